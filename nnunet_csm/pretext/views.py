"""Views of a patch for pretexts that compare them: boxes of it, resized, flipped, each series changed by itself."""

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nnunet_csm.pretext.base import Drawn
from nnunet_csm.schema import Size

NUM_GLOBAL = 2


@dataclass(frozen=True)
class ViewSettings:
    """What the views of a patch are.

    Attributes:
        num_local: views that only the student sees, beside two global ones that both see.
        global_grid: tokens along (z, y, x) of a global view; null: those of the patch.
        local_grid: of a local view; null: half of them, at least 2.
        global_scale: least and most of the patch's volume that a global view shows.
        local_scale: of a local one.
        flip: probability of a flip of each axis.
        changed: probability that contrast or, as often, noise of a series changes.
        contrast: most that its values are multiplied by, beside 1, and shifted by, in its standard deviations.
        noise: most that the deviation of noise is, in the same unit.
        smoothed: probability that a series is smoothed or sharpened in the first and second global view and in a local one.
    """

    num_local: int = 8
    global_grid: Size | None = None
    local_grid: Size | None = None
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    flip: float = 0.5
    changed: float = 0.8
    contrast: float = 0.3
    noise: float = 0.1
    smoothed: tuple[float, float, float] = (1.0, 0.1, 0.5)

    def grids(self, patch: Size) -> tuple[Size, Size]:
        """Tokens along (z, y, x) of a global and of a local view of a patch with so many."""
        z, y, x = (min(n, max(2, n // 2)) for n in patch)
        return self.global_grid or patch, self.local_grid or (z, y, x)


@dataclass(frozen=True)
class Views(Drawn):
    """Where views lie in their patch, whose edges are -1 and 1, and what becomes of their series; global views first."""

    half_edge: Float[Tensor, "b n 3"]
    """Along (z, y, x); below 0 where the axis is flipped."""
    centre: Float[Tensor, "b n 3"]
    factor: Float[Tensor, "b n s"]
    shift: Float[Tensor, "b n s"]
    noise: Float[Tensor, "b n s"]
    """Standard deviation."""
    smoothing: Float[Tensor, "b n s"]
    """How far values go towards the mean of 3 x 3 x 3; below 0 away from it, which sharpens."""


def between(uniform: Tensor, low: float, high: float) -> Tensor:
    """Numbers that are uniform on [0, 1), uniform on [low, high)."""
    return low + (high - low) * uniform


def global_and_local(drawn: Views) -> tuple[Views, Views]:
    """The draws of the global views, and of the others."""
    return Views(*(t[:, :NUM_GLOBAL] for t in drawn.tensors)), Views(*(t[:, NUM_GLOBAL:] for t in drawn.tensors))


def cut_views(
    volume: Float[Tensor, "b s _z _y _x"], half_edge: Float[Tensor, "b n 3"], centre: Float[Tensor, "b n 3"], size: Size
) -> Float[Tensor, "b n s z y x"]:
    """Cut boxes out of patches and resize them, trilinearly; see `Views` for what the numbers mean."""
    along = []
    for axis, num in enumerate(size):
        # centres of voxels; a product of matrices (`affine_grid`) would be one of 16 bits
        steps = (2 * torch.arange(num, device=volume.device) + 1) / num - 1
        along.append(centre[..., axis, None] + half_edge[..., axis, None] * steps)
    z, y, x = along
    places = torch.broadcast_tensors(x[:, :, None, None, :], y[:, :, None, :, None], z[:, :, :, None, None])
    # views one behind the other, so that no patch is copied for each
    seen = F.grid_sample(volume, torch.stack(places, -1).flatten(1, 2), padding_mode="border", align_corners=False)
    return rearrange(seen, "b s (n z) y x -> b n s z y x", n=centre.shape[1])


def changed(views: Float[Tensor, "b n s z y x"], drawn: Views) -> Float[Tensor, "b n s z y x"]:
    """Smooth or sharpen, change contrast and add noise, each series by itself; what is 0 (no image, no series) stays 0."""
    factor, shift, noise = (t[..., None, None, None] for t in (drawn.factor, drawn.shift, drawn.noise))
    made = smoothed(views, drawn.smoothing) * factor + shift + noise * torch.randn_like(views)
    return torch.where(views == 0, views, made)


def smoothed(views: Float[Tensor, "b n s z y x"], smoothing: Float[Tensor, "b n s"]) -> Float[Tensor, "b n s z y x"]:
    """Smooth or sharpen, see `Views.smoothing`."""
    means = F.avg_pool3d(views.flatten(0, 1), 3, stride=1, padding=1, count_include_pad=False).view_as(views)
    return torch.lerp(views, means, smoothing[..., None, None, None])
