"""The encoding and the loss depend on what they may depend on and on nothing else; the loss is the plain formula."""

import itertools
import math

import numpy as np
import pytest
import torch
from factories import GRID_SIZE, PATCH_SIZE, SERIES, TOKEN_SIZE, loss_of, pretext_of
from factories import settings as read_settings
from torch import nn

from nnunet_csm.data.draws import Draws
from nnunet_csm.model.tokens import all_tokens, coordinates, select, to_tokens, to_volume
from nnunet_csm.model.vit import Positions, ViT
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.masking import Mask, Masking, draw_mask
from nnunet_csm.pretext.rebuilding import masked_mean

NUM_TOKENS = math.prod(GRID_SIZE)
MASKING = Masking(mask_ratio=0.8, places="independent", hidden_series="rebuilt")
# the second sample has no T1w
PRESENT = torch.tensor([[True, True, True], [True, False, True]])


def build(series=SERIES, **reconstruction):
    torch.manual_seed(0)
    return pretext_of(read_settings(series=series, reconstruction=reconstruction)).eval()


def random_volume(present, seed=1):
    volume = torch.randn(*present.shape, *PATCH_SIZE, generator=torch.Generator().manual_seed(seed))
    return volume * present[:, :, None, None, None]


def draw(present=PRESENT, num_shown=1, masking=MASKING, seed=2):
    return draw_mask(Draws(seed, torch.arange(len(present))), present, num_shown, NUM_TOKENS, masking)


def change(volume, where):
    """Other voxels in the tokens for which `where` (b, s, l) is True."""
    tokens = to_tokens(volume, TOKEN_SIZE)
    changed = torch.where(where[..., None], torch.randn_like(tokens) * 3 + 5, tokens)
    return to_volume(changed, GRID_SIZE, TOKEN_SIZE)


def encode(model, volume, mask):
    """What the model's own forward pass hands from the encoder to the decoder."""
    outputs = []
    handle = model.encoder.register_forward_hook(lambda module, inputs, output: outputs.append(output[-1]))
    with torch.no_grad():
        rebuilt = model.rebuild(volume, mask)
    handle.remove()
    return outputs[0], rebuilt


class Fixed(nn.Module):
    """A decoder whose predictions do not depend on what was encoded."""

    def __init__(self, predictions):
        super().__init__()
        self.predictions = nn.Parameter(predictions)

    def forward(self, encoded, visible, asked, grid):
        return select(self.predictions, asked)


def numpy_loss(volume, predicted, mask, normalize):
    """Mean over the tokens to be rebuilt of the mean over voxels, token by token, by slicing."""
    errors = []
    (gz, gy, gx), (tz, ty, tx) = GRID_SIZE, TOKEN_SIZE
    for b, s, z, y, x in itertools.product(*map(range, (*volume.shape[:2], gz, gy, gx))):
        number = (z * gy + y) * gx + x
        if mask.rebuilt[b, s, number]:
            block = volume[b, s, z * tz : (z + 1) * tz, y * ty : (y + 1) * ty, x * tx : (x + 1) * tx].numpy().astype(np.float64)
            if normalize:
                block = (block - block.mean()) / np.sqrt(block.var(ddof=1) + 1e-6)
            errors.append(np.mean((predicted[b, s, number].numpy().astype(np.float64) - block.ravel()) ** 2))
    return np.mean(errors)


# --- what the encoding depends on --------------------------------------------------------------------------------------------


def test_the_encoding_and_the_predictions_do_not_change_with_any_hidden_voxel():
    model, volume, mask = build(), random_volume(PRESENT), draw()
    encoded, rebuilt = encode(model, volume, mask)
    encoded_again, rebuilt_again = encode(model, change(volume, mask.hidden), mask)
    assert encoded.equal(encoded_again)
    assert rebuilt.tokens[mask.hidden].equal(rebuilt_again.tokens[mask.hidden])
    assert rebuilt.tokens[~mask.hidden].equal(to_tokens(volume, TOKEN_SIZE)[~mask.hidden])


def test_the_encoding_changes_with_a_visible_voxel():
    model, volume, mask = build(), random_volume(PRESENT), draw()
    encoded, _ = encode(model, volume, mask)
    assert not encoded.equal(encode(model, change(volume, ~mask.hidden), mask)[0])


def test_the_encoder_knows_tokens_by_their_coordinates_not_by_their_order_in_the_sequence():
    model, volume = build(), random_volume(PRESENT[:1])
    index = torch.randperm(3 * NUM_TOKENS)[None, :17]
    order = torch.randperm(17)
    tokens, places = select(to_tokens(volume, TOKEN_SIZE), index), coordinates(index, GRID_SIZE)
    features = model.encoder(tokens, places)[-1]
    torch.testing.assert_close(model.encoder(tokens[:, order], places[:, order])[-1], features[:, order])


def test_the_encoder_tells_apart_series_and_places():
    model = build()
    index = all_tokens(3, GRID_SIZE, 1, torch.device("cpu"))
    same = torch.ones(1, 3 * NUM_TOKENS, math.prod(TOKEN_SIZE))
    features = model.encoder(same, coordinates(index, GRID_SIZE))[-1][0]
    distances = torch.cdist(features, features) + 10 * torch.eye(len(features))
    assert distances.min() > 1e-3


def test_tokens_nobody_may_attend_to_influence_no_other():
    model, volume = build(), random_volume(PRESENT[:1])
    index = all_tokens(3, GRID_SIZE, 1, torch.device("cpu"))
    tokens, places = select(to_tokens(volume, TOKEN_SIZE), index), coordinates(index, GRID_SIZE)
    attend = torch.rand(1, 3 * NUM_TOKENS) < 0.5
    features = model.encoder(tokens, places, attend)[-1]
    others = model.encoder(tokens[:, attend[0]], places[:, attend[0]])[-1]
    torch.testing.assert_close(features[:, attend[0]], others)


@pytest.mark.parametrize("width", [24, 32])
def test_the_position_embedding_tells_every_place_of_a_large_grid_apart_and_ignores_the_series(width):
    grid = (6, 8, 7)
    index = all_tokens(2, grid, 1, torch.device("cpu"))
    embedding = Positions(width, "geometric")(coordinates(index, grid))[0]
    assert embedding.shape == (2 * math.prod(grid), width)
    first, second = embedding.chunk(2)
    assert first.equal(second)
    assert (torch.cdist(first, first) + 10 * torch.eye(len(first))).min() > 0.01


# --- what the loss depends on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("hidden_series", ["rebuilt", "ignored", "none"])
def test_the_loss_is_the_plain_formula(normalize, hidden_series):
    num_shown = 2 if hidden_series == "none" else 1
    present = PRESENT[1:] if hidden_series == "none" else PRESENT
    model, volume = build(normalize_targets=normalize), random_volume(present)
    mask = draw(present, num_shown, Masking(0.8, "independent", hidden_series))
    predicted = torch.randn(*present.shape, NUM_TOKENS, math.prod(TOKEN_SIZE))
    model.decoder = Fixed(predicted)
    assert loss_of(model, volume, mask).item() == pytest.approx(numpy_loss(volume, predicted, mask, normalize), rel=1e-5)


def test_the_loss_does_not_look_at_visible_or_absent_voxels():
    model, volume, mask = build(), random_volume(PRESENT), draw()
    model.decoder = Fixed(torch.randn(2, 3, NUM_TOKENS, math.prod(TOKEN_SIZE)))
    loss = loss_of(model, volume, mask)
    absent = ~PRESENT[..., None].expand_as(mask.hidden)
    assert loss_of(model, change(volume, ~mask.hidden), mask).equal(loss)
    assert loss_of(model, change(volume, absent), mask).equal(loss)
    assert loss_of(model, change(volume, ~mask.rebuilt), mask).equal(loss)
    assert not loss_of(model, change(volume, mask.rebuilt), mask).equal(loss)


def test_its_gradient_reaches_the_predictions_of_rebuilt_tokens_only():
    model, volume, mask = build(), random_volume(PRESENT), draw()
    model.decoder = Fixed(torch.randn(2, 3, NUM_TOKENS, math.prod(TOKEN_SIZE)))
    loss_of(model, volume, mask).backward()
    assert (model.decoder.predictions.grad != 0).any(-1).equal(mask.rebuilt)


def test_absent_series_influence_neither_predictions_nor_loss():
    model, volume, mask = build(), random_volume(PRESENT), draw()
    absent = ~PRESENT[..., None].expand_as(mask.hidden)
    with torch.no_grad():
        before, after = model.rebuild(volume, mask), model.rebuild(change(volume, absent), mask)
        assert loss_of(model, change(volume, absent), mask).equal(loss_of(model, volume, mask))
    assert after.tokens[PRESENT].equal(before.tokens[PRESENT])


def test_series_that_are_ignored_when_hidden_are_not_in_the_loss():
    masking = Masking(0.8, "independent", "ignored")
    model, volume, mask = build(), random_volume(PRESENT), draw(masking=masking)
    hidden_whole = mask.series_hidden[..., None].expand_as(mask.hidden)
    with torch.no_grad():
        assert loss_of(model, volume, mask).equal(loss_of(model, change(volume, hidden_whole), mask))


def test_one_series_alone_can_be_learned_from():
    present = torch.ones(2, 1, dtype=torch.bool)
    model, volume, mask = build(series=("T2w",)), random_volume(present), draw(present)
    loss_of(model, volume, mask).backward()
    assert model.rebuild(volume, mask).tokens.shape == (2, 1, NUM_TOKENS, math.prod(TOKEN_SIZE))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_it_is_zero_and_has_a_gradient_when_nothing_is_hidden():
    present = torch.ones(1, 1, dtype=torch.bool)
    model, volume, mask = build(series=("T2w",)), random_volume(present), draw(present, masking=Masking(0.0, "shared", "none"))
    assert not mask.hidden.any()
    loss = loss_of(model, volume, mask)
    loss.backward()
    assert loss.item() == 0.0
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_the_mean_is_over_all_rebuilt_tokens_of_the_batch():
    error = torch.tensor([[1.0, 2.0, 9.0, 4.0, 9.0, 9.0]])
    rebuilt = torch.tensor([[[True, True, False], [True, False, False]]])
    mask = Mask(rebuilt, rebuilt, torch.zeros(1, 0, dtype=torch.long), torch.arange(6)[None])
    assert masked_mean(error, mask).item() == pytest.approx(7 / 3)
    nothing = Mask(torch.zeros_like(rebuilt), torch.zeros_like(rebuilt), mask.visible, mask.asked)
    assert masked_mean(error, nothing).item() == 0.0


def test_the_forward_pass_sums_what_the_weight_counts_so_that_parts_of_a_batch_add_up():
    model, volume, mask = build(), random_volume(PRESENT), draw()
    with torch.no_grad():
        summed, error = model(volume, mask), model.errors(volume, mask)
        torch.testing.assert_close(summed / model.weight(mask), masked_mean(error, mask))
        assert model.weight(mask) == mask.rebuilt.sum()
        parts = [(volume[n : n + 1], mask[n : n + 1]) for n in range(2)]
        torch.testing.assert_close(sum(model(*part) for part in parts), summed)
        assert sum(model.weight(part) for _, part in parts) == model.weight(mask)


# --- normalised targets ------------------------------------------------------------------------------------------------------


def test_normalised_targets_are_finite_on_constant_tokens():
    model, mask = build(normalize_targets=True), draw()
    volume = torch.full((2, 3, *PATCH_SIZE), 7.0)
    loss = loss_of(model, volume, mask)
    loss.backward()
    assert loss.isfinite() and model.rebuild(volume, mask).tokens.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_perfect_prediction_of_normalised_targets_gives_the_input_back():
    model, volume, mask = build(normalize_targets=True), 3 * random_volume(PRESENT) + 2, draw()
    tokens = to_tokens(volume, TOKEN_SIZE)
    deviation = (tokens.var(-1, keepdim=True) + 1e-6).sqrt()
    model.decoder = Fixed((tokens - tokens.mean(-1, keepdim=True)) / deviation)
    rebuilt = model.rebuild(volume, mask)
    torch.testing.assert_close(rebuilt.tokens, tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_volume(rebuilt.tokens, GRID_SIZE, TOKEN_SIZE), volume, rtol=1e-4, atol=1e-4)
    assert loss_of(model, volume, mask).item() < 1e-8


def test_the_decoder_gives_every_hidden_token_its_own_answer():
    model, volume, mask = build(), random_volume(PRESENT[:1]), draw(PRESENT[:1])
    with torch.no_grad():
        tokens = model.rebuild(volume, mask).tokens[0][mask.hidden[0]]
    assert (torch.cdist(tokens, tokens) + 10 * torch.eye(len(tokens))).min() > 1e-4


def test_two_backward_passes_give_the_same_gradients():
    """At a size at which torch splits sums over threads; summed in the order of arrival, they would differ."""
    torch.manual_seed(0)
    encoder = ViT(Architecture(("A", "B", "C"), (0, 1, 2), (2, 4, 4), 48, depth=1, num_heads=2, features=4, drop_path=0.0))
    index = all_tokens(3, (4, 8, 8), 8, torch.device("cpu"))
    tokens, place = torch.randn(8, index.shape[1], 32), coordinates(index, (4, 8, 8))

    def gradients():
        encoder.zero_grad()
        encoder(tokens, place)[-1].square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
