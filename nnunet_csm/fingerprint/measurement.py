"""One case: read its files, measure every series, compare the series with each other. Runs in processes of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_csm.fingerprint.alignment import binned, coarse, shifted_series
from nnunet_csm.fingerprint.reading import SeriesImage, grid_problems, groups_on_one_grid, read_case
from nnunet_csm.fingerprint.record import (
    ALL_ZERO,
    CONSTANT,
    NOT_FINITE,
    PERCENTILES,
    CaseRecord,
    Intensities,
    SeriesRecord,
    Subset,
)

# A rescaled or lossy copy: ranks and steps between neighbours agree as no two acquisitions do, for each has noise of its own.
# 258 pairs of real series reached 0.89 and 0.92; copies in 8 bits, with another gamma or with 1 % noise had at least 0.985 and
# 0.96. Half of the copies through JPEG at quality 75 are below, and phases of one dynamic series may be above.
COPY_RANK_CORRELATION = 0.975
COPY_STEP_CORRELATION = 0.9
# ranks cost time: pairs below this are no copies
LEVEL_CORRELATION = 0.9
# of the voxels that are not 0 in one of the two, those that are not in both
COMMON_SHARE = 0.5
NUM_PLACES = 24_000
BLOCKS_PER_AXIS = 3

Box = tuple[slice, slice, slice]


@dataclass(frozen=True)
class Job:
    """What a process needs to measure a case.

    Attributes:
        files: of its channels that are there, channel to path.
        voxel_mm: series to the edges (z, y, x) of the voxels it was acquired with, along the axes of its file, if known.
    """

    name: str
    subset: Subset
    key: str
    files: dict[int, Path]
    series: tuple[str, ...]
    reader: type[BaseReaderWriter]
    voxel_mm: Mapping[str, tuple[float, ...]]


def measure(job: Job) -> CaseRecord:
    """Read and measure a case; copies are found, but which volume is the original is for the whole dataset to say."""
    volumes, missing, problems = read_case(job.files, job.series, job.reader)
    problems += grid_problems(volumes)
    records = {name: _record(why) for name, why in missing.items()}
    groups = groups_on_one_grid(volumes)
    crop = tuple[int, ...]()
    for group in groups:
        box = nonzero_box([volume.voxels for volume in group.values()])
        crop = tuple(part.stop - part.start for part in box)
        records |= measure_series(group, box, job.voxel_mm)
    whole = next(iter(groups[0].values())) if len(groups) == 1 and not missing else None
    return CaseRecord(
        subset=job.subset,
        key=job.key,
        shape=whole.voxels.shape if whole else None,
        shape_after_crop=crop if whole else None,
        spacing=whole.spacing if whole else None,
        problems=tuple(problems),
        series={name: records[name] for name in job.series},
    )


def nonzero_box(volumes: Sequence[Float[np.ndarray, "z y x"]]) -> Box:
    """The box around all voxels that are not 0 in any of the volumes; everything where there is none, as nnU-Net crops.

    nnU-Net fills holes first, which no box can tell.
    """
    nonzero = volumes[0] != 0
    for volume in volumes[1:]:
        nonzero |= volume != 0
    spans = []
    for axis in range(3):
        inside = np.flatnonzero(nonzero.any(axis=tuple(other for other in range(3) if other != axis)))
        if not len(inside):
            return slice(0, nonzero.shape[0]), slice(0, nonzero.shape[1]), slice(0, nonzero.shape[2])
        spans.append(slice(int(inside[0]), int(inside[-1]) + 1))
        nonzero = nonzero[(slice(None),) * axis + (spans[-1],)]
    z, y, x = spans
    return z, y, x


@dataclass(frozen=True)
class _Seen:
    """What comparisons of a series need: voxels at some places, those next to them along x, and block means."""

    here: Float[np.ndarray, " n"]
    beside: Float[np.ndarray, " n"]
    window: tuple[float, float]
    blocks: Float[np.ndarray, "z y x"]

    @property
    def inside(self) -> Bool[np.ndarray, " n"]:
        return (self.here != 0) & (self.beside != 0)


def measure_series(
    volumes: Mapping[str, SeriesImage], box: Box, voxel_mm: Mapping[str, tuple[float, ...]] | None = None
) -> dict[str, SeriesRecord]:
    """Records of series on one grid; `box` holds all that is not 0 in them; `voxel_mm` as in `Job`."""
    shape = tuple(part.stop - part.start for part in box)
    places, spacing = _places(shape), next(iter(volumes.values())).spacing
    records, seen = dict[str, SeriesRecord](), dict[str, _Seen]()
    for name, volume in volumes.items():
        records[name], found = _measure_one(volume, spacing, box, places)
        if found is not None:
            seen[name] = found
    for first, second in combinations(seen, 2):
        same = _same_image(volumes[first], volumes[second], seen[first], seen[second])
        if same is not None:
            records[first].twins[second] = records[second].twins[first] = same == "identical"
    names = list(seen)
    # copies would vote twice
    once = [name for i, name in enumerate(names) if not any(earlier in records[name].twins for earlier in names[:i])]
    if len(once) > 1:
        own = {name: tuple(map(max, (voxel_mm or {}).get(name, spacing), spacing)) for name in once}
        grids = {name: binned(seen[name].blocks, seen[name].window, shape, spacing, own[name]) for name in once}
        for name, (z, y, x) in shifted_series(grids).items():
            records[name] = replace(records[name], shift_mm=(_rounded(z), _rounded(y), _rounded(x)))
    return records


def _measure_one(
    volume: SeriesImage, spacing: tuple[float, ...], box: Box, places: Int[np.ndarray, " n"]
) -> tuple[SeriesRecord, _Seen | None]:
    """What the volume alone tells; nothing to compare where it shows nothing. `spacing` is that of its group."""
    voxels = np.ascontiguousarray(volume.voxels[box])
    finite = np.isfinite(voxels)
    num_invalid = volume.num_zeroed + voxels.size - int(np.count_nonzero(finite))
    if num_invalid > volume.num_zeroed:
        voxels = np.where(finite, voxels, np.float32(0))
    values = voxels[voxels != 0]
    flat = _flat(values, num_invalid)
    record = _record(flat, volume, num_invalid, values.size)
    if flat is not None:
        return record, None
    intensities = _intensities(values)
    flattened = voxels.ravel()
    seen = _Seen(flattened[places], flattened[places + 1], (intensities.at(0.5), intensities.at(99.5)), coarse(voxels, spacing))
    return replace(record, intensities=intensities, appearance=_appearance(seen)), seen


def _record(flat: str | None, volume: SeriesImage | None = None, num_invalid: int = 0, num_foreground: int = 0) -> SeriesRecord:
    """What is known of a series before its intensities are looked at."""
    return SeriesRecord(
        absent=flat,
        flat=flat,
        twins={},
        shape=volume.voxels.shape if volume else None,
        spacing=volume.spacing if volume else None,
        before=None,
        num_invalid=num_invalid,
        foreground=_rounded(num_foreground / volume.voxels.size) if volume else 0.0,
        intensities=None,
        appearance=(),
        shift_mm=None,
    )


def _flat(values: Float[np.ndarray, " n"], num_invalid: int) -> str | None:
    """Why these voxels (finite, not 0) show nothing. One value on a background of 0 is a mask, no image."""
    if not values.size:
        return NOT_FINITE if num_invalid else ALL_ZERO
    return CONSTANT if values.min() == values.max() else None


def _intensities(values: Float[np.ndarray, " n"]) -> Intensities:
    values = np.sort(values)  # percentiles of sorted values take a fifth of the time, sorting included
    return Intensities(
        minimum=_rounded(values.min()),
        maximum=_rounded(values.max()),
        mean=_rounded(values.mean(dtype=np.float64)),
        sd=_rounded(values.std(dtype=np.float64)),
        percentiles=tuple(_rounded(value) for value in np.percentile(values, PERCENTILES)),
    )


def _rounded(value: float) -> float:
    """Six digits: records of thousands of cases stay small."""
    return float(f"{float(value):.6g}")


@lru_cache(maxsize=4)
def _places(shape: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """Flat indices of voxels that have a neighbour along x: the same for every case of a shape."""
    if shape[2] < 2:
        return np.zeros(0, dtype=np.int64)
    z, y, x = np.random.default_rng(0).integers(0, [[shape[0]], [shape[1]], [shape[2] - 1]], size=(3, NUM_PLACES))
    return np.ravel_multi_index((z, y, x), shape)


def _scaled(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    low, high = window
    return np.clip((values - low) / max(high - low, 1e-20), 0, 1)


def _appearance(seen: _Seen) -> tuple[float, ...]:
    """Means within the foreground of 3 x 3 x 3 blocks, then the mean step between neighbours: see `SeriesRecord`."""
    scaled, inside = _scaled(seen.blocks, seen.window) * (seen.blocks != 0), (seen.blocks != 0).astype(float)
    for axis, size in enumerate(seen.blocks.shape):
        starts = np.linspace(0, size, BLOCKS_PER_AXIS, endpoint=False).astype(int)
        scaled, inside = np.add.reduceat(scaled, starts, axis=axis), np.add.reduceat(inside, starts, axis=axis)
    here, beside = (_scaled(values[seen.inside], seen.window) for values in (seen.here, seen.beside))
    step = float(np.abs(beside - here).mean()) if here.size else 0.0
    return tuple(round(float(value), 4) for value in (*(scaled / np.maximum(inside, 1)).ravel(), step))


def _same_image(a: SeriesImage, b: SeriesImage, seen_a: _Seen, seen_b: _Seen) -> Literal["identical", "almost"] | None:
    """Whether two series show one acquisition: bit-identical, or rescaled, clipped or lossy."""
    if np.array_equal(seen_a.here, seen_b.here) and np.array_equal(a.voxels, b.voxels, equal_nan=True):
        return "identical"
    inside_a, inside_b = seen_a.inside, seen_b.inside
    both = inside_a & inside_b
    if both.sum() < max(2, COMMON_SHARE * (inside_a | inside_b).sum()):
        return None
    here_a, here_b = _scaled(seen_a.here[both], seen_a.window), _scaled(seen_b.here[both], seen_b.window)
    if _correlation(here_a, here_b) < LEVEL_CORRELATION:
        return None
    step_a = _scaled(seen_a.beside[both], seen_a.window) - here_a
    step_b = _scaled(seen_b.beside[both], seen_b.window) - here_b
    if _correlation(step_a, step_b) < COPY_STEP_CORRELATION:
        return None
    ranks_a, ranks_b = _ranks(seen_a.here[both]), _ranks(seen_b.here[both])
    return "almost" if _correlation(ranks_a, ranks_b) >= COPY_RANK_CORRELATION else None


def _correlation(a: Float[np.ndarray, " n"], b: Float[np.ndarray, " n"]) -> float:
    """Pearson's; 0 where one does not vary. By sums: a product by BLAS would wake threads in every process."""
    a, b = a.astype(np.float64) - a.mean(dtype=np.float64), b.astype(np.float64) - b.mean(dtype=np.float64)
    spread = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / spread if spread > 0 else 0.0


def _ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Ranks from 0, equal values sharing the mean of theirs (scipy.stats takes half a second to import in every process)."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]
