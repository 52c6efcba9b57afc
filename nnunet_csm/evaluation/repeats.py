"""A classifier's predictions of several folds or repeats as one table."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from nnunet_csm.errors import UserError

PROBABILITY = "p_"
REMEDY = "give the predictions.csv that a classifier's training wrote into validation/ or test/"


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
    return joined(tables)


def joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of several runs as one; column run has its number."""
    return pd.concat(tables, keys=range(len(tables)), names=["run"]).reset_index("run").reset_index(drop=True)


def read_predictions(path: Path) -> pd.DataFrame:
    """Read one `predictions.csv` of classes; names that look like numbers are text.

    Raises:
        UserError: no such file, or not a table of a classifier's validation.
    """
    table = read_samples(path, ("class",))
    if not classes_of(table):
        raise UserError(f"{path}: no column p_CLASS; {REMEDY}")
    for column in (PROBABILITY + name for name in classes_of(table)):
        table[column] = numbers_in(table, column, path, (0, 1), "probabilities from 0 to 1")
    return table


def read_samples(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """Read one `predictions.csv` that has these columns beside those that name samples.

    Raises:
        UserError: no such file, or it is no CSV, or lacks a column or rows.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; {REMEDY}")
    try:
        table = pd.read_csv(path, dtype={"case": str, "patient": str, "class": str, "mask_label": str}, keep_default_na=False)
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV ({error}); {REMEDY}") from None
    missing = [name for name in ("case", "mask_label", "patient", *columns) if name not in table]
    if missing or table.empty:
        raise UserError(f"{path}: no {f'column {missing[0]}' if missing else 'row'}; {REMEDY}")
    return table


def numbers_in(
    table: pd.DataFrame, column: str, path: Path, limits: tuple[float, float] | None = None, expected: str = "numbers"
) -> pd.Series:
    """Read a column as finite numbers between limits.

    Raises:
        UserError: others, of which the first is named.
    """
    found = pd.to_numeric(table[column], errors="coerce")
    if not (fine := np.isfinite(found) if limits is None else found.between(*limits)).all():
        row = int(np.argmin(fine))
        where = f"{table[column].iloc[row]!r} in column {column}, line {row + 2}"
        raise UserError(f"{path}: {where}, expected {expected}; {REMEDY}")
    return found
