"""What grows with the number of subjects and of ranks: time and memory.

Subjects: the mapped bank on ten times and a hundred times as many cases (copies by hard links); seconds to open it the first time
and again, crops a second, and the memory of a process that does nothing else, without the pages of mapped files, which the system
takes back when it needs them. Ranks: whole steps of pretraining by 1, 2 and 4 processes on this machine, started by torchrun,
which share one batch (gloo on CPU cores, NCCL on GPUs).

    python benchmarks/scaling.py -o scaling        # also scaling.json
    python benchmarks/scaling.py --cpu
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from pretrain_speed import MAX_SERIES, NUM_CASES, Row, write_cases
from steps import bare_pretrainer, variants_of

from nnunet_csm.data.bank import open_bank
from nnunet_csm.data.draws import Purpose, ahead
from nnunet_csm.data.stored import CaseFile
from nnunet_csm.pretext.batches import Batches
from nnunet_csm.training.ranks import started

SHAPE = (70, 85, 70)
NUM_SERIES = 4


def rows(cpu: bool) -> tuple[Row, Row]:
    """Rows for subjects, and for ranks."""
    small = Row("demo", NUM_SERIES, 32, 16, SHAPE, 8)
    return small, small if cpu else Row("B", NUM_SERIES, 96, 64)


def with_subjects(row: Row, folder: Path, num_subjects: int, num_batches: int, num_threads: int) -> dict[str, float]:
    """Batches from mapped files, by a process of its own."""
    paths = [folder / f"subject{number:05d}.b2nd" for number in range(num_subjects)]
    for number, path in enumerate(paths):
        if not path.exists():
            os.link(folder / f"case{number % NUM_CASES}.b2nd", path)
    files = [CaseFile(path.stem, path, MAX_SERIES, tuple(range(NUM_SERIES))) for path in paths]
    begun = time.perf_counter()
    bank = open_bank(files, torch.device("cpu"))
    opened = time.perf_counter() - begun
    batches = Batches(bank, row.method.build(), 1, Purpose.TRAINING, range(row.batch_size))
    loader = ahead(lambda at: batches(*at), ((0, step) for step in range(num_batches)), num_threads, torch.device("cpu"))
    begun = time.perf_counter()
    for _ in loader:
        pass
    seconds = time.perf_counter() - begun
    status = Path("/proc/self/status").read_text().splitlines()
    taken = 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    rate = num_batches * row.batch_size / seconds
    return {"opened": opened, "crops_per_second": rate, "taken": taken}


def as_rank(cpu: bool, num_steps: int) -> None:
    """One of the processes that torchrun starts; the first prints what was measured."""
    row = rows(cpu)[1]
    with started("cpu" if cpu else "cuda") as ranks:
        device = ranks.device(torch.device("cpu" if cpu else "cuda"))
        trainer = bare_pretrainer(row.method, device, not cpu, graphs=False)
        trainer.ranks, trainer.learning_network = ranks, ranks.shared(trainer.network, device)
        num_samples = len(ranks.samples_of(row.batch_size))
        batch = trainer.on_device(trainer.pretext.example(num_samples, max(variants_of(trainer.pretext))))
        for _ in range(2 if cpu else 10):
            loss = trainer.learn(batch)
        # steps still under way would be counted
        float(loss)
        ranks.wait()
        begun = time.perf_counter()
        for _ in range(num_steps):
            loss = trainer.learn(batch)
        float(loss)
        ranks.wait()
        seconds = time.perf_counter() - begun
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if cpu else torch.cuda.max_memory_allocated()
        if ranks.rank == 0:
            print(json.dumps({"crops_per_second": num_steps * row.batch_size / seconds, "peak": peak}))


def with_ranks(num_ranks: int, cpu: bool, num_steps: int) -> dict[str, float]:
    flags = ["--as_rank", "-n", str(num_steps), *(["--cpu"] if cpu else [])]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(num_ranks),
        __file__,
        *flags,
    ]
    threads = str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    environment = os.environ | {"OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{num_ranks} ranks ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="a small network on CPU cores for the ranks")
    parser.add_argument("-n", type=int, default=30, help="steps measured (default: 30)")
    parser.add_argument("-o", help="writes this name with .json")
    parser.add_argument("--as_rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.as_rank:
        as_rank(args.cpu, args.n)
        return 0
    if not args.cpu and not torch.cuda.is_available():
        print("Error: no CUDA device; measure on a machine with one, or give --cpu", file=sys.stderr)
        return 2
    name = platform.processor() or platform.machine() if args.cpu else torch.cuda.get_device_name()
    machine = f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    print(machine)
    found: dict[str, list[dict[str, Any]]] = {"subjects": [], "ranks": []}
    print(f"{'subjects':>8}{'to open':>10}{'again':>10}{'crops/s':>10}{'ratio':>7}{'own MiB':>10}{'ratio':>7}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "dataset" / "cases"
        folder.mkdir(parents=True)
        write_cases(folder, SHAPE)
        for num_subjects in (NUM_CASES, 10 * NUM_CASES, 100 * NUM_CASES):
            runs = []
            # the first run decodes the cases and stores them
            for _ in range(2):
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
                    future = fresh_process.submit(with_subjects, rows(args.cpu)[0], folder, num_subjects, 10 * args.n, 2)
                    runs.append(future.result())
            measured = runs[1] | {"first_opened": runs[0]["opened"]}
            found["subjects"].append({"subjects": num_subjects, **measured})
            first = found["subjects"][0]
            print(
                f"{num_subjects:>8}{measured['first_opened']:>9.1f}s{measured['opened']:>9.2f}s{measured['crops_per_second']:>10.0f}"
                f"{measured['crops_per_second'] / first['crops_per_second']:>7.2f}{measured['taken'] / 2**20:>10.0f}"
                f"{measured['taken'] / first['taken']:>7.2f}",
                flush=True,
            )
    gpus = 10**9 if args.cpu else torch.cuda.device_count()
    print(f"{'ranks':>8}{'crops/s':>10}{'ratio':>7}{'peak MiB':>10}")
    for num_ranks in (1, 2, 4):
        if num_ranks > gpus:
            print(f"{num_ranks:>8}  not measured: {gpus} GPU")
            continue
        measured = with_ranks(num_ranks, args.cpu, args.n)
        found["ranks"].append({"ranks": num_ranks, **measured})
        ratio = measured["crops_per_second"] / found["ranks"][0]["crops_per_second"]
        print(f"{num_ranks:>8}{measured['crops_per_second']:>10.1f}{ratio:>7.2f}{measured['peak'] / 2**20:>10.0f}", flush=True)
    if args.o:
        Path(f"{args.o}.json").write_text(json.dumps({"machine": machine} | found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
