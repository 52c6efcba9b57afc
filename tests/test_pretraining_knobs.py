"""The knobs of pretraining: each does what it says, and nothing changes where it is not set."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    GRID_SIZE,
    JOINT,
    MASKING,
    PATCH_SIZE,
    SERIES,
    TOKEN_SIZE,
    GuessedMemory,
    KnownBank,
    base_plans,
    csm_plans,
    facts_of,
    pretext_of,
    settings,
    source_of,
)
from torch import Tensor

from nnunet_csm.data.draws import Draws, Purpose
from nnunet_csm.data.intensities import foreground
from nnunet_csm.data.stored import CaseFile
from nnunet_csm.errors import UserError
from nnunet_csm.model.tokens import select, to_tokens, to_volume
from nnunet_csm.planning.facts import Wishes
from nnunet_csm.planning.planner import plan
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext.base import setup_of
from nnunet_csm.pretext.batches import Batches
from nnunet_csm.pretext.csm import CSM, seen_beside
from nnunet_csm.pretext.masking import Mask, ask_some, draw_mask, shown_series_weights
from nnunet_csm.pretext.memory import pretraining_memory

NUM_TOKENS, NUM_VOXELS = math.prod(GRID_SIZE), math.prod(TOKEN_SIZE)
# a case without T1w
PRESENT = torch.tensor([[True, True, True], [True, False, True]])
PATHS = ("linear", "gains")


def build(same_place: str = "none", augmentation: float = 0.0, **reconstruction: Any) -> Any:
    torch.manual_seed(0)
    chosen = settings(reconstruction={"same_place": same_place, **reconstruction})
    block = chosen.csm.pretext | {"augmentation": augmentation}
    return pretext_of(replace(chosen, csm=replace(chosen.csm, pretext=block))).eval()


def learned(model: Any) -> Any:
    """The same with weights everywhere: some begin at zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def volumes(present: Tensor = PRESENT, seed: int = 1) -> Tensor:
    drawn = torch.randn(*present.shape, *PATCH_SIZE, generator=torch.Generator().manual_seed(seed))
    return drawn * present[..., None, None, None]


def drawn(present: Tensor = PRESENT, num_shown: int = 2, seed: int = 2) -> Mask:
    masking = replace(MASKING, mask_ratio=0.5)
    return draw_mask(Draws(seed, torch.arange(len(present))), present, num_shown, NUM_TOKENS, masking)


def changed(volume: Tensor, where: Tensor) -> Tensor:
    tokens = to_tokens(volume, TOKEN_SIZE)
    return to_volume(torch.where(where[..., None], 5 + torch.randn_like(tokens), tokens), GRID_SIZE, TOKEN_SIZE)


# --- what is visible at a hidden token's place -------------------------------------------------------------------------------


def test_what_is_seen_beside_a_token_is_the_mean_of_what_other_series_show_at_its_place() -> None:
    tokens, mask = to_tokens(volumes(), TOKEN_SIZE), drawn()
    mask = replace(mask, asked=torch.arange(3 * NUM_TOKENS).repeat(2, 1))
    found = seen_beside(tokens, mask)
    numbers = set()
    for b, number in ((b, n) for b in range(2) for n in range(3 * NUM_TOKENS)):
        series, place = divmod(number, NUM_TOKENS)
        seen = [s for s in range(3) if s != series and not mask.hidden[b, s, place]]
        for s in range(3):
            expected = tokens[b, s, place] / len(seen) if s in seen else torch.zeros(NUM_VOXELS)
            torch.testing.assert_close(found[b, number, s, :-1], expected)
            assert found[b, number, s, -1].item() == pytest.approx((s in seen) / max(len(seen), 1))
        numbers.add(len(seen))
    assert numbers == {0, 1, 2}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_changes_neither_the_encoder_nor_how_the_rest_begins(path: str) -> None:
    plain, with_path = build().state_dict(), build(path).state_dict()
    assert all(with_path[name].equal(weights) for name, weights in plain.items())
    assert {name.split(".")[1] for name in set(with_path) - set(plain)} == {"linear": {"beside"}, "gains": {"beside", "gains"}}[
        path
    ]


def test_without_the_key_plans_have_no_path() -> None:
    entry = csm_plans()
    block = entry["configurations"]["3d_fullres"]["csm"]["pretext"]["reconstruction"]
    assert "same_place" not in block
    assert setup_of(read_configuration(entry, "3d_fullres", "plans"))[1].settings.reconstruction.same_place == "none"


def test_gains_begin_at_zero_and_are_factors_of_what_is_seen() -> None:
    volume, mask = volumes(), drawn()
    with_gains, without = build("gains"), build("linear")
    tokens, grid = with_gains.tokens_of(volume)
    with torch.no_grad():
        expected = without.predicted(tokens, mask, grid)
        assert with_gains.predicted(tokens, mask, grid).equal(expected)
        with_gains.decoder.gains.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
        added = torch.tensor([1.0, -2.0, 0.5]) @ seen_beside(tokens, mask)[..., :-1]
        torch.testing.assert_close(with_gains.predicted(tokens, mask, grid), expected + added)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("head", ["shared", "by_series"])
@pytest.mark.parametrize("path", PATHS)
def test_predictions_rest_on_visible_voxels_only_whatever_else_is_asked_for(path: str, head: str, normalize: bool) -> None:
    model, volume, mask = learned(build(path, head=head, normalize_targets=normalize)), volumes(), drawn()

    def predicted(volume: Tensor, mask: Mask) -> Tensor:
        tokens, grid = model.tokens_of(volume)
        return model.predicted(tokens, mask, grid)

    with torch.no_grad():
        expected = predicted(volume, mask)
        assert predicted(changed(volume, mask.hidden), mask).equal(expected)
        assert not predicted(changed(volume, ~mask.hidden), mask).equal(expected)
        some = ask_some(mask, Draws(3, torch.arange(2)), 0.25)
        at = torch.searchsorted(mask.asked, some.asked)
        torch.testing.assert_close(predicted(volume, some), expected.gather(1, at[..., None].expand(-1, -1, NUM_VOXELS)))


@pytest.mark.parametrize("path", PATHS)
def test_a_token_with_nothing_visible_at_its_place_is_rebuilt_by_attention_alone(path: str) -> None:
    model, volume = learned(build(path)), volumes(PRESENT[:1])
    mask = drawn(PRESENT[:1], num_shown=1)
    tokens, grid = model.tokens_of(volume)
    with torch.no_grad():
        expected = model.predicted(tokens, mask, grid)
        model.decoder.beside.weight *= 2
        moved = (model.predicted(tokens, mask, grid) != expected).any(-1)
    assert moved.equal(seen_beside(tokens, mask).flatten(2).any(-1)) and moved.any() and not moved.all()


@pytest.mark.parametrize("path", PATHS)
def test_it_learns_a_series_that_is_another_one_in_other_intensities(path: str) -> None:
    model = build(path)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    losses = []
    for step in range(150):
        volume = volumes(torch.ones(8, 3, dtype=torch.bool), seed=step)
        volume[:, 1] = -volume[:, 0]
        volume[:, 2] = 0.5 * volume[:, 0]
        mask = drawn(torch.ones(8, 3, dtype=torch.bool), seed=step)
        beside = seen_beside(to_tokens(volume, TOKEN_SIZE), mask).flatten(2).any(-1)
        error = model.errors(volume, mask)[beside].mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        losses.append(error.item())
    # white noise: what is not visible at the place itself, nobody can know
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("path", ("none", *PATHS))
def test_no_shape_of_a_step_rests_on_what_is_drawn(path: str) -> None:
    model = build(path, augmentation=0.3)
    # runs it on tensors without values: whatever read one would fail
    assert pretraining_memory(CSM, model.setup, 2).total > 0


def test_joint_tokens_have_no_path() -> None:
    changes = {**JOINT, "reconstruction": {"same_place": PATHS[-1]}}
    with pytest.raises(UserError, match=r"same_place is .* joint token is hidden in all series"):
        setup_of(settings(**changes))


# --- intensities of what the encoder sees ------------------------------------------------------------------------------------


def given_to_the_encoder(model: Any, volume: Tensor, mask: Mask) -> Tensor:
    given = []
    handle = model.encoder.register_forward_hook(lambda _, inputs, __: given.append(inputs[0]))
    with torch.no_grad():
        model.errors(volume, mask)
    handle.remove()
    return given[0]


def test_augmentation_changes_no_other_draw_and_is_of_training_only() -> None:
    volume, draws = volumes(), Draws(5, torch.arange(2))
    plain, augmented = (build(augmentation=a).draw(draws, PRESENT, 0, (volume,), training=True) for a in (0.0, 0.3))
    assert all(one.equal(other) for one, other in zip(plain.tensors[:-1], augmented.tensors[:-1], strict=True))
    assert plain.change.shape == (2, 3, 0) and augmented.change.shape == (2, 3, 2)
    model = build(augmentation=0.3)
    seen = model.draw(draws, PRESENT, 0, (volume,), training=False)
    assert given_to_the_encoder(model, volume, seen).equal(select(to_tokens(volume, TOKEN_SIZE), seen.visible))


def test_changes_are_drawn_evenly_for_each_sample_and_series_and_a_rank_draws_its_own() -> None:
    model, present = build(augmentation=0.3), torch.ones(400, 3, dtype=torch.bool)
    volume = torch.zeros(400, 3, *PATCH_SIZE)
    change = model.draw(Draws(5, torch.arange(400)), present, 0, (volume,), training=True).change.flatten(1)
    assert change.abs().max() <= 0.3
    # of 400 draws from -0.3 to 0.3
    assert change.mean(0).abs().max() < 5 * 0.3 / math.sqrt(3 * 400)
    assert (change.T.corrcoef() - torch.eye(6)).abs().max() < 5 / math.sqrt(400)
    rank = model.draw(Draws(5, torch.arange(100, 200)), present[:100], 0, (volume[:100],), training=True)
    assert rank.change.flatten(1).equal(change[100:200])


def test_the_encoder_sees_changed_intensities_and_background_and_targets_stay() -> None:
    model, volume = build(augmentation=0.3), volumes()
    # background of nnU-Net's two kinds
    volume[0, :, :, :6] = -3.0
    volume[1, :, :, 6:] = 0.0
    mask = model.draw(Draws(5, torch.arange(2)), PRESENT, 0, (volume,), training=True)
    plain = replace(mask, change=mask.change[..., :0])
    tokens = to_tokens(volume, TOKEN_SIZE)
    inside, before, after = (
        select(foreground(tokens).float(), mask.visible).bool(),
        given_to_the_encoder(model, volume, plain),
        given_to_the_encoder(model, volume, mask),
    )
    assert before.equal(select(tokens, mask.visible))
    assert after[~inside].equal(before[~inside]) and 0 < inside.float().mean() < 1
    series = mask.visible // NUM_TOKENS
    gain, shift = (mask.change[..., n].gather(1, series)[..., None] for n in range(2))
    torch.testing.assert_close(after[inside], ((1 + gain) * before + shift)[inside])
    assert model.targets(tokens, mask)[2].equal(model.targets(tokens, plain)[2])


# --- how often sources are drawn ---------------------------------------------------------------------------------------------


def batches_of(present: Tensor, weights: list[float] | None, purpose: Purpose = Purpose.TRAINING, batch_size: int = 4) -> Batches:
    """Batches of cases whose voxels are their number."""
    num_series = present.shape[1]
    bank = KnownBank(present, lambda cases, _: cases.float()[:, None, None, None, None].expand(-1, num_series, 1, 1, 1), weights)
    chosen = settings(series=[f"series {n}" for n in range(num_series)])
    return Batches(bank, pretext_of(chosen), 12345, purpose, range(batch_size))


def test_cases_are_drawn_by_their_weights_in_every_kind_of_batch() -> None:
    present = torch.tensor([[True] * 4, [True, True, False, True], [False, True, True, False], [False, False, False, True]])
    weights, num_batches, batch_size = [1.0, 4.0, 2.0, 0.5], 1500, 4
    make = batches_of(present, weights)
    counts = torch.zeros(4, 4)
    for step in range(num_batches):
        batch = make(0, step)
        assert isinstance(batch.drawn, Mask)
        cases, shown = batch.volumes[0].flatten(1)[:, 0].long(), (~batch.drawn.series_hidden).sum(1)
        counts.index_put_((cases, shown - 1), torch.ones(batch_size), accumulate=True)
    # whatever its weight, a case shows each number of its series as often as without weights
    share = torch.tensor(weights) / sum(weights)
    expected = share[:, None] * shown_series_weights(present, MASKING)
    # the samples of a batch share that number, so only batches count as independent
    tolerance = 5 * (expected * (1 - expected) / num_batches).sqrt()
    assert ((counts / (num_batches * batch_size) - expected).abs() <= tolerance).all()


@pytest.mark.parametrize(("purpose", "weights"), [(Purpose.TRAINING, [3.0, 3.0]), (Purpose.VALIDATION, [1.0, 9.0])])
def test_equal_weights_and_validation_are_as_without_weights(purpose: Purpose, weights: list[float]) -> None:
    weighed, plain = (batches_of(PRESENT, given, purpose) for given in (weights, None))
    for step in range(20):
        first, second = weighed(0, step), plain(0, step)
        assert all(one.equal(other) for one, other in zip(first.tensors, second.tensors, strict=True))


def test_two_sources_are_drawn_as_often_with_weights_of_one_over_their_cases() -> None:
    bank_of = [1 / 30] * 30 + [1 / 3] * 3
    make, num_steps = batches_of(torch.ones(33, 2, dtype=torch.bool), bank_of, batch_size=8), 200
    cases = torch.cat([make(0, step).volumes[0].flatten(1)[:, 0] for step in range(num_steps)])
    assert abs(Counter((cases >= 30).tolist())[True] / len(cases) - 0.5) < 5 * 0.5 / math.sqrt(len(cases))


def test_the_log_says_how_many_cases_a_source_has_and_how_often_they_are_drawn() -> None:
    files = [CaseFile(f"Dataset001_A/{n}", Path(f"pre/Dataset001_A/x/{n}.b2nd"), 2, (0, 1)) for n in range(6)]
    files += [CaseFile("Dataset001_A/t", Path("pre/Dataset001_A/x_imagesTs/t.b2nd"), 2, (0, 1), 2.0)]
    files += [CaseFile(f"Dataset002_B/{n}", Path(f"pre/Dataset002_B/x/{n}.b2nd"), 2, (0, None), 4.0) for n in range(3)]
    bank = KnownBank(torch.ones(10, 2, dtype=torch.bool), lambda *_: torch.empty(0), [file.weight for file in files])
    bank.files = files
    expected = {"Dataset001_A/x": (6, 0.3), "Dataset001_A/x_imagesTs": (1, 0.1), "Dataset002_B/x": (3, 0.6)}
    assert {name: (num, round(share, 9)) for name, (num, share) in bank.shares().items()} == expected


def test_plans_hold_weights_only_where_they_are_not_1() -> None:
    sources = tuple(source_of(SERIES, dataset=f"Dataset00{n}_X", weight=weight) for n, weight in ((1, 1.0), (2, 2.5)))
    plans, _ = plan(base_plans(), "3d_fullres", facts_of(sources=sources), "nnUNetCSMPlans", Wishes("B"), GuessedMemory())
    written = plans["configurations"]["3d_fullres"]["csm"]["sources"]
    assert [source.get("weight") for source in written] == [None, 2.5]
    assert read_configuration(plans, "3d_fullres", "plans").csm.sources == sources
    written[0]["weight"] = 0
    with pytest.raises(UserError, match=r"sources\[0\].weight is 0, expected 0 < weight"):
        read_configuration(plans, "3d_fullres", "plans")
