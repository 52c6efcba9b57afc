"""What a study's results say: means over repeats, and arms compared on the same patients.

Results have a row a tested case and structure: `SETTING`, num_labelled, repeat, case, patient, structure, dice, and prediction, a
path. Predictions of classes have a row a sample: `SETTING`, num_labelled, repeat, case, mask_label, patient, class, p_CLASS;
those of numbers value and predicted in place of the last two.
`finetuned` and `tested` name series: "all", "FLAIR", "T1w+T2w"; `labels` is the share of training patients that are labelled.

A setting is what one row of a paper's table is about. A repeat is a training with a split, a seed or a fold of its
own; it may test all patients or some. Dice is NaN where it is not defined (evaluation/scores.py) and then counts nowhere.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.stats import wilcoxon

from nnunet_csm.evaluation.bootstrap import SEED, drawn, drawn_within, interval, mean_of_defined, ratio, two_sided_p
from nnunet_csm.evaluation.class_metrics import auc
from nnunet_csm.evaluation.repeats import labels_and_probabilities

SETTING = ["table", "arm", "labels", "finetuned", "tested"]
ALL_SERIES, JOIN = "all", "+"
# fine-tuned and tested on one series, the mean over the series
SINGLE_MEAN = "mean of single series"
AVERAGE = "Average"
# of classes, and of numbers: what stands in place of a structure, and is no Dice
AUC, MAE = "AUC", "MAE"
OF_CLASSIFIERS = (AUC, MAE)

# Dice below which a structure counts as missed
FAILURE = 0.1
NUM_RESAMPLES = 5000

COMPARED = ["table", "arm", "baseline", "labels", "baseline_labels", "finetuned", "tested"]
PAIR = ["patient", "case", "repeat"]
RUN = ["table", "arm", "labels", "repeat"]


@dataclass(frozen=True)
class Contrast:
    """`arm` minus `baseline`. Without shares of labels: at every share that both have; else `arm` at `labels`, `baseline` at
    `baseline_labels` (the same where it is None)."""

    arm: str
    baseline: str
    labels: float | None = None
    baseline_labels: float | None = None


@dataclass(frozen=True)
class Pair:
    """Rows of two arms to be compared; `names` are `COMPARED`."""

    names: Mapping[str, Any]
    arm: pd.DataFrame
    baseline: pd.DataFrame


def with_single_mean(results: pd.DataFrame) -> pd.DataFrame:
    """Add, where networks were fine-tuned and tested on one series each, their mean over the series as a setting of its own."""
    single = _of_single_series(results)
    if single.empty:
        return results
    keys = [*RUN, *(["division"] if "division" in single else []), "num_labelled", "case", "patient", "structure"]
    mean = single.groupby(keys, sort=False)["dice"].mean().reset_index().assign(finetuned=SINGLE_MEAN, tested=SINGLE_MEAN)
    return pd.concat([results, mean], ignore_index=True)


def _of_single_series(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of networks of one series, of runs that have all single series of their table, where there are several.

    Means over different series are not to be compared.
    """
    one = ~table["tested"].str.contains(JOIN, regex=False) & (table["tested"] != ALL_SERIES)
    single = table[one & (table["tested"] == table["finetuned"])]
    num_series = single["table"].map(single.groupby("table")["tested"].nunique())
    return single[(num_series > 1) & (single.groupby(RUN)["tested"].transform("nunique") == num_series)]


def summarize(results: pd.DataFrame) -> pd.DataFrame:
    """A row a setting and structure, and the average over structures where there are several.

    Columns are `SETTING`, num_labelled_min, num_labelled_max, structure and these. mean and sd (n - 1): over repeats, of the
    mean over cases within each, as the paper's tables have them. The average is the mean over structures of these means; a
    repeat in which a structure is nowhere defined has none. num_cases counts tested cases, the same one in two repeats twice.
    median: over patients, of a patient's mean over repeats. share_failed: of tested cases, those with Dice below 0.1. For the
    latter two, a case's average is over the structures defined in it.
    """
    structures = list(dict.fromkeys(results["structure"]))
    rows: list[dict[str, Any]] = []
    for setting, group in results.groupby(SETTING, sort=False):
        by_case = _wide(group, structures)
        by_repeat = by_case.groupby("repeat").mean()
        if len(structures) > 1:
            by_repeat.insert(0, AVERAGE, by_repeat.mean(axis=1, skipna=False))
            by_case.insert(0, AVERAGE, by_case.mean(axis=1))
        for structure in by_repeat:
            dice = by_case[structure].dropna()
            tested = {
                "num_cases": len(dice),
                "num_patients": dice.index.get_level_values("patient").nunique(),
                "median": dice.groupby("patient").mean().median(),
                "share_failed": (dice < FAILURE).mean() if len(dice) else np.nan,
            }
            rows.append({**_over_repeats(setting, group, structure, by_repeat[structure]), **tested})
    return pd.DataFrame(rows)


def _over_repeats(setting: tuple[Any, ...], group: pd.DataFrame, structure: str, by_repeat: pd.Series) -> dict[str, Any]:
    """The first columns of a summary, up to num_repeats."""
    return {
        **dict(zip(SETTING, setting, strict=True)),
        "num_labelled_min": int(group["num_labelled"].min()),
        "num_labelled_max": int(group["num_labelled"].max()),
        "structure": structure,
        "mean": by_repeat.mean(),
        "sd": by_repeat.std(),
        "num_repeats": int(by_repeat.count()),
    }


def _wide(group: pd.DataFrame, structures: Sequence[str]) -> pd.DataFrame:
    """Dice of one setting: a row a (patient, case, repeat), a column a structure."""
    assert not group.duplicated([*PAIR, "structure"]).any(), "two results of one case and structure in one repeat"
    return group.set_index([*PAIR, "structure"])["dice"].unstack("structure").reindex(columns=structures)


def contrasts_of(arms: Sequence[str], baseline: str | None = None, against: Sequence[Contrast] = ()) -> list[Contrast]:
    """Every arm against the baseline, the first arm where None is given, in their order; then `against`."""
    baseline = arms[0] if baseline is None else baseline
    return list(dict.fromkeys([*(Contrast(arm, baseline) for arm in arms if arm != baseline), *against]))


def pairs(table: pd.DataFrame, contrasts: Sequence[Contrast]) -> Iterator[Pair]:
    """What each contrast compares, in every table and with every choice of series in which both arms were run already."""
    series = ["table", "finetuned", "tested"]
    for (name, finetuned, tested), rows in table.groupby(series, sort=False):
        for contrast in contrasts:
            arm, baseline = (rows[rows["arm"] == one] for one in (contrast.arm, contrast.baseline))
            shares = list(dict.fromkeys(arm["labels"])) if contrast.labels is None else [contrast.labels]
            for share in shares:
                other = share if contrast.baseline_labels is None else contrast.baseline_labels
                first, second = arm[arm["labels"] == share], baseline[baseline["labels"] == other]
                if len(first) and len(second):
                    names = (name, contrast.arm, contrast.baseline, share, other, finetuned, tested)
                    yield Pair(dict(zip(COMPARED, names, strict=True)), first, second)


def differences(pair: Pair) -> dict[str, pd.DataFrame]:
    """Structure to differences of Dice, arm - baseline: a row a patient, a column a repeat, NaN where one of the two lacks it.

    A patient's cases are averaged; the average over structures is, in each case, over those defined in both arms.
    """
    structures = list(dict.fromkeys(pair.arm["structure"]))
    return _by_patient(_wide(pair.arm, structures) - _wide(pair.baseline, structures))


def scores(group: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Structure to Dice of one setting, as `differences` has it."""
    return _by_patient(_wide(group, list(dict.fromkeys(group["structure"]))))


def _by_patient(by_case: pd.DataFrame) -> dict[str, pd.DataFrame]:
    if by_case.shape[1] > 1:
        by_case.insert(0, AVERAGE, by_case.mean(axis=1))
    return {name: by_case[name].groupby(["patient", "repeat"]).mean().unstack("repeat").dropna(how="all") for name in by_case}


def compare(results: pd.DataFrame, contrasts: Sequence[Contrast]) -> pd.DataFrame:
    """A row a pair of settings and structure, differences being arm - baseline on the same (case, repeat).

    Columns are `COMPARED`, structure, num_patients, num_repeats, num_pairs and these. difference: mean over patients of a
    patient's mean over repeats. low, high: `crossed_interval` over patients and repeats. p_value: Wilcoxon's signed-rank test
    over patients' means. p_holm: corrected for all comparisons of the table, those with a part of the series at test time being
    a table of their own. num_unpaired counts (case, repeat) that one arm lacks: not tested, or Dice not defined, as of a
    structure that is neither there nor predicted.
    """
    rows = []
    for pair in pairs(results, contrasts):
        num_unpaired = _num_unpaired(pair)
        for structure, matrix in differences(pair).items():
            found, of_division = matrix.to_numpy(), divisions(pair.arm, matrix.columns)
            low, high = crossed_interval(found, of_division)
            there = (~np.isnan(found)).any(0)
            rows.append(
                {
                    **pair.names,
                    "structure": structure,
                    "num_patients": len(found),
                    "num_repeats": int(there.sum()),
                    "num_pairs": int((~np.isnan(found)).sum()),
                    "num_unpaired": num_unpaired[structure],
                    "difference": mean_of_defined(found, axis=1).mean() if len(found) else np.nan,
                    "low": low,
                    "high": high,
                    "test": "Wilcoxon",
                    "p_value": signed_rank(mean_of_defined(found, axis=1)),
                    "p_holm": np.nan,
                    "note": _note(len(found), int(there.sum()), len({*of_division[there]})),
                }
            )
    return _with_holm(rows)


def divisions(table: pd.DataFrame, repeats: Sequence[int]) -> np.ndarray:
    """The division of patients, with its pretraining, that each repeat is of; one of its own where nothing is said."""
    known = dict(zip(table["repeat"], table["division"], strict=True)) if "division" in table else {}
    return np.array([known.get(repeat, repeat) for repeat in repeats])


def _num_unpaired(pair: Pair) -> dict[str, int]:
    structures = list(dict.fromkeys(pair.arm["structure"]))
    arm, baseline = (_wide(rows, structures).notna() for rows in (pair.arm, pair.baseline))
    arm, baseline = arm.align(baseline, fill_value=False)
    lacking = arm != baseline
    return {
        AVERAGE: int((arm.any(axis=1) != baseline.any(axis=1)).sum()),
        **{name: int(lacking[name].sum()) for name in structures},
    }


def _note(num_patients: int, num_repeats: int, num_divisions: int) -> str:
    if num_patients == 0:
        return "no case that both have"
    if num_patients == 1:
        return "one patient: no interval, no test"
    if num_repeats == 1:
        return "one repeat: the interval is over patients alone"
    return "one division: all is said of its one pretraining" if num_divisions == 1 else ""


def _with_holm(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=None if rows else COMPARED)
    for _, group in table.groupby(["table", table["tested"] != table["finetuned"]], sort=False):
        table.loc[group.index, "p_holm"] = holm(group["p_value"].to_numpy(np.float64))
    return table


def crossed_interval(
    values: Float[np.ndarray, "p r"],
    divisions: Int[np.ndarray, " r"] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over rows of their means over columns; NaN is what does not exist.

    A resample draws rows and, independently, columns, with replacement (pigeonhole bootstrap, Owen 2007), and keeps what exists
    in both. Columns of one division share its patients and its pretraining: divisions are drawn, then columns within each. It
    knows that rows differ, and columns, and is conservative where their interplay varies most. With one column it draws rows
    alone; with one row both ends are NaN.
    """
    if len(values) < 2:
        return np.nan, np.nan
    rng = np.random.default_rng(seed)
    exists = ~np.isnan(values)
    num_rows, num_columns = values.shape
    rows = drawn(rng, num_rows, num_resamples)
    columns = drawn_within(rng, np.arange(num_columns) if divisions is None else divisions, num_resamples)
    weight = columns @ exists.T
    means = np.nan_to_num(ratio(columns @ np.where(exists, values, 0).T, weight))
    low, high = interval(ratio((rows * means).sum(1), (rows * (weight > 0)).sum(1)))
    return float(low), float(high)


def signed_rank(values: Float[np.ndarray, " p"]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test, as scipy's; 1 where all are 0, NaN for fewer than two values."""
    if len(values) < 2:
        return np.nan
    return float(wilcoxon(values).pvalue) if values.any() else 1.0


def holm(p_values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Corrected for their number (Holm 1979); NaN stays and does not count."""
    corrected = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[: np.count_nonzero(~np.isnan(p_values))]  # NaN is sorted to the end
    corrected[order] = np.minimum(np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1)), 1)
    return corrected


def summarize_classes(predictions: pd.DataFrame) -> pd.DataFrame:
    """A row a setting, as `summarize` has it, of the AUC, or of numbers the MAE: mean and sd over repeats of the repeat's own.

    With several classes the AUC is the mean of each against all others. There is no median and no share of failures.
    """
    known = predictions.assign(series=predictions["tested"])
    single = _of_single_series(known).assign(finetuned=SINGLE_MEAN, tested=SINGLE_MEAN)
    rows = []
    for setting, group in pd.concat([known, single]).groupby(SETTING, sort=False):
        by_repeat = group.groupby(["repeat", "series"])[list(group)].apply(_score_of_all).groupby("repeat").mean()
        num_cases = len(group.drop_duplicates(["repeat", "case", "mask_label"]))
        tested = {"num_cases": num_cases, "num_patients": group["patient"].nunique(), "median": np.nan, "share_failed": np.nan}
        rows.append({**_over_repeats(setting, group, _measure(predictions), by_repeat), **tested})
    return pd.DataFrame(rows)


def compare_classes(predictions: pd.DataFrame, contrasts: Sequence[Contrast]) -> pd.DataFrame:
    """A row a pair of settings, as `compare` has it, of AUC or MAE on the samples and repeats that both arms have.

    difference: mean over repeats. low, high: resamples of patients and, independently, of repeats, each with a score per repeat.
    An AUC has no value of a patient to rank, so p_value is the bootstrap's: twice the smaller share of resamples beyond 0.
    """
    rows = []
    for pair in pairs(predictions, contrasts):
        runs = _common_runs(pair)
        num_samples = sum(len(arm) for arm, _ in runs)
        num_patients = len({patient for arm, _ in runs for patient in arm["patient"]})
        resampled = _differences_of_scores(runs, NUM_RESAMPLES) if num_patients > 1 else np.full(1, np.nan)
        low, high = interval(resampled)
        rows.append(
            {
                **pair.names,
                "structure": _measure(predictions),
                "num_patients": num_patients,
                "num_repeats": len(runs),
                "num_pairs": num_samples,
                "num_unpaired": len(pair.arm) + len(pair.baseline) - 2 * num_samples,
                "difference": _differences_of_scores(runs, 0)[0] if runs else np.nan,
                "low": low,
                "high": high,
                "test": "bootstrap",
                "p_value": two_sided_p(resampled),
                "p_holm": np.nan,
                "note": _note(num_patients, len(runs), len({*divisions(pair.arm, pair.arm["repeat"].unique())})),
            }
        )
    return _with_holm(rows)


def _common_runs(pair: Pair) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    """Samples that both predict, in one order, of each repeat."""
    sample = [*PAIR, "mask_label", "class" if _measure(pair.arm) == AUC else "value"]
    arm, baseline = (rows.set_index(sample) for rows in (pair.arm, pair.baseline))
    common = arm.index.intersection(baseline.index)
    arm, baseline = (rows.loc[common].reset_index() for rows in (arm, baseline))
    return [(rows, baseline.loc[rows.index]) for _, rows in arm.groupby("repeat", sort=False)]


def _differences_of_scores(runs: Sequence[tuple[pd.DataFrame, pd.DataFrame]], num_resamples: int) -> Float[np.ndarray, " n"]:
    """Arm - baseline, mean over repeats in which both are defined: of resamples, or, of 0 resamples, the value itself."""
    patient = np.unique(np.concatenate([arm["patient"] for arm, _ in runs]), return_inverse=True)[1]
    times, repeats = np.ones((1, patient.max() + 1)), np.ones((1, len(runs)))
    if num_resamples:
        rng = np.random.default_rng(SEED)
        times = drawn(rng, times.shape[1], num_resamples)
        repeats = drawn_within(rng, np.concatenate([divisions(arm, arm["repeat"][:1]) for arm, _ in runs]), num_resamples)
    weights = np.split(times[:, patient], np.cumsum([len(arm) for arm, _ in runs])[:-1], axis=1)
    found = [
        _score(arm, drawn_here) - _score(baseline, drawn_here) for (arm, baseline), drawn_here in zip(runs, weights, strict=True)
    ]
    by_repeat = np.stack(found, axis=1)
    return ratio((repeats * np.nan_to_num(by_repeat)).sum(1), np.where(np.isnan(by_repeat), 0, repeats).sum(1))


def _measure(predictions: pd.DataFrame) -> str:
    """What they are scored by."""
    return MAE if "value" in predictions else AUC


def _score(samples: pd.DataFrame, weights: Float[np.ndarray, "r n"]) -> Float[np.ndarray, " r"]:
    """AUC or MAE of resamples; `weights` says how often each drew each sample."""
    if _measure(samples) == MAE:
        return ratio(weights @ (samples["predicted"] - samples["value"]).abs().to_numpy(), weights.sum(1))
    return auc(*labels_and_probabilities(samples), weights)


def _score_of_all(samples: pd.DataFrame) -> float:
    return float(_score(samples, np.ones((1, len(samples))))[0])
