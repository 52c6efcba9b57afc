"""One feature per place out of one per series and place, as a map; every way is a class here and a name in the plans."""

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.errors import UserError
from nnunet_csm.model.outputs import Outputs
from nnunet_csm.model.tokens import Size, to_map
from nnunet_csm.plans import FusionSettings

# `fusion` in the plans to its class, imported when it is asked for
FUSIONS = {
    "mean": "nnunet_csm.model.fusion.MeanFusion",
    "projected": "nnunet_csm.model.fusion.ProjectedFusion",
    "adaptive": "nnunet_csm.model.adaptive.AdaptiveFusion",
    "deformable": "nnunet_csm.model.deformable.DeformableFusion",
    "apart": "nnunet_csm.model.fusion.SideBySide",
}


class Fusion(nn.Module, ABC):
    """One map of the features of all series; one of these for every level of the segmenter.

    Args:
        num_series: that the encoder keeps apart.
        width: of a feature.
        num_classes: of logits that it may give beside its map, at the encoder's end; None at the levels before.
        smoothness: of offsets, see `plans.FusionSettings`.

    Attributes:
        weighs: whether series are weighed place by place, which is something to a classifier as well.
    """

    weighs = False

    def __init__(self, num_series: int, width: int, num_classes: int | None = None, smoothness: float = 0.0) -> None:
        super().__init__()

    @abstractmethod
    def forward(
        self,
        features: Float[Tensor, "b m l e"],
        present: Bool[Tensor, "b m"],
        grid: Size,
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b e gz gy gx"] | Outputs:
        """Fuse; series that are absent contribute nothing. For the arguments, see `encoder.Features`.

        While it learns, a fusion may give logits on its grid and a penalty beside the map.
        """


class MeanFusion(Fusion):
    """The average over the series that are present."""

    def forward(
        self,
        features: Float[Tensor, "b m l e"],
        present: Bool[Tensor, "b m"],
        grid: Size,
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b e gz gy gx"]:
        return to_map(mean_over_present(features, present), grid)


class ProjectedFusion(Fusion):
    """A linear layer for each series, then the average over those that are present; each begins as a rotation of its own.

    The average alone hardly tells a place that is bright in one series from one that is bright in another; with a layer for
    each, this is one linear layer over the features of all series side by side (docs/experiments.md, E1, E2 and E7).
    """

    def __init__(self, num_series: int, width: int, *of_others: Any) -> None:
        super().__init__(num_series, width, *of_others)
        self.weight = nn.Parameter(torch.empty(num_series, width, width))
        for weight in self.weight:
            # the average of the rotated features of all series then has the size of one of them
            nn.init.orthogonal_(weight, gain=num_series**0.5)

    def forward(
        self,
        features: Float[Tensor, "b m l e"],
        present: Bool[Tensor, "b m"],
        grid: Size,
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b e gz gy gx"]:
        weight = self.weight if series is None else torch.stack([self.weight[number] for number in series])
        share = present / present.sum(1, keepdim=True)
        side_by_side = (features * share[:, :, None, None].to(features.dtype)).transpose(1, 2).flatten(2)
        return to_map(side_by_side @ weight.flatten(0, 1), grid)


class SideBySide(Fusion):
    """No fusion: the features of all series in one map, those of absent ones 0, for the adaptive decoder."""

    def __init__(self, num_series: int, *of_others: Any) -> None:
        super().__init__(num_series, *of_others)
        self.num_series = num_series

    def forward(
        self,
        features: Float[Tensor, "b m l e"],
        present: Bool[Tensor, "b m"],
        grid: Size,
        series: tuple[int, ...] | None = None,
    ) -> Float[Tensor, "b _side_by_side gz gy gx"]:
        there = [to_map(of_one, grid) for of_one in torch.where(present[:, :, None, None], features, 0.0).unbind(1)]
        if series is not None:
            absent = torch.zeros_like(there[0])
            there = [there[series.index(number)] if number in series else absent for number in range(self.num_series)]
        return torch.cat(there, dim=1)


def mean_over_present(features: Float[Tensor, "b s l e"], series_present: Bool[Tensor, "b s"]) -> Float[Tensor, "b l e"]:
    """Average over the series that are present; those that are absent contribute nothing. One map of all is what it is."""
    if features.shape[1] == 1:
        return features[:, 0]
    weight = series_present / series_present.sum(1, keepdim=True)
    return (features * weight[:, :, None, None].to(features.dtype)).sum(1)


def fusion_class(settings: FusionSettings) -> type[Fusion]:
    """The class of a fusion. Raises UserError when there is none of that name."""
    name = settings.name
    if name not in FUSIONS:
        raise UserError(f"fusion in arch_kwargs is {name!r}, expected one of {', '.join(FUSIONS)}; correct it in the plans")
    module, _, attribute = FUSIONS[name].rpartition(".")
    found: type[Fusion] = getattr(import_module(module), attribute)
    return found


def build_fusion(settings: FusionSettings, num_series: int, width: int, num_classes: int | None = None) -> Fusion:
    """The fusion that the plans name; with one map of all series there is nothing to fuse but that. See `Fusion`.

    Raises:
        UserError: there is none of that name, or it has not what the settings ask for.
    """
    found, name = fusion_class(settings), settings.name
    if settings.smoothness < 0 or (settings.smoothness and name != "deformable"):
        raise UserError(
            f"fusion.smoothness in arch_kwargs is {settings.smoothness:g} with fusion {name!r}; expected a weight of 0 or more, "
            f"above 0 only with 'deformable', which has offsets; correct it in the plans"
        )
    return (found if num_series > 1 else MeanFusion)(num_series, width, num_classes, settings.smoothness)
