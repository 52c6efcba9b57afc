"""Files that are written whole or not at all."""

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_csm.errors import FULL, UserError

# libraries report a full disk in words of their own; one with less room than this is full
ROOM = 2**20


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file takes its place when all went well, and is removed otherwise.

    So a reader sees the old file or the whole new one, also after a process was killed.

    Raises:
        UserError: there is no room for it.
    """
    path = Path(path)
    # of no other process, on no other machine that shares the folder
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        full = isinstance(error, OSError) and error.errno in FULL
        if not full and (not path.parent.is_dir() or shutil.disk_usage(path.parent).free > ROOM):
            raise
        raise UserError(f"{path}: there is no room for it, and nothing was written; free some space and run this again") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(folder: str | Path, what: str) -> Iterator[None]:
    """Keep other processes that do the same out of a folder. A killed one no longer does.

    Raises:
        UserError: another one is at work there.
    """
    path = Path(folder) / ".running"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another {what} is running there; wait for it or stop it, or choose another fold or plans"
            ) from None
        except OSError:
            # a file system that knows no locks
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def in_turn(folder: Path, what: str) -> Iterator[None]:
    """Have other processes that do the same in a folder wait. A killed one no longer makes them wait."""
    with (folder / ".writing").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder}: {what} by another process; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            # a file system that knows no locks
            pass
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
