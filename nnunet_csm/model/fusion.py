"""From one feature per series and place to one per place."""

from jaxtyping import Bool, Float
from torch import Tensor


def mean_over_present(features: Float[Tensor, "b s l e"], series_present: Bool[Tensor, "b s"]) -> Float[Tensor, "b l e"]:
    """Average over the series that are present; those that are absent contribute nothing."""
    weight = series_present / series_present.sum(1, keepdim=True)
    return (features * weight[:, :, None, None].to(features.dtype)).sum(1)
