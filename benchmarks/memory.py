"""Predicted against measured peak memory of pretraining and fine-tuning.

On a CUDA device, `torch.cuda.max_memory_allocated` over three steps of the trainers' own step functions, compiled and under
autocast as they run them, is compared with `pretext/memory.py`. Each configuration runs in a process of its own, after one
step in which torch compiles and cuDNN tries its algorithms (with whatever memory is free; that step's peak is in the last
column and is not judged). Passes when every ratio of predicted to measured lies within 1.00 and 1.15.

    python benchmarks/memory.py
    python benchmarks/memory.py --cpu             # reduced configurations against the memory that tensors take on a CPU
    python benchmarks/memory.py --cpu --compile   # the same through torch.compile: minutes
"""

import argparse
import dataclasses
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from steps import NUM_CLASSES, Method, bare_finetuner, bare_pretrainer, labelled_batch, method_of, variants_of

from nnunet_csm.pretext import memory
from nnunet_csm.schema import Size

LOWEST, HIGHEST = 1.00, 1.15
NUM_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """A step to measure."""

    stage: str
    """pretraining, or fine-tuning, for which the pretext does not matter."""
    name: str
    method: Method
    batch_size: int


def case(stage: str, preset: str, num_series: int, patch_size: Size, batch_size: int, token_size: Size = (16, 16, 16)) -> Case:
    """A shipped preset on `num_series` series."""
    return Case(stage, f"{stage} {preset}", method_of(preset, num_series, token_size, patch_size), batch_size)


def small_case(stage: str, num_series: int, token_size: Size, width: int, depth: int, patch_size: Size, batch_size: int) -> Case:
    """What a CPU runs in seconds."""
    network = {"width": width, "depth": depth, "num_heads": width // 32, "features": 8, "drop_path": 0.1}
    decoder = {"width": width // 2, "depth": 2, "num_heads": 3, "rebuilt_share": 1.0}
    method = method_of("B", num_series, token_size, patch_size, network=network, pretext={"reconstruction": decoder})
    return Case(stage, f"{stage} {width} x {depth}", method, batch_size)


GPU_CASES = [
    case("pretraining", "B", 4, (96, 96, 96), 64),
    case("pretraining", "B", 4, (96, 96, 96), 6),
    case("pretraining", "S", 1, (128, 128, 128), 32),
    case("pretraining", "S", 7, (64, 96, 96), 48),
    case("pretraining", "L", 4, (96, 96, 96), 32),
    case("pretraining", "L", 2, (128, 128, 128), 16),
    case("pretraining", "B", 3, (24, 160, 160), 32, (4, 16, 16)),
    case("pretraining", "B", 3, (48, 48, 48), 128),
    case("fine-tuning", "B", 4, (96, 96, 96), 2),
    case("fine-tuning", "B", 4, (96, 96, 96), 8),
    case("fine-tuning", "S", 1, (128, 128, 128), 4),
    case("fine-tuning", "S", 7, (64, 96, 96), 4),
    case("fine-tuning", "L", 4, (96, 96, 96), 6),
    case("fine-tuning", "L", 2, (128, 128, 128), 4),
    case("fine-tuning", "B", 3, (24, 160, 160), 6, (4, 16, 16)),
    case("fine-tuning", "B", 3, (48, 48, 48), 24),
]
CPU_CASES = [
    small_case(stage, *sizes)
    for sizes in (
        (1, (8, 8, 8), 96, 3, (32, 32, 32), 4),
        (2, (8, 8, 8), 192, 4, (32, 32, 32), 4),
        (3, (8, 8, 8), 192, 3, (64, 32, 32), 6),
        (4, (8, 8, 8), 192, 4, (48, 48, 48), 2),
        (4, (16, 16, 16), 384, 6, (48, 48, 48), 2),
        (5, (2, 8, 8), 96, 4, (8, 40, 40), 3),
        (7, (4, 8, 8), 96, 3, (16, 32, 32), 4),
    )
    for stage in ("pretraining", "fine-tuning")
]


def predicted(of: Case, backend: memory.Backend) -> memory.Memory:
    pretext, setup = of.method
    if of.stage == "pretraining":
        return memory.pretraining_memory(pretext, setup, of.batch_size, backend)
    return memory.finetuning_memory(setup.architecture, NUM_CLASSES, setup.patch_size, of.batch_size, None, backend)


def make_step(of: Case, device: torch.device, compiled: bool) -> tuple[Callable[[], Any], torch.optim.Optimizer]:
    """A training step as the trainers take it, and its optimiser."""
    if of.stage == "pretraining":
        trainer = bare_pretrainer(of.method, device, compiled, graphs=False)
        pretext = trainer.pretext
        # with as many visible tokens as there ever are
        return lambda: trainer.learn(pretext.example(of.batch_size, max(variants_of(pretext)))), trainer.optimizer
    trainer = bare_finetuner(of.method.setup, device, compiled)
    return lambda: trainer.learn(labelled_batch(of.method.setup, of.batch_size)), trainer.optimizer


def measure_cuda(of: Case, compiled: bool) -> tuple[int, int]:
    """Bytes at the peak of later steps, and of the first step."""
    torch.backends.cudnn.benchmark = True  # as nnU-Net's run_training does
    step, _ = make_step(of, torch.device("cuda"), compiled)
    step()
    torch.cuda.synchronize()
    first = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(NUM_STEPS):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), first


def measure_cpu(of: Case, compiled: bool) -> tuple[int, int]:
    """Bytes at the peak of a later step: weights and moments, and what torch's profiler saw allocated. No first step: 0."""
    step, optimizer = make_step(of, torch.device("cpu"), compiled)
    for group in optimizer.param_groups:
        group["fused"] = True  # as on a GPU
    for _ in range(2):
        step()
    # the profiler does not see the end of what it did not see the beginning of
    optimizer.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    weights = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
    return 3 * weights + peak, 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="reduced configurations, without a GPU")
    parser.add_argument("--compile", action="store_true", help="with --cpu: through torch.compile")
    parser.add_argument("-only", "--only", default="", help="cases whose name contains this")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("Error: no CUDA device; measure on a machine with one, or give --cpu for reduced configurations", file=sys.stderr)
        return 2
    if args.cpu:
        backend = memory.Backend(autocast=False, compiled=args.compile, cuda=False)
        machine = f"CPU, {platform.machine()}, fp32"
    else:
        backend = dataclasses.replace(
            memory.TRAINING, compiled=os.environ.get("nnUNet_compile", "t").lower() in ("true", "1", "t")
        )
        machine = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    how = "compiled" if backend.compiled else "not compiled"
    print(f"{machine}, torch {torch.__version__}, Python {platform.python_version()}, {how}; sizes in MiB")
    print(f"{'':<22} {'series':>6} {'patch':>15} {'batch':>5} {'measured':>9} {'predicted':>9} {'ratio':>6} {'first step':>10}")
    measure, ratios = measure_cpu if args.cpu else measure_cuda, []
    for of in CPU_CASES if args.cpu else GPU_CASES:
        if args.only not in of.name:
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as fresh_process:
            measured, first = fresh_process.submit(measure, of, backend.compiled).result()
        total = predicted(of, backend).total
        ratios.append(total / measured)
        patch = " x ".join(map(str, of.method.setup.patch_size))
        print(
            f"{of.name:<22} {of.method.setup.num_series:>6} {patch:>15} {of.batch_size:>5} {measured / memory.MIB:>9.1f} "
            f"{total / memory.MIB:>9.1f} {ratios[-1]:>6.3f} {first / memory.MIB:>10.1f}",
            flush=True,
        )
    passed = bool(ratios) and all(LOWEST <= ratio <= HIGHEST for ratio in ratios)
    print(
        f"{'PASS' if passed else 'FAIL'}: {len(ratios)} configurations, predicted / measured from {min(ratios, default=0):.3f} "
        f"to {max(ratios, default=0):.3f}; within [{LOWEST:.2f}, {HIGHEST:.2f}] is required"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
