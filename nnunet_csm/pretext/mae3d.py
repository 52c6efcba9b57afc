"""MAE3D: masked autoencoding with joint tokens (Zhou et al., "Self pre-training with masked autoencoders ...", ISBI 2023).

One token holds a cube's voxels of all series, and one mask serves all of them. It stands beside CSM so that the two can be
compared: encoder size, decoder, draws, schedule and fine-tuning are the same, and `joint_tokens` in the plans chooses. So, on
purpose, these are CSM's and not as published: no class token; decoder tokens attend to visible tokens only; the periods of the
position embedding; initial weights; the size of the decoder; optimiser, schedule, crops and flips. See docs/paper.md.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.tokens import Size, coordinates, join, select, separate
from nnunet_csm.plans import Architecture, Masking, Reconstruction
from nnunet_csm.pretext.csm import CSM, TokenError
from nnunet_csm.pretext.masking import Mask, apart, num_visible, smallest


class MAE3D(CSM):
    """Encoder and decoder of pretraining on joint tokens; takes the place of `CSM`.

    The targets are the voxels or, as published, each joint token normalised by its mean and deviation over the voxels of all
    present series. Absent series are zero in the volume, and any that is counts as absent there. Errors are those of each
    series in a joint token.
    """

    def __init__(self, architecture: Architecture, reconstruction: Reconstruction) -> None:
        nn.Module.__init__(self)
        a, r = architecture, reconstruction
        assert a.joint_tokens, "separate tokens are CSM's"
        self.token_size = a.token_size
        self.normalize_targets = r.normalize_targets
        # no drop path, as in CSM
        self.encoder = Encoder(a.series, a.token_size, a.width, a.depth, a.num_heads, joint_tokens=True)
        self.decoder = ReconstructionDecoder(1, len(a.series) * math.prod(a.token_size), a.width, r.width, r.depth, r.num_heads)
        self.error = TokenError()

    def predicted(self, tokens: Float[Tensor, "b s l v"], mask: Mask, grid: Size) -> Float[Tensor, "b m v"]:
        # volumes come as fp16
        encoded = self.encoder(select(join(tokens), mask.visible).float(), coordinates(mask.visible, grid))[-1]
        num_series = tokens.shape[1]
        # the numbers of the first series are those of joint tokens
        places = mask.asked[:, : mask.asked.shape[1] // num_series]
        return separate(self.decoder(encoded, mask.visible, places, grid)[:, None], num_series).flatten(1, 2)

    def targets(
        self, tokens: Float[Tensor, "b s l v"], mask: Mask
    ) -> tuple[Tensor | float, Tensor | float, Float[Tensor, "b m v"]]:
        if not self.normalize_targets:
            return super().targets(tokens, mask)
        truth = select(tokens, mask.asked).float().unflatten(1, (tokens.shape[1], -1))
        mean, scale = moments(truth, tokens.flatten(2).any(2))
        shifts = (part.expand(*truth.shape[:3], 1).flatten(1, 2) for part in (mean, scale))
        return *shifts, ((truth - mean) / scale).flatten(1, 2)


def without_empty_series(mask: Mask, volume: Float[Tensor, "b s z y x"]) -> Mask:
    """A mask that asks for no series of which nothing is in the patch: a normalised target would be a constant."""
    return replace(mask, rebuilt=mask.rebuilt & volume.flatten(2).any(2)[..., None])


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
        `hidden` is the same for all series, absent ones included; `visible` numbers joint tokens; `asked`, as in CSM, the tokens
        of series, those of the first one first.
    """
    num_shown = num_visible(num_tokens, masking)
    hidden = ~smallest(draws.integers(What.TOKENS, num_tokens), num_shown)
    visible, asked = apart(hidden, num_shown)
    num_series = series_present.shape[1]
    everywhere = hidden[:, None].expand(-1, num_series, -1)
    asked = torch.cat([asked + series * num_tokens for series in range(num_series)], dim=1)
    return Mask(everywhere.contiguous(), everywhere & series_present[..., None], visible, asked)
