"""Writes the tables of docs/presets.md: every key of a preset, from the dataclasses that read it.

python docs/preset_keys.py
"""

import dataclasses
import inspect
import json
import math
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from nnunet_csm.planning.presets import FOLDER, Preset
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import PRETEXTS, pretext_class
from nnunet_csm.schema import Within, to_dict

PAGE = Path(__file__).with_name("presets.md")
START = "<!-- from here on written by docs/preset_keys.py -->\n"
# what follows from the dataset, and cannot stand in a preset
OF_DATASET = {"series", "channels", "token_size"}
FAR = 1000
B: dict[str, Any] = json.loads((FOLDER / "B.json").read_text(encoding="utf-8"))


def meanings(cls: type) -> dict[str, str]:
    """What the docstrings of a dataclass, and of those it derives from, say of its fields."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "")
        attributes = text.partition("Attributes:\n")[2]
        for names, said in re.findall(r"^    ([\w, ]+): (.*(?:\n {8}.*)*)", attributes, flags=re.MULTILINE):
            found |= {name.strip(): said for name in names.split(",")}
        for names, said in re.findall(r"((?:`\w+`, )*`\w+`): (.*?)(?=\.?\s+(?:`\w+`, )*`\w+`: |\Z)", text, flags=re.DOTALL):
            found |= dict.fromkeys(re.findall(r"`(\w+)`", names), said)
    return {name: " ".join(said.split()).rstrip(".") for name, said in found.items()}


def kind(hint: Any) -> str:
    """A type as a reader of JSON knows it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        rules = [told_of(rule) for rule in args[1:] if isinstance(rule, Within)]
        return kind(args[0]) + "".join(f", {rule}" for rule in rules if rule != "x")
    if origin is Literal:
        return " or ".join(f'"{one}"' for one in args)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(one) for one in args)
    if origin is tuple:
        return f"list of {kind(args[0])}" if args[-1] is Ellipsis else f"{len(args)} of: {kind(args[0])}"
    if dataclasses.is_dataclass(hint) or origin is dict:
        return "object"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null"}
    return names[hint]


def told_of(rule: Within) -> str:
    """Bounds, without those that only keep a mistyped number from asking for all memory."""
    return dataclasses.replace(rule, most=math.inf if rule.most >= FAR else rule.most).told("x")


def rows(cls: type, prefix: str, given: Any) -> Iterator[str]:
    """Lines of a table: the fields of a dataclass, those of its parts after them; `given` is what preset B says of it."""
    hints, said, given = get_type_hints(cls, include_extras=True), meanings(cls), given if isinstance(given, dict) else {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from rows(hint, f"{prefix}{field.name}.", given.get(field.name))
        elif field.name not in OF_DATASET or not prefix.startswith("network."):
            if field.name in ("network", "pretext") and not prefix:
                continue
            default = json.dumps(given[field.name] if field.name in given else default_of(field))
            yield f"| `{prefix}{field.name}` | {kind(hint)} | `{default}` | {said[field.name]} |".replace("\\|", "|")


def default_of(field: dataclasses.Field) -> Any:
    """As it would stand in JSON."""
    if field.default is not dataclasses.MISSING:
        return field.default
    return to_dict(field.default_factory()) if field.default_factory is not dataclasses.MISSING else None


def table(lines: Iterator[str]) -> str:
    return "\n".join(["| key | what it may be | in preset B | meaning |", "|---|---|---|---|", *lines])


def written() -> str:
    """The part of the page that is made."""
    parts = [
        "## A preset\n\n" + table(rows(Preset, "", B)),
        "## `network`\n\n" + table(rows(Architecture, "network.", B["network"])),
    ]
    told: dict[type, str] = {}
    for name in PRETEXTS:
        settings = pretext_class(name, "docs").Settings
        said = f"## `pretext`, with the name `{name}`\n\n"
        if settings in told:
            parts.append(f"{said}As `{told[settings]}`.")
        elif dataclasses.fields(settings):
            parts.append(said + table(rows(settings, "pretext.", B["pretext"] if name == "csm" else {})))
        else:
            parts.append(f"{said}No further keys: networks are trained from scratch.")
        told.setdefault(settings, name)
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(START) + len(START)] + "\n" + written(), encoding="utf-8")
