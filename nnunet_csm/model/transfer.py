"""How encoder weights enter a downstream network: every tensor accounted for, or an error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.plans import Architecture, read_architecture


@dataclass(frozen=True)
class PretrainedEncoder:
    """Weights of an encoder, what they were made for, and the cases they were learned from (`dataset/case`; none known: empty).

    `architecture.series` are the rows of its series embedding.
    """

    source: str
    architecture: Architecture
    weights: Mapping[str, Tensor]
    training_cases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Transferred:
    """What became of one tensor of the downstream encoder."""

    name: str
    shape: tuple[int, ...]
    how: str


def read_encoder(path: str) -> PretrainedEncoder:
    """The encoder in a checkpoint of one of our trainers.

    Raises:
        UserError: not a checkpoint, or one without an encoder of ours.
    """
    saved = checkpoint.load(path)
    weights = {k.removeprefix("encoder."): v for k, v in saved["network_weights"].items() if k.startswith("encoder.")}
    init_args: dict[str, Any] = saved["init_args"]
    if "series_embedding" not in weights:
        kind = saved["trainer_name"]
        raise UserError(
            f"{path}: a {kind} network without an encoder of ours (no series_embedding); give a checkpoint of pretraining"
        )
    architecture = read_architecture(init_args["plans"], init_args["configuration"], str(path))
    # pretraining may know more series than the dataset whose plans these are
    architecture = replace(architecture, series=tuple(saved.get("series", architecture.series)))
    found, expected = len(weights["series_embedding"]), len(architecture.series)
    if found != expected:
        raise UserError(
            f"{path}: series_embedding holds {found} series, it names {expected}; the file was changed, pretrain again"
        )
    return PretrainedEncoder(str(path), architecture, weights, tuple(saved.get("training_cases", ())))


def transfer(pretrained: PretrainedEncoder, encoder: Encoder, architecture: Architecture) -> list[Transferred]:
    """Load pretrained weights into the encoder of a downstream network.

    Series are matched by name; a series the pretraining did not have starts from the mean of those it had.

    Args:
        pretrained: source weights.
        encoder: changed in place, and only when everything fits.
        architecture: what `encoder` was built from.

    Returns:
        One row per tensor of `encoder`.

    Raises:
        UserError: another token size or network, or a tensor without a partner on either side.
    """
    source, target = pretrained.architecture, architecture
    for field in ("token_size", "width", "depth", "num_heads"):
        found, expected = getattr(source, field), getattr(target, field)
        if found != expected:
            raise UserError(
                f"{pretrained.source}: {field} is {found}, expected {expected} as in the plans of this run; "
                f"pretrain with these plans, or plan with the same preset and token size"
            )
    weights, rows = dict(pretrained.weights), []
    weights["series_embedding"], series_rows = by_series_name(weights["series_embedding"], source.series, target.series)
    state = encoder.state_dict()
    wrong = [
        k for k in sorted(set(state) | set(weights)) if k not in state or k not in weights or state[k].shape != weights[k].shape
    ]
    if wrong:
        raise UserError(
            f"{pretrained.source}: tensors without an equal partner: {', '.join(wrong[:5])}; was it written by another version?"
        )
    encoder.load_state_dict(weights)
    for name, tensor in state.items():
        rows += series_rows if name == "series_embedding" else [Transferred(name, tuple(tensor.shape), "loaded")]
    return rows


def by_series_name(embedding: Tensor, source: Sequence[str], target: Sequence[str]) -> tuple[Tensor, list[Transferred]]:
    """Rows of a per-series tensor (s, e) in another order, or for other series."""
    rows, report = [], []
    for name in target:
        known = name in source
        rows.append(embedding[source.index(name)] if known else embedding.mean(0))
        how = f"by name, from {name}" if known else f"new series: mean of {', '.join(source)}"
        report.append(Transferred(f"series_embedding[{name}]", tuple(rows[-1].shape), how))
    return torch.stack(rows), report


def as_table(rows: Sequence[Transferred]) -> str:
    """The rows as text; blocks of the ViT that were all loaded share a line."""
    lines: dict[str, list[Transferred]] = {}
    for row in rows:
        prefix = ".".join(row.name.split(".")[:2]) if row.name.startswith("blocks.") else row.name
        lines.setdefault(prefix, []).append(row)
    table = []
    for prefix, group in lines.items():
        shape = " x ".join(map(str, group[0].shape)) if len(group) == 1 else f"{len(group)} tensors"
        table.append(f"  {prefix:<28} {shape:<16} {group[0].how}")
    return "\n".join(table)
