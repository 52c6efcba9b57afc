"""Which DICOM series the grid of a prediction is of, and its slices as the images that a segmentation refers to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.valuerep import DSfloat

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError, reason
from nnunet_csm.raw.dicom_frames import Frame, header_of
from nnunet_csm.raw.geometry import Grid
from nnunet_csm.raw.manifest import MANIFEST
from nnunet_csm.raw.subjects import CaseError, Volume
from nnunet_csm.raw.volumes import sha256
from nnunet_csm.schema import read_value

from .sheets import read_sheet

# What a segmentation takes over from its source, which may lack what DICOM allows to be empty.
OF_PATIENT = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex")
OF_STUDY = ("StudyID", "StudyDate", "StudyTime", "AccessionNumber")
# What all slices have to agree on, and what none may lack.
SHARED = ("PatientID", "StudyInstanceUID", "FrameOfReferenceUID")
NEEDED = ("StudyInstanceUID", "FrameOfReferenceUID")


def find_series(given: str, cases: Sequence[str]) -> dict[str, Volume]:
    """The DICOM series of every case that `given` tells of: one series, one folder a case, a table, a converted dataset.

    Args:
        given: a folder with the files of one series (for one case), or with a folder of them for each case; a table with the
            columns case, path and, where a series holds several volumes, volume; csm_manifest.json of a dataset that was
            converted from DICOM, its folder, its name or ID, which stands for the series that was the reference.
        cases: names of the predictions.

    Raises:
        UserError: it is none of them, or what a dataset was converted from is not DICOM or not what it was.
    """
    path = Path(given)
    if not path.exists() and len(path.parts) == 1 and not path.suffix:
        path = nnunet.folder("nnUNet_raw") / nnunet.dataset_name(given)
    if (path / MANIFEST).is_file():
        path /= MANIFEST
    if path.suffix == ".json":
        content = nnunet.read_json(path, "give -dicom the folder of a dataset that nnunet_csm convert wrote")
        entries = read_value(dict[str, Any], content.get("cases"), f"{path}: cases")
        return {case: _reference(entries[case], f"{path}: {case}") for case in cases if case in entries}
    if not path.is_dir():
        return _from_table(path, cases)
    folders = {case: Volume(path / case) for case in cases if (path / case).is_dir()}
    return folders or ({cases[0]: Volume(path)} if len(cases) == 1 else {})


def _reference(entry: Mapping[str, Any], where: str) -> Volume:
    """The series whose grid a converted case has; it has to be what was converted, byte by byte."""
    try:
        record = entry["series"][entry["reference"]]
        volume, digest = Volume(Path(record["source"]), record["index"]), record["sha256"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: is not as nnunet_csm convert writes it ({reason(error)}); convert again") from None
    if not volume.path.is_dir():
        raise UserError(
            f"{where}: its reference {entry['reference']} was converted from {volume.path}, which is no folder of DICOM files; "
            "give -dicom the folder of that series, or a table"
        )
    if sha256(volume.path) != digest:
        raise UserError(f"{where}: {volume.path} holds other files than when it was converted; convert again, or give -dicom it")
    return volume


def _from_table(path: Path, cases: Sequence[str]) -> dict[str, Volume]:
    """What the rows of these cases say."""
    found: dict[str, Volume] = {}
    for row in read_sheet(path, ("case", "path")):
        case, index, folder = row.require("case"), row.get("volume"), path.parent / row.require("path")
        if case not in cases:
            continue
        if case in found:
            raise row.error(f"case {case} stands in an earlier line already; keep the series whose grid its prediction has")
        if index and not index.isdecimal():
            raise row.error(f"'volume' is {index!r}; give the number of a volume in the series, from 0, or nothing")
        if not folder.is_dir():
            raise row.error(
                f"'path' is {row.get('path')}, and {folder} is no folder; give the folder of the series, from the table's"
            )
        found[case] = Volume(folder, int(index) if index else None)
    return found


def source_images(folder: Path, frames: Sequence[Frame], grid: Grid) -> list[Dataset]:
    """Headers of the slices in the order of the frames, or one of an enhanced file that holds these frames only, in this order.

    Where slices lie, what is between them and how they are turned is set to what frames and grid say: some files leave it out, or
    say it for each frame, or contradict their places.

    Raises:
        CaseError: slices are of several patients, studies or frames of reference, or lack what a segmentation must refer to; or
            a volume is spread over several enhanced files.
    """
    headers = {frame.file: header_of(frame.file) for frame in frames}
    first = next(iter(headers.values()))
    for keyword in SHARED:
        if len(values := {str(header.get(keyword, "")) for header in headers.values()}) > 1:
            raise CaseError(
                f"{folder} mixes slices of {len(values)} {keyword} in one series; keep those of one patient and study"
            )
    for keyword in NEEDED:
        if not first.get(keyword):
            raise CaseError(
                f"{folder} has no {keyword} in {frames[0].file.name}, which a segmentation has to take over; export it again"
            )
    if len(headers) > 1 and any("PerFrameFunctionalGroupsSequence" in header for header in headers.values()):
        raise CaseError(
            f"{folder} has a volume in {len(headers)} enhanced files, expected one; export it as one file, or by slices"
        )
    for header in headers.values():
        for keyword in (*OF_PATIENT, *OF_STUDY):
            if keyword not in header:
                setattr(header, keyword, "")
    if len(headers) == 1:
        first.SharedFunctionalGroupsSequence = [
            _group(PixelMeasures=_measures(frames[0], grid), PlaneOrientation=_turned(frames))
        ]
        first.PerFrameFunctionalGroupsSequence = [_group(PlanePosition=_placed(frame)) for frame in frames]
        first.NumberOfFrames = len(frames)
        return [first]
    for frame in frames:
        for said in (_measures(frame, grid), _turned(frames), _placed(frame)):
            headers[frame.file].update(said)
    return [headers[frame.file] for frame in frames]


def _group(**said: Dataset) -> Dataset:
    group = Dataset()
    for name, one in said.items():
        setattr(group, f"{name}Sequence", [one])
    return group


def _measures(frame: Frame, grid: Grid) -> Dataset:
    measures = Dataset()
    measures.PixelSpacing = _numbers(frame.spacing)
    measures.SliceThickness, measures.SpacingBetweenSlices = _numbers((frame.thickness or grid.spacing[2], grid.spacing[2]))
    return measures


def _turned(frames: Sequence[Frame]) -> Dataset:
    """One orientation of all, from which none differs by more than rounding."""
    orientation = Dataset()
    orientation.ImageOrientationPatient = _numbers(frames[0].orientation)
    return orientation


def _placed(frame: Frame) -> Dataset:
    position = Dataset()
    position.ImagePositionPatient = _numbers(frame.position)
    return position


def _numbers(values: Sequence[float]) -> list[DSfloat]:
    """As DICOM writes them, in 16 characters."""
    return [DSfloat(value, auto_format=True) for value in values]
