"""Cross-series masked pretraining: encode what is visible, rebuild what is hidden (paper III-B, Eq. 1 and 2)."""

import math
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.tokens import Size, coordinates, grid_size, select, to_tokens
from nnunet_csm.plans import Architecture, Reconstruction
from nnunet_csm.pretext.masking import Mask


@dataclass(frozen=True)
class Rebuilt:
    """What the decoder made of a batch."""

    error: Float[Tensor, "b s l"]
    """Mean squared error of every token that was asked for; 0 elsewhere."""
    tokens: Float[Tensor, "b s l v"]
    """Voxels in the units of the input: rebuilt where they were asked for, else as they are."""

    @staticmethod
    def of(tokens: Float[Tensor, "b s l v"], asked: Int[Tensor, "b m"], error: Tensor, rebuilt: Tensor) -> "Rebuilt":
        """Put the errors and voxels of the asked tokens in their places."""
        flat = tokens.float().flatten(1, 2)
        filled = flat.scatter(1, asked[..., None].expand_as(rebuilt), rebuilt)
        errors = flat.new_zeros(flat.shape[:2]).scatter(1, asked, error)
        return Rebuilt(errors.view(tokens.shape[:3]), filled.view_as(tokens))


class TokenError(nn.Module):
    """Mean squared error of each token, in full precision; a module so that it is compiled as the others are."""

    def forward(self, predicted: Float[Tensor, "b m v"], target: Float[Tensor, "b m v"]) -> Float[Tensor, "b m"]:
        return (predicted.float() - target).square().mean(-1)


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
        self.error = TokenError()

    def forward(self, volume: Float[Tensor, "b s z y x"], mask: Mask) -> Float[Tensor, "b m"]:
        """Rebuild the tokens that the mask asks for from the visible ones, and compare: the mean squared error of each.

        The target is the voxels as in the paper's Eq. 2 or, as an option, each token normalised by its own mean and
        deviation (MAE's).
        """
        tokens = to_tokens(volume, self.token_size)
        _, _, target = self.targets(tokens, mask)
        return self.error(self.predicted(tokens, mask, grid_of(volume, self.token_size)), target)

    def rebuild(self, volume: Float[Tensor, "b s z y x"], mask: Mask) -> Rebuilt:
        """The same with the rebuilt voxels, to be looked at and scored."""
        tokens = to_tokens(volume, self.token_size)
        mean, scale, target = self.targets(tokens, mask)
        predicted = self.predicted(tokens, mask, grid_of(volume, self.token_size))
        return Rebuilt.of(tokens, mask.asked, self.error(predicted, target), predicted.float() * scale + mean)

    def predicted(self, tokens: Float[Tensor, "b s l v"], mask: Mask, grid: Size) -> Float[Tensor, "b m v"]:
        """What the decoder makes of the asked tokens."""
        # volumes come as fp16
        encoded = self.encoder(select(tokens, mask.visible).float(), coordinates(mask.visible, grid))[-1]
        return self.decoder(encoded, mask.visible, mask.asked, grid)

    def targets(
        self, tokens: Float[Tensor, "b s l v"], mask: Mask
    ) -> tuple[Tensor | float, Tensor | float, Float[Tensor, "b m v"]]:
        """What is subtracted from the voxels of each asked token, what they are divided by, and the outcome."""
        truth = select(tokens, mask.asked).float()
        if not self.normalize_targets:
            return 0.0, 1.0, truth
        mean, scale = truth.mean(-1, keepdim=True), (truth.var(-1, keepdim=True) + 1e-6).sqrt()
        return mean, scale, (truth - mean) / scale


def grid_of(volume: Float[Tensor, "b s z y x"], token_size: Size) -> Size:
    """Tokens along (z, y, x) of a patch."""
    _, _, z, y, x = volume.shape
    return grid_size((z, y, x), token_size)


def masked_mean(error: Float[Tensor, "b m"], mask: Mask) -> Float[Tensor, ""]:
    """Mean over the tokens to be rebuilt; 0 when there are none (one series, nothing hidden)."""
    return summed_error(error, mask) / mask.rebuilt.sum().clamp(min=1)


def summed_error(error: Float[Tensor, "b m"], mask: Mask) -> Float[Tensor, ""]:
    """Sum over the tokens to be rebuilt: the numerator of the loss, which ranks and parts of a batch add up."""
    return (error * mask.weight).sum()
