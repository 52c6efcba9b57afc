"""Embeddings as points in a plane, coloured by class or by value."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Real

from nnunet_csm.figures.canvas import dress, line_colours, new_figure, save_figure
from nnunet_csm.figures.studies import MARKERS

# Pixels.
WIDTH, HEIGHT = 480, 400


def save_embeddings(
    path: str | Path,
    panels: Mapping[str, Mapping[str, Float[np.ndarray, "n 2"]]],
    values: Real[np.ndarray, " n"],
    what: str,
    labels: Sequence[str] | None = None,
) -> None:
    """A row an embedding, a column a projection (its name to coordinates).

    Args:
        path: of the PNG.
        panels: embedding to projections.
        values: of each case, which colour the points where there are no labels.
        what: the values are.
        labels: class of each case.
    """
    assert panels
    num_columns = max(map(len, panels.values()))
    figure = new_figure(WIDTH * num_columns, HEIGHT * len(panels))
    names = sorted(set(labels or ()))
    for row, (title, projections) in enumerate(panels.items()):
        for column, (projection, xy) in enumerate(projections.items()):
            axes = figure.add_subplot(len(panels), num_columns, row * num_columns + column + 1)
            if labels is None:
                points = axes.scatter(xy[:, 0], xy[:, 1], c=values, s=18, cmap="viridis")
                figure.colorbar(points, ax=axes, label=what)
            for place, (name, colour) in enumerate(zip(names, line_colours(len(names)), strict=True)):
                chosen = np.array(labels) == name
                marker = MARKERS[place % len(MARKERS)]
                axes.scatter(xy[chosen, 0], xy[chosen, 1], s=18, color=colour, marker=marker, label=name)
            dress(axes, title, f"{projection} 1", f"{projection} 2")
            if labels is not None and row == column == 0:
                axes.legend(frameon=False, fontsize=8, title=what, title_fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
