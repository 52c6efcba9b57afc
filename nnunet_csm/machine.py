"""What a process may take of its machine: threads, workers, memory a step, a place for compiled kernels."""

import ctypes
import getpass
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import joblib
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunet_csm.errors import UserError
from nnunet_csm.processes import follow_parent, kill_workers, stopping

if TYPE_CHECKING:
    import torch

CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
ACCUMULATE_VARIABLE = "nnUNet_csm_accumulate"
# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
# handed out but not yet done, for each process: enough that none waits, and no more in memory than that
JOBS_PER_PROCESS = 4

Given = TypeVar("Given")
Made = TypeVar("Made")


def accumulation(num_samples: int) -> int:
    """Parts that a rank learns its share of a batch in, one after the other (`nnUNet_csm_accumulate`): memory for time.

    Raises:
        UserError: no such number of parts.
    """
    given = os.environ.get(ACCUMULATE_VARIABLE, "1")
    if not given.isdigit() or not 1 <= int(given) <= num_samples:
        raise UserError(f"{ACCUMULATE_VARIABLE} is {given!r}; a share of {num_samples} samples has 1 to {num_samples} parts")
    return int(given)


def slices(num: int, num_parts: int) -> list[slice]:
    """`num` places in parts of nearly the same size."""
    bounds = [part * num // num_parts for part in range(num_parts + 1)]
    return [slice(first, last) for first, last in pairwise(bounds)]


def check_compiler_cache() -> None:
    """torch.compile writes its kernels before the first step.

    Raises:
        UserError: it cannot.
    """
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # as torch names users that a container does not know
        user = f"uid_{os.getuid()}"
    folder = Path(os.environ.get(CACHE_VARIABLE) or Path(tempfile.gettempdir()) / f"torchinductor_{user}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"{folder}: torch.compile cannot write its cache there ({error.strerror}); set {CACHE_VARIABLE} to a folder that can "
            f"be written, or do without with nnUNet_compile=f"
        ) from None


@lru_cache
def why_not_compiled(device_type: str) -> str:
    """Empty when networks are to be compiled, as nnU-Net decides (`nnUNet_compile`), and an addition compiles; else, why not."""
    import torch

    if device_type != "cuda":
        return "it is for GPUs"
    if os.environ.get("nnUNet_compile", "t").lower() not in ("true", "1", "t"):
        return "switched off by nnUNet_compile"
    try:
        number = torch.ones(8, device=device_type)
        torch.compile(torch.add, fullgraph=True)(number, number)
    except Exception as error:  # whatever a missing compiler or missing headers lead to
        return f"torch does not compile here ({(str(error).strip() or repr(error)).splitlines()[0]})"
    return ""


def has_bf16() -> bool:
    """Whether this processor multiplies bf16 (AVX512-BF16 or AMX): others are slower with it than without."""
    table = Path("/proc/cpuinfo")
    flags = table.read_text().split() if table.is_file() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def num_cores() -> int:
    """Cores that this process may use: a cluster, a container or `taskset` gives it a part of the machine's.

    More threads than that wait for each other: a prediction with two on one core took several times as long.
    """
    return joblib.cpu_count()


def num_threads(num_local_ranks: int) -> int:
    """Threads of the network on a CPU: `OMP_NUM_THREADS`, or this process's cores, shared by the ranks of the machine."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() else max(1, num_cores() // num_local_ranks)


def num_workers(device: "torch.device") -> int:
    """Processes that make batches ahead: nnU-Net's number (`nnUNet_n_proc_DA`); none beside a network on the same CPU cores."""
    return get_allowed_n_proc_DA() if device.type == "cuda" or "nnUNet_n_proc_DA" in os.environ else 0


def keep_freed_memory() -> None:
    """Have this process keep the memory it frees, for the next step or tile.

    glibc returns large blocks to the system at once, which then has to clear them again, page by page: up to a sixth of the CPU
    time of a step (docs/performance.md). The process holds its peak until it ends. Does nothing where there is no glibc.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def in_processes(make: Callable[[Given], Made], given: Sequence[Given], num_processes: int) -> Generator[tuple[Given, Made]]:
    """Each of `given` with what `make` makes of it, as they are done; one process, or one to make, is this process itself.

    Close the generator to stop early: it waits for what is being made and begins no more.

    Raises:
        UserError: a process was killed.
    """
    num_processes = min(num_processes, len(given))
    if num_processes <= 1:
        yield from ((one, make(one)) for one in given)
        return
    # not forked: this process may have threads by now, ITK's among them
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_start_process)
    left, running = iter(given), dict[Future[Made], Given]()
    try:
        while True:
            running |= {pool.submit(make, one): one for one in islice(left, JOBS_PER_PROCESS * num_processes - len(running))}
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        what = f"one of {num_processes} processes was killed, most likely for want of memory"
        raise UserError(f"{what}; run again with fewer processes (-np)") from None
    finally:
        if stopping():
            kill_workers()
        pool.shutdown(cancel_futures=True)


def _start_process() -> None:
    """One thread each, and no longer than the parent."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    follow_parent()
