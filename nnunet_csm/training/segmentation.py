"""`nnUNetTrainerCSM`: fine-tune a segmenter from the pretrained encoder of the same plans and fold (paper III-C)."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class, nnUNetBaseDataset

from nnunet_csm.data.draws import Purpose, batches, seed_everything
from nnunet_csm.data.sources import run_name
from nnunet_csm.errors import UserError
from nnunet_csm.model.transfer import as_table, read_encoder, transfer
from nnunet_csm.plans import Recipe, Schedule
from nnunet_csm.training.host import CSMTrainer, num_workers

ENCODER_VARIABLE = "nnUNet_csm_encoder"
PRETRAINER = "nnUNetTrainerCSMPretrain"


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


class AugmentedBatches:
    """nnU-Net's batches, each a function of (epoch, step)."""

    def __init__(self, loader: nnUNetDataLoader, make_key: Callable[..., int], purpose: Purpose) -> None:
        self.loader, self.make_key, self.purpose = loader, make_key, purpose

    def __call__(self, epoch: int, step: int) -> dict[str, Any]:
        seed_everything(self.make_key(self.purpose, epoch, step))
        return self.loader.generate_train_batch()


def without_copies(dataset_class: type[nnUNetBaseDataset], absent: Mapping[str, Sequence[int]]) -> type[nnUNetBaseDataset]:
    """nnU-Net's class of preprocessed cases, with the given channels of some cases read as zero."""

    def load_case(self: nnUNetBaseDataset, identifier: str) -> tuple:
        data, *others = dataset_class.load_case(self, identifier)
        if identifier in absent:
            data = np.array(data[:])
            data[list(absent[identifier])] = 0
        return data, *others

    return type(dataset_class.__name__, (dataset_class,), {"load_case": load_case})


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


class nnUNetTrainerCSM(CSMTrainer):  # noqa: N801, nnU-Net's trainers are named so
    """nnU-Net's segmentation training with the network, schedule and encoder of the CSM plans.

    Where the encoder comes from is `csm.finetuning.encoder` of the plans, or the environment variable
    `nnUNet_csm_encoder`: auto, all, scratch, or a path.
    """

    encoder_source: str = "-pretrained_weights"

    @staticmethod
    def choose_schedule(csm: Recipe) -> Schedule:
        return csm.finetuning_schedule

    def initialize(self) -> None:
        super().initialize()
        self.untrained_embedding = self.encoder.embedding.weight.detach().cpu().clone()

    def on_fresh_start(self) -> None:
        if not self.untrained_embedding.equal(self.encoder.embedding.weight.detach().cpu()):
            self.print_to_log_file("Weights were given with -pretrained_weights; no pretrained encoder is looked for")
            return
        wanted = os.environ.get(ENCODER_VARIABLE, self.settings.csm.finetuning.encoder)
        if wanted == "scratch":
            self.encoder_source = wanted
            self.print_to_log_file("Training from scratch, as set; no pretrained encoder is used")
            return
        owner = self.settings.csm.sources[0].dataset
        path = find_encoder(wanted, Path(self.output_folder_base), owner, self.fold)
        pretrained = read_encoder(str(path))
        if self.fold != "all":
            dataset = self.plans_manager.dataset_name
            seen = set(pretrained.training_cases) & {run_name(dataset, case) for case in self.do_split()[1]}
            if seen:
                self.print_to_log_file(
                    f"WARNING: {path} saw the images (never the labels) of {len(seen)} validation cases of fold {self.fold}; "
                    f"validation scores of this run are too good"
                )
        rows = transfer(pretrained, self.encoder, self.settings.architecture)
        self.encoder_source = str(path)
        self.print_to_log_file(f"Encoder from {path}:\n{as_table(rows)}", add_timestamp=False)

    def provenance(self) -> dict[str, Any]:
        return {"encoder_source": self.encoder_source}

    def restore_provenance(self, saved: dict[str, Any]) -> None:
        self.encoder_source = saved["encoder_source"]

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
        return ComposeTransforms([*spatial, KeepAbsentSeriesAbsent(ComposeTransforms(intensity))])

    def do_split(self) -> tuple[list[str], list[str]]:
        absent = self.absent_series()
        if absent:
            # before anything of nnU-Net's opens a case
            self.dataset_class = without_copies(infer_dataset_class(self.preprocessed_dataset_folder), absent)
        return super().do_split()

    def absent_series(self) -> dict[str, list[int]]:
        """Channels, by case, that hold a copy of another series and count as absent."""
        own = [s for s in self.settings.csm.sources if s.dataset == self.plans_manager.dataset_name and s.labelled]
        return {
            case: [source.channels[name] for name in names if name in source.channels]
            for source in own
            for case, names in source.absent_series.items()
        }

    def get_dataloaders(self) -> tuple[Iterator[dict], Iterator[dict]]:
        with no_worker_processes():
            training, validation = super().get_dataloaders()
        pin = self.device.type == "cuda"
        num_train, num_val = self.num_iterations_per_epoch, self.num_val_iterations_per_epoch
        workers = num_workers(self.device)
        make_train = AugmentedBatches(training.data_loader, self.key, Purpose.TRAINING)
        make_val = AugmentedBatches(validation.data_loader, self.key, Purpose.VALIDATION)
        return (
            batches(make_train, self.current_epoch, self.num_epochs, num_train, workers, pin),
            batches(make_val, self.current_epoch, self.num_epochs, num_val, workers // 2, pin),
        )

    def train_step(self, batch: dict) -> dict:
        self.before_step()
        output = super().train_step(batch)
        self.progress.step(float(output["loss"]))
        return output


def find_encoder(wanted: str, output_folder: Path, owner: str, fold: int | str) -> Path:
    """The checkpoint that fine-tuning starts from.

    Args:
        wanted: auto (that of the same fold), all (that of fold all), or a path.
        output_folder: where fine-tuning of these plans writes, above the fold.
        owner: the dataset that the pretraining belongs to, by joint plans another one than that of `output_folder`.
        fold: the fold being fine-tuned.

    Raises:
        UserError: there is none; the message offers what there is.
    """
    pretraining = output_folder.parent.with_name(owner) / output_folder.name.replace(nnUNetTrainerCSM.__name__, PRETRAINER, 1)
    if wanted not in ("auto", "all"):
        if not Path(wanted).is_file():
            raise UserError(f"{wanted}: no such checkpoint; {ENCODER_VARIABLE} takes auto, all, scratch or a path")
        return Path(wanted)
    folder = pretraining / f"fold_{fold if wanted == 'auto' else 'all'}"
    path = folder / "checkpoint_final.pth"
    if path.is_file():
        return path
    remedies = [f"pretrain with `nnUNetv2_train ... {folder.name.removeprefix('fold_')} -tr {PRETRAINER}`"]
    if (folder / "checkpoint_latest.pth").is_file():
        remedies = [f"finish the pretraining that was begun there with `nnUNetv2_train ... -tr {PRETRAINER} --c`"]
    if (pretraining / "fold_all" / "checkpoint_final.pth").is_file():
        remedies.append(f"use that of fold all, which saw this fold's validation images, with {ENCODER_VARIABLE}=all")
    remedies.append(f"train from scratch with {ENCODER_VARIABLE}=scratch")
    raise UserError(f"{path}: no pretrained encoder; {'; or '.join(remedies)}")
