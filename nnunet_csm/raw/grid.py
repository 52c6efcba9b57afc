"""The series and masks of a case on one grid: which grid, how a volume gets there, when a header cannot be believed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_csm.errors import reason
from nnunet_csm.raw.geometry import SAME_GRID, Grid, described_misfit
from nnunet_csm.raw.subjects import CaseError, Mask
from nnunet_csm.raw.volumes import Look, described

FINEST = "finest"

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


def refuse_doubtful_places(series: Mapping[str, tuple[str, Look]]) -> None:
    """Raise `CaseError` when headers leave open how the series of a case (name: its file, its header) lie to each other.

    An sform and a qform that disagree do no harm where all series are moved alike, and no place at all where none has one.
    """
    (first, look), *others = series.values()
    remedy = "copy the right one over the other, such as with fslorient -copysform2qform or -copyqform2sform"
    for what, other in others:
        if other.placed != look.placed:
            without, placed = (what, first) if look.placed else (first, what)
            msg = f"{without} holds neither sform nor qform, {placed} does, so that nobody knows how they lie to each other; "
            raise CaseError(msg + "write the missing transform into its header")
        # from where one transform puts the first series to where the other one does
        moves = [one.places[-1].affine @ np.linalg.inv(one.places[0].affine) for one in (look, other)]
        if not look.places[0].is_kept_by(np.linalg.solve(moves[0], moves[1])):
            doubtful, one = (what, other) if len(other.places) > 1 else (first, look)
            apart = one.places[0].apart(one.places[-1])
            raise CaseError(
                f"{doubtful} holds an sform and a qform that are {apart:.1f} mm apart, unlike the other series; {remedy}"
            )


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


def laid_on_a_series(
    mask: sitk.Image, look: Look, series: Mapping[str, Look], reference: str, what: str
) -> tuple[sitk.Image, str, str]:
    """The mask on the grid of the series that it was drawn on, voxel by voxel; that series; what was done.

    A mask that was drawn on none of them stays where its header puts it, and counts as drawn on the reference.

    Raises:
        CaseError: its header cannot be believed: it has the reference's shape but lies elsewhere, or names two places.
    """
    fits = [(found, name) for name in (reference, *series) if (found := look.fit_to(series[name]))]
    if fits:
        found, name = min(fits, key=lambda one: one[0].apart if one[0].apart > SAME_GRID * min(one[0].grid.spacing) else 0.0)
        laid = found.applied(mask)
        series[name].places[0].put_on(laid)
        return laid, name, found.said
    own, grid = look.places[0], series[reference].places[0]
    refuse_misplaced(own, grid, what, reference)
    remedy = f"if it was drawn on {reference}, copy the header from there, else resample it to that grid"
    if own.size == grid.size:
        raise CaseError(f"{what} {described_misfit(own, grid, reference)}; {remedy}")
    if len(look.places) > 1 or len(series[reference].places) > 1 or look.placed != series[reference].placed:
        doubt = "sform and qform disagree, or one has neither"
        raise CaseError(
            f"{what} and {reference} are on other grids, and their headers do not say how they lie ({doubt}); {remedy}"
        )
    return mask, reference, "kept"


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
