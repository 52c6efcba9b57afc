"""What fine-tuning starts from: a pretrained encoder, and cases without the copies that stand in for missing series."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.sources import run_name
from nnunet_csm.errors import UserError
from nnunet_csm.hub import find_weights
from nnunet_csm.model.transfer import as_table, read_encoder, transfer
from nnunet_csm.plans import Configuration, read_configuration
from nnunet_csm.pretext.base import setup_of
from nnunet_csm.training.trainer import CSMTrainer

ENCODER_VARIABLE = "nnUNet_csm_encoder"
PRETRAINER = "nnUNetTrainerCSMPretrain"


def find_encoder(wanted: str, output_folder: Path, trainer: str, owner: str, fold: int | str) -> Path:
    """The checkpoint, or folder of weights, that fine-tuning starts from.

    Args:
        wanted: auto (that of the same fold), all (that of fold all), or what `hub.find_weights` takes.
        output_folder: where fine-tuning of these plans writes, above the fold.
        trainer: the one that fine-tunes.
        owner: the dataset that the pretraining belongs to, by joint plans another one than that of `output_folder`.
        fold: the fold being fine-tuned.

    Raises:
        UserError: there is none; the message offers what there is.
    """
    pretraining = output_folder.parent.with_name(owner) / output_folder.name.replace(trainer, PRETRAINER, 1)
    if wanted not in ("auto", "all"):
        return find_weights(wanted)
    folder = pretraining / f"fold_{fold if wanted == 'auto' else 'all'}"
    path = folder / "checkpoint_final.pth"
    if path.is_file():
        return path
    remedies = [f"pretrain with `nnUNetv2_train ... {folder.name.removeprefix('fold_')} -tr {PRETRAINER}`"]
    if (folder / "checkpoint_latest.pth").is_file():
        remedies = [f"finish the pretraining that was begun there with `nnUNetv2_train ... -tr {PRETRAINER} --c`"]
    best = folder / "checkpoint_best.pth"
    if best.is_file():
        remedies.append(f"use the weights of its lowest validation loss so far with {ENCODER_VARIABLE}={best}")
    if (pretraining / "fold_all" / "checkpoint_final.pth").is_file():
        remedies.append(f"use that of fold all, which saw this fold's validation images, with {ENCODER_VARIABLE}=all")
    remedies.append(f"train from scratch with {ENCODER_VARIABLE}=scratch")
    raise UserError(f"{path}: no pretrained encoder; {'; or '.join(remedies)}")


def start_from_pretrained(trainer: CSMTrainer, wanted: str, num_blocks: int | None = None) -> None:
    """Load the pretrained encoder and say where it comes from, unless weights were given with -pretrained_weights.

    Args:
        trainer: before its first step.
        wanted: scratch, or what `find_encoder` takes.
        num_blocks: see `transfer`.
    """
    if not trainer.untrained_embedding.equal(trainer.first_layer()):
        trainer.print_to_log_file("Weights were given with -pretrained_weights; no pretrained encoder is looked for")
        return
    if wanted == "scratch":
        trainer.encoder_source = wanted
        trainer.print_to_log_file("Training from scratch, as set; no pretrained encoder is used")
        return
    owner = trainer.settings.csm.sources[0].dataset
    path = find_encoder(wanted, Path(trainer.output_folder_base), type(trainer).__name__, owner, trainer.fold)
    pretrained = read_encoder(str(path))
    if wanted in ("auto", "all"):
        check_recipe(path, trainer.settings)
    if trainer.fold != "all":
        dataset = trainer.plans_manager.dataset_name
        if not pretrained.training_cases:
            trainer.print_to_log_file(f"{path} does not name the cases it learned from; held-out ones may be among them")
        seen = set(pretrained.training_cases) & {run_name(dataset, case) for case in held_out_cases(trainer)}
        if seen:
            trainer.print_to_log_file(
                f"WARNING: {path} saw the images (never the labels) of {len(seen)} held-out cases of fold {trainer.fold}; "
                f"scores of this run are too good"
            )
    rows = transfer(pretrained, trainer.encoder, trainer.settings.architecture, num_blocks)
    trainer.encoder_source = str(path)
    trainer.print_to_log_file(f"Encoder from {path}:\n{as_table(rows)}", add_timestamp=False)


def check_recipe(path: Path, settings: Configuration) -> None:
    """Raise UserError when an encoder that nobody chose by its path was pretrained by another recipe than that of the plans."""
    init_args = checkpoint.load(path)["init_args"]
    try:
        then = read_configuration(init_args["plans"], init_args["configuration"], str(path))
        recipes = [recipe_of(one, str(path)) for one in (then, settings)]
    except UserError:
        return  # of another version: what it has to fit in is compared all the same
    for name, expected in recipes[1].items():
        found = recipes[0].get(name)
        if found != expected:
            raise UserError(
                f"{path}: was pretrained with {name} {found}, the plans say {expected}: they were made anew since. Pretrain "
                f"again, or choose this encoder by its path ({ENCODER_VARIABLE}={path}), or restore the plans"
            )


def recipe_of(settings: Configuration, where: str) -> dict[str, Any]:
    """What a pretraining rests on beside the network, by name; defaults as if they were spelled out."""
    pretext, setup = setup_of(settings, where)
    return {
        "pretext.name": pretext.__name__,
        **{f"pretext.{name}": value for name, value in vars(setup.settings).items()},
        **{f"pretraining.{name}": value for name, value in vars(settings.csm.pretraining).items()},
        "pretraining_patch_size": settings.csm.pretraining_patch_size,
        "sources": settings.csm.sources,
    }


def held_out_cases(trainer: CSMTrainer) -> Sequence[str]:
    """Cases that scores of this fold are computed on: its validation cases, and those of a test side where there is one."""
    validation = trainer.do_split()[1]
    splits = nnunet.read_splits(Path(trainer.preprocessed_dataset_folder_base) / trainer.settings.csm.splits)
    return [*validation, *splits[int(trainer.fold)].get("test", [])]


def absent_series(trainer: CSMTrainer) -> dict[str, list[int]]:
    """Channels, by case, that hold a copy of another series and count as absent."""
    own = [s for s in trainer.settings.csm.sources if s.dataset == trainer.plans_manager.dataset_name and s.labelled]
    return {
        case: [source.channels[name] for name in names if name in source.channels]
        for source in own
        for case, names in source.absent_series.items()
    }


def without_copies(dataset_class: type[nnUNetBaseDataset], absent: Mapping[str, Sequence[int]]) -> type[nnUNetBaseDataset]:
    """nnU-Net's class of preprocessed cases, with the given channels of some cases read as zero."""

    def load_case(self: nnUNetBaseDataset, identifier: str) -> tuple:
        data, *others = dataset_class.load_case(self, identifier)
        if identifier in absent:
            data = np.array(data[:])
            data[list(absent[identifier])] = 0
        return data, *others

    return type(dataset_class.__name__, (dataset_class,), {"load_case": load_case})
