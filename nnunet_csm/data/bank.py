"""Images of preprocessed cases, without labels, kept where patches are cut from them fastest: on the GPU, or in mapped files.

Both banks give the same patches for the same draws. For the files, see `stored.py`.
"""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, TypeAlias, get_args

import numpy as np
import torch
from jaxtyping import Float16, Int
from torch import Tensor
from tqdm import tqdm

from nnunet_csm.data.crops import Crops, Occupancy, Size, cut, gather
from nnunet_csm.data.stored import CaseFile, Contents, gib, read
from nnunet_csm.errors import UserError
from nnunet_csm.machine import why_not_compiled

Where: TypeAlias = Literal["gpu", "mapped"]
# where the user insists on having the images
VARIABLE = "nnUNet_csm_bank"

# the images are kept on the GPU where they take no more than this share of what is free; the rest is for the network
SHARE_OF_GPU = 0.5
# the same when the user insists
SHARE_WHEN_FORCED = 0.9
# of samples at a time, where gathering is not compiled and its indices lie in memory
SAMPLES_UNCOMPILED = 4


class Bank(ABC):
    """The images of some preprocessed cases.

    Attributes:
        where: "gpu" or "mapped".
        reason: why the images lie there, with sizes, for the log.
        names: identifiers of the cases.
        weights: how often each is drawn in training, beside the others.
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
        self.weights = [file.weight for file in self.files]
        self.shapes = torch.tensor([case.shape for case in cases], device=device)
        self.series_present = torch.tensor([case.series_present for case in cases], device=device)
        self.occupancy = Occupancy.of(case.occupied for case in cases).to(device)

    def __len__(self) -> int:
        return len(self.names)

    def shares(self) -> dict[str, tuple[int, float]]:
        """Folder of images to the number of its cases, and their share of what training draws."""
        found: dict[str, tuple[int, float]] = {}
        total = sum(self.weights)
        for file in self.files:
            source = f"{file.path.parent.parent.name}/{file.path.parent.name}"
            num, share = found.get(source, (0, 0.0))
            found[source] = num + 1, share + file.weight / total
        return found

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
    images = f"{gib(contents.num_bytes)} of images as fp16"
    size = sum(file.stored.stat().st_size for file in files)
    reason = f"{images}, stored in {', '.join(sorted({str(file.stored.parent) for file in files}))} ({gib(size)})"
    if device.type == "cuda" and where != "mapped":
        free = max(0, torch.cuda.mem_get_info(device)[0] - reserved)
        share = SHARE_WHEN_FORCED if where == "gpu" else SHARE_OF_GPU
        room = f"{share:.0%} of {gib(free)} left on {device} beside a step of {gib(reserved)}"
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
