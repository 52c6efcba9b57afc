"""What happens to files: ways of being damaged, each by a generator of random numbers, so that a draw can be repeated."""

import gzip
import io
import json
import math
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Damage:
    """One way of being damaged.

    `apply` changes the file and says how. What is `wrong` must not be taken without a word; anything else may be, and must only
    not end in a traceback.
    """

    name: str
    wrong: bool
    apply: Callable[[Path, random.Random], str]


Bytes = Callable[[bytes, random.Random], bytes]


def _of_bytes(name: str, wrong: bool, change: Bytes) -> Damage:
    def apply(path: Path, rng: random.Random) -> str:
        path.write_bytes(change(path.read_bytes(), rng))
        return name

    return Damage(name, wrong, apply)


def _replaced(name: str, wrong: bool, put: Callable[[Path], None]) -> Damage:
    def apply(path: Path, rng: random.Random) -> str:
        path.unlink()
        put(path)
        return name

    return Damage(name, wrong, apply)


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"

ANY_FILE = (
    _of_bytes("empty", True, lambda data, rng: b""),
    _of_bytes("cut off", True, lambda data, rng: data[: int(len(data) * rng.uniform(0.05, 0.95))]),
    _of_bytes("random bytes", True, lambda data, rng: rng.randbytes(max(64, len(data) // 2))),
    _of_bytes("beginning overwritten by zeros", True, lambda data, rng: bytes(min(100, len(data))) + data[100:]),
    _of_bytes("pointer of Git LFS", True, lambda data, rng: LFS_POINTER),
    _of_bytes("a web page", True, lambda data, rng: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n"),
    _of_bytes("one bit", False, _flip),
    _replaced("a folder", True, Path.mkdir),
    _replaced("a link to nowhere", True, lambda path: path.symlink_to(path.with_name("nowhere"))),
    _replaced("a link to itself", True, lambda path: path.symlink_to(path.name)),
    _replaced("a pipe", True, os.mkfifo),
)


# ---- JSON

Leaf = tuple[tuple[Any, ...], Any]


def _leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[Leaf]:
    """Every value with the keys that lead to it, tables and lists included."""
    if path:
        yield path, data
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from _leaves(value, (*path, key))


def _of_leaf(name: str, wrong: bool, change: Callable[[Any, random.Random], Any]) -> Damage:
    """A value somewhere replaced. `change` gives what is there instead; `...` takes key and value away."""

    def apply(path: Path, rng: random.Random) -> str:
        data = json.loads(path.read_text("utf-8"))
        keys, value = rng.choice(list(_leaves(data)))
        new = change(value, rng)
        holder = data
        for key in keys[:-1]:
            holder = holder[key]
        if new is ...:
            del holder[keys[-1]]
        else:
            holder[keys[-1]] = new
        path.write_text(json.dumps(data), "utf-8")
        return f"{name}: {'.'.join(map(str, keys))} {'gone' if new is ... else f'= {new!r}'}, was {str(value)[:60]!r}"

    return Damage(name, wrong, apply)


def _other_type(value: Any, rng: random.Random) -> Any:
    return 7 if isinstance(value, str) else rng.choice(["words", {"words": "words"}])


VALUES: tuple[Any, ...] = (
    None,
    "",
    -1,
    0,
    1e308,
    math.nan,
    math.inf,
    True,
    [],
    {},
    "../../elsewhere",
    10**30,
    -0.5,
    "é\u200b",
    [[[]]],
    3,
)


def _with_duplicate(data: bytes, rng: random.Random) -> bytes:
    found = json.loads(data)
    key = next(iter(found)) if isinstance(found, dict) else None
    return data if key is None else b"{" + json.dumps({key: "first"}).encode()[1:-1] + b"," + data.lstrip()[1:]


JSON = (
    *ANY_FILE,
    _of_leaf("another value", False, lambda value, rng: rng.choice(VALUES)),
    _of_leaf("another type", False, _other_type),
    _of_leaf("a key less", False, lambda value, rng: ...),
    _of_bytes("trailing comma", True, lambda data, rng: data.rstrip()[:-1] + b",\n" + data.rstrip()[-1:]),
    _of_bytes("single quotes", True, lambda data, rng: data.replace(b'"', b"'")),
    _of_bytes("byte order mark", False, lambda data, rng: b"\xef\xbb\xbf" + data),
    _of_bytes("UTF-16", False, lambda data, rng: data.decode().encode("utf-16")),
    _of_bytes("Latin-1", True, lambda data, rng: data.replace(b'"', b'"\xe9', 1)),
    _of_bytes("deep", True, lambda data, rng: b"[" * 100_000 + b"]" * 100_000),
    _of_bytes("a list", True, lambda data, rng: b"[null]"),
    _of_bytes("a number", True, lambda data, rng: b"42"),
    _of_bytes("an empty object", True, lambda data, rng: b"{}"),
    _of_bytes("a key twice", False, _with_duplicate),
    _of_bytes("Windows lines", False, lambda data, rng: data.replace(b"\n", b"\r\n")),
)


def with_wrong_types(damages: tuple[Damage, ...]) -> tuple[Damage, ...]:
    """The same, for files all of whose keys are read: another type is then wrong."""
    return tuple(replace(d, wrong=d.wrong or d.name == "another type") for d in damages)


def without(damages: tuple[Damage, ...], *names: str) -> tuple[Damage, ...]:
    """All but those whose names begin so."""
    return tuple(d for d in damages if not d.name.startswith(names))


def made_anew(damages: tuple[Damage, ...]) -> tuple[Damage, ...]:
    """The same, for files that a command makes anew where they are of no use."""
    return tuple(replace(d, wrong=False) for d in damages)


# ---- NIfTI

# field -> where it lies, its format, values
FIELDS: dict[str, tuple[int, str, tuple[float, ...]]] = {
    "sizeof_hdr": (0, "<i", (0, 540, 1543569408)),
    "dim[0]": (40, "<h", (0, 2, 7, -1)),
    "dim[1]": (42, "<h", (0, -5, 32767)),
    "dim[3]": (46, "<h", (0, -5, 32767)),
    "datatype": (70, "<h", (0, 1, 32, 128, 1792, 999)),
    "bitpix": (72, "<h", (0, -8, 1)),
    "pixdim[1]": (80, "<f", (0.0, -1.0, math.nan, math.inf, 1e-30, 1e30)),
    "vox_offset": (108, "<f", (0.0, -352.0, math.inf, math.nan, 1e20, 1e6)),
    "magic": (344, "<f", (0.0,)),
    "sform x": (292, "<f", (math.nan, math.inf, 1e30)),
    "qform x": (268, "<f", (math.nan, math.inf, 1e30)),
}
# what may be anything where nothing is stored with it, or is mended by every reader
HARMLESS = {"bitpix", "sizeof_hdr", "pixdim[1]", "qform x", "sform x", "vox_offset", "datatype", "dim[0]", "magic"}


def _of_field(name: str) -> Damage:
    offset, form, values = FIELDS[name]

    def apply(path: Path, rng: random.Random) -> str:
        value = rng.choice(values)
        data = bytearray(gzip.decompress(path.read_bytes()))
        struct.pack_into(form, data, offset, value)
        path.write_bytes(gzip.compress(bytes(data), mtime=0))
        return f"{name} = {value}"

    return Damage(f"header: {name}", name not in HARMLESS, apply)


def _of_image(name: str, wrong: bool, change: Callable[[Any, random.Random], Any]) -> Damage:
    """Written again by nibabel, from (voxels, affine)."""

    def apply(path: Path, rng: random.Random) -> str:
        import nibabel

        image = nibabel.Nifti1Image.from_filename(path)
        voxels, affine = change((np.asanyarray(image.dataobj), image.affine), rng)
        path.unlink()
        nibabel.save(nibabel.Nifti1Image(voxels, affine), path)
        return name

    return Damage(name, wrong, apply)


def _holed(image: Any, rng: random.Random) -> Any:
    voxels = image[0].astype(np.float32)
    voxels.flat[rng.randrange(voxels.size)] = rng.choice([np.nan, np.inf])
    return voxels, image[1]


def _sheared(image: Any, rng: random.Random) -> Any:
    affine = image[1].copy()
    affine[0, 1] += 0.3 * affine[0, 0]
    return image[0], affine


def _far(image: Any, rng: random.Random) -> Any:
    affine = image[1].copy()
    affine[rng.randrange(3), 3] += 500
    return image[0], affine


def _mixed(image: Any, rng: random.Random) -> Any:
    return image[0].swapaxes(0, 2), image[1]


NIFTI = (
    *ANY_FILE,
    *map(_of_field, FIELDS),
    _of_image("a voxel that is no number", True, _holed),
    _of_image("axes that are not at right angles", True, _sheared),
    _of_image("elsewhere by its header", False, _far),
    _of_image("axes in another order", False, _mixed),
    _of_image("a slice less", False, lambda image, rng: (image[0][:, :, :-1], image[1])),
    _of_image("complex", True, lambda image, rng: (image[0].astype(np.complex64), image[1])),
    _of_image("constant", False, lambda image, rng: (np.full_like(image[0], 7), image[1])),
    _of_image("2-D", True, lambda image, rng: (image[0][:, :, 0], image[1])),
    _of_image("5-D", True, lambda image, rng: (np.stack([np.atleast_3d(image[0])] * 2, -1)[..., None, :], image[1])),
    _of_bytes("not compressed", False, lambda data, rng: gzip.decompress(data)),
    _of_bytes("compressed twice", True, lambda data, rng: gzip.compress(data, mtime=0)),
    _of_bytes("bytes behind it", False, lambda data, rng: data + b"more"),
    _of_bytes("voxels cut off", True, lambda data, rng: gzip.compress(gzip.decompress(data)[:-100], mtime=0)),
)
MASK = (
    *NIFTI,
    _of_image("a label of 99", False, lambda image, rng: (np.where(image[0] == 1, 99, image[0]).astype(np.uint8), image[1])),
    _of_image("labels of 0.5", False, lambda image, rng: (image[0].astype(np.float32) / 2, image[1])),
    _of_image("nothing", False, lambda image, rng: (np.zeros_like(image[0]), image[1])),
)


# ---- tables


def _of_lines(name: str, wrong: bool, change: Callable[[list[str], random.Random], list[str]]) -> Damage:
    def apply(path: Path, rng: random.Random) -> str:
        path.write_text("\n".join(change(path.read_text("utf-8").splitlines(), rng)) + "\n", "utf-8")
        return name

    return Damage(name, wrong, apply)


def _without_column(lines: list[str], rng: random.Random) -> list[str]:
    mark = "\t" if "\t" in lines[0] else ","
    column = rng.randrange(len(lines[0].split(mark)))
    return [mark.join(cell for i, cell in enumerate(line.split(mark)) if i != column) for line in lines]


def _of_cell(name: str, wrong: bool, text: str) -> Damage:
    def change(lines: list[str], rng: random.Random) -> list[str]:
        mark = "\t" if "\t" in lines[0] else ","
        row = rng.randrange(1, len(lines))
        cells = lines[row].split(mark)
        cells[rng.randrange(len(cells))] = text
        return [*lines[:row], mark.join(cells), *lines[row + 1 :]]

    return _of_lines(name, wrong, change)


TABLE = (
    *ANY_FILE,
    _of_lines("a column less", False, _without_column),
    _of_lines("a row twice", False, lambda lines, rng: [*lines, rng.choice(lines[1:])]),
    _of_lines("no row", True, lambda lines, rng: lines[:1]),
    _of_lines("no names of columns", True, lambda lines, rng: lines[1:]),
    _of_lines("semicolons", False, lambda lines, rng: [line.replace(",", ";").replace("\t", ";") for line in lines]),
    _of_lines("a quote that does not end", False, lambda lines, rng: [*lines[:-1], '"' + lines[-1]]),
    _of_lines("a cell more", True, lambda lines, rng: [*lines[:-1], lines[-1] + ",more,and more\tand more"]),
    _of_cell("NA", False, "NA"),
    _of_cell("an empty cell", False, ""),
    _of_cell("a zero byte", False, "\0"),
    _of_cell("a path upwards", False, "../../../etc/passwd"),
    _of_cell("a formula", False, "=1+1"),
    _of_bytes("UTF-16", False, lambda data, rng: data.decode().encode("utf-16")),
    _of_bytes("Latin-1", False, lambda data, rng: data[:-2] + b"\xe9" + data[-2:]),
    _of_bytes("byte order mark", False, lambda data, rng: b"\xef\xbb\xbf" + data),
    _of_bytes("Windows lines", False, lambda data, rng: data.replace(b"\n", b"\r\n")),
)


# ---- what trainings read and write


class _Mine:
    """Executes something where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


EXECUTED = "executed"


def _put_mine(path: Path, rng: random.Random) -> str:
    path.write_bytes(pickle.dumps(_Mine(path.parent / EXECUTED)))
    return "executes something"


PICKLE = (
    *ANY_FILE,
    Damage("executes something", True, _put_mine),
    _of_bytes("another object", True, lambda data, rng: pickle.dumps([1, 2, 3])),
)


def _inflating(data: bytes, rng: random.Random) -> bytes:
    """The same records, compressed, the largest followed by 100 MB of zeros."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        largest = max(old.namelist(), key=lambda name: old.getinfo(name).file_size)
        for name in old.namelist():
            new.writestr(name, old.read(name) + bytes(100_000_000 if name == largest else 0))
    return out.getvalue()


def _of_tensors(name: str, wrong: bool, change: Callable[[dict[str, Any], random.Random], object]) -> Damage:
    def apply(path: Path, rng: random.Random) -> str:
        import torch

        saved = torch.load(path, weights_only=True)
        said = change(saved, rng)
        torch.save(saved, path)
        return f"{name}: {said}"

    return Damage(name, wrong, apply)


def _weight(saved: dict[str, Any], rng: random.Random) -> tuple[dict[str, Any], str]:
    weights = saved["network_weights"]
    return weights, rng.choice(sorted(weights))


def _lost(saved: dict[str, Any], rng: random.Random) -> object:
    weights, name = _weight(saved, rng)
    del weights[name]
    return name


def _grown(saved: dict[str, Any], rng: random.Random) -> object:
    import torch

    weights, name = _weight(saved, rng)
    weights[name] = torch.zeros(*[n + 1 for n in weights[name].shape], 2)
    return name


def _no_number(saved: dict[str, Any], rng: random.Random) -> object:
    weights, name = _weight(saved, rng)
    weights[name] = weights[name] * math.nan
    return name


CHECKPOINT = (
    *ANY_FILE,
    _of_bytes("executes something", True, lambda data, rng: pickle.dumps(_Mine(Path("/tmp") / EXECUTED))),
    _of_bytes("inflates", True, _inflating),
    _of_tensors("a weight less", True, _lost),
    _of_tensors("a weight of another shape", True, _grown),
    _of_tensors("a weight that is no number", True, _no_number),
    _of_tensors("a key less", False, lambda saved, rng: saved.pop(rng.choice(sorted(saved)))),
    _of_tensors("another kind of value", False, lambda saved, rng: saved.update({rng.choice(sorted(saved)): [1, 2]})),
)


def remove(path: Path) -> None:
    """Whatever lies there."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
