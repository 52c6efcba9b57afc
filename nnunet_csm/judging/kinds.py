"""Error on hidden tokens by what was left to rebuild them from: of a network, and of linear maps given the same tokens."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

HIDDEN_WHOLE = "series hidden whole, another visible there"
HIDDEN_WHOLE_ALONE = "series hidden whole, nothing visible there"
HIDDEN_PART = "series visible elsewhere"
KINDS = (HIDDEN_WHOLE, HIDDEN_WHOLE_ALONE, HIDDEN_PART)


def kinds_of(hidden: Bool[Tensor, "b s l"], present: Bool[Tensor, "b s"]) -> Bool[Tensor, "c b s l"]:
    """The hidden tokens of present series, apart by `KINDS`: every one is of one kind."""
    visible = ~hidden
    elsewhere = (visible.sum(1, keepdim=True) - visible.long()) > 0
    whole = hidden.all(2, keepdim=True)
    scored = hidden & present[..., None]
    return torch.stack([scored & whole & elsewhere, scored & whole & ~elsewhere, scored & ~whole])


def squared_errors(
    truth: Float[Tensor, "b s l v"],
    estimate: Float[Tensor, "b s l v"] | Float[Tensor, "s 1 1"],
    inside: Bool[Tensor, "b s l v"],
    kinds: Bool[Tensor, "c b s l"],
) -> Float[Tensor, "c s"]:
    """Sums over the voxels that are `inside`, by kind and series."""
    error = torch.where(inside, (truth - estimate).square(), 0.0).sum(-1)
    return torch.where(kinds, error, 0.0).double().sum((1, 3))


def num_voxels(inside: Bool[Tensor, "b s l v"], kinds: Bool[Tensor, "c b s l"]) -> Float[Tensor, "c s"]:
    """What those sums are to be divided by."""
    return torch.where(kinds, inside.sum(-1), 0).sum((1, 3)).double()


def error_table(series: Sequence[str], counts: Float[Tensor, "c s"], sums: Mapping[str, Float[Tensor, "c s"]]) -> pd.DataFrame:
    """Mean squared errors of several estimates.

    Args:
        series: their names.
        counts: `num_voxels` of all patches.
        sums: `squared_errors` of all patches, by estimate.

    Returns:
        Columns left_visible, series, voxels and one for every estimate; a row "all" for every kind.
    """
    rows = []
    for kind, name in enumerate(KINDS):
        for one in [*series, "all"]:
            of = list(range(len(series))) if one == "all" else [series.index(one)]
            count = float(counts[kind, of].sum())
            errors = {estimate: float(values[kind, of].sum()) / max(count, 1) for estimate, values in sums.items()}
            rows.append({"left_visible": name, "series": one, "voxels": int(count), **errors})
    table = pd.DataFrame(rows)
    return table[table["voxels"] > 0].sort_values(["left_visible", "series"], ignore_index=True)
