"""JSON files that inherit from each other: those that come with the package by name, others by path."""

from collections.abc import Callable, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from nnunet_csm.errors import UserError
from nnunet_csm.schema import parse_json, shown

Json = dict[str, Any]


def shipped_names(folder: Traversable) -> list[str]:
    """Names of the files in a folder of the package."""
    return sorted(file.name.removesuffix(".json") for file in folder.iterdir() if file.name.endswith(".json"))


def read_inherited(
    kind: str,
    name: str,
    folder: Traversable,
    merge: Callable[[Json, Json], Json],
    others: Sequence[str] = (),
    children: tuple[str, ...] = (),
    root: bool = True,
) -> Json:
    """A file of `folder` by name, or any by path, merged over what its `inherits_from` names, and so on.

    Args:
        kind: what errors call it.
        name: of the file; paths end in .json, and those in `inherits_from` begin at the file's own folder.
        folder: of the files that come with the package.
        merge: puts a file over what it inherits.
        others: further names that the caller understands, for the message when there is no such file.
        children: that inherit from this file.
        root: whether the file that inherits from none is part of it.

    Raises:
        UserError: no such file, not JSON, no object, or files that inherit from each other.
    """
    path = Path(name) if name.endswith(".json") else None
    file = folder / f"{name}.json" if path is None and name in shipped_names(folder) else path
    if file is None or not file.is_file():
        child = f"{kind} {children[-1]}: inherits_from: " if children else ""
        offers = ", ".join([*([] if children else others), f"one of {', '.join(shipped_names(folder))}"])
        raise UserError(f"{child}no {kind} {name!r}; expected {offers}, or the path of a JSON file")
    data: Json = parse_json(file.read_bytes(), f"{kind} {name}", "correct it")
    parent = data.pop("inherits_from", None)
    if parent is None:
        return data if root else {}
    if not isinstance(parent, str):
        raise UserError(
            f"{kind} {name}: inherits_from is {shown(parent)}; expected the name of another {kind} or the path of its file"
        )
    if path is not None and parent.endswith(".json"):
        parent = str(path.parent / parent)
    if parent in (name, *children):
        raise UserError(f"{kind} {name}: inherits from {parent}, which inherits from it; leave inherits_from out in one of them")
    return merge(read_inherited(kind, parent, folder, merge, others, (*children, name), root), data)
