"""A run of a study, a training and its tests; a row of the table; and all of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nnunet_csm import nnunet

PRETRAINER, SEGMENTER, CLASSIFIER = "nnUNetTrainerCSMPretrain", "nnUNetTrainerCSM", "nnUNetTrainerCSMClassifier"
YARDSTICK = "nnUNetTrainerCSMYardstick"
ALL = "all"


@dataclass(frozen=True)
class Evaluation:
    """Test cases, and the channels of each that the network is given."""

    name: str
    channels: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Run:
    """One training, and what its network is tested on.

    Attributes:
        id: unique in a study; also the name of its folder.
        needs: the pretraining it starts from, when that is the study's.
        encoder: the weights it starts from.
        tests: of classification those with a part of the series, as its trainer tests with all; none for pretraining, unless
            what it rebuilds is scored.
        num_crops: that it learns from.
        visible_tokens: of a crop, by the encoder, on average.
    """

    id: str
    kind: Literal["pretraining", "fine-tuning"]
    dataset: str
    configuration: str
    plans_name: str
    trainer: str
    fold: int
    needs: str | None
    encoder: Path | None
    tests: tuple[Evaluation, ...]
    num_crops: int
    visible_tokens: float

    @property
    def folder(self) -> Path:
        """Where nnU-Net's trainer writes."""
        name = f"{self.trainer}__{self.plans_name}__{self.configuration}"
        return nnunet.folder("nnUNet_results") / self.dataset / name / f"fold_{self.fold}"


@dataclass(frozen=True)
class Row:
    """What a run stands for in the table."""

    run: str
    arm: str
    labels: float
    num_labelled: int
    division: int
    repeat: int
    finetuned: str


@dataclass
class Runs:
    """Runs in an order in which they can be done, and rows. `search` runs only choose settings and are in no row."""

    runs: dict[str, Run] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    plans: dict[str, dict[str, Any]] = field(default_factory=dict)
    splits: dict[str, list[dict[str, list[str]]]] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    """What cannot be told before others are done: settings that are searched for, and times."""
    chosen: dict[tuple[str, float, int], dict[str, Any]] = field(default_factory=dict)
    """What was best, by arm, share of labels and division."""
