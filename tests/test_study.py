"""Studies: what is run, on whom, and that nothing is done twice or learned from the wrong patients."""

import json
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
import warm_processes
from factories import checkpoint_of, csm_plans, masking_of, pretext_of
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunet_folders import NUM_TRAINING, TINY_PRESET, PlannedDataset
from torch._subclasses.fake_tensor import FakeTensorMode

from nnunet_csm import checkpoint, cli, nnunet
from nnunet_csm.data.diagnoses import ClassTable, Sample
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import encoder_class
from nnunet_csm.planning.presets import method_of, read_preset
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext.cost import counted, finetuning_cost, pretraining_cost
from nnunet_csm.raw.manifest import MANIFEST
from nnunet_csm.study import execution, measured
from nnunet_csm.study.collection import with_classes
from nnunet_csm.study.command import StudyRequest, run_study, study_name
from nnunet_csm.study.dataset import Dataset, hashed
from nnunet_csm.study.divisions import divide, everybody, labelled, taken_away
from nnunet_csm.study.execution import cluster, perform, read_records, visible_gpus
from nnunet_csm.study.expansion import Expansion, arm_changes, essence
from nnunet_csm.study.forest import forest_predictions
from nnunet_csm.study.runs import Evaluation, Run, Runs
from nnunet_csm.study.spec import Repeats, Study, parse_study, read_study, study_names
from nnunet_csm.study.statistics import MAE, summarize_classes

JOINT = {"network": {"encoder": {"kind": "joint_vit"}}, "pretext": {"name": "mae3d", "masking": {"mask_ratio": 0.75}}}
AUTOENCODER = {
    "name": "AE",
    "changes": {
        "network": {"width": 16, "depth": 1, "decoder": "unet", "encoder": {"kind": "residual_unet", "base": 4}},
        "pretext": {"name": "ae"},
    },
}
SCRATCH, MAE3D, CSM = {"name": "scratch", "pretrained": False}, {"name": "MAE3D", "changes": JOINT}, {"name": "CSM"}
FOREST = {"name": "forest", "mask_volumes": ["labelsTr"]}


def spec(**given: Any) -> dict[str, Any]:
    """A study of the test dataset's six cases in two folds."""
    return {
        "description": "of the tests",
        "task": "segmentation",
        "preset": str(TINY_PRESET),
        "repeats": {"kind": "folds", "number": 2},
        "labels": [1.0],
        "arms": [SCRATCH, CSM],
        **given,
    }


def reconstruction(*arms: Any, **given: Any) -> dict[str, Any]:
    """A study of what pretrainings rebuild."""
    return spec(**({"task": "reconstruction", "arms": list(arms) or [CSM]} | given))


def make_table(num_patients: int, num_positive: int, cases_each: int = 1) -> ClassTable:
    samples = [
        Sample(f"case{p:03d}_{c}", int(p < num_positive), None, f"patient{p:03d}")
        for p in range(num_patients)
        for c in range(cases_each)
    ]
    return ClassTable(("no", "yes"), tuple(samples))


@pytest.fixture
def dataset(planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    for name, value in planned_dataset.environment.items():
        if name.startswith("nnUNet"):
            monkeypatch.setenv(name, value)
    return Dataset("900", "3d_fullres", tmp_path)


@pytest.fixture
def expand(dataset: Dataset) -> Callable[..., Runs]:
    def expand(records: Mapping[str, Mapping[str, Any]] | None = None, **given: Any) -> Runs:
        return Expansion(parse_study(spec(**given), "study"), "s", dataset, records or {}).expand()

    return expand


# --- what a file may say


@pytest.mark.parametrize("name", study_names())
def test_shipped_studies_are_valid(name: str, tmp_path: Path) -> None:
    study = read_study(name)
    for number, arm in enumerate(study.arms):
        content = {"inherits_from": study.preset, **arm_changes(study, arm)}
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(content))
        preset = read_preset(str(path))
        architecture = preset.architecture(("FLAIR", "T1w"), (0, 1), preset.token_size or (preset.token_edge,) * 3)
        encoder_class(architecture).check(architecture, arm.name)


def test_the_method_of_an_arm_is_a_preset_without_its_size(expand: Callable[..., Runs]) -> None:
    lines = method_of("nemesis")
    assert lines["pretext"]["noise"] == [0.0, 0.05, 0.15, 0.25] and lines["pretext"]["name"] == "maesil"
    assert "max_patch_voxels" not in lines and "description" not in lines
    assert method_of("B") == {}
    arms = [{"name": "MAE3D", "changes": {"pretext": {"reconstruction": {"width": 12, "depth": 1, "num_heads": 2}}}}]
    runs = expand(arms=[{**arms[0], "method": "mae3d"}])
    plans = next(plans for plans in runs.plans.values())
    entry = plans["configurations"]["3d_fullres"]
    assert entry["csm"]["pretext"]["name"] == "mae3d" and entry["csm"]["pretext"]["masking"]["mask_ratio"] == 0.75
    assert entry["csm"]["pretext"]["reconstruction"]["width"] == 12
    assert entry["architecture"]["arch_kwargs"]["encoder"]["kind"] == "joint_vit"
    with pytest.raises(UserError, match="no preset 'no_such'"):
        expand(arms=[{"name": "x", "method": "no_such"}])


def test_the_papers_tables_are_shipped() -> None:
    assert {f"table{n}" for n in range(1, 9)} <= set(study_names())


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"arms": [SCRATCH, SCRATCH]}, "name of its own"),
        ({"arms": []}, "at least one"),
        ({"baseline": "nobody"}, "none of the arms"),
        ({"labels": [0.0]}, r"labels\[0\] is 0.0, expected 0 < labels"),
        ({"labels": [0.5, 0.5]}, "each once"),
        ({"repeats": {"kind": "folds", "number": 1}}, "2 folds"),
        ({"search": {"pretraining.learning_rate": [1]}}, "concerns pretraining"),
        ({"search": {"finetuning.learning_rate": 0.1}}, "list of values"),
        ({"search": {"finetuning.learning_rate": [0.1]}, "task": "classification"}, "does nothing for classification"),
        ({"search": {"classification.schedule.learning_rate": [0.1]}}, "does nothing for segmentation"),
        ({"arms": [{**CSM, "changes": {"stem_closed_share": 0.5}}], "task": "classification"}, "arm 'CSM': stem_closed_share"),
        ({"search": {"network.width": [24, 48]}}, "concerns pretraining"),
        ({"arms": [{**CSM, "incomplete": {"share": 2, "remove": [1]}}]}, "share is 2, expected 0 < share <= 1"),
        ({"arms": [CSM, {"name": "n", "nnunet": {"plans": "p", "minutes_of": "n", "with_pretraining": False}}]}, "minutes_of"),
        ({"arms": [FOREST]}, "the task is segmentation"),
        ({"task": "classification", "arms": [{**FOREST, "method": "dino"}]}, "leave all else out"),
        ({"task": "classification", "arms": [{**FOREST, "mask_volumes": ["../labelsTr"]}]}, "which is no path"),
        (reconstruction(CSM, FOREST), "the task is reconstruction"),
        ({"surprise": 1}, "unknown surprise"),
        ({"arms": [{**CSM, "colour": "red"}]}, "unknown colour"),
        ({"arms": [{**SCRATCH, "encoder": "x.pth"}]}, "leave out pretrained and"),
        ({"arms": [{**SCRATCH, "changes": {"pretraining": {"warmup": 0.2}}}]}, "pretraining does nothing in an arm without"),
        ({"arms": [{**CSM, "encoder": "x.pth", "changes": {"pretraining": {"warmup": 0.2}}}]}, "changes.pretraining does nothing"),
        (reconstruction({**CSM, "encoder": "x.pth"}), "arm 'CSM': encoder does nothing"),
        ({"arms": [{**CSM, "pretraining_series": 0}]}, "pretraining_series is 0, expected 1 <= "),
        (reconstruction(CSM, SCRATCH), "arm 'scratch': pretrained does nothing for reconstruction"),
        (reconstruction(labels=[0.5]), "labels does nothing"),
        (reconstruction(tested="subsets"), "tested does nothing"),
        (reconstruction(structures=["WT"]), "structures does nothing"),
        (reconstruction(repeats={"kind": "folds", "number": 2, "seeds": 3}), "repeats.seeds does nothing"),
        (reconstruction({**CSM, "incomplete": {"share": 0.5, "remove": [1]}}), "arm 'CSM': incomplete does nothing"),
        (reconstruction({**CSM, "changes": {"finetuning": {"learning_rate": 0.1}}}), "finetuning does nothing for recon"),
    ],
)
def test_what_a_study_cannot_mean_is_an_error_that_names_it(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_study(spec(**given), "study x.json")


def test_a_study_inherits_and_replaces(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(spec()))
    (tmp_path / "b.json").write_text(json.dumps({"inherits_from": "a.json", "labels": [0.5]}))
    assert read_study(str(tmp_path / "b.json")) == replace(read_study(str(tmp_path / "a.json")), labels=(0.5,))


@pytest.mark.parametrize(("parent", "complaint"), [("a.json", "inherits from it"), ("table99", "no study 'table99'"), (3, "3")])
def test_what_a_study_cannot_inherit_is_named(tmp_path: Path, parent: Any, complaint: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"inherits_from": "b.json"}))
    (tmp_path / "b.json").write_text(json.dumps(spec(inherits_from=parent)))
    with pytest.raises(UserError, match=complaint):
        read_study(str(tmp_path / "b.json"))


@pytest.mark.parametrize("text", ["[]", "{", '"x"'])
def test_a_file_that_is_no_study_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json"):
        read_study(str(tmp_path / "x.json"))


# --- who trains, validates and tests


@settings(max_examples=30, deadline=None)
@given(st.integers(12, 60), st.integers(1, 3), st.sampled_from([("splits", 3), ("folds", 3), ("folds", 5)]), st.integers(0, 3))
def test_no_patient_is_on_two_sides_and_folds_test_everybody_once(
    num: int, cases_each: int, kind: tuple[str, int], seed: int
) -> None:
    table = make_table(num, num // 3, cases_each)
    patient = {sample.case: sample.patient for sample in table.samples}
    divisions = divide(table, Repeats(kind[0], kind[1], 2))  # type: ignore[arg-type]
    for division in divisions:
        sides = [{patient[case] for case in side} for side in (division.train, division.val, division.test)]
        assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == num
        assert set(labelled(table, division, 0.3, seed)) < set(division.train)
    if kind[0] == "folds":
        assert sorted(case for division in divisions for case in division.test) == sorted(patient)


@pytest.mark.parametrize("seed", range(5))
def test_labelled_patients_are_nested_whole_and_of_all_classes_alike(seed: int) -> None:
    table = make_table(60, 20, 2)
    division = divide(table, Repeats("splits", 1))[0]
    label = {sample.case: sample.class_index for sample in table.samples}
    before: set[str] = set()
    for share in (0.1, 0.25, 0.5, 1.0):
        cases = labelled(table, division, share, seed)
        assert before <= set(cases)
        assert len(cases) == 2 * round(share * len(division.train) / 2)
        assert abs(np.mean([label[case] for case in cases]) - 1 / 3) <= 1 / (len(cases) / 2)
        before = set(cases)
    assert set(labelled(table, division, 0.25, seed)) != set(labelled(table, division, 0.25, seed + 1))


def test_a_case_never_loses_its_last_series() -> None:
    rng = np.random.default_rng(0)
    assert not taken_away(["T1w"], 1.0, (1, 2), rng)
    lost = [taken_away(["T1w", "T2w", "FLAIR"], 1.0, (1, 2, 5), rng) for _ in range(50)]
    assert {len(names) for names in lost} == {1, 2}
    assert sum(bool(taken_away(["a", "b"], 0.25, (1,), rng)) for _ in range(400)) == pytest.approx(100, abs=30)


# --- classes


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


# --- which runs


def test_arms_that_pretrain_alike_share_their_pretraining_and_no_other(expand: Callable[..., Runs]) -> None:
    faster = {"name": "CSM, faster", "changes": {"finetuning": {"learning_rate": 0.01}, "network": {"drop_path": 0.2}}}
    other = {"name": "half", "changes": {"pretext": {"masking": {"mask_ratio": 0.6}}}}
    runs = expand(arms=[SCRATCH, CSM, faster, other, MAE3D], labels=[1.0, 0.5])
    pretraining = {run.id for run in runs.runs.values() if run.kind == "pretraining"}
    needs = {row.arm: set[str | None]() for row in runs.rows}
    for row in runs.rows:
        needs[row.arm].add(runs.runs[row.run].needs)
    assert needs["CSM"] == needs["CSM, faster"] and len(needs["CSM"]) == 2  # folds
    assert needs["scratch"] == {None}
    assert not needs["CSM"] & needs["half"] and not needs["CSM"] & needs["MAE3D"]
    assert len(pretraining) == 3 * 2
    # arms, shares, folds
    assert len(runs.rows) == len({row.run for row in runs.rows}) == 5 * 2 * 2


def test_an_arm_starts_from_weights_of_elsewhere_unless_they_saw_who_is_tested(
    expand: Callable[..., Runs], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = csm_plans()
    paths = [tmp_path / f"{fold}.pth" for fold in range(2)]
    monkeypatch.setenv("somewhere", str(tmp_path))
    arms = [SCRATCH, {"name": "elsewhere", "encoder": "$somewhere/{division}.pth"}]
    with pytest.raises(UserError, match=f"study s: arm 'elsewhere': {paths[0]}: no such checkpoint"):
        expand(arms=arms)
    saved = checkpoint_of(plans, pretext_of(read_configuration(plans, "3d_fullres", "plans")).state_dict()) | {
        "training_cases": ["Dataset001_Tiny/one"]
    }
    for fold, path in enumerate(paths):
        checkpoint.save({**saved, "fold": fold}, path)
    runs = expand(arms=arms)
    started = {row.division: runs.runs[row.run] for row in runs.rows if row.arm == "elsewhere"}
    assert {fold: run.encoder for fold, run in started.items()} == dict(enumerate(paths))
    assert len(runs.runs) == len(runs.rows) == 4 and not any(run.needs for run in runs.runs.values())
    assert all(
        runs.plans[r.plans_name]["configurations"]["3d_fullres"]["csm"]["finetuning"]["encoder"] == "auto"
        for r in started.values()
    )
    tested = next(iter(started[1].tests[0].channels))
    seen = tmp_path / "seen.pth"
    checkpoint.save({**saved, "training_cases": [f"{started[1].dataset}/{tested}"]}, seen)
    with pytest.raises(UserError, match=f"{seen} learned from images of 1 test cases of division 1"):
        expand(arms=[SCRATCH, {"name": "elsewhere", "encoder": str(seen)}])


def test_folds_of_a_setting_share_plans_and_no_two_settings_do(expand: Callable[..., Runs]) -> None:
    runs = expand(labels=[1.0, 0.5])
    plans: dict[tuple[str, float], set[str]] = defaultdict(set)
    for row in runs.rows:
        plans[row.arm, row.labels].add(runs.runs[row.run].plans_name)
    assert all(len(names) == 1 for names in plans.values())
    assert len(set.union(*plans.values())) == 4


def splits_of(runs: Runs, run: str) -> str:
    plans = runs.plans[runs.runs[run].plans_name]
    return str(plans["configurations"]["3d_fullres"]["csm"]["splits"])


def test_no_run_learns_from_patients_it_is_judged_by(expand: Callable[..., Runs]) -> None:
    runs = expand(arms=[CSM, MAE3D], labels=[1.0, 0.5], repeats={"kind": "folds", "number": 2, "seeds": 3})
    for run in runs.runs.values():
        csm = runs.plans[run.plans_name]["configurations"]["3d_fullres"]["csm"]
        sides = runs.splits[csm["splits"]][run.fold]
        images = {*sides["train"], *sides.get("unlabelled", ())}
        assert not images & {*sides["val"], *sides["test"]}
        # of all training patients, however few of them are labelled
        assert run.needs is None or images == set(runs.splits[splits_of(runs, run.needs)][run.fold]["train"])
        assert all(source["labelled"] for source in csm["sources"])  # test images would train in every fold
        for test in run.tests:
            assert set(test.channels) == set(sides["test"])
        if run.needs is not None:
            pretraining = runs.runs[run.needs]
            assert pretraining.fold == run.fold
            seen = runs.splits[runs.plans[pretraining.plans_name]["configurations"]["3d_fullres"]["csm"]["splits"]][run.fold]
            assert set(sides["train"]) <= set(seen["train"]) and seen["test"] == sides["test"]


def test_changes_that_are_no_preset_are_refused_by_the_name_of_the_study(dataset: Dataset) -> None:
    dataset.study = "mine.json"
    with pytest.raises(UserError, match=r"^study mine\.json: preset demo with its changes.*network is ''"):
        dataset.plans("demo", {"network": ""})


def test_images_of_imagests_are_drawn_on_and_never_tested(
    planned_dataset: PlannedDataset, dataset: Dataset, tmp_path: Path
) -> None:
    more = Dataset("900", "3d_fullres", tmp_path / "more", test_images=True)
    sources = [source.subset for source in more.settings({**more.plans("demo", {}), "plans_name": "x"}).csm.sources]
    assert sources == ["imagesTr", "imagesTs"] and more.present == dataset.present


def test_expanding_twice_names_the_same_runs_and_a_moved_study_too(dataset: Dataset, tmp_path: Path) -> None:
    study = parse_study(spec(arms=[SCRATCH, CSM, MAE3D]), "study")
    first = Expansion(study, "s", dataset, {}).expand()
    elsewhere = Dataset("900", "3d_fullres", tmp_path / "elsewhere")
    assert list(first.runs) == list(Expansion(study, "s", elsewhere, {}).expand().runs)


@pytest.mark.parametrize(
    ("tested", "expected"), [("all", lambda n: 1), ("one_missing", lambda n: n + 1), ("subsets", lambda n: 2**n - 1)]
)
def test_subsets_of_series_are_tested_by_one_network(
    expand: Callable[..., Runs], dataset: Dataset, tested: str, expected: Callable[[int], int]
) -> None:
    runs = expand(arms=[SCRATCH], tested=tested)
    (run, *_) = runs.runs.values()
    num_series = len(dataset.series)
    assert len({test.name for test in run.tests}) == len(run.tests) == expected(num_series)
    if tested == "one_missing":
        assert all(test.name == "all" or len(test.name.split("+")) == num_series - 1 for test in run.tests)
    for test in run.tests:
        wanted = set(dataset.series) if test.name == "all" else set(test.name.split("+"))
        for case, channels in test.channels.items():
            assert {dataset.series[channel] for channel in channels} == wanted & set(dataset.present[case])


def test_each_series_alone_is_fine_tuned_from_the_encoder_of_all(expand: Callable[..., Runs], dataset: Dataset) -> None:
    runs = expand(arms=[CSM], finetuned="both")
    assert {row.finetuned for row in runs.rows} == {"all", *dataset.series}
    assert len({runs.runs[row.run].needs for row in runs.rows}) == 2  # folds
    for row in runs.rows:
        network = runs.plans[runs.runs[row.run].plans_name]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        assert network["series"] == (list(dataset.series) if row.finetuned == "all" else [row.finetuned])


def test_pretraining_on_some_series_only(expand: Callable[..., Runs], dataset: Dataset) -> None:
    runs = expand(arms=[{"name": "two", "pretraining_series": 2}, CSM])
    for run in runs.runs.values():
        (source,) = runs.plans[run.plans_name]["configurations"]["3d_fullres"]["csm"]["sources"]
        expected = dataset.series
        if run.kind == "pretraining" and run.id in {runs.runs[r.run].needs for r in runs.rows if r.arm == "two"}:
            expected = dataset.series[:2]
        assert tuple(source["channels"]) == expected


def test_incomplete_series_are_gone_from_labels_and_tests_but_not_from_pretraining(expand: Callable[..., Runs]) -> None:
    arm = {"name": "incomplete", "incomplete": {"share": 1.0, "remove": [1]}}
    complete, incomplete = expand(arms=[CSM]), expand(arms=[arm])
    for one, other in zip(complete.runs.values(), incomplete.runs.values(), strict=True):
        if one.kind == "pretraining":
            assert one == other
            continue
        for case, channels in one.tests[0].channels.items():
            assert len(other.tests[0].channels[case]) == max(1, len(channels) - 1)
        (source,) = incomplete.plans[other.plans_name]["configurations"]["3d_fullres"]["csm"]["sources"]
        assert len(source["absent_series"]) >= NUM_TRAINING - 1


def test_a_search_tries_as_much_for_every_arm_and_takes_the_best_on_validation(expand: Callable[..., Runs]) -> None:
    given = {"search": {"finetuning.learning_rate": [0.1, 0.2, 0.3]}, "arms": [SCRATCH, CSM]}
    searching = expand(**given)
    assert not searching.rows and len(searching.waiting) == 2 * 2
    tried = [run for run in searching.runs.values() if run.kind == "fine-tuning"]
    assert len(tried) == 2 * 2 * 3 and {run.fold for run in tried} == {0, 1}

    def rate(runs: Runs, run: Run) -> float:
        csm = runs.plans[run.plans_name]["configurations"]["3d_fullres"]["csm"]
        return float(csm["finetuning_schedule"]["learning_rate"])

    # each division by itself: the validation patients of one are tested in the other
    best = {run.id: (0.3 if run.needs else 0.2) if run.fold == 0 else 0.1 for run in tried}
    records = {run.id: {"validation": 1.0 if rate(searching, run) == best[run.id] else 0.5} for run in tried}
    found = expand(records, **given)
    assert not found.waiting
    chosen = {(row.arm, row.division): rate(found, found.runs[row.run]) for row in found.rows}
    assert chosen == {("scratch", 0): 0.2, ("CSM", 0): 0.3, ("scratch", 1): 0.1, ("CSM", 1): 0.1}
    # what was tried is not trained again
    assert {row.run for row in found.rows} <= set(records)


def test_the_yardstick_gets_the_time_the_arm_took(expand: Callable[..., Runs]) -> None:
    stock = {"plans": "nnUNetPlans", "minutes_of": "CSM"}
    arms = [CSM, *({"name": f"n{both}", "nnunet": {**stock, "with_pretraining": both}} for both in (False, True))]
    first = expand(arms=arms)
    assert len(first.waiting) == 2 and {row.arm for row in first.rows} == {"CSM"}
    records = {run.id: {"seconds": 600.0 if run.kind == "pretraining" else 120.0} for run in first.runs.values()}
    runs = expand(records, arms=arms)
    minutes = {row.arm: runs.plans[runs.runs[row.run].plans_name].get("csm_yardstick", {}).get("minutes") for row in runs.rows}
    assert minutes == {"CSM": None, "nFalse": 2.0, "nTrue": 12.0}


def test_seeds_of_the_yardstick_are_networks_of_their_own(expand: Callable[..., Runs]) -> None:
    given: dict[str, Any] = {
        "arms": [CSM, {"name": "n", "nnunet": {"plans": "nnUNetPlans", "minutes_of": "CSM", "with_pretraining": False}}]
    }
    given |= {"repeats": {"kind": "folds", "number": 2, "seeds": 3}}
    records = {run.id: {"seconds": 60.0} for run in expand(**given).runs.values()}
    rows = [row for row in expand(records, **given).rows if row.arm == "n"]
    assert len({row.run for row in rows}) == len({row.repeat for row in rows}) == len(rows) == 2 * 3
    assert all(row.repeat // 3 == row.division for row in rows)


def test_runs_are_pretrainings_on_one_size_of_patch_scored_on_unseen_cases(expand: Callable[..., Runs]) -> None:
    smaller = {"name": "smaller", "changes": {"pretraining_grid": [2, 2, 2]}}
    runs = expand(**reconstruction(CSM, MAE3D, smaller, AUTOENCODER))
    # arms that differ in the size of patches only are one
    assert {run.kind for run in runs.runs.values()} == {"pretraining"} and len(runs.runs) == 3 * 2 and len(runs.rows) == 4 * 2
    sizes = set()
    for run in runs.runs.values():
        csm = runs.plans[run.plans_name]["configurations"]["3d_fullres"]["csm"]
        sizes.add(tuple(csm["pretraining_patch_size"]))
        sides = runs.splits[csm["splits"]][run.fold]
        (test,) = run.tests
        assert set(test.channels) == set(sides["test"]) and not set(sides["test"]) & {*sides["train"], *sides["val"]}
    (size,) = sizes
    token = runs.plans[next(iter(runs.plans))]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["token_size"]
    assert size == tuple(2 * edge for edge in token)


def test_arms_that_cannot_be_compared_are_refused(expand: Callable[..., Runs]) -> None:
    head = {"hidden": 8, "bottleneck": 4, "num_prototypes": 8}
    dino = {"name": "DINO", "changes": {"pretext": {"name": "dino", "head": head}}}
    with pytest.raises(UserError, match="arm 'DINO': dino rebuilds nothing"):
        expand(**reconstruction(CSM, dino))
    with pytest.raises(UserError, match="different series"):
        expand(**reconstruction(CSM, {"name": "one", "pretraining_series": 1}))


def test_what_would_stop_runs_hours_later_is_told_at_once(expand: Callable[..., Runs]) -> None:
    stock = {"plans": "nnUNetResEncUNetMPlans", "minutes_of": "CSM", "with_pretraining": False}
    with pytest.raises(UserError, match="nnUNetResEncUNetMPlans"):
        expand(arms=[CSM, {"name": "n", "nnunet": stock}])
    with pytest.raises(UserError, match=r"classification\.csv"):
        expand(task="classification")
    with pytest.raises(UserError, match="leave the arm out"):
        expand(arms=[{"name": "many", "pretraining_series": 9}])


def test_cases_without_a_class_are_segmented_all_the_same() -> None:
    table = make_table(3, 1)
    cases = [sample.case for sample in table.samples]
    found = everybody(table, [*cases, "x", "y"], {"y": table.samples[0].patient})
    assert [sample.patient for sample in found.samples][-2:] == ["x", table.samples[0].patient] and len(found.samples) == 5
    assert everybody(table, cases, {}) is table


def test_visits_of_a_patient_stay_on_one_side_without_a_class_table(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw" / dataset.name
    shutil.copytree(nnunet.folder("nnUNet_raw") / dataset.name, raw)
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    cases = sorted(sample.case for sample in dataset.table.samples)
    assert len({sample.patient for sample in dataset.table.samples}) == len(cases) > 3
    manifest = {"cases": {case: {"patient": f"p{number // 2}"} for number, case in enumerate(cases[1:])}}
    nnunet.save_json(manifest, raw / MANIFEST)
    again = Dataset("900", "3d_fullres", dataset.folder)
    patients = {sample.case: sample.patient for sample in again.table.samples}
    assert patients == {cases[0]: cases[0], **{case: f"p{number // 2}" for number, case in enumerate(cases[1:])}}
    for division in divide(again.table, Repeats("folds", 2)):
        sides = [{patients[case] for case in side} for side in (division.train, division.val, division.test)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert f"{len(cases)} cases of {len(set(patients.values()))} patients" in again.described()


@pytest.mark.parametrize(
    ("given", "name"), [("few_labels", "few_labels"), ("a/b c.json", "b-c"), ("__x__y_.json", "x_y"), ("_.json", "study")]
)
def test_the_name_of_a_study_can_be_part_of_nnunets_names(given: str, name: str) -> None:
    assert study_name(given) == name


def test_what_only_people_read_makes_no_other_run(dataset: Dataset) -> None:
    plans = dataset.plans(str(TINY_PRESET), {})
    other = json.loads(json.dumps(plans))
    csm = other["configurations"]["3d_fullres"]["csm"]
    csm["preset"], csm["reasons"] = "x", {}
    assert essence(plans) == essence(other) and hashed(plans) != hashed(other)
    csm["pretext"]["masking"]["mask_ratio"] = 0.123
    assert essence(plans) != essence(other)


def test_stock_nnunet_is_given_what_it_was_trained_with(expand: Callable[..., Runs], dataset: Dataset) -> None:
    given = {"arms": [CSM, {"name": "n", "nnunet": {"plans": "nnUNetPlans", "minutes_of": "CSM", "with_pretraining": False}}]}
    runs = expand({run.id: {"seconds": 60.0} for run in expand(**given).runs.values()}, **given)
    assert any(len(names) < len(dataset.series) for names in dataset.present.values())
    for row in runs.rows:
        (test,) = runs.runs[row.run].tests
        for case, channels in test.channels.items():
            assert len(channels) == (len(dataset.series) if row.arm == "n" else len(dataset.present[case]))


def test_a_run_is_done_when_it_has_the_tests_asked_for(tmp_path: Path) -> None:
    run = replace(make_run("x"), tests=(Evaluation("all", {}),))
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "record.json").write_text('{"tests": ["all"]}')
    assert read_records(tmp_path, [run])
    assert not read_records(tmp_path, [replace(run, tests=(*run.tests, Evaluation("T1w", {})))])


@pytest.mark.parametrize("given", [None, "3", "GPU-abc,GPU-def"])
def test_gpus_are_those_the_user_lets_be_seen(given: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    count = 2 if given is None else len(given.split(","))
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert visible_gpus(1) == ["0" if given is None else given.split(",")[0]]
    with pytest.raises(UserError, match="-num_gpus 3"):
        visible_gpus(3)


def test_visible_tokens_are_those_masks_show(expand: Callable[..., Runs], dataset: Dataset) -> None:
    runs = expand(arms=[CSM, {"name": "none", "changes": {"pretext": {"masking": {"hidden_series": "none"}}}}, MAE3D])
    visible = {row.arm: runs.runs[runs.runs[row.run].needs or ""].visible_tokens for row in runs.rows}
    mean_present = np.mean([len(names) for names in dataset.present.values()])
    settings = dataset.settings(next(iter(runs.plans.values())))
    shown = round((1 - masking_of(settings).mask_ratio) * np.prod(settings.pretraining_grid))
    assert visible["none"] == pytest.approx(mean_present * shown)
    assert visible["CSM"] < visible["none"]
    assert visible["MAE3D"] == round(0.25 * np.prod(settings.pretraining_grid))


def test_costs_grow_with_what_is_computed(expand: Callable[..., Runs], dataset: Dataset) -> None:
    runs = expand(arms=[CSM])
    of = {run.kind: dataset.settings(runs.plans[run.plans_name]) for run in runs.runs.values()}
    # with more series in a case, more tokens are visible, and more are rebuilt
    few, many = (pretraining_cost(of["pretraining"], torch.ones(4, 3).tril(n) > 0).operations_per_crop for n in (0, 2))
    assert 0 < few < many
    finetuning = finetuning_cost(of["fine-tuning"], len(dataset.series), 4, classifies=False)
    assert finetuning.num_crops == of["fine-tuning"].csm.finetuning_schedule.num_iterations * 2
    assert finetuning.seconds(2e9) == pytest.approx(finetuning.seconds(1e9) / 2)


def test_attention_is_counted() -> None:
    with FakeTensorMode():
        query = torch.empty(2, 3, 5, 8, requires_grad=True)
        # two products of 5 x 5 x 8 for each of 6 heads, and two for each of them backward
        assert counted(AttentionOnly(), query) == 3 * 2 * (2 * 5 * 5 * 8) * 6


class AttentionOnly(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


# --- in which order, and what a failure stops


def make_run(name: str, needs: str | None = None) -> Run:
    return Run(name, "fine-tuning", "d", "c", "p", "t", 0, needs, None, (), 0, 0.0)


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_runs_wait_for_what_they_need_and_a_failure_stops_only_those_that_need_it(at_once: int) -> None:
    begun: list[str] = []
    runs = [make_run("a"), make_run("a1", "a"), make_run("b"), make_run("b1", "b"), make_run("c1", "c"), make_run("d")]

    def launch(run: Run) -> None:
        assert run.needs is None or run.needs in begun or run.needs == "c"
        begun.append(run.id)
        if run.id == "b":
            raise OSError("no space left")

    ended = {run.id: error for run, error in perform(runs, ["c", "d"], launch, at_once)}
    assert set(ended) == set(begun) == {"a", "a1", "b", "c1"}
    assert {name: str(error) for name, error in ended.items() if error} == {"b": "run b: OSError: no space left"}


def test_a_cluster_does_runs_as_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # submitit's executor of local processes stands in for SLURM's; what it is given is pickled alike
    launch, at_once = cluster(tmp_path, "cpu", {"timeout_min": 10}, 3, kind="local")
    assert at_once == 3
    run = replace(make_run("x"), kind="pretraining", trainer="nnUNetTrainerCSMPretrain", dataset="Dataset999_None")
    for variable in nnunet.FOLDER_VARIABLES:
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(UserError, match="x"):
        launch(run)
    said = (tmp_path / "runs" / "x" / "log.txt").read_text(encoding="utf-8")
    # by the command itself, in a process of its own
    assert "$ pretrain" in said and "Dataset999_None/p.json: no such file" in said


def test_without_slurm_the_remedy_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="-slurm"):
        cluster(tmp_path, "cpu", {"no_such_parameter": 1}, 1, kind="local")


# --- the whole


def request(study: Path, output: Path) -> StudyRequest:
    return StudyRequest(str(study), None, "nnUNetPlans", "900", "3d_fullres", output, "cpu", 1, 2, None)


def test_a_dry_run_tells_runs_and_costs_and_writes_no_plans(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], planned_dataset: PlannedDataset
) -> None:
    (tmp_path / "dry.json").write_text(json.dumps(spec(arms=[SCRATCH, CSM, MAE3D])))
    run_study(request(tmp_path / "dry.json", tmp_path / "out"), dry_run=True, report_only=False)
    said = capsys.readouterr().out
    assert "4 pretraining" in said and "6 fine-tuning" in said and "visible tokens" in said and "hours" in said
    assert not list((planned_dataset.folders.preprocessed / planned_dataset.name).glob("*dry*"))


def study_of_warm_steps(*arguments: str) -> int:
    """`nnunet_csm study`, in a process of its own, whose steps start warm as well and end with it."""
    execution.run_command = warm_step  # type: ignore[assignment]
    return cli.main(["study", *arguments])


def warm_step(command: Sequence[str], environment: Mapping[str, str], stdout: TextIO) -> int:
    assert command[:2] == ["-m", measured.__name__]
    log = Path(stdout.name)
    process = warm_processes.start(measured.main, [command[2:]], environment, log, log, os.getpgrp())
    process.join()
    # its exit code is read once, by either of the threads that do runs; the file is written when all went well
    return int(not Path(command[2]).is_file())


def start_study(planned: PlannedDataset, file: Path, output: Path) -> warm_processes.WarmProcess:
    arguments = [str(file), "-d", "900", "-device", "cpu", "-jobs", "2", "-o", str(output)]
    said = output.with_suffix(".txt")
    return warm_processes.start(study_of_warm_steps, arguments, planned.environment, said, said)


def ended_well(process: warm_processes.WarmProcess) -> bool:
    process.join(600)
    return process.exitcode == 0


@pytest.mark.slow
def test_a_study_that_was_killed_does_only_what_is_missing_and_gives_the_same_tables(
    planned_dataset: PlannedDataset, tmp_path: Path
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.json").write_text(json.dumps(spec(arms=[CSM])))
    assert ended_well(start_study(planned_dataset, tmp_path / "whole.json", tmp_path / "whole"))

    output = tmp_path / "killed"
    process = start_study(planned_dataset, tmp_path / "killed.json", output)
    # in the middle: one run is done, others are not
    while not list(output.glob("runs/*/record.json")):
        assert process.is_alive()
        time.sleep(0.1)
    assert process.pid
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    done = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/record.json")}
    assert 0 < len(done) < 4 and not (output / "results.csv").exists()
    assert ended_well(start_study(planned_dataset, tmp_path / "killed.json", output))
    assert all(path.stat().st_mtime_ns == written for path, written in done.items())

    whole, again = (pd.read_csv(folder / "results.csv") for folder in (tmp_path / "whole", output))
    assert whole["case"].nunique() == NUM_TRAINING
    columns = ["arm", "labels", "repeat", "tested", "case", "structure", "dice"]
    pd.testing.assert_frame_equal(whole[columns], again[columns])
    for folder in (tmp_path / "whole", output):
        assert {"report.html", "tables.md", "tables.tex", "costs.csv", "study.json"} <= {f.name for f in folder.iterdir()}
        record = json.loads(next(folder.glob("runs/*/record.json")).read_text())
        assert record["seconds"] > 0 and record["peak_memory_gb"] > 0 and record["software"]["torch"]


@pytest.mark.slow
def test_a_study_of_reconstructions_to_its_page(planned_dataset: PlannedDataset, tmp_path: Path) -> None:
    study = reconstruction(CSM, MAE3D, AUTOENCODER)
    (tmp_path / "r.json").write_text(json.dumps(study))
    output = tmp_path / "out"
    assert ended_well(start_study(planned_dataset, tmp_path / "r.json", output)), output.with_suffix(".txt").read_text()
    results = pd.read_csv(output / "results.csv")
    assert set(results["arm"]) == {"CSM", "MAE3D", "AE"} and np.isfinite(results["ssim"]).all()
    truths = [torch.load(path, weights_only=True) for path in output.glob("runs/*/slices.pt")]
    assert len(truths) == 3 * 2
    of_cases: dict[str, Any] = {}
    for truth in truths:
        for case, of_case in truth.items():
            for series, kept in of_case.items():
                assert kept["true"].equal(of_cases.setdefault(f"{case} {series}", kept["true"]))
    text = (output / "report.html").read_text(encoding="utf-8")
    assert "Cost" in text and "The same patches" in text and "Pretraining" in text
