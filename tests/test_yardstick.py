"""The yardstick is stock nnU-Net but for its end: it lasts the given time, over kills, on the given folds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import base_plans
from hypothesis import given
from hypothesis import strategies as st
from nnunet_folders import NnunetFolders, PlannedDataset
from nnunetv2.training.logging.nnunet_logger import LocalLogger
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_csm.errors import UserError
from nnunet_csm.training import yardstick
from nnunet_csm.training.yardstick import (
    NUM_EPOCHS,
    SECONDS_FILE,
    PolyInTime,
    Yardstick,
    epoch_length,
    nnUNetTrainerCSMYardstick,
    read_yardstick,
)

SECONDS_A_STEP = 3.0
KEY: dict[str, Any] = {"minutes": 1.0, "splits": "splits_study.json"}


class Clock:
    """Time that stands still unless a test moves it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class KilledError(Exception):
    """Stands in for a kill: nothing is saved on the way out."""


# --- the key -----------------------------------------------------------------------------------------------------------------


def test_the_key_is_read() -> None:
    assert read_yardstick(base_plans() | {"csm_yardstick": KEY}, "plans") == Yardstick(1.0, "splits_study.json")


@pytest.mark.parametrize(
    ("key", "found"),
    [
        (None, "has no key csm_yardstick; add"),
        ({"minutes": 5}, "missing splits"),
        (KEY | {"hours": 1}, "unknown hours"),
        (KEY | {"minutes": "5"}, "minutes is '5', expected float"),
        (KEY | {"minutes": 0}, "minutes is 0, expected 0 < minutes"),
        (KEY | {"splits": "../splits.json"}, "expected a name that ends in .json"),
    ],
)
def test_a_wrong_key_names_file_and_remedy(key: Any, found: str) -> None:
    with pytest.raises(UserError, match=found) as caught:
        read_yardstick(base_plans() | ({} if key is None else {"csm_yardstick": key}), "folder/nnUNetPlans.json")
    assert str(caught.value).startswith("folder/nnUNetPlans.json")


# --- lengths and rates -------------------------------------------------------------------------------------------------------


@given(st.floats(1, 1e5), st.floats(0, 1), st.floats(1e-3, 1e4))
def test_an_epoch_fits_into_a_tenth_and_into_what_is_left(seconds: float, share_left: float, pace: float) -> None:
    num = epoch_length(250, seconds, share_left * seconds, pace)
    assert 1 <= num <= 250
    assert num == 1 or num * pace <= min(seconds / NUM_EPOCHS, share_left * seconds) * (1 + 1e-9)
    assert num == 250 or (num + 1) * pace > min(seconds / NUM_EPOCHS, share_left * seconds) * (1 - 1e-9)


def test_the_rate_falls_in_time_as_nnunets_does_in_epochs() -> None:
    used = [0.0]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.01)
    scheduler = PolyInTime(optimizer, 0.01, 50.0, lambda: used[0])
    for seconds, expected in ((0.0, 0.01), (25.0, 0.01 * 0.5**0.9), (50.0, 0.0), (51.0, 0.0)):
        used[0] = seconds
        # nnU-Net passes the number of the epoch
        scheduler.step(3)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)


# --- trainings ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Learning rates of the steps made, on a clock by which a step takes three seconds and nothing else takes any time."""
    clock, made = Clock(), []
    monkeypatch.setattr(yardstick, "time", clock)
    original = nnUNetTrainer.train_step

    def train_step(self: Any, batch: dict) -> dict:
        clock.now += SECONDS_A_STEP
        made.append(self.optimizer.param_groups[0]["lr"])
        return original(self, batch)

    monkeypatch.setattr(nnUNetTrainer, "train_step", train_step)
    # takes longer than an epoch
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)
    return made


@pytest.fixture
def make_trainer(planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Yardsticks on the phantom, with nnU-Net's own plans for it but for the widths."""
    folders = NnunetFolders(planned_dataset.folders.raw, tmp_path / "nnUNet_preprocessed", tmp_path / "nnUNet_results")
    for folder in vars(folders).values():
        monkeypatch.setenv(folder.name, str(folder))
    given = planned_dataset.folders.preprocessed / planned_dataset.name
    preprocessed = folders.preprocessed / planned_dataset.name
    preprocessed.mkdir(parents=True)
    for entry in given.iterdir():
        (preprocessed / entry.name).symlink_to(entry)
    cases = sorted(f.name.removesuffix("_seg.b2nd") for f in given.glob("nnUNetPlans_3d_fullres/*_seg.b2nd"))
    (preprocessed / KEY["splits"]).write_text(json.dumps([{"train": cases[:2], "val": cases[2:3]}]))

    def make(
        resume: bool = False,
        fold: int | str = 0,
        residual: bool = False,
        trainer: type[nnUNetTrainer] = nnUNetTrainerCSMYardstick,
        **key: Any,
    ) -> Any:
        plans = json.loads((preprocessed / "nnUNetPlans.json").read_text())
        plans |= {"csm_yardstick": KEY | key, "continue_training": resume}
        network = plans["configurations"]["3d_fullres"]["architecture"]
        arguments = network["arch_kwargs"]
        arguments["features_per_stage"] = [4] * arguments["n_stages"]
        if residual:
            network["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
            arguments["n_blocks_per_stage"] = arguments.pop("n_conv_per_stage")
        dataset_json = json.loads((preprocessed / "dataset.json").read_text())
        return trainer(plans, "3d_fullres", fold, dataset_json, torch.device("cpu"))

    return make


def log_of(trainer: Any) -> dict[str, list]:
    saved = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    return saved["logging"]


@pytest.mark.parametrize("residual", [False, True])
def test_it_ends_with_its_time_after_ten_epochs_or_more(
    make_trainer: Callable[..., Any], rates: list[float], residual: bool
) -> None:
    trainer = make_trainer(residual=residual)
    trainer.run_training()
    assert rates == pytest.approx([0.01 * (1 - step * SECONDS_A_STEP / 60) ** 0.9 for step in range(20)])
    log = log_of(trainer)
    assert sum(log["seconds_used"]) == pytest.approx(60)
    # one iteration is tried, then as many as the tenth part holds, then what is left
    assert log["seconds_used"] == [3.0, *[6.0] * 9, 3.0]
    assert len(log["val_losses"]) == len(log["seconds_used"]) >= NUM_EPOCHS
    assert not list(Path(trainer.output_folder).glob("*.tmp"))


def test_time_before_a_kill_counts(make_trainer: Callable[..., Any], rates: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    killed = make_trainer()
    original = killed.train_step

    def train_step(batch: dict) -> dict:
        if len(rates) == 8:
            raise KilledError
        return original(batch)

    killed.train_step = train_step
    with pytest.raises(KilledError):
        killed.run_training()
    resumed = make_trainer(resume=True)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    # epochs of 1, 2, 2 and 2 steps; the one of the fifth is lost, and so is what it learned
    assert resumed.seconds_used() == 7 * SECONDS_A_STEP
    resumed.run_training()
    assert len(rates) == 8 + 20 - 7
    assert sum(log_of(resumed)["seconds_used"]) == pytest.approx(60)
    assert json.loads((Path(resumed.output_folder) / SECONDS_FILE).read_text())["seconds"] == pytest.approx(60)
    assert rates[8] == pytest.approx(0.01 * (1 - 21 / 60) ** 0.9)


def test_it_learns_and_is_judged_on_the_cases_of_its_own_split(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer()
    trainer.initialize()
    chosen = json.loads((Path(trainer.preprocessed_dataset_folder_base) / "splits_study.json").read_text())[0]
    training, validation = trainer.get_tr_and_val_datasets()
    assert (sorted(training.identifiers), sorted(validation.identifiers)) == (chosen["train"], chosen["val"])


def test_all_but_its_end_is_nnunets(make_trainer: Callable[..., Any]) -> None:
    ours, stock = make_trainer(), make_trainer(trainer=nnUNetTrainer)
    for trainer in (ours, stock):
        trainer.initialize()
    shapes = [{name: tensor.shape for name, tensor in t.network.state_dict().items()} for t in (ours, stock)]
    assert shapes[0] == shapes[1]
    assert ours.enable_deep_supervision and ours.network.decoder.deep_supervision
    assert ours.optimizer.param_groups[0].keys() == stock.optimizer.param_groups[0].keys()
    for name in ("momentum", "nesterov", "weight_decay", "initial_lr"):
        assert ours.optimizer.param_groups[0][name] == stock.optimizer.param_groups[0][name]
    assert type(ours.optimizer) is type(stock.optimizer) and type(ours.loss) is type(stock.loss)
    assert ours.loss.weight_factors == stock.loss.weight_factors
    assert (ours.oversample_foreground_percent, ours.stock_lengths) == (stock.oversample_foreground_percent, (250, 50))


def test_a_missing_split_file_ends_without_a_traceback(
    make_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(splits="splits_none.json")
    with pytest.raises(SystemExit) as stop:
        trainer.run_training()
    assert stop.value.code == 2
    assert "splits_none.json: no such file" in capsys.readouterr().err


def test_without_the_key_nothing_is_made(make_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        make_trainer(minutes=-1)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("Error: ") and "nnUNetPlans.json: csm_yardstick.minutes is -1," in said


def test_nnunet_finds_the_trainer() -> None:
    from nnunet_csm.nnunet_ext import nnunet_csm_trainers

    assert nnunet_csm_trainers.nnUNetTrainerCSMYardstick is nnUNetTrainerCSMYardstick
