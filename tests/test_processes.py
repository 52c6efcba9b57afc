"""A command that is told to end says so in a line, leaves nothing half-written, and takes its processes with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# two workers that never end, in a folder that is not whole; what all of them hold open is the pipe to this test
COMMAND = """
import sys, time
from functools import partial
from pathlib import Path
from nnunet_csm import processes
from nnunet_csm.files import whole_folder
from nnunet_csm.machine import in_processes

def work(number, folder):
    (folder / str(number)).touch()
    time.sleep(600)

if __name__ == "__main__":
    with processes.stoppable("go on so"), whole_folder(Path(sys.argv[1]), overwrite=False) as folder:
        for _ in in_processes(partial(work, folder=folder), [1, 2], 2):
            pass
"""
# a library that does not answer
HANGING = """
import sys, threading, time
from pathlib import Path
from nnunet_csm import processes
processes.GRACE_SECONDS = 0.5
with processes.stoppable("go on so"):
    Path(sys.argv[1]).touch()
    try:
        time.sleep(600)
    finally:
        time.sleep(600)
"""
# as a study runs its steps: in a thread, each a command
STARTING = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
from nnunet_csm import processes
with processes.stoppable("go on so"), ThreadPoolExecutor(1) as threads:
    print("exit code", threads.submit(processes.run_command, ["-c", sys.argv[2], sys.argv[1]]).result())
"""
STARTED = """
import sys, time
from pathlib import Path
from nnunet_csm import processes
with processes.stoppable("told by its parent"):
    Path(sys.argv[1]).touch()
    time.sleep(600)
"""


def started(folder: Path, script: str, begun: str, *more: str) -> subprocess.Popen[str]:
    """A command in a session of its own, once the files of that pattern are there."""
    (folder / "command.py").write_text(script)
    arguments = [sys.executable, str(folder / "command.py"), str(folder / "out"), *more]
    # a shell ignores Ctrl-C for what it starts in the background, and `nohup` a hang-up: these tests perhaps
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    command = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=folder
    )
    for number, handler in before.items():
        signal.signal(number, handler)
    for _ in range(600):
        if list(folder.glob(begun)):
            return command
        assert command.poll() is None, command.communicate()
        time.sleep(0.1)
    raise TimeoutError(begun)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_and_its_workers_with_a_line(tmp_path: Path, number: signal.Signals) -> None:
    command = started(tmp_path, COMMAND, ".out.partial/out/2")
    command.send_signal(number)
    said, _ = command.communicate(timeout=20)  # until nobody holds the pipe
    assert said == f"Stopped by {number.name}; go on so\n" and command.returncode == 128 + number
    assert [file.name for file in tmp_path.iterdir()] == ["command.py"]


def test_ctrl_c_reaches_all_processes_of_a_terminal_and_is_answered_once(tmp_path: Path) -> None:
    command = started(tmp_path, COMMAND, ".out.partial/out/2")
    os.killpg(command.pid, signal.SIGINT)
    said, _ = command.communicate(timeout=20)
    assert said == "Stopped by SIGINT; go on so\n" and command.returncode == 130


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    command = started(tmp_path, COMMAND, ".out.partial/out/2")
    command.kill()
    said, _ = command.communicate(timeout=20)  # until nobody holds the pipe; Python may tell of semaphores left behind
    assert "Traceback" not in said and command.returncode == -signal.SIGKILL


def test_what_does_not_answer_is_ended_after_a_while(tmp_path: Path) -> None:
    command = started(tmp_path, HANGING, "out")
    command.terminate()
    command.terminate()  # a second signal changes nothing
    said, _ = command.communicate(timeout=20)
    assert said == "Stopped by SIGTERM; go on so\n" and command.returncode == 143


def test_commands_that_a_command_started_are_told(tmp_path: Path) -> None:
    command = started(tmp_path, STARTING, "out", STARTED)
    command.terminate()
    said, _ = command.communicate(timeout=20)
    assert said == "Stopped by SIGTERM; told by its parent\nStopped by SIGTERM; go on so\n" and command.returncode == 143


def test_an_ignored_signal_stays_ignored_and_handlers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_csm.processes import stoppable

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable("outer"), stoppable("inner"):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
