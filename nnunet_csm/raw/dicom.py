"""A folder of DICOM files as one volume: frames sorted into volumes by what they are, and by place within each."""

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_csm.raw.dicom_frames import Frame, frames_of, series_in, voxels_of
from nnunet_csm.raw.dicom_names import name_from_attributes
from nnunet_csm.raw.geometry import Grid
from nnunet_csm.raw.subjects import CaseError

# Numbers of one volume are equal but for rounding.
ROUNDING = 0.01


def read_dicom_series(folder: Path, index: int | None = None) -> sitk.Image:
    """The voxels of `stack_in`, on its grid. Raises `CaseError`, also when a file cannot be decoded."""
    frames, grid = stack_in(folder, index)
    image = sitk.GetImageFromArray(voxels_of(frames))
    grid.put_on(image)
    return image


def stack_in(folder: Path, index: int | None = None) -> tuple[list[Frame], Grid]:
    """Slices of the only series in `folder`, sorted along its normal, and the grid of its headers; slice i is z = i of it.

    Slices of one b-value, echo, time point and image type are a volume; `index` says which, where there are several. Files with
    one slice and enhanced ones with many are alike. Slices missing at either end cannot be noticed.

    Raises `CaseError` when there is no series or more than one; when there are several volumes and no index; when a slice is
    missing or twice there, when slices differ in shape, spacing or orientation, when they overlap, or when a file cannot be read.
    """
    volumes = _volumes(_only_series(folder))
    if index is None and len(volumes) > 1:
        raise CaseError(_several(folder, volumes))
    if not 0 <= (index or 0) < len(volumes):
        found = "1 volume" if len(volumes) == 1 else f"{len(volumes)} volumes"
        raise CaseError(f"{folder} holds {found}, so that there is none of index {index}; give one from 0 to {len(volumes) - 1}")
    frames = volumes[index or 0]
    if len(frames) == 1:
        raise CaseError(f"{folder} holds a single slice ({frames[0].name}); give the folder with all slices of the series")
    _check_parallel(folder, frames)
    rows, columns = np.array(frames[0].orientation[:3]), np.array(frames[0].orientation[3:])
    normal = np.cross(rows, columns)
    normal /= np.linalg.norm(normal)
    frames = sorted(frames, key=lambda frame: float(np.dot(frame.position, normal)))
    positions = np.array([frame.position for frame in frames])
    _check_distances(folder, frames, positions @ normal)
    in_plane = positions - np.outer(positions @ normal, normal)
    shift = float(np.linalg.norm(in_plane - in_plane[0], axis=1).max())
    if shift > 1.0:
        raise CaseError(f"{folder} has slices that are shifted by up to {shift:.1f} mm in their plane; is it one acquisition?")
    between = float((positions[-1] - positions[0]) @ normal) / (len(frames) - 1)
    (rows_count, columns_count), spacing = frames[0].shape, (frames[0].spacing[1], frames[0].spacing[0], between)
    direction = np.stack([rows, np.cross(normal, rows), normal], axis=1).flatten().tolist()
    return frames, Grid((columns_count, rows_count, len(frames)), spacing, frames[0].position, tuple(direction))


def series_name(folder: Path) -> str | None:
    """Canonical name of the series in `folder` after BIDS' suffixes, None when the attributes do not tell.

    Decided in this order: what ImageType declares (ADC map, trace image); the words of SeriesDescription, then of ProtocolName,
    through the alias table, the longest match first; a diffusion b-value above 0; echo, repetition and inversion times. A T1w
    with a contrast agent is T1ce. Raises `CaseError` like `read_dicom_series` when `folder` does not hold exactly one series.
    """
    frames = _volumes(_only_series(folder))[-1]  # of the highest b-value
    return name_from_attributes(frames[len(frames) // 2].attributes)


def study_and_frame(folder: Path) -> tuple[str, str]:
    """UIDs of the study and of the frame of reference of the series in `folder`; empty where it does not say.

    Series that share both were taken of a patient who lay there all the while. Raises `CaseError`.
    """
    header = next(iter(series_in(folder).values()))[0]
    return str(header.get("StudyInstanceUID", "")), str(header.get("FrameOfReferenceUID", ""))


def _only_series(folder: Path) -> list[Frame]:
    """Slices of the only series in `folder` itself (not its subfolders)."""
    if not folder.is_dir():
        raise CaseError(f"{folder} is not a folder; give the folder that holds the DICOM files of one series")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise CaseError(f"{folder} may not be read by this user; change its permission (chmod -R u+rX)")
    series = series_in(folder)
    if not series:
        entries = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
        found = f"found {', '.join(entries[:3])}{' ...' if len(entries) > 3 else ''}" if entries else "it is empty"
        raise CaseError(f"{folder} holds no DICOM image; {found}; give the folder in which the files of one series lie")
    if len(series) > 1:
        described = (
            f"{str(headers[0].get('SeriesDescription') or 'without description').strip()!r} ({len(headers)} "
            f"{'file' if len(headers) == 1 else 'files'}, such as {Path(str(headers[0].filename)).name})"
            for headers in series.values()
        )
        raise CaseError(f"{folder} holds {len(series)} series, not one: {'; '.join(described)}; move each to a folder of its own")
    return [frame for headers in series.values() for header in headers for frame in frames_of(header)]


def _volumes(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Slices by their kind, in ascending order of b-values, then of echo times, and so on."""
    alike = {name: _alike([frame.kind[name] for frame in frames]) for name in frames[0].kind}
    found: dict[tuple[int, ...], list[Frame]] = defaultdict(list)
    for frame in frames:
        found[tuple(alike[name][frame.kind[name]] for name in alike)].append(frame)
    return [found[key] for key in sorted(found)]


def _alike(values: Sequence[float | str | None]) -> dict[float | str | None, int]:
    """The rank of each value; numbers that only rounding tells apart have one rank, "nothing said" is the lowest."""
    ranks: dict[float | str | None, int] = {None: 0}
    before: float | str | None = None
    for value in sorted({one for one in values if one is not None}, key=lambda one: (isinstance(one, str), one)):
        same = isinstance(before, float) and isinstance(value, float) and value - before <= ROUNDING * abs(value)
        ranks[value] = ranks[before] if same else max(ranks.values()) + 1
        before = value
    return ranks


def _several(folder: Path, volumes: Sequence[Sequence[Frame]]) -> str:
    """What tells the volumes of a series apart, and how to choose."""
    kinds = [frames[0].kind for frames in volumes]
    names = [name for name in kinds[0] if len(_alike_ranks([kind[name] for kind in kinds])) > 1]
    listed = (
        f"{number}: {', '.join(f'{name} {_said(frames[0].kind[name])}' for name in names)} ({len(frames)} slices)"
        for number, frames in enumerate(volumes)
    )
    return (
        f"{folder} holds {len(volumes)} volumes in one series, told apart by {', '.join(names)}: {'; '.join(listed)}; choose "
        "one by its number (the column 'volume' of a table), or move each to a folder of its own"
    )


def _alike_ranks(values: Sequence[float | str | None]) -> set[int]:
    ranks = _alike(values)
    return {ranks[value] for value in values}


def _said(value: float | str | None) -> str:
    return "not given" if value is None else value if isinstance(value, str) else f"{value:g}"


def _check_parallel(folder: Path, frames: Sequence[Frame]) -> None:
    """Raise `CaseError` unless all slices are of one shape, one spacing and one orientation."""
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        found = sorted((columns, rows) for rows, columns in shapes)
        raise CaseError(f"{folder} mixes slices of the shapes {found} (x, y) in one series; keep those of one acquisition")
    if np.abs(np.subtract([frame.orientation for frame in frames], frames[0].orientation)).max() > 1e-3:
        msg = f"{folder} mixes slices of several orientations in one series, as a localizer does; give a parallel stack"
        raise CaseError(msg)
    odd = next((one for one in frames if not np.allclose(one.spacing, frames[0].spacing, rtol=1e-3, atol=0)), None)
    if odd:
        msg = f"{folder} mixes slices of several PixelSpacing in one series: {frames[0].spacing} mm in {frames[0].name} and "
        raise CaseError(f"{msg}{odd.spacing} mm in {odd.name}; keep those of one acquisition")


def _check_distances(folder: Path, frames: Sequence[Frame], along: np.ndarray) -> None:
    """Raise `CaseError` unless slices, sorted, lie at equal distances, and no closer than their headers say."""
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    if (gaps < 1e-3).any():
        at = int(np.argmin(gaps))
        raise CaseError(
            f"{folder} holds {int((gaps < 1e-3).sum())} slices at places where another one is, such as {frames[at].name} and "
            f"{frames[at + 1].name}; a series with several volumes (b-values, phases, echoes) must be split, each to a folder of "
            "its own"
        )
    # scanners round positions; a missing slice doubles the distance
    odd = np.flatnonzero(np.abs(gaps - usual) > 0.02 * usual + 0.01)
    if odd.size:
        at = int(odd[0])
        raise CaseError(
            f"{folder} has slices at unequal distances: {gaps[at]:.2f} mm between {frames[at].name} and "
            f"{frames[at + 1].name}, {usual:.2f} mm elsewhere; is a slice missing?"
        )
    # Two volumes whose places alternate look like one of twice as many slices. Slices thicker than their distance are usual in
    # CT, but not ones that are to lie further apart, nor thick ones of several acquisitions.
    thickness, between = frames[0].thickness, frames[0].between
    numbers = list(dict.fromkeys(frame.acquisition for frame in frames))
    expected = min(between, thickness or between) if between else thickness * (len(numbers) > 1)
    if usual < 0.75 * expected:
        told = f", and the acquisition numbers {', '.join(numbers)}" if len(numbers) > 1 else ""
        raise CaseError(
            f"{folder} has slices {usual:.2f} mm apart where the headers say {expected:g} mm{told}: several volumes whose places "
            "alternate? split it, each volume to a folder of its own"
        )
