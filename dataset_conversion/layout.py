"""What readers ask of a folder: is the release there, which files are volumes, which names can be a case's."""

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from nnunet_csm.errors import UserError
from nnunet_csm.listing import file_problem, is_hidden
from nnunet_csm.raw.subjects import CaseError
from nnunet_csm.raw.volumes import READABLE_ENDINGS, read_header


def require_folder(release: Path) -> None:
    """Raises `UserError` unless the release is a folder that can be read."""
    if not release.is_dir():
        what = "is a file, not a folder; unpack it" if release.exists() else "does not exist"
        raise UserError(f"the release {release} {what}; give -i the unpacked folder")
    if not os.access(release, os.R_OK | os.X_OK):
        raise UserError(f"the release {release} may not be read by this user; change its permission (chmod -R u+rX)")


def other_layout(folder: Path, looked_for: str) -> UserError:
    """The error for a release of another shape: what was looked for and what is there."""
    return UserError(f"{folder} does not look like the release: {looked_for} not found; there is {listing(folder)}")


def listing(folder: Path, most: int = 6) -> str:
    """The first entries of a folder, in words."""
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not is_hidden(path))
    if not names:
        return "nothing in it"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def stem(path: Path) -> str | None:
    """The name without the ending of a volume; None when it is no volume's name."""
    ending = next((ending for ending in READABLE_ENDINGS if path.name.endswith(ending)), None)
    return path.name.removesuffix(ending) if ending else None


def volume_named(folder: Path, name: str) -> Path | None:
    """The volume `name` of a folder, whatever its ending, or the DICOM folder `name`; None when there is none."""
    candidates = [folder / f"{name}{ending}" for ending in READABLE_ENDINGS]
    return next((path for path in (*candidates, folder / name) if os.path.lexists(path)), None)


def existing(path: Path, said: str) -> Path:
    """The path of a file or folder that the release names, as `said`. Raises `CaseError`, with what a link to nothing is."""
    if os.path.exists(path):
        return path
    raise CaseError(
        (os.path.islink(path) and file_problem(path))
        or f"{said} does not exist (looked for {path}); correct the name, or copy the release again"
    )


def shape_of(path: Path) -> tuple[int, ...]:
    """(z, y, x), or (series, z, y, x) of a 4-D file, from the header. Raises `CaseError` when there is none."""
    return tuple(read_header(path).GetSize()[::-1])


def usable_name(name: str) -> bool:
    """Can this be a case's identifier, which becomes a file name?"""
    return re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) is not None


def dataset_name(dataset_id: int, name: str) -> str:
    """nnU-Net's name of the dataset. Raises `UserError`."""
    if not 1 <= dataset_id <= 999:
        raise UserError(f"-d {dataset_id} is no dataset ID; give a number from 1 to 999")
    if not usable_name(name):
        raise UserError(f"-name {name!r} cannot be part of a folder name; use letters, digits, '-' and '_'")
    return f"Dataset{dataset_id:03d}_{name}"


def require_cases(found: Sequence[object], release: Path, reasons: Iterable[str]) -> None:
    """Raises `UserError` when a reader found no case at all."""
    if not found:
        first = next(iter(reasons), None)
        msg = f"{release} holds no usable case" + (f"; the first was left out because {first}" if first else "")
        raise UserError(msg)
