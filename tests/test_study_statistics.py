"""A study's statistics: means over repeats by hand, comparisons against scipy and against simulated truths."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from nnunet_csm.evaluation.classification import evaluate
from nnunet_csm.study.statistics import (
    AUC,
    AVERAGE,
    MAE,
    SINGLE_MEAN,
    Contrast,
    compare,
    compare_classes,
    contrasts_of,
    crossed_interval,
    holm,
    signed_rank,
    summarize,
    summarize_classes,
    with_single_mean,
)

NAN = float("nan")


def rows_of(arm, dice, repeat=0, structure="lesion", labels=1.0, finetuned="all", tested="all", table="t"):
    """Results from case to Dice; the patient is the case's name up to a dash."""
    names = {"table": table, "arm": arm, "labels": labels, "num_labelled": round(40 * labels), "repeat": repeat}
    names |= {"finetuned": finetuned, "tested": tested, "structure": structure}
    return [{**names, "case": case, "patient": case.split("-")[0], "dice": value} for case, value in dice.items()]


def test_means_are_over_cases_then_repeats():
    rows = rows_of("A", {"p1": 0.2, "p2": 0.4, "p3": NAN}) + rows_of("A", {"p1": 0.9}, repeat=1)
    (found,) = summarize(pd.DataFrame(rows)).to_dict("records")
    assert found["mean"] == pytest.approx((0.3 + 0.9) / 2)
    assert found["sd"] == pytest.approx(np.std([0.3, 0.9], ddof=1))
    assert (found["num_repeats"], found["num_cases"], found["num_patients"]) == (2, 3, 2)
    assert found["median"] == pytest.approx(np.median([(0.2 + 0.9) / 2, 0.4]))
    assert found["share_failed"] == 0


def test_the_average_is_over_structures_and_failures_are_counted():
    rows = rows_of("A", {"p1": 0.05, "p2": 0.5}, structure="WT") + rows_of("A", {"p1": 0.0, "p2": NAN}, structure="ET")
    found = summarize(pd.DataFrame(rows)).set_index("structure")
    assert list(found.index) == [AVERAGE, "WT", "ET"]
    assert found.loc[AVERAGE, "mean"] == pytest.approx((0.275 + 0.0) / 2)
    assert found.loc["WT", "share_failed"] == 0.5 and found.loc["ET", "share_failed"] == 1
    assert np.isnan(found.loc["WT", "sd"])


def test_a_structure_that_is_nowhere_defined_is_no_failure():
    found = summarize(pd.DataFrame(rows_of("A", {"p1": NAN}))).iloc[0]
    assert np.isnan(found["mean"]) and np.isnan(found["share_failed"]) and found["num_cases"] == 0


def test_single_series_are_averaged_where_all_are_there():
    rows = [
        *rows_of("A", {"p1": 0.2}, finetuned="T1w", tested="T1w"),
        *rows_of("A", {"p1": 0.6}, finetuned="FLAIR", tested="FLAIR"),
        *rows_of("A", {"p1": 0.9}, finetuned="all", tested="FLAIR"),
        *rows_of("B", {"p1": 0.7}, finetuned="FLAIR", tested="FLAIR"),
    ]
    found = summarize(with_single_mean(pd.DataFrame(rows)))
    mean = found[found["tested"] == SINGLE_MEAN]
    assert list(mean["arm"]) == ["A"] and mean["mean"].item() == pytest.approx(0.4)


def test_a_comparison_takes_what_both_have():
    a = rows_of("A", {"p1-0": 0.5, "p1-1": 0.7, "p2": 0.4, "p3": 0.9}) + rows_of("A", {"p1-0": 0.8, "p4": NAN}, repeat=1)
    b = rows_of("B", {"p1-0": 0.4, "p1-1": 0.4, "p2": 0.5, "p4": 0.1}) + rows_of("B", {"p1-0": 0.4, "p4": 0.0}, repeat=1)
    (found,) = compare(pd.DataFrame([*a, *b]), [Contrast("A", "B")]).to_dict("records")
    patient_1 = (np.mean([0.1, 0.3]) + 0.4) / 2
    assert found["difference"] == pytest.approx((patient_1 - 0.1) / 2)
    # pairs of (patient, repeat): p1 twice, p2 once; unpaired: p3, p4 in both repeats
    assert (found["num_patients"], found["num_repeats"], found["num_pairs"], found["num_unpaired"]) == (2, 2, 3, 3)


def test_the_test_is_scipys_over_patients_means():
    rng = np.random.default_rng(0)
    rows, by_patient = [], np.zeros(20)
    for repeat in range(3):
        for patient in range(20):
            dice = rng.random(2)
            rows += rows_of("A", {f"p{patient}": dice[0]}, repeat) + rows_of("B", {f"p{patient}": dice[1]}, repeat)
            by_patient[patient] += (dice[0] - dice[1]) / 3
    (found,) = compare(pd.DataFrame(rows), [Contrast("A", "B")]).to_dict("records")
    assert found["p_value"] == pytest.approx(wilcoxon(by_patient).pvalue) and found["p_holm"] == found["p_value"]
    assert found["difference"] == pytest.approx(by_patient.mean()) and found["low"] < by_patient.mean() < found["high"]


def test_shares_of_labels_are_compared_with_each_other_and_across():
    rows = [row for arm, at in (("A", {0.1: 0.5, 1.0: 0.9}), ("B", {0.1: 0.3, 1.0: 0.8})) for share, dice in at.items()
            for row in rows_of(arm, {"p1": dice, "p2": dice}, labels=share)]  # fmt: skip
    found = compare(pd.DataFrame(rows), [Contrast("A", "B"), Contrast("A", "B", 0.1, 1.0)])
    assert list(found["difference"]) == pytest.approx([0.2, 0.1, -0.3])
    assert list(found["baseline_labels"]) == [0.1, 1.0, 1.0]


def test_holm_by_hand():
    # sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 (not .06 = .03 * 2) .06 (not .04)
    assert holm(np.array([0.04, 0.01, NAN, 0.03, 0.02])) == pytest.approx([0.06, 0.04, NAN, 0.06, 0.06], nan_ok=True)
    assert holm(np.array([0.6, 0.9])) == pytest.approx([1, 1])


def test_each_table_is_corrected_by_itself():
    rng = np.random.default_rng(0)
    dice = {arm: dict(zip([f"p{i}" for i in range(9)], rng.random(9), strict=True)) for arm in "ABC"}
    rows = [row for table, arms in (("t", "ABC"), ("u", "AB")) for arm in arms for row in rows_of(arm, dice[arm], table=table)]
    found = compare(pd.DataFrame(rows), contrasts_of(["A", "B", "C"]))
    assert list(found["table"]) == ["t", "t", "u"]
    assert list(found["p_holm"]) == pytest.approx([*holm(found["p_value"].to_numpy()[:2]), found["p_value"][2]])


@pytest.mark.parametrize("dice", [{"p1": 0.5}, {"p1": NAN}])
def test_one_patient_or_none_has_no_interval(dice):
    rows = rows_of("A", dice) + rows_of("B", {"p1": 0.2})
    (found,) = compare(pd.DataFrame(rows), [Contrast("A", "B")]).to_dict("records")
    assert all(np.isnan(found[name]) for name in ("low", "high", "p_value", "p_holm")) and found["note"]


def test_equal_arms_differ_by_nothing():
    rows = [row for arm in "AB" for row in rows_of(arm, {"p1": 0.5, "p2": 0.6})]
    (found,) = compare(pd.DataFrame(rows), [Contrast("A", "B")]).to_dict("records")
    assert (found["difference"], found["low"], found["high"], found["p_value"]) == (0, 0, 0, 1)
    assert "one repeat" in found["note"]


def test_contrasts_are_with_the_baseline_then_those_asked_for():
    found = contrasts_of(["A", "B", "C"], "B", [Contrast("C", "A"), Contrast("C", "B")])
    assert found == [Contrast("A", "B"), Contrast("C", "B"), Contrast("C", "A")]
    assert contrasts_of(["A", "B"]) == [Contrast("B", "A")]


@pytest.mark.parametrize("design", ["seeds", "splits", "folds"])
def test_intervals_cover_the_truth(design):
    """With patients, repeats and noise as measured on gliomas, and no difference. 95 % of 150 are 142.5, give or take 2.7."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(150):
        values = rng.normal(0, 0.065, (40, 1)) + rng.normal(0, 0.025, (1, 6)) + rng.normal(0, 0.14, (40, 6))
        if design == "splits":
            values[rng.random((40, 6)) < 0.7] = NAN
        divisions = np.arange(6) if design == "splits" else np.zeros(6, int)
        if design == "folds":
            # three folds, two seeds of each, and a pretraining that moves all patients of its fold
            divisions = np.arange(6) // 2
            values += rng.normal(0, 0.025, 3)[divisions]
            values[(rng.permutation(40) % 3)[:, None] != divisions] = NAN
        known = ~np.isnan(values).all(1)
        low, high = crossed_interval(values[known], divisions, num_resamples=400)
        covered += low <= 0 <= high
    assert covered >= 136


def test_an_interval_knows_that_repeats_differ():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.01, (50, 5))
    alike, unlike = crossed_interval(noise), crossed_interval(noise + rng.normal(0, 0.1, (1, 5)))
    assert unlike[1] - unlike[0] > 5 * (alike[1] - alike[0])
    assert crossed_interval(noise) == alike


def test_an_interval_of_one_repeat_is_that_of_patients():
    values = np.random.default_rng(0).normal(0.1, 0.2, 60)
    low, high = crossed_interval(values[:, None])
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / np.sqrt(60), rel=0.1)
    assert all(np.isnan(crossed_interval(values[None])))


def test_signed_rank_of_little():
    assert np.isnan(signed_rank(np.array([0.1]))) and signed_rank(np.zeros(4)) == 1


def predictions_of(arm, skill, num_repeats=4, num_samples=40, finetuned="all", classes=("benign", "malignant"), seed=0):
    tables = []
    for repeat in range(num_repeats):
        rng = np.random.default_rng([seed, repeat])
        truth = np.arange(num_samples) % len(classes)
        logits = skill * np.eye(len(classes))[truth] + rng.normal(size=(num_samples, len(classes)))
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        names = {"table": "t", "arm": arm, "labels": 1.0, "num_labelled": 9, "repeat": repeat}
        table = pd.DataFrame({**names, "finetuned": finetuned, "tested": finetuned, "mask_label": ""}, index=range(num_samples))
        table["case"] = [f"{n:02d}" for n in range(num_samples)]
        table["patient"] = [f"{n // 2:02d}" for n in range(num_samples)]
        table["class"] = [classes[t] for t in truth]
        tables.append(table.assign(**{f"p_{name}": p for name, p in zip(classes, probabilities.T, strict=True)}))
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("classes", [("benign", "malignant"), ("I", "II", "III")])
def test_the_auc_is_that_of_the_evaluation(classes):
    table = predictions_of("A", 1.0, classes=classes)
    expected = [
        evaluate(
            np.array([classes.index(name) for name in run["class"]]),
            run[[f"p_{name}" for name in classes]].to_numpy(),
            classes,
            num_resamples=0,
        )
        .overall["auc"]
        .value
        for _, run in table.groupby("repeat")
    ]
    (found,) = summarize_classes(table).to_dict("records")
    assert found["mean"] == pytest.approx(np.mean(expected)) and found["sd"] == pytest.approx(np.std(expected, ddof=1))
    assert (found["structure"], found["num_repeats"], found["num_cases"], found["num_patients"]) == (AUC, 4, 160, 20)


def test_classifiers_are_compared_on_the_same_samples():
    good, bad = predictions_of("A", 3.0), predictions_of("B", 0.0, seed=1)
    table = pd.concat([good, bad[bad["case"] != "00"]], ignore_index=True)
    (found,) = compare_classes(table, [Contrast("A", "B")]).to_dict("records")
    both = summarize_classes(table[table["case"] != "00"])["mean"]
    assert found["difference"] == pytest.approx(both[0] - both[1]) and found["num_unpaired"] == 4
    assert 0 < found["low"] < found["difference"] < found["high"] and found["p_value"] == pytest.approx(2 / 5001)
    (same,) = compare_classes(pd.concat([good, good.assign(arm="B")]), [Contrast("A", "B")]).to_dict("records")
    assert same["difference"] == 0 and same["p_value"] == 1


def test_numbers_are_compared_by_their_mean_absolute_error():
    arms = []
    for arm, noise in (("A", 1.0), ("B", 4.0)):
        table = predictions_of(arm, 0.0).drop(columns=["class", "p_benign", "p_malignant"])
        rng = np.random.default_rng(0)
        table["value"] = 10.0 + table["case"].astype(int)
        arms.append(table.assign(predicted=table["value"] + noise * rng.normal(size=len(table))))
    table = pd.concat([arms[0], arms[1][arms[1]["case"] != "00"]], ignore_index=True)
    found = summarize_classes(table).set_index("arm")
    errors = (arms[0]["predicted"] - arms[0]["value"]).abs().groupby(arms[0]["repeat"]).mean()
    assert found.loc["A", ["structure", "mean", "sd"]].tolist() == [
        MAE,
        pytest.approx(errors.mean()),
        pytest.approx(errors.std()),
    ]
    (compared,) = compare_classes(table, [Contrast("A", "B")]).to_dict("records")
    both = summarize_classes(table[table["case"] != "00"])["mean"]
    assert compared["difference"] == pytest.approx(both[0] - both[1]) and compared["structure"] == MAE
    assert compared["low"] < compared["difference"] < compared["high"] < 0 and compared["num_unpaired"] == 4


def test_the_auc_of_single_series_has_a_mean():
    table = pd.concat([predictions_of("A", skill, finetuned=name) for skill, name in ((1.0, "T2w"), (2.0, "DWI"))])
    found = summarize_classes(table).set_index("tested")
    assert found.loc[SINGLE_MEAN, "mean"] == pytest.approx((found.loc["T2w", "mean"] + found.loc["DWI", "mean"]) / 2)
    assert found.loc[SINGLE_MEAN, "num_repeats"] == 4
