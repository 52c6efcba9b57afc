"""`CASE.pkl`, what nnU-Net writes beside a preprocessed case: looked at, without executing anything, before nnU-Net opens it."""

import pickle
from pathlib import Path
from typing import Any

from nnunet_csm.errors import UserError, reason

# what numbers, arrays and containers are made of; a pickle may name any function of Python's, and have it called
PLAIN = frozenset(
    {
        *(f"numpy{core}.multiarray.{name}" for core in (".core", "._core") for name in ("_reconstruct", "scalar")),
        *(f"numpy{core}.numeric._frombuffer" for core in (".core", "._core")),
        *(f"numpy.{name}" for name in ("ndarray", "dtype")),
        *(f"builtins.{name}" for name in ("slice", "set", "frozenset", "complex", "bytearray", "range")),
        "collections.OrderedDict",
        "_codecs.encode",
    }
)


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in PLAIN:
            raise UserError(f"names {module}.{name}, expected numbers, text, arrays and containers of them")
        return super().find_class(module, name)


REMEDY = "preprocess the dataset again, and trust no preprocessed folder that comes from elsewhere (docs/security.md)"


def read_properties(path: Path, remedy: str = REMEDY) -> dict[str, Any]:
    """What nnU-Net noted of a case; `remedy` says what to do where it cannot be read.

    Raises:
        UserError: a file of properties that is not whole, or holds anything but plain data.
    """
    try:
        with path.open("rb") as file:
            found = _PlainUnpickler(file).load()
    except UserError as error:
        raise UserError(f"{path}: {error}; {remedy}") from None
    except Exception as error:  # whatever bytes that are no pickle may lead to
        raise UserError(f"{path}: not readable as properties of a case ({reason(error)}); {remedy}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__}, expected the properties of a case; {remedy}")
    return found
