"""The one kind of error users are meant to read."""

import errno
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import gettempdir

# of a disk, of a user's share of it, and of what a process may write (ulimit -f)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# libraries report a full disk in words of their own; one with less room than this is full
ROOM = 2**20
# torch's, of a checkpoint that could not be written to its end
WORDS_OF_TORCH = ("iostream error", "unexpected pos")
# where commands write, beside what they are given
FOLDER_VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


class UserError(ValueError):
    """Something outside the program is wrong: which file, what was found, what was expected, the remedy."""

    def __init__(self, text: str) -> None:
        # names of files that are not UTF-8 come as lone surrogates, which no terminal, table or JSON takes
        super().__init__(text.encode("utf-8", "backslashreplace").decode())


def reason(error: BaseException) -> str:
    """What a library says of an error, in one line: the last one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


def no_room(error: BaseException, *folders: Path) -> bool:
    """Whether something could not be written for want of room, which libraries report in words of their own."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in FULL
    words = (*map(os.strerror, FULL), *WORDS_OF_TORCH)
    return any(one in str(error) for one in words) or bool(_full(*folders))


def _full(*folders: Path) -> list[Path]:
    there = [next(above for above in (folder, *folder.parents) if above.is_dir()) for folder in map(Path.absolute, folders)]
    return [folder for folder in there if shutil.disk_usage(folder).free < ROOM]


@contextmanager
def exit_on_user_error(*outputs: Path) -> Iterator[None]:
    """Print a `UserError`, or what the system does not let us do with a file, without a traceback; exit code 2.

    Args:
        outputs: where else than in nnU-Net's folders something may be written.
    """
    try:
        yield
    except UserError as error:
        raise SystemExit(_said(str(error))) from None
    except Exception as error:
        file = getattr(error, "filename2", None) or getattr(error, "filename", None)
        inside = [*outputs, *(Path(os.environ[name]) for name in FOLDER_VARIABLES if name in os.environ), Path(gettempdir())]
        if no_room(error, *inside):
            where = file or f"a file in {next(iter(_full(*inside)), 'an output folder')} ({reason(error)})"
            raise SystemExit(_said(f"{where}: there is no room for it; free some space on its disk and run this again")) from None
        if isinstance(error, OSError) and file is not None:
            remedy = "give another name or folder, or change its permissions"
            raise SystemExit(_said(f"{os.fsdecode(file)}: {error.strerror or reason(error)}; {remedy}")) from None
        raise


def _said(text: str) -> int:
    print(f"Error: {text}", file=sys.stderr, flush=True)
    return 2
