"""Several processes learn what one would, a batch may be learned in parts, and a lost rank ends the others with a remedy."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_processes
from hypothesis import given
from hypothesis import strategies as st
from nnunet_folders import NnunetFolders, PlannedDataset

from nnunet_csm.errors import UserError
from nnunet_csm.machine import accumulation, check_compiler_cache, slices
from nnunet_csm.training.ranks import Ranks, lost_rank_explained, running, started

pytestmark = pytest.mark.xdist_group("ranks")

PLANS = "nnUNetCSMPlansRanks"


@given(st.integers(1, 40), st.integers(1, 40))
def test_shares_are_disjoint_nearly_equal_and_complete(num_ranks: int, more: int) -> None:
    batch_size = num_ranks + more - 1
    shares = [Ranks(rank, num_ranks).samples_of(batch_size) for rank in range(num_ranks)]
    assert [place for share in shares for place in share] == list(range(batch_size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_batch_smaller_than_the_number_of_ranks_is_an_error() -> None:
    with pytest.raises(UserError, match="batch of 2 cannot be shared by 3 ranks"):
        Ranks(0, 3).samples_of(2)


@given(st.integers(1, 40), st.integers(1, 40))
def test_parts_are_disjoint_and_complete(num_parts: int, more: int) -> None:
    places = list(range(num_parts + more - 1))
    parts = [places[part] for part in slices(len(places), num_parts)]
    assert len(parts) == num_parts and all(parts)
    assert [place for part in parts for place in part] == places


def test_a_compiler_cache_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    check_compiler_cache()
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file: torch\.compile cannot write .*nnUNet_compile=f"):
        check_compiler_cache()


@pytest.mark.parametrize("given", ["0", "5", "two", "-1"])
def test_an_impossible_number_of_parts_is_an_error(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("nnUNet_csm_accumulate", given)
    with pytest.raises(UserError, match=f"nnUNet_csm_accumulate is '{given}'"):
        accumulation(4)


def test_only_the_loss_of_a_rank_is_explained() -> None:
    with pytest.raises(UserError, match=r"rank 1 of 2 lost another rank .*--c"), lost_rank_explained(Ranks(1, 2)):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="shapes"), lost_rank_explained(Ranks(1, 2)):
        raise RuntimeError("shapes do not match")
    with pytest.raises(RuntimeError, match="gloo"), lost_rank_explained(Ranks()):
        raise RuntimeError("gloo")


def test_nnunets_own_command_under_torchrun_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process would train by itself, into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"torchrun .* nnunet_csm pretrain"):
        running()


def test_more_gpus_than_there_are_is_an_error_before_any_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="-num_gpus 2, but this machine has 1 GPUs"), started("cuda", 2):
        pass
    with pytest.raises(UserError, match="several ranks on cpu are started by torchrun or srun"), started("cpu", 2):
        pass


@pytest.mark.parametrize(
    ("of_torchrun", "expected"), [("4", Ranks(3, 4, 1, 2)), ("1", Ranks(3, 4, 3, 4)), (None, Ranks(3, 4, 3, 4))]
)
def test_a_rank_of_nnunets_own_has_the_gpu_of_its_number(
    monkeypatch: pytest.MonkeyPatch, of_torchrun: str | None, expected: Ranks
) -> None:
    """Whatever torchrun left in the environment of the process that started it."""
    for name, value in {"WORLD_SIZE": of_torchrun, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    assert running() == expected


def test_gpu_ranks_need_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(UserError, match="no NCCL"), started("cuda"):
        pass


def test_slurm_tasks_are_ranks_but_a_batch_script_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        # set first, or what is set below would stay for the tests after this one
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    with started("cpu") as ranks:
        assert ranks == Ranks()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x2)")
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node7")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    with started("cpu"):
        found = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")}
    assert found == {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node7"}


# --- whole trainings, started as users start them -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(planned_dataset: PlannedDataset, tmp_path_factory: pytest.TempPathFactory) -> PlannedDataset:
    """The planned phantom with classes, and plans without drop path: what a rank drops is its own affair."""
    folder = tmp_path_factory.mktemp("ranks")
    preprocessed = folder / "nnUNet_preprocessed"
    shutil.copytree(planned_dataset.folders.preprocessed, preprocessed)
    plans = json.loads((preprocessed / planned_dataset.name / "nnUNetCSMPlans.json").read_text())
    plans["plans_name"] = PLANS
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"]["arch_kwargs"]["drop_path"] = 0.0
    configuration["csm"]["classification"]["schedule"] |= {"batch_size": 3}
    # long enough to be killed in the middle
    configuration["csm"]["pretraining"] |= {"num_epochs": 12, "learning_rate": 2e-4}
    (preprocessed / planned_dataset.name / f"{PLANS}.json").write_text(json.dumps(plans))
    # other tests have preprocessed the dataset in other ways
    data = preprocessed / planned_dataset.name / configuration["data_identifier"]
    cases = sorted(f.name.removesuffix("_seg.b2nd") for f in data.glob("*_seg.b2nd"))
    rows = [f"{case},{name}" for case, name in zip(cases, ("benign", "malignant") * 3, strict=True)]
    (preprocessed / planned_dataset.name / "classification.csv").write_text("\n".join(["case,class", *rows]) + "\n")
    splits = [{"train": cases[:4], "val": cases[4:]}]
    (preprocessed / planned_dataset.name / "splits_final.json").write_text(json.dumps(splits))
    folders = NnunetFolders(planned_dataset.folders.raw, preprocessed, folder / "nnUNet_results")
    environment = planned_dataset.environment | {variable.name: str(variable) for variable in vars(folders).values()}
    return replace(planned_dataset, folders=folders, environment=environment)


def with_results(dataset: PlannedDataset, folder: Path, **environment: str) -> PlannedDataset:
    folders = replace(dataset.folders, results=folder)
    return replace(dataset, folders=folders, environment=dataset.environment | {"nnUNet_results": str(folder)} | environment)


def flags(command: str, *more: str) -> list[str]:
    chosen = ["-encoder", "scratch"] if command == "finetune" else []
    return [command, "-d", "900", "-f", "0", "-p", PLANS, "-device", "cpu", *chosen, *more]


def train(dataset: PlannedDataset, num_ranks: int, command: str, *more: str) -> dict:
    """Train with this many ranks, in the environments that srun and torchrun give them; returns the final checkpoint."""
    from nnunet_csm import checkpoint

    folder = dataset.folders.results
    folder.mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(num_ranks)}
    said, errors = ([folder / f"{kind}{rank}" for rank in range(num_ranks)] for kind in ("said", "errors"))
    processes = []
    for rank in range(num_ranks):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(num_ranks)}
        environment = dataset.environment | (own if num_ranks > 1 else {})
        typed = ["nnunet_csm", *flags(command, *more)]
        processes.append(warm_processes.start(warm_processes.console_command, typed, environment, said[rank], errors[rank]))
    for process, text in zip(processes, errors, strict=True):
        process.join(600)
        assert process.exitcode == 0, text.read_text()[-3000:]
    assert sum(text.read_text().count("Training done") for text in said) == 1
    (path,) = folder.rglob("checkpoint_final.pth")
    return checkpoint.load(path)


def assert_alike(found: dict, expected: dict) -> None:
    assert found["current_epoch"] == expected["current_epoch"]
    for name in ("train_losses", "val_losses"):
        assert found["logging"][name] == pytest.approx(expected["logging"][name], rel=1e-4)
    # Adam makes steps of the same size out of gradients that are hardly more than rounding
    for name, tensor in expected["network_weights"].items():
        torch.testing.assert_close(found["network_weights"][name], tensor, rtol=0, atol=2e-3)


@pytest.fixture(scope="module")
def pretrained(dataset: PlannedDataset, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(with_results(dataset, tmp_path_factory.mktemp("one_rank")), 1, "pretrain")


@pytest.mark.slow
def test_ranks_pretrain_what_one_process_does(dataset: PlannedDataset, pretrained: dict, tmp_path: Path) -> None:
    """Also when they cannot share a batch of 4 evenly."""
    assert_alike(train(with_results(dataset, tmp_path), 3, "pretrain"), pretrained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "block", "moved"),
    [
        # without what each rank draws for itself: drop path and noise
        (
            {"encoder": {"kind": "joint_vit"}},
            {
                "name": "dino",
                "views": {"noise": 0.0},
                "head": {"hidden": 16, "bottleneck": 8, "num_prototypes": 12},
                "drop_path": 0.0,
            },
            "centre",
        ),
        # so few idle steps that codes are replaced
        (
            {"width": 16, "depth": 1, "decoder": "unet", "encoder": {"kind": "residual_unet", "base": 4}},
            {"name": "vqvae", "num_codes": 12, "code_width": 5, "idle_steps": 2},
            "codes",
        ),
    ],
    ids=["teacher and centre", "codebook"],
)
def test_ranks_share_what_follows_a_step(
    dataset: PlannedDataset, tmp_path: Path, network: dict[str, Any], block: dict[str, Any], moved: str
) -> None:
    folder, name = dataset.folders.preprocessed / dataset.name, f"{PLANS}{moved}"
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    plans["plans_name"] = name
    configuration = plans["configurations"]["3d_fullres"]
    configuration["architecture"]["arch_kwargs"] |= network
    configuration["csm"]["pretext"] = block
    configuration["csm"]["pretraining"] |= {"num_epochs": 3}
    (folder / f"{name}.json").write_text(json.dumps(plans))
    typed = ("pretrain", "-p", name)
    one, three = (train(with_results(dataset, tmp_path / str(num)), num, *typed) for num in (1, 3))
    parts = train(with_results(dataset, tmp_path / "parts"), 1, *typed, "-accumulate", "3")
    for found in (three, parts):
        assert_alike(found, one)
        torch.testing.assert_close(found["network_weights"][moved], one["network_weights"][moved], rtol=0, atol=1e-4)
    assert one["network_weights"][moved].abs().max() > 0.01


@pytest.mark.slow
def test_a_batch_in_parts_teaches_the_same(dataset: PlannedDataset, pretrained: dict, tmp_path: Path) -> None:
    assert_alike(train(with_results(dataset, tmp_path), 1, "pretrain", "-accumulate", "3"), pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("-tr", "nnUNetTrainerCSMClassifier")], ids=["segmenter", "classifier"])
def test_ranks_fine_tune_what_one_process_does(dataset: PlannedDataset, tmp_path: Path, more: tuple[str, ...]) -> None:
    one, two = with_results(dataset, tmp_path / "one"), with_results(dataset, tmp_path / "two")
    assert_alike(train(two, 2, "finetune", *more), train(one, 1, "finetune", *more))
    (scores,), (expected,) = (list(d.folders.results.rglob("validation/summary.json")) for d in (two, one))
    assert json.loads(scores.read_text()).keys() == json.loads(expected.read_text()).keys()


@pytest.mark.slow
def test_ranks_share_the_pretexts_loss_beside_the_segmentations(dataset: PlannedDataset, tmp_path: Path) -> None:
    """What rebuilds learns as well, though it is no part of the network that exchanges its gradients."""
    folder, name = dataset.folders.preprocessed / dataset.name, f"{PLANS}Masked"
    plans = json.loads((folder / f"{PLANS}.json").read_text()) | {"plans_name": name}
    plans["configurations"]["3d_fullres"]["csm"]["finetuning"]["masked_loss_weight"] = 0.5
    (folder / f"{name}.json").write_text(json.dumps(plans))
    one, two = (train(with_results(dataset, tmp_path / str(num)), num, "finetune", "-p", name) for num in (1, 2))
    assert_alike(two, one)
    for weight, tensor in one["masked_loss_weights"].items():
        torch.testing.assert_close(two["masked_loss_weights"][weight], tensor, rtol=0, atol=2e-3)


@pytest.mark.slow
def test_a_run_whose_rank_was_killed_says_so_and_goes_on_with_another_number_of_ranks(
    dataset: PlannedDataset, pretrained: dict, tmp_path: Path
) -> None:
    run = with_results(dataset, tmp_path)
    command = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "nnunet_csm", *flags("pretrain")]
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(command, env=run.environment, stdout=said, stderr=said, start_new_session=True)
        try:
            wait_for(lambda: bool(list(tmp_path.rglob("checkpoint_latest.pth"))), process)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[-1]), signal.SIGKILL)
            assert process.wait(timeout=60) != 0
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "said").read_text()
    assert re.search(r"SIGKILL|Signal 9|exitcode\s*: -9", text)
    assert_alike(train(run, 1, "pretrain", "--c"), pretrained)


def wait_for(condition, process: subprocess.Popen, seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)
