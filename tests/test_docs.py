"""What README and docs tell people to type exists: every command, with every flag that is shown with it."""

import argparse
import re
from pathlib import Path

import pytest

from nnunet_csm.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# as far as a comment, the end of a code span, or another command
TYPED = re.compile(r"(?<![\w./-])nnunet_csm ([a-z_]\w*)([^`#|;&\n]*)")


def commands() -> dict[str, set[str]]:
    """Every command with its flags."""
    parser = build_parser()
    (subcommands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {name: set(command._option_string_actions) for name, command in subcommands.choices.items()}


def in_code(text: str) -> str:
    """Only what stands in code blocks and spans, long commands on one line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    joined = "\n".join([*blocks, *(" ".join(span.split()) for span in spans)])
    return re.sub(r"\\\n\s*", " ", joined)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_that_are_shown_exist(page: Path) -> None:
    known, wrong = commands(), []
    for name, rest in TYPED.findall(in_code(page.read_text(encoding="utf-8"))):
        if name not in known:
            wrong.append(f"nnunet_csm {name}")
            continue
        flags = re.findall(r"(?:^|\s)(--?[A-Za-z_]\w*)", rest)
        wrong += [f"nnunet_csm {name} {flag}" for flag in flags if flag not in known[name]]
    assert not wrong


def test_it_would_notice() -> None:
    assert TYPED.findall(in_code("say `nnunet_csm gone -d 1 --lost`")) == [("gone", " -d 1 --lost")]
    assert "plan" in commands() and "-preset" in commands()["plan"]
