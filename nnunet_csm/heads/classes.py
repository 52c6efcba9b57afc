"""Classes, as probabilities."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_csm.data.diagnoses import told_order
from nnunet_csm.evaluation.class_curves import draw_classification
from nnunet_csm.evaluation.classification import Comparison, Metrics, compare, evaluate
from nnunet_csm.evaluation.repeats import PROBABILITY, classes_of, labels_and_probabilities, read_runs
from nnunet_csm.heads.base import Head
from nnunet_csm.model.attribution import log_odds
from nnunet_csm.model.classifier import CSMClassifier
from nnunet_csm.plans import Classification


class Classes(Head):
    """Logits of classes; targets are their indices."""

    target = "class"
    said_name = "probabilities"
    loss_name = "cross-entropy"
    float_format = "%.6f"
    sides = ("for the class", "against it")
    curves: ClassVar = {
        "Validation": {"auc": "AUC", "average_precision": "average precision", "balanced_accuracy": "balanced accuracy"}
    }

    @property
    def num_outputs(self) -> int:
        return len(self.classes)

    def told(self) -> str:
        return told_order(self.classes)

    def known(self) -> str:
        return f"the classes {', '.join(self.classes)}"

    def build_loss(self, settings: Classification) -> nn.Module:
        return nn.CrossEntropyLoss(label_smoothing=settings.label_smoothing, reduction="none")

    def fit(self, loss: nn.Module, network: CSMClassifier, targets: Int[Tensor, " m"], settings: Classification) -> None:
        """Weigh classes by how rare they are."""
        if settings.class_weights:
            counts = torch.bincount(targets, minlength=self.num_outputs)
            loss.weight = (len(targets) / (len(counts) * counts)).to(next(network.parameters()).device)

    def weight(self, loss: nn.Module, targets: Int[Tensor, " b"]) -> Tensor:
        if isinstance(loss.weight, Tensor):
            return loss.weight[targets].sum()
        # filled there: copied from here it would wait for the GPU
        return torch.full((), float(len(targets)), device=targets.device)

    def score(self, targets: Int[np.ndarray, " n"], said: Float[np.ndarray, "n c"]) -> dict[str, float]:
        metrics = evaluate(targets, said, self.classes, num_resamples=0).overall
        return {name: metrics[name].value for name in self.titles}

    def rank(self, scores: Mapping[str, float]) -> float:
        """By AUC; where it is not defined, as if all were worse."""
        return float(np.nan_to_num(scores["auc"]))

    def said(self, outputs: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        return outputs.softmax(1)

    def explained(self, outputs: Float[Tensor, "b c"], said: Float[np.ndarray, " c"]) -> Float[Tensor, " b"]:
        """Log odds of the most probable class."""
        return log_odds(outputs, int(said.argmax()))

    def truth(self, targets: Int[np.ndarray, " n"]) -> dict[str, Any]:
        return {"class": [self.classes[index] for index in targets]}

    def predicted(self, said: Float[np.ndarray, "n c"]) -> dict[str, Any]:
        """A probability for every class, and the most probable one."""
        probabilities = {f"{PROBABILITY}{name}": said[:, index] for index, name in enumerate(self.classes)}
        return {**probabilities, "predicted": [self.classes[index] for index in said.argmax(1)]}

    def spread(self, by_fold: Float[np.ndarray, "f n c"]) -> dict[str, Any]:
        return {}

    def verdict(self, said: Float[np.ndarray, " c"]) -> str:
        return f"{self.classes[said.argmax()]}, probability {said.max():.2f}"

    def summary(self, said: Float[np.ndarray, "n c"]) -> str:
        counts = np.bincount(said.argmax(1), minlength=self.num_outputs)
        return ", ".join(f"{count} {name}" for count, name in zip(counts, self.classes, strict=True))

    def described(self) -> dict[str, Any]:
        return {"probabilities": "softmax", "classes": list(self.classes)}

    @classmethod
    def read(cls, paths: Sequence[Path]) -> pd.DataFrame:
        return read_runs(paths)

    @classmethod
    def evaluate(cls, table: pd.DataFrame) -> Metrics:
        return evaluate(*labels_and_probabilities(table), **_samples(table))

    @classmethod
    def compare(cls, first: pd.DataFrame, second: pd.DataFrame) -> Comparison[Metrics]:
        labels, before = labels_and_probabilities(first)
        return compare(labels, before, labels_and_probabilities(second)[1], **_samples(second))

    @classmethod
    def draw(cls, path: Path, table: pd.DataFrame, title: str) -> None:
        draw_classification(path, *labels_and_probabilities(table), classes_of(table), list(table["patient"]), title)


def _samples(table: pd.DataFrame) -> dict[str, Any]:
    """What `evaluate` wants to know of samples beside what is said of them."""
    return {
        "classes": classes_of(table),
        "patients": list(table["patient"]),
        "runs": list(table["run"]) if "run" in table else None,
    }
