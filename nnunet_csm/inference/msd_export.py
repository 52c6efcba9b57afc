"""Predictions of decathlon tasks as the archive that the decathlon scores.

The archive holds a folder for each task, called as the task, and in it a label map for each image of the task's imagesTs, under
the image's name. The site states no file format beyond that. What is known otherwise: its scorer reads `Task01_BrainTumour/` and
so on with SimpleITK (evalutils); a submission is one archive for all tasks; eleven test images of Task03 and Task08 are not to be
in it (the submission scripts of Yucca and of Auto-nnU-Net leave out the same). The release's label maps are uint8 on the image's
grid.
"""

import gzip
import hashlib
import json
import os
import platform
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError
from tqdm import tqdm

from nnunet_csm import __version__, nnunet
from nnunet_csm.errors import UserError

ENDING = ".nii.gz"

# How far a corner of the volume may lie from where the source image has it, in voxels. Headers hold float32: up to ROUNDING is
# not spoken of. A quaternion in float32 may turn a volume by 3e-4, which is 0.1 voxels at the far side of 300.
ROUNDING = 1e-3
LARGEST_SHIFT = 0.1

# What a NIfTI header says of the place of a volume, beside pixdim.
PLACE = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)

UNREADABLE = (OSError, EOFError, ValueError, zlib.error, ImageFileError, HeaderDataError, WrapStructError)


@dataclass(frozen=True)
class Labels:
    """What predicted values mean. `names`: foreground values of the task; `to_task`: predicted value -> the task's value."""

    names: dict[int, str]
    to_task: dict[int, int]
    source: str

    def __str__(self) -> str:
        values = {task: predicted for predicted, task in self.to_task.items()}
        shown = []
        for value, name in self.names.items():
            if value not in values:
                shown.append(f"{value} {name} (not among the predicted labels)")
            else:
                shown.append(f"{value} {name}" + (f" (predicted as {values[value]})" if values[value] != value else ""))
        return f"{', '.join(shown)}; predicted values are those of {self.source}"


@dataclass(frozen=True)
class Task:
    """A task of the decathlon. `images`: file of each test image by the case's name, without those left out.

    `listed`: test cases of dataset.json; `left_out`: cases that are not to be exported.
    """

    name: str
    folder: Path
    images: dict[str, Path]
    listed: frozenset[str]
    left_out: tuple[str, ...]
    labels: dict[int, str]


@dataclass(frozen=True)
class Case:
    """A prediction that can be exported. `shift`: how far its header puts the worst corner from the image's, in voxels."""

    task: str
    name: str
    image: Path
    prediction: Path
    prediction_sha256: str
    voxels_sha256: str
    volumes_ml: dict[str, float]
    shift: float

    @property
    def path_in_archive(self) -> str:
        return f"{self.task}/{self.name}{ENDING}"


def export_msd(
    predictions: Sequence[Path],
    archive: Path,
    tasks: Sequence[Path],
    labels_from: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Case]:
    """Check every prediction against its source image, then write the archive and, beside it, `<archive>.manifest.json`.

    Args:
        predictions: folders as nnUNetv2_predict leaves them, one for each task.
        archive: a name ending in .zip.
        tasks: folders of the decathlon's release, with dataset.json and imagesTs.
        labels_from: where the predicted values are named, one for each task: a dataset.json, a folder that holds one, or the
            name or ID of an nnU-Net dataset. Default: dataset.json beside the predictions; without that, the task's own values.
        leave_out: test cases that are not to be in the archive.
        overwrite: replace an archive of that name.

    Raises:
        UserError: anything is wrong with any case; nothing was written then.
    """
    manifest = archive.with_name(f"{archive.name}.manifest.json")
    _check_arguments(predictions, archive, manifest, tasks, labels_from, overwrite)
    problems: list[str] = []
    plan: list[tuple[Task, Path, Labels]] = []
    for position, (folder, path) in enumerate(zip(predictions, tasks, strict=True)):
        task = read_task(path, leave_out)
        labels = read_labels(task, folder, labels_from[position] if labels_from else None)
        print(f"{task.name}: {labels}")
        problems += [*_release_problems(task), *_extra_predictions(task, folder)]
        plan.append((task, folder, labels))
    _check_left_out(leave_out, [task for task, _, _ in plan])

    cases: list[Case] = []
    pairs = [
        (task, labels, image, folder / image.name)
        for task, folder, labels in plan
        for image in task.images.values()
        if image.is_file()
    ]
    for task, labels, image, prediction in tqdm(pairs, desc="checking", unit="case"):
        try:
            cases.append(check_case(task.name, labels, image, prediction))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(_summary(problems))

    for task, _, labels in plan:
        print(_table([case for case in cases if case.task == task.name], labels))
    labels_of = {task.name: labels for task, _, labels in plan}
    _write(archive, manifest, cases, labels_of, [_provenance(*entry) for entry in plan])
    print(f"{archive}: {len(cases)} cases, read back and found equal; where they come from stands in {manifest}")
    return cases


# --- the task ----------------------------------------------------------------------------------------------------------------


def read_task(folder: Path, leave_out: Sequence[str] = ()) -> Task:
    """A task folder of the decathlon's release.

    Raises:
        UserError: the folder is not of the release.
    """
    remedy = "give -task the path of the decathlon's folder as it was downloaded, e.g. /data/Task01_BrainTumour"
    name = _task_name(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (looked in {folder.absolute().parent}); {remedy}")
    if not re.fullmatch(r"Task\d\d_\w+", name):
        raise UserError(f"{folder}: the archive's folder is named as the task, and {name!r} is not of its form; {remedy}")
    content = nnunet.read_json(folder / "dataset.json", remedy)
    if not isinstance(content.get("test"), list) or not isinstance(content.get("labels"), dict):
        raise UserError(f"{folder / 'dataset.json'}: no list of 'test' images or no 'labels', found {sorted(content)}; {remedy}")
    if not (folder / "imagesTs").is_dir():
        raise UserError(f"{folder / 'imagesTs'}: no such folder; {remedy}")
    listed = _listed(content["test"])
    excluded = {case.removesuffix(ENDING) for case in leave_out}
    names = listed | _image_names(folder / "imagesTs")
    if not names - excluded:
        raise UserError(f"{folder / 'imagesTs'}: no image to be scored; {remedy}")
    images = {case: folder / "imagesTs" / f"{case}{ENDING}" for case in sorted(names - excluded)}
    labels = _label_names(content["labels"], str(folder / "dataset.json"))
    return Task(name, folder, images, frozenset(listed), tuple(sorted(excluded & names)), labels)


def _task_name(folder: Path) -> str:
    """The name as given: a link to the folder may be called as the task while the folder is not."""
    return os.path.basename(os.path.abspath(folder))


def _image_names(folder: Path) -> set[str]:
    names = {path.name for path in folder.iterdir() if path.name.endswith(ENDING)}
    return {name.removesuffix(ENDING) for name in names if not _is_stray(name)}


def _listed(test: Sequence[Any]) -> set[str]:
    """Names of cases in dataset.json, whose entries are paths or {"image": path}."""
    paths = [entry["image"] if isinstance(entry, dict) else entry for entry in test]
    names = {Path(path).name for path in paths}
    return {name.removesuffix(ENDING) for name in names if not _is_stray(name)}


def _is_stray(name: str) -> bool:
    """macOS leaves ._ files in archives; nnU-Net's converter skips whatever begins with these letters."""
    return name.startswith((".", "_"))


def _release_problems(task: Task) -> Iterator[str]:
    """Where the list in dataset.json and the folder differ."""
    for case, image in task.images.items():
        if not image.is_file():
            yield f"{image} is missing, but dataset.json lists it; download the task again, or use -leave_out {case}"
        elif case not in task.listed:
            yield f"{image} is not among the test images of dataset.json; remove it, or use -leave_out {case}"


def _extra_predictions(task: Task, folder: Path) -> Iterator[str]:
    for case in sorted(_image_names(folder) - set(task.images) - set(task.left_out)):
        yield f"{folder / case}{ENDING} is of no test image of {task.name}; remove it from the folder"


# --- labels ------------------------------------------------------------------------------------------------------------------


def read_labels(task: Task, predictions: Path, labels_from: str | None = None) -> Labels:
    """Match the predicted values to those of the task by the names of the labels.

    Models trained on regions predict the values of `regions_class_order`, which have no names; they are kept.

    Raises:
        UserError: a name that the task does not have.
    """
    source = predictions / "dataset.json" if labels_from is None else _labels_file(labels_from)
    if labels_from is None and not source.is_file():
        return Labels(
            _foreground(task.labels), {value: value for value in task.labels}, f"{task.name}: {predictions} holds no dataset.json"
        )
    content = nnunet.read_json(source, "give -labels_from a dataset.json, or the name or ID of an nnU-Net dataset")
    labels = content.get("labels")
    if not isinstance(labels, dict):
        raise UserError(f"{source}: no 'labels' found, expected a table of label names and values")
    expected = ", ".join(f"{value} {name}" for value, name in task.labels.items())
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        order = {0, *(int(value) for value in content.get("regions_class_order", ()))}
        if unknown := sorted(order - set(task.labels)):
            raise UserError(f"{source}: regions_class_order has the values {unknown}, but {task.name} has {expected}")
        return Labels(_foreground(task.labels), {value: value for value in sorted(order)}, f"the regions of {source}")
    values = {_plain(name): value for value, name in task.labels.items()}
    to_task = {0: 0}
    for value, name in _foreground(_label_names(labels, str(source))).items():
        if _plain(name) not in values:
            raise UserError(
                f"{source}: label {name!r} ({value}) is not in {task.folder / 'dataset.json'}, which has {expected}; "
                f"give -labels_from a dataset.json with the task's names, the task's own when the predicted values are its own"
            )
        to_task[value] = values[_plain(name)]
    return Labels(_foreground(task.labels), to_task, str(source))


def _labels_file(given: str) -> Path:
    """A dataset.json, a folder that holds one, or an nnU-Net dataset."""
    path = Path(given)
    if path.is_file() or path.suffix == ".json":
        return path
    return (path if path.is_dir() else nnunet.folder("nnUNet_raw") / nnunet.dataset_name(given)) / "dataset.json"


def _label_names(labels: Mapping[str, Any], source: str) -> dict[int, str]:
    """Value -> name, of the decathlon's form ({"1": "edema"}) or of nnU-Net's ({"edema": 1}), by rising value; no "ignore"."""
    decathlon = all(key.isdecimal() for key in labels)
    pairs = labels.items() if decathlon else ((v[0] if isinstance(v, list) and v else v, k) for k, v in labels.items())
    try:
        names = {int(value): str(name) for value, name in pairs if name != "ignore"}
    except (TypeError, ValueError):
        raise UserError(f"{source}: labels {dict(labels)}, expected a whole number for each name") from None
    if len({_plain(name) for name in names.values()}) < len(names) or len(names) < len(labels) - ("ignore" in labels):
        raise UserError(f"{source}: labels {dict(labels)} have a name or a value twice; correct the file")
    return dict(sorted(names.items()))


def _foreground(names: Mapping[int, str]) -> dict[int, str]:
    return {value: name for value, name in names.items() if value}


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())


# --- a case ------------------------------------------------------------------------------------------------------------------


def check_case(task: str, labels: Labels, image: Path, prediction: Path) -> Case:
    """Compare a prediction with the test image it was made from.

    Raises:
        UserError: it is missing or unreadable, or its shape, place or values are wrong.
    """
    name = image.name.removesuffix(ENDING)
    if not prediction.is_file():
        raise UserError(f"{prediction} is missing; predict the case, or use -leave_out {name}")
    try:
        source = _read_header(image)
    except UNREADABLE as error:
        raise UserError(f"{image}: cannot be read ({_reason(error)}); download the task again") from None
    try:
        predicted, content_sha256 = _read_image(prediction)
        voxels = np.asanyarray(predicted.dataobj)
    except UNREADABLE as error:
        raise UserError(f"{prediction}: cannot be read ({_reason(error)}); predict the case again") from None
    shape = source.get_data_shape()[:3]
    if voxels.shape != shape:
        found, expected = voxels.shape[::-1], shape[::-1]
        raise UserError(f"{prediction} has the shape {found}, but {image} has {expected} (z, y, x); predict from that image")
    shift = _shift(prediction, image, shape)
    if not shift <= LARGEST_SHIFT:
        raise UserError(f"the header of {prediction} puts it {shift:.3g} voxels from {image}; predict from that image")
    counts = _counts(voxels, prediction)
    if unknown := [value for value in counts if value not in labels.to_task]:
        raise UserError(
            f"{prediction} holds the values {_first(unknown)}, but the labels of {labels.source} are {sorted(labels.to_task)}"
        )
    ml = float(np.prod(source.get_zooms()[:3], dtype=np.float64)) / 1000
    volumes = dict.fromkeys(labels.names.values(), 0.0)
    for value, count in counts.items():
        if labels.to_task[value]:
            volumes[labels.names[labels.to_task[value]]] += count * ml
    sha256 = _voxels_sha256(_label_map(voxels, labels))
    return Case(task, name, image, prediction, content_sha256, sha256, volumes, shift)


def _read_header(path: Path) -> nibabel.Nifti1Header:
    header = nibabel.Nifti1Image.from_filename(path).header
    if len(header.get_data_shape()) not in (3, 4):
        raise ValueError(f"an image of shape {header.get_data_shape()}, expected three or four axes")
    return header


def _read_image(path: Path) -> tuple[nibabel.Nifti1Image, str]:
    """An image, and the hash of its file. Reads to the end, so that gzip compares its checksum; nibabel would not."""
    content = path.read_bytes()
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(content)), hashlib.sha256(content).hexdigest()


def _shift(prediction: Path, image: Path, shape: Sequence[int]) -> float:
    """The largest distance of a corner in one header from the same corner in the other, in voxels (of the shortest edge).

    nnU-Net reads with SimpleITK or with nibabel, which differ where a header names two places or none; one of them has to agree.
    """
    shifts = [
        _corner_distance(found, expected, shape)
        for read in (_itk_affine, _nibabel_affine)
        if (found := read(prediction)) is not None and (expected := read(image)) is not None
    ]
    return min(shifts)


def _itk_affine(path: Path) -> np.ndarray | None:
    """Voxel (x, y, z) to millimetres, of the first three axes; None where ITK refuses the header."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    num_axes = reader.GetDimension()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(reader.GetDirection(), (num_axes, num_axes))[:3, :3] * reader.GetSpacing()[:3]
    affine[:3, 3] = reader.GetOrigin()[:3]
    return affine


def _nibabel_affine(path: Path) -> np.ndarray:
    return nibabel.Nifti1Image.from_filename(path).affine


def _corner_distance(found: np.ndarray, expected: np.ndarray, shape: Sequence[int]) -> float:
    corners = np.array([(*corner, 1) for corner in product(*((0, length - 1) for length in shape))])
    distance = np.linalg.norm((corners @ (found - expected).T)[:, :3], axis=1).max()
    return float(distance / np.linalg.norm(expected[:3, :3], axis=0).min())


def _counts(voxels: np.ndarray, path: Path) -> dict[int, int]:
    """Number of voxels by value. Raises UserError where a value is not whole."""
    if voxels.dtype.kind not in "iuf":
        raise UserError(f"{path} holds voxels of type {voxels.dtype}, expected whole numbers; give label maps")
    values, counts = np.unique(voxels, return_counts=True)
    if not np.array_equal(values, np.trunc(values)) or not np.isfinite(values).all():
        broken = [float(value) for value in values if not np.isfinite(value) or value != np.trunc(value)]
        raise UserError(f"{path} holds values that are not whole, {_first(broken)}; give label maps, not probabilities")
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def _label_map(voxels: np.ndarray, labels: Labels) -> np.ndarray:
    """The task's values, in the type of the release's label maps."""
    result = np.zeros(voxels.shape, np.uint8 if max(labels.names, default=0) < 256 else np.uint16, order="F")
    for predicted, value in labels.to_task.items():
        if value:
            result[voxels == predicted] = value
    return result


def _voxels_sha256(label_map: np.ndarray) -> str:
    return hashlib.sha256(label_map.tobytes(order="F")).hexdigest()


def _first(values: Sequence[float]) -> str:
    return ", ".join(str(value) for value in values[:5]) + (", ..." if len(values) > 5 else "")


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


# --- the archive -------------------------------------------------------------------------------------------------------------


def _check_arguments(
    predictions: Sequence[Path],
    archive: Path,
    manifest: Path,
    tasks: Sequence[Path],
    labels_from: Sequence[str],
    overwrite: bool,
) -> None:
    if len(predictions) != len(tasks) or len(labels_from) not in (0, len(tasks)):
        counts = f"{len(predictions)} folders of predictions, {len(tasks)} tasks, {len(labels_from)} -labels_from"
        raise UserError(f"{counts}; give one task for each folder (and one -labels_from, if any), in the same order")
    names = [_task_name(task) for task in tasks]
    if len(set(names)) < len(names):
        raise UserError(f"-task: {', '.join(names)}; give each task once")
    if archive.suffix != ".zip":
        raise UserError(f"{archive}: the decathlon takes zip archives; give -o a name that ends in .zip")
    for folder in predictions:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give -i the folder that nnUNetv2_predict wrote")
    for path in (archive, manifest):
        if path.is_dir() or (path.exists() and not overwrite):
            raise UserError(f"{path} exists; move it away, choose another -o, or replace it with --overwrite")


def _check_left_out(leave_out: Sequence[str], tasks: Sequence[Task]) -> None:
    known = {case for task in tasks for case in task.left_out}
    if unknown := sorted({case.removesuffix(ENDING) for case in leave_out} - known):
        raise UserError(f"-leave_out {', '.join(unknown)}: no such test image in {', '.join(task.name for task in tasks)}")


def _summary(problems: Sequence[str]) -> str:
    """The first five problems and how many follow."""
    more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
    return "\n  ".join([f"nothing was written, {len(problems)} thing(s) to mend:", *problems[:5], *more])


def _write(
    archive: Path, manifest: Path, cases: Sequence[Case], labels: Mapping[str, Labels], provenance: Sequence[dict[str, Any]]
) -> None:
    """Archive and manifest under temporary names, read back, then renamed; the archive last, so that none lacks its manifest."""
    temporary, temporary_manifest = (path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (archive, manifest))
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_archive(temporary, cases, labels)
            _verify(temporary, cases)
            content = {
                "archive": archive.name,
                "sha256": _file_sha256(temporary),
                "created": datetime.now().astimezone().isoformat(timespec="seconds"),
                "software": _software(),
                "tasks": provenance,
                "cases": [_plain_case(case) for case in cases],
            }
            temporary_manifest.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            temporary_manifest.replace(manifest)
            temporary.replace(archive)
        finally:
            temporary.unlink(missing_ok=True)
            temporary_manifest.unlink(missing_ok=True)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(
            f"{archive}: cannot be written ({_reason(error)}); is there room, and does nothing write to -i?"
        ) from error


def _write_archive(path: Path, cases: Sequence[Case], labels: Mapping[str, Labels]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for case in tqdm(cases, desc="writing", unit="case"):
            # no time stamps: the same predictions give the same archive
            entry = zipfile.ZipInfo(case.path_in_archive)
            entry.external_attr = 0o644 << 16
            file.writestr(entry, _nifti(case, labels[case.task]))


def _nifti(case: Case, labels: Labels) -> bytes:
    """The label map as a .nii.gz with the place of the source image."""
    label_map = _label_map(np.asanyarray(_read_image(case.prediction)[0].dataobj), labels)
    source = _read_header(case.image)
    # of the source's header only the place: the rest tells of grey values, and its extensions may tell of the patient
    header = nibabel.Nifti1Header()
    header.set_data_dtype(label_map.dtype)
    header.set_data_shape(label_map.shape)
    header["pixdim"][:4] = source["pixdim"][:4]
    for field in PLACE:
        header[field] = source[field]
    return gzip.compress(nibabel.Nifti1Image(label_map, None, header).to_bytes(), compresslevel=6, mtime=0)


def _verify(archive: Path, cases: Sequence[Case]) -> None:
    """Read every case back: checksums of zip and gzip, place and voxels."""
    with zipfile.ZipFile(archive) as file:
        for case in tqdm(cases, desc="reading back", unit="case"):
            image = nibabel.Nifti1Image.from_bytes(gzip.decompress(file.read(case.path_in_archive)))
            same_voxels = _voxels_sha256(np.asanyarray(image.dataobj)) == case.voxels_sha256
            if not (same_voxels and _same_place(image.header, case.image)):
                raise UserError(f"{case.prediction} is not what it was when it was checked; export when nothing writes to it")


def _same_place(header: nibabel.Nifti1Header, image: Path) -> bool:
    source = _read_header(image)
    return (
        header.get_data_shape() == source.get_data_shape()[:3]
        and np.array_equal(header["pixdim"][:4], source["pixdim"][:4])
        and all(np.array_equal(header[field], source[field], equal_nan=True) for field in PLACE)
    )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- what is said of it ------------------------------------------------------------------------------------------------------


def _table(cases: Sequence[Case], labels: Labels) -> str:
    """Volumes in millilitres, then what deserves a look."""
    rows = {case.name: case.volumes_ml for case in cases}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(labels.names.values()))
    lines = ["volumes in ml", table.to_string(float_format="{:.2f}".format)]
    if empty := [case.name for case in cases if not any(case.volumes_ml.values())]:
        lines.append(f"{len(empty)} without any foreground: {', '.join(empty)}")
    if absent := [name for name in labels.names.values() if not any(case.volumes_ml[name] for case in cases)]:
        lines.append(f"labels that no case has: {', '.join(absent)}")
    if moved := [case for case in cases if case.shift > ROUNDING]:
        worst = max(moved, key=lambda case: case.shift)
        distance = f"{worst.shift:.2g} voxels in {worst.name}"
        lines.append(f"{len(moved)} with a header that differs from the image's, by {distance}; the image's was written")
    return "\n".join(lines)


def _provenance(task: Task, folder: Path, labels: Labels) -> dict[str, Any]:
    """Of a task: which predictions, by which plans, and what was done to their labels."""
    plans = folder / "plans.json"
    content = nnunet.read_json(plans, "predict again") if plans.is_file() else {}
    return {
        "task": task.name,
        "predictions": str(folder.resolve()),
        "dataset": content.get("dataset_name"),
        "plans": content.get("plans_name"),
        "plans_sha256": _file_sha256(plans) if plans.is_file() else None,
        "labels": asdict(labels),
        "left_out": list(task.left_out),
    }


def _plain_case(case: Case) -> dict[str, Any]:
    return {**asdict(case), "image": str(case.image), "prediction": str(case.prediction)}


def _software() -> dict[str, str]:
    packages = ("nnunetv2", "nibabel", "SimpleITK", "numpy")
    return {"nnunet_csm": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}
