"""The one kind of error users are meant to read."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# of a disk, of a user's share of it, and of what a process may write (ulimit -f)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """Something outside the program is wrong: which file, what was found, what was expected, the remedy."""

    def __init__(self, text: str) -> None:
        # names of files that are not UTF-8 come as lone surrogates, which no terminal, table or JSON takes
        super().__init__(text.encode("utf-8", "backslashreplace").decode())


def reason(error: BaseException) -> str:
    """What a library says of an error, in one line: the last one."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a `UserError`, or that a disk is full, without a traceback and end the process with exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in FULL:
            raise
        what = error.filename2 or error.filename or "an output file"
        said = f"Error: {what}: there is no room for it; free some space on its disk and run this again"
        print(said, file=sys.stderr, flush=True)
        raise SystemExit(2) from None
