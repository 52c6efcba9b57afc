"""What of every series a classifier's decision rests on, drawn over that series."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from nnunet_csm.figures.canvas import (
    COLOURS,
    EDGE,
    GAP,
    INK,
    PAPER,
    box_around,
    draw_absent,
    draw_grey,
    draw_outline,
    grey_window,
    panel_grid,
    save_figure,
    write_above,
)

# Pixels.
PICTURE_WIDTH = 820
PANEL_WIDTH_MAX = 230
HEADINGS_HEIGHT = 84
LEGEND_HEIGHT = 40
LETTER_WIDTH = 10

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
    sides: tuple[str, str] = ("for the class", "against it"),
) -> None:
    """A column per series: the image with the mask as a line, and below it what speaks for and against the class.

    All show the slice through the mask with the strongest maps, cut to the mask and to where maps are. Full strength is
    that of the strongest place in any slice of any series, so that series can be compared. A series that is 0 everywhere is
    drawn as absent. `shares` stand above the columns; `spacing` is in mm as (z, y, x); `sides` say what is above 0 and below.
    """
    assert volume.shape == maps.shape and mask.shape == volume.shape[1:]
    assert len(volume) == len(series_names) == len(shares)
    through_mask = mask.any(axis=(1, 2))
    assert through_mask.any(), "nothing was classified"
    z = int(np.where(through_mask, np.abs(maps).sum(axis=(0, 2, 3)), -1).argmax())
    rims = [round(SURROUNDINGS * size) for size in mask.shape[1:]]
    shown = box_around(mask[z] | (maps[:, z] != 0).any(axis=0), rims)
    strongest = max(float(np.abs(maps).max()), float(np.finfo(np.float32).tiny))
    height, width = mask[z][shown].shape
    aspect = spacing[1] / spacing[2]
    panel_width = min(PANEL_WIDTH_MAX, (PICTURE_WIDTH - 2 * EDGE) / len(volume) - GAP)
    panel = (panel_width, panel_width * aspect * height / width)
    heading = f"{title}, slice {z + 1} of {len(mask)}"
    least_width = 2 * EDGE + LETTER_WIDTH * len(heading)
    figure, panels = panel_grid(heading, 2, len(volume), panel, (EDGE, HEADINGS_HEIGHT), LEGEND_HEIGHT, least_width)
    for series, (upper, lower) in enumerate(zip(*panels, strict=True)):
        present = bool(volume[series].any())
        write_above(figure, upper, series_names[series], 30, fontsize=11, fontweight="bold")
        if not present:
            draw_absent(upper)
            draw_absent(lower)
            continue
        write_above(figure, upper, f"{shares[series]:.0%} of the decision", 12, fontsize=9)
        window = grey_window(volume[series])
        dimmed = (window[0], window[0] + DIMMING * (window[1] - window[0]))
        for axes, grey in ((upper, window), (lower, dimmed)):
            draw_grey(axes, volume[series, z][shown], grey, aspect)
            draw_outline(axes, mask[z][shown], PAPER, 1.0)
        lower.imshow(_colours(maps[series, z][shown] / strongest), aspect=aspect, interpolation="nearest")
    handles = [Patch(color=colour, label=side) for colour, side in zip((FOR, AGAINST), sides, strict=True)]
    figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False, fontsize=9, labelcolor=INK)
    save_figure(figure, path)


def _colours(strength: Float[np.ndarray, "y x"]) -> Float[np.ndarray, "y x 4"]:
    """RGBA: the colour says for or against, the opacity how strongly; from -1 to 1."""
    colours = np.where((strength > 0)[..., None], to_rgb(FOR), to_rgb(AGAINST))
    return np.concatenate([colours, OPACITY * np.abs(strength)[..., None]], axis=-1)
