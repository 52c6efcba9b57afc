"""Images of preprocessed cases, without their labels: of one dataset, or of several with different series."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import blosc2
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from nnunet_csm.data.crops import Crops, Size, cut
from nnunet_csm.errors import UserError

# the images are kept in memory when they take no more than this share of it
SHARE_OF_MEMORY = 0.25


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


class Cases:
    """The images of some preprocessed cases, in memory as fp16 when they fit, else cut from their files.

    Attributes:
        names: identifiers of the cases.
        shapes: (c, 3) voxels along (z, y, x).
        series_present: (c, s) False for a series that the case does not have, or whose stored volume is all zero.
        where: "memory" or "files", for the log.
        left_out: names of cases that hold nothing but zeros.
    """

    names: list[str]
    shapes: Int[Tensor, "c 3"]
    series_present: Bool[Tensor, "c s"]

    def __init__(self, files: Sequence[CaseFile]) -> None:
        """Open the cases.

        Raises:
            UserError: no case, or one that was not preprocessed or has another number of channels than the plans.
        """
        if not files:
            raise UserError("no case to read; check splits_final.json and the preprocessed folder")
        size = sum(2 * len(f.channels) * _num_voxels(f) for f in files)
        self.where = "memory" if size <= SHARE_OF_MEMORY * memory_bytes() else "files"
        self.files: list[CaseFile] = []
        self.volumes: list[Tensor] = []
        self.left_out: list[str] = []
        present, shapes = [], []
        for file in tqdm(files, desc="reading images", unit="case", disable=None, leave=False):
            opened = _open(file)
            known = [(s, torch.from_numpy(opened[c])) for s, c in enumerate(file.channels) if c is not None]
            if not all(bool(torch.isfinite(volume).all()) for _, volume in known):
                raise UserError(
                    f"{file.path}: holds NaN or infinite voxels; write 0 or what belongs there into the raw images "
                    f"(`nnunet_csm fingerprint` names them) and preprocess again"
                )
            volumes = {s: volume for s, volume in known if bool((volume != 0).any())}
            if not volumes:
                self.left_out.append(file.name)
                continue
            self.files.append(file)
            shapes.append(opened.shape[1:])
            present.append(torch.tensor([s in volumes for s in range(len(file.channels))]))
            if self.where == "memory":
                self.volumes.append(torch.stack([to_half(volume) for volume in volumes.values()]))
        if not self.files:
            raise UserError(
                f"{files[0].path.parent}: {', '.join(self.left_out[:5])} hold nothing but zeros in the planned series"
            )
        self.names = [file.name for file in self.files]
        self.shapes, self.series_present = torch.tensor(shapes), torch.stack(present)

    def __len__(self) -> int:
        return len(self.names)

    def cut(self, cases: Int[Tensor, " b"], crops: Crops, patch_size: Size) -> Float[Tensor, "b s z y x"]:
        """Cut one patch from each of the given cases; absent series are zero."""
        patches = torch.zeros(len(cases), self.series_present.shape[1], *patch_size)
        for patch, case, start, flip in zip(patches, cases.tolist(), crops.start.tolist(), crops.flip.tolist(), strict=True):
            present = self.series_present[case]
            if self.where == "memory":
                voxels = cut(self.volumes[case], range(int(present.sum())), start, flip, patch_size)
            else:
                file = self.files[case]
                channels = [c for c, has in zip(file.channels, present.tolist(), strict=True) if has and c is not None]
                voxels = to_half(cut(_open(file), channels, start, flip, patch_size)).float()
            patch[present] = voxels
        return patches


def to_half(volume: Tensor) -> Tensor:
    """Round to fp16, so that a batch does not depend on where its images lie; values beyond fp16 are clamped to it."""
    largest = torch.finfo(torch.float16).max
    return volume.clamp(-largest, largest).half()


def memory_bytes() -> int:
    """Memory of this machine, or of the container if that has less."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(text)) if text.isdigit() else machine


def _num_voxels(file: CaseFile) -> int:
    z, y, x = _open(file).shape[1:]
    return z * y * x


def _open(file: CaseFile) -> blosc2.NDArray:
    """Opened when needed: hundreds of files held open would exceed the usual limit."""
    if not file.path.is_file():
        raise UserError(f"{file.path}: not preprocessed; run `nnunet_csm preprocess`, or check splits_final.json")
    opened = blosc2.open(urlpath=str(file.path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    if opened.shape[0] != file.num_channels:
        raise UserError(
            f"{file.path}: {opened.shape[0]} series, expected {file.num_channels} as in the plans; plan and preprocess again"
        )
    return opened
