"""Files and folders that are written whole or not at all."""

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
def whole_folder(final: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder that takes the name `final` when the block ends, and is gone when the block fails.

    It lies in a hidden folder beside `final`; what a killed run left there is removed. With `overwrite`, a folder of that name is
    replaced, at the end.

    Raises:
        UserError: it is there without `overwrite`, or another process is writing it.
    """
    workplace, replaced = (final.with_name(f".{final.name}.{state}") for state in ("partial", "replaced"))
    if replaced.is_dir():  # killed between the two renames below, or just after
        shutil.rmtree(replaced) if final.exists() else replaced.rename(final)
    if final.exists() and not final.is_dir():
        raise UserError(f"{final} is a file, expected a folder or nothing; move it away")
    if final.is_dir() and any(final.iterdir()) and not overwrite:
        raise UserError(f"{final} exists and is kept; give --overwrite to replace it, or another name")
    with alone(workplace, f"process that writes {final.name}", "choose another name"):
        unfinished = workplace / final.name
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir()
            yield unfinished
            if final.exists():
                final.rename(replaced)
            unfinished.rename(final)
        finally:  # after an interrupt as well
            shutil.rmtree(workplace, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def alone(folder: str | Path, what: str, remedy: str = "choose another fold or plans") -> Iterator[None]:
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
            raise UserError(f"{folder}: another {what} is running there; wait for it or stop it, or {remedy}") from None
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
