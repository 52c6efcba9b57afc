"""Patches around a mask, a lesion's or an organ's: where they lie, cut once, and varied at every step.

Places along an axis are counted in voxels from the centre of the first one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import blosc2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer, Shaped
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor
from tqdm import tqdm

from nnunet_csm.data.crops import Size
from nnunet_csm.data.diagnoses import Sample
from nnunet_csm.data.stored import to_half
from nnunet_csm.errors import UserError
from nnunet_csm.plans import Classification

Array: TypeAlias = np.ndarray | blosc2.NDArray
LoadCase = Callable[[str], tuple[Array, np.ndarray]]

# of the patch's edge: how far a patch may be shifted along each axis
MAX_SHIFT = 1 / 12
# of lengths (every second patch keeps its own) and of the voxels of a series
MAX_ZOOM, MAX_GAIN = 0.1, 0.1


@dataclass(frozen=True)
class Placement:
    """Where a patch lies: its voxel i has its centre at `start + factor * i` in the volume, along each of (z, y, x).

    `factor` is 1, and `start` whole, unless the mask was too large for the patch or all patches are made smaller.
    """

    start: tuple[float, float, float]
    factor: float
    patch_size: Size

    def to_volume(self, patch: Float[Tensor, "n pz py px"], shape: Size) -> Float[Tensor, "n z y x"]:
        """Bring maps on the patch to the volume it was cut from, which has `shape`; zero outside the patch."""
        start = torch.tensor([self.start], dtype=torch.float64)
        step = torch.full_like(start, 1 / self.factor)
        return resample(patch[None], -start / self.factor, step, shape)[0]


def cut_around(
    volume: Array,
    mask: Bool[np.ndarray, "z y x"],
    patch_size: Size,
    margin: float,
    border: Size = (0, 0, 0),
    scale: Literal["each"] | float = "each",
    with_mask: bool = False,
) -> tuple[Float[Tensor, "n pz py px"], Placement]:
    """Cut the patch around a mask.

    The patch is centred on the mask's box, and zero outside the volume. Where the box, widened by `margin` of its length
    on each side, is longer than the patch along an axis, the patch is taken from a volume made smaller until it fits, by one
    factor for all axes and linear interpolation. What a patch holds beyond the widened box is not blanked: surroundings
    tell something too. Voxels are rounded to fp16, as they are kept in training.

    Args:
        volume: (n, z, y, x), in memory or a file; only the part in question is read.
        mask: where to look.
        patch_size: in voxels, after the volume was made smaller.
        margin: see above.
        border: more voxels on each side of the patch, for `vary`; the placement is that of the patch without them.
        scale: the factor, whatever the size of the mask, of which the patch then holds the middle where it is larger; "each"
            for the one that lets it fit.
        with_mask: give the mask as one more channel, after the others; 1 inside.

    Raises:
        ValueError: an empty mask.
    """
    low, length = box_of(mask)
    high = low + length - 1
    factor = max(1.0, float((length * (1 + 2 * margin) / patch_size).max())) if scale == "each" else scale
    start = (low + high) / 2 - factor * (np.array(patch_size) - 1) / 2
    if factor == 1.0:
        start = np.floor(start)
    first = start - factor * np.array(border)
    size = np.array(patch_size) + 2 * np.array(border)
    # what interpolation reaches, inside the volume
    reach = math.ceil(factor)
    lower = np.maximum(np.floor(first).astype(int) - reach, 0)
    upper = np.minimum(np.ceil(first + factor * (size - 1)).astype(int) + reach + 1, volume.shape[1:])
    z, y, x = (slice(int(a), int(b)) for a, b in zip(lower, upper, strict=True))
    part = torch.as_tensor(volume[:, z, y, x]).float()
    if with_mask:
        part = torch.cat([part, torch.from_numpy(mask[None, z, y, x]).float()])
    begin = torch.from_numpy(first - lower)[None]
    cut = resample(part[None], begin, torch.full_like(begin, factor), (int(size[0]), int(size[1]), int(size[2])))[0]
    return to_half(cut).float(), Placement((float(start[0]), float(start[1]), float(start[2])), factor, patch_size)


def cut_sample(
    volume: Array, mask: Bool[np.ndarray, "z y x"], settings: Classification, border: Size = (0, 0, 0)
) -> tuple[Float[Tensor, "n pz py px"], Placement]:
    """Cut the patch that a classifier with these settings sees, in training as in prediction."""
    with_mask = settings.pooling == "mask"
    return cut_around(volume, mask, settings.patch_size, settings.margin, border, settings.scale, with_mask)


def box_of(mask: Bool[np.ndarray, "z y x"]) -> tuple[Int[np.ndarray, " 3"], Int[np.ndarray, " 3"]]:
    """Find the first voxel of the box around a mask, and its lengths, in voxels.

    Raises:
        ValueError: an empty mask.
    """
    if not mask.any():
        raise ValueError("the mask is empty: there is nothing to cut a patch around")
    places = [np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    low = np.array([place[0] for place in places])
    return low, np.array([place[-1] for place in places]) - low + 1


def measures_of(
    mask: Bool[np.ndarray, "z y x"], segmentation: Integer[np.ndarray, "z y x"], labels: Sequence[int]
) -> Float[Tensor, " f"]:
    """Measure a mask: log(1 + voxels) of the lengths of its box, of its volume, and of that of each of some labels, NaN for a
    label that is absent; then 1 for each of these labels that is there, 0 for one that is not.

    Voxels are those of the plans, which are as large in all cases.
    """
    volumes = [np.count_nonzero(segmentation == label) for label in labels]
    sizes = torch.tensor([*box_of(mask)[1], np.count_nonzero(mask), *volumes], dtype=torch.float32)
    return torch.cat([sizes.log1p().where(sizes > 0, torch.nan), torch.tensor([float(volume > 0) for volume in volumes])])


def measured_labels(labels: LabelManager, by_mask_label: bool) -> tuple[int, ...]:
    """Choose, of the labels of a dataset, those whose volumes are among the measures of a mask.

    None where there is one, whose volume is the mask's, and none where labels number the lesions of a case.
    """
    several = tuple(int(label) for label in labels.all_labels if label > 0)
    return () if by_mask_label or len(several) == 1 else several


def measure_names(labels: Sequence[int]) -> tuple[str, ...]:
    """Name what `measures_of` gives for these labels, in its order."""
    of_mask = ("length along z", "length along y", "length along x", "volume")
    return (*of_mask, *(f"volume of label {label}" for label in labels), *(f"presence of label {label}" for label in labels))


def sample_mask(sample: Sample, segmentation: Integer[np.ndarray, "z y x"]) -> Bool[np.ndarray, "z y x"]:
    """The sample's own label, or all labels when it names none."""
    return segmentation > 0 if sample.mask_label is None else segmentation == sample.mask_label


def resample(
    volume: Float[Tensor, "b n z y x"], start: Float[Tensor, "b 3"], step: Float[Tensor, "b 3"], size: Size
) -> Float[Tensor, "b n pz py px"]:
    """Values at `start + step * i`, i = 0 ... size - 1, by linear interpolation along each axis; zero outside the volume.

    Starts and steps are on the CPU, where a volume on a GPU need not be waited for to know how far they reach.
    """
    pattern = ("bnzyx,biz->bniyx", "bnzyx,biy->bnzix", "bnzyx,bix->bnzyi")
    reach = math.ceil(max(1.0, float(step.abs().max())))
    start, step = (given.to(volume.device, non_blocking=True) for given in (start, step))
    for axis in (2, 1, 0):
        weights = linear_weights(start[:, axis], step[:, axis], size[axis], volume.shape[2 + axis], reach)
        volume = torch.einsum(pattern[axis], volume, weights.to(volume))
    return volume


def linear_weights(
    start: Float[Tensor, " b"], step: Float[Tensor, " b"], size: int, length: int, reach: int
) -> Float[Tensor, "b i j"]:
    """Weights of the values at j = 0 ... length - 1 for the values at `start + step * i`; a negative step mirrors.

    A step above 1 averages over a triangle as wide as the step, so that nothing finer than the new voxels is folded into
    them. Values beyond the ends count as zero. `reach` is at least every step.
    """
    start, step = start.double(), step.double()
    width = step.abs().clamp(min=1.0)[:, None, None]
    place = (start[:, None] + step[:, None] * torch.arange(size, device=start.device))[:, :, None]
    weights = (1 - (place - torch.arange(length, device=start.device)).abs() / width).clamp(min=0)
    around = torch.arange(-reach, reach + 2, device=start.device)
    total = (1 - (place - place.floor() - around).abs() / width).clamp(min=0).sum(-1, keepdim=True)
    return weights / total


@dataclass(frozen=True)
class Variation:
    """What training does to patches, drawn."""

    flip: Bool[Tensor, "b 3"]
    shift: Int[Tensor, "b 3"]
    """Voxels along (z, y, x)."""
    zoom: Float[Tensor, " b"]
    """Above 1 makes the lesion larger."""
    gain: Float[Tensor, "b n"]
    """By which each series is multiplied."""

    def __getitem__(self, samples: slice) -> "Variation":
        """The batch of some samples."""
        return Variation(self.flip[samples], self.shift[samples], self.zoom[samples], self.gain[samples])


def draw_variation(generator: torch.Generator, num_samples: int, num_channels: int, patch_size: Size) -> Variation:
    """Draw flips, shifts of a few voxels, zooms of every second patch, and gains."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    limit = max_shift(patch_size)
    flip = uniform(num_samples, 3) < 0.5
    shift = (uniform(num_samples, 3) * (2 * limit + 1)).long() - limit
    zoomed = uniform(num_samples) < 0.5
    zoom = 1 / (1 + MAX_ZOOM * (2 * uniform(num_samples) - 1))
    return Variation(
        flip,
        shift,
        torch.where(zoomed, zoom, torch.ones(num_samples)),
        1 + MAX_GAIN * (2 * uniform(num_samples, num_channels) - 1),
    )


def max_shift(patch_size: Size) -> Int[Tensor, " 3"]:
    return (torch.tensor(patch_size) * MAX_SHIFT).long()


def border_of(patch_size: Size) -> Size:
    """Voxels on each side of a patch that shifts and zooms may bring into it."""
    zoomed = torch.ceil((torch.tensor(patch_size) - 1) / 2 * MAX_ZOOM).long()
    z, y, x = (max_shift(patch_size) + zoomed).tolist()
    return z, y, x


def vary(regions: Float[Tensor, "b n z y x"], variation: Variation, patch_size: Size) -> Float[Tensor, "b n pz py px"]:
    """Cut patches out of patches with borders, on the device these are on; a series that is all zero stays so."""
    sign = torch.where(variation.flip, -1.0, 1.0).double()
    step = sign / variation.zoom[:, None]
    half = (torch.tensor(patch_size) - 1) / 2
    middle = (torch.tensor(regions.shape[2:]) - 1) / 2
    start = middle + variation.shift - step * half
    patches = resample(regions, start, step, patch_size)
    return patches * variation.gain[:, :, None, None, None].to(patches)


def targets_of(samples: Sequence[Sample]) -> Shaped[Tensor, "m ..."]:
    """Class indices (m,), or numbers (m, k)."""
    numbers = [sample.numbers for sample in samples]
    return torch.tensor(numbers) if any(numbers) else torch.tensor([one.class_index for one in samples], dtype=torch.long)


class SampleVolumes:
    """The patches of some samples with their borders, in memory as fp16.

    Attributes:
        samples: those that could be cut.
        regions: their patches with borders.
        measures: of their masks, see `measures_of`.
        targets: what is to be learned of them, see `diagnoses.Sample.target`.
        left_out: name of a sample that could not be cut, and why.
    """

    samples: tuple[Sample, ...]
    regions: Float[Tensor, "m n z y x"]
    measures: Float[Tensor, "m f"]
    targets: Shaped[Tensor, "m ..."]

    def __init__(
        self,
        samples: Sequence[Sample],
        load_case: LoadCase,
        channels: Sequence[int],
        settings: Classification,
        measured_labels: Sequence[int] = (),
    ) -> None:
        """Cut the samples.

        Args:
            samples: of one side of a split.
            load_case: gives the images (n, z, y, x) and the segmentation (z, y, x) of a case.
            channels: those of the planned series; a sample in which all of them are zero is left out.
            settings: of the classifier.
            measured_labels: whose volumes are among the measures.

        Raises:
            UserError: voxels that are no numbers.
        """
        self.patch_size, self.border = settings.patch_size, border_of(settings.patch_size)
        self.left_out: dict[str, str] = {}
        kept, regions, measures = [], [], []
        for sample in tqdm(samples, desc="reading samples", unit="sample", disable=None, leave=False):
            volume, segmentation = load_case(sample.case)
            mask = sample_mask(sample, segmentation)
            if not mask.any():
                self.left_out[sample.name] = "its mask is empty"
                continue
            region = cut_sample(volume, mask, settings, self.border)[0]
            if not region.isfinite().all():
                raise UserError(
                    f"{sample.case}: holds NaN or infinite voxels; write 0 or what belongs there into the raw images "
                    f"(`nnunet_csm fingerprint` names them) and preprocess again"
                )
            if not region[list(channels)].any():
                self.left_out[sample.name] = "none of the planned series is present"
                continue
            kept.append(sample)
            regions.append(region.half())
            measures.append(measures_of(mask, segmentation, measured_labels))
        self.samples = tuple(kept)
        self.regions = torch.stack(regions) if regions else torch.empty(0, len(channels), *self.patch_size).half()
        self.measures = torch.stack(measures) if measures else torch.empty(0, 0)
        self.targets = targets_of(kept)

    def __len__(self) -> int:
        return len(self.samples)

    def patches(self, first: int, last: int) -> Float[Tensor, "b n z y x"]:
        """The patches of samples `first` to `last - 1` as they are."""
        z, y, x = (slice(b, b + p) for b, p in zip(self.border, self.patch_size, strict=True))
        return self.regions[first:last, :, z, y, x].float()
