"""Metrics are scikit-learn's, intervals tell how few patients there are, and the picture shows what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn import metrics as sk

from nnunet_csm.evaluation import bootstrap
from nnunet_csm.evaluation.class_curves import draw_classification
from nnunet_csm.evaluation.class_metrics import METRICS, measure
from nnunet_csm.evaluation.classification import Metrics, compare, evaluate

TWO, THREE = ("benign", "malignant"), ("a", "b", "c")
RANKED = ("auc", "average_precision", "balanced_accuracy", "sensitivity_at_90_specificity")


def binary(num: int, gap: float = 1.2, seed: int = 0, decimals: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Rounding gives ties."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 2
    p = np.round(1 / (1 + np.exp(-rng.normal(size=num) - gap * (labels - 0.5))), decimals)
    return labels, np.stack([1 - p, p], axis=1)


def several(num: int, num_classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num)
    logits = rng.normal(size=(num, num_classes)) + np.eye(num_classes)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def value(found: Metrics, name: str) -> float:
    return found.overall[name].value


def width(found: Metrics, name: str = "auc") -> float:
    return found.overall[name].high - found.overall[name].low


def sensitivity_at_90(is_positive: np.ndarray, score: np.ndarray) -> float:
    false, true, _ = sk.roc_curve(is_positive, score, drop_intermediate=False)
    return float(true[false <= 0.1 + 1e-9].max())


# --- values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [20, 41, 300])
@pytest.mark.parametrize("decimals", [1, 2, 15])
def test_two_classes_as_in_scikit_learn(num: int, decimals: int) -> None:
    labels, probabilities = binary(num, seed=num, decimals=decimals)
    p = probabilities[:, 1]
    found = evaluate(labels, probabilities, TWO, num_resamples=0)
    expected = {
        "auc": sk.roc_auc_score(labels, p),
        "average_precision": sk.average_precision_score(labels, p),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, probabilities.argmax(1)),
        "accuracy": sk.accuracy_score(labels, probabilities.argmax(1)),
        "sensitivity_at_90_specificity": sensitivity_at_90(labels, p),
        "brier": sk.brier_score_loss(labels, p),
        "log_loss": sk.log_loss(labels, np.clip(probabilities, 1e-7, 1)),
    }
    for name, want in expected.items():
        assert value(found, name) == pytest.approx(want, rel=1e-6), name
    assert set(found.overall) == set(METRICS) == {*expected, "calibration_error"}


def test_three_classes_as_in_scikit_learn_one_against_the_rest() -> None:
    labels, probabilities = several(120)
    found = evaluate(labels, probabilities, THREE, num_resamples=0)
    assert value(found, "auc") == pytest.approx(sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro"))
    assert value(found, "average_precision") == pytest.approx(sk.average_precision_score(np.eye(3)[labels], probabilities))
    assert value(found, "balanced_accuracy") == pytest.approx(sk.balanced_accuracy_score(labels, probabilities.argmax(1)))
    assert value(found, "log_loss") == pytest.approx(sk.log_loss(labels, probabilities))
    assert value(found, "brier") == pytest.approx(3 * sk.mean_squared_error(np.eye(3)[labels], probabilities))
    recalls = sk.recall_score(labels, probabilities.argmax(1), average=None)
    for index, name in enumerate(THREE):
        of_class = found.estimates[name]
        assert of_class["auc"].value == pytest.approx(sk.roc_auc_score(labels == index, probabilities[:, index]))
        assert of_class["recall"].value == pytest.approx(recalls[index])
        assert of_class["sensitivity_at_90_specificity"].value == pytest.approx(
            sensitivity_at_90(labels == index, probabilities[:, index])
        )


def test_calibration_error_is_the_gap_between_what_is_said_and_what_is() -> None:
    labels = np.array([1] * 8 + [0] * 2 + [1] * 2 + [0] * 8)
    p = np.array([0.9] * 10 + [0.4] * 10)
    found = evaluate(labels, np.stack([1 - p, p], axis=1), TWO, num_resamples=0)
    assert value(found, "calibration_error") == pytest.approx((0.1 + 0.2) / 2)
    rng = np.random.default_rng(0)
    p = rng.random(50_000)
    calibrated = evaluate((rng.random(50_000) < p).astype(int), np.stack([1 - p, p], axis=1), TWO, num_resamples=0)
    assert value(calibrated, "calibration_error") < 0.01


def test_the_last_of_two_classes_is_the_positive_one() -> None:
    labels, probabilities = binary(60)
    found = evaluate(labels, probabilities, TWO, num_resamples=50)
    turned = evaluate(1 - labels, probabilities[:, ::-1].copy(), TWO[::-1], num_resamples=50)
    precision, of_the_last = found.overall["average_precision"], found.estimates["malignant", "average_precision"]
    of_the_other = found.estimates["benign", "average_precision"]
    assert precision.equals(of_the_last) and turned.overall["average_precision"].equals(of_the_other)
    assert not precision.equals(of_the_other)
    assert value(turned, "auc") == pytest.approx(value(found, "auc"))


def test_ranks_alone_decide_the_auc() -> None:
    labels, probabilities = binary(50)
    p = probabilities[:, 1] ** 3
    cubed = evaluate(labels, np.stack([1 - p, p], axis=1), TWO, num_resamples=100)
    assert cubed.overall["auc"].equals(evaluate(labels, probabilities, TWO, num_resamples=100).overall["auc"])


def test_probabilities_that_are_none_are_refused() -> None:
    labels, probabilities = binary(10)
    for wrong in (np.nan, 2.0, -0.5):
        spoilt = probabilities.copy()
        spoilt[3, 0] = wrong
        with pytest.raises(ValueError, match="1 of 10 samples"):
            evaluate(labels, spoilt, TWO)
    assert np.isfinite(value(evaluate(labels, probabilities.astype(np.float32), TWO), "auc"))


# --- intervals ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "seed"), [(12, 0), (40, 1), (77, 2), (400, 3)])
def test_intervals_cover_their_value(num: int, seed: int) -> None:
    for labels, probabilities, classes in ((*binary(num, seed=seed), TWO), (*several(num, seed=seed), THREE)):
        table = evaluate(labels, probabilities, classes, num_resamples=500).table()
        assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
        assert (table["low"] < table["high"]).mean() > 0.8


def test_a_drawn_patient_counts_as_often_as_it_was_drawn() -> None:
    """A resample by weights is the same as one by repeated samples."""
    labels, probabilities = several(60)
    weights = np.random.default_rng(0).multinomial(60, np.full(60, 1 / 60), size=5)
    by_weights = measure(labels, probabilities, weights.astype(float), [np.arange(60)])
    for row, times in zip(by_weights, weights, strict=True):
        drawn = np.repeat(np.arange(60), times)
        repeated = evaluate(labels[drawn], probabilities[drawn], THREE, num_resamples=0)
        np.testing.assert_allclose(row, repeated.table()["value"])


def test_intervals_shrink_with_more_patients() -> None:
    widths = [
        np.mean([width(evaluate(*binary(num, seed=seed), TWO, num_resamples=300)) for seed in range(8)]) for num in (30, 120, 480)
    ]
    assert widths[0] > 1.5 * widths[1] > 1.5**2 * widths[2]


def test_samples_of_a_patient_that_agree_are_no_further_evidence() -> None:
    labels, probabilities = binary(40, decimals=15)
    patients = [f"p{i}" for i in range(40)]
    once = evaluate(labels, probabilities, TWO, patients)
    thrice = (np.repeat(labels, 3), np.repeat(probabilities, 3, axis=0), TWO)
    by_patient = evaluate(*thrice, [patient for patient in patients for _ in range(3)])
    by_sample = evaluate(*thrice)
    assert (by_patient.num_patients, by_sample.num_patients) == (40, 120)
    assert by_patient.table()["value"].equals(by_sample.table()["value"])
    assert width(by_patient) == pytest.approx(width(once)) and width(by_patient) > 1.4 * width(by_sample)


def test_intervals_depend_on_the_seed_and_not_on_the_order_of_samples_or_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, probabilities = binary(40)
    patients = [f"p{i // 2}" for i in range(40)]
    found = evaluate(labels, probabilities, TWO, patients, num_resamples=300)
    order = np.random.default_rng(0).permutation(40)
    shuffled = evaluate(labels[order], probabilities[order], TWO, [patients[i] for i in order], num_resamples=300)
    np.testing.assert_allclose(found.table()[["value", "low", "high"]], shuffled.table()[["value", "low", "high"]])
    assert not evaluate(labels, probabilities, TWO, patients, num_resamples=300, seed=1).estimates.equals(found.estimates)
    monkeypatch.setattr(bootstrap, "LARGEST_BLOCK", 40 * 7)
    np.testing.assert_allclose(
        found.table()[["low", "high"]], evaluate(labels, probabilities, TWO, patients, num_resamples=300).table()[["low", "high"]]
    )


def test_without_resamples_there_are_values_only() -> None:
    table = evaluate(*binary(30), TWO, num_resamples=0).table()
    assert table["value"].notna().all() and table[["low", "high"]].isna().all(axis=None)


# --- what is not defined -----------------------------------------------------------------------------------------------------


def test_one_class_only_leaves_nan_where_two_are_needed() -> None:
    found = evaluate(np.ones(9, int), binary(9)[1], TWO, num_resamples=100)
    assert {name for name in METRICS if np.isnan(value(found, name))} == set(RANKED)
    assert {name for name in METRICS if np.isnan(found.overall[name].low)} == set(RANKED)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["metrics"]["auc"] == {
        "value": None,
        "low": None,
        "high": None,
    }
    assert "| AUC                             | - " in found.to_markdown()


def test_a_class_with_one_patient_has_values_without_intervals() -> None:
    labels, probabilities = binary(20)
    labels = np.where(np.arange(20) < 2, 1, 0)
    by_sample = evaluate(labels, probabilities, TWO, num_resamples=200)
    by_patient = evaluate(labels, probabilities, TWO, ["p", "p", *(f"q{i}" for i in range(18))], num_resamples=200)
    for name in METRICS:
        assert value(by_sample, name) == value(by_patient, name) and not np.isnan(value(by_patient, name))
        assert np.isnan(by_patient.overall[name].low) == (name in RANKED)
        assert not np.isnan(by_sample.overall[name].low)


def test_one_patient_alone_says_nothing_of_others() -> None:
    labels, probabilities = binary(20)
    found = evaluate(labels, probabilities, TWO, ["p"] * 20, num_resamples=100)
    assert found.overall.loc[["low", "high"]].isna().all(axis=None) and found.overall.loc["value"].notna().all()


def test_a_class_without_samples_is_left_out_of_means() -> None:
    labels, probabilities = binary(40)
    of_three = np.concatenate([probabilities * 0.9, np.full((40, 1), 0.1)], axis=1)
    found = evaluate(labels, of_three, THREE, num_resamples=100)
    assert np.isnan(found.estimates["c"]["auc"].value) and found.num_samples == (20, 20, 0)
    assert value(found, "auc") == pytest.approx(evaluate(labels, probabilities, TWO, num_resamples=0).overall["auc"].value)
    assert found.overall["auc"].low <= value(found, "auc") <= found.overall["auc"].high


# --- repeats and comparisons -------------------------------------------------------------------------------------------------


def test_runs_are_ranked_by_themselves_and_otherwise_pooled() -> None:
    labels, probabilities = binary(80, decimals=15)
    runs = np.repeat(np.arange(4), 20)
    p = np.clip(probabilities[:, 1] / 4 + runs / 4, 0, 1)  # every run ranks as before, on another scale
    shifted = np.stack([1 - p, p], axis=1)
    found = evaluate(labels, shifted, TWO, runs=runs.tolist(), num_resamples=200)
    by_run = [sk.roc_auc_score(labels[runs == run], p[runs == run]) for run in range(4)]
    pooled = evaluate(labels, shifted, TWO, num_resamples=200)
    assert value(found, "auc") == pytest.approx(np.mean(by_run)) and value(found, "auc") > value(pooled, "auc") + 0.1
    for name in ("accuracy", "balanced_accuracy", "brier", "log_loss", "calibration_error"):
        assert found.overall[name].equals(pooled.overall[name])
    assert found.overall["auc"].low < value(found, "auc") < found.overall["auc"].high


def test_a_run_with_one_class_does_not_count_for_the_auc() -> None:
    labels, probabilities = binary(40)
    some = np.append(np.arange(20), np.flatnonzero(labels[20:]) + 20)
    runs = [0] * 20 + [1] * 10
    found = evaluate(labels[some], probabilities[some], TWO, runs=runs, num_resamples=0)
    assert value(found, "auc") == value(evaluate(labels[:20], probabilities[:20], TWO, num_resamples=0), "auc")


def test_a_difference_is_second_minus_first_on_the_same_patients() -> None:
    labels, good = binary(60, gap=2.0, decimals=15)
    noise = np.random.default_rng(1).normal(0, 0.03, 60)
    p = np.clip(good[:, 1] + noise, 0, 1)
    nearly = np.stack([1 - p, p], axis=1)
    bad = binary(60, gap=0.0, seed=5)[1]
    better = compare(labels, bad, good, TWO).difference["auc"]
    assert better.low > 0 and better.value == pytest.approx(
        sk.roc_auc_score(labels, good[:, 1]) - sk.roc_auc_score(labels, bad[:, 1])
    )
    back = compare(labels, good, bad, TWO).difference["auc"]
    assert (back.value, back.low, back.high) == pytest.approx((-better.value, -better.high, -better.low))
    paired = compare(labels, good, nearly, TWO)
    assert paired.difference["auc"].high - paired.difference["auc"].low < 0.5 * width(paired.first)
    for one, probabilities in ((paired.first, good), (paired.second, nearly)):
        assert one.estimates.equals(evaluate(labels, probabilities, TWO).estimates)
    table = paired.table()
    assert (table["second"] - table["first"]).to_numpy() == pytest.approx(table["difference"].to_numpy())
    json.dumps(paired.to_dict(), allow_nan=False)
    counts, _, header, *_ = paired.to_markdown(("scratch", "pretrained")).splitlines()
    assert counts == paired.counts and "| pretrained - scratch" in header


def test_nothing_differs_from_itself() -> None:
    labels, probabilities = several(50)
    assert (compare(labels, probabilities, probabilities, THREE, num_resamples=100).difference == 0).all(axis=None)


# --- the picture -------------------------------------------------------------------------------------------------------------


def test_the_picture_follows_the_probabilities_and_needs_no_luck(tmp_path: Path) -> None:
    labels, probabilities = binary(50)
    pictures = {}
    for name, given in (("a", probabilities), ("again", probabilities), ("other", probabilities[:, ::-1].copy())):
        draw_classification(tmp_path / "new" / f"{name}.png", labels, given, TWO, title="case", num_resamples=50)
        pictures[name] = np.asarray(Image.open(tmp_path / "new" / f"{name}.png"))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.png", "again.png", "other.png"]
    assert (pictures["a"] == pictures["again"]).all() and (pictures["a"] != pictures["other"]).mean() > 0.01


@pytest.mark.parametrize("labels", [np.zeros(6, int), np.array([0, 0, 0, 0, 0, 1]), np.array([0, 1, 2, 0, 1, 2])])
def test_few_samples_and_one_class_are_drawn(labels: np.ndarray, tmp_path: Path) -> None:
    num_classes = max(2, labels.max() + 1)
    probabilities = several(6, int(num_classes))[1]
    draw_classification(tmp_path / "a.png", labels, probabilities, THREE[:num_classes], num_resamples=20)
    assert Image.open(tmp_path / "a.png").size == (900, 840)
