"""A classifier's predicted numbers: scores with intervals over patients, two trainings compared, and a picture.

Tables have a row a sample: case, mask_label, patient, value (the truth), predicted, and run where there are several networks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_csm.data.diagnoses import spread_text
from nnunet_csm.evaluation.bootstrap import CONFIDENCE, estimate_text, estimates_dict, estimates_markdown
from nnunet_csm.evaluation.classification import Comparison
from nnunet_csm.evaluation.number_metrics import NUM_RESAMPLES, TITLES, evaluate_numbers
from nnunet_csm.evaluation.repeats import joined, numbers_in, read_samples
from nnunet_csm.figures.numbers import save_numbers


@dataclass(frozen=True)
class NumberMetrics:
    """What predicted numbers are worth.

    Attributes:
        num_samples, num_patients: that were scored, and resampled.
        distribution: of the true numbers, in words.
        overall: rows value, low and high; a column a metric of `number_metrics.TITLES`. NaN is what is not defined.
    """

    num_samples: int
    num_patients: int
    distribution: str
    overall: pd.DataFrame

    @property
    def digits(self) -> str:
        """How metrics are written: those in the unit of the numbers may be of any size."""
        return ".4g"

    @property
    def counts(self) -> str:
        """Samples and patients in a line."""
        return f"{self.num_samples} samples of {self.num_patients} patients, values {self.distribution}"

    def table(self) -> pd.DataFrame:
        """A row a metric: metric, value, low, high."""
        return self.overall.T.rename_axis("metric").reset_index()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; NaN is None."""
        return {
            "num_samples": self.num_samples,
            "num_patients": self.num_patients,
            "num_resamples": NUM_RESAMPLES,
            "confidence": CONFIDENCE,
            "metrics": estimates_dict(self.overall),
        }

    def to_markdown(self) -> str:
        """Counts and the metrics as a Markdown table."""
        return f"{self.counts}\n\n{estimates_markdown({'value (95 % interval)': self.overall}, TITLES, self.digits)}"


def evaluate_table(table: pd.DataFrame) -> NumberMetrics:
    """All metrics, in 2,000 resamples of patients."""
    (found,) = _evaluated([table])
    return found


def compare_tables(first: pd.DataFrame, second: pd.DataFrame) -> Comparison[NumberMetrics]:
    """Predictions of the same samples in the same order, and their differences in the same resamples."""
    before, after, difference = _evaluated([first, second])
    return Comparison(before, after, difference.overall)


def _evaluated(tables: Sequence[pd.DataFrame]) -> list[NumberMetrics]:
    table = tables[0]
    values, patients = table["value"].to_numpy(np.float64), list(table["patient"])
    runs = list(table["run"]) if "run" in table else [0] * len(table)
    found = evaluate_numbers(values, [one["predicted"].to_numpy(np.float64) for one in tables], patients, runs)
    return [NumberMetrics(len(values), len(set(patients)), spread_text(values), one) for one in found]


def draw_table(path: Path, table: pd.DataFrame, title: str) -> None:
    """Write a scatter plot of truth over prediction, with the line that calibrates, and of the errors."""
    found = evaluate_table(table)
    overall = found.overall
    told = [f"{title} {estimate_text(overall[name], found.digits)}" for name, title in TITLES.items()]
    line = float(overall["slope"]["value"]), float(overall["intercept"]["value"])
    save_numbers(path, table["value"].to_numpy(np.float64), table["predicted"].to_numpy(np.float64), line, told, title)


def read_numbers(paths: Sequence[Path]) -> pd.DataFrame:
    """Read the `predictions.csv` of trainings on numbers, one a run, in their order; column run has its number.

    Raises:
        UserError: no such file, or not such a table.
    """
    tables = []
    for path in paths:
        table = read_samples(path, ("value", "predicted"))
        tables.append(table.assign(**{name: numbers_in(table, name, path) for name in ("value", "predicted")}))
    return joined(tables)
