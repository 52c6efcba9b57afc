"""When can a pretraining stop? A rule on the history of its error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# fewer epochs tell nothing
MIN_EPOCHS = 6
# of what was learned so far, in the last third of the epochs: less is flat
FLAT = 0.02
# of the reference: what counts as learned at least, so that a run that learned nothing is not judged by its noise
LEAST_LEARNED = 0.1
# of the schedule, after which a network worse than a linear map is worth a warning
WARM = 0.1


@dataclass(frozen=True)
class Verdict:
    """What the history of an error tells.

    Attributes:
        trend: of the last third of the epochs.
        since: epoch, from 0 as in nnU-Net's log, from which on the error is flat, or at which it was lowest before it rose; else
            the last.
        gain: fall of the error in the last third, as a share of what was learned so far.
        share: of the schedule that is over.
        worse_than_linear: and more than a tenth of the schedule is over.
    """

    trend: Literal["early", "falling", "flat", "rising"]
    since: int
    gain: float
    share: float
    worse_than_linear: bool

    def __str__(self) -> str:
        said = {
            "early": f"too early to tell with fewer than {MIN_EPOCHS} epochs",
            "falling": f"still falling: {self.gain:.0%} of what was learned came in the last third of the epochs",
            "flat": f"flat since epoch {self.since}: stopping would cost little",
            "rising": (
                f"rising since epoch {self.since}: stopping would cost nothing; nnUNet_csm_encoder=PATH/checkpoint_best.pth "
                "fine-tunes from the epoch of the lowest val_loss"
            ),
        }[self.trend]
        if not self.worse_than_linear:
            return said
        return (
            f"{said}; worse than the voxel-wise linear map after {self.share:.0%} of the schedule: this pretraining is not "
            "learning structure across series or places (yet), check learning_rate, warmup and mask_ratio"
        )


def judge(errors: Sequence[float], num_epochs: int, reference: float, linear: float) -> Verdict:
    """Judge a run by its errors, one per epoch.

    The slope is the median of those between any two epochs of the last third (Theil and Sen), so that single epochs weigh little.
    It is compared with what was learned: how far the lowest error is below the reference.

    Args:
        errors: of the epochs so far, at least one. The first may be NaN, those of a run begun before there were probes: they
            count as epochs and are not judged.
        num_epochs: of the schedule.
        reference: error of an estimate that has learned nothing (the mean); NaN when unknown, then the first error.
        linear: of the voxel-wise linear map; NaN when unknown.
    """
    known = np.isfinite(errors)
    begun = int(known.argmax()) if known.any() else len(known)
    history = np.asarray(errors, dtype=float)[begun:]
    num, final = len(history), len(errors) - 1
    share = len(errors) / num_epochs
    worse = bool(share > WARM and num > 0 and np.median(history[-3:]) > linear)
    if num < MIN_EPOCHS:
        return Verdict("early", final, float("nan"), share, worse)
    last = history[-(num // 3 + 1) :]
    first, second = np.triu_indices(len(last), 1)
    slope = float(np.median((last[second] - last[first]) / (second - first)))
    reference = reference if np.isfinite(reference) else float(history[0])
    learned = max(reference - history.min(), LEAST_LEARNED * abs(reference), np.finfo(float).tiny)
    gain = -slope * (len(last) - 1) / learned
    if gain > FLAT:
        return Verdict("falling", final, gain, share, worse)
    if gain < -FLAT:
        return Verdict("rising", begun + int(history.argmin()), gain, share, worse)
    smooth = np.array([np.median(history[max(0, at - 1) : at + 2]) for at in range(num)])
    return Verdict("flat", begun + int(np.argmax(smooth <= smooth.min() + FLAT * learned)), gain, share, worse)
