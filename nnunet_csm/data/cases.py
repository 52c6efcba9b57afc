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
        files = [self._open(Path(folder), name, len(series)) for name in self.names]
        self.shapes = torch.tensor([file.shape[1:] for file in files])
        size = sum(2 * len(series) * int(shape.prod()) for shape in self.shapes)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.where = "memory" if size <= SHARE_OF_MEMORY * memory else "files"
        self.volumes, present = [], []
        for file in tqdm(files, desc="reading images", unit="case", disable=None, leave=False):
            volume = torch.from_numpy(file[:])
            present.append((volume != 0).flatten(1).any(1))
            half = volume.half()
            # intensities that nobody normalised may be beyond fp16
            in_memory = half if half.isfinite().all() else volume
            self.volumes.append(in_memory if self.where == "memory" else file)
        self.series_present = torch.stack(present)
        empty = [name for name, has in zip(self.names, self.series_present, strict=True) if not has.any()]
        if empty:
            raise UserError(f"{folder}: {', '.join(empty[:5])} hold nothing but zeros; remove them from the dataset")

    @staticmethod
    def _open(folder: Path, name: str, num_series: int) -> blosc2.NDArray:
        path = folder / f"{name}.b2nd"
        if not path.is_file():
            raise UserError(
                f"{path}: case {name} is not preprocessed; run nnUNetv2_preprocess (nnU-Net 2.8) or check splits_final.json"
            )
        file = blosc2.open(urlpath=str(path), mode="r", mmap_mode="r", dparams={"nthreads": 1})
        if file.shape[0] != num_series:
            raise UserError(f"{path}: {file.shape[0]} series, expected {num_series} as in the plans; plan and preprocess again")
        return file

    def __len__(self) -> int:
        return len(self.names)

    def cut(self, cases: Int[Tensor, " b"], crops: Crops, patch_size: Size) -> Float[Tensor, "b s z y x"]:
        """Cut one patch from each of the given cases."""
        drawn = zip(cases.tolist(), crops.start.tolist(), crops.flip.tolist(), strict=True)
        return torch.stack([cut(self.volumes[case], start, flip, patch_size) for case, start, flip in drawn])
