"""A folder of DICOM files as one volume, and the name of its series from the attributes."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from jaxtyping import Shaped

from nnunet_csm.raw.frames import Frame, only_series, stored_pixels
from nnunet_csm.raw.series import alias_table
from nnunet_csm.raw.subjects import CaseError

_TABLE = json.loads(resources.files("nnunet_csm.raw").joinpath("dicom_words.json").read_text(encoding="utf-8"))
# Words of descriptions that the alias table, which is about names of channels, does not have. "tirm" is a FLAIR or a STIR: the
# inversion time decides; with "t1" it is inversion recovery with the weighting of T1.
DESCRIPTION_WORDS: dict[str, str] = _TABLE["descriptions"]
# No series of their own: planning images, and images computed from others.
OTHER_WORDS = frozenset(_TABLE["other"])
CONTRAST_WORDS, NO_CONTRAST_WORDS = frozenset(_TABLE["contrast"]), frozenset(_TABLE["no_contrast"])
# Names that say more than others where a description has several of equal length: "t2 flair" is a FLAIR.
SPECIFIC_FIRST: list[str] = _TABLE["specific_first"]


# Attributes that name a series.
NAMING = (
    "ImageType", "Modality", "SeriesDescription", "ContrastBolusAgent", "ScanningSequence", "RepetitionTime", "EchoTime",
    "InversionTime", "ProtocolName", "DiffusionBValue",
)  # fmt: skip
# Attributes that are one value in a volume. Those of enhanced files are called so by `frames`.
OF_A_VOLUME = (
    "DiffusionBValue", "DiffusionGradientOrientation", "EchoTime", "InversionTime", "FlipAngle", "ImageType", "AcquisitionNumber",
    "TemporalPositionIdentifier", "StackID", "PhotometricInterpretation",
)  # fmt: skip


def read_dicom_series(folder: Path, several: bool = False) -> sitk.Image:
    """The only series in `folder`, sorted along its normal, with the geometry of its headers; voxels rescaled frame by frame.

    Frames come from files with one each, from enhanced files with many, or both. What makes a volume (`OF_A_VOLUME`, shape,
    spacing, orientation) must be one value. Slices missing at either end cannot be noticed.

    Args:
        folder: subfolders are not looked into; files of another ending that are no DICOM do not disturb.
        several: give a series of several volumes (b-values, echoes, ...) as a 4-D image, in the order of their values.

    Raises:
        CaseError: there is no series or more than one; several volumes, unless asked for; a slice is missing or twice there;
            frames differ in what makes a stack; a file cannot be read, or is no DICOM although called as one.
    """
    frames = only_series(folder)
    if len(frames) < 2:
        raise CaseError(f"{folder} holds a single slice ({frames[0].name}); give the folder with all slices of the series")
    volumes = _volumes(folder, frames)
    if len(volumes) > 1 and not several:
        msg = f"{folder} holds {len(volumes)} volumes in one series, which differ in {_differing(frames)}; choose one by number "
        msg += f"('volume' of a table, 0 to {len(volumes) - 1} in this order), or move each to a folder of its own"
        raise CaseError(msg)
    images = [_image(folder, stack) for stack in volumes]
    if len(images) == 1:
        return images[0]
    if any(_geometry(image) != _geometry(images[0]) for image in images):
        raise CaseError(f"{folder} holds {len(images)} volumes of several grids in one series; move each to a folder of its own")
    return sitk.JoinSeries(images)


def series_name(folder: Path) -> str | None:
    """Canonical name of the series in `folder` after BIDS' suffixes, None when the attributes do not tell.

    Decided in this order: what ImageType declares (ADC map, trace image); the words of SeriesDescription, then of ProtocolName,
    through the alias table, the longest match first; a diffusion b-value above 0; echo, repetition and inversion times. A T1w
    with a contrast agent is T1ce. Raises `CaseError` like `read_dicom_series` when `folder` does not hold exactly one series.
    """
    frames = only_series(folder)
    middle = frames[len(frames) // 2]
    return name_from_attributes({keyword: middle.text(keyword) for keyword in NAMING})


def name_from_attributes(attributes: Mapping[str, str]) -> str | None:
    """`series_name` on attributes by keyword (`NAMING`); a missing one is left out or empty. Times in ms, b-value in s/mm²."""
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


def _makes_volumes(frames: Sequence[Frame]) -> list[str]:
    """Attributes that have several values. A number that no two slices share counts slices, not volumes."""
    counts = {keyword: len({frame.text(keyword) for frame in frames}) for keyword in OF_A_VOLUME}
    return [key for key, count in counts.items() if count > 1 and not (key == "AcquisitionNumber" and count == len(frames))]


def _differing(frames: Sequence[Frame]) -> str:
    """The attributes that have several values, with them."""
    return " and ".join(
        f"{key} ({', '.join(f'{value or None}: {number} slices' for value, number in _counted(frames, key))})"
        for key in _makes_volumes(frames)
    )


def _counted(frames: Sequence[Frame], keyword: str) -> list[tuple[str, int]]:
    return sorted(Counter(frame.text(keyword) for frame in frames).items(), key=lambda item: _in_order(item[0]))


def _in_order(text: str) -> tuple[float, str]:
    """Sorts numbers as such; no value comes first."""
    number = _number(text)
    return (-math.inf if not text else math.inf if number is None else number), text


def _volumes(folder: Path, frames: Sequence[Frame]) -> list[list[Frame]]:
    """Frames by volume, each volume's sorted along its normal. Raises `CaseError` for frames that make no stack."""
    shapes = {(int(frame.values["Columns"]), int(frame.values["Rows"])) for frame in frames}
    if len(shapes) > 1:
        msg = f"{folder} mixes slices of the shapes {sorted(shapes)} (x, y) in one series; keep those of one acquisition"
        raise CaseError(msg)
    orientations = np.array([frame.numbers("ImageOrientationPatient", 6) for frame in frames])
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        msg = f"{folder} mixes slices of several orientations in one series, as a localizer does; give a parallel stack"
        raise CaseError(msg)
    across, down = orientations[0].reshape(2, 3)
    if abs(across @ down) > 1e-3 or np.abs(np.linalg.norm([across, down], axis=1) - 1).max() > 1e-2:
        raise CaseError(
            f"{folder}: ImageOrientationPatient {orientations[0].tolist()} is no pair of unit vectors at right angles"
        )
    spacings = np.array([frame.numbers("PixelSpacing", 2) for frame in frames])
    if spacings.min() <= 0 or np.abs(spacings / spacings[0] - 1).max() > 1e-3:
        found = sorted({tuple(edges) for edges in spacings.tolist()})
        raise CaseError(f"{folder} has slices of the PixelSpacing {found} (y, x in mm); expected one above 0 for all of them")
    if any(int(frame.values.get("SamplesPerPixel", 1)) != 1 for frame in frames):
        raise CaseError(f"{folder} holds colour images; give a folder with one 3-D series of grey values")
    keys = _makes_volumes(frames)
    groups: dict[tuple[str, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        groups[tuple(frame.text(key) for key in keys)].append(frame)
    return [groups[values] for values in sorted(groups, key=lambda values: [_in_order(value) for value in values])]


def _image(folder: Path, frames: Sequence[Frame]) -> sitk.Image:
    """One volume, its slices at equal distances along their normal."""
    if len(frames) < 2:
        raise CaseError(f"{folder} has a volume of a single slice, {frames[0].name}; keep slices of one acquisition")
    positions = np.array([frame.numbers("ImagePositionPatient", 3) for frame in frames])
    across, down = np.reshape(frames[0].numbers("ImageOrientationPatient", 6), (2, 3))
    across = across / np.linalg.norm(across)
    down = down - (down @ across) * across
    down /= np.linalg.norm(down)
    normal = np.cross(across, down)
    along = positions @ normal
    _check_distances(folder, frames, along)
    in_plane = positions - np.outer(along, normal)
    shift = float(np.linalg.norm(in_plane - in_plane[0], axis=1).max())
    if shift > 1.0:
        raise CaseError(f"{folder} has slices that are shifted by up to {shift:.1f} mm in their plane; is it one acquisition?")
    order = np.argsort(along)
    image = sitk.GetImageFromArray(_voxels([frames[i] for i in order]))
    row_spacing, column_spacing = frames[0].numbers("PixelSpacing", 2)
    image.SetSpacing((column_spacing, row_spacing, float(along[order[-1]] - along[order[0]]) / (len(frames) - 1)))
    image.SetOrigin(positions[order[0]].tolist())
    image.SetDirection(np.stack([across, down, normal], axis=1).flatten().tolist())
    return image


def _geometry(image: sitk.Image) -> tuple[Any, ...]:
    return image.GetSize(), *(tuple(np.round(one, 3)) for one in (image.GetSpacing(), image.GetOrigin(), image.GetDirection()))


def _voxels(frames: Sequence[Frame]) -> Shaped[np.ndarray, "z y x"]:
    """Rescaled slices: integers where all of them are, of a type that holds all slices, else float32."""
    stored: dict[Path, Shaped[np.ndarray, "frames y x"]] = {}
    slices = []
    for frame in frames:
        if frame.file not in stored:
            if frame.num_in_file == 1:
                stored.clear()
            stored[frame.file] = stored_pixels(frame)
        slope, intercept = (
            frame.numbers(key, 1)[0] if key in frame.values else usual
            for key, usual in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0))
        )
        plane = stored[frame.file][frame.number]
        slices.append(plane if (slope, intercept) == (1, 0) else plane * slope + intercept)
    voxels = np.stack(slices)
    if not np.array_equal(voxels, np.round(voxels)):
        return voxels.astype(np.float32)
    fitting = (
        kind
        for kind in (np.int16, np.uint16, np.int32)
        if np.iinfo(kind).min <= voxels.min() and voxels.max() <= np.iinfo(kind).max
    )
    return voxels.astype(next(fitting, np.float32))


def _check_distances(folder: Path, frames: Sequence[Frame], along: np.ndarray) -> None:
    order = np.argsort(along)
    gaps = np.diff(along[order])
    usual = float(np.median(gaps))
    if (gaps < 1e-3).any():
        at = int(np.argmin(gaps))
        pair = " and ".join(frames[order[index]].name for index in (at, at + 1))
        raise CaseError(
            f"{folder} holds {int((gaps < 1e-3).sum())} slices at places where another one is, such as {pair}; a series with "
            "several volumes (b-values, phases, echoes) must be split, each to a folder of its own"
        )
    # scanners round positions; a missing slice doubles the distance
    odd = np.flatnonzero(np.abs(gaps - usual) > 0.02 * usual + 0.01)
    if odd.size:
        at = int(odd[0])
        more = f" ({odd.size} such gaps)" if odd.size > 1 else ""
        raise CaseError(
            f"{folder} has slices at unequal distances: {gaps[at]:.2f} mm between {frames[order[at]].name} and "
            f"{frames[order[at + 1]].name}, {usual:.2f} mm elsewhere{more}; is a slice missing?"
        )
