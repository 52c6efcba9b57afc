"""Voxels to tokens and back: the only place that knows the order of tokens.

Tokens of a patch are numbered series first, then z, y, x. A joint token holds those of all series at one place, one series after
the other; joint tokens are numbered as those of one series. Legend: b batch, s series, l tokens of a series,
k selected tokens, e embedding, v voxels of a token, z y x voxels.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Size = tuple[int, int, int]


def grid_size(patch_size: Size, token_size: Size) -> Size:
    """Tokens along (z, y, x) of a patch. Raises ValueError when the patch is no multiple of the token."""
    if any(p % t for p, t in zip(patch_size, token_size, strict=True)):
        raise ValueError(f"patch of {tuple(patch_size)} voxels is not a multiple of token_size {tuple(token_size)}")
    z, y, x = (p // t for p, t in zip(patch_size, token_size, strict=True))
    return z, y, x


def level_strides(token_size: Sequence[int]) -> list[Size]:
    """Strides from level i to level i + 1, finest first; their product is the token size.

    Level i has a resolution i halvings below the input; level n, where n = log2 of the longest token edge, is the token grid.
    A short token edge is halved at the coarse levels only, as nnU-Net treats thick slices.
    """
    halvings = [t.bit_length() - 1 for t in token_size]
    num_levels = max(halvings)
    strides = []
    for level in range(num_levels):
        z, y, x = (2 if level >= num_levels - h else 1 for h in halvings)
        strides.append((z, y, x))
    return strides


def level_kernels(strides: Sequence[Size]) -> list[Size]:
    """Kernels of the convolutions at each level but the last: 1 along an axis that is not halved there."""
    return [(3 if z > 1 else 1, 3 if y > 1 else 1, 3 if x > 1 else 1) for z, y, x in strides]


def to_tokens(volume: Float[Tensor, "b s z y x"], token_size: Size) -> Float[Tensor, "b s l v"]:
    """Cut every series into non-overlapping tokens (paper III-B)."""
    gz, gy, gx = grid_size((volume.shape[2], volume.shape[3], volume.shape[4]), token_size)
    return rearrange(volume, "b s (gz tz) (gy ty) (gx tx) -> b s (gz gy gx) (tz ty tx)", gz=gz, gy=gy, gx=gx)


def to_volume(tokens: Shaped[Tensor, "b s l v"], grid: Size, token_size: Size) -> Shaped[Tensor, "b s z y x"]:
    """The inverse of `to_tokens`."""
    (gz, gy, gx), (tz, ty, tx) = grid, token_size
    pattern = "b s (gz gy gx) (tz ty tx) -> b s (gz tz) (gy ty) (gx tx)"
    return rearrange(tokens, pattern, gz=gz, gy=gy, gx=gx, tz=tz, ty=ty, tx=tx)


def join(tokens: Float[Tensor, "b s l v"]) -> Float[Tensor, "b 1 l s*v"]:
    """The joint tokens of a patch."""
    return rearrange(tokens, "b s l v -> b 1 l (s v)")


def separate(joint: Float[Tensor, "b 1 l w"], num_series: int) -> Float[Tensor, "b s l v"]:
    """The inverse of `join`."""
    return rearrange(joint, "b 1 l (s v) -> b s l v", s=num_series)


def to_voxels(per_token: Bool[Tensor, "b s l"], grid: Size, token_size: Size) -> Bool[Tensor, "b s z y x"]:
    """Spread one value per token over its voxels."""
    return to_volume(per_token[..., None].expand(*per_token.shape, math.prod(token_size)), grid, token_size)


def to_map(features: Float[Tensor, "b l e"], grid: Size) -> Float[Tensor, "b e gz gy gx"]:
    """Features of a series' tokens as a map for convolutions."""
    gz, gy, gx = grid
    return rearrange(features, "b (gz gy gx) e -> b e gz gy gx", gz=gz, gy=gy, gx=gx)


def coordinates(index: Int[Tensor, "b k"], grid: Size) -> Int[Tensor, "b k 4"]:
    """(series, z, y, x) of tokens given by their number in the patch."""
    gz, gy, gx = grid
    series, place = index // (gz * gy * gx), index % (gz * gy * gx)
    return torch.stack([series, place // (gy * gx), place // gx % gy, place % gx], dim=-1)


def all_tokens(num_series: int, grid: Size, batch_size: int, device: torch.device) -> Int[Tensor, "b k"]:
    """The numbers of all tokens of a patch, for every sample."""
    return torch.arange(num_series * math.prod(grid), device=device).expand(batch_size, -1)


def select(tokens: Float[Tensor, "b s l v"], index: Int[Tensor, "b k"]) -> Float[Tensor, "b k v"]:
    """The tokens with the given numbers."""
    flat = tokens.flatten(1, 2)
    return flat.gather(1, index[..., None].expand(-1, -1, flat.shape[-1]))
