"""`nnUNetTrainerCSMPretrain`: train an encoder by cross-series masking, on images only (paper III-B)."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import join, save_json
from nnunetv2.utilities.collate_outputs import collate_outputs
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_csm import nnunet
from nnunet_csm.data.cases import Cases
from nnunet_csm.data.crops import draw_crops
from nnunet_csm.data.draws import Purpose, batches, generator, key
from nnunet_csm.data.sources import fold_files
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.evaluation.hidden import HiddenVoxelErrors, foreground_voxels
from nnunet_csm.evaluation.reconstruction import RidgeBaseline
from nnunet_csm.figures.curves import Panel, save_curves
from nnunet_csm.figures.reconstructions import save_reconstruction
from nnunet_csm.model.tokens import to_volume, to_voxels
from nnunet_csm.model.transfer import PretrainedEncoder, as_table, transfer
from nnunet_csm.plans import Configuration, Recipe, Schedule, parse_configuration
from nnunet_csm.pretext.csm import CSM, Rebuilt
from nnunet_csm.pretext.masking import Mask, draw_mask, shown_series_weights
from nnunet_csm.training.host import CUDA, CSMTrainer, num_workers
from nnunet_csm.training.segmentation import nnUNetTrainerCSM

SECONDS_BETWEEN_PICTURES = 60.0
MAX_GRADIENT_NORM = 1.0
# patches on which reconstructions are compared with the linear map
NUM_COMPARED = 192


class MaskedBatches:
    """Batches of patches and their masks, each a function of (epoch, step).

    All samples of a batch show the same number of series, so that the number of visible tokens is one. That number is
    drawn first, then cases by how likely each would have drawn it; every case and every k keep their probabilities.
    """

    def __init__(self, cases: Cases, settings: Configuration, purpose: Purpose, rank: int) -> None:
        self.cases, self.settings, self.purpose, self.rank = cases, settings, purpose, rank
        self.weights = shown_series_weights(cases.series_present, settings.csm.masking)

    def __call__(self, epoch: int, step: int) -> tuple[Tensor, Mask]:
        csm = self.settings.csm
        patch_size = csm.pretraining_patch_size
        g = generator(key(csm.seed, self.purpose, epoch, step, self.rank))
        num_shown = 1 + int(torch.multinomial(self.weights.mean(0), 1, generator=g))
        weights = self.weights[:, num_shown - 1]
        chosen = torch.multinomial(weights, csm.pretraining.batch_size, replacement=True, generator=g)
        crops = draw_crops(g, self.cases.shapes[chosen], patch_size)
        num_tokens = math.prod(self.settings.pretraining_grid)
        mask = draw_mask(g, self.cases.series_present[chosen], num_shown, num_tokens, csm.masking)
        return self.cases.cut(chosen, crops, patch_size), mask


class nnUNetTrainerCSMPretrain(CSMTrainer):  # noqa: N801, nnU-Net's trainers are named so
    """Pretrain on the training cases of a fold; the images of its validation cases are only looked at, never learned from.

    Writes beside nnU-Net's files: reconstructions/*.png, progress.png, validation/summary.json.
    """

    rests_on = frozenset({"sources", "pretraining_patch_size", "masking", "reconstruction", "pretraining"})
    logged = ("error_part_hidden", "error_whole_hidden", "crops_per_second")

    def __init__(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.grad_scaler = None  # bf16 needs none
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
        return CSM(settings.pretraining_architecture, settings.csm.reconstruction)

    def initialize(self) -> None:
        super().initialize()
        self.batch_size = self.schedule.batch_size

    def provenance(self) -> dict[str, Any]:
        return {"training_cases": self.train_batches.cases.names, "series": self.series}

    @property
    def series(self) -> tuple[str, ...]:
        """Those of all sources."""
        return self.settings.pretraining_architecture.series

    def _build_loss(self) -> None:
        """The loss is part of the pretext, see `pretext/csm.py`."""

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """There is none."""

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

    def open_cases(self) -> None:
        """Read the images of the fold, training and validation cases apart."""
        with exit_on_user_error():
            sources = self.settings.csm.sources
            training, validation = fold_files(sources, self.series, nnunet.folder("nnUNet_preprocessed"), self.fold)
            train_cases = Cases(training)
            val_cases = train_cases if validation == training else Cases(validation)
        self.train_batches = MaskedBatches(train_cases, self.settings, Purpose.TRAINING, self.local_rank)
        self.val_batches = MaskedBatches(val_cases, self.settings, Purpose.VALIDATION, self.local_rank)
        self.print_to_log_file(f"Pretraining on {len(train_cases)} cases (read from {train_cases.where}), labels unread")
        counted = Counter(name.split("/")[0] for name in train_cases.names)
        share = {s: int(n) for s, n in zip(self.series, train_cases.series_present.sum(0), strict=True)}
        self.print_to_log_file(f"of {dict(counted)}; with each series: {share}", add_timestamp=False)
        for names in (train_cases.left_out, [] if val_cases is train_cases else val_cases.left_out):
            if names:
                self.print_to_log_file(f"WARNING: left out, as all planned series are zero there: {', '.join(names)}")

    def get_dataloaders(self) -> tuple[Any, Any]:
        self.open_cases()
        voxels = math.prod(self.settings.csm.pretraining_patch_size) * len(self.series)
        train = batches(
            self.train_batches,
            self.current_epoch,
            self.num_epochs,
            self.num_iterations_per_epoch,
            num_workers(self.device),
            pin_memory=self.device.type == "cuda",
            batch_bytes=4 * voxels * self.schedule.batch_size,
        )
        return train, self.fixed_validation()

    def fixed_validation(self) -> Iterator[tuple[Tensor, Mask]]:
        """The same patches and masks in every epoch, so that epochs compare."""
        return (self.val_batches(0, step) for step in range(self.num_val_iterations_per_epoch))

    def train_step(self, batch: tuple[Tensor, Mask]) -> dict:
        self.before_step()
        volume, mask = batch[0].to(self.device, non_blocking=True), batch[1].to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.rebuild(volume, mask).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.progress.step(loss.detach())
        return {"loss": loss.detach()}

    def rebuild(self, volume: Tensor, mask: Mask) -> Rebuilt:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.network(volume, mask)

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        loss = torch.stack([output["loss"] for output in train_outputs]).mean().item()
        if not np.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} in epoch {self.current_epoch}; lower csm.pretraining.learning_rate in the plans"
            )
        super().on_train_epoch_end([{"loss": np.asarray(loss)}])

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.dataloader_val = self.fixed_validation()

    def validation_step(self, batch: tuple[Tensor, Mask]) -> dict:
        volume, mask = batch[0].to(self.device), batch[1].to(self.device)
        rebuilt = self.rebuild(volume, mask)
        whole = mask.rebuilt & mask.series_hidden[..., None]
        part = mask.rebuilt & ~mask.series_hidden[..., None]
        sums = [torch.where(m, rebuilt.error, 0.0).sum() for m in (part, whole)]
        counts = torch.stack([part.sum(), whole.sum()])
        return {"loss": rebuilt.loss.cpu().numpy(), "sums": torch.stack(sums).cpu().numpy(), "counts": counts.cpu().numpy()}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        outputs = collate_outputs(val_outputs)
        counts = outputs["counts"].sum(0)
        # with one series, none is hidden whole
        part, whole = np.where(counts > 0, outputs["sums"].sum(0) / np.maximum(counts, 1), np.nan)
        self.logger.log("val_losses", float(np.mean(outputs["loss"])), self.current_epoch)
        self.logger.log("error_part_hidden", float(part), self.current_epoch)
        self.logger.log("error_whole_hidden", float(whole), self.current_epoch)
        self.logger.log("crops_per_second", self.progress.crops_per_second, self.current_epoch)

    def on_epoch_end(self) -> None:
        self.logger.log("epoch_end_timestamps", time.time(), self.current_epoch)
        log = self.logger.local_logger.my_fantastic_logging
        self.print_to_log_file(
            f"train_loss {log['train_losses'][-1]:.4f}  val_loss {log['val_losses'][-1]:.4f}  "
            f"(series visible elsewhere {log['error_part_hidden'][-1]:.4f}, hidden whole {log['error_whole_hidden'][-1]:.4f})"
        )
        last = self.current_epoch == self.num_epochs - 1
        if self._best_ema is None or log["val_losses"][-1] < self._best_ema:
            self._best_ema = log["val_losses"][-1]
            self.save_checkpoint(join(self.output_folder, "checkpoint_best.pth"))
        if not last:
            self.save_checkpoint(join(self.output_folder, "checkpoint_latest.pth"))
        if last or time.monotonic() - self.last_picture > SECONDS_BETWEEN_PICTURES:
            self.save_pictures()
            self.last_picture = time.monotonic()
        self.current_epoch += 1

    def save_pictures(self) -> None:
        """progress.png, and reconstructions of two patches of validation cases (unseen in training unless fold is all)."""
        log = self.logger.local_logger.my_fantastic_logging
        errors = {"series visible elsewhere": log["error_part_hidden"], "series hidden whole": log["error_whole_hidden"]}
        save_curves(
            Path(self.output_folder) / "progress.png",
            [
                Panel("Loss", {"training": log["train_losses"], "validation": log["val_losses"]}, "epoch", "mean squared error"),
                Panel("Validation error", errors, "epoch", "mean squared error"),
                Panel("Learning rate", {"at the start of the epoch": log["lrs"]}, "epoch", ""),
                Panel("Speed", {"training": log["crops_per_second"]}, "epoch", "crops/s"),
            ],
        )
        folder = Path(self.output_folder) / "reconstructions"
        folder.mkdir(exist_ok=True)
        for number, (volume, mask) in enumerate(itertools.islice(self.fixed_validation(), 2)):
            # the sample with most to see
            sample = slice(best := int(volume.flatten(1).std(1).argmax()), best + 1)
            chosen = Mask(mask.hidden[sample], mask.rebuilt[sample], mask.visible[sample])
            patch, hidden, filled = next(self.rebuilt_patches((volume[sample], chosen)))
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
        volume, mask = batch[0].to(self.device), batch[1].to(self.device)
        grid, token_size = self.settings.pretraining_grid, self.settings.architecture.token_size
        rebuilt = to_volume(self.rebuild(volume, mask).tokens, grid, token_size)
        hidden = to_voxels(mask.hidden, grid, token_size)
        yield from zip(*(t.cpu().numpy() for t in (volume, hidden, rebuilt.float())), strict=True)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Rebuild patches of the validation cases and write the errors beside those of the best linear map.

        The map is fitted on patches of training cases. Writes validation/summary.json and validation/reconstruction.csv.
        """
        if not hasattr(self, "val_batches"):
            self.open_cases()
        folder = Path(self.output_folder) / "validation"
        folder.mkdir(exist_ok=True)
        num_batches = max(4, math.ceil(NUM_COMPARED / self.batch_size))
        self.print_to_log_file("Comparing reconstructions of validation cases with a voxel-wise linear map ...")
        training = (patch.numpy() for step in range(num_batches) for patch in self.train_batches(0, step)[0])
        try:
            baseline = RidgeBaseline().fit(foreground_voxels(patch) for patch in training)
        except UserError as error:
            self.print_to_log_file(f"No comparison: {error}")
            save_json({}, str(folder / "summary.json"))
            return
        errors = HiddenVoxelErrors(self.series, baseline)
        for step in range(num_batches):
            # epoch 1: other draws than those the epochs were judged by
            for patch, hidden, rebuilt in self.rebuilt_patches(self.val_batches(1, step)):
                errors.add(patch, rebuilt, hidden)
        table = errors.table()
        table.to_csv(folder / "reconstruction.csv", index=False)
        save_json({"hidden_voxels": table.to_dict("records")}, str(folder / "summary.json"))
        self.print_to_log_file(
            f"Mean squared error on hidden foreground voxels:\n{table.to_string(index=False, float_format='%.4f')}",
            add_timestamp=False,
        )
