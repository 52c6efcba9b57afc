"""Decoders from an encoder's features to logits at full resolution.

Of a ViT's, all on the token grid: UNETR's, and a light one. Of a pyramid's, one map for each level (`tokens.level_strides`): that
of a U-Net, which is UNETR's without what brings tokens up, and the two heads of vox2vec.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import LayerNormNd
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_csm.model.deformable import RefinedHead
from nnunet_csm.model.outputs import Outputs
from nnunet_csm.model.tokens import Size

# of leaky ReLUs, torch's and nnU-Net's
SLOPE = 0.01


def conv_block(input_channels: int, output_channels: int, kernel_size: Size) -> BasicBlockD:
    """UNETR's residual block: two convolutions with instance norm and leaky ReLU."""
    return BasicBlockD(
        nn.Conv3d,
        input_channels,
        output_channels,
        kernel_size,
        stride=1,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


class Skip(nn.Module):
    """Bring a map from the token grid up to one level."""

    def __init__(self, width: int, channels: int, strides: Sequence[Size], kernel_sizes: Sequence[Size]) -> None:
        super().__init__()
        first, *further = strides
        layers: list[nn.Module] = [nn.ConvTranspose3d(width, channels, first, first)]
        for stride, kernel_size in zip(further, kernel_sizes[1:], strict=True):
            layers += [nn.ConvTranspose3d(channels, channels, stride, stride), conv_block(channels, channels, kernel_size)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class UNETRDecoder(nn.Module):
    """Upsample, concatenate with the skip of that level, convolve; logits at full resolution (UNETR's, and any U-Net's).

    `seg_layers` is nnU-Net's name: `-pretrained_weights` leaves these out, so that other class counts load. Without
    `finest_skip`, the last block convolves the upsampled map alone.
    """

    def __init__(
        self,
        width: int,
        channels: Sequence[int],
        strides: Sequence[Size],
        kernel_sizes: Sequence[Size],
        num_classes: int,
        finest_skip: bool = True,
    ):
        super().__init__()
        inputs = [*channels[1:], width]
        levels = list(zip(inputs, channels, strides, kernel_sizes, strict=True))[::-1]
        self.upsamplings = nn.ModuleList(nn.ConvTranspose3d(i, c, stride, stride) for i, c, stride, _ in levels)
        num_maps = [2] * (len(levels) - 1) + [2 if finest_skip else 1]
        self.blocks = nn.ModuleList(
            conv_block(n * c, c, kernel_size) for n, (_, c, _, kernel_size) in zip(num_maps, levels, strict=True)
        )
        self.seg_layers = nn.ModuleList([nn.Conv3d(channels[0], num_classes, 1)])

    def refine(self, kernel_size: Size, refinement: str) -> None:
        """Segment twice, see `RefinedHead`."""
        num_classes, channels = next(self.seg_layers.parameters()).shape[:2]
        self.seg_layers[0] = RefinedHead(channels, num_classes, kernel_size, refinement)

    def forward(self, x: Tensor, skips: Sequence[Tensor | None]) -> Tensor | Outputs:
        for upsampling, block, skip in zip(self.upsamplings, self.blocks, reversed(skips), strict=True):
            x = upsampling(x)
            x = block(x if skip is None else torch.cat([x, skip], dim=1))
        return self.seg_layers[0](x)


class LightDecoder(nn.Module):
    """A linear layer over the features of all taps, and transposed convolutions from tokens to voxels (Primus, arXiv 2503.01835).

    No token meets another here and no voxel comes past the encoder: all context is the encoder's, and so is all that
    pretraining brought. `seg_layers` as in `UNETRDecoder`.
    """

    def __init__(self, width: int, num_taps: int, channels: Sequence[int], strides: Sequence[Size], num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Conv3d(num_taps * width, width, 1), LayerNormNd(width))
        inputs = [*channels[1:], width]
        self.upsamplings = nn.Sequential(
            *(
                nn.Sequential(nn.ConvTranspose3d(i, c, stride, stride), LayerNormNd(c), nn.GELU())
                for i, c, stride in list(zip(inputs, channels, strides, strict=True))[:0:-1]
            )
        )
        self.seg_layers = nn.ModuleList([nn.ConvTranspose3d(inputs[0], num_classes, strides[0], strides[0])])

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.seg_layers[0](self.upsamplings(self.embedding(torch.cat(list(features), dim=1))))


class LinearHead(nn.Module):
    """The sum of a linear layer at each level of a pyramid, brought up to voxels by repetition (vox2vec's linear probe)."""

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.seg_layers = nn.ModuleList(nn.Conv3d(width, num_classes, 1, bias=not level) for level, width in enumerate(widths))

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, x = [layer(m) for layer, m in zip(self.seg_layers, maps, strict=True)]
        for of_level in reversed(finer):
            x = F.interpolate(x, of_level.shape[2:], mode="nearest") + of_level
        return x


class NonlinearHead(nn.Module):
    """Residual blocks of kernel 1, from the coarsest level of a pyramid up, each level added (vox2vec's non-linear probe).

    No place meets another but where a level is brought up by repetition, so all context is the encoder's.
    """

    def __init__(self, widths: Sequence[int], num_classes: int) -> None:
        super().__init__()
        finer = list(pairwise(widths))
        self.ups = nn.ModuleList(nn.Conv3d(coarse, fine, 1) for fine, coarse in finer)
        self.blocks = nn.ModuleList(conv_block(width, width, (1, 1, 1)) for width in widths)
        self.seg_layers = nn.ModuleList([nn.Conv3d(widths[0], num_classes, 1)])

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = self.blocks[-1](maps[-1])
        for level in reversed(range(len(self.ups))):
            above = F.interpolate(self.ups[level](x), maps[level].shape[2:], mode="nearest")
            x = self.blocks[level](above + maps[level])
        return self.seg_layers[0](x)
