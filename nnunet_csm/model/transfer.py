"""How encoder weights enter a downstream network: every tensor accounted for, or an error."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.tokens import join, separate
from nnunet_csm.plans import Architecture, read_architecture


@dataclass(frozen=True)
class PretrainedEncoder:
    """Weights of an encoder, what they were made for, and the cases they were learned from (`dataset/case`; none known: empty).

    `architecture.series` are the rows of its series embedding; with joint tokens, the blocks of columns of its token embedding.
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
    lacking = [name for name in ("series_embedding", "embedding.weight") if name not in weights]
    if lacking:
        kind = saved["trainer_name"]
        raise UserError(
            f"{path}: a {kind} network without an encoder of ours (no {lacking[0]}); give a checkpoint of pretraining"
        )
    architecture = read_architecture(init_args["plans"], init_args["configuration"], str(path))
    # pretraining may know more series than the dataset whose plans these are
    architecture = replace(architecture, series=tuple(saved.get("series", architecture.series)))
    joint, named = architecture.joint_tokens, len(architecture.series)
    what = "embedding.weight" if joint else "series_embedding"
    found = weights[what].shape[1] / math.prod(architecture.token_size) if joint else len(weights[what])
    if found != named:
        raise UserError(f"{path}: {what} holds {found:g} series, it names {named}; the file was changed, pretrain again")
    return PretrainedEncoder(str(path), architecture, weights, tuple(saved.get("training_cases", ())))


def transfer(
    pretrained: PretrainedEncoder, encoder: Encoder, architecture: Architecture, num_blocks: int | None = None
) -> list[Transferred]:
    """Load pretrained weights into the encoder of a downstream network.

    Series are matched by name; a series the pretraining did not have starts from the mean of those it had. With joint tokens
    they are blocks of columns of the token embedding: those of series that are not used are left out, as if the series were
    absent, and a series the pretraining did not have is an error.

    Args:
        pretrained: source weights.
        encoder: changed in place, and only when everything fits.
        architecture: what `encoder` was built from.
        num_blocks: load the embeddings and this many blocks from the input on, and the last norm only with all of them; the
            rest stays as it is. None: all.

    Returns:
        One row per tensor of `encoder`.

    Raises:
        UserError: another token size or network, joint tokens on one side only, a series without columns, or a tensor without
            a partner on either side.
    """
    source, target = pretrained.architecture, architecture
    for field in ("token_size", "width", "depth", "num_heads"):
        found, expected = getattr(source, field), getattr(target, field)
        if found != expected:
            raise UserError(
                f"{pretrained.source}: {field} is {found}, expected {expected} as in the plans of this run; "
                f"pretrain with these plans, or plan with the same preset and token size"
            )
    if source.joint_tokens != target.joint_tokens:
        raise UserError(
            f"{pretrained.source}: joint_tokens is {source.joint_tokens}, expected {target.joint_tokens} as in the plans of this "
            f"run; pretrain with these plans, or fine-tune with those that it was pretrained with"
        )
    weights, rows = dict(pretrained.weights), []
    by_series = "embedding.weight" if target.joint_tokens else "series_embedding"
    if target.joint_tokens:
        lacking = [name for name in target.series if name not in source.series]
        if lacking:
            raise UserError(
                f"{pretrained.source}: its joint tokens hold {', '.join(source.series)}, this run also needs "
                f"{', '.join(lacking)}; plan with -series {' '.join(source.series)}, or pretrain on all of them"
            )
        weights[by_series], series_rows = columns_by_series_name(weights[by_series], source.series, target.series)
    else:
        weights[by_series], series_rows = by_series_name(weights[by_series], source.series, target.series)
    state = encoder.state_dict()
    wrong = [
        k for k in sorted(set(state) | set(weights)) if k not in state or k not in weights or state[k].shape != weights[k].shape
    ]
    if wrong:
        raise UserError(
            f"{pretrained.source}: tensors without an equal partner: {', '.join(wrong[:5])}; was it written by another version?"
        )
    kept = set() if num_blocks is None else {name for name in state if beyond(name, num_blocks, target.depth)}
    encoder.load_state_dict({name: state[name] if name in kept else tensor for name, tensor in weights.items()})
    for name, tensor in state.items():
        how = "not transferred, starts as drawn" if name in kept else "loaded"
        rows += series_rows if name == by_series else [Transferred(name, tuple(tensor.shape), how)]
    return rows


def beyond(name: str, num_blocks: int, depth: int) -> bool:
    """Whether a tensor of an encoder comes after its first blocks; the last norm belongs to the last block."""
    room, *rest = name.split(".")
    return int(rest[0]) >= num_blocks if room == "blocks" else room == "norm" and num_blocks < depth


def by_series_name(embedding: Tensor, source: Sequence[str], target: Sequence[str]) -> tuple[Tensor, list[Transferred]]:
    """Rows of a per-series tensor (s, e) in another order, or for other series."""
    rows, report = [], []
    for name in target:
        known = name in source
        rows.append(embedding[source.index(name)] if known else embedding.mean(0))
        how = f"by name, from {name}" if known else f"new series: mean of {', '.join(source)}"
        report.append(Transferred(f"series_embedding[{name}]", tuple(rows[-1].shape), how))
    return torch.stack(rows), report


def columns_by_series_name(weight: Tensor, source: Sequence[str], target: Sequence[str]) -> tuple[Tensor, list[Transferred]]:
    """Columns of an embedding of joint tokens (e, s v) in another order, or for a part of the series."""
    # a row is laid out as a joint token is
    separated = separate(weight[:, None, None], len(source))[:, [source.index(name) for name in target]]
    shape = (len(weight), separated.shape[-1])
    report = [Transferred(f"embedding.weight[{name}]", shape, f"by name, from {name}") for name in target]
    return join(separated)[:, 0, 0], report


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
