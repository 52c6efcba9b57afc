"""Images of preprocessed cases, without labels, kept where patches are cut from them fastest: on the GPU, or in mapped files.

Every case is decoded once, to an uncompressed file of fp16 beside the preprocessed folder, which all folds, arms of a study and
resumed runs map into memory; the operating system keeps as much of these files there as it has room for. Both banks give the same
patches for the same draws.
"""

import math
import os
import shutil
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import blosc2
import numpy as np
import torch
from jaxtyping import Bool, Float16, Int
from torch import Tensor
from tqdm import tqdm

from nnunet_csm.data.crops import BLOCK, MIN_SPAN, Crops, Occupancy, Size, cut, gather, occupied_blocks
from nnunet_csm.data.draws import ahead
from nnunet_csm.errors import UserError
from nnunet_csm.files import in_turn, whole
from nnunet_csm.machine import num_cores, why_not_compiled

Where: TypeAlias = Literal["gpu", "mapped"]
# what a stored file holds, see `_decode`
Stored: TypeAlias = dict[str, Any]
# where the user insists on having the images
VARIABLE = "nnUNet_csm_bank"
# where stored files go instead of nnUNet_preprocessed: to a faster disk, or one with more room
FOLDER_VARIABLE = "nnUNet_csm_images"

# the images are kept on the GPU where they take no more than this share of what is free; the rest is for the network
SHARE_OF_GPU = 0.5
# the same when the user insists
SHARE_WHEN_FORCED = 0.9
# bytes of a disk that are left to checkpoints and other programs
SPARE = 2**30
# of the stored files; another number when what is in them changes its meaning
FORMAT = 1
# threads that decompress files
NUM_READERS = 8
# of samples at a time, where gathering is not compiled and its indices lie in memory
SAMPLES_UNCOMPILED = 4


@dataclass(frozen=True)
class CaseFile:
    """Where the images of a case lie.

    Attributes:
        name: unique among the cases of a run.
        path: its `.b2nd` file.
        num_channels: of the file, as the plans have it.
        channels: channel of every series of the run; None for one that the case does not have.
    """

    name: str
    path: Path
    num_channels: int
    channels: tuple[int | None, ...]

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


class Bank(ABC):
    """The images of some preprocessed cases.

    Attributes:
        where: "gpu" or "mapped".
        reason: why the images lie there, with sizes, for the log.
        names: identifiers of the cases.
        shapes: (c, 3) voxels along (z, y, x).
        series_present: (c, s) False for a series that the case does not have, or whose stored volume is all zero.
        occupancy: where there is more than background.
        left_out: names of cases that hold nothing but zeros.
        device: where patches are cut. `shapes`, `series_present` and `occupancy` are there; draws are to be made there.
    """

    where: ClassVar[Where]

    def __init__(self, contents: Contents, device: torch.device, reason: str) -> None:
        cases = contents.cases
        self.device, self.reason, self.left_out = device, reason, contents.left_out
        self.files = [case.file for case in cases]
        self.names = [file.name for file in self.files]
        self.shapes = torch.tensor([case.shape for case in cases], device=device)
        self.series_present = torch.tensor([case.series_present for case in cases], device=device)
        self.occupancy = Occupancy.of(case.occupied for case in cases).to(device)

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def cut(self, cases: Int[Tensor, " b"], crops: Crops, patch_size: Size) -> Float16[Tensor, "b s z y x"]:
        """Cut one patch from each of the given cases; absent series are zero.

        Arguments and result are on `device`. Where that is the CPU, several threads may call it at once, and beside a GPU the
        result lies in pinned memory.
        """


class GpuBank(Bank):
    """All volumes in one tensor on the device; a batch is one gather."""

    where = "gpu"

    def __init__(self, contents: Contents, device: torch.device, reason: str = "") -> None:
        super().__init__(contents, device, reason)
        volumes = [volume for case in contents.cases for volume in case.volumes if volume is not None]
        self.flat = torch.empty(contents.num_bytes // 2, dtype=torch.float16, device=device)
        parts = self.flat.split([volume.numel() for volume in volumes])
        copied = tqdm(zip(parts, volumes, strict=True), "copying images", len(volumes), unit="volume", disable=None, leave=False)
        for part, volume in copied:
            part.copy_(volume.ravel())
        sizes = self.shapes.prod(1, keepdim=True) * self.series_present
        self.offset = sizes.ravel().cumsum(0).view_as(sizes) - sizes
        self.compiled = device.type == "cuda" and not why_not_compiled(device.type)
        self.gather = torch.compile(gather, fullgraph=True, dynamic=False) if self.compiled else gather

    @torch.no_grad()
    def cut(self, cases: Int[Tensor, " b"], crops: Crops, patch_size: Size) -> Float16[Tensor, "b s z y x"]:
        # without gradients whoever asks, or the gather would be compiled once more
        size = len(cases) if self.compiled else SAMPLES_UNCOMPILED
        parts = []
        for some, start, flip in zip(*(drawn.split(size) for drawn in (cases, crops.start, crops.flip)), strict=True):
            samples = self.offset[some], self.shapes[some], self.series_present[some]
            parts.append(self.gather(self.flat, *samples, Crops(start, flip), patch_size))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class MappedBank(Bank):
    """Patches are slices of mapped files, cut by the CPU. The volumes' own pages are not pinned: no GPU reads them."""

    where = "mapped"

    def __init__(self, contents: Contents, pinned: bool = False, reason: str = "") -> None:
        super().__init__(contents, torch.device("cpu"), reason)
        self.volumes = [[None if volume is None else volume.numpy() for volume in case.volumes] for case in contents.cases]
        self.pinned = pinned
        self.unused: list[np.ndarray] = []

    def cut(self, cases: Int[Tensor, " b"], crops: Crops, patch_size: Size) -> Float16[Tensor, "b s z y x"]:
        batch = self._empty((len(cases), self.series_present.shape[1], *patch_size))
        drawn = zip(batch, cases.tolist(), crops.start.tolist(), crops.flip.tolist(), strict=True)
        for patches, case, start, flip in drawn:
            for patch, volume in zip(patches, self.volumes[case], strict=True):
                if volume is None:
                    patch.zero_()
                else:
                    cut(volume, start, flip, patch)
        return batch

    def _empty(self, shape: tuple[int, ...]) -> Float16[Tensor, "b s z y x"]:
        """Memory of a batch that nobody holds any more, if there is one: fresh pages take longer than the copying."""
        if self.pinned:
            # torch does the same, and waits for copies to the GPU
            return torch.empty(shape, dtype=torch.float16, pin_memory=True)
        try:
            memory = self.unused.pop()
        except IndexError:
            memory = np.empty(0, np.float16)
        if memory.size != math.prod(shape):
            memory = np.empty(math.prod(shape), np.float16)
        lent = memory.reshape(shape)
        # a batch and all that shares its memory holds on to `lent`
        weakref.finalize(lent, self.unused.append, memory).atexit = False
        return torch.from_numpy(lent)


def open_bank(files: Sequence[CaseFile], device: torch.device, where: str = "auto", *, reserved: int = 0) -> Bank:
    """Map the stored files of the cases, after writing those that are missing; copy them to the GPU where that has room.

    Args:
        files: of the cases.
        device: of the network.
        where: "auto", or the place that the user insists on (`nnUNet_csm_bank`).
        reserved: bytes of the GPU that steps are to have.

    Raises:
        UserError: an unknown or too small place; no case; or one that was not preprocessed, has another number of channels than
            the plans, or holds voxels that are no numbers; or no room to store them.
    """
    if not files:
        raise UserError("no case to read; check splits_final.json and the preprocessed folder")
    if where not in ("auto", *get_args(Where)):
        raise UserError(
            f"{VARIABLE} is {where!r}; choose auto, gpu or mapped (which stands for memory and disk of earlier versions)"
        )
    if where == "gpu" and device.type != "cuda":
        raise UserError(f"{VARIABLE} is gpu, but the network is on {device}; choose auto or mapped")
    contents = read(files)
    images = f"{_gib(contents.num_bytes)} of images as fp16"
    size = sum(file.stored.stat().st_size for file in files)
    reason = f"{images}, stored in {', '.join(sorted({str(file.stored.parent) for file in files}))} ({_gib(size)})"
    if device.type == "cuda" and where != "mapped":
        free = max(0, torch.cuda.mem_get_info(device)[0] - reserved)
        share = SHARE_WHEN_FORCED if where == "gpu" else SHARE_OF_GPU
        room = f"{share:.0%} of {_gib(free)} left on {device} beside a step of {_gib(reserved)}"
        if contents.num_bytes <= share * free:
            try:
                return GpuBank(contents, device, f"{reason}; on the GPU, as they take no more than {room}")
            except torch.OutOfMemoryError as error:
                # another program took it between the question and the answer
                raise UserError(f"no room for {images} ({error}); set {VARIABLE}=mapped") from None
        if where == "gpu":
            raise UserError(f"{VARIABLE} is gpu: {images} do not fit into {room}; choose mapped or auto")
        reason += f"; more than {room}"
    pinned, reason = _pinned(device, f"{reason}; mapped into memory")
    return MappedBank(contents, pinned, reason)


def _pinned(device: torch.device, reason: str) -> tuple[bool, str]:
    """Whether batches can lie in pinned memory; if not, the reason goes on with why."""
    if device.type != "cuda":
        return False, reason
    try:
        torch.empty(1, pin_memory=True)
    except RuntimeError as error:
        return False, f"{reason}; batches wait for their copies to the GPU, since memory cannot be pinned ({error})"
    return True, reason


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
        raise UserError(f"{folder}: {_gib(size)} of images are to be stored as fp16, and {_gib(free)} are left; {remedy}")


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
        return bool(_mapped(file)["stamp"] == _stamp(file.path))
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
        return blosc2.open(urlpath=str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    except (RuntimeError, ValueError, OSError):
        # blosc2 says of any such file that it could not open it
        raise UserError(
            f"{path}: not a whole file of preprocessed data, it was cut off or changed; delete the files of this case there and "
            f"preprocess again"
        ) from None


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
