"""`nnUNetTrainerCSM`: fine-tune a segmenter from the pretrained encoder of the same plans and fold (paper III-C)."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunet_csm import nnunet
from nnunet_csm.data.draws import Purpose, What, batches, key, seed_everything
from nnunet_csm.data.sources import check_preprocessed, split
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.export import whole_exports
from nnunet_csm.judging import encoder_share
from nnunet_csm.machine import num_workers
from nnunet_csm.model.compilation import uncompiled
from nnunet_csm.model.outputs import total_loss
from nnunet_csm.plans import SPLITS, STEM_OPENS, Recipe, Schedule
from nnunet_csm.pretext.base import Batch
from nnunet_csm.processes import stoppable
from nnunet_csm.training.averaging import WeightAverage
from nnunet_csm.training.masked_loss import RESTS_ON, MaskedLoss
from nnunet_csm.training.optimization import build_optimizer, build_scheduler
from nnunet_csm.training.pretrained import ENCODER_VARIABLE, absent_series, start_from_pretrained, without_copies
from nnunet_csm.training.ranks import lost_rank_explained
from nnunet_csm.training.trainer import CUDA, CSMTrainer

# voxels on each side that nnU-Net's blur mirrors a patch by: one of no more than these ends the training
WIDEST_BLUR = 3


class KeepAbsentSeriesAbsent(BasicTransform):
    """Apply intensity transforms, then set series that were all zero before them back to zero.

    Noise and the like make an absent series differ from zero, and the segmenter would take it for present.
    """

    def __init__(self, transforms: ComposeTransforms) -> None:
        super().__init__()
        self.transforms = transforms

    def __call__(self, **data: Any) -> dict:
        absent = ~(data["image"] != 0).flatten(1).any(1)
        data = self.transforms(**data)
        if not absent.all():
            data["image"][absent] = 0
        return data


def drop_series(image: Tensor, channels: Sequence[int], share: float, seed: int) -> None:
    """Set some of the series of a sample to zero, which is how a missing series looks, in place.

    As many as cross-series masking hides whole: with p present series, k uniform on [1, p - 1], any k of them.

    Args:
        image: (c, z, y, x).
        channels: of the series of the network.
        share: probability that a sample loses any.
        seed: what is drawn is a function of it.
    """
    draws = np.random.default_rng(seed)
    present = [channel for channel in channels if image[channel].any()]
    if draws.random() < share and len(present) > 1:
        image[draws.permutation(present)[: draws.integers(1, len(present))]] = 0


class AugmentedBatches:
    """Some samples of nnU-Net's batches, each a function of (epoch, step, place in the batch).

    nnU-Net's loader is asked for one sample at a time, so that ranks that share a batch make the samples one rank would.
    """

    def __init__(
        self,
        loader: nnUNetDataLoader,
        batch_size: int,
        samples: range,
        seed: int,
        purpose: Purpose,
        channels: Sequence[int] = (),
        series_dropout: float = 0.0,
        series_dropout_epochs: str = "all",
    ) -> None:
        self.loader, self.samples, self.seed, self.purpose = loader, samples, seed, purpose
        self.channels, self.series_dropout, self.alternating = channels, series_dropout, series_dropout_epochs == "alternating"
        self.first_oversampled = round(batch_size * (1 - loader.oversample_foreground_percent))
        loader.batch_size = 1

    def __call__(self, epoch: int, step: int) -> dict[str, Any]:
        made = [self.sample(epoch, step, number) for number in self.samples]
        return {name: torch.cat([sample[name] for sample in made]) for name in ("data", "target")}

    def sample(self, epoch: int, step: int, place: int) -> dict[str, Any]:
        seed_everything(key(self.seed, self.purpose, epoch, step, place))
        # nnU-Net's rule: the last samples of a batch hold foreground
        self.loader.get_do_oversample = lambda _: place >= self.first_oversampled
        sample = self.loader.generate_train_batch()
        # alternating: the first epoch has all series
        if self.series_dropout > 0 and (epoch % 2 == 1 or not self.alternating):
            for_series = key(self.seed, self.purpose, epoch, step, place, What.SERIES)
            drop_series(sample["data"][0], self.channels, self.series_dropout, for_series)
        return sample


@contextmanager
def no_worker_processes() -> Iterator[None]:
    """While nnU-Net sets up its loaders: we take its loaders and decide ourselves who runs them and in which order."""
    before = os.environ.get("nnUNet_n_proc_DA")
    os.environ["nnUNet_n_proc_DA"] = "0"
    try:
        yield
    finally:
        del os.environ["nnUNet_n_proc_DA"]
        if before is not None:
            os.environ["nnUNet_n_proc_DA"] = before


def stem_opening(done: float, closed: float) -> float:
    """How far the stem is open when a share `done` of the iterations is: not at all for a share `closed`, then more and more."""
    return min(1.0, max(0.0, (done - closed) / min(STEM_OPENS, 1.0 - closed)))


class nnUNetTrainerCSM(CSMTrainer):  # noqa: N801, nnU-Net's trainers are named so
    """nnU-Net's segmentation training with the network, schedule and encoder of the CSM plans.

    Where the encoder comes from is `csm.finetuning.encoder` of the plans, or the environment variable
    `nnUNet_csm_encoder`: auto, all, scratch, or a path.
    """

    rests_on = frozenset(
        {
            "patch_size",
            "finetuning_schedule",
            "frozen_share",
            "stem_closed_share",
            "ema",
            "series_dropout",
            "series_dropout_epochs",
            "masked_loss_weight",
        }
    )
    max_gradient_norm = 12.0  # nnU-Net's
    share: encoder_share.EncoderShare | None = None
    masked: MaskedLoss | None = None

    def __init__(self, plans: dict, configuration: str, fold: int | str, dataset_json: dict, device: torch.device = CUDA) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.settings.csm.finetuning.masked_loss_weight > 0:
            self.rests_on = self.rests_on | RESTS_ON

    @staticmethod
    def choose_schedule(csm: Recipe) -> Schedule:
        return csm.finetuning_schedule

    def initialize(self) -> None:
        super().initialize()
        finetuning = self.settings.csm.finetuning
        self.frozen_share = finetuning.frozen_share
        if finetuning.ema > 0:
            self.average = WeightAverage(self.bare_network, finetuning.ema)

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        if self.settings.csm.finetuning.masked_loss_weight == 0:
            return super().configure_optimizers()
        self.masked = MaskedLoss(self)
        optimizer = build_optimizer(self.masked.learned_with(self.bare_network), self.encoder, self.schedule)
        self.masked.after_steps_of(optimizer)
        return optimizer, build_scheduler(optimizer, self.schedule)

    def before_step(self) -> None:
        super().before_step()
        closed = self.settings.csm.finetuning.stem_closed_share
        if closed > 0:
            self.bare_network.open_stem(stem_opening(self.iteration / self.schedule.num_iterations, closed))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        last = self.current_epoch == self.num_epochs - 1
        self.share = encoder_share.EncoderShare(self.bare_network) if last else None

    def on_fresh_start(self) -> None:
        name = self.plans_manager.dataset_name
        if not any(source.labelled for source in self.settings.csm.sources if source.dataset == name):
            raise UserError(f"{name} has no labels to fine-tune on; fine-tune another dataset from its encoder")
        if self.settings.architecture.fusion_settings.refinement != "none" and self.label_manager.has_regions:
            raise UserError(
                f"{name} is trained on regions, which overlap: the refinement of uncertain voxels (fusion.refinement in "
                f"arch_kwargs) wants classes that exclude each other; make it 'none'"
            )
        if min(self.settings.patch_size) <= WIDEST_BLUR:
            self.print_to_log_file("Patches are too thin for nnU-Net's blur, which is left out of the augmentation")
        finetuning = self.settings.csm.finetuning
        start_from_pretrained(self, os.environ.get(ENCODER_VARIABLE, finetuning.encoder), finetuning.transferred_blocks)
        if self.masked is not None:
            self.masked.start()

    def provenance(self) -> dict[str, Any]:
        masked = {} if self.masked is None else {"masked_loss_weights": self.masked.own_weights()}
        return {"encoder_source": self.encoder_source, **masked}

    def restore_provenance(self, saved: dict[str, Any]) -> None:
        self.encoder_source = saved["encoder_source"]
        if self.masked is not None:
            self.masked.load(saved["masked_loss_weights"])

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802, nnU-Net's spelling
        result = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        if not self.settings.csm.finetuning.mirroring:
            self.inference_allowed_mirroring_axes = None
        return result

    @staticmethod
    def get_training_transforms(*args: Any, **kwargs: Any) -> BasicTransform:
        transforms = CSMTrainer.get_training_transforms(*args, **kwargs)
        for transform in transforms.transforms:
            inner = getattr(transform, "transform", transform)
            if isinstance(inner, GaussianBlurTransform):
                # it would time two implementations and keep the faster: not a function of the key
                inner.benchmark = False
        # spatial transforms come first; what is left of a series after them is what the network may see
        first = next(i for i, transform in enumerate(transforms.transforms) if isinstance(transform, RandomTransform))
        spatial, intensity = transforms.transforms[:first], transforms.transforms[first:]
        if min(kwargs.get("patch_size", args[0] if args else ())) <= WIDEST_BLUR:
            intensity = [one for one in intensity if not isinstance(getattr(one, "transform", one), GaussianBlurTransform)]
        return ComposeTransforms([*spatial, KeepAbsentSeriesAbsent(ComposeTransforms(intensity))])

    def do_split(self) -> tuple[list[str], list[str]]:
        absent = absent_series(self)
        if absent:
            # before anything of nnU-Net's opens a case
            self.dataset_class = without_copies(infer_dataset_class(self.preprocessed_dataset_folder), absent)
        if self.fold == "all":
            return super().do_split()
        folder, splits = Path(self.preprocessed_dataset_folder_base), self.settings.csm.splits
        cases = infer_dataset_class(self.preprocessed_dataset_folder).get_identifiers(self.preprocessed_dataset_folder)
        with exit_on_user_error():
            # nnU-Net knows one file only, writes it under its name while another rank may read it, and splits at random for a
            # fold that the file does not have
            training, validation = split(folder, cases, int(self.fold), splits)
        if splits == SPLITS:
            return super().do_split()
        numbers = f"{len(training)} training and {len(validation)} validation cases"
        self.print_to_log_file(f"Fold {self.fold} of {splits}: {numbers}")
        return training, validation

    def get_dataloaders(self) -> tuple[Iterator[dict], Iterator[dict]]:
        with exit_on_user_error():
            check_preprocessed(self.settings.csm.sources, self.plans_manager.dataset_name, nnunet.folder("nnUNet_preprocessed"))
            if self.masked is not None:
                self.masked.open_images()
        with no_worker_processes():
            training, validation = super().get_dataloaders()
        pin = self.device.type == "cuda"
        num_train, num_val = self.num_iterations_per_epoch, self.num_val_iterations_per_epoch
        workers = num_workers(self.device)
        shared = self.schedule.batch_size, self.samples, self.settings.csm.seed
        finetuning = self.settings.csm.finetuning
        dropout = self.settings.architecture.channels, finetuning.series_dropout, finetuning.series_dropout_epochs
        make_train = AugmentedBatches(training.data_loader, *shared, Purpose.TRAINING, *dropout)
        make_val = AugmentedBatches(validation.data_loader, *shared, Purpose.VALIDATION)
        return (
            batches(make_train, self.current_epoch, self.num_epochs, num_train, workers, pin),
            batches(make_val, self.current_epoch, self.num_epochs, num_val, workers // 2, pin),
        )

    def _build_loss(self) -> nn.Module:
        with self.shared_by_nnunet():
            # Dice over the batch of all ranks, where nnU-Net planned one over batches
            loss: Any = super()._build_loss()
        if self.compiles:
            loss.dc = torch.compile(loss.dc)
        return loss

    def on_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def parts(self, batch: dict[str, Tensor]) -> list[Any]:
        # the last part is the one with which ranks exchange gradients of the segmenter
        return [*(self.masked.parts() if self.masked else ()), *super().parts(batch)]

    def part(self, batch: dict[str, Tensor], samples: slice) -> dict[str, Tensor]:
        return {name: tensor[samples] for name, tensor in batch.items()}

    def weight(self, batch: dict[str, Tensor]) -> Tensor:
        """The number of samples."""
        # filled there: copied from here it would wait for the GPU
        return torch.full((), float(len(batch["data"])), device=self.device)

    def summed_loss(self, batch: dict[str, Tensor] | Batch) -> Tensor:
        with self.autocast():
            if isinstance(batch, Batch):
                assert self.masked is not None
                return self.masked(batch)
            result = self.learning_network(batch["data"])
            return total_loss(result, lambda logits: self.loss(logits.float(), batch["target"])) * len(batch["data"])

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        super().on_train_epoch_end(train_outputs)
        if self.masked is not None:
            self.print_to_log_file(self.masked.said())

    def validation_step(self, batch: dict) -> dict:
        with self.averaged(), uncompiled():
            if self.share is None:
                return super().validation_step(batch)
            # nnU-Net changes what is to be ignored in place
            again = {name: value.clone() if isinstance(value, Tensor) else value for name, value in batch.items()}
            own = super().validation_step(batch)
            network = self.network
            self.network = self.share.network
            try:
                self.share.add(own, super().validation_step(again))
            finally:
                self.network = network
            return own

    def averaged(self) -> AbstractContextManager[None]:
        """The network has the averaged weights, if there are any."""
        return nullcontext() if self.average is None else self.average.in_charge()

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        with self.shared_by_nnunet():
            super().on_validation_epoch_end(val_outputs)
        if self.share is not None:
            counted = [sums for sums in self.ranks.gather(self.share.sums) if sums is not None]
            dice = encoder_share.as_dice(np.sum(counted, axis=0)) if counted else {}
            if line := encoder_share.said(dice):
                self.print_to_log_file(line)
            if self.ranks.rank == 0:
                nnunet.save_json(dice, Path(self.output_folder) / encoder_share.FILE)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        with (
            exit_on_user_error(),
            lost_rank_explained(self.ranks),
            self.only_one(),
            self.shared_by_nnunet(),
            self.averaged(),
            uncompiled(),
            stoppable("the training is done; go on with --c, which makes its final validation"),
            whole_exports(nnUNetTrainer, Path(self.output_folder) / "validation"),
        ):
            super().perform_actual_validation(save_probabilities)
