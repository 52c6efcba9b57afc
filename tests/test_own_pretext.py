"""A pretext that does not come with the package trains from plans that name its class, whatever it is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from factories import KnownBank, csm_plans
from factories import settings as read_settings
from torch import Tensor, nn

from nnunet_csm.data.draws import Draws, Purpose, What
from nnunet_csm.errors import UserError
from nnunet_csm.judging.probe import LOGGED_PRECISION, Probe, logged_names
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext.base import Batch, Drawn, Pretext, Setup, setup_of
from nnunet_csm.pretext.batches import Batches
from nnunet_csm.pretext.memory import pretraining_memory
from nnunet_csm.schema import Size


@dataclass(frozen=True)
class Settings:
    """How much of the contrast is taken away."""

    faded: float


@dataclass(frozen=True)
class Fading(Drawn):
    """A factor for every sample."""

    factor: Tensor


class Fade(Pretext):
    """Tells from a crop how much a second, larger one was faded; a batch holds cases with as many series as each other."""

    Settings = Settings
    Draw = Fading
    parts = ("bias", "spread")

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.encoder = build_encoder(setup.architecture)
        self.head = nn.Linear(2 * self.encoder.width, 1)
        self.done: list[float] = []

    @classmethod
    def check(cls, settings: Any, architecture: Any, where: str) -> None:
        if not 0 <= settings.faded < 1:
            raise UserError(f"{where}.faded is {settings.faded}, expected 0 <= faded < 1")

    @property
    def crop_sizes(self) -> tuple[Size, ...]:
        z, y, x = self.setup.patch_size
        return (z, y, x), (z, 2 * y, x)

    def variants(self, present: Tensor) -> Tensor:
        return nn.functional.one_hot(present.sum(1) - 1, self.setup.num_series).double()

    def draw(self, draws: Draws, present: Tensor, variant: int, volumes: tuple[Tensor, ...], training: bool) -> Fading:
        return Fading(1 - self.settings.faded * draws.uniform(What.SERIES, 1)[:, 0])

    def _error(self, first: Tensor, second: Tensor, drawn: Fading) -> Tensor:
        seen = []
        for volume in (first, second * drawn.factor[:, None, None, None, None]):
            features = self.encoder.levels(volume.float(), volume.flatten(2).any(2))[-1]
            seen.append(features.tokens.mean((1, 2)))
        return self.head(torch.cat(seen, 1))[:, 0].float() - drawn.factor

    def forward(self, *batch: Any) -> Tensor:
        return self._error(*batch).square().sum()

    def after_step(self, done: float) -> None:
        self.done.append(done)

    def validate(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        error, num = self._error(*batch.args), self.weight(batch.drawn)
        return {**super().validate(batch), "bias": (error.sum(), num), "spread": (error.abs().sum(), num)}


BLOCK = {"name": f"{__name__}.Fade", "faded": 0.5}


def plans(**changes: Any) -> dict[str, Any]:
    made = csm_plans()
    made["configurations"]["3d_fullres"]["csm"]["pretext"] = BLOCK | changes
    return made


def build() -> Any:
    settings = read_settings()
    torch.manual_seed(0)
    return Fade(Setup(settings.architecture, Settings(0.5), settings.csm.pretraining_patch_size))


def test_its_settings_are_read_and_checked_by_its_class() -> None:
    pretext, setup = setup_of(read_configuration(plans(), "3d_fullres", "plans"))
    assert pretext is Fade and setup.settings == Settings(0.5)
    for wrong, complaint in (({"faded": 2.0}, "faded is 2.0"), ({"masking": {}}, "unknown masking; expected exactly faded")):
        with pytest.raises(UserError, match=complaint):
            setup_of(read_configuration(plans(**wrong), "3d_fullres", "plans"))


def batches() -> Batches:
    """Of cases with one, two and three series; voxels are the case's number from 1."""
    present = torch.ones(3, 3).tril() > 0

    def patches(cases: Tensor, size: Size) -> Tensor:
        return ((cases + 1.0)[:, None] * present[cases])[:, :, None, None, None].expand(-1, -1, *size)

    return Batches(KnownBank(present, patches), build(), 3, Purpose.TRAINING, range(4))


def test_a_batch_has_all_crops_of_one_case_and_cases_of_one_kind() -> None:
    make, counts = batches(), torch.zeros(3)
    sizes = make.pretext.crop_sizes
    for step in range(300):
        batch = make(0, step)
        assert [tuple(volume.shape) for volume in batch.volumes] == [(4, 3, *size) for size in sizes]
        cases = [volume.amax((1, 2, 3, 4)) for volume in batch.volumes]
        # a case has as many series as its number
        assert cases[0].equal(cases[1]) and len(cases[0].unique()) == 1
        counts[int(cases[0][0]) - 1] += 1
    assert ((counts / 300 - 1 / 3).abs() < 5 * (2 / 9 / 300) ** 0.5).all()


def test_a_batch_is_its_tensors_and_its_parts() -> None:
    batch = batches()(1, 2)
    assert isinstance(batch.drawn, Fading) and len(batch) == 4
    again = Batch.of(batch.tensors, 2, Fading)
    moved = batch.to(torch.device("cpu"))
    for other in (again, moved):
        assert type(other.drawn) is Fading and len(other.volumes) == 2
        assert all(one.equal(two) for one, two in zip(other.tensors, batch.tensors, strict=True))
    parts = [batch[:1], batch[1:]]
    assert [len(part) for part in parts] == [1, 3]
    for number, whole in enumerate(batch.tensors):
        assert torch.cat([part.tensors[number] for part in parts]).equal(whole)
    assert batch.args[:2] == batch.volumes and batch.args[2] is batch.drawn


def test_its_loss_adds_up_over_parts_of_a_batch() -> None:
    pretext, batch = build().eval(), batches()(0, 0)
    with torch.no_grad():
        whole, parts = pretext(*batch.args), [pretext(*part.args) for part in (batch[:1], batch[1:])]
    torch.testing.assert_close(sum(parts), whole)
    assert pretext.weight(batch.drawn) == len(batch)


def test_its_memory_is_predicted_on_its_own_step() -> None:
    setup = build().setup
    small, large = (pretraining_memory(Fade, setup, num) for num in (2, 8))
    assert small.states == large.states and 0 < small.activations < large.activations


def test_it_is_judged_by_its_loss_and_what_it_names_is_written(tmp_path: Path) -> None:
    settings = read_settings()
    probe = Probe(build(), settings.csm.pretraining, None)
    assert logged_names(Fade) == logged_names(build()) == Fade.parts
    assert (probe.judged, probe.baselines) == ("val_losses", None) and np.isnan(probe.baseline("linear"))
    log = {"val_losses": [2.0, 1.0], "bias": [0.1, 0.2], "spread": [0.3, 0.4], LOGGED_PRECISION: [float("nan")] * 2}
    probe.save(log, tmp_path / "probe.csv")
    table = pd.read_csv(tmp_path / "probe.csv")
    assert table[["val_losses", "bias", "spread"]].to_dict("list") == {name: log[name] for name in ("val_losses", *Fade.parts)}
    assert "1.0000" in probe.said(log) and "linear" not in probe.said(log)
    assert [list(panel.lines) for panel in probe.panels(log)] == [["bias", "spread"]]


def test_a_run_trains_it_and_finetuning_takes_its_encoder(make_trainer: Callable[..., Any]) -> None:
    pretrainer = make_trainer(True, pretext=BLOCK)
    pretrainer.run_training()
    network, schedule = pretrainer.bare_network, pretrainer.settings.csm.pretraining
    assert type(network).__name__ == "Fade"
    steps = schedule.num_iterations
    assert network.done == pytest.approx([(step + 1) / steps for step in range(steps)])
    log = pretrainer.logger.local_logger.my_fantastic_logging
    for name in ("train_losses", "val_losses", *Fade.parts):
        assert len(log[name]) == schedule.num_epochs and np.isfinite(log[name]).all()
    # the same samples and draws in every validation: the spread bounds the bias
    assert all(abs(bias) <= spread for bias, spread in zip(log["bias"], log["spread"], strict=True))
    pretrainer.perform_actual_validation()
    folder = Path(pretrainer.output_folder)
    assert (folder / "progress.png").is_file() and (folder / "probe.csv").is_file()
    assert not (folder / "validation").exists() and not list((folder / "reconstructions").glob("*.png"))
    finetuner = make_trainer(False, pretext=BLOCK)
    finetuner.initialize()
    finetuner.on_fresh_start()
    expected = network.encoder.state_dict()
    assert all(tensor.equal(expected[name]) for name, tensor in finetuner.encoder.state_dict().items())
