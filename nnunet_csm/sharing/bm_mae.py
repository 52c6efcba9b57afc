"""Encoders of BM-MAE (Robinet et al., arXiv 2505.00568) as encoders of ours.

Both are ViTs over the tokens of all series, with an embedding for each and fixed sine-cosine positions. What differs is names and
orders, which are changed here: theirs has axes (x, y, z), and the entries of its positions in the order y, x, z; in ours both are
z, y, x. All layers do the same with the entries of a token in another order, as long as it is one throughout. Its class token
is left out, as its authors do for segmentation; its decoder is not needed.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from nnunet_csm.errors import UserError
from nnunet_csm.model.tokens import coordinates
from nnunet_csm.model.vit import Positions

# its names of series to ours
SERIES = {"flair": "FLAIR", "t1": "T1w", "t1ce": "T1ce", "t2": "T2w"}
WIDTH_OF_HEAD = 64  # of the published network; no weight tells it
SPACING = (1.0, 1.0, 1.0)
DATA = "gliomas of BraTS 2021, says the paper (arXiv 2505.00568); nothing in the file tells"
PATCH = "patch_embedding"
# of a block: their name, our name, whether its rows are entries of a token, and whether its columns are
OF_A_BLOCK = (
    ("norm1", "norm1", True, False),
    ("attn.qkv", "attn.qkv", False, True),
    ("attn.out_proj", "attn.proj", True, False),
    ("norm2", "norm2", True, False),
    ("mlp.linear1", "mlp.fc1", False, True),
    ("mlp.linear2", "mlp.fc2", True, False),
)
# what is known and not taken over; MONAI from 1.4 on makes the norm of a cross-attention that is not there
LEFT_OUT = re.compile(r"cls_token|decoder\..*|blocks\.\d+\.norm_cross_attn\.(weight|bias)")


@dataclass(frozen=True)
class Brought:
    """An encoder of others as one of ours.

    Attributes:
        arch_kwargs: the network, as in plans.
        weights: of the encoder, by our names.
        grid: tokens along (z, y, x) of the patches that it learned from.
        left_out: their tensors that are not taken over.
    """

    arch_kwargs: dict[str, Any]
    weights: dict[str, Tensor]
    grid: tuple[int, int, int]
    left_out: tuple[str, ...]


def bring_in(theirs: Mapping[str, Tensor], where: str) -> Brought:
    """Turn the weights of a pretrained BM-MAE, or of its encoder, into those of our ViT.

    Args:
        theirs: its state dictionary.
        where: the file, for errors.

    Raises:
        UserError: a tensor that is missing, of another shape, or unknown, or positions that are others.
    """
    rest = dict(theirs)
    names = [name for name in SERIES if f"tokenizers.{name}.{PATCH}.patch_embeddings.weight" in rest]
    if not names:
        raise UserError(
            f"{where}: no tokenizers.SERIES.{PATCH}.patch_embeddings.weight with SERIES one of {', '.join(SERIES)}; expected the "
            f"weights of BM-MAE, such as bmmae.pth"
        )

    def take(name: str, *shape: int | None) -> Tensor:
        found = rest.pop(name, None)
        if found is None:
            raise UserError(f"{where}: has no {name}; expected all weights of BM-MAE: nothing was taken over")
        sizes = zip(found.shape, shape, strict=False)
        if found.ndim != len(shape) or any(size not in (None, n) for n, size in sizes) or not found.is_floating_point():
            expected = " x ".join("any" if size is None else str(size) for size in shape)
            raise UserError(
                f"{where}: {name} is {' x '.join(map(str, found.shape))}, expected {expected}: nothing was taken over"
            )
        return found.float()

    first = take(f"tokenizers.{names[0]}.{PATCH}.patch_embeddings.weight", None, 1, None, None, None)
    width, _, *edges = first.shape
    if width % (6 * WIDTH_OF_HEAD) or len(set(edges)) > 1:
        raise UserError(f"{where}: tokens of {' x '.join(map(str, edges))} voxels, {width} wide; expected cubes, 768 wide")
    rest[f"tokenizers.{names[0]}.{PATCH}.patch_embeddings.weight"] = first
    order, grid = entries_in_our_order(width), (0, 0, 0)
    embedding, bias = [], []
    for name in names:
        kernel = take(f"tokenizers.{name}.{PATCH}.patch_embeddings.weight", width, 1, *edges)
        embedding.append(rearrange(kernel, "e 1 x y z -> e (z y x)")[order])
        bias.append(take(f"tokenizers.{name}.{PATCH}.patch_embeddings.bias", width)[order])
        grid = checked_grid(take(f"tokenizers.{name}.{PATCH}.position_embeddings", 1, None, width)[0, :, order], name, where)
    weights = {
        "embedding.weight": torch.stack(embedding),
        "embedding.bias": torch.stack(bias),
        # tokens of a series are told by their embedding alone
        "series_embedding": torch.zeros(len(names), width),
    }
    depth = 1 + max((int(found[1]) for name in rest if (found := re.match(r"blocks\.(\d+)\.", name))), default=0)
    hidden = next(iter(rest.get("blocks.0.mlp.linear1.weight", torch.empty(0)).shape), 0)
    sizes = {"attn.qkv": 3 * width, "mlp.linear1": hidden}
    for number in range(depth):
        for name, ours, rows, columns in OF_A_BLOCK:
            num_rows = sizes.get(name, width)
            shape = (num_rows,) if name.startswith("norm") else (num_rows, hidden if name == "mlp.linear2" else width)
            weight, shift = take(f"blocks.{number}.{name}.weight", *shape), take(f"blocks.{number}.{name}.bias", num_rows)
            weight = weight[:, order] if columns else weight
            weights[f"blocks.{number}.{ours}.weight"] = weight[order] if rows else weight
            weights[f"blocks.{number}.{ours}.bias"] = shift[order] if rows else shift
    for name in ("weight", "bias"):
        weights[f"norm.{name}"] = take(f"norm.{name}", width)[order]
    if unknown := [name for name in rest if not LEFT_OUT.fullmatch(name)]:
        raise UserError(f"{where}: {unknown[0]} ({len(unknown)} such) is no tensor of BM-MAE; nothing was taken over")
    arch_kwargs = {
        "series": [SERIES[name] for name in names],
        "channels": list(range(len(names))),
        "token_size": edges,
        "width": width,
        "depth": depth,
        "num_heads": width // WIDTH_OF_HEAD,
        "features": 16,
        "drop_path": 0.0,
        "encoder": {"positions": "mae", "embedding": "by_series", "mlp_ratio": hidden / width},
    }
    return Brought(arch_kwargs, weights, grid, tuple(rest))


def entries_in_our_order(width: int) -> Tensor:
    """Numbers of their entries of a token, in our order: those of z, of y and of x, a third each."""
    y, x, z = torch.arange(width).chunk(3)
    return torch.cat([z, y, x])


def checked_grid(positions: Float[Tensor, "l e"], series: str, where: str) -> tuple[int, int, int]:
    """Tokens along (z, y, x) of a table of positions, in our order of entries, of a cube.

    Raises:
        UserError: it is not the one that our encoder makes by itself.
    """
    edge = round(len(positions) ** (1 / 3))
    grid = edge, edge, edge
    if edge**3 == len(positions):
        ours = Positions(positions.shape[1], "mae")(coordinates(torch.arange(edge**3)[None], grid))[0]
        theirs = rearrange(positions, "(x y z) e -> (z y x) e", x=edge, y=edge, z=edge)
        if torch.allclose(theirs, ours, atol=1e-4):
            return grid
    raise UserError(
        f"{where}: the position_embeddings of {series} are not the fixed sines and cosines of a cube of tokens; "
        f"nothing was taken over"
    )
