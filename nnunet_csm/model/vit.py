"""The ViT over the tokens of all series of a patch (paper III-B and IV-A, ViT-B/16)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Bool, Float, Int
from timm.layers import Attention
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import Encoder, Features, Transferred
from nnunet_csm.model.tokens import all_tokens, coordinates, grid_size, level_strides, select, to_tokens
from nnunet_csm.plans import Architecture

# the longest period of our position embedding is 128 tokens, beyond any grid in use; of MAE's, made for sentences, 2 pi 10,000
LONGEST_HALF_PERIOD = 64.0
MAE_FREQUENCY = 10_000.0
WITH_MASK = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Positions(nn.Module):
    """Fixed 3-D position embedding: a sixth of the width for the sine and the cosine of each of z, y and x.

    "geometric": half periods rise geometrically from 1 to 64 tokens. "mae": frequencies 10,000^(-i/n), half periods from pi to
    31,416 tokens; on a grid of a few tokens most of its entries are constant, and places hardly differ. Left-over entries (width
    not a multiple of 6) are zero. The series coordinate is not used here.
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.width, self.kind = width, kind

    def forward(self, coordinates: Int[Tensor, "b k 4"]) -> Float[Tensor, "b k e"]:
        n = self.width // 6
        share = torch.arange(n, device=coordinates.device, dtype=torch.float32) / n
        # made on the device, where a graph finds them
        frequency = MAE_FREQUENCY**-share if self.kind == "mae" else math.pi / LONGEST_HALF_PERIOD**share
        angle = coordinates[..., 1:].float()[..., None] * frequency
        embedding = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)
        return nn.functional.pad(embedding, (0, self.width - 6 * n))


def of_series(embedding: Float[Tensor, "s e"], series: Int[Tensor, "b k"]) -> Float[Tensor, "b k e"]:
    """The row of each token's series.

    As a product, since the gradient of indexing is summed in an order that changes from run to run.
    """
    return nn.functional.one_hot(series, len(embedding)).to(embedding.dtype) @ embedding


class LinearBySeries(nn.Module):
    """A linear layer for each series; every token goes through that of its own."""

    def __init__(self, num_series: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_series, num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.zeros(num_series, num_outputs))
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)

    def forward(self, x: Float[Tensor, "b k i"], series: Int[Tensor, "b k"]) -> Float[Tensor, "b k o"]:
        # all through every layer: those of one series are no whole rows of a batch
        layers = zip(self.weight, self.bias, strict=True)
        made = [nn.functional.linear(x, *layer) * (series == number)[..., None] for number, layer in enumerate(layers)]
        return torch.stack(made).sum(0)


def draw_weights(module: nn.Module, query_key_gain: float) -> None:
    """Initial weights: linear layers as in MAE, and keys equal to queries, unless the gain is 0.

    Then a token of a small network at first attends to tokens that resemble it, above all those of its own place in other
    series, and need not learn to; at size B it hardly does. A gain of 4 makes the first score of a token with itself about 8
    whatever the width of a head.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Attention) and query_key_gain:
        with torch.no_grad():
            query, key, _ = module.qkv.weight.chunk(3)
            query *= query_key_gain / module.head_dim**0.25
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


def blocks(
    width: int, depth: int, num_heads: int, drop_path: float = 0.0, kind: type[Block] = Block, mlp_ratio: float = 4.0
) -> nn.ModuleList:
    """Pre-norm ViT blocks; the drop path rate rises linearly with depth."""
    rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
    layers = [kind(width, num_heads, mlp_ratio=mlp_ratio, qkv_bias=True) for _ in rates]
    for layer, rate in zip(layers, rates, strict=True):
        if drop_path > 0:
            layer.drop_path1, layer.drop_path2 = DropPath(rate), DropPath(rate)  # type: ignore[assignment]
        # timm's other path adds a boolean mask as 0 and 1 to the scores
        layer.attn.fused_attn = True  # type: ignore[misc]
    return nn.ModuleList(layers)


class ViT(Encoder):
    """Encode any subset of the tokens of any subset of the series.

    The token embedding is shared by all series, or there is one for each; an embedding per series name tells them apart, so that
    the encoder can be carried to other series, or another order, by name.

    Args:
        architecture: which series, sizes and kinds.
        drop_path: share of the samples in which the last block is left out while training.
    """

    decoders = ("unetr", "light")

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__(architecture)
        a, options = architecture, architecture.encoder
        self.width, self.depth = a.width, a.depth
        self.level_widths = [a.width] * len(level_strides(a.token_size))
        tz, ty, tx = a.token_size
        self.token_size = tz, ty, tx
        num_series, num_voxels = self.layout(a)
        # with one series as well, so that its layer can be carried
        self.by_series = options.embedding == "by_series" and self.keeps_series_apart
        self.embedding: nn.Module = (
            LinearBySeries(num_series, num_voxels, a.width) if self.by_series else nn.Linear(num_voxels, a.width)
        )
        self.positions = Positions(a.width, options.positions)
        self.series_embedding = nn.Parameter(torch.empty(num_series, a.width))
        self.blocks = blocks(a.width, a.depth, a.num_heads, drop_path, mlp_ratio=options.mlp_ratio)
        self.norm = nn.LayerNorm(a.width)
        self.apply(lambda module: draw_weights(module, options.query_key_gain))
        nn.init.normal_(self.series_embedding, std=options.series_embedding_std)

    @classmethod
    def layout(cls, architecture: Architecture) -> tuple[int, int]:
        """Series that tokens are told apart by, and voxels of a token."""
        return len(architecture.series), math.prod(architecture.token_size)

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
        series = coordinates[..., 0]
        embedded = self.embedding(tokens, series) if self.by_series else self.embedding(tokens)
        x = embedded + of_series(self.series_embedding, series) + self.positions(coordinates)
        mask = None if attend is None else attend[:, None, None, :]
        features = []
        # cuDNN's attention with a mask can give NaN in its backward pass (pytorch issue 196678)
        with nullcontext() if mask is None else sdpa_kernel(WITH_MASK):
            for number, block in enumerate(self.blocks, start=1):
                x = block(x, attn_mask=mask)
                if number in taps and number < self.depth:
                    features.append(x)
        return [*features, self.norm(x)]

    def levels(
        self,
        volume: Float[Tensor, "b s z y x"],
        present: Bool[Tensor, "b s"],
        num_levels: int = 1,
        shown: Sequence[int] | None = None,
    ) -> list[Features]:
        b, s = present.shape
        grid = grid_size((volume.shape[2], volume.shape[3], volume.shape[4]), self.token_size)
        index = all_tokens(s, grid, b, volume.device)
        attend = None
        if shown is not None:
            # a stack of slices: a list as an index would be copied to the GPU
            index = torch.cat([index.unflatten(1, (s, -1))[:, number] for number in shown], dim=1)
            present = torch.stack([present[:, number] for number in shown], dim=1)
        elif s > 1:
            # masked, not left out, so that every sample of a batch has the same length
            attend = present.repeat_interleave(math.prod(grid), dim=1)
        tokens = select(to_tokens(volume, self.token_size), index)
        encoded = self(tokens, coordinates(index, grid), attend, self.taps(num_levels))
        series = None if shown is None else tuple(shown)
        return [Features(f.unflatten(1, (present.shape[1], -1)), present, grid, series) for f in encoded]

    def taps(self, num_levels: int) -> list[int]:
        """Numbers of the blocks after which levels are read: evenly spaced, the last one among them."""
        return [round(self.depth * (level + 1) / num_levels) for level in range(num_levels)]

    def stages(self) -> list[list[nn.Parameter]]:
        return [[*self.embedding.parameters(), self.series_embedding], *(list(block.parameters()) for block in self.blocks)]

    def compiled_parts(self) -> Iterator[nn.Module]:
        # equal, so that one is compiled for all
        yield from self.blocks

    @classmethod
    def check(cls, architecture: Architecture, where: str) -> None:
        if architecture.depth < len(level_strides(architecture.token_size)):
            raise UserError(
                f"{where}: depth {architecture.depth} is too small for a decoder over token_size {architecture.token_size}"
            )

    @classmethod
    def num_blocks(cls, architecture: Architecture) -> int:
        return architecture.depth

    @classmethod
    def told(cls, architecture: Architecture) -> str:
        return f"{architecture.width} wide, {architecture.depth} deep, {architecture.num_heads} heads"

    @classmethod
    def num_series_in(cls, weights: Mapping[str, Tensor], architecture: Architecture) -> float:
        return len(weights["series_embedding"])

    @classmethod
    def carried(
        cls, weights: Mapping[str, Tensor], source: Architecture, target: Architecture, origin: str
    ) -> tuple[dict[str, Tensor], list[Transferred]]:
        """Rows for each series by its name; one that the pretraining did not have starts from the mean of those it had."""
        names = ["series_embedding"]
        if target.encoder.embedding == "by_series":
            names += [name for name in ("embedding.weight", "embedding.bias") if name in weights]
        carried, report = dict(weights), []
        for name in names:
            rows = []
            for series in target.series:
                known = series in source.series
                rows.append(weights[name][source.series.index(series)] if known else weights[name].mean(0))
                how = f"by name, from {series}" if known else f"new series: mean of {', '.join(source.series)}"
                report.append(Transferred(f"{name}[{series}]", tuple(rows[-1].shape), how))
            carried[name] = torch.stack(rows)
        return carried, report
