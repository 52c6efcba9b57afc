"""MAESIL's dual masking on joint tokens (Kim et al., arXiv 2604.00514), and the noise of its sibling NEMESIS (arXiv 2604.01612).

No code of MAESIL is public: the masking is that of the sibling's, by the same group, written anew. Encoder, decoder, schedule and
fine-tuning are those of the other pretexts on joint tokens; see docs/methods.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.errors import UserError
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import Setup
from nnunet_csm.pretext.joint import JointRebuilding
from nnunet_csm.pretext.masking import LAST, Mask, smallest
from nnunet_csm.pretext.rebuilding import Reconstruction
from nnunet_csm.schema import NotNegative, ShareBelowOne, Size


@dataclass(frozen=True)
class DualMasking:
    """What is hidden, of all series at once.

    Attributes:
        mask_ratio: share of the places of a plane hidden in all planes, and share of the others hidden in each plane: three
            quarters of the tokens in all when it is a half.
        background: whether hidden tokens in which nothing varies are rebuilt or stay out of the loss.
    """

    mask_ratio: ShareBelowOne
    background: Literal["rebuilt", "ignored"] = "rebuilt"


@dataclass(frozen=True)
class Settings:
    """What is hidden, what the encoder is given, and what rebuilds the rest.

    Attributes:
        noise: deviations, in those of a z-scored series, of Gaussian noise on visible voxels; each batch of training draws one.
    """

    masking: DualMasking
    reconstruction: Reconstruction
    noise: tuple[NotNegative, ...] = (0.0,)


@dataclass(frozen=True)
class NoisyMask(Mask):
    """A mask, and what is added to what the encoder sees."""

    # a mask that hides nothing is made of one of fewer visible tokens
    noise: Float[Tensor, "b _k w"]
    """Noise of every voxel of the visible joint tokens; w is 0 where there is none."""


class MAESIL(JointRebuilding):
    """Hide places of a plane in all planes, and then others plane by plane.

    Planes are those of the last two axes, in which spacing is finest in nnU-Net's order of axes. Every plane shows the same
    number of tokens, and a column of tokens that is hidden in all planes is never seen.
    """

    Settings = Settings
    Draw = NoisyMask

    def __init__(self, setup: Setup) -> None:
        # as the plan did
        num_in_plane(setup.grid, setup.settings.masking.mask_ratio)
        super().__init__(setup)

    @classmethod
    def check(cls, settings: Any, architecture: Architecture, where: str) -> None:
        super().check(settings, architecture, where)
        if not settings.noise:
            raise UserError(f"{where}.noise is {list(settings.noise)}, expected one deviation or more, 0 for none")

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        lines = super().described(setup, num_present)
        told = ", ".join(f"{deviation:g}" for deviation in setup.settings.noise)
        return [*lines, ("noise", told, "deviations of what is added to visible voxels, one for each batch")]

    @classmethod
    def num_shown(cls, setup: Setup) -> int:
        return setup.grid[0] * num_in_plane(setup.grid, setup.settings.masking.mask_ratio)[1]

    def hide(self, draws: Draws) -> Bool[Tensor, "b l"]:
        return hidden_in_planes(draws, self.setup.grid, self.settings.masking.mask_ratio, first=self.beyond)

    @property
    def beyond(self) -> int:
        """The first of the numbers of `What.TOKENS` that neither places nor `ask_some` are drawn with."""
        return (self.setup.num_series + 1) * self.setup.num_tokens

    def draw(
        self, draws: Draws, present: Bool[Tensor, "b s"], variant: int, volumes: tuple[Tensor, ...], training: bool
    ) -> NoisyMask:
        mask = super().draw(draws, present, variant, volumes, training)
        noise = self.draw_noise(draws, volumes[0], training)
        return NoisyMask(mask.hidden, mask.rebuilt, mask.visible, mask.asked, noise)

    def draw_noise(self, draws: Draws, volume: Float[Tensor, "b s z y x"], training: bool) -> Float[Tensor, "b k w"]:
        """Noise of the visible tokens of every series of which there is something in the patch."""
        deviations, num_shown = self.settings.noise, self.num_shown(self.setup)
        if not (training and any(deviations)):
            return volume.new_zeros(len(volume), num_shown, 0)
        num_voxels, first = math.prod(self.setup.architecture.token_size), self.beyond + self.setup.num_tokens
        # one for all samples, of all ranks: that of the first
        of_batch = Draws(draws.key, torch.zeros_like(draws.samples[:1]))
        number = (of_batch.uniform(What.TOKENS, 1, first) * len(deviations)).long()
        # made on the device
        chosen = sum(deviation * (number == n) for n, deviation in enumerate(deviations))
        there = volume.flatten(2).any(2) * chosen
        normal = draws.normal(What.TOKENS, num_shown * self.setup.num_series * num_voxels, first + 1)
        noise = normal.view(len(volume), num_shown, -1, num_voxels) * there[:, None, :, None]
        return noise.flatten(2).to(volume.dtype)

    def seen(self, tokens: Float[Tensor, "b s l v"], mask: Mask) -> Float[Tensor, "b k w"]:
        assert isinstance(mask, NoisyMask)
        clean = super().seen(tokens, mask)
        return clean + mask.noise if mask.noise.shape[2] else clean


def num_in_plane(grid: Size, mask_ratio: float) -> tuple[int, int]:
    """Places of a plane that some plane may show, and how many of them each plane shows.

    Raises:
        UserError: none would be left.
    """
    _, y, x = grid
    # what is a whole number but for rounding is one
    places = math.floor(y * x * (1 - mask_ratio) + 1e-6)
    shown = math.floor(places * (1 - mask_ratio) + 1e-6)
    if shown < 1:
        raise UserError(
            f"csm.pretext.masking.mask_ratio is {mask_ratio}, and hides all of the {y} x {x} tokens of a plane of the patch of "
            f"pretraining: of floor({y * x} (1 - mask_ratio)) places a plane shows floor({places} (1 - mask_ratio)); take a "
            f"smaller ratio, smaller tokens or a larger patch"
        )
    return places, shown


def hidden_in_planes(draws: Draws, grid: Size, mask_ratio: float, first: int) -> Bool[Tensor, "b l"]:
    """Draw the dual mask. Nothing waits for the device, and no shape depends on a drawn value.

    Args:
        draws: source of all randomness; of its numbers for tokens, l from 0 and y x from `first` on are used.
        grid: tokens along (z, y, x); planes lie along y and x.
        mask_ratio: of both steps.
        first: at least l.
    """
    z, y, x = grid
    num_places, num_shown = num_in_plane(grid, mask_ratio)
    common = smallest(draws.integers(What.TOKENS, y * x, first), num_places)
    preference = draws.integers(What.TOKENS, z * y * x).view(-1, z, y * x).masked_fill(~common[:, None], LAST)
    return ~smallest(preference, num_shown).flatten(1)
