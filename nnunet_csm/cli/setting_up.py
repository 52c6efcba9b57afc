"""The first steps: the demo, the environment, what is missing."""

import argparse
import shlex
from pathlib import Path

from nnunet_csm import nnunet
from nnunet_csm.cli.flags import Commands
from nnunet_csm.errors import UserError


def declare(commands: Commands) -> None:
    p = commands.add(
        "demo",
        "Run everything on a phantom, on two CPU cores, in minutes, with a summary page.",
        "nnunet_csm demo -o csm_demo",
        demo,
    )
    p.add_argument("-o", default="csm_demo", help="output folder; holds the nnU-Net folders of the demo and summary.html")
    p.add_argument("-seed", type=int, default=0, help="seed of the phantom")

    commands.add(
        "env", "Print the export that lets stock nnUNetv2_... commands find our trainers.", 'eval "$(nnunet_csm env)"', env
    )

    p = commands.add(
        "doctor",
        "Check versions, folders, GPU, trainers, what a dataset lacks, and its classes by fold.",
        "nnunet_csm doctor -d 21",
        doctor,
    )
    p.add_argument("-d", nargs="+", help="dataset names or IDs")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("--strict", action="store_true", help="exit code 2 also where something is missing or doubtful, a GPU apart")


def demo(args: argparse.Namespace) -> int:
    from nnunet_csm.demo import run_demo

    run_demo(Path(args.o), args.seed)
    return 0


def env(args: argparse.Namespace) -> int:
    print(f"export {nnunet.TRAINER_VARIABLE}={shlex.quote(nnunet.trainer_path())}")
    return 0


def doctor(args: argparse.Namespace) -> int:
    from nnunet_csm.doctor import examine

    findings = []
    for finding in examine(args.d or (), args.c):
        findings.append(finding)
        print(finding, flush=True)
    missing = sum(bool(f.remedy) for f in findings)
    print(f"{missing} to look at" if missing else "all is well")
    unusable = [finding.remedy for finding in findings if finding.mark == "UNUSABLE"]
    if unusable:
        raise UserError("; ".join(unusable))
    return 2 if args.strict and any(f.remedy and f.mark != "optional" for f in findings) else 0
