"""A reader sees the old file or the whole new one, whatever happens in between."""

import errno
import fcntl
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_csm import errors
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.files import alone, in_turn, whole, write_text


def begin(path: Path, error: Exception) -> None:
    """Write half of a file, and fail."""
    with whole(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise error


def test_a_file_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_text(path, "old")
    with whole(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [file.name for file in tmp_path.iterdir()] == ["table.csv"]


def test_what_was_begun_is_removed_and_the_older_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_text(path, "old")
    with pytest.raises(KeyError):
        begin(path, KeyError())
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_named(tmp_path: Path, number: int) -> None:
    path = tmp_path / "checkpoint.pth"
    with pytest.raises(UserError, match=r"checkpoint\.pth: there is no room"):
        begin(path, OSError(number, "no more"))
    assert not list(tmp_path.iterdir())


def test_a_library_that_calls_a_full_disk_otherwise_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for torchs in ("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0", "basic_ios::clear: iostream error"):
        with pytest.raises(UserError, match="no room"), whole(tmp_path / "a"):
            raise RuntimeError(torchs)
    with pytest.raises(RuntimeError, match="words of its own"), whole(tmp_path / "a"):
        raise RuntimeError("words of its own")
    monkeypatch.setattr(errors, "ROOM", 2**63)
    with pytest.raises(UserError, match="no room"), whole(tmp_path / "a"):
        raise RuntimeError("words of its own")


def test_other_errors_are_their_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole(tmp_path / "no_such_folder" / "a") as temporary:
        temporary.write_text("a")


def test_a_disk_that_is_full_elsewhere_ends_a_command_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, exit_on_user_error():
        raise OSError(errno.ENOSPC, "No space left on device", "out/a.nii.gz")
    assert ended.value.code == 2 and "out/a.nii.gz: there is no room" in capsys.readouterr().err
    with pytest.raises(PermissionError), exit_on_user_error():
        raise PermissionError(errno.EACCES, "no")


def test_what_the_system_refuses_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for path, what in (
        (tmp_path / "file" / "a", "Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path, "Is"),
    ):
        with pytest.raises(SystemExit) as ended, exit_on_user_error():
            path.open("w")
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith(f"Error: {path}: {what}") and said.count("\n") == 1


def test_a_library_in_whose_words_no_disk_is_full_is_understood_by_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="no frame"), exit_on_user_error(tmp_path / "out"):
        raise RuntimeError("no frame")
    with pytest.raises(SystemExit), exit_on_user_error(tmp_path / "out"):
        raise RuntimeError("blosc2: No space left on device")
    monkeypatch.setattr(errors, "ROOM", 2**63)
    with pytest.raises(SystemExit), exit_on_user_error(tmp_path / "out" / "deeper"):
        raise RuntimeError("more\nno frame")
    assert f"a file in {tmp_path} (no frame): there is no room for it" in capsys.readouterr().err


def test_the_lock_is_one_lock_for_whoever_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One opens the file, the one before removes it on leaving: a lock of the removed file keeps nobody out."""
    lock, begun = before_locking(monkeypatch), tmp_path / "fold_0"
    first = alone(begun, "training")
    first.__enter__()
    lock.append(lambda: first.__exit__(None, None, None))
    with alone(begun, "training"), pytest.raises(UserError, match="another training"), alone(begun, "training"):
        pass


def before_locking(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What is done between the opening of a lock's file and its locking, once each."""
    waiting: list[Callable[[], object]] = []
    flock = fcntl.flock

    def late(file: object, how: int) -> None:
        while waiting:
            waiting.pop()()
        flock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", late)
    return waiting


def test_what_a_killed_process_left_is_removed_by_the_next_one(tmp_path: Path) -> None:
    for name in (".checkpoint_latest.pth.0123.tmp", "checkpoint_best.pth"):
        (tmp_path / name).touch()
    with alone(tmp_path, "training"):
        assert sorted(file.name for file in tmp_path.iterdir()) == [".running", "checkpoint_best.pth"]


def test_a_second_one_is_kept_out_until_the_first_has_ended(tmp_path: Path) -> None:
    with alone(tmp_path / "fold_0", "training"):
        with pytest.raises(UserError, match=r"fold_0: another training is running there"), alone(tmp_path / "fold_0", "training"):
            pass
        with alone(tmp_path / "fold_1", "training"):
            pass
    with alone(tmp_path / "fold_0", "training"):
        pass
    assert not list((tmp_path / "fold_0").iterdir())


def test_processes_wait_for_their_turn_and_say_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = []

    def second() -> None:
        with in_turn(tmp_path, "images are written"):
            order.append("second")

    other = threading.Thread(target=second)
    with in_turn(tmp_path, "images are written"):
        other.start()
        other.join(0.3)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    assert capsys.readouterr().out == f"{tmp_path}: images are written by another process; waiting for it\n"


def test_one_file_written_by_two_at_once_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with whole(path) as slow:
        slow.write_text("slow", encoding="utf-8")
        write_text(path, "quick")
        assert path.read_text() == "quick"
    assert path.read_text() == "slow" and [file.name for file in tmp_path.iterdir()] == ["table.csv"]
