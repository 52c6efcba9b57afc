"""The decoder gives what one with keys and values of all tokens and a mask gave; asking for a part changes no expectation."""

import math
from pathlib import Path

import pytest
import torch
from factories import GRID_SIZE, JOINT, PATCH_SIZE, SERIES, loss_of, pretext_of
from factories import settings as read_settings

from nnunet_csm.data.draws import Draws
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.tokens import all_tokens, select
from nnunet_csm.pretext import mae3d
from nnunet_csm.pretext.masking import Mask, Masking, ask_some, draw_mask, num_asked, without_background
from nnunet_csm.pretext.rebuilding import masked_mean

NUM_TOKENS = math.prod(GRID_SIZE)
MASKING = Masking(0.8, "independent", "rebuilt")
# the second sample lacks one
PRESENT = torch.tensor([[True, True, True], [True, False, True]])


@pytest.fixture
def masked_decoder(monkeypatch):
    """The class of the first versions' decoder, which `benchmarks/decoder_speed.py` measures against."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from steps import MaskedDecoder

    return MaskedDecoder


def draw(num=2, seed=2, masking=MASKING):
    return draw_mask(Draws(seed, torch.arange(num)), PRESENT[:num], 1, NUM_TOKENS, masking)


@pytest.mark.parametrize("depth", [1, 3])
def test_keys_of_the_visible_tokens_alone_give_the_same_answers_and_gradients(depth, masked_decoder):
    torch.manual_seed(0)
    decoder = ReconstructionDecoder(len(SERIES), 16, encoder_width=24, width=12, depth=depth, num_heads=2).double()
    before = masked_decoder(len(SERIES), 16, encoder_width=24, width=12, depth=depth, num_heads=2).double()
    before.load_state_dict(decoder.state_dict())
    mask, weights = draw(), torch.randn(2, 3 * NUM_TOKENS, 16, dtype=torch.float64)
    encoded = torch.randn(2, mask.visible.shape[1], 24, dtype=torch.float64, requires_grad=True)
    found, expected = (one(encoded, mask.visible, mask.asked, GRID_SIZE) for one in (decoder, before))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = select(weights[:, None], mask.asked)
    gradients = [
        torch.autograd.grad((out * weights).sum(), [encoded, *one.parameters()])
        for out, one in ((found, decoder), (expected, before))
    ]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_an_answer_does_not_depend_on_what_else_is_asked_for():
    torch.manual_seed(0)
    decoder = ReconstructionDecoder(len(SERIES), 16, encoder_width=24, width=12, depth=2, num_heads=2)
    mask = draw()
    encoded = torch.randn(2, mask.visible.shape[1], 24)
    everything = decoder(encoded, mask.visible, mask.asked, GRID_SIZE)
    some = decoder(encoded, mask.visible, mask.asked[:, 3:8], GRID_SIZE)
    torch.testing.assert_close(some, everything[:, 3:8])


def test_visible_and_asked_tokens_are_all_tokens_unless_some_are_asked_for():
    mask = draw()
    both = torch.cat([mask.visible, mask.asked], 1).sort(1).values
    assert both.equal(all_tokens(3, GRID_SIZE, 2, mask.asked.device))
    assert mask.hidden.flatten(1).gather(1, mask.asked).all() and mask.weight.equal(
        mask.rebuilt.flatten(1).gather(1, mask.asked).float()
    )


def test_strides_are_those_of_a_tensor_of_its_own():
    # a compiled network is compiled again for a view
    mask = draw()
    assert all(tensor.is_contiguous() for tensor in mask.tensors)
    joint = mae3d.draw_mask(Draws(1, torch.arange(2)), PRESENT, NUM_TOKENS, 0.75)
    assert all(tensor.is_contiguous() for tensor in joint.tensors)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_asks_for_tokens_that_are_rebuilt_first_and_leaves_the_places_as_they_were(share):
    draws, full = Draws(2, torch.arange(2)), draw()
    some = ask_some(full, draws, share)
    assert some.hidden.equal(full.hidden) and some.rebuilt.equal(full.rebuilt) and some.visible.equal(full.visible)
    assert some.asked.shape[1] == num_asked(full.asked.shape[1], share)
    for sample, asked in enumerate(some.asked):
        assert len(asked.unique()) == len(asked) and full.hidden[sample].flatten()[asked].all()
        in_loss = full.rebuilt[sample].flatten()
        assert in_loss[asked].sum() == min(len(asked), in_loss.sum())
    # the weight of a sample is that of all its tokens
    torch.testing.assert_close(some.weight.sum(1), full.rebuilt.flatten(1).sum(1).float())
    assert ask_some(full, draws, 1.0) is full


def test_every_token_to_be_rebuilt_is_asked_for_as_often_as_the_others():
    counts, num_draws = torch.zeros(3 * NUM_TOKENS), 600
    full = draw(1)
    for seed in range(num_draws):
        some = ask_some(full, Draws(seed, torch.arange(1)), 0.25)
        counts[some.asked[0]] += 1
    rebuilt = full.rebuilt[0].flatten()
    expected = num_draws * some.asked.shape[1] / float(rebuilt.sum())
    assert (counts[~rebuilt] == 0).all()
    assert ((counts[rebuilt] - expected).abs() < 5 * math.sqrt(expected)).all()


def test_the_loss_of_a_share_is_that_of_all_tokens_in_the_mean():
    torch.manual_seed(0)
    chosen = read_settings()
    model = pretext_of(chosen).eval()
    volume = torch.randn(2, 3, *PATCH_SIZE) * PRESENT[:, :, None, None, None]
    # half of the second sample is background, so that samples have different numbers of tokens in the loss
    volume[1, :, :2] = 0
    full = without_background(draw(), volume, chosen.architecture.token_size)
    with torch.no_grad():
        expected = float(loss_of(model, volume, full))
        error = model.errors(volume, full)
        places = torch.zeros(2, 3 * NUM_TOKENS).scatter(1, full.asked, error)
        losses = []
        for seed in range(800):
            some = ask_some(full, Draws(seed, torch.arange(2)), 0.25)
            losses.append(float(masked_mean(places.gather(1, some.asked), some)))
        some_error = model.errors(volume, some)
    torch.testing.assert_close(some_error, places.gather(1, some.asked))
    found = torch.tensor(losses)
    assert float(found.std()) > 0
    assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / math.sqrt(len(losses))


def test_joint_tokens_are_asked_for_in_all_series_together():
    draws = Draws(3, torch.arange(2))
    some = ask_some(mae3d.draw_mask(draws, PRESENT, NUM_TOKENS, 0.75), draws, 0.5, num_joined=3)
    by_series = some.asked.unflatten(1, (3, -1))
    assert (by_series % NUM_TOKENS == by_series[:, :1]).all() and (by_series // NUM_TOKENS == torch.arange(3)[:, None]).all()
    model = pretext_of(read_settings(**JOINT)).eval()
    volume = torch.randn(2, 3, *PATCH_SIZE) * PRESENT[:, :, None, None, None]
    full = mae3d.draw_mask(draws, PRESENT, NUM_TOKENS, 0.75)
    with torch.no_grad():
        everything, part = model.errors(volume, full), model.errors(volume, some)
    places = torch.zeros(2, 3 * NUM_TOKENS).scatter(1, full.asked, everything)
    torch.testing.assert_close(part, places.gather(1, some.asked))


def test_a_mask_in_parts_weighs_as_the_whole():
    mask = ask_some(draw(), Draws(2, torch.arange(2)), 0.25)
    parts = [mask[:1], mask[1:]]
    assert torch.cat([part.weight for part in parts]).equal(mask.weight)
    assert all(isinstance(part, Mask) for part in parts)
