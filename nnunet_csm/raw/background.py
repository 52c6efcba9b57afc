"""Which value stands for background in an image: 0 for nnU-Net and for this package, another one in images that were z-scored."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import SimpleITK as sitk

# of an image's voxels that are finite and not 0
PERCENTILES = (0.5, *(float(p) for p in range(5, 100, 5)), 99.5)
# Percentiles with one value: of a quarter of the voxels at least, which no tissue has.
MOST_OF_TISSUE = 5
# Of the range of values: below, it is as good as 0, such as air in images of 8 bits.
NEAR_ZERO = 0.05
NUM_VOXELS = 200_000  # looked at, of the whole image


def background(percentiles: Sequence[float]) -> float | None:
    """The value that takes the place of 0: that of a quarter of the other voxels or more; None where there is no such value.

    `percentiles`: of the voxels that are finite and not 0, at PERCENTILES.
    """
    value, count = Counter(percentiles).most_common(1)[0]
    far = abs(value) > NEAR_ZERO * (percentiles[-1] - percentiles[0])
    return float(value) if count > MOST_OF_TISSUE and far else None


def background_of(image: sitk.Image) -> float | None:
    """As `background`, of an image that is not all zero."""
    voxels = sitk.GetArrayViewFromImage(image).ravel()
    values = voxels[:: max(1, voxels.size // NUM_VOXELS)]
    values = values[values != 0]
    return background(np.percentile(values, PERCENTILES, method="nearest").tolist()) if values.size else None


def shifted_to_zero(image: sitk.Image, value: float) -> sitk.Image:
    """The image as float32 less `value`: voxels that have it are 0 exactly."""
    image = sitk.Cast(image, sitk.sitkFloat32)
    return image - float(np.float32(value))
