"""MAE3D: masked autoencoding with joint tokens (Zhou et al., "Self pre-training with masked autoencoders ...", ISBI 2023).

One token holds a cube's voxels of all series, and one mask serves all of them. It stands beside CSM so that the two can be
compared: encoder size, decoder, draws, schedule and fine-tuning are the same, and `joint_tokens` in the plans chooses. So, on
purpose, these are CSM's and not as published: no class token; decoder tokens attend to visible tokens only; the periods of the
position embedding; initial weights; the size of the decoder; optimiser, schedule, crops and flips. See docs/paper.md.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.tokens import coordinates, grid_size, join, select, separate, to_tokens
from nnunet_csm.plans import Architecture, Masking, Reconstruction
from nnunet_csm.pretext.csm import Rebuilt, masked_mean
from nnunet_csm.pretext.masking import Mask, num_visible, smallest


class MAE3D(nn.Module):
    """Encoder and decoder of pretraining on joint tokens; takes the place of `CSM`."""

    def __init__(self, architecture: Architecture, reconstruction: Reconstruction) -> None:
        super().__init__()
        a, r = architecture, reconstruction
        assert a.joint_tokens, "separate tokens are CSM's"
        self.token_size = a.token_size
        self.normalize_targets = r.normalize_targets
        # no drop path, as in CSM
        self.encoder = Encoder(a.series, a.token_size, a.width, a.depth, a.num_heads, joint_tokens=True)
        self.decoder = ReconstructionDecoder(1, len(a.series) * math.prod(a.token_size), a.width, r.width, r.depth, r.num_heads)

    def forward(self, volume: Float[Tensor, "b s z y x"], mask: Mask) -> Rebuilt:
        """Rebuild a batch of patches from their visible joint tokens and compare with what was hidden.

        The target is the voxels or, as published, each joint token normalised by its mean and deviation over the voxels of all
        present series. Absent series are zero in `volume`, and any that is counts as absent there.
        """
        _, s, z, y, x = volume.shape
        grid = grid_size((z, y, x), self.token_size)
        tokens = to_tokens(volume, self.token_size)
        # volumes come as fp16
        encoded = self.encoder(select(join(tokens), mask.visible).float(), coordinates(mask.visible, grid))[-1]
        predicted = separate(self.decoder(encoded, mask.visible, grid).float(), s)
        target = tokens.float()
        if not self.normalize_targets:
            error = (predicted - target).square().mean(-1)
            return Rebuilt(masked_mean(error, mask), error, predicted)
        mean, scale = moments(target, target.flatten(2).any(2))
        error = (predicted - (target - mean) / scale).square().mean(-1)
        return Rebuilt(masked_mean(error, mask), error, predicted * scale + mean)


def without_empty_series(mask: Mask, volume: Float[Tensor, "b s z y x"]) -> Mask:
    """A mask that asks for no series of which nothing is in the patch: a normalised target would be a constant."""
    return Mask(mask.hidden, mask.rebuilt & volume.flatten(2).any(2)[..., None], mask.visible)


def moments(
    tokens: Float[Tensor, "b s l v"], counted: Bool[Tensor, "b s"]
) -> tuple[Float[Tensor, "b 1 l 1"], Float[Tensor, "b 1 l 1"]]:
    """Mean and deviation of each joint token over the series that count; 0 and nearly 0 where none does."""
    weight = counted[:, :, None, None].to(tokens.dtype)
    num_voxels = counted.sum(1)[:, None, None, None] * tokens.shape[3]
    mean = (tokens * weight).sum((1, 3), keepdim=True) / num_voxels.clamp(min=1)
    variance = ((tokens - mean).square() * weight).sum((1, 3), keepdim=True) / (num_voxels - 1).clamp(min=1)
    return mean, (variance + 1e-6).sqrt()


def draw_mask(draws: Draws, series_present: Bool[Tensor, "b s"], num_tokens: int, masking: Masking) -> Mask:
    """Draw a mask for a batch of samples with any series: the places of `masking.draw_mask` with shared places.

    As there, nothing waits for the device.

    Args:
        draws: source of all randomness.
        series_present: series each sample has, which are to be rebuilt.
        num_tokens: joint tokens of a patch, l.
        masking: the ratio.

    Returns:
        `hidden` is the same for all series, absent ones included; `visible` numbers joint tokens.
    """
    num_shown = num_visible(num_tokens, masking)
    hidden = ~smallest(draws.integers(What.TOKENS, num_tokens), num_shown)
    # a stable sort leaves the visible ones in front, in rising order
    visible = hidden.to(torch.uint8).argsort(dim=1, stable=True)[:, :num_shown]
    everywhere = hidden[:, None].expand(*series_present.shape, num_tokens)
    return Mask(everywhere.contiguous(), everywhere & series_present[..., None], visible)
