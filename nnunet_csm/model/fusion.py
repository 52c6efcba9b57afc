"""From one feature per series and place to one per place."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def mean_over_present(features: Float[Tensor, "b s l e"], series_present: Bool[Tensor, "b s"]) -> Float[Tensor, "b l e"]:
    """Average over the series that are present; those that are absent contribute nothing."""
    weight = series_present / series_present.sum(1, keepdim=True)
    return (features * weight[:, :, None, None].to(features.dtype)).sum(1)


class SeriesProjections(nn.Module):
    """A linear layer for each series, then the average over those that are present; each begins as a rotation of its own.

    The average alone hardly tells a place that is bright in one series from one that is bright in another; with a layer for
    each, this is one linear layer over the features of all series side by side (docs/experiments.md, E1, E2 and E7).
    """

    def __init__(self, num_series: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_series, width, width))
        for weight in self.weight:
            # the average of the rotated features of all series then has the size of one of them
            nn.init.orthogonal_(weight, gain=num_series**0.5)

    def forward(
        self, features: Float[Tensor, "b s l e"], series_present: Bool[Tensor, "b s"], series: Sequence[int] | None = None
    ) -> Float[Tensor, "b l e"]:
        """Fuse; `series` are the numbers of those given when these are not all."""
        weight = self.weight if series is None else torch.stack([self.weight[number] for number in series])
        share = series_present / series_present.sum(1, keepdim=True)
        side_by_side = (features * share[:, :, None, None].to(features.dtype)).transpose(1, 2).flatten(2)
        return side_by_side @ weight.flatten(0, 1)
