"""Patches lie where their placement says, around the mask, zero outside the volume; variations bring in true surroundings."""

from dataclasses import replace
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from factories import settings as read_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from scipy.ndimage import map_coordinates

from nnunet_csm.data.crops import cut
from nnunet_csm.data.diagnoses import Sample
from nnunet_csm.data.draws import generator
from nnunet_csm.data.lesions import (
    Placement,
    SampleVolumes,
    Variation,
    border_of,
    cut_around,
    draw_variation,
    linear_weights,
    max_shift,
    measure_names,
    measured_labels,
    measures_of,
    resample,
    vary,
)
from nnunet_csm.errors import UserError

SHAPE, PATCH = (11, 14, 17), (6, 8, 10)
SETTINGS = replace(read_settings().csm.classification, patch_size=PATCH, margin=0.25)

boxes = st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)).map(sorted) for n in SHAPE))
corners = st.tuples(*(st.integers(0, n - 1) for n in SHAPE))


def small_box(low):
    return tuple((first, min(first + 3, n)) for first, n in zip(low, SHAPE, strict=True))


small_boxes = corners.map(small_box)


def mask_of(box, shape=SHAPE):
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(slice(low, max(high, low + 1)) for low, high in box)] = True
    return mask


def random_volume(n=2, shape=SHAPE):
    return np.random.default_rng(0).standard_normal((n, *shape)).astype(np.float32)


def places(shape=SHAPE):
    """A volume that holds the place of every voxel along (z, y, x), from 100, so that none is zero."""
    return 100 + np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")).astype(np.float32)


def still(b, n, **changes):
    """The variation that changes nothing, but for `changes`."""
    values = {
        "flip": torch.zeros(b, 3, dtype=torch.bool),
        "shift": torch.zeros(b, 3, dtype=torch.long),
        "zoom": torch.ones(b),
        "gain": torch.ones(b, n),
    }
    return Variation(**{**values, **changes})


# --- where a patch lies ------------------------------------------------------------------------------------------------------


def plain_cut(volume, start, size):
    """As pretraining cuts."""
    patches = torch.empty(len(volume), *size, dtype=torch.float16)
    for series, patch in zip(volume.astype(np.float16), patches, strict=True):
        cut(series, start, (False,) * 3, patch)
    return patches.float()


@settings(max_examples=30)
@given(small_boxes)
def test_a_patch_is_the_voxels_around_the_mask_with_zeros_beyond_the_borders(box):
    volume = random_volume()
    patch, placement = cut_around(volume, mask_of(box), PATCH, margin=0.0)
    assert placement.factor == 1.0
    start = [int(s) for s in placement.start]
    assert tuple(start) == placement.start
    expected = plain_cut(volume, start, PATCH)
    assert torch.equal(patch, expected)
    for first, edge, (low, high) in zip(start, PATCH, box, strict=True):
        before, after = low - first, first + edge - max(high, low + 1)
        assert before >= 0 and after >= 0 and abs(before - after) <= 1


@settings(max_examples=30)
@given(boxes, st.floats(0.0, 0.6))
def test_a_box_wider_than_the_patch_is_made_to_fit_by_one_factor(box, margin):
    mask = mask_of(box)
    patch, placement = cut_around(places(), mask, PATCH, margin)
    lengths = [max(high, low + 1) - low for low, high in box]
    longest = max(n * (1 + 2 * margin) / p for n, p in zip(lengths, PATCH, strict=True))
    assert placement.factor == pytest.approx(max(1.0, longest))
    for axis, (low, high) in enumerate(box):
        # the middle of the patch is that of the box
        middle = placement.start[axis] + placement.factor * (PATCH[axis] - 1) / 2
        assert middle == pytest.approx((low + max(high, low + 1) - 1) / 2, abs=0.5 if placement.factor == 1 else 1e-6)
        # voxels that see nothing of the outside hold the place that the placement gives them
        at = [placement.start[a] + placement.factor * np.arange(PATCH[a]) for a in range(3)]
        inner = [(p >= placement.factor) & (p <= n - 1 - placement.factor) for p, n in zip(at, SHAPE, strict=True)]
        found = patch[axis].numpy()[np.ix_(*inner)] - 100
        expected = np.broadcast_to(np.expand_dims(at[axis][inner[axis]], [a for a in range(3) if a != axis]), found.shape)
        # fp16 at 100 and more, and half a ripple of the triangle between the voxels
        np.testing.assert_allclose(found, expected, atol=0.3)


@settings(max_examples=30)
@given(boxes)
def test_at_one_scale_a_mask_too_large_loses_its_rim_and_any_other_is_cut_as_before(box):
    volume, mask = random_volume(), mask_of(box)
    patch, placement = cut_around(volume, mask, PATCH, 0.0, scale=1.0)
    assert placement.factor == 1.0
    assert torch.equal(patch, plain_cut(volume, [int(s) for s in placement.start], PATCH))
    each, fitted = cut_around(volume, mask, PATCH, 0.0)
    assert fitted.factor > 1.0 or torch.equal(patch, each)


@pytest.mark.parametrize("scale, is_kept", [(2.0, True), ("each", False)])
def test_one_scale_keeps_how_large_masks_are_beside_each_other(scale, is_kept):
    sizes = []
    for edge in (14, 28):
        shape = (40, 40, 40)
        mask = mask_of([(20 - edge // 2, 20 + edge // 2)] * 3, shape)
        patch, _ = cut_around(random_volume(shape=shape), mask, (14, 14, 14), 0.0, scale=scale, with_mask=True)
        sizes.append(float(patch[-1].sum()))
    # 14 cubed are an eighth of 28 cubed
    assert sizes[1] / sizes[0] == pytest.approx(8.0 if is_kept else 1.0, rel=0.1)


@settings(max_examples=30)
@given(boxes, st.sampled_from(["each", 1.0, 1.7]))
def test_the_mask_is_a_channel_after_the_others_and_lies_as_they_do(box, scale):
    mask = mask_of(box)
    volume = np.concatenate([random_volume(), mask[None].astype(np.float32)])
    expected, _ = cut_around(volume, mask, PATCH, 0.25, (1, 2, 3), scale)
    found, _ = cut_around(volume[:2], mask, PATCH, 0.25, (1, 2, 3), scale, with_mask=True)
    assert torch.equal(found, expected)


@settings(max_examples=30)
@given(boxes)
def test_measures_are_logarithms_of_lengths_and_volumes_and_say_what_is_absent(box):
    segmentation = mask_of(box).astype(np.int16)
    segmentation[segmentation.shape[0] // 2 :] *= 3
    mask = segmentation > 0
    lengths = [max(high, low + 1) - low for low, high in box]
    volumes = np.array([(segmentation == label).sum() for label in (1, 2, 3)], dtype=np.float64)
    expected = np.log1p([*lengths, np.prod(lengths), *np.where(volumes > 0, volumes, np.nan)])
    found = measures_of(mask, segmentation, (1, 2, 3)).numpy()
    assert len(measure_names((1, 2, 3))) == len(found)
    np.testing.assert_allclose(found, [*expected, *(volumes > 0)], rtol=1e-4)


def test_volumes_of_labels_are_measured_where_they_are_parts_of_one_mask():
    three = LabelManager({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "ring": 2, "ignore": 4}, (1, 2, 3))
    one = LabelManager({"background": 0, "lesion": 1}, None)
    assert measured_labels(three, by_mask_label=False) == (1, 2, 3)
    assert measured_labels(three, by_mask_label=True) == measured_labels(one, by_mask_label=False) == ()


def test_making_smaller_averages_instead_of_picking():
    volume = np.indices((1, 32, 32, 32)).sum(0).astype(np.float32) % 2
    patch, placement = cut_around(volume, np.ones((32, 32, 32), dtype=bool), (16, 16, 16), margin=0.0)
    assert placement.factor == 2.0
    torch.testing.assert_close(patch[:, 2:-2, 2:-2, 2:-2], torch.full((1, 12, 12, 12), 0.5), atol=1e-3, rtol=0)


def test_files_and_memory_give_the_same_patch(tmp_path: Path):
    volume, mask = random_volume(), mask_of(((0, 9), (1, 14), (3, 5)))
    stored = blosc2.asarray(volume, urlpath=str(tmp_path / "case.b2nd"))
    assert torch.equal(cut_around(stored, mask, PATCH, 0.25)[0], cut_around(volume, mask, PATCH, 0.25)[0])


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="mask is empty"):
        cut_around(random_volume(), np.zeros(SHAPE, dtype=bool), PATCH, 0.25)


@settings(max_examples=30)
@given(small_boxes)
def test_a_map_on_the_patch_goes_back_to_the_voxels_it_came_from(box):
    volume = random_volume()
    patch, placement = cut_around(volume, mask_of(box), PATCH, margin=0.0)
    back = placement.to_volume(patch, SHAPE)
    covered = placement.to_volume(torch.ones(1, *PATCH), SHAPE)[0].bool()
    rounded = torch.from_numpy(volume).half().float()
    assert torch.equal(back, torch.where(covered, rounded, torch.zeros(())))
    assert covered[torch.from_numpy(mask_of(box))].all()


def test_a_map_on_a_patch_made_smaller_goes_back_too():
    placement = Placement((1.5, -2.0, 0.0), 2.5, PATCH)
    at = torch.meshgrid(*(s + 2.5 * torch.arange(p) for s, p in zip(placement.start, PATCH, strict=True)), indexing="ij")
    back = placement.to_volume(torch.stack(at), SHAPE)
    z, y, x = (slice(max(0, int(np.ceil(s))), int(s + 2.5 * (p - 1)) + 1) for s, p in zip(placement.start, PATCH, strict=True))
    torch.testing.assert_close(back[:, z, y, x], torch.from_numpy(places() - 100)[:, z, y, x], atol=1e-4, rtol=0)


@settings(max_examples=30)
@given(st.floats(-3, 8), st.floats(0.3, 1.0), st.booleans())
def test_interpolation_is_that_of_scipy(start, step, mirrored):
    volume = random_volume(1, (7, 8, 9))
    steps = [-step if mirrored else step, step, 1.0]
    found = resample(torch.from_numpy(volume)[None], torch.full((1, 3), start), torch.tensor([steps]), (5, 6, 7))[0, 0]
    at = np.meshgrid(
        *(np.float32(start) + np.float32(s) * np.arange(n) for s, n in zip(steps, (5, 6, 7), strict=True)), indexing="ij"
    )
    expected = map_coordinates(np.pad(volume[0], 2), [a + 2 for a in at], order=1, cval=0.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@settings(max_examples=30)
@given(st.floats(-2, 2), st.floats(0.2, 4.0))
def test_weights_inside_sum_to_one(start, step):
    reach = int(np.ceil(step)) + 1
    weights = linear_weights(torch.tensor([30.0 + start]), torch.tensor([step]), 5, 60 + reach, reach)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 5, dtype=torch.float64))


# --- variations --------------------------------------------------------------------------------------------------------------


def region_of(volume, box):
    """A patch with its border, as a batch, the patch without, and where it starts."""
    region, placement = cut_around(volume, mask_of(box), PATCH, 0.0, border_of(PATCH))
    return region[None], cut_around(volume, mask_of(box), PATCH, 0.0)[0], [int(s) for s in placement.start]


@settings(max_examples=30)
@given(small_boxes, st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_flips_are_flips_and_nothing_is_nothing(box, flips):
    region, patch, _ = region_of(random_volume(), box)
    assert torch.equal(vary(region, still(1, 2), PATCH)[0], patch)
    axes = [axis + 1 for axis, flip in enumerate(flips) if flip]
    found = vary(region, still(1, 2, flip=torch.tensor([flips])), PATCH)[0]
    assert torch.equal(found, patch.flip(axes))


def test_a_shift_brings_in_what_is_there():
    volume = random_volume(shape=(20, 26, 30))
    patch_size = (12, 12, 24)
    mask = mask_of(((9, 11), (12, 14), (14, 16)), (20, 26, 30))
    region, placement = cut_around(volume, mask, patch_size, 0.0, border_of(patch_size))
    shift = max_shift(patch_size) * torch.tensor([1, -1, 1])
    assert shift.tolist() == [1, -1, 2]
    start = [int(s) + n for s, n in zip(placement.start, shift.tolist(), strict=True)]
    expected = plain_cut(volume, start, patch_size)
    assert torch.equal(vary(region[None], still(1, 2, shift=shift[None]), patch_size)[0], expected)


def test_a_zoom_above_one_enlarges_about_the_middle():
    region = torch.from_numpy(places((20, 20, 20)))[None]
    found = vary(region, still(1, 3, zoom=torch.tensor([1.25])), (8, 8, 8))[0, 2, 0, 0]
    torch.testing.assert_close(found, 100 + 9.5 + (torch.arange(8) - 3.5) / 1.25)


@settings(max_examples=30)
@given(st.integers(0, 2**31))
def test_draws_stay_within_the_border_and_follow_their_key(seed):
    for patch_size in (PATCH, (4, 12, 25)):
        border = border_of(patch_size)
        variation, again = (draw_variation(generator(seed), 8, 2, patch_size) for _ in range(2))
        assert all(torch.equal(getattr(variation, name), getattr(again, name)) for name in vars(variation))
        ones = torch.ones(8, 2, *(p + 2 * b for p, b in zip(patch_size, border, strict=True)))
        found = vary(ones, variation, patch_size)
        # nothing from beyond the region, which counts as zero
        torch.testing.assert_close(found, variation.gain[:, :, None, None, None].expand_as(found))


def test_variations_differ_from_sample_to_sample():
    variation = draw_variation(generator(1), 200, 2, (48, 48, 48))
    assert 0.3 < variation.flip.float().mean() < 0.7
    assert variation.shift.min() == -4 and variation.shift.max() == 4
    assert 0.3 < (variation.zoom == 1).float().mean() < 0.7
    assert variation.zoom.max() > 1.05 and variation.zoom.min() < 0.95
    assert (variation.gain[:, 0] != variation.gain[:, 1]).all()


def test_an_absent_series_stays_absent():
    region = torch.randn(4, 3, *(p + 2 * b for p, b in zip(PATCH, border_of(PATCH), strict=True)))
    region[:, 1] = 0
    found = vary(region, draw_variation(generator(0), 4, 3, PATCH), PATCH)
    assert (found[:, 1] == 0).all() and (found[:, [0, 2]] != 0).any()


# --- samples -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def volumes():
    """Four samples: two lesions of a case, one with an empty mask, one without the planned series."""
    images = {"two": random_volume(3), "empty": random_volume(3), "absent": random_volume(3)}
    images["absent"][1:] = 0
    masks = {name: np.zeros(SHAPE, dtype=np.int16) for name in images}
    masks["two"][2, 3, 4], masks["two"][8, 9, 10] = 1, 2
    masks["absent"][5, 5, 5] = 1
    masks["empty"][5, 5, 5] = -1
    samples = [Sample("two", 0, 1, "p"), Sample("two", 1, 2, "p"), Sample("empty", 0, None, "q"), Sample("absent", 1, None, "r")]
    return images, masks, SampleVolumes(samples, lambda case: (images[case], masks[case]), (1, 2), SETTINGS)


def test_what_cannot_be_cut_is_left_out_with_the_reason(volumes):
    _, _, found = volumes
    assert [sample.name for sample in found.samples] == ["two_1", "two_2"]
    assert torch.equal(found.measures.expm1().round(), torch.ones(2, 4))
    assert found.targets.tolist() == [0, 1]
    assert found.left_out == {"empty": "its mask is empty", "absent": "none of the planned series is present"}


def test_voxels_that_are_no_numbers_are_refused_with_the_case(volumes):
    images, masks, _ = volumes
    images["two"][0, 2, 3, 4] = np.nan
    with pytest.raises(UserError, match="two: holds NaN"):
        SampleVolumes([Sample("two", 0, 1, "p")], lambda case: (images[case], masks[case]), (1, 2), SETTINGS)


def test_validation_sees_the_patches_that_prediction_cuts(volumes):
    images, masks, found = volumes
    expected = torch.stack([cut_around(images["two"], masks["two"] == label, PATCH, 0.25)[0] for label in (1, 2)])
    assert torch.equal(found.patches(0, 5), expected)
    assert torch.equal(vary(found.regions.float(), still(2, 3), PATCH), expected)
