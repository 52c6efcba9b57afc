"""One HTML page that needs nothing beside itself: images are inside it, and it loads nothing."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from jaxtyping import Bool

from nnunet_csm.errors import UserError
from nnunet_csm.files import write_text

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}


@dataclass(frozen=True)
class Table:
    """Text and numbers: floats get three decimals, NaN is a dash, columns of numbers stand to the right, `best` is bold."""

    cells: pd.DataFrame
    caption: str = ""
    best: Bool[np.ndarray, "row column"] | None = None

    @property
    def is_number(self) -> list[bool]:
        """Whether each column holds numbers."""
        return [pd.api.types.is_numeric_dtype(kind) for kind in self.cells.dtypes]


class Page:
    """Collect sections, then `save`. All text is escaped; an empty line in a text begins a paragraph."""

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self.lead = lead
        self._sections: list[dict[str, Any]] = []

    def section(
        self,
        title: str,
        text: str = "",
        tables: Sequence[Table] = (),
        images: Sequence[tuple[str | Path, str]] = (),
        facts: Sequence[tuple[str, object]] = (),
    ) -> None:
        """Add a section: text, then facts (name, value), tables and images (path, caption), which are read now.

        Raises UserError for an image that cannot be read or is of a kind that browsers do not show.
        """
        embedded = [{"data": _data_uri(Path(path)), "caption": caption} for path, caption in images]
        paragraphs = _paragraphs(text)
        self._sections.append({"title": title, "paragraphs": paragraphs, "tables": tables, "images": embedded, "facts": facts})

    def save(self, path: str | Path) -> None:
        """Write the page: a reader sees the old file or the whole new one. The folder is made when it is not there."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        environment.filters["cell"] = _cell_text
        template = environment.from_string(files("nnunet_csm.figures").joinpath("page.html").read_text(encoding="utf-8"))
        html = template.render(title=self.title, lead=_paragraphs(self.lead), sections=self._sections)
        write_text(path, html)


def _paragraphs(text: str) -> list[str]:
    return [paragraph.strip() for paragraph in text.split("\n\n") if paragraph.strip()]


def _cell_text(cell: object) -> str:
    if isinstance(cell, float):
        return "–" if math.isnan(cell) else f"{cell:.3f}"
    return str(cell)


def _data_uri(path: Path) -> str:
    media_type = MEDIA_TYPES.get(path.suffix.lower())
    if media_type is None:
        msg = f"{path}: browsers do not show {path.suffix!r} images, expected one of {', '.join(MEDIA_TYPES)}; convert it"
        raise UserError(msg)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: the image cannot be read ({error.strerror}); draw it before the page is written") from error
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
