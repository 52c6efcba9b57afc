"""Stages of `on_gpu.py` that take time and memory: cache, speed, predict."""

import dataclasses
import math
import os
import time
from pathlib import Path

import predict_speed
import pretrain_speed
import torch
from pretrain_speed import Row
from stage import Stage, empty, synchronize
from steps import bare_pretrainer, batch_of, method_of, variants_of
from torch.profiler import ProfilerActivity, profile

from nnunet_csm.pretext.memory import CUDA_CONTEXT, pretraining_memory


def write_large_cases(stage: Stage) -> None:
    """What `speed` reads."""
    folder = stage.work / "large_cases"
    folder.mkdir(exist_ok=True)
    pretrain_speed.write_cases(folder, rows_of(stage)[0][1].shape)
    (folder / "whole").touch()


def rows_of(stage: Stage) -> list[tuple[str, Row, bool]]:
    """Name, row, and whether graphs may be used; the most wanted first."""
    if stage.cpu:
        return [("demo, batch 6", Row("demo", 4, 32, 6, (70, 85, 70), 8), True)]
    named = [("B", 64, True), ("B", 6, True), ("B", 6, False), ("B", 64, False), ("B", 256, True), ("S", 64, True)]
    return [(f"{p}, batch {b}{'' if g else ', no graphs'}", Row(p, 4, 96, b), g) for p, b, g in named]


def cache(stage: Stage) -> None:
    """Compile what `speed` will run, beside the stages before it, into one cache."""
    if stage.cpu:
        compiled_on_cpu(stage)
        return
    for name, row, with_graphs in rows_of(stage):
        if with_graphs and stage.compiles:
            # or shapes of other batches would be compiled for all batches, which `speed` will not ask for
            torch._dynamo.reset()
            begun = time.monotonic()
            trainer = bare_pretrainer(row.method, stage.device, True, False)
            for number, variant in enumerate(variants_of(trainer.pretext)):
                loss = trainer.learn(batch_of(trainer.pretext, row.batch_size, variant, stage.device))
                if number == 0:
                    first = float(loss)
                    stage.found(f"first step from nothing: {name}", f"{time.monotonic() - begun:.1f} s, loss {first:.3f}")
            torch.cuda.synchronize()
            stage.found(f"compiled: {name}", f"{time.monotonic() - begun:.1f} s")
            del trainer
            empty(stage)


def compiled_on_cpu(stage: Stage) -> None:
    """The same code through the compiler of CPUs, on a network of a few numbers."""
    network, decoder = {"width": 24, "depth": 2, "num_heads": 2, "features": 4}, {"width": 24, "num_heads": 2}
    method = method_of("demo", 2, (4, 4, 4), (8, 8, 8), network=network, pretext={"reconstruction": decoder})
    begun = time.monotonic()
    trainer = bare_pretrainer(method, stage.device, True, False)
    loss = float(trainer.learn(batch_of(trainer.pretext, 2, 0, stage.device)))
    stage.found("compiled, on a CPU", f"{time.monotonic() - begun:.1f} s, loss {loss:.3f}", math.isfinite(loss))


def speed(stage: Stage) -> None:
    folder, rows = stage.work / "large_cases", rows_of(stage)
    if not (folder / "whole").exists():
        write_large_cases(stage)
    num_steps, graphs_wanted = 5 if stage.cpu else 60, os.environ.get("nnUNet_csm_graphs", "t")
    for name, row, with_graphs in rows:

        def step(row: Row = row, with_graphs: bool = with_graphs) -> tuple[bool | None, str]:
            os.environ["nnUNet_csm_graphs"] = graphs_wanted if with_graphs else "f"
            torch._dynamo.reset()
            found = pretrain_speed.measure(row, str(folder), num_steps, stage.device.type, stage.compiles)
            memory = pretraining_memory(*row.method, row.batch_size)
            rate = found["crops_per_second"]
            return None, (
                f"{rate:.1f} crops/s, {1000 * row.batch_size / rate:.2f} ms; first step {found['first_step']:.1f} s; peak "
                f"{found['peak'] / 2**30:.2f} GiB, predicted {memory.total / 2**30:.2f} beside {CUDA_CONTEXT / 2**30:.0f}; "
                f"volumes: {found['where']}"
            )

        stage.attempt(f"step: {name}", step)
        os.environ["nnUNet_csm_graphs"] = graphs_wanted
        empty(stage)
    _, row, _ = rows[0]
    stage.attempt("kernels of a step", lambda: (None, kernels(stage, row, folder)))
    try:
        import monai  # noqa: F401
    except ImportError:
        stage.found("MONAI's MAE", "not installed")
        return
    for batch_size in dict.fromkeys((row.batch_size, 6)):
        other = dataclasses.replace(row, monai=True, batch_size=batch_size)

        def beside(row: Row = other) -> tuple[bool | None, str]:
            found = pretrain_speed.measure(row, str(folder), num_steps, stage.device.type, not stage.cpu)
            return None, f"{found['crops_per_second']:.1f} crops/s; peak {found['peak'] / 2**30:.2f} GiB"

        stage.attempt(f"MONAI's MAE, {other.preset}, batch {other.batch_size}", beside)


def kernels(stage: Stage, row: Row, folder: Path) -> str:
    """What the device does in ten steps, into the log; how long it has nothing to do, and the loader alone."""
    torch._dynamo.reset()
    step, _ = pretrain_speed.our_step(row, folder, stage.device, stage.compiles)
    for _ in range(2 if stage.cpu else 40):
        step()
    synchronize(stage.device)
    activity = ProfilerActivity.CPU if stage.cpu else ProfilerActivity.CUDA
    num_steps = 2 if stage.cpu else 10
    with profile(activities=[activity]) as profiled:
        begun = time.perf_counter()
        for _ in range(num_steps):
            step()
        synchronize(stage.device)
        elapsed = time.perf_counter() - begun
    averages = profiled.key_averages()
    order = "self_cpu_time_total" if stage.cpu else "self_device_time_total"
    print(averages.table(sort_by=order, row_limit=25, max_name_column_width=90), flush=True)
    busy = sum(getattr(one, order) for one in averages) / 1e6
    num_kernels = sum(one.count for one in averages if getattr(one, order) > 0) / num_steps
    milliseconds = 1000 * elapsed / num_steps
    return f"{milliseconds:.2f} ms a step, idle {1 - busy / elapsed:.1%}, {num_kernels:.0f} kernels (by time in the log)"


def predict(stage: Stage) -> None:
    preset, shape = ("demo", (40, 60, 60)) if stage.cpu else ("B", (96, 160, 160))
    folder = stage.work / "case"
    folder.mkdir(exist_ok=True)
    predict_speed.write_case(folder, shape)
    plans = predict_speed.plans_of(preset, shape, 1.0)
    for missing in ((), predict_speed.SERIES[1:2]):

        def both(missing: tuple[str, ...] = missing) -> tuple[bool, str]:
            mirrored = not stage.cpu
            stock, ours = (
                predict_speed.measure(who, plans, folder, missing, mirrored, stage.device.type, 1) for who in (True, False)
            )
            differ = predict_speed.share_of_different_voxels(folder)
            # untrained networks in bf16 have many near ties
            return differ < (1e-4 if stage.cpu else 2e-2), (
                f"network {stock.network:.2f} s stock, {ours.network:.2f} s ours, {stock.network / ours.network:.2f} times; "
                f"whole case {stock.total / ours.total:.2f} times; labels differ in {differ:.1e} of the voxels"
            )

        stage.attempt(f"predict, {', '.join(missing) or 'nothing'} missing", both)
