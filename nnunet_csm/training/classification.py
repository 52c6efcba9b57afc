"""`nnUNetTrainerCSMClassifier`: fine-tune a classifier of the patches around masks from the pretrained encoder."""

import math
import os
import time
from collections.abc import Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from nnunet_csm import nnunet
from nnunet_csm.data.diagnoses import FILE_NAME, ClassTable, read_class_table
from nnunet_csm.data.draws import Purpose, batches, generator, key
from nnunet_csm.data.lesions import SampleVolumes, Variation, draw_variation, measure_names, measured_labels, vary
from nnunet_csm.data.sources import case_names, check_preprocessed, run_name, split
from nnunet_csm.data.splits import split_problems
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.figures.curves import Panel, save_curves
from nnunet_csm.files import write_text
from nnunet_csm.heads.base import head_in, head_of
from nnunet_csm.model.classifier import build_classifier, predictions
from nnunet_csm.model.compilation import uncompiled
from nnunet_csm.plans import Configuration, Recipe, Schedule
from nnunet_csm.training.pretrained import ENCODER_VARIABLE, absent_series, start_from_pretrained, without_copies
from nnunet_csm.training.trainer import CUDA, CSMTrainer

# patches with borders, how to vary them, measures of their masks, targets
Batch = tuple[Tensor, Variation, Tensor, Tensor]


class VariedSamples:
    """Some samples of batches: patches, how to vary them, measures, and targets, each a function of (epoch, step, place).

    An epoch goes through all samples in random order, again and again, so that none is drawn twice more than another.
    """

    def __init__(self, volumes: SampleVolumes, settings: Configuration, samples: range) -> None:
        self.volumes, self.classification, self.samples = volumes, settings.csm.classification, samples
        self.seed = settings.csm.seed

    def __call__(self, epoch: int, step: int) -> Batch:
        batch_size = self.classification.schedule.batch_size
        chosen = self.order(epoch)[step * batch_size : (step + 1) * batch_size]
        g = generator(key(self.seed, Purpose.TRAINING, epoch, step))
        variation = draw_variation(g, batch_size, self.volumes.regions.shape[1], self.classification.patch_size)
        mine = slice(self.samples.start, self.samples.stop)
        chosen = chosen[mine]
        return self.volumes.regions[chosen], variation[mine], self.volumes.measures[chosen], self.volumes.targets[chosen]

    def order(self, epoch: int) -> Tensor:
        """The samples of an epoch, drawn under a step that no batch has."""
        schedule = self.classification.schedule
        g = generator(key(self.seed, Purpose.TRAINING, epoch, schedule.iterations_per_epoch))
        num_rounds = math.ceil(schedule.iterations_per_epoch * schedule.batch_size / len(self.volumes))
        return torch.cat([torch.randperm(len(self.volumes), generator=g) for _ in range(num_rounds)])


class nnUNetTrainerCSMClassifier(CSMTrainer):  # noqa: N801, nnU-Net's trainers are named so
    """Train on the samples of a fold's training cases; judge on all validation samples after every epoch.

    Targets come from `classification.csv` in the preprocessed folder, and with them what is learned (`heads/`); patches from the
    preprocessed images and segmentations.
    The encoder is `csm.classification.encoder` of the plans, or the environment variable `nnUNet_csm_encoder`. Writes beside
    nnU-Net's files: progress.png; in validation/, and in test/ for splits with a test side, predictions.csv, summary.json
    and curves.png.
    """

    rests_on = frozenset({"classification"})

    def __init__(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.classification = self.settings.csm.classification
        with exit_on_user_error():
            self.table, self.split = self.read_task()
        self.head = head_of(self.table)
        # the whole validation set
        self.num_val_iterations_per_epoch = 1
        log = self.logger.local_logger.my_fantastic_logging
        for name in [name for name in log if "dice" in name]:
            del log[name]
        log.update({name: [] for name in (*self.head.titles, "crops_per_second")})
        self._best_ema: tuple[float, float] | None = None
        if self.settings.csm.finetuning.mirroring:
            self.inference_allowed_mirroring_axes = (0, 1, 2)
        # nnU-Net calls it on the instance to train, and on the class to predict segmentations
        self.build_network_architecture = self.build_network  # type: ignore[method-assign]

    @staticmethod
    def choose_schedule(csm: Recipe) -> Schedule:
        return csm.classification.schedule

    def read_task(self) -> tuple[ClassTable, dict[str, list[str]]]:
        """The targets, and the cases of this fold by side.

        Raises:
            UserError: no class table, one that names unknown cases, or a split that cannot serve classification.
        """
        preprocessed, dataset = nnunet.folder("nnUNet_preprocessed"), self.plans_manager.dataset_name
        path, splits_file = preprocessed / dataset / FILE_NAME, preprocessed / dataset / self.settings.csm.splits
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; write {FILE_NAME} (case,class[,mask_label,patient]) into the raw dataset folder "
                f"and run `nnunet_csm plan` again"
            )
        table = read_class_table(path, self.dataset_json.get("classes"))
        own = [source for source in self.settings.csm.sources if source.dataset == dataset and source.labelled]
        if not own:
            raise UserError(f"{dataset} has no masks to classify around; fine-tune another dataset from its encoder")
        names = case_names(own[0], preprocessed)
        unknown = sorted({sample.case for sample in table.samples} - set(names))
        if unknown:
            raise UserError(
                f"{path}: {len(unknown)} cases were not preprocessed: {', '.join(unknown[:5])}; correct their names, "
                f"preprocess them, or take their rows out of the table"
            )
        if self.fold == "all":
            problems = split_problems(table, {"train": names})
            sides = {"train": names, "val": names}
        else:
            train, val = split(preprocessed / dataset, names, int(self.fold), splits_file.name)
            sides = {"train": train, "val": val, "test": nnunet.read_splits(splits_file)[int(self.fold)].get("test", [])}
            # not every split has a test side
            sides = {side: cases for side, cases in sides.items() if cases or side != "test"}
            problems = split_problems(table, sides)
        if problems:
            raise UserError(
                f"{splits_file}: fold {self.fold}: {'; '.join(problems[:5])}; split by patient and class with `nnunet_csm split "
                f"-d {nnunet.dataset_id(dataset)} --overwrite`, and train again what was trained by the old splits"
            )
        return table, sides

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """What stock prediction calls: there is no segmentation to be had."""
        with exit_on_user_error():
            raise UserError(
                "these are checkpoints of nnUNetTrainerCSMClassifier, which predicts classes and no segmentation; "
                "use `nnunet_csm classify`, or choose a segmentation trainer with -tr"
            )

    def build_network(
        self,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        num_measures = len(measure_names(self.measured_labels))
        return build_classifier(self.settings, num_input_channels, self.head.num_outputs, num_measures, self.head.in_units)

    @property
    def by_mask_label(self) -> bool:
        return any(sample.mask_label is not None for sample in self.table.samples)

    @property
    def measured_labels(self) -> tuple[int, ...]:
        """Labels whose volumes are among the measures of a mask."""
        return measured_labels(self.label_manager, self.by_mask_label)

    def initialize(self) -> None:
        super().initialize()
        self.dataset_class = without_copies(infer_dataset_class(self.preprocessed_dataset_folder), absent_series(self))
        if self.classification.freeze_encoder:
            self.encoder.requires_grad_(False)

    def _build_loss(self) -> nn.Module:
        """Without what it is to know of the samples that train, which are not read yet."""
        return self.head.build_loss(self.classification)

    def fit_to(self, training: SampleVolumes) -> None:
        """Take from the samples that train what is not learned step by step: what targets are like, how large masks are."""
        self.head.fit(self.loss, self.bare_network, training.targets, self.classification)
        if self.bare_network.measures is not None:
            self.bare_network.measures.fit(training.measures)

    def on_fresh_start(self) -> None:
        self.print_to_log_file(self.head.told())
        start_from_pretrained(self, os.environ.get(ENCODER_VARIABLE, self.classification.encoder))

    def held_out_cases(self) -> list[str]:
        return [case for side in ("val", "test") for case in self.split.get(side, [])]

    def provenance(self) -> dict[str, Any]:
        dataset = self.plans_manager.dataset_name
        return {
            "encoder_source": self.encoder_source,
            "target": self.head.target,
            "classes": list(self.head.classes),
            "mask_labels": sorted({sample.mask_label for sample in self.table.samples if sample.mask_label is not None}),
            "by_mask_label": self.by_mask_label,
            "series": self.settings.architecture.series,
            "training_cases": [run_name(dataset, case) for case in self.split["train"]],
        }

    def restore_provenance(self, saved: dict[str, Any]) -> None:
        self.encoder_source = saved["encoder_source"]

    def check_saved(self, saved: Mapping[str, Any], filename: str) -> None:
        found = head_in(saved)
        if (found.target, found.classes) != (self.head.target, self.head.classes):
            raise UserError(
                f"{filename}: it learned {found.known()}, {FILE_NAME} has {self.head.known()}; restore the table, or start "
                f"afresh without --c"
            )

    def read_side(self, side: str) -> SampleVolumes:
        """Cut the samples of one side of the split, and log what is left out."""
        cases = self.split[side]
        dataset = self.dataset_class(self.preprocessed_dataset_folder, list(cases))

        def load_case(case: str) -> tuple[Any, np.ndarray]:
            data, segmentation, *_ = dataset.load_case(case)
            return data, np.asarray(segmentation[0])

        samples, channels = self.table.of(cases), self.settings.architecture.channels
        volumes = SampleVolumes(samples, load_case, channels, self.classification, self.measured_labels)
        self.print_to_log_file(f"{side}: {len(volumes)} samples, {self.table.counted(volumes.samples)}")
        without = sorted(set(cases) - {sample.case for sample in samples})
        if without:
            self.print_to_log_file(f"left out, without a {self.head.target}: {', '.join(without)}", add_timestamp=False)
        for name, why in volumes.left_out.items():
            self.print_to_log_file(f"WARNING: {name} is left out: {why}", add_timestamp=False)
        lacking = self.table.lacking(volumes.samples)
        if not len(volumes) or (lacking and (side == "train" or self.fold == "all")):
            raise UserError(
                f"{self.preprocessed_dataset_folder}: {side} of fold {self.fold} is left without {', '.join(lacking)}; "
                f"see `nnunet_csm doctor -d {self.plans_manager.dataset_name}`"
            )
        return volumes

    def get_dataloaders(self) -> tuple[Any, Any]:
        with exit_on_user_error():
            check_preprocessed(self.settings.csm.sources, self.plans_manager.dataset_name, nnunet.folder("nnUNet_preprocessed"))
            self.val_volumes = self.read_side("val")
            training = self.val_volumes if self.fold == "all" else self.read_side("train")
        self.fit_to(training)
        make_batch = VariedSamples(training, self.settings, self.samples)
        pin = self.device.type == "cuda"
        # patches are in memory: worker processes would only copy them
        train = batches(make_batch, self.current_epoch, self.num_epochs, self.num_iterations_per_epoch, 0, pin)
        return train, repeat(self.val_volumes)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.classification.freeze_encoder:
            self.encoder.eval()

    def on_device(self, batch: Batch) -> Batch:
        regions, variation, *others = batch
        measures, targets = (one.to(self.device, non_blocking=True) for one in others)
        return regions.to(self.device, non_blocking=True), variation, measures, targets

    def part(self, batch: Batch, samples: slice) -> Batch:
        regions, variation, measures, targets = batch
        return regions[samples], variation[samples], measures[samples], targets[samples]

    def weight(self, batch: Batch) -> Tensor:
        return self.head.weight(self.loss, batch[-1])

    def summed_loss(self, batch: Batch) -> Tensor:
        regions, variation, measures, targets = batch
        patches = vary(regions.float(), variation, self.classification.patch_size)
        with self.autocast():
            outputs = self.learning_network(patches, measures)
        return self.loss(outputs.float(), targets).sum()

    def outputs(self, patches: Tensor, measures: Tensor) -> Tensor:
        with self.autocast(), uncompiled():
            return self.network(patches, measures).float()

    def patches_of(self, volumes: SampleVolumes) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples in batches, as they are, with the measures of their masks."""
        for first in range(0, len(volumes), self.batch_size):
            last = first + self.batch_size
            yield volumes.patches(first, last).to(self.device), volumes.measures[first:last].to(self.device)

    def validation_step(self, batch: SampleVolumes) -> dict:
        outputs = torch.cat([self.outputs(*patches) for patches in self.patches_of(batch)])
        targets = batch.targets.to(self.device)
        loss = self.loss(outputs, targets).sum() / self.head.weight(self.loss, targets)
        return {"val_losses": float(loss), **self.head.score(batch.targets.numpy(), self.head.said(outputs).cpu().numpy())}

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        (output,) = val_outputs
        for name, value in {**output, "crops_per_second": self.progress.crops_per_second}.items():
            self.logger.log(name, value, self.current_epoch)

    def on_epoch_end(self) -> None:
        self.logger.log("epoch_end_timestamps", time.time(), self.current_epoch)
        log = self.logger.local_logger.my_fantastic_logging
        loss, scores = log["val_losses"][-1], {name: log[name][-1] for name in self.head.titles}
        told = {"train_loss": log["train_losses"][-1], "val_loss": loss}
        told |= {title: scores[name] for name, title in self.head.titles.items()}
        self.print_to_log_file("  ".join(f"{name} {value:.4f}" for name, value in told.items()))
        score = (self.head.rank(scores), -loss)
        best = self._best_ema is None or score > tuple(self._best_ema)
        self._best_ema = score if best else self._best_ema
        self.finish_epoch(best, self.save_progress)

    def save_progress(self) -> None:
        log = self.logger.local_logger.my_fantastic_logging
        save_curves(
            Path(self.output_folder) / "progress.png",
            [
                Panel("Loss", {"training": log["train_losses"], "validation": log["val_losses"]}, "epoch", self.head.loss_name),
                *(
                    Panel(panel, {title: log[name] for name, title in metrics.items()}, "epoch", "")
                    for panel, metrics in self.head.curves.items()
                ),
                Panel("Learning rate", {"at the start of the epoch": log["lrs"]}, "epoch", ""),
                Panel("Speed", {"training": log["crops_per_second"]}, "epoch", "patches/s"),
            ],
        )

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the held-out samples, mirrored when the plans say so, and write what there is to know of them."""
        if self.ranks.rank > 0:
            return
        self.network.eval()
        with exit_on_user_error(), self.only_one():
            for side, name in (("val", "validation"), ("test", "test")):
                if side in self.split:
                    self.judge(self.read_side(side), Path(self.output_folder) / name)

    def judge(self, volumes: SampleVolumes, folder: Path) -> None:
        """Write predictions.csv, curves.png and, last, summary.json."""
        folder.mkdir(exist_ok=True)
        mirror, head = self.settings.csm.finetuning.mirroring, self.head
        said = [predictions(self.outputs, *patches, mirror, head.said) for patches in self.patches_of(volumes)]
        about = {
            "case": [sample.case for sample in volumes.samples],
            "mask_label": pd.array([sample.mask_label for sample in volumes.samples], dtype="Int64"),
            "patient": [sample.patient for sample in volumes.samples],
        }
        columns = head.truth(volumes.targets.numpy()) | head.predicted(torch.cat(said).cpu().numpy())
        table = pd.DataFrame(about | columns)
        write_text(folder / "predictions.csv", table.to_csv(index=False))
        scores = head.evaluate(table)
        head.draw(folder / "curves.png", table, f"{folder.name}, fold {self.fold}")
        nnunet.save_json({**scores.to_dict(), "left_out": volumes.left_out}, folder / "summary.json")
        self.print_to_log_file(f"{folder.name}: {scores.to_markdown()}", add_timestamp=False)
