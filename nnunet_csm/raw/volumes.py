"""Reading one volume of a release, and everything that can be wrong with it."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_csm.errors import reason
from nnunet_csm.listing import file_problem
from nnunet_csm.raw.nifti import NIFTI_ENDINGS, Holes, check_nifti, read_sheared
from nnunet_csm.raw.subjects import CaseError, Volume

DETACHED_ENDINGS = (".nhdr", ".mhd")  # the voxels lie in another file beside the header
READABLE_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha", *DETACHED_ENDINGS)


def read_volume(volume: Volume) -> sitk.Image:
    """The 3-D image of a volume, with finite real voxels and an invertible geometry; see `read_volumes`."""
    return read_volumes([volume])[0]


def read_volumes(volumes: Sequence[Volume]) -> list[sitk.Image]:
    """3-D images in the given order; a file that holds several of them is read once.

    Whatever a library raises on a damaged file is a `CaseError`: one bad file never ends a conversion of many.
    Nothing but geometry comes with them: entries of headers, which may name the patient, are dropped.

    Raises:
        CaseError: the file is missing, empty, truncated, not readable, not of a known kind; it is 4-D and no index is given, or
            the index does not exist; pixels are complex or vectors; a voxel is NaN or infinite; the geometry cannot be
            inverted or is sheared.
    """
    images: dict[Volume, sitk.Image] = {}
    for path in dict.fromkeys(volume.path for volume in volumes):
        of_this_file = [volume for volume in dict.fromkeys(volumes) if volume.path == path]
        if os.path.isdir(path):
            images.update((volume, _read_dicom(volume)) for volume in of_this_file)
            continue
        try:
            whole, holes = _read(path)
        except CaseError:
            raise
        except Exception as error:
            raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
        for volume in of_this_file:
            images[volume] = _selected(whole, volume)
            _refuse_holes(holes.get(volume.index or 0) or _holes(images[volume]), volume)
    return [images[volume] for volume in volumes]


def read_header(path: Path) -> sitk.ImageFileReader:
    """Size, geometry and entries of a file. Raises `CaseError`."""
    if problem := file_problem(path):
        raise CaseError(problem)
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


def _read(path: Path) -> tuple[sitk.Image, dict[int, Holes]]:
    """Content of a file, 3-D or 4-D, with scalar voxels; which volumes have voxels that are no numbers."""
    if not os.path.lexists(path):
        raise CaseError(f"{path} does not exist; correct the path, or leave this series out")
    if problem := file_problem(path):
        raise CaseError(problem)
    if not path.name.endswith(READABLE_ENDINGS):
        raise CaseError(f"{path} is of no known kind; expected {', '.join(READABLE_ENDINGS)}, or a folder with one DICOM series")
    if path.stat().st_size == 0:
        raise CaseError(f"{path} is empty (0 bytes); copy it again, or leave this series out")
    holes = check_nifti(path) if path.name.endswith(NIFTI_ENDINGS) else {}
    return _scalar_image(_read_file(path), path), holes


def _read_dicom(volume: Volume) -> sitk.Image:
    from nnunet_csm.raw.dicom import read_dicom_series

    image = _scalar_image(read_dicom_series(volume.path, volume.index), volume.path)
    _refuse_holes(_holes(image), volume)
    return image


def _read_file(path: Path) -> sitk.Image:
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        if path.name.endswith(NIFTI_ENDINGS) and "orthonormal" in str(error):
            return read_sheared(path)
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


def _holes(image: sitk.Image) -> Holes:
    """Voxels that are no numbers. ITK leaves none in NIfTI files, where it reads them as 0."""
    voxels = sitk.GetArrayViewFromImage(image)
    finite = np.isfinite(voxels) if voxels.dtype.kind == "f" else np.ones((1, 1, 1), dtype=bool)
    return Holes(int(np.count_nonzero(~finite)), tuple(int(i) for i in np.unravel_index(np.argmin(finite), finite.shape)))


def _refuse_holes(holes: Holes, volume: Volume) -> None:
    if holes.number:
        msg = f"{described(volume)}: {holes.number} voxels are NaN or infinite, the first at {holes.first} (z, y, x); "
        raise CaseError(msg + "replace them (such as by 0) where the file was made")


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
