"""Where voxels lie: grids, and the one decision of how a mask or a prediction comes to the grid it belongs on.

Sizes, spacings and origins are in SimpleITK's order (x, y, z) and world (mm; x to the left, y to the back, z up).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from nnunet_csm.raw.subjects import CaseError

# Grids whose corners differ by less, in voxels, are one grid: interpolating for so little would only blur.
SAME_GRID = 0.05
# A label map whose header is off by no more than this many voxels is taken voxel by voxel: the nearest neighbours are the same.
MAX_ROUNDING = 0.5
# Axes not quite at right angles are taken as if they were when no voxel moves by more than this many voxels.
MAX_SNAP = 0.25

# Below it, in voxels, numbers stay as the header has them.
ROUNDING = 1e-3

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie. `direction` holds the rows of the matrix whose columns are the axes."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image | sitk.ImageFileReader) -> Self:
        """The grid of a 3-D image, or of the first volume of a 4-D one."""
        dimension = len(image.GetSize())
        direction = np.reshape(image.GetDirection(), (dimension, dimension))[:3, :3]
        return cls(image.GetSize()[:3], image.GetSpacing()[:3], image.GetOrigin()[:3], tuple(direction.flatten().tolist()))

    @property
    def voxel_volume(self) -> float:
        """mm3."""
        return float(np.prod(self.spacing))

    @property
    def affine(self) -> Array:
        """Voxel (x, y, z) to mm, (4, 4)."""
        affine = np.eye(4)
        affine[:3, :3], affine[:3, 3] = self._matrix(), self.origin
        return affine

    def is_kept_by(self, move: Array) -> bool:
        """Whether a move (4, 4) of the world leaves voxels where they are, but for half of one."""
        corners = self._world(self._corners())
        moved = corners @ move[:3, :3].T + move[:3, 3]
        return float(np.linalg.norm(moved - corners, axis=1).max()) < MAX_ROUNDING * min(self.spacing)

    @property
    def orientation(self) -> str:
        """Where the axes of the file point, such as LPS or RAS."""
        return str(sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(self.direction))

    def apart(self, other: "Grid") -> float:
        """The largest distance (mm) between corners of two grids of one size."""
        return float(np.linalg.norm(self._world(self._corners()) - other._world(other._corners()), axis=1).max())

    def same_as(self, other: "Grid") -> bool:
        """Whether voxels coincide, up to what rounding in a header may do."""
        return self.size == other.size and self.apart(other) < SAME_GRID * min(self.spacing)

    def overlap(self, other: "Grid") -> float:
        """Share of the smaller field of view that lies in the larger one, to about 0.01."""
        small, large = sorted((self, other), key=lambda grid: grid.voxel_volume * np.prod(grid.size))
        places = (np.arange(24) + 0.5) / 24
        points = small._world(_lattice(places, places, places) * small.size - 0.5)
        return float(large._contains(points).mean())

    def zeros(self) -> sitk.Image:
        image = sitk.Image(self.size, sitk.sitkUInt8)
        self.put_on(image)
        return image

    def put_on(self, image: sitk.Image) -> None:
        """Give an image of this size the geometry of this grid; each volume of a 4-D image lies there."""
        dimension = image.GetDimension()
        direction = np.eye(dimension)
        direction[:3, :3] = np.reshape(self.direction, (3, 3))
        image.SetSpacing([*self.spacing, *[1.0] * (dimension - 3)])
        image.SetOrigin([*self.origin, *[0.0] * (dimension - 3)])
        image.SetDirection(direction.flatten().tolist())

    def turned(self, order: Sequence[int], flipped: Sequence[bool]) -> "Grid":
        """The grid of the same voxels with the axes in another order, some from their other end."""
        matrix, size = self._matrix()[:, order], np.array(self.size)[list(order)]
        origin = self.origin + matrix @ (np.array(flipped) * (size - 1))
        direction = np.reshape(self.direction, (3, 3))[:, order] * np.where(flipped, -1.0, 1.0)
        spacing = np.array(self.spacing)[list(order)]
        return Grid(tuple(size.tolist()), *(tuple(map(float, one)) for one in (spacing, origin, direction.flatten())))

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        return f"{' x '.join(map(str, self.size))} voxels of {' x '.join(f'{edge:.4g}' for edge in self.spacing)} mm"

    def _matrix(self) -> Array:
        return np.reshape(self.direction, (3, 3)) * self.spacing

    def _world(self, indices: Array) -> Array:
        """mm of voxel indices (n, 3), in the order of `size`."""
        return indices @ self._matrix().T + self.origin

    def _contains(self, points: Array) -> npt.NDArray[np.bool_]:
        indices = np.linalg.solve(self._matrix(), (points - self.origin).T).T
        return np.all((indices >= -0.5) & (indices <= np.array(self.size) - 0.5), axis=1)

    def _corners(self) -> Array:
        return _lattice(*([0.0, edge - 1.0] for edge in self.size))


def affine_of(properties: Mapping[str, Any]) -> Array | None:
    """Voxel (x, y, z) to mm in ITK's LPS, from what nnU-Net's readers keep; None for other readers and for 2-D images."""
    affine = np.eye(4)
    if "sitk_stuff" in properties and len(properties["sitk_stuff"]["spacing"]) == 3:
        kept = properties["sitk_stuff"]
        affine[:3, :3] = np.reshape(kept["direction"], (3, 3)) * kept["spacing"]
        affine[:3, 3] = kept["origin"]
        return affine
    for kept in properties.values():
        if isinstance(kept, Mapping) and "original_affine" in kept:
            # of the array as it was read; nibabel's axes are RAS, ITK's LPS
            return np.diag((-1.0, -1.0, 1.0, 1.0)) @ np.asarray(
                kept.get("reoriented_affine", kept["original_affine"]), dtype=float
            )
    return None


def grid_of_array(properties: Mapping[str, Any], size: Sequence[int]) -> Grid:
    """Geometry of the array that nnU-Net's readers made of a file, by what they note of it; `size` is (z, y, x)."""
    affine = affine_of(properties)
    assert affine is not None, "an image without a geometry"
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = (affine[:3, :3] / spacing).flatten()
    return Grid(tuple(reversed(size)), tuple(spacing.tolist()), tuple(affine[:3, 3].tolist()), tuple(direction.tolist()))


class CrookedError(CaseError):
    """Axes that no rounding has turned from right angles."""


def straight_grid(path: Path, size: Sequence[int], matrix: Array, origin: Array) -> Grid:
    """The grid nearest to axes (columns of `matrix`, mm) that may not be quite at right angles; its centre stays where it is.

    Raises:
        CrookedError: they are far from right angles.
    """
    spacing = np.linalg.norm(matrix, axis=0)
    left, _, right = np.linalg.svd(matrix / spacing)
    direction = left @ right
    middle = (np.array(size) - 1) / 2
    corners = np.array(list(product((-1, 1), repeat=3))) * middle
    moved = float(np.abs(np.linalg.solve(matrix, (direction * spacing - matrix) @ corners.T)).max())
    if moved > MAX_SNAP:
        msg = f"{path} has axes that are not at right angles ({moved:.1f} voxels off at the corners), expected a grid of boxes; "
        raise CrookedError(msg + "resample it first, such as with nibabel.processing.resample_to_output")
    if moved < ROUNDING:
        direction = matrix / spacing
    else:
        origin = origin + (matrix - direction * spacing) @ middle
    return Grid(tuple(size), *(tuple(map(float, one)) for one in (spacing, origin, direction.flatten())))


@dataclass(frozen=True)
class Fit:
    """How the voxels of a label map are those of a grid: the axes in which order, which of them from their other end.

    Attributes:
        grid: the one it comes to.
        apart: mm, by which its header puts it elsewhere; no more than `MAX_ROUNDING` voxels.
        said: what is done, for a manifest: "kept", or "turned from RAS to LPS", and how far the header is off.
    """

    grid: Grid
    order: tuple[int, ...]
    flipped: tuple[bool, ...]
    apart: float
    said: str

    @property
    def upright(self) -> bool:
        """Whether voxels stay in the order in which they are stored."""
        return self.order == (0, 1, 2) and not any(self.flipped)

    def applied(self, image: sitk.Image) -> sitk.Image:
        """The label map voxel by voxel on the grid; nothing is interpolated."""
        turned = sitk.Flip(sitk.PermuteAxes(image, self.order), self.flipped, False)
        self.grid.put_on(turned)
        return turned


def fit(own: Iterable[Grid], grids: Iterable[Grid]) -> Fit | None:
    """The way to lay a label map on one of `grids` voxel by voxel, or None when its header says that it lies elsewhere.

    Both may have several places, when the two transforms of a NIfTI header disagree: the pair that is closest is taken.
    """
    fits = [found for one, grid in product(own, grids) if (found := _fit(one, grid))]
    return min(fits, key=lambda found: found.apart, default=None)


def _fit(own: Grid, grid: Grid) -> Fit | None:
    cosines = np.reshape(own.direction, (3, 3)).T @ np.reshape(grid.direction, (3, 3))
    order = [int(axis) for axis in np.abs(cosines).argmax(axis=0)]
    if sorted(order) != [0, 1, 2]:
        return None
    flipped = [bool(cosines[axis, target] < 0) for target, axis in enumerate(order)]
    turned = own.turned(order, flipped)
    apart = turned.apart(grid) if turned.size == grid.size else np.inf
    if apart > MAX_ROUNDING * min(grid.spacing):
        return None
    said = "kept" if order == [0, 1, 2] and not any(flipped) else f"turned from {own.orientation} to {grid.orientation}"
    if not turned.same_as(grid):
        said += f", its header is {apart:.2g} mm off"
    return Fit(grid, tuple(order), tuple(flipped), apart, said)


def described_misfit(own: Grid, grid: Grid, other: str) -> str:
    """What keeps a label map from lying on the grid of the image `other` voxel by voxel, in words that follow its name."""
    if own.size != grid.size:
        return f"has the shape {own.size[::-1]}, but {other} has {grid.size[::-1]} (z, y, x)"
    if not np.allclose(own.spacing, grid.spacing, rtol=1e-3, atol=0):
        found, expected = (tuple(round(edge, 5) for edge in one.spacing[::-1]) for one in (own, grid))
        return f"has the spacing {found}, but {other} has {expected} (z, y, x in mm)"
    axes = f", with axes {own.orientation} instead of {grid.orientation}" if own.orientation != grid.orientation else ""
    return f"has the shape of {other}, but its header puts it up to {own.apart(grid):.1f} mm from there{axes}"


def _lattice(*axes: Any) -> Array:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)


# Times the distance along the body, from which on the axis of the slices is told by their thickness.
THICK = 1.2
# where axes x, y and z point, by the axis along which slices are thick when z runs along the body
VIEWS = ("PIL", "LIP", "LPS")


def upright(image: sitk.Image) -> sitk.Image:
    """The image with its axes turned for pictures: z is along the slices.

    Thick slices are those that were acquired, whatever their direction, head up; else slices are axial. The patient's right is on
    the left of axial and coronal ones, the nose of sagittal ones.
    """
    image = sitk.DICOMOrient(image, "LPS")
    spacing = image.GetSpacing()
    thick = int(np.argmax(spacing)) if max(spacing) > THICK * spacing[2] else 2
    return sitk.DICOMOrient(image, VIEWS[thick])
