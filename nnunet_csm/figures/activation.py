"""What of every series a classifier's decision rests on, drawn over that series."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunet_csm.figures.canvas import COLOURS, INK, PAPER, draw_empty, draw_grey, grey_window, new_figure, save_figure

# Pixels.
PICTURE_WIDTH = 820
PANEL_WIDTH_MAX = 230
MARGIN = 10
TITLE_HEIGHT = 38
HEADING_HEIGHT = 46
LEGEND_HEIGHT = 40
GAP = 4

FOR, AGAINST = COLOURS[0], COLOURS[1]
OPACITY = 0.75
# of the grey under the colours, which are hard to see on white
DIMMING = 1.6
# of the slice, around what is drawn
SURROUNDINGS = 0.15


def save_activation(
    path: str | Path,
    volume: Float[np.ndarray, "s z y x"],
    maps: Float[np.ndarray, "s z y x"],
    mask: Bool[np.ndarray, "z y x"],
    series_names: Sequence[str],
    shares: Sequence[float],
    title: str,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> None:
    """A column per series: the image with the mask as a line, and below it what speaks for and against the class.

    All show the axial slice through the mask with the strongest maps, cut to the mask and to where maps are. Full strength is
    that of the strongest place in any slice of any series, so that series can be compared. A series that is 0 everywhere is
    drawn as absent. `shares` stand above the columns; `spacing` is in mm as (z, y, x).
    """
    assert volume.shape == maps.shape and mask.shape == volume.shape[1:]
    assert len(volume) == len(series_names) == len(shares)
    through_mask = mask.any(axis=(1, 2))
    assert through_mask.any(), "nothing was classified"
    z = int(np.where(through_mask, np.abs(maps).sum(axis=(0, 2, 3)), -1).argmax())
    shown = _around(mask[z] | (maps[:, z] != 0).any(axis=0))
    strongest = max(float(np.abs(maps).max()), float(np.finfo(np.float32).tiny))
    height, width = mask[z][shown].shape
    aspect = spacing[1] / spacing[2]
    figure, panels = _grid(len(volume), aspect * height / width, f"{title}, axial slice {z + 1} of {len(mask)}")
    for series, (upper, lower) in enumerate(panels):
        present = bool(volume[series].any())
        heading = f"{shares[series]:.0%} of the decision" if present else ""
        _write_heading(figure, upper, series_names[series], heading)
        if not present:
            draw_empty(upper, "absent")
            draw_empty(lower, "absent")
            continue
        window = grey_window(volume[series])
        dimmed = (window[0], window[0] + DIMMING * (window[1] - window[0]))
        for axes, grey in ((upper, window), (lower, dimmed)):
            draw_grey(axes, volume[series, z][shown], grey, aspect)
            _draw_outline(axes, mask[z][shown])
        lower.imshow(_colours(maps[series, z][shown] / strongest), aspect=aspect, interpolation="nearest")
    handles = [Patch(color=FOR, label="for the class"), Patch(color=AGAINST, label="against it")]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    save_figure(figure, path)


def _around(wanted: Bool[np.ndarray, "y x"]) -> tuple[slice, slice]:
    """The box of `wanted` with some of its surroundings; everything when it is nowhere."""
    if not wanted.any():
        return slice(None), slice(None)
    spans = []
    for axis, size in zip((1, 0), wanted.shape, strict=True):
        places = np.flatnonzero(wanted.any(axis=axis))
        rim = round(SURROUNDINGS * size)
        spans.append(slice(max(0, int(places[0]) - rim), int(places[-1]) + rim + 1))
    y, x = spans
    return y, x


def _grid(num_columns: int, height_over_width: float, title: str) -> tuple[Figure, list[tuple[Axes, Axes]]]:
    """Two panels below each other for every column, placed by hand, in pixels."""
    panel_width = min(PANEL_WIDTH_MAX, (PICTURE_WIDTH - 2 * MARGIN) / num_columns - GAP)
    panel_height = panel_width * height_over_width
    width = max(2 * MARGIN + num_columns * (panel_width + GAP), 2 * MARGIN + 9 * len(title))
    height = TITLE_HEIGHT + HEADING_HEIGHT + 2 * (panel_height + GAP) + LEGEND_HEIGHT
    figure = new_figure(width, height)
    figure.text(MARGIN / width, 1 - 20 / height, title, fontsize=11, fontweight="bold", color=INK, va="center")
    panels = []
    for column in range(num_columns):
        left = MARGIN + column * (panel_width + GAP)
        tops = (TITLE_HEIGHT + HEADING_HEIGHT + row * (panel_height + GAP) for row in range(2))
        bounds = [(left / width, 1 - (top + panel_height) / height, panel_width / width, panel_height / height) for top in tops]
        panels.append((figure.add_axes(bounds[0]), figure.add_axes(bounds[1])))
    return figure, panels


def _write_heading(figure: Figure, axes: Axes, name: str, below: str) -> None:
    box, height = axes.get_position(), figure.get_size_inches()[1] * figure.dpi
    middle = (box.x0 + box.x1) / 2
    figure.text(middle, box.y1 + 30 / height, name, fontsize=11, fontweight="bold", color=INK, ha="center", va="center")
    figure.text(middle, box.y1 + 12 / height, below, fontsize=9, color=INK, ha="center", va="center")


def _draw_outline(axes: Axes, inside: Bool[np.ndarray, "y x"]) -> None:
    if inside.any():
        # a rim of background closes lines that would end at the edge of the picture
        y, x = (np.arange(-1, size + 1) for size in inside.shape)
        axes.contour(x, y, np.pad(inside.astype(float), 1), levels=[0.5], colors=[PAPER], linewidths=1.0)
    axes.set_xlim(-0.5, inside.shape[1] - 0.5)
    axes.set_ylim(inside.shape[0] - 0.5, -0.5)


def _colours(strength: Float[np.ndarray, "y x"]) -> Float[np.ndarray, "y x 4"]:
    """RGBA: the colour says for or against, the opacity how strongly; from -1 to 1."""
    colours = np.where((strength > 0)[..., None], to_rgb(FOR), to_rgb(AGAINST))
    return np.concatenate([colours, OPACITY * np.abs(strength)[..., None]], axis=-1)
