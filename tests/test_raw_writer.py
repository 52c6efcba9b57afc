"""Cases on one grid, where their headers put them; nothing wrong goes through unnamed, nothing half-written looks whole."""

import csv
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st

from nnunet_csm.errors import UserError
from nnunet_csm.files import whole_folder
from nnunet_csm.raw import cases as written_cases
from nnunet_csm.raw import nifti
from nnunet_csm.raw.background import background_of, shifted_to_zero
from nnunet_csm.raw.check import check_dataset
from nnunet_csm.raw.geometry import Grid
from nnunet_csm.raw.grid import labels_of, reference_series, refuse_loss, refuse_misplaced, resampled
from nnunet_csm.raw.manifest import MANIFEST
from nnunet_csm.raw.registration import Registration, _decided, register_rigidly
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Diagnosis, Mask, Volume
from nnunet_csm.raw.volumes import is_empty, read_volume, read_volumes, refuse_constant, sha256
from nnunet_csm.raw.writer import SPLITS, Report, splits_by_patient, write_dataset

SHAPE = (6, 9, 8)  # z, y, x
SPACING = (1.0, 1.5, 3.0)  # x, y, z
TILT = tuple(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 0.3, (0, 0, 0)).GetMatrix())
UPRIGHT = tuple(np.eye(3).flatten())


def array(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


def image_of(voxels: np.ndarray, spacing=SPACING, origin=(-3.0, 5.0, 7.0), direction=UPRIGHT) -> sitk.Image:
    image = sitk.GetImageFromArray(voxels, isVector=False)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    return image


def noise(shape=SHAPE, seed=0, kind: Any = np.int16) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, shape).astype(kind)


def save(image: sitk.Image, path: Path) -> Volume:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return Volume(path)


def save_nifti(path: Path, affine: np.ndarray, voxels: np.ndarray | None = None) -> Volume:
    """With `affine` in the header just as it is."""
    nifti = nibabel.Nifti1Image(noise().T if voxels is None else voxels, None)
    nifti.header["pixdim"][1:4] = np.fmax(np.linalg.norm(affine[:3, :3], axis=0), 1.0)
    nifti.header.set_sform(affine, code=1)
    nibabel.save(nifti, path)
    return Volume(path)


# --- one volume --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd"])
def test_a_volume_is_read_as_it_was_written(tmp_path: Path, ending: str) -> None:
    written = image_of(noise(), direction=TILT)
    read = read_volume(save(written, tmp_path / f"a{ending}"))
    assert read.GetPixelID() == written.GetPixelID() and np.array_equal(array(read), array(written))
    assert Grid.of(read).same_as(Grid.of(written))


def test_volumes_of_a_4d_file_are_chosen_by_index_and_the_file_is_read_once(tmp_path: Path, monkeypatch) -> None:
    voxels = noise((3, *SHAPE))
    sitk.WriteImage(sitk.GetImageFromArray(voxels, isVector=False), str(tmp_path / "a.nii.gz"))
    readings = []
    read_image = nifti.read_image

    def counted(path: Path) -> sitk.Image:
        readings.append(path)
        return read_image(path)

    monkeypatch.setattr(nifti, "read_image", counted)
    for index, image in zip((2, 0, 2), read_volumes([Volume(tmp_path / "a.nii.gz", i) for i in (2, 0, 2)]), strict=True):
        assert np.array_equal(array(image), voxels[index])
    assert len(readings) == 1


def test_what_a_header_says_of_the_patient_does_not_come_along(tmp_path: Path) -> None:
    image = image_of(noise())
    image.SetMetaData("PatientName", "Doe^Jane")
    read = read_volume(save(image, tmp_path / "a.nrrd"))
    assert read.GetMetaDataKeys() == ()


def test_a_folder_is_read_as_dicom(tmp_path: Path, monkeypatch) -> None:
    image = image_of(noise())
    monkeypatch.setattr(
        "nnunet_csm.raw.dicom.read_dicom_series", lambda folder, index: image if (folder, index) == (tmp_path, None) else None
    )
    assert np.array_equal(array(read_volume(Volume(tmp_path))), array(image))


def _cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.97])
def test_a_truncated_file_is_refused(tmp_path: Path, ending: str, share: float) -> None:
    volume = save(image_of(noise((20, 30, 25))), tmp_path / f"a{ending}")
    _cut(volume.path, share)
    with pytest.raises(CaseError, match=rf"a\{ending} .*(truncated|cannot be read).*(copy)"):
        read_volume(volume)


def test_a_zipped_file_whose_content_is_truncated_is_refused(tmp_path: Path) -> None:
    volume = save(image_of(noise()), tmp_path / "a.nii")
    _cut(volume.path, 0.8)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(volume.path.read_bytes()))
    with pytest.raises(CaseError, match=r"b\.nii\.gz is truncated: \d+ bytes of \d+"):
        read_volume(Volume(tmp_path / "b.nii.gz"))


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    volume = save(image_of(noise((20, 30, 25))), tmp_path / "a.nii.gz")
    content = bytearray(volume.path.read_bytes())
    content[-6] ^= 0xFF  # of the checksum at the end: everything before it can be unpacked
    volume.path.write_bytes(content)
    with pytest.raises(CaseError, match=r"a\.nii\.gz cannot be read \(CRC"):
        read_volume(volume)


def _nifti_with_spacing(path: Path, spacing: float) -> None:
    sitk.WriteImage(image_of(noise()), str(path))
    content = bytearray(path.read_bytes())
    content[76 + 4 * 3 : 76 + 4 * 4] = np.float32(spacing).tobytes()  # pixdim[3]
    path.write_bytes(content)


SINGULAR, SHEARED, UNKNOWN = np.diag([1.0, 1.0, 0.0, 1.0]), np.diag([1.0, 1.0, 3.0, 1.0]), np.diag([np.nan, 1.0, 3.0, 1.0])
SHEARED[0, 1] = 0.5

BAD_FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing.nii.gz": (lambda path: None, "does not exist"),
    "empty.nii.gz": (Path.touch, r"is empty \(0 bytes\)"),
    "text.nii.gz": (lambda path: path.write_text("hello"), "cannot be read"),
    "picture.png": (lambda path: path.write_text("hello"), r"no known kind; expected \.nii\.gz"),
    "flat.nii": (lambda path: sitk.WriteImage(sitk.GetImageFromArray(noise((5, 5))), str(path)), r"the shape \(5, 5\)"),
    "four.nii": (
        lambda path: sitk.WriteImage(sitk.GetImageFromArray(noise((2, *SHAPE)), isVector=False), str(path)),
        r"4-D with the shape \(2, 6, 9, 8\).*index from 0 to 1",
    ),
    "complex.nii": (
        lambda path: save_nifti(path, np.eye(4), noise().T.astype(np.complex64)),
        "'complex of 32-bit float', expected one real number",
    ),
    "vector.nrrd": (
        lambda path: sitk.WriteImage(sitk.GetImageFromArray(noise((*SHAPE, 3)), isVector=True), str(path)),
        "'vector of 16-bit signed integer'",
    ),
    "singular.nii.gz": (lambda path: save_nifti(path, SINGULAR), r"affine that cannot be inverted.*sform"),
    "unknown.nii": (lambda path: save_nifti(path, UNKNOWN), r"affine that cannot be inverted.*sform"),
    "thin.nii": (lambda path: _nifti_with_spacing(path, 0.0), r"the spacing \(1\.0, 1\.5, 0\.0\).*pixdim"),
    "nan.nii": (lambda path: _nifti_with_spacing(path, np.nan), r"the spacing \(1\.0, 1\.5, nan\).*pixdim"),
    "sheared.nii.gz": (lambda path: save_nifti(path, SHEARED), r"not at right angles.*resample_to_output"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_what_was_found_and_the_remedy(tmp_path: Path, name: str) -> None:
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(CaseError, match=rf"{name} .*{message}"):
        read_volume(Volume(tmp_path / name))


@pytest.mark.parametrize("index", [-1, 2])
def test_an_index_that_the_file_does_not_have_is_refused(tmp_path: Path, index: int) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(noise((2, *SHAPE)), isVector=False), str(tmp_path / "a.nii"))
    with pytest.raises(CaseError, match=rf"2 volumes.*none of index {index}; give one from 0 to 1"):
        read_volume(Volume(tmp_path / "a.nii", index))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_voxel_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    voxels = noise(kind=np.float32)
    voxels[2, 3, 4] = value
    with pytest.raises(CaseError, match=r"a\.nrrd: 1 voxels are NaN or infinite, the first at \(2, 3, 4\)"):
        read_volume(save(image_of(voxels), tmp_path / "a.nrrd"))


def test_a_file_without_permission_is_refused_even_where_root_could_read_it(tmp_path: Path, monkeypatch) -> None:
    volume = save(image_of(noise()), tmp_path / "a.nii.gz")
    monkeypatch.setattr(os, "access", lambda path, mode: not (path == volume.path and mode & os.R_OK))
    with pytest.raises(CaseError, match=r"a\.nii\.gz may not be read by this user.*chmod"):
        read_volume(volume)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_a_constant_volume_is_an_error_and_a_zero_volume_a_missing_series(kind: Any) -> None:
    constant, zero, other = (image_of(voxels) for voxels in (np.full(SHAPE, 7, kind), np.zeros(SHAPE, kind), noise(kind=kind)))
    with pytest.raises(CaseError, match="every voxel is 7"):
        refuse_constant(constant, Volume(Path("a.nii")))
    for image in (zero, other):
        refuse_constant(image, Volume(Path("a.nii")))
    assert [is_empty(image) for image in (constant, zero, other)] == [False, True, False]


@pytest.mark.parametrize("shear", [1e-5, 1e-3, 1e-2])
def test_axes_off_by_a_rounding_are_straightened_and_voxels_kept(tmp_path: Path, shear: float) -> None:
    affine = np.diag([1.0, 1.5, 3.0, 1.0])
    affine[:3, 3] = (-3.0, 5.0, 7.0)
    affine[0, 1] = shear
    read = read_volume(save_nifti(tmp_path / "a.nii.gz", affine))
    assert np.array_equal(array(read), noise())
    for corner in [(0, 0, 0), (7, 8, 5), (7, 0, 5)]:
        expected = (affine @ (*corner, 1))[:3] * (-1, -1, 1)
        assert np.allclose(read.TransformIndexToPhysicalPoint(corner), expected, atol=0.25)


def test_the_hash_is_of_the_content_and_of_every_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    assert sha256(tmp_path / "a") == hashlib.sha256(b"1").hexdigest()
    together = sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "z")
    assert sha256(tmp_path) == together
    (tmp_path / "z").write_bytes(b"3")
    assert sha256(tmp_path) != together


# --- one grid ----------------------------------------------------------------------------------------------------------------


def ramp(shape: tuple[int, ...], spacing, origin, direction=UPRIGHT) -> sitk.Image:
    """Voxel value = a linear function of where the voxel lies in the world."""
    image = image_of(np.zeros(shape, np.float32), spacing, origin, direction)
    for index in np.ndindex(*image.GetSize()):
        image[index] = float(np.dot((2.0, -3.0, 5.0), image.TransformIndexToPhysicalPoint(index)) + 100)
    return image


@given(
    angles=st.tuples(*[st.floats(-0.4, 0.4)] * 3),
    spacing=st.tuples(*[st.floats(0.6, 2.5)] * 3),
    origin=st.tuples(*[st.floats(-2, 2)] * 3),
)
def test_a_series_lands_where_its_header_puts_it(angles, spacing, origin) -> None:
    direction = sitk.Euler3DTransform((0, 0, 0), *angles, (0, 0, 0)).GetMatrix()
    moving = ramp((7, 8, 9), spacing, origin, direction)
    grid = Grid((5, 4, 6), (1.1, 0.7, 1.6), (1.0, 2.0, 0.5), TILT)
    result = resampled(moving, grid)
    assert Grid.of(result).same_as(grid)
    inside = 0
    for index in np.ndindex(*grid.size):
        place = result.TransformIndexToPhysicalPoint(index)
        at = np.array(moving.TransformPhysicalPointToContinuousIndex(place))
        if (at >= 0).all() and (at <= np.array(moving.GetSize()) - 1).all():
            inside += 1
            assert result[index] == pytest.approx(np.dot((2.0, -3.0, 5.0), place) + 100, abs=1e-3)
        elif (at < -0.51).any() or (at > np.array(moving.GetSize()) - 0.49).any():
            assert result[index] == 0
    assert inside or moving.GetSpacing()[0] < 1


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32, np.float64])
def test_on_its_own_grid_a_series_keeps_every_bit_even_when_the_header_was_rounded(kind: Any) -> None:
    image = image_of(noise(kind=kind), direction=TILT)
    grid = Grid.of(image)
    rounded = replace(grid, origin=tuple(float(np.float32(edge)) + 1e-3 for edge in grid.origin), spacing=(1.0001, 1.5, 3.0))
    for target in (grid, rounded):
        kept = resampled(image, target)
        assert kept.GetPixelID() == image.GetPixelID() and np.array_equal(array(kept), array(image))
        assert Grid.of(kept) == target


def test_a_grid_half_a_voxel_off_is_another_grid() -> None:
    grid = Grid((8, 9, 6), SPACING, (0.0, 0.0, 0.0), UPRIGHT)
    for other in (replace(grid, origin=(0.5, 0.0, 0.0)), replace(grid, size=(9, 8, 6)), replace(grid, direction=TILT)):
        assert not grid.same_as(other)


def test_overlap_is_a_share_of_the_smaller_field_of_view() -> None:
    large = Grid((40, 40, 40), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), UPRIGHT)
    small = Grid((10, 10, 10), (2.0, 2.0, 2.0), (0.5, 0.5, 0.5), UPRIGHT)
    assert small.overlap(large) == large.overlap(small) == 1
    half = replace(small, origin=(-9.5, 0.5, 0.5))
    assert half.overlap(large) == large.overlap(half) == pytest.approx(0.5, abs=0.03)
    assert replace(small, origin=(100.0, 0.0, 0.0)).overlap(large) == 0


def test_the_finest_series_is_the_reference_unless_another_is_named() -> None:
    coarse, fine = (Grid((4, 4, 4), (edge, edge, 3.0), (0.0, 0.0, 0.0), UPRIGHT) for edge in (2.0, 0.5))
    slightly_finer = replace(fine, spacing=(0.49999, 0.5, 3.0))
    grids = {"ADC": coarse, "T2w": fine, "T1w": slightly_finer}
    assert reference_series(grids, "finest") == "T2w"
    assert reference_series(dict(reversed(grids.items())), "finest") == "T1w"
    assert reference_series(grids, "ADC") == "ADC"
    with pytest.raises(CaseError, match=r"FLAIR is missing, found ADC, T2w, T1w; -reference finest"):
        reference_series(grids, "FLAIR")


def test_headers_that_cannot_be_true_are_refused() -> None:
    reference = Grid((20, 18, 6), SPACING, (0.0, 0.0, 0.0), TILT)
    for fine in (reference, replace(reference, size=(10, 9, 3)), replace(reference, size=(18, 20, 6), origin=(1.0, -1.5, 0.0))):
        refuse_misplaced(fine, reference, "a.nii", "T2w")
    with pytest.raises(
        CaseError, match=r"a\.nii has the shape \(20, 18, 6\), a permutation of \(6, 18, 20\) of T2w.*axes are swapped"
    ):
        refuse_misplaced(replace(reference, size=(6, 18, 20)), reference, "a.nii", "T2w")
    far = (500.0, 0.0, 0.0)
    with pytest.raises(CaseError, match=r"a\.nii .*hardly overlap.* 0%.*swapped axes, or of another study"):
        refuse_misplaced(replace(reference, size=(5, 5, 5), origin=far), reference, "a.nii", "T2w")
    with pytest.raises(CaseError, match=r"a\.nii has the shape of T2w, but by its header 0%.*copy the header"):
        refuse_misplaced(replace(reference, origin=far), reference, "a.nii", "T2w")
    with pytest.raises(CaseError, match=r"permutation.*axes may be swapped"):
        refuse_misplaced(replace(reference, size=(6, 20, 18), origin=far), reference, "a.nii", "T2w")


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float32])
def test_mask_values_become_labels_and_others_are_refused(kind: Any) -> None:
    voxels = np.zeros(SHAPE, kind)
    voxels[1:3], voxels[4] = 3, 5
    mask = Mask(Volume(Path("m.nii")), {3: 1, 5: 2, 9: 1})
    assert np.array_equal(array(labels_of(image_of(voxels), mask)), np.select([voxels == 3, voxels == 5], [1, 2]))
    for value in (4, *([-1] if kind != np.uint8 else [])):
        voxels[0, 0, 0] = value
        with pytest.raises(CaseError, match=rf"m\.nii: the mask has the value {value}, expected one of 0, 3, 5, 9"):
            labels_of(image_of(voxels), mask)


def test_a_mask_that_was_interpolated_is_refused() -> None:
    voxels = np.zeros(SHAPE, np.float32)
    voxels[2, 2, 2] = 0.25
    with pytest.raises(CaseError, match=r"m\.nii: the mask has values such as 0\.25, expected whole numbers"):
        labels_of(image_of(voxels), Mask(Volume(Path("m.nii")), {1: 1}))


def test_a_mask_that_the_grid_loses_is_refused() -> None:
    voxels = np.zeros((10, 10, 10), np.uint8)
    voxels[2:8, 2:8, 2:8] = 1
    mask = image_of(voxels, (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
    whole = Grid((20, 20, 20), (0.5, 0.5, 0.5), (-0.25, -0.25, -0.25), UPRIGHT)
    after = resampled(mask, whole, nearest=True)
    refuse_loss(mask, after, "m.nii")
    assert array(after).sum() == 8 * voxels.sum()
    cut = replace(whole, size=(12, 20, 20))
    with pytest.raises(CaseError, match=r"m\.nii: 144 of 216 mm3 are left.*at least 90%.*-reference"):
        refuse_loss(mask, resampled(mask, cut, nearest=True), "m.nii")
    mask[9, 9, 9] = 2
    with pytest.raises(CaseError, match=r"m\.nii: no voxel of label 2 is left"):
        refuse_loss(mask, resampled(mask, replace(whole, size=(18, 18, 18)), nearest=True), "m.nii")


# --- registration ------------------------------------------------------------------------------------------------------------


def head(contrast: Callable[[np.ndarray], np.ndarray], transform: sitk.Transform | None = None) -> sitk.Image:
    """Smooth blobs in 40 x 48 x 44 voxels of 2 mm, as a series of this contrast, moved by `transform`."""
    z, y, x = np.mgrid[:40, :48, :44].astype(np.float32)
    generator = np.random.default_rng(3)
    tissue = (((z - 20) / 17) ** 2 + ((y - 24) / 21) ** 2 + ((x - 22) / 19) ** 2 < 1).astype(np.float32)
    for _ in range(14):
        centre, width = generator.uniform((10, 12, 11), (30, 36, 33)), generator.uniform(2.5, 6)
        squared = (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2
        tissue += generator.uniform(0.3, 1.2) * np.exp(-squared / (2 * width**2)) * (tissue > 0)
    voxels = contrast(tissue) * (tissue > 0) + generator.normal(0, 0.01, tissue.shape)
    image = image_of(voxels.astype(np.float32), (2.0, 2.0, 2.0), (-44.0, -48.0, -40.0))
    return image if transform is None else sitk.Resample(image, image, transform)


def registered(moving: sitk.Image, fixed: sitk.Image) -> Registration:
    """A scan of one series."""
    return register_rigidly({"T1w": moving}, fixed)["T1w"]


def moved(image: sitk.Image, *mm: float) -> sitk.Image:
    """In its header only."""
    image = sitk.Image(image)
    image.SetOrigin(np.add(image.GetOrigin(), mm).tolist())
    return image


def test_a_phantom_moved_in_its_header_and_turned_is_found_again() -> None:
    fixed = head(lambda tissue: tissue)
    turn = sitk.Euler3DTransform((0.0, 0.0, 0.0), *np.radians([3.0, -2.0, 4.0]), (0.0, 0.0, 0.0))
    moving = head(lambda tissue: 3 - tissue**1.5, turn)  # another contrast, partly inverted
    moving.SetOrigin(np.add(moving.GetOrigin(), (0.0, 4.0, 0.0)).tolist())
    found = registered(moving, fixed)
    assert not found.refused and found.after > found.before
    # From the reference into the moved series, back by the header's 4 mm, then by the turn: where it started
    for place in [(0.0, 0.0, 0.0), (20.0, 0.0, 0.0), (0.0, -25.0, 10.0), (0.0, 10.0, 20.0)]:
        back = turn.TransformPoint(np.subtract(found.transform.TransformPoint(place), (0.0, 4.0, 0.0)).tolist())
        assert np.linalg.norm(np.subtract(back, place)) < 1.0
    together = np.reshape(turn.GetMatrix(), (3, 3)) @ np.reshape(found.transform.GetMatrix(), (3, 3))
    assert np.degrees(np.arccos(min(1.0, (np.trace(together) - 1) / 2))) < 0.5
    assert registered(moving, fixed).transform.GetParameters() == found.transform.GetParameters()


def test_series_that_lie_well_are_left_and_a_wild_result_is_refused() -> None:
    fixed = head(lambda tissue: tissue)
    assert registered(head(lambda tissue: tissue), fixed).refused == "no better than the headers"
    far = moved(head(lambda tissue: tissue), 0, 0, 28)
    assert "no movement of a patient" in registered(far, fixed).refused


def faint() -> sitk.Image:
    """A series of the head in which noise hides the tissue, so that by itself it is registered anywhere or nowhere."""
    image = head(lambda tissue: tissue)
    noisy = sitk.GetImageFromArray(array(image) + np.random.default_rng(5).normal(0, 2, array(image).shape).astype(np.float32))
    noisy.CopyInformation(image)
    return noisy


def test_series_of_one_scan_share_the_transform_that_fits_all_best() -> None:
    fixed = head(lambda tissue: tissue)
    scan = {"DWI": moved(faint(), 4, 0, 0), "ADC": moved(head(lambda tissue: 3 - tissue), 4, 0, 0)}
    found = register_rigidly(scan, fixed)
    assert found["DWI"].transform.GetParameters() == found["ADC"].transform.GetParameters()
    assert not found["DWI"].refused and found["DWI"].found_with == found["ADC"].found_with == "ADC"
    assert found["ADC"].transform.GetTranslation() == pytest.approx([4, 0, 0], abs=0.5)
    assert found["DWI"].together == found["ADC"].together == ("DWI", "ADC")
    # the proposal is the one that the series makes by itself, and the order of the series does not matter
    alone, turned = registered(scan["ADC"], fixed), register_rigidly(dict(reversed(scan.items())), fixed)
    assert alone.transform.GetParameters() == found["ADC"].transform.GetParameters() == turned["DWI"].transform.GetParameters()


@given(st.data())
def test_of_every_series_it_is_decided_once_and_of_a_scan_by_one_of_it(data: st.DataObject) -> None:
    names = ("A", "B", "C", "D")[: data.draw(st.integers(1, 4))]
    mm, nats = st.floats(-15, 15), st.floats(0, 1)
    proposed = {name: sitk.Euler3DTransform((0, 0, 0), 0, 0, 0, data.draw(st.tuples(mm, mm, mm))) for name in names}
    before = {name: data.draw(nats) for name in names}
    after = {(name, by): data.draw(nats) for name in names for by in names}
    decided = _decided(names, proposed, before, after)
    assert sorted(name for together, _, _ in decided for name in together) == list(names)
    for together, by, refused in decided:
        assert by in together
        if not refused:
            assert sum(after[name, by] for name in together) > sum(before[name] for name in together)


def test_a_faint_series_follows_its_scan_and_one_that_clearly_moved_does_not() -> None:
    """Numbers of real patients: ADC and DWI of a prostate, and T1ce of a glioma moved by 5 mm beside T1w."""
    places = {"ADC": (3.2, 2.8, 2.6), "DWI": (5.5, 10.1, -15.1), "T1w": (-0.14, 0.11, 0.53), "T1ce": (-3.56, -3.29, 2.37)}
    proposed = {name: sitk.Euler3DTransform((0, 0, 0), 0, 0, 0, mm) for name, mm in places.items()}
    before = {"ADC": 0.111, "DWI": 0.0569, "T1w": 0.7735, "T1ce": 0.5416}
    after = {("ADC", "ADC"): 0.1365, ("ADC", "DWI"): 0.0597, ("DWI", "ADC"): 0.0606, ("DWI", "DWI"): 0.073}
    after |= {("T1w", "T1w"): 0.784, ("T1w", "T1ce"): 0.569, ("T1ce", "T1w"): 0.5771, ("T1ce", "T1ce"): 0.7336}
    assert _decided(("ADC", "DWI"), proposed, before, after) == [(("ADC", "DWI"), "ADC", "")]
    assert _decided(("T1w", "T1ce"), proposed, before, after) == [(("T1w",), "T1w", ""), (("T1ce",), "T1ce", "")]


def test_a_series_that_clearly_moved_by_itself_is_registered_by_itself() -> None:
    fixed, lies_well = head(lambda tissue: tissue), head(lambda tissue: 3 - tissue)
    off = sitk.Resample(lies_well, lies_well, sitk.TranslationTransform(3, (-6.0, 0.0, 0.0)))  # on the same grid
    found = register_rigidly({"T1w": lies_well, "T1ce": off}, fixed)
    assert found["T1ce"].together == ("T1ce",) and found["T1w"].together == ("T1w",)
    assert found["T1ce"].transform.GetTranslation() == pytest.approx([6, 0, 0], abs=0.7)
    assert found["T1w"].refused or np.linalg.norm(found["T1w"].transform.GetTranslation()) < 0.5


# --- a dataset ---------------------------------------------------------------------------------------------------------------

SERIES = ("T2w", "ADC", "DWI")
DATASET = Dataset("Dataset501_Clinic", SERIES, {"background": 0, "gland": 1, "lesion": 2}, about={"licence": "none"})


def make_case(folder: Path, name: str, patient: str | None = None, series=SERIES, seed: int = 0, **changes: Any) -> Case:
    """T2w fine and tilted, ADC and DWI coarser and larger; a mask on the grid of T2w."""
    images = {}
    for number, one in enumerate(series):
        if one == "T2w":
            image = image_of(noise((6, 20, 20), seed), (1.0, 1.0, 3.0), (0.0, 0.0, 0.0), TILT)
        else:
            image = image_of(noise((8, 12, 12), seed + number), (2.0, 2.0, 3.0), (-2.0, -3.0, -3.0), TILT)
        images[one] = save(image, folder / name / f"{one}.nii.gz")
    voxels = np.zeros((6, 20, 20), np.uint8)
    voxels[1:5, 5:15, 5:15] = 1
    voxels[2:4, 8:11, 8:11] = 3
    mask = save(image_of(voxels, (1.0, 1.0, 3.0), (0.0, 0.0, 0.0), TILT), folder / name / "mask.nii.gz")
    case = Case(name, patient or name, images, (Mask(mask, {1: 1, 3: 2}),))
    return replace(case, **changes)


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    source = tmp_path / "release"
    return [
        make_case(source, "a", diagnoses=(Diagnosis("malignant", 2), Diagnosis("benign", 1))),
        make_case(source, "b", series=("T2w", "DWI"), seed=10, diagnoses=(Diagnosis("benign"),)),
        make_case(source, "c", seed=20, test=True),
    ]


def convert(cases: list[Case], tmp_path: Path, dataset: Dataset = DATASET, **options: Any) -> Report:
    return write_dataset(cases, dataset, tmp_path / "raw", **{"num_processes": 1, **options})


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_dataset_is_complete_on_one_grid_a_case_and_says_where_it_came_from(cases: list[Case], tmp_path: Path) -> None:
    report = convert(cases, tmp_path)
    folder = tmp_path / "raw" / "Dataset501_Clinic"
    assert (report.folder, report.num_training, report.num_test, report.left_out) == (folder, 2, 1, {})
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["Dataset501_Clinic"]
    assert everything_in(folder) == sorted(
        ["classification.csv", "csm_manifest.json", "dataset.json", "imagesTr", "imagesTs", "labelsTr", "labelsTs"]
        + [f"imagesTr/{case}_000{channel}.nii.gz" for case in "ab" for channel in range(3)]
        + [f"imagesTs/c_000{channel}.nii.gz" for channel in range(3)]
        + ["labelsTr/a.nii.gz", "labelsTr/b.nii.gz", "labelsTs/c.nii.gz"]
    )
    check_dataset(folder)
    dataset_json = json.loads((folder / "dataset.json").read_text())
    assert dataset_json == {
        "licence": "none",
        "channel_names": {"0": "T2w", "1": "ADC", "2": "DWI"},
        "labels": {"background": 0, "gland": 1, "lesion": 2},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    manifest = json.loads((folder / "csm_manifest.json").read_text())
    for case in cases:
        side = "Ts" if case.test else "Tr"
        entry = manifest["cases"][case.identifier]
        source = sitk.ReadImage(str(case.images["T2w"].path))
        written = [
            sitk.ReadImage(str(folder / f"images{side}" / f"{case.identifier}_000{channel}.nii.gz")) for channel in range(3)
        ]
        assert all(Grid.of(image).same_as(Grid.of(source)) for image in written)
        assert written[0].GetPixelID() == source.GetPixelID() and np.array_equal(array(written[0]), array(source))
        dwi = sitk.ReadImage(str(case.images["DWI"].path))
        assert np.array_equal(array(written[2]), array(resampled(dwi, Grid.of(source))))
        assert is_empty(written[1]) == ("ADC" not in case.images)
        record = entry["series"]["DWI"]
        assert entry["patient"] == case.patient and entry["after"]["size"] == [20, 20, 6]
        assert record["done"] == "resampled linearly from 12 x 12 x 8 voxels of 2 x 2 x 3 mm"
        assert record["before"]["size"] == [12, 12, 8] and record["source"] == str(case.images["DWI"].path)
        assert record["sha256"] == hashlib.sha256(case.images["DWI"].path.read_bytes()).hexdigest()
        label = array(sitk.ReadImage(str(folder / f"labels{side}" / f"{case.identifier}.nii.gz")))
        assert np.array_equal(label, np.array([0, 1, 0, 2])[array(sitk.ReadImage(str(case.masks[0].volume.path)))])
    assert manifest["cases"]["b"]["series"]["ADC"] == {"done": "zeros: series missing"}
    assert any("ADC: 2 resampled by header, 1 missing, written as zeros" in line for line in report.lines)
    with (folder / "classification.csv").open() as file:
        assert list(csv.reader(file)) == [
            ["case", "class", "mask_label", "patient"],
            ["a", "malignant", "2", "a"],
            ["a", "benign", "1", "a"],
            ["b", "benign", "", "b"],
        ]


def test_processes_change_nothing(cases: list[Case], tmp_path: Path) -> None:
    convert(cases, tmp_path)
    convert(cases, tmp_path / "again", num_processes=2)
    one, two = (folder / "raw" / "Dataset501_Clinic" for folder in (tmp_path, tmp_path / "again"))
    assert everything_in(one) == everything_in(two)
    for name in everything_in(one):
        if (one / name).is_file() and name != MANIFEST:
            assert (one / name).read_bytes() == (two / name).read_bytes(), name
    manifests = [json.loads((folder / MANIFEST).read_text())["cases"] for folder in (one, two)]
    assert manifests[0] == manifests[1]


def test_another_reference_is_obeyed(cases: list[Case], tmp_path: Path) -> None:
    report = convert(cases, tmp_path, reference="DWI")
    assert sitk.ReadImage(str(report.folder / "imagesTr" / "a_0000.nii.gz")).GetSize() == (12, 12, 8)
    with pytest.raises(UserError, match=r"no series is called 'T1w'; -reference is finest or one of T2w, ADC, DWI"):
        convert(cases, tmp_path, reference="T1w", overwrite=True)


def test_a_zero_file_is_a_missing_series_and_is_no_reference(cases: list[Case], tmp_path: Path) -> None:
    save(image_of(np.zeros((9, 30, 30), np.int16), (0.1, 0.1, 0.1)), cases[0].images["ADC"].path)
    report = convert(cases, tmp_path)
    assert is_empty(sitk.ReadImage(str(report.folder / "imagesTr" / "a_0001.nii.gz")))
    assert any("ADC is all zero, taken as missing: a" in line for line in report.lines)


def test_masks_are_painted_in_order_and_a_value_may_be_left_out(cases: list[Case], tmp_path: Path) -> None:
    voxels = np.zeros((6, 20, 20), np.uint8)
    voxels[2, 9:14, 9:14], voxels[3] = 7, 8
    over = save(image_of(voxels, (1.0, 1.0, 3.0), (0.0, 0.0, 0.0), TILT), tmp_path / "over.nii.gz")
    first = array(sitk.ReadImage(str(cases[0].masks[0].volume.path)))
    case = replace(cases[0], masks=(*cases[0].masks, Mask(over, {7: 1, 8: 0})))
    label = array(sitk.ReadImage(str(convert([case], tmp_path).folder / "labelsTr" / "a.nii.gz")))
    assert np.array_equal(label, np.where(voxels == 7, 1, np.array([0, 1, 0, 2])[first]))


def test_regions_and_label_free_datasets(cases: list[Case], tmp_path: Path) -> None:
    regions = replace(DATASET, labels={"background": 0, "whole": (1, 2), "lesion": 2}, regions_class_order=(1, 2))
    dataset_json = json.loads((convert(cases, tmp_path, regions).folder / "dataset.json").read_text())
    assert dataset_json["labels"]["whole"] == [1, 2] and dataset_json["regions_class_order"] == [1, 2]
    free = replace(DATASET, name="Dataset502_Free", labels={})
    report = convert([replace(case, masks=(), diagnoses=()) for case in cases], tmp_path, free)
    assert not list(report.folder.glob("labels*"))
    assert json.loads((report.folder / "dataset.json").read_text())["labels"] == {}


def test_a_registered_series_takes_its_mask_along_and_the_manifest_says_how(tmp_path: Path) -> None:
    fixed = head(lambda tissue: tissue)
    moving = head(lambda tissue: 3 - tissue)
    mask = sitk.Cast(fixed > 1.5, sitk.sitkUInt8)
    for image in (moving, mask):
        image.SetOrigin(np.add(image.GetOrigin(), (4.0, 0.0, 0.0)).tolist())
    images = {"T2w": save(fixed, tmp_path / "t2.nii.gz"), "ADC": save(moving, tmp_path / "adc.nii.gz")}
    case = Case("a", "a", images, (Mask(save(mask, tmp_path / "m.nii.gz"), {1: 1}),))
    dataset = replace(DATASET, series=("T2w", "ADC"), labels={"background": 0, "lesion": 1})
    report = convert([case], tmp_path, dataset, reference="T2w", register=True)
    entry = json.loads((report.folder / MANIFEST).read_text())["cases"]["a"]
    assert entry["series"]["ADC"]["registration"]["translation_mm"] == pytest.approx([4, 0, 0], abs=0.5)
    assert entry["series"]["ADC"]["done"].startswith("registered") and entry["masks"][0]["done"].startswith("registered")
    label = array(sitk.ReadImage(str(report.folder / "labelsTr" / "a.nii.gz")))
    truth = array(fixed) > 1.5
    assert 2 * (truth & (label == 1)).sum() / (truth.sum() + (label == 1).sum()) > 0.95


def test_series_of_one_grid_and_scan_move_together_and_the_log_says_so(tmp_path: Path) -> None:
    scan = {
        "T2w": head(lambda tissue: tissue),
        "DWI": moved(faint(), 4, 0, 0),
        "ADC": moved(head(lambda tissue: 3 - tissue), 4, 0, 0),
    }
    images = {name: save(image, tmp_path / f"{name}.nii.gz") for name, image in scan.items()}
    report = convert([Case("a", "a", images)], tmp_path, replace(DATASET, labels={}), reference="T2w", register=True)
    records = json.loads((report.folder / MANIFEST).read_text())["cases"]["a"]["series"]
    found = {name: records[name]["registration"] for name in ("ADC", "DWI")}
    for key in ("translation_mm", "rotation_degrees", "centre_mm", "used", "together", "found_with"):
        assert found["ADC"][key] == found["DWI"][key], key
    assert found["DWI"]["used"] and found["DWI"]["together"] == ["ADC", "DWI"] and found["DWI"]["found_with"] == "ADC"
    lines = "\n".join(report.lines)
    assert (
        "DWI moved onto the reference: a (4.0 mm" in lines and "together with ADC, of one scan, by the transform of ADC" in lines
    )


def test_only_series_of_one_grid_study_and_frame_of_reference_are_one_scan(tmp_path: Path, monkeypatch) -> None:
    groups: list[tuple[str, ...]] = []

    def noted(scan: Mapping[str, sitk.Image], fixed: sitk.Image) -> dict[str, Registration]:
        groups.append(tuple(scan))
        return {}

    monkeypatch.setattr(written_cases, "register_rigidly", noted)
    scans = {
        "FLAIR": ("1", "2"),
        "PD": ("1", "2"),
        "T1w": ("1", "3"),
        "T1ce": ("4", "2"),
        "ADC": (),
        "DWI": (),
        "T2w": (),
        "SWI": (),
    }
    monkeypatch.setattr(written_cases, "scan_of", lambda volume: scans[volume.path.name])
    images = {name: image_of(noise()) for name in scans}
    images["SWI"] = moved(images["SWI"], 0, 0, 3)
    case = Case("a", "a", {name: Volume(tmp_path / name) for name in scans})
    written_cases._registered(case, images, "T2w")
    assert groups == [("FLAIR", "PD"), ("T1w",), ("T1ce",), ("ADC", "DWI"), ("SWI",)]


# --- background --------------------------------------------------------------------------------------------------------------


@given(st.floats(-1e4, 1e4).filter(lambda value: abs(value) > 0.01), st.integers(0, 9), st.sampled_from([np.float32, np.float64]))
def test_the_background_is_0_exactly_and_nothing_else_is(value: float, seed: int, kind: Any) -> None:
    tissue = np.random.default_rng(seed).normal(0, abs(value), (8, 10, 12))
    inside = np.zeros(tissue.shape, bool)
    inside[2:6, 2:8, 3:9] = True
    image = sitk.GetImageFromArray(np.where(inside, tissue, value).astype(kind))
    found = background_of(image)
    assert found is not None and found == pytest.approx(value, rel=1e-6)
    shifted = array(shifted_to_zero(image, found))
    assert np.array_equal(shifted != 0, inside & (array(image).astype(np.float32) != np.float32(value)))
    np.testing.assert_allclose(shifted[inside], tissue[inside] - value, atol=1e-5 * abs(value) * 10)


def test_images_of_tissue_on_0_or_on_air_have_no_other_background() -> None:
    for image in (head(lambda tissue: tissue), image_of(noise()), sitk.Cast(head(lambda tissue: tissue) * 50, sitk.sitkInt16)):
        assert background_of(image) is None


def test_a_background_other_than_0_is_told_and_shifted_when_that_is_asked_for(tmp_path: Path) -> None:
    t2, tissue = head(lambda tissue: tissue), array(head(lambda tissue: 3 - tissue))
    inside = array(t2) > 0.5
    z_scored = np.where(inside, tissue - 2, -3.7).astype(np.float32)
    adc = sitk.GetImageFromArray(z_scored)
    adc.CopyInformation(t2)
    case = Case("a", "a", {"T2w": save(t2, tmp_path / "t2.nii.gz"), "ADC": save(moved(adc, 0, 0, 5), tmp_path / "adc.nii.gz")})
    dataset = replace(DATASET, series=("T2w", "ADC"), labels={})
    told = convert([case], tmp_path / "told", dataset, reference="T2w")
    shifted = convert([case], tmp_path / "shifted", dataset, reference="T2w", zero_background=True)
    assert any("ADC has another background than 0" in line and "a (-3.7)" in line for line in told.lines)
    assert any("ADC was shifted from another background to 0: a (-3.7)" in line for line in shifted.lines)
    records = [json.loads((one.folder / MANIFEST).read_text())["cases"]["a"]["series"] for one in (told, shifted)]
    assert [one["ADC"]["background"]["shifted_to_zero"] for one in records] == [False, True]
    assert "background" not in records[0]["T2w"]
    t2s, adcs = (
        [array(sitk.ReadImage(str(one.folder / f"imagesTr/a_000{channel}.nii.gz"))) for one in (told, shifted)]
        for channel in (0, 1)
    )
    assert np.array_equal(t2s[0], t2s[1])
    # outside the field of view of ADC both have 0, which is background in the second only
    assert adcs[0].min() == pytest.approx(-3.7) and adcs[0][0].max() == 0
    assert adcs[1].min() == 0 and np.count_nonzero(adcs[1]) < np.count_nonzero(adcs[0]) / 2


# --- what does not become a dataset ------------------------------------------------------------------------------------------


def test_a_case_that_cannot_be_used_is_left_out_and_named(cases: list[Case], tmp_path: Path) -> None:
    _cut(cases[1].images["DWI"].path, 0.5)
    report = convert(cases, tmp_path, left_out={"z": "the table has no path"})
    assert list(report.left_out) == ["z", "b"] and "DWI.nii.gz" in report.left_out["b"]
    assert report.num_training == 1 and not list(report.folder.rglob("b_*")) and not list(report.folder.rglob("b.nii.gz"))
    with (report.folder / "left_out.csv").open() as file:
        assert list(csv.reader(file)) == [["case", "reason"], ["z", "the table has no path"], ["b", report.left_out["b"]]]
    assert any("2 cases left out" in line for line in report.lines) and any(report.left_out["b"] in line for line in report.lines)
    assert json.loads((report.folder / "dataset.json").read_text())["numTraining"] == 1
    assert "b," not in (report.folder / "classification.csv").read_text()


@pytest.mark.parametrize("num_processes", [1, 2])
def test_strict_ends_at_the_first_and_leaves_nothing(cases: list[Case], tmp_path: Path, num_processes: int) -> None:
    _cut(cases[1].images["DWI"].path, 0.5)
    with pytest.raises(CaseError, match=r"case b: .*DWI\.nii\.gz"):
        convert(cases, tmp_path, strict=True, num_processes=num_processes)
    assert everything_in(tmp_path / "raw") == []


def _change_mask(case: Case, change: Callable[[np.ndarray], None]) -> None:
    path = case.masks[0].volume.path
    image = sitk.ReadImage(str(path))
    voxels = array(image)
    change(voxels)
    changed = sitk.GetImageFromArray(voxels)
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(path))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda case: _change_mask(case, lambda voxels: voxels.__setitem__((0, 0, 0), 4)), "value 4, expected one of 0, 1, 3"),
        (
            lambda case: _change_mask(case, lambda voxels: voxels.__setitem__(voxels == 3, 1)),
            "of mask label 2, but the mask .* 1;",
        ),
        (lambda case: save(image_of(np.full((8, 12, 12), 5, np.int16)), case.images["ADC"].path), "ADC.nii.gz: every voxel is 5"),
        (
            lambda case: save(image_of(noise((20, 6, 20)), (1.0, 1.0, 3.0), (0.0, 0.0, 0.0), TILT), case.images["ADC"].path),
            r"ADC.nii.gz has the shape \(20, 6, 20\), a permutation of \(6, 20, 20\) of T2w.*swapped",
        ),
        (lambda case: save(image_of(noise(), origin=(400.0, 0.0, 0.0)), case.images["DWI"].path), "hardly overlap"),
        (
            lambda case: save(
                image_of(np.ones((8, 12, 12), np.uint8), (4.0, 4.0, 4.0), (10.0, 5.0, 5.0)), case.masks[0].volume.path
            ),
            "mm3 are left on the grid",
        ),
    ],
)
def test_contradictions_between_files_of_a_case_leave_it_out(cases: list[Case], tmp_path: Path, spoil, reason: str) -> None:
    spoil(cases[0])
    with pytest.raises(CaseError, match=reason):
        convert(cases, tmp_path, strict=True)


def test_a_training_case_needs_a_mask_and_an_image_and_a_test_case_no_mask(cases: list[Case], tmp_path: Path) -> None:
    spoilt = [replace(cases[0], masks=(), diagnoses=()), replace(cases[1], images={}), replace(cases[2], masks=())]
    report = convert(spoilt, tmp_path)
    assert set(report.left_out) == {"a", "b"} and "no mask" in report.left_out["a"] and "no image" in report.left_out["b"]
    assert report.num_test == 1 and not (report.folder / "labelsTs").exists()


def test_no_case_left_writes_nothing(cases: list[Case], tmp_path: Path) -> None:
    for case in cases:
        case.images["T2w"].path.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 3 cases.*T2w\.nii\.gz is empty"):
        convert(cases, tmp_path)
    assert everything_in(tmp_path / "raw") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cases: [], "no case found"),
        (lambda cases: [*cases, replace(cases[0], patient="d")], r"several cases are called a \(.*T2w\.nii\.gz"),
        (lambda cases: [*cases, replace(cases[0], identifier="d", test=True)], "patient a has training and test cases"),
        (lambda cases: [replace(cases[0], images={"T3w": Volume(Path("x"))})], "unknown series T3w; expected T2w, ADC, DWI"),
        (lambda cases: [replace(cases[0], identifier="a/b")], "cannot be a file name"),
        (
            lambda cases: [replace(cases[0], masks=(Mask(Volume(Path("m")), {1: 3}),))],
            "mask label 3, which .* expected 0, 1, 2",
        ),
        (lambda cases: [replace(cases[0], diagnoses=(Diagnosis("benign", 5),))], "mask label 5"),
    ],
)
def test_a_reader_that_contradicts_itself_is_refused_before_writing(cases, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        convert(change(cases), tmp_path)
    assert not isinstance(caught.value, CaseError) and not (tmp_path / "raw").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "Dataset5_Clinic"}, "three digits"),
        ({"series": ("T2w", "T2w")}, "T2w twice"),
        ({"labels": {"gland": 1, "lesion": 2}}, "background: 0"),
        ({"labels": {"background": 0, "gland": 1, "lesion": 2, "nerve": 4}}, "without a gap"),
        ({"labels": {"background": 0, "whole": (1, 2), "lesion": 2}}, "regions_class_order"),
        ({"labels": {}}, "has no labels"),
    ],
)
def test_a_dataset_json_that_nnunet_would_refuse_is_refused(cases, tmp_path: Path, change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        convert(cases, tmp_path, replace(DATASET, **change))
    assert not (tmp_path / "raw").exists()


def test_an_existing_dataset_is_kept_unless_overwritten_and_until_the_new_one_is_complete(cases, tmp_path: Path) -> None:
    folder = convert(cases, tmp_path).folder
    before = {name: (folder / name).read_bytes() for name in everything_in(folder) if (folder / name).is_file()}
    refused: list[dict[str, Any]] = [{}, {"overwrite": True, "strict": True}]
    for options in refused:
        content = cases[0].images["T2w"].path.read_bytes()
        cases[0].images["T2w"].path.write_bytes(b"")
        with pytest.raises(UserError, match="--overwrite" if not options else "is empty"):
            convert(cases, tmp_path, **options)
        cases[0].images["T2w"].path.write_bytes(content)
        assert {name: (folder / name).read_bytes() for name in everything_in(folder) if (folder / name).is_file()} == before
    convert(cases[1:], tmp_path, overwrite=True)
    assert not (folder / "imagesTr" / "a_0000.nii.gz").exists()
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["Dataset501_Clinic"]


def test_a_number_that_another_dataset_has_is_refused(cases: list[Case], tmp_path: Path) -> None:
    (tmp_path / "raw" / "Dataset501_Other").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Dataset501_Other already.*another number"):
        convert(cases, tmp_path)


def test_a_dataset_is_not_overwritten_with_its_own_files(cases: list[Case], tmp_path: Path) -> None:
    folder = convert(cases, tmp_path).folder
    own = replace(cases[0], images={"T2w": Volume(folder / "imagesTr" / "a_0000.nii.gz")})
    with pytest.raises(UserError, match=r"a_0000\.nii\.gz lies in .*choose another dataset"):
        convert([own], tmp_path, overwrite=True)


def test_a_conversion_that_is_interrupted_leaves_nothing(cases: list[Case], tmp_path: Path, monkeypatch) -> None:
    write = written_cases.write_image

    def interrupted(image: sitk.Image, path: Path) -> None:
        if path.name.startswith("b"):
            raise KeyboardInterrupt
        write(image, path)

    monkeypatch.setattr(written_cases, "write_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(cases, tmp_path)
    assert everything_in(tmp_path / "raw") == []


KILLED = """
import os, signal
from pathlib import Path
from nnunet_csm.raw import writer
from nnunet_csm.raw.manifest import MANIFEST
from nnunet_csm.raw.subjects import Case, Dataset, Volume
writer.check_dataset = writer._write_tables = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
case = Case("a", "a", {{"T2w": Volume(Path({path!r}))}})
writer.write_dataset([case], Dataset("Dataset501_Clinic", ("T2w",), {{}}), Path({raw!r}), num_processes=1)
"""


def test_a_killed_conversion_leaves_no_dataset_and_the_next_one_cleans_up(cases: list[Case], tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    script = KILLED.format(path=str(cases[0].images["T2w"].path), raw=str(raw))
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -signal.SIGKILL
    (left,) = raw.iterdir()
    assert left.name.startswith(".") and (left / "Dataset501_Clinic" / "imagesTr" / "a_0000.nii.gz").is_file()
    convert(cases, tmp_path)
    assert [path.name for path in raw.iterdir()] == ["Dataset501_Clinic"]


def test_a_dataset_that_another_process_writes_is_left_to_it(cases: list[Case], tmp_path: Path) -> None:
    with whole_folder(tmp_path / "raw" / "Dataset501_Clinic", overwrite=False) as theirs:
        with pytest.raises(UserError, match="another process that writes Dataset501_Clinic is running there; wait for it"):
            convert(cases, tmp_path)
        assert theirs.is_dir()
    assert (tmp_path / "raw" / "Dataset501_Clinic").is_dir()


def test_a_dataset_that_was_being_replaced_when_the_machine_stopped_comes_back(cases: list[Case], tmp_path: Path) -> None:
    folder = convert(cases, tmp_path).folder
    folder.rename(folder.with_name(".Dataset501_Clinic.replaced"))
    with pytest.raises(UserError, match="exists and is kept"):
        convert(cases, tmp_path)
    assert (folder / "dataset.json").is_file()


def test_what_was_written_wrongly_is_noticed(cases: list[Case], tmp_path: Path, monkeypatch) -> None:
    write = sitk.WriteImage
    monkeypatch.setattr(sitk, "WriteImage", lambda image, *args, **kwargs: write(image * 0, *args, **kwargs))
    with pytest.raises(UserError, match=r"a_0000\.nii\.gz does not read as it was written"):
        convert(cases, tmp_path)


# --- splits ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 8), max_size=30))
def test_no_patient_is_on_both_sides_of_a_fold(owners: list[int]) -> None:
    patients = {f"case{number}": f"patient{owner}" for number, owner in enumerate(owners)}
    splits = splits_by_patient(patients)
    num_patients = len(set(patients.values()))
    if num_patients < 2 or num_patients == len(patients):
        assert splits == []
        return
    assert len(splits) == min(5, num_patients)
    for fold in splits:
        assert sorted(fold["train"] + fold["val"]) == sorted(patients) and fold["train"] and fold["val"]
        assert not {patients[case] for case in fold["train"]} & {patients[case] for case in fold["val"]}
    assert sorted(case for fold in splits for case in fold["val"]) == sorted(patients)
    assert splits == splits_by_patient(dict(reversed(patients.items())))


def test_splits_are_written_only_when_a_patient_has_several_training_cases(cases: list[Case], tmp_path: Path) -> None:
    assert not (convert(cases, tmp_path).folder / SPLITS).exists()
    several = [*cases, make_case(tmp_path / "release", "a2", patient="a")]
    report = convert(several, tmp_path, overwrite=True)
    splits = json.loads((report.folder / SPLITS).read_text())
    assert {tuple(fold["val"]) for fold in splits} == {("a", "a2"), ("b",)}
    assert any("splits_final.json" in line for line in report.lines)
