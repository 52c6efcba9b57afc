"""MAE3D: masked autoencoding with joint tokens (Zhou et al., "Self pre-training with masked autoencoders ...", ISBI 2023).

One token holds a cube's voxels of all series, and one mask serves all of them. It stands beside CSM so that the two can be
compared: encoder size, draws, schedule and fine-tuning are the same. So, on purpose, these are CSM's and not as published: no
class token; decoder tokens attend to visible tokens only; optimiser, schedule, crops and flips. See docs/paper.md.

Plans of before version 3 chose it by `joint_tokens` in `arch_kwargs`.
"""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool
from torch import Tensor

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.pretext.base import Setup
from nnunet_csm.pretext.joint import JointRebuilding, joint_mask
from nnunet_csm.pretext.masking import Mask, num_visible, smallest
from nnunet_csm.pretext.rebuilding import Reconstruction
from nnunet_csm.schema import ShareBelowOne


@dataclass(frozen=True)
class PlaceMasking:
    """What is hidden, of all series at once.

    Attributes:
        mask_ratio: share of the joint tokens that are hidden.
        background: whether hidden tokens in which nothing varies are rebuilt or stay out of the loss.
    """

    mask_ratio: ShareBelowOne
    background: Literal["rebuilt", "ignored"] = "rebuilt"


@dataclass(frozen=True)
class Settings:
    """What is hidden, and what rebuilds it."""

    masking: PlaceMasking
    reconstruction: Reconstruction


class MAE3D(JointRebuilding):
    """Hide places drawn one by one; as published, targets are normalised."""

    Settings = Settings

    @classmethod
    def num_shown(cls, setup: Setup) -> int:
        return num_visible(setup.num_tokens, setup.settings.masking.mask_ratio)

    def hide(self, draws: Draws) -> Bool[Tensor, "b l"]:
        return hidden_places(draws, self.setup.num_tokens, self.num_shown(self.setup))


def hidden_places(draws: Draws, num_tokens: int, num_shown: int) -> Bool[Tensor, "b l"]:
    """All but `num_shown` of the joint tokens: the places of `masking.draw_mask` with shared places; nothing waits, as there."""
    return ~smallest(draws.integers(What.TOKENS, num_tokens), num_shown)


def draw_mask(draws: Draws, series_present: Bool[Tensor, "b s"], num_tokens: int, mask_ratio: float) -> Mask:
    """Draw a mask for a batch of samples with any series.

    Args:
        draws: source of all randomness.
        series_present: series each sample has, which are to be rebuilt.
        num_tokens: joint tokens of a patch, l.
        mask_ratio: share of them that is hidden.
    """
    num_shown = num_visible(num_tokens, mask_ratio)
    return joint_mask(hidden_places(draws, num_tokens, num_shown), num_shown, series_present)
