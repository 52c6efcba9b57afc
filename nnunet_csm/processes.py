"""How a command ends before its work is done, and how its processes end with it.

A signal becomes an exception in the main thread, so that what is half-written is removed on the way out, and every child that a
command starts ends with it: those of `multiprocessing` because they watch their parent, commands because they are told.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from nnunet_csm.errors import UserError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# from the signal to the end of everything: less than the 10 s that `docker stop` waits
GRACE_SECONDS = 7.0
SECONDS_BETWEEN_LOOKS = 1.0


class Stopped(KeyboardInterrupt):
    """The command was told to end; what is left to do is to leave nothing half-written."""


@dataclass
class _Process:
    """This process: the signal that ended it, what to say then and whether it was said, what it started, what it follows."""

    number: int | None = None
    advice: str | None = None
    said: bool = False
    commands: set["subprocess.Popen[bytes]"] = field(default_factory=set)
    watched: bool = False


_this = _Process()


@contextmanager
def stoppable(advice: str) -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end the block: one line, no process left, exit code 128 and the number of the signal.

    What waits for a child that is gone, or for a library that does not answer, is given `GRACE_SECONDS`. Within another such
    block, and outside the main thread, it does nothing. A signal that is ignored (`nohup`) stays so.

    Args:
        advice: what the line says beside the signal, such as how to go on.
    """
    if _this.advice is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    caught = [number for number in SIGNALS if before[number] in (signal.SIG_DFL, signal.default_int_handler)]
    _this.advice = advice
    for number in caught:
        signal.signal(number, _stop)
    try:
        yield
    except BaseException:
        # after a signal, a child's end may be what is told first
        if _this.number is None:
            raise
    finally:
        if _this.number is None:
            _this.advice = None
            for number in caught:
                signal.signal(number, before[number])
    if _this.number is not None:
        kill_workers()
        _say()
        raise SystemExit(128 + _this.number)


def stopping() -> bool:
    """Whether a signal has come: nothing new is begun then, and no child waited for."""
    return _this.number is not None


def _stop(number: int, frame: FrameType | None) -> None:
    if stopping():  # as a terminal, a cluster and a parent may each send one
        return
    _this.number = number
    for command in list(_this.commands):
        command.terminate()
    threading.Thread(target=_end_late, daemon=True).start()
    raise Stopped


def _end_late() -> None:
    time.sleep(GRACE_SECONDS)
    kill_workers()
    for command in list(_this.commands):
        command.kill()
    _say()
    assert _this.number is not None
    os._exit(128 + _this.number)


def _say() -> None:
    if not _this.said:
        _this.said = True
        name = signal.Signals(_this.number or 0).name
        sys.stdout.flush()
        print(f"Stopped by {name}; {_this.advice}", file=sys.stderr, flush=True)


def kill_workers() -> None:
    """End the processes that `multiprocessing` started here, at once."""
    if threading.current_thread() is threading.main_thread():
        # torch has a handler that takes the end of a worker for an error of its own
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        child.kill()


@contextmanager
def no_worker_left() -> Iterator[None]:
    """When the block fails, end the workers that were started in it: they would tell at length that nobody is there any more."""
    before = multiprocessing.active_children()
    try:
        yield
    except BaseException:
        for child in multiprocessing.active_children():
            if child not in before:
                child.kill()
        raise


def run_command(arguments: Sequence[str | Path], environment: Mapping[str, str] | None = None, log: IO[str] | None = None) -> int:
    """Run a command to its end, from any thread, and have it end with this process.

    Args:
        arguments: of Python.
        environment: instead of this process's.
        log: where its output goes, without any input; here when None.

    Returns:
        Its exit code.

    Raises:
        UserError: this process is about to end.
    """
    if stopping():
        raise UserError("not begun, since a signal has come")
    quiet = subprocess.DEVNULL if log is not None else None
    with subprocess.Popen([sys.executable, *arguments], env=environment, stdout=log, stderr=log, stdin=quiet) as command:
        _this.commands.add(command)
        try:
            if stopping():
                command.terminate()
            return command.wait()
        finally:
            _this.commands.discard(command)


def follow_parent() -> None:
    """In a process that `multiprocessing` started: end with the parent, and leave Ctrl-C to it. Nothing in any other.

    Workers that wait for work never notice that nobody is there to give them any.
    """
    if "--multiprocessing-fork" in sys.orig_argv or multiprocessing.parent_process() is not None:
        _follow(_is_told_parent_alive)


def _follow(is_parent_alive: Callable[[], bool]) -> None:
    if _this.watched:
        return
    _this.watched = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    threading.Thread(target=_watch, args=(is_parent_alive,), daemon=True).start()


def _watch(is_parent_alive: Callable[[], bool]) -> None:
    while is_parent_alive():
        time.sleep(SECONDS_BETWEEN_LOOKS)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_told_parent_alive() -> bool:
    """While a process begins, `multiprocessing` has not told it yet who its parent is: it may be gone by then."""
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()


def _after_fork() -> None:
    """A forked child has its parent's handlers."""
    if _this.advice is not None:
        _this.watched, _this.number, _this.commands = False, None, set()
        parent = os.getppid()
        _follow(lambda: os.getppid() == parent)


os.register_at_fork(after_in_child=_after_fork)
