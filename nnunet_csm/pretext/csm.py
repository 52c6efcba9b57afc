"""Cross-series masked pretraining: encode what is visible, rebuild what is hidden (paper III-B, Eq. 1 and 2)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.data.intensities import foreground
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.tokens import Size, coordinates, join, select
from nnunet_csm.model.vit import ViT
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import Setup
from nnunet_csm.pretext.masking import (
    Mask,
    Masking,
    ask_some,
    draw_mask,
    shown_series_weights,
    total_visible,
    without_background,
)
from nnunet_csm.pretext.rebuilding import Rebuilding, Reconstruction, TokenError, own_moments
from nnunet_csm.schema import ShareBelowOne


@dataclass(frozen=True)
class Settings:
    """What is hidden, and what rebuilds it.

    Attributes:
        augmentation: strength a of random intensities of what the encoder sees in training, while the targets stay as they are
            (AMAES, arXiv 2408.00640): the foreground of every series is multiplied by 1 - a to 1 + a, and -a to a deviations of
            a z-scored series are added to it.
    """

    masking: Masking
    reconstruction: Reconstruction
    augmentation: ShareBelowOne = 0.0


@dataclass(frozen=True)
class AugmentedMask(Mask):
    """A mask, and what is done to the intensities that the encoder sees."""

    change: Float[Tensor, "b s c"]
    """What is added to the gain of 1 of every series, and its shift (c is 2); c is 0 where nothing is done."""


class CSM(Rebuilding):
    """Encoder and decoder of pretraining."""

    Settings = Settings
    Draw = AugmentedMask
    encoder: ViT

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        a, r = setup.architecture, setup.settings.reconstruction
        # no drop path: the decoder is to tell what is visible, and ranks learn what one process would
        self.encoder = build_encoder(a)  # type: ignore[assignment]
        self.decoder = ReconstructionDecoder(
            len(a.series),
            math.prod(a.token_size),
            a.width,
            r.width,
            r.depth,
            r.num_heads,
            a.encoder,
            head_by_series=r.head == "by_series",
            same_place=r.same_place,
        )
        self.error = TokenError()

    @classmethod
    def check(cls, settings: Any, architecture: Architecture, where: str) -> None:
        super().check(settings, architecture, where)
        if settings.masking.counts != "equal" and settings.masking.places != "independent":
            raise UserError(
                f"{where}.masking.counts is {settings.masking.counts!r}, but series that share places show the same number of "
                f"tokens; set counts to 'equal', or places to 'independent'"
            )
        if architecture.encoder.kind != "vit":
            raise UserError(
                f"{where}: series are hidden one by one, but encoder.kind in arch_kwargs is {architecture.encoder.kind!r}; set "
                f"it to 'vit', or the name of the pretext to 'mae3d'"
            )

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        masking, num_series = setup.settings.masking, setup.num_series
        visible = total_visible(1, setup.num_tokens, masking)
        places = "each series at its own places" if masking.places == "independent" else "all series at the same places"
        shared = {
            "equal": places,
            "pooled": "on average: they are drawn from all series shown together",
            "dirichlet": "on average: series share them in proportions drawn for each sample",
        }
        shown = f"{visible} of {setup.num_tokens} tokens of a series stay visible, {shared[masking.counts]}"
        hidden = "series hidden whole", "none", "there is one series" if num_series == 1 else "set by the preset"
        if num_series > 1 and masking.hidden_series != "none":
            rebuilt = "and rebuilt" if masking.hidden_series == "rebuilt" else "and not rebuilt"
            why = f"of the present ones, each number as likely, {rebuilt}"
            if len(num_present) > 1:
                counted = ", ".join(f"{n} have {p}" for p, n in sorted(num_present.items()))
                why += f"; of {sum(num_present.values())} cases {counted}, and each keeps at least one"
            hidden = hidden[0], f"{min(masking.fewest_hidden, num_series - 1)} to {num_series - 1}", why
        what, value, why = setup.settings.reconstruction.told
        why += "" if masking.background == "rebuilt" else "; background left out"
        lines = [("mask ratio", f"{masking.mask_ratio:g}", shown), hidden, (what, value, why)]
        if strength := setup.settings.augmentation:
            changed = "gain and shift of every series by itself, in what the encoder sees; targets stay"
            lines.append(("intensity augmentation", f"{strength:g}", changed))
        return lines

    def variants(self, present: Bool[Tensor, "c s"]) -> Float[Tensor, "c n"]:
        """Kinds of batches by the number of series that stay visible in part, less one."""
        return shown_series_weights(present, self.settings.masking).double()

    def draw(
        self, draws: Draws, present: Bool[Tensor, "b s"], variant: int, volumes: tuple[Tensor, ...], training: bool
    ) -> AugmentedMask:
        masking, strength = self.settings.masking, self.settings.augmentation
        mask = draw_mask(draws, present, variant + 1, self.setup.num_tokens, masking)
        if masking.background == "ignored":
            mask = without_background(mask, volumes[0], self.setup.architecture.token_size)
        change = volumes[0].new_zeros(*present.shape, 0)
        if training:
            mask = ask_some(mask, draws, self.settings.reconstruction.rebuilt_share)
            if strength:
                # beyond the numbers that series are hidden by
                drawn = draws.uniform(What.SERIES, 2 * self.setup.num_series, first=self.setup.num_series)
                change = strength * (2 * drawn - 1).view(*present.shape, 2)
        return AugmentedMask(mask.hidden, mask.rebuilt, mask.visible, mask.asked, change)

    def predicted(self, tokens: Float[Tensor, "b s l v"], mask: Mask, grid: Size) -> Float[Tensor, "b m v"]:
        if isinstance(mask, AugmentedMask) and mask.change.shape[2]:
            more, shift = mask.change[:, :, None, None].unbind(-1)
            tokens = torch.where(foreground(tokens), tokens + tokens * more + shift, tokens)
        # volumes come as fp16
        encoded = self.encoder(select(tokens, mask.visible).float(), coordinates(mask.visible, grid))[-1]
        if self.settings.reconstruction.same_place == "none":
            return self.decoder(encoded, mask.visible, mask.asked, grid)
        if self.settings.reconstruction.normalize_targets:
            mean, scale = own_moments(tokens.float())
            tokens = (tokens - mean) / scale
        return self.decoder(encoded, mask.visible, mask.asked, grid, seen_beside(tokens, mask))

    def moments(self, tokens: Float[Tensor, "b n l v"], present: Bool[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
        """Each token's own."""
        return own_moments(tokens)

    @property
    def learns_whole_series(self) -> bool:
        return self.settings.masking.hidden_series == "rebuilt"

    def seen_tokens(self, present: Bool[Tensor, "c s"]) -> float:
        weights, setup = self.variants(present), self.setup
        totals = [total_visible(shown, setup.num_tokens, setup.settings.masking) for shown in range(1, weights.shape[1] + 1)]
        return float((weights * torch.tensor(totals)).sum(1).mean())


def seen_beside(tokens: Float[Tensor, "b s l v"], mask: Mask) -> Float[Tensor, "b m s w"]:
    """Voxels, and a 1, of the other series that are visible at the place of each asked token, over the number of these series.

    A mean, as that number varies from place to place: one map then serves whether a series is seen alone or with others. The 1
    tells which are seen, where voxels may be 0. Series that are not seen there, and the token's own, are 0.
    """
    num_series, num_tokens = mask.hidden.shape[1:]
    place = mask.asked % num_tokens
    seen = ~mask.hidden.transpose(1, 2).gather(1, place[..., None].expand(-1, -1, num_series))
    # no token is asked for that is visible, but where one is to see what the network makes of a patch with nothing hidden
    seen = seen & (mask.asked[..., None] // num_tokens != torch.arange(num_series, device=place.device))
    voxels = select(join(tokens), place).float().unflatten(2, (num_series, -1))
    return nn.functional.pad(voxels, (0, 1), value=1.0) * (seen / seen.sum(2, keepdim=True).clamp(min=1))[..., None]
