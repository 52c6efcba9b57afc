"""A U-Net for each series (A2FSeg's branches): what an encoder is to the adaptive decoder, which fuses their maps."""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from dynamic_network_architectures.building_blocks.simple_conv_blocks import StackedConvBlocks
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.model.encoder import Encoder, Features, Transferred, numbers_by_name
from nnunet_csm.model.pyramid import Pyramid, level_widths
from nnunet_csm.model.tokens import Size, level_kernels, level_strides
from nnunet_csm.plans import Architecture


def convolutions(inputs: int, outputs: int, kernel_size: Size, number: int, stride: Size = (1, 1, 1)) -> StackedConvBlocks:
    """nnU-Net's: convolutions, each with instance norm and leaky ReLU."""
    return StackedConvBlocks(
        number,
        nn.Conv3d,
        inputs,
        outputs,
        kernel_size,
        stride,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


class Up(nn.Module):
    """Bring a map up a level, beside what is there convolve both."""

    def __init__(self, coarse: int, fine: int, stride: Size, kernel_size: Size, depth: int) -> None:
        super().__init__()
        self.upsampling = nn.ConvTranspose3d(coarse, fine, stride, stride, bias=False)
        self.block = convolutions(2 * fine, fine, kernel_size, depth)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.block(torch.cat([self.upsampling(x), skip], dim=1))


def ups(widths: Sequence[int], strides: Sequence[Size], depth: int) -> nn.ModuleList:
    """The way up of a U-Net, from the coarsest level on."""
    levels = zip(pairwise(widths), strides, level_kernels(strides), strict=True)
    return nn.ModuleList([Up(coarse, fine, stride, kernel, depth) for (fine, coarse), stride, kernel in levels][::-1])


class UNet(nn.Module):
    """A plain U-Net without its segmentation heads."""

    def __init__(self, widths: Sequence[int], strides: Sequence[Size], depth: int) -> None:
        super().__init__()
        inputs, kernels = [1, *widths], [*level_kernels(strides), (3, 3, 3)]
        layers = zip(inputs[:-1], widths, kernels, [(1, 1, 1), *strides], strict=True)
        self.blocks = nn.ModuleList(convolutions(i, o, kernel, depth, stride) for i, o, kernel, stride in layers)
        self.ups = ups(widths, strides, depth)

    def forward(self, volume: Float[Tensor, "b 1 z y x"]) -> list[Tensor]:
        """Maps (b, channels, z, y, x) of the way up, finest first, and that of the coarsest level."""
        skips = [volume]
        for block in self.blocks:
            skips.append(block(skips[-1]))
        maps = [skips.pop()]
        for up in self.ups:
            maps.append(up(maps[-1], skips.pop()))
        return maps[::-1]


class UNetBySeries(Encoder):
    """A U-Net for each series, sharing nothing; `depth` in the plans is the number of convolutions at each level.

    Its levels are those of a convolutional encoder, `encoder.base` channels at full resolution, doubled up to `width`.
    """

    attends = False
    decoders: ClassVar[tuple[str, ...]] = ("adaptive",)

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__(architecture)
        self.level_widths = level_widths(architecture)
        self.width = self.level_widths[-1]
        strides = level_strides(architecture.token_size)
        self.branches = nn.ModuleList(UNet(self.level_widths, strides, architecture.depth) for _ in self.series)

    def levels(
        self,
        volume: Float[Tensor, "b s z y x"],
        present: Bool[Tensor, "b s"],
        num_levels: int = 1,
        shown: Sequence[int] | None = None,
    ) -> list[Features]:
        """Features as of any encoder; of one level, that of the coarsest."""
        numbers = range(len(self.series)) if shown is None else shown
        maps = [self.branches[number](volume[:, number : number + 1]) for number in numbers]
        there = torch.stack([present[:, number] for number in numbers], dim=1)
        series = None if shown is None else tuple(shown)
        found = []
        for of_level in [*zip(*maps, strict=True)][-num_levels:]:
            _, _, z, y, x = of_level[0].shape
            found.append(Features(torch.stack(of_level, dim=1).flatten(3).mT, there, (z, y, x), series))
        return found

    def stages(self) -> list[list[nn.Parameter]]:
        levels = zip(*(branch.blocks for branch in self.branches), strict=True)
        return [[parameter for block in of_level for parameter in block.parameters()] for of_level in levels]

    def compiled_parts(self) -> Iterator[nn.Module]:
        # equal but for their weights
        yield from self.branches

    @classmethod
    def check(cls, architecture: Architecture, where: str) -> None:
        Pyramid.check(architecture, where)

    @classmethod
    def num_blocks(cls, architecture: Architecture) -> int:
        return len(level_strides(architecture.token_size))

    @classmethod
    def told(cls, architecture: Architecture) -> str:
        return f"a U-Net for each series: {Pyramid.told(architecture)}"

    @classmethod
    def num_series_in(cls, weights: Mapping[str, Tensor], architecture: Architecture) -> float:
        return len({name.split(".")[1] for name in weights})

    @classmethod
    def carried(
        cls, weights: Mapping[str, Tensor], source: Architecture, target: Architecture, origin: str
    ) -> tuple[dict[str, Tensor], list[Transferred]]:
        """The U-Net of each series by its name; one that there was none for is an error."""
        numbers = numbers_by_name(source, target, origin, "U-Nets are for")
        found, report = {}, []
        for new, (old, series) in enumerate(zip(numbers, target.series, strict=True)):
            for name, tensor in weights.items():
                if name.startswith(f"branches.{old}."):
                    renamed = re.sub(r"\d+", str(new), name, count=1)
                    found[renamed] = tensor
                    report.append(Transferred(renamed, tuple(tensor.shape), f"by name, from {series}"))
        return found, report
