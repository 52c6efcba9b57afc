"""Images of preprocessed cases, without labels, kept where patches are cut from them fastest: on the GPU, in memory or on disk.

The three banks give the same patches for the same draws. What is kept is fp16, so that a batch does not depend on where it lies.
"""

import math
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias, get_args

import blosc2
import numpy as np
import torch
from jaxtyping import Bool, Float16, Int
from torch import Tensor
from tqdm import tqdm

from nnunet_csm.data.crops import Crops, Occupancy, Size, cut, gather, occupied_blocks
from nnunet_csm.data.draws import Purpose, ahead, key
from nnunet_csm.errors import UserError
from nnunet_csm.machine import num_cores, why_not_compiled

Where: TypeAlias = Literal["gpu", "memory", "disk"]
# where the user insists on having the images
VARIABLE = "nnUNet_csm_bank"

# the images are kept where they take no more than this share of what is free; the rest is for the network, or other programs
SHARE_OF_GPU, SHARE_OF_MEMORY = 0.5, 0.5
# the same when the user insists
SHARE_WHEN_FORCED = 0.9
# of the disk bank. Not a share of memory: pools follow from it, and draws from pools, which are to be those of other machines.
# A larger cache would not be faster, since every volume is used CROPS_PER_VOLUME times from any
CACHE_BYTES = 4 * 2**30
CROPS_PER_VOLUME = 16
# of the cache, which keeps some volumes for a while after they left the pool: without that room it would drop some that are in it
SHARE_OF_POOL = 0.75
# fewer cases than this would be shown too often in a row, even when they do not fit into the cache
MIN_POOL = 16
# edge of what a `.b2nd` file compresses in one piece: a patch takes about this much more of it along every axis
PIECE = 32
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


@dataclass(frozen=True)
class Contents:
    """What was found in the files of some cases; tensors are on the CPU."""

    files: list[CaseFile]
    shapes: Int[Tensor, "c 3"]
    series_present: Bool[Tensor, "c s"]
    occupancy: Occupancy
    offset: Int[Tensor, "c s"]
    """Where each volume begins when all lie one after the other, those of absent series left out; 0 for these."""
    left_out: list[str]


class Bank(ABC):
    """The images of some preprocessed cases.

    Attributes:
        where: "gpu", "memory" or "disk".
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
        self.device, self.reason = device, reason
        self.files, self.left_out = contents.files, contents.left_out
        self.names = [file.name for file in contents.files]
        self.shapes, self.series_present = contents.shapes.to(device), contents.series_present.to(device)
        self.occupancy = contents.occupancy.to(device)

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def cut(self, cases: Int[Tensor, " b"], crops: Crops, patch_size: Size) -> Float16[Tensor, "b s z y x"]:
        """Cut one patch from each of the given cases; absent series are zero.

        Arguments and result are on `device`. Where that is the CPU, several threads may call it at once, and beside a GPU the
        result lies in pinned memory.
        """

    def reach(self, step: int) -> Int[Tensor, " p"] | None:
        """The cases that may be drawn in a step of the run, see `Pools`; None when all may."""
        return None


class GpuBank(Bank):
    """All volumes in one tensor on the device; a batch is one gather."""

    where = "gpu"

    def __init__(self, contents: Contents, flat: Float16[Tensor, " n"], reason: str) -> None:
        super().__init__(contents, flat.device, reason)
        self.flat, self.offset = flat, contents.offset.to(flat.device)
        self.compiled = flat.is_cuda and not why_not_compiled(flat.device.type)
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


class HostBank(Bank):
    """Patches are slices, cut by the CPU. The volumes' own pages are not pinned: no GPU reads them."""

    def __init__(self, contents: Contents, pinned: bool, reason: str) -> None:
        super().__init__(contents, torch.device("cpu"), reason)
        self.pinned, self.present = pinned, contents.series_present.tolist()
        self.unused: list[np.ndarray] = []

    @abstractmethod
    def part(self, case: int, start: Sequence[int], patch_size: Size) -> tuple[Sequence[np.ndarray], Sequence[int]]:
        """Volumes (z, y, x) of the present series that hold a patch, and where in them it starts."""

    def cut(self, cases: Int[Tensor, " b"], crops: Crops, patch_size: Size) -> Float16[Tensor, "b s z y x"]:
        batch = self._empty((len(cases), self.series_present.shape[1], *patch_size))
        drawn = zip(batch, cases.tolist(), crops.start.tolist(), crops.flip.tolist(), strict=True)
        for patches, case, start, flip in drawn:
            volumes, first = self.part(case, start, patch_size)
            remaining = iter(volumes)
            for patch, present in zip(patches, self.present[case], strict=True):
                if present:
                    cut(next(remaining), first, flip, patch)
                else:
                    patch.zero_()
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


class MemoryBank(HostBank):
    """All volumes in the memory of the machine."""

    where = "memory"

    def __init__(self, contents: Contents, flat: Float16[Tensor, " n"], pinned: bool, reason: str) -> None:
        super().__init__(contents, pinned, reason)
        self.volumes = [
            [flat[first : first + math.prod(shape)].view(shape).numpy() for first in offset[present].tolist()]
            for offset, shape, present in zip(contents.offset, contents.shapes.tolist(), contents.series_present, strict=True)
        ]

    def part(self, case: int, start: Sequence[int], patch_size: Size) -> tuple[Sequence[np.ndarray], Sequence[int]]:
        return self.volumes[case], start


class DiskBank(HostBank):
    """Volumes stay in their files; decoded ones are kept in a cache as long as it has room, the least recently used leave first.

    Its memory does not depend on the number of cases.
    """

    where = "disk"

    def __init__(
        self, contents: Contents, cache_bytes: int, batch_size: int, seed: int, pinned: bool = False, reason: str = ""
    ) -> None:
        super().__init__(contents, pinned, reason)
        self.num_voxels = contents.shapes.prod(1).tolist()
        self.sizes = (2 * contents.shapes.prod(1) * contents.series_present.sum(1)).tolist()
        self.cache = _Cache(self._decode, cache_bytes)
        # as many as fit, by their mean size
        pool_size = int(SHARE_OF_POOL * cache_bytes * len(self) / sum(self.sizes))
        pool_size = min(max(pool_size, MIN_POOL), len(self))
        self.pools = Pools(len(self), pool_size, batch_size, seed) if pool_size < len(self) else None

    def reach(self, step: int) -> Int[Tensor, " p"] | None:
        return self.pools(step) if self.pools else None

    def part(self, case: int, start: Sequence[int], patch_size: Size) -> tuple[Sequence[np.ndarray], Sequence[int]]:
        voxels_of_patch = math.prod(size + PIECE for size in patch_size)
        if self.sizes[case] <= self.cache.max_bytes and self.num_voxels[case] <= CROPS_PER_VOLUME * voxels_of_patch:
            return self.cache(case), start
        # so large that decoding all of it takes longer than its crops one by one
        lower = [max(first, 0) for first in start]
        box = tuple(slice(low, first + size) for low, first, size in zip(lower, start, patch_size, strict=True))
        return self._decode(case, box), [first - low for first, low in zip(start, lower, strict=True)]

    def _decode(self, case: int, box: tuple[slice, ...] = (slice(None),) * 3) -> list[np.ndarray]:
        file = self.files[case]
        opened = _open(file)
        channels = [c for c, present in zip(file.channels, self.present[case], strict=True) if present and c is not None]
        return [to_half(torch.from_numpy(opened[(channel, *box)])).numpy() for channel in channels]


class _Cache:
    """Decoded volumes of the cases used last, of `max_bytes` in all. Two threads that want one case decode it once."""

    def __init__(self, decode: Callable[[int], list[np.ndarray]], max_bytes: int) -> None:
        self.decode, self.max_bytes = decode, max_bytes
        self.kept: OrderedDict[int, Future[list[np.ndarray]]] = OrderedDict()
        self.num_bytes, self.lock = 0, threading.Lock()

    def __call__(self, case: int) -> list[np.ndarray]:
        with self.lock:
            known = self.kept.get(case)
            if known is None:
                mine = self.kept[case] = Future()
            else:
                self.kept.move_to_end(case)
        if known is not None:
            return known.result()
        try:
            volumes = self.decode(case)
        except BaseException as error:
            with self.lock:
                del self.kept[case]
            mine.set_exception(error)
            raise
        mine.set_result(volumes)
        with self.lock:
            self.num_bytes += _num_bytes(volumes)
            self._make_room()
        return volumes

    def _make_room(self) -> None:
        for case, future in list(self.kept.items()):
            if self.num_bytes <= self.max_bytes:
                return
            # others are still being decoded, and not yet counted
            if future.done():
                self.num_bytes -= _num_bytes(future.result())
                del self.kept[case]


@dataclass(frozen=True)
class Pools:
    """Which cases may be drawn in a step, so that a decoded volume serves many crops before it leaves the cache.

    The cases stand in an endless row of permutations of all of them. The pool is a window of that row which moves on by one
    case for every `CROPS_PER_VOLUME` crops: every case is in it for as many steps as any other, so that over a pass through
    the cases each is drawn as often as without pools. What changes is that neighbouring steps share cases, and that a batch
    holds cases of one pool.

    A function of the seed and the step, counted over the whole run, and of nothing else: the same on all ranks, in a run that
    was resumed, and whoever makes the batch.
    """

    num_cases: int
    pool_size: int
    """At most `num_cases`."""
    batch_size: int
    """Of all ranks."""
    seed: int

    def __call__(self, step: int) -> Int[Tensor, " p"]:
        """The cases of a step; one may be there twice, at the end of one permutation and the beginning of the next."""
        first = step * self.batch_size // CROPS_PER_VOLUME
        number, begin = divmod(first, self.num_cases)
        row = [_permutation(self.num_cases, self.seed, number + following) for following in (0, 1)]
        return torch.cat(row)[begin : begin + self.pool_size]


@lru_cache(maxsize=4)
def _permutation(num_cases: int, seed: int, number: int) -> Int[Tensor, " c"]:
    return torch.from_numpy(np.random.default_rng(key(seed, Purpose.POOL, number)).permutation(num_cases))


def open_bank(
    files: Sequence[CaseFile],
    device: torch.device,
    where: str = "auto",
    *,
    batch_size: int,
    seed: int,
    num_ranks: int = 1,
    agree: Callable[[int], int] = lambda number: number,
    reserved: int = 0,
) -> Bank:
    """Read the cases and keep them in the fastest place that has room: the GPU, else memory, else their files.

    Args:
        files: of the cases.
        device: of the network.
        where: "auto", or the place that the user insists on (`nnUNet_csm_bank`).
        batch_size: of all ranks; with `seed`, what the pools of a disk bank follow from.
        num_ranks: processes on this machine that open a bank at the same time, each on a GPU of its own.
        agree: the least of the numbers that all ranks give. One whose neighbour was quicker finds less memory free, and with
            another place or pool it would draw other cases.
        reserved: bytes of the GPU that steps are to have.

    Raises:
        UserError: an unknown or too small place; no case; or one that was not preprocessed, has another number of channels than
            the plans, or holds voxels that are no numbers.
    """
    if not files:
        raise UserError("no case to read; check splits_final.json and the preprocessed folder")
    size = sum(2 * sum(c is not None for c in f.channels) * math.prod(_open(f).shape[1:]) for f in files)
    place, reason = _choose(size, device, where, num_ranks, reserved)
    slowest_first = get_args(Where)[::-1]
    agreed = slowest_first[agree(slowest_first.index(place))]
    if agreed != place:
        place, reason = agreed, f"{reason}; but {agreed}, since another rank has less room"
    pinned, reason = _pinned(device, reason)
    if place == "disk":
        cache_bytes = agree(min(CACHE_BYTES, int(SHARE_OF_MEMORY * free_memory() / num_ranks)))
        bank = DiskBank(read(files), cache_bytes, batch_size, seed, pinned)
        pools = f"pools of {bank.pools.pool_size} of {len(bank)} cases" if bank.pools else "which holds all cases"
        bank.reason = f"{reason}; cache of {_gib(cache_bytes)}, {pools}"
        return bank
    try:
        flat = torch.empty(size // 2, dtype=torch.float16, device=device if place == "gpu" else "cpu")
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # another program took it between the question and the answer
        raise UserError(f"no room for {_gib(size)} of images ({error}); set {VARIABLE}=disk") from None
    contents = read(files, flat)
    return GpuBank(contents, flat, reason) if place == "gpu" else MemoryBank(contents, flat, pinned, reason)


def _choose(size: int, device: torch.device, where: str, num_ranks: int, reserved: int) -> tuple[Where, str]:
    """The place of `size` bytes of images, and why it was chosen."""
    if where not in ("auto", *get_args(Where)):
        raise UserError(f"{VARIABLE} is {where!r}; choose auto, gpu, memory or disk")
    if where == "gpu" and device.type != "cuda":
        raise UserError(f"{VARIABLE} is gpu, but the network is on {device}; choose auto, memory or disk")
    images = f"{_gib(size)} of images as fp16"
    if where == "disk":
        return "disk", f"{images}, and {VARIABLE} is disk"
    places: list[tuple[Where, int, float, str]] = []
    if device.type == "cuda":
        free_there = max(0, torch.cuda.mem_get_info(device)[0] - reserved)
        places.append(("gpu", free_there, SHARE_OF_GPU, f"left on {device} beside a step of {_gib(reserved)}"))
    places.append(("memory", free_memory() // num_ranks, SHARE_OF_MEMORY, "free memory" + " a rank" * (num_ranks > 1)))
    tried = ""
    for place, free, share, whose in places:
        if place == where:
            if size > SHARE_WHEN_FORCED * free:
                smaller = "memory, disk or auto" if place == "gpu" else "disk or auto"
                raise UserError(
                    f"{VARIABLE} is {place}: {images} do not fit into {SHARE_WHEN_FORCED:.0%} of {_gib(free)} {whose}; "
                    f"choose {smaller}"
                )
            return place, f"{images}, of {_gib(free)} {whose}, and {VARIABLE} is {place}"
        if where == "auto" and size <= share * free:
            return place, f"{images}{tried}, within {share:.0%} of {_gib(free)} {whose}"
        tried += f", more than {share:.0%} of {_gib(free)} {whose}"
    return "disk", images + tried


def _pinned(device: torch.device, reason: str) -> tuple[bool, str]:
    """Whether batches can lie in pinned memory; if not, the reason goes on with why."""
    if device.type != "cuda":
        return False, reason
    try:
        torch.empty(1, pin_memory=True)
    except RuntimeError as error:
        return False, f"{reason}; batches wait for their copies to the GPU, since memory cannot be pinned ({error})"
    return True, reason


@dataclass(frozen=True)
class _Case:
    file: CaseFile
    shape: tuple[int, ...]
    present: list[bool]
    volumes: list[Tensor]
    """Of the present series; none when they are not to be kept."""
    occupied: Bool[np.ndarray, "z y x"]


def read(files: Sequence[CaseFile], flat: Float16[Tensor, " n"] | None = None) -> Contents:
    """Read and check all cases once, in threads; with `flat`, put their volumes there one after the other.

    Raises:
        UserError: as `open_bank`.
    """
    kept: list[CaseFile] = []
    shapes, present, offsets, maps = [], [], [], []
    left_out, end = [], 0
    num_readers = min(NUM_READERS, num_cores())
    cases = ahead(partial(_read, keep=flat is not None), files, num_readers, torch.device("cpu"))
    with closing(cases):
        for case in tqdm(cases, total=len(files), desc="reading images", unit="case", disable=None, leave=False):
            if not any(case.present):
                left_out.append(case.file.name)
                continue
            offset = [0] * len(case.present)
            if flat is not None:
                for series, volume in zip(np.flatnonzero(case.present), case.volumes, strict=True):
                    offset[series], end = end, end + volume.numel()
                    flat[offset[series] : end].copy_(volume.ravel())
            kept.append(case.file)
            shapes.append(case.shape)
            present.append(case.present)
            offsets.append(offset)
            maps.append(case.occupied)
    if not kept:
        raise UserError(f"{files[0].path.parent}: {', '.join(left_out[:5])} hold nothing but zeros in the planned series")
    return Contents(kept, torch.tensor(shapes), torch.tensor(present), Occupancy.of(maps), torch.tensor(offsets), left_out)


def _read(file: CaseFile, keep: bool) -> _Case:
    opened = _open(file)
    present, volumes, decoded = [], [], []
    for channel in file.channels:
        array = None if channel is None else opened[channel]
        if array is not None:
            lowest, highest = (float(value) for value in torch.from_numpy(array).aminmax())
            # either is NaN when a voxel is
            if not (math.isfinite(lowest) and math.isfinite(highest)):
                raise UserError(
                    f"{file.path}: holds NaN or infinite voxels; write 0 or what belongs there into the raw images "
                    f"(`nnunet_csm fingerprint` names them) and preprocess again"
                )
            if lowest == highest == 0:
                array = None
        present.append(array is not None)
        if array is not None:
            decoded.append(array)
            if keep:
                volumes.append(to_half(torch.from_numpy(array)))
    occupied = occupied_blocks(decoded) if decoded else np.zeros((0, 0, 0), bool)
    return _Case(file, opened.shape[1:], present, volumes, occupied)


def to_half(volume: Tensor) -> Tensor:
    """Round to fp16; values beyond fp16 are clamped to it."""
    largest = torch.finfo(torch.float16).max
    return volume.clamp(-largest, largest).half()


def memory_bytes() -> int:
    """Memory of this machine, or of the container if that has less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def free_memory() -> int:
    """Memory that programs may still take."""
    table = Path("/proc/meminfo")
    rows = dict(line.split(":") for line in table.read_text().splitlines()) if table.is_file() else {}
    available = rows.get("MemAvailable")
    return min(memory_bytes(), 1024 * int(available.split()[0])) if available else memory_bytes()


def _open(file: CaseFile) -> blosc2.NDArray:
    """Opened when needed: hundreds of files held open would exceed the usual limit."""
    if not file.path.is_file():
        remedy = "run `nnunet_csm plan_and_preprocess -preprocess_only` with the name of the plans, or check splits_final.json"
        raise UserError(f"{file.path}: not preprocessed; {remedy}")
    opened = open_volumes(file.path)
    if opened.shape[0] != file.num_channels:
        raise UserError(
            f"{file.path}: {opened.shape[0]} series, expected {file.num_channels} as in the plans; plan and preprocess again"
        )
    return opened


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


def _num_bytes(volumes: Sequence[np.ndarray]) -> int:
    return sum(volume.nbytes for volume in volumes)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
