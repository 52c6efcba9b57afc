"""A mask splits the present tokens into visible and rebuilt ones, in exact numbers, and draws series as the paper does."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from factories import PATCH_SIZE, KnownBank, pretext_of
from factories import settings as read_settings
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_csm.data.draws import Draws, Purpose
from nnunet_csm.pretext.batches import Batches
from nnunet_csm.pretext.masking import Masking, draw_mask, num_visible, shown_series_weights

PAPER = Masking(mask_ratio=0.875, places="independent", hidden_series="rebuilt")


def keyed(num_samples, seed=0):
    return Draws(seed, torch.arange(num_samples))


def present(*rows):
    return torch.tensor(rows, dtype=torch.bool)


maskings = st.builds(
    Masking,
    mask_ratio=st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.875, 0.99]),
    places=st.sampled_from(["independent", "shared"]),
    hidden_series=st.sampled_from(["rebuilt", "ignored", "none"]),
    fewest_hidden=st.sampled_from([0, 1]),
)


@st.composite
def draws(draw):
    """Presence of a batch, and a number of shown series that all its samples can show."""
    s = draw(st.integers(1, 5))
    series_present = draw(st.lists(st.lists(st.booleans(), min_size=s, max_size=s).filter(any), min_size=1, max_size=4))
    num_shown = draw(st.integers(1, min(map(sum, series_present))))
    return present(*series_present), num_shown, draw(st.sampled_from([1, 2, 30, 216])), draw(maskings), draw(st.integers(0, 999))


@settings(max_examples=80, deadline=None)
@given(draws())
def test_visible_rebuilt_and_unused_tokens_partition_a_patch_in_exact_numbers(case):
    series_present, num_shown, num_tokens, masking, seed = case
    mask = draw_mask(keyed(len(series_present), seed), series_present, num_shown, num_tokens, masking)
    b, s = series_present.shape
    shown = ~mask.series_hidden
    count = num_visible(num_tokens, masking.mask_ratio)

    # exact numbers: of shown series, and of visible tokens in each
    assert (shown.sum(1) == num_shown).all()
    assert ((~mask.hidden).sum(2) == shown * count).all()
    # absent series are neither visible nor in the loss
    assert not (shown & ~series_present).any()
    assert not (mask.rebuilt & ~series_present[..., None]).any()
    # no token is both, and every hidden token of a series that counts is rebuilt
    counts = series_present if masking.hidden_series != "ignored" else shown
    assert mask.rebuilt.equal(mask.hidden & counts[..., None])
    # the numbers of the visible tokens say the same as `hidden`, in rising order
    assert mask.visible.shape == (b, num_shown * count)
    assert (mask.visible.diff(dim=1) > 0).all()
    assert torch.ones(b, s * num_tokens, dtype=torch.bool).scatter(1, mask.visible, False).view_as(mask.hidden).equal(mask.hidden)


@pytest.mark.parametrize(
    ("num_tokens", "mask_ratio", "expected"),
    [(216, 0.875, 27), (27, 0.875, 3), (30, 0.875, 4), (30, 0.0, 30), (4, 0.99, 1), (1, 0.9, 1)],
)
def test_visible_tokens_of_a_series_are_the_share_that_is_not_masked_and_at_least_one(num_tokens, mask_ratio, expected):
    assert num_visible(num_tokens, mask_ratio) == expected


def test_shared_places_are_one_and_independent_places_are_many():
    series_present = torch.ones(4, 3, dtype=torch.bool)
    shared = draw_mask(keyed(len(series_present)), series_present, 3, 216, Masking(0.875, "shared", "none")).hidden
    independent = draw_mask(keyed(len(series_present)), series_present, 3, 216, Masking(0.875, "independent", "none")).hidden
    assert shared.equal(shared[:, :1].expand_as(shared))
    assert not any(shared[i, 0].equal(shared[j, 0]) for i, j in itertools.combinations(range(4), 2))
    rows = independent.flatten(0, 1)
    assert not any(rows[i].equal(rows[j]) for i, j in itertools.combinations(range(12), 2))


def test_one_present_series_is_never_hidden_whole():
    series_present = present([True, False, False], [False, False, True])
    weights = shown_series_weights(series_present, PAPER)
    assert weights.tolist() == [[1.0, 0.0, 0.0]] * 2
    mask = draw_mask(keyed(len(series_present)), series_present, 1, 30, PAPER)
    assert (~mask.series_hidden).equal(series_present)
    assert (mask.rebuilt.sum(2) == series_present * 26).all()


@pytest.mark.parametrize("s", [2, 3, 4, 7])
def test_each_number_of_hidden_series_is_as_likely(s):
    rows = [[place < p for place in range(s)] for p in range(2, s + 1)]
    for p, weights in zip(range(2, s + 1), shown_series_weights(present(*rows), PAPER), strict=True):
        expected = [1 / (p - 1) if 1 <= p - shown <= p - 1 else 0.0 for shown in range(1, s + 1)]
        assert weights.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("s", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("fewest", [0, 1, 2, 5])
def test_each_number_of_hidden_series_from_the_fewest_on_is_as_likely_and_one_stays_visible(s, fewest):
    rows = [[place < p for place in range(s)] for p in range(1, s + 1)]
    masking = replace(PAPER, fewest_hidden=fewest)
    for p, weights in zip(range(1, s + 1), shown_series_weights(present(*rows), masking), strict=True):
        hidden = range(min(fewest, p - 1), p)
        expected = [1 / len(hidden) if p - shown in hidden else 0.0 for shown in range(1, s + 1)]
        assert weights.tolist() == pytest.approx(expected)


def test_with_none_as_the_fewest_complete_samples_are_drawn_too():
    series_present = present([True] * 3, [True, False, True])
    make_batch = masked_batches(series_present, 2, fewest_hidden=0)
    counts, num_batches = torch.zeros(2, 3), 900
    for step in range(num_batches):
        batch = make_batch(0, step)
        cases, shown = batch.volumes[0].flatten(1)[:, 0].long(), (~batch.drawn.series_hidden).sum(1)
        counts.index_put_((cases, shown - 1), torch.ones(2), accumulate=True)
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 1 / 2, 0]]) / 2
    tolerance = 5 * (expected * (1 - expected) / num_batches).sqrt()
    assert ((counts / (num_batches * 2) - expected).abs() <= tolerance).all()


def test_no_series_is_hidden_when_none_is_to_be():
    series_present = present([True] * 4, [True, False, True, False])
    weights = shown_series_weights(series_present, Masking(0.5, "independent", "none"))
    assert weights.tolist() == [[0, 0, 0, 1], [0, 1, 0, 0]]


def test_every_series_and_every_place_is_as_likely_to_be_visible():
    num_draws, s, num_tokens, count = 3000, 4, 6, 2
    masking = Masking(1 - count / num_tokens, "independent", "rebuilt")
    visible = ~draw_mask(keyed(num_draws), torch.ones(num_draws, s, dtype=torch.bool), 3, num_tokens, masking).hidden
    expected = 3 / 4 * count / num_tokens
    tolerance = 5 * math.sqrt(expected * (1 - expected) / num_draws)
    assert (visible.float().mean(0) - expected).abs().max() < tolerance


def test_the_same_key_draws_the_same_mask_and_another_another():
    series_present = torch.ones(2, 3, dtype=torch.bool)
    first, again, other = (draw_mask(keyed(len(series_present), seed), series_present, 2, 30, PAPER) for seed in (3, 3, 4))
    assert all(getattr(first, f).equal(getattr(again, f)) for f in ("hidden", "rebuilt", "visible"))
    assert not first.hidden.equal(other.hidden)


def masked_batches(series_present, batch_size, **masking):
    """Batches of cases that exist only as far as their series are known; all voxels of a patch are the case's number."""
    s = series_present.shape[1]
    bank = KnownBank(series_present, lambda cases, size: cases.float()[:, None, None, None, None].expand(-1, s, *size))
    chosen = read_settings(series=[f"series {n}" for n in range(s)], masking=masking)
    return Batches(bank, pretext_of(chosen), chosen.csm.seed, Purpose.TRAINING, range(batch_size))


def test_over_cases_with_other_series_missing_every_case_and_every_k_keep_their_probabilities():
    series_present = present([True] * 4, [True, True, False, True], [False, True, True, False], [False, False, False, True])
    num_batches, batch_size = 1500, 4
    make_batch = masked_batches(series_present, batch_size)
    counts = torch.zeros(4, 4)
    for step in range(num_batches):
        batch = make_batch(0, step)
        cases, shown = batch.volumes[0].flatten(1)[:, 0].long(), (~batch.drawn.series_hidden).sum(1)
        assert (shown == shown[0]).all(), "samples of a batch differ in their number of visible tokens"
        counts.index_put_((cases, shown - 1), torch.ones(batch_size), accumulate=True)
    # p series present: p - k shown, each k in [1, p - 1] as likely as the others, each case as likely as the others
    expected = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0], [1 / 2, 1 / 2, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]) / 4
    # the four samples of a batch share the number of shown series, so only batches count as independent
    tolerance = 5 * (expected * (1 - expected) / num_batches).sqrt()
    assert ((counts / (num_batches * batch_size) - expected).abs() <= tolerance).all()


def test_a_batch_is_a_function_of_epoch_and_step():
    make_batch = masked_batches(torch.ones(3, 4, dtype=torch.bool), 2)
    again = masked_batches(torch.ones(3, 4, dtype=torch.bool), 2)
    batch = make_batch(5, 7)
    assert all(one.equal(other) for one, other in zip(batch.tensors, again(5, 7).tensors, strict=True))
    assert batch.volumes[0].shape == (2, 4, *PATCH_SIZE)
    assert not all(make_batch(epoch, 7).drawn.hidden.equal(batch.drawn.hidden) for epoch in range(5))


@pytest.mark.parametrize("mask_ratio", [0.5, 0.875])
@pytest.mark.parametrize("fewest_hidden", [0, 1])
def test_the_encoder_sees_as_many_tokens_as_are_counted_on_average(mask_ratio, fewest_hidden):
    series_present = present([True] * 4, [True, True, False, True], [False, False, False, True])
    make_batch = masked_batches(series_present, 4, mask_ratio=mask_ratio, fewest_hidden=fewest_hidden)
    seen = torch.tensor([float(make_batch(0, step).drawn.visible.shape[1]) for step in range(600)])
    expected = make_batch.pretext.seen_tokens(series_present)
    assert abs(float(seen.mean()) - expected) < 5 * float(seen.std()) / math.sqrt(len(seen))
