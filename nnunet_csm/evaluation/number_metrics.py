"""How good predicted numbers are: mean absolute error, Pearson's r, R2 and calibration, with bootstrap intervals by patient.

Calibration is the straight line of truth on prediction: slope 1 and intercept 0 where predictions are right on average, a slope
below 1 where they are too far apart. Predictions come from runs, networks or probes of other training samples each: r is computed
in each run and averaged, as those of different ones are not to be ranked against each other; the others pool all samples. What is
not defined is NaN: r, R2 and line of equal values.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from nnunet_csm.evaluation.bootstrap import SEED, drawn_weights, interval, mean_of_defined, ratio

TITLES = {"mae": "MAE", "r": "r", "r2": "R2", "slope": "slope of truth on prediction", "intercept": "its intercept"}
NUM_RESAMPLES = 2000


def evaluate_numbers(
    values: Float[np.ndarray, " n"],
    predictions: Sequence[Float[np.ndarray, " n"]],
    patients: Sequence[str],
    runs: Sequence[int],
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
) -> list[pd.DataFrame]:
    """Rows value, low and high (95 %), a column a metric, of every set of predictions; of two, then of second - first as well.

    All are measured in the same resamples of patients; with one patient there are no intervals.
    """
    patient = np.unique(np.asarray(patients), return_inverse=True)[1]
    samples_of_runs = [np.flatnonzero(np.asarray(runs) == run) for run in np.unique(runs)]

    def measured(weights: Float[np.ndarray, "r n"]) -> Float[np.ndarray, "k r m"]:
        return np.stack([measure(values, one, weights, samples_of_runs) for one in predictions])

    found = measured(np.ones((1, len(values))))
    resampled = np.concatenate([measured(weights) for weights in drawn_weights(patient, num_resamples, seed)], axis=1)
    if len(predictions) == 2:
        found, resampled = (np.concatenate([both, both[1:] - both[:1]]) for both in (found, resampled))
    if patient.max() == 0:
        resampled[:] = np.nan
    rows = ["value", "low", "high"]
    return [pd.DataFrame([f[0], *interval(r)], index=rows, columns=[*TITLES]) for f, r in zip(found, resampled, strict=True)]


def measure(
    values: Float[np.ndarray, " n"],
    predicted: Float[np.ndarray, " n"],
    weights: Float[np.ndarray, "r n"],
    runs: Sequence[Int[np.ndarray, " _"]],
) -> Float[np.ndarray, "r m"]:
    """The metrics of `TITLES`; `weights` says how often each resample drew each sample."""
    total = weights.sum(1)
    mae = ratio(weights @ np.abs(values - predicted), total)
    of_mean = _covariance(values, values, weights) * total
    r2 = 1 - ratio(weights @ np.square(values - predicted), np.where(of_mean > 0, of_mean, 0))
    by_run = []
    for run in runs:
        one, other, drawn = values[run], predicted[run], weights[:, run]
        variances = _covariance(one, one, drawn).clip(0) * _covariance(other, other, drawn).clip(0)
        by_run.append(ratio(_covariance(one, other, drawn), np.sqrt(variances)))
    slope = ratio(_covariance(values, predicted, weights), _covariance(predicted, predicted, weights))
    intercept = ratio(weights @ values, total) - slope * ratio(weights @ predicted, total)
    return np.stack([mae, mean_of_defined(np.stack(by_run), axis=0), r2, slope, intercept], axis=1)


def _covariance(
    one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"], weights: Float[np.ndarray, "r n"]
) -> Float[np.ndarray, " r"]:
    """Of weighted samples; centred beforehand, so that equal values give 0 and not what rounding leaves."""
    one, other, total = one - one.mean(), other - other.mean(), weights.sum(1)
    found = ratio(weights @ (one * other), total) - ratio(weights @ one, total) * ratio(weights @ other, total)
    return np.where(np.abs(found) > 1e-12 * one.std() * other.std(), found, 0.0)
