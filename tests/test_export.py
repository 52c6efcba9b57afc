"""What prediction writes is whole or not there, and only what is whole is taken for done."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_csm import export
from nnunet_csm.errors import UserError
from nnunet_csm.export import FAILED, is_whole, whole_exports

SHAPE = (5, 40, 30)
# nnU-Net crops along transposed axes
PLANS: Any = SimpleNamespace(transpose_backward=(1, 0, 2), image_reader_writer_class=SimpleITKIO)
PROPERTIES = {"shape_before_cropping": (40, 5, 30)}


def segmentation() -> sitk.Image:
    return sitk.GetImageFromArray(np.random.default_rng(0).integers(0, 3, SHAPE, dtype=np.uint8))


def write_case(truncated: str, probabilities: bool = False) -> None:
    sitk.WriteImage(segmentation(), f"{truncated}.nii.gz")
    if probabilities:
        np.savez_compressed(f"{truncated}.npz", probabilities=np.random.default_rng(1).random((3, *SHAPE), dtype=np.float32))
        Path(f"{truncated}.pkl").write_bytes(b"pickled.")


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of nnU-Net's that exports; what it finds on the disk afterwards is a share of what was written."""
    host = SimpleNamespace(export_prediction_from_logits=None, share=1.0)

    def stock(logits: Any, properties: Any, configuration: Any, plans: Any, described: Any, truncated: str, saved: bool) -> None:
        write_case(truncated, saved)
        cut(Path(f"{truncated}.nii.gz"), host.share)

    monkeypatch.setattr(export, "export_prediction_from_logits", stock)
    return host


def predict(host: Any, folder: Path, probabilities: bool = False) -> None:
    described = {"file_ending": ".nii.gz"}
    host.export_prediction_from_logits(None, PROPERTIES, None, PLANS, described, str(folder / "case"), probabilities)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_case_gets_its_names_when_all_of_it_was_read_back(host: Any, tmp_path: Path) -> None:
    with whole_exports(host, tmp_path / "out"):
        predict(host, tmp_path / "out", probabilities=True)
    assert host.export_prediction_from_logits is None
    assert names(tmp_path / "out") == ["case.nii.gz", "case.npz", "case.pkl"]
    assert is_whole(tmp_path / "out" / "case", ".nii.gz", SimpleITKIO(), True, list(SHAPE))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_one_that_was_cut_off_is_an_error_and_the_older_one_stays(host: Any, tmp_path: Path, share: float) -> None:
    with whole_exports(host, tmp_path):
        predict(host, tmp_path)
    before = (tmp_path / "case.nii.gz").read_bytes()
    host.share = share
    with whole_exports(host, tmp_path) as unfinished:
        with pytest.raises(UserError, match=r"case\.nii\.gz: was cut off"):
            predict(host, tmp_path, probabilities=True)
        assert names(unfinished) == [".running", FAILED]
    assert names(tmp_path) == ["case.nii.gz"] and (tmp_path / "case.nii.gz").read_bytes() == before


def test_a_full_disk_is_named(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnunet_csm.errors.ROOM", 2**63)
    host.share = 0.5
    with (
        pytest.raises(UserError, match=r"case\.nii\.gz: there is no room for it; free some space"),
        whole_exports(host, tmp_path),
    ):
        predict(host, tmp_path)


def test_half_a_file_is_not_taken_for_done(tmp_path: Path) -> None:
    case, reader = tmp_path / "case", SimpleITKIO()
    assert not is_whole(case, ".nii.gz", reader, False)
    write_case(str(case))
    assert is_whole(case, ".nii.gz", reader, False) and not is_whole(case, ".nii.gz", reader, True)
    assert not is_whole(case, ".nii.gz", reader, False, [1, 2, 3])
    write_case(str(case), probabilities=True)
    assert is_whole(case, ".nii.gz", reader, True)
    cut(tmp_path / "case.npz", 0.9)
    assert is_whole(case, ".nii.gz", reader, False) and not is_whole(case, ".nii.gz", reader, True)
    # ITK reads it without a word
    cut(tmp_path / "case.nii.gz", 0.8)
    assert not is_whole(case, ".nii.gz", reader, False)
    (tmp_path / "other.mha").write_text(json.dumps({}))
    assert not is_whole(tmp_path / "other", ".mha", reader, False)


def test_what_a_killed_prediction_left_is_removed_and_what_another_one_writes_is_not(tmp_path: Path, host: Any) -> None:
    (tmp_path / ".unfinished_killed").mkdir()
    (tmp_path / ".unfinished_killed" / ".running").touch()
    (tmp_path / ".unfinished_killed" / "case.nii.gz").touch()
    with whole_exports(host, tmp_path) as first, whole_exports(host, tmp_path) as second:
        assert names(tmp_path) == sorted([first.name, second.name])
    assert not names(tmp_path)
