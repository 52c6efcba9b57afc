"""What all pictures share: a figure without global state, places in pixels, grey windows, colours, and an atomic, small PNG.

Figures are made with matplotlib's Figure and FigureCanvasAgg, never pyplot: nothing global changes, and threads may draw.
Panels of images are placed by hand, in pixels from the upper left corner: matplotlib's own layouts leave wide gaps between images
of a fixed aspect.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from PIL import Image

from nnunet_csm.files import whole

DPI = 100

INK = "#222222"
PAPER = "#ffffff"
EMPTY = "#eeeeee"

# Okabe and Ito's colours, told apart with every common colour vision; ordered so that the first ones differ most on grey.
COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")

# dark ones of them first, for lines on white
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)

# pixels between panels, and from the edge to what is written at it
GAP = 4
EDGE = 10

# 52 levels a channel, black and white among them: most bytes of a PNG of an MRI go into noise that the eye does not see.
COARSE_LEVELS = [5 * round(level / 5) for level in range(256)]


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of `width` x `height` pixels."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def bounds(figure: Figure, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
    """Pixels from the upper left corner to matplotlib's shares from the lower left one."""
    whole_width, whole_height = (float(inches * DPI) for inches in figure.get_size_inches())
    return left / whole_width, 1 - (top + height) / whole_height, width / whole_width, height / whole_height


def add_panel(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """A panel, by its place in pixels."""
    return figure.add_axes(bounds(figure, left, top, width, height))


def panel_grid(
    title: str,
    num_rows: int,
    num_columns: int,
    panel: tuple[float, float],
    corner: tuple[float, float],
    below: float,
    least_width: float = 0,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with a title and rows of equal panels; all sizes in pixels, (across, down).

    Args:
        panel: size of a panel.
        corner: where the first one begins.
        below: room under the last row.
        least_width: of the figure.
    """
    (width, height), (left, top) = panel, corner
    across = max(least_width, left + num_columns * (width + GAP))
    figure = new_figure(across, top + num_rows * (height + GAP) + below)
    write(figure, EDGE, 20, title, fontsize=12, fontweight="bold")
    places = [[(left + x * (width + GAP), top + y * (height + GAP)) for x in range(num_columns)] for y in range(num_rows)]
    return figure, [[add_panel(figure, *place, width, height) for place in row] for row in places]


def write(figure: Figure, left: float, middle: float, text: str, **style: object) -> None:
    """Text in ink about a height in pixels."""
    x, y, _, _ = bounds(figure, left, middle, 0, 0)
    figure.text(x, y, text, **{"color": INK, "va": "center", **style})  # type: ignore[arg-type]


def write_above(figure: Figure, axes: Axes, text: str, pixels: float = 11, fontsize: float = 10, **style: object) -> None:
    """Text centred over a panel, by default just above it."""
    box, height = axes.get_position(original=True), figure.get_size_inches()[1] * DPI
    place = (box.x0 + box.x1) / 2, box.y1 + pixels / height
    figure.text(*place, text, color=INK, ha="center", va="center", fontsize=fontsize, **style)  # type: ignore[arg-type]


def write_beside(figure: Figure, axes: Axes, text: str, pixels: float = 0, **style: object) -> None:
    """Text at the edge of the figure, left of a panel, `pixels` above its middle."""
    box, height = axes.get_position(original=True), figure.get_size_inches()[1] * DPI
    write(figure, EDGE, (1 - (box.y0 + box.y1) / 2) * height - pixels, text, **style)


def row_names_width(names: Sequence[str]) -> int:
    """Pixels that names of up to 11 points need to the left of a row of panels."""
    return 20 + 9 * max(len(name) for name in names)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write `figure` as PNG: a reader sees the old file or the whole new one. The folder is made when it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI)
    image = Image.open(drawn).convert("RGB").point(COARSE_LEVELS * 3)
    with whole(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)


def grey_window(series: Float[np.ndarray, "z y x"]) -> tuple[float, float]:
    """1st and 99th percentile of the voxels that are not 0 (0 is background), so that a few bright voxels darken nothing."""
    values = series[series != 0]
    if values.size == 0:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    return (low, high) if high > low else (low, low + 1.0)


def draw_grey(axes: Axes, image: Float[np.ndarray, "y x"], window: tuple[float, float], aspect: float = 1.0) -> None:
    """`aspect` is the height of a voxel over its width."""
    axes.imshow(image, cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect, interpolation="nearest")
    axes.set_axis_off()


def write_within(axes: Axes, text: str, fontsize: float, fontweight: str = "normal") -> None:
    """White text in the lower left corner of an image, outlined, so that it is read on white, too."""
    style = {"transform": axes.transAxes, "color": "white", "va": "bottom", "fontsize": fontsize, "fontweight": fontweight}
    note = axes.text(0.03, 0.03, text, **style)  # type: ignore[arg-type]
    note.set_path_effects([withStroke(linewidth=2, foreground="black")])


def line_colours(num_lines: int) -> list[str]:
    """Colours of that many lines; after the last it begins again."""
    return [LINE_COLOURS[line % len(LINE_COLOURS)] for line in range(num_lines)]


def draw_absent(axes: Axes) -> None:
    """A light panel that says so, where there is no image."""
    axes.set_facecolor(EMPTY)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.text(0.5, 0.5, "absent", transform=axes.transAxes, ha="center", va="center", color=INK, fontsize=10)


def draw_outline(axes: Axes, inside: Bool[np.ndarray, "y x"], colour: str, width: float, style: str = "solid") -> None:
    """A line around what is inside, over the image of a panel."""
    if inside.any():
        # a rim of background closes lines that would end at the edge of the picture
        y, x = (np.arange(-1, size + 1) for size in inside.shape)
        axes.contour(x, y, np.pad(inside.astype(float), 1), levels=[0.5], colors=[colour], linewidths=width, linestyles=style)
    axes.set_xlim(-0.5, inside.shape[1] - 0.5)
    axes.set_ylim(inside.shape[0] - 0.5, -0.5)


def box_around(wanted: Bool[np.ndarray, "y x"], margins: Sequence[int] = (2, 2)) -> tuple[slice, slice]:
    """Where `wanted` is True, widened by voxels along (y, x); everything when it is nowhere."""
    if not wanted.any():
        return slice(None), slice(None)
    spans = [np.flatnonzero(wanted.any(axis=axis)) for axis in (1, 0)]
    y, x = (slice(max(0, int(span[0]) - m), int(span[-1]) + m + 1) for span, m in zip(spans, margins, strict=True))
    return y, x


def dress(axes: Axes, title: str, xlabel: str, ylabel: str = "") -> None:
    """Titles, a light grid and no more lines than needed."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
