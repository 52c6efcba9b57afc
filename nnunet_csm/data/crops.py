"""Where a patch is cut and how it is flipped: drawn first, then applied, on the CPU by slices or on a GPU by one gather."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float32, Int
from torch import Tensor

from nnunet_csm.data.draws import Draws, What

Size = tuple[int, int, int]

# positions drawn for a sample, of which the first that is not background is taken
NUM_CANDIDATES = 4
# of a thousand blocks within a patch, how many must vary for it not to be background
MIN_OCCUPIED = 50
# edge of a block in voxels
BLOCK = 8
# of the standard deviation of a series: a block whose values span no more is background
MIN_SPAN = 0.1


@dataclass(frozen=True)
class Crops:
    """Drawn patches, one per sample."""

    start: Int[Tensor, "b 3"]
    """First voxel along (z, y, x); negative where the volume is smaller than the patch."""
    flip: Bool[Tensor, "b 3"]

    def to(self, device: torch.device) -> "Crops":
        return Crops(self.start.to(device, non_blocking=True), self.flip.to(device, non_blocking=True))


@dataclass(frozen=True)
class Occupancy:
    """Where in some volumes there is something: how many blocks vary in any series, counted from the first corner.

    Background is what does not vary. It is no certain value: z-scoring makes another constant of a zero.
    """

    counts: Int[Tensor, " n"]
    """One integral image after the other, each one longer along every axis than the volume has blocks."""
    offset: Int[Tensor, " c"]
    """Where the integral image of a case begins."""
    num_blocks: Int[Tensor, "c 3"]

    @staticmethod
    def of(occupied: Iterable[np.ndarray]) -> "Occupancy":
        """Of the maps (z, y, x) of some volumes, see `occupied_blocks`."""
        counts, num_blocks = [], []
        for blocks in occupied:
            counts.append(np.pad(blocks, [(1, 0)] * 3).astype(np.int32).cumsum(0).cumsum(1).cumsum(2, dtype=np.int32).ravel())
            num_blocks.append(blocks.shape)
        ends = np.cumsum([len(c) for c in counts])
        return Occupancy(
            torch.from_numpy(np.concatenate(counts)).int(), torch.from_numpy(np.append(0, ends[:-1])), torch.tensor(num_blocks)
        )

    def __getitem__(self, cases: Int[Tensor, " b"]) -> "Occupancy":
        """Of the volumes from which the samples of a batch are cut."""
        return Occupancy(self.counts, self.offset[cases], self.num_blocks[cases])

    def to(self, device: torch.device) -> "Occupancy":
        return Occupancy(self.counts.to(device), self.offset.to(device), self.num_blocks.to(device))

    def share(self, start: Int[Tensor, "b m 3"], patch_size: Size) -> Int[Tensor, "b m"]:
        """How many of a thousand blocks vary, of those that a patch of sample b touches when it begins at `start`."""
        low = start.clamp(min=0) // BLOCK
        end = torch.stack([start[..., axis] + size for axis, size in enumerate(patch_size)], -1)
        high = ((end + BLOCK - 1) // BLOCK).minimum(self.num_blocks[:, None])
        _, num_y, num_x = (self.num_blocks[:, None] + 1).unbind(-1)
        # the eight corners of an integral image
        bounds = torch.stack([low, high])
        z, y, x = bounds[:, None, None, ..., 0], bounds[:, None, ..., 1], bounds[..., 2]
        corners = self.counts[self.offset[:, None] + (z * num_y + y) * num_x + x]
        found = corners.diff(dim=0).diff(dim=1).diff(dim=2)[0, 0, 0]
        return 1000 * found // (high - low).prod(-1)


def occupied_blocks(volume: Float32[np.ndarray, "z y x"]) -> Bool[np.ndarray, "bz by bx"]:
    """Blocks of a series in which it varies: their largest less their smallest value is more than background has."""
    largest = smallest = volume
    for axis in range(3):
        bounds = range(BLOCK, volume.shape[axis], BLOCK)
        largest = np.stack([part.max(axis) for part in np.split(largest, bounds, axis)], axis)
        smallest = np.stack([part.min(axis) for part in np.split(smallest, bounds, axis)], axis)
    return largest - smallest > MIN_SPAN * volume.std()


def draw_crops(
    draws: Draws, shapes: Int[Tensor, "b 3"], patch_size: Size, occupancy: Occupancy | None = None, number: int = 0
) -> Crops:
    """Draw positions uniformly and a flip of each axis with probability one half (paper IV-A).

    Along an axis shorter than the patch, the volume lies anywhere within the patch. With `occupancy` (that of each sample's
    volume), a patch of background is drawn again, `NUM_CANDIDATES` positions in all; when all are background, the fullest is
    taken. Where there is no background the draw is the one without. With another `number`, another crop of the same samples is
    drawn. Nothing here waits for the device.
    """
    num_candidates = 1 if occupancy is None else NUM_CANDIDATES
    room = torch.stack([shapes[:, axis] - size for axis, size in enumerate(patch_size)], 1)[:, None]
    position = draws.integers(What.POSITION, 3 * num_candidates, 3 * num_candidates * number).view(-1, num_candidates, 3)
    # 31 bits of a number in [0, 2**63), so that the product is exact and the last place is never passed
    offset = ((position >> 32) * (room.abs() + 1)) >> 31
    start = torch.where(room >= 0, offset, -offset)
    if occupancy is not None:
        # the first among equals
        best = occupancy.share(start, patch_size).clamp(max=MIN_OCCUPIED).argmax(1)
        start = start.gather(1, best[:, None, None].expand(-1, 1, 3))
    return Crops(start[:, 0], draws.uniform(What.FLIP, 3, 3 * number) < 0.5)


def cut(
    volume: Float16[np.ndarray, "z y x"], start: Sequence[int], flip: Sequence[bool], patch: Float16[Tensor, "pz py px"]
) -> None:
    """Cut a patch out of one series, zero outside of it, and flip it: in one pass, straight into `patch`."""
    source, target = [], []
    for first, size, length in zip(start, patch.shape, volume.shape, strict=True):
        low, high = max(first, 0), min(first + size, length)
        source.append(slice(low, high))
        target.append(slice(low - first, high - first))
    # numpy writes backwards without a copy, which torch cannot
    whole = patch.numpy()[tuple(slice(None, None, -1 if turned else 1) for turned in flip)]
    inside = whole[tuple(target)]
    if inside.size < whole.size:
        whole[...] = 0
    np.copyto(inside, volume[tuple(source)])


def gather(
    flat: Float16[Tensor, " n"],
    offset: Int[Tensor, "b s"],
    shapes: Int[Tensor, "b 3"],
    series_present: Bool[Tensor, "b s"],
    crops: Crops,
    patch_size: Size,
) -> Float16[Tensor, "b s z y x"]:
    """Cut patches out of volumes that lie one after the other in one tensor, on its device and without waiting for it.

    Pure index arithmetic, which a compiler fuses into one kernel. Places are 64-bit: `flat` may have more than 2**31 voxels.

    Args:
        flat: the volumes, each (z, y, x).
        offset: where the volume of a sample's series begins; anything for an absent series.
        shapes: of the samples' volumes.
        series_present: absent series are zero.
    """
    places, inside = [], []
    for axis, size in enumerate(patch_size):
        steps = torch.arange(size, device=flat.device)
        place = crops.start[:, axis, None] + torch.where(crops.flip[:, axis, None], size - 1 - steps, steps)
        places.append(place)
        inside.append((place >= 0) & (place < shapes[:, axis, None]))
    _, num_y, num_x = (shapes[:, axis, None, None] for axis in range(3))
    row = (places[0][:, :, None] * num_y + places[1][:, None, :]) * num_x
    place = (row[..., None] + places[2][:, None, None, :])[:, None] + offset[..., None, None, None]
    valid = (inside[0][:, :, None, None] & inside[1][:, None, :, None] & inside[2][:, None, None, :])[:, None]
    valid = valid & series_present[..., None, None, None]
    return torch.where(valid, flat[torch.where(valid, place, 0)], 0)
