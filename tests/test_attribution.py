"""Maps of a decision say what the classifier rests on: they add up, fall on what was planted, and die with the weights."""

from functools import partial

import pytest
import torch
from factories import GRID_SIZE, PATCH_SIZE, SERIES, TINY, TOKEN_SIZE
from torch import nn

from nnunet_csm.model.attribution import log_odds, series_shares, token_maps
from nnunet_csm.model.classifier import HEAD_STD, CSMClassifier
from nnunet_csm.model.tokens import coordinates

NUM_PLACES = 30
PLANTED, DECOY = 1, 0
NUM_TRAINING_STEPS = 120


def build(num_classes=2, channels=(0, 1, 2), seed=0, **changes):
    torch.manual_seed(seed)
    of_dataset = {"series": SERIES, "channels": channels, "token_size": TOKEN_SIZE}
    network = CSMClassifier(max(channels) + 1, num_classes, **(TINY | of_dataset | changes)).eval()
    nn.init.normal_(network.head.weight)
    return network


def of_class(index):
    return partial(log_odds, class_index=index)


def random_volume(b=2, num_channels=3):
    return torch.randn(b, num_channels, *PATCH_SIZE, generator=torch.Generator().manual_seed(1))


def draw_planted(generator, b):
    """Noise with a bright token, or none, in each of two series at one place; that in series `PLANTED` is the class."""
    volume = 0.5 * torch.randn(b, len(SERIES), *PATCH_SIZE, generator=generator)
    classes, decoys = torch.randint(2, (2, b), generator=generator)
    places = coordinates(torch.randint(NUM_PLACES, (b, 1), generator=generator), GRID_SIZE)[:, 0, 1:]
    for sample, place in enumerate(places.tolist()):
        z, y, x = (slice(p * t, (p + 1) * t) for p, t in zip(place, TOKEN_SIZE, strict=True))
        for series, is_there in ((PLANTED, classes[sample]), (DECOY, decoys[sample])):
            volume[sample, series, z, y, x] += 1.5 * is_there
    return volume, classes, places


@pytest.fixture(scope="module")
def trained():
    network = build().train()
    nn.init.normal_(network.head.weight, std=HEAD_STD)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(NUM_TRAINING_STEPS):
        volume, classes, _ = draw_planted(generator, 32)
        loss = nn.functional.cross_entropy(network(volume), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.fixture(scope="module")
def held_out():
    volume, classes, places = draw_planted(torch.Generator().manual_seed(99), 64)
    return volume[classes == 1], places[classes == 1]


def test_log_odds_are_those_of_the_softmax():
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    probability = logits.softmax(1)[:, 2]
    torch.testing.assert_close(log_odds(logits, 2), (probability / (1 - probability)).log())


@pytest.mark.parametrize("pooling", ["attentive", "mean"])
def test_a_map_adds_up_to_what_the_patch_adds(pooling):
    network, volume = build(num_classes=3, pooling=pooling), random_volume()
    with torch.no_grad():
        added = log_odds(network(volume), 1) - log_odds(network(1e-4 * volume), 1)
    maps = token_maps(network, volume, of_class(1))
    assert maps.shape == (2, len(SERIES), *GRID_SIZE)
    torch.testing.assert_close(maps.sum((1, 2, 3, 4)), added, rtol=0.05, atol=0.02)


def test_a_map_is_of_the_images_and_takes_the_mask_as_it_is():
    network = build(num_classes=3, pooling="mask", num_measures=4)
    mask = torch.rand(2, 1, *PATCH_SIZE, generator=torch.Generator().manual_seed(2))
    measures, volume = torch.randn(2, 4), random_volume()
    with torch.no_grad():
        both = [log_odds(network(torch.cat([contrast * volume, mask], 1), measures), 1) for contrast in (1.0, 1e-4)]
    maps = token_maps(network, torch.cat([volume, mask], 1), of_class(1), measures=measures)
    assert maps.shape == (2, len(SERIES), *GRID_SIZE)
    torch.testing.assert_close(maps.sum((1, 2, 3, 4)), both[0] - both[1], rtol=0.05, atol=0.02)


def test_a_trained_map_adds_up_too(trained, held_out):
    volume, _ = held_out
    with torch.no_grad():
        added = log_odds(trained(volume), 1) - log_odds(trained(1e-4 * volume), 1)
    error = (token_maps(trained, volume, of_class(1)).sum((1, 2, 3, 4)) - added).abs().mean()
    assert error < 0.1 * added.abs().mean()


def test_the_map_falls_on_the_planted_place_of_the_planted_series(trained, held_out):
    volume, places = held_out
    assert (trained(volume).argmax(1) == 1).float().mean() > 0.95
    maps = token_maps(trained, volume, of_class(1))
    z, y, x = places.T
    planted = maps[torch.arange(len(maps)), PLANTED, z, y, x]
    assert (planted == maps.flatten(1).amax(1)).float().mean() > 0.9
    assert (planted / maps.abs().sum((1, 2, 3, 4))).mean() > 0.5
    assert series_shares(maps).mean(0)[PLANTED] > 0.7


def test_with_other_weights_the_map_is_another(trained, held_out):
    """J. Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018."""
    volume, _ = held_out
    first, second = (token_maps(network, volume, of_class(1)).flatten() for network in (trained, build(seed=7)))
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.3


def test_maps_follow_series_not_channels():
    network, volume = build(), random_volume()
    moved = build(channels=(3, 0, 2))
    elsewhere = torch.zeros(2, 4, *PATCH_SIZE)
    elsewhere[:, [3, 0, 2]] = volume
    elsewhere[:, 1] = 9.0
    torch.testing.assert_close(token_maps(moved, elsewhere, of_class(0), 4), token_maps(network, volume, of_class(0), 4))


def test_an_absent_series_gets_nothing():
    volume = random_volume()
    volume[:, 2] = 0
    maps = token_maps(build(), volume, of_class(1), 4)
    assert not maps[:, 2].any()
    assert series_shares(maps)[:, 2].tolist() == [0, 0]


def test_shares_sum_to_one():
    maps = token_maps(build(), random_volume(), of_class(1), 4)
    torch.testing.assert_close(series_shares(maps).sum(1), torch.ones(2))
    assert not series_shares(torch.zeros_like(maps)).any()
