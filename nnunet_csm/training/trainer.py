"""What all trainers need of their host, nnU-Net's trainer: settings from the plans, keyed draws, checkpoints, progress."""

import math
import os
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.draws import Purpose, key, seed_everything
from nnunet_csm.data.stored import damage_named
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.files import alone
from nnunet_csm.host_files import check_dataset_json
from nnunet_csm.machine import (
    ACCUMULATE_VARIABLE,
    accumulation,
    check_compiler_cache,
    keep_freed_memory,
    num_threads,
    slices,
    why_not_compiled,
)
from nnunet_csm.model.compilation import compile_parts
from nnunet_csm.model.encoder import Encoder, check_encoder
from nnunet_csm.plans import Recipe, Schedule, read_configuration
from nnunet_csm.pretext.base import setup_of
from nnunet_csm.pretext.cost import check_device
from nnunet_csm.processes import stoppable
from nnunet_csm.training.averaging import WeightAverage
from nnunet_csm.training.earlier import EarlierRun
from nnunet_csm.training.optimization import build_optimizer, build_scheduler, clipped_step
from nnunet_csm.training.progress import Progress
from nnunet_csm.training.ranks import lost_rank_explained, running

CUDA = torch.device("cuda")
# what a killed run loses at most, and how often a large network is written
SECONDS_BETWEEN_CHECKPOINTS = 60.0
SECONDS_BETWEEN_PICTURES = 60.0


class CSMTrainer(nnUNetTrainer):
    """A trainer that follows the `csm` block of its plans; its draws are functions of (seed, epoch, step, place in the batch)."""

    encoder_source: str = "-pretrained_weights"
    # parts of the plans that the run rests on: it does not go on when they changed
    rests_on: frozenset[str] = frozenset()
    # whether the network draws while it learns (drop path)
    network_draws = True
    max_gradient_norm = 1.0
    # share of the iterations in which a pretrained encoder does not learn; None: no average of the weights is kept
    frozen_share = 0.0
    network: Any
    average: WeightAverage | None = None

    def __init__(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA) -> None:
        with exit_on_user_error():
            # before nnU-Net makes a folder
            source = nnunet.path_of_plans(plans)
            check_dataset_json(dataset_json, "dataset.json")
            self.settings = read_configuration(plans, configuration, source)
            check_encoder(self.settings, source)
            self.schedule = self.choose_schedule(self.settings.csm)
            self.ranks = running()
            self.samples = self.ranks.samples_of(self.schedule.batch_size)
            self.num_parts = accumulation(len(self.samples))
            check_device(device, self.settings, self.schedule, len(dataset_json["labels"]))
            if device.type == "cuda" and os.environ.get("nnUNet_compile", "t").lower() in ("true", "1", "t"):
                check_compiler_cache()
        if device.type == "cpu":
            # nnU-Net takes all cores for every process, whatever it was told
            torch.set_num_threads(num_threads(self.ranks.num_local))
            keep_freed_memory()
        super().__init__(plans, configuration, fold, dataset_json, device)
        # nnU-Net takes the rank for the number of a GPU and wraps the network in place, where prediction and checkpoints want
        # it bare. It sees one process, unless a step of its own is to be shared
        self.device, self.is_ddp = self.ranks.device(device), False
        self.grad_scaler = None  # bf16 needs none
        self.num_epochs = self.schedule.num_epochs
        self.num_iterations_per_epoch = self.schedule.iterations_per_epoch
        self.num_val_iterations_per_epoch = self.schedule.val_iterations_per_epoch
        self.initial_lr, self.weight_decay = self.schedule.learning_rate, self.schedule.weight_decay
        self.enable_deep_supervision = False
        self.save_every = 1
        self.iteration = 0
        # by file name, when a checkpoint was last written
        self.written: dict[str, float] = {}
        self.last_picture = 0.0
        # the run whose place this one takes with its first checkpoint
        self.replaced: EarlierRun | None = None

    @staticmethod
    @abstractmethod
    def choose_schedule(csm: Recipe) -> Schedule:
        """The schedule this trainer follows."""

    @property
    def bare_network(self) -> Any:
        """The network without the wrapper of torch.compile."""
        return self.network._orig_mod if isinstance(self.network, OptimizedModule) else self.network

    def _do_i_compile(self) -> bool:
        """nnU-Net compiles a network whole; `initialize` does so part by part."""
        return False

    @cached_property
    def compiles(self) -> bool:
        """Whether parts of the network and of the loss are compiled; where a GPU is not helped so, the log says why."""
        why_not = why_not_compiled(self.device.type)
        if why_not and self.device.type == "cuda":
            self.print_to_log_file(f"Not compiled: {why_not}")
        return not why_not

    @property
    def encoder(self) -> Encoder:
        found: Encoder = self.bare_network.encoder
        return found

    def first_layer(self) -> Tensor:
        """Weights of the encoder that meet the voxels, as they are now."""
        return next(self.encoder.parameters()).detach().cpu().clone()

    def key(self, purpose: Purpose, *numbers: int) -> int:
        return key(self.settings.csm.seed, purpose, *numbers)

    @contextmanager
    def shared_by_nnunet(self) -> Iterator[None]:
        """nnU-Net sees all ranks, and shares the work or gathers what each has."""
        self.is_ddp = self.ranks.num_ranks > 1
        try:
            yield
        finally:
            self.is_ddp = False

    def initialize(self) -> None:
        seed_everything(self.key(Purpose.NETWORK))
        super().initialize()
        self.batch_size = len(self.samples)
        if self.compiles:
            compile_parts(self.bare_network)
        self.untrained_embedding = self.first_layer()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = build_optimizer(self.bare_network, self.encoder, self.schedule)
        return optimizer, build_scheduler(optimizer, self.schedule)

    def only_one(self) -> AbstractContextManager[None]:
        """Keep other trainings out of the folder, in the final validation as well; rank 0 does, which writes."""
        return alone(self.output_folder, "training") if self.ranks.rank == 0 else nullcontext()

    def run_training(self) -> None:
        advice = "go on from the latest checkpoint with --c"
        damage = damage_named(Path(self.preprocessed_dataset_folder))
        with stoppable(advice), exit_on_user_error(), lost_rank_explained(self.ranks), damage, self.only_one():
            if self.current_epoch > 0:
                EarlierRun(Path(self.output_folder)).refuse_to_continue()
            super().run_training()

    def on_train_start(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self.print_to_log_file(f"{self.schedule.num_iterations:,} steps in all; what they need is read and prepared first")
        if self.current_epoch == 0:
            with exit_on_user_error():
                self.on_fresh_start()
            if self.average is not None:
                self.average.start()
        fresh = self.current_epoch == 0 and not self.disable_checkpointing and self.ranks.rank == 0
        self.replaced = EarlierRun(Path(self.output_folder)) if fresh else None
        with self.replaced.kept() if self.replaced else nullcontext():
            super().on_train_start()
        # parameters are frozen by now, if any
        self.learning_network = self.ranks.shared(self.network, self.device)
        self.ranks.wait()
        self.progress = Progress(self.num_epochs, self.num_iterations_per_epoch, self.schedule.batch_size, self.ranks.rank == 0)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""

    def plot_network_architecture(self) -> None:
        """nnU-Net draws with hiddenlayer, which is no longer to be had, and complains at every start."""

    def on_fresh_start(self) -> None:
        """What a run does before its first step and a resumed run does not."""

    def on_train_epoch_start(self) -> None:
        self.iteration = self.current_epoch * self.num_iterations_per_epoch
        self.lr_scheduler.step_update(self.iteration)
        super().on_train_epoch_start()
        self.progress.start_epoch(self.current_epoch)

    def train_step(self, batch: Any) -> dict:
        """Learn from this rank's share of a batch, in parts when memory asks for it.

        The loss of a batch is its summed loss over its weight, each over all ranks and parts, whatever their sizes.
        """
        self.before_step()
        try:
            loss = self.learn(batch)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"no GPU memory for a step: {str(error).splitlines()[0]} Learn a batch in parts ({ACCUMULATE_VARIABLE}=2), keep "
                f"the images of a pretraining elsewhere (nnUNet_csm_bank=mapped), or plan with a smaller -gpu_memory_target"
            ) from None
        # as if this rank's samples were all
        self.progress.step(loss * self.ranks.num_ranks)
        return {"loss": loss}

    def before_step(self) -> None:
        """Set the learning rate of the coming iteration and key what the network draws (drop path)."""
        if self.network_draws:
            seed_everything(self.key(Purpose.NETWORK, self.current_epoch, self.iteration, self.ranks.rank))
        self.iteration += 1
        self.lr_scheduler.step_update(self.iteration)

    def learn(self, batch: Any) -> Tensor:
        """One step of the optimiser.

        Returns:
            This rank's part of the loss, on the device; nothing here waits for it.
        """
        batch = self.on_device(batch)
        self.optimizer.zero_grad(set_to_none=True)
        weight = self.ranks.sum(self.weight(batch)).clamp(min=1)
        parts = self.parts(batch)
        loss = torch.zeros((), device=self.device)
        for number, part in enumerate(parts, start=1):
            with self.exchange_gradients(number == len(parts)):
                part_loss = self.summed_loss(part) / weight
                # the exchange takes means over ranks
                (part_loss * self.ranks.num_ranks).backward()
            loss += part_loss.detach()
        if self.encoder_is_frozen:
            # the optimiser passes over what has no gradient: no step, no weight decay, no moments. With requires_grad, ranks
            # would have to be joined anew when the encoder begins to learn; with a learning rate of 0, its gradient would count
            # where gradients are clipped
            for parameter in self.encoder.parameters():
                parameter.grad = None
        clipped_step(self.optimizer, self.max_gradient_norm)
        if self.average is not None:
            self.average.update(self.iteration)
        return loss

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether the encoder does not learn in the iteration that runs now, counted from 1.

        There is nothing to keep in an encoder that starts from scratch.
        """
        if self.frozen_share == 0.0 or self.encoder_source == "scratch":
            return False
        return self.iteration <= round(self.frozen_share * self.schedule.num_iterations)

    @contextmanager
    def exchange_gradients(self, now: bool) -> Iterator[None]:
        """Exchange accumulated gradients only once."""
        if now or not isinstance(self.learning_network, DistributedDataParallel):
            yield
        else:
            with self.learning_network.no_sync():
                yield

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def parts(self, batch: Any) -> list[Any]:
        """The batch in `num_parts` parts."""
        return (
            [batch] if self.num_parts == 1 else [self.part(batch, samples) for samples in slices(self.batch_size, self.num_parts)]
        )

    @abstractmethod
    def on_device(self, batch: Any) -> Any:
        """The batch, moved without waiting."""

    @abstractmethod
    def part(self, batch: Any, samples: slice) -> Any:
        """Some samples of a batch."""

    @abstractmethod
    def weight(self, batch: Any) -> Tensor:
        """What the summed loss of this rank's share is to be divided by."""

    @abstractmethod
    def summed_loss(self, batch: Any) -> Tensor:
        """The loss of a part of a batch, by `learning_network`."""

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        loss = torch.stack([output["loss"] for output in train_outputs])
        mean = float(self.ranks.sum(loss.mean()))
        self.progress.end_epoch()
        if not np.isfinite(mean):
            raise UserError(
                f"{self.output_folder}: the loss is {mean} in epoch {self.current_epoch}, expected a number; lower the stage's "
                f"learning rate in the csm block of the plans and train afresh (checkpoints of earlier epochs are kept)"
            )
        super().on_train_epoch_end([{"loss": np.asarray(mean)}])
        self.print_to_log_file(f"{self.progress.crops_per_second:.1f} crops/s, {self.progress.left(1.0)} left")

    def finish_epoch(self, best: bool, save_pictures: Callable[[], None]) -> None:
        """Write what an epoch leaves: the best checkpoint, the latest, and now and then pictures."""
        last = self.current_epoch == self.num_epochs - 1
        if best:
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_best.pth"))
        if not last:
            self.save_checkpoint(os.path.join(self.output_folder, "checkpoint_latest.pth"))
        if self.ranks.rank == 0 and (last or time.monotonic() - self.last_picture > SECONDS_BETWEEN_PICTURES):
            save_pictures()
            self.last_picture = time.monotonic()
        self.current_epoch += 1

    def save_checkpoint(self, filename: str) -> None:
        if self.ranks.rank != 0:
            return
        name = os.path.basename(filename)
        if name == "checkpoint_latest.pth" and not self.due(name):
            return
        if self.disable_checkpointing:
            self.print_to_log_file("No checkpoint written, checkpointing is disabled")
            return
        # nnU-Net's keys, so that its own commands read the file, and what tells where it comes from
        weights = self.bare_network.state_dict()
        # what prediction uses; with an average of the weights, those that learning goes on from stand beside it
        used = weights if self.average is None else self.average.state_dict()
        saved = {
            "network_weights": used,
            **({} if self.average is None else {"learning_weights": weights}),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": {**self.my_init_kwargs, "device": str(self.device)},
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
            "software": checkpoint.software(),
            **self.provenance(),
        }
        moved = checkpoint.save(saved, filename, first=self.replaced is not None)
        if self.replaced is not None:
            self.replaced.make_way()
            self.replaced = None
        if moved is not None:
            self.print_to_log_file(f"Checkpoints of an earlier run were moved to {moved}")
        self.written[name] = time.monotonic()

    def due(self, name: str) -> bool:
        """Whether a checkpoint of this name was last written long enough ago."""
        return time.monotonic() - self.written.get(name, -math.inf) >= SECONDS_BETWEEN_CHECKPOINTS

    def provenance(self) -> dict[str, Any]:
        """Further entries of the checkpoint."""
        return {}

    def check_saved(self, saved: Mapping[str, Any], filename: str) -> None:
        """Raise UserError when a run cannot go on from a checkpoint of the same plans."""

    def restore_provenance(self, saved: dict[str, Any]) -> None:
        """Take over those entries when a run goes on."""

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load a checkpoint of the same plans; it is read once without executing anything before nnU-Net reads it."""
        with exit_on_user_error():
            loaded = checkpoint.load(filename_or_checkpoint)
            init_args = loaded["init_args"]
            saved = read_configuration(init_args["plans"], init_args["configuration"], str(filename_or_checkpoint))
            parts = [
                {"patch_size": one.patch_size, **vars(one.csm), **vars(one.csm.finetuning), **one.architecture.named}
                for one in (saved, self.settings)
            ]
            if "pretext" in self.rests_on and saved.csm.pretext.get("name") == self.settings.csm.pretext["name"]:
                # a default that one file spells out and the other does not is no change
                for part, one in zip(parts, (saved, self.settings), strict=True):
                    pretext, setup = setup_of(one, str(filename_or_checkpoint))
                    part["pretext"] = {"name": pretext.__name__, **vars(setup.settings)}
            for field in sorted(self.rests_on | {"seed", "splits", *saved.architecture.named}):
                found, expected = (part[field] for part in parts)
                if found != expected:
                    raise UserError(
                        f"{filename_or_checkpoint}: {field} is {found}, the plans say {expected}; they changed since this run "
                        f"began: restore them, or train afresh"
                    )
            self.check_saved(loaded, str(filename_or_checkpoint))
        with exit_on_user_error(), checkpoint.going_on(filename_or_checkpoint):
            super().load_checkpoint(str(filename_or_checkpoint))
            if self.average is not None:
                self.average.load(loaded["network_weights"])
                self.bare_network.load_state_dict(loaded["learning_weights"])
            self.restore_provenance(loaded)
