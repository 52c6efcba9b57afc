"""Scores of segmentations as tables: a summary by structure, Dice by case, and the files that hold them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from nnunet_csm.evaluation.regions import Structure, short_name
from nnunet_csm.files import write_text

METRICS = ("dice", "sensitivity", "precision", "reference_ml", "predicted_ml")


@dataclass(frozen=True)
class Scores:
    """The scores of a folder.

    `table` has one row a case and structure: case, structure, kind ("label" or "region"), dice, sensitivity, precision, and
    reference_ml and predicted_ml in millilitres. Dice is NaN where reference and prediction are both empty, sensitivity where the
    reference is, precision where the prediction is. `not_scored` names predictions without a reference,
    `not_predicted` references without a prediction that were left out, `brought` says of predictions how they came to their
    reference's grid, where that was not as they were stored.
    """

    table: pd.DataFrame
    structures: tuple[Structure, ...]
    not_scored: tuple[str, ...] = ()
    not_predicted: tuple[str, ...] = ()
    brought: Mapping[str, str] = field(default_factory=dict)

    @property
    def dice(self) -> pd.DataFrame:
        """A row a case, a column a structure."""
        names = [structure.name for structure in self.structures]
        return self.table.pivot(index="case", columns="structure", values="dice").reindex(
            self.table["case"].unique(), columns=names
        )

    @property
    def foreground_mean(self) -> float:
        """nnU-Net's foreground_mean: mean over the labels (regions, of a region-based dataset) of the mean Dice over cases.

        As in nnU-Net, it is NaN when one of them is empty in every case.
        """
        averaged = [structure.name for structure in self.structures if structure.in_foreground_mean]
        return float(self.dice[averaged].mean().mean(skipna=False))

    def summary(self) -> pd.DataFrame:
        """Statistics of Dice, a row per structure: kind, labels, mean, median, sd (n - 1), min, n; last, the foreground mean.

        n counts the cases in which Dice is defined. The last row's n is the number of all cases.
        """
        table = self.dice.agg(["mean", "median", "std", "min", "count"]).T.rename(columns={"std": "sd", "count": "n"})
        table.insert(0, "kind", [structure.kind for structure in self.structures])
        table.insert(1, "labels", [structure.labels_text for structure in self.structures])
        averaged = [structure for structure in self.structures if structure.in_foreground_mean]
        labels = ", ".join(structure.labels_text for structure in averaged)
        means = [self.foreground_mean, np.nan, np.nan, np.nan, len(self.dice)]
        table.loc["foreground mean"] = [f"mean of {averaged[0].kind}s", labels, *means]
        return table.astype({"n": int}).rename_axis("structure")

    def to_markdown(self) -> str:
        """Summary and Dice by case as Markdown tables with aligned columns, for a terminal as much as for a page."""
        dice = self.dice.rename(columns=short_name)
        number = len(dice)
        parts = [
            f"Dice of {number} case{'s' if number != 1 else ''}; "
            "a case without the structure in reference and prediction is left out (n)",
            markdown(self.summary().drop(columns="kind"), num_text=2),
            "Dice by case",
            markdown(dice, num_text=1),
        ]
        if self.not_scored:
            parts.append("Not scored, no reference: " + ", ".join(self.not_scored))
        if self.not_predicted:
            number = len(self.not_predicted) + len(dice)
            parts.append(f"Left out: {len(self.not_predicted)} of {number} references, which have no prediction")
        if self.brought:
            parts.append("Predictions brought to their reference's grid: " + "; ".join(map(": ".join, self.brought.items())))
        return "\n\n".join(parts) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write evaluation.csv (a row a case and structure), evaluation.md and evaluation.json; NaN is null in JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        summary = _without_nan(self.summary())
        summary["labels"] = [list(structure.labels) for structure in self.structures] + [[]]
        *structures, foreground_mean = summary.to_dict("index").items()
        by_case = _without_nan(self.table.set_index("structure")).groupby("case", sort=False)
        content = {
            "foreground_mean": foreground_mean[1]["mean"],
            "dice": dict(structures),
            "cases": {case: rows[list(METRICS)].to_dict("index") for case, rows in by_case},
            "not_scored": list(self.not_scored),
            "not_predicted": list(self.not_predicted),
            "brought": dict(self.brought),
        }
        write_text(folder / "evaluation.csv", self.table.to_csv(index=False))
        write_text(folder / "evaluation.md", self.to_markdown())
        write_text(folder / "evaluation.json", json.dumps(content, indent=2, allow_nan=False) + "\n")


def _without_nan(table: pd.DataFrame) -> pd.DataFrame:
    """JSON has no NaN."""
    return table.astype(object).where(table.notna(), None)


def markdown(table: pd.DataFrame, num_text: int) -> str:
    """The first `num_text` columns, counted from the index on, are names, which may look like numbers."""
    sides = ["left"] * num_text + ["right"] * (table.shape[1] + 1 - num_text)
    return _without_nan(table).to_markdown(floatfmt=".4f", missingval="-", disable_numparse=range(num_text), colalign=sides)
