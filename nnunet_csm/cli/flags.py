"""Subcommands, and the flags that several of them share."""

import argparse
from collections.abc import Callable
from typing import Any

from nnunet_csm.machine import num_cores
from nnunet_csm.plans import PLANS_NAME

Command = Callable[[argparse.Namespace], int]

PRETRAINER, FINETUNER, CLASSIFIER = "nnUNetTrainerCSMPretrain", "nnUNetTrainerCSM", "nnUNetTrainerCSMClassifier"
NUM_PROCESSES = min(8, num_cores())


class Commands:
    """The subcommands of a parser."""

    def __init__(self, parser: argparse.ArgumentParser, title: str, metavar: str, **options: Any) -> None:
        self.subparsers = parser.add_subparsers(title=title, required=True, metavar=metavar, **options)

    def add(self, name: str, what: str, example: str, run: Command) -> argparse.ArgumentParser:
        """A command, what it does in a sentence and as an example, and the function that does it."""
        command: argparse.ArgumentParser = self.subparsers.add_parser(
            name,
            help=what,
            description=what,
            epilog=f"Example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=run)
        return command


def add_model(
    p: argparse.ArgumentParser,
    trainer: str,
    required: bool = True,
    folds: str = "folds whose predictions are averaged; default: those of 0 to 4 that are trained",
    device: bool = True,
) -> None:
    """A trained model, and where it is to run."""
    p.add_argument("-d", required=required, help="dataset name or ID")
    p.add_argument("-f", nargs="+", help=folds)
    p.add_argument("-tr", default=trainer, help="trainer")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint name")
    if device:
        p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device")


def model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that name a trained model, and its device."""
    return {
        "dataset": args.d or "",
        "trainer": args.tr,
        "plans": args.p,
        "configuration": args.c,
        "folds": tuple(args.f or ()),
        "checkpoint_name": args.chk,
        "device": args.device,
    }
