"""Runs of a study: in which order, what a failure stops, that nothing is done twice, and studies as a whole."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from nnunet_folders import NUM_TRAINING, PlannedDataset
from studies import AUTOENCODER, CSM, MAE3D, SCRATCH, ended_well, make_run, reconstruction, spec, start_study

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.study.command import StudyRequest, run_study
from nnunet_csm.study.dataset import Dataset
from nnunet_csm.study.execution import cluster, perform, read_records, visible_gpus
from nnunet_csm.study.runs import Evaluation, Run


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


def request(study: Path, output: Path) -> StudyRequest:
    return StudyRequest(str(study), None, "nnUNetPlans", "900", "3d_fullres", output, "cpu", 1, 2, None)


def test_a_dry_run_tells_runs_and_costs_and_writes_no_plans(
    studied: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str], planned_dataset: PlannedDataset
) -> None:
    (tmp_path / "dry.json").write_text(json.dumps(spec(arms=[SCRATCH, CSM, MAE3D])))
    run_study(request(tmp_path / "dry.json", tmp_path / "out"), dry_run=True, report_only=False)
    said = capsys.readouterr().out
    assert "4 pretraining" in said and "6 fine-tuning" in said and "visible tokens" in said and "hours" in said
    assert not list((planned_dataset.folders.preprocessed / planned_dataset.name).glob("*dry*"))


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
