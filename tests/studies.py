"""Studies of the tests: of the planned phantom's six cases."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import warm_processes
from nnunet_folders import TINY_PRESET, PlannedDataset

from nnunet_csm import cli
from nnunet_csm.data.diagnoses import ClassTable, Sample
from nnunet_csm.study import execution, measured
from nnunet_csm.study.runs import Run

JOINT = {"network": {"encoder": {"kind": "joint_vit"}}, "pretext": {"name": "mae3d", "masking": {"mask_ratio": 0.75}}}
AUTOENCODER = {
    "name": "AE",
    "changes": {
        "network": {"width": 16, "depth": 1, "decoder": "unet", "encoder": {"kind": "residual_unet", "base": 4}},
        "pretext": {"name": "ae"},
    },
}
SCRATCH, MAE3D, CSM = {"name": "scratch", "pretrained": False}, {"name": "MAE3D", "changes": JOINT}, {"name": "CSM"}
FOREST = {"name": "forest", "mask_volumes": ["labelsTr"]}


def spec(**given: Any) -> dict[str, Any]:
    """A study of the test dataset's six cases in two folds."""
    return {
        "description": "of the tests",
        "task": "segmentation",
        "preset": str(TINY_PRESET),
        "repeats": {"kind": "folds", "number": 2},
        "labels": [1.0],
        "arms": [SCRATCH, CSM],
        **given,
    }


def reconstruction(*arms: Any, **given: Any) -> dict[str, Any]:
    """A study of what pretrainings rebuild."""
    return spec(**({"task": "reconstruction", "arms": list(arms) or [CSM]} | given))


def make_table(num_patients: int, num_positive: int, cases_each: int = 1) -> ClassTable:
    samples = [
        Sample(f"case{p:03d}_{c}", int(p < num_positive), None, f"patient{p:03d}")
        for p in range(num_patients)
        for c in range(cases_each)
    ]
    return ClassTable(("no", "yes"), tuple(samples))


def make_run(name: str, needs: str | None = None) -> Run:
    return Run(name, "fine-tuning", "d", "c", "p", "t", 0, needs, None, (), 0, 0.0)


def study_of_warm_steps(*arguments: str) -> int:
    """`nnunet_csm study`, in a process of its own, whose steps start warm as well and end with it."""
    execution.run_command = warm_step  # type: ignore[assignment]
    return cli.main(["study", *arguments])


def warm_step(command: Sequence[str], environment: Mapping[str, str], stdout: TextIO) -> int:
    assert command[:2] == ["-m", measured.__name__]
    log = Path(stdout.name)
    process = warm_processes.start(measured.main, [command[2:]], environment, log, log, os.getpgrp())
    process.join()
    # its exit code is read once, by either of the threads that do runs; the file is written when all went well
    return int(not Path(command[2]).is_file())


def start_study(planned: PlannedDataset, file: Path, output: Path) -> warm_processes.WarmProcess:
    arguments = [str(file), "-d", "900", "-device", "cpu", "-jobs", "2", "-o", str(output)]
    said = output.with_suffix(".txt")
    return warm_processes.start(study_of_warm_steps, arguments, planned.environment, said, said)


def ended_well(process: warm_processes.WarmProcess) -> bool:
    process.join(600)
    return process.exitcode == 0
