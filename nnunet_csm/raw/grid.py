"""The series and masks of a case on one grid: which grid, how a volume gets there, when a header cannot be believed.

Sizes, spacings and origins are in SimpleITK's order (x, y, z) and world (mm; x to the left, y to the back, z up), as everything
here goes to SimpleITK or into the manifest, which says so.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk

from nnunet_csm.errors import reason
from nnunet_csm.raw.subjects import CaseError, Mask
from nnunet_csm.raw.volumes import described

FINEST = "finest"

# Grids whose corners differ by less, in voxels, are one grid: interpolating for so little would only blur.
SAME_GRID = 0.05
# The least share of the smaller field of view that has to lie in the other one.
MIN_OVERLAP = 0.1
# The most of a mask's volume (mm3) that a grid may lose.
MAX_LOSS = 0.1

# Registration: two series of one sitting differ by a movement of the patient. A larger one is a wrong optimum.
MAX_SHIFT, MAX_ROTATION = 20.0, 15.0  # mm, degrees
MIN_GAIN = 0.01  # of the mutual information, relative: for less, no voxel is interpolated
REGISTRATION_SEED = 12345
REGISTRATION_SAMPLING = 0.5  # share of the voxels
REGISTRATION_LEVELS = (4.0, 2.0)  # mm: both series are averaged to about this before a level
CLIPPED = (1.0, 99.0)  # percentiles of the voxels that are not zero: a few bright ones would take most bins of a histogram
NUM_BINS = 32

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie. `direction` holds the rows of the matrix whose columns are the axes."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @classmethod
    def of(cls, image: sitk.Image) -> Self:
        return cls(image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection())

    @property
    def voxel_volume(self) -> float:
        """mm3."""
        return float(np.prod(self.spacing))

    def same_as(self, other: "Grid") -> bool:
        """Whether voxels coincide, up to what rounding in a header may do."""
        if self.size != other.size:
            return False
        apart = np.linalg.norm(self._world(self._corners()) - other._world(other._corners()), axis=1)
        return bool(apart.max() < SAME_GRID * min(self.spacing))

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
        """Give an image of this size the geometry of this grid."""
        image.SetSpacing(self.spacing)
        image.SetOrigin(self.origin)
        image.SetDirection(self.direction)

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


def reference_series(grids: Mapping[str, Grid], reference: str) -> str:
    """The series whose grid a case gets: the one that is named, or the one with the smallest voxels.

    `grids` of the series that are there, in dataset order, which decides between equally fine ones. Raises `CaseError`.
    """
    if reference == FINEST:
        smallest = min(grid.voxel_volume for grid in grids.values())
        return next(name for name, grid in grids.items() if grid.voxel_volume <= smallest * (1 + 1e-3))
    if reference not in grids:
        raise CaseError(
            f"the reference series {reference} is missing, found {', '.join(grids)}; -reference {FINEST} takes the finest series"
        )
    return reference


def refuse_misplaced(grid: Grid, reference: Grid, what: str, reference_name: str) -> None:
    """Raise `CaseError` when a header cannot be true of a volume of the same study: axes swapped, or elsewhere in the body."""
    permuted = grid.size != reference.size and sorted(grid.size) == sorted(reference.size)
    swapped = f"{what} has the shape {grid.size[::-1]}, a permutation of {reference.size[::-1]} of {reference_name} (z, y, x), "
    # Saved from an array whose axes had been transposed: the header is the old one, but the shape is not.
    same_header = all(
        np.allclose(getattr(grid, name), getattr(reference, name), atol=1e-3) for name in ("spacing", "origin", "direction")
    )
    if permuted and same_header:
        raise CaseError(swapped + "under the same spacing, origin and direction; its axes are swapped: export it again")
    overlap = grid.overlap(reference)
    if overlap >= MIN_OVERLAP:
        return
    found = f"by its header {overlap:.0%} of the smaller field of view of the two lies in the other"
    if permuted:
        raise CaseError(swapped + f"and {found}; its axes may be swapped: export it again")
    if grid.size == reference.size:
        msg = f"{what} has the shape of {reference_name}, but {found}; if it belongs on that grid, copy the header from there"
        raise CaseError(msg)
    msg = f"{what} ({grid}) and {reference_name} ({reference}) hardly overlap: {found}, expected at least {MIN_OVERLAP:.0%}; "
    raise CaseError(msg + "swapped axes, or of another study? correct the file, or leave it out")


def resampled(image: sitk.Image, grid: Grid, nearest: bool = False, transform: sitk.Transform | None = None) -> sitk.Image:
    """The image on `grid`, 0 outside its field of view; itself, voxel by voxel, when it lies there already.

    Linear, as float32; with `nearest`, values and type are kept. `transform` takes points of the grid to points
    of the image (mm).
    """
    if transform is None and Grid.of(image).same_as(grid):
        same = sitk.Image(image)
        grid.put_on(same)
        return same
    interpolator, kind = (sitk.sitkNearestNeighbor, image.GetPixelID()) if nearest else (sitk.sitkLinear, sitk.sitkFloat32)
    return sitk.Resample(image, grid.zeros(), transform or sitk.Transform(3, sitk.sitkIdentity), interpolator, 0.0, kind)


# --- masks -------------------------------------------------------------------------------------------------------------------


def labels_of(image: sitk.Image, mask: Mask) -> sitk.Image:
    """A mask with its values replaced by labels of the dataset, on its own grid, as uint8. Raises `CaseError`."""
    voxels = sitk.GetArrayViewFromImage(image)
    values = np.unique(voxels)
    what = described(mask.volume)
    fractions = [float(value) for value in values if value != np.round(value)]
    if fractions:
        msg = (
            f"{what}: the mask has values such as {fractions[0]:g}, expected whole numbers; was it resampled with interpolation?"
        )
        raise CaseError(f"{msg} resample it with nearest neighbour")
    unknown = [int(value) for value in values if value != 0 and int(value) not in mask.values]
    if unknown:
        allowed = ", ".join(map(str, sorted({0, *mask.values})))
        msg = f"{what}: the mask has the value {unknown[0]}, expected one of {allowed}; correct the mask, or say what it means"
        raise CaseError(msg)
    labels = {value: label for value, label in mask.values.items() if value != 0}
    return sitk.Cast(sitk.ChangeLabel(sitk.Cast(image, sitk.sitkInt32), labels), sitk.sitkUInt8)


def refuse_loss(before: sitk.Image, after: sitk.Image, what: str) -> None:
    """Raise `CaseError` when resampling a mask lost more than a tenth of its volume, or a whole label."""
    old, new = sitk.GetArrayViewFromImage(before), sitk.GetArrayViewFromImage(after)
    remedy = "does its header belong to this study? if it does, take the grid it was drawn on as -reference"
    lost = sorted(set(np.unique(old).tolist()) - set(np.unique(new).tolist()) - {0})
    if lost:
        raise CaseError(f"{what}: no voxel of label {lost[0]} is left on the grid of the images ({Grid.of(after)}); {remedy}")
    volume, voxel = np.count_nonzero(old) * Grid.of(before).voxel_volume, Grid.of(after).voxel_volume
    left = np.count_nonzero(new) * voxel
    if volume - left > max(MAX_LOSS * volume, voxel):  # one voxel may always be rounded away
        msg = f"{what}: {left:.0f} of {volume:.0f} mm3 are left on the grid of the images, expected at least {1 - MAX_LOSS:.0%}; "
        raise CaseError(msg + remedy)


# --- registration ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registration:
    """What the rigid registration of a series found.

    Attributes:
        transform: takes points of the reference to points of the series (mm).
        before, after: mutual information (nats) by header and with the transform.
        refused: why the series is left where its header puts it; empty when the transform is used.
    """

    transform: sitk.Euler3DTransform
    before: float
    after: float
    refused: str

    @property
    def degrees(self) -> tuple[float, ...]:
        angles = (self.transform.GetAngleX(), self.transform.GetAngleY(), self.transform.GetAngleZ())
        return tuple(float(np.degrees(angle)) for angle in angles)

    @property
    def shift(self) -> tuple[float, ...]:
        """mm (x, y, z), of the centre of rotation."""
        return tuple(self.transform.GetTranslation())

    def to_dict(self) -> dict[str, Any]:
        return {
            "used": not self.refused,
            "refused": self.refused,
            "rotation_degrees": list(self.degrees),
            "translation_mm": list(self.shift),
            "centre_mm": list(self.transform.GetCenter()),
            "mutual_information_by_header": self.before,
            "mutual_information_registered": self.after,
        }


def register_rigidly(moving: sitk.Image, fixed: sitk.Image) -> Registration:
    """Rigid registration from where the headers put the two, by Mattes' mutual information, coarse to fine.

    The same images give the same transform. It is to be used only when it is better than the headers, on the
    part of the reference that both see, and no larger than a patient's movement; `refused` says why not.
    """
    middle = (np.array(fixed.GetSize()) - 1) / 2
    by_header = sitk.Euler3DTransform()
    by_header.SetCenter(fixed.TransformContinuousIndexToPhysicalPoint(middle.tolist()))
    transform = sitk.Euler3DTransform(by_header)
    fixed, moving = _clipped(fixed), _clipped(moving)
    num_threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # sums, and with them the path, depend on the number of threads
    try:
        for level in REGISTRATION_LEVELS:
            coarse_fixed, coarse_moving = _averaged(fixed, level), _averaged(moving, level)
            method = _method(transform)
            # steps in mm; with the default relaxation of 0.5 rotations stop degrees too early
            method.SetOptimizerAsRegularStepGradientDescent(
                learningRate=level / 2,
                minStep=level / 400,
                numberOfIterations=200,
                relaxationFactor=0.8,
                gradientMagnitudeTolerance=1e-7,
            )
            method.SetOptimizerScalesFromPhysicalShift()
            method.Execute(coarse_fixed, coarse_moving)
        # Parts that leave the field of view must not count for or against either
        seen = _covered(coarse_fixed, coarse_moving, by_header) * _covered(coarse_fixed, coarse_moving, transform)
        before, after = (_mutual_information(coarse_fixed, coarse_moving, t, seen) for t in (by_header, transform))
    except RuntimeError as error:  # such as no sample left in the moving series
        return Registration(transform, 0.0, 0.0, f"it failed ({reason(error)})")
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(num_threads)
    return Registration(transform, before, after, _refusal(Registration(transform, before, after, refused="")))


def _refusal(found: Registration) -> str:
    if found.after <= found.before * (1 + MIN_GAIN):
        return "no better than the headers"
    shift, rotation = float(np.linalg.norm(found.shift)), max(map(abs, found.degrees))
    if shift > MAX_SHIFT or rotation > MAX_ROTATION:
        return f"{shift:.0f} mm and {rotation:.0f} degrees are no movement of a patient"
    return ""


def _method(transform: sitk.Euler3DTransform) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(NUM_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(REGISTRATION_SAMPLING, REGISTRATION_SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(transform, inPlace=True)
    return method


def _mutual_information(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Euler3DTransform, seen: sitk.Image) -> float:
    method = _method(sitk.Euler3DTransform(transform))
    method.SetMetricFixedMask(seen)
    return -float(method.MetricEvaluate(fixed, moving))


def _covered(fixed: sitk.Image, moving: sitk.Image, transform: sitk.Euler3DTransform) -> sitk.Image:
    """1 where a voxel of `fixed` lies in the field of view of `moving`."""
    everywhere = sitk.Cast(moving * 0 + 1, sitk.sitkUInt8)
    return resampled(everywhere, Grid.of(fixed), nearest=True, transform=transform)


def _clipped(image: sitk.Image) -> sitk.Image:
    voxels = sitk.GetArrayViewFromImage(image)
    low, high = (float(limit) for limit in np.percentile(voxels[voxels != 0], CLIPPED))
    return sitk.Clamp(sitk.Cast(image, sitk.sitkFloat32), sitk.sitkFloat32, min(low, 0.0), high)


def _averaged(image: sitk.Image, edge: float) -> sitk.Image:
    """Over blocks of about `edge` mm along every axis: a thick axis stays as it is, and four voxels are left of each."""
    sides = zip(image.GetSpacing(), image.GetSize(), strict=True)
    factors = [max(1, min(round(edge / spacing), size // 4)) for spacing, size in sides]
    return sitk.BinShrink(image, factors)


def _lattice(*axes: Any) -> Array:
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
