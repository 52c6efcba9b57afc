"""What a preset fixes; the planner decides the rest. The files are in `plans/`, installed as nnunet_csm.presets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import partial
from importlib.resources import files
from typing import Any, Literal, get_type_hints

from nnunet_csm.errors import UserError
from nnunet_csm.inheritance import read_inherited, shipped_names
from nnunet_csm.plans import Architecture, ClassifierSettings, Finetuning, Optimization, parse_architecture
from nnunet_csm.pretext.base import pretext_class, read_pretext
from nnunet_csm.schema import Count, Edge, Index, Size, from_dict

FOLDER = files("nnunet_csm.presets")


@dataclass(frozen=True)
class PresetSchedule(Optimization):
    """An optimisation whose length follows from the data: see `schedules.num_crops`; null is no limit.

    Attributes:
        iterations_per_epoch: steps between two validations.
        val_iterations_per_epoch: batches of a validation.
        batch_size: of all ranks together.
        learning_rate: the highest, for a batch of this size.
        warmup: share of the steps in which the learning rate rises, before its cosine to 0.
        weight_decay: AdamW's; never on biases, norms and embeddings of series.
        betas: AdamW's.
        layer_decay: factor on the learning rate from a block of the encoder to the one before it; 1: all alike.
        num_crops: the most patches to learn from; of a classifier, cases or lesions.
        passes: over the training cases; null: as many as num_crops makes.
        min_steps: the fewest steps, whatever the passes.
    """

    num_crops: Count | None
    passes: Count | None
    min_steps: Index


@dataclass(frozen=True, kw_only=True)
class PresetClassification(ClassifierSettings):
    """A classifier; a patch size that is null is left to the planner, and so is the factor that `scale` "one" asks for.

    Attributes:
        patch_size: around the mask, a multiple of the token size.
        schedule: in samples (cases or lesions) for crops.
        scale: a mask that is too large for the patch is made smaller by a factor of its own, or all masks by one.
    """

    patch_size: Size | None
    schedule: PresetSchedule
    scale: Literal["each", "one"] = "each"


@dataclass(frozen=True, kw_only=True)
class Preset(Finetuning):
    """What the planner starts from, beside the fields of `plans.Finetuning`; sizes that are null are left to it.

    Attributes:
        description: a line about it.
        series: those of the dataset this preset was made for, or null.
        network: fields of `plans.Architecture`, without those that follow from the dataset.
        token_edge: of a token where spacing is finest, in voxels.
        patch_size: of fine-tuning, in voxels along (z, y, x).
        token_size: in voxels along (z, y, x).
        max_patch_voxels: the most voxels of a planned patch.
        pretraining_grid: tokens of a patch in pretraining, when it is not to be the patch of fine-tuning.
        pretext: what pretraining learns from, by name, with its settings.
        pretraining: its schedule.
        finetuning: schedule of a segmenter.
        classification: a classifier and its schedule.
    """

    description: str
    series: tuple[str, ...] | None
    network: dict[str, Any]
    token_edge: Edge
    patch_size: Size | None
    pretraining_grid: Size | None
    token_size: Size | None
    max_patch_voxels: Count
    pretext: dict[str, Any]
    pretraining: PresetSchedule
    finetuning: PresetSchedule
    classification: PresetClassification

    def architecture(
        self, series: Sequence[str], channels: Sequence[int], token_size: Size, where: str = "preset"
    ) -> Architecture:
        """The network for some series."""
        of_dataset = {"series": series, "channels": channels, "token_size": token_size}
        return parse_architecture(self.network | of_dataset, f"{where}: network")


# what stood at the top of preset files before it stood in `pretext`
MOVED = frozenset({"masking", "reconstruction"})


def preset_names() -> list[str]:
    """Presets that come with the package."""
    return shipped_names(FOLDER)


def read_preset(name: str) -> Preset:
    """A shipped preset by name, or a preset file by path."""
    content = read_inherited("preset", name, FOLDER, partial(put_over, where=f"preset {name}: "), ["auto", "paper"])
    if moved := sorted(MOVED & content.keys()):
        print(f'preset {name}: {", ".join(moved)} are read as parts of "pretext", where they belong now')
        content = merged(content, {"pretext": {key: content.pop(key) for key in moved}})
    preset = from_dict(Preset, content, f"preset {name}")
    read_pretext(preset.pretext, preset.architecture(("T1w",), (0,), (16, 16, 16), f"preset {name}"), f"preset {name}: pretext")
    lengths = {
        "pretraining": preset.pretraining,
        "finetuning": preset.finetuning,
        "classification": preset.classification.schedule,
    }
    for stage, length in lengths.items():
        if length.num_crops is None and length.passes is None:
            raise UserError(f"preset {name}: {stage} has neither num_crops nor passes; give one of them")
    return preset


def method_of(name: str) -> dict[str, Any]:
    """What a preset changes about the one that it inherits from in the end: the method, whatever the size.

    Raises:
        UserError: no such preset.
    """
    content = read_inherited("preset", name, FOLDER, partial(merged, where=f"preset {name}: "), root=False)
    return {key: value for key, value in content.items() if key not in ("description", "series")}


def put_over(base: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`merged`; what `base` says of itself, such as a length that gained, is not said of a preset that changes it."""
    told = {"description": f"changed from: {base['description']}"} if "description" in base else {}
    return merged({**base, **told}, changes, where)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """`base` with `changes`, objects merged key by key; another pretext takes over what it knows of the settings of the first.

    Raises:
        UserError: no such pretext; `where` is what the message names.
    """
    result = dict(base)
    for key, value in changes.items():
        there = result.get(key)
        if not (isinstance(value, Mapping) and isinstance(there, Mapping)):
            result[key] = value
            continue
        name = value.get("name")
        # what is no name at all is refused when the outcome is read
        if key == "pretext" and isinstance(name, str) and name != there.get("name"):
            there = {"name": name, **known_to(pretext_class(name, f"{where}pretext").Settings, there)}
        result[key] = merged(there, value)
    return result


def known_to(settings: type, block: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an object that a dataclass has fields for."""
    hints = get_type_hints(settings)
    return {
        key: known_to(hints[key], value) if is_dataclass(hints[key]) and isinstance(value, Mapping) else value
        for key, value in block.items()
        if key in hints
    }


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
