"""How good predicted classes are: metrics with bootstrap intervals by patient, and two classifiers compared on the same patients.

Labels are class indices (n,); probabilities are (n, c), rows sum to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from nnunet_csm.evaluation.bootstrap import CONFIDENCE, SEED, drawn_weights, estimates_dict, estimates_markdown, interval
from nnunet_csm.evaluation.class_metrics import METRICS, OF_A_CLASS, TITLES, measure
from nnunet_csm.evaluation.number_metrics import TITLES as NUMBER_TITLES

# these say nothing where a class is absent, or has one patient that every resample has or has not
NEED_CLASSES = frozenset({"auc", "average_precision", "balanced_accuracy", "sensitivity_at_90_specificity", "recall"})

NUM_RESAMPLES = 2000
# half precision rounds probabilities
SUM_TOLERANCE = 0.01

# no class has this name
ALL = ""


@dataclass(frozen=True)
class Metrics:
    """What `evaluate` found; it says what each metric is and when it is NaN.

    Attributes:
        classes: names in the order of their indices; with two, the last is the positive one.
        num_samples: of each class.
        num_patients: that were resampled.
        num_resamples: 0 when no interval was asked for.
        estimates: rows value, low and high; a column a (class, metric): of class `ALL` the `METRICS`, of the others the metrics
            `OF_A_CLASS`, against all others. NaN is what is not defined.
    """

    classes: tuple[str, ...]
    num_samples: tuple[int, ...]
    num_patients: int
    num_resamples: int
    estimates: pd.DataFrame

    @property
    def digits(self) -> str:
        """How metrics are written."""
        return ".3f"

    @property
    def overall(self) -> pd.DataFrame:
        """Rows value, low and high; a column a metric of `METRICS`."""
        return self.estimates[ALL]

    @property
    def counts(self) -> str:
        """Samples and patients in a line."""
        counts = ", ".join(f"{count} {name}" for name, count in zip(self.classes, self.num_samples, strict=True))
        return f"{sum(self.num_samples)} samples of {self.num_patients} patients: {counts}"

    def table(self) -> pd.DataFrame:
        """A row a metric: class ("all" or a name), metric, value, low, high."""
        return self.estimates.T.rename(index={ALL: "all"}, level=0).rename_axis(["class", "metric"]).reset_index()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN is None."""
        return {
            "classes": list(self.classes),
            "num_samples": dict(zip(self.classes, self.num_samples, strict=True)),
            "num_patients": self.num_patients,
            "num_resamples": self.num_resamples,
            "confidence": CONFIDENCE,
            "metrics": estimates_dict(self.overall),
            "by_class": {name: estimates_dict(self.estimates[name]) for name in self.classes},
        }

    def to_markdown(self) -> str:
        """Counts and the overall metrics as a Markdown table, for a terminal as much as for a page."""
        return f"{self.counts}\n\n{estimates_markdown({'value (95 % interval)': self.overall}, TITLES)}"


@runtime_checkable
class Scored(Protocol):
    """Metrics of classes, or of numbers."""

    @property
    def overall(self) -> pd.DataFrame: ...

    @property
    def counts(self) -> str: ...

    @property
    def digits(self) -> str: ...

    def to_dict(self) -> dict[str, Any]: ...


Metered = TypeVar("Metered", bound=Scored)


@dataclass(frozen=True)
class Comparison(Generic[Metered]):
    """Two sets of predictions for the same samples; `difference`, as `Metrics.overall`, is second - first in each resample."""

    first: Metered
    second: Metered
    difference: pd.DataFrame

    @property
    def counts(self) -> str:
        """Samples and patients in a line."""
        return self.second.counts

    def table(self) -> pd.DataFrame:
        """A row a metric: metric, first, second, difference, low, high (of the difference)."""
        values = {"first": self.first.overall.loc["value"], "second": self.second.overall.loc["value"]}
        return (
            pd.DataFrame(values)
            .join(self.difference.T.rename(columns={"value": "difference"}))
            .rename_axis("metric")
            .reset_index()
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN is None."""
        return {"first": self.first.to_dict(), "second": self.second.to_dict(), "difference": estimates_dict(self.difference)}

    def to_markdown(self, names: tuple[str, str] = ("first", "second")) -> str:
        """Counts, both and their difference as a Markdown table."""
        first, second = names
        columns = {first: self.first.overall, second: self.second.overall, f"{second} - {first}": self.difference}
        return f"{self.counts}\n\n{estimates_markdown(columns, {**TITLES, **NUMBER_TITLES}, self.second.digits)}"


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
    (found,) = _evaluated(labels, [probabilities], classes, patients, runs, num_resamples, seed)
    return found


def compare(
    labels: Int[np.ndarray, " n"],
    first: Float[np.ndarray, "n c"],
    second: Float[np.ndarray, "n c"],
    classes: Sequence[str],
    patients: Sequence[str] | None = None,
    runs: Sequence[int] | None = None,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> Comparison[Metrics]:
    """Two sets of probabilities for the same samples, and their differences in the same resamples. Arguments as of `evaluate`."""
    before, after, difference = _evaluated(labels, [first, second], classes, patients, runs, num_resamples, seed)
    return Comparison(before, after, difference.overall)


def _evaluated(
    labels: Int[np.ndarray, " n"],
    predictions: Sequence[Float[np.ndarray, "n c"]],
    classes: Sequence[str],
    patients: Sequence[str] | None,
    runs: Sequence[int] | None,
    num_resamples: int,
    seed: int,
) -> list[Metrics]:
    """Metrics of every set of predictions in the same resamples; of two, then their differences, second - first."""
    num_samples, num_classes = len(labels), len(classes)
    assert num_samples and num_classes >= 2 and labels.min() >= 0 and labels.max() < num_classes
    assert all(given is None or len(given) == num_samples for given in (patients, runs))
    predictions = [_checked(one, (num_samples, num_classes)) for one in predictions]
    patient = np.unique(range(num_samples) if patients is None else np.asarray(patients), return_inverse=True)[1]
    run = np.zeros(num_samples) if runs is None else np.asarray(runs)
    samples_of_runs = [np.flatnonzero(run == one) for one in np.unique(run)]

    def measured(weights: Float[np.ndarray, "r n"]) -> Float[np.ndarray, "k r m"]:
        return np.stack([measure(labels, one, weights, samples_of_runs) for one in predictions])

    columns = pd.MultiIndex.from_tuples(
        [(ALL, name) for name in METRICS] + [(one, name) for one in classes for name in OF_A_CLASS]
    )
    values = measured(np.ones((1, num_samples)))
    blocks = [measured(weights) for weights in drawn_weights(patient, num_resamples, seed)]
    resampled = np.concatenate([values[:, :0], *blocks], axis=1)
    if num_resamples:
        biased = columns.get_level_values(1) == "calibration_error"
        shift = values[..., biased] - np.median(resampled[..., biased], axis=1, keepdims=True)
        resampled[..., biased] = np.clip(resampled[..., biased] + shift, 0, 1)
    if len(predictions) == 2:
        values, resampled = (np.concatenate([both, both[1:] - both[:1]]) for both in (values, resampled))

    few_patients = pd.Series(patient).groupby(labels).nunique().min() < 2
    unknown = few_patients & columns.get_level_values(1).isin(NEED_CLASSES) | (len(np.unique(patient)) < 2)
    found = []
    for (value,), of_resamples in zip(values, resampled, strict=True):
        estimates = pd.DataFrame([value, *interval(of_resamples)], index=["value", "low", "high"], columns=columns)
        estimates.loc[["low", "high"], unknown] = np.nan
        num_of_class = tuple(np.bincount(labels, minlength=num_classes).tolist())
        found.append(Metrics(tuple(classes), num_of_class, len(np.unique(patient)), num_resamples, estimates))
    return found


def _checked(probabilities: Float[np.ndarray, "n c"], shape: tuple[int, int]) -> Float[np.ndarray, "n c"]:
    """Return them as float64. Raises ValueError where they are none."""
    assert probabilities.shape == shape
    wrong = ~np.isfinite(probabilities).all(1) | (np.abs(probabilities.sum(1) - 1) > SUM_TOLERANCE) | (probabilities < 0).any(1)
    if wrong.any():
        raise ValueError(
            f"{wrong.sum()} of {len(wrong)} samples have probabilities that are not finite, or below 0, or do not sum to 1, the "
            f"first one {probabilities[wrong][0]}; give softmax's output, and look at the training's loss when it is not finite"
        )
    return probabilities.astype(np.float64)
