"""`nnUNetTrainerCSMPretrain`: train an encoder by cross-series masking, on images only (paper III-B)."""

import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join, save_json
from jaxtyping import Float, Int
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_csm import nnunet
from nnunet_csm.data.bank import VARIABLE, Bank, CaseFile, open_bank
from nnunet_csm.data.crops import draw_crops
from nnunet_csm.data.draws import Draws, Purpose, What, ahead, key
from nnunet_csm.data.sources import fold_files
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.evaluation.hidden import KINDS
from nnunet_csm.evaluation.token_regression import TokenRidge
from nnunet_csm.figures.curves import Panel, save_curves
from nnunet_csm.figures.reconstructions import save_reconstruction
from nnunet_csm.machine import has_bf16, num_workers
from nnunet_csm.model.compilation import uncompiled
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.tokens import to_volume, to_voxels
from nnunet_csm.model.transfer import PretrainedEncoder, as_table, transfer
from nnunet_csm.plans import Configuration, Recipe, Schedule, parse_configuration
from nnunet_csm.pretext import mae3d
from nnunet_csm.pretext.csm import CSM, Rebuilt, summed_error
from nnunet_csm.pretext.mae3d import MAE3D
from nnunet_csm.pretext.masking import Mask, ask_some, draw_mask, shown_series_weights, without_background
from nnunet_csm.pretext.memory import CUDA_CONTEXT, pretraining_memory
from nnunet_csm.training.graphs import GraphedSteps, why_no_graphs
from nnunet_csm.training.host import CUDA, CSMTrainer
from nnunet_csm.training.probe import (
    LOGGED_ERRORS,
    LOGGED_PRECISION,
    HiddenErrors,
    Probe,
    draw_linear_probe,
    fit_linear_maps,
    validation_sums,
)
from nnunet_csm.training.segmentation import nnUNetTrainerCSM

SECONDS_BETWEEN_PICTURES = 60.0
# of an encoder from which bf16 pays on a CPU
WIDTH_FOR_BF16 = 256
# patches on which reconstructions are compared with the linear map
NUM_COMPARED = 192


class MaskedBatches:
    """Some samples of batches and their masks, each a function of (epoch, step, place in the batch).

    All samples of a batch show the same number of series, so that the number of visible tokens is one. That number is
    drawn first, then cases by how likely each would have drawn it; every case and every k keep their probabilities. Joint
    tokens are as many whatever series a sample has, and cases are drawn alike.
    Everything is drawn where the volumes are.
    """

    def __init__(self, bank: Bank, settings: Configuration, purpose: Purpose, places: range) -> None:
        self.bank, self.settings, self.purpose = bank, settings, purpose
        self.places = torch.arange(places.start, places.stop, device=bank.device)
        present = bank.series_present.cpu()
        # joint tokens are those of one series, which every case has
        present = present.any(1, keepdim=True) if settings.architecture.joint_tokens else present
        self.weights = shown_series_weights(present, settings.csm.masking).double()
        self.cumulative = self.weights.cumsum(0).to(bank.device)
        # epochs are compared on all hidden tokens
        self.share = settings.csm.reconstruction.rebuilt_share if purpose == Purpose.TRAINING else 1.0

    def __call__(self, epoch: int, step: int) -> tuple[Tensor, Mask]:
        return self.make(*self.batch_key(epoch, step))

    def batch_key(self, epoch: int, step: int) -> tuple[int, int]:
        """What a batch is a function of: the key of its draws, and the number of series that all its samples show."""
        seed = key(self.settings.csm.seed, self.purpose, epoch, step)
        # one number for all samples, of all ranks; drawn on the CPU, since shapes depend on it
        batch = Draws(seed, torch.zeros(1, dtype=torch.long))
        return seed, 1 + int(pick(self.weights.sum(0).cumsum(0), batch, What.NUM_SHOWN))

    def make(self, seed: int | Tensor, num_shown: int) -> tuple[Tensor, Mask]:
        """The batch of a key. When that is a tensor on the bank's device, nothing here waits for the device or reads from it."""
        csm = self.settings.csm
        patch_size = csm.pretraining_patch_size
        draws = Draws(seed, self.places)
        chosen = pick(self.cumulative[:, num_shown - 1].contiguous(), draws, What.CASE)
        crops = draw_crops(draws, self.bank.shapes[chosen], patch_size, self.bank.occupancy[chosen])
        present, num_tokens = self.bank.series_present[chosen], math.prod(self.settings.pretraining_grid)
        if self.settings.architecture.joint_tokens:
            mask = mae3d.draw_mask(draws, present, num_tokens, csm.masking)
        else:
            mask = draw_mask(draws, present, num_shown, num_tokens, csm.masking)
        volume = self.bank.cut(chosen, crops, patch_size)
        if self.settings.architecture.joint_tokens:
            mask = mae3d.without_empty_series(mask, volume)
        if csm.masking.background == "ignored":
            mask = without_background(mask, volume, self.settings.architecture.token_size)
        return volume, ask_some(mask, draws, self.share, present.shape[1] if self.settings.architecture.joint_tokens else 1)


def pick(cumulative: Float[Tensor, " n"], draws: Draws, what: What) -> Int[Tensor, " b"]:
    """For each sample the number of an entry, drawn by its weight, given running sums of weights; those of weight 0 never are."""
    return torch.searchsorted(cumulative, draws.uniform(what, 1)[:, 0].double() * cumulative[-1], right=True)


class nnUNetTrainerCSMPretrain(CSMTrainer):  # noqa: N801, nnU-Net's trainers are named so
    """Pretrain on the training cases of a fold; the images of its validation cases are only looked at, never learned from.

    Labels are read for the linear probe only (`training/probe.py`). Writes beside nnU-Net's files: reconstructions/*.png,
    progress.png, probe.csv, validation/summary.json.
    """

    network_draws = False
    rests_on = frozenset({"sources", "pretraining_patch_size", "masking", "reconstruction", "pretraining"})
    logged = ("error_part_hidden", "error_whole_hidden", "crops_per_second", *LOGGED_ERRORS, LOGGED_PRECISION)

    def __init__(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        for name in self.logged:
            self.logger.local_logger.my_fantastic_logging[name] = []
        self.last_picture = 0.0
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
        pretext = MAE3D if settings.architecture.joint_tokens else CSM
        return pretext(settings.pretraining_architecture, settings.csm.reconstruction)

    def provenance(self) -> dict[str, Any]:
        return {"training_cases": self.train_batches.bank.names, "series": self.series}

    def restore_provenance(self, saved: dict[str, Any]) -> None:
        log = self.logger.local_logger.my_fantastic_logging
        for name in self.logged:
            # of a run begun before there were probes
            log.setdefault(name, [float("nan")] * self.current_epoch)

    @property
    def series(self) -> tuple[str, ...]:
        """Those of all sources."""
        return self.settings.pretraining_architecture.series

    def _build_loss(self) -> None:
        """The loss is part of the pretext, see `pretext/csm.py`."""

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
        self.train_batches = MaskedBatches(bank, self.settings, Purpose.TRAINING, self.places)
        self.val_batches = MaskedBatches(val_bank, self.settings, Purpose.VALIDATION, self.places)
        self.print_to_log_file(f"Pretraining on {len(bank.names)} cases, nothing learned from labels; {bank.reason}")
        counted = Counter(name.split("/")[0] for name in bank.names)
        share = {s: int(n) for s, n in zip(self.series, bank.series_present.sum(0), strict=True)}
        self.print_to_log_file(f"of {dict(counted)}; with each series: {share}", add_timestamp=False)
        for names in (bank.left_out, [] if val_bank is bank else val_bank.left_out):
            if names:
                self.print_to_log_file(f"WARNING: left out, as all planned series are zero there: {', '.join(names)}")

    def open_bank(self, files: Sequence[CaseFile]) -> Bank:
        return open_bank(
            files,
            self.device,
            os.environ.get(VARIABLE, "auto"),
            reserved=self.step_memory() if self.device.type == "cuda" else 0,
        )

    def step_memory(self) -> int:
        """Bytes that a step is predicted to take of this rank's GPU."""
        csm, batch_size = self.settings.csm, math.ceil(len(self.places) / self.num_parts)
        architecture, patch_size = self.settings.pretraining_architecture, csm.pretraining_patch_size
        memory = pretraining_memory(architecture, csm.reconstruction, csm.masking, patch_size, batch_size)
        return memory.total + CUDA_CONTEXT

    def get_dataloaders(self) -> tuple[Any, Any]:
        self.open_banks()
        num_steps = self.num_iterations_per_epoch
        steps = ((epoch, step) for epoch in range(self.current_epoch, self.num_epochs) for step in range(num_steps))
        self.why_no_graphs = why_no_graphs(self.device, self.ranks.num_ranks, self.num_parts)
        if self.train_batches.bank.where == "gpu" and not self.why_no_graphs:
            # made within the step
            return (self.train_batches.batch_key(*at) for at in steps), self.fixed_validation()
        # a bank on the GPU cuts there; beside a network on the same CPU cores, threads would only be in its way
        threads = num_workers(self.device) if self.train_batches.bank.where != "gpu" else 0
        voxels = len(self.series) * math.prod(self.settings.csm.pretraining_patch_size)
        batch_bytes = 2 * self.batch_size * voxels
        train = ahead(lambda at: self.train_batches(*at), steps, threads, self.device, batch_bytes)
        return train, self.fixed_validation()

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
        probe = self.comparison()
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

    def comparison(self) -> Probe:
        """With errors of linear maps, as far as the memory that training leaves them will do."""
        validation = MaskedBatches(self.val_batches.bank, self.settings, Purpose.VALIDATION, range(self.schedule.batch_size))

        def batches() -> Iterator[tuple[Tensor, Mask]]:
            return (validation(0, step) for step in range(self.num_val_iterations_per_epoch))

        try:
            return Probe(self.settings, self.linear_maps, batches(), self.device)
        except torch.OutOfMemoryError as error:
            self.print_to_log_file(f"No comparison with linear maps: {str(error).splitlines()[0]}")
            self.linear_maps = None
        return Probe(self.settings, None, batches(), self.device)

    def untrained_encoder(self) -> Encoder:
        """As `initialize` made it, whatever has been learned since."""
        state = torch.get_rng_state()
        # the CPU's only, where networks are made
        torch.default_generator.manual_seed(self.key(Purpose.NETWORK))
        network: Any = self.build_network_architecture(self.plans_manager, self.configuration_manager, self.num_input_channels, 1)
        torch.set_rng_state(state)
        return network.encoder.to(self.device)

    @cached_property
    def linear_maps(self) -> TokenRidge | None:
        """Fitted on patches of training cases; None when hardly any of them holds every series, or memory does not do."""
        batches = MaskedBatches(self.train_batches.bank, self.settings, Purpose.TRAINING, range(self.schedule.batch_size))
        try:
            return fit_linear_maps(lambda step: batches(0, step)[0], self.settings, self.device)
        except (UserError, torch.OutOfMemoryError) as error:
            self.print_to_log_file(f"No comparison with linear maps: {str(error).splitlines()[0]}")
            return None

    def before_step(self) -> None:
        super().before_step()
        if self.graphed is not None:
            # a graph reads the learning rate from where it was when captured
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate.fill_(group["lr"])

    def fixed_validation(self) -> Iterator[tuple[Tensor, Mask]]:
        """The same patches and masks in every epoch, so that epochs compare."""
        return (self.val_batches(0, step) for step in range(self.num_val_iterations_per_epoch))

    def launched_step(self, volume: Tensor, *mask: Tensor) -> Tensor:
        """A step launched from Python, kernel by kernel."""
        return super().learn((volume, Mask(*mask)))

    def drawn_step(self, seed: Tensor, num_shown: int) -> Tensor:
        """The same on the batch of a key."""
        return super().learn(self.train_batches.make(seed, num_shown))

    def learn(self, batch: tuple[Tensor, Mask] | tuple[int, int]) -> Tensor:
        """One step of the optimiser, on a batch or, with a bank on the GPU, on the key of one."""
        if self.graphed is None:
            return super().learn(batch)
        given, other = batch
        if isinstance(given, int) and isinstance(other, int):
            if not self.graphed_with_draws.failed:
                # filled there: copied from here it would wait for the GPU
                return self.graphed_with_draws([torch.full((), given, device=self.device)], other)
            batch = self.train_batches.make(given, other)
        volume, mask = self.on_device(batch)  # type: ignore[arg-type]
        return self.graphed((volume, *mask.tensors))

    @property
    def autocast_on_cpu(self) -> bool:
        """Whether a CPU multiplies in bf16, which pays from a certain width on (docs/performance.md)."""
        return self.device.type == "cpu" and self.settings.architecture.width >= WIDTH_FOR_BF16 and has_bf16()

    def autocast(self) -> Any:
        enabled = self.device.type == "cuda" or self.autocast_on_cpu
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """As training computes, but not compiled: parts of batches have shapes of their own."""
        with self.autocast(), uncompiled():
            yield

    def on_device(self, batch: tuple[Tensor, Mask]) -> tuple[Tensor, Mask]:
        return batch[0].to(self.device, non_blocking=True), batch[1].to(self.device)

    def part(self, batch: tuple[Tensor, Mask], places: slice) -> tuple[Tensor, Mask]:
        return batch[0][places], batch[1][places]

    def weight(self, batch: tuple[Tensor, Mask]) -> Tensor:
        """The number of tokens to be rebuilt."""
        return batch[1].rebuilt.sum()

    def summed_loss(self, batch: tuple[Tensor, Mask]) -> Tensor:
        with self.autocast():
            return summed_error(self.learning_network(*batch), batch[1])

    def rebuild(self, volume: Tensor, mask: Mask) -> Rebuilt:
        with self.evaluating():
            return self.bare_network.rebuild(volume, mask)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.dataloader_val = self.fixed_validation()

    def validation_step(self, batch: tuple[Tensor, Mask]) -> dict:
        volume, mask = self.on_device(batch)
        return validation_sums(volume, mask, self.rebuild, self.settings)

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        # of all ranks, batch by batch
        outputs = {name: torch.stack([output[name].double() for output in val_outputs]) for name in ("sums", "counts")}
        sums, counts = (self.ranks.sum(output).cpu().numpy() for output in outputs.values())
        losses = sums[:, :2].sum(1) / np.maximum(counts[:, :2].sum(1), 1)
        kinds = [total.sum(0)[2:].reshape(len(KINDS), -1).sum(1) for total in (sums, counts)]
        errors, num = (np.append(total.sum(0)[:2], by_kind) for total, by_kind in zip((sums, counts), kinds, strict=True))
        # with one series, none is hidden whole
        means = np.where(num > 0, errors / np.maximum(num, 1), np.nan)
        self.logger.log("val_losses", float(losses.mean()), self.current_epoch)
        for name, value in zip(("error_part_hidden", "error_whole_hidden", *LOGGED_ERRORS), means, strict=True):
            self.logger.log(name, float(value), self.current_epoch)
        self.logger.log("crops_per_second", self.progress.crops_per_second, self.current_epoch)

    def on_epoch_end(self) -> None:
        self.logger.log("epoch_end_timestamps", time.time(), self.current_epoch)
        log = self.logger.local_logger.my_fantastic_logging
        self.print_to_log_file(
            f"train_loss {log['train_losses'][-1]:.4f}  val_loss {log['val_losses'][-1]:.4f}  "
            f"(series visible elsewhere {log['error_part_hidden'][-1]:.4f}, hidden whole {log['error_whole_hidden'][-1]:.4f})"
        )
        last = self.current_epoch == self.num_epochs - 1
        precision = float("nan") if self.probe is None else self.probe.precision(self.encoder, self.current_epoch)
        self.logger.log(LOGGED_PRECISION, precision, self.current_epoch)
        if self.probe is not None:
            self.print_to_log_file(self.probe.said(log), add_timestamp=False)
            self.probe.save(log, Path(self.output_folder) / "probe.csv")
        if (self._best_ema is None or log["val_losses"][-1] < self._best_ema) and (last or self.due("checkpoint_best.pth")):
            self._best_ema = log["val_losses"][-1]
            self.save_checkpoint(join(self.output_folder, "checkpoint_best.pth"))
        if not last:
            self.save_checkpoint(join(self.output_folder, "checkpoint_latest.pth"))
        if self.ranks.rank == 0 and (last or time.monotonic() - self.last_picture > SECONDS_BETWEEN_PICTURES):
            self.save_pictures()
            self.last_picture = time.monotonic()
        self.current_epoch += 1

    def save_pictures(self) -> None:
        """progress.png, and reconstructions of two patches of validation cases (unseen in training unless fold is all)."""
        log = self.logger.local_logger.my_fantastic_logging
        assert self.probe is not None, "rank 0 only"
        errors = {"series visible elsewhere": log["error_part_hidden"], "series hidden whole": log["error_whole_hidden"]}
        save_curves(
            Path(self.output_folder) / "progress.png",
            [
                Panel("Loss", {"training": log["train_losses"], "validation": log["val_losses"]}, "epoch", "mean squared error"),
                Panel("Validation error", errors, "epoch", "mean squared error"),
                *self.probe.panels(log),
                Panel("Learning rate", {"at the start of the epoch": log["lrs"]}, "epoch", ""),
                Panel("Speed", {"training": log["crops_per_second"]}, "epoch", "crops/s"),
            ],
        )
        folder = Path(self.output_folder) / "reconstructions"
        folder.mkdir(exist_ok=True)
        for number, (volume, mask) in enumerate(itertools.islice(self.fixed_validation(), 2)):
            # the sample with most to see
            sample = slice(best := int(volume.flatten(1).std(1).argmax()), best + 1)
            patch, hidden, filled = next(self.rebuilt_patches((volume[sample], mask[sample])))
            save_reconstruction(
                folder / f"epoch_{self.current_epoch:04d}_{number}.png",
                patch,
                hidden,
                filled,
                self.series,
                np.asarray(patch.any(axis=(1, 2, 3))),
                f"validation patch {number}, epoch {self.current_epoch}",
            )

    @torch.no_grad()
    def rebuilt_patches(self, batch: tuple[Tensor, Mask]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each sample of a batch: the patch, its hidden voxels, and what was rebuilt, each (s, z, y, x)."""
        self.network.eval()
        volume, mask = self.on_device(batch)
        grid, token_size = self.settings.pretraining_grid, self.settings.architecture.token_size
        rebuilt = to_volume(self.rebuild(volume, mask).tokens, grid, token_size)
        hidden = to_voxels(mask.hidden, grid, token_size)
        yield from zip(*(t.cpu().numpy() for t in (volume, hidden, rebuilt.float())), strict=True)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Rebuild patches of the validation cases and write the errors beside those of the linear maps.

        Writes validation/summary.json and validation/reconstruction.csv.
        """
        if not hasattr(self, "val_batches"):
            # which ranks do together
            self.open_banks()
        if self.ranks.rank > 0:
            return
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(exist_ok=True)
        self.print_to_log_file("Comparing reconstructions of validation cases with linear maps ...")
        errors = HiddenErrors(self.settings, self.linear_maps, self.device)
        self.network.eval()
        with torch.no_grad():
            for step in range(max(4, math.ceil(NUM_COMPARED / self.batch_size))):
                # epoch 1: other draws than those the epochs were judged by
                errors.add(*self.val_batches(1, step), self.rebuild)
        table = errors.table()
        table.to_csv(folder / "reconstruction.csv", index=False)
        save_json({"hidden_voxels": table.to_dict("records")}, str(folder / "summary.json"))
        self.print_to_log_file(
            f"Mean squared error on hidden foreground voxels:\n{table.to_string(index=False, float_format='%.4f')}",
            add_timestamp=False,
        )
