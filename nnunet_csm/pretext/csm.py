"""Cross-series masked pretraining: encode what is visible, rebuild what is hidden (paper III-B, Eq. 1 and 2)."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.tokens import coordinates, grid_size, select, to_tokens
from nnunet_csm.plans import Architecture, Reconstruction
from nnunet_csm.pretext.masking import Mask


@dataclass(frozen=True)
class Rebuilt:
    """What the decoder made of a batch."""

    loss: Float[Tensor, ""]
    error: Float[Tensor, "b s l"]
    """Mean squared error of every token, whether hidden or not."""
    tokens: Float[Tensor, "b s l v"]
    """Rebuilt voxels, in the units of the input."""


class CSM(nn.Module):
    """Encoder and decoder of pretraining."""

    def __init__(self, architecture: Architecture, reconstruction: Reconstruction) -> None:
        super().__init__()
        a, r = architecture, reconstruction
        self.token_size = a.token_size
        self.normalize_targets = r.normalize_targets
        # no drop path: the decoder is to tell what is visible, and ranks learn what one process would
        self.encoder = Encoder(a.series, a.token_size, a.width, a.depth, a.num_heads)
        self.decoder = ReconstructionDecoder(len(a.series), math.prod(a.token_size), a.width, r.width, r.depth, r.num_heads)

    def forward(self, volume: Float[Tensor, "b s z y x"], mask: Mask) -> Rebuilt:
        """Rebuild a batch of patches from their visible tokens and compare with what was hidden.

        The target is the voxels as in the paper's Eq. 2 or, as an option, each token normalised by its own mean and
        deviation (MAE's); the rebuilt tokens are voxels in either case.
        """
        _, _, z, y, x = volume.shape
        grid = grid_size((z, y, x), self.token_size)
        tokens = to_tokens(volume, self.token_size)
        # volumes come as fp16
        encoded = self.encoder(select(tokens, mask.visible).float(), coordinates(mask.visible, grid))[-1]
        predicted = self.decoder(encoded, mask.visible, grid).float()
        target = tokens.float()
        if not self.normalize_targets:
            error = (predicted - target).square().mean(-1)
            return Rebuilt(masked_mean(error, mask), error, predicted)
        mean, scale = target.mean(-1, keepdim=True), (target.var(-1, keepdim=True) + 1e-6).sqrt()
        error = (predicted - (target - mean) / scale).square().mean(-1)
        return Rebuilt(masked_mean(error, mask), error, predicted * scale + mean)


def masked_mean(error: Float[Tensor, "b s l"], mask: Mask) -> Float[Tensor, ""]:
    """Mean over the tokens to be rebuilt; 0 when there are none (one series, nothing hidden)."""
    return summed_error(error, mask) / mask.rebuilt.sum().clamp(min=1)


def summed_error(error: Float[Tensor, "b s l"], mask: Mask) -> Float[Tensor, ""]:
    """Sum over the tokens to be rebuilt: the numerator of the loss, which ranks and parts of a batch add up."""
    return torch.where(mask.rebuilt, error, 0.0).sum()
