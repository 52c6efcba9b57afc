"""Vox2Vec: a voxel has the same features in two boxes that hold it, unlike all other voxels (Goncharov et al., MICCAI 2023).

Both boxes are cut from one crop on the device, without resampling. docs/methods.md says which numbers are published and which are
ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_csm.data.crops import MIN_SPAN
from nnunet_csm.data.draws import Draws, What
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import build_encoder, encoder_class
from nnunet_csm.model.pyramid import Pyramid
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import Batch, Drawn, Pretext, Setup
from nnunet_csm.pretext.dino import SAME_FEATURES, deviation
from nnunet_csm.pretext.info_nce import contrast, retrieved
from nnunet_csm.pretext.views import between, smoothed
from nnunet_csm.schema import NotNegative, Positive, Share, ShareBelowOne, Size, Width, Within

NUM_VIEWS = 2
# integers for the voxel that both views hold and for their places, and uniform numbers for each series of a view
OF_PLACES, OF_SERIES = 1 + 3 * NUM_VIEWS, 8
# edge in voxels of a block that is background when no series varies in it
BLOCK = 4
# of the values of a series: no range
TINY = 1e-6


Percentile = Annotated[float, Within(0, 100)]
AtLeastTwo = Annotated[int, Within(2, 2**24)]


@dataclass(frozen=True)
class ChangeSettings:
    """How each series of a view changes by itself.

    Attributes:
        smoothed: probability that it is smoothed or sharpened.
        noisy: probability of noise.
        noise: most that the deviation of noise is, as a share of the range of its foreground.
        windowed: probability that its values are cut off and their curve changes.
        window: least and most percentile of the foreground below which values are cut off, then those above which they are.
        gamma: least and most exponent of values scaled to 0 to 1.
    """

    smoothed: Share = 0.5
    noisy: Share = 0.5
    noise: NotNegative = 0.1
    windowed: Share = 0.8
    window: tuple[Percentile, Percentile, Percentile, Percentile] = (0.0, 5.0, 90.0, 100.0)
    gamma: tuple[Positive, Positive] = (0.7, 1.5)


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        margin: how much longer a crop is than a view, as a share of each axis.
        num_voxels: of a pair of views, in both of them.
        most_voxels: of all pairs that are drawn together; each then has the fewer.
        num_outputs: numbers that the projection makes of the features of a voxel.
        temperature: of the softmax over similarities.
    """

    margin: ShareBelowOne = 0.5
    num_voxels: AtLeastTwo = 1024
    most_voxels: AtLeastTwo = 10240
    num_outputs: Width = 128
    temperature: Positive = 0.1
    changes: ChangeSettings = field(default_factory=ChangeSettings)


@dataclass(frozen=True)
class VoxelPairs(Drawn):
    """Where views lie in their crop, the voxels that are compared, and what becomes of the series."""

    start: Int[Tensor, "b 2 3"]
    """First voxel of each view along (z, y, x) of the crop."""
    voxels: Int[Tensor, "b n 3"]
    """Along (z, y, x) of the crop, in both views."""
    valid: Bool[Tensor, "b n"]
    """Voxels that count; the others stand in where there are fewer, and repeat some."""
    smoothing: Float[Tensor, "b 2 s"]
    """As in `views.Views`."""
    noise: Float[Tensor, "b 2 s"]
    """Standard deviation."""
    windowed: Bool[Tensor, "b 2 s"]
    window: Float[Tensor, "b 2 s 2"]
    """Values at which others are cut off, below and above."""
    span: Float[Tensor, "b 2 s 2"]
    """Least and largest value of the foreground, which the window is stretched to."""
    gamma: Float[Tensor, "b 2 s"]


class Vox2Vec(Pretext):
    """A pyramid of features and a projection of those of a voxel; the pyramid is what is transferred."""

    Settings, Draw, parts = Settings, VoxelPairs, ("retrieved", "feature_deviation")
    # the voxels of noise
    network_draws = True
    encoder: Pyramid

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.encoder = build_encoder(setup.architecture)  # type: ignore[assignment]
        width = sum(self.encoder.level_widths)
        # norms keep no statistics: those of a batch are all that a validation compares by, and no rank has others
        self.projector = nn.Sequential(
            nn.Linear(width, width),
            nn.BatchNorm1d(width, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(width, setup.settings.num_outputs),
        )

    @classmethod
    def check(cls, settings: Any, architecture: Architecture, where: str) -> None:
        changes = settings.changes
        if not issubclass(encoder_class(architecture), Pyramid):
            raise UserError(
                f"{where}: {cls.__name__} compares voxels by maps of many resolutions, but encoder.kind in arch_kwargs is "
                f"{architecture.encoder.kind!r}; set it to 'fpn', or the name of the pretext to 'csm'"
            )
        if list(changes.window) != sorted(changes.window):
            raise UserError(f"{where}.changes.window is {list(changes.window)}, expected four percentiles, 0 to 100, that rise")
        least, most = changes.gamma
        if least > most:
            raise UserError(f"{where}.changes.gamma is {least}, {most}, expected two exponents, 0 < least <= most")

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        s = setup.settings
        view, crop = (" x ".join(map(str, size)) for size in (setup.patch_size, crop_size(setup.patch_size, s.margin)))
        return [
            (
                "views",
                f"{NUM_VIEWS} of {view} voxels",
                f"of a crop of {crop}; both hold a voxel drawn from its foreground, and every series changes by itself",
            ),
            (
                "voxels",
                f"{s.num_voxels} a pair",
                f"of the foreground that both views show; at most {s.most_voxels} at once, which the pairs then share",
            ),
            ("temperature", f"{s.temperature:g}", f"of the similarities of {s.num_outputs} numbers, projected from all maps"),
        ]

    @property
    def crop_sizes(self) -> tuple[Size, ...]:
        """One crop that holds both views."""
        return (crop_size(self.setup.patch_size, self.settings.margin),)

    def draw(
        self, draws: Draws, present: Bool[Tensor, "b s"], variant: int, volumes: tuple[Tensor, ...], training: bool
    ) -> VoxelPairs:
        """Draw views, voxels and changes; what is not learned from gets no noise, whose voxels are drawn at every look."""
        (volume,), changes = volumes, self.settings.changes
        num, num_series, size = len(volume), volume.shape[1], volume.shape[2:]
        num_voxels = min(self.settings.num_voxels, max(2, self.settings.most_voxels // num))
        counted = foreground(volume)
        drawn = draws.integers(What.TOKENS, OF_PLACES)
        anchor = places(chosen(counted.flatten(1), drawn[:, :1])[0], size)
        start = boxes_around(anchor, drawn[:, 1:].view(num, NUM_VIEWS, 3), size, self.setup.patch_size)
        numbers, valid = chosen(
            (counted & overlap(start, size, self.setup.patch_size)).flatten(1), draws.integers(What.TOKENS, num_voxels, OF_PLACES)
        )
        # absent series and stand-ins change nothing here: values of the foreground, each as often as it was drawn
        values = volume.flatten(2).gather(2, numbers[:, None].expand(-1, num_series, -1)).float().sort(-1).values

        each = (NUM_VIEWS, num_series, OF_SERIES)
        uniform = draws.uniform(What.TOKENS, math.prod(each), OF_PLACES + num_voxels).unflatten(1, each)
        smooth, how, noisy, noise, window, low, high, gamma = uniform.unbind(-1)
        from_low, to_low, from_high, to_high = changes.window
        share = torch.stack([between(low, from_low, to_low), between(high, from_high, to_high)], -1) / 100
        values = values[:, None].expand(-1, NUM_VIEWS, -1, -1)
        span = torch.stack([values[..., 0], values[..., -1]], -1)
        return VoxelPairs(
            start,
            places(numbers, size),
            valid,
            smoothing=(smooth < changes.smoothed) * between(how, -1.0, 1.0),
            noise=(noisy < changes.noisy) * training * changes.noise * noise * (span[..., 1] - span[..., 0]),
            windowed=window < changes.windowed,
            window=values.gather(-1, (share * (num_voxels - 1)).round().long()),
            span=span,
            gamma=between(gamma, *changes.gamma),
        )

    @torch.no_grad()
    def views(self, volume: Float[Tensor, "b s _z _y _x"], drawn: VoxelPairs) -> Float[Tensor, "b 2 s z y x"]:
        """The views of crops, changed; what is 0 (no image, no series) stays 0."""
        views = cut_boxes(volume, drawn.start, self.setup.patch_size).float()
        noise, gamma, windowed = (t[..., None, None, None] for t in (drawn.noise, drawn.gamma, drawn.windowed))
        (low, high), (least, most) = (t[..., None, None, None, :].unbind(-1) for t in (drawn.window, drawn.span))
        made = smoothed(views, drawn.smoothing) + noise * torch.randn_like(views)
        share = ((made - low) / (high - low).clamp(min=TINY)).clamp(0.0, 1.0)
        made = torch.where(windowed, least + (most - least) * share**gamma, made)
        return torch.where(views == 0, views, made)

    def features(self, volume: Float[Tensor, "b s _z _y _x"], drawn: VoxelPairs) -> Float[Tensor, "2 m w"]:
        """What the maps hold of each voxel in the two views; m = b n, the voxels of all samples."""
        maps = self.encoder.maps(self.views(volume, drawn).flatten(0, 1))
        within = (drawn.voxels[:, None] - drawn.start[:, :, None]).flatten(0, 1)
        features = voxel_features(maps, within, self.setup.patch_size)
        return features.unflatten(0, (-1, NUM_VIEWS)).transpose(0, 1).flatten(1, 2)

    def projected(self, features: Float[Tensor, "2 m w"]) -> Float[Tensor, "2 m d"]:
        """Outputs of length 1, each view by itself in the norms."""
        return torch.stack([F.normalize(self.projector(view).float(), dim=-1) for view in features])

    def forward(self, *batch: Any) -> Float[Tensor, ""]:
        """The sum over the voxels of all samples; those of the same call are what they are told from."""
        volume, drawn = batch
        return contrast(self.projected(self.features(volume, drawn)), drawn.valid.flatten(), self.settings.temperature)

    def weight(self, drawn: Drawn) -> Tensor:
        """Voxels that count."""
        assert isinstance(drawn, VoxelPairs)
        return drawn.valid.sum().float()

    def validate(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        volume, drawn = batch.args
        features, num, valid = self.features(volume, drawn), self.weight(drawn), drawn.valid.flatten()
        outputs = self.projected(features)
        return {
            "loss": (contrast(outputs, valid, self.settings.temperature), num),
            "retrieved": (retrieved(outputs, valid), num),
            "feature_deviation": (deviation(features.transpose(0, 1)) * num, num),
        }

    def warning(self, log: Mapping[str, Sequence[float]]) -> str:
        if not log["feature_deviation"][-1] < SAME_FEATURES:
            return ""
        return (
            f"all voxels have the same features (deviation {log['feature_deviation'][-1]:.4f}): stop, and plan with another "
            f"pretext.temperature or a smaller learning rate"
        )

    def seen_tokens(self, present: Bool[Tensor, "c s"]) -> float:
        """Tokens of both views; all series are channels of one image."""
        return float(NUM_VIEWS * self.setup.num_tokens)


def crop_size(view: Size, margin: float) -> Size:
    """Voxels of a crop that holds views of a size."""
    z, y, x = (length + round(margin * length) for length in view)
    return z, y, x


def foreground(volume: Float[Tensor, "b s z y x"]) -> Bool[Tensor, "b z y x"]:
    """Voxels that are not 0 in all series, in blocks in which some series varies (a z-scored one has a deviation of 1)."""
    largest, smallest = (sign * F.max_pool3d(sign * volume, BLOCK, BLOCK, ceil_mode=True) for sign in (1, -1))
    varies = (largest - smallest > MIN_SPAN).any(1)
    z, y, x = (torch.arange(length, device=volume.device) // BLOCK for length in volume.shape[2:])
    return varies[:, z[:, None, None], y[:, None], x] & (volume != 0).any(1)


def chosen(counted: Bool[Tensor, "b v"], drawn: Int[Tensor, "b n"]) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Choose n of those that count, none twice: one of each of n runs of nearly equal length.

    Nothing here waits for the device, and no shape depends on how many there are.

    Args:
        counted: what can be chosen.
        drawn: uniform on [0, 2**63).

    Returns:
        Numbers in rising order, and which of them are chosen: all, or each that counts once where there are fewer than n. The
        others repeat some; where nothing counts, none is chosen.
    """
    num = drawn.shape[1]
    running = counted.cumsum(1, dtype=torch.int32)
    total = running[:, -1:].long()
    bounds = total * torch.arange(num + 1, device=counted.device) // num
    length = bounds.diff(dim=1)
    # 31 bits of a drawn number, so that the product is exact
    rank = (bounds[:, :-1] + (((drawn >> 32) * length) >> 31)).minimum(total - 1)
    number = torch.searchsorted(running, (rank + 1).clamp(min=1).int())
    return number.clamp(max=counted.shape[1] - 1), length > 0


def places(numbers: Int[Tensor, "b n"], size: Sequence[int]) -> Int[Tensor, "b n 3"]:
    """Places along (z, y, x) of voxels by their numbers in a volume of a size."""
    _, num_y, num_x = size
    return torch.stack([numbers // (num_y * num_x), numbers // num_x % num_y, numbers % num_x], -1)


def boxes_around(
    anchor: Int[Tensor, "b 1 3"], drawn: Int[Tensor, "b n 3"], crop: Sequence[int], view: Size
) -> Int[Tensor, "b n 3"]:
    """First voxels of boxes that are uniform among those within the crop that hold a voxel; `drawn` is uniform on [0, 2**63)."""
    starts = []
    for axis, (length, size) in enumerate(zip(crop, view, strict=True)):
        voxel, number = anchor[..., axis], drawn[..., axis]
        low, high = (voxel - size + 1).clamp(min=0), voxel.clamp(max=length - size)
        starts.append(low + (((number >> 32) * (high - low + 1)) >> 31))
    return torch.stack(starts, -1)


def overlap(start: Int[Tensor, "b n 3"], crop: Sequence[int], view: Size) -> Bool[Tensor, "b z y x"]:
    """Voxels of crops that are in all n boxes of a size."""
    first, last = start.amax(1), start.amin(1)
    within = []
    for axis, (length, size) in enumerate(zip(crop, view, strict=True)):
        place = torch.arange(length, device=start.device)
        within.append((place >= first[:, axis, None]) & (place < last[:, axis, None] + size))
    z, y, x = within
    return z[:, :, None, None] & y[:, None, :, None] & x[:, None, None, :]


def cut_boxes(volume: Float[Tensor, "b s _z _y _x"], start: Int[Tensor, "b n 3"], view: Size) -> Float[Tensor, "b n s z y x"]:
    """Cut boxes out of crops: index arithmetic, which does not wait for the device."""
    sample, series = (torch.arange(length, device=volume.device) for length in volume.shape[:2])
    z, y, x = (start[..., axis, None] + torch.arange(size, device=volume.device) for axis, size in enumerate(view))
    return volume[
        sample[:, None, None, None, None, None],
        series[:, None, None, None],
        z[:, :, None, :, None, None],
        y[:, :, None, None, :, None],
        x[:, :, None, None, None, :],
    ]


def voxel_features(
    maps: Sequence[Float[Tensor, "b _c _z _y _x"]], voxels: Int[Tensor, "b n 3"], size: Size
) -> Float[Tensor, "b n w"]:
    """What maps of an image of a size hold of its voxels, one map after the other: at place v // stride."""
    found = []
    for level in maps:
        z, y, x = (voxels[..., axis] // (length // level.shape[2 + axis]) for axis, length in enumerate(size))
        number = (z * level.shape[3] + y) * level.shape[4] + x
        # many voxels share a place of a coarse map, and 16 bits would lose much of the sum of their gradients
        exact = level if level.shape[2:] == size else level.float()
        found.append(exact.flatten(2).gather(2, number[:, None].expand(-1, level.shape[1], -1)))
    return torch.cat([values.float() for values in found], 1).transpose(1, 2)
