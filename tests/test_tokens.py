"""Voxels become tokens and tokens voxels again, and every function agrees on which token is where."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_csm.model.tokens import (
    all_tokens,
    coordinates,
    grid_size,
    join,
    select,
    separate,
    to_map,
    to_tokens,
    to_volume,
    to_voxels,
)

GRID, TOKEN = (2, 3, 5), (2, 4, 8)
NUM_SERIES = 3

grids = st.tuples(*[st.integers(1, 4)] * 3)
token_sizes = st.tuples(*[st.sampled_from([1, 2, 4])] * 3)


def numbered_volume(b, s, grid, token_size):
    """Every voxel has a value of its own."""
    shape = (b, s, *(g * t for g, t in zip(grid, token_size, strict=True)))
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def block_of(volume, place, token_size):
    """Voxels of the token at (series, z, y, x) of one sample (s, z, y, x), by plain slicing."""
    series, *corner = place
    z, y, x = (slice(c * t, (c + 1) * t) for c, t in zip(corner, token_size, strict=True))
    return volume[series, z, y, x]


@settings(max_examples=30, deadline=None)
@given(grids, token_sizes, st.integers(1, 2), st.integers(1, 3))
def test_tokens_round_trip(grid, token_size, b, s):
    volume = numbered_volume(b, s, grid, token_size)
    tokens = to_tokens(volume, token_size)
    z, y, x = grid
    assert tokens.shape == (b, s, z * y * x, volume[0, 0].numel() // (z * y * x))
    assert grid_size(tuple(volume.shape[2:]), token_size) == grid
    assert to_volume(tokens, grid, token_size).equal(volume)


def test_coordinates_and_selection_name_the_voxels_of_a_token():
    volume = numbered_volume(2, NUM_SERIES, GRID, TOKEN)
    index = all_tokens(NUM_SERIES, GRID, 2, torch.device("cpu"))
    selected = select(to_tokens(volume, TOKEN), index)
    for sample in range(2):
        for token, place in zip(selected[sample], coordinates(index, GRID)[sample].tolist(), strict=True):
            assert token.view(TOKEN).equal(block_of(volume[sample], place, TOKEN))


@given(grids, token_sizes, st.integers(1, 2), st.integers(1, 4))
def test_joint_tokens_round_trip(grid, token_size, b, s):
    tokens = to_tokens(numbered_volume(b, s, grid, token_size), token_size)
    joint = join(tokens)
    assert joint.shape == (b, 1, tokens.shape[2], s * tokens.shape[3])
    assert separate(joint, s).equal(tokens)


def test_a_joint_token_holds_the_voxels_of_its_place_one_series_after_the_other():
    volume = numbered_volume(2, NUM_SERIES, GRID, TOKEN)
    index = all_tokens(1, GRID, 2, torch.device("cpu"))
    selected = select(join(to_tokens(volume, TOKEN)), index)
    for sample in range(2):
        for token, (series, *place) in zip(selected[sample], coordinates(index, GRID)[sample].tolist(), strict=True):
            assert series == 0
            blocks = [block_of(volume[sample], (number, *place), TOKEN) for number in range(NUM_SERIES)]
            assert token.view(NUM_SERIES, *TOKEN).equal(torch.stack(blocks))


def test_tokens_are_numbered_by_series_then_z_y_x():
    index = all_tokens(NUM_SERIES, GRID, 2, torch.device("cpu"))
    expected = [list(place) for place in itertools.product(range(NUM_SERIES), *map(range, GRID))]
    assert coordinates(index, GRID)[1].tolist() == expected


def test_every_sample_selects_its_own_tokens_in_the_order_asked_for():
    volume = numbered_volume(2, NUM_SERIES, GRID, TOKEN)
    index = torch.tensor([[41, 7, 0], [3, 88, 3]])
    selected, places = select(to_tokens(volume, TOKEN), index), coordinates(index, GRID)
    for sample, k in itertools.product(range(2), range(3)):
        assert selected[sample, k].view(TOKEN).equal(block_of(volume[sample], places[sample, k].tolist(), TOKEN))


def test_a_pattern_at_one_token_is_found_at_its_coordinates():
    volume = torch.zeros(1, NUM_SERIES, *(g * t for g, t in zip(GRID, TOKEN, strict=True)))
    block_of(volume[0], (2, 1, 0, 4), TOKEN)[:] = torch.rand(TOKEN) + 1
    number = to_tokens(volume, TOKEN).any(-1).flatten(1).nonzero()[:, 1][None]
    assert coordinates(number, GRID).tolist() == [[[2, 1, 0, 4]]]


def test_a_map_has_the_feature_of_each_token_at_its_coordinates():
    features = torch.rand(2, 30, 7)
    mapped = to_map(features, GRID)
    assert mapped.shape == (2, 7, *GRID)
    for number, (_, z, y, x) in enumerate(coordinates(torch.arange(30)[None], GRID)[0].tolist()):
        assert mapped[:, :, z, y, x].equal(features[:, number])


def test_a_value_per_token_is_spread_over_the_voxels_of_that_token_only():
    per_token = torch.zeros(1, NUM_SERIES, 30, dtype=torch.bool)
    per_token[0, 1, 17] = True
    place = coordinates(torch.tensor([[30 + 17]]), GRID)[0, 0].tolist()
    expected = torch.zeros(NUM_SERIES, *(g * t for g, t in zip(GRID, TOKEN, strict=True)), dtype=torch.bool)
    block_of(expected, place, TOKEN)[:] = True
    assert to_voxels(per_token, GRID, TOKEN)[0].equal(expected)


def test_a_patch_that_is_no_multiple_of_the_token_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"\(4, 12, 39\).*\(2, 4, 8\)"):
        to_tokens(torch.zeros(1, 1, 4, 12, 39), TOKEN)
