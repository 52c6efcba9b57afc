"""NIfTI files: what a header means, and voxels that are read whole.

ITK reads a truncated file without a word and fills the rest with zeros, turns NaN into 0, takes one of two transforms that
disagree and a spacing of zero as 1. So both header and voxels are read here, once, and checked while they are.
"""

import gzip
import io
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from nnunet_csm.errors import reason
from nnunet_csm.listing import file_problem
from nnunet_csm.raw.geometry import MAX_ROUNDING, SAME_GRID, Array, Grid, straight_grid
from nnunet_csm.raw.subjects import CaseError

ENDINGS = (".nii.gz", ".nii")

# what gzip and nibabel's headers raise for a damaged file
DAMAGED = (OSError, EOFError, ValueError, zlib.error, OverflowError, WrapStructError, HeaderDataError, ImageFileError)
_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_KINDS = {
    1: "bits",
    32: "complex of 32-bit float",
    128: "RGB",
    1536: "128-bit float",
    1792: "complex of 64-bit float",
    2048: "complex of 128-bit float",
    2304: "RGBA",
}
# xyzt_units: mm of a unit of length; unknown is taken as mm
_MILLIMETRES = {1: 1000.0, 3: 0.001}
_EDGES = (1e-4, 1e3)  # mm: edges of voxels outside are no spacing of an image of a body
# A quaternion of float32 numbers turns by up to sqrt(2^-23) rad more or less, near half a turn, than the sform beside it.
QUATERNION_ROUNDING = 1e-3
MOST_COMPRESSED = 1100  # gzip makes of a byte at most 1032
_SCANNER = 1  # a code of a transform: it goes to the scanner's own coordinates
_CHUNK = 1 << 22  # bytes


@dataclass(frozen=True)
class Header:
    """What a NIfTI header says, after everything in it that voxels or places rest on was checked.

    Attributes:
        shape: (z, y, x), or (volumes, z, y, x).
        spacing: mm, (x, y, z).
        affines: voxel (x, y, z) to mm in ITK's world: of the sform and of the qform, the one that ITK takes first; of the
            spacing alone when there is neither. One only when they put no voxel elsewhere.
        placed: whether there is a transform at all.
        kind: of the voxels as stored.
        offset: bytes before them.
        scale: slope and intercept; (1, 0) without one.
        unit: mm that the header's unit of length stands for, 1 or what its numbers were multiplied with.
    """

    path: Path
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    affines: tuple[Array, ...]
    placed: bool
    kind: np.dtype
    offset: int
    scale: tuple[float, float]
    unit: float

    @property
    def num_bytes(self) -> int:
        """Of the uncompressed file."""
        return self.offset + int(np.prod(self.shape, dtype=object)) * self.kind.itemsize

    def grids(self) -> tuple[Grid, ...]:
        """Where the voxels lie, as the header says once or twice.

        Raises:
            CrookedError: axes far from right angles.
            CaseError: a spacing that is not the length of the axes.
        """
        found = []
        for affine in self.affines:
            size = self.shape[::-1][:3]
            grid = straight_grid(self.path, size, affine[:, :3], affine[:, 3])
            if (np.abs(np.divide(grid.spacing, self.spacing) - 1) * size).max() > max(SAME_GRID, 1e-3 * max(size)):
                listed = [tuple(round(float(one), 5) for one in edges) for edges in (self.spacing, grid.spacing)]
                msg = f"{self.path}: its pixdim says voxels of {listed[0]} mm (x, y, z), its sform of {listed[1]}"
                raise CaseError(f"{msg}; correct the wrong one")
            found.append(replace(grid, spacing=self.spacing))  # which a transform has up to its rounding
        return tuple(found)


def read_header(path: Path) -> Header:
    """The header of a file of version 1 or 2, which must fit the size of the file.

    Raises:
        CaseError: it is damaged, contradicts itself, or tells of more voxels than the file can hold.
    """
    with np.errstate(all="ignore"), _opened(path) as file:  # numbers of a damaged header are judged, not warned of
        return _parsed(path, file.read(Nifti2Header.sizeof_hdr))


def read_image(path: Path) -> sitk.Image:
    """The image, 3-D or 4-D, where the first of its `grids` is; scaled voxels as float32 (float64 when stored so).

    Raises:
        CaseError: as `read_header`; voxels are missing, or others lie behind them.
    """
    header = read_header(path)
    grid = header.grids()[0]
    image = sitk.GetImageFromArray(read_voxels(header), isVector=False)
    grid.put_on(image)
    return image


def read_voxels(header: Header) -> np.ndarray:
    """All voxels, in the order of `header.shape`, scaled; the file is read to its end, where gzip keeps its checksum."""
    path = header.path
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize
    if header.num_bytes > memory:
        raise CaseError(f"{path} holds {header.num_bytes / 2**30:.0f} GiB, more than this machine has memory; cut it first")
    voxels = np.empty(header.shape, header.kind)
    content = voxels.reshape(-1).view(np.uint8).data
    with _opened(path) as file:
        start = len(file.read(header.offset))
        found = 0
        while found < len(content) and (num := file.readinto(content[found : found + _CHUNK])):
            found += num
        if start + found < header.num_bytes:
            raise _truncated(path, start + found, header.num_bytes)
        while chunk := file.read(_CHUNK):
            if any(chunk):  # zeros fill a block of a tape
                raise CaseError(
                    f"{path} goes on behind its {header.num_bytes} bytes, where its header (dim, datatype, vox_offset) says that "
                    "it ends; correct the header, or copy the file again"
                )
    voxels = voxels.astype(header.kind.newbyteorder("="), copy=False)
    slope, intercept = header.scale
    if (slope, intercept) == (1.0, 0.0):
        return voxels
    return (voxels * slope + intercept).astype(
        np.float64 if header.kind.itemsize == 8 and header.kind.kind == "f" else np.float32
    )


@contextmanager
def _opened(path: Path) -> Iterator[gzip.GzipFile | io.BufferedReader]:
    if problem := file_problem(path):
        raise CaseError(problem)
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            yield file
    except CaseError:
        raise
    except DAMAGED as error:
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error


def _truncated(path: Path, found: int, expected: int) -> CaseError:
    return CaseError(f"{path} is truncated: {found} bytes of {expected}, uncompressed; copy it again")


def _parsed(path: Path, content: bytes) -> Header:
    raw = _raw_header(path, content)
    num_axes = int(raw["dim"][0])
    dims = [int(length) for length in raw["dim"][1 : 1 + max(num_axes, 0)]]
    while len(dims) > 3 and dims[-1] in (0, 1):  # of length one, which some programs write as 0
        dims.pop()
    if not 1 <= num_axes <= 7 or min(dims, default=0) < 1:
        raise _wrong(path, "dim", raw["dim"].tolist(), "the number of axes, then a length above 0 for each")
    if len(dims) not in (3, 4):
        raise CaseError(
            f"{path} has the shape {tuple(dims[::-1])}, expected (z, y, x); give a 3-D file, or a 4-D file and an index"
        )
    code = int(raw["datatype"])
    if code not in _TYPES:
        kind = _KINDS.get(code, f"of no known type ({code})")
        msg = (
            f"{path} holds pixels of the kind '{kind}', expected one real number a voxel; write the part to be used (such as the "
        )
        raise CaseError(msg + "magnitude) to a file of its own")
    stored = np.dtype(_TYPES[code]).newbyteorder(raw.endianness)
    if int(raw["bitpix"]) != 8 * stored.itemsize:
        raise _wrong(path, "bitpix", int(raw["bitpix"]), f"{8 * stored.itemsize}, as datatype {code} has")
    offset = float(raw["vox_offset"])
    if not (offset.is_integer() and offset >= raw.single_vox_offset):
        raise _wrong(path, "vox_offset", offset, f"a whole number from {raw.single_vox_offset} on")
    unit = _MILLIMETRES.get(int(raw["xyzt_units"]) & 7, 1.0)
    spacing = np.abs(raw["pixdim"][1:4].astype(float)) * unit
    if not all(_EDGES[0] <= edge <= _EDGES[1] for edge in spacing):
        listed, units = tuple(float(edge) for edge in raw["pixdim"][1:4]), "mm" if unit == 1 else f"units of {unit:g} mm"
        msg = f"{path} has the spacing {listed} (x, y, z in {units}), expected numbers above 0, edges"
        raise CaseError(f"{msg} of a voxel up to {_EDGES[1]:g} mm; correct its header (pixdim, xyzt_units)")
    affines, placed = _affines(path, raw, spacing, dims[:3], unit)
    shape = tuple(dims[::-1])
    header = Header(path, shape, tuple(spacing.tolist()), affines, placed, stored, int(offset), _scale(path, raw), unit)
    size = path.stat().st_size
    if header.num_bytes > (size * MOST_COMPRESSED if path.name.endswith(".gz") else size):
        found = f"at most {size * MOST_COMPRESSED}" if path.name.endswith(".gz") else str(size)
        msg = f"{path} is truncated: its header tells of {header.num_bytes} bytes with the shape {shape}, it can hold {found}; "
        raise CaseError(msg + "copy it again, or correct the header (dim)")
    return header


def _raw_header(path: Path, content: bytes) -> Nifti1Header:
    """The fields as they are, unchecked: nibabel would repair some of them without a word."""
    for kind in (Nifti1Header, Nifti2Header):
        if len(content) < kind.sizeof_hdr:
            break
        raw = kind(content[: kind.sizeof_hdr], check=False)
        if int(raw["sizeof_hdr"]) == kind.sizeof_hdr and raw["magic"].item().rstrip(b"\0").startswith(kind.single_magic):
            return raw
    raise CaseError(f"{path} cannot be read (its first {len(content)} bytes are no NIfTI header); is the copy complete?")


def _wrong(path: Path, field: str, found: object, expected: str) -> CaseError:
    return CaseError(f"{path} cannot be read ({field} in its header is {found}, expected {expected}); copy it or export it again")


def _scale(path: Path, raw: Nifti1Header) -> tuple[float, float]:
    """Slope and intercept. A slope of 0 or NaN says that there is no scaling."""
    slope, intercept = float(raw["scl_slope"]), float(raw["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise _wrong(path, "scl_slope, scl_inter", (slope, intercept), "finite numbers")
    return slope, intercept


def _affines(path: Path, raw: Nifti1Header, spacing: Array, size: list[int], unit: float) -> tuple[tuple[Array, ...], bool]:
    """As `Header.affines`, and whether there is a transform at all."""
    codes = {"sform": int(raw["sform_code"]), "qform": int(raw["qform_code"])}
    transforms = {}
    if codes["sform"] > 0:
        transforms["sform"] = np.array([raw[f"srow_{axis}"] for axis in "xyz"], dtype=float)
        transforms["sform"] *= unit
    if codes["qform"] > 0:
        transforms["qform"] = _qform(path, raw, spacing, unit)
    for name, affine in transforms.items():
        if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:, :3])) > 1e-6 * np.prod(spacing)):
            msg = f"{path} has an affine that cannot be inverted: {affine[:, :3].round(4).tolist()}; correct its header ({name})"
            raise CaseError(msg)
    in_itk = {name: np.diag([-1.0, -1.0, 1.0]) @ affine for name, affine in transforms.items()}  # its x and y are reversed
    if not in_itk:
        return (np.column_stack([np.diag(spacing), np.zeros(3)]),), False
    order = ("sform", "qform") if codes["sform"] == _SCANNER else ("qform", "sform")
    first, *others = (in_itk[name] for name in order if name in in_itk)
    corners = np.stack(np.meshgrid(*[(0.0, length - 1.0) for length in size], 1.0, indexing="ij"), -1).reshape(-1, 4)
    apart = [np.linalg.norm(corners @ (other - first).T, axis=1).max() for other in others]
    extent = np.linalg.norm(spacing * size)
    tolerance = max(MAX_ROUNDING * min(spacing), QUATERNION_ROUNDING * extent)
    return (first, *(one for one, mm in zip(others, apart, strict=True) if mm > tolerance)), True


def _qform(path: Path, raw: Nifti1Header, spacing: Array, unit: float) -> Array:
    """Voxel to mm, (3, 4), as the quaternion says."""
    numbers = [float(raw[f"quatern_{one}"]) for one in "bcd"]
    square = sum(one * one for one in numbers)
    handedness = float(raw["pixdim"][0])
    if not (np.isfinite(handedness) and square <= 1.001):
        raise _wrong(path, "quatern_b, c, d or pixdim[0]", (*numbers, handedness), "a rotation, and 1 or -1")
    quaternion = np.array([np.sqrt(max(0.0, 1 - square)), *numbers])
    rotation = nibabel.quaternions.quat2mat(quaternion) * spacing * (1, 1, -1 if handedness < 0 else 1)
    return np.column_stack([rotation, np.array([float(raw[f"qoffset_{axis}"]) for axis in "xyz"]) * unit])
