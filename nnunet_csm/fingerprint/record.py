"""What is known of a dataset's images before planning: which series each case has, how they look, where they lie.

It stands beside nnU-Net's `dataset_fingerprint.json`, needs no labels, and says per case and series what nnU-Net's does not ask.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.files import write_text
from nnunet_csm.raw.background import PERCENTILES, background
from nnunet_csm.schema import from_dict

FILE_NAME = "csm_fingerprint.json"
VERSION = 2

# what is known of the distribution function, with the least and the largest value
KNOWN = (0.0, *PERCENTILES, 100.0)
NUM_BISECTIONS = 40

Subset = Literal["imagesTr", "imagesTs"]
Millimetres = tuple[float, float, float]

ALL_ZERO, CONSTANT, NOT_FINITE, UNREADABLE, NO_FILE = "all zero", "constant", "no finite voxel", "unreadable", "no file"


@dataclass(frozen=True)
class Intensities:
    """Numbers of the voxels that are finite and not 0; `percentiles` at `PERCENTILES`."""

    minimum: float
    maximum: float
    mean: float
    sd: float
    percentiles: tuple[float, ...]

    def at(self, percentile: float) -> float:
        return self.percentiles[PERCENTILES.index(percentile)]

    @property
    def background(self) -> float | None:
        """The value that stands for background in place of 0, where there is one."""
        return background(self.percentiles)


@dataclass(frozen=True)
class Before:
    """A series' own grid before the conversion put it on that of its case: `size` (z, y, x) in voxels, `spacing` in mm."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]


@dataclass(frozen=True)
class SeriesRecord:
    """One series of one case.

    Attributes:
        absent: why it counts as missing: what `flat` says, "copy of NAME" or "almost a copy of NAME"; None when it is there.
        flat: why the volume alone shows nothing: all zero, constant, no finite voxel, unreadable, no file; else None.
        twins: series of the case with the same image; True when bit-identical, False when rescaled or lossy.
        shape: (z, y, x) of the file; None when it cannot be read.
        spacing: mm, as `shape`.
        before: its own grid before resampling, where the converter's manifest tells.
        num_invalid: voxels that are NaN or infinite.
        foreground: share of voxels that are finite and not 0.
        intensities: None where `flat` is not.
        appearance: means of 27 blocks and mean step between neighbours, in units of the 0.5th to 99.5th percentile.
        shift_mm: how far (z, y, x) it lies from most other series of the case, when that is clearly not zero: 3 mm or more; 0
            along an axis where it is less than half a voxel.
    """

    absent: str | None
    flat: str | None
    twins: dict[str, bool]
    shape: tuple[int, ...] | None
    spacing: tuple[float, ...] | None
    before: Before | None
    num_invalid: int
    foreground: float
    intensities: Intensities | None
    appearance: tuple[float, ...]
    shift_mm: Millimetres | None


@dataclass(frozen=True)
class CaseRecord:
    """One case.

    Attributes:
        subset: where its images are.
        key: of the files it was measured from (names, sizes, times); another key means measuring again.
        shape: (z, y, x) that all its series share; None where they do not, or one cannot be read: nnU-Net cannot use such a case.
        shape_after_crop: of the box around all voxels that are not 0 in any series, as nnU-Net crops.
        spacing: mm, as `shape`.
        problems: of its files and grids.
        series: all series of the dataset, by canonical name, in the order of the channels.
    """

    subset: Subset
    key: str
    shape: tuple[int, ...] | None
    shape_after_crop: tuple[int, ...] | None
    spacing: tuple[float, ...] | None
    problems: tuple[str, ...]
    series: dict[str, SeriesRecord]


@dataclass(frozen=True)
class Fingerprint:
    """All cases of a dataset; `series` are canonical names in the order of the channels."""

    version: int
    dataset: str
    series: tuple[str, ...]
    cases: dict[str, CaseRecord]


def read_fingerprint(path: Path) -> Fingerprint:
    """Raises `UserError` where the file is not there, broken, or of another version."""
    remedy = "run `nnunet_csm fingerprint -d ID`"
    data: Any = nnunet.read_json(path, remedy)
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise UserError(f"{path}: version {version}, expected {VERSION}; {remedy}")
    return from_dict(Fingerprint, data, str(path))


def save_fingerprint(fingerprint: Fingerprint, path: Path) -> None:
    """Write the file whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(fingerprint), indent=1, allow_nan=False) + "\n")


def cases_of(fingerprint: Fingerprint, subset: Subset | None = "imagesTr") -> dict[str, CaseRecord]:
    """Cases of one subset; all for None."""
    return {name: case for name, case in fingerprint.cases.items() if subset in (None, case.subset)}


def num_with_series(fingerprint: Fingerprint) -> dict[str, int]:
    """Series to the number of cases of imagesTr that have it."""
    cases = cases_of(fingerprint).values()
    return {name: sum(case.series[name].absent is None for case in cases) for name in fingerprint.series}


def num_present(fingerprint: Fingerprint, subset: Subset) -> Counter[int]:
    """How many cases have 0, 1, 2, ... series."""
    cases = cases_of(fingerprint, subset).values()
    return Counter(sum(record.absent is None for record in case.series.values()) for case in cases)


def absent_series(fingerprint: Fingerprint, subset: Subset | None = None) -> dict[str, tuple[str, ...]]:
    """Case to its absent series, for cases that lack some."""
    absent = {
        name: tuple(series for series, record in case.series.items() if record.absent is not None)
        for name, case in cases_of(fingerprint, subset).items()
    }
    return {name: series for name, series in absent.items() if series}


def misaligned(fingerprint: Fingerprint) -> dict[str, dict[str, Millimetres]]:
    """Case to its series that do not lie on the others, and how far (z, y, x) in mm they lie from them."""
    found = {
        name: {series: record.shift_mm for series, record in case.series.items() if record.shift_mm is not None}
        for name, case in fingerprint.cases.items()
    }
    return {name: shifts for name, shifts in found.items() if shifts}


def distance(shift: Millimetres) -> float:
    return float(np.linalg.norm(shift))


def backgrounds(fingerprint: Fingerprint) -> dict[str, dict[str, float]]:
    """Series to its cases whose background is another value than 0, and that value."""
    found: dict[str, dict[str, float]] = {name: {} for name in fingerprint.series}
    for case, record in fingerprint.cases.items():
        for name, one in record.series.items():
            if one.intensities is not None and (value := one.intensities.background) is not None:
                found[name][case] = value
    return {name: cases for name, cases in found.items() if cases}


def problems(fingerprint: Fingerprint) -> list[str]:
    """A line for each case and what is wrong with it; absent series that are all zero are none."""
    return [f"{name}: {problem}" for name, case in fingerprint.cases.items() for problem in _problems_of(case)]


def _problems_of(case: CaseRecord) -> Iterator[str]:
    yield from case.problems
    for name, record in case.series.items():
        if record.flat in (CONSTANT, NOT_FINITE):
            yield f"{name} is {record.flat}; it counts as missing" if record.flat == CONSTANT else f"{name} has {record.flat}"
        elif record.absent is not None and record.flat is None:
            yield f"{name} is {_a(record.absent)}; it counts as missing"
        if record.flat != NOT_FINITE and record.num_invalid:
            yield f"{name} has {record.num_invalid} NaN or infinite voxels; write 0, or what belongs there"
        if record.shift_mm is not None:
            z, y, x = record.shift_mm
            voxels = ", ".join(f"{mm / edge:+.1f}" for mm, edge in zip(record.shift_mm, record.spacing or (), strict=True))
            where = f"z {z:+.1f}, y {y:+.1f}, x {x:+.1f} mm; in voxels {voxels}"
            yield f"{name} lies {distance(record.shift_mm):.1f} mm off the other series ({where}); register it"
    if all(record.absent is not None for record in case.series.values()):
        yield "no series at all"


def _a(reason: str) -> str:
    return reason if reason.startswith("almost") else f"a {reason}"


def as_nnunet_fingerprint(fingerprint: Fingerprint) -> dict[str, Any]:
    """The content of nnU-Net's `dataset_fingerprint.json`, from images alone.

    nnU-Net takes intensities of labelled foreground; here they are those of voxels that are not 0, each case with equal weight
    as there. Percentiles are of the pooled piecewise linear distributions of the cases. Cases without one shape are left out.

    Raises:
        UserError: no case of imagesTr that nnU-Net could use.
    """
    cases = [case for case in cases_of(fingerprint).values() if case.shape and case.shape_after_crop and case.spacing]
    if not cases:
        raise UserError(f"{fingerprint.dataset}: no case of imagesTr can be used; see `nnunet_csm fingerprint`")
    relative = [np.prod(case.shape_after_crop or ()) / np.prod(case.shape or ()) for case in cases]
    return {
        "spacings": [list(case.spacing or ()) for case in cases],
        "shapes_after_crop": [list(case.shape_after_crop or ()) for case in cases],
        "foreground_intensity_properties_per_channel": {
            str(channel): _pooled([r.intensities for c in cases if (r := c.series[name]).absent is None and r.intensities])
            for channel, name in enumerate(fingerprint.series)
        },
        "median_relative_size_after_cropping": float(np.median(relative)),
    }


def _pooled(of_cases: list[Intensities]) -> dict[str, float]:
    """nnU-Net's intensity properties; zeros for a series that no case has, where nnU-Net would have NaN."""
    keys = ("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5")
    if not of_cases:
        return dict.fromkeys(keys, 0.0)
    minimum, maximum = min(one.minimum for one in of_cases), max(one.maximum for one in of_cases)
    low, median, high = (_pooled_percentile(of_cases, percentile, minimum, maximum) for percentile in (0.5, 50.0, 99.5))
    mean = float(np.mean([one.mean for one in of_cases]))
    square = float(np.mean([one.sd**2 + one.mean**2 for one in of_cases]))
    return dict(zip(keys, (mean, median, max(0.0, square - mean**2) ** 0.5, minimum, maximum, high, low), strict=True))


def _pooled_percentile(of_cases: list[Intensities], percentile: float, minimum: float, maximum: float) -> float:
    """Where the mean of the cases' distribution functions, linear between what is kept of them, reaches a percentile."""
    below, above = minimum, maximum
    for _ in range(NUM_BISECTIONS):
        middle = (below + above) / 2
        reached = np.mean([np.interp(middle, (one.minimum, *one.percentiles, one.maximum), KNOWN) for one in of_cases])
        below, above = (middle, above) if reached < percentile else (below, middle)
    return (below + above) / 2


def with_manifest(fingerprint: Fingerprint, manifest: Mapping[str, Any]) -> Fingerprint:
    """Put in each series' own grid, where the converter's manifest (`raw/manifest.py`) has it; read as what may be anything."""
    cases = {
        name: dataclasses.replace(
            case,
            series={one: dataclasses.replace(record, before=_before(manifest, name, one)) for one, record in case.series.items()},
        )
        for name, case in fingerprint.cases.items()
    }
    return dataclasses.replace(fingerprint, cases=cases)


def voxels_before(manifest: Mapping[str, Any], case: str) -> dict[str, tuple[float, ...]]:
    """Series to the edges of its own voxels (mm) along the axes (z, y, x) that its file has now, where the manifest tells."""
    found = {}
    try:
        entry = manifest["cases"][case]
        now = np.reshape(entry["after"]["direction"], (3, 3))
        for name, record in entry["series"].items():
            if (grid := record.get("before")) is not None:
                nearest = np.abs(now.T @ np.reshape(grid["direction"], (3, 3))).argmax(axis=1)
                found[name] = tuple(float(grid["spacing"][axis]) for axis in nearest[::-1])
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        return {}
    return found


def _before(manifest: Mapping[str, Any], case: str, series: str) -> Before | None:
    try:
        grid = manifest["cases"][case]["series"][series]["before"]
        # (x, y, z) there
        return Before(tuple(int(n) for n in grid["size"][::-1]), tuple(float(mm) for mm in grid["spacing"][::-1]))
    except (KeyError, TypeError, ValueError):
        return None
