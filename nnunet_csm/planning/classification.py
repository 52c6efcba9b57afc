"""What classification needs before training: the class table where the trainer looks for it, folds by class, sizes of masks."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool
from tqdm import tqdm

from nnunet_csm import nnunet
from nnunet_csm.data.diagnoses import (
    FILE_NAME,
    ClassTable,
    Sample,
    read_class_table,
    told_order,
    write_class_table,
)
from nnunet_csm.data.lesions import box_of, sample_mask
from nnunet_csm.data.splits import repeated_splits, split_problems, stratified_folds
from nnunet_csm.errors import UserError
from nnunet_csm.fingerprint.record import FILE_NAME as FINGERPRINT
from nnunet_csm.fingerprint.record import Fingerprint, read_fingerprint
from nnunet_csm.listing import files_in
from nnunet_csm.raw.check import load_dataset_json
from nnunet_csm.raw.manifest import patients_of
from nnunet_csm.raw.subjects import CaseError, Volume
from nnunet_csm.raw.volumes import read_volume

SPLITS = "splits_final.json"
Extent = tuple[float, float, float]
# a patch is to hold the masks of this share of the samples whole
SHARE_WITHIN_PATCH = 75
# and, where all are shown at one scale, of this share
SHARE_AT_ONE_SCALE = 95


def take_class_table(name: str, dataset_json: Mapping[str, Any]) -> ClassTable | None:
    """Copy the class table from the raw dataset to the preprocessed one and read it; None when there is none.

    Test cases, which have no preprocessed images to train on, are left out of the copy. What the raw dataset.json says of the
    order of the classes goes into the preprocessed one, `dataset_json`, which trainers read.
    Writes folds by patient and class where the dataset has no folds yet: they then serve all trainers.
    """
    raw, folder = nnunet.folder("nnUNet_raw") / name, nnunet.folder("nnUNet_preprocessed") / name
    classes = dataset_json.get("classes")
    if (raw / FILE_NAME).is_file():
        if (raw / "dataset.json").is_file() and (chosen := load_dataset_json(raw).get("classes", classes)) != classes:
            classes = chosen
            nnunet.save_json({**dataset_json, "classes": classes}, folder / "dataset.json")
        everything = read_class_table(raw / FILE_NAME, classes)
        test = set(test_cases(name)) - set(training_cases(name)) if (raw / "dataset.json").is_file() else set()
        write_class_table(everything.only({sample.case for sample in everything.samples} - test), folder / FILE_NAME)
    if not (folder / FILE_NAME).is_file():
        return None
    table = read_class_table(folder / FILE_NAME, classes)
    if not (raw / "dataset.json").is_file():
        return table
    table = table.only(training_cases(name))
    if not (folder / SPLITS).is_file() and len({sample.patient for sample in table.samples}) >= 5:
        write_splits(name, with_other_cases(stratified_folds(table), table, name), overwrite=False)
    return table


def with_other_cases(splits: Sequence[Mapping[str, list[str]]], table: ClassTable, name: str) -> list[dict[str, list[str]]]:
    """The splits with all cases of the dataset, for the other trainers.

    Those without a class are where others of their patient are, as the converter's manifest tells, else they train.
    """
    others = set(training_cases(name)) - {sample.case for sample in table.samples}
    patients = patients_of(nnunet.folder("nnUNet_raw") / name)
    found = []
    for split in splits:
        side = {sample.patient: where for where, cases in split.items() for sample in table.of(cases)}
        added = {case: side.get(patients.get(case, case), "train") for case in others}
        found.append({where: sorted([*cases, *(c for c in others if added[c] == where)]) for where, cases in split.items()})
    return found


def training_cases(name: str) -> list[str]:
    """Identifiers of the labelled cases of a raw dataset."""
    raw = nnunet.folder("nnUNet_raw") / name
    dataset_json = load_dataset_json(raw)
    if "dataset" in dataset_json:
        return sorted(dataset_json["dataset"])
    ending = dataset_json["file_ending"]
    return [file.name.removesuffix(ending) for file in files_in(raw / "labelsTr", ending)]


def test_cases(name: str) -> list[str]:
    """Identifiers of the cases in imagesTs."""
    raw = nnunet.folder("nnUNet_raw") / name
    ending = load_dataset_json(raw)["file_ending"]
    return sorted({file.name.removesuffix(ending)[:-5] for file in files_in(raw / "imagesTs", ending)})


def write_splits(name: str, splits: Sequence[Mapping[str, list[str]]], overwrite: bool) -> Path:
    """Write `splits_final.json`, which all trainers read.

    Raises:
        UserError: there is another one; encoders and networks trained by it would meet cases they have seen.
    """
    path = nnunet.folder("nnUNet_preprocessed") / name / SPLITS
    if path.is_file() and not overwrite and nnunet.read_splits(path) != list(splits):
        raise UserError(f"{path}: has other splits, which trained encoders may rest on; give --overwrite to replace them")
    path.parent.mkdir(parents=True, exist_ok=True)
    nnunet.save_json(list(splits), path)
    return path


def split_dataset(dataset: str, num_repeats: int | None, seed: int, overwrite: bool) -> None:
    """`nnunet_csm split`: five folds, or repeats of 8:1:1, by patient and stratified by class, or by the size of a number.

    Raises:
        UserError: no class table, too few patients, other splits without `overwrite`, a number that is none of repeats or a seed.
    """
    if num_repeats is not None and num_repeats < 1:
        raise UserError(f"-repeats {num_repeats} leaves nothing to train on; give 1 or more, or leave it out for five folds")
    if seed < 0:
        raise UserError(f"-seed {seed} is below 0; give 0 or more")
    name = nnunet.dataset_name(dataset)
    raw = nnunet.folder("nnUNet_raw") / name
    dataset_json = load_dataset_json(raw)
    if not (raw / FILE_NAME).is_file():
        raise UserError(
            f"{raw / FILE_NAME}: no such file; write case,class[,mask_label,patient] to split by class, or case,value by number"
        )
    table = read_class_table(raw / FILE_NAME, dataset_json.get("classes")).only(training_cases(name))
    splits = repeated_splits(table, num_repeats, seed) if num_repeats else stratified_folds(table, seed=seed)
    path = write_splits(name, with_other_cases(splits, table, name), overwrite)
    for line in fold_lines(table, nnunet.read_splits(path)):
        print(line)
    print(f"written to {path}")


def check_classification(name: str) -> tuple[list[str], list[str]]:
    """Count the classes, or describe the numbers, of a raw dataset by series and fold.

    Returns:
        Lines to print, and what is wrong.

    Raises:
        UserError: a class table or splits that cannot be read.
    """
    raw, folder = nnunet.folder("nnUNet_raw") / name, nnunet.folder("nnUNet_preprocessed") / name
    dataset_json = load_dataset_json(raw)
    known, test = set(training_cases(name)), set(test_cases(name))
    everything = read_class_table(raw / FILE_NAME, dataset_json.get("classes"))
    table = everything.only(known)
    patients = {sample.patient for sample in table.samples}
    lines = [f"{len(table.samples)} samples of {len(patients)} patients: {table.counted(table.samples)}"]
    lines += [told_order(table.classes)] if table.classes else []
    strangers = {sample.case: None for sample in everything.samples if sample.case not in known | test}
    wrong = [f"{case} has a {table.target}, but no mask in {raw / 'labelsTr'}" for case in strangers]
    both = patients & {sample.patient for sample in everything.of(test - known)}
    wrong += [f"patient {patient} has training cases and test cases" for patient in sorted(both)]
    if without := sorted(known - {sample.case for sample in table.samples}):
        more = " ..." if len(without) > 10 else ""
        wrong.append(f"{len(without)} cases without a {table.target}, left out: {', '.join(without[:10])}{more}")
    extents = mask_extents(raw, dataset_json, table)
    wrong += [f"{sample.name}: {extent}" for sample, extent in extents.items() if isinstance(extent, str)]
    if (folder / FINGERPRINT).is_file():
        lines += series_lines(table, read_fingerprint(folder / FINGERPRINT))
    else:
        lines.append("which series they have: `nnunet_csm plan` counts it")
    if (folder / SPLITS).is_file():
        splits = nnunet.read_splits(folder / SPLITS)
        lines += fold_lines(table, splits)
        wrong += [f"fold {number}: {problem}" for number, split in enumerate(splits) for problem in split_problems(table, split)]
    else:
        lines.append(
            f"no {folder / SPLITS} yet: `nnunet_csm plan` or `nnunet_csm split` writes it, by patient and {table.target}"
        )
    return lines, wrong


def series_lines(table: ClassTable, fingerprint: Fingerprint) -> list[str]:
    """How many samples, of each class where there are classes, have each series."""
    lines = []
    total = Counter(sample.class_index for sample in table.samples)
    for name in fingerprint.series:
        cases = {case for case, record in fingerprint.cases.items() if record.series[name].absent is None}
        have = Counter(sample.class_index for sample in table.of(cases))
        counts = [f"{have[i]} of {total[i]} {one}" for i, one in enumerate(table.classes)]
        lines.append(f"{name}: {', '.join(counts) or f'{have.total()} of {total.total()} samples'}")
    return lines


def fold_lines(table: ClassTable, splits: Sequence[Mapping[str, Sequence[str]]]) -> list[str]:
    """Samples by class, or the distribution of numbers, on every side of every split."""
    lines = []
    for number, split in enumerate(splits):
        sides = [f"{side} {table.counted(table.of(cases))}" for side, cases in split.items()]
        lines.append(f"fold {number}: {'; '.join(sides)}")
    return lines


def extent_to_hold(
    extents: Iterable[Extent | str], base_plans: Mapping[str, Any], share: int = SHARE_WITHIN_PATCH
) -> Extent | None:
    """What `share` percent of the masks do not exceed, mm along (z, y, x) of the plans; None when none was measured."""
    found = [extent for extent in extents if not isinstance(extent, str)]
    if not found:
        return None
    z, y, x = np.percentile(np.array(found)[:, base_plans["transpose_forward"]], share, axis=0)
    return float(z), float(y), float(x)


def mask_extents(raw: Path, dataset_json: Mapping[str, Any], table: ClassTable) -> dict[Sample, Extent | str]:
    """Sample to the lengths of its mask's box in mm along (z, y, x) of the file, or to why it has none."""
    ending, listed = dataset_json["file_ending"], dataset_json.get("dataset", {})
    extents: dict[Sample, Extent | str] = {}
    cases = {sample.case: table.of([sample.case]) for sample in table.samples}
    for case, samples in tqdm(cases.items(), "measuring masks", unit="case", disable=None, leave=False):
        path = raw / os.path.expandvars(listed[case]["label"]) if case in listed else raw / "labelsTr" / f"{case}{ending}"
        if not path.is_file():
            continue
        try:
            image = read_volume(Volume(path))
        except CaseError as error:
            extents |= dict.fromkeys(samples, str(error))
            continue
        mask, spacing = sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]
        for sample in samples:
            extents[sample] = extent(sample_mask(sample, mask), spacing)
    return extents


def extent(mask: Bool[np.ndarray, "z y x"], spacing: Sequence[float]) -> Extent | str:
    """Lengths of the box around a mask, in mm, or that it is empty."""
    if not mask.any():
        return "its mask is empty"
    z, y, x = (float(length * step) for length, step in zip(box_of(mask)[1], spacing, strict=True))
    return z, y, x
