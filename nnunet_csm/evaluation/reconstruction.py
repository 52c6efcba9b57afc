"""How near a rebuilt image is to the true one: PSNR, SSIM, and how much of a pattern the borders of tokens leave in it.

Images are scaled to intensities from 0 to 1, so that the peak and the data range are 1.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

# of the Gaussian that SSIM weighs neighbours with, in voxels; scikit-image cuts it off at 11
SSIM_SIGMA, SSIM_WINDOW = 1.5, 11


def psnr(true: Float[np.ndarray, "z y x"], rebuilt: Float[np.ndarray, "z y x"], where: Bool[np.ndarray, "z y x"]) -> float:
    """Peak signal-to-noise ratio in dB over some voxels; NaN when there are none, or when they are as in truth."""
    if np.array_equal(true[where], rebuilt[where]):
        return float("nan")
    return float(peak_signal_noise_ratio(true[where].astype(float), rebuilt[where].astype(float), data_range=1))


def similarity(true: Float[np.ndarray, "z y x"], rebuilt: Float[np.ndarray, "z y x"]) -> Float[np.ndarray, "z y x"]:
    """SSIM of every voxel with its neighbours in 3-D (Wang et al. 2004, in 3-D), beyond the patch reflected at its border."""
    # what scikit-image leaves out of its mean, which is not taken; it wants it to fit
    window = min(SSIM_WINDOW, *(size - 1 + size % 2 for size in true.shape))
    images = true.astype(float), rebuilt.astype(float)
    options = {"gaussian_weights": True, "sigma": SSIM_SIGMA, "use_sample_covariance": False, "data_range": 1, "full": True}
    return structural_similarity(*images, win_size=window, **options)[1]


def mean_where(values: Float[np.ndarray, "z y x"], where: Bool[np.ndarray, "z y x"]) -> float:
    """Mean over some voxels; NaN when there are none."""
    return float(values[where].mean()) if where.any() else float("nan")


def error_steps(
    error: Float[np.ndarray, "z y x"], where: Bool[np.ndarray, "z y x"], token_size: Sequence[int]
) -> tuple[float, float]:
    """How much the error changes from a voxel to the next: across borders of tokens, and within tokens.

    Along each axis, the mean of |error[i + 1] - error[i]| over the pairs of neighbours that are both in `where`, apart by
    whether voxel i + 1 is the first of a token; then the mean over the axes that have pairs of both kinds, so that an axis along
    which images are smoother, or tokens are shorter, counts on both sides alike. A decoder that rebuilds each token by itself
    leaves steps at the borders, and the first of the numbers is larger; without such a pattern they are equal.

    Args:
        error: rebuilt minus true.
        where: voxels that count.
        token_size: of the tokens, the first of which begins in the corner.

    Returns:
        Across and within; NaN when no axis has both.
    """
    means = []
    for axis, edge in enumerate(token_size):
        steps = np.abs(np.diff(error.astype(float), axis=axis))
        pairs = np.logical_and(*(where.take(range(first, first + steps.shape[axis]), axis) for first in (0, 1)))
        shape = [1, 1, 1]
        shape[axis] = -1
        across = (np.arange(1, error.shape[axis]) % edge == 0).reshape(shape)
        means.append([mean_where(steps, pairs & across), mean_where(steps, pairs & ~across)])
    both = [axis for axis in means if not np.isnan(axis).any()]
    if not both:
        return float("nan"), float("nan")
    across_borders, within = np.mean(both, axis=0)
    return float(across_borders), float(within)
