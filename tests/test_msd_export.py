"""An archive holds what was predicted, placed as the test images are; one bad case, and there is no archive."""

import gzip
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_csm.dataset_conversion import to_msd
from nnunet_csm.errors import UserError
from nnunet_csm.raw.volumes import sha256

SHAPE = (5, 4, 3)  # x, y, z, as in a NIfTI file
NAMES = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
CASES = ("BRATS_485", "BRATS_486", "BRATS_490")


def rotation(z: float, x: float) -> np.ndarray:
    turn_z = np.array([[np.cos(z), -np.sin(z), 0], [np.sin(z), np.cos(z), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(x), -np.sin(x)], [0, np.sin(x), np.cos(x)]])
    return turn_z @ turn_x


def affine_of(directions: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions * (0.7, 1.3, 2.9)
    affine[:3, 3] = (-81.3, 12.7, 33.1)
    return affine


AFFINES = {
    "as BraTS": np.diag([-1.0, -1.0, 1.0, 1.0]),
    "oblique": affine_of(rotation(0.3, -0.2)),
    "mirrored": affine_of(rotation(0.3, -0.2) * (-1, 1, 1)),
    "turned by half": affine_of(rotation(np.pi - 1e-4, 1e-4)),  # where the quaternion in a header is least exact
    "axes swapped": affine_of(np.array([[0, 0, 1.0], [-1, 0, 0], [0, -1, 0]])),
}


def write_image(path: Path, affine: np.ndarray, shape: tuple[int, ...] = (*SHAPE, 2), codes: tuple[int, int] = (1, 1)) -> None:
    image = nibabel.Nifti1Image(np.zeros(shape, np.float32), affine)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"a name that must not travel"
    nibabel.save(image, path)


def predict(image: Path, prediction: Path, labels: np.ndarray) -> None:
    """Write `labels` (z, y, x) as nnU-Net does: what its converter makes of an image, through its reader and writer."""
    source = sitk.ReadImage(str(image))
    num_axes = source.GetDimension()
    result = sitk.GetImageFromArray(labels)
    result.SetSpacing(source.GetSpacing()[:3])
    result.SetOrigin(source.GetOrigin()[:3])
    result.SetDirection(np.reshape(source.GetDirection(), (num_axes, num_axes))[:3, :3].ravel().tolist())
    sitk.WriteImage(result, str(prediction), True)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


class Release:
    """A task of the decathlon and predictions for it."""

    def __init__(self, root: Path, name: str = "Task01_BrainTumour", affine: np.ndarray | None = None, axes: int = 4) -> None:
        self.task, self.predictions, self.archive = root / name, root / f"out_{name}", root / "submission.zip"
        (self.task / "imagesTs").mkdir(parents=True)
        self.predictions.mkdir()
        self.labels: dict[str, np.ndarray] = {}
        rng = np.random.default_rng(7)
        for case in CASES:
            write_image(self.image(case), AFFINES["oblique"] if affine is None else affine, (*SHAPE, 2)[:axes])
            self.labels[case] = rng.integers(0, 4, SHAPE[::-1]).astype(np.uint8)
            predict(self.image(case), self.prediction(case), self.labels[case])
        write_json(self.task / "dataset.json", {"labels": NAMES, "test": [f"./imagesTs/{case}.nii.gz" for case in CASES]})
        self.write_labels({name: int(value) for value, name in NAMES.items()})
        write_json(self.predictions / "plans.json", {"plans_name": "nnUNetCSMPlans", "dataset_name": "Dataset001_BrainTumour"})

    def image(self, case: str) -> Path:
        return self.task / "imagesTs" / f"{case}.nii.gz"

    def prediction(self, case: str) -> Path:
        return self.predictions / f"{case}.nii.gz"

    def write_labels(self, labels: Mapping[str, object], **more: object) -> None:
        write_json(self.predictions / "dataset.json", {"labels": labels, **more})

    def export(self, **options: object) -> list[to_msd.Case]:
        return to_msd.write([self.predictions], self.archive, [self.task], **options)

    def unpacked(self) -> dict[str, nibabel.Nifti1Image]:
        with zipfile.ZipFile(self.archive) as file:
            return {name: nibabel.Nifti1Image.from_bytes(gzip.decompress(file.read(name))) for name in file.namelist()}

    def outputs(self) -> list[str]:
        """Everything beside task and predictions, hidden files too."""
        return sorted(path.name for path in self.archive.parent.iterdir() if path.is_file())


@pytest.fixture
def release(tmp_path: Path) -> Release:
    return Release(tmp_path)


# --- the way there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [3, 4])
@pytest.mark.parametrize("affine", AFFINES.values(), ids=AFFINES)
def test_what_comes_out_is_what_was_predicted_at_the_place_of_the_image(tmp_path: Path, affine: np.ndarray, axes: int) -> None:
    release = Release(tmp_path, affine=affine, axes=axes)
    release.export()
    with zipfile.ZipFile(release.archive) as file:
        assert file.testzip() is None
        file.extractall(tmp_path / "unpacked")
    assert sorted(release.unpacked()) == [f"Task01_BrainTumour/{case}.nii.gz" for case in CASES]
    for case, labels in release.labels.items():
        path = tmp_path / "unpacked" / "Task01_BrainTumour" / f"{case}.nii.gz"
        image, source = nibabel.Nifti1Image.from_filename(path), nibabel.Nifti1Image.from_filename(release.image(case))
        assert np.array_equal(np.asanyarray(image.dataobj).T, labels) and image.get_data_dtype() == np.uint8
        assert np.array_equal(image.affine, source.affine)
        for code in ("qform_code", "sform_code", "xyzt_units"):
            assert image.header[code] == source.header[code]
        assert b"must not travel" not in image.header.binaryblock
        # and as the decathlon's scorer reads it
        read, expected = sitk.ReadImage(str(path)), sitk.ReadImage(str(release.image(case)))
        assert np.array_equal(sitk.GetArrayFromImage(read), labels)
        assert read.GetSize() == expected.GetSize()[:3]
        assert read.GetSpacing() == expected.GetSpacing()[:3] and read.GetOrigin() == expected.GetOrigin()[:3]
        directions = np.reshape(expected.GetDirection(), (axes, axes))[:3, :3]
        assert np.array_equal(np.reshape(read.GetDirection(), (3, 3)), directions)


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2), (3, 1)])
def test_codes_of_the_source_header_are_kept(release: Release, codes: tuple[int, int]) -> None:
    # with no code at all SimpleITK and nibabel disagree on the place
    for case in CASES:
        write_image(release.image(case), AFFINES["oblique"], codes=codes)
        predict(release.image(case), release.prediction(case), release.labels[case])
    release.export()
    for name, image in release.unpacked().items():
        assert (image.header["qform_code"], image.header["sform_code"]) == codes
        assert np.array_equal(np.asanyarray(image.dataobj).T, release.labels[Path(name).name.removesuffix(".nii.gz")])


def test_volumes_are_those_of_the_prediction(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    cases = release.export()
    for case in cases:
        for value, name in list(NAMES.items())[1:]:
            voxels = int((release.labels[case.name] == int(value)).sum())
            assert case.volumes_ml[name] == pytest.approx(voxels * 0.7 * 1.3 * 2.9 / 1000, rel=1e-6)
    printed = capsys.readouterr().out
    assert all(case in printed for case in CASES)


def test_labels_that_are_never_predicted_are_spoken_of(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    for case in CASES:
        predict(release.image(case), release.prediction(case), np.minimum(release.labels[case], 0 if case == CASES[1] else 2))
    release.export()
    printed = capsys.readouterr().out
    assert "labels that no case has: enhancing tumour" in printed
    assert f"1 without any foreground: {CASES[1]}" in printed


def test_several_tasks_share_an_archive(tmp_path: Path) -> None:
    first, second = Release(tmp_path), Release(tmp_path, "Task04_Hippocampus", axes=3)
    to_msd.write([first.predictions, second.predictions], first.archive, [first.task, second.task])
    assert set(first.unpacked()) == {f"{task.task.name}/{case}.nii.gz" for task in (first, second) for case in CASES}


def test_the_same_predictions_give_the_same_archive(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    release.export()
    before = release.archive.read_bytes()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    release.export(overwrite=True)
    assert release.archive.read_bytes() == before


def test_the_manifest_says_where_the_archive_comes_from(release: Release) -> None:
    release.export()
    manifest = json.loads((release.archive.parent / "submission.zip.manifest.json").read_text())
    assert manifest["sha256"] == sha256(release.archive)
    assert manifest["tasks"][0]["plans"] == "nnUNetCSMPlans" and manifest["tasks"][0]["dataset"] == "Dataset001_BrainTumour"
    hashes = {case["name"]: case["prediction_sha256"] for case in manifest["cases"]}
    assert hashes == {case: sha256(release.prediction(case)) for case in CASES}
    assert {"nnunet_csm", "nnunetv2"} <= set(manifest["software"])


# --- labels ------------------------------------------------------------------------------------------------------------------

SHUFFLED = {"background": 0, "enhancing tumour": 1, "edema": 2, "Non-Enhancing  Tumor": 3}
TO_TASK = np.array([0, 3, 1, 2], np.uint8)


@pytest.mark.parametrize("given", ["beside the predictions", "a file", "a folder", "a dataset ID"])
def test_labels_are_matched_by_name(release: Release, given: str, request: pytest.FixtureRequest) -> None:
    options = {}
    if given == "beside the predictions":
        release.write_labels(SHUFFLED)
    else:
        folders = request.getfixturevalue("nnunet_folders")
        folder = folders.raw / "Dataset077_Shuffled"
        folder.mkdir()
        write_json(folder / "dataset.json", {"labels": SHUFFLED})
        options["labels_from"] = {"a file": [str(folder / "dataset.json")], "a folder": [str(folder)], "a dataset ID": ["77"]}[
            given
        ]
    release.export(**options)
    for name, image in release.unpacked().items():
        labels = release.labels[Path(name).name.removesuffix(".nii.gz")]
        assert np.array_equal(np.asanyarray(image.dataobj).T, TO_TASK[labels])


@pytest.mark.parametrize("how", ["no dataset.json", "the task's own", "regions"])
def test_values_that_are_the_tasks_own_are_kept(release: Release, how: str) -> None:
    options = {}
    if how == "no dataset.json":
        (release.predictions / "dataset.json").unlink()
    elif how == "the task's own":
        release.write_labels({"background": 0, "unheard of": 1})
        options["labels_from"] = [str(release.task)]
    else:
        regions = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}
        release.write_labels(regions, regions_class_order=[1, 2, 3])
    release.export(**options)
    for name, image in release.unpacked().items():
        assert np.array_equal(np.asanyarray(image.dataobj).T, release.labels[Path(name).name.removesuffix(".nii.gz")])


@pytest.mark.parametrize(
    ("labels", "more", "words"),
    [
        ({"background": 0, "edema": 1, "necrosis": 2}, {}, "label 'necrosis' .* not in .*1 edema.*-labels_from"),
        ({"background": 0, "edema": 1, "core": [2, 3]}, {"regions_class_order": [1, 4]}, r"regions_class_order .*\[4\]"),
        ({"background": 0, "edema": "one"}, {}, "expected a whole number"),
        ({"background": 0, "edema": 1, "EDEMA": 2}, {}, "a name or a value twice"),
        ({"background": 0, "edema": 1, "necrosis": 1}, {}, "a name or a value twice"),
    ],
)
def test_labels_that_cannot_be_matched_are_refused(
    release: Release, labels: dict[str, object], more: dict[str, object], words: str
) -> None:
    release.write_labels(labels, **more)
    with pytest.raises(UserError, match=words):
        release.export()
    assert release.outputs() == []


# --- bad cases ---------------------------------------------------------------------------------------------------------------


def change_header(release: Release, change: Callable[[nibabel.Nifti1Image], nibabel.Nifti1Image]) -> None:
    path = release.prediction(CASES[1])
    image = nibabel.Nifti1Image.from_filename(path)
    image = nibabel.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    nibabel.save(change(image), path)


def with_voxels(convert: Callable[[np.ndarray], np.ndarray]) -> Callable[[Release], None]:
    def change(image: nibabel.Nifti1Image) -> nibabel.Nifti1Image:
        voxels = convert(np.asanyarray(image.dataobj).copy())
        return nibabel.Nifti1Image(voxels, image.affine)

    return lambda release: change_header(release, change)


def moved(matrix: np.ndarray) -> Callable[[Release], None]:
    return lambda release: change_header(release, lambda image: nibabel.Nifti1Image(image.dataobj, image.affine @ matrix))


def one_voxel(value: float, dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    def convert(voxels: np.ndarray) -> np.ndarray:
        voxels = voxels.astype(dtype)
        voxels[1, 2, 1] = value
        return voxels

    return convert


def flip_a_bit(release: Release) -> None:
    """Damage that gzip's checksum alone can tell: a stored block holds the voxels as they are."""
    path = release.prediction(CASES[1])
    content = bytearray(gzip.compress(gzip.decompress(path.read_bytes()), compresslevel=0))
    content[-20] ^= 1
    path.write_bytes(content)


def put_a_folder_there(release: Release) -> None:
    release.prediction(CASES[1]).unlink()
    release.prediction(CASES[1]).mkdir()


def put_a_pipe_there(release: Release) -> None:
    release.image(CASES[1]).unlink()
    os.mkfifo(release.image(CASES[1]))


def shift_by(x: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[0, 3] = x
    return matrix


BAD: dict[str, tuple[Callable[[Release], object], str]] = {
    "missing": (lambda r: r.prediction(CASES[1]).unlink(), "BRATS_486.nii.gz is missing; .*-leave_out BRATS_486"),
    "zero bytes": (lambda r: r.prediction(CASES[1]).write_bytes(b""), "BRATS_486.nii.gz: cannot be read"),
    "truncated": (
        lambda r: r.prediction(CASES[1]).write_bytes(r.prediction(CASES[1]).read_bytes()[:-30]),
        "BRATS_486.nii.gz: cannot be read",
    ),
    "damaged": (flip_a_bit, "BRATS_486.nii.gz: cannot be read .*CRC"),
    "no NIfTI": (lambda r: r.prediction(CASES[1]).write_bytes(gzip.compress(b"x" * 400)), "BRATS_486.nii.gz: cannot be read"),
    "a folder": (put_a_folder_there, "BRATS_486.nii.gz is missing"),
    "cropped": (with_voxels(lambda v: v[:, :, 1:]), r"BRATS_486.nii.gz has the shape \(2, 4, 5\), but .* has \(3, 4, 5\)"),
    "axes swapped": (with_voxels(lambda v: v.swapaxes(0, 2)), r"BRATS_486.nii.gz has the shape \(5, 4, 3\)"),
    "4-D": (with_voxels(lambda v: v[..., None]), r"BRATS_486.nii.gz has the shape \(1, 3, 4, 5\)"),
    "shifted": (moved(shift_by(0.2)), r"the header of .*BRATS_486.nii.gz puts it 0\.\d+ voxels from .*imagesTs"),
    "mirrored": (moved(np.diag([-1.0, 1, 1, 1])), "the header of .*BRATS_486.nii.gz puts it"),
    "other spacing": (moved(np.diag([1.0, 1.05, 1, 1])), "the header of .*BRATS_486.nii.gz puts it"),
    "unknown label": (with_voxels(one_voxel(4, np.uint8)), r"BRATS_486.nii.gz holds the values 4, but .*\[0, 1, 2, 3\]"),
    "negative": (with_voxels(one_voxel(-1, np.int16)), "BRATS_486.nii.gz holds the values -1"),
    "fraction": (with_voxels(one_voxel(0.5, np.float32)), "BRATS_486.nii.gz holds values that are not whole, 0.5"),
    "NaN": (with_voxels(one_voxel(np.nan, np.float32)), "BRATS_486.nii.gz holds values that are not whole, nan"),
    "infinite": (with_voxels(one_voxel(np.inf, np.float64)), "BRATS_486.nii.gz holds values that are not whole, inf"),
    "complex": (with_voxels(one_voxel(1, np.complex64)), "BRATS_486.nii.gz holds voxels of type complex64"),
    "extra": (
        lambda r: r.prediction("BRATS_001").write_bytes(r.prediction(CASES[1]).read_bytes()),
        "BRATS_001.nii.gz is of no test image of Task01_BrainTumour",
    ),
    "no image": (lambda r: r.image(CASES[1]).unlink(), "imagesTs/BRATS_486.nii.gz is missing, but dataset.json lists it"),
    "unlisted image": (
        lambda r: write_json(r.task / "dataset.json", {"labels": NAMES, "test": [f"./imagesTs/{c}.nii.gz" for c in CASES[::2]]}),
        "imagesTs/BRATS_486.nii.gz is not among the test images",
    ),
    "a pipe as image": (put_a_pipe_there, "imagesTs/BRATS_486.nii.gz is a device, a pipe or a socket"),
    "broken image": (lambda r: r.image(CASES[1]).write_bytes(b"no gzip"), "imagesTs/BRATS_486.nii.gz: cannot be read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_case_is_named_and_nothing_is_written(release: Release, kind: str) -> None:
    spoil, words = BAD[kind]
    spoil(release)
    with pytest.raises(UserError, match=words) as raised:
        release.export()
    assert "1 thing(s) to mend" in str(raised.value)
    assert release.outputs() == []


def test_an_old_archive_outlives_a_bad_case(release: Release) -> None:
    release.archive.write_text("old")
    release.prediction(CASES[0]).unlink()
    with pytest.raises(UserError, match="BRATS_485"):
        release.export(overwrite=True)
    assert release.archive.read_text() == "old"


def test_all_problems_are_counted_and_five_are_shown(release: Release) -> None:
    for number in range(5):
        release.prediction(f"BRATS_00{number}").write_bytes(b"")
    BAD["fraction"][0](release)
    release.prediction(CASES[0]).unlink()
    with pytest.raises(UserError) as raised:
        release.export()
    lines = str(raised.value).splitlines()
    assert "7 thing(s)" in lines[0] and len(lines) == 7 and lines[-1].strip() == "and 2 more"


def test_a_header_off_by_rounding_is_replaced_by_the_images(release: Release, capsys: pytest.CaptureFixture[str]) -> None:
    moved(shift_by(0.01))(release)
    cases = release.export()
    assert [case.shift > to_msd.ROUNDING for case in cases] == [False, True, False]
    assert "1 with a header that differs" in capsys.readouterr().out
    expected = nibabel.Nifti1Image.from_filename(release.image(CASES[1])).affine
    assert np.array_equal(release.unpacked()[f"Task01_BrainTumour/{CASES[1]}.nii.gz"].affine, expected)


def test_whole_numbers_in_another_type_are_label_maps(release: Release) -> None:
    with_voxels(lambda voxels: voxels.astype(np.float64))(release)
    release.export()
    image = release.unpacked()[f"Task01_BrainTumour/{CASES[1]}.nii.gz"]
    assert image.get_data_dtype() == np.uint8 and np.array_equal(np.asanyarray(image.dataobj).T, release.labels[CASES[1]])


def test_what_macos_leaves_behind_is_no_case(release: Release) -> None:
    for folder in (release.task / "imagesTs", release.predictions):
        (folder / f"._{CASES[0]}.nii.gz").write_bytes(b"resource fork")
    release.export()
    assert len(release.unpacked()) == len(CASES)


def test_cases_can_be_left_out_by_name_only(release: Release) -> None:
    release.prediction(CASES[1]).unlink()
    release.export(leave_out=[CASES[1], f"{CASES[2]}.nii.gz"])
    assert list(release.unpacked()) == [f"Task01_BrainTumour/{CASES[0]}.nii.gz"]
    with pytest.raises(UserError, match="-leave_out BRATS_4: no such test image"):
        release.export(leave_out=["BRATS_4"], overwrite=True)


# --- the archive -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("existing", ["submission.zip", "submission.zip.manifest.json"])
def test_nothing_is_overwritten_unasked(release: Release, existing: str) -> None:
    (release.archive.parent / existing).write_text("mine")
    with pytest.raises(UserError, match=rf"{re.escape(existing)} exists.*--overwrite"):
        release.export()
    assert (release.archive.parent / existing).read_text() == "mine" and release.outputs() == [existing]


@pytest.mark.parametrize("step", ["_nifti", "_verify", "software"])
@pytest.mark.parametrize("old", [False, True])
def test_an_interruption_leaves_nothing_new(release: Release, monkeypatch: pytest.MonkeyPatch, step: str, old: bool) -> None:
    if old:
        release.archive.write_text("old")
    done = iter((True, False))
    original = getattr(to_msd, step)

    def interrupted(*arguments: object) -> object:
        if step == "_nifti" and next(done):
            return original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(to_msd, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        release.export(overwrite=True)
    assert release.outputs() == (["submission.zip"] if old else [])
    assert not old or release.archive.read_text() == "old"


def test_a_prediction_that_changes_meanwhile_is_exported_as_it_was_checked(
    release: Release, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = to_msd._nifti
    expected = sha256(release.prediction(CASES[0]))

    def change_then_write(*arguments: Any) -> bytes:
        predict(release.image(CASES[0]), release.prediction(CASES[0]), release.labels[CASES[0]] * 0)
        return original(*arguments)

    monkeypatch.setattr(to_msd, "_nifti", change_then_write)
    case = release.export()[0]
    image = release.unpacked()[case.path_in_archive]
    assert np.array_equal(np.asanyarray(image.dataobj).T, release.labels[CASES[0]]) and case.prediction_sha256 == expected


@pytest.mark.parametrize("damage, message", [("a bit", "CRC"), ("a case", "does not read back as it was written")])
def test_an_archive_that_reads_back_wrongly_is_not_kept(
    release: Release, monkeypatch: pytest.MonkeyPatch, damage: str, message: str
) -> None:
    original = to_msd._write_archive

    def write_then_damage(path: Path, tasks: Any) -> list[to_msd.Case]:
        cases = original(path, tasks)
        content = bytearray(path.read_bytes())
        content[120] ^= 255
        if damage == "a bit":
            path.write_bytes(content)
        else:
            with zipfile.ZipFile(path, "w") as file:
                for case in cases:
                    file.writestr(case.path_in_archive, b"another")
        return cases

    monkeypatch.setattr(to_msd, "_write_archive", write_then_damage)
    with pytest.raises(UserError, match=message):
        release.export()
    assert release.outputs() == []


def test_a_place_that_cannot_be_written_to_is_named(release: Release) -> None:
    (release.archive.parent / "file").write_text("")
    release.archive = release.archive.parent / "file" / "submission.zip"
    with pytest.raises(UserError, match=r"file/submission\.zip: cannot be written"):
        release.export()


def test_arguments_that_do_not_fit_are_refused(release: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "Task03_Liver").symlink_to(release.task)
    to_msd.write([release.predictions], Path("by_name.zip"), [Path("elsewhere/Task03_Liver/")])
    with zipfile.ZipFile("by_name.zip") as file:
        assert {Path(name).parent.name for name in file.namelist()} == {"Task03_Liver"}
    one, tasks, archive = [release.predictions], [release.task], release.archive
    renamed, converted = tmp_path / "brats", tmp_path / "Task09_Spleen"
    renamed.mkdir()
    (converted / "imagesTs").mkdir(parents=True)
    write_json(converted / "dataset.json", {"labels": {"background": 0}, "channel_names": {"0": "CT"}})
    for words, arguments in [
        ("one task for each folder", (one * 2, archive, tasks)),
        ("give each task once", (one * 2, archive, tasks * 2)),
        ("ends in .zip", (one, archive.with_suffix(".tar"), tasks)),
        ("no such folder; give -i", ([tmp_path / "nowhere"], archive, tasks)),
        ("no such folder .looked in .*give -task", (one, archive, [Path("Task02_Heart")])),
        ("named as the task, and 'brats'", (one, archive, [renamed])),
        ("no list of 'test' images", (one, archive, [converted])),
    ]:
        with pytest.raises(UserError, match=words):
            to_msd.write(*arguments)
    with pytest.raises(UserError, match="one task for each folder"):
        release.export(labels_from=["a", "b"])
    with pytest.raises(UserError, match=r"nowhere\.json: no such file; give -labels_from"):
        release.export(labels_from=["nowhere.json"])
    assert release.outputs() == ["by_name.zip", "by_name.zip.manifest.json"]
