"""Where a patch is cut and how it is flipped: drawn first, then applied."""

from collections.abc import Sequence
from dataclasses import dataclass

import blosc2
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Size = tuple[int, int, int]


@dataclass(frozen=True)
class Crops:
    """Drawn patches, one per sample."""

    start: Int[Tensor, "b 3"]
    """First voxel along (z, y, x); negative where the volume is smaller than the patch."""
    flip: Bool[Tensor, "b 3"]


def draw_crops(generator: torch.Generator, shapes: Int[Tensor, "b 3"], patch_size: Size) -> Crops:
    """Draw positions uniformly and a flip of each axis with probability one half (paper IV-A).

    Along an axis shorter than the patch, the volume lies anywhere within the patch.
    """
    room = shapes - torch.tensor(patch_size)
    position = torch.rand(shapes.shape, generator=generator)
    offset = (position * (room.abs() + 1)).long()
    return Crops(torch.where(room >= 0, offset, -offset), torch.rand(shapes.shape, generator=generator) < 0.5)


def cut(
    volume: Tensor | blosc2.NDArray, channels: Sequence[int], start: Sequence[int], flip: Sequence[bool], patch_size: Size
) -> Float[Tensor, "s z y x"]:
    """Cut one patch out of the given channels of a volume (c, z, y, x), zero outside of it, and flip it."""
    inside, outside = [], []
    for first, size, length in zip(start, patch_size, volume.shape[1:], strict=True):
        low, high = max(first, 0), min(first + size, length)
        inside.append(slice(low, high))
        outside += [low - first, first + size - high]
    z, y, x = inside
    # a slice of a file comes as an array, of a tensor as a view
    patch = torch.stack([torch.as_tensor(volume[channel, z, y, x]).float() for channel in channels])
    if any(outside):
        patch = torch.nn.functional.pad(patch, outside[4:] + outside[2:4] + outside[:2])
    axes = [axis + 1 for axis, turned in enumerate(flip) if turned]
    return patch.flip(axes) if axes else patch
