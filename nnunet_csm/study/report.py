"""A study's tables as files, and one self-contained page with tables and pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_csm.evaluation.bootstrap import CONFIDENCE
from nnunet_csm.evaluation.pictures import save_methods_of_case
from nnunet_csm.figures.page import Page
from nnunet_csm.figures.studies import Curve, PatientDifferences, save_label_efficiency, save_patient_differences
from nnunet_csm.study.statistics import (
    ALL_SERIES,
    AVERAGE,
    NUM_RESAMPLES,
    OF_CLASSIFIERS,
    SINGLE_MEAN,
    Contrast,
    contrasts_of,
    crossed_interval,
    differences,
    divisions,
    pairs,
    scores,
    with_single_mean,
)
from nnunet_csm.study.tables import arms_of, make_tables, percent, series_name, share_of_labels, versus

MOST_PANELS = 12
# with as many pictures there is no further case
MOST_CASES = 4
# in a picture of a case
METHODS_SIDE_BY_SIDE = 8

METHODS = f"""A score is the mean over the cases tested in a repeat, then the mean and standard deviation (n - 1) over repeats. A
structure that is neither there nor predicted has no Dice and does not count.

A comparison takes the cases and repeats that both arms have: the difference of each, averaged over a patient's repeats, then
over patients; so it may differ slightly from the difference of two means over repeats. Intervals are {100 * CONFIDENCE:g} %
percentile bootstrap intervals of {NUM_RESAMPLES} resamples, each of patients and, independently, of divisions and the seeds
within them. In simulations with patients, repeats and noise of a likely size they cover the truth in 95 to 100 % of studies:
they are rather too wide than too narrow. With one division, all is said of its one pretraining. Intervals of a score, in the
curves, hold the variation between patients, which a paired difference does not have: curves with overlapping bands can
differ clearly.

P-values are two-sided (Wilcoxon's signed-rank test over patients' means, which takes the repeats as given; of an AUC, and of
MAE, the mean absolute error of numbers, the bootstrap's) and corrected by Holm's method for all tests of a table. Where p and
interval disagree, the interval is the more careful one: it knows that trainings differ."""


@dataclass(frozen=True)
class CaseFiles:
    """Where images and references of tested cases are, in nnU-Net's layout.

    Attributes:
        images: folder of {case}_{channel:04d}{file_ending}.
        references: folder of {case}{file_ending}.
        channel: of the series to be drawn.
        label_names: of the labels to be drawn.
    """

    images: Path
    references: Path
    channel: int
    label_names: Mapping[int, str]
    file_ending: str = ".nii.gz"


def write_report(
    folder: Path,
    title: str,
    results: pd.DataFrame,
    predictions: pd.DataFrame,
    costs: pd.DataFrame,
    baseline: str | None = None,
    against: Sequence[Contrast] = (),
    cases: CaseFiles | None = None,
    pictures: Sequence[tuple[Path, str]] = (),
    text: str = "",
) -> Path:
    """Write tables (`Tables.save`), figures/ and report.html into `folder`; returns the page. What is not there has no section.

    Args:
        results, predictions, costs, baseline, against: as `make_tables`; paths of predictions are relative to `folder`.
        cases: for one case under all methods.
        pictures: (path, caption) of the pretrainings.
        text: the first lines of the page.

    Raises:
        UserError: an image that cannot be read.
    """
    tables = make_tables(results, predictions, costs, baseline, against)
    tables.save(folder)
    figures = folder / "figures"
    page = Page(title, text)
    for name in dict.fromkeys(tables.summary["table"]):
        page.section(name, tables=[layout.to_page() for layout in tables.layouts if layout.table == name])
    if curves := draw_label_efficiency(figures, tables.summary, results):
        page.section("Label efficiency", "Bands: 95 % intervals over patients and repeats.", images=curves)
    contrasts = contrasts_of(arms_of(results, predictions), baseline, against)
    if bars := draw_differences(figures, results, contrasts):
        page.section("Patient by patient", "Differences averaged over repeats, with their mean and its interval.", images=bars)
    if cases is not None and (compared := draw_cases(folder, results, cases)):
        page.section("One case under all methods", "The case in which the last arm has its median Dice.", images=compared)
    if pictures:
        page.section("Pretraining", images=pictures)
    if of_study := [layout.to_page() for layout in tables.layouts if not layout.table]:
        page.section("Cost", tables=of_study)
    page.section("How this was computed", METHODS)
    page.save(folder / "report.html")
    return folder / "report.html"


def draw_label_efficiency(figures: Path, summary: pd.DataFrame, results: pd.DataFrame) -> list[tuple[Path, str]]:
    """A picture a table and choice of series in which several shares of labels were used."""
    whole = summary[summary["tested"] == summary["finetuned"]]
    drawn: list[tuple[Path, str]] = []
    for (table, series), part in whole.groupby(["table", "tested"], sort=False):
        if part["labels"].nunique() < 2:
            continue
        panels = {
            structure: [_curve(arm, rows, results) for arm, rows in of_structure.groupby("arm", sort=False)]
            for structure, of_structure in list(part.groupby("structure", sort=False))[:MOST_PANELS]
        }
        measure = next((one for one in OF_CLASSIFIERS if list(panels) == [one]), "Dice")
        path = figures / f"labels_{len(drawn) + 1}.png"
        save_label_efficiency(path, panels, measure)
        drawn.append((path, f"{table}, {series_name(series)}: {measure} over the number of labelled training cases"))
    return drawn


def _curve(arm: str, rows: pd.DataFrame, results: pd.DataFrame) -> Curve:
    rows = rows.assign(num=(rows["num_labelled_min"] + rows["num_labelled_max"]) / 2).sort_values("num")
    bounds = np.array([_bounds(row, results) for _, row in rows.iterrows()])
    return Curve(arm, rows["num"].to_numpy(), rows["mean"].to_numpy(), bounds[:, 0], bounds[:, 1])


def _bounds(row: pd.Series, results: pd.DataFrame) -> tuple[float, float]:
    """Interval of the mean over repeats; none for AUC and MAE, and for means of single series."""
    if row["structure"] in OF_CLASSIFIERS or row["tested"] == SINGLE_MEAN:
        return np.nan, np.nan
    names = ["table", "arm", "labels", "finetuned", "tested"]
    group = results[(results[names] == [row[name] for name in names]).all(axis=1)]
    matrix = scores(group)[row["structure"]]
    return crossed_interval(matrix.to_numpy(), divisions(group, matrix.columns))


def draw_differences(figures: Path, results: pd.DataFrame, contrasts: Sequence[Contrast]) -> list[tuple[Path, str]]:
    """A picture a table: every comparison on all series given, of the average over structures where there are several."""
    if results.empty:
        return []
    panels: dict[str, list[PatientDifferences]] = {}
    for pair in pairs(with_single_mean(results), contrasts):
        if pair.names["finetuned"] != pair.names["tested"]:
            continue
        by_structure = differences(pair)
        matrix = by_structure[AVERAGE if AVERAGE in by_structure else next(iter(by_structure))]
        if matrix.empty:
            continue
        values = matrix.mean(axis=1).to_numpy()
        low, high = crossed_interval(matrix.to_numpy(), divisions(pair.arm, matrix.columns))
        name = _pair_name(pair.names, len({*results["tested"]}) > 1)
        panels.setdefault(str(pair.names["table"]), []).append(PatientDifferences(name, values, values.mean(), low, high))
    drawn: list[tuple[Path, str]] = []
    for number, (table, of_table) in enumerate(panels.items(), start=1):
        path = figures / f"patients_{number}.png"
        save_patient_differences(path, of_table[:MOST_PANELS], "difference of Dice")
        left_out = f" (the first {MOST_PANELS} of {len(of_table)} comparisons)" if len(of_table) > MOST_PANELS else ""
        drawn.append((path, f"{table}: each bar is a patient{left_out}"))
    return drawn


def _pair_name(names: Mapping[str, Any], with_series: bool) -> str:
    series = f", {series_name(names['tested'])}" if with_series else ""
    return f"{versus(names)}, {percent(names['labels'])} of labels{series}"


def draw_cases(folder: Path, results: pd.DataFrame, cases: CaseFiles) -> list[tuple[Path, str]]:
    """A picture a table and share of labels, where predictions of all series given were kept."""
    if "prediction" not in results:
        return []
    is_whole = (results["tested"] == ALL_SERIES) & (results["finetuned"] == ALL_SERIES)
    kept = results[is_whole & results["prediction"].map(lambda file: file != "" and (folder / file).is_file())]
    drawn: list[tuple[Path, str]] = []
    for (table, share), part in kept.groupby(["table", "labels"], sort=False):
        if len(drawn) >= MOST_CASES:
            break
        by_case = part.groupby(["arm", "repeat", "case"], sort=False).agg(dice=("dice", "mean"), file=("prediction", "first"))
        chosen = _median_case(by_case)
        if chosen is None:
            continue
        repeat, case = chosen
        found = by_case.xs((repeat, case), level=("repeat", "case"))
        labels = share_of_labels(share, part["num_labelled"].min(), part["num_labelled"].max())
        for first in range(0, len(found), METHODS_SIDE_BY_SIDE):
            some = found.iloc[first : first + METHODS_SIDE_BY_SIDE]
            path = folder / "figures" / f"case_{len(drawn) + 1}.png"
            save_methods_of_case(
                path,
                cases.images / f"{case}_{cases.channel:04d}{cases.file_ending}",
                cases.references / f"{case}{cases.file_ending}",
                {arm: folder / file for arm, file in some["file"].items()},
                cases.label_names,
                str(case),
                {arm: f"Dice {dice:.3f}" for arm, dice in some["dice"].items()},
            )
            drawn.append((path, f"{table}, labels {labels}, repeat {repeat}, case {case}"))
    return drawn


def _median_case(by_case: pd.DataFrame) -> tuple[int, str] | None:
    """(repeat, case) of the last arm's median Dice among those that all arms have (of an even number, the lower one)."""
    wide = by_case["dice"].unstack("arm").dropna()
    if wide.empty:
        return None
    last = wide[by_case.index.get_level_values("arm").unique()[-1]].sort_values(kind="stable")
    return last.index[(len(last) - 1) // 2]
