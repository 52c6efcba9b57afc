"""Curves over training, redrawn after every epoch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from nnunet_csm.figures.canvas import dress, line_colours, new_figure, save_figure

# Pixels.
WIDTH = 900
HEIGHT = 600


@dataclass(frozen=True)
class Panel:
    """One plot: each line is a name and its values at 0, 1, 2, ...; values that are not finite are left out."""

    title: str
    lines: Mapping[str, Sequence[float]]
    xlabel: str
    ylabel: str
    log: bool = False


def save_curves(path: str | Path, panels: Sequence[Panel]) -> None:
    """Draw `panels` as PNG: one or two below each other, more in two columns."""
    assert panels
    num_columns = 1 if len(panels) <= 2 else 2
    num_rows = -(-len(panels) // num_columns)
    figure = new_figure(WIDTH, HEIGHT if num_rows <= 2 else HEIGHT / 2 * num_rows)
    for position, panel in enumerate(panels, start=1):
        _draw_panel(figure.add_subplot(num_rows, num_columns, position), panel)
    figure.tight_layout()
    save_figure(figure, path)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for (name, values), colour in zip(panel.lines.items(), line_colours(len(panel.lines)), strict=True):
        y = np.asarray(values, dtype=np.float64)
        drawable = np.isfinite(y) & (y > 0 if panel.log else True)
        # A line through one point is invisible, and some values are measured every few epochs only.
        marker = "." if drawable.sum() <= 30 else None
        axes.plot(np.flatnonzero(drawable), y[drawable], label=name, color=colour, linewidth=1.5, marker=marker)
    if panel.log:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins="auto", min_n_ticks=1))
    dress(axes, panel.title, panel.xlabel, panel.ylabel)
    if panel.lines:
        axes.legend(frameon=False, fontsize=8)
