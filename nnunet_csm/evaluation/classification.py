"""How good predicted classes are: metrics with bootstrap intervals by patient, and two classifiers compared on the same patients.

Labels are class indices (n,); probabilities are (n, c), rows sum to 1. Every metric is computed from weights of the samples: all
ones for the value, how often a resample drew each sample for the interval.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Real

from nnunet_csm.figures.classification import ROC_GRID, ClassCurves, save_classification

# Of each class against all others. With two classes the metric of the last one counts, with more the mean over classes.
OF_A_CLASS = ("auc", "average_precision", "sensitivity_at_90_specificity", "calibration_error", "recall")
METRICS = (
    "auc",
    "average_precision",
    "balanced_accuracy",
    "accuracy",
    "sensitivity_at_90_specificity",
    "calibration_error",
    "brier",
    "log_loss",
)
TITLES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "sensitivity_at_90_specificity": "sensitivity at 90 % specificity",
    "calibration_error": "calibration error",
    "brier": "Brier score",
    "log_loss": "log loss",
}
# these rank samples, which those of different networks cannot be
RANKING = OF_A_CLASS[:3]
# these say nothing where a class is absent, or has one patient that every resample has or has not
NEED_CLASSES = frozenset({"auc", "average_precision", "balanced_accuracy", "sensitivity_at_90_specificity", "recall"})

SPECIFICITY = 0.9
NUM_BINS = 10
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
SEED = 12345

# of weights held at a time
LARGEST_BLOCK = 2**20
# half precision rounds probabilities
SUM_TOLERANCE = 0.01
LEAST_PROBABILITY = float(np.finfo(np.float32).eps)

# no class has this name
ALL = ""


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; NaN where it is not defined."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if np.isnan(self.value):
            return "-"
        return f"{self.value:.3f}" + ("" if np.isnan(self.low) else f" ({self.low:.3f} to {self.high:.3f})")


@dataclass(frozen=True)
class Metrics:
    """What `evaluate` found; it says what each metric is and when it is NaN.

    Attributes:
        classes: names in the order of their indices; with two, the last is the positive one.
        num_samples: of each class.
        num_patients: that were resampled.
        num_resamples: 0 when no interval was asked for.
        overall: of `METRICS`.
        by_class: class to its metrics `OF_A_CLASS`, against all others.
    """

    classes: tuple[str, ...]
    num_samples: tuple[int, ...]
    num_patients: int
    num_resamples: int
    overall: Mapping[str, Estimate]
    by_class: Mapping[str, Mapping[str, Estimate]]

    def table(self) -> pd.DataFrame:
        """A row a metric: class ("all" or a name), metric, value, low, high."""
        groups = {ALL: self.overall, **self.by_class}
        rows = [(name or "all", metric, e.value, e.low, e.high) for name, group in groups.items() for metric, e in group.items()]
        return pd.DataFrame(rows, columns=["class", "metric", "value", "low", "high"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN is None."""
        return {
            "classes": list(self.classes),
            "num_samples": dict(zip(self.classes, self.num_samples, strict=True)),
            "num_patients": self.num_patients,
            "num_resamples": self.num_resamples,
            "confidence": CONFIDENCE,
            "metrics": _as_dict(self.overall),
            "by_class": {name: _as_dict(group) for name, group in self.by_class.items()},
        }

    def to_markdown(self) -> str:
        """Counts and the overall metrics as a Markdown table, for a terminal as much as for a page."""
        counts = ", ".join(f"{count} {name}" for name, count in zip(self.classes, self.num_samples, strict=True))
        header = f"{sum(self.num_samples)} samples of {self.num_patients} patients: {counts}"
        rows = {TITLES[name]: [str(estimate)] for name, estimate in self.overall.items()}
        return header + "\n\n" + _markdown(rows, ["value (95 % interval)"])


@dataclass(frozen=True)
class Comparison:
    """Two sets of predictions for the same samples; `difference` is second - first, from the same resamples."""

    first: Metrics
    second: Metrics
    difference: Mapping[str, Estimate]

    def table(self) -> pd.DataFrame:
        """A row a metric: metric, first, second, difference, low, high (of the difference)."""
        rows = [
            (name, self.first.overall[name].value, self.second.overall[name].value, e.value, e.low, e.high)
            for name, e in self.difference.items()
        ]
        return pd.DataFrame(rows, columns=["metric", "first", "second", "difference", "low", "high"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN is None."""
        return {"first": self.first.to_dict(), "second": self.second.to_dict(), "difference": _as_dict(self.difference)}

    def to_markdown(self, names: tuple[str, str] = ("first", "second")) -> str:
        """Both and their difference as a Markdown table."""
        rows = {
            TITLES[name]: [str(self.first.overall[name]), str(self.second.overall[name]), str(difference)]
            for name, difference in self.difference.items()
        }
        return _markdown(rows, [*names, f"{names[1]} - {names[0]}"])


def evaluate(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n c"],
    classes: Sequence[str],
    patients: Sequence[str] | None = None,
    runs: Sequence[int] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> Metrics:
    """Metrics of predictions, each with a percentile bootstrap interval (Efron 1979) of 95 % that resamples patients.

    - auc, average_precision (as scikit-learn's: step-wise, no interpolation), sensitivity_at_90_specificity (the highest at
      any threshold whose specificity is at least 0.9), calibration_error (mean over ten bins of equal width of |mean
      probability - share of the class|, weighted by samples: Naeini 2015, class-wise as in Nixon 2019): of the positive
      class, the last of two; with more classes each against all others, and their mean.
    - balanced_accuracy: mean recall of the most probable class; accuracy; brier: sum over classes of squared errors, halved
      with two classes; log_loss: natural logarithm, probabilities not below float32's epsilon.

    What is not defined is NaN: with one class only, the metrics that rank or that need a recall of each class; in means over
    classes, a class without samples does not count. A resample that lacks a class does not count for these metrics, and they
    have no interval where a class has one patient, or where fewer than half of the resamples count. With one patient in all,
    of whom every resample is a copy, nothing has an interval.

    Calibration error is biased upwards, the more the fewer samples a bin has, and resamples, which repeat patients, are
    biased again. They are therefore shifted so that their median is the value: the interval tells how much the value varies,
    not that a calibrated classifier would have 0. Intervals of an AUC near 1 from few patients are too narrow (simulated: of 16
    patients with a true AUC of 0.92, 79 % cover it; of 77 patients, 92 %), down to width zero where no resample has an error.

    Args:
        labels: class indices.
        probabilities: of each class.
        classes: their names.
        patients: of each sample, drawn whole; every sample is a patient's own by default.
        runs: of each sample, when predictions come from repeats. The three metrics that rank are computed in each run and
            averaged over the runs in which they are defined, as probabilities of different networks are not to be ranked
            against each other; all others pool the samples. In runs of a few samples, average precision is biased upwards
            and sensitivity at 90 % specificity is at 100 %. A resample draws patients once for all runs: the interval
            does not know how training differs from run to run.
        num_resamples: 0 for values without intervals.
        seed: of the resamples.

    Raises:
        ValueError: probabilities that are not finite or do not sum to 1.
    """
    task = _task(labels, classes, patients, runs)
    values, resampled = _bootstrap(task, [_checked(probabilities, task)], num_resamples, seed)
    return _metrics(task, values[0], resampled[0])


def compare(
    labels: Int[np.ndarray, " n"],
    first: Float[np.ndarray, "n c"],
    second: Float[np.ndarray, "n c"],
    classes: Sequence[str],
    patients: Sequence[str] | None = None,
    runs: Sequence[int] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> Comparison:
    """Two sets of probabilities for the same samples, and their differences in the same resamples. Arguments as of `evaluate`."""
    task = _task(labels, classes, patients, runs)
    values, resampled = _bootstrap(task, [_checked(first, task), _checked(second, task)], num_resamples, seed)
    return Comparison(
        first=_metrics(task, values[0], resampled[0]),
        second=_metrics(task, values[1], resampled[1]),
        difference=_metrics(task, values[1] - values[0], resampled[1] - resampled[0]).overall,
    )


def draw_classification(
    path: str | Path,
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n c"],
    classes: Sequence[str],
    patients: Sequence[str] | None = None,
    title: str = "",
    num_resamples: int = NUM_RESAMPLES,
) -> None:
    """One PNG: ROC with its pointwise 95 % band, precision-recall, reliability, probabilities by class.

    All samples share each curve, those of different runs too. Of two classes the last has curves, of more each has. A class
    without samples, or without others, has none.
    """
    task = _task(labels, classes, patients, None)
    probabilities = _checked(probabilities, task)
    values, resampled = _bootstrap(task, [probabilities], num_resamples, SEED)
    metrics = _metrics(task, values[0], resampled[0])
    drawn = [
        index
        for index in range(1 if len(task.classes) == 2 else 0, len(task.classes))
        if 0 < np.count_nonzero(task.labels == index) < len(task.labels)
    ]
    curves = [_curves(task, index, probabilities[:, index], metrics, num_resamples) for index in drawn]
    save_classification(path, curves, task.labels, probabilities, task.classes, title)


@dataclass(frozen=True)
class _Task:
    """What is to be predicted, and what is resampled.

    Attributes:
        patient: index of the patient of each sample.
        runs: the samples of each run.
    """

    labels: Int[np.ndarray, " n"]
    classes: tuple[str, ...]
    patient: Int[np.ndarray, " n"]
    runs: tuple[Int[np.ndarray, " _"], ...]

    @property
    def num_patients(self) -> int:
        return int(self.patient.max()) + 1

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(group, metric) in the order in which metrics are computed."""
        return [(ALL, name) for name in METRICS] + [(one, name) for one in self.classes for name in OF_A_CLASS]


def _task(
    labels: Int[np.ndarray, " n"], classes: Sequence[str], patients: Sequence[str] | None, runs: Sequence[int] | None
) -> _Task:
    num_samples = len(labels)
    assert num_samples and len(classes) >= 2 and labels.min() >= 0 and labels.max() < len(classes)
    assert patients is None or len(patients) == num_samples
    assert runs is None or len(runs) == num_samples
    patient = np.arange(num_samples) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    run = np.zeros(num_samples, dtype=int) if runs is None else np.asarray(runs)
    return _Task(np.asarray(labels), tuple(classes), patient, tuple(np.flatnonzero(run == one) for one in np.unique(run)))


def _checked(probabilities: Float[np.ndarray, "n c"], task: _Task) -> Float[np.ndarray, "n c"]:
    """As float64. Raises ValueError where they are none."""
    assert probabilities.shape == (len(task.labels), len(task.classes))
    wrong = ~np.isfinite(probabilities).all(1) | (np.abs(probabilities.sum(1) - 1) > SUM_TOLERANCE) | (probabilities < 0).any(1)
    if wrong.any():
        raise ValueError(
            f"{wrong.sum()} of {len(wrong)} samples have probabilities that are not finite, or below 0, or do not sum to 1, the "
            f"first one {probabilities[wrong][0]}; give softmax's output, and look at the training's loss when it is not finite"
        )
    return probabilities.astype(np.float64)


def _bootstrap(
    task: _Task, predictions: Sequence[Float[np.ndarray, "n c"]], num_resamples: int, seed: int
) -> tuple[Float[np.ndarray, "k m"], Float[np.ndarray, "k r m"]]:
    """Metrics of every set of predictions: on the samples, and on every resample of their patients."""
    once = np.ones((1, len(task.labels)))
    values = np.concatenate([_measure(task, one, once) for one in predictions])
    blocks = [
        np.stack([_measure(task, one, weights) for one in predictions]) for weights in _drawn_weights(task, num_resamples, seed)
    ]
    if not blocks:
        return values, np.empty((len(predictions), 0, values.shape[1]))
    resampled = np.concatenate(blocks, axis=1)
    biased = [position for position, (_, name) in enumerate(task.columns) if name == "calibration_error"]
    shift = values[:, None, biased] - np.median(resampled[..., biased], axis=1, keepdims=True)
    resampled[..., biased] = np.clip(resampled[..., biased] + shift, 0, 1)
    return values, resampled


def _drawn_weights(task: _Task, num_resamples: int, seed: int) -> Iterator[Float[np.ndarray, "r n"]]:
    """How often each sample is in each resample: as often as its patient was drawn. In blocks, to spare memory."""
    rng = np.random.default_rng(seed)
    shares = np.full(task.num_patients, 1 / task.num_patients)
    at_once = max(1, LARGEST_BLOCK // len(task.labels))
    for start in range(0, num_resamples, at_once):
        times = rng.multinomial(task.num_patients, shares, size=min(at_once, num_resamples - start))
        yield times[:, task.patient].astype(np.float64)


def _measure(task: _Task, probabilities: Float[np.ndarray, "n c"], weights: Float[np.ndarray, "r n"]) -> Float[np.ndarray, "r m"]:
    """Metrics with weighted samples, in the order of `task.columns`."""
    labels, num_classes = task.labels, probabilities.shape[1]
    is_class = np.eye(num_classes)[labels]
    is_correct = probabilities.argmax(1) == labels
    by_run = np.stack([_ranking(labels[run], probabilities[run], weights[:, run]) for run in task.runs])
    by_class = dict(zip(RANKING, np.moveaxis(_mean_of_defined(by_run, axis=0), 1, 0), strict=True))
    by_class["calibration_error"] = _calibration_errors(is_class, probabilities, weights)
    by_class["recall"] = _ratio(weights @ (is_class * is_correct[:, None]), weights @ is_class)
    by_class["recall"][_lacks_class(labels, num_classes, weights)] = np.nan

    squares = np.square(probabilities - is_class).sum(1) / (2 if num_classes == 2 else 1)
    surprise = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], LEAST_PROBABILITY))
    overall = {name: column[:, 1] if num_classes == 2 else _mean_of_defined(column, axis=1) for name, column in by_class.items()}
    overall["balanced_accuracy"] = _mean_of_defined(by_class["recall"], axis=1)
    for name, of_sample in (("accuracy", is_correct), ("brier", squares), ("log_loss", surprise)):
        overall[name] = _ratio(weights @ of_sample, weights.sum(1))
    columns = [overall[name] for name in METRICS] + [by_class[name][:, k] for k in range(num_classes) for name in OF_A_CLASS]
    return np.stack(columns, axis=1)


def _ranking(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n c"], weights: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, "r 3 c"]:
    """`RANKING` of each class against all others; NaN in resamples that lack a class of these samples."""
    num_classes = probabilities.shape[1]
    ranking = np.stack([_ranking_of(labels == k, probabilities[:, k], weights) for k in range(num_classes)], axis=-1)
    ranking[_lacks_class(labels, num_classes, weights)] = np.nan
    return ranking


def _lacks_class(labels: Int[np.ndarray, " n"], num_classes: int, weights: Float[np.ndarray, "r n"]) -> Bool[np.ndarray, " r"]:
    """Resamples without one of the classes that the samples have; all of them where that is one class only."""
    is_class = np.eye(num_classes)[labels]
    present = is_class.any(0)
    return ((weights @ is_class)[:, present] == 0).any(1) | (present.sum() < 2)


def _ranking_of(
    is_positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"], weights: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, "r 3"]:
    """AUC, where ties count half, average precision, sensitivity at 90 % specificity."""
    true, false = _above_thresholds(is_positive, score, weights)
    num_true, num_false = true[:, -1], false[:, -1]
    true_here, false_here = (np.diff(above, axis=1, prepend=0) for above in (true, false))
    auc = _ratio((false_here * (true - true_here / 2)).sum(1), num_true * num_false)
    precision = np.divide(true, true + false, out=np.zeros_like(true), where=true + false > 0)
    average_precision = _ratio((true_here * precision).sum(1), num_true)
    # weights are whole numbers: the tolerance only makes up for the rounding of 0.1
    specific = false <= (1 - SPECIFICITY) * num_false[:, None] + 1e-6
    sensitivity = _ratio(np.where(specific, true, 0).max(1), num_true)
    return np.stack([auc, average_precision, sensitivity], axis=1)


def _above_thresholds(
    is_positive: Bool[np.ndarray, " n"], score: Float[np.ndarray, " n"], weights: Float[np.ndarray, "r n"]
) -> tuple[Float[np.ndarray, "r t"], Float[np.ndarray, "r t"]]:
    """Weight of true and of false positives at every threshold, from the highest score to the lowest; ties share one."""
    order = np.argsort(-score, kind="stable")
    first_of_ties = np.flatnonzero(np.diff(score[order], prepend=np.inf))
    true, false = (
        np.add.reduceat(weights[:, order] * counted[order], first_of_ties, axis=1).cumsum(1)
        for counted in (is_positive, ~is_positive)
    )
    return true, false


def _calibration_errors(
    is_class: Float[np.ndarray, "n c"], probabilities: Float[np.ndarray, "n c"], weights: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, "r c"]:
    errors = []
    for y, p in zip(is_class.T, probabilities.T, strict=True):
        excess = np.eye(NUM_BINS)[_bin(p)] * (p - y)[:, None]
        errors.append(_ratio(np.abs(weights @ excess).sum(1), weights.sum(1)))
    return np.stack(errors, axis=1)


def _bin(probability: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.minimum((probability * NUM_BINS).astype(int), NUM_BINS - 1)


def _metrics(task: _Task, values: Float[np.ndarray, " m"], resampled: Float[np.ndarray, "r m"]) -> Metrics:
    """Values with their intervals."""
    few_patients = any(len(np.unique(task.patient[task.labels == index])) < 2 for index in np.unique(task.labels))
    groups: dict[str, dict[str, Estimate]] = {ALL: {}, **{name: {} for name in task.classes}}
    for (group, name), value, drawn in zip(task.columns, values, resampled.T, strict=True):
        has_interval = task.num_patients > 1 and not (few_patients and name in NEED_CLASSES)
        low, high = _interval(drawn) if has_interval else (np.nan, np.nan)
        groups[group][name] = Estimate(float(value), low, high)
    return Metrics(
        classes=task.classes,
        num_samples=tuple(np.bincount(task.labels, minlength=len(task.classes)).tolist()),
        num_patients=task.num_patients,
        num_resamples=len(resampled),
        overall=groups.pop(ALL),
        by_class=groups,
    )


def _interval(drawn: Float[np.ndarray, " r"]) -> tuple[float, float]:
    defined = drawn[~np.isnan(drawn)]
    if defined.size == 0 or defined.size < drawn.size / 2:
        return np.nan, np.nan
    low, high = np.quantile(defined, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _curves(task: _Task, index: int, probability: Float[np.ndarray, " n"], metrics: Metrics, num_resamples: int) -> ClassCurves:
    """Of one class against all others."""
    is_positive = task.labels == index
    name = task.classes[index]
    true, false = (above[0] for above in _above_thresholds(is_positive, probability, np.ones((1, len(probability)))))
    bins = _bin(probability)
    filled = np.unique(bins)
    counts = np.bincount(bins)[filled]
    return ClassCurves(
        name=name,
        auc=str(metrics.by_class[name]["auc"]),
        average_precision=str(metrics.by_class[name]["average_precision"]),
        calibration_error=f"{metrics.by_class[name]['calibration_error'].value:.3f}",
        false_positive_rate=np.append(0, false / false[-1]),
        true_positive_rate=np.append(0, true / true[-1]),
        band=_roc_band(task, is_positive, probability, num_resamples),
        precision=true / (true + false),
        share=float(is_positive.mean()),
        predicted=np.bincount(bins, probability)[filled] / counts,
        observed=np.bincount(bins, is_positive)[filled] / counts,
        counts=counts,
    )


def _roc_band(
    task: _Task, is_positive: Bool[np.ndarray, " n"], probability: Float[np.ndarray, " n"], num_resamples: int
) -> Float[np.ndarray, "2 g"] | None:
    """Interval of the true positive rate at each rate of `ROC_GRID`; None without resamples or with one patient of a class."""
    drawn = []
    if min(len(np.unique(task.patient[side])) for side in (is_positive, ~is_positive)) < 2:
        return None
    for weights in _drawn_weights(task, num_resamples, SEED):
        true, false = _above_thresholds(is_positive, probability, weights)
        usable = (true[:, -1] > 0) & (false[:, -1] > 0)
        for t, f in zip(true[usable], false[usable], strict=True):
            drawn.append(np.interp(ROC_GRID, np.append(0, f / f[-1]), np.append(0, t / t[-1])))
    if not drawn:
        return None
    return np.quantile(np.stack(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)


def _ratio(numerator: Real[np.ndarray, "..."], denominator: Real[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def _mean_of_defined(values: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Over values that are not NaN; NaN where there is none."""
    return _ratio(np.nansum(values, axis=axis), (~np.isnan(values)).sum(axis=axis))


def _as_dict(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    return {
        name: {key: None if np.isnan(value) else value for key, value in (("value", e.value), ("low", e.low), ("high", e.high))}
        for name, e in estimates.items()
    }


def _markdown(rows: Mapping[str, Sequence[str]], header: Sequence[str]) -> str:
    """A row a metric, with columns of equal width."""
    cells = [["metric", *header], *([name, *values] for name, values in rows.items())]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]) + "\n"
