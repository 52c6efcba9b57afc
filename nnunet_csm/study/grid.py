"""A table as it is read: Markdown, LaTeX with booktabs, and for the page."""

import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from nnunet_csm.figures.page import Table

SHOWN, HIDDEN = "●", "○"

LATEX = {
    "\\": r"\textbackslash{}",
    # after a line's end they would be its options
    "[": "{[}",
    "*": "{*}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "–": "--",
    SHOWN: r"$\bullet$",
    HIDDEN: r"$\circ$",
}

# characters that the space between two columns is as wide as
GAP = 2
# of a row, which fit between the margins of an article
MOST_CHARACTERS = 72


@dataclass(frozen=True)
class Grid:
    """One table as it is read.

    Attributes:
        table: the study's table that it belongs to; empty for costs, which are of the whole study.
        name: of this part of it; both together are unique.
        rows: text; a block of rows, such as one share of labels, is ruled off from the next.
        num_text: leading columns that hold names, not numbers.
        best: (row, column) of the best values, drawn bold.
        blocks: first row of every block.
        details: columns that a reader is told of in the caption where every row says the same.
    """

    table: str
    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    num_text: int
    best: frozenset[tuple[int, int]] = frozenset()
    blocks: tuple[int, ...] = (0,)
    details: frozenset[str] = frozenset()

    def brief(self) -> "Grid":
        """The table without the details that all of several rows share; its caption ends with them."""
        columns = range(len(self.header))
        shared = {c for c in columns if self.header[c] in self.details and len({row[c] for row in self.rows}) == 1}
        if not shared or len(self.rows) <= 1:
            return self
        kept = [c for c in columns if c not in shared]
        told = "; ".join(f"{self.header[c]}: {self.rows[0][c]}" for c in sorted(shared))
        return replace(
            self,
            caption=f"{self.caption}. {told}",
            header=tuple(self.header[c] for c in kept),
            rows=tuple(tuple(row[c] for c in kept) for row in self.rows),
            num_text=sum(c < self.num_text for c in kept),
            best=frozenset((row, kept.index(c)) for row, c in self.best if c in kept),
        )

    def to_markdown(self) -> str:
        """A pipe table with columns of equal width under its caption."""
        return self.brief()._to_markdown()

    def to_latex(self) -> str:
        """A `table` of booktabs; one too wide for an article is scaled down by graphicx."""
        return self.brief()._to_latex()

    def to_page(self) -> Table:
        brief = self.brief()
        rows = [[*row[: brief.num_text], *map(_unbroken, row[brief.num_text :])] for row in brief.rows]
        return Table(brief.header, rows, brief.caption, brief.best)

    def _to_markdown(self) -> str:
        rows = [self.header, *(self._marked(row, "**{}**".format) for row in range(len(self.rows)))]
        escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
        widths = [max(3, *(len(row[column]) for row in escaped)) for column in range(len(self.header))]
        ruler = [":" + "-" * (w - 1) if c < self.num_text else "-" * (w - 1) + ":" for c, w in enumerate(widths)]
        lines = [
            "| " + " | ".join(self._aligned(cell, column, widths[column]) for column, cell in enumerate(row)) + " |"
            for row in (escaped[0], ruler, *escaped[1:])
        ]
        return "\n".join([f"**{self.caption}**", "", *lines]) + "\n"

    def _aligned(self, cell: str, column: int, width: int) -> str:
        return cell.ljust(width) if column < self.num_text else cell.rjust(width)

    def _to_latex(self) -> str:
        columns = range(len(self.header))
        longest = [max(map(len, (*name.split(), *(row[c] for row in self.rows)))) for c, name in enumerate(self.header)]
        header = [_stacked(self.header[c], longest[c], c < self.num_text) for c in columns]
        lines = [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(self.caption)}}}",
            rf"\label{{tab:{_label(f'{self.table} {self.name}')}}}",
        ]
        is_wide = sum(longest) + GAP * len(longest) > MOST_CHARACTERS
        alignment = "l" * self.num_text + "r" * (len(self.header) - self.num_text)
        lines.append((r"\resizebox{\linewidth}{!}{" if is_wide else "") + rf"\begin{{tabular}}{{{alignment}}}")
        lines += [r"\toprule", _latex_row(header), r"\midrule"]
        for row in range(len(self.rows)):
            if row and row in self.blocks:
                lines.append(r"\midrule")
            lines.append(_latex_row(self._marked(row, r"\textbf{{{}}}".format, latex)))
        lines += [r"\bottomrule", r"\end{tabular}" + ("}" if is_wide else ""), r"\end{table}"]
        return "\n".join(lines) + "\n"

    def _marked(self, row: int, mark: Callable[[str], str], escape: Callable[[str], str] = str) -> tuple[str, ...]:
        cells = [escape(cell) for cell in self.rows[row]]
        return tuple(mark(cell) if (row, column) in self.best else cell for column, cell in enumerate(cells))


def latex(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(LATEX.get(character, character) for character in text)


def _stacked(name: str, width: int, is_text: bool) -> str:
    """A heading in lines no longer than `width`, or than its longest word."""
    lines = textwrap.wrap(name, max(width, *map(len, name.split())), break_on_hyphens=False)
    if len(lines) == 1:
        return latex(name)
    return rf"\shortstack[{'l' if is_text else 'r'}]{{" + r"\\".join(map(latex, lines)) + "}"


def _latex_row(cells: Iterator[str] | Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _unbroken(cell: str) -> str:
    """Numbers stay on one line; words may wrap."""
    return cell if cell[:1].isalpha() else cell.replace(" ", "\u00a0")


def _label(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name).strip("-").lower()
