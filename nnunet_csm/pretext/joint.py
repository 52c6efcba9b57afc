"""Pretexts on joint tokens: a place is hidden in all series at once, and rebuilt in those that are there."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnunet_csm.data.draws import Draws
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.joint_vit import JointViT
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.tokens import Size, coordinates, join, select, separate
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import Setup
from nnunet_csm.pretext.masking import Mask, apart, ask_some, without_background
from nnunet_csm.pretext.rebuilding import Rebuilding, TokenError


class JointRebuilding(Rebuilding):
    """Encoder and decoder of pretraining on joint tokens; a subclass says how many places stay visible, and draws which.

    The targets are the voxels, or each joint token normalised by its mean and deviation over the voxels of all present series.
    Absent series are zero in the volume, and any that is counts as absent there. Errors are those of each series in a joint
    token. The settings have a `masking` with `mask_ratio` and `background`.
    """

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
        if settings.reconstruction.same_place != "none":
            raise UserError(
                f"{where}.reconstruction.same_place is {settings.reconstruction.same_place!r}, but a joint token is hidden in "
                f"all series, and nothing is visible at its place; leave it out, or set the name of the pretext to 'csm'"
            )
        if architecture.encoder.kind != "joint_vit":
            raise UserError(
                f"{where}: {cls.__name__} hides a place in all series, but encoder.kind in arch_kwargs is "
                f"{architecture.encoder.kind!r}; set it to 'joint_vit', or the name of the pretext to 'csm'"
            )

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        masking = setup.settings.masking
        what, value, why = setup.settings.reconstruction.told
        why += "" if masking.background == "rebuilt" else "; background left out"
        shown = f"{cls.num_shown(setup)} of {setup.num_tokens} joint tokens stay visible"
        return [
            ("mask ratio", f"{masking.mask_ratio:g}", shown),
            ("series hidden whole", "none", f"a joint token holds all {setup.num_series} series"),
            (what, value, why),
        ]

    @classmethod
    @abstractmethod
    def num_shown(cls, setup: Setup) -> int:
        """Joint tokens of a patch that stay visible."""

    @abstractmethod
    def hide(self, draws: Draws) -> Bool[Tensor, "b l"]:
        """Draw which joint tokens are hidden: all but `num_shown`. `ask_some` uses numbers s l to s l + l of `What.TOKENS`."""

    def draw(self, draws: Draws, present: Bool[Tensor, "b s"], variant: int, volumes: tuple[Tensor, ...], training: bool) -> Mask:
        mask = without_empty_series(joint_mask(self.hide(draws), self.num_shown(self.setup), present), volumes[0])
        if self.settings.masking.background == "ignored":
            mask = without_background(mask, volumes[0], self.setup.architecture.token_size)
        share = self.settings.reconstruction.rebuilt_share
        return ask_some(mask, draws, share, self.setup.num_series) if training else mask

    def seen(self, tokens: Float[Tensor, "b s l v"], mask: Mask) -> Float[Tensor, "b k w"]:
        """What the encoder is given: the visible joint tokens."""
        # volumes come as fp16
        return select(join(tokens), mask.visible).float()

    def predicted(self, tokens: Float[Tensor, "b s l v"], mask: Mask, grid: Size) -> Float[Tensor, "b m v"]:
        encoded = self.encoder(self.seen(tokens, mask), coordinates(mask.visible, grid))[-1]
        num_series = tokens.shape[1]
        # the numbers of the first series are those of joint tokens
        places = mask.asked[:, : mask.asked.shape[1] // num_series]
        return separate(self.decoder(encoded, mask.visible, places, grid)[:, None], num_series).flatten(1, 2)

    def nothing_hidden(self, mask: Mask, present: Bool[Tensor, "1 s"]) -> Mask:
        """As in CSM, with joint tokens, which hold absent series too, as zeros."""
        hidden = torch.zeros_like(mask.hidden)
        places, asked = (torch.arange(num, device=hidden.device)[None] for num in (hidden.shape[2], hidden[0].numel()))
        return replace(mask, hidden=hidden, rebuilt=~hidden & present[..., None], visible=places, asked=asked)

    def moments(self, tokens: Float[Tensor, "b n l v"], present: Bool[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
        """Moments of joint tokens, over the voxels of present series."""
        return joint_moments(tokens, present)

    def moments_of_asked(self, truth: Float[Tensor, "b m v"], tokens: Float[Tensor, "b s l v"]) -> tuple[Tensor, Tensor]:
        by_series = truth.unflatten(1, (tokens.shape[1], -1))
        mean, scale = self.moments(by_series, tokens.flatten(2).any(2))
        every = by_series.shape[:3]
        return mean.expand(*every, 1).flatten(1, 2), scale.expand(*every, 1).flatten(1, 2)

    def seen_tokens(self, present: Bool[Tensor, "c s"]) -> float:
        return float(self.num_shown(self.setup))


def joint_mask(hidden: Bool[Tensor, "b l"], num_shown: int, series_present: Bool[Tensor, "b s"]) -> Mask:
    """The mask of joint tokens, of which the same number is visible in every sample.

    Args:
        hidden: joint tokens that the encoder does not see.
        num_shown: how many it sees.
        series_present: series each sample has, which are to be rebuilt.

    Returns:
        `hidden` is the same for all series, absent ones included; `visible` numbers joint tokens; `asked`, as in CSM, the tokens
        of series, those of the first one first.
    """
    visible, asked = apart(hidden, num_shown)
    num_series, num_tokens = series_present.shape[1], hidden.shape[1]
    everywhere = hidden[:, None].expand(-1, num_series, -1)
    asked = torch.cat([asked + series * num_tokens for series in range(num_series)], dim=1)
    return Mask(everywhere.contiguous(), everywhere & series_present[..., None], visible, asked)


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
