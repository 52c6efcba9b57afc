"""A DICOM folder gives the volume its headers describe, or an error that says what is wrong; attributes give the series' name."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileMetaDataset

from nnunet_csm.errors import UserError
from nnunet_csm.raw.dicom import name_from_attributes, read_dicom_series, series_name
from nnunet_csm.raw.subjects import CaseError, Volume
from nnunet_csm.raw.volumes import read_volume

# an oblique stack: rows and columns turned by about 20 degrees about x
DIRECTION = (1.0, 0.0, 0.0, 0.0, 0.94, -0.34117444218, 0.0, 0.34117444218, 0.94)


def volume(shape: tuple[int, int, int] = (5, 4, 3), seed: int = 0) -> sitk.Image:
    image = sitk.GetImageFromArray(np.random.default_rng(seed).integers(-200, 2000, shape).astype(np.int16))
    image.SetSpacing((0.5, 0.75, 3.0))
    image.SetOrigin((-10.5, 20.25, 7.0))
    image.SetDirection(DIRECTION)
    return image


def write_dicom(folder: Path, image: sitk.Image, uid: str = "1.2.3.1", skip: tuple[int, ...] = (), **tags: str) -> None:
    """One MR image file a slice, as scanners store them; file names do not follow the order of the slices."""
    folder.mkdir(parents=True, exist_ok=True)
    direction = np.reshape(image.GetDirection(), (3, 3))
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    named = {"description": "0008|103e", "image_type": "0008|0008", "agent": "0018|0010", "protocol": "0018|1030"}
    for z in range(image.GetSize()[2]):
        if z in skip:
            continue
        plane = image[:, :, z : z + 1]
        values = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.4",  # MR image storage
            "0008|0018": f"{uid}.{z + 1}",
            "0008|0060": "MR",
            "0020|000d": "1.2.3",
            "0020|000e": uid,
            "0020|0013": str(z + 1),
            "0020|0032": "\\".join(f"{value:.9g}" for value in plane.GetOrigin()),
            "0020|0037": "\\".join(f"{value:.9g}" for value in (*direction[:, 0], *direction[:, 1])),
            **{named[key]: text for key, text in tags.items()},
        }
        for tag, value in values.items():
            plane.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{uid}_{(z * 3) % 7}.dcm"))
        writer.Execute(plane)


def test_a_series_comes_back_with_its_geometry(tmp_path: Path) -> None:
    image = volume()
    write_dicom(tmp_path / "s", image)
    read = read_dicom_series(tmp_path / "s")
    assert np.array_equal(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(image))
    for mine, expected in (
        (read.GetSpacing(), image.GetSpacing()),
        (read.GetOrigin(), image.GetOrigin()),
        (read.GetDirection(), DIRECTION),
    ):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_files_that_are_not_dicom_do_not_disturb(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume())
    (tmp_path / "notes.txt").write_text("seen by the radiologist")
    assert read_dicom_series(tmp_path).GetSize() == (3, 4, 5)


def test_two_series_are_listed_with_their_descriptions(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume(), description="t2_tse_tra")
    write_dicom(tmp_path, volume((2, 4, 3)), uid="1.2.3.2", description="ep2d_diff")
    expected = r"holds 2 series.*'t2_tse_tra' \(5 files.*'ep2d_diff' \(2 files.*folder of its own"
    for read in (read_dicom_series, series_name):
        with pytest.raises(CaseError, match=expected):
            read(tmp_path)


def test_a_missing_slice_is_found_by_its_neighbours(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume((6, 4, 3)), skip=(3,))
    with pytest.raises(CaseError, match=r"unequal distances: 6\.00 mm between .*, 3\.00 mm elsewhere; is a slice missing"):
        read_dicom_series(tmp_path)


def test_several_volumes_in_one_series_are_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a", volume())
    write_dicom(tmp_path / "b", volume(seed=1))
    for file in (tmp_path / "b").iterdir():  # the same series at the same places: a second b-value
        file.rename(tmp_path / "a" / f"b_{file.name}")
    with pytest.raises(CaseError, match=r"5 slices at places where another one is.*b-values"):
        read_dicom_series(tmp_path / "a")


def test_slices_of_another_shape_or_orientation_are_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "shape", volume())
    odd = volume((7, 6, 3))[:, :, 6:]
    write_dicom(tmp_path / "shape_b", odd)
    next((tmp_path / "shape_b").iterdir()).rename(tmp_path / "shape" / "odd.dcm")
    with pytest.raises(CaseError, match=r"shapes \[\(3, 4\), \(3, 6\)\]"):
        read_dicom_series(tmp_path / "shape")
    write_dicom(tmp_path / "turn", volume())
    turned = volume()
    turned.SetDirection(np.eye(3).flatten().tolist())
    write_dicom(tmp_path / "turn_b", turned[:, :, 4:])
    next((tmp_path / "turn_b").iterdir()).rename(tmp_path / "turn" / "odd.dcm")
    with pytest.raises(CaseError, match="several orientations"):
        read_dicom_series(tmp_path / "turn")


def test_a_slice_shifted_in_its_plane_is_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume(), skip=(2,))
    shifted = volume()
    shifted.SetOrigin((-5.5, 20.25, 7.0))
    write_dicom(tmp_path, shifted, skip=(0, 1, 3, 4))
    with pytest.raises(CaseError, match=r"shifted by up to 5\.0 mm in their plane"):
        read_dicom_series(tmp_path)


def test_a_single_slice_is_no_volume(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume((1, 4, 3)))
    with pytest.raises(CaseError, match="single slice"):
        read_dicom_series(tmp_path)


def test_a_folder_without_dicom_says_what_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaseError, match="no DICOM image; it is empty"):
        read_dicom_series(tmp_path)
    (tmp_path / "inner").mkdir()
    with pytest.raises(CaseError, match="no DICOM image; found inner/"):
        read_dicom_series(tmp_path)
    with pytest.raises(CaseError, match="not a folder"):
        read_dicom_series(tmp_path / "nowhere")
    assert capfd.readouterr().err == ""  # ITK's own warning would come before ours


def test_a_truncated_file_is_an_error_a_user_can_read(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume((5, 64, 64)))
    broken = sorted(tmp_path.iterdir())[2]
    broken.write_bytes(broken.read_bytes()[:-3000])
    with pytest.raises(UserError):
        read_dicom_series(tmp_path)


def edit_dicom(file: Path, **values: Any) -> None:
    header = pydicom.dcmread(file)
    for keyword, value in values.items():
        setattr(header, keyword, value)
    header.save_as(file)


def in_order(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda file: int(pydicom.dcmread(file).InstanceNumber))


def test_two_b_values_half_a_slice_apart_are_refused(tmp_path: Path) -> None:
    image = volume((10, 4, 3))  # even slices are of b = 0
    write_dicom(tmp_path, image, uid="1.2.3.1", skip=(1, 3, 5, 7, 9))
    write_dicom(tmp_path, image, uid="1.2.3.2", skip=(0, 2, 4, 6, 8))
    for file in tmp_path.iterdir():
        edit_dicom(file, DiffusionBValue=0.0 if "3.1_" in file.name else 2000.0, SeriesInstanceUID="1.2.3.1")
    expected = (
        r"holds 2 volumes in one series, which differ in DiffusionBValue \(0: 5 slices, 2000: 5 slices\); choose one by number"
    )
    with pytest.raises(CaseError, match=expected):
        read_volume(Volume(tmp_path))
    with pytest.raises(CaseError, match="volumes of several grids"):
        read_volume(Volume(tmp_path, 0))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"EchoTime": 90}, r"EchoTime \(None: 4 slices, 90: 1 slices\)"),
        ({"ImageType": ["DERIVED", "PRIMARY", "P"]}, "ImageType"),
        ({"AcquisitionNumber": 2}, "AcquisitionNumber"),
        ({"InversionTime": 2500}, "InversionTime"),
        ({"PixelSpacing": [0.75, 0.6]}, r"PixelSpacing \[\(0\.75, 0\.5\), \(0\.75, 0\.6\)\]"),
        ({"PixelSpacing": [0, 0]}, "PixelSpacing"),
        ({"PixelSpacing": None}, r"PixelSpacing none, expected 2 numbers"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient none, expected 3 numbers"),
        ({"SamplesPerPixel": 3}, "colour"),
    ],
)
def test_a_slice_that_differs_in_what_makes_a_stack_is_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    write_dicom(tmp_path, volume())
    edit_dicom(in_order(tmp_path)[2], **values)
    with pytest.raises(CaseError, match=said):
        read_dicom_series(tmp_path)


def test_a_number_for_each_slice_makes_no_volumes(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume())
    for number, file in enumerate(in_order(tmp_path), start=1):
        edit_dicom(file, AcquisitionNumber=number)
    assert read_dicom_series(tmp_path).GetSize() == (3, 4, 5)


def test_b_values_of_a_vendor_are_read(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume())
    for file, b_value in zip(in_order(tmp_path), ("0", "800", "800", "800", "800"), strict=True):
        header = pydicom.dcmread(file)
        header.add_new(0x00190010, "LO", "SIEMENS MR HEADER")
        header.add_new(0x0019100C, "IS", b_value)
        header.save_as(file)
    with pytest.raises(CaseError, match=r"DiffusionBValue \(0: 1 slices, 800: 4 slices\)"):
        read_dicom_series(tmp_path)


def test_each_slice_is_rescaled_by_its_own_slope_into_a_type_that_holds_all(tmp_path: Path) -> None:
    image = volume()
    write_dicom(tmp_path, image)
    stored = sitk.GetArrayFromImage(image).astype(np.float64)
    files = in_order(tmp_path)
    edit_dicom(files[3], RescaleSlope=100, RescaleIntercept=-7)
    stored[3] = stored[3] * 100 - 7
    assert np.array_equal(sitk.GetArrayFromImage(read_dicom_series(tmp_path)), stored)
    edit_dicom(files[1], RescaleSlope=0.25, RescaleIntercept=0)
    stored[1] *= 0.25
    np.testing.assert_allclose(sitk.GetArrayFromImage(read_dicom_series(tmp_path)), stored)


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_compressed_files_are_read(tmp_path: Path, compressor: str) -> None:
    voxels = np.random.default_rng(0).integers(0, 2000, (3, 64, 48)).astype(np.uint16)
    image = sitk.GetImageFromArray(voxels)
    write_dicom(tmp_path, image)
    writer = sitk.ImageFileWriter()
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.SetFileName(str(tmp_path / "compressed.dcm"))
    for z, file in enumerate(in_order(tmp_path)):
        writer.Execute(image[:, :, z : z + 1])
        compressed, header = pydicom.dcmread(tmp_path / "compressed.dcm"), pydicom.dcmread(file)
        header.PixelData, header.file_meta = compressed.PixelData, compressed.file_meta
        header["PixelData"].VR = "OB"
        header.RescaleSlope, header.RescaleIntercept = 2, 0
        assert header.file_meta.TransferSyntaxUID.is_compressed
        header.save_as(file)
        (tmp_path / "compressed.dcm").unlink()
    assert np.array_equal(sitk.GetArrayFromImage(read_dicom_series(tmp_path)), 2 * voxels)


def write_enhanced(
    folder: Path, places: Sequence[float], b_values: Sequence[float], slopes: Sequence[float] = (), **values: Any
) -> np.ndarray:
    """One file with many frames, frame i at `places[i]` mm along z; returns what is stored, (frames, 3, 4)."""
    folder.mkdir()
    frames = np.random.default_rng(1).integers(0, 1000, (len(places), 3, 4)).astype("<u2")
    file = Dataset()
    file.SOPClassUID, file.SOPInstanceUID, file.SeriesInstanceUID = "1.2.840.10008.5.1.4.1.1.4.1", "1.2.3.4", "1.2.3"
    file.Modality, file.SeriesDescription, file.NumberOfFrames = "MR", "diffusion", len(places)
    file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = 3, 4, 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 16, 15, 0
    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, plane.ImageOrientationPatient = [1, 2], [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    groups = []
    for i, place in enumerate(places):
        group, position, diffusion, rescale = Dataset(), Dataset(), Dataset(), Dataset()
        position.ImagePositionPatient, diffusion.DiffusionBValue = [0, 0, place], float(b_values[i])
        rescale.RescaleSlope, rescale.RescaleIntercept = (slopes or [1] * len(places))[i], 0
        group.PlanePositionSequence, group.MRDiffusionSequence = [position], [diffusion]
        group.PixelValueTransformationSequence = [rescale]
        groups.append(group)
    file.SharedFunctionalGroupsSequence, file.PerFrameFunctionalGroupsSequence = [shared], groups
    file.PixelData = frames.tobytes()
    for keyword, value in values.items():
        setattr(file, keyword, value)
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID, file.file_meta.MediaStorageSOPInstanceUID = file.SOPClassUID, file.SOPInstanceUID
    file.save_as(folder / "enhanced.dcm", enforce_file_format=True)
    return frames


def test_frames_are_sorted_by_place_and_rescaled_each(tmp_path: Path) -> None:
    frames = write_enhanced(tmp_path / "s", [6, 0, 9, 3], [500] * 4, slopes=[1, 2, 3, 4])
    image = read_dicom_series(tmp_path / "s")
    slopes = np.array([1, 2, 3, 4])[:, None, None]
    assert np.array_equal(sitk.GetArrayFromImage(image), (frames * slopes)[[1, 3, 0, 2]])
    assert (image.GetSpacing(), image.GetOrigin()) == ((2, 1, 3), (0, 0, 0))


def test_of_several_b_values_in_an_enhanced_file_one_is_asked_for(tmp_path: Path) -> None:
    frames = write_enhanced(tmp_path / "s", [0, 0, 3, 3, 6, 6], [2000, 0] * 3)
    with pytest.raises(CaseError, match=r"2 volumes.*DiffusionBValue \(0: 3 slices, 2000: 3 slices\)"):
        read_volume(Volume(tmp_path / "s"))
    for index in (0, 1):
        assert np.array_equal(sitk.GetArrayFromImage(read_volume(Volume(tmp_path / "s", index))), frames[1 - index :: 2])
    with pytest.raises(CaseError, match="from 0 to 1"):
        read_volume(Volume(tmp_path / "s", 2))


@pytest.mark.parametrize(
    ("places", "values", "said"),
    [
        ([0, 3, 6, 12], {}, r"6\.00 mm between frame 3 of enhanced\.dcm and frame 4"),
        ([0, 3, 3, 6], {}, r"places where another one is, such as frame 2 of .* and frame 3"),
        ([0, 3, 6, 9], {"NumberOfFrames": 5}, "tells of 5 frames, but describes 4"),
        ([0, 3, 6, 9], {"PixelData": b"\0" * 20}, "is the copy complete"),
        ([0, 3, 6, 9], {"SharedFunctionalGroupsSequence": []}, "ImageOrientationPatient none"),
    ],
)
def test_enhanced_files_that_make_no_stack_are_refused(
    tmp_path: Path, places: Sequence[float], values: dict[str, Any], said: str
) -> None:
    write_enhanced(tmp_path / "s", places, [0] * 4, **values)
    with pytest.raises(CaseError, match=said):
        read_dicom_series(tmp_path / "s")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>Log in first</html>" * 9, "begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "pointer of Git LFS"),
        (b"", "0 bytes"),
        (b"\0" * 128 + b"DICM", "no DICOM image"),
        ("link", "a link to nothing"),
        ("pipe", "no regular file"),
    ],
)
def test_a_file_called_as_the_series_is_that_is_no_dicom_is_named(tmp_path: Path, content: bytes | str, said: str) -> None:
    write_dicom(tmp_path, volume())
    odd = tmp_path / "odd.dcm"
    if content == "pipe":
        os.mkfifo(odd)
    elif content == "link":
        odd.symlink_to(tmp_path / "nowhere")
    elif isinstance(content, bytes):
        odd.write_bytes(content)
    for read in (read_dicom_series, series_name):
        with pytest.raises(CaseError, match=rf"odd\.dcm is called as its series is, but is .*{said}"):
            read(tmp_path)
    odd.rename(tmp_path / "odd.txt")
    assert read_dicom_series(tmp_path).GetSize() == (3, 4, 5)


def test_the_name_comes_from_the_files(tmp_path: Path) -> None:
    write_dicom(tmp_path / "a", volume(), description="t1_mprage_sag", agent="Gadovist")
    write_dicom(tmp_path / "b", volume(), description="Schädel", protocol="t2_tirm_tra_dark-fluid")
    write_dicom(tmp_path / "c", volume(), description="whatever", image_type="DERIVED\\PRIMARY\\DIFFUSION\\ADC")
    write_dicom(tmp_path / "d", volume(), description="whatever")
    assert [series_name(tmp_path / name) for name in "abcd"] == ["T1ce", "FLAIR", "ADC", None]


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("t2_tse_tra", "T2w"),
        ("AX T2 FLAIR", "FLAIR"),
        ("t2_tirm_tra_dark-fluid", "FLAIR"),
        ("Ax T1 FLAIR", "T1w"),
        ("T1 MPRAGE", "T1w"),
        ("t1_mprage_sag_p2_iso_KM", "T1ce"),
        ("AX T1 POST", "T1ce"),
        ("t1_vibe_tra + Gd", "T1ce"),
        ("T1 pre contrast", "T1w"),
        ("ep2d_diff_b50_500_1400_tra_ADC", "ADC"),
        ("ep2d_diff_b50_500_1400_tra_TRACEW", "DWI"),
        ("DWI b1000", "DWI"),
        ("ep2d_diff_4scan_trace_p2", "DWI"),
        ("SWI 3D", "SWI"),
        ("pd_tse_fs_cor", "PDw"),
        ("t2_stir_cor", "STIR"),
        ("localizer", None),
        ("t1_vibe_SUB", None),
        ("t2_tirm_cor", None),  # a FLAIR or a STIR
        ("", None),
        ("AAHead_Scout t1", None),
    ],
)
def test_names_of_descriptions(description: str, expected: str | None) -> None:
    assert name_from_attributes({"SeriesDescription": description}) == expected


def timing(sequence: str, repetition: float, echo: float, inversion: float | None = None) -> dict[str, str]:
    attributes = {"ScanningSequence": sequence, "RepetitionTime": str(repetition), "EchoTime": str(echo)}
    return attributes | ({"InversionTime": str(inversion)} if inversion else {})


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        (timing("SE", 500, 12), "T1w"),
        (timing("SE", 5000, 100), "T2w"),
        (timing("SE", 3000, 20), "PDw"),
        (timing("SE", 1000, 45), None),
        (timing("SE\\IR", 9000, 110, 2500), "FLAIR"),
        (timing("SE\\IR", 5000, 40, 160), "STIR"),
        (timing("GR\\IR", 2000, 3, 900), "T1w"),
        (timing("GR", 700, 20), "T2starw"),
        (timing("GR", 5, 2), None),
        (timing("EP", 6000, 90), None),
        ({**timing("EP", 6000, 90), "DiffusionBValue": "1000"}, "DWI"),
        ({**timing("EP", 6000, 90), "DiffusionBValue": "0"}, None),
        ({**timing("SE", 500, 12), "ContrastBolusAgent": "Magnevist"}, "T1ce"),
        ({**timing("SE", 500, 12), "ContrastBolusAgent": "NONE"}, "T1w"),
        ({**timing("SE", 500, 12), "ContrastBolusAgent": "Magnevist", "SeriesDescription": "native"}, "T1w"),
        ({**timing("SE", 5000, 100), "ContrastBolusAgent": "Magnevist"}, "T2w"),
        ({**timing("SE", 500, 12), "Modality": "CT"}, None),
        ({**timing("SE\\IR", 9000, 110, 2500), "SeriesDescription": "t2_tirm_cor"}, "FLAIR"),
        ({**timing("SE", 500, 12), "SeriesDescription": "t2_tse"}, "T2w"),  # words before times
        ({**timing("SE", 500, 12), "EchoTime": "?"}, None),
    ],
)
def test_names_of_attributes(attributes: dict[str, str], expected: str | None) -> None:
    assert name_from_attributes(attributes) == expected
