"""A step clips as torch's own function does, a batch is the same whatever its key is kept in, and bf16 is taken where it pays."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nnunet_csm.training import pretraining
from nnunet_csm.training import trainer as trainers
from nnunet_csm.training.optimization import clipped_step
from nnunet_csm.training.pretraining import nnUNetTrainerCSMPretrain


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", [0.01, 30.0])
def test_a_clipped_step_is_that_of_torch(fused: bool, size: float) -> None:
    networks = []
    for clip in (clipped_step, clipped_by_torch):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
        for _ in range(3):
            optimizer.zero_grad()
            (size * network(torch.randn(4, 7)).square().mean()).backward()
            clip(optimizer, 1.0)
        networks.append(network)
    for one, other in zip(*(network.parameters() for network in networks), strict=True):
        torch.testing.assert_close(one, other)


def clipped_by_torch(optimizer: torch.optim.Optimizer, max_norm: float) -> None:
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], max_norm)
    optimizer.step()


def test_a_batch_is_the_same_for_a_key_on_the_device(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(True)
    trainer.initialize()
    trainer.open_banks()
    for step in range(3):
        seed, variant = trainer.train_batches.batch_key(0, step)
        found, expected = trainer.train_batches.make(torch.tensor(seed), variant), trainer.train_batches(0, step)
        assert all(one.equal(other) for one, other in zip(found.tensors, expected.tensors, strict=True))


def test_checkpoints_are_written_by_time(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    save = trainers.checkpoint.save

    def recorded(saved: dict[str, Any], path: str, first: bool = False) -> None:
        written.append(path.rsplit("checkpoint_", 1)[1])
        save(saved, path, first)

    monkeypatch.setattr(trainers.checkpoint, "save", recorded)
    monkeypatch.setattr(trainers, "SECONDS_BETWEEN_CHECKPOINTS", float("inf"))
    trainer = make_trainer(True)
    assert trainer.num_epochs > 2
    trainer.run_training()
    # the first epoch writes both, the last one what the run leaves
    assert written.count("latest.pth") == 1 and written.count("final.pth") == 1 and written.count("best.pth") <= 2


@pytest.mark.parametrize("width, has, expected", [(384, True, True), (384, False, False), (128, True, False)])
def test_bf16_on_a_cpu_is_for_wide_encoders_and_processors_that_have_it(
    width: int, has: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "has_bf16", lambda: has)
    trainer: Any = nnUNetTrainerCSMPretrain.__new__(nnUNetTrainerCSMPretrain)
    trainer.device = torch.device("cpu")
    trainer.settings = SimpleNamespace(architecture=SimpleNamespace(width=width))
    with trainer.evaluating():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert (product.dtype == torch.bfloat16) == expected
