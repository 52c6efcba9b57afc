"""One step of a run in a process of its own: a command of ours or of nnU-Net's, and what it took.

    python -m nnunet_csm.study.measured FILE.json COMMAND [ARGUMENTS ...]

COMMAND is a subcommand of nnunet_csm, or module:function as in nnU-Net's console scripts. The file is written when the step is
done. A step that another process is still at, left behind by a study that was killed, is waited for and not done twice.
"""

import fcntl
import resource
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nnunet_csm import nnunet
from nnunet_csm.processes import follow_parent, stoppable


def main(arguments: Sequence[str]) -> int:
    path, command, *flags = arguments
    with Path(path).with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if Path(path).is_file():
            return 0
        started = time.monotonic()
        code = perform(command, flags)
        if code == 0:
            nnunet.save_json({"seconds": time.monotonic() - started, "peak_memory_gb": peak_memory(), **device()}, Path(path))
        return code


def perform(command: str, flags: Sequence[str]) -> int:
    if ":" in command:
        nnunet.run(command, flags)
        return 0
    # as a user would type it: this room knows nothing of the command line
    sys.argv = ["nnunet_csm", command, *flags]
    try:
        runpy.run_module("nnunet_csm", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def peak_memory() -> float:
    """GB of the GPU where one was used, of the process otherwise."""
    import torch

    if torch.cuda.is_available() and torch.cuda.max_memory_reserved():
        return torch.cuda.max_memory_reserved() / 1e9
    # Linux counts kilobytes, macOS bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def device() -> dict[str, str]:
    import platform

    import torch

    used = torch.cuda.is_available() and torch.cuda.max_memory_reserved()
    return {"device": torch.cuda.get_device_name() if used else platform.processor() or platform.machine()}


if __name__ == "__mp_main__":
    follow_parent()
elif __name__ == "__main__":
    with stoppable("start the study again to go on"):
        raise SystemExit(main(sys.argv[1:]))
