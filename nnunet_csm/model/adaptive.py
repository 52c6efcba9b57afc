"""Adaptive fusion after A2FSeg (Wang and Hong, MICCAI 2023), over the maps of an encoder that keeps series apart.

Written anew; Zirui0623/A2FSeg @ed0936f (Apache-2.0) was read. There, weights are 3 x 3 x 3 convolutions of full-resolution maps.
Tokens have met all others in the encoder, and at its width such a kernel has 27 times the weights: kernels are 1 here.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.model.fusion import Fusion, mean_over_present
from nnunet_csm.model.outputs import Outputs
from nnunet_csm.model.tokens import Size, to_map

# A branch's loss is a mean over its levels with weights that halve from one to the next (the published network counts four of
# its five), the segmentation's has the weight of the finest level, 8 / 15; here the segmentation has 1
BRANCH_WEIGHT = 1 + 1 / 2 + 1 / 4 + 1 / 8


class AdaptiveFusion(Fusion):
    """A sum over present series, weighed by each against their average, and the average; series and average also segment.

    The weights of a channel at a place sum to 1 over the present series. At the encoder's end, while it learns, every series'
    map and the average are segmented by one layer; where a sample lacks a series, the average stands in, without gradient.
    """

    def __init__(self, num_series: int, width: int, num_classes: int | None = None, *of_others: Any) -> None:
        super().__init__(num_series, width, num_classes, *of_others)
        self.weigh = nn.ModuleList(
            nn.Sequential(*convolution(2 * width, width), nn.Conv3d(width, width, 1), nn.LeakyReLU()) for _ in range(num_series)
        )
        self.output = nn.Sequential(*convolution(2 * width, width))
        self.head = None if num_classes is None else nn.Conv3d(width, num_classes, 1)

    def forward(
        self,
        features: Float[Tensor, "b m l e"],
        present: Bool[Tensor, "b m"],
        grid: Size,
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b e gz gy gx"] | Outputs:
        maps = [to_map(of_one, grid) for of_one in features.unbind(1)]
        average = to_map(mean_over_present(features, present), grid)
        weight = self.weights(maps, average, present, series)
        fused = (weight.to(average.dtype) * torch.stack(maps, dim=1)).sum(1)
        result = self.output(torch.cat([fused, average], dim=1))
        if self.head is None or not self.training:
            return result
        of_average = self.head(average)
        others = [of_average]
        for number, of_one in enumerate(maps):
            there = present[:, number, None, None, None, None]
            others.append(torch.where(there, self.head(of_one), of_average.detach()))
        return Outputs(result, tuple((logits, BRANCH_WEIGHT) for logits in others))

    def weights(
        self,
        maps: list[Float[Tensor, "b e gz gy gx"]],
        average: Float[Tensor, "b e gz gy gx"],
        present: Bool[Tensor, "b m"],
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b m e gz gy gx"]:
        """What each series counts at every place and channel; 0 where it is absent."""
        numbers = range(len(maps)) if series is None else series
        scores = torch.stack(
            [self.weigh[number](torch.cat([of_one, average], dim=1)) for number, of_one in zip(numbers, maps, strict=True)], dim=1
        )
        return scores.float().masked_fill(~present[:, :, None, None, None, None], -math.inf).softmax(1)


def convolution(input_channels: int, output_channels: int) -> tuple[nn.Module, ...]:
    """A linear layer at every place, instance norm and leaky ReLU."""
    return nn.Conv3d(input_channels, output_channels, 1), nn.InstanceNorm3d(output_channels, affine=True), nn.LeakyReLU()
