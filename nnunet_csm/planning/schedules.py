"""How long a training is, and its learning rate: from a preset and the number of cases."""

import math

from nnunet_csm.planning.presets import PresetSchedule
from nnunet_csm.plans import Schedule


def schedule(preset: PresetSchedule, batch_size: int, num_cases: int) -> Schedule:
    """Turn a length in crops into epochs of iterations.

    Another batch size than the preset's scales the learning rate by the square root of their ratio, which keeps the noise of
    Adam's steps (Malladi et al. 2022, "On the SDEs and scaling rules for adaptive gradient algorithms").
    """
    crops, _ = num_crops(preset, num_cases)
    num_iterations = math.ceil(crops / batch_size)
    values = {k: v for k, v in vars(preset).items() if k not in ("num_crops", "passes", "min_steps")}
    values["batch_size"] = batch_size
    values["learning_rate"] = float(f"{preset.learning_rate * math.sqrt(batch_size / preset.batch_size):.3g}")
    values["iterations_per_epoch"] = min(preset.iterations_per_epoch, num_iterations)
    return Schedule(num_epochs=math.ceil(num_iterations / values["iterations_per_epoch"]), **values)


def num_crops(preset: PresetSchedule, num_cases: int) -> tuple[int, str]:
    """Passes over the training cases of a fold (80 % of all), not fewer than the least steps, at most the preset's number."""
    if preset.passes is None:
        assert preset.num_crops is not None, "a preset gives num_crops or passes"
        return preset.num_crops, f"{preset.num_crops:,} crops"
    cases = max(1, round(0.8 * num_cases))
    crops, why = preset.passes * cases, f"{preset.passes:,} passes over the {cases} training cases of a fold"
    least = preset.min_steps * preset.batch_size
    if crops < least:
        crops, why = least, f"{preset.min_steps:,} steps of {preset.batch_size}, more than {why}"
    if preset.num_crops is not None and crops > preset.num_crops:
        return preset.num_crops, f"{preset.num_crops:,} crops, fewer than {why}"
    return crops, why


def length_text(chosen: Schedule) -> str:
    """`7,000 iterations of 64`."""
    return f"{chosen.num_iterations:,} iterations of {chosen.batch_size}"


def schedule_reason(chosen: Schedule, preset: PresetSchedule, num_cases: int) -> str:
    """Why a training is as long as it is, and how it is optimised."""
    _, why = num_crops(preset, num_cases)
    scaled = "" if chosen.batch_size == preset.batch_size else " (scaled with the root of the batch)"
    return f"{why}; AdamW {chosen.learning_rate:g}{scaled}, weight decay {chosen.weight_decay:g}, warm-up {chosen.warmup:.0%}"
