"""Intensities of patches: which voxels are foreground, and a common scale for series that are compared with each other."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# shares of the foreground of a series in a patch that lie below what becomes 0 and 1
LOW, HIGH = 0.005, 0.995
# voxels of a patch that tell its percentiles well enough to learn from, at most twice as many
NUM_SAMPLED = 2**16


def foreground(voxels: Float[Tensor, "b s *place"]) -> Bool[Tensor, "b s *place"]:
    """Voxels that are not background: nnU-Net leaves it 0 when it normalises within a mask, else it is a patch's lowest value."""
    lowest = voxels.flatten(2).amin(2)
    return (voxels != 0) & (voxels > lowest.view(*lowest.shape, *[1] * (voxels.ndim - 2)))


def percentile_range(
    volume: Float[Tensor, "b s z y x"], exact: bool = False
) -> tuple[Float[Tensor, "b s 1 1 1"], Float[Tensor, "b s 1 1 1"]]:
    """The 0.5th and 99.5th percentile of the foreground of each series; where hardly anything varies, a range of 1.

    Unless they are to be exact, they are taken from voxels at equal distances, see `NUM_SAMPLED`: sorting all would cost more
    than it tells. Nothing here waits for the device.
    """
    inside = torch.where(foreground(volume), volume.float(), torch.nan).flatten(2)
    step, plane = 1 if exact else max(1, inside.shape[2] // NUM_SAMPLED), volume.shape[3] * volume.shape[4]
    # in rows of another length every time
    while math.gcd(step, plane) > 1:
        step += 1
    # made on the device
    shares = torch.linspace(LOW, HIGH, 2, device=volume.device)
    low, high = torch.nanquantile(inside[..., ::step], shares, dim=2).nan_to_num()[..., None, None, None]
    return low, torch.where(high - low > 1e-3, high, low + 1)


def scaled(volume: Float[Tensor, "b s z y x"], low: Tensor, high: Tensor) -> Float[Tensor, "b s z y x"]:
    """Intensities from 0 to 1, those beyond a `percentile_range` clipped."""
    return ((volume.float() - low) / (high - low)).clamp(0, 1)
