"""Where there is no terminal, a training says in lines how far it is: at once, and then now and then."""

import re
from itertools import pairwise

import pytest

from nnunet_csm.training import progress
from nnunet_csm.training.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its last place."""
    time = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def steps(clock: list[float], seconds: float, num_epochs: int = 2, num_iterations: int = 1000, shown: bool = True) -> None:
    told = Progress(num_epochs, num_iterations, 4, shown)
    for epoch in range(num_epochs):
        told.start_epoch(epoch)
        for _ in range(num_iterations):
            clock[0] += seconds
            told.step(0.5)
        told.end_epoch()
        assert told.crops_per_second == pytest.approx(4 / seconds)


@pytest.mark.parametrize("seconds", [0.5, 30.0])
def test_lines_come_at_once_and_then_at_growing_intervals(
    seconds: float, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    steps(clock, seconds)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 0 of 2,000")
    found = [re.fullmatch(r"step ([\d,]+) of 2,000: loss 0.5000, ([\d.]+) crops/s, [\d:]+ left", line) for line in lines[1:]]
    assert all(found)
    at = [int(one[1].replace(",", "")) * seconds for one in found if one is not None]
    assert at[0] == seconds
    pauses = [later - earlier for earlier, later in pairwise(at)]
    assert all(10 <= pause <= 600 + seconds for pause in pauses) and pauses == sorted(pauses)
    assert all(float(one[2]) == pytest.approx(4 / seconds, abs=0.05) for one in found if one is not None)


def test_other_ranks_and_terminals_get_no_lines(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps(clock, 1.0, shown=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    steps(clock, 1.0)
    assert not capsys.readouterr().out
