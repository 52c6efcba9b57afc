"""One subject's anatomy: what is drawn at random about it, and the fractions of the tissues in every voxel.

Lengths are shares of the field of view ("head units": 1 is about half a head, some 70 mm), so that the brain fills the volume
whatever its shape; a subject drawn at two shapes is the same brain on two grids. Axes are (z, y, x) with z towards the vertex,
y towards the back and x towards the left, as an LPS image array has them.
"""

import math
from dataclasses import astuple, dataclass, replace

import numpy as np

from nnunet_csm.phantom.tissues import TISSUES, Tissue

Triple = tuple[float, float, float]
Shape = tuple[int, int, int]

# What labels 1, 2 and 3 are made of. MSD Task01_BrainTumour's names:
GLIOMA = {"edema": ("oedema",), "non-enhancing tumor": ("core", "restricted"), "enhancing tumor": ("enhancing",)}
# and two that show by their brightness beside one that does not, since the fluid of sulci is as bright:
GLIOMA_AND_VENTRICLES = {
    "oedema": ("oedema",),
    "tumour core": ("core", "restricted", "enhancing"),
    "ventricles": ("ventricles",),
}
# of a phantom without a label for ventricles
LABELS = {name: value for value, name in enumerate(("background", *GLIOMA))}
TISSUE_INDEX = {name: i for i, name in enumerate(TISSUES)}

CORTEX_THICKNESS = 0.05  # head units, about 3.5 mm

# Nodes along each axis of the random fields; a field varies over about two node distances.
BEND_LATTICES = {"bend z": 5, "bend y": 5, "bend x": 5}
TISSUE_LATTICES = {"hull": 6, "folds": 29, "depth": 7, "vessels": 13, "spots": 21, "water": 11}
LESION_LATTICES = {"lobes": 11, "bumps": 19, "rim": 13, "reach": 15}


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


def draw_lattice(rng: np.random.Generator, num_nodes: int) -> np.ndarray:
    return rng.standard_normal((num_nodes,) * 3, dtype=np.float32)


def _draw_jitter(rng: np.random.Generator, tissue: Tissue) -> Tissue:
    """A subject's own tissue: 3 % scatter in relaxation and diffusion, 1 % in proton density, 20 % in uptake."""
    scatter = np.exp(rng.standard_normal(5) * (0.01, 0.03, 0.03, 0.03, 0.2))
    return Tissue(*(float(value * factor) for value, factor in zip(astuple(tissue), scatter, strict=True)))


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
        lattices={name: draw_lattice(rng, n) for name, n in LESION_LATTICES.items()},
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
        lattices={name: draw_lattice(rng, n) for name, n in (BEND_LATTICES | TISSUE_LATTICES).items()},
        lesion=_draw_lesion(rng, enhancing_share),
    )


def along_axes(volume: np.ndarray, matrices: list[np.ndarray]) -> np.ndarray:
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
    return along_axes(lattice, matrices)


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

    def place(self, tissue: str, distance: np.ndarray) -> np.ndarray:
        """Put `tissue` inside, at the cost of all that was there; returns the share of each voxel that is inside."""
        share = self._share_inside(distance)
        touched = share > 0
        self.fractions[:, touched] *= 1 - share[touched]
        self[tissue][...] += share
        return share

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


def tissue_fractions(anatomy: Anatomy, shape: Shape, restricted_focus: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fractions (t, z, y, x) in the order of TISSUES, summing to 1, that of the ventricles' fluid and the brain, bool (z, y, x).

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
    ventricles = _place_deep_structures(mixture, anatomy, _before_mass_effect(point, anatomy.lesion), fields["water"])
    mixture.convert("white matter", "gliosis", 0.1 * (anatomy.spot_level - fields["spots"]))
    _place_lesion(mixture, anatomy.lesion, point, restricted_focus)
    return mixture.fractions, np.minimum(ventricles, mixture["CSF"]), brain


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


def _place_deep_structures(mixture: _Mixture, anatomy: Anatomy, point: np.ndarray, cap_field: np.ndarray) -> np.ndarray:
    """Deep nuclei on either side, then the ventricles between them with their gliotic lining; returns the ventricles' share."""
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
    return mixture.place("CSF", ventricles)


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


def label_map(fractions: np.ndarray, ventricles: np.ndarray, labelled: dict[str, tuple[str, ...]]) -> np.ndarray:
    """Fractions of tissues (t, z, y, x) and ventricles (z, y, x) to labels (z, y, x) uint8: the largest of each voxel.

    `labelled` as in GLIOMA; what is not labelled is one part.
    """
    share = {**dict(zip(TISSUES, fractions, strict=True)), "ventricles": ventricles}
    parts = [sum(share[one] for one in made_of) for made_of in labelled.values()]
    return np.argmax([1 - sum(parts), *parts], axis=0).astype(np.uint8)
