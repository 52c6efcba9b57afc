"""A checkpoint is written whole or not at all, loads without executing anything, and is never mistaken for another run's."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import checkpoint_of, csm_plans

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError


def saved_by_a_trainer(**more):
    return {**checkpoint_of(csm_plans(), {"encoder.weight": torch.arange(3.0)}), **more}


def test_what_is_saved_loads_without_executing_anything(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    checkpoint.save(saved_by_a_trainer(current_epoch=3), path)
    loaded = checkpoint.load(path)
    assert loaded["network_weights"]["encoder.weight"].tolist() == [0, 1, 2]
    assert loaded["current_epoch"] == 3
    assert loaded["init_args"] == saved_by_a_trainer()["init_args"]


def test_values_of_numpy_become_pythons_own(tmp_path):
    path = tmp_path / "checkpoint_final.pth"
    values = {
        "scalar": np.float64(0.5),
        "whole": np.int64(7),
        "array": np.arange(4).reshape(2, 2),
        "nested": [np.float32(0.25), (np.bool_(True), None)],
        "path": Path("/a/folder"),
        np.str_("key"): "value",
    }
    checkpoint.save(saved_by_a_trainer(logging=values), path)
    loaded = torch.load(path, weights_only=True)["logging"]
    assert loaded == {
        "scalar": 0.5, "whole": 7, "array": [[0, 1], [2, 3]], "nested": [0.25, (True, None)], "path": "/a/folder", "key": "value",
    }  # fmt: skip
    assert all(type(v).__module__ == "builtins" for v in (*loaded, *loaded.values()))


def test_the_state_of_an_optimiser_survives(tmp_path):
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    path = tmp_path / "checkpoint_latest.pth"
    checkpoint.save(
        saved_by_a_trainer(optimizer_state=optimizer.state_dict(), network_weights=OrderedDict(layer.state_dict())), path
    )
    loaded = checkpoint.load(path)
    other = torch.optim.AdamW(layer.parameters())
    other.load_state_dict(loaded["optimizer_state"])
    assert other.state_dict()["state"][0]["exp_avg"].equal(optimizer.state_dict()["state"][0]["exp_avg"])


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_latest.pth"
    checkpoint.save(saved_by_a_trainer(current_epoch=1), path)

    def disk_full(value, target):
        Path(target).write_bytes(b"half of a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", disk_full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(saved_by_a_trainer(current_epoch=2), path)
    assert checkpoint.load(path)["current_epoch"] == 1


def test_a_save_replaces_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "checkpoint_latest.pth"
    for epoch in (1, 2):
        checkpoint.save(saved_by_a_trainer(current_epoch=epoch), path)
    assert checkpoint.load(path)["current_epoch"] == 2
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(UserError, match=r"latest\.pth: no such checkpoint"):
        checkpoint.load(tmp_path / "checkpoint_latest.pth")


@pytest.mark.parametrize("text", ["epoch,loss\n1,0.5\n", "{}", "network_weights", "\n", "(lp0\n."])
def test_a_text_file_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "checkpoint_final.pth"
    path.write_text(text)
    with pytest.raises(UserError, match=r"final\.pth: .*expected a checkpoint written by"):
        checkpoint.load(path)


def test_checkpoints_of_an_earlier_run_are_moved_away_together(tmp_path):
    for name in ("checkpoint_best.pth", "checkpoint_final.pth", "training_log.txt"):
        (tmp_path / name).write_text(name)
    target = checkpoint.move_away(tmp_path)
    assert target is not None and target.parent == tmp_path and target.name.startswith("previous_")
    assert sorted(f.name for f in target.iterdir()) == ["checkpoint_best.pth", "checkpoint_final.pth"]
    assert (target / "checkpoint_best.pth").read_text() == "checkpoint_best.pth"
    assert sorted(f.name for f in tmp_path.iterdir() if f.is_file()) == ["training_log.txt"]


def test_nothing_is_moved_where_there_is_nothing(tmp_path):
    assert checkpoint.move_away(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_two_fresh_starts_keep_both_earlier_runs(tmp_path):
    folders = []
    for run in ("first", "second"):
        (tmp_path / "checkpoint_final.pth").write_text(run)
        folders.append(checkpoint.move_away(tmp_path))
    assert [(f / "checkpoint_final.pth").read_text() for f in folders if f is not None] == ["first", "second"]


def test_the_software_a_result_depends_on_is_named():
    versions = checkpoint.software()
    assert {"nnunet_csm", "python", "torch", "nnunetv2", "timm", "numpy"} <= set(versions)
    assert all(isinstance(v, str) for v in versions.values())
