"""How good predicted classes are, in one picture: ROC, precision-recall, reliability, probabilities by class."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from scipy.stats import binomtest

from nnunet_csm.figures.canvas import INK, LINE_COLOURS, dress, line_colours, new_figure, save_figure

# Pixels.
WIDTH = 900
HEIGHT = 840

ROC_GRID = np.linspace(0, 1, 101)
REFERENCE: dict[str, Any] = {"color": "#999999", "linewidth": 1.0, "linestyle": "--", "zorder": 1}

Corner = Literal["lower left", "lower right", "upper right"]


@dataclass(frozen=True)
class Reliability:
    """How often what was predicted with some probability came true.

    Attributes:
        name: of a class or structure.
        calibration_error: as printed.
        predicted, observed, counts: mean probability, share that came true and samples of each bin that has some.
    """

    name: str
    calibration_error: str
    predicted: Float[np.ndarray, " k"]
    observed: Float[np.ndarray, " k"]
    counts: Int[np.ndarray, " k"]


@dataclass(frozen=True)
class ClassCurves:
    """Curves of one class against all others; rates and precisions at thresholds from the highest to the lowest.

    Attributes:
        name: of the class.
        auc, average_precision: as printed.
        false_positive_rate, true_positive_rate: from (0, 0) to (1, 1).
        band: interval of the true positive rate at each of `ROC_GRID`.
        precision: at each true positive rate but the first.
        share: of the class among all samples, the precision of chance.
        reliability: of its probabilities.
    """

    name: str
    auc: str
    average_precision: str
    false_positive_rate: Float[np.ndarray, " t"]
    true_positive_rate: Float[np.ndarray, " t"]
    band: Float[np.ndarray, "2 g"] | None
    precision: Float[np.ndarray, " _"]
    share: float
    reliability: Reliability


def save_classification(
    path: str | Path,
    curves: Sequence[ClassCurves],
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n c"],
    classes: Sequence[str],
    title: str = "",
) -> None:
    """Draw four panels as PNG. One curve has its band, and bars, Wilson's 95 % interval of samples (1927); several have none."""
    figure = new_figure(WIDTH, HEIGHT)
    roc, precision_recall, reliability, strip = (figure.add_subplot(2, 2, position) for position in (1, 2, 3, 4))
    _draw_roc(roc, curves)
    _draw_precision_recall(precision_recall, curves)
    _draw_reliability(reliability, [one.reliability for one in curves], with_bars=len(curves) == 1)
    dress(reliability, "Reliability (larger dots: more samples)", "mean predicted probability", "share of the class")
    _draw_strip(strip, labels, probabilities, classes)
    corners: dict[Axes, Corner] = {
        roc: "lower right",
        precision_recall: "lower left",
        reliability: "lower right",
        strip: "upper right",
    }
    for axes, corner in corners.items():
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=8, loc=corner)
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    figure.tight_layout()
    save_figure(figure, path)


def save_reliability(path: str | Path, structures: Sequence[Reliability], title: str) -> None:
    """Draw the reliability of structures in one panel, as PNG; without bars, as voxels are no independent samples."""
    figure = new_figure(WIDTH * 2 / 3, HEIGHT * 2 / 3)
    axes = figure.add_subplot()
    _draw_reliability(axes, structures, with_bars=False)
    dress(axes, title, "mean predicted probability", "share of the voxels that the reference has in the structure")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    save_figure(figure, path)


def _draw_roc(axes: Axes, curves: Sequence[ClassCurves]) -> None:
    axes.plot([0, 1], [0, 1], **REFERENCE)
    for one, colour in zip(curves, line_colours(len(curves)), strict=True):
        axes.plot(
            one.false_positive_rate, one.true_positive_rate, color=colour, linewidth=1.5, label=f"{one.name}: AUC {one.auc}"
        )
        if one.band is not None and len(curves) == 1:
            axes.fill_between(ROC_GRID, *one.band, color=colour, alpha=0.15, linewidth=0, label="95 % band")
    _unit_square(axes)
    dress(axes, "ROC", "1 - specificity", "sensitivity")


def _draw_precision_recall(axes: Axes, curves: Sequence[ClassCurves]) -> None:
    for one, colour in zip(curves, line_colours(len(curves)), strict=True):
        recall, precision = one.true_positive_rate, np.append(one.precision[:1], one.precision)
        label = f"{one.name}: average precision {one.average_precision}"
        axes.plot(recall, precision, drawstyle="steps-pre", color=colour, linewidth=1.5, label=label)
        axes.axhline(one.share, **{**REFERENCE, "color": colour})
    _unit_square(axes)
    dress(axes, "Precision-recall (dashed: chance)", "recall (sensitivity)", "precision")


def _draw_reliability(axes: Axes, curves: Sequence[Reliability], with_bars: bool) -> None:
    axes.plot([0, 1], [0, 1], **REFERENCE)
    for one, colour in zip(curves, line_colours(len(curves)), strict=True):
        if with_bars:
            tests = [binomtest(round(share * n), int(n)) for share, n in zip(one.observed, one.counts, strict=True)]
            bars = np.transpose([tuple(test.proportion_ci(method="wilson")) for test in tests])
            axes.vlines(one.predicted, *bars, color=colour, linewidth=1.0, alpha=0.6)
        axes.plot(one.predicted, one.observed, color=colour, linewidth=1.0)
        label = f"{one.name}: calibration error {one.calibration_error}"
        axes.scatter(one.predicted, one.observed, 100 * one.counts / one.counts.sum() + 8, color=colour, label=label, zorder=3)
    _unit_square(axes)


def _draw_strip(
    axes: Axes, labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n c"], classes: Sequence[str]
) -> None:
    """A row a true class, a dot a sample."""
    is_binary = len(classes) == 2
    shown = probabilities[:, 1] if is_binary else probabilities[np.arange(len(labels)), labels]
    is_correct = probabilities.argmax(1) == labels
    for index in range(len(classes)):
        rows = np.flatnonzero(labels == index)
        # spread by rank, so that neighbours do not hide each other and the picture does not depend on chance
        spread = np.empty(len(rows))
        spread[np.argsort(shown[rows], kind="stable")] = (np.arange(len(rows)) * 0.618) % 1 - 0.5
        for chosen, colour in ((is_correct[rows], LINE_COLOURS[0]), (~is_correct[rows], LINE_COLOURS[1])):
            axes.scatter(shown[rows][chosen], index + 0.6 * spread[chosen], 14, color=colour, alpha=0.7, linewidth=0)
    for label, colour in (("predicted right", LINE_COLOURS[0]), ("predicted wrong", LINE_COLOURS[1])):
        axes.scatter([], [], 14, color=colour, label=label)
    axes.axvline(0.5 if is_binary else 1 / len(classes), **REFERENCE)
    axes.set_xlim(-0.02, 1.02)
    # room for the legend above the rows
    axes.set_ylim(-0.5, len(classes) - 0.5 + 0.25 * len(classes))
    axes.set_yticks(range(len(classes)), [f"{name}\n(n={np.count_nonzero(labels == i)})" for i, name in enumerate(classes)])
    dress(
        axes,
        "Samples by true class",
        f"probability of {classes[1]}" if is_binary else "probability of the true class (dashed: chance)",
    )


def _unit_square(axes: Axes) -> None:
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
