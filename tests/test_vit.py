"""What the plans choose of a ViT and of its decoder does what it says, and nothing else."""

import math

import pytest
import torch
from factories import GRID_SIZE, JOINT, PATCH_SIZE, loss_of, pretext_of
from factories import settings as read_settings
from torch import nn

from nnunet_csm.data.draws import Draws
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.tokens import all_tokens, coordinates
from nnunet_csm.model.vit import LinearBySeries, Positions
from nnunet_csm.pretext.masking import Masking, draw_mask

NUM_TOKENS = math.prod(GRID_SIZE)
EVERYTHING = torch.ones(2, 3, dtype=torch.bool)
BY_SERIES = {"architecture": {"encoder": {"embedding": "by_series"}}, "reconstruction": {"head": "by_series"}}


def build(**changes):
    torch.manual_seed(0)
    return pretext_of(read_settings(**changes)).eval()


def encoder_of(**options):
    torch.manual_seed(0)
    return build_encoder(read_settings(architecture={"encoder": options}).architecture).eval()


def draw(num_shown=2, seed=2):
    masking = Masking(0.8, "independent", "rebuilt")
    return draw_mask(Draws(seed, torch.arange(2)), EVERYTHING, num_shown, NUM_TOKENS, masking)


def random_volume(s=3):
    return torch.randn(2, s, *PATCH_SIZE, generator=torch.Generator().manual_seed(1))


# --- positions ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [24, 32])
@pytest.mark.parametrize(
    ("kind", "frequency"), [("mae", lambda i, n: 10_000 ** (-i / n)), ("geometric", lambda i, n: math.pi / 64 ** (i / n))]
)
def test_positions_are_the_plain_formula(kind, frequency, width):
    index = all_tokens(2, GRID_SIZE, 1, torch.device("cpu"))
    places, n = coordinates(index, GRID_SIZE), width // 6
    found = Positions(width, kind)(places)[0]
    assert found.shape == (2 * NUM_TOKENS, width)
    for row, (_, *place) in zip(found.tolist(), places[0].tolist(), strict=True):
        by_hand = []
        for along in place:
            by_hand += [math.sin(along * frequency(i, n)) for i in range(n)]
            by_hand += [math.cos(along * frequency(i, n)) for i in range(n)]
        assert row == pytest.approx(by_hand + [0.0] * (width - 6 * n), abs=1e-5)


@pytest.mark.parametrize("kind", ["geometric", "mae"])
def test_encoder_and_decoder_have_the_positions_of_the_plans(kind):
    model = build(architecture={"encoder": {"positions": kind}})
    assert model.encoder.positions.kind == model.decoder.positions.kind == kind


# --- initial weights ---------------------------------------------------------------------------------------------------------


def attentions(model):
    found = [module.qkv.weight.chunk(3)[:2] for module in model.modules() if hasattr(module, "qkv")]
    assert len(found) == 3 + 1
    return found


@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_keys_begin_equal_to_queries_with_a_gain_that_scales_their_scores(gain):
    plain = build(architecture={"encoder": {"query_key_gain": 0.0}})
    for (query, key), (drawn, _) in zip(
        attentions(build(architecture={"encoder": {"query_key_gain": gain}})), attentions(plain), strict=True
    ):
        assert key.equal(query)
        torch.testing.assert_close(query, drawn * gain / (len(query) // 2) ** 0.25)


def test_without_a_gain_keys_and_queries_are_each_drawn_by_themselves():
    for query, key in attentions(build(architecture={"encoder": {"query_key_gain": 0.0}})):
        assert not torch.isclose(query, key).any(dim=1).all()
        correlation = float(torch.corrcoef(torch.stack([query.flatten(), key.flatten()]).detach())[0, 1])
        assert abs(correlation) < 5 / math.sqrt(query.numel())
        # xavier's, of query, key and value together
        assert float(query.abs().max()) <= math.sqrt(6 / (4 * query.shape[1])) and float(key.std()) == pytest.approx(
            math.sqrt(2 / (4 * key.shape[1])), rel=0.15
        )


@pytest.mark.parametrize("std", [0.0, 0.02, 0.5])
def test_embeddings_of_series_begin_with_the_deviation_of_the_plans(std):
    model = build(series=[f"series {n}" for n in range(40)], architecture={"encoder": {"series_embedding_std": std}})
    for part in (model.encoder, model.decoder):
        assert float(part.series_embedding.std()) == pytest.approx(std, rel=0.15)


# --- a layer for each series -------------------------------------------------------------------------------------------------


def test_every_token_goes_through_the_layer_of_its_own_series():
    torch.manual_seed(0)
    layer, series = LinearBySeries(3, 16, 8), torch.randint(3, (2, 20))
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 20, 16)
    found = layer(x, series)
    for sample, token in [(b, k) for b in range(2) for k in range(20)]:
        number = series[sample, token]
        torch.testing.assert_close(found[sample, token], layer.weight[number] @ x[sample, token] + layer.bias[number])


def test_a_layer_learns_from_tokens_of_its_own_series_only():
    layer, series = LinearBySeries(3, 16, 8), torch.tensor([[0, 2, 2, 0]])
    layer(torch.randn(1, 4, 16), series).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.flatten(1).any(1).tolist() == [True, False, True]


def test_layers_of_series_are_drawn_apart_each_as_a_shared_one_would_be():
    layers = build(**BY_SERIES).encoder.embedding.weight
    bound = math.sqrt(6 / sum(layers.shape[1:]))
    assert all(float(weight.detach().abs().max()) == pytest.approx(bound, rel=0.05) for weight in layers)
    assert not layers[0].equal(layers[1])


def test_equal_layers_give_what_a_shared_one_gives():
    shared, apart = build(), build(**BY_SERIES)
    weights = shared.state_dict()
    for part in ("encoder.embedding", "decoder.head"):
        for name in ("weight", "bias"):
            nn.init.normal_(weights[f"{part}.{name}"])
            weights[f"{part}.{name}"] = weights[f"{part}.{name}"].expand(3, *weights[f"{part}.{name}"].shape)
    apart.load_state_dict(weights)
    volume, mask = random_volume(), draw()
    with torch.no_grad():
        torch.testing.assert_close(apart.rebuild(volume, mask).tokens, shared.rebuild(volume, mask).tokens)
        torch.testing.assert_close(loss_of(apart, volume, mask), loss_of(shared, volume, mask))
        features = [one.encoder.levels(volume, EVERYTHING)[-1].tokens for one in (apart, shared)]
    torch.testing.assert_close(*features)


def test_another_head_of_a_series_changes_the_rebuilt_tokens_of_that_series_alone():
    model, volume, mask = build(**BY_SERIES), random_volume(), draw()
    with torch.no_grad():
        before = model.rebuild(volume, mask).tokens
        model.decoder.head.bias[1] += 1
        after = model.rebuild(volume, mask).tokens
    assert ((after - before).abs().amax(-1) > 0).any(2).tolist() == [[False, True, False]] * 2
    torch.testing.assert_close((after - before)[:, 1][mask.hidden[:, 1]], torch.ones(int(mask.hidden[:, 1].sum()), 16))


def test_layers_of_absent_series_change_nothing_for_the_others():
    encoder, volume = encoder_of(embedding="by_series"), random_volume()
    volume[:, 1] = 0
    present = torch.tensor([[True, False, True]] * 2)
    with torch.no_grad():
        before = encoder.levels(volume, present)[-1].tokens[:, [0, 2]]
        encoder.embedding.weight[1].normal_()
        assert encoder.levels(volume, present)[-1].tokens[:, [0, 2]].equal(before)
        left_out = encoder.levels(volume, present, shown=(0, 2))[-1]
    assert left_out.series == (0, 2) and left_out.grid == GRID_SIZE and left_out.present.all()
    torch.testing.assert_close(left_out.tokens, before, rtol=1e-4, atol=1e-5)


def test_all_of_it_learns():
    model = build(**BY_SERIES)
    # every series is visible, so that every layer has tokens
    loss_of(model, random_volume(), draw(num_shown=3)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(gradient.any() for part in (model.encoder.embedding, model.decoder.head) for gradient in part.weight.grad)


def test_joint_tokens_have_one_layer_in_any_case():
    of_each = {"encoder": JOINT["architecture"]["encoder"] | {"embedding": "by_series"}}
    shared, apart = build(**JOINT), build(**(JOINT | {"architecture": of_each, "reconstruction": {"head": "by_series"}}))
    assert {n: t.shape for n, t in apart.state_dict().items()} == {n: t.shape for n, t in shared.state_dict().items()}
