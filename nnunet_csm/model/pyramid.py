"""Convolutional encoders: maps from full resolution down to the token grid, for the methods that were not made for a ViT.

All series are channels of the input, absent ones zeros. Each is one class: PCRLv2's (`PlainUNet`), vox2vec's (`FPN`) and that of
the autoencoders (`ResidualUNet`). Norms are group norms, before and after the transfer: batch norm, which the first two have in
pretraining, would make another function of the encoder in fine-tuning with small batches (docs/methods.md).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import Encoder, Features, Transferred, numbers_by_name
from nnunet_csm.model.tokens import Size, level_kernels, level_strides
from nnunet_csm.plans import Architecture

NUM_GROUPS = 8


class Norm(nn.GroupNorm):
    """Group norm in 8 groups, or as many as divide the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(NUM_GROUPS, channels), channels)


def convolution(inputs: int, outputs: int, kernel: Size, stride: Size = (1, 1, 1)) -> nn.Conv3d:
    """A convolution without bias whose output has the resolution of its input over the stride."""
    z, y, x = ((k - 1) // 2 for k in kernel)
    return nn.Conv3d(inputs, outputs, kernel, stride, (z, y, x), bias=False)


class Residual(nn.Module):
    """Norm, activation, convolution, twice, beside the identity."""

    def __init__(self, channels: int, kernel: Size, activation: type[nn.Module]) -> None:
        super().__init__()
        layers = [(Norm(channels), activation(), convolution(channels, channels, kernel)) for _ in range(2)]
        self.layers = nn.Sequential(*(layer for block in layers for layer in block))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


def level_widths(architecture: Architecture) -> list[int]:
    """Channels of each level, finest first: doubled from level to level, up to the width of the plans."""
    num = len(level_strides(architecture.token_size)) + 1
    return [min(architecture.encoder.base * 2**level, architecture.width) for level in range(num)]


class Pyramid(Encoder):
    """A convolutional encoder; `depth` in the plans is the number of its blocks (convolutions or residual blocks) at each level.

    A subclass makes `self.embedding`, the only layer that meets the series, and `self.blocks`, one module for each level, each of
    which takes the map of the level above.
    """

    keeps_series_apart = False
    attends = False
    decoders: ClassVar[tuple[str, ...]] = ("unet", "linear", "nonlinear")
    embedding: nn.Conv3d
    blocks: nn.ModuleList

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__(architecture)
        self.check(architecture, "arch_kwargs")
        self.strides = level_strides(architecture.token_size)
        self.kernels: list[Size] = [*level_kernels(self.strides), (3, 3, 3)]
        self.level_widths = level_widths(architecture)
        self.width = self.level_widths[-1]

    def maps(self, volume: Float[Tensor, "b s z y x"]) -> list[Tensor]:
        """A map (b, channels, z, y, x) of each level, finest first."""
        x = self.embedding(volume)
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(x)
        return maps

    def end(self, maps: Sequence[Tensor]) -> Float[Tensor, "b e gz gy gx"]:
        """What the encoder tells of each token, from the maps of all levels."""
        return maps[-1]

    def levels(
        self,
        volume: Float[Tensor, "b s z y x"],
        present: Bool[Tensor, "b s"],
        num_levels: int = 1,
        shown: Sequence[int] | None = None,
    ) -> list[Features]:
        """Features as of any encoder; of several levels these are the maps, each on a grid of its own."""
        maps = self.maps(volume)
        found, there = maps if num_levels > 1 else [self.end(maps)], present.any(1, keepdim=True)
        grids = [(m.shape[2], m.shape[3], m.shape[4]) for m in found]
        return [Features(m.flatten(2).mT[:, None], there, grid, None) for m, grid in zip(found, grids, strict=True)]

    def stages(self) -> list[list[nn.Parameter]]:
        return [list(self.embedding.parameters()), *(list(block.parameters()) for block in self.blocks)]

    def compiled_parts(self) -> Iterator[nn.Module]:
        yield from self.blocks

    @classmethod
    def check(cls, architecture: Architecture, where: str) -> None:
        a = architecture
        if not 2 <= a.encoder.base <= a.width or a.encoder.base % 2 or a.depth < 1:
            raise UserError(
                f"{where}: encoder.base is {a.encoder.base}, width {a.width}, depth {a.depth}; expected an even number of "
                f"channels at full resolution, at most as many as the width, and one block or more at each level"
            )

    @classmethod
    def num_blocks(cls, architecture: Architecture) -> int:
        return len(level_strides(architecture.token_size)) + 1

    @classmethod
    def told(cls, architecture: Architecture) -> str:
        return f"{', '.join(map(str, level_widths(architecture)))} channels, {architecture.depth} blocks at each level"

    @classmethod
    def num_series_in(cls, weights: Mapping[str, Tensor], architecture: Architecture) -> float:
        return weights["embedding.weight"].shape[1]

    @classmethod
    def carried(
        cls, weights: Mapping[str, Tensor], source: Architecture, target: Architecture, origin: str
    ) -> tuple[dict[str, Tensor], list[Transferred]]:
        """Kernels of the first convolution for each series by its name; one that the pretraining did not have is an error."""
        numbers = numbers_by_name(source, target, origin, "first convolution takes")
        weight = weights["embedding.weight"][:, numbers]
        shape = (len(weight), 1, *weight.shape[2:])
        report = [Transferred(f"embedding.weight[{name}]", shape, f"by name, from {name}") for name in target.series]
        return {**weights, "embedding.weight": weight}, report


class PlainUNet(Pyramid):
    """Convolutions with norm and ReLU, a maximum over places between levels, as in PCRLv2 (Zhou et al., TPAMI 2023)."""

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__(architecture)
        depth, inputs = architecture.depth, self.level_widths[0] // 2
        self.embedding = convolution(len(self.series), inputs, self.kernels[0])
        self.blocks = nn.ModuleList()
        for level, (outputs, kernel) in enumerate(zip(self.level_widths, self.kernels, strict=True)):
            # the embedding is the first convolution of the first level
            layers: list[nn.Module] = [nn.MaxPool3d(self.strides[level - 1])] if level else [Norm(inputs), nn.ReLU()]
            for channels in [inputs] * (depth - (1 if level else 2)) + [outputs]:
                layers += [convolution(inputs, channels, kernel), Norm(channels), nn.ReLU()]
                inputs = channels
            self.blocks.append(nn.Sequential(*layers))


class ResidualUNet(Pyramid):
    """Strided convolutions between levels, residual blocks with SiLU: the autoencoders' [ours]."""

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__(architecture)
        inputs = self.level_widths[0]
        self.embedding = convolution(len(self.series), inputs, self.kernels[0])
        self.blocks = nn.ModuleList()
        for level, (outputs, kernel) in enumerate(zip(self.level_widths, self.kernels, strict=True)):
            layers: list[nn.Module] = []
            if level:
                stride = self.strides[level - 1]
                z, y, x = (4 if step == 2 else 1 for step in stride)
                layers.append(convolution(inputs, outputs, (z, y, x), stride))
            layers += [Residual(outputs, kernel, nn.SiLU) for _ in range(architecture.depth)]
            inputs = outputs
            self.blocks.append(nn.Sequential(*layers))


class FPN(Pyramid):
    """Residual blocks, maxima between levels, then up again, each level added, as in vox2vec (Goncharov et al., MICCAI 2023)."""

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__(architecture)
        depth, widths = architecture.depth, self.level_widths
        self.embedding = convolution(len(self.series), widths[0], self.kernels[0])
        self.blocks = nn.ModuleList()
        for level, (outputs, kernel) in enumerate(zip(widths, self.kernels, strict=True)):
            down = [nn.MaxPool3d(self.strides[level - 1]), nn.Conv3d(widths[level - 1], outputs, 1)] if level else []
            self.blocks.append(nn.Sequential(*down, *self.residuals(depth, outputs, kernel)))
        finer = list(pairwise(widths))
        self.ups = nn.ModuleList(nn.Conv3d(coarse, fine, 1) for fine, coarse in finer)
        self.laterals = nn.ModuleList(nn.Conv3d(fine, fine, 1) for fine, _ in finer)
        self.merged = nn.ModuleList(
            nn.Sequential(*self.residuals(depth, fine, kernel))
            for (fine, _), kernel in zip(finer, self.kernels[:-1], strict=True)
        )
        self.width = sum(widths)

    @staticmethod
    def residuals(depth: int, channels: int, kernel: Size) -> list[nn.Module]:
        return [Residual(channels, kernel, nn.ReLU) for _ in range(depth)]

    def maps(self, volume: Float[Tensor, "b s z y x"]) -> list[Tensor]:
        maps = super().maps(volume)
        # from the coarsest to the finest
        for level in reversed(range(len(self.ups))):
            above = F.interpolate(self.ups[level](maps[level + 1]), maps[level].shape[2:], mode="nearest")
            maps[level] = self.merged[level](above + self.laterals[level](maps[level]))
        return maps

    def end(self, maps: Sequence[Tensor]) -> Float[Tensor, "b e gz gy gx"]:
        """All levels side by side, averaged over each token: their mean over places is the mean of the pyramid."""
        _, _, z, y, x = maps[-1].shape
        return torch.cat([F.adaptive_avg_pool3d(m, (z, y, x)) for m in maps], dim=1)

    def compiled_parts(self) -> Iterator[nn.Module]:
        yield from self.blocks
        yield from self.merged
