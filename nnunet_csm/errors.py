"""The one kind of error users are meant to read."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Something outside the program is wrong: which file, what was found, what was expected, the remedy."""


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Print a `UserError` without a traceback and end the process with exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
