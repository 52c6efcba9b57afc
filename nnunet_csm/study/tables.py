"""A study's tables in the layout of the paper's: CSV, Markdown, LaTeX with booktabs, and for the page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_csm.evaluation.bootstrap import CONFIDENCE
from nnunet_csm.evaluation.regions import BRATS_REGIONS
from nnunet_csm.files import write_text
from nnunet_csm.study.grid import HIDDEN, SHOWN, Grid
from nnunet_csm.study.statistics import (
    ALL_SERIES,
    AUC,
    AVERAGE,
    JOIN,
    SINGLE_MEAN,
    Contrast,
    compare,
    compare_classes,
    contrasts_of,
    summarize,
    summarize_classes,
    with_single_mean,
)

UNDEFINED = "–"
# more choices of series than these stand below each other
MOST_COLUMNS = 5


@dataclass(frozen=True)
class Tables:
    """Everything a study's results say.

    Attributes:
        summary: as `summarize`; AUC too.
        comparisons: as `compare`; AUC too.
        costs: as `costs_by_arm`; empty when no costs are known.
        grids: the same, for readers.
    """

    summary: pd.DataFrame
    comparisons: pd.DataFrame
    costs: pd.DataFrame
    grids: tuple[Grid, ...]

    def to_markdown(self) -> str:
        return "\n".join(grid.to_markdown() for grid in self.grids)

    def to_latex(self) -> str:
        needed = "% needs \\usepackage{booktabs}, and \\usepackage{graphicx} for wide tables"
        return "\n".join([needed, *(grid.to_latex() for grid in self.grids)])

    def save(self, folder: Path) -> None:
        """Write summary.csv, comparisons.csv, costs_by_arm.csv (where there are costs), tables.md and tables.tex."""
        folder.mkdir(parents=True, exist_ok=True)
        texts = {
            "summary.csv": self.summary.to_csv(index=False),
            "comparisons.csv": self.comparisons.to_csv(index=False),
            **({} if self.costs.empty else {"costs_by_arm.csv": self.costs.to_csv(index=False)}),
            "tables.md": self.to_markdown(),
            "tables.tex": self.to_latex(),
        }
        for name, text in texts.items():
            write_text(folder / name, text)


def make_tables(
    results: pd.DataFrame,
    predictions: pd.DataFrame,
    costs: pd.DataFrame,
    baseline: str | None = None,
    against: Sequence[Contrast] = (),
) -> Tables:
    """Summaries, comparisons and costs of a study. Each table may be empty, but one of results and predictions is not.

    Args:
        results: of segmentation, as statistics.py says, with the structures that are to be shown and averaged.
        predictions: of classification.
        costs: a row a run and the arm it served: run, kind ("pretraining", "fine-tuning", "prediction"), arm, labels, seconds,
            peak_memory_gb, num_crops, visible_tokens (mean of a crop), encoder_share (of a segmenter), device.
        baseline: the arm that all others are compared with, by default the first.
        against: further comparisons. Arms without results are not compared.
    """
    summaries, comparisons = [], []
    contrasts = contrasts_of(arms_of(results, predictions), baseline, against)
    if not results.empty:
        extended = with_single_mean(results)
        summaries.append(summarize(extended))
        comparisons.append(compare(extended, contrasts))
    if not predictions.empty:
        summaries.append(summarize_classes(predictions))
        comparisons.append(compare_classes(predictions, contrasts))
    summary, compared = _stacked(summaries), _stacked(comparisons)
    by_arm = costs if costs.empty else costs_by_arm(costs)
    grids = [grid for name in dict.fromkeys(summary["table"]) for grid in _grids_of(name, summary, compared)]
    return Tables(summary, compared, by_arm, (*grids, *_cost_grid(by_arm)))


def arms_of(results: pd.DataFrame, predictions: pd.DataFrame) -> list[str]:
    """Arms in order of appearance."""
    return list(dict.fromkeys(arm for table in (results, predictions) if not table.empty for arm in table["arm"]))


def _stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([table for table in tables if not table.empty] or tables[:1], ignore_index=True)


def _grids_of(name: str, summary: pd.DataFrame, comparisons: pd.DataFrame) -> Iterator[Grid]:
    of_table = _in_order(summary[summary["table"] == name])
    compared = _in_order(comparisons[comparisons["table"] == name])
    yield from _main_grids(name, of_table)
    yield from _subset_grids(name, of_table, _series_of(summary))
    yield from _robust_grid(name, of_table)
    yield from _comparison_grids(name, compared)


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """By series, then by share of labels, each in order of appearance."""
    ranks = {column: table[column].map(list(dict.fromkeys(table[column])).index) for column in ("finetuned", "tested", "labels")}
    return table.loc[pd.DataFrame(ranks).sort_values(list(ranks), kind="stable").index]


def costs_by_arm(costs: pd.DataFrame) -> pd.DataFrame:
    """A row a kind, arm and share of labels: means over runs of minutes, crops and visible tokens; largest memory in GB; devices.

    A pretraining serves all shares of labels of its repeat and counts once.
    """
    shared = costs.assign(labels=costs["labels"].where(costs["kind"] != "pretraining"))
    arms = shared["arm"].map(list(dict.fromkeys(shared["arm"])).index)
    once = shared.loc[arms.sort_values(kind="stable").index].drop_duplicates(["run", "kind", "arm"])
    grouped = once.groupby(["arm", "kind", "labels"], sort=False, dropna=False)
    return grouped.agg(
        num_runs=("run", "size"),
        minutes=("seconds", lambda seconds: seconds.mean() / 60),
        minutes_sd=("seconds", lambda seconds: seconds.std() / 60),
        peak_memory_gb=("peak_memory_gb", "max"),
        num_crops=("num_crops", "mean"),
        visible_tokens=("visible_tokens", "mean"),
        encoder_share=("encoder_share", "mean"),
        device=("device", lambda devices: ", ".join(dict.fromkeys(devices))),
    ).reset_index()


def _short(structure: str) -> str:
    """As the paper's tables name it."""
    return BRATS_REGIONS[structure][0] if structure in BRATS_REGIONS else structure


def _series_of(summary: pd.DataFrame) -> list[str]:
    """Every single series that was tested alone or among others, in order of appearance."""
    tested = [
        name for text in dict.fromkeys(summary["tested"]) if text not in (ALL_SERIES, SINGLE_MEAN) for name in text.split(JOIN)
    ]
    return list(dict.fromkeys(tested))


def _is_subset(table: pd.DataFrame) -> pd.Series:
    """Tested without some of the series that the network was fine-tuned on."""
    return table["tested"] != table["finetuned"]


def mean_and_sd(mean: float, sd: float) -> str:
    """As in the paper: 0.8345 ± 0.007. Of one repeat there is no deviation."""
    if np.isnan(mean):
        return UNDEFINED
    return f"{mean:.4f}" if np.isnan(sd) else f"{mean:.4f} ± {sd:.3f}"


def share_of_labels(share: float, least: int, most: int) -> str:
    """With the number of cases, which differs between folds of different sizes."""
    return f"{100 * share:g} % ({least if least == most else f'{least}–{most}'})"


def _series_name(tested: str, finetuned: str) -> str:
    if tested == finetuned:
        return "all series" if tested == ALL_SERIES else tested
    return f"{tested}, of {finetuned}"


def _main_grids(name: str, summary: pd.DataFrame) -> Iterator[Grid]:
    """Arms by structures, as tables I, II and V; one structure and few choices of series: arms by series, as III and IV."""
    whole = summary[~_is_subset(summary)]
    if whole.empty:
        return
    for is_auc, part in whole.groupby(whole["structure"] == AUC, sort=True):
        measure = "AUC" if is_auc else "Dice"
        structures, settings = (list(dict.fromkeys(part[column])) for column in ("structure", "tested"))
        by_series = len(structures) == 1 and 1 < len(settings) <= MOST_COLUMNS
        columns = [_series_name(tested, tested) for tested in settings] if by_series else structures
        part = part.assign(column=part["tested"].map(lambda t: _series_name(t, t)) if by_series else part["structure"])
        keys = ["labels"] if by_series else ["finetuned", "labels"]
        with_series = not by_series and len(settings) > 1
        with_labels = part["labels"].nunique() > 1
        blocks: list[int] = []
        best: set[tuple[int, int]] = set()
        rows: list[tuple[str, ...]] = []
        cells: dict[tuple[int, int], tuple[float, float]] = {}
        for _, block in part.groupby(keys, sort=False):
            blocks.append(len(rows))
            for arm, of_arm in block.groupby("arm", sort=False):
                one = of_arm.iloc[0]
                labels = share_of_labels(one["labels"], of_arm["num_labelled_min"].min(), of_arm["num_labelled_max"].max())
                series = _series_name(one["tested"], one["finetuned"])
                names = (arm, *([series] if with_series else []), labels)
                found = {row["column"]: (row["mean"], row["sd"]) for _, row in of_arm.iterrows()}
                for position, column in enumerate(columns):
                    cells[len(rows), position] = found.get(column, (np.nan, np.nan))
                rows.append((*names, *(mean_and_sd(*cells[len(rows), position]) for position in range(len(columns)))))
            best |= _best(cells, range(blocks[-1], len(rows)), len(columns), 3 if with_series else 2)
        header = ("Method", *(["Series"] if with_series else []), "Labels (cases)", *map(_short, columns))
        sizes = f"{_range(part['num_repeats'])} repeats, {part['num_patients'].max()} patients tested"
        only = f", {_series_name(settings[0], settings[0])}" if len(settings) == 1 else ""
        caption = f"{name}: {measure}{only}, mean ± standard deviation over {sizes}"
        # shares of labels of one arm read better as one block
        blocks = [0] if with_labels and part["arm"].nunique() == 1 and not with_series else blocks
        num_text, details = len(header) - len(columns), frozenset({"Labels (cases)"})
        yield Grid(name, measure, caption, header, tuple(rows), num_text, frozenset(best), tuple(blocks), details)


def _range(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low}–{high}"


def _best(
    cells: Mapping[tuple[int, int], tuple[float, float]], rows: range, num_columns: int, offset: int
) -> set[tuple[int, int]]:
    """The highest mean of each column within a block of two rows or more, as printed: ties share it."""
    best = set()
    for column in range(num_columns if len(rows) > 1 else 0):
        values = {row: round(cells[row, column][0], 4) for row in rows if not np.isnan(cells[row, column][0])}
        best |= {(row, column + offset) for row, value in values.items() if value == max(values.values())}
    return best


def _subset_grids(name: str, summary: pd.DataFrame, series: Sequence[str]) -> Iterator[Grid]:
    """Series given at test time by arms, a table a structure, for networks that were tested without some of their series."""
    partly = summary[_is_subset(summary)][["finetuned", "labels"]].drop_duplicates()
    for finetuned, share in partly.itertuples(index=False):
        part = summary[(summary["finetuned"] == finetuned) & (summary["labels"] == share)]
        arms = list(dict.fromkeys(part["arm"]))
        known = list(series) if finetuned == ALL_SERIES else finetuned.split(JOIN)
        for structure, of_structure in part.groupby("structure", sort=False):
            by_subset = {
                tuple(one in (known if tested in (ALL_SERIES, finetuned) else tested.split(JOIN)) for one in known): rows
                for tested, rows in of_structure.groupby("tested", sort=False)
            }
            rows: list[tuple[str, ...]] = []
            cells: dict[tuple[int, int], tuple[float, float]] = {}
            for subset in sorted(by_subset, key=lambda shown: (sum(shown), tuple(not one for one in shown))):
                found = {row["arm"]: (row["mean"], row["sd"]) for _, row in by_subset[subset].iterrows()}
                for position, arm in enumerate(arms):
                    cells[len(rows), position] = found.get(arm, (np.nan, np.nan))
                values = (mean_and_sd(*cells[len(rows), position]) for position in range(len(arms)))
                rows.append((*(SHOWN if one else HIDDEN for one in subset), *values))
            means = [float(np.mean([cells[row, position][0] for row in range(len(rows))])) for position in range(len(arms))]
            rows.append((*("mean", *[""] * (len(known) - 1)), *(mean_and_sd(mean, np.nan) for mean in means)))
            one = of_structure.iloc[0]
            labels = share_of_labels(share, one["num_labelled_min"], of_structure["num_labelled_max"].max())
            measure = "AUC" if structure == AUC else ("average Dice" if structure == AVERAGE else f"Dice of {_short(structure)}")
            caption = (
                f"{name}: {measure} with a part of the series at test time ({SHOWN} given, {HIDDEN} missing), "
                f"one network for all parts, labels {labels}"
            )
            best = _best_of_rows(cells, len(rows) - 1, len(arms), len(known))
            best |= {(len(rows) - 1, len(known) + p) for p in range(len(arms)) if len(arms) > 1 and means[p] == np.nanmax(means)}
            grid_name = f"subsets {structure} {100 * share:g}"
            yield Grid(name, grid_name, caption, (*known, *arms), tuple(rows), len(known), frozenset(best), (0, len(rows) - 1))


def _best_of_rows(
    cells: Mapping[tuple[int, int], tuple[float, float]], num_rows: int, num_columns: int, offset: int
) -> set[tuple[int, int]]:
    turned = {(column, row): cells[row, column] for row in range(num_rows) for column in range(num_columns)}
    return {(row, column + offset) for column, row in _best(turned, range(num_columns), num_rows, 0)}


def _robust_grid(name: str, summary: pd.DataFrame) -> Iterator[Grid]:
    """Medians and shares of failures, which a mean of Dice hides; of all series, and of the average where there is one."""
    part = summary[~_is_subset(summary) & (summary["structure"] != AUC)]
    part = part[part["structure"] == AVERAGE] if (part["structure"] == AVERAGE).any() else part
    if part.empty:
        return
    rows = tuple(
        (
            row["arm"],
            _series_name(row["tested"], row["finetuned"]),
            share_of_labels(row["labels"], row["num_labelled_min"], row["num_labelled_max"]),
            _short(row["structure"]),
            _number(row["median"]),
            UNDEFINED if np.isnan(row["share_failed"]) else f"{100 * row['share_failed']:.1f} %",
            f"{row['num_cases']} ({row['num_patients']})",
        )
        for _, row in part.iterrows()
    )
    header = ("Method", "Series", "Labels (cases)", "Structure", "Median", "Dice < 0.1", "Tested (patients)")
    caption = f"{name}: median Dice over patients, and the share of tested cases that are missed"
    details = frozenset({"Series", "Labels (cases)", "Structure", "Tested (patients)"})
    yield Grid(name, "failures", caption, header, rows, 4, details=details)


def _number(value: float) -> str:
    return UNDEFINED if np.isnan(value) else f"{value:.4f}"


def _comparison_grids(name: str, comparisons: pd.DataFrame) -> Iterator[Grid]:
    """With the series that networks were made for; with a part of them."""
    for is_part, part in comparisons.groupby(_is_subset(comparisons), sort=True):
        yield _comparison_grid(name, "comparisons of parts" if is_part else "comparisons", part)


def _comparison_grid(name: str, part: str, comparisons: pd.DataFrame) -> Grid:
    rows = tuple(
        (
            _versus(row),
            _series_name(row["tested"], row["finetuned"]),
            f"{100 * row['labels']:g} %",
            _short(row["structure"]),
            points(row["difference"]),
            UNDEFINED if np.isnan(row["low"]) else f"{points(row['low'])} to {points(row['high'])}",
            p_text(row["p_value"]),
            p_text(row["p_holm"]),
            f"{row['num_patients']} × {row['num_repeats']}",
            row["note"],
        )
        for _, row in comparisons.iterrows()
    )
    header = (
        "Comparison",
        "Series",
        "Labels",
        "Structure",
        "Points",
        "95 % interval",
        "p",
        "p (Holm)",
        "Patients × repeats",
        "Note",
    )
    keep = [i for i in range(len(header)) if header[i] != "Note" or any(row[i] for row in rows)]
    tests = " and ".join(dict.fromkeys("Wilcoxon over patients" if t == "Wilcoxon" else "bootstrap" for t in comparisons["test"]))
    given = " with a part of the series at test time" if part != "comparisons" else ""
    num_tests = int(comparisons["p_value"].count())
    caption = (
        f"{name}: paired differences{given} in points ({100 * CONFIDENCE:g} % bootstrap interval over patients and repeats; "
        f"p: {tests}; "
        f"Holm over the {num_tests} test{'s' if num_tests != 1 else ''} of this table)"
    )
    shown = tuple(tuple(row[i] for i in keep) for row in rows)
    details = frozenset({"Series", "Labels", "Structure", "Patients × repeats", "Note"})
    return Grid(name, part, caption, tuple(header[i] for i in keep), shown, 4, details=details)


def _versus(row: pd.Series) -> str:
    """What is compared; the baseline's share of labels where it is another."""
    other = "" if row["labels"] == row["baseline_labels"] else f" with {100 * row['baseline_labels']:g} %"
    return f"{row['arm']} − {row['baseline']}{other}"


def points(difference: float) -> str:
    """Of 100; with a sign."""
    return UNDEFINED if np.isnan(difference) else f"{100 * difference:+.2f}".replace("-", "−")


def p_text(p_value: float) -> str:
    if np.isnan(p_value):
        return UNDEFINED
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _cost_grid(costs: pd.DataFrame) -> Iterator[Grid]:
    if costs.empty:
        return
    rows = tuple(
        (
            row["arm"],
            row["kind"],
            UNDEFINED if np.isnan(row["labels"]) else f"{100 * row['labels']:g} %",
            str(row["num_runs"]),
            _rounded(row["minutes"], 1) + ("" if np.isnan(row["minutes_sd"]) else f" ± {row['minutes_sd']:.1f}"),
            _rounded(row["peak_memory_gb"], 1),
            _rounded(row["num_crops"], 0),
            _rounded(row["visible_tokens"], 0),
            UNDEFINED if np.isnan(row["encoder_share"]) else f"{100 * row['encoder_share']:.0f} %",
            row["device"],
        )
        for _, row in costs.iterrows()
    )
    header = (
        "Method",
        "Run",
        "Labels",
        "Runs",
        "Minutes a run",
        "Peak GB",
        "Crops",
        "Visible tokens a crop",
        "Encoder's share",
        "Device",
    )
    caption = (
        "Cost: mean ± standard deviation over runs; encoder's share: of the Dice, what is lost when a segmenter is given the "
        "encoder's features of other patches"
    )
    yield Grid("", "cost", caption, header, rows, 3, details=frozenset({"Device"}))


def _rounded(value: float, digits: int) -> str:
    """A dash for 0 too: memory that was not measured, crops of a prediction."""
    return UNDEFINED if np.isnan(value) or value == 0 else f"{value:,.{digits}f}"
