"""`nnUNetTrainerCSMYardstick`: stock nnU-Net for a given time, as the yardstick from outside.

Network, loss, augmentation, optimiser and the shape of the learning rate's fall are nnU-Net's; what is ours is when it ends.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_csm import nnunet
from nnunet_csm.data.draws import seed_everything
from nnunet_csm.data.sources import split
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.files import whole
from nnunet_csm.host_files import check_network
from nnunet_csm.machine import keep_freed_memory, num_threads
from nnunet_csm.plans import SPLITS, configuration_of
from nnunet_csm.schema import JsonName, Positive, Seed, from_dict
from nnunet_csm.training.trainer import CUDA

# an epoch takes at most the tenth part of the time
NUM_EPOCHS = 10
# more than time allows
MAX_EPOCHS = 10**6
SECONDS = "seconds_used"
SECONDS_FILE = "seconds.json"


@dataclass(frozen=True)
class Yardstick:
    """The plans' key `csm_yardstick`: how long stock nnU-Net trains, and on which folds.

    `splits` is the name of a file in the preprocessed dataset folder, as `splits_final.json`; `seed` draws the initial weights.
    """

    minutes: Positive
    splits: JsonName
    seed: Seed = 0


def read_yardstick(plans: Mapping[str, Any], source: str) -> Yardstick:
    """The key `csm_yardstick` at the top of nnU-Net plans; `source` is the path that errors name.

    Raises:
        UserError: no such key, an unknown or missing key in it, or a value that cannot be.
    """
    if "csm_yardstick" not in plans:
        raise UserError(
            f'{source} has no key csm_yardstick; add "csm_yardstick": {{"minutes": 60, "splits": "{SPLITS}"}} beside plans_name'
        )
    return from_dict(Yardstick, plans["csm_yardstick"], f"{source}: csm_yardstick")


class TimeIsUp(Exception):  # noqa: N818, no error
    """Ends nnU-Net's loop over epochs, which knows only their number."""


class PolyInTime(PolyLRScheduler):
    """nnU-Net's polynomial decay, in the share of the time that is used instead of epochs."""

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, seconds: float, seconds_used: Callable[[], float]):
        self.seconds, self.seconds_used = seconds, seconds_used
        super().__init__(optimizer, initial_lr, seconds)

    def step(self, current_step: float | None = None) -> None:
        """Set the rate of this moment, whatever epoch it is."""
        super().step(min(self.seconds_used(), self.seconds))


def epoch_length(stock: int, seconds: float, seconds_left: float, pace: float | None) -> int:
    """Training iterations of the coming epoch.

    Args:
        stock: nnU-Net's number, which is not exceeded.
        seconds: the whole time.
        seconds_left: of it.
        pace: seconds of an iteration, with its share of the validation; None when not known yet: then one is tried.

    Returns:
        As many as fit into the tenth part of the time and into what is left of it; at least one.
    """
    if pace is None:
        return 1
    return max(1, min(stock, math.floor(min(seconds / NUM_EPOCHS, seconds_left) / pace)))


class nnUNetTrainerCSMYardstick(nnUNetTrainer):  # noqa: N801, nnU-Net's trainers are named so
    """Train for `csm_yardstick.minutes` of the plans on a fold of the file `csm_yardstick.splits`, then validate.

    The time is that of epochs (training and the validation within them), also those before a kill, without set-up, checkpoints
    and the final validation. The first epoch has one iteration, which compiles the network where nnU-Net does so; later ones
    nnU-Net's number, or as many as the tenth part of the time holds at the pace of the epoch before.
    """

    num_iterations_per_epoch: int
    num_val_iterations_per_epoch: int

    def __init__(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA) -> None:
        with exit_on_user_error():
            source = nnunet.path_of_plans(plans)
            # before nnU-Net makes a folder
            self.yardstick = read_yardstick(plans, source)
            network = configuration_of(plans, configuration, source).get("architecture")
            if network is not None:  # plans of early nnU-Net have none, and may only mean two networks of its library
                check_network(network, f"{source}: configurations.{configuration}.architecture")
            self.seconds = 60 * self.yardstick.minutes
        if device.type == "cpu":
            # as the other arms; nnU-Net takes all cores, whatever it was told
            torch.set_num_threads(num_threads(1))
            keep_freed_memory()
        super().__init__(plans, configuration, fold, dataset_json, device)
        with exit_on_user_error():
            if self.is_ddp:
                raise UserError(
                    "the yardstick's epochs are as long as time allows, on which ranks do not agree; train on one GPU"
                )
        self.stock_lengths = self.num_iterations_per_epoch, self.num_val_iterations_per_epoch
        self.num_epochs, self.save_every = MAX_EPOCHS, 1
        self.pace: float | None = None
        # of finished epochs; it travels with the checkpoint
        self.logger.local_logger.my_fantastic_logging[SECONDS] = []
        self.epoch_begun: float | None = None

    def initialize(self) -> None:
        seed_everything(self.yardstick.seed)
        super().initialize()

    def seconds_used(self) -> float:
        """Time used by epochs that are over and the one that runs."""
        over = sum(self.logger.get_value(SECONDS, step=None))
        return over + (time.monotonic() - self.epoch_begun if self.epoch_begun is not None else 0.0)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer, _ = super().configure_optimizers()
        return optimizer, PolyInTime(optimizer, self.initial_lr, self.seconds, self.seconds_used)

    def do_split(self) -> tuple[list[str], list[str]]:
        if self.fold == "all":
            return super().do_split()
        folder = Path(self.preprocessed_dataset_folder_base)
        cases = infer_dataset_class(self.preprocessed_dataset_folder).get_identifiers(self.preprocessed_dataset_folder)
        with exit_on_user_error():
            training, validation = split(folder, cases, int(self.fold), self.yardstick.splits)
        self.print_to_log_file(
            f"Fold {self.fold} of {self.yardstick.splits}: {len(training)} training and {len(validation)} validation cases"
        )
        return training, validation

    def run_training(self) -> None:
        try:
            super().run_training()
        except TimeIsUp:
            self.on_train_end()

    def on_train_end(self) -> None:
        super().on_train_end()
        nnunet.save_json({"seconds": self.seconds_used()}, Path(self.output_folder) / SECONDS_FILE)

    def on_epoch_start(self) -> None:
        left = self.seconds - self.seconds_used()
        if self.current_epoch > 0 and left <= (self.pace or 0.0) / 2:
            self.print_to_log_file(f"{self.seconds_used() / 60:.2f} of {self.yardstick.minutes:g} minutes are used")
            raise TimeIsUp
        stock_training, stock_validation = self.stock_lengths
        num = epoch_length(stock_training, self.seconds, left, self.pace)
        self.num_iterations_per_epoch = num
        self.num_val_iterations_per_epoch = max(1, round(num * stock_validation / stock_training))
        super().on_epoch_start()
        self.epoch_begun = time.monotonic()

    def train_step(self, batch: dict) -> dict:
        self.lr_scheduler.step()
        return super().train_step(batch)

    def on_epoch_end(self) -> None:
        used = time.monotonic() - self.epoch_begun if self.epoch_begun is not None else 0.0
        self.epoch_begun = None
        self.pace = used / self.num_iterations_per_epoch
        # before nnU-Net saves a checkpoint
        self.logger.log(SECONDS, used, self.current_epoch)
        super().on_epoch_end()

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, whole or not at all."""
        if self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        with whole(filename) as temporary:
            super().save_checkpoint(str(temporary))
