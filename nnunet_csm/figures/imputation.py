"""A made up series beside what it was made from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from nnunet_csm.figures.canvas import GAP, draw_grey, grey_window, panel_grid, save_figure, write_above

# Pixels.
PANEL_WIDTH = 260
TITLE_HEIGHT = 62
# z-scores, the deviation that is white
WHITE = 1.0


def save_imputation(
    path: str | Path,
    given: Mapping[str, Float[np.ndarray, "z y x"]],
    truth: Float[np.ndarray, "z y x"] | None,
    imputed: Float[np.ndarray, "z y x"],
    deviation: Float[np.ndarray, "z y x"] | None,
    inside: Bool[np.ndarray, "z y x"],
    spacing: Sequence[float],
    series: str,
    title: str,
) -> None:
    """The middle slice of the foreground: series given, the truth where it is known, what was made up, where draws disagree.

    Args:
        path: of the picture.
        given: raw, by name.
        truth, imputed: z-scores, which share a grey window.
        deviation: z-scores; black is 0 and white is 1.
        inside: foreground.
        spacing: (x, y, z) in mm.
        series: name of what is imputed.
        title: of the picture.
    """
    z = int(np.median(np.nonzero(inside)[0]))
    panels = [(name, image, grey_window(image)) for name, image in given.items()]
    window = grey_window(imputed if truth is None else truth)
    if truth is not None:
        panels.append((f"{series}, scanned", truth, window))
    panels.append((f"{series}, IMPUTED", np.where(inside, imputed, window[0]), window))
    if deviation is not None:
        panels.append((f"disagreement, 0 to {WHITE:g} SD", deviation, (0.0, WHITE)))
    aspect = spacing[1] / spacing[0]
    height = PANEL_WIDTH * aspect * imputed.shape[1] / imputed.shape[2]
    figure, (row,) = panel_grid(title, 1, len(panels), (PANEL_WIDTH, height), (GAP, TITLE_HEIGHT), GAP, least_width=700)
    for axes, (name, image, of_image) in zip(row, panels, strict=True):
        write_above(figure, axes, name)
        draw_grey(axes, image[z], of_image, aspect)
    save_figure(figure, path)
