"""Whether a pretraining is worth going on with: errors beside linear maps, lesions found in frozen features, and when to stop."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_csm.figures.curves import Panel
from nnunet_csm.files import write_text
from nnunet_csm.judging.hidden_errors import LOGGED_ERRORS, LOGGED_TOKENS, HiddenErrors
from nnunet_csm.judging.kinds import HIDDEN_PART, HIDDEN_WHOLE, KINDS
from nnunet_csm.judging.lesion_probe import LinearProbe
from nnunet_csm.judging.linear_maps import ESTIMATES
from nnunet_csm.judging.plateau import MEAN, Verdict, judge
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.plans import Schedule
from nnunet_csm.pretext.base import Pretext
from nnunet_csm.pretext.rebuilding import Rebuilding

LOGGED_PRECISION = "lesion_precision"
TRIVIAL = {"mean": MEAN, "linear": "voxel-wise linear map", "token_linear": "linear map of tokens"}


def logged_names(pretext: Pretext | type[Pretext]) -> tuple[str, ...]:
    """What is logged of every validation beside the loss."""
    cls = pretext if isinstance(pretext, type) else type(pretext)
    return (*LOGGED_TOKENS, *LOGGED_ERRORS) if issubclass(cls, Rebuilding) else cls.parts


class Probe:
    """What a run is compared with, and what is said, drawn and written of it after every epoch.

    Attributes:
        baselines: errors of the linear maps and of the mean on the validation patches of every epoch, by estimate, then by
            `KINDS`; NaN when no map could be fitted, or for a kind that there is not. None for a pretext that rebuilds nothing:
            it is judged by its loss.
        linear_probe: None when there are no labels.
    """

    def __init__(self, pretext: Pretext, schedule: Schedule, errors: HiddenErrors | None) -> None:
        self.schedule, self.parts, self.warning = schedule, pretext.parts, pretext.warning
        self.linear_probe: LinearProbe | None = None
        self.baselines: dict[str, list[float]] | None = None
        self.judged, self.name = "val_losses", "validation loss"
        if errors is not None:
            assert isinstance(pretext, Rebuilding)
            self.baselines = {name: errors.by_kind(name) for name in ESTIMATES}
            # what cross-series learning is about; with one series, or joint tokens, none is hidden whole, and where those that
            # are stay out of the loss the network never learns to rebuild them
            whole = KINDS.index(HIDDEN_WHOLE)
            kind = whole if pretext.learns_whole_series and errors.counts[whole].sum() else KINDS.index(HIDDEN_PART)
            self.judged, self.name = LOGGED_ERRORS[kind], f"{KINDS[kind]}, foreground"

    def baseline(self, estimate: str) -> float:
        """The error of a linear map, or the mean, that the judged one stands beside; NaN when there is none."""
        return float("nan") if self.baselines is None else self.baselines[estimate][LOGGED_ERRORS.index(self.judged)]

    def precision(self, encoder: Encoder, epoch: int) -> float:
        """Average precision of the linear probe in the first and the last epoch, and as often as its cost allows; else NaN."""
        probe, last = self.linear_probe, self.schedule.num_epochs - 1
        return probe.of(encoder) if probe is not None and (epoch in (0, last) or probe.due) else float("nan")

    def verdict(self, log: Mapping[str, Sequence[float]]) -> Verdict:
        """What the history of the judged error tells."""
        return judge(log[self.judged], self.schedule.num_epochs, {name: self.baseline(of) for of, name in TRIVIAL.items()})

    def said(self, log: Mapping[str, Sequence[float]]) -> str:
        """A line on the last epoch, one more when lesions were probed, and what the pretext warns of."""
        known = {name: error for of, name in TRIVIAL.items() if np.isfinite(error := self.baseline(of))}
        first = "; smaller is better" if len(log[self.judged]) == 1 else ""
        beside = f" ({', '.join(f'{name} {error:.4f}' for name, error in known.items())}{first})" if known else ""
        lines = [f"Probe: {self.name}: {log[self.judged][-1]:.4f}{beside}; {self.verdict(log)}"]
        precision, probe = log[LOGGED_PRECISION][-1], self.linear_probe
        if probe is not None and np.isfinite(precision):
            lines.append(
                f"Probe: lesions in frozen features, average precision {precision:.3f} (untrained encoder {probe.untrained:.3f}, "
                f"mean and deviation of tokens {probe.statistics:.3f}, chance {probe.prevalence:.3f})"
            )
        if warning := self.warning(log):
            lines.append(f"WARNING: {warning}")
        return "\n".join(lines)

    def panels(self, log: Mapping[str, Sequence[float]]) -> list[Panel]:
        """Curves of the errors beside the linear maps, or of the parts of the loss, and of the linear probe."""
        epochs = len(log[LOGGED_PRECISION])
        panels = []
        if self.baselines is not None:
            part, whole = (log[name] for name in LOGGED_TOKENS)
            by_kind = {"series visible elsewhere": part, "series hidden whole": whole}
            panels.append(Panel("Validation error", by_kind, "epoch", "mean squared error"))
            flat = {name: [self.baseline(estimate)] * epochs for estimate, name in TRIVIAL.items()}
            errors = {"network": log[self.judged], **flat}
            kind = KINDS[LOGGED_ERRORS.index(self.judged)]
            panels.append(Panel(kind, errors, "epoch", "mean squared error, foreground"))
        if self.parts:
            panels.append(Panel("Parts of the validation", {name: log[name] for name in self.parts}, "epoch", ""))
        if self.linear_probe is not None:
            found = {
                "encoder": log[LOGGED_PRECISION],
                "untrained encoder": [self.linear_probe.untrained] * epochs,
                "mean and deviation": [self.linear_probe.statistics] * epochs,
            }
            panels.append(Panel("Lesions found by a linear probe", found, "epoch", "average precision"))
        return panels

    def save(self, log: Mapping[str, Sequence[float]], path: Path) -> None:
        """One row per epoch, all of them written again from the log, which is in the checkpoints: a resumed run repeats none.

        Columns: epoch from 0, crops, then for each of `LOGGED_ERRORS` the network's and those of `ESTIMATES` or, for a pretext
        that rebuilds nothing, the validation loss and its parts; then the precisions; empty where there is none.
        """
        schedule, probe = self.schedule, self.linear_probe
        epochs = np.arange(len(log[LOGGED_PRECISION]))
        table = pd.DataFrame({"epoch": epochs, "crops": (epochs + 1) * schedule.iterations_per_epoch * schedule.batch_size})
        for kind, name in enumerate(LOGGED_ERRORS) if self.baselines is not None else ():
            table[name] = log[name]
            for estimate in ESTIMATES:
                table[f"{name}_{estimate}"] = self.baselines[estimate][kind]  # type: ignore[index]
        for name in ("val_losses", *self.parts) if self.baselines is None else ():
            table[name] = log[name]
        table[LOGGED_PRECISION] = log[LOGGED_PRECISION]
        for name in ("untrained", "statistics", "prevalence"):
            table[f"{LOGGED_PRECISION}_{name}"] = float("nan") if probe is None else getattr(probe, name)
        write_text(path, table.to_csv(index=False))
