"""What README and docs tell people to type exists: every command, with every flag that is shown with it."""

import argparse
import re
import runpy
from pathlib import Path

import pytest

from nnunet_csm.cli import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# as far as a comment, the end of a code span, or another command
TYPED = re.compile(r"(?<![\w./-])nnunet_csm ([a-z_]\w*)([^`#|;&\n]*)")


def commands() -> dict[str, set[str]]:
    """Every command with its flags, those of its formats among them."""

    def flags(parser: argparse.ArgumentParser) -> set[str]:
        return set(parser._option_string_actions).union(*(flags(one) for one in below(parser).values()))

    def below(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        return {name: command for action in actions for name, command in action.choices.items()}

    return {name: flags(command) for name, command in below(build_parser()).items()}


def in_code(text: str) -> str:
    """Only what stands in code blocks and spans, long commands on one line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    joined = "\n".join([*blocks, *(" ".join(span.split()) for span in spans)])
    return re.sub(r"\\\n\s*", " ", joined)


def unknown(text: str) -> list[str]:
    """Commands and flags that do not exist."""
    known, wrong = commands(), []
    for name, rest in TYPED.findall(text):
        if name not in known:
            wrong.append(f"nnunet_csm {name}")
            continue
        flags = re.findall(r"(?:^|\s)(--?[A-Za-z_]\w*)", rest)
        wrong += [f"nnunet_csm {name} {flag}" for flag in flags if flag not in known[name]]
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_flags_that_are_shown_exist(page: Path) -> None:
    assert not unknown(in_code(page.read_text(encoding="utf-8")))


def test_commands_and_flags_in_messages_and_docstrings_exist() -> None:
    files = [path for folder in ("nnunet_csm", "dataset_conversion", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    quoted = [span for path in files for span in re.findall(r"`(nnunet_csm [^`\n]*)`", path.read_text(encoding="utf-8"))]
    assert len(quoted) > 20 and not unknown("\n".join(quoted))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    """As GitHub shows them; `mkdocs build --strict` looks at the site."""
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_it_would_notice() -> None:
    assert TYPED.findall(in_code("say `nnunet_csm gone -d 1 --lost`")) == [("gone", " -d 1 --lost")]
    assert "plan" in commands() and "-preset" in commands()["plan"]


def test_the_tables_of_preset_keys_are_what_the_code_reads() -> None:
    """Else run `python docs/preset_keys.py`."""
    script = runpy.run_path(str(ROOT / "docs" / "preset_keys.py"))
    start, written = script["START"], script["PAGE"].read_text(encoding="utf-8")
    assert written[written.index(start) + len(start) :].strip() == script["written"]().strip()
