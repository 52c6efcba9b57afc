"""nnU-Net's folders as tests see them."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import warm_processes


@dataclass(frozen=True)
class NnunetFolders:
    raw: Path
    preprocessed: Path
    results: Path


TINY_PRESET = Path(__file__).with_name("tiny.json")
NUM_TRAINING, NUM_TEST = 6, 2


@dataclass(frozen=True)
class PlannedDataset:
    """A phantom in nnU-Net's folders, converted, planned and preprocessed by stock commands, with CSM plans."""

    folders: NnunetFolders
    environment: dict[str, str]
    task: Path
    name: str = "Dataset900_Phantom"
    cold: bool = False  # commands start as users start them, and take long to

    def run(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a console command of the environment the tests run in."""
        if not self.cold:
            return warm_processes.run(program, arguments, self.environment, timeout=600)
        command = [str(Path(sys.executable).with_name(program)), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, encoding="utf-8", check=False, timeout=600)

    def check(self, program: str, *arguments: str) -> str:
        done = self.run(program, *arguments)
        assert done.returncode == 0, f"{program} {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout
