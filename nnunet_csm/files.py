"""Files and folders that are written whole or not at all."""

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from nnunet_csm.errors import UserError, no_room

# the lock of a folder, and a folder for what is not whole yet
RUNNING, WORKPLACE = ".running", ".unfinished_"


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
        if not no_room(error, path.parent):
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
    """Keep other processes that do the same out of a folder. A killed one no longer does, and what it left is removed.

    Raises:
        UserError: another one is at work there.
    """
    path = Path(folder) / RUNNING
    with ExitStack() as stack:
        while True:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("a"))
            free = _locked(file)
            if free is False:
                raise UserError(f"{folder}: another {what} is running there; wait for it or stop it, or {remedy}")
            # the one before may have removed the file after it was opened here: then whoever comes next would lock another
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        if free:
            _remove_unfinished(path.parent)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A hidden folder in `folder` for what is not whole yet, removed at the end with all that is in it.

    Several processes may have one each; those that killed processes left are removed.
    """
    for left in folder.glob(f"{WORKPLACE}*"):
        with suppress(OSError), (left / RUNNING).open("a") as file:
            if _locked(file):
                shutil.rmtree(left, ignore_errors=True)
    unlocked, own = folder / f".{uuid.uuid4().hex}", folder / f"{WORKPLACE}{uuid.uuid4().hex}"
    with alone(unlocked, "process"):
        try:
            # only now, as another process may look for what is not locked
            unlocked.rename(own)
            yield own
        finally:
            shutil.rmtree(own, ignore_errors=True)


@contextmanager
def in_turn(folder: Path, what: str) -> Iterator[None]:
    """Have other processes that do the same in a folder wait. A killed one no longer does, and what it left is removed."""
    with (folder / ".writing").open("a") as file:
        free = _locked(file)
        if free is False:
            print(f"{folder}: {what} by another process; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        if free is not None:
            _remove_unfinished(folder)
        yield


def _remove_unfinished(folder: Path) -> None:
    """What `whole` began, in a folder whose lock is held."""
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)


def _locked(file: IO[str]) -> bool | None:
    """Whether the lock of a file was free, and is this process's from now on; None where the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_of_file(path: Path) -> str:
    """Hash of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
