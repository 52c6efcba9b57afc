"""How encoder weights enter a downstream network: every tensor accounted for, or an error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import Encoder, Transferred, encoder_class
from nnunet_csm.plans import Architecture, read_architecture

# settings of an encoder that do not matter any more once there are weights
HOW_WEIGHTS_BEGAN = frozenset({"series_embedding_std", "query_key_gain"})


@dataclass(frozen=True)
class PretrainedEncoder:
    """Weights of an encoder, what they were made for, and the cases they were learned from (`dataset/case`; none known: empty).

    `architecture.series` are those it was made for, in the order of its weights.
    """

    source: str
    architecture: Architecture
    weights: Mapping[str, Tensor]
    training_cases: tuple[str, ...] = ()


def read_encoder(path: str) -> PretrainedEncoder:
    """The encoder in a checkpoint of one of our trainers.

    Raises:
        UserError: not a checkpoint, or one without an encoder of ours.
    """
    return encoder_in(checkpoint.load(path), path)


def encoder_in(saved: Mapping[str, Any], path: str) -> PretrainedEncoder:
    """Do as `read_encoder`, for what `checkpoint.load` has read."""
    weights = {k.removeprefix("encoder."): v for k, v in saved["network_weights"].items() if k.startswith("encoder.")}
    init_args: dict[str, Any] = saved["init_args"]
    without = f"{path}: a {saved['trainer_name']} network without an encoder of ours"
    if not weights:
        raise UserError(f"{without}; give a checkpoint of pretraining")
    try:
        architecture = read_architecture(init_args["plans"], init_args["configuration"], str(path))
    except UserError as error:
        raise UserError(f"{without} ({error}); give a checkpoint of pretraining") from None
    # pretraining may know more series than the dataset whose plans these are
    architecture = replace(architecture, series=tuple(saved.get("series", architecture.series)))
    named = len(architecture.series)
    try:
        found = encoder_class(architecture).num_series_in(weights, architecture)
    except KeyError as error:
        raise UserError(f"{path}: its encoder has no {error}; was it written by another version? Pretrain again") from None
    if found != named:
        raise UserError(f"{path}: the encoder holds {found:g} series, it names {named}; the file was changed, pretrain again")
    return PretrainedEncoder(str(path), architecture, weights, tuple(saved.get("training_cases", ())))


def transfer(
    pretrained: PretrainedEncoder, encoder: Encoder, architecture: Architecture, num_blocks: int | None = None
) -> list[Transferred]:
    """Load pretrained weights into the encoder of a downstream network.

    Series are matched by name, see `Encoder.carried`.

    Args:
        pretrained: source weights.
        encoder: changed in place, and only when everything fits.
        architecture: what `encoder` was built from.
        num_blocks: load the embeddings and this many blocks from the input on, and the last norm only with all of them; the
            rest stays as it is. None: all.

    Returns:
        One row per tensor of `encoder`.

    Raises:
        UserError: another token size or network, weights that cannot do for these series, or a tensor without a partner on
            either side.
    """
    source, target = pretrained.architecture, architecture
    for field in ("token_size", "width", "depth", "num_heads"):
        found, expected = getattr(source, field), getattr(target, field)
        if found != expected:
            raise UserError(
                f"{pretrained.source}: {field} is {found}, expected {expected} as in the plans of this run; "
                f"pretrain with these plans, or plan with the same preset and token size"
            )
    mine, theirs = vars(target.encoder), vars(source.encoder)
    different = [name for name in mine if name not in HOW_WEIGHTS_BEGAN and mine[name] != theirs[name]]
    if different:
        name = different[0]
        raise UserError(
            f"{pretrained.source}: encoder.{name} is {theirs[name]}, expected {mine[name]} as in the plans of this run; pretrain "
            f"with these plans, or fine-tune with those that it was pretrained with"
        )
    weights, by_name = encoder_class(target).carried(pretrained.weights, source, target, pretrained.source)
    state = encoder.state_dict()
    wrong = [
        k for k in sorted(set(state) | set(weights)) if k not in state or k not in weights or state[k].shape != weights[k].shape
    ]
    if wrong:
        raise UserError(
            f"{pretrained.source}: tensors without an equal partner: {', '.join(wrong[:5])}; was it written by another version?"
        )
    kept = set() if num_blocks is None else beyond(encoder, num_blocks)
    encoder.load_state_dict({name: state[name] if name in kept else tensor for name, tensor in weights.items()})
    named = {row.name.split("[")[0] for row in by_name}
    rows = list(by_name)
    for name, tensor in state.items():
        how = "not transferred, starts as drawn" if name in kept else "loaded"
        rows += [] if name in named else [Transferred(name, tuple(tensor.shape), how)]
    return rows


def beyond(encoder: Encoder, num_blocks: int) -> set[str]:
    """Names of the parameters after the first blocks of an encoder; what belongs to no stage belongs to the last."""
    stages = encoder.stages()
    loaded = {id(parameter) for stage in stages[: num_blocks + 1] for parameter in stage}
    return {
        name for name, parameter in encoder.named_parameters() if num_blocks < len(stages) - 1 and id(parameter) not in loaded
    }


def as_table(rows: Sequence[Transferred]) -> str:
    """The rows as text; tensors of a block share a line."""
    lines: dict[str, list[Transferred]] = {}
    for row in rows:
        room, *rest = row.name.split(".")
        prefix = f"{room}.{rest[0]}" if len(rest) > 1 and rest[0].isdigit() else row.name
        lines.setdefault(prefix, []).append(row)
    table = []
    for prefix, group in lines.items():
        shape = " x ".join(map(str, group[0].shape)) if len(group) == 1 else f"{len(group)} tensors"
        table.append(f"  {prefix:<28} {shape:<16} {group[0].how}")
    return "\n".join(table)
