"""The nearest relatives: UniME's and BM-MAE's shares of visible tokens in CSM, MAESIL's planes, NEMESIS's noise."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import GRID_SIZE, JOINT_NETWORK, PATCH_SIZE, SERIES, TOKEN_SIZE, GuessedMemory, base_plans, facts_of, make_csm
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.errors import UserError
from nnunet_csm.model.tokens import join, select, to_tokens
from nnunet_csm.phantom import PhantomSpec, draw_subject
from nnunet_csm.planning.facts import Wishes
from nnunet_csm.planning.planner import plan
from nnunet_csm.planning.presets import merged
from nnunet_csm.plans import Architecture, EncoderSettings, read_configuration
from nnunet_csm.pretext.base import Batch, Setup, read_pretext, setup_of
from nnunet_csm.pretext.csm import CSM
from nnunet_csm.pretext.maesil import MAESIL, DualMasking, NoisyMask, Settings, hidden_in_planes, num_in_plane
from nnunet_csm.pretext.masking import Masking, ask_some, dirichlet_counts, draw_mask, shown_series_weights, total_visible
from nnunet_csm.pretext.rebuilding import Rebuilding, Reconstruction, masked_mean
from nnunet_csm.schema import to_dict

UNIME = Masking(0.75, "independent", "rebuilt", fewest_hidden=0, counts="pooled")
BM_MAE = Masking(0.75, "independent", "none", counts="dirichlet")
NUM_TOKENS = math.prod(GRID_SIZE)
DECODER = Reconstruction(24, 1, 2, normalize_targets=False)
NOISE = (0.0, 0.05, 0.15, 0.25)
# visible tokens of two samples, drawn before counts were a setting
RECORDED = [[1, 24, 26, 56, 72, 73], [39, 44, 53, 95, 99, 106]]


def keyed(num_samples: int, seed: int = 0) -> Draws:
    return Draws(seed, torch.arange(num_samples))


def architecture(series=SERIES, token_size=TOKEN_SIZE, kind="vit", width=24) -> Architecture:
    channels = tuple(range(len(series)))
    return Architecture(series, channels, token_size, width, 2, 4, features=4, drop_path=0.0, encoder=EncoderSettings(kind))


def maesil(noise=(0.0,), mask_ratio=0.5, patch_size=PATCH_SIZE, decoder=DECODER, **network: Any) -> MAESIL:
    chosen = Settings(DualMasking(mask_ratio), decoder, noise)
    return MAESIL(Setup(architecture(kind="joint_vit", **network), chosen, patch_size))


# --- UniME and BM-MAE: how visible tokens are shared -------------------------------------------------------------------------


@st.composite
def shares(draw):
    """Presence of a batch, and a number of shown series that all its samples can show."""
    s = draw(st.integers(1, 7))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=s, max_size=s).filter(any), min_size=1, max_size=4))
    ratio, num_tokens = draw(st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.99])), draw(st.sampled_from([1, 2, 3, 30, 216]))
    return torch.tensor(rows), draw(st.integers(1, min(map(sum, rows)))), ratio, num_tokens, draw(st.integers(0, 999))


@settings(max_examples=100, deadline=None)
@given(shares(), st.sampled_from([UNIME, BM_MAE]))
def test_totals_are_exact_and_nothing_of_absent_series_is_ever_visible(case, masking):
    present, num_shown, ratio, num_tokens, seed = case
    masking = dataclasses.replace(masking, mask_ratio=ratio)
    mask = draw_mask(keyed(len(present), seed), present, num_shown, num_tokens, masking)
    total = max(1, round((1 - ratio) * num_tokens * num_shown))
    assert total_visible(num_shown, num_tokens, masking) == total
    counts = (~mask.hidden).sum(2)
    assert (counts.sum(1) == total).all() and (counts <= num_tokens).all()
    assert not counts[~present].any() and ((counts > 0).sum(1) <= num_shown).all()
    assert mask.rebuilt.equal(mask.hidden & present[..., None])
    assert mask.visible.shape == (len(present), total) and (mask.visible.diff(dim=1) > 0).all()
    assert not mask.hidden.flatten(1).gather(1, mask.visible).any()
    assert mask.hidden.flatten(1).gather(1, mask.asked).all()


def test_pooled_counts_are_those_of_draws_without_replacement():
    num, s, num_tokens = 4000, 3, 40
    mask = draw_mask(keyed(num), torch.ones(num, s, dtype=torch.bool), s, num_tokens, UNIME)
    counts = (~mask.hidden).sum(2).double()
    # hypergeometric: a quarter of all tokens, a third of them of each series
    expected, variance = num_tokens / 4, num_tokens / 4 * (2 / 3) * (90 / 119)
    assert ((counts.mean(0) - expected).abs() < 5 * math.sqrt(variance / num)).all()
    assert counts.var(0).tolist() == pytest.approx([variance] * s, rel=0.1)
    # every place as often
    assert ((~mask.hidden).double().mean(0) - 0.25).abs().max() < 5 * math.sqrt(0.1875 / num)


def test_with_pooled_counts_as_many_series_as_drawn_take_part_from_none_hidden_on():
    present = torch.tensor([[True, True, True, True], [True, True, False, True]])
    assert shown_series_weights(present, UNIME).tolist() == [pytest.approx([0.25] * 4), pytest.approx([1 / 3] * 3 + [0])]
    every, one = (draw_mask(keyed(2), present, shown, 216, UNIME) for shown in (3, 1))
    assert ((~every.series_hidden).sum(1) == 3).all() and ((~one.series_hidden).sum(1) == 1).all()
    network = make_csm(architecture(("a", "b", "c", "d")), DECODER, UNIME)
    by_hand = [round(NUM_TOKENS * shown / 4) for shown in (1, 2, 3, 4)]
    assert network.seen_tokens(present) == pytest.approx((sum(by_hand) / 4 + sum(by_hand[:3]) / 3) / 2)


@pytest.mark.parametrize("s", [2, 3, 4])
def test_dirichlet_counts_are_spread_as_shares_that_are_all_as_likely(s):
    num, num_tokens = 4000, 200
    present = torch.ones(num, s, dtype=torch.bool)
    counts = (~draw_mask(keyed(num), present, s, num_tokens, BM_MAE).hidden).sum(2).double()
    total = num_tokens * s / 4
    # of a share: mean 1/s, variance (s - 1) / (s^2 (s + 1)); it is below t with probability 1 - (1 - t)^(s - 1)
    deviation = total * math.sqrt((s - 1) / (s + 1)) / s
    assert ((counts.mean(0) - total / s).abs() < 5 * deviation / math.sqrt(num)).all()
    assert counts.std(0).tolist() == pytest.approx([deviation] * s, rel=0.06)
    for share in (0.1, 0.5):
        below = (counts < share * total).double().mean(0)
        assert below.tolist() == pytest.approx([1 - (1 - share) ** (s - 1)] * s, abs=0.04)
    # a series that shows nothing is rare, and occurs
    assert 0 < (counts == 0).double().mean() < 0.05


def test_shares_beyond_a_series_go_to_the_others_and_never_to_absent_ones():
    # the first asks for nearly everything, and the last is absent
    drawn = torch.tensor([[0.0, 0.9, 0.95, 0.0], [0.999, 0.998, 0.0, 0.0]])
    shown = torch.tensor([[True, True, True, False]]).expand(2, -1)
    counts = dirichlet_counts(drawn, shown, 10, 24)
    # 14 in proportions of -log 0.9 to -log 0.95, and of -log 0.999 to -log 0.998
    assert counts.tolist() == [[10, 9, 5, 0], [5, 9, 10, 0]] and counts.sum(1).tolist() == [24, 24]
    # all there is, and drawn numbers at their limits
    extreme = torch.full((1, 4), 1 - 2.0**-24)
    for total in (1, 15, 30):
        assert dirichlet_counts(extreme, shown[:1], 10, total).sum() == total
        assert dirichlet_counts(torch.zeros(1, 4), shown[:1], 10, total).sum() == total


def test_shares_places_and_what_is_asked_for_are_drawn_apart():
    present, draws = torch.ones(400, 3, dtype=torch.bool), keyed(400)
    mask = draw_mask(draws, present, 3, NUM_TOKENS, BM_MAE)
    # a place that is drawn early says nothing of the share of its series
    first = draws.integers(What.TOKENS, 3 * NUM_TOKENS).view(400, 3, -1)[..., 0].double()
    counts = (~mask.hidden).sum(2).double()
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), counts.flatten()]))[0, 1])) < 0.15
    some = ask_some(mask, draws, 0.25)
    assert some.hidden.equal(mask.hidden) and some.asked.shape[1] == round(0.25 * mask.asked.shape[1])
    assert draw_mask(draws, present, 3, NUM_TOKENS, BM_MAE).visible.equal(mask.visible)


def test_equal_counts_are_drawn_as_they_always_were():
    present = torch.tensor([[True, True, True, True], [True, True, False, True]])
    mask = draw_mask(keyed(2, 7), present, 2, 27, Masking(0.875, "independent", "rebuilt"))
    assert mask.visible.tolist() == RECORDED
    weighed = (mask.hidden.flatten(1) * torch.arange(4 * 27)).sum(1)
    assert weighed.tolist() == [4 * 27 * (4 * 27 - 1) // 2 - sum(row) for row in RECORDED]


@pytest.mark.parametrize("counts", ["pooled", "dirichlet"])
def test_shared_places_cannot_have_other_counts(counts):
    chosen = make_csm(architecture(), DECODER, Masking(0.75, "shared", "rebuilt", counts=counts)).settings
    with pytest.raises(UserError, match=rf"here.masking.counts is '{counts}'.*set counts to 'equal'"):
        CSM.check(chosen, architecture(), "here")


# --- MAESIL: planes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(16, 16, 16), GRID_SIZE, (1, 4, 4), (7, 3, 2), (5, 2, 9)])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
def test_every_plane_shows_the_same_number_and_hidden_columns_are_never_seen(grid, ratio):
    z, y, x = grid
    places = math.floor(y * x * (1 - ratio))
    shown = math.floor(places * (1 - ratio))
    if shown == 0:
        with pytest.raises(UserError, match=f"{y} x {x} tokens of a plane"):
            num_in_plane(grid, ratio)
        return
    assert num_in_plane(grid, ratio) == (places, shown)
    visible = ~hidden_in_planes(keyed(50), grid, ratio, first=z * y * x).view(50, z, y * x)
    assert (visible.sum(2) == shown).all()
    assert (visible.any(1).sum(1) <= places).all()


def test_the_published_numbers_come_out():
    assert num_in_plane((16, 16, 16), 0.5) == (128, 64)
    assert num_in_plane((16, 16, 16), 0.25) == (192, 144)
    assert num_in_plane((16, 16, 16), 0.75) == (64, 16)
    # whole but for rounding
    assert num_in_plane((2, 10, 10), 0.9) == (10, 1)


def test_columns_and_planes_are_drawn_anew_and_every_place_is_as_likely():
    num, grid = 3000, (4, 4, 5)
    visible = ~hidden_in_planes(keyed(num), grid, 0.5, first=80).view(num, 4, 20)
    assert (visible.double().mean(0) - 0.25).abs().max() < 5 * math.sqrt(0.1875 / num)
    # of the ten common places, each plane shows five of its own
    common = visible.any(1)
    assert 0.9 < float((common.sum(1) / 10.0).mean()) <= 1.0
    both = (visible[:, 0] & visible[:, 1]).sum(1).double().mean()
    assert abs(float(both) - 2.5) < 5 * math.sqrt(1.0 / num)
    assert not any(common[0].equal(other) for other in common[1:20])


def test_a_drawn_mask_is_the_same_in_all_series_and_rebuilds_present_ones():
    network, present = maesil(), torch.tensor([[True, True, True], [True, False, True]])
    volume = torch.randn(2, 3, *PATCH_SIZE) * present[:, :, None, None, None]
    mask = network.draw(keyed(2), present, 0, (volume,), training=True)
    # 15 places of a plane: 7 in common, of which each of the 2 planes shows 3
    assert mask.visible.shape == (2, 6) and (mask.visible.diff(dim=1) > 0).all()
    assert (mask.visible < 15).sum(1).tolist() == [3, 3]
    assert mask.hidden.equal(mask.hidden[:, :1].expand(2, 3, NUM_TOKENS))
    assert mask.rebuilt.equal(mask.hidden & present[..., None])
    assert mask.asked.shape == (2, 3 * (NUM_TOKENS - 6)) and network.seen_tokens(present) == 6
    some = maesil(decoder=dataclasses.replace(DECODER, rebuilt_share=0.5)).draw(keyed(2), present, 0, (volume,), training=True)
    assert some.hidden.equal(mask.hidden) and some.asked.shape == (2, 3 * 12)


def test_a_patch_of_which_no_plane_would_show_anything_is_refused_in_the_plan_and_in_training():
    with pytest.raises(UserError, match=r"mask_ratio is 0.5.*1 x 2 tokens of a plane"):
        maesil(patch_size=(4, 4, 4))
    wishes = Wishes("maesil", (32, 8, 16), (8, 8, 8))
    with pytest.raises(UserError, match=r"mask_ratio is 0.5.*1 x 2 tokens of a plane"):
        plan(base_plans(), "3d_fullres", facts_of(), "nnUNetCSMPlans", wishes, GuessedMemory())


# --- NEMESIS: noise ----------------------------------------------------------------------------------------------------------


def test_noise_is_added_to_what_is_seen_of_series_that_are_there_and_to_nothing_else():
    network, clean = maesil(noise=(0.25,)).eval(), maesil().eval()
    clean.load_state_dict(network.state_dict())
    present = torch.tensor([[True, True, True], [True, False, True]])
    volume = torch.randn(2, 3, *PATCH_SIZE) * present[:, :, None, None, None]
    before = volume.clone()
    noisy, plain = (n.draw(keyed(2), present, 0, (volume,), training=True) for n in (network, clean))
    assert all(a.equal(b) for a, b in zip(noisy.tensors[:-1], plain.tensors[:-1], strict=True))
    tokens = to_tokens(volume, TOKEN_SIZE)
    added = network.seen(tokens, noisy) - clean.seen(tokens, plain)
    assert clean.seen(tokens, plain).equal(select(join(tokens), plain.visible))
    by_series = added.unflatten(2, (3, -1))
    assert not by_series[1, :, 1].any() and (by_series[0] != 0).all() and (by_series[1, :, [0, 2]] != 0).all()
    # targets are what they were, and nothing was written into the volume
    assert network.targets(tokens, noisy)[2].equal(clean.targets(tokens, plain)[2]) and volume.equal(before)
    assert not network.errors(volume, noisy).equal(clean.errors(volume, plain))


def test_a_batch_draws_one_deviation_each_as_often_whatever_samples_a_rank_has():
    network, present = maesil(noise=NOISE), torch.ones(4, 3, dtype=torch.bool)
    volume, found = torch.randn(4, 3, *PATCH_SIZE), []
    for step in range(200):
        noise = network.draw(keyed(4, step), present, 0, (volume,), training=True).noise
        deviations = noise.flatten(1).std(1)
        nearest = (deviations[:, None] - torch.tensor(NOISE)).abs().argmin(1)
        assert (nearest == nearest[0]).all()
        assert deviations.tolist() == pytest.approx([NOISE[nearest[0]]] * 4, rel=0.2)
        found.append(int(nearest[0]))
        later = network.draw(Draws(step, torch.arange(2, 4)), present[2:], 0, (volume[2:],), training=True).noise
        assert later.equal(noise[2:])
    assert min(found.count(n) for n in range(4)) > 25


def test_validation_is_without_noise():
    network = maesil(noise=NOISE)
    mask = network.draw(keyed(2), torch.ones(2, 3, dtype=torch.bool), 0, (torch.randn(2, 3, *PATCH_SIZE),), training=False)
    assert isinstance(mask, NoisyMask) and mask.noise.shape == (2, 6, 0)
    batch = network.example(4, 0)
    again = Batch.of(batch[1:3].tensors, 1, network.Draw)
    assert len(again) == 2 and again.drawn.tensors[-1].equal(batch.drawn.tensors[-1][1:3])


def test_normal_numbers_are_normal_and_those_of_their_key():
    drawn = keyed(3).normal(What.TOKENS, 40_001, first=5)
    assert drawn.shape == (3, 40_001) and drawn.isfinite().all()
    assert drawn.mean(1).abs().max() < 0.03 and (drawn.std(1) - 1).abs().max() < 0.02
    assert (drawn.abs() < 1).double().mean() == pytest.approx(0.6827, abs=0.01)
    assert abs(float(torch.corrcoef(torch.stack([drawn[0, :20_000], drawn[0, 20_001:]]))[0, 1])) < 0.04
    assert keyed(3).normal(What.TOKENS, 40_001, first=5).equal(drawn)


@pytest.mark.parametrize(
    ("noise", "told"),
    [([], r"noise is \[\]"), ([-0.1], r"noise\[0\] is -0.1"), ([0.0, -1.0], r"noise\[1\] is -1"), ([1e999], "finite")],
)
def test_noise_that_cannot_be_is_refused(noise, told):
    block = {"name": "maesil", **to_dict(maesil().settings), "noise": noise}
    with pytest.raises(UserError, match=f"here.{told}" if told != "finite" else told):
        read_pretext(block, architecture(kind="joint_vit"), "here")


# --- all of them -------------------------------------------------------------------------------------------------------------

SPEC = PhantomSpec(series=SERIES, shape=(16, 32, 32), spacing_mm=(8.0, 5.0, 5.0))


def phantoms(num: int) -> torch.Tensor:
    """Z-scored series of phantoms (b, s, z, y, x)."""
    drawn = torch.stack([torch.stack([*map(torch.as_tensor, draw_subject(SPEC, n).series.values())]) for n in range(num)])
    return ((drawn - drawn.mean((2, 3, 4), keepdim=True)) / drawn.std((2, 3, 4), keepdim=True)).float()


RELATIVES: dict[str, Any] = {
    "unime": lambda decoder: make_csm(architecture(token_size=(4, 8, 8), width=48), decoder, UNIME, SPEC.shape),
    "bm_mae": lambda decoder: make_csm(architecture(token_size=(4, 8, 8), width=48), decoder, BM_MAE, SPEC.shape),
    "maesil": lambda decoder: maesil(patch_size=SPEC.shape, decoder=decoder, token_size=(4, 8, 8), width=48),
    "nemesis": lambda decoder: maesil(NOISE, patch_size=SPEC.shape, decoder=decoder, token_size=(4, 8, 8), width=48),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_each_rebuilds_hidden_tokens_of_others_better_than_the_mean(name):
    torch.manual_seed(0)
    network: Rebuilding = RELATIVES[name](Reconstruction(48, 1, 4, normalize_targets=False, rebuilt_share=0.5))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    volume = phantoms(10)
    training, others = volume[:6], volume[6:]

    def batch_of(some: torch.Tensor, seed: int, learns: bool) -> Batch:
        present = torch.ones(len(some), 3, dtype=torch.bool)
        kinds = network.variants(present)[0].nonzero().flatten()
        variant = int(kinds[seed % len(kinds)])
        return Batch((some,), network.draw(keyed(len(some), seed), present, variant, (some,), learns))

    for step in range(60):
        batch = batch_of(training, step, True)
        optimizer.zero_grad()
        (network(*batch.args) / network.weight(batch.drawn)).backward()
        optimizer.step()
    batch = batch_of(others, 62, False)
    mask: Any = batch.drawn
    with torch.no_grad():
        found = float(network(*batch.args) / network.weight(mask))
        # z-scored series have a mean of 0
        tokens, _ = network.tokens_of(others)
        of_the_mean = float(masked_mean(select(tokens, mask.asked).square().mean(-1), mask))
    assert found < 0.8 * of_the_mean


def changed(pretext: dict[str, Any], network: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Makes a configuration one of another pretext."""

    def change(entry: dict[str, Any]) -> None:
        entry["architecture"]["arch_kwargs"] = merged(entry["architecture"]["arch_kwargs"], network)
        entry["csm"] = merged(entry["csm"], {"pretext": pretext})

    return change


CHANGES = {
    "unime": changed({"masking": {"mask_ratio": 0.75, "fewest_hidden": 0, "counts": "pooled"}}, {}),
    "bm_mae": changed(
        {"masking": {"mask_ratio": 0.75, "hidden_series": "none", "counts": "dirichlet"}}, {"encoder": {"embedding": "by_series"}}
    ),
    "nemesis": changed({"name": "maesil", "masking": {"mask_ratio": 0.5}, "noise": list(NOISE)}, JOINT_NETWORK),
}


@pytest.mark.parametrize("name", CHANGES)
def test_pretraining_runs_from_plans_alone_and_is_judged(name: str, make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(True, change=CHANGES[name])
    trainer.run_training()
    assert isinstance(trainer.bare_network, MAESIL if name == "nemesis" else CSM)
    log = trainer.logger.local_logger.my_fantastic_logging
    assert np.isfinite(log["train_losses"]).all() and np.isfinite(log["error_part_hidden"]).all()
    trainer.perform_actual_validation()
    assert [*(Path(trainer.output_folder) / "reconstructions").glob("*.png")]


PRESETS = {
    "unime": (CSM, UNIME, (864, 16, 12), (384, 4, 6), 8),
    "bm_mae": (CSM, BM_MAE, (768, 12, 12), (384, 3, 12), 16),
    "maesil": (MAESIL, DualMasking(0.5), (384, 12, 6), (256, 4, 8), 8),
    "nemesis": (MAESIL, DualMasking(0.5), (384, 12, 6), (256, 4, 8), 8),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_plan_a_dataset_and_hold_what_is_published(name):
    expected, masking, encoder, decoder, edge = PRESETS[name]
    plans, decisions = plan(base_plans(num_series=3), "3d_fullres", facts_of(), "nnUNetCSMPlans", Wishes(name), GuessedMemory())
    found = read_configuration(json.loads(json.dumps(plans)), "3d_fullres", "plans")
    pretext, setup = setup_of(found)
    a, r = found.architecture, setup.settings.reconstruction
    assert (pretext, setup.settings.masking) == (expected, masking)
    assert (a.width, a.depth, a.num_heads) == encoder and (r.width, r.depth, r.num_heads) == decoder
    assert (r.normalize_targets, r.rebuilt_share, r.head) == (False, 1.0, "shared") and a.token_size == (edge,) * 3
    assert a.encoder.embedding == ("by_series" if name == "bm_mae" else "shared")
    told = {decision.name: f"{decision.value}: {decision.reason}" for decision in decisions}
    words = {"unime": "drawn from all series shown together", "bm_mae": "in proportions drawn for each sample"}
    assert words.get(name, "joint tokens stay visible") in told["mask ratio"]
    assert told["series hidden whole"].startswith("0 to 2" if name == "unime" else "none")
    if expected is MAESIL:
        assert setup.settings.noise == (NOISE if name == "nemesis" else (0.0,))
        assert f"{MAESIL.num_shown(setup)} of {setup.num_tokens}" in told["mask ratio"] and told["noise"]
