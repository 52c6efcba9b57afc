"""The parser of the command line."""

import argparse

from nnunet_csm import __version__
from nnunet_csm.cli import applying, converting, planning, scoring, setting_up, sharing, training
from nnunet_csm.cli.flags import Commands


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnunet_csm",
        description="Cross-series masking for nnU-Net v2: pretrain on unlabelled multi-series MRI, fine-tune on few labels.",
        epilog='Stock nnUNetv2_... commands do the same once `eval "$(nnunet_csm env)"` was run.',
    )
    parser.add_argument("--version", action="version", version=f"nnunet_csm {__version__}")
    commands = Commands(parser, "commands", "COMMAND")
    for family in (setting_up, converting, planning, training, applying, scoring, sharing):
        family.declare(commands)
    return parser
