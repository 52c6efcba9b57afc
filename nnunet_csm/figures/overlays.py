"""Segmentations drawn over the series they belong to."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nnunet_csm.figures.canvas import (
    COLOURS,
    GAP,
    INK,
    box_around,
    draw_absent,
    draw_grey,
    draw_outline,
    grey_window,
    panel_grid,
    row_names_width,
    save_figure,
    write_above,
    write_beside,
    write_within,
)

# Pixels. The width of a panel shrinks with their number, which keeps files under 300 kB.
PICTURE_WIDTH = 820
PANEL_WIDTH_MAX = 250
TITLE_HEIGHT = 62
LEGEND_HEIGHT = 44

# Pixels that a method needs beside others, and letters of its name that fit there.
METHOD_WIDTH = 160
METHOD_NAME_LENGTH = 22
# lines of a name that fit above a panel, and pixels that any other needs
NAME_LINES, LINE_HEIGHT = 2, 18

FILL_OPACITY = 0.4


def save_overlay(
    path: str | Path,
    volume: Float[np.ndarray, "s z y x"],
    series_names: Sequence[str],
    reference: Int[np.ndarray, "z y x"] | None,
    prediction: Int[np.ndarray, "z y x"],
    label_names: Mapping[int, str],
    title: str,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    drawn: str = "prediction",
    uncertainty: Float[np.ndarray, "z y x"] | None = None,
) -> None:
    """A row per series: image, reference, prediction, and both as lines, enlarged; without a reference, image and prediction.

    `drawn` is the heading of the predictions' column, for labels that are something else. `uncertainty`, from 0 (nothing over the
    image) to 1 (yellow), has the last column.

    All show the slice with most of the labels in the reference (in the prediction where there is none). A series that is 0
    everywhere is drawn as absent. `label_names` names the labels to draw (0 is never drawn); `spacing` is in mm as (z, y, x).
    """
    assert len(volume) == len(series_names)
    assert prediction.shape == volume.shape[1:] and (reference is None or reference.shape == volume.shape[1:])
    labels = [label for label in sorted(label_names) if label != 0]
    guide = prediction if reference is None else reference
    z = _fullest_slice(guide, labels)
    shown = box_around((volume[:, z] != 0).any(axis=0) | np.isin(prediction[z], labels) | np.isin(guide[z], labels))
    predicted_slice = prediction[z][shown]
    reference_slice = None if reference is None else reference[z][shown]

    columns = ["image", drawn] if reference is None else ["image", "reference", drawn, "both, enlarged"]
    columns += [] if uncertainty is None else ["uncertainty, 0 to 1"]
    aspect = spacing[1] / spacing[2]
    height, width = predicted_slice.shape
    heading = f"{title}, slice {z + 1} of {len(guide)}"
    figure, panels = _grid(columns, series_names, aspect * height / width, heading)
    for series, row in zip(volume, panels, strict=True):
        if not series.any():
            for axes in row:
                draw_absent(axes)
            continue
        window = grey_window(series)
        for axes in row:
            draw_grey(axes, series[z][shown], window, aspect)
        if reference_slice is None:
            _draw_labels(row[1], predicted_slice, labels)
        else:
            _draw_labels(row[1], reference_slice, labels)
            _draw_labels(row[2], predicted_slice, labels)
            _draw_outlines(row[3], reference_slice, labels, "solid")
            _draw_outlines(row[3], predicted_slice, labels, "dashed")
            _enlarge(row[3], np.isin(reference_slice, labels) | np.isin(predicted_slice, labels))
        if uncertainty is not None:
            _draw_uncertainty(row[-1], uncertainty[z][shown])
    _draw_legend(figure, labels, label_names, with_lines=reference is not None)
    save_figure(figure, path)


def save_methods(
    path: str | Path,
    series: Float[np.ndarray, "z y x"] | Int[np.ndarray, "z y x"],
    segmentations: Mapping[str, Int[np.ndarray, "z y x"]],
    label_names: Mapping[int, str],
    title: str,
    notes: Mapping[str, str],
    spacing: tuple[float, float, float],
) -> None:
    """One case under several methods: image, reference and every prediction by name, whole and enlarged around the labels.

    The slice is the one with most of the labels in the reference, which comes first of `segmentations`. `notes` are words
    under a prediction, such as its Dice; `spacing` is in mm, (z, y, x).
    """
    (_, reference), *_ = segmentations.items()
    _, y, x = spacing
    labels = [label for label in sorted(label_names) if label != 0]
    z = _fullest_slice(reference, labels)
    anywhere = np.any([np.isin(one[z], labels) for one in segmentations.values()], axis=0)
    shown, aspect = box_around((series[z] != 0) | anywhere), y / x
    height, width = series[z][shown].shape
    columns = ["image", *(textwrap.fill(name, METHOD_NAME_LENGTH) for name in segmentations)]
    heading = f"{title}, slice {z + 1} of {len(reference)}"
    picture_width = max(PICTURE_WIDTH, METHOD_WIDTH * len(columns))
    figure, panels = _grid(columns, ("whole", "enlarged"), aspect * height / width, heading, picture_width)
    for row in panels:
        for axes in row:
            draw_grey(axes, series[z][shown], grey_window(series), aspect)
        for axes, segmentation in zip(row[1:], segmentations.values(), strict=True):
            _draw_outlines(axes, segmentation[z][shown], labels, "solid")
    for axes in panels[1]:
        _enlarge(axes, anywhere[shown])
    for axes, segmentation in zip(panels[0][1:], segmentations.values(), strict=True):
        _draw_labels(axes, segmentation[z][shown], labels)
    for axes, name in zip(panels[0][2:], list(segmentations)[1:], strict=True):
        write_within(axes, notes.get(name, ""), fontsize=10, fontweight="bold")
    _draw_legend(figure, labels, label_names, with_lines=False)
    save_figure(figure, path)


def _fullest_slice(segmentation: Int[np.ndarray, "z y x"], labels: Sequence[int]) -> int:
    """The slice that shows most of the labels, each as a share of its own largest area; the middle one where there is none.

    Of the shares the roots are added: something of every label is better than all of one.
    """
    areas = np.array([(segmentation == label).sum(axis=(1, 2)) for label in labels if (segmentation == label).any()])
    if not len(areas):
        return len(segmentation) // 2
    return int(np.sqrt(areas / areas.max(axis=1, keepdims=True)).sum(axis=0).argmax())


def _grid(
    columns: Sequence[str], row_names: Sequence[str], height_over_width: float, title: str, picture_width: float = PICTURE_WIDTH
) -> tuple[Figure, list[list[Axes]]]:
    """Panels with names above the columns and beside the rows."""
    names_width = row_names_width(row_names)
    panel_width = min(PANEL_WIDTH_MAX, (picture_width - names_width) / len(columns) - GAP)
    more = LINE_HEIGHT * max(0, max(name.count("\n") + 1 for name in columns) - NAME_LINES)
    panel, corner = (panel_width, panel_width * height_over_width), (names_width, TITLE_HEIGHT + more)
    figure, panels = panel_grid(title, len(row_names), len(columns), panel, corner, LEGEND_HEIGHT)
    for axes, name in zip(panels[0], columns, strict=True):
        write_above(figure, axes, name, 11 + 0.8 * more)
    for row, name in zip(panels, row_names, strict=True):
        write_beside(figure, row[0], name, fontsize=10)
    return figure, panels


def _colour(labels: Sequence[int], label: int) -> str:
    return COLOURS[labels.index(label) % len(COLOURS)]


def _draw_labels(axes: Axes, segmentation: Int[np.ndarray, "y x"], labels: Sequence[int]) -> None:
    rgba = np.zeros((*segmentation.shape, 4))
    for label in labels:
        rgba[segmentation == label] = (*to_rgb(_colour(labels, label)), FILL_OPACITY)
    axes.imshow(rgba, aspect=axes.get_aspect(), interpolation="nearest")
    _draw_outlines(axes, segmentation, labels, "solid")


def _draw_uncertainty(axes: Axes, uncertainty: Float[np.ndarray, "y x"]) -> None:
    """Colour over the image, from none where all is certain."""
    rgba = colormaps["autumn"](uncertainty)
    rgba[..., 3] = uncertainty
    axes.imshow(rgba, aspect=axes.get_aspect(), interpolation="nearest")


def _draw_outlines(axes: Axes, segmentation: Int[np.ndarray, "y x"], labels: Sequence[int], style: str) -> None:
    for label in labels:
        draw_outline(axes, segmentation == label, _colour(labels, label), 1.2, style)


def _enlarge(axes: Axes, wanted: Bool[np.ndarray, "y x"]) -> None:
    """Show `wanted` and a quarter of its size around it, in the proportions of the whole; everything when it is nowhere."""
    if not wanted.any():
        return
    size = np.array(wanted.shape)
    first, last = np.argwhere(wanted).min(axis=0), np.argwhere(wanted).max(axis=0)
    half = size / 2 * min(1.0, 1.5 * float(((last - first + 1) / size).max()))
    centre = np.clip((first + last + 1) / 2, half, size - half) - 0.5
    axes.set_xlim(centre[1] - half[1], centre[1] + half[1])
    axes.set_ylim(centre[0] + half[0], centre[0] - half[0])


def _draw_legend(figure: Figure, labels: Sequence[int], label_names: Mapping[int, str], with_lines: bool) -> None:
    handles: list[Patch | Line2D] = [Patch(color=_colour(labels, label), label=label_names[label]) for label in labels]
    if with_lines:
        handles.append(Line2D([], [], color=INK, linewidth=1.2, linestyle="solid", label="reference"))
        handles.append(Line2D([], [], color=INK, linewidth=1.2, linestyle="dashed", label="prediction"))
    figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 6), frameon=False, fontsize=9, labelcolor=INK)
