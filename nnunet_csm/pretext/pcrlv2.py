"""PCRLv2: restore a view, and predict from each of its levels what other views tell there (Zhou et al., TPAMI 2023).

Views are cut from one patch on the device, see `pairs.py`. docs/methods.md says which numbers are published and which are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_csm.data.draws import Draws
from nnunet_csm.data.intensities import percentile_range
from nnunet_csm.errors import UserError
from nnunet_csm.figures.reconstructions import save_restoration
from nnunet_csm.model.encoder import build_encoder, encoder_class
from nnunet_csm.model.planned import series_present
from nnunet_csm.model.pyramid import Norm, Pyramid, convolution
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import Batch, Pretext, Setup
from nnunet_csm.pretext.dino import deviation
from nnunet_csm.pretext.pairs import Pairs, PairSettings, block_size, draw_pairs, num_blocks, swap
from nnunet_csm.pretext.views import NUM_GLOBAL, changed, cut_views, global_and_local
from nnunet_csm.schema import Size

# means over places that differ less than this from sample to sample, of 1 where they have nothing in common; none of them is
# below 0, and untrained ones differ by 0.007 on real patches
SAME_FEATURES = 0.001


@dataclass(frozen=True)
class Settings:
    """What is compared; the sizes of the decoder and its heads follow from the encoder's."""

    views: PairSettings = field(default_factory=PairSettings)


class Decoder(nn.Module):
    """From the coarsest map of an encoder up to full resolution, without skips."""

    def __init__(self, encoder: Pyramid) -> None:
        super().__init__()
        levels = list(
            zip(encoder.level_widths[:-1], encoder.level_widths[1:], encoder.strides, encoder.kernels[:-1], strict=True)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose3d(below, below, stride, stride),
                *(convolution(below, width, kernel), Norm(width), nn.ReLU()),
                *(convolution(width, width, kernel), Norm(width), nn.ReLU()),
            )
            for width, below, stride, kernel in reversed(levels)
        )

    def forward(self, x: Float[Tensor, "n c z y x"]) -> list[Tensor]:
        """The map of every level, coarsest first."""
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps


@dataclass(frozen=True)
class Told:
    """What a level tells of views, z, and what it predicts of what is told of others, q."""

    z: Float[Tensor, "b n c"]
    q: Float[Tensor, "b n c"]

    def view(self, number: int) -> "Told":
        """One of the views."""
        return Told(self.z[:, number : number + 1], self.q[:, number : number + 1])


class Head(nn.Module):
    """What a level tells of views, z, and what it predicts of what is told of others, q, over the samples of a step.

    Batch norms keep no running statistics: validation, too, is over its batch, and nothing is to be exchanged between ranks.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, track_running_stats=False)
        hidden = 2 * width
        norm = nn.BatchNorm1d(hidden, track_running_stats=False)
        self.prediction = nn.Sequential(nn.Linear(width, hidden), norm, nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Float[Tensor, "n c z y x"]) -> tuple[Float[Tensor, "n c"], Float[Tensor, "n c"]]:
        means = x.mean((2, 3, 4), dtype=torch.float)
        # the cosine of what 16 bits have rounded would not tell much of small differences
        with torch.autocast(means.device.type, enabled=False):
            z = self.norm(means)
            return z, self.prediction(z)


class Restored(nn.Module):
    """One image that a level restores, on its own grid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv3d(width, 1, 3, padding=1, bias=False), nn.BatchNorm3d(1, track_running_stats=False))

    def forward(self, x: Float[Tensor, "n c z y x"]) -> Float[Tensor, "n 1 z y x"]:
        return self.layers(x).sigmoid()


@dataclass(frozen=True)
class Terms:
    """The terms of the loss of each sample, of weight 1 but for `level_reconstruction`, whose weight falls."""

    reconstruction: Float[Tensor, " b"]
    level_reconstruction: Float[Tensor, " b"]
    global_similarity: Float[Tensor, " b"]
    local_similarity: Float[Tensor, " b"]

    def sum(self, beta: float | Tensor) -> Float[Tensor, ""]:
        """The loss, summed over samples."""
        total = self.reconstruction + beta * self.level_reconstruction + self.global_similarity + self.local_similarity
        return total.sum()


class PCRLv2(Pretext):
    """An encoder, a decoder without skips, and at each of its levels a head and an image that is restored.

    The first global view is restored, as it was before it was changed; the second and the local ones never are.
    """

    Settings, Draw = Settings, Pairs
    parts = ("reconstruction", "level_reconstruction", "global_similarity", "local_similarity", "feature_deviation")
    # the voxels of noise
    network_draws = True
    encoder: Pyramid
    beta: Tensor

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.encoder = build_encoder(setup.architecture)  # type: ignore[assignment]
        self.decoder = Decoder(self.encoder)
        widths = self.encoder.level_widths
        self.heads = nn.ModuleList(Head(width) for width in reversed(widths[:-1]))
        self.restored = nn.ModuleList(Restored(width) for width in reversed(widths[:-1]))
        self.output = nn.Sequential(nn.Conv3d(widths[0], setup.num_series, 1), nn.Sigmoid())
        # weight of what levels restore; a tensor, so that a graph reads it
        self.register_buffer("beta", torch.ones(()))

    @classmethod
    def check(cls, settings: Any, architecture: Architecture, where: str) -> None:
        settings.views.check(f"{where}.views")
        if not issubclass(encoder_class(architecture), Pyramid):
            raise UserError(
                f"{where}: PCRLv2 restores from the maps of a convolutional encoder, but encoder.kind in arch_kwargs is "
                f"{architecture.encoder.kind!r}; set it to 'plain_unet', or plan with the preset pcrlv2"
            )

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        v = setup.settings.views
        large, small = (" x ".join(map(str, size)) for size in v.sizes(setup.grid, setup.architecture.token_size))
        (low, high), (least, most) = v.global_scale, v.local_scale
        return [
            (
                "views",
                f"{NUM_GLOBAL} of {large} and {v.num_local} of {small} voxels",
                f"{100 * low:g}% to {100 * high:g}% and {100 * least:g}% to {100 * most:g}% of a patch, in which every series "
                f"changes by itself; the two have {v.overlap:.0%} or more in common",
            ),
            (
                "restored",
                f"{setup.num_series} series of the first view",
                f"from 0 to 1, by a decoder without skips; {v.swapped:.0%} of its blocks have traded places",
            ),
        ]

    @property
    def sizes(self) -> tuple[Size, Size]:
        """Voxels along (z, y, x) of a global and of a local view."""
        return self.settings.views.sizes(self.setup.grid, self.setup.architecture.token_size)

    def draw(
        self, draws: Draws, present: Bool[Tensor, "b s"], variant: int, volumes: tuple[Tensor, ...], training: bool
    ) -> Pairs:
        blocks = num_blocks(self.sizes[0], self.setup.architecture.token_size)
        return draw_pairs(draws, self.settings.views, present.shape[1], len(self.heads), blocks, training)

    def views(self, volume: Float[Tensor, "b s z y x"], drawn: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        """The global and the local views of patches, each (b, n, s, z, y, x), and the first one before it was changed."""
        # volumes come as fp16
        large, small = (
            cut_views(volume.float(), part.half_edge, part.centre, size)
            for part, size in zip(global_and_local(drawn), self.sizes, strict=True)
        )
        of_large, of_small = global_and_local(drawn)
        moved = swap(
            changed(large, of_large).flatten(0, 1), drawn.source.flatten(0, 1), block_size(self.setup.architecture.token_size)
        )
        return moved.view_as(large), changed(small, of_small), large[:, 0]

    def decoded(self, views: Float[Tensor, "b n s z y x"]) -> tuple[Float[Tensor, "b n e"], list[Tensor]]:
        """The mean of the encoder's coarsest map of each view, and the decoder's maps (b, n, c, z, y, x), coarsest first."""
        num_views = views.shape[1]
        coarsest = self.encoder.maps(views.flatten(0, 1))[-1]
        means = coarsest.mean((2, 3, 4), dtype=torch.float).unflatten(0, (-1, num_views))
        return means, [level.unflatten(0, (-1, num_views)) for level in self.decoder(coarsest)]

    def compared(self, volume: Float[Tensor, "b s z y x"], drawn: Pairs) -> tuple[Terms, Float[Tensor, "b 2 e"]]:
        """The terms of the loss of each sample, and the features of its global views.

        Raises:
            UserError: a single sample, whose batch norm would be 0.
        """
        if len(volume) == 1:
            raise UserError(
                "the heads of pcrlv2 normalise over the samples of a step, and this step has one; plan with a larger batch for "
                "pretraining (a larger -gpu_memory_target), or train on fewer ranks or in fewer parts (-accumulate), of 2 or more"
            )
        present = series_present(volume)
        global_views, local_views, clean = self.views(volume, drawn)
        features, of_large = self.decoded(global_views)
        _, of_small = self.decoded(local_views)
        target, weight = grey_levels(clean, *percentile_range(volume)), present.float() / present.sum(1, keepdim=True)
        told = [of_views(head, maps, apart=True) for head, maps in zip(self.heads, of_large, strict=True)]
        told_locally = [of_views(head, maps, apart=False) for head, maps in zip(self.heads, of_small, strict=True)]
        wanted = (target * weight[:, :, None, None, None]).sum(1, keepdim=True)
        errors = [
            # squares of 16 bits would be rounded
            squared_error(F.interpolate(restored(maps[:, 0]).float(), wanted.shape[2:], mode="trilinear"), wanted)
            for restored, maps in zip(self.restored, of_large, strict=True)
        ]
        of_batch, of_locals = drawn.level[:, :1], drawn.level[:, 1:]
        terms = Terms(
            (squared_error(self.output(of_large[-1][:, 0]).float(), target) * weight).sum(1),
            at_levels(errors, of_batch),
            at_levels([unlikeness(large.view(0), large.view(1)) for large in told], of_batch),
            at_levels([to_globals(small, large) for small, large in zip(told_locally, told, strict=True)], of_locals),
        )
        return terms, features

    def forward(self, *batch: Any) -> Float[Tensor, ""]:
        return self.compared(*batch)[0].sum(self.beta)

    def validate(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums of the loss, in which the weight of what levels restore does not fall, and of its terms."""
        terms, features = self.compared(*batch.args)
        num = self.weight(batch.drawn)
        of_terms = {name: (value.sum(), num) for name, value in vars(terms).items()}
        return {"loss": (terms.sum(1.0), num), **of_terms, "feature_deviation": (deviation(features) * num, num)}

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        self.beta.fill_((1 + math.cos(math.pi * done)) / 2)

    def warning(self, log: Mapping[str, Sequence[float]]) -> str:
        spread = log["feature_deviation"][-1]
        if not spread < SAME_FEATURES:
            return ""
        return (
            f"the encoder tells samples no longer apart (features deviate by {spread:.4f}): stop, and plan with a smaller "
            f"learning rate or weaker changes (pretext.views)"
        )

    def seen_tokens(self, present: Bool[Tensor, "c s"]) -> float:
        """Tokens of all views, each of all series."""
        large, small = map(math.prod, self.settings.views.grids(self.setup.grid))
        return float(NUM_GLOBAL * large + self.settings.views.num_local * small)

    @torch.no_grad()
    def picture(self, path: Path, batch: Batch, title: str) -> None:
        """The first view as it was, as the encoder is given it, as it is restored, and the difference, a row for each series."""
        (volume,), drawn = batch.volumes, batch.drawn
        assert isinstance(drawn, Pairs)
        large, _, clean = self.views(volume, drawn)
        _, maps = self.decoded(large[:, :1])
        target, restored = grey_levels(clean, *percentile_range(volume)), self.output(maps[-1][:, 0])
        view, seen, found = (t[0].float().cpu().numpy() for t in (target, large[:, 0], restored))
        present = series_present(volume)[0].cpu().numpy()
        save_restoration(path, view, seen, found, self.setup.architecture.series, present, title)


def grey_levels(
    views: Float[Tensor, "b s z y x"], low: Float[Tensor, "b s 1 1 1"], high: Float[Tensor, "b s 1 1 1"]
) -> Float[Tensor, "b s z y x"]:
    """Voxels from 0 at `low` to 1 at `high`, and not beyond; what is 0 (no image, no series) stays 0."""
    scaled = ((views - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return torch.where(views == 0, 0.0, scaled)


def squared_error(found: Float[Tensor, "b s z y x"], wanted: Float[Tensor, "b s z y x"]) -> Float[Tensor, "b s"]:
    """The mean over voxels."""
    return (found - wanted).square().mean((2, 3, 4))


def at_levels(found: Sequence[Float[Tensor, "b n"]], level: Int[Tensor, "b n"]) -> Float[Tensor, " b"]:
    """What was found at the levels that were drawn, of what was found at each, the mean over n."""
    return torch.stack(list(found), -1).gather(-1, level[..., None]).mean((1, 2))


def of_views(head: nn.Module, maps: Float[Tensor, "b n c z y x"], apart: bool) -> Told:
    """What a level tells of views, normalised over the samples, of each view by itself or of all together."""
    if apart:
        z, q = zip(*(head(view) for view in maps.unbind(1)), strict=True)
        return Told(torch.stack(z, 1), torch.stack(q, 1))
    z, q = (told.unflatten(0, maps.shape[:2]) for told in head(maps.flatten(0, 1)))
    return Told(z, q)


def unlikeness(one: Told, other: Told) -> Float[Tensor, "b n"]:
    """From -1, where each of two views predicts what is told of the other, to 1; no gradient goes into what is told."""
    return -(F.cosine_similarity(one.q, other.z.detach(), -1) + F.cosine_similarity(other.q, one.z.detach(), -1)) / 2


def to_globals(local: Told, told: Told) -> Float[Tensor, "b n"]:
    """Compare each local view with both global ones of its own sample, the mean."""
    return torch.stack([unlikeness(local, told.view(number)) for number in range(NUM_GLOBAL)]).mean(0)
