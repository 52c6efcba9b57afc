"""Views as PCRLv2 draws them: two global ones that overlap, with blocks that trade places, and local ones near both."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.errors import UserError
from nnunet_csm.model.tokens import grid_size, to_tokens, to_volume
from nnunet_csm.pretext.views import NUM_GLOBAL, Views, ViewSettings, between, draw_views
from nnunet_csm.schema import Depth, NotNegative, Share, ShareAboveZero, ShareBelowOne, Size

# places drawn for the second global view, of which the first that overlaps enough is taken
NUM_CANDIDATES = 8


@dataclass(frozen=True)
class PairSettings(ViewSettings):
    """What the views of a patch are, beside the fields of `ViewSettings`.

    Attributes:
        global_grid: tokens along (z, y, x) of a global view; null: two thirds of those of the patch, at least 2.
        local_grid: of a local view; null: a sixth of them, at least 2.
        overlap: least that the two global views have in common, over what they cover together.
        margin: how far the first corner of a local view may lie outside of the box around both global ones, as a share of the
            patch's edges.
        swapped: share of the blocks of a global view that trade places, which are half a token long.
    """

    num_local: Depth = 6
    global_scale: tuple[ShareAboveZero, ShareAboveZero] = (0.2, 0.6)
    local_scale: tuple[ShareAboveZero, ShareAboveZero] = (0.0006, 0.04)
    changed: Share = 1.0
    noise: NotNegative = 1.25
    smoothed: tuple[Share, Share, Share] = (1.0, 1.0, 1.0)
    overlap: ShareBelowOne = 0.3
    margin: ShareBelowOne = 0.03
    swapped: ShareBelowOne = 0.2

    def grids(self, patch: Size) -> tuple[Size, Size]:
        """Tokens along (z, y, x) of a global and of a local view of a patch with so many."""
        z, y, x = (max(min(n, 2), round(2 * n / 3)) for n in patch)
        lz, ly, lx = (min(n, max(2, n // 6)) for n in patch)
        return self.global_grid or (z, y, x), self.local_grid or (lz, ly, lx)

    def check(self, where: str) -> None:
        super().check(where)
        least, most = self.global_scale
        # one view within the other
        if least / most <= self.overlap:
            raise UserError(
                f"{where}.global_scale is {least}, {most}: views of these sizes may have only {least / most:.3g} in common, "
                f"but overlap is {self.overlap}; let the sizes differ less, or ask for less overlap"
            )
        if self.local_scale[1] > least:
            raise UserError(
                f"{where}.local_scale is {self.local_scale[0]}, {self.local_scale[1]}, expected at most the least global_scale, "
                f"{least}"
            )


@dataclass(frozen=True)
class Pairs(Views):
    """Views, and what else is drawn for a batch."""

    level: Int[Tensor, "b k"]
    """Levels at which the two global views are compared, and each local one with both: the same for all samples of a batch."""
    source: Int[Tensor, "b 2 l"]
    """The block that stands in place of each block of a global view."""


def draw_pairs(draws: Draws, v: PairSettings, num_series: int, num_levels: int, num_blocks: int, training: bool) -> Pairs:
    """Draw views, levels and swaps. Nothing waits for the device, and no shape depends on what is drawn.

    Args:
        draws: source of all randomness; of its numbers for tokens, those from 0 on are used.
        v: settings.
        num_series: of a patch.
        num_levels: of the decoder.
        num_blocks: of a global view, see `swapped`.
        training: whether the batch is learned from.
    """
    views = draw_views(draws, v, num_series, training)
    first = v.num_drawn(num_series)
    num_places = NUM_CANDIDATES - 1 + v.num_local
    uniform = draws.uniform(What.TOKENS, 3 * num_places, first).unflatten(1, (num_places, 3))
    candidates, corners = uniform[:, : NUM_CANDIDATES - 1], uniform[:, NUM_CANDIDATES - 1 :]
    first += 3 * num_places
    # of all samples, of all ranks: that of the first
    of_batch = Draws(draws.key, torch.zeros_like(draws.samples[:1]))
    level = (of_batch.uniform(What.TOKENS, 1 + v.num_local, first) * num_levels).long().repeat(len(uniform), 1)
    order = draws.integers(What.TOKENS, NUM_GLOBAL * num_blocks, first + 1 + v.num_local).unflatten(1, (NUM_GLOBAL, num_blocks))
    placed = vars(views) | {"centre": places(views, candidates, corners, v)}
    return Pairs(**placed, level=level, source=trade_places(order, round(v.swapped * num_blocks)))


def places(
    views: Views, candidates: Float[Tensor, "b k 3"], corners: Float[Tensor, "b n 3"], v: PairSettings
) -> Float[Tensor, "b m 3"]:
    """Centres of all views: of the second, the first that lets the global ones overlap enough; of local ones, near both.

    The last place that is tried for the second has one view within the other as far as their sizes let them, which is enough,
    see `PairSettings.check`.

    Args:
        views: with sizes as they are to be; the centres of the two global ones are the first that are tried.
        candidates: other places of the second, uniform on [0, 1).
        corners: of the local ones, uniform on [0, 1).
        v: settings.
    """
    half = views.half_edge.abs()
    one, two, local = half[:, :1], half[:, 1:2], half[:, NUM_GLOBAL:]
    centre, room = views.centre[:, :1], 1 - two
    nested = centre.minimum(room).maximum(-room)
    tried = torch.cat([views.centre[:, 1:2], between(candidates, -1.0, 1.0) * room, nested], 1)
    # the first among equals
    best = (overlap(one, centre, two, tried) >= v.overlap).float().argmax(1)
    second = tried.gather(1, best[:, None, None].expand(-1, 1, 3))
    low = torch.minimum(centre - one, second - two) - 2 * v.margin
    high = torch.maximum(centre + one, second + two) + 2 * v.margin
    # within the patch
    low, high = low.clamp(min=-1), high.minimum(1 - 2 * local)
    return torch.cat([centre, second, low + (high - low) * corners + local], 1)


def overlap(
    half: Float[Tensor, "b 1 3"], centre: Float[Tensor, "b 1 3"], others: Float[Tensor, "b 1 3"], at: Float[Tensor, "b k 3"]
) -> Float[Tensor, "b k"]:
    """Intersection over union of boxes, by halves of their edges and centres."""
    common = (torch.minimum(centre + half, at + others) - torch.maximum(centre - half, at - others)).clamp(min=0).prod(-1)
    return common / ((2 * half).prod(-1) + (2 * others).prod(-1) - common)


def trade_places(order: Int[Tensor, "b n l"], num: int) -> Int[Tensor, "b n l"]:
    """Where each of l blocks comes from: the `num` of the lowest order each go to the place of the next, in a ring."""
    moved = order.argsort(-1)[..., :num]
    stay = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return stay.scatter(-1, moved, moved.roll(1, -1))


def block_size(token_size: Size) -> Size:
    """Voxels of a block: half a token, at least one."""
    z, y, x = (max(1, t // 2) for t in token_size)
    return z, y, x


def num_blocks(size: Size, token_size: Size) -> int:
    """Blocks of a view of so many voxels."""
    return math.prod(grid_size(size, block_size(token_size)))


def swap(views: Float[Tensor, "n s z y x"], source: Int[Tensor, "n l"], block: Size) -> Float[Tensor, "n s z y x"]:
    """Views whose blocks come from where `source` says, of all series alike."""
    tokens = to_tokens(views, block)
    moved = tokens.gather(2, source[:, None, :, None].expand_as(tokens))
    return to_volume(moved, grid_size((views.shape[2], views.shape[3], views.shape[4]), block), block)
