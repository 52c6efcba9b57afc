"""What every stage of `on_gpu.py` stands on: where it writes what it finds, its commands and its clock."""

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from nnunet_csm.machine import why_not_compiled


class Stage:
    """What a stage needs to know, and where it writes what it finds."""

    def __init__(self, name: str, work: Path, results: Path, cpu: bool, study: str, jobs: int) -> None:
        self.name, self.work, self.results, self.cpu, self.study, self.jobs = name, work, results, cpu, study, jobs
        self.device = torch.device("cpu" if cpu else "cuda")

    def found(self, check: str, value: object = "", passed: bool | None = None) -> None:
        """One line of the results, flushed: the process may be killed at any time."""
        row = {"stage": self.name, "check": check, "value": str(value), "passed": passed}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    def attempt(self, check: str, do: Callable[[], tuple[bool | None, object]]) -> None:
        """A check that may fail in any way, and stops no other."""
        try:
            passed, value = do()
        except Exception as error:
            traceback.print_exc()
            passed, value = False, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]}"
        self.found(check, value, passed)

    def command(self, *arguments: str, code: str = "") -> None:
        """Run a command of the package, or a line of Python."""
        how = ["-c", code] if code else ["-m", "nnunet_csm"]
        subprocess.run([sys.executable, "-P", *how, *arguments], check=True, stdin=subprocess.DEVNULL)

    @property
    def compiles(self) -> bool:
        """Whether networks are compiled, as trainers would decide."""
        return not why_not_compiled(self.device.type)

    def on(self) -> list[str]:
        return ["-device", self.device.type]

    @property
    def prepared(self) -> Path:
        return self.work / "prepared"


def wait_for(path: Path, seconds: float, process: subprocess.Popen[bytes] | None = None) -> None:
    """Until another process has written it."""
    end = time.monotonic() + seconds
    while not path.exists():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the process that was to write {path.name} ended with exit code {process.returncode}")
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not come within {seconds:.0f} s")
        time.sleep(0.2)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(do: Callable[[], object], device: torch.device, num: int) -> float:
    """The fastest of some calls."""
    best = float("inf")
    for _ in range(num):
        synchronize(device)
        begun = time.perf_counter()
        do()
        synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best


def empty(stage: Stage) -> None:
    """Free what trainers of earlier rows held, some of it in cycles."""
    gc.collect()
    if not stage.cpu:
        torch.cuda.empty_cache()
