"""The encoder: a ViT over the tokens of all series of a patch (paper III-B and IV-A, ViT-B/16)."""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Int
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# the longest period of the position embedding is 128 tokens, beyond any grid in use
LONGEST_HALF_PERIOD = 64.0
# comparable to the position embedding from the start: with MAE's 0.02, series are told apart only after many steps
SERIES_EMBEDDING_STD = 0.5
WITH_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def sine_cosine(coordinates: Int[Tensor, "b k 4"], width: int) -> Float[Tensor, "b k e"]:
    """Fixed 3-D position embedding: a sixth of the width for the sine and the cosine of each of z, y and x.

    Half periods rise geometrically from 1 to 64 tokens. (MAE's, made for sentences, rise to 31,416; on a grid of a few
    tokens most of its entries are constant, and places hardly differ.) Left-over entries (width not a multiple of 6) are
    zero. The series coordinate is not used here.
    """
    n = width // 6
    half_period = LONGEST_HALF_PERIOD ** (torch.arange(n, device=coordinates.device, dtype=torch.float32) / n)
    angle = coordinates[..., 1:].float()[..., None] * (math.pi / half_period)
    embedding = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
    return nn.functional.pad(embedding, (0, width - 6 * n))


def of_series(embedding: Float[Tensor, "s e"], series: Int[Tensor, "b k"]) -> Float[Tensor, "b k e"]:
    """The row of each token's series.

    As a product, since the gradient of indexing is summed in an order that changes from run to run.
    """
    return nn.functional.one_hot(series, len(embedding)).to(embedding.dtype) @ embedding


def draw_weights(module: nn.Module) -> None:
    """Initial weights: linear layers as in MAE, and keys equal to queries.

    Then a token of a small network at first attends to tokens that resemble it, above all those of its own place in other
    series, and need not learn to; at size B it hardly does. The gain makes the first score of a token with itself about 8
    whatever the width of a head.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Attention):
        with torch.no_grad():
            query, key, _ = module.qkv.weight.chunk(3)
            query *= 4.0 / module.head_dim**0.25
            key.copy_(query)


class DropPath(nn.Module):
    """Leave out a branch of some samples while training (stochastic depth), as timm's.

    The rate is a tensor, so that blocks with different rates are compiled as one.
    """

    kept: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Float[Tensor, "b k e"]) -> Float[Tensor, "b k e"]:
        if not self.training:
            return x
        keeps = torch.rand(len(x), 1, 1, device=x.device) < self.kept
        return x * (keeps / self.kept).to(x.dtype)


def blocks(width: int, depth: int, num_heads: int, drop_path: float = 0.0, kind: type[Block] = Block) -> nn.ModuleList:
    """Pre-norm ViT blocks; the drop path rate rises linearly with depth."""
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    layers = [kind(width, num_heads, qkv_bias=True) for _ in rates]
    for layer, rate in zip(layers, rates, strict=True):
        if drop_path > 0:
            layer.drop_path1, layer.drop_path2 = DropPath(rate), DropPath(rate)  # type: ignore[assignment]
        # timm's other path adds a boolean mask as 0 and 1 to the scores
        layer.attn.fused_attn = True  # type: ignore[misc]
    return nn.ModuleList(layers)


class Encoder(nn.Module):
    """Encode any subset of the tokens of any subset of the series.

    The token embedding is shared by all series; an embedding per series name tells them apart, so that the encoder can
    be carried to other series, or another order, by name.

    With `joint_tokens`, the series of a place are one token (see `tokens.join`): the embedding has columns for every series, and
    the tokens are those of one series, number 0.
    """

    def __init__(
        self,
        series: Sequence[str],
        token_size: Sequence[int],
        width: int,
        depth: int,
        num_heads: int,
        drop_path: float = 0.0,
        joint_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.series = tuple(series)
        self.width, self.depth = width, depth
        self.joint_tokens = joint_tokens
        num_joined, num_rows = (len(self.series), 1) if joint_tokens else (1, len(self.series))
        self.embedding = nn.Linear(num_joined * math.prod(token_size), width)
        self.series_embedding = nn.Parameter(torch.empty(num_rows, width))
        self.blocks = blocks(width, depth, num_heads, drop_path)
        self.norm = nn.LayerNorm(width)
        self.apply(draw_weights)
        nn.init.normal_(self.series_embedding, std=SERIES_EMBEDDING_STD)

    def forward(
        self,
        tokens: Float[Tensor, "b k v"],
        coordinates: Int[Tensor, "b k 4"],
        attend: Bool[Tensor, "b k"] | None = None,
        taps: Sequence[int] = (),
    ) -> list[Float[Tensor, "b k e"]]:
        """Encode the given tokens.

        Args:
            tokens: voxels of the visible tokens.
            coordinates: (series, z, y, x) of each.
            attend: False for tokens nobody may look at (those of absent series); None when all may be looked at.
            taps: numbers of blocks after which features are returned; those after the last block are normalised.

        Returns:
            The features at `taps`, or only the last ones when `taps` is empty.
        """
        x = self.embedding(tokens) + of_series(self.series_embedding, coordinates[..., 0]) + sine_cosine(coordinates, self.width)
        mask = None if attend is None else attend[:, None, None, :]
        features = []
        # cuDNN's attention with a mask can give NaN in its backward pass (pytorch issue 196678)
        with nullcontext() if mask is None else sdpa_kernel(WITH_MASK):
            for number, block in enumerate(self.blocks, start=1):
                x = block(x, attn_mask=mask)
                if number in taps and number < self.depth:
                    features.append(x)
        return [*features, self.norm(x)]
