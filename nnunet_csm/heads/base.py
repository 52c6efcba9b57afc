"""What a classifier's outputs are: the contract, and which there are.

Everything else of classification (patches, encoder, pooling, schedule, folds, ensembles, maps, commands) knows none by name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from nnunet_csm.data.diagnoses import ClassTable
from nnunet_csm.evaluation.classification import Comparison
from nnunet_csm.model.classifier import CSMClassifier
from nnunet_csm.plans import Classification

# `ClassTable.target` to its class, imported when it is asked for
HEADS = {
    "class": "nnunet_csm.heads.classes.Classes",
    "value": "nnunet_csm.heads.numbers.Numbers",
}


class Scores(Protocol):
    """What predictions are worth, with intervals."""

    def to_markdown(self) -> str: ...

    def table(self) -> pd.DataFrame: ...

    def to_dict(self) -> dict[str, Any]: ...


class Head(ABC):
    """What is learned of samples, from the targets in `classification.csv` to scores and pictures.

    What the outputs (b, c) of a network say of samples is "said": probabilities, numbers; means over flips and folds are taken
    of it. Tables are those of `predictions.csv`: case, mask_label, patient, the columns of `truth`, those of `predicted`, and,
    of several networks, run.

    Args:
        classes: names in the order of their indices, for a head that has some.

    Attributes:
        target: its name in `HEADS`.
        in_units: outputs have the unit of the targets, see `model.classifier.Units`.
        said_name: what is said, as the record of `classify` calls it.
        loss_name: below the curve of the loss.
        float_format: of what `classify` writes.
        sides: what a map shows, above 0 and below.
        curves: title of a panel of progress.png to metrics, as `score` names them, and their titles.
    """

    target: ClassVar[str]
    in_units: ClassVar[bool] = False
    said_name: ClassVar[str]
    loss_name: ClassVar[str]
    float_format: ClassVar[str]
    sides: ClassVar[tuple[str, str]]
    curves: ClassVar[Mapping[str, Mapping[str, str]]]

    def __init__(self, classes: Sequence[str] = ()) -> None:
        self.classes = tuple(classes)

    @property
    def titles(self) -> dict[str, str]:
        """Metrics that are logged after every epoch."""
        return {name: title for panel in self.curves.values() for name, title in panel.items()}

    # --- training ------------------------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def num_outputs(self) -> int:
        """Outputs of the network."""

    @abstractmethod
    def told(self) -> str:
        """What is predicted, in a line for the user."""

    @abstractmethod
    def known(self) -> str:
        """What a network has learned, in a few words for an error."""

    @abstractmethod
    def build_loss(self, settings: Classification) -> nn.Module:
        """What gives, of outputs (b, c) and targets (b, ...), the loss of each sample (b,)."""

    @abstractmethod
    def fit(self, loss: nn.Module, network: CSMClassifier, targets: Shaped[Tensor, "m ..."], settings: Classification) -> None:
        """Give loss and network what they are to know of the targets of all samples that train."""

    @abstractmethod
    def weight(self, loss: nn.Module, targets: Shaped[Tensor, "b ..."]) -> Tensor:
        """What the summed loss of some samples is to be divided by; nothing here waits for a GPU."""

    @abstractmethod
    def score(self, targets: Shaped[np.ndarray, "n ..."], said: Float[np.ndarray, "n c"]) -> dict[str, float]:
        """The metrics of `curves`; NaN where one is not defined."""

    @abstractmethod
    def rank(self, scores: Mapping[str, float]) -> float:
        """How good a checkpoint is with these scores; the highest is kept, of equal ones that with the lowest loss."""

    # --- what is written -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def said(self, outputs: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        """What outputs say."""

    @abstractmethod
    def explained(self, outputs: Float[Tensor, "b c"], said: Float[np.ndarray, " c"]) -> Float[Tensor, " b"]:
        """The score whose parts a map shows, where `said` is what was said of the sample."""

    @abstractmethod
    def truth(self, targets: Shaped[np.ndarray, "n ..."]) -> dict[str, Any]:
        """Columns of a table."""

    @abstractmethod
    def predicted(self, said: Float[np.ndarray, "n c"]) -> dict[str, Any]:
        """Columns of a table."""

    @abstractmethod
    def spread(self, by_fold: Float[np.ndarray, "f n c"]) -> dict[str, Any]:
        """Columns that tell how far several networks are apart; none where there are none."""

    @abstractmethod
    def verdict(self, said: Float[np.ndarray, " c"]) -> str:
        """What is said of a sample, in words."""

    @abstractmethod
    def summary(self, said: Float[np.ndarray, "n c"]) -> str:
        """What is said of several samples, in words."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """What the outputs are, for whoever runs an exported network."""

    # --- scores --------------------------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def read(cls, paths: Sequence[Path]) -> pd.DataFrame:
        """Read the `predictions.csv` of trainings, one a run.

        Raises:
            UserError: no such file, or not such a table, or they are not of one task.
        """

    @classmethod
    @abstractmethod
    def evaluate(cls, table: pd.DataFrame) -> Scores:
        """All metrics, with intervals over patients."""

    @classmethod
    @abstractmethod
    def compare(cls, first: pd.DataFrame, second: pd.DataFrame) -> Comparison[Any]:
        """Both, and second - first, where both say something of the same samples in the same order."""

    @classmethod
    @abstractmethod
    def draw(cls, path: Path, table: pd.DataFrame, title: str) -> None:
        """One PNG of how good predictions are."""


def head_class(target: str) -> type[Head]:
    """The class of a target."""
    module, _, name = HEADS[target].rpartition(".")
    found: type[Head] = getattr(import_module(module), name)
    return found


def head_of(table: ClassTable) -> Head:
    """What is learned from a class table."""
    return head_class(table.target)(table.classes)


def head_in(saved: Mapping[str, Any]) -> Head:
    """What the network of a classifier's checkpoint has learned; those before there were numbers have learned classes."""
    return head_class(saved.get("target", "class"))(saved["classes"])
