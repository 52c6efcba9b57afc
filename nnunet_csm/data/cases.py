"""Images of preprocessed cases, without their labels."""

import os
from collections.abc import Sequence
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


class Cases:
    """The images of some cases of a preprocessed dataset, in memory as fp16 when they fit, else cut from their files.

    Attributes:
        names: identifiers of the cases.
        shapes: (c, 3) voxels along (z, y, x).
        series_present: (c, s) False for a series whose stored volume is all zero.
        where: "memory" or "files", for the log.
    """

    names: list[str]
    shapes: Int[Tensor, "c 3"]
    series_present: Bool[Tensor, "c s"]

    def __init__(self, folder: str | Path, names: Sequence[str], series: Sequence[str]) -> None:
        """Open the cases.

        Raises:
            UserError: a case that was not preprocessed, or has another number of series than the plans.
        """
        self.names = list(names)
        if not self.names:
            raise UserError(f"{folder}: no case to read; check splits_final.json beside it")
        self.paths = [Path(folder) / f"{name}.b2nd" for name in self.names]
        self.shapes = torch.tensor([_open(path, len(series)).shape[1:] for path in self.paths])
        size = sum(2 * len(series) * int(shape.prod()) for shape in self.shapes)
        self.where = "memory" if size <= SHARE_OF_MEMORY * memory_bytes() else "files"
        self.volumes: list[Tensor] = []
        present = []
        for path in tqdm(self.paths, desc="reading images", unit="case", disable=None, leave=False):
            volume = torch.from_numpy(_open(path, len(series))[:])
            present.append((volume != 0).flatten(1).any(1))
            if self.where == "memory":
                self.volumes.append(to_half(volume))
        self.series_present = torch.stack(present)
        empty = [name for name, has in zip(self.names, self.series_present, strict=True) if not has.any()]
        if empty:
            raise UserError(f"{folder}: {', '.join(empty[:5])} hold nothing but zeros; remove them from the dataset")

    def __len__(self) -> int:
        return len(self.names)

    def cut(self, cases: Int[Tensor, " b"], crops: Crops, patch_size: Size) -> Float[Tensor, "b s z y x"]:
        """Cut one patch from each of the given cases."""
        num_series = self.series_present.shape[1]
        patches = []
        for case, start, flip in zip(cases.tolist(), crops.start.tolist(), crops.flip.tolist(), strict=True):
            volume = self.volumes[case] if self.where == "memory" else _open(self.paths[case], num_series)
            patches.append(to_half(cut(volume, start, flip, patch_size)).float())
        return torch.stack(patches)


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


def _open(path: Path, num_series: int) -> blosc2.NDArray:
    """Opened when needed: hundreds of files held open would exceed the usual limit."""
    if not path.is_file():
        raise UserError(f"{path}: not preprocessed; run nnUNetv2_preprocess (nnU-Net 2.8), or check splits_final.json")
    file = blosc2.open(urlpath=str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
    if file.shape[0] != num_series:
        raise UserError(f"{path}: {file.shape[0]} series, expected {num_series} as in the plans; plan and preprocess again")
    return file
