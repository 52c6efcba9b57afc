"""A study's tables in the layout of the paper's: CSV, Markdown, LaTeX with booktabs, and for the page."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from nnunet_csm.evaluation.bootstrap import CONFIDENCE
from nnunet_csm.evaluation.regions import short_name
from nnunet_csm.files import write_text
from nnunet_csm.study.layout import HIDDEN, SHOWN, TableLayout
from nnunet_csm.study.statistics import (
    ALL_SERIES,
    AUC,
    AVERAGE,
    JOIN,
    MAE,
    OF_CLASSIFIERS,
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
LABELS = "Labels (cases)"
# more choices of series than these stand below each other
MOST_COLUMNS = 5


@dataclass(frozen=True)
class Tables:
    """Everything a study's results say.

    Attributes:
        summary: as `summarize`; AUC and MAE too.
        comparisons: as `compare`; AUC and MAE too. Without columns where nothing is compared.
        costs: as `costs_by_arm`; empty when no costs are known.
        layouts: the same, for readers.
    """

    summary: pd.DataFrame
    comparisons: pd.DataFrame
    costs: pd.DataFrame
    layouts: tuple[TableLayout, ...]

    def to_markdown(self) -> str:
        return "\n".join(layout.to_markdown() for layout in self.layouts)

    def to_latex(self) -> str:
        needed = "% needs \\usepackage{booktabs} and \\usepackage{adjustbox}"
        return "\n".join([needed, *(layout.to_latex() for layout in self.layouts)])

    def save(self, folder: Path) -> None:
        """Write summary.csv, comparisons.csv and costs_by_arm.csv (where there are any), tables.md and tables.tex."""
        folder.mkdir(parents=True, exist_ok=True)
        numbers = {"summary.csv": self.summary, "comparisons.csv": self.comparisons, "costs_by_arm.csv": self.costs}
        texts = {
            **{name: table.to_csv(index=False) for name, table in numbers.items() if len(table.columns)},
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
    by_arm, of_study = cost_tables(costs)
    layouts = [layout for name in dict.fromkeys(summary["table"]) for layout in _layouts_of(name, summary, compared)]
    return Tables(summary, compared, by_arm, (*layouts, *of_study))


def cost_tables(costs: pd.DataFrame) -> tuple[pd.DataFrame, tuple[TableLayout, ...]]:
    """As `costs_by_arm`, and for readers; empty when no costs are known."""
    by_arm = costs if costs.empty else costs_by_arm(costs)
    return by_arm, tuple(_cost_layout(by_arm))


def arms_of(results: pd.DataFrame, predictions: pd.DataFrame) -> list[str]:
    """Arms in order of appearance."""
    return list(dict.fromkeys(arm for table in (results, predictions) if not table.empty for arm in table["arm"]))


def _stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([table for table in tables if not table.empty] or tables[:1], ignore_index=True)


def _layouts_of(name: str, summary: pd.DataFrame, comparisons: pd.DataFrame) -> Iterator[TableLayout]:
    of_table = _in_order(summary[summary["table"] == name])
    compared = _in_order(comparisons[comparisons["table"] == name])
    yield from _main_layouts(name, of_table)
    yield from _subset_layouts(name, of_table, _series_of(summary))
    yield from _robust_layout(name, of_table)
    yield from _comparison_layouts(name, compared)


def _in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Sort by series, then by share of labels, each in order of appearance."""
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


def _series_of(summary: pd.DataFrame) -> list[str]:
    """Every single series that was tested alone or among others, in order of appearance."""
    tested = [
        name for text in dict.fromkeys(summary["tested"]) if text not in (ALL_SERIES, SINGLE_MEAN) for name in text.split(JOIN)
    ]
    return list(dict.fromkeys(tested))


def _is_subset(table: pd.DataFrame) -> pd.Series:
    """Tested without some of the series that the network was fine-tuned on."""
    return table["tested"] != table["finetuned"]


def mean_and_sd(mean: float, sd: float, digits: int = 4, digits_of_sd: int = 3) -> str:
    """Write as in the paper: 0.8345 ± 0.007. Of one repeat there is no deviation."""
    if np.isnan(mean):
        return UNDEFINED
    return f"{mean:.{digits}f}" if np.isnan(sd) else f"{mean:.{digits}f} ± {sd:.{digits_of_sd}f}"


def share_of_labels(share: float, least: int, most: int) -> str:
    """Write a share with the number of cases, which differs between folds of different sizes."""
    return f"{100 * share:g} % ({least if least == most else f'{least}–{most}'})"


def _series_names(table: pd.DataFrame) -> list[str]:
    """The series given at test time, and those of the fine-tuning where they are others."""
    names = zip(table["tested"], table["finetuned"], strict=True)
    return [f"{tested}, of {finetuned}" if tested != finetuned else series_name(tested) for tested, finetuned in names]


def series_name(tested: str) -> str:
    return "all series" if tested == ALL_SERIES else tested


def _main_layouts(name: str, summary: pd.DataFrame) -> Iterator[TableLayout]:
    """Arms by structures, as tables I, II and V; one structure and few choices of series: arms by series, as III and IV."""
    whole = summary[~_is_subset(summary)]
    whole = whole.assign(Method=whole["arm"], Series=_series_names(whole))
    measures = whole["structure"].where(whole["structure"].isin(OF_CLASSIFIERS), "Dice")
    for measure, part in whole.groupby(measures, sort=False):
        part = part.copy()
        structures, settings = part["structure"].unique(), part["Series"].unique()
        by_series = len(structures) == 1 and 1 < len(settings) <= MOST_COLUMNS
        with_series = not by_series and len(settings) > 1
        part["block"] = part.groupby(["labels"] if by_series else ["finetuned", "labels"], sort=False).ngroup()
        row = part.groupby(["block", "arm"])
        least, most = row["num_labelled_min"].transform("min"), row["num_labelled_max"].transform("max")
        part[LABELS] = list(map(share_of_labels, part["labels"], least, most))
        part["column"] = part["Series"] if by_series else part["structure"].map(short_name)

        names = ["Method", *(["Series"] if with_series else []), LABELS]
        texts, means = _wide(part.sort_values("block", kind="stable"), ["block", *names], part["column"].unique())
        num_in_block = means.groupby("block").transform("size").to_numpy()
        best_of_block = means.groupby("block").transform("min" if measure == MAE else "max")
        best = (means == best_of_block).to_numpy() & (num_in_block > 1)[:, None]
        cells = texts.reset_index()
        starts = tuple(np.flatnonzero(cells.pop("block").diff() != 0).tolist())
        # shares of labels of one arm read better as one block
        blocks = (0,) if part["arm"].nunique() == 1 and not with_series else starts
        sizes = f"{_range(part['num_repeats'])} repeats, {part['num_patients'].max()} patients tested"
        only = f", {settings[0]}" if len(settings) == 1 else ""
        caption = f"{name}: {measure}{only}, mean ± standard deviation over {sizes}"
        yield TableLayout(name, measure, caption, cells, len(names), _beside(names, best), blocks).brief(LABELS)


def _wide(part: pd.DataFrame, names: Sequence[Any], columns: Sequence[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean ± deviation as text, and means as printed, a row each of `names` in order of appearance, by `column`."""
    texts = part.assign(text=list(map(mean_and_sd, part["mean"], part["sd"])), mean=part["mean"].round(4))
    wide = texts.pivot(index=names, columns="column", values=["text", "mean"])
    wide = wide.reindex(pd.MultiIndex.from_frame(part[names].drop_duplicates()))
    return wide["text"][columns].fillna(UNDEFINED), wide["mean"][columns].astype(float)


def _beside(names: Sequence[Any], best: Bool[np.ndarray, "row value"]) -> Bool[np.ndarray, "row column"]:
    """The best of a table whose first columns are names."""
    return np.pad(best, [(0, 0), (len(names), 0)])


def _range(numbers: pd.Series) -> str:
    low, high = int(numbers.min()), int(numbers.max())
    return str(low) if low == high else f"{low}–{high}"


def _subset_layouts(name: str, summary: pd.DataFrame, series: Sequence[str]) -> Iterator[TableLayout]:
    """Series given at test time by arms, a table a structure, for networks that were tested without some of their series."""
    partly = summary[_is_subset(summary)][["finetuned", "labels"]].drop_duplicates()
    for finetuned, share in partly.itertuples(index=False):
        part = summary[(summary["finetuned"] == finetuned) & (summary["labels"] == share)]
        known = list(series) if finetuned == ALL_SERIES else finetuned.split(JOIN)
        arms, places = part["arm"].unique(), list(range(len(known)))
        for structure, of_structure in part.groupby("structure", sort=False):
            given = [known if tested in (ALL_SERIES, finetuned) else tested.split(JOIN) for tested in of_structure["tested"]]
            dots = pd.DataFrame([[SHOWN if one in names else HIDDEN for one in known] for names in given], of_structure.index)
            rows = of_structure.assign(column=of_structure["arm"], num_shown=(dots == SHOWN).sum(axis=1)).join(dots)
            rows = rows.drop_duplicates([*places, "column"], keep="last")
            # few series first, the first of them before the others
            texts, means = _wide(rows.sort_values(["num_shown", *places], ascending=[True, *[False] * len(places)]), places, arms)
            over_all = rows.pivot(index=places, columns="column", values="mean")[arms].mean(skipna=False)
            last = ["mean", *[""] * (len(known) - 1), *(mean_and_sd(mean, np.nan) for mean in over_all)]
            cells = pd.DataFrame([*texts.reset_index().to_numpy(), last], columns=[*known, *arms])
            printed = np.vstack([means, over_all.round(4)])
            of_best = np.fmin if structure == MAE else np.fmax
            best = (printed == of_best.reduce(printed, axis=1, keepdims=True)) & (len(arms) > 1)
            one = of_structure.iloc[0]
            labels = share_of_labels(share, one["num_labelled_min"], of_structure["num_labelled_max"].max())
            known_measures = {AUC: AUC, MAE: MAE, AVERAGE: "average Dice"}
            measure = known_measures.get(structure, f"Dice of {short_name(structure)}")
            caption = (
                f"{name}: {measure} with a part of the series at test time ({SHOWN} given, {HIDDEN} missing), "
                f"one network for all parts, labels {labels}"
            )
            layout_name = f"subsets {structure} {100 * share:g}"
            yield TableLayout(name, layout_name, caption, cells, len(known), _beside(known, best), (0, len(cells) - 1))


def _robust_layout(name: str, summary: pd.DataFrame) -> Iterator[TableLayout]:
    """Medians and shares of failures, which a mean of Dice hides; of all series, and of the average where there is one."""
    part = summary[~_is_subset(summary) & ~summary["structure"].isin(OF_CLASSIFIERS)]
    part = part[part["structure"] == AVERAGE] if (part["structure"] == AVERAGE).any() else part
    if part.empty:
        return
    names = {
        "Method": part["arm"],
        "Series": _series_names(part),
        LABELS: list(map(share_of_labels, part["labels"], part["num_labelled_min"], part["num_labelled_max"])),
        "Structure": part["structure"].map(short_name),
    }
    numbers = {
        "Median": part["median"].map("{:.4f}".format, na_action="ignore"),
        "Dice < 0.1": part["share_failed"].map(lambda share: f"{100 * share:.1f} %", na_action="ignore"),
        "Tested (patients)": [
            f"{cases} ({patients})" for cases, patients in zip(part["num_cases"], part["num_patients"], strict=True)
        ],
    }
    caption = f"{name}: median Dice over patients, and the share of tested cases that are missed"
    yield _plain(name, "failures", caption, names, numbers).brief("Series", LABELS, "Structure", "Tested (patients)")


def _plain(table: str, name: str, caption: str, names: Mapping[str, Any], numbers: Mapping[str, Any]) -> TableLayout:
    """Columns of text; what is not defined is a dash, and nothing is best."""
    cells = pd.DataFrame({**names, **numbers}).fillna(UNDEFINED).reset_index(drop=True)
    return TableLayout(table, name, caption, cells, len(names), np.zeros(cells.shape, bool))


def _comparison_layouts(name: str, comparisons: pd.DataFrame) -> Iterator[TableLayout]:
    """Tables with the series that networks were made for, and with a part of them."""
    for is_part, part in comparisons.groupby(_is_subset(comparisons), sort=True):
        yield _comparison_layout(name, "comparisons of parts" if is_part else "comparisons", part)


def _comparison_layout(name: str, part: str, comparisons: pd.DataFrame) -> TableLayout:
    is_mae = bool((comparisons["structure"] == MAE).all())
    written = in_units if is_mae else points
    ends = zip(map(written, comparisons["low"]), map(written, comparisons["high"]), strict=True)
    names = {
        "Comparison": comparisons.apply(versus, axis=1),
        "Series": _series_names(comparisons),
        "Labels": comparisons["labels"].map(percent),
        "Structure": comparisons["structure"].map(short_name),
    }
    numbers = {
        "Difference" if is_mae else "Points": comparisons["difference"].map(written),
        "95 % interval": [UNDEFINED if low == UNDEFINED else f"{low} to {high}" for low, high in ends],
        "p": comparisons["p_value"].map(p_text),
        "p (Holm)": comparisons["p_holm"].map(p_text),
        "Patients × repeats": comparisons["num_patients"].astype(str) + " × " + comparisons["num_repeats"].astype(str),
        **({"Note": comparisons["note"]} if comparisons["note"].any() else {}),
    }
    tests = " and ".join(dict.fromkeys("Wilcoxon over patients" if t == "Wilcoxon" else "bootstrap" for t in comparisons["test"]))
    given = " with a part of the series at test time" if part != "comparisons" else ""
    num_tests = int(comparisons["p_value"].count())
    of, unit = (" of the MAE", ", below 0 is better") if is_mae else ("", " in points")
    caption = (
        f"{name}: paired differences{of}{given}{unit} ({100 * CONFIDENCE:g} % bootstrap interval over patients and repeats; "
        f"p: {tests}; Holm over the {num_tests} test{'s' if num_tests != 1 else ''} of this table)"
    )
    details = ("Series", "Labels", "Structure", "Patients × repeats", "Note")
    return _plain(name, part, caption, names, numbers).brief(*details)


def versus(row: Mapping[str, Any]) -> str:
    """What is compared; the baseline's share of labels where it is another."""
    other = "" if row["labels"] == row["baseline_labels"] else f" with {percent(row['baseline_labels'])}"
    return f"{row['arm']} − {row['baseline']}{other}"


def points(difference: float) -> str:
    """Write a difference of Dice in points of 100, with a sign."""
    return UNDEFINED if np.isnan(difference) else f"{100 * difference:+.2f}".replace("-", "−")


def in_units(difference: float) -> str:
    """Write a difference in the unit of the numbers, with a sign."""
    return UNDEFINED if np.isnan(difference) else f"{difference:+.4g}".replace("-", "−")


def p_text(p_value: float) -> str:
    if np.isnan(p_value):
        return UNDEFINED
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def _cost_layout(costs: pd.DataFrame) -> Iterator[TableLayout]:
    if costs.empty:
        return
    minutes = [
        _rounded(mean, 1) + ("" if np.isnan(sd) else f" ± {sd:.1f}")
        for mean, sd in zip(costs["minutes"], costs["minutes_sd"], strict=True)
    ]
    names = {"Method": costs["arm"], "Run": costs["kind"], "Labels": costs["labels"].map(percent)}
    numbers = {
        "Runs": costs["num_runs"].astype(str),
        "Minutes a run": minutes,
        "Peak GB": [_rounded(value, 1) for value in costs["peak_memory_gb"]],
        "Crops": [_rounded(value, 0) for value in costs["num_crops"]],
        "Visible tokens a crop": [_rounded(value, 0) for value in costs["visible_tokens"]],
        "Encoder's share": costs["encoder_share"].map(lambda share: f"{100 * share:.0f} %", na_action="ignore"),
        "Device": costs["device"],
    }
    caption = (
        "Cost: mean ± standard deviation over runs; encoder's share: of the Dice, what is lost when a segmenter is given the "
        "encoder's features of other patches"
    )
    yield _plain("", "cost", caption, names, numbers).brief("Device")


def percent(share: float) -> str:
    return UNDEFINED if np.isnan(share) else f"{100 * share:g} %"


def _rounded(value: float, digits: int) -> str:
    """A dash for 0 too: memory that was not measured, crops of a prediction."""
    return UNDEFINED if np.isnan(value) or value == 0 else f"{value:,.{digits}f}"
