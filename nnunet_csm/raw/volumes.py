"""Reading one volume of a release, and everything that can be wrong with it."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_csm.errors import reason
from nnunet_csm.files import sha256_of_file
from nnunet_csm.listing import file_problem
from nnunet_csm.raw import nifti
from nnunet_csm.raw.geometry import Fit, Grid, fit, straight_grid
from nnunet_csm.raw.subjects import CaseError, Volume

DETACHED_ENDINGS = (".nhdr", ".mhd")  # the voxels lie in another file beside the header
_METAIMAGE_ENDINGS = (".mha", ".mhd")
_LONGEST_HEADER = 1 << 16  # bytes that are searched
READABLE_ENDINGS = (*nifti.ENDINGS, ".nrrd", ".mha", *DETACHED_ENDINGS)


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
            whole = _read(path)
        except CaseError:
            raise
        except Exception as error:
            raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
        for volume in of_this_file:
            images[volume] = _selected(whole, volume)
            _refuse_non_finite(images[volume], volume)
    return [images[volume] for volume in volumes]


def read_header(path: Path) -> sitk.ImageFileReader:
    """Size, geometry and entries of a file. Raises `CaseError`."""
    if problem := file_problem(path):
        raise CaseError(problem)
    if path.name.endswith(_METAIMAGE_ENDINGS):
        _refuse_other_dimensions(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
    return reader


def _refuse_other_dimensions(path: Path) -> None:
    """Raise `CaseError` for a MetaImage header with a number of axes at which ITK ends the process (below 1, above 8)."""
    try:
        with path.open("rb") as file:
            found = re.search(rb"^\s*NDims\s*=\s*(.*?)\s*$", file.read(_LONGEST_HEADER), re.MULTILINE)
    except OSError as error:
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
    if found is None or found[1] not in (b"2", b"3", b"4"):
        value = None if found is None else found[1].decode(errors="replace")
        raise CaseError(f"{path} cannot be read (NDims in its header is {value}, expected 3 or 4); copy it or export it again")


@dataclass(frozen=True)
class Look:
    """What a header says.

    Attributes:
        shape: (z, y, x), or with more axes before these.
        places: where the (first) volume may lie; several when the transforms of a NIfTI header disagree.
        placed: whether the header says so at all; without, the place is that of ITK.
        remarks: what else to say of it, each to follow the name of the file.
    """

    shape: tuple[int, ...]
    places: tuple[Grid, ...]
    placed: bool = True
    remarks: tuple[str, ...] = ()

    def on_grid_of(self, other: "Look") -> bool:
        """Whether the voxels of two images of a case coincide, as they are stored."""
        if not (self.placed and other.placed):
            own, grid = self.places[0], other.places[0]
            return own.size == grid.size and np.allclose(own.spacing, grid.spacing)
        return any(one.same_as(another) for one in self.places for another in other.places)

    def fit_to(self, other: "Look") -> Fit | None:
        """How a label map comes to the grid of an image voxel by voxel; None when it does not belong on it.

        Where a header has no place, shape and spacing have to do.
        """
        if self.placed and other.placed:
            return fit(self.places, other.places)
        grid = other.places[0]
        own = replace(grid, size=self.places[0].size, spacing=self.places[0].spacing)
        found = fit([own], [grid])
        return found and replace(found, said=f"{found.said}, voxel by voxel as a header holds no place")


def look_at(path: Path) -> Look:
    """What the header of an image file says, without a look at its voxels. Raises `CaseError`."""
    if problem := file_problem(path):
        raise CaseError(problem)
    if path.name.endswith(nifti.ENDINGS):
        return _look_at_nifti(nifti.read_header(path))
    header = read_header(path)
    shape = tuple(header.GetSize()[::-1])
    on_disk = path.stat().st_size
    if not path.name.endswith(DETACHED_ENDINGS) and np.prod(shape, dtype=object) > on_disk * nifti.MOST_COMPRESSED:
        raise CaseError(
            f"{path} is truncated: its header tells of the shape {shape}, too much for {on_disk} bytes; copy it again"
        )
    if min(shape) < 1:
        raise CaseError(f"{path} has the shape {shape}, without a voxel; copy it again")
    return Look(shape, (straight_grid_of(header, path),) if len(shape) > 2 else ())


def _look_at_nifti(header: nifti.Header) -> Look:
    places = header.grids()
    remarks = []
    if len(places) > 1:
        remarks.append(f"holds an sform and a qform that are {places[0].apart(places[1]):.3g} mm apart")
    if not header.placed:
        remarks.append("holds neither sform nor qform: where it lies is not known")
    if header.unit != 1:
        remarks.append(f"is in units of {header.unit:g} mm, by which its spacing is multiplied")
    return Look(header.shape, places, header.placed, tuple(remarks))


def nnunet_sees(path: Path, look: Look) -> bool:
    """Whether nnU-Net's reader takes a file for what it is here: 3-D, and where its header puts it."""
    try:
        header = read_header(path)
    except CaseError:
        return False
    return bool(header.GetDimension() == 3 and Grid.of(header).same_as(look.places[0]))


def look_of(volume: Volume, image: sitk.Image) -> Look:
    """What the header of a volume says; of a DICOM folder, what its reader made of its headers. Raises `CaseError`."""
    return Look(image.GetSize()[::-1], (Grid.of(image),)) if volume.path.is_dir() else look_at(volume.path)


def scan_of(volume: Volume) -> tuple[str, ...]:
    """What tells scans apart whose series share a grid: study and frame of reference of a DICOM folder; () of a file."""
    if not volume.path.is_dir():
        return ()
    from nnunet_csm.raw.dicom import study_and_frame

    return study_and_frame(volume.path)


def straight_grid_of(image: sitk.Image | sitk.ImageFileReader, path: Path) -> Grid:
    """Where an image lies. Raises `CaseError` when its axes are far from right angles, or its geometry is no geometry."""
    grid = Grid.of(image)
    spacing, directions = grid.spacing, np.reshape(grid.direction, (3, 3))
    if not (
        np.isfinite([*spacing, *grid.origin, *grid.direction]).all()
        and min(spacing) > 0
        and abs(np.linalg.det(directions)) > 1e-6
    ):
        raise CaseError(f"{path} has a header with NaN, infinite numbers or zeros in its geometry; export the file again")
    return straight_grid(path, grid.size, directions * spacing, np.array(grid.origin))


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
        return sha256_of_file(path)
    return hashlib.sha256("".join(sorted(map(sha256_of_file, files))).encode()).hexdigest()


def described(volume: Volume) -> str:
    return str(volume.path) if volume.index is None else f"{volume.path} (volume {volume.index})"


def _read(path: Path) -> sitk.Image:
    """The whole content of a file; 3-D or 4-D, with scalar voxels."""
    if not os.path.lexists(path):
        raise CaseError(f"{path} does not exist; correct the path, or leave this series out")
    if problem := file_problem(path):
        raise CaseError(problem)
    if not path.name.endswith(READABLE_ENDINGS):
        raise CaseError(f"{path} is of no known kind; expected {', '.join(READABLE_ENDINGS)}, or a folder with one DICOM series")
    if path.stat().st_size == 0:
        raise CaseError(f"{path} is empty (0 bytes); copy it again, or leave this series out")
    return _scalar_image(_read_file(path), path)


def _read_dicom(volume: Volume) -> sitk.Image:
    from nnunet_csm.raw.dicom import read_dicom_series

    image = _scalar_image(read_dicom_series(volume.path, volume.index), volume.path)
    _refuse_non_finite(image, volume)
    return image


def _read_file(path: Path) -> sitk.Image:
    if path.name.endswith(nifti.ENDINGS):
        return nifti.read_image(path)
    look = look_at(path)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise CaseError(f"{path} cannot be read ({reason(error)}); is the copy complete?") from error
    if look.places:
        look.places[0].put_on(image)  # with right angles
    return image


def _scalar_image(image: sitk.Image, path: Path) -> sitk.Image:
    kind = image.GetPixelIDTypeAsString()
    if image.GetNumberOfComponentsPerPixel() != 1 or "complex" in kind:
        msg = f"{path} holds pixels of the kind '{kind}', expected one real number a voxel; write the part to be used (such as "
        raise CaseError(msg + "the magnitude) to a file of its own")
    try:
        for key in image.GetMetaDataKeys():
            image.EraseMetaData(key)
    except TypeError as error:  # SimpleITK takes no name that is not UTF-8
        raise CaseError(f"{path} has a header entry whose name is no text; export the file again") from error
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
    return whole[:, :, :, index] if whole.GetDimension() == 4 else whole


def _refuse_non_finite(image: sitk.Image, volume: Volume) -> None:
    voxels = sitk.GetArrayViewFromImage(image)
    if voxels.dtype.kind != "f":
        return
    finite = np.isfinite(voxels)
    if not finite.all():
        first = tuple(int(i) for i in np.unravel_index(np.argmin(finite), finite.shape))
        msg = f"{described(volume)}: {np.count_nonzero(~finite)} voxels are NaN or infinite, the first at {first} (z, y, x); "
        raise CaseError(msg + "replace them (such as by 0) where the file was made")
