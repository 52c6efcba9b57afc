"""The demo's stages and its page, cut down to a few subjects and steps; its numbers say nothing here."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
import PIL.Image
import pytest
import warm_processes

from nnunet_csm import demo
from nnunet_csm.errors import UserError

SCHEDULE = {"iterations_per_epoch": 2, "val_iterations_per_epoch": 1}
CUT_DOWN = {
    "inherits_from": "phantom_demo",
    "pretraining": {"num_crops": 64, **SCHEDULE},
    "finetuning": {"num_crops": 8, **SCHEDULE},
}


def act(command: tuple[str, ...]) -> int | None:
    """A stage as `python -m` would run it, but for nnU-Net's pictures, each of which takes longer than an epoch here."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    from nnunet_csm import cli, nnunet

    LocalLogger.plot_progress_png = lambda _, folder: save_picture(Path(folder, "progress.png"))
    if command[1] == "nnunet_csm":
        return cli.main(command[2:])
    nnunet.run(command[2], command[3:])
    return 0


def save_picture(path: Path) -> None:
    PIL.Image.new("L", (8, 8)).save(path)


def warm(command: tuple[str, ...], environment: dict[str, str], log: IO[str] | None = None) -> int:
    """A stage in a process that has imported what it needs; what it says goes to a file."""
    file = Path(log.name if log else environment["DEMO_LOG"])
    process = warm_processes.start(act, (command,), environment, file, file)
    process.join()
    return process.exitcode or 0


def test_the_demo_runs_to_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "tiny.json"
    preset.write_text(json.dumps(CUT_DOWN))
    monkeypatch.setenv("DEMO_LOG", str(tmp_path / "log"))
    small = replace(demo.SPEC, shape=(16, 32, 32), spacing_mm=(8.0, 5.0, 5.0))
    cut_down = {"PRESET": str(preset), "SPEC": small, "NUM_LABELLED": 3, "NUM_WATCHING": 1, "NUM_UNLABELLED": 4, "NUM_TEST": 2}
    for name, value in {"run_command": warm, **cut_down}.items():
        monkeypatch.setattr(demo, name, value)

    try:
        demo.run_demo(tmp_path / "out", seed=0)
    except UserError:
        print((tmp_path / "log").read_text("utf-8")[-3000:])
        raise

    said = capsys.readouterr().out
    assert "With all series: Dice" in said
    assert "With FLAIR missing: Dice" in said
    assert "the best linear map" in said
    assert "epoch" in (tmp_path / "out" / "fine-tune_from_scratch.log").read_text("utf-8").lower()
    page = (tmp_path / "out" / "summary.html").read_text("utf-8")
    assert "What pretraining brought" in page
    assert page.count("<img") >= 8
    # the incomplete images lack one series, and are links to the others
    files = sorted(os.listdir(tmp_path / "out" / "images_incomplete"))
    assert len(files) == 2 * 3
    assert not any(name.endswith(f"_{demo.SPEC.series.index(demo.MISSING):04d}.nii.gz") for name in files)
    splits = json.loads((tmp_path / "out" / "nnUNet_preprocessed" / demo.NAME / "splits_final.json").read_text())
    assert [len(splits[0][part]) for part in ("train", "val", "unlabelled")] == [3, 1, 4]


def test_the_verdict_says_what_came_out() -> None:
    arms = ("pretrained", "from scratch")
    columns = pd.MultiIndex.from_product([arms, (demo.COMPLETE, demo.WITHOUT)])
    scores = pd.DataFrame(np.array([[0.8, 0.6, 0.7, 0.65]] * 4), columns=columns)
    whole = pd.Series({"network": 0.6, "linear": 0.8, "token_linear": 0.75, "mean": 1.0})
    lines = demo.verdict(scores, whole).splitlines()
    assert (
        lines[0]
        == "With all series: Dice 0.700 from scratch, 0.800 pretrained, +10.0 points (10.0 to 10.0) over 4 test subjects."
    )
    assert (
        lines[1]
        == "With FLAIR missing: Dice 0.650 from scratch, 0.600 pretrained, -5.0 points (-5.0 to -5.0) over 4 test subjects."
    )
    assert lines[2] == "Pretraining rebuilds hidden series 20% better than the best linear map of what else is visible."
    assert "as well as" in demo.verdict(scores, pd.Series({**whole, "network": 0.75}))
    assert "33% worse than" in demo.verdict(scores, pd.Series({**whole, "network": 1.0}))


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        demo.run_demo(tmp_path, seed=0)


def test_a_stage_that_fails_is_named_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(command: tuple[str, ...], environment: dict[str, str], log: IO[str] | None) -> int:
        return 3 if "scratch" in command else 0

    monkeypatch.setattr(demo, "run_command", fails)
    one = demo.Demo(tmp_path / "out")
    one.stage("plan", "-m", "nnunet_csm", "plan")
    with pytest.raises(UserError, match=r"at 'fine-tune, from scratch' \(exit code 3, see .*fine-tune_from_scratch\.log\)"):
        one.side_by_side("fine-tune", {"pretrained": ("-m", "nnunet_csm"), "from scratch": ("-m", "nnunet_csm", "scratch")})
    with pytest.raises(UserError, match=r"at 'plan' \(exit code 3, see above\)"):
        one.stage("plan", "-m", "nnunet_csm", "scratch")
