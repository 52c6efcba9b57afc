"""The chain a user runs, by stock commands, on a tiny phantom."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunet_folders import NUM_TEST, TINY_PRESET, NnunetFolders, PlannedDataset

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chain")]

PRETRAINER, FINETUNER, PLANS = "nnUNetTrainerCSMPretrain", "nnUNetTrainerCSM", "nnUNetCSMPlans"


@pytest.fixture(scope="module")
def trained(planned_dataset: PlannedDataset) -> PlannedDataset:
    """Also in that the commands start as they do for a user."""
    for trainer in (PRETRAINER, FINETUNER):
        replace(planned_dataset, cold=True).check(
            "nnUNetv2_train", "900", "3d_fullres", "0", "-tr", trainer, "-p", PLANS, "-device", "cpu"
        )
    return planned_dataset


def fold(dataset: PlannedDataset, trainer: str, number: str = "0") -> Path:
    return dataset.folders.results / dataset.name / f"{trainer}__{PLANS}__3d_fullres" / f"fold_{number}"


def test_training_leaves_what_users_look_at(trained: PlannedDataset) -> None:
    pretraining, finetuning = fold(trained, PRETRAINER), fold(trained, FINETUNER)
    for folder in (pretraining, finetuning):
        assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png"} <= {f.name for f in folder.iterdir()}
        assert not list(folder.glob("*.tmp"))
        assert (folder / "validation" / "summary.json").is_file()
    assert list((pretraining / "reconstructions").glob("*.png"))
    log = next(finetuning.glob("training_log_*.txt")).read_text()
    assert str(pretraining / "checkpoint_final.pth") in log
    assert "by name, from T1ce" in log


def test_stock_prediction_and_evaluation(trained: PlannedDataset, tmp_path: Path) -> None:
    images, references = trained.folders.raw / trained.name / "imagesTs", trained.task / "labelsTs"
    model = ["-d", "900", "-c", "3d_fullres", "-tr", FINETUNER, "-p", PLANS, "-f", "0", "-device", "cpu"]
    cold = replace(trained, cold=True)
    processes = ["-npp", "1", "-nps", "1"]
    cold.check("nnUNetv2_predict", *model, "-i", str(images), "-o", str(tmp_path / "out"), *processes)
    predictions = sorted((tmp_path / "out").glob("*.nii.gz"))
    assert len(predictions) == NUM_TEST
    for file in predictions:
        found, expected = sitk.ReadImage(str(file)), sitk.ReadImage(str(references / file.name))
        assert found.GetSize() == expected.GetSize()
        assert found.GetSpacing() == expected.GetSpacing()

    cold.check("nnunet_csm", "predict", *model, "-i", str(images), "-o", str(tmp_path / "ours"), *processes)
    for file in predictions:
        ours = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "ours" / file.name)))
        assert np.array_equal(ours, sitk.GetArrayFromImage(sitk.ReadImage(str(file))))

    printed = trained.check(
        "nnunet_csm", "evaluate", "-d", "900", "-ref", str(references), "-pred", str(tmp_path / "out"), "-images", str(images)
    )
    assert "WT" in printed and "paper" in printed and "BraTS" in printed
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == NUM_TEST
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert summary


def test_a_case_without_a_channel_file_is_segmented_as_one_with_zeros_in_it(trained: PlannedDataset, tmp_path: Path) -> None:
    inputs, filled = tmp_path / "inputs", tmp_path / "filled"
    shutil.copytree(trained.folders.raw / trained.name / "imagesTs", inputs)
    victim = sorted(inputs.glob("*_0001.nii.gz"))[0]
    victim.unlink()
    flags = ["-d", "900", "-f", "0", "-device", "cpu", "-i"]
    said = trained.check("nnunet_csm", "predict", *flags, str(inputs), "-o", str(tmp_path / "ours"))
    assert "zeros for T1w (no file)" in said
    trained.check("nnunet_csm", "predict", "--fill_missing_only", "-d", "900", "-i", str(inputs), "-o", str(filled))
    assert (filled / victim.name).is_file()
    chosen = ["-c", "3d_fullres", "-tr", FINETUNER, "-p", PLANS, "--disable_progress_bar"]
    trained.check("nnUNetv2_predict", *flags, str(filled), "-o", str(tmp_path / "stock"), *chosen)
    names = [path.name for path in sorted((tmp_path / "stock").glob("*.nii.gz"))]
    assert len(names) == NUM_TEST
    for name in names:
        ours, stock = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f / name))) for f in ("ours", "stock"))
        assert np.array_equal(ours, stock)


@pytest.mark.parametrize("trainer, complaint", [(FINETUNER, "no pretrained encoder"), (PRETRAINER, "is not a multiple")])
def test_what_our_trainers_refuse_ends_in_exit_code_2(trained: PlannedDataset, trainer: str, complaint: str) -> None:
    arguments = ["900", "3d_fullres", "1", "-tr", trainer, "-p", PLANS, "-device", "cpu"]
    if trainer == PRETRAINER:
        path = trained.folders.preprocessed / trained.name / f"{PLANS}.json"
        plans = json.loads(path.read_text())
        plans["plans_name"] = "Broken"
        plans["configurations"]["3d_fullres"]["patch_size"][0] += 1
        path.with_name("Broken.json").write_text(json.dumps(plans))
        arguments[-3] = "Broken"
    done = trained.run("nnUNetv2_train", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr and "Traceback" not in done.stderr
    assert "checkpoint" not in " ".join(f.name for f in trained.folders.results.rglob("*") if "Broken" in str(f))


FLAGS = {
    "plan_and_preprocess": ["-preset", str(TINY_PRESET), "-np", "1"],
    "pretrain": ["-device", "cpu"],
    "finetune": ["-device", "cpu"],
    "predict": ["-device", "cpu", "-npp", "0", "-nps", "0"],
    "evaluate": [],
}


def test_the_readmes_commands_in_their_order_where_a_test_case_lacks_a_series(
    planned_dataset: PlannedDataset, tmp_path: Path
) -> None:
    folders = NnunetFolders(*(tmp_path / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")))
    raw, task = folders.raw / planned_dataset.name, planned_dataset.task
    shutil.copytree(planned_dataset.folders.raw / planned_dataset.name, raw)
    victim = sorted((raw / "imagesTs").glob("*_0000.nii.gz"))[0]
    victim.unlink()
    environment = planned_dataset.environment | {name.name: str(name) for name in vars(folders).values()}
    dataset = replace(planned_dataset, folders=folders, environment=environment)
    places = {"21": "900", "imagesTs": str(raw / "imagesTs"), "labelsTs": str(task / "labelsTs"), "out": str(tmp_path / "out")}

    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    commands = readme.split("<!-- chain -->\n```bash\n")[1].split("```")[0].splitlines()
    printed = {}
    for line in commands:
        program, command, *flags = (places.get(word, word) for word in shlex.split(line, comments=True))
        assert program == "nnunet_csm"
        printed[command] = dataset.check(program, command, *flags, *FLAGS[command])
    assert list(printed) == list(FLAGS)
    assert "expected on" in printed["plan_and_preprocess"] and "-preset cpu" in printed["plan_and_preprocess"]
    for stage in ("pretrain", "finetune"):
        assert "step 0 of" in printed[stage] and "crops/s" in printed[stage]
    assert "zeros for FLAIR (no file)" in printed["predict"]
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == NUM_TEST


def test_a_gpu_that_is_not_there_is_told_with_the_time_on_the_cpu(planned_dataset: PlannedDataset) -> None:
    without = replace(planned_dataset, environment={**planned_dataset.environment, "CUDA_VISIBLE_DEVICES": ""})
    done = without.run("nnunet_csm", "pretrain", "-d", "900")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "-device cpu, which takes about 1 minute" in done.stderr and "-preset cpu" in done.stderr


def test_validation_alone_export_and_installation_elsewhere(trained: PlannedDataset, tmp_path: Path) -> None:
    model = ["-d", "900", "-c", "3d_fullres", "-tr", FINETUNER, "-p", PLANS]
    trained.check("nnUNetv2_train", "900", "3d_fullres", "0", "-tr", FINETUNER, "-p", PLANS, "-device", "cpu", "--val", "--npz")
    assert list((fold(trained, FINETUNER) / "validation").glob("*.npz"))

    archive, elsewhere = tmp_path / "model.zip", tmp_path / "nnUNet_results"
    elsewhere.mkdir()
    trained.check("nnUNetv2_export_model_to_zip", *model, "-f", "0", "-o", str(archive))
    installed = replace(trained, environment={**trained.environment, "nnUNet_results": str(elsewhere)})
    installed.check("nnUNetv2_install_pretrained_model_from_zip", str(archive))

    inputs = trained.folders.raw / trained.name / "imagesTs"
    found = []
    for number, dataset in enumerate((trained, installed)):
        out = tmp_path / f"out{number}"
        dataset.check("nnUNetv2_predict", *model, "-f", "0", "-device", "cpu", "-i", str(inputs), "-o", str(out))
        found.append([sitk.GetArrayFromImage(sitk.ReadImage(str(f))) for f in sorted(out.glob("*.nii.gz"))])
    assert len(found[0]) == NUM_TEST
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
