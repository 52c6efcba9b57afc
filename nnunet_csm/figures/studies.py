"""What a study found, in pictures: scores over the number of labelled cases, differences patient by patient."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter, NullLocator

from nnunet_csm.figures.canvas import INK, dress, line_colours, new_figure, save_figure

# Pixels.
WIDTH = 900
PANEL_HEIGHT = 330
# of a title over the whole width
TITLE_LETTERS = 110

MARKERS = "osD^vPX"
BETTER, WORSE = "#0072B2", "#D55E00"


@dataclass(frozen=True)
class Curve:
    """Scores of one arm, in the order of `num_labelled`; `low` and `high` are NaN where there is no interval."""

    name: str
    num_labelled: Float[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    low: Float[np.ndarray, " n"]
    high: Float[np.ndarray, " n"]


@dataclass(frozen=True)
class PatientDifferences:
    """Differences of one comparison: a value a patient, their mean and its interval."""

    name: str
    values: Float[np.ndarray, " p"]
    mean: float
    low: float
    high: float


def save_label_efficiency(path: str | Path, panels: Mapping[str, Sequence[Curve]], measure: str) -> None:
    """A panel a structure, two in a row: score over the number of labelled cases (logarithmic), with intervals as bands."""
    assert panels
    num_columns = min(2, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = new_figure(WIDTH, PANEL_HEIGHT * num_rows * (1 if num_columns == 2 else 1.3))
    for position, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(num_rows, num_columns, position)
        for place, (curve, colour) in enumerate(zip(curves, line_colours(len(curves)), strict=True)):
            axes.fill_between(curve.num_labelled, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
            marker = MARKERS[place % len(MARKERS)]
            axes.plot(curve.num_labelled, curve.score, color=colour, marker=marker, markersize=5, linewidth=1.6, label=curve.name)
        ticks = sorted({float(number) for curve in curves for number in curve.num_labelled})
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:.0f}" for tick in ticks]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        dress(axes, textwrap.fill(title, TITLE_LETTERS // num_columns), "labelled training cases", measure)
        if position == 1:
            axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)


def save_patient_differences(path: str | Path, comparisons: Sequence[PatientDifferences], unit: str) -> None:
    """A panel a comparison, two in a row: every patient's difference as a bar, sorted, with the mean and its interval."""
    assert comparisons
    num_columns = min(2, len(comparisons))
    num_rows = -(-len(comparisons) // num_columns)
    figure = new_figure(WIDTH, PANEL_HEIGHT * num_rows)
    reach = 1.05 * max(float(np.abs(one.values).max()) for one in comparisons) or 1.0
    for position, one in enumerate(comparisons, start=1):
        axes = figure.add_subplot(num_rows, num_columns, position)
        values = np.sort(one.values)[::-1]
        axes.bar(range(1, len(values) + 1), values, width=0.85, color=[BETTER if value > 0 else WORSE for value in values])
        axes.axhline(0, color=INK, linewidth=0.8)
        if not np.isnan(one.low):
            axes.axhspan(one.low, one.high, color=INK, alpha=0.12, linewidth=0)
        axes.axhline(one.mean, color=INK, linewidth=1.2, linestyle="--", label=_mean_text(one))
        axes.set_ylim(-reach, reach)
        num_better = int((values > 0).sum())
        name = textwrap.fill(one.name, TITLE_LETTERS // num_columns)
        dress(axes, name, f"patients, sorted: {num_better} of {len(values)} better", unit)
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    figure.tight_layout()
    save_figure(figure, path)


def _mean_text(one: PatientDifferences) -> str:
    interval = "" if np.isnan(one.low) else f" ({one.low:+.3f} to {one.high:+.3f})"
    return f"mean {one.mean:+.3f}{interval}"
