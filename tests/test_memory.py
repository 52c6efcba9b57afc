"""The memory planner predicts what steps really take, and what it says behaves as memory does."""

import dataclasses
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import loss_of, make_csm, make_mae3d
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

from nnunet_csm.data.draws import Draws
from nnunet_csm.model.outputs import total_loss
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import Architecture, EncoderSettings, FusionSettings
from nnunet_csm.pretext import mae3d, maesil
from nnunet_csm.pretext.base import Batch, Pretext, Setup
from nnunet_csm.pretext.csm import CSM
from nnunet_csm.pretext.masking import Masking, ask_some, draw_mask, shown_series_weights
from nnunet_csm.pretext.memory import (
    GIB,
    MIB,
    TRAINING,
    Backend,
    Ledger,
    Memory,
    allocated,
    finetuning_memory,
    pretraining_memory,
)
from nnunet_csm.pretext.rebuilding import Reconstruction
from nnunet_csm.schema import Size, to_dict

MASKING = Masking(mask_ratio=0.875, places="independent", hidden_series="rebuilt")
DECODER = Reconstruction(width=96, depth=2, num_heads=4, normalize_targets=False)
NUM_CLASSES = 3
FP32 = Backend(autocast=False, compiled=False, cuda=False)
BF16 = Backend(autocast=True, compiled=False, cuda=False)

# series, token size, width, depth, patch, batch; with a batch of one, a CPU unfolds what it convolves and a GPU does not
CONFIGURATIONS: list[tuple[int, Size, int, int, Size, int]] = [
    (1, (8, 8, 8), 96, 3, (16, 16, 16), 2),
    (1, (8, 8, 8), 96, 3, (32, 32, 32), 2),
    (2, (8, 8, 8), 192, 4, (32, 32, 32), 2),
    (2, (8, 8, 8), 96, 4, (32, 32, 32), 4),
    (3, (8, 8, 8), 96, 3, (32, 16, 32), 6),
    (4, (16, 16, 16), 192, 4, (32, 32, 48), 2),
    (5, (2, 8, 8), 96, 4, (8, 40, 40), 2),
    (7, (4, 8, 8), 96, 3, (16, 32, 32), 2),
]


def architecture(num_series: int, token_size: Size = (8, 8, 8), width: int = 96, depth: int = 3) -> Architecture:
    series = tuple(f"series{i}" for i in range(num_series))
    return Architecture(series, tuple(range(num_series)), token_size, width, depth, width // 24, features=8, drop_path=0.1)


def measured(network: nn.Module, loss: Callable[[], torch.Tensor], backend: Backend) -> int:
    """Bytes at the peak of a training step, as torch's allocator reports them: knows nothing of the predictor."""
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=backend.autocast):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    return 3 * weights + peak


def memory_of(network: Pretext, batch_size: int, backend: Backend = TRAINING) -> Memory:
    """What pretraining such a network is predicted to take."""
    return pretraining_memory(type(network), network.setup, batch_size, backend)


def predicted_for(
    a: Architecture, patch_size: Size, batch_size: int, backend: Backend = TRAINING, decoder: Reconstruction = DECODER
) -> Memory:
    """That of CSM."""
    return memory_of(make_csm(a, decoder, MASKING, patch_size), batch_size, backend)


def pretraining_step(
    a: Architecture, patch_size: Size, batch_size: int, backend: Backend, decoder: Reconstruction = DECODER
) -> int:
    num_series = len(a.series)
    network = make_csm(a, decoder, MASKING, patch_size)
    num_tokens = math.prod(p // t for p, t in zip(patch_size, a.token_size, strict=True))
    present = torch.ones(batch_size, num_series, dtype=torch.bool)

    def loss() -> torch.Tensor:
        draws = Draws(0, torch.arange(batch_size))
        mask = draw_mask(draws, present, max(1, num_series - 1), num_tokens, MASKING)
        mask = ask_some(mask, draws, decoder.rebuilt_share)
        return loss_of(network, torch.randn(batch_size, num_series, *patch_size), mask)

    return measured(network, loss, backend)


def finetuning_step(a: Architecture, patch_size: Size, batch_size: int, backend: Backend) -> int:
    network = CSMSegmenter(len(a.series), NUM_CLASSES, **to_dict(a))
    options = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    criterion = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)

    def loss() -> torch.Tensor:
        # held until the end of the step, as nnU-Net holds them
        volume = torch.randn(batch_size, len(a.series), *patch_size)
        target = torch.randint(NUM_CLASSES, (batch_size, 1, *patch_size), dtype=torch.int16)
        value: Any = total_loss(network(volume), lambda logits: criterion(logits, target))
        value.batch = volume, target
        return value

    return measured(network, loss, backend)


def close_and_not_below(predicted: int, real: int) -> bool:
    return real <= predicted <= 1.15 * real


@pytest.mark.parametrize("backend", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("num_series, token_size, width, depth, patch_size, batch_size", CONFIGURATIONS)
def test_pretraining_takes_what_was_predicted(num_series, token_size, width, depth, patch_size, batch_size, backend):
    a = architecture(num_series, token_size, width, depth)
    predicted = predicted_for(a, patch_size, batch_size, backend).total
    assert close_and_not_below(predicted, pretraining_step(a, patch_size, batch_size, backend))


def test_rebuilding_a_quarter_takes_what_was_predicted_and_less_than_rebuilding_all():
    a, decoder, sizes = architecture(4, (4, 8, 8), 192), dataclasses.replace(DECODER, rebuilt_share=0.25), ((32, 64, 64), 2)
    predicted = predicted_for(a, *sizes, FP32, decoder)
    assert close_and_not_below(predicted.total, pretraining_step(a, *sizes, FP32, decoder))
    assert predicted.activations < 0.6 * predicted_for(a, *sizes, FP32).activations


@pytest.mark.parametrize("num_series, token_size, width, depth, patch_size, batch_size", CONFIGURATIONS)
def test_finetuning_takes_what_was_predicted(num_series, token_size, width, depth, patch_size, batch_size):
    a = architecture(num_series, token_size, width, depth)
    predicted = finetuning_memory(a, NUM_CLASSES, patch_size, batch_size, None, FP32).total
    assert close_and_not_below(predicted, finetuning_step(a, patch_size, batch_size, FP32))


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": "adaptive"},
        {"fusion": FusionSettings("deformable", "threshold", 0.01)},
        {"fusion": "apart", "decoder": "adaptive", "depth": 2, "encoder": EncoderSettings("unet_by_series", base=8)},
    ],
    ids=["adaptive", "deformable", "unet_by_series"],
)
def test_what_is_learned_beside_the_segmentation_takes_what_was_predicted(changes):
    a = dataclasses.replace(architecture(3), **changes)
    predicted = finetuning_memory(a, NUM_CLASSES, (32, 32, 32), 2, None, FP32).total
    assert close_and_not_below(predicted, finetuning_step(a, (32, 32, 32), 2, FP32))


@pytest.mark.parametrize("backend", [FP32, BF16], ids=["fp32", "bf16"])
def test_joint_tokens_take_what_was_predicted_and_less_than_separate_ones(backend):
    a = architecture(3, (2, 4, 2))
    joint, patch_size, batch_size = dataclasses.replace(a, encoder=EncoderSettings("joint_vit")), (8, 32, 32), 4
    network = make_mae3d(joint, DECODER, 0.75, patch_size)
    mask = mae3d.draw_mask(Draws(0, torch.arange(batch_size)), torch.ones(batch_size, 3, dtype=torch.bool), 512, 0.75)
    real = measured(network, lambda: loss_of(network, torch.randn(batch_size, 3, *patch_size), mask), backend)
    assert close_and_not_below(memory_of(network, batch_size, backend).total, real)
    tuning, separate = (finetuning_memory(one, NUM_CLASSES, patch_size, batch_size) for one in (joint, a))
    assert tuning.activations < separate.activations


@pytest.mark.parametrize("counts", ["pooled", "dirichlet"])
def test_other_counts_take_what_was_predicted(counts):
    masking = dataclasses.replace(MASKING, mask_ratio=0.75, fewest_hidden=0, counts=counts)
    takes_what_was_predicted(make_csm(architecture(3), DECODER, masking, (32, 32, 32)))


@pytest.mark.parametrize("noise", [(0.0,), (0.0, 0.25)], ids=["plain", "noisy"])
def test_planes_of_joint_tokens_take_what_was_predicted(noise):
    joint = dataclasses.replace(architecture(3), encoder=EncoderSettings("joint_vit"))
    chosen = maesil.Settings(maesil.DualMasking(0.5), DECODER, noise)
    takes_what_was_predicted(maesil.MAESIL(Setup(joint, chosen, (32, 32, 32))))


def takes_what_was_predicted(network: Pretext, batch_size: int = 4) -> None:
    """Assert it, of a step on the kind of batch that takes most."""
    last = network.setup.num_series - 1 if isinstance(network, CSM) else 0

    def loss() -> torch.Tensor:
        batch = network.example(batch_size, last)
        value: torch.Tensor = network(*batch.args) / network.weight(batch.drawn)
        return value

    assert close_and_not_below(memory_of(network, batch_size, FP32).total, measured(network, loss, FP32))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
def test_a_compiled_step_takes_what_was_predicted():
    # in a process of its own: the shape checks of these tests cannot be compiled, and would break up the network
    benchmark = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    command = [sys.executable, str(benchmark), "--cpu", "--compile", "-only", "pretraining 96 x 3"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "PASS: 2 configurations" in finished.stdout


GROWN = {
    "batch": {"batch_size": 5},
    "patch": {"patch_size": (32, 32, 48)},
    "series": {"num_series": 4},
    "width": {"width": 120},
    "depth": {"depth": 4},
}


@pytest.mark.parametrize("change", GROWN.values(), ids=GROWN.keys())
@pytest.mark.parametrize("stage", ["pretraining", "fine-tuning"])
def test_more_of_anything_takes_more(stage, change):
    def predict(num_series=3, width=96, depth=3, patch_size=(32, 32, 32), batch_size=4):
        a = architecture(num_series, width=width, depth=depth)
        if stage == "pretraining":
            return predicted_for(a, patch_size, batch_size).total
        return finetuning_memory(a, NUM_CLASSES, patch_size, batch_size).total

    assert predict(**change) > predict()


def test_compiled_and_in_16_bits_takes_less():
    a = architecture(3)
    for memory in (
        lambda backend: predicted_for(a, (32, 32, 32), 8, backend),
        lambda backend: finetuning_memory(a, NUM_CLASSES, (32, 32, 32), 8, None, backend),
    ):
        best, uncompiled = memory(TRAINING), memory(dataclasses.replace(TRAINING, compiled=False))
        neither = memory(Backend(autocast=False, compiled=False, cuda=True))
        assert best.activations < uncompiled.activations < neither.activations
        assert best.states == uncompiled.states == neither.states


def test_states_are_weights_and_two_moments():
    a = architecture(2)
    num_weights = sum(p.numel() for p in make_csm(a, DECODER).parameters())
    assert predicted_for(a, (32, 32, 32), 2, FP32).states == 12 * num_weights


def test_memory_is_a_straight_line_in_the_batch_once_activations_dominate():
    a = architecture(3)
    for predict in (
        lambda n: predicted_for(a, (32, 32, 32), n).activations,
        lambda n: finetuning_memory(a, NUM_CLASSES, (32, 32, 32), n).activations,
    ):
        # large enough for the rounding of the allocator, in steps of 2 MiB, not to count
        assert predict(96) == pytest.approx((predict(48) + predict(144)) / 2, rel=0.02)


@pytest.mark.parametrize("hidden_series", ["rebuilt", "ignored", "none"])
@pytest.mark.parametrize("fewest_hidden", [0, 1, 2])
def test_memory_is_that_of_the_kind_of_batch_that_shows_most_of_those_ever_drawn(hidden_series, fewest_hidden):
    masking = dataclasses.replace(MASKING, hidden_series=hidden_series, fewest_hidden=fewest_hidden)
    asked = []

    class Recording(CSM):
        def example(self, num_samples: int, variant: int) -> Batch:
            asked.append(variant)
            return super().example(num_samples, variant)

    for num_series in (1, 2, 4):
        network = make_csm(architecture(num_series), DECODER, masking, (16, 16, 16))
        drawn = shown_series_weights(torch.ones(1, num_series, dtype=torch.bool), masking)[0].nonzero().flatten().tolist()
        visible = {variant: network.example(1, variant).drawn.visible.shape[1] for variant in drawn}
        pretraining_memory(Recording, network.setup, 2)
        assert visible[asked[-1]] == max(visible.values())


def test_showing_every_series_takes_more_than_hiding_some_whole():
    a, shown = architecture(3), dataclasses.replace(MASKING, fewest_hidden=0)
    some, every = (memory_of(make_csm(a, DECODER, masking, (32, 32, 32)), 8) for masking in (MASKING, shown))
    assert some.activations < every.activations


def test_unused_channels_of_the_dataset_take_memory():
    a = architecture(2)
    used = finetuning_memory(a, NUM_CLASSES, (32, 32, 32), 4, None, FP32)
    more = finetuning_memory(a, NUM_CLASSES, (32, 32, 32), 4, 5, FP32)
    assert more.activations - used.activations >= 3 * 4 * 32**3 * 4


@given(st.integers(1, 2**34))
def test_the_allocator_rounds_up_by_little(num_bytes):
    taken = allocated(num_bytes)
    assert taken % 512 == 0
    assert num_bytes <= taken <= num_bytes + 512 + MIB


def test_the_books_are_empty_when_everything_is_freed():
    for fuse in (False, True):
        ledger = Ledger(cuda=True)
        ledger.fuse = fuse
        with ledger:
            layer = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64))
            layer(torch.randn(8, 64)).square().mean().backward()
        assert ledger.live > 0
        del layer
        assert ledger.live == 0


def test_what_is_only_passed_along_is_not_booked():
    ledger = Ledger(cuda=False)
    ledger.fuse = True
    with ledger, torch.no_grad():
        x = torch.ones(1024)
        ledger.write(x)
        y = x.sin().cos().tanh()
        assert ledger.peak == x.nbytes
        ledger.write(y)
    assert ledger.peak == x.nbytes + y.nbytes


def test_text_for_the_plan():
    memory = Memory(2 * GIB, 7 * GIB, GIB)
    assert str(memory) == "10.0 GiB (weights and optimiser 2.0, activations 7.0, workspace 1.0)"
