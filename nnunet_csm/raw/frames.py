"""Frames of DICOM files: the slices of a folder's only series, with their attributes and pixels.

Headers, the functional groups of enhanced files, and pixels are read with pydicom: GDCM takes the geometry of several frames from
the first. It still decodes what is compressed in ways that pydicom alone cannot.
"""

import math
import os
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from jaxtyping import Shaped
from pydicom.multival import MultiValue

from nnunet_csm.errors import reason
from nnunet_csm.raw.subjects import CaseError

ENHANCED_NAMES = {
    "EffectiveEchoTime": "EchoTime",
    "InversionTimes": "InversionTime",
    "FrameType": "ImageType",
    "TemporalPositionIndex": "TemporalPositionIdentifier",
}
# b-values before there was an attribute for them: Siemens, GE (the first of four numbers, above 1e9 by an offset), Philips
PRIVATE_B_VALUES = ((0x0019, 0x100C), (0x0043, 0x1039), (0x2001, 0x1003))


@dataclass(frozen=True)
class Frame:
    """One slice: `values` are attributes of the file and of its functional groups by keyword; `number` is that in the file."""

    file: Path
    number: int
    num_in_file: int
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.file.name if self.num_in_file == 1 else f"frame {self.number + 1} of {self.file.name}"

    def text(self, keyword: str) -> str:
        """As it is compared and shown: numbers rounded, several values joined; "" where there is none."""
        value = self.values.get(keyword)
        parts = value if isinstance(value, MultiValue | list) else [] if value is None else [value]
        text = "\\".join(f"{part:.4g}" if isinstance(part, float) else str(part) for part in parts)
        return text.encode("utf-8", "replace").decode("utf-8").strip()

    def numbers(self, keyword: str, count: int) -> list[float]:
        """Raises `CaseError` unless there are `count` finite numbers."""
        value: Any = self.values.get(keyword)
        try:
            numbers = [float(part) for part in (value if isinstance(value, MultiValue | list) else [value])]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != count or not all(map(math.isfinite, numbers)):
            found = repr(self.text(keyword)) if value is not None else "none"
            msg = f"{self.file}: {self.name} has the {keyword} {found}, expected {count} numbers; export the series again"
            raise CaseError(msg)
        return numbers


def only_series(folder: Path) -> list[Frame]:
    """Frames of the only series in `folder` itself (not its subfolders), by file name."""
    if not folder.is_dir():
        raise CaseError(f"{folder} is not a folder; give the folder that holds the DICOM files of one series")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise CaseError(f"{folder} may not be read by this user; change its permission (chmod -R u+rX)")
    series: dict[str, list[Frame]] = defaultdict(list)
    others, without_pixels = list[Path](), list[Path]()
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in entries:
        if path.is_dir():
            continue
        header = _header(path)
        if header is None:
            others.append(path)
        elif "Rows" in header and "Columns" in header:
            series[str(header.get("SeriesInstanceUID", ""))] += _frames(path, header)
        elif not header.get("SeriesInstanceUID"):
            without_pixels.append(path)
    if not series:
        listed = [f"{ascii(path.name)[1:-1]}{'/' * path.is_dir()}" for path in entries]
        found = f"found {', '.join(listed[:3])}{' ...' if len(listed) > 3 else ''}" if listed else "it is empty"
        raise CaseError(f"{folder} holds no DICOM image; {found}; give the folder in which the files of one series lie")
    if len(series) > 1:
        listing = "; ".join(_described(frames) for frames in series.values())
        raise CaseError(f"{folder} holds {len(series)} series, not one: {listing}; move each to a folder of its own")
    frames = next(iter(series.values()))
    endings = {_ending(frame.file) for frame in frames}
    broken = [path for path in others if _ending(path) in endings] + [path for path in without_pixels if path.name != "DICOMDIR"]
    if broken:
        more = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        what = _what_it_is(broken[0])
        raise CaseError(
            f"{ascii(str(broken[0]))[1:-1]}{more} is called as its series is, but is {what}; copy it again, or move it away"
        )
    return frames


def _ending(path: Path) -> str:
    """Of the name; a number is none, since scanners number files."""
    return "" if path.suffix[1:].isdigit() else path.suffix.casefold()


def _what_it_is(path: Path) -> str:
    if not path.exists():
        return "a link to nothing"
    if not path.is_file():
        return "no regular file"
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS (git lfs pull gets the file)"
    return f"no DICOM image ({'0 bytes' if not start else f'it begins with {start[:16]!a}'})"


def _header(path: Path) -> pydicom.Dataset | None:
    """All but the pixels; None for what is no DICOM. A pipe or a link to nothing is never opened."""
    if not path.is_file():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are not by the standard; those that matter are checked
            header = pydicom.dcmread(path, stop_before_pixels=True, force=True)  # old files begin without the letters DICM
            known = "SOPClassUID" in header or "Rows" in header
    except OSError as error:
        raise CaseError(f"{path} cannot be read ({reason(error)})") from error
    except Exception:  # a parser of what may be anything raises anything
        return None
    return header if known else None


def _frames(path: Path, header: pydicom.Dataset) -> list[Frame]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            common = _flat(header)
            if "DiffusionBValue" not in common and (b_value := _private_b_value(header)) is not None:
                common["DiffusionBValue"] = b_value
            shared = _of_groups(header.get("SharedFunctionalGroupsSequence"))
            groups = list(header.get("PerFrameFunctionalGroupsSequence") or [])
            number = int(header.get("NumberOfFrames") or 1)
            if groups:
                common.pop("AcquisitionNumber", None)
                if len(groups) != number:
                    raise CaseError(f"{path} tells of {number} frames, but describes {len(groups)}; copy it again")
            own = [_of_groups([group]) for group in groups] or [{}] * number
    except CaseError:
        raise
    except Exception as error:  # as above
        raise CaseError(f"{path} has a header that cannot be read ({reason(error)}); copy it again") from error
    return [Frame(path, i, number, {**common, **shared, **one}) for i, one in enumerate(own)]


def _flat(dataset: pydicom.Dataset) -> dict[str, Any]:
    """Values by keyword, without sequences."""
    values = {one.keyword: one.value for one in dataset if one.keyword and one.VR != "SQ" and one.value not in (None, "")}
    return {ENHANCED_NAMES.get(keyword, keyword): value for keyword, value in values.items()}


def _of_groups(groups: Iterable[pydicom.Dataset] | None) -> dict[str, Any]:
    """Values in the first item of each functional group, and in that of sequences inside it, as gradient directions are."""
    values: dict[str, Any] = {}
    for group in list(groups or [])[:1]:
        for element in group:
            if element.VR == "SQ" and element.value:
                inner = element.value[0]
                values |= _of_groups([inner]) | _flat(inner)
    return values


def _private_b_value(header: pydicom.Dataset) -> float | None:
    for tag in PRIVATE_B_VALUES:
        if tag not in header:
            continue
        value = header[tag].value
        try:
            first = (
                value if isinstance(value, str | int | float) else bytes(value).decode() if isinstance(value, bytes) else value[0]
            )
            return float(str(first).split("\\")[0]) % 1e9
        except (TypeError, ValueError, IndexError):
            continue
    return None


def _described(frames: Sequence[Frame]) -> str:
    description = frames[0].text("SeriesDescription") or "without description"
    files = list(dict.fromkeys(frame.file for frame in frames))
    return f"{description!r} ({len(files)} {'file' if len(files) == 1 else 'files'}, such as {files[0].name})"


def stored_pixels(frame: Frame) -> Shaped[np.ndarray, "frames y x"]:
    """As stored, of all frames of a file. Raises `CaseError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            file = pydicom.dcmread(frame.file, force=True)
            if "TransferSyntaxUID" not in file.file_meta:
                file.file_meta.TransferSyntaxUID = pydicom.uid.ImplicitVRLittleEndian
            try:
                array = file.pixel_array
            except (NotImplementedError, RuntimeError):
                array = _decoded_by_gdcm(file)
    except Exception as error:  # decoders of what may be damaged raise anything
        raise CaseError(f"{frame.file} cannot be read ({reason(error)}); is the copy complete?") from error
    shape = (frame.num_in_file, int(frame.values["Rows"]), int(frame.values["Columns"]))
    if array.size != np.prod(shape):
        raise CaseError(
            f"{frame.file} holds pixels of the shape {array.shape}, its header tells of {shape}; is the copy complete?"
        )
    return array.reshape(shape)


def _decoded_by_gdcm(file: pydicom.Dataset) -> Shaped[np.ndarray, "..."]:
    """Stored values of a file compressed in a way that pydicom does not know; rescaling is ours."""
    for key in ("RescaleSlope", "RescaleIntercept", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        if key in file:
            delattr(file, key)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stored.dcm"
        file.save_as(path)
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
