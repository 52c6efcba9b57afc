"""Crops a second of the banks beside nnU-Net's own loader, on the same preprocessed cases in one run.

nnU-Net's loader runs without transforms and without looking for foreground; it decompresses labels too, which is its way, and
ours never does. Two threads are two threads of ours, and two processes of nnU-Net's. Rows take turns, and each
is the median of its turns, so that other programs on the machine slow all of them alike.

The floor of a bank on the CPU: a crop of fp16 is read once and written once. Mapped files are in the page cache: what a disk
adds is not measured here.

    python benchmarks/loader_speed.py -o /tmp/loader_speed -n 40
    python benchmarks/loader_speed.py -o /tmp/loader_speed -d 1
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
from torch import Tensor
from tqdm import tqdm

from nnunet_csm import nnunet
from nnunet_csm.data.bank import Bank, GpuBank, MappedBank, Where
from nnunet_csm.data.crops import Size, draw_crops
from nnunet_csm.data.draws import Draws, What, ahead, batches
from nnunet_csm.data.stored import CaseFile, read
from nnunet_csm.errors import exit_on_user_error

# of BT-MSD after cropping: series, and voxels along (z, y, x)
NUM_SERIES, SHAPE = 4, (138, 170, 138)
NUM_SYNTHETIC = 8
# batches before the clock starts: then threads are at work, and memory is used again that batches gave back
NUM_WARM = 8
CPU = torch.device("cpu")


@dataclass
class Row:
    """A way to make batches, and the crops a second it made in each turn."""

    name: str
    batch_size: int
    num_threads: int
    bytes_per_crop: int
    start: Callable[[], Iterator[object]]
    wait: Callable[[], None]
    in_this_process: bool = True
    rates: list[float] = field(default_factory=list)
    rates_busy: list[float] = field(default_factory=list)
    """By the time that the cores worked for this process: what is left of them does not count."""

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)

    @property
    def rate_busy(self) -> float | None:
        return statistics.median(self.rates_busy) if self.in_this_process else None


def write_case(folder: Path, number: int, patch_size: Size) -> None:
    """A head of whole-numbered grey values in a volume of zeros, as nnU-Net's preprocessor leaves BT-MSD behind."""
    path = folder / f"case_{number}.b2nd"
    if path.is_file():
        return
    if number >= NUM_SYNTHETIC:
        for ending in ("_seg.b2nd", ".pkl", ".b2nd"):
            os.link(folder / f"case_{number % NUM_SYNTHETIC}{ending}", folder / f"case_{number}{ending}")
        return
    rng = np.random.default_rng(number)
    axes = (np.linspace(-1.05, 1.05, length) for length in SHAPE)
    head = sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij")) < 1
    volume = np.zeros((NUM_SERIES, *SHAPE), np.float32)
    for series in volume:
        coarse = torch.from_numpy(rng.normal(size=(1, 1, 9, 11, 9)).astype(np.float32))
        smooth = torch.nn.functional.interpolate(coarse, SHAPE, mode="trilinear")[0, 0].numpy()
        grey = np.rint(400 + 150 * smooth + rng.normal(0, 15, SHAPE))[head]
        series[head] = (grey - grey.mean()) / grey.std()
    labels = np.zeros((1, *SHAPE), np.int8)
    sizes = {}
    for suffix, array in (("", volume), ("_seg", labels)):
        sizes[f"blocks{suffix}"], sizes[f"chunks{suffix}"] = comp_blosc2_params(array.shape, patch_size)
    nnUNetDatasetBlosc2.save_case(volume, labels, {"class_locations": None}, str(path.with_suffix("")), **sizes)


def find_files(folder: Path, num_cases: int) -> list[CaseFile]:
    """The cases of a preprocessed folder, each several times when there are fewer than asked for."""
    paths = sorted(path for path in folder.glob("*.b2nd") if not path.stem.endswith("_seg"))
    num_channels = blosc2.open(str(paths[0])).shape[0]
    chosen = [paths[number % len(paths)] for number in range(max(num_cases, len(paths)))]
    return [CaseFile(f"{n}/{p.stem}", p, num_channels, tuple(range(num_channels))) for n, p in enumerate(chosen)]


def maker(bank: Bank, batch_size: int, patch_size: Size) -> Callable[[int], Tensor]:
    """Batches as pretraining draws them, without masks."""
    places = torch.arange(batch_size, device=bank.device)

    def make(step: int) -> Tensor:
        draws = Draws(step, places)
        chosen = draws.integers(What.CASE, 1)[:, 0] % len(bank)
        return bank.cut(chosen, draw_crops(draws, bank.shapes[chosen], patch_size, bank.occupancy[chosen]), patch_size)

    return make


def rows_of_bank(
    where: Where, opened: Callable[[], Bank], device: torch.device, batch_size: int, patch_size: Size, num_threads: int, size: int
) -> list[Row]:
    """Every turn opens the bank anew, so that no turn finds memory that another one left behind."""
    # inline where there is but one; a bank on the GPU needs none
    workers = 0 if num_threads == 1 or where == "gpu" else num_threads

    def by_threads() -> Iterator[object]:
        return ahead(maker(opened(), batch_size, patch_size), count(), workers, device)

    def by_processes() -> Iterator[object]:
        make = maker(opened(), batch_size, patch_size)
        return batches(lambda _, step: make(step), 0, 1, 10**6, num_threads, pin_memory=False)

    if device.type == "cuda":
        name = where if where == "gpu" else f"{where}, to the GPU"
        return [Row(name, batch_size, num_threads, size, by_threads, torch.cuda.synchronize)]
    rows = [Row(where, batch_size, num_threads, size, by_threads, nothing)]
    if num_threads > 1:
        rows.append(Row("mapped, processes", batch_size, num_threads, size, by_processes, nothing, in_this_process=False))
    return rows


def nothing() -> None:
    """Stand-in for what is waited for on a GPU."""


def row_of_nnunet(folder: Path, num_series: int, batch_size: int, patch_size: Size, num_threads: int) -> Row:
    def start() -> Iterator[object]:
        labels = SimpleNamespace(all_labels=[1], has_ignore_label=False)
        dataset = nnUNetDatasetBlosc2(str(folder))
        loader = nnUNetDataLoader(dataset, batch_size, patch_size, patch_size, labels, 0.0)
        if num_threads == 1:
            return loader
        return NonDetMultiThreadedAugmenter(loader, None, num_threads, 2, None, pin_memory=False)

    size = 4 * num_series * math.prod(patch_size)
    return Row("nnU-Net's loader", batch_size, num_threads, size, start, nothing, in_this_process=num_threads == 1)


def measure(row: Row, seconds: float) -> None:
    made = row.start()
    try:
        for _ in range(NUM_WARM):
            next(made)
        row.wait()
        started, busy, num_batches = time.perf_counter(), time.process_time(), 0
        # one at least, however busy the machine is
        while not num_batches or time.perf_counter() - started < seconds:
            next(made)
            num_batches += 1
        row.wait()
        row.rates.append(num_batches * row.batch_size / (time.perf_counter() - started))
        row.rates_busy.append(num_batches * row.batch_size / (time.process_time() - busy))
    finally:
        stop = getattr(made, "close", None) or getattr(made, "_finish", None)
        if stop is not None:
            stop()


def copied_bytes_a_second() -> float:
    """Bytes that one thread copies a second, out of cache: read and written once each."""
    source, target = np.ones(2**27, np.uint16), np.empty(2**27, np.uint16)
    best = math.inf
    for _ in range(4):
        started = time.perf_counter()
        np.copyto(target, source)
        best = min(best, time.perf_counter() - started)
    return source.nbytes / best


def processor() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.is_file() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, help="folder for the table (loader_speed.json) and synthetic cases")
    parser.add_argument("-d", help="dataset whose preprocessed 3d_fullres cases are read; without it, synthetic ones are written")
    parser.add_argument("-n", type=int, default=40, help="number of cases; when there are fewer, they are taken several times")
    parser.add_argument("-patch", "--patch", type=int, nargs=3, default=(96, 96, 96), help="along z, y, x")
    parser.add_argument("-batch", "--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("-threads", "--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("-s", type=float, default=4.0, help="seconds of a turn")
    parser.add_argument("-turns", "--turns", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    patch_size: Size = tuple(args.patch)
    with exit_on_user_error():
        if args.d:
            folder = nnunet.folder("nnUNet_preprocessed") / convert_id_to_dataset_name(int(args.d)) / "nnUNetPlans_3d_fullres"
        else:
            folder = args.o / "cases"
            folder.mkdir(parents=True, exist_ok=True)
            for number in tqdm(range(args.n), desc="writing cases", disable=None):
                write_case(folder, number, patch_size)
        files = find_files(folder, args.n)
        reading = []
        # decoded and stored unless an earlier call did that, then mapped only
        for _ in range(2):
            started = time.perf_counter()
            contents = read(files)
            reading.append(time.perf_counter() - started)
    num_series = len(contents.cases[0].volumes)
    size = 2 * num_series * math.prod(patch_size)
    devices = [CPU] + [torch.device("cuda", 0)] * torch.cuda.is_available()
    rows = []
    for batch_size, num_threads in itertools.product(args.batch, args.threads):
        rows.append(row_of_nnunet(folder, num_series, batch_size, patch_size, num_threads))
        for device in devices:
            pinned = device.type == "cuda"
            opened: dict[Where, Callable[[], Bank]] = {
                "mapped": partial(MappedBank, contents, pinned),
            }
            if pinned:
                opened["gpu"] = partial(GpuBank, contents, device)
            for where, make in opened.items():
                rows += rows_of_bank(where, make, device, batch_size, patch_size, num_threads, size)
    for turn in range(args.turns):
        for row in tqdm(rows, desc=f"turn {turn + 1} of {args.turns}", unit="row", disable=None, leave=False):
            measure(row, args.s)
    bandwidth = copied_bytes_a_second()
    print(
        f"\n{'':<24}{'batch':>6}{'threads':>8}{'crops/s':>10}{'GiB/s':>8}{'to nnU-Net':>12}{'crops/CPU s':>13}{'to nnU-Net':>12}"
    )
    table = []
    for row in rows:
        same = [other for other in rows if other.batch_size == row.batch_size and other.name == rows[0].name]
        stock = next(other for other in same if other.num_threads == row.num_threads)
        # whose processes are not counted here
        stock_busy = next((other.rate_busy for other in same if other.rate_busy), None)
        ratio, ratio_busy = row.rate / stock.rate, row.rate_busy / stock_busy if row.rate_busy and stock_busy else None
        busy = f"{row.rate_busy:>13.0f}{ratio_busy:>11.1f}x" if row.rate_busy and ratio_busy else ""
        gib = row.rate * row.bytes_per_crop / 2**30
        print(f"{row.name:<24}{row.batch_size:>6}{row.num_threads:>8}{row.rate:>10.1f}{gib:>8.2f}{ratio:>11.1f}x{busy}")
        table.append(
            {
                "bank": row.name,
                "batch_size": row.batch_size,
                "num_threads": row.num_threads,
                "bytes_per_crop": row.bytes_per_crop,
                "crops_per_second": row.rate,
                "to_nnunet": ratio,
                "crops_per_cpu_second": row.rate_busy,
                "to_nnunet_per_cpu_second": ratio_busy,
                "turns": row.rates,
            }
        )
    paths = {file.path for file in files}
    stored = sum(path.stat().st_size for path in paths)
    print(
        f"\n{len(files)} cases ({len(paths)} files, {stored / 2**20:.0f} MiB) of {num_series} series, the first "
        f"{contents.cases[0].shape}; patch {patch_size}; {contents.num_bytes / 2**30:.1f} GiB as fp16, opened in "
        f"{reading[0]:.1f} s and again in {reading[1]:.2f} s"
    )
    most = bandwidth / size
    print(f"the floor: one thread copies {bandwidth / 2**30:.1f} GiB/s, {most:.0f} crops of {size / 2**20:.1f} MiB a second")
    machine = f"{os.cpu_count()} cores, {processor()}"
    if torch.cuda.is_available():
        machine += f", {torch.cuda.get_device_name(0)}"
    versions = {name: version(name) for name in ("nnunet_csm", "nnunetv2", "torch", "numpy", "blosc2")}
    print(f"{machine}; Python {platform.python_version()}, {versions}; load {os.getloadavg()[0]:.1f}")
    result = {
        "machine": machine,
        "versions": versions,
        "patch_size": patch_size,
        "num_series": num_series,
        "copied_bytes_per_second": bandwidth,
        "rows": table,
    }
    (args.o / "loader_speed.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
