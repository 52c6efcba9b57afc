"""Rigid registration of the series of a case onto its reference: series of one scan move together.

A movement of the patient moves all that one scan gave alike, but not every series shows it alike: mutual information is often led
astray by diffusion images. So each series of a scan proposes a transform, and the one that fits all of them best is everybody's.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_csm.errors import reason
from nnunet_csm.raw.geometry import Grid
from nnunet_csm.raw.grid import resampled

# Two series of one sitting differ by a movement of the patient. A larger one is a wrong optimum.
MAX_SHIFT, MAX_ROTATION = 20.0, 15.0  # mm, degrees
MIN_GAIN = 0.01  # of the mutual information, relative: for less, no voxel is interpolated
# mm and nats: a series that its own transform puts so far from where that of its scan does, and fits by so much better, has moved
# by itself: files of one grid may be of several scans. Real T1ce moved beside T1w by 3 and 5 mm gained 0.08 and 0.16 nats, wrong
# optima of diffusion images of prostates up to 0.02.
CLEAR_SHIFT, CLEAR_GAIN = 3.0, 0.05
SEED = 12345
SAMPLING = 0.5  # share of the voxels
LEVELS = (4.0, 2.0)  # mm: series are averaged to about this before a level
CLIPPED = (1.0, 99.0)  # percentiles of the voxels that are not zero: a few bright ones would take most bins of a histogram
NUM_BINS = 32


@dataclass(frozen=True)
class Registration:
    """What registration found for a series.

    Attributes:
        transform: takes points of the reference to points of the series (mm); of a whole scan it is one.
        before, after: mutual information (nats) of this series and the reference, by header and with the transform.
        refused: why the series is left where its header puts it; empty when the transform is used.
        together: the series that it was decided for, this one among them.
        found_with: the one of these that proposed the transform.
    """

    transform: sitk.Euler3DTransform
    before: float
    after: float
    refused: str
    together: tuple[str, ...]
    found_with: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "used": not self.refused,
            "refused": self.refused,
            "together": list(self.together),
            "found_with": self.found_with,
            "rotation_degrees": _degrees(self.transform),
            "translation_mm": list(self.transform.GetTranslation()),  # of the centre of rotation
            "centre_mm": list(self.transform.GetCenter()),
            "mutual_information_by_header": self.before,
            "mutual_information_registered": self.after,
        }


def register_rigidly(scan: Mapping[str, sitk.Image], fixed: sitk.Image) -> dict[str, Registration]:
    """Rigid registration of the series of a scan, on one grid, from where the headers put them, by Mattes' mutual information.

    The same images give the same transform. It is the proposal with the greatest sum of the series' mutual informations, to be
    used only when it is no larger than a patient's movement and that sum is greater than by header, on the part of the reference
    that all such proposals see; `refused` says why not. A series that has clearly moved by itself is decided for alone.
    """
    middle = (np.array(fixed.GetSize()) - 1) / 2
    by_header = sitk.Euler3DTransform()
    by_header.SetCenter(fixed.TransformContinuousIndexToPhysicalPoint(middle.tolist()))
    fixed, clipped = _clipped(fixed), {name: _clipped(image) for name, image in scan.items()}
    try:
        with _one_thread():
            proposed = {name: _proposal(image, fixed, by_header) for name, image in clipped.items()}
            fixed, coarse = _averaged(fixed, LEVELS[-1]), {name: _averaged(image, LEVELS[-1]) for name, image in clipped.items()}
            first = next(iter(coarse.values()))
            covered = {by: _covered(fixed, first, transform) for by, transform in proposed.items()}
            # parts that leave the field of view must not count for or against a transform
            near = [covered[by] for by, transform in proposed.items() if not _too_far(transform)]
            seen = prod(near, start=_covered(fixed, first, by_header))
            before = {name: _mutual_information(fixed, image, by_header, seen) for name, image in coarse.items()}
            after = {
                (name, by): _mutual_information(fixed, image, transform, seen * covered[by])
                for name, image in coarse.items()
                for by, transform in proposed.items()
            }
    except RuntimeError as error:  # such as no sample left in a series
        names = tuple(scan)
        return {name: Registration(by_header, 0.0, 0.0, f"it failed ({reason(error)})", names, name) for name in names}
    decided = _decided(tuple(scan), proposed, before, after)
    return {
        name: Registration(proposed[by], before[name], after[name, by], refused, together, by)
        for together, by, refused in decided
        for name in together
    }


def _decided(
    names: tuple[str, ...],
    proposed: Mapping[str, sitk.Euler3DTransform],
    before: Mapping[str, float],
    after: Mapping[tuple[str, str], float],
) -> list[tuple[tuple[str, ...], str, str]]:
    """Series that share a transform, which of them proposed it, and why it is not used (empty when it is).

    Args:
        before: mutual information of a series by header.
        after: of a series with the proposal of another one.
    """

    def chosen(together: Sequence[str]) -> tuple[str, str]:
        total = {by: sum(after[name, by] for name in together) for by in together}
        refusals = {by: _refusal(proposed[by], sum(before[name] for name in together), total[by]) for by in together}
        by = min(together, key=lambda one: (bool(refusals[one]), -total[one]))
        return by, refusals[by]

    def result(name: str, by: str, refused: str) -> tuple[float, np.ndarray]:
        """Mutual information of a series, and where its centre goes."""
        return (before[name], np.zeros(3)) if refused else (after[name, by], np.array(proposed[by].GetTranslation()))

    def moved_alone(name: str) -> bool:
        (own, there), (shared, here) = result(name, *chosen([name])), result(name, *chosen(names))
        return own - shared > CLEAR_GAIN and float(np.linalg.norm(there - here)) > CLEAR_SHIFT

    alone = [name for name in names if moved_alone(name)]
    if not alone:
        return [(names, *chosen(names))]
    others = tuple(name for name in names if name not in alone)
    together = _decided(others, proposed, before, after) if others else []
    return [*together, *(((name,), *chosen([name])) for name in alone)]


def _refusal(transform: sitk.Euler3DTransform, before: float, after: float) -> str:
    return _too_far(transform) or ("no better than the headers" if after <= before * (1 + MIN_GAIN) else "")


def _too_far(transform: sitk.Euler3DTransform) -> str:
    """Why a transform cannot be a patient's movement; empty when it can."""
    shift, rotation = float(np.linalg.norm(transform.GetTranslation())), max(map(abs, _degrees(transform)))
    within = shift <= MAX_SHIFT and rotation <= MAX_ROTATION
    return "" if within else f"{shift:.0f} mm and {rotation:.0f} degrees are no movement of a patient"


def _degrees(transform: sitk.Euler3DTransform) -> list[float]:
    return [float(np.degrees(angle)) for angle in (transform.GetAngleX(), transform.GetAngleY(), transform.GetAngleZ())]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums, and with them the path of the optimizer, depend on the number of threads."""
    num_threads = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(num_threads)


def _proposal(moving: sitk.Image, fixed: sitk.Image, by_header: sitk.Euler3DTransform) -> sitk.Euler3DTransform:
    """The transform that a series finds by itself, coarse to fine."""
    transform = sitk.Euler3DTransform(by_header)
    for level in LEVELS:
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
        method.Execute(_averaged(fixed, level), _averaged(moving, level))
    return transform


def _method(transform: sitk.Euler3DTransform) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(NUM_BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(SAMPLING, SEED)
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
