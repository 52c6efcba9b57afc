"""The classifier knows series by name, sees nothing of absent ones, and takes the pretrained encoder whole."""

import math

import pytest
import torch
from factories import PATCH_SIZE, SERIES, TINY, TOKEN_SIZE, pretext_of
from factories import settings as read_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunet_csm.model.classifier import (
    MOST_DEVIATIONS,
    AttentivePooling,
    CSMClassifier,
    MaskPooling,
    MeanPooling,
    StandardizedMeasures,
    build_classifier,
    predictions,
)
from nnunet_csm.model.transfer import PretrainedEncoder, transfer

NUM_CLASSES = 3
NO_MEASURES = torch.empty(2, 0)
POOLINGS = ["attentive", "mean"]


def build(series=SERIES, channels=None, input_channels=None, pooling="attentive", num_classes=NUM_CLASSES, **changes):
    """A classifier whose pooling and head are no longer those of the start, where all tokens count the same."""
    torch.manual_seed(0)
    channels = tuple(range(len(series)) if channels is None else channels)
    arguments = TINY | {"series": series, "channels": channels, "token_size": TOKEN_SIZE} | changes
    network = CSMClassifier(input_channels or len(series), num_classes, pooling, **arguments)
    torch.manual_seed(7)
    for name, parameter in network.named_parameters():
        if not name.startswith("encoder."):
            nn.init.normal_(parameter)
    return network.eval()


def random_volume(b=2, absent=(), s=3):
    volume = torch.randn(b, s, *PATCH_SIZE, generator=torch.Generator().manual_seed(1))
    volume[:, list(absent)] = 0
    return volume


@torch.no_grad()
def logits(network, volume):
    return network(volume)


def with_rows(network, series):
    """The weights of `network` for a classifier of these of its series."""
    weights = network.state_dict()
    rows = torch.tensor([SERIES.index(name) for name in series])
    return weights | {"encoder.series_embedding": weights["encoder.series_embedding"][rows]}


@pytest.mark.parametrize("pooling", POOLINGS)
@settings(max_examples=10)
@given(series=st.permutations(SERIES).flatmap(lambda names: st.integers(1, 3).map(lambda n: tuple(names[:n]))))
def test_an_absent_series_is_one_the_classifier_was_never_built_for(pooling, series):
    whole, part = build(pooling=pooling), build(series, pooling=pooling)
    part.load_state_dict(with_rows(whole, series))
    absent = [n for n, name in enumerate(SERIES) if name not in series]
    volume = random_volume(absent=absent)
    expected = logits(part, volume[:, [SERIES.index(name) for name in series]])
    torch.testing.assert_close(logits(whole, volume), expected, rtol=1e-4, atol=1e-5)


def test_samples_of_a_batch_may_lack_different_series():
    network, volume = build(), random_volume(b=3)
    volume[0, 1] = 0
    volume[2, [0, 2]] = 0
    alone = torch.cat([logits(network, one[None]) for one in volume])
    torch.testing.assert_close(logits(network, volume), alone, rtol=1e-4, atol=1e-5)


def test_only_planned_channels_are_used():
    network, wide = build(), build(channels=[3, 0, 2], input_channels=5)
    wide.load_state_dict(network.state_dict())
    volume = random_volume(s=5)
    assert torch.equal(logits(wide, volume), logits(network, volume[:, [3, 0, 2]]))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_every_place_and_series_counts(pooling):
    network, volume = build(pooling=pooling), random_volume(b=1)
    volume.requires_grad_()
    network(volume)[0, 0].backward()
    assert (volume.grad != 0).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_features_and_head_make_the_logits_and_absent_tokens_get_no_gradient(pooling):
    network, volume = build(pooling=pooling), random_volume(absent=[1])
    features = network.features(volume)
    tokens, present = features.tokens, features.present
    assert tokens.shape == (2, 3, 30, TINY["width"])
    assert present.tolist() == [[True, False, True]] * 2
    tokens = tokens.detach().requires_grad_()
    found = network.classify(tokens, present)
    torch.testing.assert_close(found, network(volume))
    found[:, 0].sum().backward()
    assert (tokens.grad[:, 1] == 0).all()
    assert (tokens.grad[:, [0, 2]] != 0).any(-1).all()


def test_attention_is_a_distribution_over_present_tokens_and_starts_flat():
    torch.manual_seed(0)
    pooling, tokens = AttentivePooling(24, 2), torch.randn(2, 3, 5, 24)
    present = torch.tensor([[True, False, True], [True, True, True]])
    flat = pooling.attention(tokens, present)
    torch.testing.assert_close(flat[0, 0], torch.full((5, 2), 0.1))
    torch.testing.assert_close(flat[1], torch.full((3, 5, 2), 1 / 15))
    nn.init.normal_(pooling.score.weight)
    attention = pooling.attention(tokens, present)
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2, 2))
    assert (attention[0, 1] == 0).all() and (attention[1] > 0).all()


def test_mean_pooling_is_the_mean_of_present_tokens():
    tokens, present = torch.randn(2, 3, 5, 24), torch.tensor([[True, False, True], [False, True, False]])
    expected = torch.stack([tokens[0, [0, 2]].flatten(0, 1).mean(0), tokens[1, 1].mean(0)])
    torch.testing.assert_close(MeanPooling()(tokens, present), expected)


def test_mask_pooling_is_the_mean_of_present_tokens_by_what_the_mask_covers():
    tokens, present = torch.randn(2, 3, 5, 24), torch.tensor([[True, False, True], [False, True, False]])
    one_token = torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0]).expand(2, 5)
    expected = torch.stack([tokens[0, [0, 2], 1].mean(0), tokens[1, 1, 1]])
    torch.testing.assert_close(MaskPooling()(tokens, present, one_token), expected)
    weights = torch.tensor([0.1, 0.2, 0.3, 0.0, 0.4])
    expected = (tokens[1, 1] * weights[:, None]).sum(0)
    torch.testing.assert_close(MaskPooling()(tokens, present, 0.5 * weights.expand(2, 5))[1], expected)
    for same in (torch.zeros(2, 5), torch.ones(2, 5)):
        torch.testing.assert_close(MaskPooling()(tokens, present, same), MeanPooling()(tokens, present))


def test_a_classifier_that_pools_by_the_mask_takes_it_as_the_last_channel_and_as_nothing_else():
    network, mean, volume = build(pooling="mask"), build(pooling="mean"), random_volume(absent=[1])
    mean.load_state_dict(network.state_dict())
    whole = torch.ones(2, 1, *PATCH_SIZE)
    torch.testing.assert_close(logits(network, torch.cat([volume, whole], 1)), logits(mean, volume))
    part = whole.clone()
    part[..., 4:] = 0
    found = logits(network, torch.cat([volume, part], 1))
    assert not torch.allclose(found, logits(mean, volume))
    # a gain, as training varies all channels by, says nothing
    torch.testing.assert_close(logits(network, torch.cat([volume, 0.9 * part], 1)), found)
    with pytest.raises(ValueError, match="2 channels, the network was planned for 3"):
        network(volume)


def test_measures_are_standardised_by_the_training_samples_and_their_statistics_are_saved():
    measures = torch.randn(50, 7) * torch.arange(1, 8) + 3
    measures[:, 2] = 4.0
    measures[::2, 3] = torch.nan
    measures[:, 4] = torch.nan
    one, other = StandardizedMeasures(7, 28), StandardizedMeasures(7, 28)
    one.fit(measures)
    found = one(measures)
    torch.testing.assert_close(found.mean(0), torch.zeros(7), atol=1e-5, rtol=0)
    assert not found[::2, 3].any() and not found[:, [2, 4]].any()
    # 2 is the gain; as if one more sample were 1 away
    for column in (0, 1, 5, 6):
        spread = measures[:, column].var(correction=0)
        expected = 2 * (spread / ((50 * spread + 1) / 51)).sqrt()
        torch.testing.assert_close(found[:, column].std(correction=0), expected, atol=1e-5, rtol=0)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(measures), found)
    far = one(torch.full((1, 7), 1e6))[0]
    assert far[4] == 0 and (far[[0, 1, 2, 3, 5, 6]] == MOST_DEVIATIONS * 2).all()


@pytest.mark.parametrize(("num_samples", "is_like"), [(3, True), (20, True), (30, False)])
def test_that_all_samples_had_a_label_tells_only_where_they_are_many(num_samples, is_like):
    """Also that they were of one size: a factor of 2.5 is too much only for many."""
    one = StandardizedMeasures(2, 2)
    one.fit(torch.tensor([[6.0, 1.0]]).repeat(num_samples, 1))
    for measures in ([6.0 + math.log(2.5), 1.0], [torch.nan, 0.0]):
        assert (one.standardized(torch.tensor([measures])).abs().max() <= MOST_DEVIATIONS) == is_like


def test_the_head_sees_measures_only_where_the_plans_say_so():
    planned = read_settings(classification={"mask_features": True})
    network = build_classifier(planned, 3, 2, 5).eval()
    nn.init.normal_(network.head.weight)
    assert network.head.in_features == planned.architecture.width + 5
    volume, measures = random_volume(), torch.randn(2, 5)
    assert not torch.allclose(network(volume, measures), network(volume, measures + 1))
    plain = build_classifier(read_settings(), 3, 2, 5).eval()
    assert plain.head.in_features == planned.architecture.width and plain.measures is None
    assert torch.equal(plain(volume, measures), plain(volume))


def test_mirrored_probabilities_do_not_change_when_the_patch_is_flipped():
    network, volume = build(), random_volume()

    def found(volume, mirror):
        return predictions(network, volume, NO_MEASURES, mirror, lambda logits: logits.softmax(1))

    mirrored = found(volume, mirror=True)
    torch.testing.assert_close(mirrored.sum(1), torch.ones(2))
    for axes in ((2,), (3, 4), (2, 3, 4)):
        torch.testing.assert_close(found(volume.flip(axes), mirror=True), mirrored)
        assert not torch.allclose(found(volume.flip(axes), mirror=False), logits(network, volume).softmax(1))
    torch.testing.assert_close(found(volume, mirror=False), logits(network, volume).softmax(1))


def test_the_pretrained_encoder_enters_whole():
    planned = read_settings()
    torch.manual_seed(1)
    pretrained = pretext_of(planned)
    classifier = build_classifier(planned, 3, 2)
    source = PretrainedEncoder("here", planned.architecture, pretrained.encoder.state_dict())
    transfer(source, classifier.encoder, planned.architecture)
    weights = classifier.encoder.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pretrained.encoder.state_dict().items())


def test_plans_choose_the_pooling():
    for pooling, kind in (("mean", MeanPooling), ("attentive", AttentivePooling), ("mask", MaskPooling)):
        planned = read_settings(classification={"pooling": pooling})
        assert isinstance(build_classifier(planned, 3, 2).pooling, kind)


def test_wrong_channels_are_refused_with_their_numbers():
    with pytest.raises(ValueError, match="2 input channels"):
        build(input_channels=2)
    with pytest.raises(ValueError, match="the input has 4 channels, the network was planned for 3"):
        build()(random_volume(s=4))


def test_it_learns_what_only_two_series_together_tell():
    torch.manual_seed(3)
    a, b = torch.randint(2, (2, 48)).float() * 2 - 1
    volume = 0.3 * torch.randn(48, 2, 4, 8, 4)
    volume[:, 0, 2:, 4:, 2:] += a[:, None, None, None]
    volume[:, 1, 2:, 4:, 2:] += b[:, None, None, None]
    labels = (a * b > 0).long()
    network = CSMClassifier(2, 2, series=SERIES[:2], channels=(0, 1), token_size=TOKEN_SIZE, **TINY)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.003)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(volume), labels).backward()
        optimizer.step()
    assert (logits(network, volume).argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("fusion", ["adaptive", "deformable"])
def test_fusions_that_weigh_series_fuse_before_pooling(fusion):
    network = build(fusion=fusion)
    volume = random_volume(absent=[1]).requires_grad_()
    features = network.features(volume)
    assert features.tokens.shape[1] == 1 and features.present.shape == (2, 1) and features.present.all()
    network(volume).sum().backward()
    assert not volume.grad[:, 1].any() and volume.grad[:, 0].any() and volume.grad[:, 2].any()
    assert all(p.grad is not None for p in network.fusion.parameters())
    # whatever stands in an absent series' place among the features
    with torch.no_grad():
        found = network.encoder.levels(*network.present_series(volume))[-1]
        other = found.tokens.clone()
        other[:, 1] = 5.0
        assert network.fusion(other, found.present, found.grid).equal(network.fusion(found.tokens, found.present, found.grid))


@pytest.mark.parametrize("changes", [{"fusion": "projected"}, {"fusion": "adaptive", "series": ("T1w",)}])
def test_other_fusions_and_one_series_leave_the_classifier_as_it_was(changes):
    plain = build(changes.get("series", SERIES))
    assert build(**changes).state_dict().keys() == plain.state_dict().keys()
