"""Tiles of an image, as large as the patches of training, that begin at whole tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window
from torch import Tensor
from torch.nn.functional import pad
from torch.signal.windows import gaussian

from nnunet_csm.model.tokens import Size, grid_size

# deviation of a tile's weights, as a share of the tile: nnU-Net's in prediction
DEVIATION = 1 / 8

Place = tuple[slice, ...]


@dataclass(frozen=True)
class Tiling:
    """How an image is cut. All but `token_size` counts tokens along (z, y, x).

    Attributes:
        grid: of the image, which is filled up to whole tokens.
        tile: of a tile.
    """

    token_size: Size
    grid: Size
    tile: Size

    @classmethod
    def of(cls, shape: Sequence[int], patch_size: Size, token_size: Size) -> "Tiling":
        grid = triple(-(-n // t) for n, t in zip(shape, token_size, strict=True))
        return cls(token_size, grid, grid_size(patch_size, token_size))

    @property
    def before(self) -> Size:
        """Tokens of zeros before the image, which is in the middle where it is smaller than a tile, as training had it."""
        return triple(max(0, t - g) // 2 for g, t in zip(self.grid, self.tile, strict=True))

    @property
    def padded(self) -> Size:
        """The image and what is around it."""
        return triple(max(g, t) for g, t in zip(self.grid, self.tile, strict=True))

    @property
    def within(self) -> Place:
        """The image in what is padded."""
        return tuple(slice(b, b + g) for b, g in zip(self.before, self.grid, strict=True))

    def pad(self, volume: Float[Tensor, "s z y x"]) -> Float[Tensor, "s pz py px"]:
        """Put zeros around a volume."""
        return with_zeros(volume, self.before, self.padded, self.token_size)

    def places(self, step_size: float) -> list[Place]:
        """Tokens of each tile; where a step would be less than a token, there is no tile twice."""
        steps = [sorted(set(of_axis)) for of_axis in compute_steps_for_sliding_window(self.padded, self.tile, step_size)]
        return [tuple(slice(s, s + n) for s, n in zip(start, self.tile, strict=True)) for start in product(*steps)]

    def voxels(self, place: Place) -> Place:
        """The voxels of tokens."""
        return tuple(slice(p.start * t, p.stop * t) for p, t in zip(place, self.token_size, strict=True))


def with_zeros(
    volume: Float[Tensor, "s z y x"], before: Sequence[int], grid: Size, token_size: Size
) -> Float[Tensor, "s pz py px"]:
    """Zeros around a volume, so that it makes `grid` tokens, the first `before` of them empty."""
    widths: list[int] = []
    for length, num_before, num_tokens, edge in zip(volume.shape[1:], before, grid, token_size, strict=True):
        # the last axis comes first
        widths = [num_before * edge, (num_tokens - num_before) * edge - length, *widths]
    return pad(volume, widths)


def weights_of(tile: Sequence[int], device: torch.device) -> Float[Tensor, "z y x"]:
    """What tokens, or voxels, of a tile weigh where tiles overlap: less, the further they are from its middle."""
    weight = torch.ones((), device=device)
    for n in tile:
        weight = weight[..., None] * gaussian(n, std=n * DEVIATION, device=device)
    return weight


def triple(values: Any) -> Size:
    """Three numbers as a size."""
    z, y, x = values
    return z, y, x
