"""Pretraining, from files to the optimiser's step: crops a second, peak memory, and the share of the matrix products' peak.

Synthetic cases of BT-MSD's size are written as nnU-Net writes them, opened by the bank that pretraining would choose, and
learned from by the trainer's own step (compiled and in CUDA graphs where there is a GPU). Beside it, with the same sizes and in
the same run, MONAI's `MaskedAutoEncoderViT`, which takes series as channels: a quarter of the tokens at four series, random
data that is already on the device, no clipped gradients. On a GPU it runs in fp32 as it is, and compiled under bf16 autocast
(which fails uncompiled); the faster counts.

Operations are counted by torch on the network's own code, forward and backward, as a mean over the kinds of batches that a
pretext draws (for CSM, the numbers of hidden series); the peak is that of one large product measured in the same run.

    python benchmarks/pretrain_speed.py -o speed            # table, speed.json, speed.png
    python benchmarks/pretrain_speed.py --cpu               # small networks, where there is no GPU
    python benchmarks/pretrain_speed.py -presets mae3d own.json    # these only: any pretext that a preset names
    python benchmarks/pretrain_speed.py --cpu -study methods_quick # what each arm of a study pretrains, to the first of them
    pip install monai                                       # for MONAI's rows
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from steps import Method, bare_pretrainer, method_of, variants_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_csm.data.bank import open_bank
from nnunet_csm.data.draws import Purpose, ahead
from nnunet_csm.data.stored import CaseFile
from nnunet_csm.machine import num_workers
from nnunet_csm.planning.presets import preset_names, read_preset
from nnunet_csm.pretext.batches import Batches
from nnunet_csm.schema import Size
from nnunet_csm.study.expansion import arm_changes
from nnunet_csm.study.spec import pretraining_changes, read_study
from nnunet_csm.training.graphs import why_no_graphs

NUM_CASES = 12
MAX_SERIES = 8


@dataclasses.dataclass(frozen=True)
class Row:
    """What is measured: what a preset pretrains, or MONAI's network of the same size, on some series, patch and batch."""

    preset: str
    num_series: int
    edge: int
    batch_size: int
    shape: Size = (138, 170, 138)
    token_edge: int = 16
    monai: bool = False

    @property
    def what(self) -> str:
        return "MONAI" if self.monai else self.method.pretext.__name__

    @property
    def method(self) -> Method:
        return method_of(self.preset, self.num_series, (self.token_edge,) * 3, (self.edge,) * 3)

    def __str__(self) -> str:
        return f"{self.what} {self.preset} {self.num_series} {self.edge} {self.batch_size}"


def rows(cpu: bool, monai: bool, presets: Sequence[str] = ()) -> list[Row]:
    """Rows of the table, or of some presets only; MONAI's first, so that the others' ratios are known when they are printed."""
    small: dict[str, Any] = {"shape": (70, 85, 70), "token_edge": 8} if cpu else {}
    preset, edge, batch = ("demo", 32, 16) if cpu else ("B", 96, 64)
    names = presets or (() if cpu else ("S", "B", "L", *other_pretexts()))
    of_presets = []
    for name in names:
        read = read_preset(name)
        # what would not fit into memory with more, its preset learns from fewer
        num = min(batch, read.pretraining.batch_size)
        of_presets.append(Row(name, 4, edge, num, **small | {"token_edge": read.token_edge}))
    others = [Row(preset, 4, edge, size, monai=True, **small) for size in ((6, 32) if cpu else (6, 64))]
    if presets:
        return [*(others[1:] if monai else []), *of_presets]
    batches = [Row(preset, 4, edge, size, **small) for size in ((6, 32) if cpu else (6, 64, 256))]
    series = [Row(preset, num, edge, batch, **small) for num in ((1, 2, 4, 8) if cpu else range(1, MAX_SERIES + 1))]
    patches = [Row(preset, 4, size, batch, **small) for size in ((16, 32, 48) if cpu else (48, 96, 128))]
    return list(dict.fromkeys([*(others if monai else []), *batches, *series, *patches, *of_presets]))


def other_pretexts() -> list[str]:
    """A shipped preset for each pretext beside that of B, but for those that learn nothing."""
    by_pretext = {read_preset(name).pretext["name"]: name for name in preset_names()}
    return [name for pretext, name in by_pretext.items() if pretext not in ("none", read_preset("B").pretext["name"])]


def presets_of_study(name: str, folder: Path) -> list[str]:
    """Preset files of what the arms of a study pretrain, each named as its arm."""
    study, paths = read_study(name), []
    for arm in study.arms:
        if arm.pretrained and arm.nnunet is None:
            paths.append(folder / f"{arm.name.replace('/', ' ')}.json")
            paths[-1].write_text(json.dumps({"inherits_from": study.preset, **pretraining_changes(arm_changes(study, arm))}))
    return [str(path) for path in paths]


def write_cases(folder: Path, shape: Size) -> None:
    """Brains of noise with a background that does not vary, all series, as nnU-Net's preprocessor stores them."""
    z, y, x = np.ogrid[tuple(slice(-1, 1, complex(0, n)) for n in shape)]
    inside = (z**2 + y**2 + x**2) < 0.9
    random = np.random.default_rng(0)
    for number in range(NUM_CASES):
        volume = np.where(inside, random.standard_normal((MAX_SERIES, *shape), np.float32), np.float32(-1))
        labels = np.zeros((1, *shape), np.int16)
        sizes: dict[str, Any] = {}
        for suffix, array in (("", volume), ("_seg", labels)):
            sizes[f"blocks{suffix}"], sizes[f"chunks{suffix}"] = comp_blosc2_params(array.shape, (96, 96, 96))
        nnUNetDatasetBlosc2.save_case(volume, labels, {}, str(folder / f"case{number}"), **sizes)


def measure(row: Row, folder: str, num_steps: int, device_name: str, compiled: bool) -> dict[str, Any]:
    """Crops a second over steps after those in which networks are compiled and graphs are captured."""
    begun = time.perf_counter()
    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True  # as nnU-Net's run_training does
    if row.monai:
        step, where = monai_step(row, device, compiled), "on the device"
    else:
        step, where = our_step(row, Path(folder), device, compiled)
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    step()
    synchronize()
    first = time.perf_counter() - begun
    # each kind of batch is compiled, and captured at its fourth time; kinds are drawn, and some come late
    for _ in range(16 * row.num_series if on_gpu else 2):
        step()
    synchronize()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for _ in range(num_steps):
        step()
    synchronize()
    seconds = time.perf_counter() - begun
    # what a graph works in counts as reserved, not as allocated
    peak = torch.cuda.max_memory_reserved() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"crops_per_second": num_steps * row.batch_size / seconds, "first_step": first, "peak": peak, "where": where}


def our_step(row: Row, folder: Path, device: torch.device, compiled: bool) -> tuple[Callable[[], Any], str]:
    """The trainer's step on its next batch, and where the volumes are."""
    channels = tuple(range(row.num_series))
    paths = [folder / f"case{number}.b2nd" for number in range(NUM_CASES)]
    bank = open_bank([CaseFile(path.stem, path, MAX_SERIES, channels) for path in paths], device)
    graphs = not why_no_graphs(device, 1, 1)
    trainer = bare_pretrainer(row.method, device, compiled, graphs)
    batches = trainer.train_batches = Batches(bank, trainer.pretext, 1, Purpose.TRAINING, range(row.batch_size))
    keys = ((0, number) for number in range(10**9))
    threads = num_workers(device) if bank.where != "gpu" else 0
    loader: Iterator[Any] = ahead(lambda at: batches(*at), keys, threads, device)
    if bank.where == "gpu" and graphs:
        # made within the step
        loader = (batches.batch_key(*at) for at in keys)

    def step() -> None:
        trainer.learn(next(loader))
        trainer.pretext.after_step(0.5)

    return step, bank.where


def monai_step(row: Row, device: torch.device, compiled: bool) -> Callable[[], None]:
    from monai.networks.nets import MaskedAutoEncoderViT

    setup = row.method.setup
    a, r = setup.architecture, setup.settings.reconstruction
    network: Any = MaskedAutoEncoderViT(
        in_channels=row.num_series,
        img_size=setup.patch_size,
        patch_size=row.token_edge,
        hidden_size=a.width,
        mlp_dim=4 * a.width,
        num_layers=a.depth,
        num_heads=a.num_heads,
        masking_ratio=setup.settings.masking.mask_ratio,
        decoder_hidden_size=r.width,
        decoder_mlp_dim=4 * r.width,
        decoder_num_layers=r.depth,
        decoder_num_heads=r.num_heads,
        pos_embed_type="learnable",
        decoder_pos_embed_type="learnable",
    ).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), fused=device.type == "cuda")
    if compiled:
        network = torch.compile(network)
    volume = torch.randn(row.batch_size, row.num_series, *setup.patch_size, device=device)
    target = volume.unfold(2, *(row.token_edge,) * 2).unfold(3, *(row.token_edge,) * 2).unfold(4, *(row.token_edge,) * 2)
    target = target.permute(0, 2, 3, 4, 5, 6, 7, 1).flatten(4).flatten(1, 3)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=compiled):
            predicted, mask = network(volume)
        loss = ((predicted.float() - target).square().mean(-1) * mask).sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def fastest(row: Row, folder: str, num_steps: int, device_name: str) -> dict[str, Any]:
    """What `measure` finds, each time in a process of its own: ours as the trainer runs it, MONAI's whichever way is faster.

    Raises:
        RuntimeError: neither way runs.
    """
    on_gpu = device_name == "cuda"
    found = []
    for compiled in (False, True) if row.monai and on_gpu else (on_gpu,):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
            future = fresh_process.submit(measure, row, folder, num_steps, device_name, compiled)
            if not row.monai or (error := future.exception()) is None:
                found.append(future.result())
            else:
                first_line = (str(error) or repr(error)).splitlines()[0]
                print(f"{row.what}, compiled under bf16: {compiled}, does not run: {first_line}", file=sys.stderr)
    if not found:
        raise RuntimeError(f"{row.what} does not run")
    return max(found, key=lambda one: one["crops_per_second"])


@functools.cache
def operations(row: Row) -> float:
    """Floating-point operations of a crop, forward and backward, as a mean over kinds of batches; MONAI's are not counted."""
    pretext = row.method.build()
    total = 0.0
    for variant, share in variants_of(pretext).items():
        # two crops, since norms over a batch want more than one
        batch = pretext.example(2, variant)
        # as products: torch does not count the kernel that attention has on a CPU
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            pretext(*batch.args).backward()
        total += share * counter.get_total_flops() / 2
    return total


def peak_operations(device: torch.device) -> float:
    """Operations a second of a large product, bf16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(10):
        begun = time.perf_counter()
        for _ in range(4):
            a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - begun) / 4)
    return 2 * n**3 / best


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Crops a second against batch, series and patch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    by_axis = {"batch_size": "batch", "num_series": "series", "edge": "patch edge in voxels"}
    small = found[0]["token_edge"] == 8
    base = {"batch_size": 16 if small else 64, "num_series": 4, "edge": 32 if small else 96}
    for axes, (field, label) in zip(figure.subplots(1, 3), by_axis.items(), strict=True):
        chosen = [row for row in found if all(row[other] == base[other] for other in base if other != field)]
        for name in dict.fromkeys((row["what"], row["preset"]) for row in chosen):
            points = sorted((r[field], r["crops_per_second"]) for r in chosen if (r["what"], r["preset"]) == name)
            axes.plot(*zip(*points, strict=True), marker="o", label=" ".join(name))
        axes.set(xlabel=label, ylabel="crops/s", ylim=(0, None))
        if chosen:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def compared(found: list[dict[str, Any]], with_first: bool) -> float:
    """How many times as fast as the first row, or as MONAI's, the last row is."""
    last = found[-1]
    if with_first:
        return last["crops_per_second"] / found[0]["crops_per_second"]
    same = [f for f in found if f["what"] == "MONAI" and all(f[k] == last[k] for k in ("edge", "batch_size", "num_series"))]
    return last["crops_per_second"] / same[0]["crops_per_second"] if same else math.nan


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['what'] + ' ' + Path(row['preset']).stem:<30}{row['num_series']:>7}{row['edge']:>6}{row['batch_size']:>6}"
        f"{row['crops_per_second']:>10.1f}{row['operations'] / 1e9:>11.2f}{row['share_of_peak']:>9.1%}{row['peak'] / 2**30:>7.2f}"
        f"{row['first_step']:>10.1f}s{row['where']:>14}{row['ratio']:>10.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small networks on the CPU")
    parser.add_argument("-n", type=int, default=100, help="steps measured (default: 100)")
    parser.add_argument("-o", help="writes this name with .json and .png")
    parser.add_argument("-presets", nargs="+", default=[], help="only these, by name or file, on four series")
    parser.add_argument("-study", default="", help="only what the arms of this study pretrain, by name or file")
    parser.add_argument("-only", "--only", default="", help="rows that begin so, such as 'CSM B 4'")
    args = parser.parse_args()
    if not args.cpu and not torch.cuda.is_available():
        print("Error: no CUDA device; measure on a machine with one, or give --cpu for small networks", file=sys.stderr)
        return 2
    device = torch.device("cpu" if args.cpu else "cuda")
    monai = importlib.util.find_spec("monai") is not None
    peak = peak_operations(device)
    name = platform.processor() or platform.machine() if args.cpu else torch.cuda.get_device_name()
    machine = f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{machine}; one product: {peak / 1e12:.2f} TFLOP/s")
    if not monai:
        print("MONAI is not installed, so its rows are missing: pip install monai")
    last = "to first" if args.study else "to MONAI"
    header = ("", "series", "patch", "batch", "crops/s", "GFLOP/crop", "of peak", "GiB", "first step", "volumes", last)
    print("{:<30}{:>7}{:>6}{:>6}{:>10}{:>11}{:>9}{:>7}{:>11}{:>14}{:>10}".format(*header))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        presets = presets_of_study(args.study, Path(temporary)) if args.study else args.presets
        table = rows(args.cpu, monai and not args.study, presets)
        folder = Path(temporary) / "dataset" / "cases"
        folder.mkdir(parents=True)
        write_cases(folder, table[0].shape)
        for row in table:
            if not str(row).startswith(args.only):
                continue
            measured = fastest(row, str(folder), args.n, device.type)
            flops = math.nan if row.monai else operations(row)
            measured |= {"operations": flops, "share_of_peak": measured["crops_per_second"] * flops / peak}
            found.append({"what": row.what, **dataclasses.asdict(row), **measured})
            found[-1]["ratio"] = compared(found, bool(args.study))
            print(line(found[-1]), flush=True)
    if args.o:
        Path(f"{args.o}.json").write_text(json.dumps({"machine": machine, "peak": peak, "rows": found}, indent=1))
        draw(found, Path(f"{args.o}.png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
