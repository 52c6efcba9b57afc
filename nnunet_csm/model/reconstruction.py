"""The light decoder of pretraining: from the encoding of what was visible to the voxels of every token (paper Eq. 1)."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nnunet_csm.model.encoder import blocks, sine_cosine, xavier
from nnunet_csm.model.tokens import Size, all_tokens, coordinates


class ReconstructionDecoder(nn.Module):
    """Put a learned token at every place that was not visible, tell each its series and place, and rebuild all."""

    def __init__(
        self, num_series: int, token_size: Sequence[int], encoder_width: int, width: int, depth: int, num_heads: int
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.series_embedding = nn.Parameter(torch.empty(num_series, width))
        self.blocks = blocks(width, depth, num_heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, math.prod(token_size))
        self.apply(xavier)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.series_embedding, std=0.02)

    def forward(
        self,
        encoded: Float[Tensor, "b k e"],
        visible: Int[Tensor, "b k"],
        grid: Size,
        series_present: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b s l v"]:
        """Rebuild every token.

        Args:
            encoded: features of the visible tokens.
            visible: their numbers in the patch.
            grid: tokens of a series along (z, y, x).
            series_present: series whose tokens may be looked at; None when all are present.
        """
        num_series, num_tokens = len(self.series_embedding), math.prod(grid)
        index = all_tokens(num_series, grid, len(encoded), encoded.device)
        place = coordinates(index, grid)
        embedded = self.embedding(encoded)
        hidden = self.mask_token.to(embedded.dtype).expand(*index.shape, self.width)
        x = hidden.scatter(1, visible[..., None].expand_as(embedded), embedded)
        x = x + self.series_embedding[place[..., 0]] + sine_cosine(place, self.width)
        attend = None if series_present is None else series_present.repeat_interleave(num_tokens, 1)[:, None, None, :]
        for block in self.blocks:
            x = block(x, attn_mask=attend)
        return self.head(self.norm(x)).unflatten(1, (num_series, num_tokens))
