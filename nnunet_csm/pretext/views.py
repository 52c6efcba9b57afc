"""Views of a patch for pretexts that compare them: boxes of it, resized, flipped, each series changed by itself."""

from dataclasses import dataclass, fields

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.errors import UserError
from nnunet_csm.pretext.base import Drawn
from nnunet_csm.schema import Depth, NotNegative, Share, ShareAboveZero, Size

NUM_GLOBAL = 2
# uniform numbers for the place of a view, and for each of its series
OF_PLACE, OF_SERIES = 7, 5


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

    num_local: Depth = 8
    global_grid: Size | None = None
    local_grid: Size | None = None
    global_scale: tuple[ShareAboveZero, ShareAboveZero] = (0.4, 1.0)
    local_scale: tuple[ShareAboveZero, ShareAboveZero] = (0.05, 0.4)
    flip: Share = 0.5
    changed: Share = 0.8
    contrast: NotNegative = 0.3
    noise: NotNegative = 0.1
    smoothed: tuple[Share, Share, Share] = (1.0, 0.1, 0.5)

    def grids(self, patch: Size) -> tuple[Size, Size]:
        """Tokens along (z, y, x) of a global and of a local view of a patch with so many."""
        z, y, x = (min(n, max(2, n // 2)) for n in patch)
        return self.global_grid or patch, self.local_grid or (z, y, x)

    def sizes(self, patch: Size, token_size: Size) -> tuple[Size, Size]:
        """Voxels along (z, y, x) of a global and of a local view of a patch with so many tokens."""
        (z, y, x), (lz, ly, lx) = (tuple(n * t for n, t in zip(grid, token_size, strict=True)) for grid in self.grids(patch))
        return (z, y, x), (lz, ly, lx)

    def check(self, where: str) -> None:
        """Raise UserError when there can be no such views; `where` is what the message names."""
        for name in ("global_scale", "local_scale"):
            low, high = getattr(self, name)
            if low > high:
                raise UserError(f"{where}.{name} is {low}, {high}, expected the least and the most share, 0 < least <= most <= 1")

    def num_drawn(self, num_series: int) -> int:
        """Numbers of `What.TOKENS`, from 0 on, that `draw_views` takes for a sample."""
        return (NUM_GLOBAL + self.num_local) * (OF_PLACE + OF_SERIES * num_series)


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
    of_views = [getattr(drawn, field.name) for field in fields(Views)]
    return Views(*(t[:, :NUM_GLOBAL] for t in of_views)), Views(*(t[:, NUM_GLOBAL:] for t in of_views))


def draw_views(draws: Draws, v: ViewSettings, num_series: int, training: bool) -> Views:
    """Draw views anywhere in the patch; what is not learned from gets no noise, whose voxels would be drawn anew every time."""
    num_views, num_each = NUM_GLOBAL + v.num_local, OF_PLACE + OF_SERIES * num_series
    uniform = draws.uniform(What.TOKENS, num_views * num_each).unflatten(1, (num_views, num_each))
    share = torch.cat(
        [between(uniform[:, :NUM_GLOBAL, 0], *v.global_scale), between(uniform[:, NUM_GLOBAL:, 0], *v.local_scale)], 1
    )
    # the same share of every axis
    half_edge = share[..., None] ** (1 / 3)
    centre = between(uniform[..., 1:4], -1.0, 1.0) * (1 - half_edge)
    half_edge = torch.where(uniform[..., 4:7] < v.flip, -half_edge, half_edge)
    kind, one, other, chance, strength = uniform[..., OF_PLACE:].unflatten(-1, (num_series, OF_SERIES)).unbind(-1)
    contrast = kind < v.changed / 2
    noisy = ~contrast & (kind < v.changed) & training
    first, second, local = v.smoothed
    smoothed = torch.cat([chance[:, :1] < first, chance[:, 1:2] < second, chance[:, 2:] < local], 1)
    return Views(
        half_edge,
        centre,
        factor=1 + contrast * between(one, -v.contrast, v.contrast),
        shift=contrast * between(other, -v.contrast, v.contrast),
        noise=noisy * v.noise * one,
        smoothing=smoothed * between(strength, -1.0, 1.0),
    )


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
    # torch refuses a mean over more voxels than there are
    kernel = [3 if length >= 3 else 1 for length in views.shape[3:]]
    padding = [k // 2 for k in kernel]
    means = F.avg_pool3d(views.flatten(0, 1), kernel, stride=1, padding=padding, count_include_pad=False).view_as(views)
    return torch.lerp(views, means, smoothing[..., None, None, None])
