"""Embeddings as a file: a row a case, with the series that were looked at and the features."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_csm.errors import UserError
from nnunet_csm.files import whole
from nnunet_csm.listing import file_problem

FORMATS = (".parquet", ".csv", ".npz")
CASE, SERIES, FEATURE = "case", "series", "f"
# digits that give back every number of 32 bits
EXACT = "%.9g"


def check_format(path: Path) -> None:
    """Raise UserError when a name does not end as one of `FORMATS`, or what writes and reads parquet is not installed."""
    if path.suffix not in FORMATS:
        raise UserError(f"{path}: expected a name that ends in {', '.join(FORMATS)}; give another one")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{path}: parquet needs pyarrow; pip install 'nnunet_csm[parquet]', or take .csv or .npz")


def embeddings_of(cases: dict[str, tuple[str, np.ndarray]]) -> pd.DataFrame:
    """The table of some cases: name to series, as text, and vector (e,). Columns are case, series, f0, f1, ..."""
    features = np.stack([vector for _, vector in cases.values()]).astype(np.float32)
    table = pd.DataFrame(features, columns=[f"{FEATURE}{number}" for number in range(features.shape[1])])
    table.insert(0, SERIES, [series for series, _ in cases.values()])
    table.insert(0, CASE, list(cases))
    return table


def write_embeddings(table: pd.DataFrame, path: Path) -> None:
    """Write a table of `embeddings_of`, whole or not at all; all formats hold the same numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        if path.suffix == ".parquet":
            table.to_parquet(temporary, index=False)
        elif path.suffix == ".csv":
            table.to_csv(temporary, index=False, float_format=EXACT)
        else:
            names = {column: table[column].to_numpy(np.str_) for column in (CASE, SERIES)}
            with temporary.open("wb") as stream:
                np.savez(stream, **names, features=table.drop(columns=[CASE, SERIES]).to_numpy(np.float32))


def read_embeddings(path: Path) -> pd.DataFrame:
    """Read what `write_embeddings` wrote, or a table of another program's: case is the index, every other column a feature.

    Raises:
        UserError: no such file, not such a table, a case twice, or features that are no numbers.
    """
    check_format(path)
    if problem := file_problem(path):
        raise UserError(problem)
    remedy = "expected a table as `nnunet_csm embed` writes it: case, series, and features"
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path).astype({CASE: str})
        elif path.suffix == ".csv":
            table = pd.read_csv(path, dtype={CASE: str, SERIES: str}, na_filter=False).astype({CASE: str})
        else:
            with np.load(path, allow_pickle=False) as arrays:
                table = pd.DataFrame(arrays["features"]).assign(**{CASE: arrays[CASE].astype(str)})
        table = table.drop(columns=SERIES, errors="ignore").set_index(CASE).astype(np.float32)
    except Exception as error:  # whatever bytes that are no such file may lead to
        raise UserError(f"{path}: not readable as embeddings ({type(error).__name__}: {error}); {remedy}") from None
    twice = table.index[table.index.duplicated()]
    if len(twice) or table.empty or not np.isfinite(table.to_numpy()).all():
        found = f"{twice[0]} is there twice" if len(twice) else "there is nothing in it" if table.empty else "it holds NaN"
        raise UserError(f"{path}: {found}; {remedy}")
    return table
