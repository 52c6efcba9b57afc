"""Releases written in exactly their public layout (sources in the scripts' docstrings) give the cases they hold.

Every release here is a few voxels large. What is wrong with one is told with its file, its line and what to do.
"""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from test_dicom import write_dicom  # type: ignore[import-not-found]

from nnunet_csm import cli
from nnunet_csm.dataset_conversion import FORMATS, read_release
from nnunet_csm.dataset_conversion.masks import consecutive, parse_labels
from nnunet_csm.dataset_conversion.sheets import read_sheet
from nnunet_csm.errors import UserError
from nnunet_csm.raw.subjects import Case, Release, Volume
from nnunet_csm.raw.writer import write_dataset

SHAPE = (3, 5, 4)


def write(path: Path, voxels: np.ndarray | int = 7, spacing: tuple[float, float, float] = (1.0, 1.0, 3.0)) -> Path:
    """A volume; a number stands for a ramp that begins with it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    array = voxels if isinstance(voxels, np.ndarray) else (np.arange(np.prod(SHAPE)) + voxels).reshape(SHAPE).astype(np.int16)
    volumes = [sitk.GetImageFromArray(one) for one in (array if array.ndim == 4 else [array])]
    for volume in volumes:
        volume.SetSpacing(spacing)
    image = sitk.JoinSeries(volumes) if array.ndim == 4 else volumes[0]
    sitk.WriteImage(image, str(path))
    return path


def mask(*boxes: tuple[int, int]) -> np.ndarray:
    """A mask: (z, value) fills slice z."""
    array = np.zeros(SHAPE, dtype=np.uint8)
    for z, value in boxes:
        array[z] = value
    return array


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], delimiter: str = ",", encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as stream:
        writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(format_name: str, release: Path, strict: bool = False, **options: Any) -> Release:
    return read_release(format_name, release, 7, None, options, strict)


def by_name(release: Release) -> dict[str, Case]:
    return {case.identifier: case for case in release.cases}


def converted(release: Release, folder: Path) -> dict[str, np.ndarray]:
    """What the writer makes of a release: relative path to voxels."""
    report = write_dataset(release.cases, release.dataset, folder, num_processes=1)
    assert report.left_out == {}
    paths = sorted(report.folder.rglob("*.nii.gz"))
    return {str(path.relative_to(report.folder)): sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in paths}


# --- the decathlon ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def task01(tmp_path: Path) -> Path:
    """Two training cases and one test case of Task01_BrainTumour, with the twins that macOS writes into archives."""
    folder = tmp_path / "Task01_BrainTumour"
    four = np.stack([np.full(SHAPE, 10 * (series + 1), np.int16) for series in range(4)])
    four[:, 0, 0, 0] = (1, 2, 3, 4)
    for name in ("imagesTr/BRATS_001", "imagesTr/BRATS_002", "imagesTs/BRATS_485"):
        write(folder / f"{name}.nii.gz", four)
        (folder / name).parent.joinpath(f"._{Path(name).name}.nii.gz").write_bytes(b"Mac OS X")
    for name in ("BRATS_001", "BRATS_002"):
        write(folder / "labelsTr" / f"{name}.nii.gz", mask((0, 1), (1, 2), (2, 3)))
    task = {
        "name": "BRATS",
        "description": "Gliomas segmentation tumour and oedema in on brain images",
        "tensorImageSize": "4D",
        "modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"},
        "labels": {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"},
        "numTraining": 2,
        "numTest": 1,
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in ("BRATS_001", "BRATS_002")
        ],
        "test": ["./imagesTs/BRATS_485.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(task))
    return folder


def edit_task(folder: Path, **changes: Any) -> None:
    path = folder / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_bt_msd(task01: Path, tmp_path: Path) -> None:
    release = read("bt_msd", task01, strict=True)
    assert release.dataset.name == "Dataset007_BRATS"
    assert release.dataset.series == ("FLAIR", "T1w", "T1ce", "T2w")
    assert release.dataset.labels == {"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}
    cases = by_name(release)
    assert {name: case.test for name, case in cases.items()} == {"BRATS_001": False, "BRATS_002": False, "BRATS_485": True}
    assert cases["BRATS_001"].images["T1ce"] == Volume(task01 / "./imagesTr/BRATS_001.nii.gz", 2)
    assert not cases["BRATS_485"].masks
    files = converted(release, tmp_path / "raw")
    assert [files[f"imagesTr/BRATS_001_000{channel}.nii.gz"][1, 1, 1] for channel in range(4)] == [10, 20, 30, 40]
    assert np.array_equal(files["labelsTr/BRATS_002.nii.gz"], mask((0, 1), (1, 2), (2, 3)))
    assert "imagesTs/BRATS_485_0003.nii.gz" in files and "labelsTs/BRATS_485.nii.gz" not in files


def test_bt_msd_regions_paint_as_the_labels(task01: Path, tmp_path: Path) -> None:
    """nnU-Net paints regions_class_order one over the other: what is left of whole, core, enhancing are the three labels."""
    dataset = read("bt_msd", task01, regions=True).dataset
    assert dataset.regions_class_order is not None
    regions = [value if isinstance(value, tuple) else (value,) for name, value in dataset.labels.items() if name != "background"]
    label = mask((0, 1), (1, 2), (2, 3))
    painted = np.zeros_like(label)
    for region, value in zip(regions, dataset.regions_class_order, strict=True):
        painted[np.isin(label, region)] = value
    assert np.array_equal(painted, label)
    converted(read("bt_msd", task01, regions=True), tmp_path / "raw")


def test_regions_need_the_labels_of_task01(task01: Path) -> None:
    edit_task(task01, labels={"0": "background", "1": "enhancing tumour", "2": "non-enhancing tumor", "3": "edema"})
    with pytest.raises(UserError, match=r"1 edema, 2 non-enhancing tumor, 3 enhancing tumour; .*dataset\.json"):
        read("bt_msd", task01, regions=True)


def test_labels_of_test_cases_are_read_where_they_are_there(task01: Path) -> None:
    write(task01 / "labelsTs" / "BRATS_485.nii.gz", mask((0, 1)))
    assert by_name(read("bt_msd", task01))["BRATS_485"].masks


def test_a_task_with_one_series_is_3d(tmp_path: Path) -> None:
    write(tmp_path / "imagesTr" / "hippocampus_001.nii.gz")
    write(tmp_path / "labelsTr" / "hippocampus_001.nii.gz", mask((0, 1)))
    task = {
        "name": "Hippocampus",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [{"image": "./imagesTr/hippocampus_001.nii.gz", "label": "./labelsTr/hippocampus_001.nii.gz"}],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(task))
    (case,) = read("bt_msd", tmp_path).cases
    assert case.images["MRI"].index is None


def test_bad_cases_of_the_decathlon_are_left_out(task01: Path) -> None:
    edit_task(task01, training=[{"image": "./imagesTr/BRATS_001.nii.gz", "label": "./labelsTr/BRATS_003.nii.gz"}])
    write(task01 / "imagesTs" / "BRATS_485.nii.gz", np.zeros((3, *SHAPE), np.int16))
    with pytest.raises(UserError, match=r"no usable case.*BRATS_003"):
        read("bt_msd", task01)
    write(task01 / "labelsTr" / "BRATS_003.nii.gz", mask())
    release = read("bt_msd", task01)
    assert list(by_name(release)) == ["BRATS_001"]
    assert "3 volumes, but dataset.json names 4 series" in release.left_out["BRATS_485"]
    assert any("1 images that dataset.json does not list, such as BRATS_002" in line for line in release.notes)
    with pytest.raises(UserError, match=r"BRATS_485: .*3 volumes.*without --strict"):
        read("bt_msd", task01, strict=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modality": None}, "no 'modality'"),
        ({"labels": {"0": "background", "2": "edema"}}, "needs 0 background, 1, 2"),
        ({"labels": {"x": "background"}}, "keys are numbers"),
        ({"modality": {"0": "T2", "1": "T2w"}}, "both the series 'T2w'"),
        ({"training": [7]}, "lists 7"),
        ({"training": [{"image": "./imagesTr/a.nii.gz", "label": 7}]}, "expected the path of a mask"),
    ],
)
def test_a_wrong_dataset_json_is_refused(task01: Path, changes: dict[str, Any], message: str) -> None:
    edit_task(task01, **changes)
    with pytest.raises(UserError, match=message):
        read("bt_msd", task01)


# --- Prostate158 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def prostate158(tmp_path: Path) -> Path:
    """020 has a tumour (value 1 on ADC, 3 on T2w), 024 has none, 025 is of valid.csv, 001 of the test archive."""
    folder = tmp_path / "prostate158"

    def row(split: str, number: str, tumor: bool) -> dict[str, str]:
        case = f"{split}/{number}"
        home = folder / ("prostate158_test" if split == "test" else "prostate158_train")
        for name in ("t2", "adc", "dwi"):
            write(home / case / f"{name}.nii.gz")
        write(home / case / "t2_anatomy_reader1.nii.gz", mask((0, 1), (1, 2)))
        write(home / case / "empty.nii.gz", mask())
        if tumor:
            write(home / case / "adc_tumor_reader1.nii.gz", mask((1, 1)))
            write(home / case / "t2_tumor_reader1.nii.gz", mask((1, 3)))
        return {
            "ID": number.lstrip("0"),
            **{name: f"{case}/{name}.nii.gz" for name in ("t2", "adc", "dwi", "t2_anatomy_reader1")},
            "t2_tumor_reader1": f"{case}/t2_tumor_reader1.nii.gz" if tumor else "",
            "adc_tumor_reader1": f"{case}/{'adc_tumor_reader1' if tumor else 'empty'}.nii.gz",
            "t2_anatomy_reader2": "",
            "adc_tumor_reader2": "",
        }

    write_csv(folder / "prostate158_train" / "train.csv", [row("train", "020", True), row("train", "024", False)])
    write_csv(folder / "prostate158_train" / "valid.csv", [row("train", "025", False)])
    write_csv(folder / "prostate158_test" / "test.csv", [row("test", "001", True)])
    return folder


def test_prostate158(prostate158: Path, tmp_path: Path) -> None:
    release = read("prostate158", prostate158, strict=True)
    assert release.dataset.series == ("T2w", "ADC", "DWI")
    cases = by_name(release)
    assert {name: case.diagnoses[0].name for name, case in cases.items()} == {
        "020": "malignant",
        "024": "benign",
        "025": "benign",
        "001": "malignant",
    }
    assert [name for name, case in cases.items() if case.test] == ["001"]
    files = converted(release, tmp_path / "raw")
    assert np.array_equal(files["labelsTr/020.nii.gz"], mask((0, 1), (1, 1)))


@pytest.mark.parametrize(
    ("task", "of_020", "of_024"),
    [
        ("zones", mask((0, 1), (1, 2)), mask((0, 1), (1, 2))),
        ("tumor", mask((1, 1)), mask()),
    ],
)
def test_prostate158_tasks(prostate158: Path, tmp_path: Path, task: str, of_020: np.ndarray, of_024: np.ndarray) -> None:
    files = converted(read("prostate158", prostate158, task=task), tmp_path / "raw")
    assert np.array_equal(files["labelsTr/020.nii.gz"], of_020)
    assert np.array_equal(files["labelsTr/024.nii.gz"], of_024)


def test_a_tumour_of_another_value_is_a_tumour(prostate158: Path, tmp_path: Path) -> None:
    write(prostate158 / "prostate158_train/train/020/adc_tumor_reader1.nii.gz", mask((1, 3)))
    files = converted(read("prostate158", prostate158, task="tumor"), tmp_path / "raw")
    assert np.array_equal(files["labelsTr/020.nii.gz"], mask((1, 1)))


def test_no_mask_at_all_is_benign(prostate158: Path) -> None:
    table = prostate158 / "prostate158_train" / "train.csv"
    table.write_text(table.read_text().replace("train/024/empty.nii.gz", ""))
    assert by_name(read("prostate158", prostate158))["024"].diagnoses[0].name == "benign"


def test_prostate158_with_holes(prostate158: Path) -> None:
    (prostate158 / "prostate158_train/train/024/dwi.nii.gz").unlink()
    release = read("prostate158", prostate158)
    assert "train.csv line 3" in release.left_out["024"] and "dwi" in release.left_out["024"]
    (prostate158 / "prostate158_train" / "copy").mkdir()
    copy = prostate158 / "prostate158_train" / "copy" / "train.csv"
    copy.write_text((prostate158 / "prostate158_train" / "train.csv").read_text())
    with pytest.raises(UserError, match=r"train\.csv more than once"):
        read("prostate158", prostate158)


def test_an_id_in_two_tables_is_refused(prostate158: Path) -> None:
    (prostate158 / "prostate158_train" / "valid.csv").write_text((prostate158 / "prostate158_train" / "train.csv").read_text())
    with pytest.raises(UserError, match=r"valid\.csv line 2: ID 020 is in .*train\.csv line 2 already"):
        read("prostate158", prostate158)


# --- PI-CAI ----------------------------------------------------------------------------------------------------------------

HUMAN = Path("picai_labels/csPCa_lesion_delineations/human_expert")
GLAND = Path("picai_labels/anatomical_delineations/whole_gland/AI/Bosma22b")


@pytest.fixture
def picai(tmp_path: Path) -> Path:
    """Two studies of patient 10129 in one fold, one of 10008 in another, which only Pooch25 delineates."""
    folder = tmp_path / "picai"
    studies = (("fold0", "10129_1000129", "NO"), ("fold0", "10129_1000130", "YES"), ("fold1", "10008_1000008", "YES"))
    for fold, study, _ in studies:
        for series in ("t2w", "adc", "hbv", "cor", "sag"):
            spacing = (0.5, 0.5, 3.0) if series == "t2w" else (1.0, 1.0, 3.0)
            write(folder / f"picai_public_images_{fold}" / study.split("_")[0] / f"{study}_{series}.mha", spacing=spacing)
        write(folder / GLAND / f"{study}.nii.gz", mask((0, 1), (1, 1)), (0.5, 0.5, 3.0))
    write(folder / HUMAN / "resampled" / "10129_1000129.nii.gz", mask(), (0.5, 0.5, 3.0))
    write(folder / HUMAN / "resampled" / "10129_1000130.nii.gz", mask((1, 3)), (0.5, 0.5, 3.0))
    write(folder / HUMAN / "Pooch25" / "10008_1000008.nii.gz", mask((2, 1)), (0.5, 0.5, 3.0))
    rows = [
        {"patient_id": study.split("_")[0], "study_id": study.split("_")[1], "psa": 7.7, "case_ISUP": 0, "case_csPCa": positive}
        for _, study, positive in studies
    ]
    write_csv(folder / "picai_labels/clinical_information/marksheet.csv", rows)
    return folder


def test_picai(picai: Path, tmp_path: Path) -> None:
    release = read("picai", picai, strict=True)
    cases = by_name(release)
    assert {name: (case.patient, case.diagnoses[0].name) for name, case in cases.items()} == {
        "10008_1000008": ("10008", "significant"),
        "10129_1000129": ("10129", "insignificant"),
        "10129_1000130": ("10129", "significant"),
    }
    assert {series: volume.path.name[-7:-4] for series, volume in cases["10008_1000008"].images.items()} == {
        "T2w": "t2w",
        "ADC": "adc",
        "DWI": "hbv",
    }
    files = converted(release, tmp_path / "raw")
    assert np.array_equal(files["labelsTr/10129_1000130.nii.gz"], mask((0, 1), (1, 2)))
    assert np.array_equal(files["labelsTr/10008_1000008.nii.gz"], mask((0, 1), (1, 1), (2, 2)))


def test_picai_lesions_only(picai: Path, tmp_path: Path) -> None:
    files = converted(read("picai", picai, task="lesion"), tmp_path / "raw")
    assert np.array_equal(files["labelsTr/10129_1000130.nii.gz"], mask((1, 1)))
    assert not files["labelsTr/10129_1000129.nii.gz"].any()


def test_a_study_without_delineation_is_not_taken_for_one_without_lesion(picai: Path) -> None:
    (picai / HUMAN / "Pooch25" / "10008_1000008.nii.gz").unlink()
    assert "no lesion mask" in read("picai", picai).left_out["10008_1000008"]
    assert "10008_1000008" in by_name(read("picai", picai, task="gland"))


def test_picai_without_its_labels(picai: Path) -> None:
    (picai / "picai_labels").rename(picai / "elsewhere")
    assert read("picai", picai).cases  # whatever the folder is called
    (picai / "elsewhere/clinical_information").rename(picai / "elsewhere/other")
    with pytest.raises(UserError, match=r"git clone .*picai_labels.* not found; there is elsewhere/, picai_public_images_fold0/"):
        read("picai", picai)


def test_a_study_in_two_folds_is_refused(picai: Path) -> None:
    write(picai / "picai_public_images_fold1" / "10129" / "10129_1000129_t2w.mha")
    with pytest.raises(UserError, match=r"10129_1000129_t2w\.mha is there twice"):
        read("picai", picai)


@pytest.mark.parametrize(("old", "new", "message"), [("YES", "2", "line 3: 'case_cspca'? is '2'"), ("case_csPCa", "x", "lacks")])
def test_a_marksheet_of_another_kind_is_refused(picai: Path, old: str, new: str, message: str) -> None:
    path = picai / "picai_labels/clinical_information/marksheet.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=f"(?i){message}"):
        read("picai", picai)


# --- Breast2023 ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def breast(tmp_path: Path) -> Path:
    """P001 has two lesions in two files and no DWI; P002 two lesions in one file, and T2w as DICOM; P003 one, for testing."""
    folder = tmp_path / "breast"
    for patient, series in (("P001", ("T1ce", "T2w")), ("P002", ("T1ce", "DWI")), ("P003", ("T1ce", "DWI", "T2w"))):
        for one in series:
            write(folder / "images" / patient / f"{one}.nii.gz")
    dicom = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(SHAPE))
    dicom.SetSpacing((1.0, 1.0, 3.0))
    write_dicom(folder / "images" / "P002" / "T2w", dicom)
    write(folder / "masks" / "P001_1.nii.gz", mask((0, 1)))
    write(folder / "masks" / "P001_2.nii.gz", mask((1, 255)))
    write(folder / "masks" / "P002.nii.gz", mask((0, 1), (2, 2)))
    write(folder / "masks" / "P003.nrrd", mask((1, 1)))
    rows = [
        {"patient": "P001", "lesion": "1", "class": "malignant", "mask": "masks/P001_1.nii.gz", "value": "", "split": ""},
        {"patient": "P002", "lesion": "left", "class": "benign", "mask": "masks/P002.nii.gz", "value": "2", "split": "train"},
        {"patient": "P001", "lesion": "2", "class": "Benign", "mask": "masks/P001_2.nii.gz", "value": "", "split": ""},
        {"patient": "P002", "lesion": "right", "class": "malignant", "mask": "masks/P002.nii.gz", "value": "1", "split": "train"},
        {"patient": "P003", "lesion": "1", "class": "benign", "mask": "masks/P003.nrrd", "value": "", "split": "test"},
    ]
    write_csv(folder / "lesions.csv", rows)
    return folder


def test_breast2023(breast: Path, tmp_path: Path) -> None:
    release = read("breast2023", breast, strict=True)
    cases = by_name(release)
    found = {name: [(d.name, d.mask_label) for d in case.diagnoses] for name, case in cases.items()}
    assert found == {
        "P001": [("malignant", 1), ("benign", 2)],
        "P002": [("benign", 1), ("malignant", 2)],
        "P003": [("benign", 1)],
    }
    assert release.dataset.labels == {"background": 0, "lesion": (1, 2)}
    assert release.dataset.regions_class_order == (1,)
    assert list(cases["P001"].images) == ["T1ce", "T2w"]
    assert [name for name, case in cases.items() if case.test] == ["P003"]
    files = converted(release, tmp_path / "raw")
    assert np.array_equal(files["labelsTr/P001.nii.gz"], mask((0, 1), (1, 2)))
    assert np.array_equal(files["labelsTr/P002.nii.gz"], mask((0, 2), (2, 1)))
    assert not files["imagesTr/P001_0001.nii.gz"].any()  # no DWI
    assert np.array_equal(files["imagesTr/P002_0002.nii.gz"], np.arange(60).reshape(SHAPE))


def test_overlapping_lesions_are_told(breast: Path) -> None:
    write(breast / "masks" / "P001_2.nii.gz", mask((0, 1), (1, 1))[:, :, ::-1])
    release = read("breast2023", breast)
    assert "lesion 2 covers lesion 1 wholly" in release.left_out["P001"]
    partly = mask((1, 1))
    partly[0, 0] = 1
    write(breast / "masks" / "P001_2.nii.gz", partly)
    assert "P001: lesions 1 and 2 overlap in 4 voxels" in read("breast2023", breast).doubts[0]
    with pytest.raises(UserError, match="overlap in 4 voxels"):
        read("breast2023", breast, strict=True)


def test_a_mask_of_several_values_needs_the_column_value(breast: Path) -> None:
    table = breast / "lesions.csv"
    table.write_text(table.read_text().replace("P002.nii.gz,2", "P002.nii.gz,"))
    assert "line 3: masks/P002.nii.gz has the values [1, 2]" in read("breast2023", breast).left_out["P002"]


def test_patients_that_cannot_be_used_are_left_out(breast: Path) -> None:
    write(breast / "masks" / "P003.nrrd", mask())
    for series in ("T1ce", "T2w"):
        (breast / "images" / "P001" / f"{series}.nii.gz").unlink()
    write(breast / "images" / "P004" / "T1ce.nii.gz")
    release = read("breast2023", breast)
    assert list(by_name(release)) == ["P002"]
    assert "none of T1ce, DWI, T2w; there is nothing in it" in release.left_out["P001"]
    assert "no voxel above 0" in release.left_out["P003"]
    assert any("1 patients with images, but no row in lesions.csv, such as P004" in line for line in release.notes)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("malignant,masks/P001_1", "maybe,masks/P001_1", r"lesions\.csv line 2: 'class' is 'maybe'; known are benign, malignant"),
        ("P001,2", "P001,1", r"line 4: lesion 1 of patient P001 is in line 2 already"),
        ("2,train", "2,test", r"line 5: patient P002 is of another split than in line 3"),
        ("P003,1", "P/3,1", r"line 6: patient 'P/3' cannot be a file name"),
        ("patient,", "person,", r"lacks the column patient; found person, lesion"),
        ("masks/P003.nrrd", "", r"line 6: 'mask' is empty"),
        ("2,train", "two,train", r"line 3: 'value' is 'two'"),
    ],
)
def test_mistakes_in_lesions_csv_are_told_with_their_line(breast: Path, old: str, new: str, message: str) -> None:
    table = breast / "lesions.csv"
    assert old in table.read_text()
    table.write_text(table.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        read("breast2023", breast)


# --- tables ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def table_rows(tmp_path: Path) -> list[dict[str, str]]:
    """S1 with a T2w and the second volume of a 4-D file; S2 with DICOM that names itself."""
    write(tmp_path / "S1" / "t2.nrrd")
    write(
        tmp_path / "S1" / "functional.nii.gz",
        np.stack([np.full(SHAPE, 1, np.int16), np.arange(60, dtype=np.int16).reshape(SHAPE)]),
    )
    write(tmp_path / "S1" / "lesion.nii.gz", mask((0, 1), (1, 4)))
    dicom = sitk.GetImageFromArray(np.arange(60, dtype=np.int16).reshape(SHAPE))
    dicom.SetSpacing((1.0, 1.0, 3.0))
    write_dicom(tmp_path / "S2" / "series", dicom, description="ep2d_diff_ADC")
    return [
        {
            "subject": "S1",
            "series": "t2_tse",
            "path": "S1/t2.nrrd",
            "volume": "",
            "mask": "S1/lesion.nii.gz",
            "class": "",
            "split": "",
        },
        {
            "subject": "S1",
            "series": "ADC",
            "path": "S1/functional.nii.gz",
            "volume": "1",
            "mask": "",
            "class": "bad",
            "split": "",
        },
        {"subject": "S2", "series": "", "path": "S2/series", "volume": "", "mask": "", "class": "good", "split": "test"},
    ]


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding"),
    [("t.csv", ",", "utf-8"), ("t.csv", ";", "utf-8-sig"), ("t.tsv", "\t", "utf-8")],
)
def test_table(tmp_path: Path, table_rows: list[dict[str, str]], name: str, delimiter: str, encoding: str) -> None:
    release = read("table", write_csv(tmp_path / name, table_rows, delimiter, encoding), strict=True)
    cases = by_name(release)
    assert cases["S1"].images == {"T2w": Volume(tmp_path / "S1/t2.nrrd"), "ADC": Volume(tmp_path / "S1/functional.nii.gz", 1)}
    assert cases["S2"].images == {"ADC": Volume(tmp_path / "S2/series")}
    assert [case.diagnoses[0].name for case in release.cases] == ["bad", "good"]
    assert [case.test for case in release.cases] == [False, True]
    assert release.dataset.series == ("T2w", "ADC")
    assert release.dataset.labels == {"background": 0, "label_1": 1, "label_4": 2}
    assert "labels: label_4: 4 becomes 2" in release.notes
    files = converted(release, tmp_path / "raw")
    assert np.array_equal(files["labelsTr/S1.nii.gz"], mask((0, 1), (1, 2)))
    assert np.array_equal(files["imagesTs/S2_0001.nii.gz"], np.arange(60).reshape(SHAPE))


@pytest.mark.parametrize("word", ["NA", "nan", "None", "null", "-", "?", "N/A"])
def test_a_word_for_no_value_is_no_class(tmp_path: Path, word: str) -> None:
    names = {"S1": "benign", "S2": "malignant", "S3": word}
    rows = [{"subject": name, "series": "T2w", "path": f"{name}.nii.gz", "class": one} for name, one in names.items()]
    for name in names:
        write(tmp_path / f"{name}.nii.gz")
    release = read("table", write_csv(tmp_path / "series.csv", rows))
    classes = {name: [one.name for one in case.diagnoses] for name, case in by_name(release).items()}
    assert classes == {"S1": ["benign"], "S2": ["malignant"], "S3": []}
    assert release.notes == (f"'class': taken for no value: {word!r} in 1 row",)


@pytest.mark.parametrize("twins", [("benign", "Benign"), ("1", "1.0"), ("malignant", "malignant\u200b"), ("a b", "a\u00a0b")])
def test_classes_that_look_alike_are_refused_before_anything_is_written(tmp_path: Path, twins: tuple[str, str]) -> None:
    rows = [{"subject": f"S{k}", "series": "T2w", "path": f"{k}.nii.gz", "class": one} for k, one in enumerate((*twins, "other"))]
    for k in range(3):
        write(tmp_path / f"{k}.nii.gz")
    release = read("table", write_csv(tmp_path / "series.csv", rows))
    with pytest.raises(UserError, match=r"the classes .* differ only in case"):
        write_dataset(release.cases, release.dataset, tmp_path / "raw", num_processes=1)
    assert not (tmp_path / "raw").exists()


def test_labels_by_name(tmp_path: Path, table_rows: list[dict[str, str]]) -> None:
    table = write_csv(tmp_path / "t.csv", table_rows)
    release = read("table", table, labels=["enhancing=4", "necrosis=1"])
    assert release.dataset.labels == {"background": 0, "necrosis": 1, "enhancing": 2}
    assert by_name(release)["S1"].masks[0].values == {1: 1, 4: 2}


def test_one_spelling_or_another_is_one_series_and_an_unknown_one_is_told(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.mha")
    rows = [
        {"subject": "a", "series": "T2", "path": "a.mha"},
        {"subject": "b", "series": "t2w", "path": "b.mha"},
        {"subject": "b", "series": "Ktrans map", "path": "c.mha"},
    ]
    release = read("table", write_csv(tmp_path / "t.csv", rows))
    assert release.dataset.series == ("T2w", "Ktrans map") and release.dataset.labels == {}
    assert any("unknown series, kept as named: Ktrans map" in line for line in release.notes)


def test_visits_of_a_patient(tmp_path: Path) -> None:
    write(tmp_path / "a.mha")
    rows = [{"subject": f"p1_{visit}", "series": "T2", "path": "a.mha", "patient": "p1"} for visit in (1, 2)]
    assert [case.patient for case in read("table", write_csv(tmp_path / "t.csv", rows)).cases] == ["p1", "p1"]


def test_a_subject_with_a_missing_file_is_left_out(tmp_path: Path, table_rows: list[dict[str, str]]) -> None:
    table_rows[1]["path"] = "S1/nowhere.nii.gz"
    release = read("table", write_csv(tmp_path / "t.csv", table_rows))
    assert list(by_name(release)) == ["S2"]
    assert "t.csv line 3: path S1/nowhere.nii.gz does not exist" in release.left_out["S1"]
    table_rows[1]["path"] = "S1/functional.nii.gz"
    table_rows[0]["mask"] = "S1/nowhere.nii.gz"
    assert "line 2: mask S1/nowhere" in read("table", write_csv(tmp_path / "t.csv", table_rows)).left_out["S1"]
    assert release.dataset.series == ("ADC",)


def as_links(release: Path, store: Path) -> Path:
    """The release with every file a link into the store, as git-annex has it, and a link to it in place of its folder."""
    for number, path in enumerate(sorted(path for path in release.rglob("*") if path.is_file())):
        key = store / ".git/annex/objects" / str(number) / f"KEY{''.join(path.suffixes)}"
        key.parent.mkdir(parents=True)
        path.rename(key)
        path.symlink_to(key)
    link = store / "release"
    link.symlink_to(release)
    return link


@pytest.mark.parametrize(
    ("fixture", "format_name"),
    [("task01", "bt_msd"), ("prostate158", "prostate158"), ("picai", "picai"), ("breast", "breast2023"), ("bids", "bids")],
)
def test_releases_of_links_are_read_as_those_of_files(
    tmp_path: Path, request: pytest.FixtureRequest, fixture: str, format_name: str
) -> None:
    release = request.getfixturevalue(fixture)
    before = read(format_name, release)
    link = as_links(release, tmp_path / "store")
    after = read(format_name, link)
    assert [case.identifier for case in after.cases] == [case.identifier for case in before.cases]
    for old, new in zip(before.cases, after.cases, strict=True):
        assert list(new.images) == list(old.images) and len(new.masks) == len(old.masks)
        assert new.diagnoses == old.diagnoses


@pytest.mark.parametrize(
    ("fixture", "format_name", "gone"),
    [
        ("task01", "bt_msd", "imagesTr/BRATS_001.nii.gz"),
        ("task01", "bt_msd", "labelsTr/BRATS_001.nii.gz"),
        ("prostate158", "prostate158", "prostate158_train/train/024/dwi.nii.gz"),
        ("breast", "breast2023", "images/P002/DWI.nii.gz"),
        ("bids", "bids", "sub-01/ses-pre/dwi/sub-01_ses-pre_dwi.nii.gz"),
        ("bids", "bids", "sub-02/anat/sub-02_T2w.nii"),
    ],
)
def test_a_series_that_was_not_fetched_is_no_missing_series(
    tmp_path: Path, request: pytest.FixtureRequest, fixture: str, format_name: str, gone: str
) -> None:
    """Zeros in its place would pass for a patient who does not have it."""
    release = request.getfixturevalue(fixture)
    as_links(release, tmp_path / "store")
    (release / gone).resolve().unlink()
    found = read(format_name, release)
    report = write_dataset(found.cases, found.dataset, tmp_path / "raw", num_processes=1, left_out=found.left_out)
    assert [why for why in report.left_out.values() if "git annex get" in why and str(release / gone) in why], report.left_out


def test_a_table_may_name_links_and_says_which_was_not_fetched(tmp_path: Path, table_rows: list[dict[str, str]]) -> None:
    table = write_csv(tmp_path / "t.csv", table_rows)
    before = converted(read("table", table), tmp_path / "raw")
    for name in ("S1", "S2"):
        (tmp_path / name).rename(tmp_path / f"there_{name}")
        (tmp_path / name).symlink_to(f"there_{name}")
    linked = tmp_path / "there_S1/t2.nrrd"
    linked.rename(tmp_path / "KEY")
    linked.symlink_to(tmp_path / "KEY")
    after = converted(read("table", table), tmp_path / "raw2")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)
    linked.unlink()
    linked.symlink_to(".git/annex/objects/KEY/KEY")
    release = read("table", table)
    assert list(by_name(release)) == ["S2"]
    assert "S1/t2.nrrd is a link of git-annex" in release.left_out["S1"] and "datalad get" in release.left_out["S1"]


def test_masks_behind_linked_folders_are_found(bids: Path, tmp_path: Path) -> None:
    before = read("bids", bids)
    (bids / "derivatives/manual").rename(tmp_path / "manual")
    (bids / "derivatives/manual").symlink_to(tmp_path / "manual")
    (bids / "sub-02").rename(tmp_path / "sub-02")
    (bids / "sub-02").symlink_to(tmp_path / "sub-02")
    assert read("bids", bids) == before and all(case.masks for case in before.cases)


def test_a_picture_is_no_mask(tmp_path: Path, table_rows: list[dict[str, str]]) -> None:
    write(tmp_path / "S1" / "lesion.nii.gz", np.full(SHAPE, 0.5, np.float32))
    assert "is no mask" in read("table", write_csv(tmp_path / "t.csv", table_rows)).left_out["S1"]


@pytest.mark.parametrize(
    ("row", "change", "message"),
    [
        (0, {"subject": ""}, r"t\.csv line 2: 'subject' is empty"),
        (0, {"subject": "S 1/x"}, r"line 2: subject 'S 1/x' cannot be a file name"),
        (1, {"series": "T2"}, r"line 3: subject S1 has the series T2w in line 2 already"),
        (0, {"series": ""}, r"line 2: 'series' is empty, and S1/t2.nrrd is no DICOM folder"),
        (1, {"volume": "last"}, r"line 3: 'volume' is 'last'"),
        (1, {"mask": "S1/t2.nrrd"}, r"line 3: 'mask' is 'S1/t2.nrrd', but 'S1/lesion.nii.gz' in line 2"),
        (0, {"class": "worse"}, r"line 3: 'class' is 'bad', but 'worse' in line 2 for the same subject S1"),
        (2, {"split": "holdout"}, r"line 4: 'split' is 'holdout'; known are"),
        (2, {"path": ""}, r"line 4: 'path' is empty"),
    ],
)
def test_mistakes_in_a_table_are_told_with_their_line(
    tmp_path: Path, table_rows: list[dict[str, str]], row: int, change: dict[str, str], message: str
) -> None:
    table_rows[row] |= change
    with pytest.raises(UserError, match=message):
        read("table", write_csv(tmp_path / "t.csv", table_rows))


def test_all_mistakes_in_a_table_are_told_at_once(tmp_path: Path, table_rows: list[dict[str, str]]) -> None:
    table_rows[0]["subject"], table_rows[2]["split"] = "", "holdout"
    with pytest.raises(UserError, match=r"line 2: 'subject' is empty.*; .*line 4: 'split' is 'holdout'"):
        read("table", write_csv(tmp_path / "t.csv", table_rows))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; it should have the columns subject, series, path"),
        (b"subject,path\nS1,a.mha\n", "lacks the column series; found subject, path"),
        (b"patient,FLAIR,T1w\nS1,a.mha,b.mha\n", "lacks the columns subject, series, path; .* expected a row a file.*conversion"),
        (b"subject,series,path\nS1,T2,\n", "line 2: 'path' is empty; .*take the row out where there is nothing"),
        (b"subject,series,path\n", "no usable case"),
        (b"subject,series,path\nS1,T2,a.mha,extra\n", "line 2: has 4 values, but the header has 3"),
        (b"subject,series,path,path\nS1,T2,a.mha,b.mha\n", "the column path twice"),
        (b"subject,series,path\nS\xe41,T2,a.mha\n", "UTF-8"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read("table", path)


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('a,b\n\n"two\nlines",1\n,,\n3,n/a\n')
    rows = read_sheet(path, ("a", "B"))
    assert [(row.line, row.get("A"), row.get("b")) for row in rows] == [(4, "two\nlines", "1"), (6, "3", "")]


@pytest.mark.parametrize("flag", ["edema", "edema=", "=1", "edema=0", "edema=1.5", "background=1"])
def test_malformed_labels_are_refused(flag: str) -> None:
    with pytest.raises(UserError, match="-labels"):
        parse_labels([flag])


def test_labels_become_consecutive_in_the_order_of_their_values() -> None:
    labels, mapping = consecutive({"b": 7, "a": 2})
    assert labels == {"background": 0, "a": 1, "b": 2} and mapping == {2: 1, 7: 2}


# --- BIDS ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    """sub-01 with two sessions, sub-02 without; a diffusion series with b-values; lesion masks."""
    folder = tmp_path / "bids"
    pre = folder / "sub-01/ses-pre"
    write(pre / "anat/sub-01_ses-pre_T1w.nii.gz")
    write(pre / "anat/sub-01_ses-pre_ce-gad_T1w.nii.gz")
    write(pre / "anat/sub-01_ses-pre_run-2_FLAIR.nii.gz")
    write(pre / "anat/sub-01_ses-pre_run-1_FLAIR.nii.gz")
    write(pre / "anat/sub-01_ses-pre_part-phase_T2starw.nii.gz")
    write(pre / "dwi/sub-01_ses-pre_dwi.nii.gz", np.stack([np.full(SHAPE, value, np.int16) for value in (1, 2, 3)]))
    (pre / "dwi/sub-01_ses-pre_dwi.bval").write_text("0 1000 1000\n")
    write(folder / "sub-01/ses-post/anat/sub-01_ses-post_T1w.nii.gz")
    write(folder / "sub-02/anat/sub-02_T2w.nii")
    write(folder / "sub-02/anat/sub-02_acq-cor_T2w.nii")
    write(folder / "sub-02/func/sub-02_task-rest_bold.nii.gz")
    for case in ("sub-01/ses-pre", "sub-01/ses-post", "sub-02"):
        name = case.replace("/", "_")
        write(folder / "derivatives/manual" / case / f"anat/{name}_label-lesion_mask.nii.gz", mask((1, 1)))
    write_csv(
        folder / "participants.tsv",
        [{"participant_id": "sub-01", "group": "patient"}, {"participant_id": "sub-02", "group": "n/a"}],
        "\t",
    )
    return folder


def test_bids(bids: Path) -> None:
    release = read("bids", bids, class_column="group")
    cases = by_name(release)
    assert {name: (case.patient, sorted(case.images)) for name, case in cases.items()} == {
        "sub-01_ses-post": ("sub-01", ["T1w"]),
        "sub-01_ses-pre": ("sub-01", ["DWI", "FLAIR", "T1ce", "T1w"]),
        "sub-02": ("sub-02", ["T2w"]),
    }
    images = cases["sub-01_ses-pre"].images
    assert images["T1ce"].path.name == "sub-01_ses-pre_ce-gad_T1w.nii.gz"
    assert images["FLAIR"].path.name == "sub-01_ses-pre_run-1_FLAIR.nii.gz"
    assert images["DWI"].index == 1  # the first of the highest b-value
    assert cases["sub-02"].images["T2w"].path.name == "sub-02_T2w.nii"
    assert cases["sub-01_ses-post"].diagnoses[0].name == "patient" and not cases["sub-02"].diagnoses
    assert release.dataset.series == ("T1w", "T1ce", "T2w", "FLAIR", "DWI")
    assert release.dataset.labels == {"background": 0, "lesion": 1}
    assert len(release.doubts) == 2 and "run-1_FLAIR.nii.gz, not sub-01_ses-pre_run-2_FLAIR" in release.doubts[0]
    with pytest.raises(UserError, match="run-2_FLAIR"):
        read("bids", bids, strict=True)


def test_bids_is_written(bids: Path, tmp_path: Path) -> None:
    write(bids / "sub-01/ses-pre/dwi/sub-01_ses-pre_dwi.nii.gz", np.stack([np.arange(60, dtype=np.int16).reshape(SHAPE)] * 3))
    files = converted(read("bids", bids), tmp_path / "raw")
    assert np.array_equal(files["imagesTr/sub-01_ses-pre_0004.nii.gz"], np.arange(60).reshape(SHAPE))
    assert np.array_equal(files["labelsTr/sub-02.nii.gz"], mask((1, 1)))


def test_masks_of_several_kinds_need_a_choice(bids: Path) -> None:
    write(bids / "derivatives/fs/sub-02/anat/sub-02_desc-aparc_dseg.nii.gz", mask((0, 2), (1, 5)))
    with pytest.raises(UserError, match=r"kinds desc-aparc_dseg \(1\), label-lesion_mask \(3\); choose with -mask"):
        read("bids", bids)
    release = read("bids", bids, mask="desc-aparc_dseg")
    assert release.dataset.labels == {"background": 0, "label_2": 1, "label_5": 2}
    assert [name for name, case in by_name(release).items() if case.masks] == ["sub-02"]
    assert read("bids", bids, mask="none").dataset.labels == {}


def test_diffusion_without_b_values(bids: Path) -> None:
    bval = bids / "sub-01/ses-pre/dwi/sub-01_ses-pre_dwi.bval"
    bval.unlink()
    release = read("bids", bids)
    assert "DWI" not in by_name(release)["sub-01_ses-pre"].images
    assert any("sub-01_ses-pre: no DWI" in line and bval.name in line for line in release.doubts)
    write(bids / "sub-01/ses-pre/dwi/sub-01_ses-pre_dwi.nii.gz")
    assert by_name(read("bids", bids))["sub-01_ses-pre"].images["DWI"].index is None


def test_a_class_column_that_is_not_there(bids: Path) -> None:
    with pytest.raises(UserError, match=r"participants\.tsv lacks the column diagnosis; found participant_id, group"):
        read("bids", bids, class_column="diagnosis")


def with_runs(folder: Path, masks: Mapping[str, int]) -> Path:
    """sub-01 with two runs of T2w, and `masks`: entities of a mask's name to the slice that it fills."""
    for run in (1, 2):
        write(folder / f"sub-01/anat/sub-01_run-{run}_T2w.nii.gz", 100 * run)
    for name, z in masks.items():
        write(folder / f"derivatives/manual/sub-01/anat/sub-01_{name}_label-lesion_mask.nii.gz", mask((z, 1)))
    return folder


def test_the_image_is_of_the_run_that_the_mask_names(tmp_path: Path) -> None:
    release = read("bids", with_runs(tmp_path / "bids", {"run-02": 1}))
    files = converted(release, tmp_path / "raw")
    assert files["imagesTr/sub-01_0000.nii.gz"].min() == 200
    assert "T2w is sub-01_run-2_T2w.nii.gz, not sub-01_run-1_T2w.nii.gz" in release.doubts[0]


def test_of_masks_of_two_runs_that_of_the_image_is_taken(tmp_path: Path) -> None:
    release = read("bids", with_runs(tmp_path / "bids", {"run-2": 2, "run-1": 1, "space-MNI152_run-1": 0}))
    files = converted(release, tmp_path / "raw")
    assert files["imagesTr/sub-01_0000.nii.gz"].min() == 100
    assert np.array_equal(files["labelsTr/sub-01.nii.gz"], mask((1, 1)))
    assert any("the mask is sub-01_run-1_label" in line for line in release.doubts)


@pytest.mark.parametrize(
    ("name", "said"), [("run-3", "another run"), ("acq-cor_run-1", "another run"), ("space-MNI152", "MNI152")]
)
def test_a_mask_of_another_image_leaves_the_case_out(tmp_path: Path, name: str, said: str) -> None:
    folder = with_runs(tmp_path / "bids", {name: 1})
    write(folder / "sub-02/anat/sub-02_T2w.nii.gz")
    write(folder / "sub-02/anat/sub-02_space-T2w_label-lesion_mask.nii.gz", mask((1, 1)))  # beside its image
    release = read("bids", folder)
    assert list(by_name(release)) == ["sub-02"] and by_name(release)["sub-02"].masks
    assert said in release.left_out["sub-01"] and f"sub-01_{name}_label-lesion_mask" in release.left_out["sub-01"]


def test_a_series_of_another_run_than_the_mask_is_told(tmp_path: Path) -> None:
    folder = with_runs(tmp_path / "bids", {"run-2": 1})
    write(folder / "sub-01/anat/sub-01_run-1_FLAIR.nii.gz")
    assert any("FLAIR is sub-01_run-1_FLAIR.nii.gz, of another run than the mask" in line for line in read("bids", folder).doubts)


def test_what_looks_like_a_mask_and_is_none_of_bids_is_named(bids: Path) -> None:
    write(bids / "sub-02/anat/sub-02_T2w_lesion_seg.nii.gz", mask((1, 1)))
    write(bids / "derivatives/manual/sub-09/anat/sub-09_label-lesion_mask.nii.gz", mask((1, 1)))
    write(bids / "derivatives/fs/sub-02/anat/sub-02_label-GM_probseg.nii.gz", mask((1, 1)))
    (line,) = read("bids", bids).notes
    assert "probseg" not in line
    assert "sub-02_T2w_lesion_seg.nii.gz" in line and "sub-09_label-lesion_mask.nii.gz" in line


def write_dwi(folder: Path, entity: str, b_values: str, num_volumes: int | None = None) -> Path:
    """Volume i holds i, under sub-01."""
    path = folder / f"sub-01/dwi/sub-01_{entity}_dwi.nii.gz"
    number = num_volumes or len(b_values.split())
    write(path, np.stack([np.full(SHAPE, i, np.int16) for i in range(number)]))
    path.with_name(f"sub-01_{entity}_dwi.bval").write_text(b_values)
    return path


def test_dwi_is_the_highest_b_value_of_the_session(bids: Path) -> None:
    write(bids / "sub-01/anat/sub-01_T2w.nii.gz")
    for entity, b_values in (("acq-b0", "0 5"), ("acq-b1000", "0 1000"), ("acq-b800", "0 800"), ("acq-odd", "0 3000")):
        write_dwi(bids, entity, b_values, 3 if entity == "acq-odd" else None)
    release = read("bids", bids)
    chosen = by_name(release)["sub-01"].images["DWI"]
    assert (chosen.path.name, chosen.index) == ("sub-01_acq-b1000_dwi.nii.gz", 1)
    said = "\n".join(line for line in release.doubts if line.startswith("sub-01: "))
    assert "acq-odd_dwi.bval holds 2 b-values, but sub-01_acq-odd_dwi.nii.gz has 3 volumes" in said
    assert "not sub-01_acq-b800" in said


@pytest.mark.parametrize("b_values", ["0 0", "5", "nan 1000", "-1 1000", "b"])
def test_volumes_without_diffusion_weighting_are_no_dwi(bids: Path, b_values: str) -> None:
    write(bids / "sub-01/anat/sub-01_T2w.nii.gz")
    write_dwi(bids, "dir-PA", b_values)
    release = read("bids", bids)
    assert sorted(by_name(release)["sub-01"].images) == ["T2w"]
    assert any("sub-01: no DWI from sub-01_dir-PA_dwi.nii.gz" in line for line in release.doubts)


def test_a_file_called_b0_without_b_values_is_no_dwi(bids: Path) -> None:
    write(bids / "sub-02/dwi/sub-02_acq-b0_dwi.nii.gz")
    release = read("bids", bids)
    assert "DWI" not in by_name(release)["sub-02"].images and any("called b = 0" in line for line in release.doubts)


def test_participants_are_found_by_number_and_others_are_named(bids: Path) -> None:
    write(bids / "sub-003/anat/sub-003_T2w.nii.gz")
    rows = [{"participant_id": name, "group": group} for name, group in (("1", "a"), ("sub-02", "NA"), ("17", "b"))]
    write_csv(bids / "participants.tsv", rows, "\t")
    release = read("bids", bids, class_column="group")
    classes = {name: [one.name for one in case.diagnoses] for name, case in by_name(release).items()}
    assert classes == {"sub-01_ses-post": ["a"], "sub-01_ses-pre": ["a"], "sub-02": [], "sub-003": []}
    said = "\n".join(release.doubts)
    assert "by number: 1 is sub-01" in said and "rows of no subject: 17" in said and "without a row: sub-003" in said


def test_a_subject_in_two_rows_is_refused(bids: Path) -> None:
    rows = [{"participant_id": name, "group": group} for name, group in (("01", "a"), ("1", "b"))]
    write_csv(bids / "participants.tsv", rows, "\t")
    with pytest.raises(UserError, match="line 3: 1 is sub-01, which line 2 is about"):
        read("bids", bids, class_column="group")


@pytest.mark.parametrize("rows", ["", "sub-01\tn/a\n", "sub-17\ta\n"])
def test_participants_without_any_class_are_refused(bids: Path, rows: str) -> None:
    (bids / "participants.tsv").write_text("participant_id\tgroup\n" + rows)
    with pytest.raises(UserError, match=r"participants\.tsv tells the class \(group\) of none of the 2 subjects"):
        read("bids", bids, class_column="group")


# --- all of them -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format_name", FORMATS)
def test_another_layout_is_described(tmp_path: Path, format_name: str) -> None:
    with pytest.raises(UserError, match="nowhere"):
        read(format_name, tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="there is holiday.jpg" if format_name != "table" else "is not a file"):
        read(format_name, tmp_path)


def test_a_release_that_may_not_be_read(task01: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # root, who may run the tests, reads everything
    with pytest.raises(UserError, match="may not be read by this user"):
        read("bt_msd", task01)


@pytest.mark.parametrize(
    "arguments, message",
    [(["bt_msd", "-task", "tumor"], "unrecognized arguments: -task"), (["brats"], "invalid choice: 'brats' .*bt_msd")],
)
def test_an_option_of_another_format_is_refused(
    task01: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", arguments[0], "-i", str(task01), "-d", "1", *arguments[1:]])
    assert ended.value.code == 2 and re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("dataset_id", "name"), [(0, "X"), (1000, "X"), (1, "a b"), (1, "../x")])
def test_names_nnunet_cannot_use_are_refused(task01: Path, dataset_id: int, name: str) -> None:
    with pytest.raises(UserError, match=r"-d|-name"):
        read_release("bt_msd", task01, dataset_id, name, {})


@pytest.mark.parametrize(("format_name", "task"), [("prostate158", "lesion"), ("picai", "tumor")])
def test_unknown_tasks_are_refused(tmp_path: Path, format_name: str, task: str) -> None:
    with pytest.raises(UserError, match=f"-task '{task}' is unknown; choose from"):
        read(format_name, tmp_path, task=task)
