"""Linear maps of whatever series patches hold together: what is linear need not be learned by a ViT."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnunet_csm.judging.token_regression import TokenRidge

ESTIMATES = ("linear", "token_linear", "mean")


class LinearMaps:
    """One `TokenRidge` for each of the sets of series that many patches hold, see `sets_of_series`.

    Most pretrainings have one set, all series. Where datasets with other series are pretrained on together, no patch may hold
    all: then each dataset's are estimated from each other.

    Args:
        fitted: by numbers of the series, rising; not empty.
    """

    def __init__(self, fitted: Mapping[tuple[int, ...], TokenRidge]) -> None:
        self.fitted = {series: fitted[series] for series in sorted(fitted, key=len)}

    def estimates(
        self, tokens: Float[Tensor, "b s l v"], visible: Bool[Tensor, "b s l"], present: Bool[Tensor, "b s"]
    ) -> dict[str, Float[Tensor, "b s l v"]]:
        """Every token, by `ESTIMATES`, from the other series' tokens visible at its place.

        A patch takes the maps of the set that holds most of its series, and as few others as possible. Of a series beyond that
        set the estimate is its mean in another set, or 0, the mean of z-scores, where no set holds it.
        """
        means = tokens.new_zeros(tokens.shape[1])
        for series, ridge in self.fitted.items():
            means[list(series)] = torch.from_numpy(ridge.voxelwise.mean).to(means)
        found = {name: means[:, None, None].expand_as(tokens).clone() for name in ESTIMATES}
        # the first of those that hold as many, which is the smallest
        taken = torch.stack([present[:, list(series)].sum(1) for series in self.fitted]).argmax(0)
        for number, (series, ridge) in enumerate(self.fitted.items()):
            here = (taken == number).nonzero()
            columns = torch.tensor(series, device=tokens.device)
            if len(here):
                linear, token_linear = ridge.estimates(tokens[here, columns], visible[here, columns])
                mean = torch.from_numpy(ridge.voxelwise.mean).to(tokens)[:, None, None].expand_as(linear)
                for name, estimate in zip(ESTIMATES, (linear, token_linear, mean), strict=True):
                    found[name][here, columns] = estimate
        return found


def sets_of_series(held: Mapping[tuple[bool, ...], int], most: int) -> list[tuple[int, ...]]:
    """Sets of series to fit maps for, those of most patches first, at most so many.

    They are the sets that more patches hold than hold more series besides: of a few patches with all series no maps are made
    that serve many others.

    Args:
        held: which series a patch holds, to the number of such patches.
        most: sets.
    """
    sets = {tuple(number for number, there in enumerate(one) if there): count for one, count in held.items() if any(one)}
    more = {one: sum(count for other, count in sets.items() if set(one) < set(other)) for one in sets}
    return sorted((one for one in sets if sets[one] > more[one]), key=lambda one: (-sets[one], one))[:most]
