"""CSM plans from nnU-Net's plans and the fingerprint: every decision with its reason."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import encoder_class
from nnunet_csm.planning.presets import Preset, paper_preset, read_preset
from nnunet_csm.planning.schedules import length_text, schedule, schedule_reason
from nnunet_csm.planning.sizes import (
    as_text,
    choose_finetuning_batch,
    choose_patch_size,
    choose_pretraining_batch,
    choose_pretraining_patch,
    choose_token_size,
    squeeze,
)
from nnunet_csm.plans import (
    NETWORK_CLASS,
    VERSION,
    Architecture,
    Classification,
    Finetuning,
    Recipe,
    Source,
    parse_configuration,
)
from nnunet_csm.pretext import memory
from nnunet_csm.pretext.base import Pretext, Setup, read_pretext
from nnunet_csm.pretext.memory import CUDA_CONTEXT, GIB, Memory
from nnunet_csm.schema import Size, to_dict

# what "auto" chooses from, the first that fits; and how small a pretraining batch still counts as fitting
AUTOMATIC, MIN_PRETRAINING_BATCH = ("B", "S"), 16
CLASSES_FILE = "classification.csv"


@dataclass(frozen=True)
class Facts:
    """What is known of a dataset beside nnU-Net's plans.

    Attributes:
        channels: series name to its channel, of all series of the dataset.
        num_cases: training cases.
        num_classes: output channels of a segmenter.
        num_with_series: series name to the number of training cases that have it.
        num_present: a number of series to the number of training cases that have that many.
        sources: what pretraining draws on, restricted to the series it is to see.
        num_pretraining_cases: cases of all sources.
        data_note: said of the preprocessed data.
        num_samples: cases or lesions with a class; 0 when there is no class.
        mask_extent_mm: (z, y, x) that three quarters of their masks do not exceed; None when there is none.
    """

    channels: dict[str, int]
    num_cases: int
    num_classes: int
    num_with_series: dict[str, int]
    num_present: dict[int, int]
    sources: tuple[Source, ...]
    num_pretraining_cases: int
    data_note: str = "as nnU-Net preprocesses it"
    num_samples: int = 0
    mask_extent_mm: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Wishes:
    """What the user decides.

    Attributes:
        preset: a preset, "auto", or "paper".
        patch_size: instead of the planner's.
        token_size: instead of the planner's.
        series: a part of the dataset's.
        gpu_memory_target: GiB that both trainings have to fit into.
        why: said of the sizes given here.
    """

    preset: str = "auto"
    patch_size: Size | None = None
    token_size: Size | None = None
    series: tuple[str, ...] | None = None
    gpu_memory_target: float | None = None
    why: str = "by hand"


class MemoryModel(Protocol):
    """What predicts the GPU memory that a training takes: `pretext/memory.py`, or a stand-in."""

    def pretraining_memory(self, pretext: type[Pretext], setup: Setup, batch_size: int) -> Memory: ...

    def finetuning_memory(
        self, architecture: Architecture, num_classes: int, patch_size: Size, batch_size: int, num_channels: int | None
    ) -> Memory: ...


@dataclass(frozen=True)
class Decision:
    name: str
    value: str
    reason: str


def plan(
    base_plans: Mapping[str, Any],
    configuration: str,
    facts: Facts,
    plans_name: str,
    wishes: Wishes,
    predict: MemoryModel = memory,
) -> tuple[dict[str, Any], list[Decision]]:
    """Make CSM plans.

    Args:
        base_plans: nnU-Net's plans of the dataset; its preprocessed data is used as it is.
        configuration: the configuration of them to build on, a 3-D one.
        facts: of the fingerprint.
        plans_name: name of the new plans.
        wishes: of the user.
        predict: GPU memory of a training.

    Returns:
        The plans, with one configuration, and the decisions in them.

    Raises:
        UserError: a configuration that cannot be built on, or wishes that do not fit it or each other.
    """
    entry = base_configuration(base_plans, configuration, f"plans {base_plans['plans_name']}")
    for flag, size in (("-overwrite_patch_size", wishes.patch_size), ("-overwrite_token_size", wishes.token_size)):
        if size is not None and min(size) < 1:
            raise UserError(f"{flag} {as_text(size)}: expected three numbers above 0")
    series, why_series = choose_series(facts, wishes.series)
    sources = facts.sources
    channels = tuple(facts.channels[name] for name in series)
    sized_by = partial(_sized, entry, facts, wishes, sources, series, channels, predict)
    name, why_network = choose_network(wishes, series, sized_by)
    sized = sized_by(name)
    preset, decisions = sized.preset, [Decision("series", f"{len(series)}: {', '.join(series)}", why_series)]
    if len(sources) > 1 or sources[0].dataset != base_plans["dataset_name"]:
        union = sized.setup.architecture.series
        drawn = ", ".join(f"{s.dataset}/{s.subset}" for s in sources)
        decisions.append(Decision("pretraining draws on", drawn, f"every subject with the series it has, of {', '.join(union)}"))
    decisions += sized.decisions
    n = sized.architecture
    decoder = f"UNETR features {n.features}" if n.decoder == "unetr" else "light decoder"
    text = f"{n.width} wide, {n.depth} deep, {n.num_heads} heads; {decoder}"
    decisions.append(Decision("network", text, f"preset {name}: {preset.description}{why_network}"))
    decisions += [Decision(*line) for line in sized.pretext.described(sized.setup, facts.num_present)]
    pretraining = schedule(preset.pretraining, sized.pretraining_batch, facts.num_pretraining_cases)
    finetuning = schedule(preset.finetuning, sized.finetuning_batch, facts.num_cases)
    for stage, chosen, wanted, num_cases in (
        ("pretraining", pretraining, preset.pretraining, facts.num_pretraining_cases),
        ("fine-tuning", finetuning, preset.finetuning, facts.num_cases),
    ):
        decisions.append(Decision(stage, length_text(chosen), schedule_reason(chosen, wanted, num_cases)))
    decisions += knob_decisions(preset, len(series))
    classification, why_classification = plan_classification(preset, facts, sized, entry["spacing"])
    decisions.append(Decision("classification", length_text(classification.schedule), why_classification))
    mirrored = "mirrored test-time augmentation as nnU-Net" if preset.mirroring else "no mirroring: 8 times faster prediction"
    decisions.append(Decision("prediction", mirrored, f"preset {name}"))
    why_data = facts.data_note
    decisions.append(Decision("preprocessed data", entry["data_identifier"], why_data))

    csm = Recipe(
        version=VERSION,
        preset=name,
        seed=12345,
        sources=sources,
        pretraining_patch_size=sized.setup.patch_size,
        pretext=preset.pretext,
        pretraining=pretraining,
        finetuning_schedule=finetuning,
        finetuning=Finetuning(**{field.name: getattr(preset, field.name) for field in dataclasses.fields(Finetuning)}),
        classification=classification,
        reasons={d.name: (d.value, d.reason) for d in decisions},
    )
    entry |= {
        "patch_size": list(sized.patch_size),
        "batch_size": finetuning.batch_size,
        "architecture": {
            "network_class_name": NETWORK_CLASS,
            "arch_kwargs": to_dict(sized.architecture),
            "_kw_requires_import": [],
        },
        "csm": to_dict(csm),
    }
    parse_configuration(entry, plans_name)
    plans = {**deepcopy(dict(base_plans)), "plans_name": plans_name, "configurations": {configuration: entry}}
    return plans, decisions


def base_configuration(base_plans: Mapping[str, Any], configuration: str, source: str) -> dict[str, Any]:
    """A configuration of nnU-Net's plans with its inheritance resolved."""
    names = [c for c in base_plans["configurations"] if c.startswith("3d")]
    if configuration not in names:
        raise UserError(
            f"{source}: no 3-D configuration {configuration!r}, there are {', '.join(names) or 'none'}; choose with -c"
        )
    entry = deepcopy(PlansManager(dict(base_plans)).get_configuration(configuration).configuration)
    if entry.get("previous_stage") is not None:
        raise UserError(f"{source}: {configuration} is the second stage of a cascade; plan for 3d_fullres or 3d_lowres")
    # both name configurations that CSM plans do not have
    return {key: value for key, value in entry.items() if key not in ("inherits_from", "next_stage")}


def choose_series(facts: Facts, wanted: Sequence[str] | None) -> tuple[tuple[str, ...], str]:
    """All series that some training case has, in the order of the channels, or those asked for."""
    if wanted is not None:
        unknown = [name for name in wanted if name not in facts.channels]
        if unknown or len(set(wanted)) != len(wanted):
            raise UserError(f"-series {' '.join(wanted)}: expected some of {' '.join(facts.channels)}, each once")
        return tuple(name for name in facts.channels if name in wanted), "by hand; the other channels are not used"
    series = tuple(name for name in facts.channels if facts.num_with_series.get(name, 0))
    if not series:
        raise UserError("no training case has any series: all volumes are empty or constant; see `nnunet_csm fingerprint`")
    why = "channel names of the dataset, in its order"
    never = [name for name in facts.channels if name not in series]
    incomplete = [f"{n} have {name}" for name in series if (n := facts.num_with_series[name]) < facts.num_cases]
    if incomplete:
        why += f"; of {facts.num_cases} cases {', '.join(incomplete)}"
    return series, why + (f"; no case has {', '.join(never)}" if never else "")


@dataclass(frozen=True)
class _Sized:
    """Sizes for one preset, the decisions that led to them, and whether memory cut them short."""

    preset: Preset
    architecture: Architecture
    pretext: type[Pretext]
    setup: Setup
    patch_size: Size
    pretraining_batch: int
    finetuning_batch: int
    decisions: tuple[Decision, ...]
    squeezed: bool


def _sized(
    entry: Mapping[str, Any],
    facts: Facts,
    wishes: Wishes,
    sources: Sequence[Source],
    series: tuple[str, ...],
    channels: tuple[int, ...],
    predict: MemoryModel,
    preset_name: str,
) -> _Sized:
    preset = read_preset(preset_name)
    shape, spacing = [max(1, round(n)) for n in entry["median_image_size_in_voxels"]], entry["spacing"]
    target = None if wishes.gpu_memory_target is None else wishes.gpu_memory_target * GIB - CUDA_CONTEXT
    token, why_token = choose_token_size(preset, shape, spacing)
    if wishes.token_size is not None:
        token, why_token = wishes.token_size, wishes.why
    architecture = preset.architecture(series, channels, token, f"preset {preset_name}")
    union = tuple(dict.fromkeys(name for source in sources for name in source.channels))
    pretraining_architecture = dataclasses.replace(architecture, series=union, channels=tuple(range(len(union))))

    def finetuning(patch_size: Size, batch_size: int) -> Memory:
        return predict.finetuning_memory(architecture, facts.num_classes, patch_size, batch_size, len(facts.channels))

    def pretraining(batch_size: int) -> Memory:
        return predict.pretraining_memory(pretext, setup, batch_size)

    wanted = preset.finetuning.batch_size
    # of separate tokens also when they are joint: strategies are compared on one patch
    patch, why_patch = choose_patch_size(preset, shape, spacing, token, len(union))
    squeezed = False
    if wishes.patch_size is not None:
        patch, why_patch = wishes.patch_size, wishes.why
    elif target is not None and preset.patch_size is None and finetuning(patch, wanted).total > target:
        squeezed = True
        patch = squeeze(patch, token, spacing, lambda size: finetuning(size, wanted).total <= target)
        why_patch += ", shortened to fit into memory"
    if any(p % t for p, t in zip(patch, token, strict=True)):
        raise UserError(
            f"patch_size {patch} is not a multiple of token_size {token}; choose others with -overwrite_patch_size and "
            f"-overwrite_token_size"
        )
    pretraining_patch, why_pretraining_patch = choose_pretraining_patch(preset, patch, token)
    pretext, settings = read_pretext(preset.pretext, pretraining_architecture, f"preset {preset_name}: pretext")
    setup = Setup(pretraining_architecture, settings, pretraining_patch)
    if target is None:
        pretraining_batch, why_pretraining = preset.pretraining.batch_size, "as in the preset"
        finetuning_batch, why_finetuning = wanted, "as in the preset"
    else:
        pretraining_batch, why_pretraining = choose_pretraining_batch(
            preset.pretraining.batch_size, lambda batch: pretraining(batch).total <= target
        )
        finetuning_batch, why_finetuning = choose_finetuning_batch(
            wanted, patch, shape, facts.num_cases, lambda batch: finetuning(patch, batch).total <= target
        )
    decisions = [
        Decision("token size", as_text(token), why_token),
        Decision("patch size", as_text(patch), why_patch),
        Decision("tokens", tokens_text(architecture, patch), f"{as_text(patch)} voxels / {as_text(token)}"),
        Decision("pretraining patch", as_text(pretraining_patch), why_pretraining_patch),
        Decision("batch size, pretraining", str(pretraining_batch), why_pretraining),
        Decision("batch size, fine-tuning", str(finetuning_batch), why_finetuning),
    ]
    needs = {"pretraining": pretraining(pretraining_batch), "fine-tuning": finetuning(patch, finetuning_batch)}
    decisions += memory_decisions(needs, target)
    if target is not None:
        squeezed |= max(need.total for need in needs.values()) > target
        squeezed |= pretraining_batch < min(MIN_PRETRAINING_BATCH, preset.pretraining.batch_size)
    return _Sized(
        preset,
        architecture,
        pretext,
        setup,
        patch,
        pretraining_batch,
        finetuning_batch,
        tuple(decisions),
        squeezed,
    )


def memory_decisions(needs: Mapping[str, Memory], target: float | None) -> list[Decision]:
    """What each training is predicted to take, beside what it may take in bytes."""
    decisions = []
    for stage, need in needs.items():
        why = "predicted; set a limit with -gpu_memory_target"
        if target is not None:
            kept = "within" if need.total <= target else "MORE THAN"
            why = f"predicted; {kept} the target's {target / GIB:g} GiB, the CUDA context apart"
        decisions.append(Decision(f"GPU memory, {stage}", str(need), why))
    return decisions


def tokens_text(architecture: Architecture, patch_size: Size) -> str:
    apart = encoder_class(architecture).keeps_series_apart
    of_which = " a series" if apart else f", each of all {len(architecture.series)} series"
    return f"{_num_tokens(patch_size, architecture.token_size)}{of_which}"


def _num_tokens(patch_size: Size, token_size: Size) -> int:
    return math.prod(p // t for p, t in zip(patch_size, token_size, strict=True))


def choose_network(wishes: Wishes, series: Sequence[str], sized_by: Callable[[str], _Sized]) -> tuple[str, str]:
    """The preset asked for; "paper" by the series; "auto" the largest that memory allows."""
    if wishes.preset == "paper":
        return paper_preset(series), ""
    if wishes.preset != "auto":
        return wishes.preset, ""
    if wishes.gpu_memory_target is None:
        return AUTOMATIC[0], "; the default"
    for name in AUTOMATIC:
        if not sized_by(name).squeezed:
            return name, f"; the largest of {', '.join(AUTOMATIC)} that fits into {wishes.gpu_memory_target:g} GiB"
    return AUTOMATIC[-1], f"; the smallest of {', '.join(AUTOMATIC)}"


def knob_decisions(preset: Preset, num_series: int) -> list[Decision]:
    """What fine-tuning does beyond the plain: a line for what the preset asks for, none for what it leaves out."""
    why = "as in the preset; docs/planning.md"
    told = []
    if preset.frozen_share:
        told.append(Decision("frozen encoder", f"for the first {preset.frozen_share:.0%} of fine-tuning", why))
    if preset.stem_closed_share:
        value = f"closed for the first {preset.stem_closed_share:.0%} of fine-tuning"
        told.append(Decision("stem of raw voxels", value, "the decoder is to learn to read its encoder; docs/planning.md"))
    if preset.transferred_blocks is not None:
        told.append(Decision("transferred blocks", f"the first {preset.transferred_blocks}", why))
    if preset.ema:
        told.append(Decision("weights of the segmenter", f"averaged, decay {preset.ema:g}", why))
    if preset.series_dropout and num_series == 1:
        told.append(Decision("series dropped", "none", "there is one series"))
    elif preset.series_dropout:
        value = f"one or more, in {preset.series_dropout:.0%} of the training samples"
        told.append(Decision("series dropped", value, "the segmenter is to do without any; docs/planning.md"))
    return told


def plan_classification(preset: Preset, facts: Facts, sized: _Sized, spacing: Sequence[float]) -> tuple[Classification, str]:
    """The classifier's settings, and why: its patch is to hold most masks with their margin."""
    chosen, token_size = preset.classification, sized.architecture.token_size
    num_samples = facts.num_samples or facts.num_cases
    length = schedule(chosen.schedule, chosen.schedule.batch_size, num_samples)
    if chosen.patch_size is not None:
        patch, why = chosen.patch_size, "as in the preset"
    elif facts.mask_extent_mm is None:
        patch, why = sized.patch_size, "that of segmentation, as no mask was measured"
    else:
        wanted = [e * (1 + 2 * chosen.margin) / s for e, s in zip(facts.mask_extent_mm, spacing, strict=True)]
        z, y, x = (
            max(1, min(math.ceil(w / t), p // t)) * t for w, t, p in zip(wanted, token_size, sized.patch_size, strict=True)
        )
        millimetres = " x ".join(f"{e:.0f}" for e in facts.mask_extent_mm)
        patch, why = (z, y, x), f"three quarters of the masks are within {millimetres} mm, and {chosen.margin:.0%} on each side"
    values = {name: value for name, value in vars(chosen).items() if name not in ("patch_size", "schedule")}
    what = f"patch {as_text(patch)}: {why}; {schedule_reason(length, chosen.schedule, num_samples)}"
    return Classification(patch_size=patch, schedule=length, **values), f"needs {CLASSES_FILE}; {what}"
