"""Simple models on embeddings: linear (logistic or ridge regression) and nearest neighbours, in folds that keep patients whole.

What a model can be set by (regularisation, number of neighbours) is chosen within the training side of a fold, also by patient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from nnunet_csm.data.diagnoses import alike_classes, is_no_value, named_rows, number, strata_of
from nnunet_csm.errors import UserError

LINEAR, NEIGHBOURS = "linear", "nearest neighbours"
PROBES = (LINEAR, NEIGHBOURS)
CLASS_COLUMNS, VALUE_COLUMNS = ("class", "label"), ("value",)

# of L2, on features of deviation 1; ties go to the first, which is the strongest
STRENGTHS = tuple(10.0**n for n in range(-5, 1))
PENALTIES = tuple(10.0**n for n in range(6, -3, -1))
NUM_NEIGHBOURS = (20, 10, 5, 3, 1)
FEWEST_FOLDS = 3


@dataclass(frozen=True)
class Targets:
    """What is to be told from embeddings, a row a case.

    Attributes:
        column: that it was read from.
        classes: names in the order of their indices; none where values are numbers.
        table: index case; columns target (index of the class, or number), patient, and group ("" where there is none).
    """

    column: str
    classes: tuple[str, ...]
    table: pd.DataFrame

    @property
    def patients(self) -> list[str]:
        return list(self.table["patient"])

    def only(self, cases: Sequence[str]) -> "Targets":
        return Targets(self.column, self.classes, self.table.loc[list(cases)])


def read_targets(
    path: Path, class_column: str | None = None, value_column: str | None = None, group_column: str | None = None
) -> tuple[Targets, list[str]]:
    """Read a CSV with the columns case, a class or a number, and optionally patient and a group.

    Without a column named, it is `class` or `label`, else `value`. `classification.csv` is such a table, unless it is by lesion.

    Returns:
        The targets, and cases that have none.

    Raises:
        UserError: the file is not such a table; the message names the line.
    """
    if class_column and value_column:
        raise UserError(f"-class_column {class_column} -value_column {value_column}: one target at a time; give one of them")
    known = (
        f"expected columns case and {', '.join((*CLASS_COLUMNS, *VALUE_COLUMNS))} or one named by -class_column, -value_column"
    )
    rows = named_rows(path, ["case"], known)
    header = rows[0][1]
    columns = [name.casefold() for name in (class_column, value_column) if name] or [*CLASS_COLUMNS, *VALUE_COLUMNS]
    column = next((name for name in columns if name in header), None)
    group = group_column.casefold() if group_column else None
    missing = "/".join(columns) if column is None else group if group is not None and group not in header else None
    if column is None or missing:
        raise UserError(f"{path}: no column {missing} among {', '.join(header)}; {known}, and a group by -group")
    is_number = bool(value_column) or (not class_column and column in VALUE_COLUMNS)
    found: dict[str, dict[str, Any]] = {}
    without: list[str] = []
    for line, row in rows:
        case, target = row["case"], row[column]
        if case in found or case in without:
            raise UserError(f"{path}: line {line}: {case} is there twice, and has one embedding; keep one row a case")
        if not case:
            raise UserError(f"{path}: line {line}: case is empty; fill it in, or take the row out")
        if is_no_value(target):
            without.append(case)
            continue
        patient = row.get("patient", "")
        groups = row[group] if group else ""
        found[case] = {
            "target": number(target, f"{path}: line {line}: {column}", "give the column as -class_column")
            if is_number
            else target,
            "patient": case if is_no_value(patient) else patient,
            "group": "unknown" if group and is_no_value(groups) else groups,
        }
    if not found:
        raise UserError(f"{path}: no case has a value in column {column}; fill it in, or name another column")
    table = pd.DataFrame.from_dict(found, orient="index")
    if is_number:
        return Targets(column, (), table), without
    if alike := alike_classes(table["target"]):
        raise UserError(f"{path}: {alike[0]}; give them one spelling")
    classes = tuple(sorted(set(table["target"])))
    return Targets(column, classes, table.assign(target=[classes.index(name) for name in table["target"]])), without


@dataclass(frozen=True)
class Fold:
    """Numbers of the cases that a probe learns from and predicts; of the former, parts in which its settings are chosen."""

    training: Int[np.ndarray, " a"]
    test: Int[np.ndarray, " b"]
    inner: list[tuple[Int[np.ndarray, " _"], Int[np.ndarray, " _"]]]


def folds_of(targets: Targets, num_folds: int, num_repeats: int, seed: int) -> list[Fold]:
    """Every case is predicted once in each repeat; patients stay whole, classes (or values) as even as that allows.

    Raises:
        UserError: fewer patients, of all or of a class, than folds.
    """
    if num_folds < FEWEST_FOLDS or num_repeats < 1:
        raise UserError(f"{num_folds} folds and {num_repeats} repeats; expected {FEWEST_FOLDS} folds and 1 repeat or more")
    values, patients = targets.table["target"], targets.table["patient"]
    counted = patients.groupby(values).nunique() if targets.classes else pd.Series({-1: patients.nunique()})
    if len(targets.classes) == 1 or counted.min() < num_folds:
        what = targets.classes[int(counted.idxmin())] if targets.classes else "all"
        raise UserError(
            f"column {targets.column}: {len(targets.classes) or 'no'} classes, {counted.min()} patients of {what}; expected two "
            f"classes or more (or numbers), and at least as many patients of each as folds; leave rare ones out, or give -folds"
        )
    strata = values.to_numpy() if targets.classes else strata_of(values.tolist())

    def divided(cases: np.ndarray, parts: int, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=number)
        return list(splitter.split(cases[:, None], strata[cases], patients.to_numpy()[cases]))

    folds = []
    for repeat in range(num_repeats):
        for training, test in divided(np.arange(len(values)), num_folds, seed + repeat):
            inner = [(a, b) for a, b in divided(training, num_folds - 1, seed + repeat) if len(a) and len(b)]
            folds.append(Fold(training, test, inner))
    return [fold for fold in folds if len(fold.test)]


def predicted(features: Float[np.ndarray, "n e"], targets: Targets, fold: Fold, probe: str) -> Float[np.ndarray, "b ..."]:
    """What a probe that has learned from a fold's training side says of its test side: probabilities (b, c), or numbers (b,)."""
    values, num_classes = targets.table["target"].to_numpy(), len(targets.classes)
    model, grid, score = _model(probe, bool(num_classes), min(len(learned) for learned, _ in fold.inner))
    search = GridSearchCV(make_pipeline(StandardScaler(), model), grid, scoring=score, cv=fold.inner)
    search.fit(features[fold.training], values[fold.training])
    if not num_classes:
        return np.asarray(search.predict(features[fold.test]), np.float64)
    found = np.zeros((len(fold.test), num_classes))
    found[:, search.classes_] = search.predict_proba(features[fold.test])
    return found


def _model(probe: str, of_classes: bool, num_samples: int) -> tuple[BaseEstimator, dict[str, Sequence[float]], str]:
    """A model, the settings to choose from, and what they are chosen by."""
    score = "balanced_accuracy" if of_classes else "neg_mean_squared_error"
    if probe == LINEAR and of_classes:
        # classes weigh the same, however many cases they have
        logistic = LogisticRegression(class_weight="balanced", max_iter=2000)
        return logistic, {"logisticregression__C": STRENGTHS}, score
    if probe == LINEAR:
        return Ridge(), {"ridge__alpha": PENALTIES}, score
    kind = KNeighborsClassifier if of_classes else KNeighborsRegressor
    numbers = [number for number in NUM_NEIGHBOURS if number <= num_samples]
    return kind(weights="distance", metric="cosine"), {f"{kind.__name__.lower()}__n_neighbors": numbers}, score
