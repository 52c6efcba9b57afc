"""Processes that start warm: forked from one that has imported torch, nnU-Net with all its trainers, and the package.

These imports take a core 4 to 10 seconds, longer than most of what tests start takes after them. The server, one for each process
of the tests, only imports: no thread of torch's that a fork would lose, and nothing of one command is seen by another.
"""

import gc
import importlib.metadata
import multiprocessing
import os
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nnunetv2.training.nnUNetTrainer as trainers


class WarmProcess(ForkServerProcess):
    """Has the environment and the process group of who makes it, as a spawned process has."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.environment, self.group = dict(os.environ), os.getpgrp()

    def run(self) -> None:
        # the server that made this process makes those of its own; Python would start another
        forkserver._forkserver.ensure_running = resource_tracker.ensure_running  # type: ignore[method-assign]
        # or a collection would write to, and so copy, every page of the imported modules
        gc.freeze()
        os.setpgid(0, self.group)
        os.environ.clear()
        os.environ.update(self.environment)
        super().run()


class WarmContext(ForkServerContext):
    Process = WarmProcess


WARM = WarmContext()
WARM.set_forkserver_preload(
    [
        "pytest",
        "nnunetv2.run.run_training",
        "nnunetv2.inference.predict_from_raw_data",
        *(module.name for module in pkgutil.walk_packages(trainers.__path__, f"{trainers.__name__}.") if not module.ispkg),
        "nnunet_csm.study.command",
        "nnunet_csm.training.pretraining",
        "nnunet_csm.training.classification",
    ]
)


def spawn_warm() -> None:
    """Let pools that ask for spawned processes have warm ones, whose modules are imported and otherwise as fresh."""
    get_context = multiprocessing.get_context
    multiprocessing.get_context = lambda method=None: WARM if method == "spawn" else get_context(method)  # type: ignore[assignment]


def start(
    act: Callable[..., int | None],
    arguments: Sequence[Any],
    environment: Mapping[str, str],
    said: Path,
    errors: Path,
    group: int = 0,
) -> WarmProcess:
    """Start `sys.exit(act(*arguments))` in a process of its own; what it prints is added to two files.

    Args:
        group: of processes, that it joins; 0 for a new one.
    """
    process = WarmProcess(target=act_alone, args=(act, arguments, said, errors))
    process.environment, process.group = dict(environment), group
    process.start()
    return process


def act_alone(act: Callable[..., int | None], arguments: Sequence[Any], said: Path, errors: Path) -> None:
    for path, number in ((said, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    # as many threads of torch's as nnU-Net's commands take for a CPU, with others beside them
    multiprocessing.cpu_count = lambda: 1
    spawn_warm()
    leave_out_what_takes_long()
    sys.exit(act(*arguments))


def console_command(program: str, *arguments: str) -> int | None:
    sys.argv = [str(Path(sys.executable).with_name(program)), *arguments]
    (entry_point,) = importlib.metadata.entry_points(group="console_scripts", name=program)
    code: int | None = entry_point.load()()
    return code


def run(
    program: str, arguments: Sequence[str], environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a console command; as `subprocess.run` with captured output."""
    command = [program, *arguments]
    with TemporaryDirectory() as folder:
        said, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        process = start(console_command, command, environment, said, errors)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, timeout, said.read_text("utf-8"), errors.read_text("utf-8"))
        return subprocess.CompletedProcess(command, process.exitcode, said.read_text("utf-8"), errors.read_text("utf-8"))


def leave_out_what_takes_long() -> None:
    """Of nnU-Net's own work: 10^8 intensities of every series, which z-scoring does not need, and a picture after every epoch."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    make = DatasetFingerprintExtractor.__init__

    def initialise(self: DatasetFingerprintExtractor, *arguments: Any, **keywords: Any) -> None:
        make(self, *arguments, **keywords)
        self.num_foreground_voxels_for_intensitystats = 1e5

    DatasetFingerprintExtractor.__init__ = initialise
    LocalLogger.plot_progress_png = lambda *_: None
