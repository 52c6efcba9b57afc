"""The series and masks of a case on one grid: which grid, how a volume gets there, when a header cannot be believed."""

from collections.abc import Mapping

import numpy as np
import SimpleITK as sitk

from nnunet_csm.raw.geometry import SAME_GRID, Grid, described_misfit
from nnunet_csm.raw.subjects import CaseError, Mask
from nnunet_csm.raw.volumes import Look, described

FINEST = "finest"

# The least share of the smaller field of view that has to lie in the other one.
MIN_OVERLAP = 0.1
# The most of a mask's volume (mm3) that a grid may lose.
MAX_LOSS = 0.1


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
