"""Names and kinds of files are looked at before a library does: it would end the process, or wait for ever."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_csm import cli
from nnunet_csm.data.diagnoses import read_class_table
from nnunet_csm.dataset_conversion.sheets import read_sheet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.segmentation import evaluate_folder
from nnunet_csm.fingerprint.extraction import case_files
from nnunet_csm.inference.missing import fill_missing
from nnunet_csm.listing import all_below, file_problem, files_in
from nnunet_csm.nnunet import read_json
from nnunet_csm.raw import cases as written_cases
from nnunet_csm.raw.check import check_dataset, check_inputs
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Volume
from nnunet_csm.raw.volumes import read_header, read_volume
from nnunet_csm.raw.writer import write_dataset

LATIN_1 = os.fsdecode(b"caf\xe9")


def save(path: Path, kind: type = np.uint8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels: np.ndarray = np.zeros((3, 5, 4), kind)
    voxels[1] = 1
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(path))
    return path


def latin_1(path: Path) -> str:
    os.rename(save(path.with_name("a_0000.nii.gz")), path.with_name(f"{LATIN_1}_0000.nii.gz"))
    return r"caf\\udce9_0000\.nii\.gz has a name that is not in UTF-8.*rename it"


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return "is a device, a pipe or a socket, expected a file"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "is a device, a pipe or a socket, expected a file"


def folder(path: Path) -> str:
    path.mkdir()
    return "is a folder, expected a file"


def dangling(path: Path) -> str:
    path.symlink_to(path.with_name("nowhere"))
    return "is a link to nothing that can be read"


def loop(path: Path) -> str:
    path.symlink_to(path)
    return "is a link to nothing that can be read"


ODD = pytest.mark.parametrize("odd", [latin_1, pipe, device, folder, dangling, loop])


@ODD
def test_what_cannot_be_read_is_named_before_anything_is_written(tmp_path: Path, odd: Callable[[Path], str]) -> None:
    inputs = tmp_path / "in"
    save(inputs / "b_0000.nii.gz")
    expected = odd(inputs / "a_0000.nii.gz")
    for command in (
        lambda: check_inputs(inputs, ["T2w"], ".nii.gz"),
        lambda: fill_missing(inputs, tmp_path / "out", ["T2w"], ".nii.gz"),
        lambda: evaluate_folder(inputs, inputs, {"labels": {"background": 0, "lesion": 1}}, progress_bar=False),
        lambda: case_files(tmp_path, "in", {"file_ending": ".nii.gz"}, 1),  # type: ignore[arg-type]
    ):
        with pytest.raises(UserError, match=expected):
            command()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@ODD
def test_a_volume_that_is_no_file_is_its_case_s_problem(tmp_path: Path, odd: Callable[[Path], str]) -> None:
    path = tmp_path / "a_0000.nii.gz"
    expected = odd(path)
    path = path if os.path.lexists(path) else next(tmp_path.iterdir())
    with pytest.raises(CaseError, match=expected if odd is not folder else "holds no DICOM image"):
        read_volume(Volume(path))
    with pytest.raises(CaseError, match=expected):
        read_header(path)


def test_what_systems_leave_behind_is_left_aside(tmp_path: Path) -> None:
    kept = save(tmp_path / "a_0000.nii.gz")
    (tmp_path / "._a_0000.nii.gz").write_bytes(b"\0\5\x16\7")
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0")
    assert files_in(tmp_path, ".nii.gz") == [kept]
    assert files_in(tmp_path, "") == [kept]
    assert files_in(tmp_path / "nowhere", ".nii.gz") == []
    assert list(case_files(tmp_path.parent, tmp_path.name, {"file_ending": ".nii.gz"}, 1)) == ["a"]  # type: ignore[arg-type]


def test_the_longest_name_is_taken_and_no_longer_one(tmp_path: Path) -> None:
    path = save(tmp_path / f"{'a' * 248}.nii.gz")
    assert files_in(tmp_path, ".nii.gz") == [path]
    read_volume(Volume(path))
    with pytest.raises(CaseError, match="does not exist"):
        read_volume(Volume(tmp_path / f"{'a' * 249}.nii.gz"))


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        (LATIN_1, r"caf\udce9 has a name that is not in UTF-8"),
        ("a" * 300, "a name of more than 255 bytes"),
        ("/dev/zero", "/dev/zero is a device, a pipe or a socket"),
    ],
)
def test_no_command_takes_such_a_name(argument: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["convert", "table", "-i", argument, "-d", "7", "-name", "X"])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert expected in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("read", [lambda path: read_json(path, ""), read_class_table, lambda path: read_sheet(path, ("case",))])
def test_a_table_that_is_a_pipe_is_not_waited_for(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(UserError, match=r"x\.csv is a device, a pipe or a socket"):
        read(tmp_path / "x.csv")


# --- what nnU-Net would stumble over -----------------------------------------------------------------------------------------


def dataset(raw: Path, images: list[str], labels: list[str]) -> Path:
    for name in images:
        save(raw / f"imagesTr/{name}.nii.gz")
    for name in labels:
        save(raw / f"labelsTr/{name}.nii.gz")
    content = {"channel_names": {"0": "T2w"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": len(labels)}))
    return raw


@pytest.mark.parametrize("part", ["imagesTr/._c0_0000.nii.gz", "labelsTr/._c0.nii.gz"])
def test_twins_of_macos_are_named_with_their_remedy(tmp_path: Path, part: str) -> None:
    raw = dataset(tmp_path, ["c0_0000"], ["c0"])
    assert "1 case" in check_dataset(raw)[0]
    (raw / part).write_bytes(b"\0\5\x16\7")
    with pytest.raises(UserError, match=rf"{part}.*twins that macOS writes.*move the files"):
        check_dataset(raw)
    (raw / part).rename(raw / part.replace("._", ".backup_"))
    with pytest.raises(UserError, match=r"is hidden.*move it elsewhere"):
        check_dataset(raw)


def test_patients_whose_names_look_like_channels_are_told(tmp_path: Path) -> None:
    raw = dataset(tmp_path, ["P_0000", "P_0001", "P_0002"], ["P_0000", "P_0001", "P_0002"])
    with pytest.raises(UserError, match=r"P_0000\.nii\.gz would be channel 0000 of a case P,.*P_0000_0000\.nii\.gz"):
        check_dataset(raw)


def test_a_pipe_in_the_place_of_a_table_is_named(tmp_path: Path) -> None:
    pipe(tmp_path / "classification.csv")
    with pytest.raises(UserError, match=r"classification\.csv is a device, a pipe or a socket"):
        read_class_table(tmp_path / "classification.csv")
    with pytest.raises(UserError, match="a device, a pipe or a socket"):
        read_sheet(tmp_path / "classification.csv", ("case",))


# --- one bad case of many ----------------------------------------------------------------------------------------------------


def test_a_bad_case_never_ends_a_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = tmp_path / "release"
    names = ("good", LATIN_1, "long" * 70, "pipe", "link", "strange", "fine")
    paths = {name: save(release / f"{number}.nii.gz", np.int16) for number, name in enumerate(names)}
    for name, make in (("pipe", pipe), ("link", dangling)):
        paths[name].unlink()
        make(paths[name])
    resampled = written_cases.resampled

    def broken(image: sitk.Image, *args: object, **kwargs: object) -> sitk.Image:
        if image.GetOrigin()[0] == 99:
            raise RuntimeError("sitk::ERROR: something of ITK's own")
        return resampled(image, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(written_cases, "resampled", broken)
    odd = sitk.ReadImage(str(paths["strange"]))
    odd.SetOrigin((99.0, 0.0, 0.0))
    sitk.WriteImage(odd, str(paths["strange"]))
    cases = [Case(name, name, {"T2w": Volume(path)}) for name, path in paths.items()]
    report = write_dataset(cases, Dataset("Dataset007_X", ("T2w",), {}), tmp_path, num_processes=1)
    written = sorted(path.name for path in (tmp_path / "Dataset007_X/imagesTr").iterdir())
    assert written == ["fine_0000.nii.gz", "good_0000.nii.gz"]
    expected = {
        r"caf\udce9": "not in UTF-8",
        "long" * 70: "more than 255 bytes",
        "pipe": "a device, a pipe or a socket",
        "link": "a link to nothing",
        "strange": "something of ITK's own",
    }
    assert report.left_out.keys() == expected.keys()
    for name, words in expected.items():
        assert words in report.left_out[name]
    with pytest.raises(CaseError, match="not in UTF-8"):
        write_dataset(cases, Dataset("Dataset008_X", ("T2w",), {}), tmp_path, num_processes=1, strict=True)


def test_a_pointer_of_git_lfs_is_called_what_it_is(tmp_path: Path) -> None:
    image = tmp_path / "image.nii.gz"
    image.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    assert "git lfs pull" in str(file_problem(image))
    image.write_bytes(b"version")
    assert file_problem(image) is None


@pytest.mark.parametrize("where", [".git/annex", "../.git/modules/sub/annex"])
def test_content_that_git_annex_did_not_fetch_is_called_what_it_is(tmp_path: Path, where: str) -> None:
    image, through = tmp_path / "image.nii.gz", tmp_path / "mine.nii.gz"
    image.symlink_to(f"{where}/objects/aa/bb/SHA256E-s9--0.nii.gz/SHA256E-s9--0.nii.gz")
    through.symlink_to(image)
    for path in (image, through):
        assert "git-annex (DataLad) to content that was not fetched; fetch it with git annex get" in str(file_problem(path))
    image.unlink()
    image.write_text("/annex/objects/SHA256E-s9--0.nii.gz\n")  # an unlocked file
    for path in (image, through):
        assert "is a pointer of git-annex (DataLad)" in str(file_problem(path))
        assert "datalad get" in str(file_problem(path))


def test_all_below_follows_links_and_enters_no_folder_twice(tmp_path: Path) -> None:
    for name in ("data/a/1", "data/b/2", "elsewhere/c/3", "data/.git/annex/4", "data/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/gone").symlink_to("nowhere")
    (tmp_path / "data/a/circle").symlink_to(tmp_path / "data")
    (tmp_path / "start").symlink_to(tmp_path / "data")
    expected = {"a", "a/1", "a/circle", "b", "b/2", "gone", "linked", "linked/c", "linked/c/3"}
    for start in ("data", "start"):
        below = [str(path.relative_to(tmp_path / start)) for path in all_below(tmp_path / start)]
        assert set(below) == expected and len(below) == len(expected)
    assert list(all_below(tmp_path / "not there")) == []
