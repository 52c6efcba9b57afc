"""CSM plans from nnU-Net's plans and the fingerprint: every decision with its reason."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_csm.data.diagnoses import told_order
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import check_encoder, encoder_class
from nnunet_csm.planning.facts import Decision, Facts, Wishes
from nnunet_csm.planning.presets import Preset, paper_preset
from nnunet_csm.planning.schedules import length_text, schedule, schedule_reason
from nnunet_csm.planning.sizes import (
    as_text,
)
from nnunet_csm.planning.sizing import MemoryModel, Sized, sized_for
from nnunet_csm.plans import (
    NETWORK_CLASS,
    VERSION,
    Classification,
    Finetuning,
    Recipe,
    Schedule,
    Source,
    parse_configuration,
)
from nnunet_csm.pretext import memory
from nnunet_csm.pretext.cost import CPU_PRESET
from nnunet_csm.schema import Size, to_dict

# what "auto" chooses from, the first that fits
AUTOMATIC = ("B", "S")
# docs/experiments.md, E10 and E15
WHY_CPU = (
    "no CUDA device was found. Its recipe gained, with 4 labelled patients, 4.4 points of Dice on gliomas (in larger "
    "patches) and 6.4 on hearts; -preset B, or -gpu_memory_target, plans for a GPU elsewhere"
)
CLASSES_FILE = "classification.csv"


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
    sized_by = partial(sized_for, entry, facts, wishes, sources, series, channels, predict)
    name, why_network = choose_network(wishes, series, sized_by)
    sized = sized_by(name)
    preset, trainings = sized.preset, schedules(sized, facts)
    classification, why_classification = plan_classification(preset, facts, sized, entry["spacing"])
    decisions = [
        Decision("series", f"{len(series)}: {', '.join(series)}", why_series),
        *source_decisions(sources, base_plans["dataset_name"], sized.setup.architecture.series),
        *sized.decisions,
        network_decision(sized, name, why_network),
        *(Decision(*line) for line in sized.pretext.described(sized.setup, facts.num_present)),
        *trainings.decisions,
        *knob_decisions(preset, len(series)),
        *([Decision("classes", ", ".join(facts.classes), told_order(facts.classes))] if facts.classes else []),
        Decision("classification", length_text(classification.schedule), why_classification),
        prediction_decision(preset, name),
        Decision("preprocessed data", entry["data_identifier"], facts.data_note),
    ]
    csm = Recipe(
        version=VERSION,
        preset=name,
        seed=12345,
        sources=sources,
        pretraining_patch_size=sized.setup.patch_size,
        pretext=preset.pretext,
        pretraining=trainings.pretraining,
        finetuning_schedule=trainings.finetuning,
        finetuning=Finetuning(**{field.name: getattr(preset, field.name) for field in dataclasses.fields(Finetuning)}),
        classification=classification,
        reasons={d.name: (d.value, d.reason) for d in decisions},
    )
    entry |= {
        "patch_size": list(sized.patch_size),
        "batch_size": trainings.finetuning.batch_size,
        "architecture": {
            "network_class_name": NETWORK_CLASS,
            "arch_kwargs": to_dict(sized.architecture),
            "_kw_requires_import": [],
        },
        "csm": to_dict(csm),
    }
    for source in entry["csm"]["sources"]:
        # so that plans without weights, and runs that are known by them, are those of before there were any
        if source["weight"] == 1.0:
            del source["weight"]
    check_encoder(parse_configuration(entry, plans_name), plans_name)
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


def choose_network(wishes: Wishes, series: Sequence[str], sized_by: Callable[[str], Sized]) -> tuple[str, str]:
    """The preset asked for; "paper" by the series; "auto" the largest that memory allows, or that for CPUs."""
    if wishes.preset == "paper":
        return paper_preset(series), ""
    if wishes.preset != "auto":
        return wishes.preset, ""
    if wishes.gpu_memory_target is None:
        return (AUTOMATIC[0], "; the default") if wishes.device == "cuda" else (CPU_PRESET, f"; {WHY_CPU}")
    for name in AUTOMATIC:
        if not sized_by(name).squeezed:
            return name, f"; the largest of {', '.join(AUTOMATIC)} that fits into {wishes.gpu_memory_target:g} GiB"
    return AUTOMATIC[-1], f"; the smallest of {', '.join(AUTOMATIC)}"


def source_decisions(sources: Sequence[Source], dataset: str, union: Sequence[str]) -> list[Decision]:
    """What pretraining draws on, where that is not the dataset alone."""
    if len(sources) == 1 and sources[0].dataset == dataset:
        return []
    drawn = ", ".join(f"{s.dataset}/{s.subset}" + (f", weight {s.weight:g}" if s.weight != 1.0 else "") for s in sources)
    return [Decision("pretraining draws on", drawn, f"every subject with the series it has, of {', '.join(union)}")]


def network_decision(sized: Sized, name: str, why: str) -> Decision:
    """The network of a preset."""
    n = sized.architecture
    decoder = f"UNETR features {n.features}" if n.decoder == "unetr" else f"decoder {n.decoder}"
    text = f"{encoder_class(n).told(n)}; {decoder}"
    return Decision("network", text, f"preset {name}: {sized.preset.description}{why}")


@dataclass(frozen=True)
class Trainings:
    """How long both trainings are."""

    pretraining: Schedule
    finetuning: Schedule
    decisions: tuple[Decision, ...]


def schedules(sized: Sized, facts: Facts) -> Trainings:
    """The lengths of both trainings and why."""
    found, decisions = [], []
    for stage, wanted, batch_size, num_cases in (
        ("pretraining", sized.preset.pretraining, sized.pretraining_batch, facts.num_pretraining_cases),
        ("fine-tuning", sized.preset.finetuning, sized.finetuning_batch, facts.num_cases),
    ):
        found.append(schedule(wanted, batch_size, num_cases))
        decisions.append(Decision(stage, length_text(found[-1]), schedule_reason(found[-1], wanted, num_cases)))
    return Trainings(found[0], found[1], tuple(decisions))


def prediction_decision(preset: Preset, name: str) -> Decision:
    """Whether predictions are averaged over flips."""
    mirrored = "mirrored test-time augmentation as nnU-Net" if preset.mirroring else "no mirroring: 8 times faster prediction"
    return Decision("prediction", mirrored, f"preset {name}")


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
        epochs = "" if preset.series_dropout_epochs == "all" else " of every second epoch"
        value = f"one or more, in {preset.series_dropout:.0%} of the training samples{epochs}"
        told.append(Decision("series dropped", value, "the segmenter is to do without any; docs/planning.md"))
    if preset.masked_loss_weight:
        value = f"beside that of the segmentation, weight {preset.masked_loss_weight:g}"
        told.append(Decision("loss of the pretext", value, "the encoder is to keep what it learned; docs/planning.md"))
    return told


def plan_classification(preset: Preset, facts: Facts, sized: Sized, spacing: Sequence[float]) -> tuple[Classification, str]:
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
    scale: Literal["each"] | float = "each"
    if chosen.scale == "one":
        scale = one_scale(facts, chosen.margin, patch, spacing)
        why += f"; all are made smaller by {scale:.3g}, so that all but the largest masks fit, and larger ones look larger"
    values = {name: value for name, value in vars(chosen).items() if name not in ("patch_size", "schedule", "scale")}
    what = f"patch {as_text(patch)}: {why}; {schedule_reason(length, chosen.schedule, num_samples)}"
    return Classification(patch_size=patch, schedule=length, scale=scale, **values), f"needs {CLASSES_FILE}; {what}"


def one_scale(facts: Facts, margin: float, patch: Size, spacing: Sequence[float]) -> float:
    """The factor at which all but the largest masks fit the patch with their margin; 1, as they are, where they do so anyway.

    Raises:
        UserError: no mask was measured.
    """
    if facts.large_mask_mm is None:
        raise UserError(
            f"classification.scale is 'one', which is planned from masks, and none was measured: expected {CLASSES_FILE} and "
            f"masks in the raw dataset; put them there, or set it to 'each'"
        )
    lengths = zip(facts.large_mask_mm, spacing, patch, strict=True)
    return max(1.0, *(extent * (1 + 2 * margin) / step / edge for extent, step, edge in lengths))
