"""A table as it is read: Markdown, LaTeX with booktabs, and for the page."""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Bool

from nnunet_csm.figures.page import Table

SHOWN, HIDDEN = "●", "○"

LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        # after a line's end they would be its options
        "[": "{[}",
        "*": "{*}",
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
        **{character: "\\" + character for character in "&%$#_{}"},
    }
)


@dataclass(frozen=True)
class TableLayout:
    """One table as it is read.

    Attributes:
        table: the study's table that it belongs to; empty for costs, which are of the whole study.
        name: of this part of it; both together are unique.
        cells: text; a block of rows, such as one share of labels, is ruled off from the next.
        num_text: leading columns that hold names, not numbers.
        best: cells that are drawn bold.
        blocks: first row of every block.
    """

    table: str
    name: str
    caption: str
    cells: pd.DataFrame
    num_text: int
    best: Bool[np.ndarray, "row column"]
    blocks: tuple[int, ...] = (0,)

    def brief(self, *details: str) -> "TableLayout":
        """Leave out the columns of `details` in which several rows say the same; the caption ends with what they say."""
        shared = np.array([name in details and len({*cells}) == 1 < len(cells) for name, cells in self.cells.items()])
        if not shared.any():
            return self
        told = "; ".join(f"{name}: {cells.iloc[0]}" for name, cells in self.cells.loc[:, shared].items())
        kept, num_text = self.cells.loc[:, ~shared], int((~shared[: self.num_text]).sum())
        return replace(self, caption=f"{self.caption}. {told}", cells=kept, num_text=num_text, best=self.best[:, ~shared])

    def to_markdown(self) -> str:
        """A pipe table with columns of equal width under its caption."""
        cells = self._marked("**{}**", lambda cell: cell.replace("|", r"\|"))
        sides = ["left" if column < self.num_text else "right" for column in range(cells.shape[1])]
        return f"**{self.caption}**\n\n{cells.to_markdown(index=False, disable_numparse=True, colalign=sides)}\n"

    def to_latex(self) -> str:
        """A `table` of booktabs; one too wide for an article is scaled down by adjustbox."""
        cells = self._marked(r"\textbf{{{}}}", latex)
        rules = list(self.blocks[1:])
        cells.iloc[rules, 0] = "\\midrule\n" + cells.iloc[rules, 0]
        sides = ["l" if column < self.num_text else "r" for column in range(cells.shape[1])]
        cells.columns = [_stacked(name, texts, side) for (name, texts), side in zip(self.cells.items(), sides, strict=True)]
        text = cells.style.hide(axis="index").to_latex(
            column_format="".join(sides),
            position_float="centering",
            hrules=True,
            label="tab:" + re.sub(r"[\W_]", "-", f"{self.table} {self.name}").strip("-").lower(),
            caption=latex(self.caption),
        )
        text = text.replace(r"\begin{tabular}", r"\begin{adjustbox}{max width=\linewidth}" + "\n" + r"\begin{tabular}")
        return text.replace(r"\end{tabular}", r"\end{tabular}" + "\n" + r"\end{adjustbox}")

    def to_page(self) -> Table:
        """Numbers stay on one line; words may wrap."""
        numbers = self.cells.iloc[:, self.num_text :]
        numbers = numbers.map(lambda cell: cell if cell[:1].isalpha() else cell.replace(" ", "\u00a0"))
        cells = pd.concat([self.cells.iloc[:, : self.num_text], numbers], axis=1)
        return Table(cells, self.caption, self.best)

    def _marked(self, mark: str, escape: Callable[[str], str]) -> pd.DataFrame:
        """Cells and headings escaped, the best of them marked."""
        cells = self.cells.map(escape)
        return pd.DataFrame(np.where(self.best, cells.map(mark.format), cells), columns=[*map(escape, cells.columns)])


def latex(text: str) -> str:
    """Text as LaTeX prints it."""
    return text.translate(LATEX)


def _stacked(name: str, cells: pd.Series, side: str) -> str:
    """A heading in lines no longer than the longest cell below it, or than its own longest word."""
    longest = max(map(len, (*name.split(), *cells)))
    lines = map(latex, textwrap.wrap(name, longest, break_on_hyphens=False))
    return latex(name) if len(name) <= longest else rf"\shortstack[{side}]{{" + r"\\".join(lines) + "}"
