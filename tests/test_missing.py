"""A folder for stock prediction has every channel of every case; what was there is passed on untouched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_csm.errors import UserError
from nnunet_csm.inference.missing import fill_missing
from nnunet_csm.raw.check import check_inputs

NAMES = ("FLAIR", "T1w", "T1ce")
SHAPE = (4, 6, 5)
DIRECTION = tuple(sitk.Euler3DTransform((0, 0, 0), 0.2, -0.1, 0.3, (0, 0, 0)).GetMatrix())


def noise(seed: int) -> np.ndarray:
    voxels = np.random.default_rng(seed).integers(1, 1000, SHAPE).astype(np.int16)
    voxels[:2, :3] = 0  # a background that all series share
    return voxels


def save(path: Path, voxels: np.ndarray, spacing: tuple[float, ...] = (1.0, 2.0, 3.0)) -> None:
    path.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    image.SetOrigin((3.0, -7.0, 9.0))
    image.SetDirection(DIRECTION)
    sitk.WriteImage(image, str(path))


def save_zeros(folder: Path, case: str) -> None:
    for channel in range(len(NAMES)):
        save(folder / f"{case}_{channel:04d}.nii.gz", np.zeros(SHAPE, np.int16))


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """`full` has all; `two_0001` lacks T1w; `copied` has FLAIR in place of T1w."""
    folder = tmp_path / "in"
    for seed, name in enumerate(("full", "two_0001", "copied")):
        for channel in range(3):
            save(folder / f"{name}_000{channel}.nii.gz", noise(10 * seed + channel))
    (folder / "two_0001_0001.nii.gz").unlink()
    save(folder / "copied_0001.nii.gz", noise(20))
    return folder


def fill(inputs: Path, outputs: Path, **options: Any) -> list[str]:
    return fill_missing(inputs, outputs, NAMES, ".nii.gz", **options)


def voxels_of(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.parametrize("copy_files", [False, True])
def test_every_case_gets_every_channel_and_what_was_there_stays(inputs: Path, tmp_path: Path, copy_files: bool) -> None:
    before = {path.name: path.read_bytes() for path in inputs.iterdir()}
    lines = fill(inputs, tmp_path / "out", copy_files=copy_files)
    assert lines[:-1] == ["copied: zeros for T1w (a copy of FLAIR)", "two_0001: zeros for T1w (no file)"]
    assert "3 cases" in lines[-1] and "1 complete, 2 filled" in lines[-1]
    check_inputs(tmp_path / "out", NAMES, ".nii.gz")
    filled = {"two_0001_0001.nii.gz", "copied_0001.nii.gz"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == set(before) | filled
    for name in written:
        path = tmp_path / "out" / name
        assert path.is_symlink() == (not copy_files and name not in filled)
        if name in filled:
            assert not voxels_of(path).any()
            original = sitk.ReadImage(str(inputs / name.replace("_0001.nii", "_0000.nii")))
            zeros = sitk.ReadImage(str(path))
            for part in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert np.allclose(getattr(zeros, part)(), getattr(original, part)(), atol=1e-5)
        else:
            assert path.read_bytes() == before[name]
    assert {path.name: path.read_bytes() for path in inputs.iterdir()} == before


def test_copies_stay_when_asked(inputs: Path, tmp_path: Path) -> None:
    fill(inputs, tmp_path / "out", copies=False)
    assert np.array_equal(voxels_of(tmp_path / "out" / "copied_0001.nii.gz"), noise(20))


def test_the_first_of_three_copies_is_the_original(inputs: Path, tmp_path: Path) -> None:
    save(inputs / "copied_0002.nii.gz", noise(20))
    lines = fill(inputs, tmp_path / "out")
    assert "copied: zeros for T1w (a copy of FLAIR), T1ce (a copy of FLAIR)" in lines
    assert voxels_of(tmp_path / "out" / "copied_0000.nii.gz").any()


def test_the_original_is_the_series_that_was_no_copy_in_training(inputs: Path, tmp_path: Path) -> None:
    lines = fill(inputs, tmp_path / "out", num_copies={"FLAIR": 3})
    assert "copied: zeros for FLAIR (a copy of T1w)" in lines
    assert not voxels_of(tmp_path / "out" / "copied_0000.nii.gz").any()


def test_a_case_without_a_series_of_the_model_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"case copied shows FLAIR, T1ce, and the model uses T1w"):
        fill(inputs, tmp_path / "out", needed=("T1w",))
    assert not (tmp_path / "out").exists()


def test_a_constant_series_is_none(inputs: Path, tmp_path: Path) -> None:
    save(inputs / "full_0002.nii.gz", np.full(SHAPE, 7, np.int16))
    assert "full: zeros for T1ce (constant)" in fill(inputs, tmp_path / "out")


def test_an_output_folder_in_use_is_kept(inputs: Path, tmp_path: Path) -> None:
    fill(inputs, tmp_path / "out")
    (inputs / "full_0002.nii.gz").unlink()
    with pytest.raises(UserError, match="exists and is kept; give --overwrite"):
        fill(inputs, tmp_path / "out")
    assert voxels_of(tmp_path / "out" / "copied_0000.nii.gz").any()
    fill(inputs, tmp_path / "out", overwrite=True)
    assert not voxels_of(tmp_path / "out" / "full_0002.nii.gz").any()
    (tmp_path / "out" / "thesis.docx").touch()
    with pytest.raises(UserError, match=r"out holds thesis\.docx.*kept"):
        fill(inputs, tmp_path / "out", overwrite=True)
    with pytest.raises(UserError, match="another folder"):
        fill(inputs, inputs, overwrite=True)
    assert (inputs / "full_0000.nii.gz").is_file()


def test_an_empty_output_folder_is_used(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    fill(inputs, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: save(folder / "full_0003.nii.gz", noise(0)), r"full_0003\.nii\.gz is of channel 3, .*0002 T1ce"),
        (lambda folder: save(folder / "full.nii.gz", noise(0)), r"full\.nii\.gz has no channel in its name"),
        (lambda folder: save(folder / "full_0001.nii.gz", noise(0), (1.0, 1.0, 1.0)), "full_0001.*grid.*resample"),
        (lambda folder: (folder / "full_0001.nii.gz").write_bytes(b""), r"full_0001\.nii\.gz is empty"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], r"no image called CASE_0000\.nii\.gz"),
        (lambda folder: save_zeros(folder, "full"), "case full shows nothing"),
    ],
)
def test_a_bad_input_is_named_and_nothing_is_written(inputs: Path, tmp_path: Path, spoil, message: str) -> None:
    spoil(inputs)
    with pytest.raises(UserError, match=message):
        fill(inputs, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_missing_input_folder_and_flat_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        fill(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match=r"end in \.png"):
        fill_missing(tmp_path, tmp_path / "out", NAMES, ".png")
