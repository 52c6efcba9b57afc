"""`nnunet_csm`: commands beside nnU-Net's, with nnU-Net's flags."""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from nnunet_csm import nnunet
from nnunet_csm.cli.flags import Command
from nnunet_csm.cli.parser import build_parser
from nnunet_csm.cli.setting_up import doctor
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.listing import argument_problem
from nnunet_csm.processes import follow_parent, stoppable

# the script of this name is imported by the processes that `multiprocessing` starts
follow_parent()

# what torch says of other packages of the environment, which no user of ours can mend; the processes that are started read it
OF_OTHERS = "`torch.jit.interface` is deprecated"
# nnU-Net's variables that hold one
NUMBERS = ("nnUNet_def_n_proc", "nnUNet_n_proc_DA", "nnUNet_npp", "nnUNet_nps")
# what to do after a command was stopped, where it need not begin anew
GOES_ON = {
    "pretrain": "go on from the latest checkpoint with --c",
    "finetune": "go on from the latest checkpoint with --c",
    "predict": "what was written is whole, go on with --continue_prediction",
    "fingerprint": "run it again, which goes on where it was",
    "plan_and_preprocess": "run it again, which makes what is missing",
    "study": "start it again, which goes on where it was",
}
# commands of earlier versions -> what does their work now
RENAMED = {
    "classification_check": ["doctor"],
    "evaluate_classes": ["evaluate"],
    "export_msd": ["convert", "to_msd"],
    "fill_missing": ["predict", "--fill_missing_only"],
    "preprocess": ["plan_and_preprocess", "-preprocess_only"],
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command; a `UserError` ends in exit code 2 without a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", OF_OTHERS, FutureWarning)
        os.environ["PYTHONWARNINGS"] = f"ignore:{OF_OTHERS}:FutureWarning"
    outputs = [Path(value) for flag, value in pairwise(given) if flag == "-o"]
    advice = GOES_ON.get("" if "--fill_missing_only" in given else "".join(given[:1]), "nothing is half-written, run it again")
    with stoppable(advice), exit_on_user_error(*outputs):
        if given and given[0] in RENAMED:
            print(f"`nnunet_csm {given[0]}` is now `nnunet_csm {' '.join(RENAMED[given[0]])}`, which is run", file=sys.stderr)
            given[:1] = RENAMED[given[0]]
        args = build_parser().parse_args(given)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # a terminal that cannot show a sign must not end what took hours, and a file shows each line when it is said
                stream.reconfigure(errors="replace", line_buffering=True)
        for text in [*given, *(os.environ.get(variable, "") for variable in nnunet.FOLDER_VARIABLES)]:
            if problem := argument_problem(text):
                raise UserError(problem)
        for variable in NUMBERS:
            if not (value := os.environ.get(variable) or "0").isdigit():
                raise UserError(f"the environment variable {variable} is {value!r}, expected a whole number; correct or unset it")
        command: Command = args.run
        # a mistyped dataset need not wait for what the command imports; the doctor says itself which folder is not set
        if command is not doctor or all(variable in os.environ for variable in nnunet.FOLDER_VARIABLES):
            given_datasets = getattr(args, "d", None) or []
            for name in [given_datasets] if isinstance(given_datasets, str) else given_datasets:
                nnunet.dataset_name(name)
        return command(args)
