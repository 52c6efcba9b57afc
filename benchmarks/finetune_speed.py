"""Fine-tuning: the trainer's step beside the same step of MONAI's `UNETR` with the same sizes, and nnU-Net's augmentation.

Both steps take a batch that is on the host, with nnU-Net's Dice and cross-entropy loss and clipped gradients. On a GPU ours
runs as the trainer runs it (compiled, bf16), MONAI's with the same autocast, compiled or not, whichever is faster. Networks are
12 deep, since MONAI's always is. The last line says how many samples a second one worker process augments as nnU-Net does, and
so how many workers the step would need.

    python benchmarks/finetune_speed.py -o speed     # also speed.json
    python benchmarks/finetune_speed.py --cpu        # small patches, where there is no GPU
    pip install monai                                # for MONAI's columns
"""

import argparse
import dataclasses
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps import NUM_CLASSES, bare_finetuner, labelled_batch, method_of
from torch import Tensor

from nnunet_csm.pretext.base import Setup
from nnunet_csm.schema import Size
from nnunet_csm.training.segmentation import nnUNetTrainerCSM

NUM_SERIES = 4


@dataclasses.dataclass(frozen=True)
class Row:
    preset: str
    patch_size: Size
    token_edge: int
    batch_size: int

    @property
    def setup(self) -> Setup:
        return method_of(self.preset, NUM_SERIES, (self.token_edge,) * 3, self.patch_size).setup


GPU_ROWS = [Row("B", (96, 96, 96), 16, 2), Row("B", (96, 96, 96), 16, 8), Row("S", (96, 96, 96), 16, 2)]
CPU_ROWS = [Row("S", (32, 32, 32), 16, 2), Row("S", (48, 48, 48), 16, 2)]


def our_step(row: Row, device: torch.device, compiled: bool) -> Callable[[dict[str, Tensor]], Any]:
    return bare_finetuner(row.setup, device, compiled).learn


def monai_step(row: Row, device: torch.device, compiled: bool) -> Callable[[dict[str, Tensor]], Any]:
    from monai.networks.nets import UNETR
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    n = row.setup.architecture
    network: Any = UNETR(
        in_channels=NUM_SERIES,
        out_channels=NUM_CLASSES,
        img_size=row.patch_size,
        feature_size=n.features,
        hidden_size=n.width,
        mlp_dim=4 * n.width,
        num_heads=n.num_heads,
    ).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=device.type == "cuda")
    options = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss_of = DC_and_CE_loss(options, {}, dice_class=MemoryEfficientSoftDiceLoss)
    if compiled:
        network, loss_of.dc = torch.compile(network), torch.compile(loss_of.dc)

    def step(batch: dict[str, Tensor]) -> None:
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_of(network(moved["data"]).float(), moved["target"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 12.0)
        optimizer.step()

    return step


def measure(ours: bool, row: Row, device_name: str, compiled: bool, num_steps: int) -> dict[str, float]:
    device = torch.device(device_name)
    if on_gpu := device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # as nnU-Net's run_training does
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    step = (our_step if ours else monai_step)(row, device, compiled)
    batch = labelled_batch(row.setup, row.batch_size)
    if on_gpu:
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    for _ in range(5 if on_gpu else 1):
        step(batch)
    synchronize()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(num_steps):
        step(batch)
    synchronize()
    seconds = (time.perf_counter() - begun) / num_steps
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak": peak}


def augmented_per_second(patch_size: Size, num_samples: int) -> float:
    """Of samples as large as rotations need, by one process, with the transforms the trainer has."""
    torch.set_num_threads(1)
    transforms = nnUNetTrainerCSM.get_training_transforms(
        np.array(patch_size),
        (-0.5, 0.5),
        None,
        (0, 1, 2),
        False,
        use_mask_for_norm=[True] * NUM_SERIES,
        foreground_labels=[1, 2, 3],
    )
    size = [round(1.4 * edge) for edge in patch_size]
    image, segmentation = torch.randn(NUM_SERIES, *size), torch.zeros(1, *size, dtype=torch.int16)
    begun = time.perf_counter()
    for _ in range(num_samples):
        transforms(image=image.clone(), segmentation=segmentation.clone())
    return num_samples / (time.perf_counter() - begun)


def line(row: Row, ours: dict[str, float], monai: dict[str, float] | None) -> str:
    milliseconds = ratio = peak = ""
    if monai is not None:
        milliseconds, peak = f"{1000 * monai['seconds']:.0f} ms", f"{monai['peak'] / 2**30:.2f} GiB"
        ratio = f"{monai['seconds'] / ours['seconds']:.2f}"
    return (
        f"{row.preset:<7}{' x '.join(map(str, row.patch_size)):>14}{row.batch_size:>6}{1000 * ours['seconds']:>7.0f} ms"
        f"{milliseconds:>10}{ratio:>7}{ours['peak'] / 2**30:>5.2f} GiB{peak:>9}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small patches on the CPU")
    parser.add_argument("-n", type=int, default=20, help="steps measured (default: 20)")
    parser.add_argument("-o", help="writes this name with .json")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("Error: no CUDA device; measure on a machine with one, or give --cpu for small patches", file=sys.stderr)
        return 2
    device = "cpu" if args.cpu else "cuda"
    name = platform.processor() or platform.machine() if args.cpu else torch.cuda.get_device_name()
    machine = f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(machine)
    everyone = ("ours", "monai") if importlib.util.find_spec("monai") else ("ours",)
    if "monai" not in everyone:
        print("MONAI is not installed, so its columns are empty: pip install monai")
    print(f"{'':<7}{'patch':>14}{'batch':>6}{'ours':>10}{'MONAI':>10}{'ratio':>7}{'ours':>9}{'MONAI':>9}")
    found = []
    for row in CPU_ROWS if args.cpu else GPU_ROWS:
        measured = {}
        for who in everyone:
            tries = []
            for compiled in (False,) if args.cpu else ((True,) if who == "ours" else (True, False)):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
                    tries.append(fresh_process.submit(measure, who == "ours", row, device, compiled, args.n).result())
            measured[who] = min(tries, key=lambda one: one["seconds"])
        found.append(dataclasses.asdict(row) | measured)
        print(line(row, measured["ours"], measured.get("monai")), flush=True)
    last = found[-1 if args.cpu else 0]
    rate = augmented_per_second(last["patch_size"], 10)
    workers = last["batch_size"] / last["ours"]["seconds"] / rate
    print(f"augmentation of {last['patch_size']}: {rate:.1f} samples/s in one process; {workers:.1f} keep up with the step")
    if args.o:
        Path(f"{args.o}.json").write_text(json.dumps({"machine": machine, "rows": found, "augmented_per_second": rate}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
