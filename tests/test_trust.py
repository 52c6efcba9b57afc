"""What may come from strangers: JSON of any kind, names that are paths, classes to import, pickles, checkpoints that grow."""

import copy
import json
import pickle
import sys
import zipfile
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from factories import checkpoint_of, csm_plans, source_of

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.properties import read_properties
from nnunet_csm.data.sources import check_preprocessed
from nnunet_csm.data.stored import open_volumes
from nnunet_csm.errors import UserError
from nnunet_csm.host_files import check_network
from nnunet_csm.inheritance import read_inherited
from nnunet_csm.planning.preprocessing import preprocess_datasets
from nnunet_csm.planning.presets import FOLDER
from nnunet_csm.plans import NETWORK_CLASS, read_configuration
from nnunet_csm.raw.volumes import sha256
from nnunet_csm.schema import MOST_NESTED

PATHS = ["../../precious", "/etc", "a/b", "..", ".", "", " ", "a\\b", "a\0b", "x" * 300]


# --- JSON --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"42", "holds 42, expected a JSON object"),
        (b"null", "holds None, expected a JSON object"),
        (b"[]", r"holds \[\], expected a JSON object"),
        (b"", "not valid JSON"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": [1, {"b": 2, "b": 3}]}', "the key 'b' twice in one object"),
        (b'\xef\xbb\xbf{"a": 1}', "begins with a byte order mark, expected plain UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "begins with the mark of UTF-16"),
        ('{"a": "é"}'.encode("latin-1"), "not UTF-8 .* at byte 7"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "brackets within brackets"),
        (b'{"a": ' + b"[" * MOST_NESTED + b"]" * MOST_NESTED + b"}", "brackets within brackets"),
        (b'{"a": "\\ud800"}', "half of a character"),
        (b'{"a\\u0000": 1}', "half of a character"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_json_that_is_none_of_ours_is_refused_by_name_wherever_it_is_read(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "any.json"
    path.write_bytes(content)
    for read in (
        lambda: nnunet.read_json(path, "make it again"),
        lambda: nnunet.read_plans(path, "make it again"),
        lambda: nnunet.read_dataset_json(path, "make it again"),
        lambda: read_inherited("preset", str(path), FOLDER, lambda base, changes: base | changes),
    ):
        with pytest.raises(UserError, match=told) as caught:
            read()
        assert str(path) in str(caught.value)


def test_json_that_anybody_writes_is_read_as_it_is(tmp_path: Path) -> None:
    content = {"é": [1, 2.5, None, True, "\U0001f9e0", "back\\u0000slash"], "deep": [[[[[[{"x": -1e-9}]]]]]]}
    path = tmp_path / "any.json"
    for ascii_only in (True, False):
        path.write_text(json.dumps(content, ensure_ascii=ascii_only), encoding="utf-8")
        assert nnunet.read_json(path, "") == content


def test_a_folder_or_nothing_in_place_of_a_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; plan again"):
        nnunet.read_json(tmp_path / "none.json", "plan again")
    with pytest.raises(UserError, match=r"cannot be read .*; plan again"):
        nnunet.read_json(tmp_path, "plan again")


# --- names and classes in plans ----------------------------------------------------------------------------------------------


def edited(*keys: str | int, value: object) -> dict:
    plans = csm_plans()
    at = plans
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    return plans


CSM = ("configurations", "3d_fullres", "csm")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "keys",
    [
        ("plans_name",),
        ("dataset_name",),
        ("image_reader_writer",),
        ("configurations", "3d_fullres", "data_identifier"),
        (*CSM, "splits"),
        (*CSM, "sources", 0, "dataset"),
        (*CSM, "sources", 0, "data_identifier"),
    ],
    ids=lambda keys: keys[-1],
)
def test_what_is_a_name_in_plans_is_no_path(keys: tuple, path: str) -> None:
    with pytest.raises(UserError, match=rf"{keys[-1]} is .*, expected a name"):
        read_configuration(edited(*keys, value=path), "3d_fullres", "plans.json")


def test_other_names_in_plans_are_no_paths_either() -> None:
    for plans in (
        edited(*CSM, "sources", 0, "absent_series", value={"../x": ["T1w"]}),
        edited("configurations", "../x", value={"inherits_from": "3d_fullres"}),
    ):
        with pytest.raises(UserError, match="expected a name"):
            read_configuration(plans, "3d_fullres", "plans.json")


def test_plans_that_name_another_folder_leave_it_as_it_was(nnunet_folders) -> None:
    folder = nnunet_folders.preprocessed / "Dataset001_Tiny"
    precious = nnunet_folders.preprocessed.parent / "precious"
    for one in (folder, precious, nnunet_folders.raw / "Dataset001_Tiny"):
        one.mkdir(parents=True)
    (precious / "file.txt").write_text("x")
    plans = csm_plans()
    entry = plans["configurations"]["3d_fullres"]
    entry["data_identifier"] = entry["csm"]["sources"][0]["data_identifier"] = "../../precious"
    (folder / "nnUNetCSMPlans.json").write_text(json.dumps(plans))
    with pytest.raises(UserError, match="data_identifier"):
        preprocess_datasets(["1"], "3d_fullres", "nnUNetCSMPlans", 1, overwrite=True)
    assert [f.name for f in precious.iterdir()] == ["file.txt"]


@pytest.mark.parametrize(
    "name", ["os.system", "somebodys.Network", f"{NETWORK_CLASS}.forward", "nnunet_csm.cli.training.train", None]
)
def test_a_network_that_is_not_ours_is_refused_and_not_imported(name: str, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "somebodys.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"network_class_name is .*, expected nnunet_csm"):
        read_configuration(
            edited("configurations", "3d_fullres", "architecture", "network_class_name", value=name), "3d_fullres", "plans.json"
        )
    assert "somebodys" not in sys.modules


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"network_class_name": "dynamic_network_architectures.architectures.residual_unet.ResidualEncoderUNet"}, ""),
        ({"network_class_name": "dynamic_network_architectures.architectures.unet.os.system"}, "network_class_name"),
        ({"network_class_name": NETWORK_CLASS}, "network_class_name"),
        ({"arch_kwargs": {"conv_op": "os.system"}}, "conv_op"),
        ({"arch_kwargs": {"conv_op": None}}, ""),
        ({"_kw_requires_import": "conv_op"}, "_kw_requires_import"),
    ],
)
def test_networks_of_nnunet_are_made_of_its_librarys_classes(changes: dict, told: str) -> None:
    network = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {"conv_op": "torch.nn.modules.conv.Conv3d"},
        "_kw_requires_import": ["conv_op"],
    } | changes
    if not told:
        check_network(network, "here")
        return
    with pytest.raises(UserError, match=rf"here\..*{told}"):
        check_network(network, "here")


# --- pickles -----------------------------------------------------------------------------------------------------------------


class Command:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_properties_of_a_case_are_looked_at_without_executing_anything(tmp_path: Path) -> None:
    path, made = tmp_path / "case.pkl", tmp_path / "made"
    plain = {
        "spacing": [1.0, np.float64(2.0)],
        "shape": (1, np.int64(2)),
        "class_locations": {1: np.arange(8).reshape(2, 4), 2: []},
        "sitk_stuff": {"direction": np.eye(3), "named": np.array(["a", None], dtype=object)},
        "bbox": [slice(0, 3), {1}],
    }
    path.write_bytes(pickle.dumps(plain))
    read_properties(path)
    path.write_bytes(pickle.dumps({**plain, "more": Command(made)}))
    with pytest.raises(UserError, match=r"case.pkl: names pathlib.*, expected numbers"):
        read_properties(path)
    assert not made.exists()
    pickle.loads(path.read_bytes())
    assert made.exists(), "this is what nnU-Net would have done"


@pytest.mark.parametrize("content", [b"", b"\x80", pickle.dumps({"a": 1})[:-1], pickle.dumps([1]), b"hello"])
def test_properties_that_are_none_are_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "case.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"case.pkl: .*preprocess the dataset again"):
        read_properties(path)


def test_a_file_of_voxels_that_holds_an_expression_is_refused(tmp_path: Path) -> None:
    blosc2.asarray(np.arange(6.0), urlpath=str(tmp_path / "voxels.b2nd"))
    (blosc2.open(str(tmp_path / "voxels.b2nd")) + 1).save(str(tmp_path / "expression.b2nd"))
    assert open_volumes(tmp_path / "voxels.b2nd")[:].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=r"expression.b2nd: .*preprocess again"):
        open_volumes(tmp_path / "expression.b2nd")


def test_a_trainer_looks_at_them_before_it_learns(tmp_path: Path) -> None:
    folder = tmp_path / "Dataset001_A" / "x"
    folder.mkdir(parents=True)
    for ending in (".b2nd", "_seg.b2nd"):
        blosc2.asarray(np.zeros((1, 2, 2, 2)), urlpath=str(folder / f"case{ending}"))
    (folder / "case.pkl").write_bytes(pickle.dumps(Command(tmp_path / "made")))
    source = source_of(("FLAIR",), dataset="Dataset001_A", data_identifier="x")
    with pytest.raises(UserError, match=r"case.pkl"):
        check_preprocessed([source], "Dataset001_A", tmp_path)
    assert not (tmp_path / "made").exists()


# --- checkpoints -------------------------------------------------------------------------------------------------------------


def repacked(path: Path, compression: int) -> None:
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def test_a_checkpoint_whose_records_inflate_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "checkpoint_final.pth"
    checkpoint.save(checkpoint_of(csm_plans(), {"encoder.weight": torch.zeros(10**6)}), path)
    repacked(path, zipfile.ZIP_STORED)
    assert checkpoint.load(path)["network_weights"]["encoder.weight"].shape == (10**6,)
    repacked(path, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"checkpoint_final.pth: the record .* is compressed"):
        checkpoint.load(path)


def test_a_checkpoint_whose_records_share_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_final.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"0" * 4096)
        # the same bytes under many names, as archives that outgrow their reader have them
        archive.filelist += [copy.copy(archive.filelist[0]) for _ in range(50)]
    with pytest.raises(UserError, match=r"its records are 208,896 bytes long, in a file of"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("network_weights", {"a": 1}),
        ("network_weights", [1]),
        ("init_args", {}),
        ("init_args", {"plans": {}, "configuration": 3}),
        ("trainer_name", None),
    ],
)
def test_entries_that_no_training_writes_are_told(tmp_path: Path, name: str, value: object) -> None:
    path = tmp_path / "checkpoint_final.pth"
    checkpoint.save(checkpoint_of(csm_plans(), {"encoder.weight": torch.zeros(3)}) | {name: value}, path)
    with pytest.raises(UserError, match=f"checkpoint_final.pth: {name} in it"):
        checkpoint.load(path)


def test_weights_of_another_network_are_told_in_a_line() -> None:
    network = torch.nn.Linear(2, 3)
    for weights in ({}, {"weight": torch.zeros(3, 2)}, {**network.state_dict(), "more": torch.zeros(1)}):
        with pytest.raises(UserError, match=r"^fold 0: weights that do not fit") as caught:
            checkpoint.load_weights(network, weights, "fold 0")
        assert "\n" not in str(caught.value)


def test_a_run_that_cannot_go_on_says_so_in_a_line(make_trainer, tmp_path: Path, capsys) -> None:
    path = tmp_path / "checkpoint_latest.pth"
    trainer = make_trainer(pretraining=False)
    trainer.initialize()
    trainer.save_checkpoint(str(path))
    before = sha256(path)
    for change in (lambda saved: saved.pop("optimizer_state"), lambda saved: saved["network_weights"].popitem()):
        saved = checkpoint.load(path)
        change(saved)
        checkpoint.save(saved, tmp_path / "other.pth")
        with pytest.raises(SystemExit) as ended:
            trainer.load_checkpoint(str(tmp_path / "other.pth"))
        said = capsys.readouterr().err
        assert ended.value.code == 2 and "other.pth: a run cannot go on from it" in said and said.count("\n") == 1
    trainer.load_checkpoint(str(path))
    assert sha256(path) == before
