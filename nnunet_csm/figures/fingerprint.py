"""Which series the cases of a dataset have, and what its series look like."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from nnunet_csm.figures.canvas import (
    COLOURS,
    EMPTY,
    GAP,
    INK,
    PAPER,
    add_panel,
    bounds,
    draw_absent,
    draw_grey,
    grey_window,
    new_figure,
    row_names_width,
    save_figure,
    write,
    write_above,
)

State = Literal["present", "misaligned", "copy", "constant", "absent", "unusable"]

STATE_COLOURS: dict[State, str] = {
    "present": COLOURS[3],
    "misaligned": COLOURS[4],
    "copy": COLOURS[0],
    "constant": COLOURS[2],
    "absent": EMPTY,
    "unusable": COLOURS[5],
}

# Pixels.
WIDTH = 900
MARGIN = 12
TITLE_HEIGHT = 40
ROW_HEIGHT = 24
LEGEND_HEIGHT = 40
HEADING_HEIGHT = 34
CASE_WIDTH_MAX = 40
CASE_NAME_WIDTH = 11
LEADER_HEIGHT = 14
COUNT_WIDTH = 250
PANEL_WIDTH_MAX = 210
# squares of a checkerboard along the longer edge
NUM_SQUARES = 10

# More cases than this are counted by pattern.
NUM_CASES_DRAWN = 120
NUM_PATTERNS_DRAWN = 16


def save_fingerprint_picture(
    path: str | Path,
    title: str,
    series_names: Sequence[str],
    states: Mapping[str, Sequence[State]],
    slices: Mapping[str, Float[np.ndarray, "y x"]],
    shown: str,
    aspect: float = 1.0,
) -> None:
    """A chart of which case has which series, a slice of every series of one case, and each in squares with the first.

    `states`: case to the state of each of `series_names`. Up to NUM_CASES_DRAWN cases are a column each, in their order; more are
    counted by pattern, the most frequent first. `shown` says of which case the slices are. A series without a slice is drawn as
    absent; `aspect` is the height of a voxel over its width.
    """
    assert states and all(len(row) == len(series_names) for row in states.values())
    drawn_apart = len(states) <= NUM_CASES_DRAWN
    patterns = Counter(tuple(row) for row in states.values())
    named = _cases_to_name(states) if drawn_apart else {}
    chart_height = ROW_HEIGHT * (len(series_names) if drawn_apart else min(len(patterns), NUM_PATTERNS_DRAWN + 1))
    header = 8 if drawn_apart else ROW_HEIGHT
    footer = 10 + max((LEADER_HEIGHT + 7 * len(name) for name in named.values()), default=0)
    panel_width, panel_height = _panel_size(slices, len(series_names), aspect)

    chart_top = TITLE_HEIGHT + header
    slices_top = chart_top + chart_height + footer + LEGEND_HEIGHT + HEADING_HEIGHT + ROW_HEIGHT
    first = next((name for name in series_names if name in slices and slices[name].any()), None)
    pairs = [n for n in series_names if first and n != first and n in slices and slices[n].shape == slices[first].shape]
    boards_top = slices_top + panel_height + ROW_HEIGHT
    height = (boards_top if pairs else slices_top) + panel_height + MARGIN
    figure = new_figure(WIDTH, height)
    write(figure, MARGIN, 20, title, fontsize=12, fontweight="bold")
    if drawn_apart:
        _draw_cases(figure, series_names, list(states.values()), named, chart_top)
    else:
        _draw_patterns(figure, series_names, patterns, chart_top)
    _draw_legend(figure, states, chart_top + chart_height + footer + LEGEND_HEIGHT / 2)
    write(figure, MARGIN, slices_top - ROW_HEIGHT - HEADING_HEIGHT / 2, f"{shown}, middle slice", fontsize=11)
    for column, name in enumerate(series_names):
        left = MARGIN + column * (panel_width + GAP)
        axes = add_panel(figure, left, slices_top, panel_width, panel_height)
        write_above(figure, axes, name, ROW_HEIGHT / 2)
        if name in slices and slices[name].any():
            draw_grey(axes, slices[name], grey_window(slices[name][None]), aspect)
        else:
            draw_absent(axes)
        if name in pairs and first and slices[name].any():
            axes = add_panel(figure, left, boards_top, panel_width, panel_height)
            write_above(figure, axes, f"{first} and {name} in turn", ROW_HEIGHT / 2, fontsize=9)
            draw_grey(axes, checkerboard(slices[first], slices[name]), (0.0, 1.0), aspect)
    save_figure(figure, path)


def checkerboard(a: Float[np.ndarray, "y x"], b: Float[np.ndarray, "y x"]) -> Float[np.ndarray, "y x"]:
    """Squares of one slice and of another in turn, each in its own grey window: edges go on across them where both lie right."""
    greys = []
    for image in (a, b):
        low, high = grey_window(image[None])
        greys.append(np.clip((image - low) / max(high - low, 1e-20), 0, 1))
    edge = max(1, max(a.shape) // NUM_SQUARES)
    y, x = np.indices(a.shape) // edge
    return np.where((y + x) % 2 == 0, *greys)


def _cases_to_name(states: Mapping[str, Sequence[State]]) -> dict[int, str]:
    """Column to name of all cases that are not whole; none when there are too many to write side by side."""
    columns = {column: name for column, (name, row) in enumerate(states.items()) if set(row) != {"present"}}
    return columns if len(columns) * CASE_NAME_WIDTH <= WIDTH / 2 else {}


def _spread(wanted: Sequence[float], room: float) -> list[float]:
    """Positions as near to the wanted (ascending) ones as neighbours and the end of the room allow."""
    placed = list(wanted)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + CASE_NAME_WIDTH)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], room - CASE_NAME_WIDTH / 2 - (len(placed) - 1 - i) * CASE_NAME_WIDTH)
    return placed


def _panel_size(slices: Mapping[str, np.ndarray], num_panels: int, aspect: float) -> tuple[float, float]:
    shape = next(iter(slices.values())).shape if slices else (1, 1)
    width = min(PANEL_WIDTH_MAX, (WIDTH - 2 * MARGIN) / num_panels - GAP)
    return width, min(width * aspect * shape[0] / shape[1], 2 * PANEL_WIDTH_MAX)


def _draw_cases(
    figure: Figure, series_names: Sequence[str], rows: Sequence[Sequence[State]], named: Mapping[int, str], top: float
) -> None:
    """A column a case, a row a series; lines lead to the names of cases below."""
    counts = [sum(row[i] in ("present", "misaligned") for row in rows) for i in range(len(series_names))]
    labels = [f"{name}  {count}" for name, count in zip(series_names, counts, strict=True)]
    left = row_names_width(labels)
    width, height = min(WIDTH - left - MARGIN, CASE_WIDTH_MAX * len(rows)), ROW_HEIGHT * len(series_names)
    axes = add_panel(figure, left, top, width, height)
    colours = np.array([[to_rgb(STATE_COLOURS[row[i]]) for row in rows] for i in range(len(series_names))])
    axes.imshow(colours, aspect="auto", interpolation="nearest")
    for edge in np.arange(len(rows) - 1) + 0.5:
        axes.axvline(edge, color=PAPER, linewidth=0.6)
    for edge in np.arange(len(series_names) - 1) + 0.5:
        axes.axhline(edge, color=PAPER, linewidth=2)
    axes.set_axis_off()
    for i, label in enumerate(labels):
        write(figure, MARGIN, top + (i + 0.5) * ROW_HEIGHT, label, fontsize=10)
    centres = [(column + 0.5) * width / len(rows) for column in named]
    bottom = top + height
    for name, centre, x in zip(named.values(), centres, _spread(centres, WIDTH - MARGIN - left), strict=True):
        x0, y0, _, _ = bounds(figure, left + centre, bottom + 2, 0, 0)
        x1, y1, _, _ = bounds(figure, left + x, bottom + LEADER_HEIGHT - 1, 0, 0)
        figure.add_artist(Line2D((x0, x1), (y0, y1), color=INK, linewidth=0.6))
        write(figure, left + x, bottom + LEADER_HEIGHT, name, rotation=90, fontsize=8, ha="center", va="top")


def _draw_patterns(figure: Figure, series_names: Sequence[str], patterns: Mapping[tuple[State, ...], int], top: float) -> None:
    """A row a pattern: a square a series, and a bar as long as there are cases of it. Rare ones share the last row."""
    ranked = sorted(patterns.items(), key=lambda item: -item[1])
    shown, rest = ranked[:NUM_PATTERNS_DRAWN], ranked[NUM_PATTERNS_DRAWN:]
    most, total = ranked[0][1], sum(patterns.values())
    column_width = min(110.0, (WIDTH - COUNT_WIDTH - 2 * MARGIN - 90) / len(series_names))
    for i, name in enumerate(series_names):
        write(figure, MARGIN + (i + 0.5) * column_width, top - ROW_HEIGHT / 2, name, fontsize=10, ha="center")
    bars_left = 2 * MARGIN + column_width * len(series_names)
    bar_room = WIDTH - bars_left - COUNT_WIDTH + 110
    for row, (pattern, count) in enumerate(shown):
        y = top + row * ROW_HEIGHT
        for i, state in enumerate(pattern):
            _fill(figure, MARGIN + i * column_width + 2, y + 2, column_width - 4, ROW_HEIGHT - 4, STATE_COLOURS[state])
        length = max(2.0, bar_room * count / most)
        _fill(figure, bars_left, y + 5, length, ROW_HEIGHT - 10, INK)
        write(figure, bars_left + length + 8, y + ROW_HEIGHT / 2, f"{count} ({count / total:.1%})", fontsize=9)
    if rest:
        count = sum(count for _, count in rest)
        text = f"{len(rest)} further patterns: {count} cases ({count / total:.1%})"
        write(figure, bars_left, top + (len(shown) + 0.5) * ROW_HEIGHT, text, fontsize=9)


def _fill(figure: Figure, left: float, top: float, width: float, height: float, colour: str) -> None:
    axes = add_panel(figure, left, top, width, height)
    axes.set_facecolor(colour)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _draw_legend(figure: Figure, states: Mapping[str, Sequence[State]], middle: float) -> None:
    met = {state for row in states.values() for state in row}
    handles = [Patch(color=colour, label=state) for state, colour in STATE_COLOURS.items() if state in met]
    x, y, _, _ = bounds(figure, MARGIN, middle, 0, 0)
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(x, y), ncols=6, frameon=False, fontsize=9, labelcolor=INK, borderpad=0
    )
