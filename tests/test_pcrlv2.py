"""PCRLv2: how its views lie, what its loss is, and that it learns, goes on and transfers as any pretext."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import csm_plans
from test_learning import SPEC, volumes
from test_trainers import goes_on_and_transfers, weights
from torch import Tensor
from torch.nn import functional as F

from nnunet_csm.data.draws import Draws
from nnunet_csm.data.intensities import percentile_range
from nnunet_csm.errors import UserError
from nnunet_csm.plans import Architecture, EncoderSettings, read_configuration
from nnunet_csm.pretext import pcrlv2
from nnunet_csm.pretext.base import Batch, Setup, setup_of
from nnunet_csm.pretext.cost import pretraining_cost
from nnunet_csm.pretext.memory import pretraining_memory
from nnunet_csm.pretext.pairs import NUM_CANDIDATES, Pairs, PairSettings, overlap, places, swap, trade_places
from nnunet_csm.pretext.pcrlv2 import PCRLv2, Told, grey_levels, to_globals, unlikeness
from nnunet_csm.pretext.views import NUM_GLOBAL, Views

BLOCK: dict[str, Any] = {"name": "pcrlv2", "views": {"num_local": 3}}
NETWORK = {"width": 24, "depth": 2, "decoder": "unet", "encoder": {"kind": "plain_unet", "base": 8}}


def plans(architecture: dict[str, Any] | None = None, patch_size: Any = (4, 12, 10), **changes: Any) -> dict[str, Any]:
    made = csm_plans(patch_size=patch_size)
    entry = made["configurations"]["3d_fullres"]
    entry["architecture"]["arch_kwargs"] |= NETWORK | (architecture or {})
    entry["csm"]["pretext"] = BLOCK | changes
    return made


def build(**changes: Any) -> PCRLv2:
    torch.manual_seed(0)
    configuration = read_configuration(plans(**changes), "3d_fullres", "plans.json")
    pretext, setup = setup_of(configuration)
    made = pretext(setup)
    assert isinstance(made, PCRLv2)
    return made


def batch_of(pretext: PCRLv2, num: int = 4, training: bool = True, seed: int = 3) -> Batch:
    """Samples of which the second lacks a series."""
    volume = torch.randn(num, 3, *pretext.setup.patch_size, generator=torch.Generator().manual_seed(seed))
    volume[1, 2] = 0
    present = volume.flatten(2).any(2)
    return Batch((volume,), pretext.draw(Draws(seed, torch.arange(num)), present, 0, (volume,), training))


def quiet(batch: Batch, level: int | None = None) -> tuple[Tensor, Pairs]:
    """The patches and draws of a batch without noise; with one level for all views, if it is given."""
    drawn = batch.drawn
    assert isinstance(drawn, Pairs)
    level_of = drawn.level if level is None else torch.full_like(drawn.level, level)
    return batch.volumes[0], replace(drawn, noise=torch.zeros_like(drawn.noise), level=level_of)


# --- loss -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0, 1])
def test_the_terms_are_those_of_views_and_samples_one_by_one(level: int) -> None:
    pretext = build()
    volume, drawn = quiet(batch_of(pretext), level)
    # local views at levels of their own
    of_locals = torch.tensor([1, 0, 1])
    drawn = replace(drawn, level=torch.cat([drawn.level[:, :1], of_locals.expand(4, -1)], 1))
    large, small, clean = pretext.views(volume, drawn)
    assert large.shape == (4, NUM_GLOBAL, 3, 4, 8, 6) and small.shape == (4, 3, 3, 4, 8, 4) and clean.shape == (4, 3, 4, 8, 6)
    target = grey_levels(clean, *percentile_range(volume))

    def maps(views: Tensor) -> list[Tensor]:
        return pretext.decoder(pretext.encoder.maps(views)[-1])

    def cosine(one: Tensor, other: Tensor) -> Tensor:
        return (one * other).sum() / (one.norm() * other.norm())

    def compare(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
        return -(cosine(one[1], other[0]) + cosine(other[1], one[0])) / 2

    of_globals = [maps(view) for view in large.unbind(1)]
    told = [[head(m) for head, m in zip(pretext.heads, of_view, strict=True)] for of_view in of_globals]
    # rows of local views one after the other: 0 to b - 1 of the first, then of the next
    of_small = maps(small.transpose(0, 1).flatten(0, 1))
    told_locally = [head(m) for head, m in zip(pretext.heads, of_small, strict=True)]
    whole, _ = pretext.compared(volume, drawn)
    for sample in range(4):
        there = [0, 1] if sample == 1 else [0, 1, 2]
        output = pretext.output(of_globals[0][-1])[sample]
        wanted = target[sample, there].mean(0)
        torch.testing.assert_close(whole.reconstruction[sample], (output - target[sample])[there].square().mean())
        image = pretext.restored[level](of_globals[0][level])[sample : sample + 1]
        found = F.interpolate(image, wanted.shape, mode="trilinear")[0, 0]
        torch.testing.assert_close(whole.level_reconstruction[sample], (found - wanted).square().mean())
        z_and_q = [tuple(t[sample] for t in told[view][level]) for view in range(2)]
        torch.testing.assert_close(whole.global_similarity[sample], compare(*z_and_q))
        pairs = [
            compare(tuple(t[sample + 4 * local] for t in told_locally[of_local]), tuple(t[sample] for t in told[view][of_local]))
            for local, of_local in enumerate(of_locals.tolist())
            for view in range(2)
        ]
        torch.testing.assert_close(whole.local_similarity[sample], torch.stack(pairs).mean())
    pretext.beta.fill_(0.25)
    summed = whole.reconstruction + 0.25 * whole.level_reconstruction + whole.global_similarity + whole.local_similarity
    torch.testing.assert_close(pretext(volume, drawn), summed.sum())
    assert pretext.weight(drawn) == 4


def test_a_local_view_is_compared_with_the_global_ones_of_its_sample() -> None:
    random = torch.Generator().manual_seed(0)
    local, told = (Told(*torch.randn(2, 3, n, 7, generator=random)) for n in (6, 2))
    found = to_globals(local, told)
    assert found.shape == (3, 6)
    others = Told(told.z.clone(), told.q)
    others.z[1] += 1
    differs = to_globals(local, others) != found
    assert differs[1].all() and not differs[[0, 2]].any()
    # each predicts exactly what the other tells
    same = Told(told.z[:, :1], told.z[:, :1])
    torch.testing.assert_close(unlikeness(same, same), -torch.ones(3, 1))


def test_no_gradient_goes_into_what_is_told() -> None:
    one, other = (Told(*(torch.randn(2, 3, 5, requires_grad=True) for _ in range(2))) for _ in range(2))
    unlikeness(one, other).sum().backward()
    for told in (one, other):
        assert told.z.grad is None and told.q.grad is not None and told.q.grad.any()


def test_only_the_first_view_is_restored() -> None:
    pretext = build()
    volume, drawn = quiet(batch_of(pretext))
    whole, _ = pretext.compared(volume, drawn)
    centre, source = drawn.centre.clone(), drawn.source.clone()
    centre[:, 1:], source[:, 1] = 0, source[:, 0]
    others, _ = pretext.compared(volume, replace(drawn, centre=centre, source=source))
    for name in ("reconstruction", "level_reconstruction"):
        torch.testing.assert_close(vars(others)[name], vars(whole)[name])
    assert not torch.allclose(others.global_similarity, whole.global_similarity)


def test_two_samples_do_and_one_is_refused() -> None:
    pretext = build()
    batch = batch_of(pretext, 2)
    assert pretext(*batch.args).isfinite()
    with pytest.raises(UserError, match="this step has one; plan with a larger batch"):
        pretext(*batch[:1].args)


def test_the_weight_of_what_levels_restore_falls_in_training_only() -> None:
    pretext = build()
    assert pretext.beta == 1
    batch = batch_of(pretext, training=False)
    before = pretext.validate(batch)
    assert before.keys() == {"loss", *PCRLv2.parts}
    for done, beta in ((0.25, (1 + math.sqrt(0.5)) / 2), (0.5, 0.5), (1.0, 0.0)):
        pretext.after_step(done)
        assert float(pretext.beta) == pytest.approx(beta, abs=1e-6)
    after = pretext.validate(batch)
    # and validation has no noise, which would be drawn anew
    assert all(torch.equal(before[name][0], after[name][0]) for name in before)
    # the deviation is no term of the loss
    torch.testing.assert_close(after["loss"][0], sum(after[name][0] for name in PCRLv2.parts[:-1]))
    assert pretext(*batch.args) != after["loss"][0]


# --- absent series --------------------------------------------------------------------------------------------------------------


def test_absent_series_stay_zero_and_teach_nothing() -> None:
    pretext = build()
    batch = batch_of(pretext)
    drawn = batch.drawn
    assert isinstance(drawn, Pairs)
    loud = replace(drawn, noise=torch.ones_like(drawn.noise), shift=torch.ones_like(drawn.shift))
    large, small, clean = pretext.views(batch.volumes[0], loud)
    assert not large[1, :, 2].any() and not small[1, :, 2].any() and not clean[1, 2].any()
    assert large[0].flatten(2).any(2).all() and small[0].flatten(2).any(2).all()
    assert not grey_levels(clean, *percentile_range(batch.volumes[0]))[1, 2].any()
    # of samples none of which has the last series, that output learns nothing
    volume = batch.volumes[0].clone()
    volume[:, 2] = 0
    pretext.compared(volume, drawn)[0].sum(1.0).backward()
    bias = pretext.get_parameter("output.0.bias").grad
    assert bias is not None and bias[:2].all() and not bias[2].any()
    kernel = pretext.encoder.embedding.weight.grad
    assert kernel is not None and kernel[:, :2].any() and not kernel[:, 2].any()


def test_one_series_will_do() -> None:
    torch.manual_seed(0)
    architecture = Architecture(
        ("T1w",), (0,), (2, 4, 2), 16, 2, 2, 4, 0.0, "unet", encoder=EncoderSettings("plain_unet", base=4)
    )
    pretext = PCRLv2(Setup(architecture, pcrlv2.Settings(), (4, 12, 10)))
    volume = torch.randn(2, 1, 4, 12, 10)
    drawn = pretext.draw(Draws(0, torch.arange(2)), torch.ones(2, 1, dtype=torch.bool), 0, (volume,), True)
    assert pretext(volume, drawn).isfinite()


# --- targets --------------------------------------------------------------------------------------------------------------------


def test_grey_levels_are_percentiles_of_the_foreground() -> None:
    volume = torch.randn(2, 3, 30, 50, 60, generator=torch.Generator().manual_seed(0))
    volume[:, :, :, :20] = 0  # outside of a mask
    volume[0, 1, :, 20:30] = -9.0  # background that was normalised with the rest
    volume[1, 2] = 0
    low, high = percentile_range(volume.half())
    for sample, series in ((0, 0), (0, 1), (1, 0)):
        values = volume[sample, series]
        expected = np.percentile(values[(values != 0) & (values != -9.0)], (0.5, 99.5))
        assert [float(t[sample, series]) for t in (low, high)] == pytest.approx(expected, abs=0.05)
    target = grey_levels(volume, low, high)
    assert target.min() == 0 and target.max() == 1 and not target[:, :, :, :20].any() and not target[0, 1, :, 20:30].any()
    assert low[1, 2] == 0 and high[1, 2] == 1
    # of a series that does not vary
    constant = torch.full((1, 1, 2, 4, 4), 3.0)
    assert grey_levels(constant, *percentile_range(constant)).isfinite().all()


# --- views ----------------------------------------------------------------------------------------------------------------------


def drawn_many(num: int = 1000, **views: Any) -> tuple[PairSettings, Pairs]:
    pretext = build(views={"num_local": 4} | views)
    volume = torch.randn(1, 3, 4, 12, 10).expand(num, -1, -1, -1, -1)
    drawn = pretext.draw(Draws(1, torch.arange(num)), torch.ones(num, 3, dtype=torch.bool), 0, (volume,), True)
    return pretext.settings.views, drawn


@pytest.mark.parametrize("views", [{}, {"global_scale": [0.05, 0.1], "local_scale": [0.001, 0.05], "overlap": 0.49}])
def test_boxes_lie_where_they_should(views: dict[str, Any]) -> None:
    v, drawn = drawn_many(**views)
    half, centre = drawn.half_edge.abs(), drawn.centre
    assert (half + centre.abs() <= 1 + 1e-5).all()
    found = overlap(half[:, :1], centre[:, :1], half[:, 1:2], centre[:, 1:2])
    assert found.min() >= v.overlap - 1e-5 and found.max() <= 1 and found.std() > 0.02
    low, high = (centre - half)[:, :NUM_GLOBAL].amin(1), (centre + half)[:, :NUM_GLOBAL].amax(1)
    corner = (centre - half)[:, NUM_GLOBAL:]
    assert (corner >= low[:, None] - 2 * v.margin - 1e-5).all() and (corner <= high[:, None] + 2 * v.margin + 1e-5).all()
    # some begin outside
    assert (corner < low[:, None]).any()
    for scale, part in ((v.global_scale, half[:, :NUM_GLOBAL]), (v.local_scale, half[:, NUM_GLOBAL:])):
        share = part.prod(-1)
        assert scale[0] - 1e-6 <= share.min() and share.max() <= scale[1] + 1e-6


def test_where_no_place_overlaps_one_view_is_within_the_other() -> None:
    v = PairSettings(num_local=1, overlap=0.3)
    half = torch.tensor([[[0.6] * 3, [0.85] * 3, [0.2] * 3]])
    corner, far = torch.full((1, 3, 3), 0.4), torch.ones(1, NUM_CANDIDATES - 1, 3)
    views = Views(half, corner * torch.tensor([-1.0, 1.0, 1.0])[:, None], *[torch.zeros(1, 3, 1)] * 4)
    # all candidates are in the corner opposite to the first view
    views.centre[:, 1] = 0.15
    found = places(replace(views, half_edge=half * torch.tensor([1.0, 0.85, 1.0])[:, None]), far, torch.zeros(1, 1, 3), v)
    torch.testing.assert_close(found[0, 0], torch.full((3,), -0.4))
    second_half = 0.85 * 0.85
    assert found[0, 1, 0] == pytest.approx(max(-0.4, second_half - 1))
    assert (found[0, 1] - second_half <= found[0, 0] - 0.6 + 1e-6).all()


def test_intersection_over_union_is_that_of_voxels() -> None:
    grid = torch.stack(torch.meshgrid(*[torch.arange(40)] * 3, indexing="ij"), -1)
    one, other = (torch.tensor(t) for t in ([[0, 4, 10], [20, 30, 40]], [[10, 0, 12], [30, 20, 22]]))
    inside = [((grid >= low) & (grid < high)).all(-1) for low, high in (one, other)]
    expected = float((inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum())
    boxes = [((high - low)[None, None] / 40, (high + low)[None, None] / 40 - 1) for low, high in (one, other)]
    assert float(overlap(*boxes[0], *boxes[1])) == pytest.approx(expected)


def test_levels_are_those_of_the_batch_and_all_come() -> None:
    _, drawn = drawn_many(8)
    assert (drawn.level == drawn.level[:1]).all()
    pretext, volume, present = build(), torch.randn(4, 3, 4, 12, 10), torch.ones(4, 3, dtype=torch.bool)
    whole = pretext.draw(Draws(5, torch.arange(4)), present, 0, (volume,), True)
    part = pretext.draw(Draws(5, torch.arange(2, 4)), present[2:], 0, (volume[2:],), True)
    # so is everything else a function of the key and the sample
    assert all(one[2:].equal(two) for one, two in zip(whole.tensors, part.tensors, strict=True))
    levels = torch.cat([pretext.draw(Draws(key, torch.arange(1)), present, 0, (volume,), True).level for key in range(300)])
    assert ((levels.float().mean(0) - 0.5).abs() < 0.12).all() and set(levels.unique().tolist()) == {0, 1}
    assert (levels[:, :1] != levels[:, 1:]).any(0).all()


def test_blocks_trade_places_and_none_is_lost() -> None:
    order = torch.randint(2**40, (2, 3, 50), generator=torch.Generator().manual_seed(0))
    source = trade_places(order, 10)
    everything = torch.arange(50).expand_as(source)
    assert source.sort(-1).values.equal(everything)
    assert ((source != everything).sum(-1) == 10).all() and not source[0, 0].equal(source[0, 1])
    assert trade_places(order, 0).equal(everything)
    volume = torch.randn(2, 3, 4, 6, 8)
    stay = torch.arange(24).expand(2, -1)
    assert swap(volume, stay, (2, 2, 2)).equal(volume)
    first, last = stay.clone(), swap(volume, stay.flip(1), (2, 2, 2))
    first[:, 0] = 23
    assert swap(volume, first, (2, 2, 2))[:, :, :2, :2, :2].equal(volume[:, :, 2:, 4:, 6:])
    assert last[:, :, :2, :2, :2].equal(volume[:, :, 2:, 4:, 6:])


@pytest.mark.parametrize("patch_size", [(2, 4, 4), (2, 8, 2), (4, 4, 2)])
def test_patches_of_two_tokens_will_do(patch_size: tuple[int, int, int]) -> None:
    pretext = build(patch_size=patch_size)
    batch = batch_of(pretext, 3)
    assert isinstance(batch.drawn, Pairs) and (batch.drawn.half_edge.abs() + batch.drawn.centre.abs() <= 1 + 1e-5).all()
    assert pretext(*batch.args).isfinite()


# --- settings, memory, training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"views": {"num_local": 0}}, "views.num_local is 0, expected 1 <= num_local"),
        ({"views": {"overlap": 1.0}}, "views.overlap is 1.0, expected 0 <= overlap < 1"),
        ({"views": {"swapped": -0.1}}, "views.swapped is -0.1"),
        ({"views": {"global_scale": [0.2, 0.8]}}, "may have only 0.25 in common, but overlap is 0.3"),
        ({"views": {"local_scale": [0.1, 0.3]}}, "expected at most the least global_scale, 0.2"),
        ({"views": {"momentum": 0.9}}, "unknown momentum"),
        ({"architecture": {"decoder": "unetr", "encoder": {"kind": "vit"}}}, "encoder.kind in arch_kwargs is 'vit'"),
    ],
)
def test_settings_that_cannot_be_are_told(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(**changes)


def test_the_plan_tells_and_tokens_of_all_views_are_counted() -> None:
    pretext = build()
    lines = {what: f"{value}; {why}" for what, value, why in PCRLv2.described(pretext.setup, {3: 4})}
    assert "2 of 4 x 8 x 6 and 3 of 4 x 8 x 4 voxels" in lines["views"] and "20% of its blocks" in lines["restored"]
    for present in ([True, True, True], [True, False, False]):
        assert pretext.seen_tokens(torch.tensor([present])) == 2 * 12 + 3 * 8


def test_memory_and_cost_are_predicted() -> None:
    setup = build().setup
    small, large = (pretraining_memory(PCRLv2, setup, num) for num in (2, 8))
    assert small.states == large.states and 0 < small.activations < large.activations
    settings = read_configuration(plans(), "3d_fullres", "plans.json")
    # of a crop, though a step wants two
    assert 0 < pretraining_cost(settings, torch.ones(2, 3, dtype=torch.bool)).operations_per_crop < 1e9


def test_equal_features_are_told_in_the_log() -> None:
    pretext = build()
    found = {name: [float(total / num)] for name, (total, num) in pretext.validate(batch_of(pretext, 4, False)).items()}
    assert pretext.warning(found) == ""
    norm = pretext.encoder.get_submodule("blocks.2.5")
    torch.nn.init.zeros_(norm.get_parameter("weight"))
    torch.nn.init.ones_(norm.get_parameter("bias"))
    found = {name: [float(total / num)] for name, (total, num) in pretext.validate(batch_of(pretext, 4, False)).items()}
    assert "tells samples no longer apart (features deviate by 0.0000)" in pretext.warning(found)


def test_it_learns() -> None:
    torch.manual_seed(0)
    num_training, num_others, num_steps = 12, 6, 60
    encoder = EncoderSettings("plain_unet", base=4)
    architecture = Architecture(SPEC.series, (0, 1, 2), (2, 4, 4), 16, 2, 2, 4, 0.0, "unet", encoder=encoder)
    views = PairSettings(num_local=1, contrast=0.1, noise=0.1)
    pretext = PCRLv2(Setup(architecture, pcrlv2.Settings(views), SPEC.shape))
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=1e-2)
    training, others = volumes(range(num_training)), volumes(range(num_training, num_training + num_others))
    present = torch.ones(num_training, 3, dtype=torch.bool)

    def validated() -> dict[str, float]:
        found: dict[str, float] = {}
        for seed in range(1000, 1004):
            drawn = pretext.draw(Draws(seed, torch.arange(num_others)), present[:num_others], 0, (others,), False)
            with torch.no_grad():
                for name, (total, num) in pretext.eval().validate(Batch((others,), drawn)).items():
                    found[name] = found.get(name, 0.0) + float(total / num) / 4
        return found

    before = validated()
    for step in range(num_steps):
        drawn = pretext.train().draw(Draws(step, torch.arange(num_training)), present, 0, (training,), True)
        optimizer.zero_grad()
        (pretext(training, drawn) / num_training).backward()
        optimizer.step()
        pretext.after_step((step + 1) / num_steps)
    after = validated()
    assert after["loss"] < before["loss"] - 0.1 and after["reconstruction"] < 0.75 * before["reconstruction"]
    assert pretext.warning({name: [value] for name, value in after.items()}) == ""


def make_unet(entry: dict[str, Any]) -> None:
    entry["architecture"]["arch_kwargs"] |= NETWORK


def test_it_trains_goes_on_after_a_kill_and_transfers(make_trainer: Callable[..., Any]) -> None:
    given: dict[str, Any] = {"pretext": BLOCK, "change": make_unet}
    whole = make_trainer(True, **given)
    whole.run_training()
    expected = weights(whole.output_folder)
    log = whole.logger.local_logger.my_fantastic_logging
    assert all(len(log[name]) == whole.num_epochs and np.isfinite(log[name]).all() for name in PCRLv2.parts)
    assert expected["beta"] == 0 and list((Path(whole.output_folder) / "reconstructions").glob("*.png"))
    goes_on_and_transfers(make_trainer, whole, **given)
