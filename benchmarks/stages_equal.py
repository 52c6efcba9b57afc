"""Stages of `on_gpu.py` that ask whether a machine does what a CPU does: alive, equal."""

import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pretrain_speed import MAX_SERIES, NUM_CASES, write_cases
from stage import Stage, seconds_of
from steps import Method, bare_pretrainer, method_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nnunet_csm.data.bank import Bank, GpuBank, MappedBank
from nnunet_csm.data.draws import Purpose
from nnunet_csm.data.stored import CaseFile, read
from nnunet_csm.machine import why_not_compiled
from nnunet_csm.pretext.batches import Batches

SHAPE, BATCH_SIZE = (70, 85, 70), 16


def alive(stage: Stage) -> None:
    stage.found("torch, Python", f"{torch.__version__}, {sys.version.split()[0]}")
    if not stage.cpu:
        properties = torch.cuda.get_device_properties(0)
        stage.found("card", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {torch.version.cuda}")
        stage.found("free", f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    stage.found("gcc, Python.h", f"{shutil.which('gcc')}, {headers.is_file()}")
    stage.found("/dev/shm", f"{shutil.disk_usage('/dev/shm').total / 2**30:.1f} GiB; {os.cpu_count()} cores")
    if not stage.cpu:
        stage.attempt("compiles", lambda: (not (why := why_not_compiled("cuda")), why or "an addition"))
    n, dtype = (1024, torch.float32) if stage.cpu else (8192, torch.bfloat16)
    a = torch.randn(n, n, device=stage.device, dtype=dtype)
    stage.found("product", f"{2 * n**3 / seconds_of(lambda: a @ a, stage.device, 10) / 1e12:.2f} TFLOP/s")
    source = torch.empty(2**24 if stage.cpu else 2**33, dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)
    speed = 2 * source.numel() / seconds_of(lambda: target.copy_(source), stage.device, 5) / 1e12
    stage.found("copy, read and written", f"{speed:.2f} TB/s")


def equal(stage: Stage) -> None:
    network = {"width": 192, "num_heads": 3, "features": 8}
    pretext = {"masking": {"mask_ratio": 0.875}, "reconstruction": {"width": 96, "depth": 2, "num_heads": 3}}
    method = method_of("demo", 4, (8, 8, 8), (32, 32, 32), network=network, pretext=pretext)
    drawn_for = method.build()
    batches = {name: Batches(bank, drawn_for, 1, Purpose.TRAINING, range(BATCH_SIZE)) for name, bank in open_banks(stage).items()}

    def same() -> tuple[bool, str]:
        for step in range(12):
            expected, found = batches["mapped"](0, step), batches["gpu"](0, step)
            for number, (one, other) in enumerate(zip(expected.tensors, found.tensors, strict=True)):
                if not one.equal(other.cpu()):
                    return False, f"tensor {number} of step {step} differs"
        return True, "12 batches: volumes and masks to the bit"

    stage.attempt("bank: gpu as mapped", same)
    graphs(stage, batches["gpu"], method)
    attention(stage)


def open_banks(stage: Stage) -> dict[str, Bank]:
    """Both kinds, on the same files."""
    folder = stage.work / "cases"
    if not (folder / f"case{NUM_CASES - 1}_seg.b2nd").exists():
        folder.mkdir(exist_ok=True)
        write_cases(folder, SHAPE)
    files = [CaseFile(f"case{n}", folder / f"case{n}.b2nd", MAX_SERIES, (0, 1, 2, 3)) for n in range(NUM_CASES)]
    contents = read(files)
    return {"mapped": MappedBank(contents, not stage.cpu), "gpu": GpuBank(contents, stage.device)}


def attention(stage: Stage) -> None:
    """Each kernel, forward and backward, against fp64: with a mask at lengths of which some are 64 modulo 128."""
    kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    unused: list[tuple[str, Callable[[], tuple[bool, str]]]] = []
    # the last as in the decoder, with other queries than keys
    for masked, length, num_keys in (
        (False, 192, 192),
        (False, 864, 864),
        (True, 192, 192),
        (True, 864, 864),
        (False, 224, 27),
    ):
        torch.manual_seed(0)
        given = [torch.randn(2, 4, n, 64).bfloat16().double() for n in (length, num_keys, num_keys)]
        mask = torch.rand(2, 1, 1, length) < 0.5 if masked else None
        expected = outcome(given, mask)
        for kind in kinds[:1] + kinds[3:] if stage.cpu else kinds:
            if masked and kind is SDPBackend.FLASH_ATTENTION and not stage.cpu:
                continue

            compare = partial(off_by, kind, given, mask, expected, stage.device)
            name = f"{kind.name.lower()}, {'masked, ' if masked else ''}{num_keys} keys"
            if masked and kind is SDPBackend.CUDNN_ATTENTION:
                # may fail (pytorch issue 196678), and is kept out of masked calls
                unused.append((f"{name} (not used)", compare))
            else:
                stage.attempt("attention" if kind is SDPBackend.CUDNN_ATTENTION else name, compare)
    for name, call in unused:
        # last, since an error of the device would go on in what comes after
        try:
            stage.found(name, call()[1])
        except Exception as error:
            stage.found(name, type(error).__name__)


def off_by(
    kind: SDPBackend, given: list[Tensor], mask: Tensor | None, expected: list[Tensor], device: torch.device
) -> tuple[bool, str]:
    """How far a kernel in bf16 is from what is expected."""
    with sdpa_kernel([kind]):
        found = outcome([tensor.to(device, torch.bfloat16) for tensor in given], None if mask is None else mask.to(device))
    pairs = zip(found, expected, strict=True)
    off = max(float((one.cpu().double() - other).norm() / other.norm()) for one, other in pairs)
    return off < 0.05, f"off by {off:.4f} of its norm, forward and gradients"


def outcome(given: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Attention's result and the gradients of its inputs."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in given)
    result = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), (query, key, value))]


def graphs(stage: Stage, batches: Batches, method: Method) -> None:
    """Steps with graphs against steps without, from one seed; then a capture that fails."""
    said: list[str] = []

    def trained(with_graphs: bool, num_steps: int, rate: float = 1e-3, draws: bool = True) -> tuple[Any, list[float]]:
        torch.manual_seed(0)
        trainer = bare_pretrainer(method, stage.device, stage.compiles, with_graphs and not stage.cpu)
        trainer.train_batches = batches
        if trainer.graphed is not None:
            trainer.graphed.report = trainer.graphed_with_draws.report = said.append
            trainer.graphed_with_draws.failed = not draws
        for group in trainer.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        losses = [trainer.learn(given(trainer, number)) for number in range(num_steps)]
        return trainer, [float(loss) for loss in losses]

    def given(trainer: Any, number: int) -> Any:
        keys = trainer.graphed is not None and batches.bank.where == "gpu"
        return batches.batch_key(0, number) if keys else batches(0, number)

    num_steps, expected = 12 if stage.cpu else 60, []

    def alone() -> tuple[bool, str]:
        expected.extend(trained(False, num_steps)[1])
        how = "compiled" if stage.compiles else "not compiled"
        return expected[-1] < expected[0], f"{how}, {num_steps} steps: loss {expected[0]:.3f} to {expected[-1]:.3f}"

    # where parts of a network do not compile although an addition does, later stages do without
    stage.attempt("compiles" if stage.compiles else "steps", alone)

    def compare(draws: bool) -> tuple[bool, str]:
        trainer, losses = trained(True, num_steps, draws=draws)
        off = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
        if stage.cpu:
            return off == 0, f"losses differ by {off:.1e}; no graphs on a CPU"
        num_graphs = len((trainer.graphed_with_draws if draws else trainer.graphed).graphs)
        return (
            off < 1e-3 and num_graphs == 3 and not said,
            f"losses differ by {off:.1e}; {num_graphs} graphs; {said or 'none lost'}",
        )

    if stage.cpu:
        stage.attempt("the same steps twice", lambda: compare(draws=False))
    else:
        stage.attempt("graphs", lambda: compare(draws=False))
        stage.attempt("graphs that make their batch", lambda: compare(draws=True))

    def unchanged() -> tuple[bool, str]:
        trainer, _ = trained(True, num_steps)
        for group in trainer.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.0)
            else:
                group["lr"] = 0.0
        before = [p.detach().clone() for p in trainer.network.parameters()]
        for number in range(num_steps, num_steps + 12):
            trainer.learn(given(trainer, number))
        after = list(trainer.network.parameters())
        same = all(one.equal(other) for one, other in zip(before, after, strict=True))
        return same, f"weights after {num_steps} steps, and 12 more at a learning rate of 0"

    stage.attempt("learning rate is read anew", unchanged)
    if not stage.cpu:
        stage.attempt("memory after a failed capture", lambda: failed_capture(method, stage, batches))


def failed_capture(method: Method, stage: Stage, batches: Batches) -> tuple[bool, str]:
    trainer = bare_pretrainer(method, stage.device, False, True)
    trainer.train_batches, trainer.graphed_with_draws.failed = batches, True
    said: list[str] = []
    trainer.graphed.report = said.append
    step = trainer.graphed.step

    def waits(*tensors: Tensor) -> Tensor:
        loss = step(*tensors)
        if torch.cuda.is_current_stream_capturing():
            float(loss)
        return loss

    trainer.graphed.step = waits
    reserved = []
    for number in range(80):
        trainer.learn(batches(0, number))
        reserved.append(torch.cuda.memory_reserved())
    torch.cuda.synchronize()
    grown = reserved[-1] / reserved[29]
    return bool(said) and grown < 1.05, f"{reserved[-1] / 2**20:.0f} MiB, {grown:.3f} of that 50 steps before; {said[:1]}"
