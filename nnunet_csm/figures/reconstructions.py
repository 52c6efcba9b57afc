"""What the encoder saw of a patch, and what was rebuilt of the rest, or restored."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb

from nnunet_csm.figures.canvas import (
    GAP,
    draw_absent,
    draw_grey,
    grey_window,
    panel_grid,
    row_names_width,
    save_figure,
    write_above,
    write_beside,
    write_within,
)

# Pixels.
PANEL_WIDTH = 190
TITLE_HEIGHT = 62

COLUMNS = ("patch", "seen by the encoder", "rebuilt", "absolute difference")
COLUMNS_OF_RESTORATION = ("view", "seen by the encoder", "restored", "absolute difference")
SIDE_BY_SIDE = ("patch", "seen when masked", "rebuilt", "difference", "nothing hidden: rebuilt", "difference")
# of intensities from 0 to 1, the difference that is white
WHITE = 0.25

NOTHING = "nothing hidden"

# Blue, since grey levels are image: a hidden token cannot be taken for tissue.
HIDDEN_COLOUR = "#3d5a80"


def save_reconstruction(
    path: str | Path,
    patch: Float[np.ndarray, "s z y x"],
    hidden_voxels: Bool[np.ndarray, "s z y x"],
    rebuilt: Float[np.ndarray, "s z y x"],
    series_names: Sequence[str],
    series_present: Bool[np.ndarray, " s"],
    title: str,
) -> None:
    """A row per series, its middle slice: the patch, what the encoder saw, rebuilt (visible voxels as they are), |difference|.

    A row has one grey window; its differences run from black at 0 to white at half that window's width. The mean squared error
    beside a row is over all its hidden voxels, not over the slice alone.
    """
    assert patch.shape == hidden_voxels.shape == rebuilt.shape and len(patch) == len(series_names) == len(series_present)
    z = patch.shape[1] // 2
    filled = np.where(hidden_voxels, rebuilt, patch)

    def draw(series: int, panels: Sequence[Axes]) -> str:
        hidden = hidden_voxels[series]
        _draw_series(panels, patch[series], hidden, filled[series], z)
        return _error_text(patch[series], rebuilt[series], hidden)

    _save_rows(path, COLUMNS, patch, series_names, series_present, title, draw)


def save_restoration(
    path: str | Path,
    view: Float[np.ndarray, "s z y x"],
    seen: Float[np.ndarray, "s z y x"],
    restored: Float[np.ndarray, "s z y x"],
    series_names: Sequence[str],
    series_present: Bool[np.ndarray, " s"],
    title: str,
) -> None:
    """A row per series, its middle slice: the view from 0 to 1, what the encoder was given, what was restored, |difference|.

    What the encoder was given has a grey window of its own, the others that from 0 to 1; differences run from black at 0 to
    white at 0.5. The mean squared error beside a row is over the whole view.
    """
    assert view.shape == seen.shape == restored.shape and len(view) == len(series_names) == len(series_present)
    z = view.shape[1] // 2

    def draw(series: int, panels: Sequence[Axes]) -> str:
        difference = np.abs(restored[series] - view[series])
        windows = ((0.0, 1.0), grey_window(seen[series]), (0.0, 1.0))
        for axes, image, window in zip(panels[:3], (view[series], seen[series], restored[series]), windows, strict=True):
            draw_grey(axes, image[z], window)
        _draw_difference(panels[3], difference[z], 0.5)
        return f"MSE {np.mean(difference.astype(np.float64) ** 2):.3g}"

    _save_rows(path, COLUMNS_OF_RESTORATION, view, series_names, series_present, title, draw)


def _save_rows(
    path: str | Path,
    columns: Sequence[str],
    image: Float[np.ndarray, "s z y x"],
    series_names: Sequence[str],
    series_present: Bool[np.ndarray, " s"],
    title: str,
    draw: Callable[[int, Sequence[Axes]], str],
) -> None:
    """Write a row of panels per series, as `draw` draws them; `draw` gives what is written beside. `image` tells their shape."""
    panel, names_width = (PANEL_WIDTH, PANEL_WIDTH * image.shape[2] / image.shape[3]), row_names_width([*series_names, NOTHING])
    figure, rows = panel_grid(title, len(image), len(columns), panel, (names_width, TITLE_HEIGHT), GAP)
    for axes, name in zip(rows[0], columns, strict=True):
        write_above(figure, axes, name)
    for series, (series_name, panels) in enumerate(zip(series_names, rows, strict=True)):
        if series_present[series]:
            row_text = draw(series, panels)
        else:
            row_text = "absent"
            for axes in panels:
                draw_absent(axes)
        write_beside(figure, panels[0], series_name, 9, fontsize=11, fontweight="bold")
        write_beside(figure, panels[0], row_text, -9, fontsize=9)
    save_figure(figure, path)


def save_methods_of_patch(
    path: str | Path,
    true: Float[np.ndarray, "y x"],
    rebuilt: Mapping[str, Mapping[str, tuple[Float[np.ndarray, "y x"], Bool[np.ndarray, "y x"]]]],
    title: str,
) -> None:
    """A row per method: the slice as it is, what the method saw, rebuilt and |difference|; the last two also with nothing hidden.

    Args:
        path: of the picture.
        true: intensities from 0 to 1.
        rebuilt: by method, then by what it was given: the slice with visible voxels as they are, and which were rebuilt. Of one
            thing given, all voxels are rebuilt, and nothing is shown as hidden.
        title: of the picture.
    """
    width = row_names_width([f"{name} " for name in rebuilt])
    panel = (PANEL_WIDTH, PANEL_WIDTH * true.shape[0] / true.shape[1])
    figure, rows = panel_grid(title, len(rebuilt), len(SIDE_BY_SIDE), panel, (width, TITLE_HEIGHT), GAP)
    for axes, name in zip(rows[0], SIDE_BY_SIDE, strict=True):
        write_above(figure, axes, name)
    for (method, by_given), panels in zip(rebuilt.items(), rows, strict=True):
        write_beside(figure, panels[0], method, fontsize=11, fontweight="bold")
        draw_grey(panels[0], true, (0.0, 1.0))
        *masked, (whole, _) = by_given.values()
        for axes in panels[1:4]:
            axes.set_axis_off()
        for image, hidden in masked:
            _draw_seen(panels[1], true, hidden, (0.0, 1.0))
            _draw_rebuilt(panels[2:4], true, image)
        _draw_rebuilt(panels[4:], true, whole)
    save_figure(figure, path)


def _draw_rebuilt(panels: Sequence[Axes], true: Float[np.ndarray, "y x"], rebuilt: Float[np.ndarray, "y x"]) -> None:
    draw_grey(panels[0], rebuilt, (0.0, 1.0))
    _draw_difference(panels[1], np.abs(rebuilt - true), WHITE)


def _draw_difference(axes: Axes, difference: Float[np.ndarray, "y x"], white: float) -> None:
    """From black at 0 to white, which is said."""
    draw_grey(axes, difference, (0.0, white))
    write_within(axes, f"white: {white:.2g}", fontsize=8)


def _draw_seen(axes: Axes, true: Float[np.ndarray, "y x"], hidden: Bool[np.ndarray, "y x"], window: tuple[float, float]) -> None:
    """Hidden voxels in a colour of their own."""
    low, high = window
    seen = np.repeat(np.clip((true[..., None] - low) / (high - low), 0, 1), 3, axis=-1)
    seen[hidden] = to_rgb(HIDDEN_COLOUR)
    axes.imshow(seen, interpolation="nearest")
    axes.set_axis_off()


def _error_text(true: Float[np.ndarray, "z y x"], rebuilt: Float[np.ndarray, "z y x"], hidden: Bool[np.ndarray, "z y x"]) -> str:
    if not hidden.any():
        return NOTHING
    difference = rebuilt[hidden].astype(np.float64) - true[hidden]
    return f"MSE {np.mean(difference**2):.3g}"


def _draw_series(
    panels: Sequence[Axes],
    true: Float[np.ndarray, "z y x"],
    hidden: Bool[np.ndarray, "z y x"],
    filled: Float[np.ndarray, "z y x"],
    z: int,
) -> None:
    low, high = grey_window(true)
    draw_grey(panels[0], true[z], (low, high))
    _draw_seen(panels[1], true[z], hidden[z], (low, high))
    if hidden.all():
        panels[1].text(
            0.5, 0.5, "hidden whole", transform=panels[1].transAxes, ha="center", va="center", color="white", fontsize=10
        )
    draw_grey(panels[2], filled[z], (low, high))
    _draw_difference(panels[3], np.abs(filled[z] - true[z]), (high - low) / 2)
