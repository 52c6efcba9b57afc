"""What a preset fixes; the planner decides the rest. The files are in `plans/`, installed as nnunet_csm.presets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from nnunet_csm.errors import UserError
from nnunet_csm.inheritance import read_inherited, shipped_names
from nnunet_csm.plans import Masking, Reconstruction, Size, from_dict

FOLDER = files("nnunet_csm.presets")


@dataclass(frozen=True)
class PresetNetwork:
    width: int
    depth: int
    num_heads: int
    features: int
    drop_path: float
    joint_tokens: bool = False
    decoder: Literal["unetr", "light"] = "unetr"
    stem: Literal["full", "gated", "none"] = "full"
    fusion: Literal["mean", "projected"] = "mean"


@dataclass(frozen=True)
class PresetSchedule:
    """As `plans.Schedule`, but for its length: see `schedules.num_crops`; null is no limit."""

    num_crops: int | None
    passes: int | None
    min_steps: int
    iterations_per_epoch: int
    val_iterations_per_epoch: int
    batch_size: int
    learning_rate: float
    warmup: float
    weight_decay: float
    betas: tuple[float, float]
    layer_decay: float


@dataclass(frozen=True)
class PresetClassification:
    """As `plans.Classification`; a patch size that is null is left to the planner."""

    patch_size: Size | None
    margin: float
    pooling: Literal["attentive", "mean"]
    freeze_encoder: bool
    label_smoothing: float
    class_weights: bool
    encoder: str
    schedule: PresetSchedule


@dataclass(frozen=True)
class Preset:
    """Sizes that are null are left to the planner.

    `series`: those of the dataset this preset was made for, or null. `token_edge`: of a token where spacing is finest.
    `pretraining_grid`: tokens of a patch in pretraining, when it is not to be the patch of fine-tuning. The last fields, from
    `encoder` on, are those of `plans.Finetuning`.
    """

    description: str
    series: tuple[str, ...] | None
    network: PresetNetwork
    token_edge: int
    patch_size: Size | None
    pretraining_grid: Size | None
    token_size: Size | None
    max_patch_voxels: int
    masking: Masking
    reconstruction: Reconstruction
    pretraining: PresetSchedule
    finetuning: PresetSchedule
    classification: PresetClassification
    encoder: str
    mirroring: bool
    frozen_share: float = 0.0
    stem_closed_share: float = 0.0
    transferred_blocks: int | None = None
    ema: float = 0.0
    series_dropout: float = 0.0


def preset_names() -> list[str]:
    """Presets that come with the package."""
    return shipped_names(FOLDER)


def read_preset(name: str) -> Preset:
    """A shipped preset by name, or a preset file by path."""
    preset = from_dict(Preset, read_inherited("preset", name, FOLDER, merged, ["auto", "paper"]), f"preset {name}")
    lengths = {
        "pretraining": preset.pretraining,
        "finetuning": preset.finetuning,
        "classification": preset.classification.schedule,
    }
    for stage, length in lengths.items():
        if length.num_crops is None and length.passes is None:
            raise UserError(f"preset {name}: {stage} has neither num_crops nor passes; give one of them")
    return preset


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, objects merged key by key."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def paper_preset(series: Sequence[str]) -> str:
    """The preset of the paper's dataset that has these series.

    Raises:
        UserError: none has; the message lists what there is.
    """
    known = {name: preset.series for name in preset_names() if (preset := read_preset(name)).series is not None}
    for name, names in known.items():
        if names is not None and set(names) == set(series):
            return name
    offers = "; ".join(f"{name}: {', '.join(names or ())}" for name, names in known.items())
    raise UserError(
        f"the paper has no dataset with the series {', '.join(series)} ({offers}); choose one by name with -preset, or B"
    )
