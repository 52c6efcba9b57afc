"""From nnU-Net's plans and fingerprint to CSM plans: every decision with its reason."""

import math
import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_csm.errors import UserError
from nnunet_csm.planning.presets import Preset, PresetSchedule, paper_preset, read_preset
from nnunet_csm.plans import (
    NETWORK_CLASS,
    VERSION,
    Architecture,
    Finetuning,
    Recipe,
    Schedule,
    Size,
    parse_configuration,
    to_dict,
)
from nnunet_csm.pretext.masking import num_visible

# a shorter patch leaves a token too little context
MIN_TOKENS_PER_AXIS = 4


@dataclass(frozen=True)
class Decision:
    name: str
    value: str
    reason: str


def plan(
    base_plans: Mapping[str, Any],
    configuration: str,
    series: Sequence[str],
    num_cases: int,
    preset_name: str,
    plans_name: str,
    patch_size: Size | None = None,
    token_size: Size | None = None,
) -> tuple[dict[str, Any], list[Decision]]:
    """Make CSM plans.

    Args:
        base_plans: nnU-Net's plans of the dataset; its preprocessed data is used as it is.
        configuration: the configuration of them to build on, a 3-D one.
        series: canonical names, in the order of the dataset's channels.
        num_cases: training cases of the dataset.
        preset_name: a preset, or "paper".
        plans_name: name of the new plans.
        patch_size: by hand, instead of the planner's.
        token_size: by hand, instead of the planner's.

    Returns:
        The plans, with one configuration, and the decisions in them.

    Raises:
        UserError: a configuration that cannot be built on, or sizes by hand that do not fit.
    """
    source = f"plans {base_plans['plans_name']}"
    entry = base_configuration(base_plans, configuration, source)
    for flag, size in (("-overwrite_patch_size", patch_size), ("-overwrite_token_size", token_size)):
        if size is not None and min(size) < 1:
            raise UserError(f"{flag} {_size(size)}: expected three numbers above 0")
    name = paper_preset(series) if preset_name == "paper" else preset_name
    preset = read_preset(name)
    shape, spacing = [round(n) for n in entry["median_image_size_in_voxels"]], entry["spacing"]

    decisions = [Decision("series", f"{len(series)}: {', '.join(series)}", "channel names of the dataset, in its order")]
    token, why_token = choose_token_size(preset, shape, spacing, token_size)
    patch, why_patch = choose_patch_size(preset, shape, spacing, token, patch_size)
    num_tokens = math.prod(p // t for p, t in zip(patch, token, strict=True))
    decisions.append(Decision("token size", _size(token), why_token))
    decisions.append(Decision("patch size", _size(patch), why_patch))
    decisions.append(Decision("tokens", f"{num_tokens} a series", f"{_size(patch)} voxels / {_size(token)}"))
    pretraining_patch, why_pretraining_patch = choose_pretraining_patch(preset, patch, token)
    decisions.append(Decision("pretraining patch", _size(pretraining_patch), why_pretraining_patch))
    n = preset.network
    text = f"{n.width} wide, {n.depth} deep, {n.num_heads} heads; UNETR features {n.features}"
    decisions.append(Decision("network", text, f"preset {name}: {preset.description}"))
    num_pretraining_tokens = math.prod(p // t for p, t in zip(pretraining_patch, token, strict=True))
    decisions += mask_decisions(preset, len(series), num_pretraining_tokens)
    r = preset.reconstruction
    target = "each token by its own mean and deviation" if r.normalize_targets else "z-scored voxels"
    decisions.append(
        Decision("reconstruction", f"decoder {r.width} x {r.depth}", f"light, thrown away afterwards; target: {target}")
    )
    pretraining = schedule(preset.pretraining, num_cases)
    finetuning = schedule(preset.finetuning, num_cases)
    decisions.append(schedule_decision("pretraining", pretraining, preset.pretraining, num_cases))
    decisions.append(schedule_decision("fine-tuning", finetuning, preset.finetuning, num_cases))
    mirrored = "mirrored test-time augmentation as nnU-Net" if preset.mirroring else "no mirroring: 8 times faster prediction"
    decisions.append(Decision("prediction", mirrored, f"preset {name}"))
    decisions.append(Decision("preprocessed data", entry["data_identifier"], f"reused from {base_plans['plans_name']}, as it is"))

    architecture = Architecture(tuple(series), token, n.width, n.depth, n.num_heads, n.features, n.drop_path)
    csm = Recipe(
        version=VERSION,
        preset=name,
        seed=12345,
        pretraining_patch_size=pretraining_patch,
        masking=preset.masking,
        reconstruction=preset.reconstruction,
        pretraining=pretraining,
        finetuning_schedule=finetuning,
        finetuning=Finetuning(encoder=preset.encoder, mirroring=preset.mirroring),
        reasons={d.name: (d.value, d.reason) for d in decisions},
    )
    entry |= {
        "patch_size": list(patch),
        "batch_size": finetuning.batch_size,
        "architecture": {"network_class_name": NETWORK_CLASS, "arch_kwargs": to_dict(architecture), "_kw_requires_import": []},
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


def choose_token_size(preset: Preset, shape: Sequence[int], spacing: Sequence[float], by_hand: Size | None) -> tuple[Size, str]:
    """Cubes where spacing is near isotropic, shorter along a thick axis, and never more than a quarter of the volume."""
    if by_hand is not None:
        return by_hand, "by hand"
    if preset.token_size is not None:
        return preset.token_size, "as in the preset"
    edges = []
    for length, step in zip(shape, spacing, strict=True):
        wanted = 2 ** round(math.log2(max(1.0, preset.token_edge * min(spacing) / step)))
        fits = 2 ** int(math.log2(max(1, length // MIN_TOKENS_PER_AXIS)))
        edges.append(min(wanted, fits))
    z, y, x = edges
    millimetres = " x ".join(f"{e * s:.3g}" for e, s in zip(edges, spacing, strict=True))
    why = f"{millimetres} mm at a spacing of {' x '.join(f'{s:.3g}' for s in spacing)} mm; at most a quarter of the median shape"
    return (z, y, x), why


def choose_patch_size(
    preset: Preset, shape: Sequence[int], spacing: Sequence[float], token_size: Size, by_hand: Size | None
) -> tuple[Size, str]:
    """Near the median shape, in whole tokens; the longest axis in millimetres is shortened until the budget is kept."""
    if by_hand is not None:
        return by_hand, "by hand"
    if preset.patch_size is not None:
        return preset.patch_size, "as in the preset"
    whole = [max(1, round(length / t)) for length, t in zip(shape, token_size, strict=True)]
    counts, max_tokens = list(whole), preset.max_patch_voxels // math.prod(token_size)
    while math.prod(counts) > max_tokens:
        lengths = [c * t * s if c > MIN_TOKENS_PER_AXIS else 0.0 for c, t, s in zip(counts, token_size, spacing, strict=True)]
        if not any(lengths):
            break
        counts[lengths.index(max(lengths))] -= 1
    # the last token taken may have left room for one along another axis
    for axis, count in enumerate(counts):
        grown = math.prod(counts) // count * (count + 1)
        if count < whole[axis] and grown <= max_tokens:
            counts[axis] += 1
    z, y, x = (c * t for c, t in zip(counts, token_size, strict=True))
    why = f"whole tokens near the median shape {_size(shape)}, at most {preset.max_patch_voxels:,} voxels"
    return (z, y, x), why


def choose_pretraining_patch(preset: Preset, patch_size: Size, token_size: Size) -> tuple[Size, str]:
    """The patch of fine-tuning, as in the paper, unless the preset wants fewer tokens; never larger than it."""
    if preset.pretraining_grid is None:
        return patch_size, "that of fine-tuning, as in the paper"
    z, y, x = (min(n * t, p) for n, t, p in zip(preset.pretraining_grid, token_size, patch_size, strict=True))
    return (z, y, x), "set by the preset: short sequences learn faster; positions are fixed, so any grid will do later"


def mask_decisions(preset: Preset, num_series: int, num_tokens: int) -> list[Decision]:
    masking = preset.masking
    ratio, visible = masking.mask_ratio, num_visible(num_tokens, masking)
    places = "each series at its own places" if masking.places == "independent" else "all series at the same places"
    rows = [Decision("mask ratio", f"{ratio:g}", f"{visible} of {num_tokens} tokens of a series stay visible, {places}")]
    if num_series == 1:
        return [*rows, Decision("series hidden whole", "none", "there is one series")]
    if masking.hidden_series == "none":
        return [*rows, Decision("series hidden whole", "none", "set by the preset")]
    rebuilt = "and rebuilt" if masking.hidden_series == "rebuilt" else "and not rebuilt"
    return [
        *rows,
        Decision("series hidden whole", f"1 to {num_series - 1}", f"of the present ones, each number as likely, {rebuilt}"),
    ]


def schedule(preset: PresetSchedule, num_cases: int) -> Schedule:
    """Turn a length in crops, or in passes over the training cases of a fold, into epochs of iterations."""
    if preset.num_crops is not None:
        num_crops = preset.num_crops
    else:
        assert preset.passes is not None, "a preset gives num_crops or passes"
        num_crops = preset.passes * max(1, round(0.8 * num_cases))
    num_iterations = math.ceil(num_crops / preset.batch_size)
    values = {k: v for k, v in vars(preset).items() if k not in ("num_crops", "passes")}
    values["iterations_per_epoch"] = min(preset.iterations_per_epoch, num_iterations)
    return Schedule(num_epochs=math.ceil(num_iterations / values["iterations_per_epoch"]), **values)


def schedule_decision(name: str, chosen: Schedule, preset: PresetSchedule, num_cases: int) -> Decision:
    if preset.passes is None:
        why = f"{preset.num_crops:,} crops"
    else:
        why = f"{preset.passes:,} passes over the {round(0.8 * num_cases)} training cases of a fold"
    value = f"{chosen.num_iterations:,} iterations of {chosen.batch_size}"
    return Decision(
        name, value, f"{why}; AdamW {chosen.learning_rate:g}, weight decay {chosen.weight_decay:g}, warm-up {chosen.warmup:.0%}"
    )


def save_plans(plans: Mapping[str, Any], path: Path) -> None:
    """Write a plans file whole or not at all."""
    temporary = path.with_suffix(".tmp")
    save_json(plans, str(temporary), sort_keys=False)
    os.replace(temporary, path)


def _size(size: Sequence[int]) -> str:
    return " x ".join(str(n) for n in size)
