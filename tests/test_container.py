"""`nnunet_csm container`: what the folder's entry point predicts is what our commands do; it needs and writes nothing else."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from factories import DATASET_JSON, SERIES, checkpoint_of, csm_plans
from nnunet_folders import NnunetFolders

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.cli import main
from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import read_configuration
from nnunet_csm.schema import to_dict
from nnunet_csm.sharing import contained, container

NAME, SECRET = "Dataset001_Tiny", "smith_john"
# no processes beside this one
ALONE = ("-npp", "0", "-nps", "0")
SEGMENTER, CLASSIFIER = "nnUNetTrainerCSM", "nnUNetTrainerCSMClassifier"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two cases, the second without its first series, and masks beside them."""
    folder = tmp_path / "images"
    (folder / "masks").mkdir(parents=True)
    draws = np.random.default_rng(0)
    for case in ("a", "b"):
        for channel in range(len(SERIES)):
            if (case, channel) != ("b", 0):
                save(draws.normal(100, 20, (7, 20, 14)).astype(np.float32), folder / f"{case}_{channel:04d}.nii.gz")
        mask = np.zeros((7, 20, 14), np.uint8)
        mask[2:5, 6:12, 4:9] = 1
        save(mask, folder / "masks" / f"{case}.nii.gz")
    return folder


def save(voxels: np.ndarray, path: Path) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 1.1, 1.3))
    image.SetOrigin((-7.0, 3.5, 11.0))
    sitk.WriteImage(image, str(path))


@pytest.fixture
def contain(nnunet_folders: NnunetFolders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains nothing: writes the checkpoints of two folds, and the container's folder by the command."""

    def run(trainer: str, interface: str, *flags: str, classes: tuple[str, ...] = ("benign", "malignant")) -> Path:
        plans = csm_plans() | {"foreground_intensity_properties_per_channel": {str(c): {} for c in range(len(SERIES))}}
        csm = plans["configurations"]["3d_fullres"]["csm"]
        csm["sources"][0]["absent_series"] = {SECRET: ["T1w"]}
        csm["reasons"]["series"] = ["3", f"{SECRET} lacks one, in {tmp_path}"]
        settings = read_configuration(plans, "3d_fullres", "plans")
        (nnunet_folders.raw / NAME).mkdir(exist_ok=True)
        model = nnunet_folders.results / NAME / f"{trainer}__nnUNetCSMPlans__3d_fullres"
        for fold in range(2):
            torch.manual_seed(fold)
            if trainer == SEGMENTER:
                network: torch.nn.Module = CSMSegmenter(len(SERIES), 3, **to_dict(settings.architecture))
                others: dict[str, Any] = {"inference_allowed_mirroring_axes": (0, 1)}
            else:
                network = build_classifier(settings, len(SERIES), len(classes))
                torch.nn.init.normal_(network.head.weight)
                others = {"classes": list(classes), "by_mask_label": False, "training_cases": [f"{NAME}/{SECRET}"]}
            saved = checkpoint_of(plans, network.state_dict()) | {"trainer_name": trainer} | others
            saved["init_args"]["dataset_json"] = {**DATASET_JSON, "dataset": {SECRET: {"images": []}}}
            (model / f"fold_{fold}").mkdir(parents=True, exist_ok=True)
            checkpoint.save(saved, model / f"fold_{fold}" / "checkpoint_final.pth")
        nnunet.save_json(plans, model / "plans.json")
        nnunet.save_json(DATASET_JSON, model / "dataset.json")
        folder = tmp_path / "container"
        assert (
            main(["container", "-d", "1", "-tr", trainer, "-interface", interface, "-o", str(folder), "--overwrite", *flags]) == 0
        )
        return folder

    return run


def contained_run(folder: Path, tmp: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run as a container would: no variables, another working folder, a temporary folder; nothing of the container changes."""
    tmp.mkdir(exist_ok=True)
    command = [sys.executable, "-I", str(folder / "predict.py"), *map(str, arguments)]
    before = state_of(folder)
    done = subprocess.run(
        command,
        cwd="/",
        env={"TMPDIR": str(tmp), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert state_of(folder) == before
    assert not list(tmp.glob("nnunet_csm_*"))
    return done


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def in_this_process(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(folder / "model"))
    return contained.main(folder, [str(one) for one in arguments])


def voxels_of(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_the_entry_point_segments_as_predict_does_and_writes_nothing_else(contain, images, tmp_path) -> None:
    folder = contain(SEGMENTER, "plain", "-f", "0", "1")
    main(["predict", "-d", "1", "-f", "0", "1", "-i", str(images), "-o", str(tmp_path / "ours"), "-device", "cpu", *ALONE])
    out = tmp_path / "out"
    done = contained_run(folder, tmp_path / "tmp", "-i", images, "-o", out, "-seconds_per_case", "0.0001")
    assert done.returncode == 0, done.stderr
    assert "b: zeros for FLAIR (no file)" in done.stdout
    assert re.search(r"^a: \d+\.\d s, longer than 0.0001 s$", done.stdout, re.MULTILINE)
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "ours").iterdir()}
    for case in "ab":
        assert np.array_equal(voxels_of(out / f"{case}.nii.gz"), voxels_of(tmp_path / "ours" / f"{case}.nii.gz"))
    assert len(np.unique(voxels_of(out / "a.nii.gz"))) > 1
    # what a user got wrong ends as in all commands
    done = contained_run(folder, tmp_path / "tmp", "-i", tmp_path / "nothing", "-o", out)
    assert done.returncode == 2 and done.stderr.startswith("Error: ") and "does not exist" in done.stderr


def test_the_folder_is_complete_and_tells_nothing_of_patients(contain, tmp_path, capsys) -> None:
    folder = contain(SEGMENTER, "plain", "-f", "0")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".dockerignore", "Apptainer.def", "Dockerfile", "LICENSE", "README.md", "interface.json", "model", "nnunet_csm",
        "predict.py", "requirements.txt",
    }  # fmt: skip
    for path in folder.rglob("*"):
        if path.is_file() and "nnunet_csm" not in path.relative_to(folder).parts:
            assert SECRET.encode() not in path.read_bytes() and str(tmp_path).encode() not in path.read_bytes(), path
    model = folder / "model" / NAME / f"{SEGMENTER}__nnUNetCSMPlans__3d_fullres"
    # how often a series was a copy in training decides which of two equal ones is the original
    plans = json.loads((model / "plans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["csm"]["sources"][0]["absent_series"] == {"0": ["T1w"]}
    # all that a builder copies is there
    for recipe in ("Dockerfile", "Apptainer.def"):
        text = (folder / recipe).read_text()
        assert f"torch=={version('torch').split('+')[0]} torchvision==" in text and "whl/cpu" in text
        assert "{{" not in text and all(
            name in text for name in names - {".dockerignore", "Apptainer.def", "Dockerfile", "README.md"}
        )
    assert "docker run --rm --network none --read-only --tmpfs /tmp" in (folder / "README.md").read_text()
    requirements = dict(line.split("==") for line in (folder / "requirements.txt").read_text().splitlines())
    assert {"torch", "torchvision", "nnunetv2", "simpleitk", "numpy", "safetensors"} <= requirements.keys()
    assert requirements["numpy"] == version("numpy")
    assert not any(name.startswith(("nvidia", "cuda", "triton", "pytest", "onnx", "nnunet-csm")) for name in requirements)
    folder = contain(SEGMENTER, "plain", "--gpu")
    assert "whl/cpu" not in (folder / "Dockerfile").read_text() and "--gpus all" in (folder / "README.md").read_text()
    assert json.loads((folder / "interface.json").read_text())["device"] == "cuda"


def test_fomo26_gives_a_flag_for_each_series_and_one_for_the_output(contain, images, tmp_path, monkeypatch, capsys) -> None:
    folder = contain(SEGMENTER, "fomo26")
    assert "gives no" not in capsys.readouterr().out
    assert json.loads((folder / "interface.json").read_text())["inputs"] == {"flair": "FLAIR", "t1": "T1w", "t2": "T2w"}
    main(["predict", "-d", "1", "-i", str(images), "-o", str(tmp_path / "ours"), "-device", "cpu", *ALONE])
    out = tmp_path / "out" / "sub_1.nii.gz"
    given = [one for channel, flag in ((1, "--t1"), (2, "--t2")) for one in (flag, images / f"b_{channel:04d}.nii.gz")]
    # python /app/predict.py, as the challenge calls it; DWI is none of the model's series
    done = contained_run(folder, tmp_path / "tmp", *given, "--dwi", images / "a_0000.nii.gz", "--output", out)
    assert done.returncode == 0, done.stderr
    assert "dwi is left out" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert np.array_equal(voxels_of(out), voxels_of(tmp_path / "ours" / "b.nii.gz"))
    # a series on another grid comes to that of the first one
    finer = tmp_path / "finer.nii"
    image = sitk.ReadImage(str(images / "b_0002.nii.gz"))
    sitk.WriteImage(sitk.Expand(image, [2, 2, 1]), str(finer))
    assert in_this_process(folder, monkeypatch, "--t1", images / "b_0001.nii.gz", "--t2", finer, "--output", out) == 0
    assert sitk.ReadImage(str(out)).GetSize() == image.GetSize()
    with pytest.raises(SystemExit):
        in_this_process(folder, monkeypatch, "--dwi", finer, "--output", out)


def test_a_series_that_the_interface_never_gives_is_said(contain, monkeypatch, capsys) -> None:
    monkeypatch.setattr(container, "FOMO26", {"flair": "FLAIR", "t1": "T1w"})
    contain(SEGMENTER, "fomo26")
    assert "The interface gives no T2w: the model will have zeros there, in every case" in capsys.readouterr().out


def test_grand_challenge_gives_a_socket_for_each_series(contain, images, tmp_path, monkeypatch, capsys) -> None:
    folder = contain(SEGMENTER, "grand-challenge")
    assert "interface.json" in capsys.readouterr().out
    interface = json.loads((folder / "interface.json").read_text())
    assert interface["inputs"] == {"images/flair": "FLAIR", "images/t1w": "T1w", "images/t2w": "T2w"}
    main(["predict", "-d", "1", "-i", str(images), "-o", str(tmp_path / "ours"), "-device", "cpu", *ALONE])
    given = tmp_path / "given"
    for socket, channel in (("flair", 0), ("t1w", 1), ("t2w", 2)):
        (given / "images" / socket).mkdir(parents=True)
        image = sitk.ReadImage(str(images / f"a_{channel:04d}.nii.gz"))
        sitk.WriteImage(image, str(given / "images" / socket / f"8f1c{channel}.mha"))
    assert in_this_process(folder, monkeypatch, "-i", given, "-o", tmp_path / "out") == 0
    out = tmp_path / "out" / "images" / "segmentation" / "output.mha"
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [out]
    assert np.array_equal(voxels_of(out), voxels_of(tmp_path / "ours" / "a.nii.gz"))
    shutil.copy(given / "images/t1w/8f1c1.mha", given / "images/t1w/another.mha")
    with pytest.raises(SystemExit):
        in_this_process(folder, monkeypatch, "-i", given, "-o", tmp_path / "out")
    assert "holds 2 images, expected one" in capsys.readouterr().err
    nnunet.save_json({**interface, "inputs": {"images/t1w": "T1"}}, folder / "interface.json")
    with pytest.raises(SystemExit):
        in_this_process(folder, monkeypatch, "-i", given, "-o", tmp_path / "out")
    assert "inputs name 'T1'; expected series of the model: FLAIR" in capsys.readouterr().err


def test_a_classifier_gives_probabilities(contain, images, tmp_path, monkeypatch) -> None:
    folder = contain(CLASSIFIER, "plain", "-f", "0", "1")
    ours = tmp_path / "ours.csv"
    flags = ["-f", "0", "1", "-i", str(images), "-m", str(images / "masks"), "-o", str(ours), "-device", "cpu"]
    main(["classify", "-d", "1", *flags])
    expected = pd.read_csv(ours)
    done = contained_run(folder, tmp_path / "tmp", "-i", images, "-o", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "predictions.csv"), expected)
    assert re.search(r"^all cases: \d+\.\d s$", done.stdout, re.MULTILINE)

    interface = json.loads((folder / "interface.json").read_text())
    assert interface["mask"] == "masks"
    inputs = {"images/t1": "T1w", "images/t2": "T2w"}
    one_case = {"interface": "grand-challenge", "inputs": inputs, "mask": "images/lesion", "output": "malignancy.json"}
    nnunet.save_json(interface | one_case, folder / "interface.json")
    given = tmp_path / "given" / "images"
    for socket, path in (("t1", "b_0001"), ("t2", "b_0002"), ("lesion", "masks/b")):
        (given / socket).mkdir(parents=True)
        shutil.copy(images / f"{path}.nii.gz", given / socket / "x.nii.gz")
    assert in_this_process(folder, monkeypatch, "-i", given.parent, "-o", tmp_path / "socket") == 0
    found = json.loads((tmp_path / "socket" / "malignancy.json").read_text())
    assert found == pytest.approx(expected["p_malignant"][1], abs=2e-6)
    shutil.rmtree(given / "lesion")
    with pytest.raises(SystemExit):
        in_this_process(folder, monkeypatch, "-i", given.parent, "-o", tmp_path / "socket")


def test_a_classifier_without_a_mask_looks_at_all_that_is_not_zero(contain, images, tmp_path, monkeypatch, capsys) -> None:
    folder = contain(CLASSIFIER, "fomo26", "-f", "0")
    assert "all voxels that are not 0" in capsys.readouterr().out
    whole = tmp_path / "whole"
    whole.mkdir()
    save(np.ones((7, 20, 14), np.uint8), whole / "a.nii.gz")
    save(np.ones((7, 20, 14), np.uint8), whole / "b.nii.gz")
    ours = tmp_path / "ours.csv"
    main(["classify", "-d", "1", "-f", "0", "-i", str(images), "-m", str(whole), "-o", str(ours), "-device", "cpu"])
    out = tmp_path / "out.txt"
    flags = [
        one for channel, flag in enumerate(("--flair", "--t1", "--t2")) for one in (flag, images / f"a_{channel:04d}.nii.gz")
    ]
    assert in_this_process(folder, monkeypatch, *flags, "--output", out) == 0
    assert float(out.read_text()) == pytest.approx(pd.read_csv(ours)["p_malignant"][0], abs=2e-6)


@pytest.mark.parametrize(
    "flags, classes, message",
    [
        (("-tr", "nnUNetTrainerCSMPretrain"), ("a", "b"), "expected nnUNetTrainerCSM or nnUNetTrainerCSMClassifier"),
        (("-f", "3"), ("a", "b"), "no such checkpoint"),
        (("-tr", CLASSIFIER, "-interface", "fomo26"), ("a", "b", "c"), "a probability of two classes"),
    ],
)
def test_what_cannot_be_contained_is_refused(contain, tmp_path, capsys, flags, classes, message) -> None:
    contain(CLASSIFIER, "plain", classes=classes)
    shutil.rmtree(tmp_path / "container")
    with pytest.raises(SystemExit) as caught:
        main(["container", "-d", "1", "-o", str(tmp_path / "container"), *flags])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "container")
