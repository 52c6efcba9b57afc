"""Adaptive fusion after A2FSeg (Wang and Hong, MICCAI 2023): over a ViT's tokens, and over a U-Net for each series as published.

Written anew; Zirui0623/A2FSeg @ed0936f (Apache-2.0) was read. A ViT's tokens have met all others in the encoder, and at its width
kernels of 3 would have 27 times the weights: there kernels are 1.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.model.fusion import Fusion, mean_over_present
from nnunet_csm.model.outputs import Outputs
from nnunet_csm.model.tokens import Size, level_kernels, to_map
from nnunet_csm.model.unet_by_series import ups

# A branch's loss is a mean over its levels with weights that halve from one to the next (the published network counts four of
# its five), the segmentation's has the weight of the finest level, 8 / 15; here the segmentation has 1
BRANCH_WEIGHT = 1 + 1 / 2 + 1 / 4 + 1 / 8


class Adaptive(nn.Module):
    """A sum over present series, each weighed by itself and the average, and both together convolved.

    The weights of a channel at a place sum to 1 over the present series.
    """

    def __init__(self, num_series: int, width: int, kernel_size: Size) -> None:
        super().__init__()

        def convolution(inputs: int) -> nn.Conv3d:
            return nn.Conv3d(inputs, width, kernel_size, padding="same")

        def combined() -> tuple[nn.Module, ...]:
            return convolution(2 * width), nn.InstanceNorm3d(width, affine=True), nn.LeakyReLU()

        self.weigh = nn.ModuleList(nn.Sequential(*combined(), convolution(width), nn.LeakyReLU()) for _ in range(num_series))
        self.output = nn.Sequential(*combined())

    def forward(
        self,
        maps: Sequence[Float[Tensor, "b e z y x"]],
        average: Float[Tensor, "b e z y x"],
        present: Bool[Tensor, "b m"],
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b e z y x"]:
        weight = self.weights(maps, average, present, series)
        fused = (weight.to(average.dtype) * torch.stack([*maps], dim=1)).sum(1)
        return self.output(torch.cat([fused, average], dim=1))

    def weights(
        self,
        maps: Sequence[Float[Tensor, "b e z y x"]],
        average: Float[Tensor, "b e z y x"],
        present: Bool[Tensor, "b m"],
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b m e z y x"]:
        """What each series counts at every place and channel; 0 where it is absent."""
        numbers = range(len(maps)) if series is None else series
        scores = torch.stack(
            [self.weigh[number](torch.cat([of_one, average], dim=1)) for number, of_one in zip(numbers, maps, strict=True)], dim=1
        )
        return scores.float().masked_fill(~present[:, :, None, None, None, None], -math.inf).softmax(1)


class AdaptiveFusion(Fusion):
    """Adaptive fusion of the maps of a ViT; while it learns, every series' map and the average also segment.

    They do at the encoder's end, by one layer for all.
    """

    weighs = True

    def __init__(self, num_series: int, width: int, num_classes: int | None = None, *of_others: Any) -> None:
        super().__init__(num_series, width, num_classes, *of_others)
        self.adaptive = Adaptive(num_series, width, (1, 1, 1))
        # nnU-Net's name, see `decoders.UNETRDecoder`
        self.seg_layers = nn.ModuleList([] if num_classes is None else [nn.Conv3d(width, num_classes, 1)])

    def forward(
        self,
        features: Float[Tensor, "b m l e"],
        present: Bool[Tensor, "b m"],
        grid: Size,
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b e gz gy gx"] | Outputs:
        maps = [to_map(of_one, grid) for of_one in features.unbind(1)]
        average = to_map(mean_over_present(features, present), grid)
        result = self.adaptive(maps, average, present, series)
        if not self.training or not len(self.seg_layers):
            return result
        (head,) = self.seg_layers
        logits = with_stand_in(head(average), [head(of_one) for of_one in maps], present)
        return Outputs(result, tuple((of_branch, BRANCH_WEIGHT) for of_branch in logits))


class AdaptiveDecoder(nn.Module):
    """A2FSeg from the maps of its U-Nets on: a way up over their averages, and adaptive fusion at full resolution.

    While it learns, every U-Net and the average also segment, at every level but the coarsest, with half the weight of the level
    above.
    """

    def __init__(self, widths: Sequence[int], strides: Sequence[Size], depth: int, num_series: int, num_classes: int) -> None:
        super().__init__()
        self.num_series, segmented = num_series, widths[: max(1, len(strides) - 1)]
        self.ups = ups(widths, strides, depth)
        self.adaptive = Adaptive(num_series, widths[0], level_kernels(strides)[0])
        self.seg_layers = nn.ModuleList([nn.Conv3d(widths[0], num_classes, 1, bias=False)])
        self.seg_layers.extend(
            nn.ModuleList(nn.Conv3d(width, num_classes, 1, bias=False) for width in segmented) for _ in range(1 + num_series)
        )

    def forward(self, maps: Sequence[Tensor], present: Bool[Tensor, "b s"]) -> Tensor | Outputs:
        """Logits from the maps of all series side by side (b, s * channels, z, y, x), finest first, zero for absent ones."""
        apart = [of_level.unflatten(1, (self.num_series, -1)) for of_level in maps]
        number = present.sum(1)[:, None, None, None, None]
        *skips, x = [of_level.sum(1) / number for of_level in apart]
        averages: list[Tensor] = []
        for up in self.ups:
            x = up(x, skips.pop())
            averages.insert(0, x)
        first, *of_branches = self.seg_layers
        logits = first(self.adaptive(apart[0].unbind(1), x, present))
        if not self.training:
            return logits
        others: list[tuple[Tensor, float]] = []
        for level, heads in enumerate(zip(*of_branches, strict=True)):
            of_average, *of_series = (
                head(of_one) for head, of_one in zip(heads, [averages[level], *apart[level].unbind(1)], strict=True)
            )
            others += [(of_branch, 0.5**level) for of_branch in with_stand_in(of_average, of_series, present)]
        return Outputs(logits, tuple(others))


def with_stand_in(
    of_average: Float[Tensor, "b c z y x"], of_series: Sequence[Float[Tensor, "b c z y x"]], present: Bool[Tensor, "b m"]
) -> list[Float[Tensor, "b c z y x"]]:
    """Logits of the average and of each series; where a sample lacks a series those of the average, without gradient."""
    there = present[:, :, None, None, None, None].unbind(1)
    return [of_average, *(torch.where(t, of_one, of_average.detach()) for t, of_one in zip(there, of_series, strict=True))]
