"""MAE3D: masked autoencoding with joint tokens (Zhou et al., "Self pre-training with masked autoencoders ...", ISBI 2023).

One token holds a cube's voxels of all series, and one mask serves all of them. It stands beside CSM so that the two can be
compared: encoder size, draws, schedule and fine-tuning are the same. So, on purpose, these are CSM's and not as published: no
class token; decoder tokens attend to visible tokens only; optimiser, schedule, crops and flips. See docs/paper.md.

Plans of before version 3 chose it by `joint_tokens` in `arch_kwargs`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.joint_vit import JointViT
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.tokens import Size, coordinates, join, select, separate
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import Setup
from nnunet_csm.pretext.masking import Mask, apart, ask_some, num_visible, smallest, without_background
from nnunet_csm.pretext.rebuilding import Rebuilding, Reconstruction, TokenError, check_ratio


@dataclass(frozen=True)
class PlaceMasking:
    """What is hidden, of all series at once.

    Attributes:
        mask_ratio: share of the joint tokens that are hidden.
        background: whether hidden tokens in which nothing varies are rebuilt or stay out of the loss.
    """

    mask_ratio: float
    background: Literal["rebuilt", "ignored"] = "rebuilt"


@dataclass(frozen=True)
class Settings:
    """What is hidden, and what rebuilds it."""

    masking: PlaceMasking
    reconstruction: Reconstruction


class MAE3D(Rebuilding):
    """Encoder and decoder of pretraining on joint tokens.

    The targets are the voxels or, as published, each joint token normalised by its mean and deviation over the voxels of all
    present series. Absent series are zero in the volume, and any that is counts as absent there. Errors are those of each
    series in a joint token.
    """

    Settings = Settings
    encoder: JointViT

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        a, r = setup.architecture, setup.settings.reconstruction
        # no drop path, as in CSM
        self.encoder = build_encoder(a)  # type: ignore[assignment]
        num_voxels = len(a.series) * math.prod(a.token_size)
        self.decoder = ReconstructionDecoder(1, num_voxels, a.width, r.width, r.depth, r.num_heads, a.encoder)
        self.error = TokenError()

    @classmethod
    def check(cls, settings: Any, architecture: Architecture, where: str) -> None:
        super().check(settings, architecture, where)
        check_ratio(settings.masking.mask_ratio, f"{where}.masking")
        if architecture.encoder.kind != "joint_vit":
            raise UserError(
                f"{where}: MAE3D hides a place in all series, but encoder.kind in arch_kwargs is {architecture.encoder.kind!r}; "
                f"set it to 'joint_vit', or the name of the pretext to 'csm'"
            )

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        masking = setup.settings.masking
        visible = num_visible(setup.num_tokens, masking.mask_ratio)
        what, value, why = setup.settings.reconstruction.told
        why += "" if masking.background == "rebuilt" else "; background left out"
        return [
            ("mask ratio", f"{masking.mask_ratio:g}", f"{visible} of {setup.num_tokens} joint tokens stay visible"),
            ("series hidden whole", "none", f"a joint token holds all {setup.num_series} series"),
            (what, value, why),
        ]

    def draw(self, draws: Draws, present: Bool[Tensor, "b s"], variant: int, volumes: tuple[Tensor, ...], training: bool) -> Mask:
        masking = self.settings.masking
        mask = without_empty_series(draw_mask(draws, present, self.setup.num_tokens, masking.mask_ratio), volumes[0])
        if masking.background == "ignored":
            mask = without_background(mask, volumes[0], self.setup.architecture.token_size)
        share = self.settings.reconstruction.rebuilt_share
        return ask_some(mask, draws, share, self.setup.num_series) if training else mask

    def predicted(self, tokens: Float[Tensor, "b s l v"], mask: Mask, grid: Size) -> Float[Tensor, "b m v"]:
        # volumes come as fp16
        encoded = self.encoder(select(join(tokens), mask.visible).float(), coordinates(mask.visible, grid))[-1]
        num_series = tokens.shape[1]
        # the numbers of the first series are those of joint tokens
        places = mask.asked[:, : mask.asked.shape[1] // num_series]
        return separate(self.decoder(encoded, mask.visible, places, grid)[:, None], num_series).flatten(1, 2)

    def moments(self, tokens: Float[Tensor, "b n l v"], present: Bool[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
        """Moments of joint tokens, over the voxels of present series."""
        return joint_moments(tokens, present)

    def moments_of_asked(self, truth: Float[Tensor, "b m v"], tokens: Float[Tensor, "b s l v"]) -> tuple[Tensor, Tensor]:
        by_series = truth.unflatten(1, (tokens.shape[1], -1))
        mean, scale = self.moments(by_series, tokens.flatten(2).any(2))
        every = by_series.shape[:3]
        return mean.expand(*every, 1).flatten(1, 2), scale.expand(*every, 1).flatten(1, 2)

    def seen_tokens(self, present: Bool[Tensor, "c s"]) -> float:
        return float(num_visible(self.setup.num_tokens, self.settings.masking.mask_ratio))


def without_empty_series(mask: Mask, volume: Float[Tensor, "b s z y x"]) -> Mask:
    """A mask that asks for no series of which nothing is in the patch: a normalised target would be a constant."""
    return replace(mask, rebuilt=mask.rebuilt & volume.flatten(2).any(2)[..., None])


def joint_moments(
    tokens: Float[Tensor, "b s l v"], counted: Bool[Tensor, "b s"]
) -> tuple[Float[Tensor, "b 1 l 1"], Float[Tensor, "b 1 l 1"]]:
    """Mean and deviation of each joint token over the series that count; 0 and nearly 0 where none does."""
    weight = counted[:, :, None, None].to(tokens.dtype)
    num_voxels = counted.sum(1)[:, None, None, None] * tokens.shape[3]
    mean = (tokens * weight).sum((1, 3), keepdim=True) / num_voxels.clamp(min=1)
    variance = ((tokens - mean).square() * weight).sum((1, 3), keepdim=True) / (num_voxels - 1).clamp(min=1)
    return mean, (variance + 1e-6).sqrt()


def draw_mask(draws: Draws, series_present: Bool[Tensor, "b s"], num_tokens: int, mask_ratio: float) -> Mask:
    """Draw a mask for a batch of samples with any series: the places of `masking.draw_mask` with shared places.

    As there, nothing waits for the device.

    Args:
        draws: source of all randomness.
        series_present: series each sample has, which are to be rebuilt.
        num_tokens: joint tokens of a patch, l.
        mask_ratio: share of them that is hidden.

    Returns:
        `hidden` is the same for all series, absent ones included; `visible` numbers joint tokens; `asked`, as in CSM, the tokens
        of series, those of the first one first.
    """
    num_shown = num_visible(num_tokens, mask_ratio)
    hidden = ~smallest(draws.integers(What.TOKENS, num_tokens), num_shown)
    visible, asked = apart(hidden, num_shown)
    num_series = series_present.shape[1]
    everywhere = hidden[:, None].expand(-1, num_series, -1)
    asked = torch.cat([asked + series * num_tokens for series in range(num_series)], dim=1)
    return Mask(everywhere.contiguous(), everywhere & series_present[..., None], visible, asked)
