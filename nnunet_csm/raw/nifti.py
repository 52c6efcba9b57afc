"""What the header of a NIfTI file means, and whether its voxels are all there.

ITK reads a truncated file without a word and fills the rest with zeros, reads NaN as 0, replaces a spacing of zero by 1, and
takes one of two transforms that disagree: what is checked here is what a reader cannot be trusted to notice.
"""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from nnunet_csm.errors import reason
from nnunet_csm.raw.subjects import CaseError

NIFTI_ENDINGS = (".nii.gz", ".nii")

# A header whose axes are not quite at right angles is taken as if they were, and one whose two transforms do not quite agree as
# if they did, when no voxel moves by more than this many voxels.
MAX_SNAP = 0.25
UNITS = {1: "metres", 3: "micrometres"}  # of space, other than mm, in the lowest bits of xyzt_units

# what nibabel and gzip raise for a damaged file
UNREADABLE_ERRORS = (
    *(OSError, EOFError, ValueError, OverflowError, TypeError, KeyError, zlib.error),
    *(HeaderDataError, ImageFileError, WrapStructError),
)

_CHUNK = 1 << 22  # bytes


@dataclass(frozen=True)
class Holes:
    """Voxels of one volume that are NaN or infinite: how many, and the index of the first, (z, y, x)."""

    number: int
    first: tuple[int, ...]


def read_nifti(path: Path) -> Nifti1Image:
    """Header of version 1 or 2; its voxels are not read. Raises `CaseError`."""
    try:
        image = nibabel.load(path)
        if not isinstance(image, Nifti1Image):
            raise ImageFileError(f"a {type(image).__name__}, not NIfTI")
    except UNREADABLE_ERRORS as error:
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
    return image


def check_header(path: Path) -> Nifti1Header:
    """The header of a NIfTI file whose geometry has one meaning; its voxels are not read.

    Raises:
        CaseError: it cannot be read; sizes, spacing, scaling or transforms are no numbers or cannot be inverted; lengths are not
            in mm; or its two transforms put voxels at different places.
    """
    kind = type(read_nifti(path).header)
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            header = kind(file.read(kind.sizeof_hdr), check=False)  # unchecked: nibabel would repair a spacing of zero
        shape = header.get_data_shape()
        affine = header.get_best_affine()
        qform = header.get_qform() if int(header["qform_code"]) > 0 else affine
    except UNREADABLE_ERRORS as error:
        raise CaseError(f"{path} has a header that cannot be read ({reason(error)}); export the file again") from error
    if min(shape, default=0) < 1 or not 0 <= float(header["vox_offset"]) < 2**31:
        found = f"{path} has the shape {shape[::-1]} and voxels from byte {float(header['vox_offset']):g} on"
        raise CaseError(f"{found}, expected whole numbers above 0; export the file again")
    spacing = tuple(float(edge) for edge in header["pixdim"][1:4])
    if not (np.isfinite(spacing).all() and min(map(abs, spacing)) > 0):
        raise CaseError(
            f"{path} has the spacing {spacing} (x, y, z in mm), expected numbers above 0; correct its header (pixdim)"
        )
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-6 * np.prod(np.abs(spacing))):
        msg = f"{path} has an affine that cannot be inverted: {affine[:3, :3].round(4).tolist()}; correct its header (sform)"
        raise CaseError(msg)
    if (unit := int(header["xyzt_units"]) & 7) in UNITS:
        raise CaseError(
            f"{path} gives its lengths in {UNITS[unit]}, expected mm; write spacing and transforms in mm (xyzt_units)"
        )
    if np.isinf(float(header["scl_slope"])) or np.isinf(float(header["scl_inter"])):
        raise CaseError(f"{path} scales its voxels by an infinite number; correct its header (scl_slope, scl_inter)")
    _refuse_two_places(path, affine, qform, shape)
    return header


def _refuse_two_places(path: Path, sform: npt.NDArray[Any], qform: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise `CaseError` when the two transforms of a header disagree: readers take one or the other, ITK not always the same."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in (*shape, 1, 1)[:3]], (1,))).reshape(4, -1)
    apart = float(np.linalg.norm((sform - qform) @ corners, axis=0).max())
    if not apart <= MAX_SNAP * np.linalg.norm(sform[:3, :3], axis=0).min():
        raise CaseError(
            f"{path} has two transforms, sform and qform, that put its voxels up to {apart:.1f} mm apart, expected one place; "
            f"find out which is true and write it as both, such as with nibabel's set_sform and set_qform"
        )


def check_nifti(path: Path) -> dict[int, Holes]:
    """Read a NIfTI file to the end.

    Returns:
        Number of a volume, from 0, to its voxels that are no numbers.

    Raises:
        CaseError: as `check_header`; or voxels are missing at the end.
    """
    header = check_header(path)
    shape = (*header.get_data_shape(), 1, 1)
    try:
        kind = header.get_data_dtype()
        size, offset = kind.itemsize * int(np.prod(shape, dtype=object)), int(header["vox_offset"])
        holes: list[npt.NDArray[Any]] = []
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            found = len(file.read(offset))
            while chunk := file.read(_CHUNK):  # to the end: only there gzip notices a truncated or damaged file
                if kind.kind == "f":
                    begin = (found - offset) // kind.itemsize
                    values = np.frombuffer(chunk[: len(chunk) // kind.itemsize * kind.itemsize], kind)
                    holes.append(begin + np.flatnonzero(~np.isfinite(values)))
                found += len(chunk)
    except UNREADABLE_ERRORS as error:
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
    if found < offset + size:
        raise CaseError(f"{path} is truncated: {found} bytes of {offset + size}, uncompressed; copy it again")
    indices = np.concatenate([np.empty(0, int), *holes])
    indices = indices[indices < size // max(kind.itemsize, 1)]
    volume = int(np.prod(shape[:3]))
    by_volume = {int(number): indices[indices // volume == number] % volume for number in np.unique(indices // volume)}
    return {
        number: Holes(len(of), tuple(int(i) for i in np.unravel_index(of[0], shape[:3][::-1])))
        for number, of in by_volume.items()
    }


def read_sheared(path: Path) -> sitk.Image:
    """A NIfTI file whose axes are not at right angles, when rounding can be the reason. Raises `CaseError`."""
    nifti = read_nifti(path)
    matrix = np.diag([-1.0, -1.0, 1.0]) @ nifti.affine[:3, :3]  # ITK's world has x and y reversed
    spacing = np.linalg.norm(matrix, axis=0)
    left, _, right = np.linalg.svd(matrix / spacing)
    direction = left @ right  # the nearest one with right angles
    size = np.array(nifti.shape[:3])
    corners = np.stack(np.meshgrid(*[(-0.5, 0.5)] * 3, indexing="ij"), axis=-1).reshape(-1, 3) * (size - 1)  # from the centre
    moved = np.abs(np.linalg.solve(matrix, (direction * spacing - matrix) @ corners.T)).max()
    if moved > MAX_SNAP:
        msg = f"{path} has axes that are not at right angles ({moved:.1f} voxels off at the corners), expected a grid of boxes; "
        raise CaseError(msg + "resample it first, such as with nibabel.processing.resample_to_output")
    centre = np.diag([-1.0, -1.0, 1.0]) @ nifti.affine[:3, 3] + matrix @ ((size - 1) / 2)
    origin = centre - direction * spacing @ ((size - 1) / 2)
    voxels = np.asanyarray(nifti.dataobj).T  # as stored when the header does not scale
    image = sitk.GetImageFromArray(voxels, isVector=False)
    time = image.GetDimension() - 3
    image.SetSpacing([*spacing.tolist(), *[1.0] * time])
    image.SetOrigin([*origin.tolist(), *[0.0] * time])
    square = np.eye(3 + time)
    square[:3, :3] = direction
    image.SetDirection(square.flatten().tolist())
    return image
