"""Whatever happens to a file, the command that reads it says so in a line, or does without it: a hundred cases of a fixed draw.

`harness.py` runs as many as one likes.
"""

from pathlib import Path

import harness
import pytest
import workshop

CASES = harness.drawn(100)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("faults")]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("faults") / "base"
    workshop.build(root)
    return root


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_damaged_file_is_refused_or_named_or_does_no_harm(case: harness.Case, base: Path) -> None:
    outcome = harness.tried(case, base)
    assert not outcome.fault, f"{outcome.verdict}: {outcome.damage}\n{outcome.said}"


@pytest.mark.parametrize("command", workshop.COMMANDS, ids=lambda command: command.name)
def test_with_nothing_damaged_every_command_ends_well(command: workshop.Command, base: Path, tmp_path: Path) -> None:
    """Or a refusal would say nothing of the damage."""
    outcome = harness.undamaged(command, base, tmp_path)
    assert outcome.verdict == "accepted", outcome.said
