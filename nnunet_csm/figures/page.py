"""One HTML page that needs nothing beside itself: images are inside it, and it loads nothing."""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from jaxtyping import Bool

from nnunet_csm.errors import UserError
from nnunet_csm.files import write_text

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".gif": "image/gif", ".webp": "image/webp"}

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: #fdfdfc; color: #1f2328;
       font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 .75rem; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 0 0 .75rem; font-size: 1.25rem; line-height: 1.3; }
p { margin: 0 0 1rem; max-width: 44rem; overflow-wrap: break-word; }
.lead { color: #4b535d; font-size: 1.08rem; }
section { margin-top: 2.5rem; padding-top: 1.5rem; border-top: 1px solid #dfe2e6; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(12rem, 100%), 1fr)); gap: .75rem; margin: 0 0 1.25rem; }
dl div { padding: .6rem .8rem; background: #f3f4f2; border-radius: 6px; overflow-wrap: anywhere; }
dt { color: #59616b; font-size: .84rem; }
dd { margin: 0; font-weight: 600; }
.scroll { overflow-x: auto; margin: 0 0 1.25rem; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .4rem; color: #4b535d; text-align: left; }
th, td { padding: .35rem .9rem .35rem 0; border-bottom: 1px solid #e6e8eb; text-align: left; vertical-align: top; }
th { font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
.best { font-weight: 650; }
figure { margin: 0 0 1.5rem; }
img { display: block; max-width: 100%; height: auto; }
figcaption { margin-top: .4rem; color: #4b535d; font-size: .92rem; max-width: 44rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for paragraph in lead %}<p class="lead">{{ paragraph }}</p>
{% endfor %}
{%- for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}<p>{{ paragraph }}</p>
{% endfor %}
{%- if section.facts %}<dl>
{% for name, value in section.facts %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
{% endfor %}</dl>
{% endif %}
{%- for table in section.tables %}<div class="scroll"><table>
{% if table.caption %}<caption>{{ table.caption }}</caption>
{% endif %}<thead><tr>
{%- for name in table.cells %}<th{% if table.is_number[loop.index0] %} class="number"{% endif %}>{{ name }}</th>{% endfor -%}
</tr></thead>
<tbody>
{% for row in table.cells.itertuples(index=False) %}{% set place = loop.index0 %}<tr>
{%- for cell in row %}<td{% if table.is_number[loop.index0] %} class="number"{% endif %}
{%- if table.best is not none and table.best[place, loop.index0] %} class="best"{% endif %}>{{ cell|cell }}</td>{% endfor -%}
</tr>
{% endfor %}</tbody>
</table></div>
{% endfor %}
{%- for image in section.images %}<figure><img src="{{ image.data }}" alt="{{ image.caption }}">
{%- if image.caption %}<figcaption>{{ image.caption }}</figcaption>{% endif %}</figure>
{% endfor %}</section>
{% endfor %}
</body>
</html>
"""


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
        html = environment.from_string(TEMPLATE).render(title=self.title, lead=_paragraphs(self.lead), sections=self._sections)
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
        msg = f"{path}: the image cannot be read ({error.strerror}); draw it before the page is written"
        raise UserError(msg) from error
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
