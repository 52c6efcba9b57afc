"""When can a pretraining stop? A rule on the history of its error."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# fewer epochs tell nothing
MIN_EPOCHS = 6
# of what was learned so far, in the last third of the epochs: less is flat
FLAT = 0.02
# of the reference: what counts as learned at least, so that a run that learned nothing is not judged by its noise
LEAST_LEARNED = 0.1
# of the schedule, after which a network worse than something trivial is worth a warning
WARM = 0.1
MEAN = "mean"


@dataclass(frozen=True)
class Verdict:
    """What the history of an error tells.

    Attributes:
        trend: of the last third of the epochs.
        since: epoch, from 0 as in nnU-Net's log, from which on the error is flat, or at which it was lowest before it rose; else
            the last.
        gain: fall of the error in the last third, as a share of what was learned so far.
        share: of the schedule that is over.
        behind: the best of the trivial estimates, where it is better and more than a tenth of the schedule is over; else empty.
        unlearned: and no better than the mean.
    """

    trend: Literal["early", "falling", "flat", "rising"]
    since: int
    gain: float
    share: float
    behind: str
    unlearned: bool

    def __str__(self) -> str:
        said = {
            "early": f"too early to tell with fewer than {MIN_EPOCHS} epochs",
            "falling": f"still falling: {self.gain:.0%} of what was learned came in the last third of the epochs",
            "flat": f"flat since epoch {self.since}",
            "rising": f"rising since epoch {self.since}",
        }[self.trend]
        if self.unlearned:
            return (
                f"no better than the mean after {self.share:.0%} of the schedule: nothing is learned so far. Likeliest: too few "
                "steps (useful features took 4,500 to 9,000 of 16 crops, docs/experiments.md, E6); then learning_rate and warmup"
            )
        if self.behind:
            return (
                f"{said}; worse than the {self.behind} after {self.share:.0%} of the schedule. Likeliest: too few steps; then "
                "learning_rate, warmup and mask_ratio"
            )
        return said + {
            "flat": ": stopping would cost little",
            "rising": (
                ": stopping would cost nothing; nnUNet_csm_encoder=PATH/checkpoint_best.pth fine-tunes from the epoch of the "
                "lowest val_loss"
            ),
        }.get(self.trend, "")


def judge(errors: Sequence[float], num_epochs: int, trivial: Mapping[str, float]) -> Verdict:
    """Judge a run by its errors, one per epoch.

    The slope is the median of those between any two epochs of the last third (Theil and Sen), so that single epochs weigh little.
    It is compared with what was learned: how far the lowest error is below the mean's.

    Args:
        errors: of the epochs so far, at least one. The first may be NaN, those of a run begun before there were probes: they
            count as epochs and are not judged.
        num_epochs: of the schedule.
        trivial: errors of the mean (`MEAN`) and of linear maps, by name; NaN when unknown. Without the mean, what was learned
            counts from the first error.
    """
    known = np.isfinite(errors)
    begun = int(known.argmax()) if known.any() else len(known)
    history = np.asarray(errors, dtype=float)[begun:]
    num, final = len(history), len(errors) - 1
    share = len(errors) / num_epochs
    reference, known_trivial = trivial.get(MEAN, float("nan")), {n: e for n, e in trivial.items() if np.isfinite(e)}
    # single epochs weigh little, but what is printed beside the verdict must not contradict it
    now = float(min(history[-1], np.median(history[-3:]))) if share > WARM and num else float("nan")
    best = min(known_trivial, key=lambda name: known_trivial[name], default="")
    beside = best if best and now > known_trivial[best] else "", now > reference * (1 - FLAT)
    if num < MIN_EPOCHS:
        return Verdict("early", final, float("nan"), share, *beside)
    last = history[-(num // 3 + 1) :]
    first, second = np.triu_indices(len(last), 1)
    slope = float(np.median((last[second] - last[first]) / (second - first)))
    reference = reference if np.isfinite(reference) else float(history[0])
    learned = max(reference - history.min(), LEAST_LEARNED * abs(reference), np.finfo(float).tiny)
    gain = -slope * (len(last) - 1) / learned
    if gain > FLAT:
        return Verdict("falling", final, gain, share, *beside)
    if gain < -FLAT:
        return Verdict("rising", begun + int(history.argmin()), gain, share, *beside)
    smooth = np.array([np.median(history[max(0, at - 1) : at + 2]) for at in range(num)])
    return Verdict("flat", begun + int(np.argmax(smooth <= smooth.min() + FLAT * learned)), gain, share, *beside)
