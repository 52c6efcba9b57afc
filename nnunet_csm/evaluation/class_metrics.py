"""Metrics of predicted classes from weights of the samples: ones for the value, how often a resample drew each for an interval.

Labels are class indices (n,); probabilities are (n, c), rows sum to 1; weights are (r, n), a row a resample. All resamples go
through one pass over sorted scores: scikit-learn's metrics, whose values these are (tested), take one resample a call, ten
seconds instead of a twentieth for two thousand of them, and that for every run and class.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from nnunet_csm.evaluation.bootstrap import mean_of_defined, ratio

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
METRICS = tuple(TITLES)
# Of each class against all others. With two classes the metric of the last one counts, with more the mean over classes.
OF_A_CLASS = ("auc", "average_precision", "sensitivity_at_90_specificity", "calibration_error", "recall")
# these rank samples, which those of different networks cannot be
RANKING = OF_A_CLASS[:3]

SPECIFICITY = 0.9
NUM_BINS = 10
LEAST_PROBABILITY = float(np.finfo(np.float32).eps)


def measure(
    labels: Int[np.ndarray, " n"],
    probabilities: Float[np.ndarray, "n c"],
    weights: Float[np.ndarray, "r n"],
    runs: Sequence[Int[np.ndarray, " _"]],
) -> Float[np.ndarray, "r m"]:
    """All `METRICS`, then those `OF_A_CLASS` of each class. `runs` holds the samples of each run, ranked by themselves."""
    num_classes = probabilities.shape[1]
    is_class = np.eye(num_classes)[labels]
    is_correct = probabilities.argmax(1) == labels
    by_run = np.stack([_ranking(labels[run], probabilities[run], weights[:, run]) for run in runs])
    by_class = dict(zip(RANKING, np.moveaxis(mean_of_defined(by_run, axis=0), 1, 0), strict=True))
    by_class["calibration_error"] = _calibration_errors(is_class, probabilities, weights)
    by_class["recall"] = ratio(weights @ (is_class * is_correct[:, None]), weights @ is_class)
    by_class["recall"][_lacks_class(labels, num_classes, weights)] = np.nan

    squares = np.square(probabilities - is_class).sum(1) / (2 if num_classes == 2 else 1)
    surprise = -np.log(np.maximum(probabilities[np.arange(len(labels)), labels], LEAST_PROBABILITY))
    overall = {name: _over_classes(column) for name, column in by_class.items()}
    overall["balanced_accuracy"] = mean_of_defined(by_class["recall"], axis=1)
    for name, of_sample in (("accuracy", is_correct), ("brier", squares), ("log_loss", surprise)):
        overall[name] = ratio(weights @ of_sample, weights.sum(1))
    columns = [overall[name] for name in METRICS] + [by_class[name][:, k] for k in range(num_classes) for name in OF_A_CLASS]
    return np.stack(columns, axis=1)


def auc(
    labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n c"], weights: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    """AUC of weighted samples of one network; `weights` says how often each resample drew each sample."""
    return _over_classes(_ranking(labels, probabilities, weights)[:, 0])


def _over_classes(values: Float[np.ndarray, "r c"]) -> Float[np.ndarray, " r"]:
    """Take the last one's of two classes; of more, the mean of those that are defined."""
    return values[:, 1] if values.shape[1] == 2 else mean_of_defined(values, axis=1)


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
    true, false = above_thresholds(is_positive, score, weights)
    num_true, num_false = true[:, -1], false[:, -1]
    true_here, false_here = (np.diff(above, axis=1, prepend=0) for above in (true, false))
    auc = ratio((false_here * (true - true_here / 2)).sum(1), num_true * num_false)
    precision = np.divide(true, true + false, out=np.zeros_like(true), where=true + false > 0)
    average_precision = ratio((true_here * precision).sum(1), num_true)
    # weights are whole numbers: the tolerance only makes up for the rounding of 0.1
    specific = false <= (1 - SPECIFICITY) * num_false[:, None] + 1e-6
    sensitivity = ratio(np.where(specific, true, 0).max(1), num_true)
    return np.stack([auc, average_precision, sensitivity], axis=1)


def above_thresholds(
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
        excess = np.eye(NUM_BINS)[bins_of(p)] * (p - y)[:, None]
        errors.append(ratio(np.abs(weights @ excess).sum(1), weights.sum(1)))
    return np.stack(errors, axis=1)


def bins_of(probability: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The bin of equal width, of `NUM_BINS`, that each probability is in."""
    return np.minimum((probability * NUM_BINS).astype(int), NUM_BINS - 1)
