"""The images of a subject: every series as a scanner would give it, on one grid."""

import math
from dataclasses import dataclass, replace

import numpy as np

from nnunet_csm.errors import UserError
from nnunet_csm.phantom.anatomy import (
    GLIOMA,
    GLIOMA_AND_VENTRICLES,
    Anatomy,
    Shape,
    Triple,
    along_axes,
    draw_anatomy,
    draw_lattice,
    label_map,
    smooth_field,
    tissue_fractions,
)
from nnunet_csm.phantom.tissues import ACQUISITIONS, CLASSES, CORES, TISSUES, Acquisition, Tissue, signal

HEALTHY = ("white matter", "grey matter", "CSF")
WATER_SPREAD = 0.05  # SD of the relative excess of water within a tissue


@dataclass(frozen=True)
class PhantomSpec:
    """What to draw. Subject `index` of a spec depends on nothing but the spec and the index."""

    series: tuple[str, ...] = ("FLAIR", "T1w", "T1ce", "T2w")
    shape: Shape = (32, 64, 64)  # voxels (z, y, x)
    spacing_mm: Triple = (4.0, 2.5, 2.5)  # (z, y, x)
    snr: float = 20.0  # white matter over noise SD as acquired; math.inf for none
    bias: float = 0.12  # SD of the log of each series' receive field
    gain_spread: float = 0.2  # SD of the log gain, once for the subject and once for each series
    missing_share: float = 0.0  # probability that a subject lacks a series; one always remains
    enhancing_share: float = 0.85  # probability that the tumour takes up contrast agent
    diagnoses: bool = False  # cores are of four kinds, see CORES, and subjects have a class
    ventricles: bool = False  # they are labelled, and the tumour's core and its rim are one, see GLIOMA_AND_VENTRICLES
    seed: int = 0

    def __post_init__(self) -> None:
        names, shares = set(self.series), ("missing_share", "enhancing_share")
        wrong = {
            f"series {self.series} must be one or more of {tuple(ACQUISITIONS)}, each once": (
                not names or len(names & set(ACQUISITIONS)) != len(self.series)
            ),
            f"shape {self.shape} must be (z, y, x) with at least 8 voxels along each axis": (
                np.size(self.shape) != 3 or min(self.shape) < 8
            ),
            f"spacing_mm {self.spacing_mm} must be (z, y, x), all positive": (
                np.size(self.spacing_mm) != 3 or min(self.spacing_mm) <= 0
            ),
            f"snr {self.snr} must be positive; math.inf means no noise": not self.snr > 0,
            **{f"{one} {getattr(self, one)} must be between 0 and 1": not 0 <= getattr(self, one) <= 1 for one in shares},
        }
        for what, is_wrong in wrong.items():
            if is_wrong:
                raise UserError(what)

    @property
    def labelled(self) -> dict[str, tuple[str, ...]]:
        """What labels 1, 2 and 3 are made of."""
        return GLIOMA_AND_VENTRICLES if self.ventricles else GLIOMA


@dataclass(frozen=True)
class Subject:
    """One subject on the common grid."""

    series: dict[str, np.ndarray]  # name to (z, y, x) float32, 0 outside the brain and all 0 where not present
    labels: np.ndarray  # (z, y, x) uint8, values 1 to 3 in the order of the spec's `labelled`
    present: dict[str, bool]  # name to whether the series was acquired
    brain: np.ndarray  # (z, y, x) bool
    enhancing: bool  # the tumour takes up contrast agent
    diagnosis: str | None  # one of CLASSES


def mixed_signal(acquisition: Acquisition, tissues: dict[str, Tissue], fractions: np.ndarray, water: np.ndarray) -> np.ndarray:
    """Noise-free signal (z, y, x): each tissue's own, weighted by its fraction (t, z, y, x); `water` as in `signal`."""
    mixed = np.zeros(water.shape, dtype=np.float32)
    for name, fraction in zip(TISSUES, fractions, strict=True):
        there = np.nonzero(fraction)
        mixed[there] += fraction[there] * signal(acquisition, tissues[name], water[there])
    return mixed


def add_rician_noise(values: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Magnitude of the signal with complex Gaussian noise of SD `sigma` in each part; any shape, float32."""
    real, imaginary = sigma * rng.standard_normal((2, *values.shape), dtype=np.float32)
    return np.hypot(values + real, imaginary)


def _sampling_matrices(size: int, spacing_mm: float, voxel_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis, (m, n) averages of the n grid voxels over m acquired ones, and (n, m) linear interpolation back."""
    num_acquired = max(1, min(size, round(size * spacing_mm / voxel_mm)))
    if num_acquired == size:
        return np.eye(size, dtype=np.float32), np.eye(size, dtype=np.float32)
    edges = np.arange(num_acquired + 1) * size / num_acquired
    voxels = np.arange(size)
    overlap = np.minimum(edges[1:, None], voxels + 1) - np.maximum(edges[:-1, None], voxels)
    acquire = np.clip(overlap, 0, None) * num_acquired / size
    centres = (edges[:-1] + edges[1:]) / 2
    back = np.stack([np.interp(voxels + 0.5, centres, unit) for unit in np.eye(num_acquired)], axis=1)
    return acquire.astype(np.float32), back.astype(np.float32)


def acquire_series(
    spec: PhantomSpec, name: str, anatomy: Anatomy, fractions: np.ndarray, gain: float, rng: np.random.Generator
) -> np.ndarray:
    """One series (z, y, x) float32 as a scanner would give it, on the common grid; not yet cut to the brain.

    Receiver: the brightest healthy tissue without partial volume gives 1000 times `gain`, ADC maps stay 1e-6 mm2/s.
    """
    acquisition = ACQUISITIONS[name]
    bias_lattice = draw_lattice(rng, 4)
    water = WATER_SPREAD * smooth_field(anatomy.lattices["water"], spec.shape)
    values = mixed_signal(acquisition, anatomy.tissues, fractions, water)
    healthy = [abs(signal(acquisition, TISSUES[tissue], 0.0)) for tissue in HEALTHY]
    white_matter = healthy[HEALTHY.index("white matter")]
    is_map = acquisition.equation == "ADC map"
    if not is_map:
        scale = 1000 * gain / max(healthy)
        white_matter *= scale
        values *= scale * np.exp(spec.bias * smooth_field(bias_lattice, spec.shape))

    matrices = [_sampling_matrices(*axis) for axis in zip(spec.shape, spec.spacing_mm, acquisition.voxel_mm, strict=True)]
    values = along_axes(values, [acquire for acquire, _ in matrices])
    sigma = white_matter / spec.snr
    if is_map:
        values = values + sigma * rng.standard_normal(values.shape, dtype=np.float32)
    else:
        values = add_rician_noise(values, sigma, rng)
    return along_axes(values, [back for _, back in matrices])


def draw_subject(spec: PhantomSpec, index: int) -> Subject:
    """Subject `index` of `spec`: bit-identical whichever others are drawn, and its tissue whichever series are."""
    # One stream for the tissue and one for each series, so that a series does not depend on which others are asked for.
    rng = np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=(index,)))
    draws = rng.random(len(ACQUISITIONS))
    subject_gain = math.exp(spec.gain_spread * rng.standard_normal())
    anatomy = draw_anatomy(rng, spec.enhancing_share)
    diagnosis = None
    if spec.diagnoses:
        # a stream of its own, so that all else is as without diagnoses
        bits = np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=(index, len(ACQUISITIONS)))).random(2) < 0.5
        kind = (bool(bits[0]), bool(bits[1]))
        anatomy = replace(anatomy, tissues={**anatomy.tissues, "core": CORES[kind]})
        diagnosis = CLASSES[kind[0] != kind[1]]

    draw = {name: draws[i] for i, name in enumerate(ACQUISITIONS) if name in spec.series}
    present = {name: bool(draw[name] >= spec.missing_share or draw[name] == max(draw.values())) for name in spec.series}
    shows_diffusion = not {"DWI", "ADC"}.isdisjoint(spec.series)
    fractions, ventricles, brain = tissue_fractions(anatomy, spec.shape, restricted_focus=shows_diffusion)
    series = {}
    for name in spec.series:
        if not present[name]:
            series[name] = np.zeros(spec.shape, dtype=np.float32)
            continue
        stream = (index, list(ACQUISITIONS).index(name))
        series_rng = np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=stream))
        gain = subject_gain * math.exp(spec.gain_spread * series_rng.standard_normal())
        values = acquire_series(spec, name, anatomy, fractions, gain, series_rng)
        # Within the brain a value of 0 would read as background, so the least is 1, on a scale where tissue is hundreds.
        series[name] = np.where(brain, np.maximum(values, 1), 0).astype(np.float32)
    labels = np.where(brain, label_map(fractions, ventricles, spec.labelled), 0).astype(np.uint8)
    return Subject(series, labels, present=present, brain=brain, enhancing=anatomy.lesion.rim > 0, diagnosis=diagnosis)
