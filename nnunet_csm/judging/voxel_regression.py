"""The linear baseline that a pretrained network has to beat: each voxel of a hidden series from the others at the same voxel."""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Float

from nnunet_csm.errors import UserError


class RidgeBaseline:
    """Voxel-wise ridge regression of a hidden series on the series that are visible at the same voxel.

    For every hidden series h and every set v of other series there is one linear map with intercept,
    x_h = mean_h + (x_v - mean_v) (C_vv + alpha I)^-1 C_vh, and all of them follow from the mean and the covariance C of
    the series over voxels. `alpha` is per voxel: sklearn's Ridge(alpha * num_voxels) is the same map.
    """

    def __init__(self, alpha: float = 1e-3) -> None:
        assert alpha >= 0
        self.alpha = alpha
        self.num_voxels = 0
        self.mean: Float[np.ndarray, " s"] = np.empty(0)
        self.covariance: Float[np.ndarray, "s s"] = np.empty((0, 0))

    def fit(self, volumes: Iterable[Float[np.ndarray, "s _z _y _x"]]) -> "RidgeBaseline":
        """Take mean and covariance over all voxels of `volumes`, one volume in memory at a time; forgets an earlier fit.

        Volumes are (s, z, y, x), of one s. A volume with an absent (all zero) series is left out: its zeros are no measurements.
        Raises UserError when none remains.
        """
        num_voxels, num_left_out = 0, 0
        mean: np.ndarray | float = 0.0
        scatter: np.ndarray | float = 0.0
        for volume in volumes:
            voxels = np.asarray(volume, dtype=np.float64).reshape(len(volume), -1)
            if not voxels.any(axis=1).all():
                num_left_out += 1
                continue
            num_new = voxels.shape[1]
            new_mean = voxels.mean(axis=1)
            centred = voxels - new_mean[:, None]
            # Chan, Golub and LeVeque 1979: merging centred moments keeps the digits that sums of squares of raw intensities lose.
            shift = new_mean - mean
            num_total = num_voxels + num_new
            scatter = scatter + centred @ centred.T + np.outer(shift, shift) * (num_voxels * num_new / num_total)
            mean = mean + shift * (num_new / num_total)
            num_voxels = num_total
        if num_voxels == 0:
            msg = (
                f"no crop holds every series ({num_left_out} given, each lacks one): the linear baseline cannot be fitted; "
                "give it cases in which all series are present"
            )
            raise UserError(msg)
        self.num_voxels = num_voxels
        self.mean = np.asarray(mean)
        self.covariance = np.asarray(scatter) / num_voxels
        return self

    def coefficients(self, visible: tuple[int, ...], hidden: int) -> tuple[Float[np.ndarray, " v"], float]:
        """Weights of the `visible` series, in that order, and the intercept of the map to series `hidden`."""
        assert self.num_voxels, "fit first"
        v = list(visible)
        weights = np.linalg.solve(self.covariance[np.ix_(v, v)] + self.alpha * np.eye(len(v)), self.covariance[v, hidden])
        return weights, float(self.mean[hidden] - weights @ self.mean[v])
