"""How good predicted numbers are, in one picture: truth over prediction, and errors over truth."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from nnunet_csm.figures.canvas import INK, LINE_COLOURS, dress, new_figure, save_figure
from nnunet_csm.figures.classification import REFERENCE

# Pixels.
WIDTH, HEIGHT = 900, 460
# of the range of the numbers, around the dots
MARGIN = 0.05
TOLD_IN_A_LINE = 3


def save_numbers(
    path: str | Path,
    values: Float[np.ndarray, " n"],
    predicted: Float[np.ndarray, " n"],
    line: tuple[float, float],
    told: Sequence[str],
    title: str = "",
) -> None:
    """Draw two panels as PNG.

    Args:
        path: of the PNG.
        values: the truth.
        predicted: of the same samples.
        line: slope and intercept of truth on prediction; NaN where there is none.
        told: below the panels.
        title: of the picture.
    """
    figure = new_figure(WIDTH, HEIGHT)
    scatter, errors = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    both = np.concatenate([values, predicted])
    margin = MARGIN * float(np.ptp(both)) or 1.0
    ends = np.array([both.min() - margin, both.max() + margin])
    scatter.plot(ends, ends, **REFERENCE, label="identity")
    slope, intercept = line
    if np.isfinite(slope):
        along = np.array([predicted.min(), predicted.max()])
        scatter.plot(along, intercept + slope * along, color=LINE_COLOURS[1], linewidth=1.5, label="truth on prediction")
    scatter.scatter(predicted, values, 18, color=LINE_COLOURS[0], alpha=0.7, linewidth=0, zorder=3)
    scatter.set_xlim(*ends)
    scatter.set_ylim(*ends)
    scatter.legend(frameon=False, fontsize=8, loc="upper left")
    dress(scatter, "Truth and prediction", "predicted", "true")
    errors.axhline(0, **REFERENCE)
    errors.scatter(values, predicted - values, 18, color=LINE_COLOURS[0], alpha=0.7, linewidth=0, zorder=3)
    dress(errors, "Errors", "true", "predicted - true")
    if title:
        figure.suptitle(title, fontsize=11, color=INK)
    lines = [told[first : first + TOLD_IN_A_LINE] for first in range(0, len(told), TOLD_IN_A_LINE)]
    figure.text(0.5, 0.02, "\n".join("     ".join(line) for line in lines), fontsize=8, color=INK, ha="center")
    figure.tight_layout(rect=(0, 0.04 + 0.04 * len(lines), 1, 1))
    save_figure(figure, path)
