"""What the file of a study may say."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from studies import CSM, FOREST, SCRATCH, reconstruction, spec

from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import encoder_class
from nnunet_csm.planning.presets import method_of, read_preset
from nnunet_csm.study.command import study_name
from nnunet_csm.study.expansion import arm_changes
from nnunet_csm.study.runs import Runs
from nnunet_csm.study.spec import parse_study, read_study, study_names


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
        (
            {"arms": [{**CSM, "encoder": "x.pth", "changes": {"pretraining": {"warmup": 0.2}}}]},
            "changes.pretraining does nothing",
        ),
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


@pytest.mark.parametrize(
    ("given", "name"), [("few_labels", "few_labels"), ("a/b c.json", "b-c"), ("__x__y_.json", "x_y"), ("_.json", "study")]
)
def test_the_name_of_a_study_can_be_part_of_nnunets_names(given: str, name: str) -> None:
    assert study_name(given) == name
