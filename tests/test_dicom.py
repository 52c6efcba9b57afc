"""A DICOM folder gives the volume its headers describe, or an error that says what is wrong; attributes give the series' name."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

from nnunet_csm.errors import UserError
from nnunet_csm.raw.dicom import name_from_attributes, read_dicom_series, series_name
from nnunet_csm.raw.subjects import CaseError, Volume
from nnunet_csm.raw.volumes import read_volume, scan_of

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
    named = {
        "description": "0008|103e",
        "image_type": "0008|0008",
        "agent": "0018|0010",
        "protocol": "0018|1030",
        "frame": "0020|0052",
    }
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


def test_study_and_frame_of_reference_tell_scans_apart(tmp_path: Path) -> None:
    for name, frame in (("adc", "1.2.3.5"), ("dwi", "1.2.3.5"), ("later", "1.2.3.6")):
        write_dicom(tmp_path / name, volume(), frame=frame)
    adc, dwi, later = (scan_of(Volume(tmp_path / name)) for name in ("adc", "dwi", "later"))
    assert adc == dwi == ("1.2.3", "1.2.3.5") != later
    assert scan_of(Volume(tmp_path / "adc.nii.gz")) == ()


def test_a_folder_of_pointers_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "1.dcm").write_text("/annex/objects/MD5E-s9--0.dcm")
    with pytest.raises(CaseError, match=r"1\.dcm is a pointer of git-annex \(DataLad\)"):
        read_dicom_series(tmp_path)


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


# --- what makes one volume, and files with many frames -------------------------------------------------------------------


def changed(folder: Path, change: Callable[[Dataset, int], None]) -> None:
    """Have `change` edit every file of a folder, given its place in the stack."""
    for path in sorted(folder.iterdir()):
        data = pydicom.dcmread(path)
        change(data, int(data.InstanceNumber) - 1)
        data.save_as(path)


def enhanced(path: Path, voxels: np.ndarray, places: Sequence[float], *changes: Callable[[Dataset, int], None]) -> None:
    """An enhanced file: frame i lies at `places[i]` mm; `changes` edit the group of each frame."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = UID("1.2.840.10008.5.1.4.1.1.4.1"), generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.StudyInstanceUID, data.Modality = "1.2.3.9", "1.2.3", "MR"
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, "MONOCHROME2", 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.NumberOfFrames, data.Rows, data.Columns = voxels.shape
    measures, plane, shared = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, plane.ImageOrientationPatient = [0.75, 0.5], [1, 0, 0, 0, 1, 0]
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [plane]
    data.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for number, place in enumerate(places):
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = [-10, 20, place]
        group.PlanePositionSequence = [position]
        for change in changes:
            change(group, number)
        groups.append(group)
    data.PerFrameFunctionalGroupsSequence = groups
    data.PixelData = voxels.astype("<u2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def of_b_value(value: Callable[[int], float]) -> Callable[[Dataset, int], None]:
    def change(group: Dataset, number: int) -> None:
        diffusion = Dataset()
        diffusion.DiffusionBValue = value(number)
        group.MRDiffusionSequence = [diffusion]

    return change


def noise(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4000, shape)


def test_frames_of_an_enhanced_file_are_sorted_by_place_each_with_its_own_slope(tmp_path: Path) -> None:
    voxels, order = noise((5, 4, 3)), [3, 0, 4, 1, 2]

    def scaled(group: Dataset, number: int) -> None:
        transformation = Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = 0.5 * (order[number] + 1), -order[number]
        group.PixelValueTransformationSequence = [transformation]

    enhanced(tmp_path / "x.dcm", voxels[order], [2.5 * place for place in order], scaled)
    read = read_dicom_series(tmp_path)
    steps = np.arange(5).reshape(5, 1, 1)
    np.testing.assert_allclose(sitk.GetArrayFromImage(read), 0.5 * (steps + 1) * voxels - steps)
    assert read.GetSpacing() == (0.5, 0.75, 2.5)
    assert read.GetOrigin() == (-10, 20, 0)


def test_several_b_values_in_an_enhanced_file_are_volumes_to_choose_from(tmp_path: Path) -> None:
    voxels = noise((8, 4, 3))
    enhanced(tmp_path / "x.dcm", voxels, [3.0 * (i // 2) for i in range(8)], of_b_value(lambda i: [2000, 0][i % 2]))
    with pytest.raises(
        CaseError, match=r"2 volumes in one series, told apart by b-value: 0: b-value 0 \(4 slices\); 1: b-value 2000"
    ):
        read_dicom_series(tmp_path)
    for index, start in ((0, 1), (1, 0)):
        read = read_volume(Volume(tmp_path, index))
        assert np.array_equal(sitk.GetArrayFromImage(read), voxels[start::2])
    with pytest.raises(CaseError, match="none of index 2; give one from 0 to 1"):
        read_volume(Volume(tmp_path, 2))


@pytest.mark.parametrize(
    ("keyword", "values", "name"),
    [
        ("EchoTime", (80.0, 120.0), "echo time"),
        ("DiffusionBValue", (0.0, 2000.0), "b-value"),
        ("ImageType", (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]), "image type"),
        ("TemporalPositionIdentifier", (1, 2), "time point"),
        ("InversionTime", (700.0, 2500.0), "inversion time"),
        ("FlipAngle", (4.0, 20.0), "flip angle"),
        ("DiffusionGradientOrientation", ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]), "diffusion direction"),
    ],
)
def test_two_kinds_of_image_whose_places_alternate_are_no_volume(
    tmp_path: Path, keyword: str, values: tuple[Any, Any], name: str
) -> None:
    image = volume((6, 4, 3))
    write_dicom(tmp_path, image)
    changed(tmp_path, lambda data, place: setattr(data, keyword, values[place % 2]))
    with pytest.raises(CaseError, match=f"2 volumes in one series, told apart by {name}"):
        read_dicom_series(tmp_path)
    read = read_dicom_series(tmp_path, 1)
    assert np.array_equal(sitk.GetArrayFromImage(read), sitk.GetArrayFromImage(image)[1::2])
    assert read.GetSpacing()[2] == pytest.approx(6.0)


def test_the_b_value_may_stand_where_a_vendor_keeps_it(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume((6, 4, 3)))

    def siemens(data: Dataset, place: int) -> None:
        data.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", [50, 800][place % 2])

    changed(tmp_path, siemens)
    with pytest.raises(CaseError, match=r"0: b-value 50 \(3 slices\); 1: b-value 800"):
        read_dicom_series(tmp_path)


def test_numbers_that_only_rounding_tells_apart_are_one(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume())
    changed(tmp_path, lambda data, place: setattr(data, "EchoTime", 80 + 0.01 * place))
    assert read_dicom_series(tmp_path).GetSize() == (3, 4, 5)


def test_two_acquisitions_whose_places_alternate_are_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path / "phases", volume((6, 4, 3)))

    def phases(data: Dataset, place: int) -> None:
        data.AcquisitionNumber, data.SliceThickness = 1 + place % 2, 6
        del data.SpacingBetweenSlices

    changed(tmp_path / "phases", phases)
    with pytest.raises(CaseError, match=r"3\.00 mm apart where the headers say 6 mm, and the acquisition numbers 1, 2"):
        read_dicom_series(tmp_path / "phases")
    changed(
        tmp_path / "phases", lambda data, place: setattr(data, "AcquisitionNumber", 1)
    )  # thick slices as such are usual in CT
    assert read_dicom_series(tmp_path / "phases").GetSize() == (3, 4, 6)
    write_dicom(tmp_path / "packages", volume((6, 4, 3)))  # one volume, its odd slices acquired after its even ones
    changed(tmp_path / "packages", lambda data, place: setattr(data, "AcquisitionNumber", 1 + place % 2))
    assert read_dicom_series(tmp_path / "packages").GetSize() == (3, 4, 6)


def test_slices_have_slopes_and_types_of_their_own(tmp_path: Path) -> None:
    image = volume()
    write_dicom(tmp_path, image)

    def typed(data: Dataset, place: int) -> None:
        data.RescaleSlope, data.RescaleIntercept = 1, 0
        if place == 0:  # the first slice is stored without a sign
            data.PixelRepresentation = 0
            data.PixelData = np.full((4, 3), 60000, dtype="<u2").tobytes()
        if place == 2:
            data.RescaleSlope, data.RescaleIntercept = 0.5, -7

    changed(tmp_path, typed)
    expected = sitk.GetArrayFromImage(image).astype(float)
    expected[0], expected[2] = 60000, 0.5 * expected[2] - 7
    np.testing.assert_allclose(sitk.GetArrayFromImage(read_dicom_series(tmp_path)), expected)


def test_a_spacing_that_changes_within_a_series_is_refused(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume())
    changed(tmp_path, lambda data, place: setattr(data, "PixelSpacing", [0.75, 0.5 + 0.1 * (place > 2)]))
    with pytest.raises(CaseError, match=r"several PixelSpacing.*\(0\.75, 0\.5\) mm in .*\(0\.75, 0\.6\) mm in"):
        read_dicom_series(tmp_path)


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume())
    report = pydicom.dcmread(next(tmp_path.iterdir()), stop_before_pixels=True)
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.88.11")  # structured report
    report.SeriesInstanceUID = "1.2.3.77"
    report.save_as(tmp_path / "report.dcm")
    (tmp_path / "._twin.dcm").write_bytes(b"\0\5\x16\7")
    os.mkfifo(tmp_path / "pipe")
    assert read_dicom_series(tmp_path).GetSize() == (3, 4, 5)
    (tmp_path / "gone.dcm").symlink_to(tmp_path / "nowhere.dcm")
    with pytest.raises(CaseError, match=r"gone\.dcm is a link to nothing that can be read"):
        read_dicom_series(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>Log in first</html>" * 9, r"begins with b'<!DOCTYPE html>"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "pointer of Git LFS"),
        (b"", "empty"),
        (b"\0" * 128 + b"DICM", "no DICOM, or cut off"),
        (None, "a pipe"),
    ],
)
def test_what_is_called_as_a_slice_and_is_none_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    write_dicom(tmp_path, volume())
    odd = tmp_path / "odd.dcm"  # the last slice may have been it, which the others cannot tell
    if content is None:
        os.mkfifo(odd)
    else:
        odd.write_bytes(content)
    for read in (read_dicom_series, series_name):
        with pytest.raises(CaseError, match=rf"odd\.dcm is called as the slices are, but is .*{said}"):
            read(tmp_path)
    odd.rename(tmp_path / "odd.txt")
    assert read_dicom_series(tmp_path).GetSize() == (3, 4, 5)


def test_of_numbered_files_one_that_is_no_dicom_is_named(tmp_path: Path) -> None:
    write_dicom(tmp_path, volume())
    for number, path in enumerate(sorted(tmp_path.iterdir())):
        path.rename(tmp_path / f"IM.{number}")
    (tmp_path / "IM.9").write_bytes(b"lost")
    with pytest.raises(CaseError, match=r"IM\.9 is called as the slices are"):
        read_dicom_series(tmp_path)


def test_gradient_directions_of_an_enhanced_file_are_volumes(tmp_path: Path) -> None:
    voxels = noise((6, 4, 3))

    def directed(group: Dataset, number: int) -> None:
        direction, diffusion = Dataset(), Dataset()
        direction.DiffusionGradientOrientation = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]][number % 2]
        diffusion.DiffusionBValue, diffusion.DiffusionGradientDirectionSequence = 1000.0, [direction]
        group.MRDiffusionSequence = [diffusion]

    enhanced(tmp_path / "x.dcm", voxels, [0, 0, 3, 3, 6, 6], directed)
    with pytest.raises(CaseError, match="2 volumes in one series, told apart by diffusion direction"):
        read_dicom_series(tmp_path)
    assert np.array_equal(sitk.GetArrayFromImage(read_dicom_series(tmp_path, 0)), voxels[1::2])


def test_compressed_slices_are_decoded(tmp_path: Path) -> None:
    image = volume((5, 16, 16))
    write_dicom(tmp_path / "plain", image)
    for path in (tmp_path / "plain").iterdir():
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor("JPEG2000")
        writer.SetFileName(str(path))
        writer.Execute(sitk.ReadImage(str(path)))
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed
    assert np.array_equal(sitk.GetArrayFromImage(read_dicom_series(tmp_path / "plain")), sitk.GetArrayFromImage(image))


@pytest.mark.parametrize("compressor", ["JPEG", "JPEG2000"])
def test_compressed_frames_are_decoded_and_scaled_each(tmp_path: Path, compressor: str) -> None:
    voxels = noise((4, 64, 48)).astype(np.uint16)

    def scaled(group: Dataset, number: int) -> None:
        transformation = Dataset()
        transformation.RescaleSlope, transformation.RescaleIntercept = number + 1, 0
        group.PixelValueTransformationSequence = [transformation]

    enhanced(tmp_path / "x.dcm", voxels, [0, 2, 4, 6], scaled)
    writer = sitk.ImageFileWriter()
    writer.UseCompressionOn()
    writer.SetCompressor(compressor)
    writer.SetFileName(str(tmp_path / "compressed.tmp.dcm"))
    writer.Execute(sitk.GetImageFromArray(voxels))
    compressed, data = pydicom.dcmread(tmp_path / "compressed.tmp.dcm"), pydicom.dcmread(tmp_path / "x.dcm")
    data.file_meta.TransferSyntaxUID = compressed.file_meta.TransferSyntaxUID
    data.PixelData = compressed.PixelData
    data["PixelData"].VR = "OB"
    data.save_as(tmp_path / "x.dcm")
    (tmp_path / "compressed.tmp.dcm").unlink()
    assert data.file_meta.TransferSyntaxUID.is_compressed
    steps = np.arange(1, 5).reshape(4, 1, 1)
    assert np.array_equal(sitk.GetArrayFromImage(read_dicom_series(tmp_path)), voxels * steps)


def test_a_value_of_an_unknown_kind_is_an_error_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "x.dcm"
    enhanced(path, noise((4, 8, 8)), [0, 2, 4, 6])
    content = path.read_bytes()
    assert content.count(b"\x20\x00\x0e\x00UI") == 1
    path.write_bytes(content.replace(b"\x20\x00\x0e\x00UI", b"\x20\x00\x0e\x00U\x8d"))
    with pytest.raises(CaseError, match=r"x\.dcm cannot be read as a DICOM image"):
        read_dicom_series(tmp_path)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.9])
def test_a_file_that_is_cut_off_anywhere_is_an_error_or_no_image(tmp_path: Path, share: float) -> None:
    enhanced(tmp_path / "x.dcm", noise((4, 8, 8)), [0, 2, 4, 6], of_b_value(lambda i: 1000))
    content = (tmp_path / "x.dcm").read_bytes()
    (tmp_path / "x.dcm").write_bytes(content[: int(share * len(content))])
    with pytest.raises(CaseError):
        read_dicom_series(tmp_path)
