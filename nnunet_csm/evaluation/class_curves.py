"""The picture of a classifier's predictions: curves of each class with intervals over patients."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from nnunet_csm.evaluation.bootstrap import SEED, drawn_weights, estimate_text, interval
from nnunet_csm.evaluation.class_metrics import above_thresholds, bins_of
from nnunet_csm.evaluation.classification import NUM_RESAMPLES, evaluate
from nnunet_csm.figures.classification import ROC_GRID, ClassCurves, Reliability, save_classification


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
    metrics = evaluate(labels, probabilities, classes, patients, num_resamples=num_resamples)
    patient = np.unique(range(len(labels)) if patients is None else np.asarray(patients), return_inverse=True)[1]
    shown = [
        index
        for index in range(1 if len(classes) == 2 else 0, len(classes))
        if 0 < np.count_nonzero(labels == index) < len(labels)
    ]
    curves = [
        _curves(labels == k, probabilities[:, k], classes[k], metrics.estimates[classes[k]], patient, num_resamples)
        for k in shown
    ]
    save_classification(path, curves, labels, probabilities, classes, title)


def _curves(
    is_positive: Bool[np.ndarray, " n"],
    probability: Float[np.ndarray, " n"],
    name: str,
    estimates: pd.DataFrame,
    patient: Int[np.ndarray, " n"],
    num_resamples: int,
) -> ClassCurves:
    """Curves of one class against all others."""
    true, false = (above[0] for above in above_thresholds(is_positive, probability, np.ones((1, len(probability)))))
    bins = bins_of(probability)
    filled = np.unique(bins)
    counts = np.bincount(bins)[filled]
    reliability = Reliability(
        name=name,
        calibration_error=f"{estimates['calibration_error'].value:.3f}",
        predicted=np.bincount(bins, probability)[filled] / counts,
        observed=np.bincount(bins, is_positive)[filled] / counts,
        counts=counts,
    )
    return ClassCurves(
        name=name,
        auc=estimate_text(estimates["auc"]),
        average_precision=estimate_text(estimates["average_precision"]),
        false_positive_rate=np.append(0, false / false[-1]),
        true_positive_rate=np.append(0, true / true[-1]),
        band=_roc_band(is_positive, probability, patient, num_resamples),
        precision=true / (true + false),
        share=float(is_positive.mean()),
        reliability=reliability,
    )


def _roc_band(
    is_positive: Bool[np.ndarray, " n"], probability: Float[np.ndarray, " n"], patient: Int[np.ndarray, " n"], num_resamples: int
) -> Float[np.ndarray, "2 g"] | None:
    """Interval of the true positive rate at each rate of `ROC_GRID`; None without resamples or with one patient of a class."""
    resampled = []
    if min(len(np.unique(patient[side])) for side in (is_positive, ~is_positive)) < 2:
        return None
    for weights in drawn_weights(patient, num_resamples, SEED):
        true, false = above_thresholds(is_positive, probability, weights)
        usable = (true[:, -1] > 0) & (false[:, -1] > 0)
        for t, f in zip(true[usable], false[usable], strict=True):
            resampled.append(np.interp(ROC_GRID, np.append(0, f / f[-1]), np.append(0, t / t[-1])))
    return interval(np.stack(resampled)) if resampled else None
