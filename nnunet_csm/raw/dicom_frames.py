"""DICOM files as frames: where each lies, what kind of image it is, and its voxels.

A frame is a classic file with one slice, or one of the many in an enhanced file, whose attributes stand in groups: those of the
frame, those all frames share. Files are read with pydicom, which gives attributes as they stand there; GDCM, which comes with
SimpleITK, decodes what pydicom alone cannot (JPEG and its kin).
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from nnunet_csm.errors import reason
from nnunet_csm.listing import file_problem, pointer_of
from nnunet_csm.raw.dicom_names import KEYWORDS
from nnunet_csm.raw.subjects import CaseError

# The vendors' own places of the b-value: (group, who keeps it, element).
PRIVATE_B_VALUES = (
    (0x0019, "SIEMENS MR HEADER", 0x0C),
    (0x2001, "Philips Imaging DD 001", 0x03),
    (0x0043, "GEMS_PARM_01", 0x39),
)
# Where slopes and intercepts stand.
RESCALING = (
    "RescaleSlope",
    "RescaleIntercept",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)


@dataclass(frozen=True)
class Frame:
    """A slice.

    Attributes:
        file: that holds it.
        number: in the file, from 0.
        attributes: by keyword, as text; see `dicom_names.KEYWORDS`.
        kind: what is one value in one volume, by the name a user reads; None where the file does not say.
        acquisition: its number, which may differ within a volume that is acquired in parts.
        shape: rows and columns.
        position: of its first voxel in mm.
        orientation: directions of its rows and of its columns.
        spacing: between rows and between columns, mm.
        thickness, between: SliceThickness and SpacingBetweenSlices in mm; 0 where the file has none.
        slope, intercept: from stored values to those meant.
    """

    file: Path
    number: int
    attributes: Mapping[str, str]
    kind: Mapping[str, float | str | None]
    acquisition: str
    shape: tuple[int, int]
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, ...]
    thickness: float
    between: float
    slope: float
    intercept: float

    @property
    def name(self) -> str:
        return self.file.name if self.number == 0 else f"{self.file.name} frame {self.number + 1}"


def series_in(folder: Path) -> dict[str, list[Dataset]]:
    """Headers of the images in `folder` itself, by series.

    DICOM that is no image (reports, presentation states, a DICOMDIR) is passed over, and so is what has another ending than the
    images. Raises `CaseError`, also for what has their ending and is none: it may have been a slice.
    """
    found: dict[str, list[Dataset]] = defaultdict(list)
    others: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            raise CaseError(str(file_problem(path)))
        if path.name.startswith(".") or path.is_dir():
            continue
        header = _careful(path, _header) if path.is_file() else None  # a pipe is never opened
        if header is not None:
            found[str(header.get("SeriesInstanceUID", ""))].append(header)
        elif not (path.is_file() and _careful(path, _is_whole)):
            others.append(path)
    if not found and (pointers := [path for path in others if path.is_file() and pointer_of(path)]):
        raise CaseError(str(file_problem(pointers[0])))
    endings = {_ending(Path(str(header.filename))) for headers in found.values() for header in headers}
    if odd := [path for path in others if _ending(path) in endings]:
        more = f" (and {len(odd) - 1} more)" if len(odd) > 1 else ""
        raise CaseError(
            f"{odd[0]}{more} is called as the slices are, but is {_described(odd[0])}; copy it again, or move it away"
        )
    return dict(found)


def _ending(path: Path) -> str:
    """Of a name; a number is none, since scanners number files."""
    return "" if path.suffix[1:].isdigit() else path.suffix.casefold()


def _is_whole(file: Path) -> bool:
    """Whether a file that is no image is DICOM to the point where it says what it is."""
    data = _whole(file, stop_before_pixels=True)
    return data is not None and ("SOPClassUID" in data or "DirectoryRecordSequence" in data)


def _described(path: Path) -> str:
    """What a file is that is no DICOM."""
    if not path.is_file():
        return "a device, a pipe or a socket"
    with path.open("rb") as stream:
        start = stream.read(16)
    if pointer := pointer_of(path):
        return f"a pointer of {pointer[0]} ({pointer[1]} gets the file)"
    return f"no DICOM, or cut off (it begins with {start!a})" if start else "empty"


def frames_of(header: Dataset) -> list[Frame]:
    """Frames of one file, in its order. Raises `CaseError`."""
    return _careful(Path(str(header.filename)), lambda file: list(_frames(header, file)))


def header_of(file: Path) -> Dataset:
    """Everything of an image file but its voxels. Raises `CaseError`."""
    header: Dataset | None = _careful(file, _header)
    assert header is not None
    return header


def voxels_of(frames: Sequence[Frame]) -> np.ndarray:
    """Voxels (z, y, x) in the order of the frames, each with its own slope; integers where that loses nothing, else float32.

    Raises `CaseError`.
    """
    planes: list[np.ndarray | None] = [None] * len(frames)
    for file in dict.fromkeys(frame.file for frame in frames):
        stored = _careful(file, _stored)
        for place, frame in enumerate(frames):
            if frame.file == file:
                if frame.number >= len(stored) or stored.shape[1:] != frame.shape:
                    raise CaseError(f"{file} is cut off or damaged: it holds pixels of the shape {stored.shape}; copy it again")
                planes[place] = stored[frame.number].astype(np.float64) * frame.slope + frame.intercept
    voxels = np.stack([plane for plane in planes if plane is not None])
    if not (voxels == np.round(voxels)).all() or np.abs(voxels).max() > 2**31 - 1:
        return voxels.astype(np.float32)
    smallest, largest = (np.min_scalar_type(int(one)) for one in (voxels.min(), voxels.max()))
    return voxels.astype(np.promote_types(smallest, largest))


def _careful(file: Path, read: Callable[[Path], Any]) -> Any:
    """Result of `read`. pydicom warns of much that does not matter, and raises errors of any kind on damaged files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(file)
    except CaseError:
        raise
    except Exception as error:
        msg = f"{file} cannot be read as a DICOM image ({reason(error)}); is the copy complete? is it one of another kind?"
        raise CaseError(msg) from error


def _header(file: Path) -> Dataset | None:
    """Everything but the voxels; None for what is no image."""
    header = _whole(file, stop_before_pixels=True)
    if header is None:
        return None
    kind = str(getattr(header.get("SOPClassUID", ""), "name", ""))
    if "Image Storage" not in kind and ("Storage" in kind or "Rows" not in header):
        return None
    for keyword in ("SeriesInstanceUID", "SeriesDescription"):
        header.get(keyword)  # pydicom decodes a value when it is first asked for, here where errors are expected
    return header


def _whole(file: Path, stop_before_pixels: bool = False) -> Dataset | None:
    """A DICOM file; None when it is of another kind. Old ones lack the preamble, but begin with the first groups."""
    with file.open("rb") as stream:
        start = stream.read(132)
    bare = start[128:] != b"DICM"
    if bare and start[:4] not in (b"\x08\0\0\0", b"\x08\0\x01\0", b"\x08\0\x05\0", b"\x08\0\x08\0", b"\x02\0\0\0"):
        return None
    data = pydicom.dcmread(file, stop_before_pixels=stop_before_pixels, force=bare)
    if bare and "TransferSyntaxUID" not in data.file_meta:
        implicit = data.original_encoding[0]
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return data


def _stored(file: Path) -> np.ndarray:
    """Voxels as stored, (frames, rows, columns)."""
    data = _whole(file)
    assert data is not None
    if not any(keyword in data for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise CaseError(f"{file} is cut off: it holds no pixels; copy it again")
    shape, syntax = (-1, data.Rows, data.Columns), data.file_meta.TransferSyntaxUID
    try:
        return data.pixel_array.reshape(shape)
    except Exception:
        if not syntax.is_compressed:
            raise
    try:
        return _decoded_by_gdcm(data).reshape(shape)
    except (RuntimeError, ValueError) as error:
        msg = f"{file} is compressed ({syntax.name}) and cannot be decoded ({reason(error)}); is the copy complete?"
        raise CaseError(msg) from error


def _decoded_by_gdcm(data: Dataset) -> np.ndarray:
    """Voxels as stored, by way of a copy without slopes and intercepts, of which GDCM applies the first to all frames."""
    for keyword in RESCALING:
        if keyword in data:
            delattr(data, keyword)
    with TemporaryDirectory() as folder:
        data.save_as(Path(folder) / "stored.dcm")
        return sitk.GetArrayFromImage(sitk.ReadImage(str(Path(folder) / "stored.dcm")))


def _frames(header: Dataset, file: Path) -> Iterator[Frame]:
    num_frames = int(header.get("NumberOfFrames") or 1)
    if int(header.get("SamplesPerPixel") or 1) != 1 or "PALETTE" in str(header.get("PhotometricInterpretation", "")):
        raise CaseError(f"{file} is a colour image; give a folder with one 3-D series of grey values")
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    if len(groups) != num_frames and (groups or num_frames > 1):
        msg = f"{file} has {num_frames} frames and says of {len(groups)} where they lie, expected as many; export it again"
        raise CaseError(msg)
    shared = [*_items(next(iter(header.get("SharedFunctionalGroupsSequence") or []), Dataset())), header]
    for number in range(num_frames):
        places = [*_items(groups[number]), *shared] if groups else [header]
        yield _frame(file, number, places, (int(header.Rows), int(header.Columns)))


def _items(group: Dataset) -> Iterator[Dataset]:
    """What a functional group says: its sequences hold one item each."""
    for element in group:
        if element.VR == "SQ" and element.value:
            yield element.value[0]


def _frame(file: Path, number: int, places: Sequence[Dataset], shape: tuple[int, int]) -> Frame:
    def numbers(keyword: str, count: int) -> tuple[float, ...]:
        value = _first(places, keyword)
        try:
            found = tuple(float(one) for one in value)
        except (TypeError, ValueError):
            found = ()
        if len(found) != count or not all(map(math.isfinite, found)):
            msg = f"{file} has the {keyword} {_text(value)!r}, not {count} numbers; its place in the patient is unknown"
            raise CaseError(msg)
        return found

    echo = _first(places, "EffectiveEchoTime")
    kind = {
        "b-value": _b_value(places),
        "echo time": _number(_first(places, "EchoTime") if echo is None else echo),
        "echo number": _number(_first(places, "EchoNumbers")),
        "inversion time": _number(_first(places, "InversionTime") or _first(places, "InversionTimes")),
        "flip angle": _number(_first(places, "FlipAngle")),
        "diffusion direction": _direction(places),
        "time point": _number(_first(places, "TemporalPositionIdentifier") or _first(places, "TemporalPositionIndex")),
        "image type": _text(_first(places, "FrameType") or _first(places, "ImageType")) or None,
        "part of complex numbers": _text(_first(places, "ComplexImageComponent")) or None,
    }
    thickness, between = (abs(_number(_first(places, one)) or 0.0) for one in ("SliceThickness", "SpacingBetweenSlices"))
    orientation, spacing = numbers("ImageOrientationPatient", 6), numbers("PixelSpacing", 2)
    rows, columns = orientation[:3], orientation[3:]
    if abs(np.dot(rows, columns)) > 0.01 or any(abs(np.linalg.norm(one) - 1) > 0.01 for one in (rows, columns)):
        raise CaseError(f"{file} has the ImageOrientationPatient {orientation}, expected two directions at right angles")
    if min(spacing) <= 0:
        raise CaseError(f"{file} has the PixelSpacing {spacing}, expected numbers above 0; export it again")
    slope, intercept = (_number(_first(places, one)) for one in ("RescaleSlope", "RescaleIntercept"))
    return Frame(
        file,
        number,
        {keyword: text for keyword in KEYWORDS if (text := _text(_first(places, keyword)))}
        | ({"DiffusionBValue": f"{kind['b-value']:g}"} if kind["b-value"] is not None else {}),
        kind,
        _text(_first(places, "FrameAcquisitionNumber") or _first(places, "AcquisitionNumber")),
        shape,
        numbers("ImagePositionPatient", 3),
        orientation,
        spacing,
        thickness,
        between,
        1.0 if slope is None else slope,
        intercept or 0.0,
    )


def _first(places: Sequence[Dataset], keyword: str) -> Any:
    """The value in the first place that has one; None where none has."""
    return next((value for place in places if (value := place.get(keyword)) not in (None, "")), None)


def _text(value: Any) -> str:
    parts = [value] if isinstance(value, str) or not isinstance(value, Sequence) else value
    text = "" if value is None else "\\".join(str(part) for part in parts).strip()
    return text.encode("utf-8", "replace").decode("utf-8")  # what was no text comes as lone surrogates, which no file takes


def _number(value: Any) -> float | None:
    try:
        number = float(_text(value).split("\\")[0])
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _direction(places: Sequence[Dataset]) -> str | None:
    """Of the gradient, rounded; in enhanced files it stands one sequence further inside."""
    inner = [item for place in places for item in (place.get("DiffusionGradientDirectionSequence") or [])[:1]]
    value = _first([*inner, *places], "DiffusionGradientOrientation")
    return None if value is None else " ".join(f"{float(one):.2f}" for one in value)


def _b_value(places: Sequence[Dataset]) -> float | None:
    """In s/mm²; where the standard's attribute is missing, the vendor's."""
    if (b_value := _number(_first(places, "DiffusionBValue"))) is not None:
        return b_value
    for group, creator, element in PRIVATE_B_VALUES:
        for place in places:
            try:
                value = place.private_block(group, creator)[element].value
            except KeyError:
                continue
            if isinstance(value, bytes):  # of a file whose types of values are not written in it
                value = value.decode("ascii", "replace").strip("\0 ")
            number = _number(value)
            return None if number is None else number % 1e9  # GE counts some from a thousand million
    return None
