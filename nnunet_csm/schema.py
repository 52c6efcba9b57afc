"""JSON: text to data, data to frozen dataclasses and back; whatever the file has that they have not is an error."""

import contextlib
import dataclasses
import json
import math
import re
import reprlib
import types
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nnunet_csm.errors import UserError

T = TypeVar("T")
# nothing that anybody writes comes near; deeper data overflows the stack of whoever walks through it
MOST_NESTED = 64
# how a text begins that is not plain UTF-8
MARKS = {b"\xef\xbb\xbf": "a byte order mark", b"\xff\xfe": "the mark of UTF-16", b"\xfe\xff": "the mark of UTF-16"}
# in a JSON text: no character at all, or half of one
NO_CHARACTER = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
# bytes of a file name, on the file systems that are
LONGEST_NAME = 255


# --- what a value may be -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Within:
    """Bounds of a number in a dataclass, as `Annotated[float, Within(0, below=1)]`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allows(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def told(self, name: str) -> str:
        low = f"{self.above:g} < " if self.above > -math.inf else f"{self.least:g} <= " if self.least > -math.inf else ""
        high = f" < {self.below:g}" if self.below < math.inf else f" <= {self.most:g}" if self.most < math.inf else ""
        return f"{low}{name}{high}"


@dataclasses.dataclass(frozen=True)
class OneName:
    """A text that names a file or folder within another and can be no path out of it; `ending` is that of the file's name."""

    ending: str = ""

    def allows(self, value: str) -> bool:
        plain = value.isprintable() and not set(value) & set("/\\") and len(value.encode()) <= LONGEST_NAME
        return plain and value.strip() not in ("", ".", "..", self.ending) and value.endswith(self.ending)

    def told(self, name: str) -> str:
        return f"a name{f' that ends in {self.ending}' if self.ending else ''}, which is no path: without / and \\"


Count = Annotated[int, Within(1, 10**9)]
Index = Annotated[int, Within(0, 10**9)]
Seed = Annotated[int, Within(0, 2**63 - 1)]
Positive = Annotated[float, Within(above=0)]
NotNegative = Annotated[float, Within(0)]
Share = Annotated[float, Within(0, 1)]
ShareBelowOne = Annotated[float, Within(0, below=1)]
ShareAboveZero = Annotated[float, Within(above=0, most=1)]
Name = Annotated[str, OneName()]
JsonName = Annotated[str, OneName(".json")]
# of a network: what a mistyped number would ask for is an allocation that fails
Width = Annotated[int, Within(1, 2**16)]
Depth = Annotated[int, Within(1, 1000)]
# along (z, y, x), in voxels or tokens
Edge = Annotated[int, Within(1, 10**5)]
Size = tuple[Edge, Edge, Edge]


def shown(value: Any) -> str:
    """A value as an error shows it: not all of a long one."""
    return reprlib.repr(value)


# --- text to data ------------------------------------------------------------------------------------------------------------


def parse_json(content: bytes, where: str, remedy: str, kind: type = dict) -> Any:
    """Data of a JSON text.

    Args:
        content: of the file.
        where: what errors name.
        remedy: what they end with.
        kind: of the whole, `dict` or `list`.

    Raises:
        UserError: not UTF-8, not JSON, a key twice in one object, brackets within brackets without end, a string with what is no
            character, or a whole of another kind.
    """
    for mark, named in MARKS.items():
        if content.startswith(mark):
            raise UserError(f"{where}: begins with {named}, expected plain UTF-8; save it as UTF-8 without a byte order mark")
    try:
        text = content.decode("utf-8")
        data = json.loads(text, object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error}); {remedy}") from None
    except RecursionError:
        deep = True
    else:
        deep = _is_deep(data)
    if deep:
        raise UserError(f"{where}: brackets within brackets, expected at most {MOST_NESTED} levels of them; {remedy}")
    if not isinstance(data, kind):
        expected = "object" if kind is dict else "list"
        raise UserError(f"{where}: holds {shown(data)}, expected a JSON {expected}; is it the right file? {remedy}")
    if NO_CHARACTER.search(text) and not all(_is_text(one) for one in _strings(data)):
        raise UserError(f"{where}: a string holds \\u0000, or half of a character; correct it")
    return data


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a key that stands there twice, Python would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {shown(next(key for key in keys if keys.count(key) > 1))} twice in one object")
    return found


def _is_deep(data: Any) -> bool:
    level = [data]
    for _ in range(MOST_NESTED):
        within = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [one for several in within for one in several]
    return any(isinstance(one, dict | list) for one in level)


def _strings(data: Any) -> Iterator[str]:
    """All strings of data that is not deep, keys as well."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, dict | list):
        for one in [*data, *(data.values() if isinstance(data, dict) else ())]:
            yield from _strings(one)


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= character <= "\udfff" for character in value)


# --- data to dataclasses and back --------------------------------------------------------------------------------------------


def from_dict(cls: type[T], data: Any, where: str) -> T:
    """Build a frozen dataclass from JSON data; unknown and missing keys, and values that cannot be, are errors.

    A field with a default may be missing: it is newer than some of the files that are read.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where} is {shown(data)}, expected a JSON object")
    hints = get_type_hints(cls, include_extras=True)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    unknown, missing = sorted(set(data) - set(hints)), sorted(required - set(data))
    if unknown or missing:
        found = "; ".join(f"{what} {', '.join(keys)}" for what, keys in (("unknown", unknown), ("missing", missing)) if keys)
        raise UserError(f"{where}: {found}; expected exactly {', '.join(hints)}; correct it, or plan again")
    return cls(**{key: read_value(hint, data[key], f"{where}.{key}") for key, hint in hints.items() if key in data})


def read_value(hint: Any, value: Any, where: str) -> Any:
    """A value of a type as JSON has it; UserError when it is of another, not finite, or not what its annotation allows."""
    if hint is Any:
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where} is {value}, expected no NaN and no infinity; correct it")
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = read_value(args[0], value, where)
        for rule in args[1:]:
            if not rule.allows(found):
                raise UserError(f"{where} is {shown(value)}, expected {rule.told(re.split('[. ]', where)[-1])}; correct it")
        return found
    if origin is tuple and isinstance(value, list | tuple):
        hints = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(hints) == len(value):
            return tuple(read_value(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True)))
    elif origin is dict and isinstance(value, Mapping):
        return {read_value(args[0], k, f"{where}: the key"): read_value(args[1], v, f"{where}.{k}") for k, v in value.items()}
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
        with contextlib.suppress(OverflowError):
            if math.isfinite(value):
                return float(value)
        raise UserError(f"{where} is {shown(value)}, expected a finite number; correct it")
    elif (hint is int and isinstance(value, int) and not isinstance(value, bool)) or (
        hint in (str, bool) and isinstance(value, hint)
    ):
        return value
    expected = " | ".join(map(repr, args)) if origin is Literal else _named(hint)
    raise UserError(f"{where} is {shown(value)}, expected {expected}")


def _named(hint: Any) -> str:
    """A type as errors name it, without what its annotations allow."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _named(args[0])
    if origin in (Union, types.UnionType):
        return " | ".join(_named(one) for one in args)
    if origin is dict:
        return "a JSON object"
    if origin is tuple:
        return f"a list of {' and '.join(dict.fromkeys(_named(one) for one in args if one is not Ellipsis))}" + (
            "" if Ellipsis in args else f", {len(args)} of them"
        )
    return "null" if hint is type(None) else str(hint) if origin else hint.__name__


def to_dict(value: Any) -> Any:
    """A dataclass as it comes back from a JSON file, with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def check_width(width: int, num_heads: int, where: str) -> None:
    """Raise UserError when attention cannot have this width and as many heads."""
    if num_heads < 1 or width % num_heads or width < 6:
        raise UserError(f"{where}: width {width} must be a multiple of num_heads {num_heads} and at least 6")
