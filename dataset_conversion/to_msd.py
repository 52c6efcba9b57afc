"""The way out: predictions of decathlon tasks as the archive that the decathlon scores.

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
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import product
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
from tqdm import tqdm

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.files import whole
from nnunet_csm.listing import file_problem
from nnunet_csm.raw.manifest import software
from nnunet_csm.raw.nifti import DAMAGED
from nnunet_csm.raw.volumes import sha256

from .msd_task import ENDING, Task, read_task

# How far a corner of the volume may lie from where the source image has it, in voxels. Headers hold float32: up to ROUNDING is
# not spoken of. A quaternion in float32 may turn a volume by 3e-4, which is 0.1 voxels at the far side of 300.
ROUNDING = 1e-3
LARGEST_SHIFT = 0.1

# What a NIfTI header says of the place of a volume, beside pixdim.
PLACE = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units"),
)


@dataclass(frozen=True)
class Case:
    """A prediction in the archive.

    Attributes:
        sha256: of its file there; `prediction_sha256` is that of the file it comes from.
        volumes_ml: by label.
        shift: how far the header of the prediction puts the worst corner from where the image has it, in voxels.
    """

    task: str
    name: str
    image: Path
    prediction: Path
    prediction_sha256: str
    sha256: str
    volumes_ml: dict[str, float]
    shift: float

    @property
    def path_in_archive(self) -> str:
        return f"{self.task}/{self.name}{ENDING}"


def write(
    predictions: Sequence[Path],
    archive: Path,
    tasks: Sequence[Path],
    labels_from: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    overwrite: bool = False,
) -> list[Case]:
    """Write every prediction, checked against its source image, to the archive, and beside it `<archive>.manifest.json`.

    Args:
        predictions: folders as nnUNetv2_predict leaves them, one for each task.
        archive: a name ending in .zip.
        tasks: folders of the decathlon's release, with dataset.json and imagesTs.
        labels_from: where the predicted values are named, one for each task: a dataset.json, a folder that holds one, or the
            name or ID of an nnU-Net dataset. Default: dataset.json beside the predictions; without that, the task's own values.
        leave_out: test cases that are not to be in the archive.
        overwrite: replace an archive of that name.

    Raises:
        UserError: anything is wrong with any case; there is no new archive then.
    """
    manifest = archive.with_name(f"{archive.name}.manifest.json")
    if len(predictions) != len(tasks) or len(labels_from) not in (0, len(tasks)):
        counts = f"{len(predictions)} folders of predictions, {len(tasks)} tasks, {len(labels_from)} -labels_from"
        raise UserError(f"{counts}; give one task for each folder (and one -labels_from, if any), in the same order")
    if archive.suffix != ".zip":
        raise UserError(f"{archive}: the decathlon takes zip archives; give -o a name that ends in .zip")
    for path in (archive, manifest):
        if path.is_dir() or (path.exists() and not overwrite):
            raise UserError(f"{path} exists; move it away, choose another -o, or replace it with --overwrite")
    excluded = frozenset(case.removesuffix(ENDING) for case in leave_out)
    sources: Sequence[str | None] = labels_from or [None] * len(tasks)
    found = [read_task(*of_task, excluded) for of_task in zip(tasks, predictions, sources, strict=True)]
    names = [task.name for task in found]
    if len(set(names)) < len(names):
        raise UserError(f"-task: {', '.join(names)}; give each task once")
    if unknown := sorted(excluded - {case for task in found for case in task.left_out}):
        raise UserError(f"-leave_out {', '.join(unknown)}: no such test image in {', '.join(names)}")
    for task in found:
        print(task)
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        # the archive takes its name last, so that none lacks its manifest
        with whole(archive) as temporary, whole(manifest) as temporary_manifest:
            cases = _write_archive(temporary, found)
            _verify(temporary, cases)
            content = {
                "archive": archive.name,
                "sha256": sha256(temporary),
                "created": datetime.now().astimezone().isoformat(timespec="seconds"),
                "software": software("nnunetv2"),
                "tasks": [_provenance(task) for task in found],
                "cases": [asdict(case) for case in cases],
            }
            temporary_manifest.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{archive}: cannot be written ({error}); is there room, and is the disk sound?") from error
    for task in found:
        print(_table([case for case in cases if case.task == task.name], list(task.labels.values())))
    print(f"{archive}: {len(cases)} cases, read back and found equal; where they come from stands in {manifest}")
    return cases


def _write_archive(path: Path, tasks: Sequence[Task]) -> list[Case]:
    """Check and write case after case.

    Raises:
        UserError: the first five problems and how many follow.
    """
    cases, problems = list[Case](), [problem for task in tasks for problem in task.problems]
    images = [(task, image, file_problem(image)) for task in tasks for image in task.images.values()]
    pairs = [(task, image) for task, image, problem in images if problem is None]
    # of those that are not there, the task has told
    problems += [problem for _, image, problem in images if problem is not None and os.path.lexists(image)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for task, image in tqdm(pairs, desc="checking and writing", unit="case"):
            try:
                case, content = check_case(task, image)
            except UserError as error:
                problems.append(str(error))
                continue
            # no time stamps: the same predictions give the same archive
            entry = zipfile.ZipInfo(case.path_in_archive)
            entry.external_attr = 0o644 << 16
            file.writestr(entry, content)
            cases.append(case)
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise UserError("\n  ".join([f"nothing was written, {len(problems)} thing(s) to mend:", *problems[:5], *more]))
    return cases


def check_case(task: Task, image: Path) -> tuple[Case, bytes]:
    """Compare a prediction with the test image it was made from.

    Returns:
        What is known of it, and its file for the archive.

    Raises:
        UserError: it is missing or unreadable, or its shape, place or values are wrong.
    """
    name, prediction = image.name.removesuffix(ENDING), task.predictions / image.name
    if not prediction.is_file():
        raise UserError(f"{prediction} is missing; predict the case, or use -leave_out {name}")
    try:
        source = nibabel.Nifti1Image.from_filename(image).header
        if len(source.get_data_shape()) not in (3, 4):
            raise ValueError(f"an image of shape {source.get_data_shape()}, expected three or four axes")
        places = _places(source)
    except DAMAGED as error:
        raise UserError(f"{image}: cannot be read ({error}); download the task again") from None
    try:
        content = prediction.read_bytes()
        # gzip compares its checksum at the end, to which nibabel would not read
        predicted = nibabel.Nifti1Image.from_bytes(gzip.decompress(content))
        voxels, found_places = np.asanyarray(predicted.dataobj), _places(predicted.header)
    except DAMAGED as error:
        raise UserError(f"{prediction}: cannot be read ({error}); predict the case again") from None
    shape = source.get_data_shape()[:3]
    if voxels.shape != shape:
        found, expected = voxels.shape[::-1], shape[::-1]
        raise UserError(f"{prediction} has the shape {found}, but {image} has {expected} (z, y, x); predict from that image")
    apart = min(np.linalg.norm(found - expected, axis=1).max() for found in found_places for expected in places)
    shift = float(apart / min(source.get_zooms()[:3]))
    if not shift <= LARGEST_SHIFT:
        raise UserError(f"the header of {prediction} puts it {shift:.3g} voxels from {image}; predict from that image")
    if voxels.dtype.kind not in "iuf":
        raise UserError(f"{prediction} holds voxels of type {voxels.dtype}, expected whole numbers; give label maps")
    values, counts = np.unique(voxels, return_counts=True)
    if broken := [value for value in values.tolist() if not float(value).is_integer()]:
        raise UserError(
            f"{prediction} holds values that are not whole, {', '.join(map(str, broken[:5]))}; give label maps, not probabilities"
        )
    if unknown := [int(value) for value in values if int(value) not in task.to_task]:
        listed, known = ", ".join(map(str, unknown[:5])), sorted(task.to_task)
        raise UserError(f"{prediction} holds the values {listed}, but the labels of {task.labels_source} are {known}")
    ml = float(np.prod(source.get_zooms()[:3], dtype=np.float64)) / 1000
    volumes = dict.fromkeys(task.labels.values(), 0.0)
    # in the type of the release's label maps
    label_map = np.zeros(shape, np.uint8 if max(task.labels, default=0) < 256 else np.uint16, order="F")
    for value, count in zip(values, counts, strict=True):
        if target := task.to_task[int(value)]:
            label_map[voxels == value] = target
            volumes[task.labels[target]] += int(count) * ml
    file = _nifti(label_map, source)
    hashes = (hashlib.sha256(content).hexdigest(), hashlib.sha256(file).hexdigest())
    return Case(task.name, name, image, prediction, *hashes, volumes, shift), file


def _places(header: nibabel.Nifti1Header) -> list[np.ndarray]:
    """Corners of the volume in mm, (8, 3), as one reader or another may take them: a header can name two places, or none.

    nnU-Net reads with SimpleITK or with nibabel; where there is none, the latter puts the centre at 0, the former a corner.
    """
    affines = [affine for affine, code in (header.get_sform(coded=True), header.get_qform(coded=True)) if code]
    affines = affines or [header.get_base_affine(), np.diag([*(header.get_zooms()[:3] * np.array([-1, -1, 1])), 1])]
    corners = list(product(*((0, length - 1) for length in header.get_data_shape()[:3])))
    return [nibabel.affines.apply_affine(affine, corners) for affine in affines]


def _nifti(label_map: np.ndarray, source: nibabel.Nifti1Header) -> bytes:
    """The label map as a .nii.gz with the place of the source image."""
    header = nibabel.Nifti1Header()
    # of the source's header only the place: the rest tells of grey values, and its extensions may tell of the patient
    header.set_data_dtype(label_map.dtype)
    header.set_data_shape(label_map.shape)
    header["pixdim"][:4] = source["pixdim"][:4]
    for field in PLACE:
        header[field] = source[field]
    return gzip.compress(nibabel.Nifti1Image(label_map, None, header).to_bytes(), compresslevel=6, mtime=0)


def _verify(archive: Path, cases: Sequence[Case]) -> None:
    """Read every case back: the checksum of the zip, and that of what was written."""
    with zipfile.ZipFile(archive) as file:
        for case in tqdm(cases, desc="reading back", unit="case"):
            if hashlib.sha256(file.read(case.path_in_archive)).hexdigest() != case.sha256:
                raise UserError(f"{archive}: {case.path_in_archive} does not read back as it was written; is the disk sound?")


def _table(cases: Sequence[Case], labels: Sequence[str]) -> str:
    """Volumes in millilitres, then what deserves a look."""
    table = pd.DataFrame.from_dict({case.name: case.volumes_ml for case in cases}, "index", columns=labels)
    lines = ["volumes in ml", table.to_string(float_format="{:.2f}".format)]
    if empty := list(table.index[~table.any(axis=1)]):
        lines.append(f"{len(empty)} without any foreground: {', '.join(empty)}")
    if absent := list(table.columns[~table.any()]):
        lines.append(f"labels that no case has: {', '.join(absent)}")
    if moved := [case for case in cases if case.shift > ROUNDING]:
        worst = max(moved, key=lambda case: case.shift)
        distance = f"{worst.shift:.2g} voxels in {worst.name}"
        lines.append(f"{len(moved)} with a header that differs from the image's, by {distance}; the image's was written")
    return "\n".join(lines)


def _provenance(task: Task) -> dict[str, Any]:
    """Which predictions of a task, by which plans, and what was done to their labels."""
    plans = task.predictions / "plans.json"
    content = nnunet.read_json(plans, "predict again") if plans.is_file() else {}
    return {
        "task": task.name,
        "predictions": str(task.predictions.resolve()),
        "dataset": content.get("dataset_name"),
        "plans": content.get("plans_name"),
        "plans_sha256": sha256(plans) if plans.is_file() else None,
        "labels": {"names": task.labels, "to_task": task.to_task, "source": task.labels_source},
        "left_out": list(task.left_out),
    }
