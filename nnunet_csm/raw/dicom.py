"""A folder of DICOM files as one volume, and the name of its series from the attributes."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_csm.errors import reason
from nnunet_csm.raw.series import alias_table
from nnunet_csm.raw.subjects import CaseError
from nnunet_csm.raw.volumes import read_header

_TABLE = json.loads(resources.files("nnunet_csm.raw").joinpath("dicom_words.json").read_text(encoding="utf-8"))
TAGS: dict[str, str] = _TABLE["tags"]
# Words of descriptions that the alias table, which is about names of channels, does not have. "tirm" is a FLAIR or a STIR: the
# inversion time decides; with "t1" it is inversion recovery with the weighting of T1.
DESCRIPTION_WORDS: dict[str, str] = _TABLE["descriptions"]
# No series of their own: planning images, and images computed from others.
OTHER_WORDS = frozenset(_TABLE["other"])
CONTRAST_WORDS, NO_CONTRAST_WORDS = frozenset(_TABLE["contrast"]), frozenset(_TABLE["no_contrast"])
# Names that say more than others where a description has several of equal length: "t2 flair" is a FLAIR.
SPECIFIC_FIRST: list[str] = _TABLE["specific_first"]


def read_dicom_series(folder: Path) -> sitk.Image:
    """The only series in `folder`, sorted along its normal, with the geometry of its headers.

    A single file with several frames (enhanced MR) is a series as well. Slices missing at either end cannot be noticed.
    Raises `CaseError` when there is no series or more than one, when a slice is missing or twice there, when slices differ in
    shape or orientation, or when a file cannot be read.
    """
    files = _only_series(folder)
    if len(files) > 1:
        _check_stack(folder, files)
    try:
        image = sitk.ReadImage([str(file) for file in files]) if len(files) > 1 else sitk.ReadImage(str(files[0]))
    except RuntimeError as error:
        raise CaseError(f"{folder} cannot be read as a DICOM series ({reason(error)}); is the copy complete?") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        msg = f"{folder} holds colour or {image.GetDimension()}-D images; give a folder with one 3-D series of grey values"
        raise CaseError(msg)
    if image.GetSize()[2] < 2:
        raise CaseError(f"{folder} holds a single slice ({files[0].name}); give the folder with all slices of the series")
    return image


def series_name(folder: Path) -> str | None:
    """Canonical name of the series in `folder` after BIDS' suffixes, None when the attributes do not tell.

    Decided in this order: what ImageType declares (ADC map, trace image); the words of SeriesDescription, then of ProtocolName,
    through the alias table, the longest match first; a diffusion b-value above 0; echo, repetition and inversion times. A T1w
    with a contrast agent is T1ce. Raises `CaseError` like `read_dicom_series` when `folder` does not hold exactly one series.
    """
    files = _only_series(folder)
    return name_from_attributes(_attributes(files[len(files) // 2]))


def name_from_attributes(attributes: Mapping[str, str]) -> str | None:
    """`series_name` on attributes by keyword (`TAGS`); a missing one is left out or empty. Times in ms, b-value in s/mm²."""
    if attributes.get("Modality", "MR") not in ("MR", ""):
        return None
    texts = [attributes.get(key, "") for key in ("SeriesDescription", "ProtocolName")]
    words = [word for text in texts for word in _words(text)]
    if OTHER_WORDS & set(words):
        return None
    name = (
        _from_image_type(attributes.get("ImageType", ""))
        or next((found for text in texts if (found := _from_text(text))), None)
        or _from_b_value(attributes)
        or _from_timing(attributes)
    )
    return "T1ce" if name == "T1w" and _has_contrast(attributes, words) else name


def _from_image_type(image_type: str) -> str | None:
    parts = {part.strip().upper() for part in image_type.split("\\")}
    if parts & {"ADC", "ADC_UNSPECIFIED"}:
        return "ADC"
    return "DWI" if parts & {"TRACEW", "DIFFUSION"} else None


def _from_text(text: str) -> str | None:
    """The longest run of words that names a series; among runs of equal length the more specific name."""
    words = _words(text)
    names = _names_in_descriptions()
    for length in range(len(words), 0, -1):
        runs = ("".join(words[start : start + length]) for start in range(len(words) - length + 1))
        found = {names[run] for run in runs if run in names}
        if found:
            return min(found, key=lambda name: SPECIFIC_FIRST.index(name) if name in SPECIFIC_FIRST else 0)
    return None


def _names_in_descriptions() -> dict[str, str]:
    table = {alias: canonical for canonical, aliases in alias_table().items() for alias in (canonical, *aliases)}
    return {"".join(_words(alias)): canonical for alias, canonical in {**table, **DESCRIPTION_WORDS}.items()}


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s_\-/.,;:()\[\]]+", text.casefold()) if word]


def _has_contrast(attributes: Mapping[str, str], words: Sequence[str]) -> bool:
    """Words win over ContrastBolusAgent, which some scanners keep filled for the whole study."""
    if NO_CONTRAST_WORDS & set(words):
        return False
    agent = attributes.get("ContrastBolusAgent", "").strip().casefold()
    return bool(CONTRAST_WORDS & set(words)) or agent not in ("", "none", "no", "n/a", "no contrast")


def _from_b_value(attributes: Mapping[str, str]) -> str | None:
    b_value = _number(attributes.get("DiffusionBValue", ""))
    return "DWI" if b_value is not None and b_value > 0 else None


def _from_timing(attributes: Mapping[str, str]) -> str | None:
    """Weighting by the usual ranges for spin and gradient echo at 1.5 and 3 T; None between the ranges and for echo-planar."""
    sequence = {part.strip() for part in attributes.get("ScanningSequence", "").split("\\")}
    echo, repetition, inversion = (_number(attributes.get(key, "")) for key in ("EchoTime", "RepetitionTime", "InversionTime"))
    if echo is None or repetition is None or "EP" in sequence:
        return None
    if "GR" in sequence and "SE" not in sequence:
        if echo >= 15:
            return "T2starw"
        return "T1w" if inversion and echo < 10 else None  # without inversion it may be spoiled, balanced or an angiogram
    if inversion and inversion >= 1500 and echo >= 60:
        return "FLAIR"
    if inversion and inversion <= 300 and repetition >= 2000:
        return "STIR"
    if inversion or not sequence & {"SE", "RM"}:
        return None
    if echo < 30:
        return "T1w" if repetition < 1200 else "PDw" if repetition >= 1800 else None
    return "T2w" if echo >= 60 and repetition >= 1500 else None


def _number(text: str) -> float | None:
    try:
        return float(text.split("\\")[0])
    except ValueError:
        return None


def _only_series(folder: Path) -> list[Path]:
    """Files of the only series in `folder` itself (not its subfolders), in the order of the slices."""
    if not folder.is_dir():
        raise CaseError(f"{folder} is not a folder; give the folder that holds the DICOM files of one series")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise CaseError(f"{folder} may not be read by this user; change its permission (chmod -R u+rX)")
    reader = sitk.ImageSeriesReader()
    with _quiet():
        series = {uid: reader.GetGDCMSeriesFileNames(str(folder), uid) for uid in reader.GetGDCMSeriesIDs(str(folder))}
    if not series:
        entries = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        found = f"found {', '.join(entries[:3])}{' ...' if len(entries) > 3 else ''}" if entries else "it is empty"
        raise CaseError(f"{folder} holds no DICOM image; {found}; give the folder in which the files of one series lie")
    if len(series) > 1:
        listing = "; ".join(_described(Path(files[0]), len(files)) for files in series.values())
        raise CaseError(f"{folder} holds {len(series)} series, not one: {listing}; move each to a folder of its own")
    return [Path(file) for file in next(iter(series.values()))]


def _described(first: Path, num_files: int) -> str:
    description = _attributes(first).get("SeriesDescription", "").strip() or "without description"
    return f"{description!r} ({num_files} {'file' if num_files == 1 else 'files'}, such as {first.name})"


def _attributes(file: Path) -> dict[str, str]:
    return {keyword: text for keyword, tag in TAGS.items() if (text := _tag(read_header(file), tag))}


def _tag(header: sitk.ImageFileReader, tag: str) -> str:
    # GDCM decodes as latin-1 what it cannot; such bytes come as lone surrogates, which no file or terminal takes
    text = header.GetMetaData(tag) if header.HasMetaDataKey(tag) else ""
    return text.encode("utf-8", "replace").decode("utf-8").strip()


def _check_stack(folder: Path, files: Sequence[Path]) -> None:
    """Raise `CaseError` unless the files are slices of one shape, parallel, and at equal distances along their normal."""
    headers = [read_header(file) for file in files]
    shapes = {header.GetSize()[:2] for header in headers}
    if len(shapes) > 1:
        msg = f"{folder} mixes slices of the shapes {sorted(shapes)} (x, y) in one series; keep those of one acquisition"
        raise CaseError(msg)
    orientations = [_numbers(header, "ImageOrientationPatient", 6, file) for header, file in zip(headers, files, strict=True)]
    if np.abs(np.subtract(orientations, orientations[0])).max() > 1e-3:
        msg = f"{folder} mixes slices of several orientations in one series, as a localizer does; give a parallel stack"
        raise CaseError(msg)
    positions = np.array([_numbers(header, "ImagePositionPatient", 3, file) for header, file in zip(headers, files, strict=True)])
    normal = np.cross(orientations[0][:3], orientations[0][3:])
    _check_distances(folder, files, positions @ normal)
    in_plane = positions - np.outer(positions @ normal, normal)
    shift = float(np.linalg.norm(in_plane - in_plane[0], axis=1).max())
    if shift > 1.0:
        raise CaseError(f"{folder} has slices that are shifted by up to {shift:.1f} mm in their plane; is it one acquisition?")


def _check_distances(folder: Path, files: Sequence[Path], along: np.ndarray) -> None:
    order = np.argsort(along)
    gaps = np.diff(along[order])
    usual = float(np.median(gaps))
    if (gaps < 1e-3).any():
        at = int(np.argmin(gaps))
        pair = " and ".join(files[order[index]].name for index in (at, at + 1))
        raise CaseError(
            f"{folder} holds {int((gaps < 1e-3).sum())} slices at places where another one is, such as {pair}; a series with "
            "several volumes (b-values, phases, echoes) must be split, each to a folder of its own"
        )
    # scanners round positions; a missing slice doubles the distance
    odd = np.flatnonzero(np.abs(gaps - usual) > 0.02 * usual + 0.01)
    if odd.size:
        at = int(odd[0])
        raise CaseError(
            f"{folder} has slices at unequal distances: {gaps[at]:.2f} mm between {files[order[at]].name} and "
            f"{files[order[at + 1]].name}, {usual:.2f} mm elsewhere; is a slice missing?"
        )


def _numbers(header: sitk.ImageFileReader, keyword: str, count: int, file: Path) -> list[float]:
    text = _tag(header, TAGS[keyword])
    try:
        numbers = [float(part) for part in text.split("\\")]
    except ValueError:
        numbers = []
    if len(numbers) != count:
        raise CaseError(f"{file} has the {keyword} {text!r}, not {count} numbers; its place in the patient is unknown")
    return numbers


@contextmanager
def _quiet() -> Iterator[None]:
    """Without ITK's own warning that a folder holds no series; ours follows."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)
