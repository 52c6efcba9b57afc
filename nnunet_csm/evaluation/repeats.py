"""A classifier's predictions of several folds or repeats as one table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from nnunet_csm.errors import UserError

PROBABILITY = "p_"


def classes_of(table: pd.DataFrame) -> tuple[str, ...]:
    """The classes that a table of predictions has probabilities of, in the order of their indices."""
    return tuple(name.removeprefix(PROBABILITY) for name in table if name.startswith(PROBABILITY))


def labels_and_probabilities(table: pd.DataFrame) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, "n c"]]:
    """True class indices and probabilities of a table of predictions."""
    classes = classes_of(table)
    labels = np.array([classes.index(name) for name in table["class"]])
    return labels, table[[PROBABILITY + name for name in classes]].to_numpy(np.float64)


def read_runs(paths: Sequence[Path]) -> pd.DataFrame:
    """Read the `predictions.csv` of trainings, one a run, in their order; column run has its number.

    A run is a fold or a repeat, with a network of its own.

    Raises:
        UserError: no such file, not a table of a classifier's validation, or other classes than in the first.
    """
    tables = [read_predictions(path) for path in paths]
    classes = classes_of(tables[0])
    for path, table in zip(paths, tables, strict=True):
        found = classes_of(table)
        if found != classes:
            raise UserError(
                f"{path}: probabilities of {', '.join(found)}, {paths[0]} has {', '.join(classes)}; give runs of one task"
            )
        if unknown := sorted(set(table["class"]) - set(classes)):
            raise UserError(f"{path}: class {unknown[0]!r} has no column of probabilities; expected one of {', '.join(classes)}")
    return pd.concat(tables, keys=range(len(tables)), names=["run"]).reset_index("run").reset_index(drop=True)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read one `predictions.csv`; names that look like numbers are text.

    Raises:
        UserError: no such file, or not a table of a classifier's validation.
    """
    remedy = "give the predictions.csv that a classifier's training wrote into validation/ or test/"
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        table = pd.read_csv(path, dtype={"case": str, "patient": str, "class": str, "mask_label": str}, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV ({error}); {remedy}") from None
    missing = [name for name in ("case", "mask_label", "patient", "class") if name not in table]
    if missing or not classes_of(table) or table.empty:
        raise UserError(f"{path}: no column {missing[0] if missing else 'p_CLASS'} or no row; {remedy}")
    for column in (PROBABILITY + name for name in classes_of(table)):
        numbers = pd.to_numeric(table[column], errors="coerce")
        if not (fine := numbers.between(0, 1)).all():
            row = int(np.argmin(fine))
            found = f"{table[column].iloc[row]!r} in column {column}, line {row + 2}"
            raise UserError(f"{path}: {found}, expected probabilities from 0 to 1; {remedy}")
        table[column] = numbers
    return table
