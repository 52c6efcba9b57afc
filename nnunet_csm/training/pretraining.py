"""`nnUNetTrainerCSMPretrain`: train an encoder by the pretext of the plans, on images only (paper III-B)."""

import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_csm import nnunet
from nnunet_csm.data.bank import VARIABLE, Bank, open_bank
from nnunet_csm.data.draws import Purpose
from nnunet_csm.data.sources import fold_files
from nnunet_csm.data.stored import CaseFile
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.figures.curves import Panel, save_curves
from nnunet_csm.judging.comparison import Comparison
from nnunet_csm.judging.hidden_errors import validation_sums
from nnunet_csm.judging.lesion_probe import draw_linear_probe
from nnunet_csm.judging.probe import LOGGED_PRECISION, Probe, logged_names
from nnunet_csm.machine import has_bf16
from nnunet_csm.model.compilation import uncompiled
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.transfer import PretrainedEncoder, as_table, transfer
from nnunet_csm.plans import Recipe, Schedule, parse_configuration
from nnunet_csm.pretext.base import Batch, Pretext, learner_of, setup_of
from nnunet_csm.pretext.batches import Batches
from nnunet_csm.pretext.masking import Mask
from nnunet_csm.pretext.memory import CUDA_CONTEXT, pretraining_memory
from nnunet_csm.pretext.rebuilding import Rebuilding, Rebuilt
from nnunet_csm.training.graphs import GraphedSteps, why_no_graphs
from nnunet_csm.training.segmentation import nnUNetTrainerCSM
from nnunet_csm.training.trainer import CUDA, CSMTrainer

# of an encoder from which bf16 pays on a CPU
WIDTH_FOR_BF16 = 256
# patches on which reconstructions are compared with the linear map
NUM_COMPARED = 192


class nnUNetTrainerCSMPretrain(CSMTrainer):  # noqa: N801, nnU-Net's trainers are named so
    """Pretrain on the training cases of a fold; the images of its validation cases are only looked at, never learned from.

    Labels are read for the linear probe only (`judging/lesion_probe.py`). Writes beside nnU-Net's files: reconstructions/*.png,
    progress.png, probe.csv, validation/summary.json.
    """

    rests_on = frozenset({"sources", "pretraining_patch_size", "pretext", "pretraining"})

    def __init__(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        with exit_on_user_error():
            self.pretext_class, self.setup = learner_of(self.settings, plans["plans_name"])
        self.network_draws = self.pretext_class.network_draws
        self.logged = (*logged_names(self.pretext_class), "crops_per_second", LOGGED_PRECISION)
        for name in self.logged:
            self.logger.local_logger.my_fantastic_logging[name] = []
        self.compared: Comparison | None = None
        self._best_ema: float | None = None

    @staticmethod
    def choose_schedule(csm: Recipe) -> Schedule:
        return csm.pretraining

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        settings = parse_configuration(configuration_manager.configuration, plans_manager.plans_name)
        pretext, setup = setup_of(settings, plans_manager.plans_name)
        return pretext(setup)

    @property
    def pretext(self) -> Pretext:
        """The network."""
        found: Pretext = self.bare_network
        return found

    def provenance(self) -> dict[str, Any]:
        return {"training_cases": self.train_batches.bank.names, "series": self.series}

    def restore_provenance(self, saved: dict[str, Any]) -> None:
        log = self.logger.local_logger.my_fantastic_logging
        for name in self.logged:
            # of a run begun before there were probes
            log.setdefault(name, [float("nan")] * self.current_epoch)

    @property
    def series(self) -> tuple[str, ...]:
        """Series of all sources."""
        return self.settings.pretraining_architecture.series

    def _build_loss(self) -> None:
        """The loss is part of the pretext."""

    def on_fresh_start(self) -> None:
        owner = self.settings.csm.sources[0].dataset
        if owner != self.plans_manager.dataset_name:
            raise UserError(f"these plans belong to a run of {owner}: pretrain with -d {owner}, and fine-tune either from it")
        # hours of pretraining must not end in weights that do not load
        manager = self.plans_manager
        segmenter = nnUNetTrainerCSM.build_network_architecture(
            manager, self.configuration_manager, self.num_input_channels, self.label_manager.num_segmentation_heads, False
        )
        pretrained = PretrainedEncoder("this run", self.settings.pretraining_architecture, self.encoder.state_dict())
        rows = transfer(pretrained, segmenter.encoder, self.settings.architecture)
        self.print_to_log_file(f"Transfer to the segmenter, tried before the first step:\n{as_table(rows)}", add_timestamp=False)

    def open_banks(self) -> None:
        """Read the images of the fold, training and validation cases apart."""
        with exit_on_user_error():
            csm, preprocessed = self.settings.csm, nnunet.folder("nnUNet_preprocessed")
            training, validation = fold_files(csm.sources, self.series, preprocessed, self.fold, csm.splits)
            bank = self.open_bank(training)
            val_bank = bank if validation == training else self.open_bank(validation)
        self.train_batches = self.batches(bank, Purpose.TRAINING, self.samples)
        self.val_batches = self.batches(val_bank, Purpose.VALIDATION, self.samples)
        self.print_to_log_file(f"Pretraining on {len(bank.names)} cases, nothing learned from labels; {bank.reason}")
        drawn = ", ".join(f"{num} of {name} in {part:.1%} of the draws" for name, (num, part) in bank.shares().items())
        with_series = {s: int(n) for s, n in zip(self.series, bank.series_present.sum(0), strict=True)}
        self.print_to_log_file(f"{drawn}; with each series: {with_series}", add_timestamp=False)
        for names in (bank.left_out, [] if val_bank is bank else val_bank.left_out):
            if names:
                self.print_to_log_file(f"WARNING: left out, as all planned series are zero there: {', '.join(names)}")

    def batches(self, bank: Bank, purpose: Purpose, samples: range) -> Batches:
        """Batches of some samples of the batch of all ranks, by their numbers."""
        return Batches(bank, self.pretext, self.settings.csm.seed, purpose, samples)

    def open_bank(self, files: Sequence[CaseFile]) -> Bank:
        return open_bank(
            files,
            self.device,
            os.environ.get(VARIABLE, "auto"),
            reserved=self.step_memory() if self.device.type == "cuda" else 0,
        )

    def step_memory(self) -> int:
        """Bytes that a step is predicted to take of this rank's GPU."""
        memory = pretraining_memory(self.pretext_class, self.setup, math.ceil(len(self.samples) / self.num_parts))
        return memory.total + CUDA_CONTEXT

    def get_dataloaders(self) -> tuple[Any, Any]:
        self.open_banks()
        num_steps = self.num_iterations_per_epoch
        steps = ((epoch, step) for epoch in range(self.current_epoch, self.num_epochs) for step in range(num_steps))
        self.why_no_graphs = why_no_graphs(self.device, self.ranks.num_ranks, self.num_parts)
        if self.train_batches.bank.where == "gpu" and not self.why_no_graphs:
            # made within the step
            return (self.train_batches.batch_key(*at) for at in steps), self.fixed_validation()
        return self.train_batches.ahead(steps, self.device), self.fixed_validation()

    def on_train_start(self) -> None:
        super().on_train_start()
        self.graphed: GraphedSteps | None = None
        if not self.why_no_graphs:
            self.rates = [torch.zeros((), device=self.device) for _ in self.optimizer.param_groups]
            self.graphed = GraphedSteps(self.launched_step, self.print_to_log_file)
            self.graphed_with_draws = GraphedSteps(self.drawn_step, self.print_to_log_file, "what makes a batch")
        elif self.device.type == "cuda":
            self.print_to_log_file(f"No CUDA graphs: {self.why_no_graphs}", add_timestamp=False)
        if self.autocast_on_cpu:
            self.print_to_log_file("Matrix products in bf16, which this processor has", add_timestamp=False)
        self.probe = self.start_probe() if self.ranks.rank == 0 else None

    def start_probe(self) -> Probe:
        """Fit what the run is compared with; on rank 0, on the patches of all ranks."""
        started = time.monotonic()
        self.print_to_log_file("Preparing the probe: linear maps and features that the run is compared with")
        self.compared, errors = self.comparison(), None
        if self.compared is not None:
            of_all = self.batches(self.val_batches.bank, Purpose.VALIDATION, range(self.schedule.batch_size))
            errors = self.compared.errors(lambda: (of_all(0, step) for step in range(self.num_val_iterations_per_epoch)))
        probe = Probe(self.pretext, self.schedule, errors)
        try:
            linear_probe = draw_linear_probe(
                self.train_batches.bank,
                self.val_batches.bank,
                self.settings,
                nnunet.folder("nnUNet_preprocessed"),
                self.label_manager.ignore_label,
                self.evaluating,
                self.batch_size,
            )
            linear_probe.untrained = linear_probe.of(self.untrained_encoder())
            probe.linear_probe = linear_probe
        except (UserError, torch.OutOfMemoryError) as error:
            self.print_to_log_file(f"No linear probe: {str(error).splitlines()[0]}")
        self.print_to_log_file(f"Probe ready after {time.monotonic() - started:.0f} s")
        return probe

    def comparison(self) -> Comparison | None:
        """Linear maps that a pretext which rebuilds is compared with, on patches of all ranks; None for any other."""
        if not isinstance(self.pretext, Rebuilding):
            return None
        training = self.batches(self.train_batches.bank, Purpose.TRAINING, range(self.schedule.batch_size))
        return Comparison(
            self.pretext, lambda step: training(0, step), self.schedule.batch_size, self.device, self.print_to_log_file
        )

    def untrained_encoder(self) -> Encoder:
        """The encoder as `initialize` made it, whatever has been learned since."""
        state = torch.get_rng_state()
        # the CPU's only, where networks are made
        torch.default_generator.manual_seed(self.key(Purpose.NETWORK))
        network: Any = self.build_network_architecture(self.plans_manager, self.configuration_manager, self.num_input_channels, 1)
        torch.set_rng_state(state)
        return network.encoder.to(self.device)

    def before_step(self) -> None:
        super().before_step()
        if self.graphed is not None:
            # a graph reads the learning rate from where it was when captured
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate.fill_(group["lr"])

    def fixed_validation(self) -> Iterator[Batch]:
        """The same patches and draws in every epoch, so that epochs compare."""
        return (self.val_batches(0, step) for step in range(self.num_val_iterations_per_epoch))

    def launched_step(self, *tensors: Tensor) -> Tensor:
        """A step launched from Python, kernel by kernel, on the tensors of a batch."""
        return super().learn(Batch.of(tensors, len(self.pretext.crop_sizes), self.pretext.Draw))

    def drawn_step(self, seed: Tensor, variant: int) -> Tensor:
        """The same on the batch of a key."""
        return super().learn(self.train_batches.make(seed, variant))

    def train_step(self, batch: Any) -> dict:
        learned = super().train_step(batch)
        self.pretext.after_step(self.iteration / self.schedule.num_iterations)
        return learned

    def learn(self, batch: Batch | tuple[int, int]) -> Tensor:
        """One step of the optimiser, on a batch or, with a bank on the GPU, on the key of one."""
        if self.graphed is None:
            return super().learn(batch)
        if not isinstance(batch, Batch):
            if not self.graphed_with_draws.failed:
                # filled there: copied from here it would wait for the GPU
                return self.graphed_with_draws([torch.full((), batch[0], device=self.device)], batch[1])
            batch = self.train_batches.make(*batch)
        batch = self.on_device(batch)
        return self.graphed(batch.tensors)

    @property
    def autocast_on_cpu(self) -> bool:
        """Whether a CPU multiplies in bf16, which pays from a certain width on (docs/performance.md)."""
        return self.device.type == "cpu" and self.settings.architecture.width >= WIDTH_FOR_BF16 and has_bf16()

    def autocast(self) -> Any:
        enabled = self.device.type == "cuda" or self.autocast_on_cpu
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Compute as training does, but not compiled: parts of batches have shapes of their own."""
        with self.autocast(), uncompiled():
            yield

    def on_device(self, batch: Batch) -> Batch:
        return batch.to(self.device)

    def part(self, batch: Batch, samples: slice) -> Batch:
        return batch[samples]

    def weight(self, batch: Batch) -> Tensor:
        return self.pretext.weight(batch.drawn)

    def summed_loss(self, batch: Batch) -> Tensor:
        with self.autocast():
            loss: Tensor = self.learning_network(*batch.args)
        return loss

    def rebuild(self, volume: Tensor, mask: Mask) -> Rebuilt:
        """What the network makes of a batch, for a pretext that rebuilds."""
        assert isinstance(self.pretext, Rebuilding)
        with self.evaluating():
            return self.pretext.rebuild(volume, mask)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.dataloader_val = self.fixed_validation()

    def validation_step(self, batch: Batch) -> dict:
        batch = self.on_device(batch)
        if isinstance(self.pretext, Rebuilding):
            found = validation_sums(batch, self.rebuild, self.pretext)
        else:
            with self.evaluating():
                found = self.pretext.validate(batch)
        return {name: torch.stack([value.double() for value in sums]) for name, sums in found.items()}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        # of all ranks, batch by batch
        by_name = {name: self.ranks.sum(torch.stack([output[name] for output in val_outputs])).cpu() for name in val_outputs[0]}
        sums, counts = by_name.pop("loss").T
        self.logger.log("val_losses", float((sums / counts.clamp(min=1)).mean()), self.current_epoch)
        for name, of_batches in by_name.items():
            total, num = of_batches.sum(0).tolist()
            # with one series, none is hidden whole
            self.logger.log(name, total / num if num > 0 else float("nan"), self.current_epoch)
        self.logger.log("crops_per_second", self.progress.crops_per_second, self.current_epoch)

    def on_epoch_end(self) -> None:
        self.logger.log("epoch_end_timestamps", time.time(), self.current_epoch)
        log = self.logger.local_logger.my_fantastic_logging
        parts = {"series visible elsewhere": "error_part_hidden", "hidden whole": "error_whole_hidden"}
        if not isinstance(self.pretext, Rebuilding):
            parts = dict(zip(self.pretext.parts, self.pretext.parts, strict=True))
        beside = ", ".join(f"{what} {log[name][-1]:.4f}" for what, name in parts.items())
        self.print_to_log_file(
            f"train_loss {log['train_losses'][-1]:.4f}  val_loss {log['val_losses'][-1]:.4f}"
            + (f"  ({beside})" if beside else "")
        )
        last = self.current_epoch == self.num_epochs - 1
        precision = float("nan") if self.probe is None else self.probe.precision(self.encoder, self.current_epoch)
        self.logger.log(LOGGED_PRECISION, precision, self.current_epoch)
        if self.probe is not None:
            self.print_to_log_file(self.probe.said(log), add_timestamp=False)
            self.probe.save(log, Path(self.output_folder) / "probe.csv")
        loss = log["val_losses"][-1]
        best = (self._best_ema is None or loss < self._best_ema) and (last or self.due("checkpoint_best.pth"))
        self._best_ema = loss if best else self._best_ema
        self.finish_epoch(best, self.save_pictures)

    def save_pictures(self) -> None:
        """Draw progress.png, and what the pretext makes of two patches of validation cases (unseen unless fold is all)."""
        log = self.logger.local_logger.my_fantastic_logging
        assert self.probe is not None, "rank 0 only"
        losses = {"training": log["train_losses"], "validation": log["val_losses"]}
        what = "mean squared error" if isinstance(self.pretext, Rebuilding) else ""
        save_curves(
            Path(self.output_folder) / "progress.png",
            [
                Panel("Loss", losses, "epoch", what),
                *self.probe.panels(log),
                Panel("Learning rate", {"at the start of the epoch": log["lrs"]}, "epoch", ""),
                Panel("Speed", {"training": log["crops_per_second"]}, "epoch", "crops/s"),
            ],
        )
        folder = Path(self.output_folder) / "reconstructions"
        self.network.eval()
        for number, batch in enumerate(itertools.islice(self.fixed_validation(), 2)):
            # the sample with most to see
            best = int(batch.volumes[0].flatten(1).std(1).argmax())
            with self.evaluating():
                self.pretext.picture(
                    folder / f"epoch_{self.current_epoch:04d}_{number}.png",
                    self.on_device(batch[best : best + 1]),
                    f"validation patch {number}, epoch {self.current_epoch}",
                )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Rebuild patches of the validation cases, if the pretext does, and write the errors beside those of the linear maps.

        Writes validation/summary.json and validation/reconstruction.csv.
        """
        with exit_on_user_error(), self.only_one():
            if not hasattr(self, "val_batches"):
                # which ranks do together
                self.open_banks()
            compared = self.compared or self.comparison()
            if self.ranks.rank == 0 and compared is not None:
                self.write_comparison(compared, Path(self.output_folder) / "validation")

    @torch.no_grad()
    def write_comparison(self, compared: Comparison, folder: Path) -> None:
        """Errors of the network and of the linear maps on validation patches, as tables in a folder and in the log."""
        folder.mkdir(exist_ok=True)
        self.print_to_log_file("Comparing reconstructions of validation cases with linear maps ...")
        self.network.eval()
        steps = range(max(4, math.ceil(NUM_COMPARED / self.batch_size)))
        # epoch 1: other draws than those the epochs were judged by
        errors = compared.errors(lambda: (self.val_batches(1, step) for step in steps), self.rebuild)
        table = errors.table()
        table.to_csv(folder / "reconstruction.csv", index=False)
        save_json({"hidden_voxels": table.to_dict("records")}, str(folder / "summary.json"))
        self.print_to_log_file(
            f"Mean squared error on hidden foreground voxels:\n{table.to_string(index=False, float_format='%.4f')}",
            add_timestamp=False,
        )
