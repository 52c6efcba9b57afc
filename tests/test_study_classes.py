"""Studies of classes and of numbers, forests of mask volumes among them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nnunet_folders import NUM_TRAINING, PlannedDataset
from studies import FOREST, SCRATCH, ended_well, spec, start_study

from nnunet_csm import nnunet
from nnunet_csm.data.diagnoses import ClassTable, Sample
from nnunet_csm.errors import UserError
from nnunet_csm.study.collection import with_classes
from nnunet_csm.study.dataset import Dataset
from nnunet_csm.study.divisions import divide
from nnunet_csm.study.expansion import Expansion
from nnunet_csm.study.forest import forest_predictions
from nnunet_csm.study.spec import Study, parse_study
from nnunet_csm.study.statistics import MAE, summarize_classes


@pytest.fixture
def diagnoses(planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlannedDataset:
    """The test dataset in folders of its own, with classes: the larger of two labels of every case is of class large."""
    folders = replace(
        planned_dataset.folders, **{name: tmp_path / f"nnUNet_{name}" for name in ("raw", "preprocessed", "results")}
    )
    for name in ("raw", "preprocessed"):
        shutil.copytree(getattr(planned_dataset.folders, name), getattr(folders, name))
    environment = planned_dataset.environment | {variable.name: str(variable) for variable in vars(folders).values()}
    for name in nnunet.FOLDER_VARIABLES:
        monkeypatch.setenv(name, environment[name])
    raw = folders.raw / planned_dataset.name
    rows = []
    for path in sorted(raw.glob("labelsTr/*.nii.gz")):
        segmentation = sitk.GetArrayFromImage(sitk.ReadImage(path))
        smaller, larger = sorted((1, 2), key=lambda label: np.count_nonzero(segmentation == label))
        case = path.name.removesuffix(".nii.gz")
        rows += [f"{case},small,{smaller}", f"{case},large,{larger}"]
    (raw / "classification.csv").write_text("\n".join(["case,class,mask_label", *rows]) + "\n")
    return replace(planned_dataset, folders=folders, environment=environment)


def classification(**given: Any) -> Study:
    return parse_study(spec(**({"task": "classification", "arms": [SCRATCH, FOREST], "labels": [1.0]} | given)), "study")


def test_classifiers_are_tested_by_their_trainer_and_beside_it_with_a_part_of_the_series(
    diagnoses: PlannedDataset, tmp_path: Path
) -> None:
    dataset = Dataset("900", "3d_fullres", tmp_path)
    for tested, num_tests in (("all", 0), ("one_missing", len(dataset.series))):
        runs = Expansion(classification(tested=tested), "s", dataset, {}).expand()
        assert {row.arm for row in runs.rows} == {"scratch"} and len(runs.runs) == 2
        for run in runs.runs.values():
            assert len(run.tests) == num_tests and all(len(one.name.split("+")) == len(dataset.series) - 1 for one in run.tests)


def test_what_was_classified_gets_its_class_by_case_and_label(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text(
        "case,mask_label,p_no,p_yes,predicted\n01,1,0.2,0.8,yes\n01,2,0.6,0.4,no\n01,7,0.6,0.4,no\n"
    )
    table = ClassTable(("no", "yes"), (Sample("01", 0, 1, "p"), Sample("01", 1, 2, "p"), Sample("02", 1, None, "q")))
    found = with_classes(tmp_path / "one.csv", table)
    assert found[["case", "mask_label", "class", "patient"]].values.tolist() == [["01", "1", "no", "p"], ["01", "2", "yes", "p"]]


def test_a_forest_of_mask_volumes_learns_from_labelled_cases_and_predicts_those_of_the_test_side(
    diagnoses: PlannedDataset, tmp_path: Path
) -> None:
    dataset = Dataset("900", "3d_fullres", tmp_path)
    study = classification(repeats={"kind": "folds", "number": 2, "seeds": 2})
    found = forest_predictions("s", study, dataset)
    pd.testing.assert_frame_equal(found, forest_predictions("s", study, dataset))
    divisions = divide(dataset.classes, study.repeats)
    assert set(found["repeat"]) == {0, 1, 2, 3} and (found["repeat"] // 2 == found["division"]).all()
    for (number, _), rows in found.groupby(["division", "repeat"]):
        assert (
            sorted(rows["case"].unique()) == sorted(divisions[number].test) and not rows.duplicated(["case", "mask_label"]).any()
        )
    np.testing.assert_allclose(found[["p_large", "p_small"]].sum(axis=1), 1)
    assert summarize_classes(found)["mean"].item() > 0.8
    assert forest_predictions("s", classification(arms=[SCRATCH]), dataset).empty
    with pytest.raises(UserError, match=r"no_such.*needs a mask for every case"):
        forest_predictions("s", classification(arms=[{**FOREST, "mask_volumes": ["labelsTr", "no_such"]}]), dataset)


def with_numbers(diagnoses: PlannedDataset) -> None:
    """A number of every case that its mask tells: the volume of its labels, in thousands of voxels."""
    raw = diagnoses.folders.raw / diagnoses.name
    sizes = {
        path: np.count_nonzero(sitk.GetArrayFromImage(sitk.ReadImage(path))) / 1000 for path in raw.glob("labelsTr/*.nii.gz")
    }
    rows = [f"{path.name.removesuffix('.nii.gz')},{size}" for path, size in sorted(sizes.items())]
    (raw / "classification.csv").write_text("\n".join(["case,value", *rows]) + "\n")


def test_a_forest_of_mask_volumes_learns_numbers(diagnoses: PlannedDataset, tmp_path: Path) -> None:
    with_numbers(diagnoses)
    found = forest_predictions(
        "s", classification(repeats={"kind": "folds", "number": 2}), Dataset("900", "3d_fullres", tmp_path)
    )
    assert found["case"].is_unique and not [name for name in found if name.startswith("p_")]
    errors = (found["predicted"] - found["value"]).abs()
    (said,) = summarize_classes(found).to_dict("records")
    assert said["structure"] == MAE and said["mean"] == pytest.approx(errors.groupby(found["repeat"]).mean().mean())
    # means of numbers that it has seen
    assert found["predicted"].between(found["value"].min(), found["value"].max()).all() and found["predicted"].nunique() > 2


@pytest.mark.slow
def test_a_study_of_numbers_to_its_page(diagnoses: PlannedDataset, tmp_path: Path) -> None:
    with_numbers(diagnoses)
    search = {"classification.schedule.learning_rate": [1e-4, 1e-3]}
    study = spec(task="classification", arms=[SCRATCH, FOREST], tested="one_missing", search=search)
    (tmp_path / "c.json").write_text(json.dumps(study))
    output = tmp_path / "out"
    assert ended_well(start_study(diagnoses, tmp_path / "c.json", output)), output.with_suffix(".txt").read_text()
    found = pd.read_csv(output / "predictions.csv")
    scratch = found[found["arm"] == "scratch"]
    assert scratch["tested"].nunique() == 1 + len(Dataset("900", "3d_fullres", tmp_path).series)
    truth = pd.read_csv(diagnoses.folders.raw / diagnoses.name / "classification.csv").set_index("case")["value"]
    np.testing.assert_allclose(found["value"], truth.loc[found["case"]], rtol=1e-6)
    tables = (output / "tables.md").read_text(encoding="utf-8")
    assert "paired differences of the MAE, below 0 is better" in tables and "MAE with a part of the series" in tables
    assert "Dice" not in tables.split("Cost:")[0] and "AUC" not in tables


@pytest.mark.slow
def test_a_study_of_classes_to_its_page(diagnoses: PlannedDataset, tmp_path: Path) -> None:
    study = spec(task="classification", arms=[SCRATCH, FOREST], tested="one_missing")
    (tmp_path / "c.json").write_text(json.dumps(study))
    output = tmp_path / "out"
    assert ended_well(start_study(diagnoses, tmp_path / "c.json", output)), output.with_suffix(".txt").read_text()
    found = pd.read_csv(output / "predictions.csv")
    parts = set(found.loc[found["arm"] == "scratch", "tested"])
    assert len(parts) == 1 + len(Dataset("900", "3d_fullres", tmp_path).series) and "all" in parts
    assert all(rows["case"].nunique() == NUM_TRAINING for _, rows in found.groupby(["arm", "tested"]))
    assert set(found.loc[found["arm"] == "forest", "tested"]) == {"all"}
    tables = (output / "tables.md").read_text(encoding="utf-8")
    assert "AUC with a part of the series at test time" in tables and "forest" in tables
