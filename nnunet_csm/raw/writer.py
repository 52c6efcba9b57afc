"""Cases of a release to an nnU-Net raw dataset: one grid a case, zeros for a missing series, a manifest of what was done.

The dataset is written into a hidden folder and takes its name when it is complete and verified: a conversion that was stopped
leaves nothing that looks like a dataset.
"""

import csv
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import socket
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_csm import __version__
from nnunet_csm.data.diagnoses import FILE_NAME as CLASSES
from nnunet_csm.errors import UserError
from nnunet_csm.machine import num_cores
from nnunet_csm.nnunet import NUM_FOLDS, SPLIT_SEED
from nnunet_csm.raw.check import check_dataset
from nnunet_csm.raw.grid import (
    FINEST,
    Grid,
    labels_of,
    reference_series,
    refuse_loss,
    refuse_misplaced,
    register_rigidly,
    resampled,
)
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Volume
from nnunet_csm.raw.volumes import described, is_empty, read_volume, read_volumes, refuse_constant, sha256

FILE_ENDING = ".nii.gz"
MANIFEST = "csm_manifest.json"
SPLITS = "splits_final.json"  # nnU-Net's planner takes it from here
LEFT_OUT = "left_out.csv"

_NUM_LISTED = 10  # cases named in the summary; left_out.csv has all


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
        overwrite: replace a dataset of this name, once the new one is complete.
        strict: a case that cannot be used ends the conversion; otherwise it is left out.
        num_processes: that convert cases at the same time; each holds one case in memory. All cores, 8 at most, when None.
        left_out: cases that the reader of the release has left out already, and why; reported with the others.

    Raises:
        UserError: before anything is written, when cases and dataset do not fit each other, or the dataset is there; later,
            when no case is left or the disk is full. Nothing is left behind.
        CaseError: with `strict`.
    """
    cases = list(cases)
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
        convert = partial(_attempt, dataset=dataset, folder=folder, reference=reference, register=register)
        entries, unusable = _convert_all(convert, cases, strict, num_processes)
        written = [case for case in cases if case.identifier in entries]
        if not written:
            msg = f"none of the {len(cases)} cases can be used, nothing is written; the first: {next(iter(unusable.values()))}"
            raise UserError(msg)
        left_out = {**(left_out or {}), **unusable}
        lines = _write_tables(folder, written, dataset, left_out)
        manifest = {
            "dataset": dataset.name,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            "software": software(),
            "axes": "x, y, z in mm, as in SimpleITK",
            "reference": reference,
            "registered": register,
            "cases": {case.identifier: entries[case.identifier] for case in written},
            "left_out": left_out,
        }
        _write_json(folder / MANIFEST, manifest)
        num_training = sum(not case.test for case in written)
        if dataset.labels and num_training:
            check_dataset(folder)
    header = f"{dataset.name}: {num_training} training cases, {len(written) - num_training} test cases in {final}"
    lines = [header, *_series_lines(entries, dataset), *lines, *_left_out_lines(left_out, final)]
    return Report(final, num_training, len(written) - num_training, left_out, tuple(lines))


@contextmanager
def whole_folder(final: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden folder beside `final` that takes its name when the block ends, and is gone when the block fails.

    What a killed run left there is removed. With `overwrite`, a folder of that name is replaced, at the end. Raises `UserError`
    when it is there without `overwrite`, or another process is writing it.
    """
    replaced = final.with_name(f".{final.name}.replaced")
    if replaced.is_dir():  # killed between the two renames below, or just after
        shutil.rmtree(replaced) if final.exists() else replaced.rename(final)
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        raise UserError(f"{final} exists and is kept; give --overwrite to replace it, or another name")
    if final.exists() and not final.is_dir():
        raise UserError(f"{final} is a file, expected a folder or nothing; move it away")
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(final)
    unfinished = final.with_name(f".{final.name}.partial-{socket.gethostname()}-{os.getpid()}")
    unfinished.mkdir()
    try:
        yield unfinished
        if final.exists():
            final.rename(replaced)
        unfinished.rename(final)
    except BaseException:  # an interrupt as well
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _remove_stale(final: Path) -> None:
    prefix = f".{final.name}.partial-"
    for folder in final.parent.glob(f"{prefix}*"):
        host, _, process = folder.name.removeprefix(prefix).rpartition("-")
        if host != socket.gethostname() or _is_running(int(process)):
            msg = f"{folder}: process {process} on {host} is writing {final.name}; wait for it, or remove the folder if it is not"
            raise UserError(msg)
        shutil.rmtree(folder)


def _is_running(process: int) -> bool:
    if process == os.getpid() or os.name != "posix":  # elsewhere a signal of 0 is not a question
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
            if volume.path.resolve().is_relative_to(inside):
                raise UserError(f"{volume.path} lies in {final}, which is to be written from it; choose another dataset")


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _subfolders(cases: Sequence[Case], dataset: Dataset) -> set[str]:
    kinds = {"imagesTr"} | {"imagesTs" for case in cases if case.test}
    if dataset.labels:
        kinds |= {"labelsTr"} | {"labelsTs" for case in cases if case.test and case.masks}
    return kinds


# --- one case ----------------------------------------------------------------------------------------------------------------


def _convert_all(
    convert: Callable[[Case], dict[str, Any] | str], cases: Sequence[Case], strict: bool, num_processes: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Case to its entry in the manifest, and case to why it is left out, both in the order of the cases."""
    results: dict[str, dict[str, Any] | str] = {}
    with closing(_results(convert, cases, num_processes or min(8, num_cores()))) as finished:
        for case, result in tqdm(finished, total=len(cases), desc="cases", unit="case"):
            if strict and isinstance(result, str):
                raise CaseError(f"case {case.identifier}: {result}")
            results[case.identifier] = result
    ordered = {case.identifier: results[case.identifier] for case in cases}
    entries = {name: result for name, result in ordered.items() if not isinstance(result, str)}
    return entries, {name: result for name, result in ordered.items() if isinstance(result, str)}


def _results(
    convert: Callable[[Case], dict[str, Any] | str], cases: Sequence[Case], num_processes: int
) -> Generator[tuple[Case, dict[str, Any] | str], None, None]:
    if min(num_processes, len(cases)) == 1:
        yield from ((case, convert(case)) for case in cases)
        return
    # spawn: a fork would copy ITK's threads in whatever state they are
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(num_processes, len(cases)), mp_context=context, initializer=_start_worker)
    try:
        futures = {pool.submit(convert, case): case for case in cases}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        msg = f"one of {num_processes} processes ended without a word, most likely for want of memory; use fewer processes"
        raise UserError(msg) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, once


def _attempt(case: Case, dataset: Dataset, folder: Path, reference: str, register: bool) -> dict[str, Any] | str:
    """Write a case and return its entry in the manifest, or the reason why it cannot be used; then nothing of it is written."""
    try:
        images, label, entry = _on_one_grid(case, dataset, reference, register)
    except CaseError as error:
        return str(error)
    side = "Ts" if case.test else "Tr"
    for channel, name in enumerate(dataset.series):
        write_image(images[name], folder / f"images{side}" / f"{case.identifier}_{channel:04d}{FILE_ENDING}")
    if label is not None:
        write_image(label, folder / f"labels{side}" / f"{case.identifier}{FILE_ENDING}")
    return entry


def _on_one_grid(
    case: Case, dataset: Dataset, reference: str, register: bool
) -> tuple[dict[str, sitk.Image], sitk.Image | None, dict[str, Any]]:
    """Every series of the dataset, the label image (None without masks) and the entry in the manifest."""
    names = [name for name in dataset.series if name in case.images]
    images = dict(zip(names, read_volumes([case.images[name] for name in names]), strict=True))
    present = {name: image for name, image in images.items() if not is_empty(image)}
    if not present:
        raise CaseError("every image is all zero, that is, missing" if images else "the case has no image; add one, or remove it")
    grids = {name: Grid.of(image) for name, image in present.items()}
    reference_name = reference_series(grids, reference)
    grid = grids[reference_name]
    transforms: dict[str, sitk.Transform] = {}
    records: dict[str, dict[str, Any]] = {}
    results: dict[str, sitk.Image] = {}
    for name in dataset.series:
        if name not in present:
            why = "the file is all zero" if name in images else "series missing"
            results[name] = grid.zeros()
            records[name] = {**(_origin(case.images[name], images[name]) if name in images else {}), "done": f"zeros: {why}"}
            continue
        refuse_constant(present[name], case.images[name])
        records[name] = _origin(case.images[name], present[name])
        if name != reference_name:
            refuse_misplaced(grids[name], grid, described(case.images[name]), reference_name)
            records[name]["overlap"] = round(grids[name].overlap(grid), 3)
            if register:
                registration = register_rigidly(present[name], present[reference_name])
                records[name]["registration"] = registration.to_dict()
                if not registration.refused:
                    transforms[name] = registration.transform
        results[name] = resampled(present[name], grid, transform=transforms.get(name))
        records[name]["done"] = _done(grids[name], grid, "linearly", name in transforms)
        if is_empty(results[name]):
            msg = f"{described(case.images[name])}: nothing but zeros is left on the grid of {reference_name} ({grid})"
            raise CaseError(f"{msg}; does its header belong to this study?")
    label, mask_records = _painted(case, dataset, grid, reference_name, grids, transforms)
    entry = {
        "patient": case.patient,
        "test": case.test,
        "reference": reference_name,
        "after": grid.to_dict(),
        "series": records,
        "masks": mask_records,
    }
    return results, label, entry


def _painted(
    case: Case,
    dataset: Dataset,
    grid: Grid,
    reference_name: str,
    grids: Mapping[str, Grid],
    transforms: Mapping[str, sitk.Transform],
) -> tuple[sitk.Image | None, list[dict[str, Any]]]:
    """The masks of a case on `grid`, later ones over earlier ones. A mask on the grid of a registered series moves with it."""
    if not case.masks:
        if dataset.labels and not case.test:
            raise CaseError("the case has no mask, but the dataset has labels; add one, or make it a test case")
        return None, []
    label, records = grid.zeros(), []
    for mask in case.masks:
        before = labels_of(read_volume(mask.volume), mask)
        own = Grid.of(before)
        refuse_misplaced(own, grid, described(mask.volume), reference_name)
        moved_with = next((name for name in transforms if own.same_as(grids[name]) and not own.same_as(grid)), None)
        after = resampled(before, grid, nearest=True, transform=transforms.get(moved_with) if moved_with else None)
        refuse_loss(before, after, described(mask.volume))
        label = sitk.Maximum(sitk.Mask(label, after == 0), after)
        done = _done(own, grid, "by nearest neighbour", moved_with is not None)
        records.append({**_origin(mask.volume, before), "done": done, "values": dict(mask.values)})
    present = set(np.unique(sitk.GetArrayViewFromImage(label)).tolist())
    for diagnosis in case.diagnoses:
        if diagnosis.mask_label is not None and diagnosis.mask_label not in present:
            msg = f"the class {diagnosis.name} is of mask label {diagnosis.mask_label}, but the mask of the case has "
            raise CaseError(f"{msg}{', '.join(map(str, sorted(present - {0}))) or 'no label'}; correct the mask or the table")
    return label, records


def _origin(volume: Volume, image: sitk.Image) -> dict[str, Any]:
    """Where a volume came from, and its grid there."""
    path = volume.path.resolve()
    status = path.stat()
    digest = _cached_sha256(path, status.st_size, status.st_mtime_ns)
    return {"source": str(path), "index": volume.index, "sha256": digest, "before": Grid.of(image).to_dict()}


@cache
def _cached_sha256(path: Path, size: int, time: int) -> str:
    """One reading for all series of a 4-D file; size and time stand for its content."""
    return sha256(path)


def _done(before: Grid, after: Grid, how: str, registered: bool) -> str:
    if registered:
        return f"registered and resampled {how} from {before}"
    return "kept" if before.same_as(after) else f"resampled {how} from {before}"


def write_image(image: sitk.Image, path: Path) -> None:
    """Write, read again, compare. Raises `UserError`."""
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
        again = sitk.ReadImage(str(path))
    except RuntimeError as error:
        msg = f"{path} cannot be written ({str(error).strip().splitlines()[-1].strip()}); is the disk full?"
        raise UserError(msg) from error
    same = np.array_equal(sitk.GetArrayViewFromImage(again), sitk.GetArrayViewFromImage(image))
    if not (same and Grid.of(again).same_as(Grid.of(image))):
        raise UserError(f"{path} does not read as it was written; is the disk full or damaged?")


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
    _write_json(folder / "dataset.json", dataset_json)
    lines = []
    diagnoses = [(case, diagnosis) for case in written for diagnosis in case.diagnoses]
    if diagnoses:
        rows = [
            (case.identifier, diagnosis.name, "" if diagnosis.mask_label is None else diagnosis.mask_label, case.patient)
            for case, diagnosis in diagnoses
        ]
        _write_csv(folder / CLASSES, ("case", "class", "mask_label", "patient"), rows)
        counts = Counter(diagnosis.name for _, diagnosis in diagnoses)
        lines.append(f"{CLASSES}: {', '.join(f'{count} {name}' for name, count in sorted(counts.items()))}")
    splits = splits_by_patient({case.identifier: case.patient for case in training})
    if splits:
        _write_json(folder / SPLITS, splits)
        lines.append(
            f"{SPLITS}: {len(splits)} folds by patient, as some have several cases (nnU-Net splits by case); its "
            f"planner takes them over"
        )
    if left_out:
        _write_csv(folder / LEFT_OUT, ("case", "reason"), list(left_out.items()))
    return lines


def read_manifest(raw_folder: Path) -> dict[str, Any]:
    """What `write_dataset` wrote down of a dataset; {} for datasets that it did not make."""
    try:
        manifest = json.loads((raw_folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def patients_of(raw_folder: Path) -> dict[str, str]:
    """Case to its patient, as far as the manifest tells."""
    cases = read_manifest(raw_folder).get("cases")
    entries = cases.items() if isinstance(cases, Mapping) else ()
    return {case: str(entry["patient"]) for case, entry in entries if isinstance(entry, Mapping) and entry.get("patient")}


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


def _series_lines(entries: Mapping[str, Mapping[str, Any]], dataset: Dataset) -> Iterator[str]:
    """How many cases have a series, on whose grid they are, and what registration did."""
    for name in dataset.series:
        done = Counter(entry["series"][name]["done"].split(" ")[0] for entry in entries.values())
        counts = [
            (done["kept"], "kept"),
            (done["resampled"], "resampled by header"),
            (done["registered"], "registered"),
            (done["zeros:"], "missing, written as zeros"),
        ]
        yield f"  {name}: {', '.join(f'{count} {what}' for count, what in counts if count)}"
    all_zero = defaultdict(list)
    refused = []
    for identifier, entry in entries.items():
        for name, record in entry["series"].items():
            if "all zero" in record["done"]:
                all_zero[name].append(identifier)
            if record.get("registration", {}).get("refused"):
                refused.append(f"{identifier} {name} ({record['registration']['refused']})")
    for name, identifiers in all_zero.items():
        yield f"  {name} is all zero, taken as missing: {_listed(identifiers)}"
    if refused:
        yield f"  left where the header puts them, registration refused: {_listed(refused)}"


def _left_out_lines(left_out: Mapping[str, str], final: Path) -> Iterator[str]:
    if left_out:
        yield f"{len(left_out)} cases left out, listed in {final / LEFT_OUT}:"
        yield from (f"  {name}: {reason}" for name, reason in list(left_out.items())[:_NUM_LISTED])


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NUM_LISTED
    return ", ".join(names[:_NUM_LISTED]) + (f" and {more} more" if more > 0 else "")


def software(*more: str) -> dict[str, str]:
    """Versions that what is written depends on, and those of `more` packages."""
    packages = ("SimpleITK", "nibabel", "numpy", "scikit-learn", *more)
    return {"nnunet_csm": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
