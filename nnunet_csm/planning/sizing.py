"""Sizes of one preset on one dataset, as far as memory allows: token, patch and batches, each with its reason."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import encoder_class
from nnunet_csm.planning.facts import Decision, Facts, Wishes
from nnunet_csm.planning.presets import Preset, read_preset
from nnunet_csm.planning.sizes import (
    MIN_PLACES_PER_AXIS,
    MIN_TOKENS_PER_AXIS,
    as_text,
    choose_finetuning_batch,
    choose_patch_size,
    choose_pretraining_batch,
    choose_pretraining_patch,
    choose_token_size,
    squeeze,
)
from nnunet_csm.plans import Architecture, Source
from nnunet_csm.pretext.base import Pretext, Setup, read_pretext
from nnunet_csm.pretext.memory import CUDA_CONTEXT, GIB, Memory
from nnunet_csm.schema import Size

# how small a pretraining batch still counts as fitting into memory
MIN_PRETRAINING_BATCH = 16


class MemoryModel(Protocol):
    """What predicts the GPU memory that a training takes: `pretext/memory.py`, or a stand-in."""

    def pretraining_memory(self, pretext: type[Pretext], setup: Setup, batch_size: int) -> Memory: ...

    def finetuning_memory(
        self, architecture: Architecture, num_classes: int, patch_size: Size, batch_size: int, num_channels: int | None
    ) -> Memory: ...


@dataclass(frozen=True)
class Sized:
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


def sized_for(
    entry: Mapping[str, Any],
    facts: Facts,
    wishes: Wishes,
    sources: Sequence[Source],
    series: tuple[str, ...],
    channels: tuple[int, ...],
    predict: MemoryModel,
    preset_name: str,
) -> Sized:
    preset = read_preset(preset_name)
    shape, spacing = [max(1, round(n)) for n in entry["median_image_size_in_voxels"]], entry["spacing"]
    target = None if wishes.gpu_memory_target is None else wishes.gpu_memory_target * GIB - CUDA_CONTEXT
    union = tuple(dict.fromkeys(name for source in sources for name in source.channels))
    encoder = encoder_class(preset.architecture(series, channels, (preset.token_edge,) * 3, f"preset {preset_name}"))
    num_together, least = (len(union), MIN_TOKENS_PER_AXIS) if encoder.attends else (0, MIN_PLACES_PER_AXIS)
    token, why_token = choose_token_size(preset, shape, spacing, least)
    if wishes.token_size is not None:
        token, why_token = wishes.token_size, wishes.why
    architecture = preset.architecture(series, channels, token, f"preset {preset_name}")
    encoder.check(architecture, f"preset {preset_name}: network")
    pretraining_architecture = dataclasses.replace(architecture, series=union, channels=tuple(range(len(union))))

    def finetuning(patch_size: Size, batch_size: int) -> Memory:
        return predict.finetuning_memory(architecture, facts.num_classes, patch_size, batch_size, len(facts.channels))

    def pretraining(batch_size: int) -> Memory:
        return predict.pretraining_memory(pretext, setup, batch_size) if pretext.learns else Memory(0, 0, 0)

    wanted = preset.finetuning.batch_size
    # of separate tokens also when they are joint: strategies are compared on one patch
    patch, why_patch = choose_patch_size(preset, shape, spacing, token, num_together, least)
    squeezed = False
    if wishes.patch_size is not None:
        patch, why_patch = wishes.patch_size, wishes.why
    elif target is not None and preset.patch_size is None and finetuning(patch, wanted).total > target:
        squeezed = True
        patch = squeeze(patch, token, spacing, least, lambda size: finetuning(size, wanted).total <= target)
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
    return Sized(
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
