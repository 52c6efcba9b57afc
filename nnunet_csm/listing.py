"""What lies in a folder: the one place that looks at names and kinds of files before a library does.

Libraries end the process on a name that is not UTF-8 (SimpleITK), wait for ever on a pipe, and take what systems leave behind for
images.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from nnunet_csm.errors import UserError

# the longest name, and the longest path, that usual systems take
MAX_BYTES, MAX_PATH_BYTES = 255, 4095
# how small files begin that stand in place of one that was not fetched, and how to fetch it
POINTERS = {
    b"version https://git-lfs": ("Git LFS", "git lfs pull"),
    b"/annex/objects/": ("git-annex (DataLad)", "git annex get, or datalad get"),
}
MOST_OF_A_POINTER = 1024  # they have lines, and few of them
ANNEX = "annex/objects"  # where git-annex keeps the files to which it leaves links
# maps in a folder of predictions, in a folder of their own, as whoever scores predictions takes all NIfTI beside them
UNCERTAINTY = "uncertainty"
# besides what is hidden: previews and settings of folders in Windows, and the folder of macOS' twins in archives
OF_SYSTEMS = ("thumbs.db", "desktop.ini", "__macosx")


def is_hidden(path: Path) -> bool:
    """Whether a file is of the system, not of the data: `.DS_Store`, `Thumbs.db`, the `._NAME` twins that macOS writes."""
    return path.name.startswith(".") or path.name.casefold() in OF_SYSTEMS


def files_in(folder: Path, ending: str) -> list[Path]:
    """Files of a folder whose names end in `ending`, sorted, without those that systems leave behind; [] without the folder.

    Raises:
        UserError: the folder cannot be listed, or one of them is nothing that can be read; see `file_problem`.
    """
    try:
        paths = sorted(path for path in folder.iterdir() if path.name.endswith(ending) and not is_hidden(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}); give a folder, one that may be read") from error
    for path in paths:
        if problem := file_problem(path):
            raise UserError(problem)
    return paths


def uncertainty_map(truncated: Path) -> Path:
    """Where the map of uncertainty of a segmentation lies, whose path is given without its ending."""
    return truncated.parent / UNCERTAINTY / f"{truncated.name}_uncertainty.nii.gz"


def hidden_in(folder: Path, ending: str) -> list[Path]:
    """Hidden files whose names end in `ending`, which nnU-Net takes for images; sorted."""
    return sorted(path for path in folder.iterdir() if path.name.endswith(ending) and path.name.startswith("."))


def file_problem(path: Path) -> str | None:
    """Why a path cannot be read as a file, in a sentence; None where it can. No pipe is opened, which would wait for ever."""
    if problem := name_problem(str(path)):
        return problem
    try:
        status = path.stat()
    except OSError as error:
        if path.is_symlink():
            return _about_link(path, error)
        return f"{path} cannot be read ({error.strerror}); correct the path, or change its permission"
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "a device, a pipe or a socket"
        return f"{path} is {what}, expected a file; give a file"
    if not os.access(path, os.R_OK):
        return f"{path} may not be read by this user; change its permission (chmod +r)"
    if pointer := pointer_of(path):
        return f"{path} is a pointer of {pointer[0]} in place of the file; fetch the file with {pointer[1]}"
    return None


def _about_link(path: Path, error: OSError) -> str:
    """What a link that cannot be followed is."""
    target = Path(os.path.realpath(path))  # as far as it leads, over other links
    if ANNEX in target.as_posix():
        what = f"{path} is a link of git-annex (DataLad) to content that was not fetched"
        return f"{what}; fetch it with git annex get, or datalad get, in its folder"
    return f"{path} is a link to nothing that can be read ({target}: {error.strerror}); is the copy complete?"


def pointer_of(path: Path) -> tuple[str, str] | None:
    """Of a regular file that only says which file is to be fetched: whose it is, and the command that fetches; None of others."""
    if path.stat().st_size > MOST_OF_A_POINTER:
        return None
    with path.open("rb") as stream:
        start = stream.read(max(map(len, POINTERS)))
    return next((told for beginning, told in POINTERS.items() if start.startswith(beginning)), None)


def all_below(folder: Path) -> Iterator[Path]:
    """Files and folders below a folder but hidden ones; links to folders are followed, and no folder is listed twice."""
    entered = set[str]()
    for here, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in entered:  # links may lead in circles
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(Path(name)))
        yield from (Path(here) / name for name in (*folders, *sorted(files)) if not is_hidden(Path(name)))


def argument_problem(text: str) -> str | None:
    """Why what may be the name of a file or folder cannot be used: it is odd, or opening it would wait for ever; else None."""
    if problem := name_problem(text):
        return problem
    try:
        mode = os.stat(text).st_mode
    except OSError:
        return None
    return (
        None if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else f"{text} is a device, a pipe or a socket; give a file or a folder"
    )


def name_problem(text: str) -> str | None:
    """Why the name of a file or folder, or a path, cannot be used; None where it can."""
    if "\0" in text:
        return f"{text!r} has a character 0 in its name, which no file has; correct it"
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError:
        readable = text.encode("utf-8", "backslashreplace").decode()
        return f"{readable} has a name that is not in UTF-8, which image libraries cannot open; rename it"
    if any(len(part) > MAX_BYTES for part in raw.split(b"/")) or len(raw) > MAX_PATH_BYTES:
        found = f"{text[:60]}... has a name of more than {MAX_BYTES} bytes, or {MAX_PATH_BYTES} with its folders"
        return f"{found}, which file systems do not take; give a shorter one"
    return None
