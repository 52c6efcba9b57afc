"""Where the voxels of a patch lie in the file they came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_csm.data.crops import Size
from nnunet_csm.data.lesions import Placement
from nnunet_csm.raw.geometry import Grid, grid_of_array
from nnunet_csm.raw.grid import resampled


@dataclass(frozen=True)
class Frame:
    """Where the voxels of a patch are: `first + step * i` in the array that nnU-Net has read, and where that array is.

    Attributes:
        first, step: along the axes of that array, in its voxels.
        axes: of the patch, in the order of the array (nnU-Net's `transpose_backward`).
        grid: of the array; it may have other axes than the file, when nnU-Net's reader reorients.
    """

    first: tuple[float, float, float]
    step: tuple[float, float, float]
    axes: tuple[int, int, int]
    grid: Grid

    @classmethod
    def of(cls, placement: Placement, shape: Sequence[int], properties: Mapping[str, Any], plans: PlansManager) -> "Frame":
        """Undo, from the last to the first, what preprocessing did: cut, resample, crop, transpose.

        `shape` is that of the preprocessed volume, from which the patch was cut.
        """
        cropped = properties["shape_after_cropping_and_before_resampling"]
        axes = tuple(int(axis) for axis in plans.transpose_backward)
        first, step = [], []
        for axis in axes:
            scale = cropped[axis] / shape[axis]
            begin = properties["bbox_used_for_cropping"][axis][0]
            # resampling lets the edges of the first voxels coincide, not their centres
            first.append(float(begin + (placement.start[axis] + 0.5) * scale - 0.5))
            step.append(float(placement.factor * scale))
        size = [int(properties["shape_before_cropping"][axis]) for axis in axes]
        return cls(_triple(first), _triple(step), _triple(axes), grid_of_array(properties, size))

    def image(self, maps: Float[np.ndarray, "gz gy gx *e"], token_size: Size) -> sitk.Image:
        """A map of tokens as an image with a voxel a token, in its place; of vectors where a token has several values."""
        edges = [token_size[axis] for axis in self.axes]
        image = sitk.GetImageFromArray(maps.transpose(*self.axes, *range(3, maps.ndim)).astype(np.float32), maps.ndim == 4)
        centre = [f + s * (e - 1) / 2 for f, s, e in zip(self.first, self.step, edges, strict=True)]
        array = self.grid.zeros()
        image.SetOrigin(array.TransformContinuousIndexToPhysicalPoint(centre[::-1]))
        lengths = zip(self.grid.spacing, self.step[::-1], edges[::-1], strict=True)
        image.SetSpacing([spacing * step * edge for spacing, step, edge in lengths])
        image.SetDirection(self.grid.direction)
        return image

    def on_grid(self, maps: Float[np.ndarray, "gz gy gx"], token_size: Size, grid: Grid) -> sitk.Image:
        """A map of tokens as an image on `grid`: linear between the tokens' centres, 0 outside the patch."""
        return resampled(self.image(maps, token_size), grid)


def _triple(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    z, y, x = values
    return z, y, x
