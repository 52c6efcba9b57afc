"""A number, such as an age, a score or an ejection fraction."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_csm.data.diagnoses import spread_text
from nnunet_csm.evaluation.classification import Comparison
from nnunet_csm.evaluation.number_metrics import TITLES, measure
from nnunet_csm.evaluation.numbers import NumberMetrics, compare_tables, draw_table, evaluate_table, read_numbers
from nnunet_csm.heads.base import Head
from nnunet_csm.model.classifier import CSMClassifier
from nnunet_csm.plans import Classification


class StandardizedLoss(nn.Module):
    """Smooth L1 (Girshick 2015) of errors in deviations of the training targets: squared up to one deviation, linear beyond."""

    deviation: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.ones(1))

    def forward(self, outputs: Float[Tensor, "b 1"], targets: Float[Tensor, "b 1"]) -> Float[Tensor, " b"]:
        errors = (outputs - targets) / self.deviation
        return nn.functional.smooth_l1_loss(errors, torch.zeros_like(errors), reduction="none").sum(1)


class Numbers(Head):
    """One output, in the unit of the targets: the network multiplies by their deviation in training and adds their mean."""

    target = "value"
    in_units = True
    said_name = "values"
    loss_name = "smooth L1 of deviations"
    float_format = "%.9g"
    sides = ("raises the number", "lowers it")
    curves: ClassVar = {"Mean absolute error": {"mae": "MAE"}, "Agreement": {"r": "r", "r2": "R2"}}

    @property
    def num_outputs(self) -> int:
        return 1

    def told(self) -> str:
        return "numbers are predicted, in the unit of the column value"

    def known(self) -> str:
        return "numbers"

    def build_loss(self, settings: Classification) -> nn.Module:
        return StandardizedLoss()

    def fit(self, loss: nn.Module, network: CSMClassifier, targets: Float[Tensor, "m 1"], settings: Classification) -> None:
        """Standardise: mean and deviation go into the network, and with it into checkpoints."""
        assert network.units is not None and isinstance(loss, StandardizedLoss)
        network.units.fit(targets)
        loss.to(network.units.deviation.device).deviation.copy_(network.units.deviation)

    def weight(self, loss: nn.Module, targets: Float[Tensor, "b 1"]) -> Tensor:
        return torch.full((), float(len(targets)), device=targets.device)

    def score(self, targets: Float[np.ndarray, "n 1"], said: Float[np.ndarray, "n 1"]) -> dict[str, float]:
        values, predicted = (column[:, 0].astype(np.float64) for column in (targets, said))
        found = measure(values, predicted, np.ones((1, len(values))), [np.arange(len(values))])[0]
        return {name: value for name, value in zip(TITLES, found.tolist(), strict=True) if name in self.titles}

    def rank(self, scores: Mapping[str, float]) -> float:
        """By mean absolute error."""
        return -scores["mae"]

    def said(self, outputs: Float[Tensor, "b 1"]) -> Float[Tensor, "b 1"]:
        return outputs

    def explained(self, outputs: Float[Tensor, "b 1"], said: Float[np.ndarray, " 1"]) -> Float[Tensor, " b"]:
        """The number itself."""
        return outputs[:, 0]

    def truth(self, targets: Float[np.ndarray, "n 1"]) -> dict[str, Any]:
        return {"value": targets[:, 0]}

    def predicted(self, said: Float[np.ndarray, "n 1"]) -> dict[str, Any]:
        return {"predicted": said[:, 0]}

    def spread(self, by_fold: Float[np.ndarray, "f n 1"]) -> dict[str, Any]:
        """The standard deviation (f - 1) over folds."""
        return {"deviation_of_folds": by_fold[..., 0].std(0, ddof=1)} if len(by_fold) > 1 else {}

    def verdict(self, said: Float[np.ndarray, " 1"]) -> str:
        return f"{said[0]:.4g}"

    def summary(self, said: Float[np.ndarray, "n 1"]) -> str:
        return spread_text(said[:, 0])

    def described(self) -> dict[str, Any]:
        return {"values": "numbers in the unit of the training targets"}

    @classmethod
    def read(cls, paths: Sequence[Path]) -> pd.DataFrame:
        return read_numbers(paths)

    @classmethod
    def evaluate(cls, table: pd.DataFrame) -> NumberMetrics:
        return evaluate_table(table)

    @classmethod
    def compare(cls, first: pd.DataFrame, second: pd.DataFrame) -> Comparison[NumberMetrics]:
        return compare_tables(first, second)

    @classmethod
    def draw(cls, path: Path, table: pd.DataFrame, title: str) -> None:
        draw_table(path, table, title)
