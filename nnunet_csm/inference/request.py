"""What names a trained model on the command line, as in nnU-Net."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError

# nnU-Net's default
ALL_FOLDS = ("0", "1", "2", "3", "4")


@dataclass(frozen=True)
class ModelRequest:
    """A trained model, and where it is to run.

    Attributes:
        dataset: name or ID; with trainer, plans and configuration, it names the folder of the model.
        folds: whose predictions are averaged; none: see `of_trained_folds`.
        device: cuda, cpu or mps.
    """

    dataset: str
    trainer: str
    plans: str
    configuration: str
    folds: tuple[str, ...]
    checkpoint_name: str
    device: str

    @property
    def model(self) -> Path:
        """The folder of the model.

        Raises:
            UserError: no such dataset, or nnUNet_results is not set.
        """
        name = nnunet.dataset_name(self.dataset)
        return nnunet.folder("nnUNet_results") / name / f"{self.trainer}__{self.plans}__{self.configuration}"

    def of_trained_folds(self) -> Self:
        """This request where it names folds, else for all numbered folds that have the checkpoint, or for fold all alone."""
        if self.folds:
            return self
        found = [path.parent.name.removeprefix("fold_") for path in self.model.glob(f"fold_*/{self.checkpoint_name}")]
        folds = tuple(sorted(fold for fold in found if fold.isdigit())) or tuple(found) or ALL_FOLDS
        if found:
            print(f"Folds {', '.join(folds)}: those that are trained; -f chooses others")
        return replace(self, folds=folds)

    def of_one_fold(self, why: str) -> Path:
        """The one checkpoint that is asked for.

        Raises:
            UserError: it names several folds, or several are trained; `why` says what is wrong with that.
        """
        folds = self.of_trained_folds().folds
        if len(folds) > 1:
            raise UserError(f"{self.model}: folds {', '.join(folds)}; {why}, choose one fold with -f")
        return self.model / f"fold_{folds[0]}" / self.checkpoint_name

    @staticmethod
    def check_output(*files: Path, overwrite: bool) -> None:
        """Say before the work that files cannot be written.

        Raises:
            UserError: one is there, without `overwrite`, or its folder may not be written to.
        """
        for path in files:
            if path.exists() and not overwrite:
                raise UserError(f"{path} exists and is kept; give --overwrite to replace it, or another name")
            folder = next(folder for folder in path.absolute().parents if folder.exists())
            if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
                wrong = path if path.is_dir() else folder
                raise UserError(f"{path} cannot be written because of {wrong}; give -o a file in a folder you may write to")

    def torch_device(self) -> torch.device:
        """The device asked for.

        Raises:
            UserError: this machine has none.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("no CUDA device found; use the CPU with -device cpu, or check the driver with nvidia-smi")
        if self.device == "mps" and not torch.backends.mps.is_available():
            raise UserError("no Apple GPU (mps) found; use the CPU with -device cpu")
        return torch.device(self.device)
