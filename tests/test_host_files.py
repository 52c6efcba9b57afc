"""dataset.json, splits_final.json and plans as people write them: what nnU-Net cannot follow is told before it starts."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from factories import DATASET_JSON, base_plans
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_csm import nnunet
from nnunet_csm.cli import main
from nnunet_csm.data.sources import split
from nnunet_csm.doctor import of_dataset
from nnunet_csm.errors import UserError
from nnunet_csm.fingerprint.labels import check_label_values
from nnunet_csm.host_files import check_dataset_json, check_labels, check_plans, check_splits
from nnunet_csm.nnunet import read_splits
from nnunet_csm.planning.request import check_raw, split_lines
from nnunet_csm.raw.check import check_dataset
from nnunet_csm.raw.manifest import save_manifest

REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}


# --- labels ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ({}, None),
        ({"background": 0, "a": 1, "b": 2}, None),
        ({"b": 2, "background": 0, "a": 1}, None),
        ({"background": 0, "a": 1, "ignore": 2}, None),
        ({"background": 0, "a": [1], "b": [2]}, None),
        ({"background": 0, "1": 1, "2": 2}, None),
        (REGIONS, [1, 2, 3]),
        ({**REGIONS, "ignore": 4}, [1, 2, 3]),
        ({"background": 0, "whole": [1, 2, 4], "core": [1, 4], "enhancing": 4}, [2, 1, 4]),
    ],
)
def test_labels_that_nnunet_can_follow_are_taken(labels: dict, order: list | None) -> None:
    check_labels(labels, order, "dataset.json")
    if labels:
        LabelManager(labels, order)


@pytest.mark.parametrize(
    ("labels", "order", "told"),
    [
        ({"0": "background", "1": "edema"}, None, r'the decathlon.s way round.*write "labels": {"background": 0, "edema": 1}'),
        ({"a": 1, "b": 2}, None, 'no background in .*expected "background": 0'),
        ({"background": 1, "a": 0}, None, "background is 1"),
        ({"background": [0], "a": 1}, None, r"background is \[0\]"),
        ({"background": 0, "a": 1, "c": 3}, None, r"have the values 0, 1, 3, but not 2; expected 0, 1, 2, \.\.\. without a gap"),
        ({"background": 0, "a": 1, "b": 1}, None, "a and b are both 1"),
        ({"background": 0, "a": 1, "ignore": 2, "c": 3}, None, "ignore is 2, expected 4"),
        ({"background": 0, "a": 1, "ignore": [2, 3]}, None, r"ignore is \[2, 3\], expected 2"),
        ({"background": 0, "a": 1, "ignore": 3}, None, "ignore is 3, expected 2"),
        ({"background": 0, "a": True}, None, "labels.a.* is True, expected int"),
        ({"background": 0, "a": 1.0}, None, "labels.a.* is 1.0, expected int"),
        ({"background": 0, "a": "1"}, None, "labels.a.* is '1', expected int"),
        ({"background": 0, "a": -1}, None, "labels.a.* is -1, expected 0 <="),
        ({"background": 0, "a": []}, None, r"labels.a is \[\]"),
        (["background", "a"], None, "labels is .*, expected a JSON object"),
        (REGIONS, None, "regions_class_order; add it: a list of 3 values, one for each of whole, core, enhancing"),
        (REGIONS, [1, 2], "regions_class_order is .*expected a list of 3"),
        (REGIONS, [1, 2, 5], "regions_class_order is .*of 0, 1, 2, 3"),
        (REGIONS, "123", "regions_class_order is '123'"),
    ],
)
def test_labels_that_nnunet_or_its_loss_would_end_on_are_told(labels: Any, order: Any, told: str) -> None:
    with pytest.raises(UserError, match=rf"^dataset\.json.*{told}"):
        check_labels(labels, order, "dataset.json")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"channel_names": {"1": "T2w"}}, "channel_names has the keys 1, expected 0: channels count from 0"),
        ({"channel_names": ["T2w"]}, "channel_names is .*expected a JSON object"),
        ({"channel_names": {"0": 3}}, "channel_names.0 is 3, expected str"),
        ({"channel_names": {}}, "no channel_names"),
        ({"file_ending": "nii.gz"}, "file_ending is 'nii.gz', expected one that begins with a dot"),
        ({"file_ending": "/../x.nii.gz"}, "file_ending is .*expected a name"),
        ({"file_ending": ""}, "file_ending is '', expected a name"),
        ({"numTraining": "10"}, "numTraining is '10', expected int"),
        ({"dataset": {"../x": {"images": []}}}, "dataset: the key is '../x', expected a name"),
        ({"dataset": {"a": {"images": "x"}}}, "dataset.a.images is 'x'"),
        ({"labels": {}}, "labels is {}"),
    ],
)
def test_other_mistakes_in_dataset_json_are_told(changes: dict, told: str) -> None:
    check_dataset_json(DATASET_JSON, "/data/dataset.json")
    with pytest.raises(UserError, match=rf"^/data/dataset\.json.*{told}"):
        check_dataset_json({**DATASET_JSON, **changes}, "/data/dataset.json")


def test_no_remedy_removes_an_image(tmp_path: Path) -> None:
    raw = dataset(tmp_path, values=[[0, 1]])
    for path in list((raw / "imagesTr").iterdir()):
        path.rename(path.with_name(path.name.replace("_0000", "_0001")))
    for names in ({"1": "FLAIR"}, {"0": "FLAIR"}):
        content = json.loads((raw / "dataset.json").read_text()) | {"channel_names": names}
        with pytest.raises(UserError, match="channel_names") as caught:
            check_dataset(raw, content)
        assert "remove it" not in str(caught.value) and "delete" not in str(caught.value)


# --- values of masks ---------------------------------------------------------------------------------------------------------


def dataset(folder: Path, values: list[list[float]], dtype: type = np.uint8, **changes: Any) -> Path:
    """A raw dataset whose case number n has a mask of the n-th values."""
    raw = folder / "Dataset001_Values"
    for name in ("imagesTr", "labelsTr"):
        (raw / name).mkdir(parents=True)
    for number, of_case in enumerate(values):
        mask: Any = np.resize(np.array(of_case, dtype), (3, 4, 5))
        for path, voxels in (("imagesTr/c{}_0000.nii.gz", np.random.rand(3, 4, 5)), ("labelsTr/c{}.nii.gz", mask)):
            sitk.WriteImage(sitk.GetImageFromArray(voxels), str(raw / path.format(number)))
    content = {"channel_names": {"0": "FLAIR"}, "labels": {"background": 0, "a": 1, "b": 2}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps({**content, "numTraining": len(values), **changes}))
    return raw


def checked(raw: Path) -> list[str]:
    return check_label_values(raw, json.loads((raw / "dataset.json").read_text()), 1)


def test_values_that_are_named_are_taken_and_names_that_no_mask_holds_are_said(tmp_path: Path) -> None:
    assert checked(dataset(tmp_path / "all", [[0, 1], [0, 1, 2]])) == []
    assert checked(dataset(tmp_path / "floats", [[0.0, 1.0, 2.0]], np.float32)) == []
    few = checked(dataset(tmp_path / "few", [[0, 1], [0]]))
    assert few == ["no mask of Dataset001_Values holds 2 (b), which dataset.json names"]
    regions: dict[str, Any] = {"labels": {"background": 0, "w": [1, 2], "c": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    assert checked(dataset(tmp_path / "regions", [[0, 1, 2, 3]], **regions)) == []


@pytest.mark.parametrize(
    ("values", "dtype", "told"),
    [
        (
            [[0, 1], [0, 4], [0, 4]],
            np.uint8,
            r"c1.nii.gz: the mask holds the value 4 \(2 masks .*name 0 background, 1 a, 2 b",
        ),
        ([[0, 1.5]], np.float32, r"c0.nii.gz: the mask holds the value 1.5"),
        ([[0, -1]], np.int16, r"the value -1"),
        ([[0, 257]], np.int16, r"the value 257"),
    ],
)
def test_a_value_without_a_name_is_told_with_its_mask(tmp_path: Path, values: list, dtype: type, told: str) -> None:
    with pytest.raises(UserError, match=told):
        checked(dataset(tmp_path, values, dtype))


def test_a_mask_that_was_cut_off_is_told(tmp_path: Path) -> None:
    raw = dataset(tmp_path, [[0, 1], [0, 1]])
    path = raw / "labelsTr" / "c1.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"c1.nii.gz: cannot be read .*copy it again"):
        checked(raw)


def test_the_masks_of_a_dataset_are_looked_at_before_a_preset_and_before_nnunet(nnunet_folders, capsys) -> None:
    raw = dataset(nnunet_folders.raw, [[0, 1, 2], [0, 4]])
    with pytest.raises(SystemExit) as ended:
        main(["plan_and_preprocess", "-d", "1", "-preset", "not_there.json", "-np", "1"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "c1.nii.gz: the mask holds the value 4" in said and said.count("\n") == 1
    assert not list(nnunet_folders.preprocessed.iterdir())
    findings = [finding for finding in of_dataset("1", "3d_fullres") if finding.mark == "UNUSABLE" and finding.remedy]
    assert [finding.what for finding in findings] == [raw.name] and "the value 4" in findings[0].remedy


# --- splits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"train": ["a",], "val": []}]', "not valid JSON.*nnunet_csm split"),
        ('{"train": ["a"], "val": ["b"]}', "expected a JSON list"),
        ("[]", "holds no fold"),
        ("[null]", "fold 0 is None, expected train and val"),
        ('[{"train": ["a"]}]', "fold 0 is .*expected train and val"),
        ('[{"train": ["a"], "val": ["b"]}, {"train": "a", "val": ["b"]}]', "fold 1.train is 'a', expected a list"),
        ('[{"train": ["a"], "val": [3]}]', r"val\[0\] is 3, expected str"),
        ('[{"train": ["../a"], "val": ["b"]}]', r"train\[0\] is '../a', expected a name"),
        ('[{"train": ["a"], "val": []}]', "fold 0: val is empty"),
        ('[{"train": ["a", "b"], "val": ["b", "c"]}]', "fold 0: b is in train and in val .*keep it on one side"),
        ('[{"train": ["a", "b", "a"], "val": ["c"]}]', "fold 0: a is in train and in train .*keep it once"),
        ('[{"train": ["a"], "val": ["c"], "test": ["a"]}]', "fold 0: a is in train and in test"),
    ],
)
def test_splits_that_are_none_are_told_with_their_file(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(text)
    for read in (lambda: read_splits(path), lambda: split(tmp_path, ["a", "b", "c"], 0)):
        with pytest.raises(UserError, match=rf"splits_final\.json.*{told}"):
            read()


def test_a_case_that_is_not_there_is_told_with_how_names_look(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a"], "val": ["b.nii.gz"]}]))
    with pytest.raises(UserError, match=r"splits_final.json: fold 0: val names b.nii.gz .*no ending and no channel, such as a"):
        split(tmp_path, ["b", "a"], 0)
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"], "test": ["elsewhere"]}]))
    assert split(tmp_path, ["b", "a"], 0) == (["a"], ["b"])


def test_a_patient_on_both_sides_is_said(nnunet_folders) -> None:
    raw = dataset(nnunet_folders.raw, [[0, 1, 2]] * 3)
    save_manifest(
        raw,
        raw.name,
        {"reference": "finest", "register": False, "zero_background": False},
        {f"c{n}": {"patient": "p" if n < 2 else "q"} for n in range(3)},
        {},
    )
    path = raw / "splits_final.json"
    path.write_text(json.dumps([{"train": ["c0", "c1"], "val": ["c2"]}]))
    assert split_lines(raw.name) == []
    path.write_text(json.dumps([{"train": ["c0", "c1"], "val": ["c2"]}, {"train": ["c0", "c2"], "val": ["c1"]}]))
    assert split_lines(raw.name) == ["fold 1: patient p is in train and in val (1 such); scores are too good"]
    path.write_text(json.dumps([{"train": ["c0", "c9"], "val": ["c2"]}]))
    with pytest.raises(UserError, match="train names c9"):
        check_raw(raw.name, 1)


# --- plans -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "value", "told"),
    [
        (["configurations"], [], "configurations is .*expected a JSON object"),
        (["configurations", "3d_fullres"], None, "3d_fullres is None"),
        (["configurations", "3d_fullres", "spacing"], [1.0, 0.0, 1.0], r"spacing\[1\] is 0.0, expected 0 < spacing"),
        (["configurations", "3d_fullres", "spacing"], [1.0] * 4, "spacing has 4 values, patch_size 3"),
        (["configurations", "3d_fullres", "batch_size"], True, "batch_size is True, expected int"),
        (["configurations", "3d_fullres", "use_mask_for_norm"], [True], "use_mask_for_norm has 1 values"),
        (["configurations", "3d_lowres", "inherits_from"], "3d_lowres", "inherits from '3d_lowres', which inherits from it"),
        (["configurations", "3d_lowres", "inherits_from"], "none", "inherits from 'none', which is not there"),
        (["transpose_forward"], [0, 1, 1], "transpose_forward is"),
        (["plans_name"], 3, "plans_name is 3"),
    ],
)
def test_nnunets_part_of_plans_is_looked_at(keys: list, value: object, told: str) -> None:
    plans = copy.deepcopy(base_plans())
    check_plans(plans, "plans.json")
    at: Any = plans
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    with pytest.raises(UserError, match=rf"^plans\.json.*{told}"):
        check_plans(plans, "plans.json")


def test_other_files_given_as_plans_are_told(tmp_path: Path) -> None:
    path = tmp_path / "nnUNetPlans.json"
    others: list[dict[str, Any]] = [DATASET_JSON, {"train": [], "val": []}, {}]
    for content in others:
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"nnUNetPlans.json: no dataset_name; is it a file of plans"):
            nnunet.read_plans(path, "plan again")
    with pytest.raises(UserError, match="holds no fold"):
        check_splits([], "splits.json")
