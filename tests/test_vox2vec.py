"""Vox2Vec: what its views, voxels and loss are, and that it learns, trains and transfers as any pretext."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from factories import PATCH_SIZE, TOKEN_SIZE, csm_plans
from test_learning import SPEC, volumes
from test_trainers import goes_on_and_transfers
from torch import Tensor

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.errors import UserError
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext.base import Batch, setup_of
from nnunet_csm.pretext.cost import pretraining_cost
from nnunet_csm.pretext.info_nce import contrast
from nnunet_csm.pretext.memory import pretraining_memory
from nnunet_csm.pretext.vox2vec import Vox2Vec, VoxelPairs, boxes_around, chosen, cut_boxes, foreground, overlap, voxel_features
from nnunet_csm.schema import Size

NETWORK: dict[str, Any] = {"encoder": {"kind": "fpn", "base": 4}, "depth": 1, "decoder": "linear"}
BLOCK: dict[str, Any] = {"name": "vox2vec", "num_voxels": 16, "num_outputs": 8}
UNCHANGED = {"smoothed": 0.0, "noisy": 0.0, "windowed": 0.0}


def build(patch_size: Size = PATCH_SIZE, token_size: Size = TOKEN_SIZE, **changes: Any) -> Vox2Vec:
    torch.manual_seed(0)
    plans = csm_plans(patch_size=patch_size, token_size=token_size, architecture=NETWORK)
    plans["configurations"]["3d_fullres"]["csm"]["pretext"] = BLOCK | changes
    pretext, setup = setup_of(read_configuration(plans, "3d_fullres", "plans.json"))
    made = pretext(setup)
    assert isinstance(made, Vox2Vec)
    return made


def crops(pretext: Vox2Vec, num: int = 4, seed: int = 3) -> Tensor:
    """Noise, with nothing in the first rows of the first sample and without a series in the second."""
    volume = torch.randn(num, 3, *pretext.crop_sizes[0], generator=torch.Generator().manual_seed(seed))
    volume[0, :, :, :4] = 0
    volume[1 % num, 2] = 0
    return volume


def batch_of(pretext: Vox2Vec, num: int = 4, training: bool = True, seed: int = 3, volume: Tensor | None = None) -> Batch:
    volume = crops(pretext, num, seed) if volume is None else volume
    present = volume.flatten(2).any(2)
    return Batch((volume,), pretext.draw(Draws(seed, torch.arange(len(volume))), present, 0, (volume,), training))


def drawn_of(batch: Batch) -> VoxelPairs:
    assert isinstance(batch.drawn, VoxelPairs)
    return batch.drawn


# --- what is drawn --------------------------------------------------------------------------------------------------------------


def test_foreground_is_what_varies_and_is_not_zero() -> None:
    volume = torch.zeros(2, 2, 6, 8, 9)
    volume[0, 0, :, :4] = torch.randn(6, 4, 9)
    volume[0, 0, 2, 1, 3] = 0
    # a constant that is not 0, as z-scoring leaves it
    volume[1] = -0.7
    found = foreground(volume.half())
    expected = torch.zeros(6, 8, 9, dtype=torch.bool)
    expected[:, :4] = True
    expected[2, 1, 3] = False
    assert found[0].equal(expected) and not found[1].any()
    # one series will do
    volume[0, 1, 2, 1, 3] = 1
    assert foreground(volume)[0, 2, 1, 3]


@pytest.mark.parametrize("num_counted", [0, 1, 5, 7, 8, 20, 900])
def test_what_is_chosen_counts_and_comes_once(num_counted: int) -> None:
    random = torch.Generator().manual_seed(num_counted)
    counted = torch.stack([torch.randperm(1000, generator=random) < num_counted for _ in range(50)])
    number, valid = chosen(counted, Draws(1, torch.arange(50)).integers(What.TOKENS, 8))
    assert (valid.sum(1) == min(num_counted, 8)).all()
    for row in range(50):
        found = number[row][valid[row]]
        assert counted[row, found].all() and len(found.unique()) == len(found)
        # stand-ins are some of the others
        assert num_counted == 0 or counted[row, number[row]].all()


def test_all_are_as_likely_to_be_chosen() -> None:
    counted = torch.arange(60) % 3 > 0
    number, _ = chosen(counted.expand(20000, -1), Draws(1, torch.arange(20000)).integers(What.TOKENS, 8))
    share = torch.bincount(number.flatten(), minlength=60) / 20000
    assert not share[~counted].any() and ((share[counted] - 8 / 40).abs() < 0.02).all()


def test_boxes_hold_the_voxel_and_stay_within_the_crop() -> None:
    crop, view, num = (6, 18, 15), (4, 12, 10), 4000
    anchor = torch.stack([torch.randint(0, length, (num, 1)) for length in crop], -1)
    start = boxes_around(anchor, Draws(2, torch.arange(num)).integers(What.TOKENS, 6).view(num, 2, 3), crop, view)
    size, end = torch.tensor(view), torch.tensor(crop)
    assert (start >= 0).all() and (start + size <= end).all()
    assert (start <= anchor).all() and (anchor < start + size).all()
    # wherever they can be, they are
    middle = (anchor[:, 0] == torch.tensor([3, 9, 7])).any(1)
    for axis, length in enumerate(crop):
        there = start[anchor[:, 0, axis] == length // 2, :, axis]
        low, high = max(0, length // 2 - view[axis] + 1), min(length // 2, length - view[axis])
        assert set(there.flatten().tolist()) == set(range(low, high + 1)) and middle.any()
    both = overlap(start, crop, view)
    for sample in range(5):
        expected = torch.zeros(2, *crop, dtype=torch.bool)
        for box, (z, y, x) in zip(expected, start[sample].tolist(), strict=True):
            box[z : z + 4, y : y + 12, x : x + 10] = True
        assert both[sample].equal(expected.all(0))
        assert both[sample][tuple(anchor[sample, 0].tolist())]


def test_voxels_are_of_the_foreground_of_both_views() -> None:
    pretext = build()
    batch = batch_of(pretext, 30)
    drawn, there = drawn_of(batch), foreground(batch.volumes[0])
    assert drawn.valid.all() and pretext.crop_sizes == ((6, 18, 15),)
    for sample, voxels in enumerate(drawn.voxels):
        assert there[sample][tuple(voxels.T)].all() and len(voxels.unique(dim=0)) == len(voxels)
    within = drawn.voxels[:, None] - drawn.start[:, :, None]
    assert (within >= 0).all() and (within < torch.tensor(pretext.setup.patch_size)).all()


def test_fewer_voxels_are_told_and_none_is_no_error() -> None:
    pretext = build(margin=0.25)
    volume = crops(pretext, 3)
    volume[0] = 0
    volume[0, 0, 2, 6, 4:9] = torch.arange(1.0, 6.0)
    volume[1] = 0
    batch = batch_of(pretext, volume=volume)
    drawn = drawn_of(batch)
    assert 1 <= drawn.valid[0].sum() <= 5 and not drawn.valid[1].any() and drawn.valid[2].all()
    assert pretext.weight(drawn) == drawn.valid.sum()
    loss = pretext(*batch.args)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pretext.parameters())
    # stand-ins in the first sample, and all of the second, are as if they were not there
    valid = drawn.valid.flatten()
    outputs = torch.nn.functional.normalize(torch.randn(2, len(valid), 8), dim=-1)
    torch.testing.assert_close(contrast(outputs, valid, 0.1), contrast(outputs[:, valid], valid[valid], 0.1))
    # nothing at all
    empty = batch_of(pretext, volume=torch.zeros(2, 3, *pretext.crop_sizes[0]))
    assert pretext(*empty.args) == 0 and pretext.weight(empty.drawn) == 0


def test_pairs_share_the_most_voxels_of_a_step() -> None:
    pretext = build(most_voxels=40)
    assert [drawn_of(batch_of(pretext, num)).voxels.shape[1] for num in (1, 2, 4, 40)] == [16, 16, 10, 2]


def test_draws_are_functions_of_the_key_and_the_sample() -> None:
    pretext = build()
    volume = crops(pretext)
    present = torch.ones(4, 3, dtype=torch.bool)
    whole = pretext.draw(Draws(5, torch.arange(4)), present, 0, (volume,), True)
    part = pretext.draw(Draws(5, torch.arange(2, 4)), present[2:], 0, (volume[2:],), True)
    assert all(one[2:].equal(two) for one, two in zip(whole.tensors, part.tensors, strict=True))
    other = pretext.draw(Draws(6, torch.arange(4)), present, 0, (volume,), True)
    assert not whole.voxels.equal(other.voxels) and not whole.start.equal(other.start) and not whole.gamma.equal(other.gamma)


# --- views ----------------------------------------------------------------------------------------------------------------------


def test_boxes_are_cut_as_slices() -> None:
    volume = torch.randn(2, 3, 6, 9, 7).half()
    start = torch.tensor([[[0, 0, 0], [2, 4, 2]], [[1, 3, 0], [2, 0, 1]]])
    found = cut_boxes(volume, start, (4, 5, 5))
    for sample, view in product(range(2), range(2)):
        z, y, x = start[sample, view].tolist()
        assert found[sample, view].equal(volume[sample, :, z : z + 4, y : y + 5, x : x + 5])


def test_a_voxel_has_its_value_in_both_views() -> None:
    pretext = build(changes=UNCHANGED)
    (volume,), drawn = (batch := batch_of(pretext)).volumes, drawn_of(batch)
    views = pretext.views(volume, drawn)
    for sample, view in product(range(4), range(2)):
        within = drawn.voxels[sample] - drawn.start[sample, view]
        expected = volume[sample][(slice(None), *drawn.voxels[sample].T)]
        assert views[sample, view][(slice(None), *within.T)].equal(expected)


def test_changes_come_as_often_and_are_as_strong_as_they_are_set() -> None:
    batch = batch_of(build(num_voxels=64, most_voxels=25600), 400)
    (volume,), drawn = batch.volumes, drawn_of(batch)
    share = [(found != 0).float().mean() for found in (drawn.smoothing, drawn.noise, drawn.windowed)]
    # the second sample has no range of the series that it lacks, and so no noise
    torch.testing.assert_close(torch.stack(share), torch.tensor([0.5, 0.5, 0.8]), rtol=0, atol=0.03)
    spread = drawn.span[..., 1] - drawn.span[..., 0]
    assert (drawn.noise <= 0.1 * spread).all() and (drawn.noise[2:] / spread[2:]).max() > 0.095
    assert drawn.gamma.min() >= 0.7 and drawn.gamma.max() <= 1.5
    # of 64 values, the least four and the largest seven: 0 to 5 % and 90 to 100 % of the way
    values = volume[2][(slice(None), *drawn.voxels[2].T)].sort(-1).values
    low, high = drawn.window[2].unbind(-1)
    assert (low <= values[:, 3]).all() and (high >= values[:, 57]).all() and drawn.span[2, 0].equal(values[:, [0, -1]])
    # each series and each view by itself
    assert not drawn.gamma[:, 0].equal(drawn.gamma[:, 1]) and not drawn.gamma[:, :, 0].equal(drawn.gamma[:, :, 1])


def test_a_window_is_stretched_to_the_range_of_the_foreground() -> None:
    pretext = build(changes=UNCHANGED | {"windowed": 1.0})
    batch = batch_of(pretext)
    (volume,), drawn = batch.volumes, drawn_of(batch)
    views, plain = pretext.views(volume, drawn), cut_boxes(volume, drawn.start, pretext.setup.patch_size)
    low, high = drawn.window[2, 0, 1].tolist()
    least, most = drawn.span[2, 0, 1].tolist()
    before, after = plain[2, 0, 1], views[2, 0, 1]
    torch.testing.assert_close(after[before >= high], torch.full_like(after[before >= high], most))
    torch.testing.assert_close(after[before <= low], torch.full_like(after[before <= low], least))
    between = (before > low) & (before < high)
    expected = least + (most - least) * ((before - low) / (high - low)) ** drawn.gamma[2, 0, 1]
    torch.testing.assert_close(after[between], expected[between])


def test_absent_series_and_what_is_empty_stay_zero() -> None:
    pretext = build(changes={"smoothed": 1.0, "noisy": 1.0, "windowed": 1.0})
    batch = batch_of(pretext)
    views = pretext.views(batch.volumes[0], drawn_of(batch))
    plain = cut_boxes(batch.volumes[0], drawn_of(batch).start, pretext.setup.patch_size)
    assert not views[1, :, 2].any() and not views[plain == 0].any()
    assert (views != plain)[plain != 0].float().mean() > 0.95


def test_absent_series_teach_nothing() -> None:
    pretext = build()
    volume = crops(pretext)
    volume[:, 1] = 0
    batch = batch_of(pretext, volume=volume)
    pretext(*batch.args).backward()
    gradient = pretext.encoder.get_parameter("embedding.weight").grad
    assert gradient is not None and not gradient[:, 1].any() and gradient[:, 0].any() and gradient[:, 2].any()


# --- features and loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "token_size"),
    [((6, 12, 10), (2, 4, 2)), ((4, 64, 32), (4, 32, 32)), ((3, 32, 64), (1, 32, 32)), ((5, 7, 9), (1, 1, 1))],
)
def test_features_of_a_voxel_are_those_of_its_place_in_every_map(size: Size, token_size: Size) -> None:
    strides = [tuple(max(1, t // 2**level) for t in token_size) for level in range(6)][::-1]
    maps = [
        torch.randn(2, channels, *(length // step for length, step in zip(size, stride, strict=True)))
        for channels, stride in enumerate(strides, start=1)
    ]
    # odd places and the last among them
    voxels = torch.stack([torch.stack([torch.randint(0, length, (20,)) for length in size], -1) for _ in range(2)])
    voxels[:, 0] = torch.tensor(size) - 1
    found = voxel_features(maps, voxels, size)
    for sample, number in product(range(2), range(20)):
        z, y, x = voxels[sample, number].tolist()
        expected = [level[sample, :, z // a, y // b, x // c] for level, (a, b, c) in zip(maps, strides, strict=True)]
        assert found[sample, number].equal(torch.cat(expected))


def test_features_are_those_of_the_views_one_by_one() -> None:
    pretext = build(changes=UNCHANGED)
    batch = batch_of(pretext)
    (volume,), drawn = batch.volumes, drawn_of(batch)
    features = pretext.features(volume, drawn)
    assert features.shape == (2, 4 * 16, sum(pretext.encoder.level_widths))
    for view, sample in product(range(2), range(4)):
        maps = pretext.encoder.maps(pretext.views(volume, drawn)[sample, view][None])
        alone = voxel_features(maps, (drawn.voxels - drawn.start[:, view, None])[sample, None], pretext.setup.patch_size)
        torch.testing.assert_close(features[view, sample * 16 : (sample + 1) * 16], alone[0], rtol=1e-4, atol=1e-5)


def test_gradients_of_16_bits_are_summed_in_32() -> None:
    level = torch.zeros(1, 1, 2, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    voxel_features([level], torch.zeros(1, 1000, 3, dtype=torch.long), (4, 4, 4)).sum().backward()
    assert level.grad is not None and level.grad[0, 0, 0, 0, 0] == 1000


def test_outputs_have_length_one_in_16_bits_too() -> None:
    pretext = build()
    batch = batch_of(pretext)
    with torch.autocast("cpu", torch.bfloat16):
        projected = pretext.projected(pretext.features(*batch.args))
    torch.testing.assert_close(projected.norm(dim=-1), torch.ones(projected.shape[:2]))
    assert projected.dtype == torch.float32


@pytest.mark.parametrize(
    ("patch_size", "token_size"), [((4, 12, 10), (2, 4, 2)), ((4, 64, 32), (4, 32, 32)), ((3, 32, 64), (1, 32, 32))]
)
def test_every_parameter_learns_whatever_the_token(patch_size: Size, token_size: Size) -> None:
    pretext = build(patch_size, token_size)
    loss = pretext(*batch_of(pretext, 2).args)
    loss.backward()
    assert loss > 0 and all(p.grad is not None and p.grad.isfinite().all() for p in pretext.parameters())
    assert all(p.grad is not None and p.grad.any() for name, p in pretext.encoder.named_parameters())


def test_one_series_and_one_sample_are_enough() -> None:
    plans = csm_plans(series=("T1w",), architecture=NETWORK)
    plans["configurations"]["3d_fullres"]["csm"]["pretext"] = BLOCK
    pretext, setup = setup_of(read_configuration(plans, "3d_fullres", "plans.json"))
    batch = (network := pretext(setup)).example(1, 0)
    assert network(*batch.args).isfinite() and network.seen_tokens(torch.ones(1, 1, dtype=torch.bool)) == 60


# --- validation, settings, memory -----------------------------------------------------------------------------------------------


def test_validation_has_no_noise_and_is_the_same_every_time() -> None:
    pretext = build().eval()
    batch = batch_of(pretext, training=False)
    assert not drawn_of(batch).noise.any() and drawn_of(batch_of(pretext)).noise.any()
    first, second = pretext.validate(batch), pretext.validate(batch)
    assert first.keys() == {"loss", *Vox2Vec.parts}
    assert all(torch.equal(first[name][0], second[name][0]) for name in first)
    assert first["loss"][1] == pretext.weight(batch.drawn) and 0 <= first["retrieved"][0] <= first["retrieved"][1]


def test_equal_features_are_told_in_the_log() -> None:
    pretext = build().eval()

    def said() -> str:
        found = pretext.validate(batch_of(pretext, training=False))
        return pretext.warning({name: [float(total / num)] for name, (total, num) in found.items()})

    assert said() == ""
    for parameter in pretext.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    for name, parameter in pretext.encoder.named_parameters():
        if name.startswith(("ups", "laterals")) and name.endswith("bias"):
            torch.nn.init.ones_(parameter)
    assert "all voxels have the same features (deviation 0.0000)" in said()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_voxels": 1}, "num_voxels is 1, expected 2 <= num_voxels"),
        ({"most_voxels": 0}, "most_voxels is 0, expected 2 <= most_voxels"),
        ({"num_outputs": 0}, "num_outputs is 0, expected 1 <= num_outputs"),
        ({"margin": 1.0}, "margin is 1.0, expected 0 <= margin < 1"),
        ({"temperature": 0.0}, "temperature is 0.0, expected 0 < temperature"),
        ({"changes": {"noisy": 1.5}}, "changes.noisy is 1.5, expected 0 <= noisy <= 1"),
        ({"changes": {"noise": -0.1}}, "changes.noise is -0.1, expected 0 <= noise"),
        ({"changes": {"window": [0.0, 95.0, 90.0, 100.0]}}, "expected four percentiles"),
        ({"changes": {"gamma": [0.0, 1.5]}}, r"changes.gamma\[0\] is 0.0, expected 0 < gamma"),
        ({"masking": {}}, "unknown masking"),
    ],
)
def test_settings_that_cannot_be_are_told(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(**changes)


def test_an_encoder_without_maps_is_refused() -> None:
    plans = csm_plans()
    plans["configurations"]["3d_fullres"]["csm"]["pretext"] = BLOCK
    with pytest.raises(UserError, match=r"encoder\.kind in arch_kwargs is 'vit'; set it to 'fpn'"):
        setup_of(read_configuration(plans, "3d_fullres", "plans.json"))


def test_the_plan_tells_and_tokens_of_both_views_are_counted() -> None:
    pretext = build()
    lines = {what: f"{value}; {why}" for what, value, why in Vox2Vec.described(pretext.setup, {3: 4})}
    assert "2 of 4 x 12 x 10 voxels; of a crop of 6 x 18 x 15" in lines["views"] and "16 a pair" in lines["voxels"]
    assert pretext.seen_tokens(torch.tensor([[True, True, True], [True, False, False]])) == 2 * 30


def test_memory_and_cost_are_predicted() -> None:
    setup = build().setup
    small, large = (pretraining_memory(Vox2Vec, setup, num) for num in (2, 8))
    assert small.states == large.states and 0 < small.activations < large.activations
    plans = csm_plans(architecture=NETWORK)
    plans["configurations"]["3d_fullres"]["csm"]["pretext"] = BLOCK
    settings = read_configuration(plans, "3d_fullres", "plans.json")
    assert pretraining_cost(settings, torch.ones(2, 3, dtype=torch.bool)).operations_per_crop > 0


# --- learning -------------------------------------------------------------------------------------------------------------------


def test_it_learns() -> None:
    pretext = build((8, 16, 16), (4, 8, 8), num_voxels=64, margin=0.25)
    training, others = (volumes(range(*found))[..., :10, :20, :20] for found in ((0, 6), (6, 10)))
    assert SPEC.series == ("FLAIR", "T1w", "T2w") and pretext.crop_sizes == ((10, 20, 20),)
    validation = batch_of(pretext, training=False, volume=others)

    @torch.no_grad()
    def found() -> dict[str, float]:
        return {name: float(total / num) for name, (total, num) in pretext.validate(validation).items()}

    before, optimizer = found(), torch.optim.AdamW(pretext.parameters(), lr=3e-3)
    for step in range(40):
        batch = batch_of(pretext, seed=100 + step, volume=training)
        optimizer.zero_grad()
        (pretext(*batch.args) / pretext.weight(batch.drawn)).backward()
        optimizer.step()
    after = found()
    assert after["loss"] < before["loss"] - 0.5 and after["retrieved"] > before["retrieved"]


def make_fpn(entry: dict[str, Any]) -> None:
    entry["architecture"]["arch_kwargs"] |= NETWORK


def test_it_trains_goes_on_after_a_kill_and_transfers(make_trainer: Callable[..., Any]) -> None:
    given: dict[str, Any] = {"pretext": BLOCK, "change": make_fpn}
    whole = make_trainer(True, **given)
    whole.run_training()
    log = whole.logger.local_logger.my_fantastic_logging
    assert all(len(log[name]) == whole.num_epochs for name in Vox2Vec.parts) and min(log["feature_deviation"]) > 0
    goes_on_and_transfers(make_trainer, whole, **given)
