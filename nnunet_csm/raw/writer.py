"""Cases of a release to an nnU-Net raw dataset: one grid a case, zeros for a missing series, a manifest of what was done.

The dataset is written into a hidden folder and takes its name when it is complete and verified: a conversion that was stopped
leaves nothing that looks like a dataset.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from nnunet_csm.data.diagnoses import COLUMNS, alike_classes
from nnunet_csm.data.diagnoses import FILE_NAME as CLASSES
from nnunet_csm.errors import UserError
from nnunet_csm.files import whole_folder
from nnunet_csm.listing import name_problem
from nnunet_csm.machine import in_processes, num_cores
from nnunet_csm.nnunet import NUM_FOLDS, SPLIT_SEED, save_json
from nnunet_csm.raw.cases import FILE_ENDING, write_case
from nnunet_csm.raw.check import check_dataset
from nnunet_csm.raw.grid import FINEST
from nnunet_csm.raw.manifest import NUM_LISTED, save_manifest, summary
from nnunet_csm.raw.subjects import Case, CaseError, Dataset

SPLITS = "splits_final.json"  # nnU-Net's planner takes it from here
LEFT_OUT = "left_out.csv"
MOST_REASONS = 10  # why cases cannot be used, told at once


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        folder: of the dataset.
        num_training, num_test: cases in it.
        left_out: case to the reason why it is not.
        lines: the summary to print.
    """

    folder: Path
    num_training: int
    num_test: int
    left_out: Mapping[str, str]
    lines: tuple[str, ...]


def write_dataset(
    cases: Iterable[Case],
    dataset: Dataset,
    raw_folder: Path,
    reference: str = FINEST,
    register: bool = False,
    zero_background: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    num_processes: int | None = None,
    left_out: Mapping[str, str] | None = None,
) -> Report:
    """Write `raw_folder/DatasetXXX_Name`: imagesTr/Ts, labelsTr/Ts, dataset.json, and beside them what nnU-Net does not read.

    These are csm_manifest.json (per case and series: source, hash, grids, what was done), classification.csv (when there is a
    diagnosis), splits_final.json (when a patient has several training cases; nnU-Net's planner takes it over) and left_out.csv.

    Args:
        cases: with `images` by the names in `dataset.series`.
        dataset: what dataset.json says.
        raw_folder: nnU-Net's `nnUNet_raw`.
        reference: the series whose grid a case gets, or "finest".
        register: move every series rigidly onto the reference where that helps, beyond what the headers say.
        zero_background: shift the values of series whose background is not 0, so that it is.
        overwrite: replace a dataset of this name, once the new one is complete.
        strict: a case that cannot be used ends the conversion; otherwise it is left out.
        num_processes: that convert cases at the same time; each holds one case in memory. All cores, 8 at most, when None.
        left_out: cases that the reader of the release has left out already, and why; reported with the others.

    Raises:
        UserError: before anything is written, when cases and dataset do not fit each other, or the dataset is there; later,
            when no case is left or the disk is full. Nothing is left behind.
        CaseError: with `strict`.
    """
    cases, left_out = _with_usable_names(cases, left_out or {}, strict)
    _check_dataset_json(dataset)
    _check_cases(cases, dataset)
    if reference not in (FINEST, *dataset.series):
        raise UserError(f"no series is called {reference!r}; -reference is {FINEST} or one of {', '.join(dataset.series)}")
    final = raw_folder / dataset.name
    _refuse_taken_id(final)
    _refuse_own_sources(cases, final)
    with whole_folder(final, overwrite) as folder:
        for kind in _subfolders(cases, dataset):
            (folder / kind).mkdir()
        how: dict[str, Any] = {"reference": reference, "register": register, "zero_background": zero_background}
        convert = partial(write_case, dataset=dataset, folder=folder, **how)
        entries, unusable = _convert_all(convert, cases, strict, num_processes or min(8, num_cores()))
        written = [case for case in cases if case.identifier in entries]
        if not written:
            msg = f"none of the {len(cases)} cases can be used, nothing is written: {_all_of(unusable.values())}"
            raise UserError(msg)
        left_out = {**left_out, **unusable}
        lines = _write_tables(folder, written, dataset, left_out)
        save_manifest(folder, dataset.name, how, entries, left_out)
        num_training = sum(not case.test for case in written)
        if dataset.labels and num_training:
            check_dataset(folder)
    lines = [*summary(entries, dataset.series), *lines]
    if left_out:
        lines.append(f"{len(left_out)} cases left out, listed in {final / LEFT_OUT}:")
        lines += [f"  {name}: {reason}" for name, reason in list(left_out.items())[:NUM_LISTED]]
    header = f"{dataset.name}: {num_training} training cases, {len(written) - num_training} test cases in {final}"
    return Report(final, num_training, len(written) - num_training, left_out, (header, *lines))


# --- before writing ----------------------------------------------------------------------------------------------------------


def _check_dataset_json(dataset: Dataset) -> None:
    """Raise `UserError` for what nnU-Net would refuse only when it preprocesses."""
    if not re.fullmatch(r"Dataset\d{3}_\w[\w.-]*", dataset.name):
        raise UserError(
            f"{dataset.name!r} is no name of a dataset; expected DatasetXXX_Name with three digits, such as Dataset021_LGG"
        )
    repeated = _repeated(dataset.series)
    if repeated or not dataset.series:
        found = f"the series {repeated[0]} twice" if repeated else "no series"
        raise UserError(f"{dataset.name} has {found}; give each series one name")
    if not dataset.labels:
        return
    regions = any(isinstance(value, tuple) for value in dataset.labels.values())
    values = _label_values(dataset)
    if dataset.labels.get("background") != 0 or values != set(range(len(values))) or len(values) > 256:
        msg = f"{dataset.name} has the labels {dict(dataset.labels)}; nnU-Net expects background: 0 and 1, 2, ... without a gap"
        raise UserError(msg)
    if regions and len(dataset.regions_class_order or ()) != len(dataset.labels) - 1:
        raise UserError(
            f"{dataset.name} has regions; give regions_class_order, one label for each of {', '.join(dataset.labels)}"
        )


def _label_values(dataset: Dataset) -> set[int]:
    return {label for value in dataset.labels.values() for label in (value if isinstance(value, tuple) else (value,))}


def _all_of(reasons: Iterable[str]) -> str:
    """Each reason once, as many as a line bears."""
    found = list(dict.fromkeys(reasons))
    more = f"; and {len(found) - MOST_REASONS} more reasons" if len(found) > MOST_REASONS else ""
    return "; ".join(found[:MOST_REASONS]) + more


def _with_usable_names(cases: Iterable[Case], left_out: Mapping[str, str], strict: bool) -> tuple[list[Case], Mapping[str, str]]:
    """Cases whose files can be named after them, and which cannot and why."""
    usable, unusable = list[Case](), dict[str, str]()
    for case in cases:
        if problem := name_problem(f"{case.identifier}_0000{FILE_ENDING}"):
            error = CaseError(problem)
            if strict:
                raise error
            unusable[case.identifier.encode("utf-8", "backslashreplace").decode()] = str(error)
        else:
            usable.append(case)
    if unusable and not usable:
        raise UserError(f"none of the {len(unusable)} cases can be used, nothing is written: {_all_of(unusable.values())}")
    return usable, {**left_out, **unusable}


def _check_cases(cases: Sequence[Case], dataset: Dataset) -> None:
    """Raise `UserError` when the reader of the release contradicts itself: no case is to blame for that."""
    if not cases:
        raise UserError(f"no case found for {dataset.name}; check the input folder")
    repeated = _repeated([case.identifier for case in cases])
    if repeated:
        sources = [str(volume.path) for case in cases if case.identifier == repeated[0] for volume in case.images.values()]
        msg = f"several cases are called {repeated[0]} ({', '.join(sources[:4])}); give every case a name of its own"
        raise UserError(msg + (f" (and {len(repeated) - 1} more names)" if len(repeated) > 1 else ""))
    both = {case.patient for case in cases if case.test} & {case.patient for case in cases if not case.test}
    if both:
        msg = f"patient {min(both)} has training and test cases; put all cases of a patient on one side"
        raise UserError(msg + (f" (and {len(both) - 1} more patients)" if len(both) > 1 else ""))
    if alike := alike_classes(diagnosis.name for case in cases for diagnosis in case.diagnoses):
        raise UserError(f"{alike[0]}; give them one spelling in the table of the release")
    labels = _label_values(dataset)
    for case in cases:
        name = case.identifier
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(f"the case name {name!r} cannot be a file name; use letters, digits, '_', '-' and '.'")
        if case.masks and not labels:
            raise UserError(f"case {name} has a mask, but {dataset.name} has no labels; name them, or leave masks out")
        unknown = sorted(set(case.images) - set(dataset.series))
        if unknown:
            raise UserError(f"case {name} has the unknown series {unknown[0]}; expected {', '.join(dataset.series)}")
        meant = {label for mask in case.masks for label in mask.values.values()}
        meant |= {diagnosis.mask_label for diagnosis in case.diagnoses if diagnosis.mask_label is not None}
        if meant - labels:
            msg = f"case {name} has the mask label {min(meant - labels)}, which {dataset.name} does not have"
            raise UserError(f"{msg}; expected {', '.join(map(str, sorted(labels))) or 'none'}")


def _refuse_taken_id(final: Path) -> None:
    prefix = final.name[: len("Dataset000_")]
    others = sorted(folder.name for folder in final.parent.glob(f"{prefix}*") if folder.name != final.name)
    if others:
        raise UserError(f"{final.parent} has {others[0]} already, and nnU-Net knows datasets by number; choose another number")


def _refuse_own_sources(cases: Sequence[Case], final: Path) -> None:
    """Overwriting a dataset with itself would end with its images gone."""
    inside = final.resolve()
    for case in cases:
        for volume in (*case.images.values(), *(mask.volume for mask in case.masks)):
            if Path(os.path.realpath(volume.path)).is_relative_to(inside):
                raise UserError(f"{volume.path} lies in {final}, which is to be written from it; choose another dataset")


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _subfolders(cases: Sequence[Case], dataset: Dataset) -> set[str]:
    kinds = {"imagesTr"} | {"imagesTs" for case in cases if case.test}
    if dataset.labels:
        kinds |= {"labelsTr"} | {"labelsTs" for case in cases if case.test and case.masks}
    return kinds


def _convert_all(
    convert: Callable[[Case], dict[str, Any] | str], cases: Sequence[Case], strict: bool, num_processes: int
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Case to its entry in the manifest, and case to why it is left out, both in the order of the cases."""
    results: dict[str, dict[str, Any] | str] = dict.fromkeys((case.identifier for case in cases), "")
    with closing(in_processes(convert, cases, num_processes)) as finished:
        for case, result in tqdm(finished, total=len(cases), desc="cases", unit="case"):
            if strict and isinstance(result, str):
                raise CaseError(f"case {case.identifier}: {result}")
            results[case.identifier] = result
    entries = {name: result for name, result in results.items() if not isinstance(result, str)}
    return entries, {name: result for name, result in results.items() if isinstance(result, str)}


# --- beside the images -------------------------------------------------------------------------------------------------------


def _write_tables(folder: Path, written: Sequence[Case], dataset: Dataset, left_out: Mapping[str, str]) -> list[str]:
    """dataset.json and the tables that there is reason for. Returns lines to print."""
    training = [case for case in written if not case.test]
    dataset_json: dict[str, Any] = {
        **dataset.about,
        "channel_names": {str(channel): name for channel, name in enumerate(dataset.series)},
        "labels": {name: list(value) if isinstance(value, tuple) else value for name, value in dataset.labels.items()},
        "numTraining": len(training),
        "file_ending": FILE_ENDING,
    }
    if dataset.regions_class_order is not None:
        dataset_json["regions_class_order"] = list(dataset.regions_class_order)
    save_json(dataset_json, folder / "dataset.json")
    lines = []
    rows = [(case.identifier, one.name, one.mask_label, case.patient) for case in written for one in case.diagnoses]
    if rows:
        table = pd.DataFrame(rows, columns=COLUMNS).astype({"mask_label": "Int64"})  # integers, and empty where there is none
        table.to_csv(folder / CLASSES, index=False)
        lines.append(f"{CLASSES}: {', '.join(f'{n} {name}' for name, n in sorted(Counter(table['class']).items()))}")
    splits = splits_by_patient({case.identifier: case.patient for case in training})
    if splits:
        save_json(splits, folder / SPLITS)
        what = f"{len(splits)} folds by patient, as some have several cases (nnU-Net splits by case)"
        lines.append(f"{SPLITS}: {what}; its planner takes them over")
    if left_out:
        pd.DataFrame(left_out.items(), columns=["case", "reason"]).to_csv(folder / LEFT_OUT, index=False)
    return lines


def splits_by_patient(patients: Mapping[str, str]) -> list[dict[str, list[str]]]:
    """nnU-Net's splits_final from training case to patient: no patient on both sides of a fold.

    As many folds as patients when there are fewer than five. Empty when nothing is gained: each patient has one case, or there
    is one patient only.
    """
    identifiers = sorted(patients)
    groups = [patients[identifier] for identifier in identifiers]
    num_patients = len(set(groups))
    if num_patients < 2 or num_patients == len(identifiers):
        return []
    from sklearn.model_selection import GroupKFold  # a second that every worker would wait at its start

    folds = GroupKFold(min(NUM_FOLDS, num_patients), shuffle=True, random_state=SPLIT_SEED)
    return [
        {"train": [identifiers[i] for i in train], "val": [identifiers[i] for i in val]}
        for train, val in folds.split(identifiers, groups=groups)
    ]
