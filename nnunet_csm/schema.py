"""Frozen dataclasses from JSON and back; whatever the file has that they have not is an error."""

import contextlib
import dataclasses
import json
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nnunet_csm.errors import UserError

Size = tuple[int, int, int]
T = TypeVar("T")


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Build a frozen dataclass from JSON data; unknown and missing keys, and values of the wrong type, are errors.

    A field with a default may be missing: it is newer than some of the files that are read.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is {data!r}, expected a JSON object")
    hints = get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    unknown, missing = sorted(set(data) - set(hints)), sorted(required - set(data))
    if unknown or missing:
        found = "; ".join(f"{what} {', '.join(keys)}" for what, keys in (("unknown", unknown), ("missing", missing)) if keys)
        raise UserError(f"{where}: {found}; expected exactly {', '.join(hints)}; correct it, or plan again")
    return cls(**{key: read_value(hint, data[key], f"{where}.{key}") for key, hint in hints.items() if key in data})


def read_value(hint: Any, value: Any, where: str) -> Any:
    """A value of a type as JSON has it; UserError when it is of another."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(hints) == len(value):
            return tuple(read_value(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    elif origin is dict and isinstance(value, Mapping):
        return {k: read_value(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif origin is Literal and value in args:
        return value
    elif origin in (Union, types.UnionType):
        options = [option for option in args if option is not type(None)]
        if value is None and len(options) < len(args):
            return None
        for option in options[:-1] if value is not None else ():
            with contextlib.suppress(UserError):
                return read_value(option, value, where)
        if value is not None:
            # the one whose error is told
            return read_value(options[-1], value, where)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif (hint is int and isinstance(value, int) and not isinstance(value, bool)) or (
        hint in (str, bool) and isinstance(value, hint)
    ):
        return value
    expected = " | ".join(map(repr, args)) if origin is Literal else str(hint) if origin else hint.__name__
    raise UserError(f"{where} is {value!r}, expected {expected}")


def to_dict(value: Any) -> Any:
    """A dataclass as it comes back from a JSON file, with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(value)))
