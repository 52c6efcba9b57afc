"""The cases of a pretraining run: which datasets they come from, and on which side of a fold they are."""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_csm.data.properties import read_properties
from nnunet_csm.data.stored import CaseFile, open_volumes
from nnunet_csm.errors import UserError
from nnunet_csm.host_files import check_known
from nnunet_csm.nnunet import NUM_FOLDS, SPLIT_SEED, read_dataset_json, read_json, read_splits, save_json
from nnunet_csm.plans import SPLITS, Source


def fold_files(
    sources: Sequence[Source], series: Sequence[str], preprocessed: Path, fold: int | str, splits: str = SPLITS
) -> tuple[list[CaseFile], list[CaseFile]]:
    """Training and validation cases of all sources.

    Every labelled dataset keeps to its own folds, so that an encoder may start the fine-tuning of the same fold of any of
    them. Images without labels are never validated on, and so train in every fold, unless there is nothing else.

    Args:
        sources: of the plans.
        series: of the run, in the order of the network's series embeddings.
        preprocessed: nnU-Net's folder.
        fold: number of the fold, or "all": then every case is on both sides.
        splits: name of the file with the folds.

    Raises:
        UserError: a folder without cases, too few cases for folds, or a fold that a dataset does not have.
    """
    training: list[CaseFile] = []
    validation: list[CaseFile] = []
    splits_all = not any(source.labelled for source in sources)
    for number, source in enumerate(sources):
        names = case_names(source, preprocessed)
        if fold == "all":
            train, val = names, names
        elif source.labelled or (splits_all and number == 0):
            train, val = split(preprocessed / source.dataset, names, int(fold), splits)
            # training cases of which only the images are to be known
            train += read_splits(preprocessed / source.dataset / splits)[int(fold)].get("unlabelled", [])
        else:
            train, val = names, []
        for names_of_side, files in ((train, training), (val, validation)):
            files += [case_file(source, name, series, preprocessed) for name in sorted(names_of_side)]
    return training, validation


def case_names(source: Source, preprocessed: Path, labels: bool = False) -> list[str]:
    """Sorted identifiers of the preprocessed cases of a source.

    Args:
        source: of the plans.
        preprocessed: nnU-Net's folder.
        labels: they are needed as well as the images.

    Raises:
        UserError: none, or fewer than there are to be.
    """
    folder = preprocessed / source.dataset / source.data_identifier
    files = [f for f in folder.glob("*.b2nd") if not f.name.startswith(".") and not f.name.endswith("_seg.b2nd")]
    names = sorted(f.name.removesuffix(".b2nd") for f in files)
    remedy = f"run `nnunet_csm plan_and_preprocess -d {source.dataset} -preprocess_only` with the name of these plans"
    if not names:
        raise UserError(f"{folder}: no preprocessed case; {remedy}")
    missing = sorted(name for name in expected_cases(source, preprocessed) if not is_complete(folder, name, labels))
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        found = f"{len(names)} cases, {missing[0]}{more} is missing or not whole: preprocessing was stopped"
        raise UserError(f"{folder}: {found}; {remedy}")
    return names


def expected_cases(source: Source, preprocessed: Path) -> set[str]:
    """Cases that a whole preprocessed folder holds, as far as the files beside it tell."""
    folder = preprocessed / source.dataset
    if not source.labelled:
        manifest = folder / f"{source.data_identifier}.manifest.json"
        return set(read_json(manifest, "move it away").get("all_cases", ())) if manifest.is_file() else set()
    copied_json = folder / "dataset.json"
    described = read_dataset_json(copied_json, "copy it from the raw dataset") if copied_json.is_file() else {}
    ending = described.get("file_ending", ".nii.gz")
    copied = {f.name.removesuffix(ending) for f in (folder / "gt_segmentations").glob(f"*{ending}")}
    # nnU-Net copies the labels when it has preprocessed all cases: without them it has not, or never this dataset
    raw = Path(os.environ.get("nnUNet_raw", "")) / source.dataset
    if copied or not (raw / "dataset.json").is_file():
        return copied
    described = read_dataset_json(raw / "dataset.json", "it names the channels, the labels and the file ending")
    return set(get_filenames_of_train_images_and_targets(str(raw), described))


def is_complete(folder: Path, case: str, labels: bool) -> bool:
    """Whether the files of a preprocessed case are there; the last one to be written ends as a pickle does."""
    if not labels:
        return (folder / f"{case}.b2nd").is_file()
    if not all((folder / f"{case}{ending}").is_file() for ending in (".b2nd", "_seg.b2nd", ".pkl")):
        return False
    with (folder / f"{case}.pkl").open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 1))
        return file.read() == pickle.STOP


def check_preprocessed(sources: Sequence[Source], dataset: str, preprocessed: Path) -> None:
    """Look at every file of a dataset with labels before the first step of a training, not when a batch asks for it.

    Raises:
        UserError: one that is missing or not whole.
    """
    for source in sources:
        if source.labelled and source.dataset == dataset:
            for name in case_names(source, preprocessed, labels=True):
                folder = preprocessed / dataset / source.data_identifier
                for ending in (".b2nd", "_seg.b2nd"):
                    open_volumes(folder / f"{name}{ending}")
                read_properties(folder / f"{name}.pkl")


def split(folder: Path, names: Sequence[str], fold: int, splits_file: str = SPLITS) -> tuple[list[str], list[str]]:
    """Training and validation cases of a fold; `splits_final.json` is written as nnU-Net does when there is none."""
    path = folder / splits_file
    if not path.is_file():
        if splits_file != SPLITS:
            raise UserError(f"{path}: no such file, and the plans take their folds from it; start their study again")
        if len(names) < NUM_FOLDS:
            raise UserError(too_few_cases(folder, len(names)))
        save_json(generate_crossval_split([str(name) for name in np.sort(names)], SPLIT_SEED, NUM_FOLDS), path)
    splits = read_splits(path)
    if not fold < len(splits):
        raise UserError(f"{path}: has {len(splits)} folds, fold {fold} is not among them; choose another with -f")
    check_known(splits[fold], names, f"{path}: fold {fold}")
    return [str(name) for name in splits[fold]["train"]], [str(name) for name in splits[fold]["val"]]


def too_few_cases(folder: Path, num_cases: int) -> str:
    """What is said where there are fewer cases than folds."""
    what = f"{num_cases} case{'s' if num_cases > 1 else ''} cannot be split into {NUM_FOLDS} folds"
    return f"{folder}: {what}; use all of them with fold all (-f all), or write {folder / SPLITS}"


def case_file(source: Source, name: str, series: Sequence[str], preprocessed: Path) -> CaseFile:
    """A case as the run sees it: copies that fill in for missing series are left out."""
    absent = source.absent_series.get(name, ())
    return CaseFile(
        name=run_name(source.dataset, name),
        path=preprocessed / source.dataset / source.data_identifier / f"{name}.b2nd",
        num_channels=source.num_channels,
        channels=tuple(None if one in absent else source.channels.get(one) for one in series),
        weight=source.weight,
    )


def run_name(dataset: str, case: str) -> str:
    """Unique over datasets; what a checkpoint says an encoder was learned from."""
    return f"{dataset}/{case}"
