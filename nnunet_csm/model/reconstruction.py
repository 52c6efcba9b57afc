"""The light decoder of pretraining: from the encoding of what was visible to the voxels of every token (paper Eq. 1)."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nnunet_csm.model.encoder import SERIES_EMBEDDING_STD, blocks, draw_weights, of_series, sine_cosine
from nnunet_csm.model.tokens import Size, all_tokens, coordinates


class ReconstructionDecoder(nn.Module):
    """Put a learned token at every place that was not visible, tell each its series and place, and rebuild all.

    Every token attends to the visible ones only: the others hold nothing that it does not know. So tokens of absent
    series, which are never visible, influence nothing.

    `num_voxels` is that of a token; with joint tokens, which are those of one series, of all series.
    """

    def __init__(self, num_series: int, num_voxels: int, encoder_width: int, width: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.series_embedding = nn.Parameter(torch.empty(num_series, width))
        self.blocks = blocks(width, depth, num_heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_voxels)
        self.apply(draw_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.series_embedding, std=SERIES_EMBEDDING_STD)

    def forward(self, encoded: Float[Tensor, "b k e"], visible: Int[Tensor, "b k"], grid: Size) -> Float[Tensor, "b s l v"]:
        """Rebuild every token.

        Args:
            encoded: features of the visible tokens.
            visible: their numbers in the patch.
            grid: tokens of a series along (z, y, x).
        """
        num_series = len(self.series_embedding)
        index = all_tokens(num_series, grid, len(encoded), encoded.device)
        place = coordinates(index, grid)
        embedded = self.embedding(encoded)
        hidden = self.mask_token.to(embedded.dtype).expand(*index.shape, self.width)
        x = hidden.scatter(1, visible[..., None].expand_as(embedded), embedded)
        x = x + of_series(self.series_embedding, place[..., 0]) + sine_cosine(place, self.width)
        attend = torch.zeros_like(index, dtype=torch.bool).scatter(1, visible, True)[:, None, None, :]
        for block in self.blocks:
            x = block(x, attn_mask=attend)
        return self.head(self.norm(x)).unflatten(1, (num_series, math.prod(grid)))
