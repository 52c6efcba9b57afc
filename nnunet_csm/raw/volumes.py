"""Reading one volume of a release, and everything that can be wrong with it.

ITK reads a truncated NIfTI file without a word and fills the rest with zeros, replaces a spacing of zero by 1, and passes on a
direction with NaN in it: what is checked here is what a reader cannot be trusted to notice.
"""

import gzip
import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from nnunet_csm.errors import reason
from nnunet_csm.raw.subjects import CaseError, Volume

NIFTI_ENDINGS = (".nii.gz", ".nii")
DETACHED_ENDINGS = (".nhdr", ".mhd")  # the voxels lie in another file beside the header
READABLE_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha", *DETACHED_ENDINGS)

# A header whose axes are not quite at right angles is taken as if they were when no voxel moves by more than this many voxels.
MAX_SNAP = 0.25

# what nibabel and gzip raise for a damaged file
UNREADABLE_ERRORS = (OSError, EOFError, ValueError, zlib.error, HeaderDataError, ImageFileError, WrapStructError)

_CHUNK = 1 << 22  # bytes


def read_volume(volume: Volume) -> sitk.Image:
    """The 3-D image of a volume, with finite real voxels and an invertible geometry; see `read_volumes`."""
    return read_volumes([volume])[0]


def read_volumes(volumes: Sequence[Volume]) -> list[sitk.Image]:
    """3-D images in the given order; a file that holds several of them is read once.

    Nothing but geometry comes with them: entries of headers, which may name the patient, are dropped.

    Raises:
        CaseError: the file is missing, empty, truncated, not readable, not of a known kind; it is 4-D and no index is given, or
            the index does not exist; pixels are complex or vectors; a voxel is NaN or infinite; the geometry cannot be
            inverted or is sheared.
    """
    images: dict[Volume, sitk.Image] = {}
    for path in dict.fromkeys(volume.path for volume in volumes):
        of_this_file = [volume for volume in dict.fromkeys(volumes) if volume.path == path]
        whole = _read(path, several=all(volume.index is not None for volume in of_this_file))
        for volume in of_this_file:
            images[volume] = _selected(whole, volume)
            _refuse_non_finite(images[volume], volume)
    return [images[volume] for volume in volumes]


def read_header(path: Path) -> sitk.ImageFileReader:
    """Size, geometry and entries of a file. Raises `CaseError`."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
    return reader


def is_empty(image: sitk.Image) -> bool:
    """Whether every voxel is zero: the way nnU-Net datasets say that a series is missing."""
    return not sitk.GetArrayViewFromImage(image).any()


def refuse_constant(image: sitk.Image, volume: Volume) -> None:
    """Raise `CaseError` when every voxel has the same value other than zero. `is_empty` is for those that are all zero."""
    voxels = sitk.GetArrayViewFromImage(image)
    value = voxels.flat[0]
    if value != 0 and (voxels == value).all():
        msg = f"{described(volume)}: every voxel is {value}, expected an image; replace the file, or leave this series out"
        raise CaseError(msg)


def sha256(path: Path) -> str:
    """Hash of a file; of several (a DICOM folder, a header with its voxels beside it), the hash over their sorted hashes."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
    elif path.name.endswith(DETACHED_ENDINGS):
        files = [file for file in path.parent.iterdir() if file.name.startswith(f"{path.stem}.")]
    else:
        return _sha256_of_file(path)
    return hashlib.sha256("".join(sorted(map(_sha256_of_file, files))).encode()).hexdigest()


def described(volume: Volume) -> str:
    return str(volume.path) if volume.index is None else f"{volume.path} (volume {volume.index})"


def _read(path: Path, several: bool) -> sitk.Image:
    """The whole content of a file or of a DICOM folder; 3-D or 4-D, with scalar voxels."""
    if not path.exists():
        raise CaseError(f"{path} does not exist; correct the path, or leave this series out")
    if not os.access(path, os.R_OK | os.X_OK if path.is_dir() else os.R_OK):
        raise CaseError(f"{path} may not be read by this user; change its permission (chmod +r)")
    if path.is_dir():
        from nnunet_csm.raw.dicom import read_dicom_series

        return _scalar_image(read_dicom_series(path, several), path)
    if not path.name.endswith(READABLE_ENDINGS):
        raise CaseError(f"{path} is of no known kind; expected {', '.join(READABLE_ENDINGS)}, or a folder with one DICOM series")
    if path.stat().st_size == 0:
        raise CaseError(f"{path} is empty (0 bytes); copy it again, or leave this series out")
    if path.name.endswith(NIFTI_ENDINGS):
        _check_nifti(path)
    return _scalar_image(_read_file(path), path)


def _read_file(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        if path.name.endswith(NIFTI_ENDINGS) and "orthonormal" in str(error):
            return _read_sheared(path)
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error


def _scalar_image(image: sitk.Image, path: Path) -> sitk.Image:
    kind = image.GetPixelIDTypeAsString()
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in kind:
        msg = f"{path} holds pixels of the kind '{kind}', expected one real number a voxel; write the part to be used (such as "
        raise CaseError(msg + "the magnitude) to a file of its own")
    for key in image.GetMetaDataKeys():
        image.EraseMetaData(key)
    return image


def _selected(whole: sitk.Image, volume: Volume) -> sitk.Image:
    """The 3-D volume that is meant; a 3-D file has one volume."""
    shape = whole.GetSize()[::-1]
    num_volumes = shape[0] if whole.GetDimension() == 4 else 1
    if whole.GetDimension() not in (3, 4):
        raise CaseError(f"{volume.path} has the shape {shape}, expected (z, y, x); give a 3-D file, or a 4-D file and an index")
    if volume.index is None and num_volumes > 1:
        msg = f"{volume.path} is 4-D with the shape {shape}, expected (z, y, x); give an index from 0 to {num_volumes - 1}, or a "
        raise CaseError(msg + "3-D file")
    index = volume.index or 0
    if not 0 <= index < num_volumes:
        found = "1 volume" if num_volumes == 1 else f"{num_volumes} volumes"
        msg = f"{volume.path} holds {found}, so that there is none of index {index}; give one from 0 to {num_volumes - 1}"
        raise CaseError(msg)
    image = whole[:, :, :, index] if whole.GetDimension() == 4 else whole
    if not (np.isfinite(image.GetDirection()).all() and np.isfinite(image.GetOrigin()).all()):
        raise CaseError(f"{volume.path} has a header with NaN or infinite numbers in its geometry; export the file again")
    return image


def _refuse_non_finite(image: sitk.Image, volume: Volume) -> None:
    voxels = sitk.GetArrayViewFromImage(image)
    if voxels.dtype.kind != "f":
        return
    finite = np.isfinite(voxels)
    if not finite.all():
        first = tuple(int(i) for i in np.unravel_index(np.argmin(finite), finite.shape))
        msg = f"{described(volume)}: {np.count_nonzero(~finite)} voxels are NaN or infinite, the first at {first} (z, y, x); "
        raise CaseError(msg + "replace them (such as by 0) where the file was made")


def refuse_truncated(path: Path) -> Nifti1Header:
    """The header of a NIfTI file, after a reading to the end. Raises `CaseError` when voxels are missing there."""
    kind = type(read_nifti(path).header)
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            header = kind(file.read(kind.sizeof_hdr), check=False)  # unchecked: nibabel would repair a spacing of zero
            expected = int(header["vox_offset"]) + int(np.prod(header.get_data_shape())) * int(header["bitpix"]) // 8
            found = file.tell()
            while chunk := file.read(_CHUNK):  # to the end: only there gzip notices a truncated or damaged file
                found += len(chunk)
    except UNREADABLE_ERRORS as error:
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
    if found < expected:
        raise CaseError(f"{path} is truncated: {found} bytes of {expected}, uncompressed; copy it again")
    return header


def _check_nifti(path: Path) -> None:
    """Raise `CaseError` when voxels are missing at the end, or the geometry in the header cannot be inverted."""
    header = refuse_truncated(path)
    spacing = tuple(float(edge) for edge in header["pixdim"][1:4])
    if not (np.isfinite(spacing).all() and min(map(abs, spacing)) > 0):
        raise CaseError(
            f"{path} has the spacing {spacing} (x, y, z in mm), expected numbers above 0; correct its header (pixdim)"
        )
    affine = header.get_best_affine()
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-6 * np.prod(np.abs(spacing))):
        msg = f"{path} has an affine that cannot be inverted: {affine[:3, :3].round(4).tolist()}; correct its header (sform)"
        raise CaseError(msg)


def _read_sheared(path: Path) -> sitk.Image:
    """A NIfTI file whose axes are not at right angles, when rounding can be the reason."""
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


def read_nifti(path: Path) -> Nifti1Image:
    """Header of version 1 or 2; its voxels are not read. Raises `CaseError`."""
    try:
        image = nibabel.load(path)
        if not isinstance(image, Nifti1Image):
            raise ImageFileError(f"a {type(image).__name__}, not NIfTI")
    except UNREADABLE_ERRORS as error:
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
    return image


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
