"""Error on hidden voxels by what was left to rebuild them from, beside the best voxel-wise linear map."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from nnunet_csm.evaluation.reconstruction import RidgeBaseline

HIDDEN_WHOLE = "series hidden whole, another visible there"
HIDDEN_WHOLE_ALONE = "series hidden whole, nothing visible there"
HIDDEN_PART = "series visible elsewhere"


def foreground(series: Float[np.ndarray, "z y x"]) -> Bool[np.ndarray, "z y x"]:
    """Voxels that are not background: nnU-Net leaves it 0 when it normalises within a mask, else it is the lowest value."""
    return (series != 0) & (series > series.min())


def foreground_voxels(patch: Float[np.ndarray, "s z y x"]) -> Float[np.ndarray, "s n 1 1"]:
    """The voxels of a patch that are foreground in any series, for `RidgeBaseline.fit`."""
    inside = np.any([foreground(series) for series in patch], axis=0)
    return patch[:, inside][:, :, None, None]


class HiddenVoxelErrors:
    """Sums of squared errors over foreground voxels, by series and by what was visible.

    The network and the linear map see the same visible tokens. The map is the ridge regression of the hidden series on
    the series visible at the same voxel.
    """

    def __init__(self, series: Sequence[str], baseline: RidgeBaseline) -> None:
        self.series, self.baseline = tuple(series), baseline
        self.rows: list[tuple[str, str, int, float, float, float]] = []

    def add(
        self, patch: Float[np.ndarray, "s z y x"], rebuilt: Float[np.ndarray, "s z y x"], hidden: Bool[np.ndarray, "s z y x"]
    ) -> None:
        """Score one patch; series that are all zero are absent and left out."""
        visible = ~hidden
        for number, name in enumerate(self.series):
            if not patch[number].any():
                continue
            inside = foreground(patch[number])
            elsewhere = np.delete(visible, number, axis=0).any(axis=0)
            if hidden[number].all():
                kinds = {HIDDEN_WHOLE: elsewhere, HIDDEN_WHOLE_ALONE: ~elsewhere}
            else:
                kinds = {HIDDEN_PART: np.ones_like(elsewhere)}
            linear = self.baseline.predict(patch, visible, number)
            for kind, where in kinds.items():
                voxels = where & hidden[number] & inside
                true = patch[number][voxels]
                network, ridge, mean = (
                    float(np.square(true - estimate).sum())
                    for estimate in (rebuilt[number][voxels], linear[voxels], self.baseline.mean[number])
                )
                self.rows.append((kind, name, len(true), network, ridge, mean))

    def table(self) -> pd.DataFrame:
        """Mean squared errors; columns left_visible, series, voxels, network, linear, mean; a row "all" per kind."""
        rows = pd.DataFrame(self.rows, columns=["left_visible", "series", "voxels", "network", "linear", "mean"])
        sums = rows.groupby(["left_visible", "series"], sort=False).sum().reset_index()
        overall = rows.drop(columns="series").groupby("left_visible", sort=False).sum().reset_index().assign(series="all")
        table = pd.concat([sums, overall[sums.columns]], ignore_index=True)
        table = table[table["voxels"] > 0].copy()
        for column in ("network", "linear", "mean"):
            table[column] /= table["voxels"]
        return table.sort_values(["left_visible", "series"], ignore_index=True)
