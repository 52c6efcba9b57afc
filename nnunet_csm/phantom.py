"""Synthetic multi-series brain MRI with gliomas and labels, for tests and demonstrations without real subjects.

One set of tissue fractions a subject feeds every series through the MR signal equations, so the series share their anatomy
but not their order of contrasts: a series follows from what the tissue is, hardly from another series' value in that voxel.

Lengths of the anatomy are shares of the field of view ("head units": 1 is about half a head, some 70 mm), so that the brain
fills the volume whatever its shape; a subject drawn at two shapes is the same brain on two grids. Axes are (z, y, x) with
z towards the vertex, y towards the back and x towards the left, as an LPS image array has them.
"""

import csv
import json
import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_csm.errors import UserError

Value = TypeVar("Value", float, np.ndarray)
Triple = tuple[float, float, float]
Shape = tuple[int, int, int]

# MSD Task01_BrainTumour's names.
LABELS = {"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumor": 3}
# For labels 1, 2 and 3 in turn.
LABELLED_TISSUES = (("oedema",), ("core", "restricted"), ("enhancing",))
HEALTHY = ("white matter", "grey matter", "CSF")

CORTEX_THICKNESS = 0.05  # head units, about 3.5 mm
WATER_SPREAD = 0.05  # SD of the relative excess of water within a tissue

# Longitudinal relaxivity of a common gadolinium chelate in blood at 37 degrees C, 1.5 to 3 T (manufacturers' range 3.5 to 5).
RELAXIVITY_PER_MMOL_S = 4.5


@dataclass(frozen=True)
class Tissue:
    """What the signal equations need to know of a tissue."""

    proton_density: float  # relative to water
    t1_ms: float
    t2_ms: float
    adc: float  # 1e-6 mm2/s
    uptake_mmol_l: float = 0.0  # contrast agent in the tissue after injection


# Healthy tissue: rounded from the range of published relaxometry at 3 T (white matter T1 800 to 1100 ms, grey matter 1300
# to 1800 ms, T2 70 to 110 ms) and of clinical ADC maps. Lesions: within the wider ranges published for gliomas, and chosen
# there so that series complement one another: oedema's proton density offsets its T1 (isointense to white matter in T1w),
# the core's T1 offsets its T2 (isointense to oedema in FLAIR), enhancing and restricted tumour are oedema but for uptake
# and ADC.
OEDEMA = Tissue(proton_density=0.85, t1_ms=1100, t2_ms=125, adc=1350)
TISSUES: dict[str, Tissue] = {
    "white matter": Tissue(proton_density=0.70, t1_ms=850, t2_ms=75, adc=740),
    "grey matter": Tissue(proton_density=0.82, t1_ms=1400, t2_ms=98, adc=840),
    "deep grey matter": Tissue(proton_density=0.78, t1_ms=1200, t2_ms=82, adc=780),
    "CSF": Tissue(proton_density=1.0, t1_ms=4000, t2_ms=1200, adc=3000),
    "blood": Tissue(proton_density=0.80, t1_ms=1650, t2_ms=60, adc=1500, uptake_mmol_l=0.6),
    "gliosis": Tissue(proton_density=0.80, t1_ms=1080, t2_ms=100, adc=950),
    "oedema": OEDEMA,
    "core": Tissue(proton_density=0.93, t1_ms=1800, t2_ms=250, adc=2000),
    "enhancing": replace(OEDEMA, uptake_mmol_l=0.4),
    "restricted": replace(OEDEMA, adc=550),
}
# (T1 is long, T2 is long) to the core of a phantom with diagnoses. T1w tells the one and T2w the other (a long T1 costs T2w
# signal, and proton density makes up for it), and the class is whether they agree: neither by itself tells more than chance.
# FLAIR, which weighs both, does.
CORES = {
    (t1_is_long, t2_is_long): Tissue(
        proton_density=0.93 if t1_is_long else 0.835,
        t1_ms=2200 if t1_is_long else 550,
        t2_ms=260 if t2_is_long else 60,
        adc=1500,
    )
    for t1_is_long in (False, True)
    for t2_is_long in (False, True)
}
CLASSES = ("benign", "malignant")  # T1 and T2 are both short or both long; one is short and one is long
TISSUE_INDEX = {name: i for i, name in enumerate(TISSUES)}


@dataclass(frozen=True)
class Acquisition:
    """How one series is measured. `equation` is a key of EQUATIONS; fields its equation does not use stay 0."""

    equation: str
    voxel_mm: Triple  # (z, y, x); finer than the common grid has no effect
    tr_ms: float = 0.0
    te_ms: float = 0.0
    ti_ms: float = 0.0
    flip_deg: float = 0.0
    b_s_mm2: float = 0.0
    after_contrast: bool = False


def nulling_ti_ms(t1_ms: float, tr_ms: float) -> float:
    """Inversion time at which tissue of this T1 gives no signal: the root in TI of the inversion recovery equation."""
    return t1_ms * (math.log(2) - math.log1p(math.exp(-tr_ms / t1_ms)))


T1W = Acquisition("gradient echo", voxel_mm=(1.0, 1.0, 1.0), tr_ms=9, te_ms=4, flip_deg=20)
DWI = Acquisition("diffusion", voxel_mm=(5.0, 3.0, 3.0), tr_ms=6000, te_ms=85, b_s_mm2=1000)
# Typical clinical protocols at 3 T. A key is the canonical name of a series.
ACQUISITIONS: dict[str, Acquisition] = {
    "T1w": T1W,
    "T1ce": replace(T1W, after_contrast=True),
    "T2w": Acquisition("spin echo", voxel_mm=(5.0, 1.0, 1.0), tr_ms=5000, te_ms=100),
    "FLAIR": Acquisition(
        "inversion recovery",
        voxel_mm=(6.0, 1.5, 1.5),
        tr_ms=9000,
        te_ms=120,
        ti_ms=nulling_ti_ms(TISSUES["CSF"].t1_ms, 9000),
    ),
    "DWI": DWI,
    "ADC": replace(DWI, equation="ADC map"),
}


def _gradient_echo(acquisition: Acquisition, pd: Value, t1_ms: Value, t2_ms: Value, adc: float) -> Value:
    """Spoiled gradient echo in the steady state (Ernst's equation); T2 stands in for T2*."""
    flip = math.radians(acquisition.flip_deg)
    recovered = np.exp(-acquisition.tr_ms / t1_ms)
    steady_state = math.sin(flip) * (1 - recovered) / (1 - math.cos(flip) * recovered)
    return pd * steady_state * np.exp(-acquisition.te_ms / t2_ms)


def _spin_echo(acquisition: Acquisition, pd: Value, t1_ms: Value, t2_ms: Value, adc: float) -> Value:
    return pd * (1 - np.exp(-acquisition.tr_ms / t1_ms)) * np.exp(-acquisition.te_ms / t2_ms)


def _inversion_recovery(acquisition: Acquisition, pd: Value, t1_ms: Value, t2_ms: Value, adc: float) -> Value:
    """Signed, since partial volumes add before the magnitude is taken."""
    recovered = 1 - 2 * np.exp(-acquisition.ti_ms / t1_ms) + np.exp(-acquisition.tr_ms / t1_ms)
    return pd * recovered * np.exp(-acquisition.te_ms / t2_ms)


def _diffusion(acquisition: Acquisition, pd: Value, t1_ms: Value, t2_ms: Value, adc: float) -> Value:
    """Stejskal and Tanner's equation on a T2-weighted echo."""
    return _spin_echo(acquisition, pd, t1_ms, t2_ms, adc) * math.exp(-acquisition.b_s_mm2 * adc * 1e-6)


def _adc_map(acquisition: Acquisition, pd: Value, t1_ms: Value, t2_ms: Value, adc: float) -> Value:
    return 0 * pd + adc


EQUATIONS = {
    "gradient echo": _gradient_echo,
    "spin echo": _spin_echo,
    "inversion recovery": _inversion_recovery,
    "diffusion": _diffusion,
    "ADC map": _adc_map,
}


def signal(acquisition: Acquisition, tissue: Tissue, water: Value) -> Value:
    """Noise-free signal of a pure tissue, in units of fully relaxed water (ADC map: 1e-6 mm2/s).

    `water` is the relative excess of free water over the tissue's usual, a number or an array of any shape: it prolongs T1
    and T2 together and raises proton density by a third of that, as within-tissue variation does in relaxometry.
    Contrast agent shortens T1 by 1/T1' = 1/T1 + r1 C.
    """
    pd = tissue.proton_density * (1 + water / 3)
    t1_ms = tissue.t1_ms * (1 + water)
    t2_ms = tissue.t2_ms * (1 + water)
    if acquisition.after_contrast:
        t1_ms = 1 / (1 / t1_ms + RELAXIVITY_PER_MMOL_S * tissue.uptake_mmol_l / 1000)
    return EQUATIONS[acquisition.equation](acquisition, pd, t1_ms, t2_ms, tissue.adc)


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
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.series if name not in ACQUISITIONS]
        if unknown or not self.series or len(set(self.series)) != len(self.series):
            msg = f"series {self.series} must be one or more of {tuple(ACQUISITIONS)}, each once"
            raise UserError(msg)
        if np.size(self.shape) != 3 or min(self.shape) < 8:
            msg = f"shape {self.shape} must be (z, y, x) with at least 8 voxels along each axis"
            raise UserError(msg)
        if np.size(self.spacing_mm) != 3 or min(self.spacing_mm) <= 0:
            msg = f"spacing_mm {self.spacing_mm} must be (z, y, x), all positive"
            raise UserError(msg)
        if not self.snr > 0:
            msg = f"snr {self.snr} must be positive; math.inf means no noise"
            raise UserError(msg)
        for name in ("missing_share", "enhancing_share"):
            if not 0 <= getattr(self, name) <= 1:
                msg = f"{name} {getattr(self, name)} must be between 0 and 1"
                raise UserError(msg)


@dataclass(frozen=True)
class Subject:
    """One subject on the common grid."""

    series: dict[str, np.ndarray]  # name to (z, y, x) float32, 0 outside the brain and all 0 where not present
    labels: np.ndarray  # (z, y, x) uint8, values of LABELS
    present: dict[str, bool]  # name to whether the series was acquired
    brain: np.ndarray  # (z, y, x) bool
    diagnosis: str | None  # one of CLASSES


@dataclass(frozen=True)
class Lesion:
    """A drawn glioma: an irregular ball with rim and core, in oedema. Lengths in head units."""

    centre: np.ndarray  # (3,) z, y, x
    stretch: np.ndarray  # (3,) relative semi-axes, about 1
    radius: float
    rim: float  # mean thickness of the enhancing rim; 0 for none
    oedema: float  # mean reach of the oedema beyond the ball
    focus_direction: np.ndarray  # (3,) unit vector from the centre to the diffusion-restricted focus
    lattices: dict[str, np.ndarray]


@dataclass(frozen=True)
class Anatomy:
    """Everything random about one subject's tissue, drawn without regard to the grid."""

    centre: np.ndarray  # (3,) z, y, x, as shares of half the field of view
    semi_axes: np.ndarray  # (3,) likewise
    rotation: np.ndarray  # (3, 3)
    ventricle_scale: float
    sulcal_width: float
    sulcal_depth: float
    horn_caps: float  # thickness of the periventricular hyperintensity, head units
    spot_level: float  # height of a smooth field above which white matter is gliotic
    tissues: dict[str, Tissue]
    lattices: dict[str, np.ndarray]
    lesion: Lesion


# Nodes along each axis of the random fields; a field varies over about two node distances.
BEND_LATTICES = {"bend z": 5, "bend y": 5, "bend x": 5}
TISSUE_LATTICES = {"hull": 6, "folds": 29, "depth": 7, "vessels": 13, "spots": 21, "water": 11}
LESION_LATTICES = {"lobes": 11, "bumps": 19, "rim": 13, "reach": 15}


def _draw_lattice(rng: np.random.Generator, num_nodes: int) -> np.ndarray:
    return rng.standard_normal((num_nodes,) * 3, dtype=np.float32)


def _draw_jitter(rng: np.random.Generator, tissue: Tissue) -> Tissue:
    """A subject's own tissue: 3 % scatter in relaxation and diffusion, 1 % in proton density, 20 % in uptake."""
    scatter = np.exp(rng.standard_normal(5) * (0.01, 0.03, 0.03, 0.03, 0.2))
    return Tissue(
        proton_density=float(tissue.proton_density * scatter[0]),
        t1_ms=float(tissue.t1_ms * scatter[1]),
        t2_ms=float(tissue.t2_ms * scatter[2]),
        adc=float(tissue.adc * scatter[3]),
        uptake_mmol_l=float(tissue.uptake_mmol_l * scatter[4]),
    )


def _draw_tissues(rng: np.random.Generator) -> dict[str, Tissue]:
    """Tumour parts that must not differ in one series keep differing in the others only, so they share oedema's scatter."""
    drawn = {name: _draw_jitter(rng, tissue) for name, tissue in TISSUES.items()}
    oedema = drawn["oedema"]
    drawn["enhancing"] = replace(oedema, uptake_mmol_l=drawn["enhancing"].uptake_mmol_l)
    drawn["restricted"] = replace(oedema, adc=drawn["restricted"].adc)
    return drawn


def _draw_lesion(rng: np.random.Generator, enhancing_share: float) -> Lesion:
    side = rng.choice((-1.0, 1.0))
    centre = np.array([rng.uniform(-0.05, 0.45), rng.uniform(-0.45, 0.45), side * rng.uniform(0.3, 0.5)])
    direction = rng.standard_normal(3)
    rim = rng.uniform(0.05, 0.09)
    return Lesion(
        centre=centre,
        stretch=np.exp(rng.normal(0, 0.12, 3)),
        radius=rng.uniform(0.16, 0.28),
        rim=rim if rng.random() < enhancing_share else 0.0,
        oedema=rng.uniform(0.12, 0.3),
        focus_direction=direction / np.linalg.norm(direction),
        lattices={name: _draw_lattice(rng, n) for name, n in LESION_LATTICES.items()},
    )


def _draw_rotation(rng: np.random.Generator, max_deg: float) -> np.ndarray:
    rotation = np.eye(3)
    for axis in range(3):
        angle = math.radians(rng.uniform(-max_deg, max_deg))
        first, second = [i for i in range(3) if i != axis]
        turn = np.eye(3)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[first, second], turn[second, first] = -math.sin(angle), math.sin(angle)
        rotation = turn @ rotation
    return rotation


def draw_anatomy(rng: np.random.Generator, enhancing_share: float) -> Anatomy:
    """All random choices about a subject's tissue."""
    return Anatomy(
        centre=rng.uniform(-0.02, 0.02, 3),
        semi_axes=np.array([0.88, 0.92, 0.81]) * rng.uniform(0.92, 1.0, 3),
        rotation=_draw_rotation(rng, max_deg=7),
        ventricle_scale=math.exp(rng.normal(0, 0.25)),
        sulcal_width=rng.uniform(0.008, 0.028),
        sulcal_depth=rng.uniform(0.26, 0.38),
        horn_caps=max(0.0, rng.uniform(-0.03, 0.05)),
        spot_level=rng.uniform(2.6, 3.6),
        tissues=_draw_tissues(rng),
        lattices={name: _draw_lattice(rng, n) for name, n in (BEND_LATTICES | TISSUE_LATTICES).items()},
        lesion=_draw_lesion(rng, enhancing_share),
    )


def _along_axes(volume: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
    """Multiply each axis i of (a, b, c) by matrices[i] of (a', a), ...: a separable linear map."""
    first, second, third = matrices
    volume = volume @ third.T
    volume = np.swapaxes(np.swapaxes(volume, 1, 2) @ second.T, 1, 2)
    return np.tensordot(first, volume, axes=1)


def smooth_field(lattice: np.ndarray, shape: Shape) -> np.ndarray:
    """(n, n, n) independent normal values to a smooth (z, y, x) float32 field, standard normal in each voxel.

    Gaussian bumps on nodes that reach one node beyond the field of view; weights have unit norm in each voxel.
    """
    num_nodes = lattice.shape[0]
    nodes = np.arange(num_nodes) - 1.0
    matrices = []
    for size in shape:
        voxels = (np.arange(size) + 0.5) / size * (num_nodes - 3)
        weights = np.exp(-((voxels[:, None] - nodes) ** 2) / (2 * 0.7**2))
        matrices.append((weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32))
    return _along_axes(lattice, matrices)


def _as_column(vector: Triple | np.ndarray) -> np.ndarray:
    """(3,) to (3, 1, 1, 1) float32, to meet coordinates (3, z, y, x)."""
    return np.asarray(vector, dtype=np.float32)[:, None, None, None]


def _distance_to_ellipsoid(point: np.ndarray, centre: Triple, semi_axes: Triple) -> np.ndarray:
    """(3, z, y, x) to signed distance (z, y, x), negative inside; first order in the distance to the surface."""
    axes = _as_column(semi_axes)
    scaled = (point - _as_column(centre)) / axes
    radius = np.sqrt((scaled**2).sum(0))
    slope = np.sqrt(((scaled / axes) ** 2).sum(0))
    return radius * (radius - 1) / np.maximum(slope, 1e-6)


def _distance_to_level_set(field: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Unsigned distance to where a field is 0, first order; `step` (3,) is the voxel's size in head units."""
    slope = np.sqrt(sum(g**2 for g in np.gradient(field, *step)))
    # Without a floor a sheet would swell where the field has an extremum near 0.
    return np.abs(field) / np.maximum(slope, 0.5 * float(slope.mean()))


class _Mixture:
    """Tissue fractions (t, z, y, x), summing to 1 in each voxel; a structure displaces those placed before it.

    Structures are given by signed distances (z, y, x), negative inside; `voxel` is the edge in the same unit over which
    a boundary is spread, so that voxels on it hold both tissues.
    """

    def __init__(self, shape: Shape, voxel: float, filled_with: str) -> None:
        self.voxel = voxel
        self.fractions = np.zeros((len(TISSUES), *shape), dtype=np.float32)
        self[filled_with][...] = 1

    def __getitem__(self, tissue: str) -> np.ndarray:
        return self.fractions[TISSUE_INDEX[tissue]]

    def place(self, tissue: str, distance: np.ndarray) -> None:
        """Put `tissue` inside, at the cost of all that was there."""
        share = self._share_inside(distance)
        touched = share > 0
        self.fractions[:, touched] *= 1 - share[touched]
        self[tissue][...] += share

    def convert(self, source: str, tissue: str, distance: np.ndarray) -> None:
        """Turn what there is of `source` inside into `tissue`."""
        moved = self[source] * self._share_inside(distance)
        self[source][...] -= moved
        self[tissue][...] += moved

    def _share_inside(self, distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance / self.voxel, 0, 1).astype(np.float32)


def _head_coordinates(anatomy: Anatomy, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Voxel centres as (3, z, y, x) float32 head units, tilted and bent, and a voxel's size (3,) there."""
    axes = [((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32) for size in shape]
    point = np.stack(np.meshgrid(*axes, indexing="ij"))
    point -= _as_column(anatomy.centre)
    point = np.tensordot(anatomy.rotation.astype(np.float32), point, axes=1)
    point /= _as_column(anatomy.semi_axes)
    for axis, name in enumerate(("bend z", "bend y", "bend x")):
        point[axis] += 0.04 * smooth_field(anatomy.lattices[name], shape)
    return point, 2 / np.array(shape) / anatomy.semi_axes


def tissue_fractions(anatomy: Anatomy, shape: Shape, restricted_focus: bool) -> tuple[np.ndarray, np.ndarray]:
    """Fractions (t, z, y, x) in the order of TISSUES, summing to 1, and the brain (z, y, x) bool.

    `restricted_focus` adds the part of the tumour that only diffusion shows.
    """
    point, step = _head_coordinates(anatomy, shape)
    fields = {name: smooth_field(lattice, shape) for name, lattice in anatomy.lattices.items() if name in TISSUE_LATTICES}

    cerebrum = _distance_to_ellipsoid(point, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)) + 0.02 * fields["hull"]
    # The base is flat and rises towards the back, where the cerebellum lies.
    cerebrum = np.maximum(cerebrum, -0.5 - point[0] + 0.3 * np.clip(point[1], -0.3, 1))
    cerebellum = _distance_to_ellipsoid(point, (-0.52, 0.42, 0.0), (0.36, 0.42, 0.66))
    brainstem = _distance_to_ellipsoid(point, (-0.6, 0.05, 0.0), (0.38, 0.15, 0.2))
    brain = np.minimum(np.minimum(cerebrum, cerebellum), brainstem) < 0

    mixture = _Mixture(shape, voxel=float(np.prod(step) ** (1 / 3)), filled_with="CSF")
    sulci = _distance_to_level_set(fields["folds"], step)
    _place_cerebellum(mixture, point, cerebellum)
    mixture.place("white matter", brainstem + 0.02)
    _place_cerebrum(mixture, anatomy, point, cerebrum, sulci, fields["depth"])
    mixture.convert("CSF", "blood", np.hypot(sulci, _distance_to_level_set(fields["vessels"], step)) - 0.02)
    _place_deep_structures(mixture, anatomy, _before_mass_effect(point, anatomy.lesion), fields["water"])
    mixture.convert("white matter", "gliosis", 0.1 * (anatomy.spot_level - fields["spots"]))
    _place_lesion(mixture, anatomy.lesion, point, restricted_focus)
    return mixture.fractions, brain


def _place_cerebrum(
    mixture: _Mixture, anatomy: Anatomy, point: np.ndarray, cerebrum: np.ndarray, sulci: np.ndarray, depth_field: np.ndarray
) -> None:
    """White matter under a cortex of even thickness that follows the surface into sulci and fissures."""
    z, y, x = point
    depth = -cerebrum
    sulcal_depth = anatomy.sulcal_depth * (1 + 0.25 * depth_field)
    to_sulcus = np.hypot(sulci, np.maximum(depth - sulcal_depth, 0))
    above_callosum = _distance_to_ellipsoid(point, (0.02, 0.0, 0.0), (0.36, 0.58, 2.0))
    to_midline = np.hypot(x, np.maximum(-above_callosum, 0))
    # The Sylvian fissure rises from front to back and stops at the insula.
    to_sylvian_plane = 0.8 * (z + 0.05 - 0.7 * y + 0.06 * depth_field)
    to_sylvian = np.sqrt(to_sylvian_plane**2 + np.maximum(0.62 - np.abs(x), 0) ** 2 + np.maximum(np.abs(y + 0.05) - 0.25, 0) ** 2)
    to_fluid = np.minimum(np.minimum(to_sulcus, to_midline + 0.008), to_sylvian) - anatomy.sulcal_width
    parenchyma = np.minimum(to_fluid, depth - 0.02)
    mixture.place("grey matter", -parenchyma)
    mixture.place("white matter", CORTEX_THICKNESS - parenchyma)


def _place_cerebellum(mixture: _Mixture, point: np.ndarray, cerebellum: np.ndarray) -> None:
    """Stacked folia, each a grey leaf with a white stem, around a white centre."""
    period = 0.14
    between_folia = np.abs(np.sin(np.pi * (point[0] + 0.35 * point[1]) / period)) * period / np.pi
    mixture.place("grey matter", -np.minimum(-cerebellum - 0.02, between_folia - 0.004))
    stems = np.maximum(cerebellum + 0.07, period / np.pi - 0.006 - between_folia)
    mixture.convert("grey matter", "white matter", np.minimum(stems, cerebellum + 0.2))


def _place_deep_structures(mixture: _Mixture, anatomy: Anatomy, point: np.ndarray, cap_field: np.ndarray) -> None:
    """Deep nuclei on either side, then the ventricles between them with their gliotic lining."""
    z, y, x = point
    # One side serves both, about the midline.
    folded = np.stack([z, y, np.abs(x)])
    mixture.place("deep grey matter", _distance_to_ellipsoid(folded, (0.08, -0.26, 0.2), (0.14, 0.16, 0.07)))
    mixture.place("deep grey matter", _distance_to_ellipsoid(folded, (-0.02, 0.18, 0.15), (0.15, 0.18, 0.12)))
    lens = np.stack([z, y, folded[2] - 0.3 * (y + 0.05)])
    mixture.place("deep grey matter", _distance_to_ellipsoid(lens, (-0.02, -0.08, 0.4), (0.18, 0.24, 0.08)))

    scale = anatomy.ventricle_scale
    # The lateral ventricles part from each other in front and, much more, behind, where they also dip.
    centre_line = 0.11 + np.where(y < 0, 0.25, 0.9) * y**2
    curved = np.stack([z + 0.5 * np.maximum(y, 0) ** 2, y, folded[2] - centre_line])
    lateral = _distance_to_ellipsoid(curved, (0.14, 0.05, 0.0), (0.13 * scale, 0.46, 0.07 * scale))
    third = _distance_to_ellipsoid(point, (-0.1, 0.08, 0.0), (0.16, 0.22, 0.03 * scale))
    fourth = _distance_to_ellipsoid(point, (-0.52, 0.2, 0.0), (0.12, 0.07, 0.09))
    ventricles = np.minimum(np.minimum(lateral, third), fourth)
    # Caps sit at the two horns, a thin line along the body.
    cap = anatomy.horn_caps * (0.4 + np.abs(y) + 0.3 * cap_field)
    mixture.convert("white matter", "gliosis", lateral - cap)
    mixture.place("CSF", ventricles)


def _before_mass_effect(point: np.ndarray, lesion: Lesion) -> np.ndarray:
    """Where the tissue now at (3, z, y, x) lay before the tumour pushed it outwards."""
    offset = point - _as_column(lesion.centre)
    closeness = np.exp(-(offset**2).sum(0) / (2 * (2 * lesion.radius) ** 2))
    return point - 0.35 * closeness * offset


def _place_lesion(mixture: _Mixture, lesion: Lesion, point: np.ndarray, restricted_focus: bool) -> None:
    """Oedema, mostly in white matter; within it the tumour, a core in a rim of uneven thickness."""
    lobes, bumps, rim, reach = (smooth_field(lesion.lattices[name], point.shape[1:]) for name in LESION_LATTICES)
    stretched = (point - _as_column(lesion.centre)) / _as_column(lesion.stretch)
    radius = np.sqrt((stretched**2).sum(0))
    tumour = radius - lesion.radius * (1 + 0.2 * lobes + 0.16 * bumps)
    # Oedema fades out over some millimetres, so its distance counts half.
    oedema = 0.5 * (radius - lesion.radius - lesion.oedema * (1 + 0.4 * reach))
    mixture.convert("white matter", "oedema", oedema)
    mixture.convert("grey matter", "oedema", oedema + 0.06)
    mixture.place("core", tumour)
    if lesion.rim > 0:
        mixture.convert("core", "enhancing", -tumour - lesion.rim * (1 + 0.5 * rim))
    # Taken from what the rim leaves of the core, so that labels do not depend on the series asked for.
    if restricted_focus:
        focus = lesion.focus_direction * 0.45 * lesion.radius
        to_focus = np.sqrt(((stretched - _as_column(focus)) ** 2).sum(0))
        mixture.convert("core", "restricted", to_focus - 0.45 * lesion.radius * (1 + 0.3 * reach))


def label_map(fractions: np.ndarray) -> np.ndarray:
    """Tissue fractions (t, z, y, x) to labels (z, y, x) uint8: of healthy and the three lesion parts, the largest."""
    parts = [fractions[[TISSUE_INDEX[tissue] for tissue in tissues]].sum(0) for tissues in LABELLED_TISSUES]
    return np.argmax([1 - sum(parts), *parts], axis=0).astype(np.uint8)


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
    bias_lattice = _draw_lattice(rng, 4)
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
    values = _along_axes(values, [acquire for acquire, _ in matrices])
    sigma = white_matter / spec.snr
    if is_map:
        values = values + sigma * rng.standard_normal(values.shape, dtype=np.float32)
    else:
        values = add_rician_noise(values, sigma, rng)
    return _along_axes(values, [back for _, back in matrices])


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
    fractions, brain = tissue_fractions(anatomy, spec.shape, restricted_focus=not {"DWI", "ADC"}.isdisjoint(spec.series))
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
    labels = np.where(brain, label_map(fractions), 0).astype(np.uint8)
    return Subject(series, labels, present=present, brain=brain, diagnosis=diagnosis)


def _as_image(volume: np.ndarray, spacing_mm: Triple) -> sitk.Image:
    """(z, y, x) array with spacing in the same order to an image with the identity direction."""
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing_mm[::-1])
    return image


def _write_case(spec: PhantomSpec, subject: Subject, image_path: Path, label_path: Path) -> None:
    """The series as one 4-D int16 image in the order of `spec.series`, as MSD stores them, and the labels."""
    volumes = [_as_image(np.rint(subject.series[name]).astype(np.int16), spec.spacing_mm) for name in spec.series]
    sitk.WriteImage(sitk.JoinSeries(volumes, 0.0, 1.0), str(image_path), useCompression=True)
    sitk.WriteImage(_as_image(subject.labels, spec.spacing_mm), str(label_path), useCompression=True)


def write_task(
    spec: PhantomSpec, folder: Path, num_training: int, num_test: int, task_id: int = 900, name: str = "Phantom"
) -> Path:
    """Write a Medical Segmentation Decathlon task to `folder`/TaskXXX_Name and return that path.

    Subjects 0 to num_training - 1 are training cases, the next num_test are test cases. Besides MSD's files there are
    labelsTs and `cases.csv`: which series each case has (an absent one is stored as zeros) and whether its tumour
    enhances; with diagnoses also `classification.csv`, for nnU-Net's raw dataset folder, and `classes_test.csv`. The
    task appears whole or not at all. Raises UserError where it exists already or its name would not convert.
    """
    folder = Path(folder)
    target = folder / f"Task{task_id:02d}_{name}"
    if target.exists():
        msg = f"{target} exists; remove it or choose another task id or name"
        raise UserError(msg)
    if not name.isalnum():
        msg = f"task name {name!r} must be letters and digits only, as nnUNetv2_convert_MSD_dataset splits at underscores"
        raise UserError(msg)
    if num_training < 1 or num_test < 0:
        msg = f"num_training {num_training} must be at least 1 and num_test {num_test} at least 0"
        raise UserError(msg)

    cases = [f"phantom_{index:03d}" for index in range(num_training + num_test)]
    folder.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that the final rename stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}_", dir=folder) as temporary:
        staging = Path(temporary) / target.name
        for subfolder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (staging / subfolder).mkdir(parents=True)
        rows = []
        diagnoses: dict[str, list[list[str]]] = {"Tr": [], "Ts": []}
        for index, case in enumerate(tqdm(cases, desc=target.name, unit="subject")):
            split = "Tr" if index < num_training else "Ts"
            file = f"{case}.nii.gz"
            subject = draw_subject(spec, index)
            _write_case(spec, subject, staging / f"images{split}" / file, staging / f"labels{split}" / file)
            if subject.diagnosis is not None:
                diagnoses[split].append([case, subject.diagnosis])
            enhances = bool((subject.labels == LABELS["enhancing tumor"]).any())
            rows.append([case, split, *(int(subject.present[series]) for series in spec.series), int(enhances)])
        with (staging / "cases.csv").open("w", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([["case", "split", *spec.series, "enhancing"], *rows])
        if spec.diagnoses:
            for split, file in (("Tr", "classification.csv"), ("Ts", "classes_test.csv")):
                with (staging / file).open("w", newline="") as stream:
                    csv.writer(stream, lineterminator="\n").writerows([["case", "class"], *diagnoses[split]])
        description = _dataset_json(spec, name, cases[:num_training], cases[num_training:])
        (staging / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
        staging.rename(target)
    return target


def _dataset_json(spec: PhantomSpec, name: str, training: list[str], test: list[str]) -> dict[str, object]:
    """MSD's description of a task; "modality" is its own word for series."""
    return {
        "name": name,
        "description": "Synthetic multi-series brain MRI with gliomas",
        "reference": f"nnunet_csm.phantom, seed {spec.seed}",
        "licence": "generated, no subject's data",
        "release": "1.0",
        "tensorImageSize": "4D",
        "modality": {str(channel): series for channel, series in enumerate(spec.series)},
        "labels": {str(value): label for label, value in LABELS.items()},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in training],
        "test": [f"./imagesTs/{case}.nii.gz" for case in test],
    }
