"""Images of preprocessed cases as fp16, decoded once and stored for all runs.

Every case is decoded once, to an uncompressed file of fp16 beside the preprocessed folder, which all folds, arms of a study and
resumed runs map into memory; the operating system keeps as much of these files there as it has room for.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import blosc2
import numpy as np
import torch
from jaxtyping import Bool, Float16
from torch import Tensor
from tqdm import tqdm

from nnunet_csm.data.crops import BLOCK, MIN_SPAN, Size, occupied_blocks
from nnunet_csm.data.draws import ahead
from nnunet_csm.errors import UserError
from nnunet_csm.files import in_turn, whole
from nnunet_csm.machine import num_cores

# what a stored file holds, see `_decode`
Stored: TypeAlias = dict[str, Any]
# where stored files go instead of nnUNet_preprocessed: to a faster disk, or one with more room
FOLDER_VARIABLE = "nnUNet_csm_images"
# bytes of a disk that are left to checkpoints and other programs
SPARE = 2**30
# of the stored files; another number when what is in them changes its meaning
FORMAT = 1
# threads that decompress files
NUM_READERS = 8


# blosc2's words for voxels that cannot be decoded
UNDECODED = "Error while getting the buffer"
AGAIN = "preprocess again with `nnunet_csm plan_and_preprocess -preprocess_only --overwrite`, with -d and the name of the plans"


@dataclass(frozen=True)
class CaseFile:
    """Where the images of a case lie.

    Attributes:
        name: unique among the cases of a run.
        path: its `.b2nd` file.
        num_channels: of the file, as the plans have it.
        channels: channel of every series of the run; None for one that the case does not have.
        weight: how often the case is drawn in training, beside others.
    """

    name: str
    path: Path
    num_channels: int
    channels: tuple[int | None, ...]
    weight: float = 1.0

    @property
    def stored(self) -> Path:
        """The file of fp16, of all channels, whichever of them a run has."""
        folder = self.path.parent
        dataset = Path(os.environ.get(FOLDER_VARIABLE) or folder.parent.parent) / folder.parent.name
        return dataset / f"{folder.name}_csm" / f"{self.path.stem}.pt"


@dataclass(frozen=True)
class Case:
    """The images of a case as the run sees them."""

    file: CaseFile
    shape: Size
    volumes: list[Float16[Tensor, "z y x"] | None]
    """Of every series; None for one that the case does not have, or that is all zero."""
    occupied: Bool[np.ndarray, "bz by bx"]
    """Blocks in which any series varies."""

    @property
    def series_present(self) -> list[bool]:
        return [volume is not None for volume in self.volumes]


@dataclass(frozen=True)
class Contents:
    """What was found in the files of some cases."""

    cases: list[Case]
    left_out: list[str]

    @property
    def num_bytes(self) -> int:
        return sum(volume.nbytes for case in self.cases for volume in case.volumes if volume is not None)


def read(files: Sequence[CaseFile]) -> Contents:
    """Map the stored files of the cases, after writing those that are missing or were made from other files, in threads.

    One process writes to a folder at a time; others wait, and find what it wrote.

    Raises:
        UserError: as `open_bank`.
    """
    missing = [file for file in files if not _is_stored(file)]
    size = sum(2 * math.prod(_open(file).shape) for file in missing)
    with ExitStack() as stack:
        for folder in sorted({file.stored.parent for file in missing}):
            _make_room(folder, size)
            stack.enter_context(in_turn(folder, "images are written"))
        written = stack.enter_context(closing(ahead(_store, missing, min(NUM_READERS, num_cores()), torch.device("cpu"))))
        for _ in tqdm(written, "storing images as fp16", len(missing), unit="case", disable=None, leave=False):
            pass
    # only here: what is kept of a case between its decoding and that of others would leave memory in pieces
    cases = [_case(file) for file in files]
    kept = [case for case in cases if any(case.series_present)]
    left_out = [case.file.name for case in cases if not any(case.series_present)]
    if not kept:
        raise UserError(f"{files[0].path.parent}: {', '.join(left_out[:5])} hold nothing but zeros in the planned series")
    return Contents(kept, left_out)


def _make_room(folder: Path, size: int) -> None:
    """Make a folder for stored files of so many bytes."""
    remedy = f"set {FOLDER_VARIABLE} to a folder with more room (one in /dev/shm is in memory)"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder}: images cannot be stored there as fp16 ({error.strerror}); {remedy}") from None
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise UserError(f"{folder}: {gib(size)} of images are to be stored as fp16, and {gib(free)} are left; {remedy}")


def _store(file: CaseFile) -> None:
    # another process may have done it in the meantime
    if not _is_stored(file):
        with whole(file.stored) as temporary, temporary.open("wb") as out:
            torch.save(_decode(file), out)
            # or a power failure could leave a file of the right name and length without its voxels
            out.flush()
            os.fsync(out.fileno())
    # for its errors, before hours may have passed
    _case(file)


def _case(file: CaseFile) -> Case:
    stored = _mapped(file)
    _check_channels(file, len(stored["volumes"]))
    channels = [channel for channel in file.channels if channel is not None]
    if set(channels) & set(stored["not_finite"]):
        raise UserError(
            f"{file.path}: holds NaN or infinite voxels; write 0 or what belongs there into the raw images "
            f"(`nnunet_csm fingerprint` names them) and preprocess again"
        )
    volumes = [None if channel is None else stored["volumes"][channel] for channel in file.channels]
    return Case(file, stored["shape"], volumes, stored["occupied"][channels].any(0).numpy())


def _mapped(file: CaseFile) -> Stored:
    return torch.load(file.stored, mmap=True, weights_only=True)


def _is_stored(file: CaseFile) -> bool:
    """Whether there is a whole stored file, made from the present one by the present code."""
    try:
        # a pipe would be waited for
        return file.stored.is_file() and bool(_mapped(file)["stamp"] == _stamp(file.path))
    except (OSError, RuntimeError):
        return False


def _stamp(path: Path) -> list[float]:
    """What a stored file was made from, and how."""
    found = path.stat()
    return [FORMAT, BLOCK, MIN_SPAN, found.st_size, found.st_mtime_ns]


def _decode(file: CaseFile) -> Stored:
    # taken before reading: what is written to the file in the meantime is noticed by the next run
    stamp, opened = _stamp(file.path), _open(file)
    volumes, occupied, not_finite = [], [], []
    for channel in range(len(opened)):
        with damage_named(file.path.parent):
            array = opened[channel]
        lowest, highest = (float(value) for value in torch.from_numpy(array).aminmax())
        # either is NaN when a voxel is
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            not_finite.append(channel)
            array = np.zeros_like(array)
        volumes.append(to_half(torch.from_numpy(array)) if array.any() else None)
        occupied.append(torch.from_numpy(occupied_blocks(array)))
    return {
        "stamp": stamp,
        "shape": opened.shape[1:],
        "volumes": volumes,
        "occupied": torch.stack(occupied),
        "not_finite": not_finite,
    }


def to_half(volume: Tensor) -> Tensor:
    """Round to fp16; values beyond fp16 are clamped to it."""
    largest = torch.finfo(torch.float16).max
    return volume.clamp(-largest, largest).half()


def _open(file: CaseFile) -> blosc2.NDArray:
    """Opened when needed: hundreds of files held open would exceed the usual limit."""
    if not file.path.is_file():
        remedy = "run `nnunet_csm plan_and_preprocess -preprocess_only` with the name of the plans, or check splits_final.json"
        raise UserError(f"{file.path}: not preprocessed; {remedy}")
    opened = open_volumes(file.path)
    _check_channels(file, len(opened))
    return opened


def _check_channels(file: CaseFile, number: int) -> None:
    if number != file.num_channels:
        raise UserError(f"{file.path}: {number} series, expected {file.num_channels} as in the plans; plan and preprocess again")


def open_volumes(path: Path) -> blosc2.NDArray:
    """A file of nnU-Net's preprocessed data, of which only what is asked for is read.

    Raises:
        UserError: not such a file, or not the whole of one.
    """
    try:
        opened = blosc2.open(urlpath=str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
        if not isinstance(opened, blosc2.NDArray):
            # blosc2 knows files that hold an expression, a function or a link in place of voxels
            raise UserError(f"{path}: holds a {type(opened).__name__} and no voxels; preprocess again")
        return opened
    except UserError:
        raise
    except (RuntimeError, ValueError, OSError):
        # blosc2 says of any such file that it could not open it
        raise UserError(f"{path}: not a whole file of preprocessed data, it was cut off or changed; {AGAIN}") from None


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Say which preprocessed file of a folder cannot be decoded, where that ends the block: blosc2 and nnU-Net do not."""
    try:
        yield
    except RuntimeError as error:
        if UNDECODED not in str(error):
            raise
        for path in sorted(folder.glob("*.b2nd")):
            try:
                np.asarray(open_volumes(path)[:])
            except RuntimeError:
                raise UserError(f"{path}: cannot be decoded, it was changed or its disk is damaged; {AGAIN}") from None
        raise


def gib(num_bytes: int) -> str:
    """A size for a line of text."""
    return f"{num_bytes / 2**30:.1f} GiB"
