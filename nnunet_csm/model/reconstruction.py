"""The light decoder of pretraining: from the encoding of what was visible to the voxels of hidden tokens (paper Eq. 1)."""

import torch
from jaxtyping import Float, Int
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from nnunet_csm.model.tokens import Size, coordinates
from nnunet_csm.model.vit import LinearBySeries, Positions, blocks, draw_weights, of_series
from nnunet_csm.plans import EncoderSettings

PLAIN = EncoderSettings()


class VisibleBlock(Block):
    """A ViT block, with timm's weights, in which all tokens attend to the visible ones only.

    Keys and values of the others are not made: attention with a mask would make them, and then pass over nine in ten.
    """

    def forward(self, x: Float[Tensor, "b n e"], num_visible: int, first: int) -> Float[Tensor, "b q e"]:  # type: ignore[override]
        """New features of the tokens from number `first` on, of which the first `num_visible` of `x` are the visible ones."""
        normed = self.norm1(x)
        width = x.shape[-1]
        to_query, to_key_value = self.attn.qkv.weight.split([width, 2 * width])
        of_query, of_key_value = self.attn.qkv.bias.split([width, 2 * width])
        query = linear(normed[:, first:], to_query, of_query)
        key, value = linear(normed[:, :num_visible], to_key_value, of_key_value).chunk(2, -1)
        heads = (part.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        x = x[:, first:] + self.attn.proj(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class ReconstructionDecoder(nn.Module):
    """Put a learned token at every place that is asked for, tell each its series and place, and rebuild it.

    Every token attends to the visible ones only: the others hold nothing that it does not know. So tokens of absent
    series, which are never visible, influence nothing, and a token's answer does not depend on which others are asked for.

    Args:
        num_series: that tokens are told apart by; 1 with joint tokens.
        num_voxels: of a token; with joint tokens, of all series.
        encoder_width: of the features of visible tokens.
        width, depth, num_heads: of the decoder.
        options: of the encoder, whose initial weights and positions the decoder shares.
        head_by_series: a last layer for each series.
        same_place: what is made of the voxels of other series that are visible at the place of a token to be rebuilt: "linear",
            a map of them is added to the mask token; "gains", in addition they are themselves added to what is rebuilt, those of
            each series by a factor that is read off the token's features.
    """

    def __init__(
        self,
        num_series: int,
        num_voxels: int,
        encoder_width: int,
        width: int,
        depth: int,
        num_heads: int,
        options: EncoderSettings = PLAIN,
        head_by_series: bool = False,
        same_place: str = "none",
    ) -> None:
        super().__init__()
        self.width = width
        self.embedding = nn.Linear(encoder_width, width)
        self.mask_token = nn.Parameter(torch.empty(width))
        self.series_embedding = nn.Parameter(torch.empty(num_series, width))
        self.blocks = blocks(width, depth, num_heads, kind=VisibleBlock)
        self.norm = nn.LayerNorm(width)
        self.head_by_series = head_by_series and num_series > 1
        self.head: nn.Module = (
            LinearBySeries(num_series, width, num_voxels) if self.head_by_series else nn.Linear(width, num_voxels)
        )
        self.positions = Positions(width, options.positions)
        self.apply(lambda module: draw_weights(module, options.query_key_gain))
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.series_embedding, std=options.series_embedding_std)
        # last, so that all else begins as without it
        self.beside = nn.Linear(num_series * (num_voxels + 1), width) if same_place != "none" else None
        if self.beside is not None:
            draw_weights(self.beside, options.query_key_gain)
        self.gains = nn.Linear(width, num_series) if same_place == "gains" else None
        if self.gains is not None:
            nn.init.zeros_(self.gains.weight)
            nn.init.zeros_(self.gains.bias)

    def forward(
        self,
        encoded: Float[Tensor, "b k e"],
        visible: Int[Tensor, "b k"],
        asked: Int[Tensor, "b m"],
        grid: Size,
        beside: Float[Tensor, "b m s w"] | None = None,
    ) -> Float[Tensor, "b m v"]:
        """Rebuild some tokens.

        Args:
            encoded: features of the visible tokens.
            visible: their numbers in the patch.
            asked: the numbers of those to be rebuilt, none of them visible.
            grid: tokens of a series along (z, y, x).
            beside: for `same_place`, at the place of each asked token the voxels of every other series that is visible there, and
                1; 0 of those that are not.
        """
        seen, num_visible = self.embedding(encoded), visible.shape[1]
        start = self.mask_token.to(seen.dtype).expand(*asked.shape, self.width)
        if self.beside is not None:
            assert beside is not None
            start = start + self.beside(beside.flatten(2))
        x = torch.cat([seen, start], dim=1)
        place = coordinates(torch.cat([visible, asked], dim=1), grid)
        x = x + of_series(self.series_embedding, place[..., 0]) + self.positions(place)
        for block in self.blocks[:-1]:
            x = block(x, num_visible, 0)
        # after the last one, nobody attends to the visible ones any more
        x = self.blocks[-1](x, num_visible, num_visible)
        x = self.norm(x)
        series = place[:, num_visible:, 0]
        rebuilt = self.head(x, series) if self.head_by_series else self.head(x)
        if self.gains is not None:
            assert beside is not None
            rebuilt = rebuilt + (self.gains(x)[..., None] * beside[..., :-1]).sum(2)
        return rebuilt
