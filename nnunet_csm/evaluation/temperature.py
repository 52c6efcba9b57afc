"""Class probabilities at a temperature (Guo 2017), fitted on what the networks of a model said of patients they had not seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.class_metrics import LEAST_PROBABILITY, TITLES
from nnunet_csm.evaluation.classification import evaluate
from nnunet_csm.evaluation.repeats import classes_of, labels_and_probabilities, read_runs

# beyond them every sample is right, so that certainty pays without end, or probabilities say nothing of the classes
LIMITS = (0.05, 20.0)
# of the patients of a single fold
NUM_PARTS = 5
SHOWN = ("calibration_error", "brier", "log_loss")


@dataclass(frozen=True)
class Temperature:
    """A temperature of all networks of a model.

    Attributes:
        value: above 1 makes probabilities less certain.
        num_samples: that it was fitted on.
        judged: rows before and after, columns `SHOWN`: each fold at a temperature that was fitted on other patients of the other
            folds; of one fold, a fifth of the patients at that of the others.
    """

    value: float
    num_samples: int
    judged: pd.DataFrame

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, for the record."""
        return {"value": self.value, "num_samples": self.num_samples, "cross_validated": self.judged.to_dict("index")}

    def lines(self) -> list[str]:
        """What there is to tell a user."""
        how = "more" if self.value < 1 else "less"
        said = f"temperature {self.value:.3f}, fitted on {self.num_samples} validation samples: probabilities are {how} certain"
        changes = (f"{TITLES[name]} {one['before']:.3f} -> {one['after']:.3f}" for name, one in self.judged.items())
        return [said, f"the same samples, each at a temperature that others were fitted with: {', '.join(changes)}"]


def at_temperature(probabilities: Float[np.ndarray, "*n c"], temperature: float) -> Float[np.ndarray, "*n c"]:
    """What a softmax would give of logits that are divided by the temperature; at 1 probabilities are left as they are."""
    if temperature == 1:
        return probabilities
    return softmax(np.log(np.maximum(probabilities, LEAST_PROBABILITY)) / temperature, axis=-1)


def fit(labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n c"]) -> float:
    """The temperature of the smallest log loss.

    Raises:
        ValueError: there is none within `LIMITS`; says why.
    """
    logits, samples = np.log(np.maximum(probabilities, LEAST_PROBABILITY)), np.arange(len(labels))

    def log_loss(log_temperature: float) -> float:
        return -float(log_softmax(logits / np.exp(log_temperature), axis=1)[samples, labels].mean())

    low, high = np.log(LIMITS)
    found = float(minimize_scalar(log_loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6}).x)
    if found < low + 1e-3:
        msg = "hardly a sample is wrong, so that no temperature is low enough"
        raise ValueError(msg)
    if found > high - 1e-3:
        msg = "their probabilities tell nothing of the classes, so that no temperature is high enough"
        raise ValueError(msg)
    return float(np.exp(found))


def fit_on_folds(folds: Sequence[Path], classes: Sequence[str]) -> Temperature:
    """Fit on the validation predictions of trained folds, and judge that on each fold by a temperature of the others.

    Args:
        folds: the folders that their trainings wrote.
        classes: of the model.

    Raises:
        UserError: a fold without held-out patients or without predictions of them, other classes, one that no patient has, or
            predictions that no temperature fits.
    """
    for folder in folds:
        if folder.name == "fold_all":
            raise UserError(f"{folder}: has no patients it was not trained on; choose folds with held-out ones for --calibrated")
    paths = [folder / "validation" / "predictions.csv" for folder in folds]
    if missing := [path for path in paths if not path.is_file()]:
        raise UserError(
            f"{missing[0]}: no such file, expected what the training of the fold predicts at its end; run that part with "
            f"`nnunet_csm finetune --val`, or leave out --calibrated"
        )
    table = read_runs(paths)
    if classes_of(table) != tuple(classes):
        found, expected = ", ".join(classes_of(table)), ", ".join(classes)
        raise UserError(f"{paths[0]}: classes {found}, the checkpoints know {expected}; validate again with finetune --val")
    labels, probabilities = labels_and_probabilities(table)
    if lacking := [name for index, name in enumerate(classes) if not (labels == index).any()]:
        raise UserError(f"{paths[0]} ...: no sample is {lacking[0]}, expected some of each class; give more folds with -f")
    try:
        value = fit(labels, probabilities)
        judged = _cross_validated(table, labels, probabilities, classes)
    except ValueError as error:
        raise UserError(f"{paths[0]} ...: {error}; leave out --calibrated, or give more folds with -f") from None
    return Temperature(value, len(labels), judged)


def _cross_validated(
    table: pd.DataFrame, labels: Int[np.ndarray, " n"], probabilities: Float[np.ndarray, "n c"], classes: Sequence[str]
) -> pd.DataFrame:
    after, parts = probabilities.copy(), table["run"].to_numpy()
    if len(np.unique(parts)) == 1:
        parts = pd.factorize(table["patient"])[0] % NUM_PARTS
    for part in np.unique(parts):
        own = parts == part
        others = ~(own | table["patient"].isin(table.loc[own, "patient"]).to_numpy())
        if not others.any():
            msg = "the same patients are in every part, so that no others are left to fit a temperature on"
            raise ValueError(msg)
        after[own] = at_temperature(probabilities[own], fit(labels[others], probabilities[others]))
    found = {"before": probabilities, "after": after}
    rows = {name: evaluate(labels, one, classes, num_resamples=0).overall.loc["value"] for name, one in found.items()}
    return pd.DataFrame(rows).T[list(SHOWN)]
