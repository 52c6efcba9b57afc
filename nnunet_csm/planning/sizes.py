"""Sizes from the data and the memory: token, patch, batch. Every function gives the value and why."""

import math
from collections.abc import Callable, Sequence

from nnunet_csm.planning.presets import Preset
from nnunet_csm.schema import Size

# a shorter patch leaves a token of a ViT too little context
MIN_TOKENS_PER_AXIS = 4
# a convolutional encoder looks beyond its tokens' borders at every level
MIN_PLACES_PER_AXIS = 2
SHARES = {MIN_TOKENS_PER_AXIS: "a quarter", MIN_PLACES_PER_AXIS: "half"}
# of all series together; at that length attention costs a ViT-B as much as its linear layers
MAX_TOKENS = 4096
# a patch of whole tokens, each axis rounded to the nearest, holds at least this share of the volume
WHOLE_VOLUME = (7 / 8) ** 3
# as in nnU-Net: no batch shows more than this share of the voxels of the dataset
MAX_SHARE_IN_BATCH = 0.05


def as_text(numbers: Sequence[int]) -> str:
    """`96 x 96 x 96`."""
    return " x ".join(map(str, numbers))


def choose_token_size(preset: Preset, shape: Sequence[int], spacing: Sequence[float], least: int) -> tuple[Size, str]:
    """Cubes where spacing is near isotropic, shorter along a thick axis, and at least `least` of them along each axis."""
    if preset.token_size is not None:
        return preset.token_size, "as in the preset"
    edges = []
    for length, step in zip(shape, spacing, strict=True):
        wanted = 2 ** round(math.log2(max(1.0, preset.token_edge * min(spacing) / step)))
        fits = 2 ** int(math.log2(max(1, length // least)))
        edges.append(min(wanted, fits))
    z, y, x = edges
    millimetres = " x ".join(f"{e * s:.3g}" for e, s in zip(edges, spacing, strict=True))
    spacings = " x ".join(f"{s:.3g}" for s in spacing)
    why = f"{millimetres} mm at a spacing of {spacings} mm; at most {SHARES[least]} of the median shape"
    return (z, y, x), why


def choose_patch_size(
    preset: Preset, shape: Sequence[int], spacing: Sequence[float], token_size: Size, num_series: int, least: int
) -> tuple[Size, str]:
    """Near the median shape, in whole tokens, within the preset's voxels and the longest sequence.

    Args:
        preset: gives the patch, or the most voxels of one.
        shape: median shape of the dataset, in voxels.
        spacing: mm; the longest axis in mm is shortened first.
        token_size: of the patch.
        num_series: whose tokens make one sequence; 0 when they make none, as places of a convolutional encoder.
        least: tokens along each axis that are left.
    """
    if preset.patch_size is not None:
        return preset.patch_size, "as in the preset"
    whole = [max(1, round(length / t)) for length, t in zip(shape, token_size, strict=True)]
    by_voxels = preset.max_patch_voxels // math.prod(token_size)
    by_attention = MAX_TOKENS // num_series if num_series else by_voxels
    why = f"whole tokens near the median shape {as_text(shape)}"
    if math.prod(whole) > by_voxels:
        why += f", at most {preset.max_patch_voxels:,} voxels"
    if by_attention < min(math.prod(whole), by_voxels):
        why += f", at most {MAX_TOKENS:,} tokens in the {num_series} series together"
    return shortened(whole, token_size, spacing, min(by_voxels, by_attention), least), why


def squeeze(patch_size: Size, token_size: Size, spacing: Sequence[float], least: int, fits: Callable[[Size], bool]) -> Size:
    """The largest shorter patch that fits; the smallest there is when none does."""
    whole = [p // t for p, t in zip(patch_size, token_size, strict=True)]
    low, high = 0, math.prod(whole)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(shortened(whole, token_size, spacing, middle, least)) else (low, middle)
    return shortened(whole, token_size, spacing, max(low, 1), least)


def shortened(whole: Sequence[int], token_size: Size, spacing: Sequence[float], most: int, least: int) -> Size:
    """A patch of at most `most` tokens: the longest axis in millimetres is shortened first, none below `least` tokens."""
    counts = list(whole)
    while math.prod(counts) > most:
        lengths = [c * t * s if c > least else 0.0 for c, t, s in zip(counts, token_size, spacing, strict=True)]
        if not any(lengths):
            break
        counts[lengths.index(max(lengths))] -= 1
    # the last token taken may have left room for one along another axis
    for axis, count in enumerate(counts):
        if count < whole[axis] and math.prod(counts) // count * (count + 1) <= most:
            counts[axis] += 1
    z, y, x = (c * t for c, t in zip(counts, token_size, strict=True))
    return z, y, x


def choose_pretraining_patch(preset: Preset, patch_size: Size, token_size: Size) -> tuple[Size, str]:
    """The patch of fine-tuning, as in the paper, unless the preset wants fewer tokens; never larger than it."""
    if preset.pretraining_grid is None:
        return patch_size, "that of fine-tuning, as in the paper"
    z, y, x = (min(n * t, p) for n, t, p in zip(preset.pretraining_grid, token_size, patch_size, strict=True))
    return (z, y, x), "set by the preset: short sequences learn faster; positions are fixed, so any grid will do later"


def choose_pretraining_batch(wanted: int, fits: Callable[[int], bool]) -> tuple[int, str]:
    """The preset's, halved until it fits into memory."""
    batch = wanted
    while batch > 1 and not fits(batch):
        batch //= 2
    return batch, "as in the preset" if batch == wanted else f"halved from the preset's {wanted} to fit into memory"


def choose_finetuning_batch(
    wanted: int, patch_size: Size, shape: Sequence[int], num_cases: int, fits: Callable[[int], bool] | None
) -> tuple[int, str]:
    """The preset's; more, as in nnU-Net, only where the patch is as large as the volume and memory is left.

    Args:
        wanted: of the preset.
        patch_size: in voxels.
        shape: median shape, in voxels.
        num_cases: training cases of the dataset.
        fits: whether a batch fits into memory; None when no memory was named.
    """
    if fits is None or math.prod(patch_size) < WHOLE_VOLUME * math.prod(shape):
        return wanted, "as in the preset"
    most = max(wanted, round(MAX_SHARE_IN_BATCH * num_cases * math.prod(shape) / math.prod(patch_size)))
    batch = wanted
    while 2 * batch <= most and fits(2 * batch):
        batch *= 2
    return (
        batch,
        "as in the preset" if batch == wanted else f"the patch is the whole volume and memory allows it (preset {wanted})",
    )
