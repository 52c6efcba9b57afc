"""What a header means: right voxels at a place that is said, or an error that names the file; never a guess."""

import gzip
import json
import os
import struct
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nibabel.nifti1 import header_dtype

from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.segmentation import evaluate_folder
from nnunet_csm.fingerprint.reading import read_case
from nnunet_csm.inference.missing import fill_missing
from nnunet_csm.nnunet import save_json
from nnunet_csm.raw.check import check_dataset, check_inputs
from nnunet_csm.raw.geometry import Grid, fit, upright
from nnunet_csm.raw.manifest import MANIFEST
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Mask, Volume
from nnunet_csm.raw.volumes import look_at, read_volume
from nnunet_csm.raw.writer import write_dataset

SHAPE = (4, 6, 5)  # z, y, x
SPACING = (1.0, 2.0, 3.0)
DATASET = Dataset("Dataset501_Clinic", ("T2w",), {"background": 0, "lesion": 1})
TILT = np.reshape(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 0.3, (0, 0, 0)).GetMatrix(), (3, 3))


def voxels() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, SHAPE).astype(np.int16)


def lesion() -> np.ndarray:
    mask = np.zeros(SHAPE, np.uint8)
    mask[1:3, 2:4, 1:4] = 1
    return mask


def affine(shift: float = 0.0) -> np.ndarray:
    """In NIfTI's world."""
    matrix = np.eye(4)
    matrix[:3, :3] = TILT * SPACING
    matrix[:3, 3] = (10 + shift, -20, 30)
    return matrix


def save(
    path: Path,
    array: np.ndarray,
    sform: np.ndarray | None,
    qform: np.ndarray | None,
    codes: tuple[int, int] = (1, 1),
    change: Callable[[nibabel.Nifti1Header], None] = lambda header: None,
) -> Volume:
    """A NIfTI file with the two transforms and their codes, (sform, qform); 0 for one that is not given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array.T, None)
    image.header.set_zooms(SPACING)
    image.set_sform(sform, codes[0] if sform is not None else 0)
    image.set_qform(qform, codes[1] if qform is not None else 0)
    image.header["pixdim"][1:4] = SPACING
    change(image.header)
    nibabel.save(image, path)
    return Volume(path)


def array_of(image: sitk.Image) -> np.ndarray:
    return sitk.GetArrayFromImage(image)


# --- headers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", product((0, 1, 2), repeat=2))
def test_the_place_is_that_of_itk_and_a_second_one_is_said(tmp_path: Path, codes: tuple[int, int]) -> None:
    path = save(tmp_path / "a.nii", voxels(), affine(), affine(8.0), codes).path
    look, itk = look_at(path), sitk.ReadImage(str(path))
    assert look.places[0].apart(Grid.of(itk)) < 1e-3
    assert look.placed == any(codes) and np.allclose(look.places[0].spacing, SPACING)
    expected = "8 mm apart" if all(codes) else "neither sform nor qform" if not any(codes) else ""
    assert len(look.remarks) == bool(expected) and expected in "".join(look.remarks)
    assert np.array_equal(array_of(read_volume(Volume(path))), voxels())


def test_what_rounding_does_to_a_quaternion_is_no_second_place(tmp_path: Path) -> None:
    """ITK writes both transforms; near half a turn the fourth number of a quaternion is known to 3e-4 only."""
    image = sitk.Image([384, 384, 4], sitk.sitkUInt8)
    image.SetSpacing((0.5, 0.5, 3.0))
    image.SetDirection(sitk.Euler3DTransform((0, 0, 0), 0.02, -0.06, 3e-4, (0, 0, 0)).GetMatrix())
    sitk.WriteImage(image, str(tmp_path / "a.nii"))
    header = nibabel.Nifti1Image.from_filename(tmp_path / "a.nii").header
    assert np.abs(header.get_sform() - header.get_qform()).max() > 0
    assert len(look_at(tmp_path / "a.nii").places) == 1 and not look_at(tmp_path / "a.nii").remarks


def test_a_pipe_is_no_file_to_wait_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.nii")
    with pytest.raises(CaseError, match=r"a\.nii"):
        look_at(tmp_path / "a.nii")


@pytest.mark.parametrize(("unit", "factor"), [(1, 1000.0), (3, 0.001)])
def test_units_are_converted_and_said_or_refused_where_no_body_is_so_large(tmp_path: Path, unit: int, factor: float) -> None:
    scaled = affine()
    scaled[:3] /= factor

    def change(header: nibabel.Nifti1Header) -> None:
        header["xyzt_units"], header["pixdim"][1:4] = unit, np.array(SPACING) / factor

    path = save(tmp_path / "a.nii", voxels(), scaled, None, change=change).path
    look = look_at(path)
    assert look.places[0].apart(Grid.of(sitk.ReadImage(str(path)))) < 1e-3 and np.allclose(look.places[0].spacing, SPACING)
    assert f"units of {factor:g} mm" in look.remarks[0]
    if unit == 1:  # a file that says metres and means mm
        path = save(tmp_path / "b.nii", voxels(), affine(), None, change=lambda h: h.__setitem__("xyzt_units", unit)).path
        with pytest.raises(CaseError, match=r"b\.nii has the spacing \(1\.0, 2\.0, 3\.0\) .*units of 1000 mm.*xyzt_units"):
            look_at(path)


def test_a_spacing_that_the_axes_contradict_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a_0000.nii", voxels(), affine(), None, change=lambda h: h["pixdim"].__setitem__(2, 1.0)).path
    for read in (lambda: read_volume(Volume(path)), lambda: check_inputs(tmp_path, ["T2w"], ".nii")):
        with pytest.raises(UserError, match=r"pixdim says voxels of \(1\.0, 1\.0, 3\.0\).*sform of \(1\.0, 2\.0, 3\.0\)"):
            read()


FIELDS: dict[str, tuple[int, np.dtype]] = {name: (about[1], about[0]) for name, about in (header_dtype.fields or {}).items()}
ODD = {
    "i": (-1, 0, 1, 7, 32767, -32768),
    "f": (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30, 1e-30, 3.5),
    "u": (0, 1, 3, 5, 255),
    "S": (b"", b"x"),
}


def damaged_headers() -> list[tuple[str, int, bytes]]:
    """Where, and what is written there: every byte in four ways, and every number of every field as odd ones."""
    damages = [(f"byte {at}", at, bytes([value])) for at in range(352) for value in (0, 1, 127, 255)]
    for name, (at, kind) in FIELDS.items():
        base = kind.base
        for index, odd in product(range(int(np.prod(kind.shape, dtype=int))), ODD[base.kind]):
            with np.errstate(over="ignore"):
                value = np.array([odd]).astype(base).tobytes()
            damages.append((f"{name}[{index}]", at + index * base.itemsize, value))
    return damages


def test_whatever_is_damaged_in_a_header_the_voxels_are_right_or_the_file_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.nii", voxels(), affine(), affine()).path.read_bytes()
    path = tmp_path / "a.nii"
    place, refused, unnamed, said = look_at(tmp_path / "whole.nii").places[0], 0, 0, 0
    slope = range(FIELDS["scl_slope"][0], FIELDS["scl_inter"][0] + 4)
    for what, at, value in (damages := damaged_headers()):
        path.write_bytes(whole[:at] + value + whole[at + len(value) :])
        try:
            look, image = look_at(path), read_volume(Volume(path))
        except CaseError as error:
            refused += "a.nii" in str(error)
            unnamed += "a.nii" not in str(error)
            continue
        assert at in slope or np.array_equal(array_of(image), voxels()), what
        assert look.remarks or fit([Grid.of(image)], [place]), what
        said += bool(look.remarks)
    assert len(damages) > 1700 and refused > 300 and said > 10 and not unnamed


def test_a_damaged_prediction_scores_as_the_whole_one_or_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "reference" / "a.nii", lesion(), affine(), affine())
    whole = save(tmp_path / "predicted" / "a.nii", lesion(), affine(), affine()).path.read_bytes()
    about = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii"}
    refused = unnamed = 0
    for what, at, value in damaged_headers()[352 * 4 :: 2]:
        (tmp_path / "predicted" / "a.nii").write_bytes(whole[:at] + value + whole[at + len(value) :])
        try:
            scores = evaluate_folder(tmp_path / "reference", tmp_path / "predicted", about, progress_bar=False)
        except UserError as error:
            refused += "a.nii" in str(error)
            unnamed += "a.nii" not in str(error)
            continue
        assert scores.foreground_mean == 1 or what.startswith("scl"), what
    assert refused > 30 and not unnamed


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_header_that_tells_of_more_than_a_file_can_hold_is_refused_before_room_is_made(tmp_path: Path, ending: str) -> None:
    path = save(tmp_path / f"a{ending}", voxels(), affine(), None).path
    content = gzip.decompress(path.read_bytes()) if ending == ".nii.gz" else path.read_bytes()
    huge = content[:40] + struct.pack("<8h", 4, 30000, 30000, 30000, 30000, 1, 1, 1) + content[56:]
    path.write_bytes(gzip.compress(huge) if ending == ".nii.gz" else huge)
    with pytest.raises(CaseError, match=rf"a\{ending} is truncated: its header tells of 162\d+ bytes"):
        look_at(path)
    read, _, problems = read_case({0: path}, ["T2w"], None)  # type: ignore[arg-type]  # no reader is asked
    assert not read and "truncated" in problems[0]


def test_a_header_of_metaimage_that_tells_of_too_much_is_refused(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(voxels()), str(tmp_path / "a.mha"))
    content = (tmp_path / "a.mha").read_bytes().replace(b"DimSize = 5 6 4", b"DimSize = 50000 60000 40000")
    (tmp_path / "a.mha").write_bytes(content)
    with pytest.raises(CaseError, match=r"a\.mha is truncated: its header tells of the shape \(40000, 60000, 50000\)"):
        read_volume(Volume(tmp_path / "a.mha"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"NDims = 3", b"NDims = 9", "NDims in its header is 9, expected 3 or 4"),  # ITK would end the process
        (b"NDims = 3", b"Ndims = 3", "NDims in its header is None"),
        (b"CenterOfRotation", b"CenterOfRotati\xff\xff", "entry whose name is no text"),
        (b"DimSize = 5 6 4", b"DimSize = 5 0 4", "without a voxel|cannot be read"),
        (b"ElementSpacing = 1 1 1", b"ElementSpacing = 1 0 1", "zeros in its geometry|cannot be read"),
    ],
)
def test_a_damaged_header_of_metaimage_is_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(voxels()), str(tmp_path / "a.mha"))
    content = (tmp_path / "a.mha").read_bytes()
    assert old in content
    (tmp_path / "a.mha").write_bytes(content.replace(old, new))
    with pytest.raises(CaseError, match=rf"a\.mha .*({message})"):
        read_volume(Volume(tmp_path / "a.mha"))


@pytest.mark.parametrize(
    ("behind", "message"), [(bytes(512), ""), (b"\0\0x", r"a\.nii goes on behind its 592 bytes"), (None, "cannot be read")]
)
def test_what_lies_behind_the_voxels_is_zeros_or_refused(tmp_path: Path, behind: bytes | None, message: str) -> None:
    path = save(tmp_path / "a.nii", voxels(), affine(), None).path
    if behind is None:  # behind the end of a gzip file
        content, path = gzip.compress(path.read_bytes()) + b"garbage", tmp_path / "a.nii.gz"
    else:
        content = path.read_bytes() + behind
    path.write_bytes(content)
    if message:
        with pytest.raises(CaseError, match=message):
            read_volume(Volume(path))
    else:
        assert np.array_equal(array_of(read_volume(Volume(path))), voxels())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_of_a_nifti_file_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    broken = voxels().astype(np.float32)
    broken[1, 2, 3] = value
    with pytest.raises(CaseError, match=r"a\.nii\.gz: 1 voxels are NaN or infinite, the first at \(1, 2, 3\)"):
        read_volume(save(tmp_path / "a.nii.gz", broken, affine(), None))


def test_scaled_voxels_are_those_of_itk(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels(), affine(), None).path
    content = path.read_bytes()
    path.write_bytes(content[:112] + struct.pack("<2f", 0.37, -5.0) + content[120:])
    image, itk = read_volume(Volume(path)), sitk.ReadImage(str(path))
    assert image.GetPixelID() == itk.GetPixelID() and np.allclose(array_of(image), array_of(itk))


@pytest.mark.parametrize(("shear", "straightened"), [(0.1, True), (2.0, False)])
def test_other_formats_are_straightened_as_well(tmp_path: Path, shear: float, straightened: bool) -> None:
    header = f"""NRRD0004
type: int16
dimension: 3
sizes: 5 6 4
space: left-posterior-superior
space directions: (1,0,0) ({shear / 10},2,0) (0,0,3)
space origin: (1,2,3)
endian: little
encoding: raw

"""
    path = tmp_path / "a.nrrd"
    path.write_bytes(header.encode() + voxels().tobytes())
    if not straightened:
        with pytest.raises(CaseError, match=r"a\.nrrd has axes that are not at right angles"):
            read_volume(Volume(path))
        return
    image = read_volume(Volume(path))
    directions = np.reshape(image.GetDirection(), (3, 3))
    assert np.allclose(directions @ directions.T, np.eye(3), atol=1e-12) and np.array_equal(array_of(image), voxels())


# --- masks and predictions ---------------------------------------------------------------------------------------------------


def test_a_label_map_stored_with_any_axes_comes_back_voxel_by_voxel() -> None:
    image = sitk.GetImageFromArray(voxels())
    grid = Grid(SHAPE[::-1], SPACING, (3.0, -4.0, 5.0), tuple(TILT.flatten().tolist()))
    grid.put_on(image)
    for order, flips in product(permutations(range(3)), product((False, True), repeat=3)):
        stored = sitk.Flip(sitk.PermuteAxes(image, order), flips, False)
        found = fit([Grid.of(stored)], [grid])
        assert found is not None and np.array_equal(array_of(found.applied(stored)), voxels())
        assert found.said.startswith("kept" if order == (0, 1, 2) and not any(flips) else "turned from")
    for shift, fits in ((0.4, True), (0.6, False)):
        moved = sitk.Image(image)
        moved.SetOrigin(np.add(grid.origin, (shift, 0, 0)).tolist())
        found = fit([Grid.of(moved)], [grid])
        assert ("0.4 mm off" in found.said) if fits and found else (found is None and not fits)


def turned(array: np.ndarray, path: Path, moved: float = 0.0) -> Volume:
    """Saved in NIfTI's own order of axes (RAS), in which ITK would save LPS otherwise; `moved` in mm."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image = sitk.DICOMOrient(image, "RAS")
    image.SetOrigin(np.add(image.GetOrigin(), (moved, 0, 0)).tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return Volume(path)


def plain(array: np.ndarray, path: Path, moved: float = 0.0) -> Volume:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(SPACING)
    image.SetOrigin((moved, 0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return Volume(path)


def convert(image: Volume, mask: Volume, folder: Path) -> tuple[np.ndarray, str, str]:
    """The label that is written, what the manifest says was done to the mask, and what is printed."""
    case = Case("a", "a", {"T2w": image}, (Mask(mask, {1: 1}),))
    report = write_dataset([case], DATASET, folder, strict=True, num_processes=1)
    entry = json.loads((report.folder / MANIFEST).read_text())["cases"]["a"]
    written = array_of(sitk.ReadImage(str(report.folder / "labelsTr" / "a.nii.gz")))
    return written, entry["masks"][0]["done"], "\n".join(report.lines)


def test_a_mask_stored_with_other_axes_is_turned_and_said(tmp_path: Path) -> None:
    image, mask = plain(voxels(), tmp_path / "t2.nii.gz"), turned(lesion(), tmp_path / "m.nii.gz")
    written, done, printed = convert(image, mask, tmp_path / "raw")
    assert np.array_equal(written, lesion())
    assert done == "turned from RAS to LPS"
    assert "masks: 1 turned to the axes of the image" in printed and "a (turned from RAS to LPS)" in printed


def test_a_mask_of_the_images_shape_at_another_place_is_refused(tmp_path: Path) -> None:
    image = plain(voxels(), tmp_path / "t2.nii.gz")
    for mask in (plain(lesion(), tmp_path / "m.nii.gz", moved=1.0), turned(lesion(), tmp_path / "r.nii.gz", moved=1.0)):
        with pytest.raises(CaseError, match=r"[mr]\.nii\.gz has the shape of T2w, but its header puts it up to .* mm from there"):
            convert(image, mask, tmp_path / "raw")
    written, done, _ = convert(image, plain(lesion(), tmp_path / "k.nii.gz", moved=0.3), tmp_path / "raw")
    assert np.array_equal(written, lesion()) and done == "kept, its header is 0.3 mm off"


def test_a_mask_lies_where_it_was_drawn_though_the_images_two_transforms_disagree(tmp_path: Path) -> None:
    image = save(tmp_path / "t2.nii.gz", voxels(), affine(), affine(8.0), (2, 1))
    mask = save(tmp_path / "m.nii.gz", lesion(), affine(), None)
    written, done, printed = convert(image, mask, tmp_path / "raw")
    assert np.array_equal(written, lesion()) and done == "kept"
    assert "sform and a qform that are 8 mm apart: a (t2.nii.gz)" in printed


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ((affine(), affine(), (1, 1)), r"\.nii holds an sform and a qform that are 8\.0 mm apart, unlike the other"),
        ((affine(), affine(8.0), (2, 1)), ""),
        ((None, None, (0, 0)), r"adc\.nii holds neither sform nor qform, .*t2\.nii does"),
    ],
)
def test_series_whose_place_to_each_other_is_open_are_refused(tmp_path: Path, transforms, message: str) -> None:
    t2 = save(tmp_path / "t2.nii", voxels(), affine(), affine(8.0), (2, 1))
    case = Case("a", "a", {"T2w": t2, "ADC": save(tmp_path / "adc.nii", voxels(), *transforms)})
    dataset = Dataset("Dataset501_Clinic", ("T2w", "ADC"), {})
    if message:
        with pytest.raises(CaseError, match=message):
            write_dataset([case], dataset, tmp_path / "raw", strict=True, num_processes=1)
    else:
        assert write_dataset([case], dataset, tmp_path / "raw", strict=True, num_processes=1).num_training == 1


def test_a_prediction_stored_with_other_axes_scores_1_and_one_elsewhere_is_refused(tmp_path: Path) -> None:
    about = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    folders = tmp_path / "reference", tmp_path / "predicted"
    plain(lesion(), folders[0] / "a.nii.gz")
    turned(lesion(), folders[1] / "a.nii.gz")
    scores = evaluate_folder(*folders, about)
    assert scores.foreground_mean == 1 and scores.brought == {"a": "turned from RAS to LPS"}
    assert "a: turned from RAS to LPS" in scores.to_markdown()
    plain(lesion(), folders[1] / "a.nii.gz", moved=20.0)
    with pytest.raises(
        UserError, match=r"predicted/a\.nii\.gz has the shape of its reference .*reference/a\.nii\.gz, .* 20\.0 mm"
    ):
        evaluate_folder(*folders, about)
    plain(lesion(), folders[1] / "a.nii.gz")
    path = folders[1] / "a.nii.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"predicted/a\.nii\.gz cannot be read"):
        evaluate_folder(*folders, about)


# --- nnU-Net's folders -------------------------------------------------------------------------------------------------------


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "Dataset501_Clinic"
    for case in "ab":
        plain(voxels(), folder / "imagesTr" / f"{case}_0000.nii.gz")
        plain(lesion(), folder / "labelsTr" / f"{case}.nii.gz")
    about = {"channel_names": {"0": "T2w"}, "labels": {"background": 0, "lesion": 1}, "numTraining": 2, "file_ending": ".nii.gz"}
    save_json(about, folder / "dataset.json")
    return folder


def test_a_label_mirrored_by_its_header_is_refused_where_nnunet_does_not_turn_it(raw: Path) -> None:
    turned(lesion(), raw / "labelsTr" / "b.nii.gz")
    with pytest.raises(UserError, match=r"labelsTr/b\.nii\.gz is stored with axes RAS, but .*b_0000\.nii\.gz with LPS"):
        check_dataset(raw)
    about = json.loads((raw / "dataset.json").read_text())
    save_json({**about, "overwrite_image_reader_writer": "SimpleITKIOWithReorient"}, raw / "dataset.json")
    assert "2 cases" in check_dataset(raw)[0]


def test_cases_stored_with_different_axes_are_told(raw: Path) -> None:
    turned(voxels(), raw / "imagesTr" / "b_0000.nii.gz")
    turned(lesion(), raw / "labelsTr" / "b.nii.gz")
    (line,) = check_dataset(raw)[1:]
    assert "1 LPS (such as a), 1 RAS (such as b)" in line


def test_axes_that_only_one_of_nnunets_readers_takes_are_named(raw: Path) -> None:
    crooked = np.diag([1.0, 2.0, 3.0, 1.0])
    crooked[0, 1] = 0.02
    save(raw / "imagesTr" / "b_0000.nii.gz", voxels(), crooked, None)
    save(raw / "labelsTr" / "b.nii.gz", lesion(), crooked, None)
    with pytest.raises(UserError, match=r"b_0000\.nii\.gz \(and 1 more\) has axes that SimpleITK refuses.*NibabelIO"):
        check_dataset(raw)
    about = json.loads((raw / "dataset.json").read_text())
    save_json({**about, "overwrite_image_reader_writer": "NibabelIO"}, raw / "dataset.json")
    assert "2 cases" in check_dataset(raw)[0]


def test_images_to_be_predicted_are_straightened_where_nnunet_could_not_read_them(tmp_path: Path) -> None:
    crooked = np.diag([1.0, 2.0, 3.0, 1.0])
    crooked[0, 1] = 0.02
    save(tmp_path / "in" / "a_0000.nii.gz", voxels(), crooked, None)
    with pytest.raises(RuntimeError, match="orthonormal"):
        sitk.ReadImage(str(tmp_path / "in" / "a_0000.nii.gz"))
    lines = fill_missing(tmp_path / "in", tmp_path / "out", ["T2w"], ".nii.gz")
    assert "a_0000.nii.gz is written anew with axes at right angles" in lines[0]
    assert np.array_equal(array_of(sitk.ReadImage(str(tmp_path / "out" / "a_0000.nii.gz"))), voxels())
    assert "1 case" in check_inputs(tmp_path / "out", ["T2w"], ".nii.gz")[0]


@pytest.mark.parametrize(("slices", "code"), [("LPS", "RAS"), ("LIP", "ASR"), ("PIL", "SRP")])
@pytest.mark.parametrize("thick", [True, False])
def test_pictures_show_slices_as_they_were_acquired_and_the_patient_upright(slices: str, code: str, thick: bool) -> None:
    """The file has its axes as `code` says; slices of `slices` are thick, or no axis is."""
    image = sitk.Image((4, 5, 6), sitk.sitkInt16)
    image.SetSpacing((1.0, 1.0, 5.0 if thick else 1.0))
    image.SetDirection(sitk.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(slices))
    turned = upright(sitk.DICOMOrient(image, code))
    found = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(turned.GetDirection())
    assert found == (slices if thick else "LPS")
    if thick:
        assert turned.GetSpacing() == (1.0, 1.0, 5.0) and turned.GetSize() == (4, 5, 6)
