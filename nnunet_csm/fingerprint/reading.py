"""The files of a case as nnU-Net's readers give them, and what is wrong with them."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_csm.errors import reason
from nnunet_csm.fingerprint.alignment import MISALIGNED_VOXELS
from nnunet_csm.fingerprint.record import NO_FILE, UNREADABLE
from nnunet_csm.raw import nifti
from nnunet_csm.raw.geometry import affine_of


@dataclass(frozen=True)
class SeriesImage:
    """A series as nnU-Net's reader gives it.

    Attributes:
        voxels: may hold NaN and infinite ones.
        spacing: mm, (z, y, x).
        affine: voxel (x, y, z) to mm, where the reader tells (NIfTI, NRRD, MHA).
        num_zeroed: voxels of the file that are NaN or infinite, but 0 here.
    """

    voxels: Float[np.ndarray, "z y x"]
    spacing: tuple[float, ...]
    affine: Float[np.ndarray, "4 4"] | None
    num_zeroed: int = 0


def read_case(
    files: Mapping[int, Path], series: Sequence[str], reader: type[BaseReaderWriter]
) -> tuple[dict[str, SeriesImage], dict[str, str], list[str]]:
    """Volumes by series; why others are missing; what is wrong with the files.

    Files are read one by one: nnU-Net's readers refuse a case whose files disagree, and this is to say how they do.
    A file may hold all channels, as 4-D images and colour pictures do.
    """
    volumes, missing, problems = dict[str, SeriesImage](), dict.fromkeys(series, NO_FILE), list[str]()
    for channel, path in files.items():
        try:
            if is_nifti := path.name.endswith(nifti.ENDINGS):
                nifti.read_header(path)  # before ITK, which would make room for whatever a damaged one tells of
            channels, properties = reader().read_images((str(path),))
            num_zeroed = _num_zeroed_in_nifti(path) if is_nifti and "sitk_stuff" in properties else 0
        except MemoryError:
            raise
        except Exception as error:  # the readers' libraries raise whatever they like
            problems.append(f"{path} cannot be read ({reason(error)}); is it complete?")
            missing[series[channel]] = UNREADABLE
            continue
        held = {0: len(series)}.get(channel, 1) if len(files) == 1 else 1
        if len(channels) != held:
            problems.append(f"{path} holds {len(channels)} volumes, expected {held}; give each series its own 3-D file")
            missing[series[channel]] = UNREADABLE
            continue
        spacing = tuple(float(mm) for mm in properties["spacing"])
        for name, voxels in zip(series[channel : channel + held], channels, strict=True):
            volumes[name] = SeriesImage(voxels, spacing, affine_of(properties), num_zeroed)
            del missing[name]
    absent = [name for name, why in missing.items() if why == NO_FILE]
    if absent:
        problems.append(f"no file of {', '.join(absent)}; for a series that the patient does not have, write zeros")
    return volumes, missing, problems


def _num_zeroed_in_nifti(path: Path) -> int:
    """NaN and infinite voxels, which ITK reads as 0 from NIfTI: a second reading, where the type of the file has such values.

    ITK also reads a gzip file that was cut off, with 0 for what is not there.

    Raises:
        CaseError: the file was cut off.
    """
    header = nifti.read_header(path)
    cut_off = path.suffix == ".gz" and _size_told_by_gzip(path) != header.num_bytes % 2**32
    if not cut_off and header.kind.kind != "f":
        return 0
    voxels = nifti.read_voxels(header)
    return voxels.size - int(np.count_nonzero(np.isfinite(voxels)))


def _size_told_by_gzip(path: Path) -> int:
    """Size of the content, modulo 4 GiB: the last four bytes (RFC 1952). That of the last part only, where a file has several."""
    with path.open("rb") as stream:
        stream.seek(-4, os.SEEK_END)
        return int.from_bytes(stream.read(4), "little")


def groups_on_one_grid(volumes: Mapping[str, SeriesImage]) -> list[dict[str, SeriesImage]]:
    """Series of one shape and spacing together: only these can be compared voxel by voxel."""
    groups: list[dict[str, SeriesImage]] = []
    for name, volume in volumes.items():
        for group in groups:
            if _same_grid(volume, next(iter(group.values()))):
                group[name] = volume
                break
        else:
            groups.append({name: volume})
    return groups


def _same_grid(a: SeriesImage, b: SeriesImage) -> bool:
    """Whether two volumes have one shape and spacing; nnU-Net's readers refuse a case whose files differ in these."""
    return a.voxels.shape == b.voxels.shape and np.allclose(a.spacing, b.spacing)


def grid_problems(volumes: Mapping[str, SeriesImage]) -> list[str]:
    """Series whose grid is not that of the first."""
    found = []
    for name, volume in volumes.items():
        reference_name, reference = next(iter(volumes.items()))
        shape, expected = volume.voxels.shape, reference.voxels.shape
        if shape != expected:
            found.append(f"{name} has the shape {shape}, {reference_name} has {expected}; resample them to one grid")
        elif not _same_grid(volume, reference):
            found.append(f"{name} has the spacing {volume.spacing}, {reference_name} has {reference.spacing}; resample them")
        elif volume.affine is not None and reference.affine is not None:
            apart, in_voxels = _apart(volume.affine, reference.affine, shape)
            if in_voxels > MISALIGNED_VOXELS:
                found.append(
                    f"the header of {name} puts it up to {apart:.1f} mm from {reference_name}, "
                    f"and nnU-Net reads them as if they overlapped; resample them to one grid"
                )
    return found


def _apart(first: np.ndarray, second: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float]:
    """How far at most two affines put a corner of a volume of `shape` (z, y, x) apart: in mm, and in voxels along an axis."""
    z, y, x = (size - 1 for size in shape)
    corners = np.array([(i, j, k, 1) for i in (0, x) for j in (0, y) for k in (0, z)])
    apart = corners @ (first - second)[:3].T
    return float(np.linalg.norm(apart, axis=1).max()), float(np.abs(np.linalg.solve(second[:3, :3], apart.T)).max())
