"""What raw images of training cases tell of a series: which intensities its z-scores stand for, and linear maps to others."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from jaxtyping import Bool, Float
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask

from nnunet_csm.errors import UserError
from nnunet_csm.judging.voxel_regression import RidgeBaseline
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.raw.volumes import read_volume

# shares of voxels that lie below a knot of the map from z-scores to intensities
SHARES = np.concatenate([[0, 0.001, 0.005], np.linspace(0.01, 0.99, 99), [0.995, 0.999, 1]])
# training cases that are looked at, at equal distances in the order of their names
NUM_CASES = 16


def voxels_of(files: Sequence[Path]) -> Float[np.ndarray, "s z y x"]:
    """Images of one grid."""
    return np.stack([sitk.GetArrayFromImage(read_volume(Volume(file))).astype(np.float32) for file in files])


def z_scored(
    volumes: Float[np.ndarray, "s z y x"], masked: Sequence[bool]
) -> tuple[Float[np.ndarray, "s z y x"], Bool[np.ndarray, "z y x"]]:
    """Series as nnU-Net normalises them before it resamples, and where any of them is other than 0, holes filled.

    Args:
        volumes: raw; a series that is 0 everywhere stays so.
        masked: whether mean and deviation of each are those of that foreground, and the rest stays 0, or those of the box around
            it (nnU-Net's `use_mask_for_norm`).
    """
    inside = create_nonzero_mask(volumes)
    box = tuple(slice(where.min(), where.max() + 1) for where in np.nonzero(inside))
    scored = np.zeros_like(volumes)
    for raw, z, within in zip(volumes, scored, masked, strict=True):
        voxels = raw[inside] if within else raw[box]
        where = inside if within else np.ones_like(inside)
        z[where] = (raw[where] - voxels.mean()) / max(voxels.std(), 1e-8)
    return scored, inside


@dataclass(frozen=True)
class TrainingScans:
    """Measured on training cases, over the foreground of each.

    Attributes:
        num_cases: those that were looked at.
        z_scores, intensities: of each series, medians over cases of the values that `SHARES` of its voxels lie below.
        linear: maps between the z-scored series; None where no case has all of them.
    """

    num_cases: int
    z_scores: Mapping[str, Float[np.ndarray, " q"]]
    intensities: Mapping[str, Float[np.ndarray, " q"]]
    linear: RidgeBaseline | None

    @classmethod
    def measured(
        cls, cases: Iterable[Float[np.ndarray, "s _z _y _x"]], series: Sequence[str], masked: Sequence[bool]
    ) -> "TrainingScans":
        """Look at cases; series that a case lacks are 0 everywhere."""
        z_scores: dict[str, list[np.ndarray]] = {name: [] for name in series}
        intensities: dict[str, list[np.ndarray]] = {name: [] for name in series}
        complete = []
        num_cases = 0
        for volumes in cases:
            num_cases += 1
            scored, inside = z_scored(volumes, masked)
            there = [number for number in range(len(series)) if volumes[number].any()]
            for number in there:
                z_scores[series[number]].append(np.quantile(scored[number][inside], SHARES))
                intensities[series[number]].append(np.quantile(volumes[number][inside], SHARES))
            if len(there) == len(series):
                complete.append(scored[:, inside][:, :, None, None])
        known = [name for name in series if z_scores[name]]
        return cls(
            num_cases,
            {name: np.median(z_scores[name], axis=0) for name in known},
            {name: np.median(intensities[name], axis=0) for name in known},
            RidgeBaseline().fit(complete) if complete else None,
        )

    def check(self, series: Sequence[str]) -> None:
        """Raise UserError where a series was not measured."""
        if unknown := [name for name in series if name not in self.z_scores]:
            raise UserError(
                f"no training case in nnUNet_raw shows {unknown[0]}, so its intensities are not known; give --z_scores, without "
                f"--score, to write z-scores"
            )

    def as_scanned(self, series: str, z_scores: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
        """Intensities as a scan of the series has them: linear between the measured ones, and none beyond them."""
        # where several shares have one z-score, as in background, the lowest intensity stands for it
        knots, first = np.unique(self.z_scores[series], return_index=True)
        return np.interp(z_scores, knots, self.intensities[series][first]).astype(np.float32)


def training_scans(
    folder: Path, cases: Iterable[str], channels: Mapping[str, int], masked: Sequence[bool], ending: str
) -> TrainingScans:
    """Measure raw images of some training cases.

    Args:
        folder: of the raw dataset.
        cases: names of training cases.
        channels: of the files, by series.
        masked: of each series, see `z_scored`.
        ending: of the files.

    Raises:
        UserError: none of the cases is there.
    """
    found = []
    for case in sorted(cases):
        for subset in ("imagesTr", "imagesTs"):
            files = [folder / subset / f"{case}_{channel:04d}{ending}" for channel in channels.values()]
            if all(file.is_file() for file in files):
                found.append(files)
    if not found:
        raise UserError(
            f"{folder}: holds no images of the training cases, which tell what intensities are; set nnUNet_raw to their place, "
            f"or give --z_scores, without --score, to write z-scores"
        )
    chosen = np.unique(np.linspace(0, len(found) - 1, min(NUM_CASES, len(found))).round().astype(int))
    return TrainingScans.measured((voxels_of(found[number]) for number in chosen), tuple(channels), masked)
