"""Decoders from features on the token grid to logits at full resolution: UNETR's decoder, and a light one.

Level i has a resolution i halvings below the input; level n, where n = log2 of the longest token edge, is the token grid.
A short token edge is halved at the coarse levels only, as nnU-Net treats thick slices.
"""

from collections.abc import Sequence

import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import LayerNormNd
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from torch import Tensor, nn

from nnunet_csm.model.outputs import Outputs
from nnunet_csm.model.tokens import Size


def level_strides(token_size: Sequence[int]) -> list[Size]:
    """Strides from level i to level i + 1, finest first; their product is the token size."""
    halvings = [t.bit_length() - 1 for t in token_size]
    num_levels = max(halvings)
    strides = []
    for level in range(num_levels):
        z, y, x = (2 if level >= num_levels - h else 1 for h in halvings)
        strides.append((z, y, x))
    return strides


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
    """Upsample, concatenate with the skip of that level, convolve; logits at full resolution.

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

    def forward(self, x: Tensor, skips: Sequence[Tensor | None]) -> Tensor | Outputs:
        for upsampling, block, skip in zip(self.upsamplings, self.blocks, reversed(skips), strict=True):
            x = upsampling(x)
            x = block(x if skip is None else torch.cat([x, skip], dim=1))
        return self.seg_layers[0](x)


class LightDecoder(nn.Module):
    """A linear layer over the features of all taps, and transposed convolutions from tokens to voxels (Primus, arXiv 2410.23132).

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
