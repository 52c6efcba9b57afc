"""What all pictures share: a figure without global state, the grey window, colours, and an atomic, small PNG.

Figures are made with matplotlib's Figure and FigureCanvasAgg, never pyplot: nothing global changes, and threads may draw.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from nnunet_csm.files import whole

DPI = 100

# Okabe and Ito's colours, told apart with every common colour vision; ordered so that the first ones differ most on grey.
COLOURS = ("#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#D55E00", "#0072B2")

# 52 levels a channel, black and white among them: most bytes of a PNG of an MRI go into noise that the eye does not see.
COARSE_LEVELS = [5 * round(level / 5) for level in range(256)]

INK = "#222222"
PAPER = "#ffffff"
EMPTY = "#eeeeee"

# dark ones of COLOURS, for lines on white
LINE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure of `width` x `height` pixels."""
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


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


def line_colours(num_lines: int) -> list[str]:
    """Colours of that many lines; after the last it begins again."""
    return [LINE_COLOURS[line % len(LINE_COLOURS)] for line in range(num_lines)]


def label_axes(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title, names of the axes and a light grid, as all plots have them."""
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_empty(axes: Axes, text: str) -> None:
    """A light panel with a word in it, where there is no image."""
    axes.set_facecolor(EMPTY)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=INK, fontsize=10)
