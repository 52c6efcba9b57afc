"""MAE3D hides one place in all series; but for its joint tokens, and what follows from them, it runs as CSM does."""

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import (
    GRID_SIZE,
    JOINT,
    JOINT_NETWORK,
    PATCH_SIZE,
    SERIES,
    TINY,
    TOKEN_SIZE,
    KnownBank,
    base_plans,
    checkpoint_of,
    csm_plans,
    facts_of,
    loss_of,
    pretext_of,
)
from factories import settings as read_settings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunet_csm import checkpoint
from nnunet_csm.data.draws import Draws, Purpose
from nnunet_csm.errors import UserError
from nnunet_csm.model.classifier import CSMClassifier
from nnunet_csm.model.planned import series_present
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.model.tokens import select, separate, to_tokens, to_volume
from nnunet_csm.model.transfer import PretrainedEncoder, as_table, read_encoder, transfer
from nnunet_csm.planning.facts import Wishes
from nnunet_csm.planning.planner import plan
from nnunet_csm.planning.presets import merged
from nnunet_csm.plans import EncoderSettings, read_configuration
from nnunet_csm.pretext import masking as csm_masking
from nnunet_csm.pretext.base import setup_of
from nnunet_csm.pretext.batches import Batches
from nnunet_csm.pretext.csm import CSM
from nnunet_csm.pretext.joint import without_empty_series
from nnunet_csm.pretext.mae3d import MAE3D, PlaceMasking, draw_mask
from nnunet_csm.pretext.masking import Masking, num_visible, without_background
from nnunet_csm.schema import to_dict

NUM_TOKENS, NUM_VOXELS = math.prod(GRID_SIZE), math.prod(TOKEN_SIZE)
RATIO = 0.75
# the second sample has no T1w
PRESENT = torch.tensor([[True, True, True], [True, False, True]])


def build(series=SERIES, **reconstruction):
    torch.manual_seed(0)
    return pretext_of(read_settings(series=series, reconstruction=reconstruction, **JOINT)).eval()


def random_volume(present=PRESENT, seed=1):
    volume = torch.randn(*present.shape, *PATCH_SIZE, generator=torch.Generator().manual_seed(seed))
    return volume * present[:, :, None, None, None]


def draw(present=PRESENT, mask_ratio=RATIO, seed=2):
    return draw_mask(Draws(seed, torch.arange(len(present))), present, NUM_TOKENS, mask_ratio)


def change(volume, where):
    """Other voxels in the tokens for which `where` (b, s, l) is True."""
    tokens = to_tokens(volume, TOKEN_SIZE)
    changed = torch.where(where[..., None], torch.randn_like(tokens) * 3 + 5, tokens)
    return to_volume(changed, GRID_SIZE, TOKEN_SIZE)


class Fixed(nn.Module):
    """A decoder whose predictions do not depend on what was encoded."""

    def __init__(self, predictions):
        super().__init__()
        self.predictions = nn.Parameter(predictions)

    def forward(self, encoded, visible, asked, grid):
        return select(self.predictions, asked)


def random_predictions(b=2, s=3):
    return torch.randn(b, 1, NUM_TOKENS, s * NUM_VOXELS, generator=torch.Generator().manual_seed(3))


# --- masks -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda s: st.lists(st.lists(st.booleans(), min_size=s, max_size=s).filter(any), min_size=1, max_size=4)
    ),
    st.sampled_from([1, 2, 30, 216]),
    st.sampled_from([0.0, 0.125, 0.5, 0.75, 0.99]),
    st.integers(0, 999),
)
def test_as_many_tokens_as_planned_are_visible_at_one_place_in_all_series(rows, num_tokens, mask_ratio, seed):
    present = torch.tensor(rows)
    b, s = present.shape
    mask = draw_mask(Draws(seed, torch.arange(b)), present, num_tokens, mask_ratio)
    count = num_visible(num_tokens, mask_ratio)
    assert ((~mask.hidden).sum(2) == count).all()
    assert mask.hidden.equal(mask.hidden[:, :1].expand(b, s, num_tokens))
    assert mask.rebuilt.equal(mask.hidden & present[..., None])
    # joint tokens are numbered as those of one series, in rising order
    assert mask.visible.shape == (b, count) and (mask.visible.diff(dim=1) > 0).all()
    assert torch.ones(b, num_tokens, dtype=torch.bool).scatter(1, mask.visible, False).equal(mask.hidden[:, 0])


def test_the_places_are_those_that_csm_draws_when_series_share_them():
    draws, everything = Draws(5, torch.arange(4)), torch.ones(4, 3, dtype=torch.bool)
    shared = csm_masking.draw_mask(draws, everything, 3, 216, Masking(RATIO, "shared", "none"))
    joint = draw_mask(draws, everything, 216, RATIO)
    assert joint.hidden.equal(shared.hidden) and joint.rebuilt.equal(shared.rebuilt)
    assert joint.visible.equal(shared.visible[:, : joint.visible.shape[1]])


def test_which_series_are_present_changes_nothing_but_what_is_rebuilt():
    complete, lacking = draw(torch.ones_like(PRESENT)), draw(PRESENT)
    assert complete.hidden.equal(lacking.hidden) and complete.visible.equal(lacking.visible)
    assert lacking.rebuilt.equal(complete.rebuilt & PRESENT[..., None])


@pytest.mark.parametrize("joint", [True, False])
def test_background_stays_out_of_the_loss_unless_there_is_nothing_else(joint):
    volume, present = random_volume(torch.ones(3, 3, dtype=torch.bool)), torch.ones(3, 3, dtype=torch.bool)
    draws = Draws(2, torch.arange(3))
    drawn = (
        draw(present) if joint else csm_masking.draw_mask(draws, present, 2, NUM_TOKENS, Masking(0.75, "independent", "rebuilt"))
    )
    flat = torch.rand(3, 3, NUM_TOKENS, generator=torch.Generator().manual_seed(4)) < 0.5
    flat[2] = True
    # no certain value: z-scoring makes another constant of a zero
    tokens = torch.where(flat[..., None], torch.full((), -0.4), to_tokens(volume, TOKEN_SIZE))
    mask = without_background(drawn, to_volume(tokens, GRID_SIZE, TOKEN_SIZE).half(), TOKEN_SIZE)
    assert mask.rebuilt[:2].equal(drawn.rebuilt[:2] & ~flat[:2]) and mask.rebuilt[:2].any()
    assert mask.rebuilt[2].equal(drawn.rebuilt[2])
    assert mask.hidden.equal(drawn.hidden) and mask.visible.equal(drawn.visible)


# --- the network and its loss ------------------------------------------------------------------------------------------------


def numpy_loss(volume, present, predicted, hidden, normalize):
    """Token by token, by slicing: the mean over hidden places and present series of the mean over voxels."""
    errors = []
    (gz, gy, gx), (tz, ty, tx) = GRID_SIZE, TOKEN_SIZE
    for b, z, y, x in itertools.product(range(len(volume)), *map(range, (gz, gy, gx))):
        number = (z * gy + y) * gx + x
        if not hidden[b, number]:
            continue
        block = volume[b, :, z * tz : (z + 1) * tz, y * ty : (y + 1) * ty, x * tx : (x + 1) * tx].numpy().astype(np.float64)
        block = block.reshape(len(block), -1)
        there = block[present[b].numpy()]
        if normalize:
            block = (block - there.mean()) / np.sqrt(there.var(ddof=1) + 1e-6)
        found = predicted[b, 0, number].numpy().astype(np.float64).reshape(block.shape)
        errors += [np.mean((found[s] - block[s]) ** 2) for s in range(len(block)) if present[b, s]]
    return np.mean(errors)


@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_is_the_plain_formula(normalize):
    model, volume, mask = build(normalize_targets=normalize), 2 * random_volume() + PRESENT[:, :, None, None, None], draw()
    predicted = random_predictions()
    model.decoder = Fixed(predicted)
    expected = numpy_loss(volume, PRESENT, predicted, mask.hidden[:, 0], normalize)
    assert loss_of(model, volume, mask).item() == pytest.approx(expected, rel=1e-5)


def test_hidden_voxels_of_no_series_reach_the_predictions_and_visible_ones_of_every_series_do():
    model, present = build(), torch.ones(1, 3, dtype=torch.bool)
    volume, mask = random_volume(present), draw(present)
    with torch.no_grad():
        before = model.rebuild(volume, mask).tokens
        assert model.rebuild(change(volume, mask.hidden), mask).tokens[mask.hidden].equal(before[mask.hidden])
        for series in range(3):
            where = torch.zeros_like(mask.hidden)
            where[:, series] = ~mask.hidden[:, series]
            after = model.rebuild(change(volume, where), mask).tokens
            changed = ((after - before).abs().amax(3) > 0) & mask.hidden
            assert changed.any(2).any(0).all(), "a series was not told"


@pytest.mark.parametrize("normalize", [False, True])
def test_the_gradient_of_the_loss_reaches_hidden_tokens_of_present_series_only(normalize):
    model, mask = build(normalize_targets=normalize), draw()
    model.decoder = Fixed(random_predictions())
    loss_of(model, random_volume(), mask).backward()
    assert (separate(model.decoder.predictions.grad, 3) != 0).any(-1).equal(mask.rebuilt)


@pytest.mark.parametrize("normalize", [False, True])
def test_targets_beside_an_absent_series_are_those_of_the_others_alone(normalize):
    present = torch.tensor([[True, False, True]] * 2)
    volume, predicted = 2 * random_volume(present) + present[:, :, None, None, None], random_predictions()
    of_three, of_two = (build(series, normalize_targets=normalize) for series in (SERIES, ("FLAIR", "T2w")))
    of_three.decoder = Fixed(predicted)
    of_two.decoder = Fixed(predicted.unflatten(3, (3, NUM_VOXELS))[..., [0, 2], :].flatten(3))
    expected = loss_of(of_two, volume[:, [0, 2]], draw(torch.ones(2, 2, dtype=torch.bool)))
    torch.testing.assert_close(loss_of(of_three, volume, draw(present)), expected)


def test_a_perfect_prediction_of_normalised_targets_gives_the_input_back():
    present = torch.ones(2, 3, dtype=torch.bool)
    model, volume, mask = build(normalize_targets=True), 3 * random_volume(present) + 2, draw(present)
    joint = torch.stack([to_tokens(volume, TOKEN_SIZE)[:, s] for s in range(3)], 2).flatten(2)[:, None]
    model.decoder = Fixed((joint - joint.mean(-1, keepdim=True)) / (joint.var(-1, keepdim=True) + 1e-6).sqrt())
    rebuilt = model.rebuild(volume, mask)
    torch.testing.assert_close(to_volume(rebuilt.tokens, GRID_SIZE, TOKEN_SIZE), volume, rtol=1e-4, atol=1e-4)
    assert loss_of(model, volume, mask).item() < 1e-8


def test_constant_patches_are_finite_and_so_is_nothing_hidden():
    model = build(normalize_targets=True)
    for volume, mask in (
        (torch.full((2, 3, *PATCH_SIZE), 7.0), draw()),
        (random_volume(), draw(mask_ratio=0.0)),
    ):
        model.zero_grad()
        loss = loss_of(model, volume, mask)
        loss.backward()
        assert loss.isfinite() and model.rebuild(volume, mask).tokens.isfinite().all()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_it_learns():
    present = torch.ones(4, 3, dtype=torch.bool)
    model, volume, mask = build().train(), random_volume(present), draw(present)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = loss_of(model, volume, mask)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# --- batches -----------------------------------------------------------------------------------------------------------------


def masked_batches(present, volume=None, **changes):
    """Batches of cases known by their series; a patch is a voxel of each with the case's number from 1, or always `volume`."""

    def patches(cases, patch_size):
        return volume if volume is not None else ((cases + 1.0)[:, None] * present[cases])[:, :, None, None, None]

    chosen = read_settings(**(JOINT | changes))
    return Batches(KnownBank(present, patches), pretext_of(chosen), chosen.csm.seed, Purpose.TRAINING, range(8))


def test_cases_with_any_series_share_a_batch_each_as_likely_as_the_others():
    present = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])
    make_batch, counts, num_kinds = masked_batches(present), torch.zeros(3), set()
    for step in range(300):
        batch = make_batch(0, step)
        cases = batch.volumes[0].amax((1, 2, 3, 4)).long() - 1
        assert batch.drawn.rebuilt.any(2).equal(present[cases])
        counts += torch.bincount(cases, minlength=3)
        num_kinds.add(len(set(cases.tolist())))
    assert max(num_kinds) == 3
    assert ((counts / 2400 - 1 / 3).abs() < 5 * math.sqrt(2 / 9 / 2400)).all()


def test_a_series_of_which_nothing_is_in_the_patch_is_not_asked_for():
    volume = torch.randn(2, 3, *PATCH_SIZE)
    volume[1, 2] = 0
    present = torch.ones(2, 3, dtype=torch.bool)
    mask = draw_mask(Draws(1, torch.arange(2)), present, math.prod(GRID_SIZE), RATIO)
    found = without_empty_series(mask, volume)
    assert found.hidden.equal(mask.hidden) and found.visible.equal(mask.visible)
    assert not found.rebuilt[1, 2].any()
    assert found.rebuilt[0].equal(mask.rebuilt[0]) and found.rebuilt[1, :2].equal(mask.rebuilt[1, :2])


def test_batches_without_background_leave_it_out():
    volume = random_volume(torch.ones(8, 3, dtype=torch.bool))
    volume[:, :, :2] = 0.0
    present = torch.ones(3, 3, dtype=torch.bool)
    kept, left_out = (
        masked_batches(present, volume, masking={"mask_ratio": RATIO, "background": background})(0, 0).drawn
        for background in ("rebuilt", "ignored")
    )
    # the first of two layers of tokens
    expected = kept.rebuilt.unflatten(2, GRID_SIZE).clone()
    expected[:, :, 0] = False
    assert left_out.rebuilt.unflatten(2, GRID_SIZE).equal(expected) and left_out.hidden.equal(kept.hidden)


# --- plans -------------------------------------------------------------------------------------------------------------------


def test_the_preset_differs_from_b_in_the_strategy_only():
    found = {}
    for name in ("B", "mae3d"):
        plans, decisions = plan(base_plans(), "3d_fullres", facts_of(), "nnUNetCSMPlans", Wishes(name))
        found[name] = read_configuration(json.loads(json.dumps(plans)), "3d_fullres", "plans")
        reasons = {d.name: f"{d.value}: {d.reason}" for d in decisions}
    b, joint = found["B"], found["mae3d"]
    (csm, _), (mae3d, setup) = setup_of(b), setup_of(joint)
    assert (csm, mae3d) == (CSM, MAE3D)
    assert setup.settings.masking == PlaceMasking(RATIO) and setup.settings.reconstruction.normalize_targets
    as_published = EncoderSettings("joint_vit", positions="mae", series_embedding_std=0.0, query_key_gain=0.0)
    assert (b.architecture.encoder, joint.architecture.encoder) == (EncoderSettings(), as_published)
    assert dataclasses.replace(joint.architecture, encoder=EncoderSettings()) == b.architecture
    assert (joint.patch_size, joint.csm.pretraining_patch_size) == (b.patch_size, b.csm.pretraining_patch_size)
    assert (joint.csm.pretraining, joint.csm.finetuning_schedule) == (b.csm.pretraining, b.csm.finetuning_schedule)
    num_tokens = math.prod(joint.pretraining_grid)
    assert f"{num_tokens}, each of all 3 series" in reasons["tokens"]
    assert f"{num_visible(num_tokens, RATIO)} of {num_tokens} joint tokens" in reasons["mask ratio"]
    assert "none" in reasons["series hidden whole"]


# --- downstream --------------------------------------------------------------------------------------------------------------


def segmenter(series=SERIES, seed=2, **changes):
    architecture = read_settings(**(JOINT | {"series": series} | changes)).architecture
    torch.manual_seed(seed)
    return CSMSegmenter(len(series), 3, **to_dict(architecture)).eval(), architecture


def encoded(network, volume):
    with torch.no_grad():
        return [level.main for level in network.encode(volume, series_present(volume))]


def source_of(network, architecture):
    return PretrainedEncoder("here", architecture, network.encoder.state_dict())


def assert_same_features(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_pretrained_encoder_enters_whole_from_a_checkpoint(tmp_path):
    model = build()
    path = tmp_path / "checkpoint_final.pth"
    checkpoint.save(checkpoint_of(csm_plans(**JOINT), model.state_dict()), path)
    network, architecture = segmenter()
    rows = transfer(read_encoder(str(path)), network.encoder, architecture)
    assert all(model.encoder.state_dict()[name].equal(tensor) for name, tensor in network.encoder.state_dict().items())
    table = as_table(rows)
    assert all(f"embedding.weight[{name}]" in table for name in SERIES) and "series_embedding " in table
    assert len(network.encoder.series_embedding) == 1


def test_another_order_of_series_permutes_columns():
    (network, architecture), order = segmenter(), [2, 0, 1]
    permuted, other = segmenter([SERIES[n] for n in order], seed=3)
    transfer(source_of(network, architecture), permuted.encoder, other)
    volume = random_volume(torch.ones(2, 3, dtype=torch.bool))
    assert_same_features(encoded(permuted, volume[:, order]), encoded(network, volume))


def test_fewer_series_are_as_if_the_others_were_absent():
    network, architecture = segmenter()
    fewer, other = segmenter(["T2w", "FLAIR"], seed=3)
    transfer(source_of(network, architecture), fewer.encoder, other)
    volume = random_volume(torch.ones(2, 3, dtype=torch.bool))
    volume[:, SERIES.index("T1w")] = 0
    assert_same_features(encoded(fewer, volume[:, [2, 0]]), encoded(network, volume))


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (JOINT, JOINT | {"series": ["T2w", "DWI"]}, "hold FLAIR, T1w, T2w, this run also needs DWI; plan with -series FLAIR"),
        (JOINT, {}, r"encoder\.kind is joint_vit, expected vit.*pretrain with these plans"),
        ({}, JOINT, r"encoder\.kind is vit, expected joint_vit.*pretrain with these plans"),
    ],
)
def test_what_has_no_columns_is_refused_and_nothing_is_changed(source, target, message):
    given = read_settings(**source)
    pretrained = pretext_of(given)
    architecture = read_settings(**target).architecture
    network = CSMSegmenter(len(architecture.series), 3, **to_dict(architecture))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(UserError, match=message):
        transfer(source_of(pretrained, given.architecture), network.encoder, architecture)
    assert all(tensor.equal(before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("num_columns", [2 * NUM_VOXELS, 3 * NUM_VOXELS + 1])
def test_a_checkpoint_with_other_columns_than_series_is_refused(tmp_path, num_columns):
    path = tmp_path / "checkpoint_final.pth"
    weights = build().state_dict() | {"encoder.embedding.weight": torch.zeros(TINY["width"], num_columns)}
    checkpoint.save(checkpoint_of(csm_plans(**JOINT), weights), path)
    with pytest.raises(UserError, match=r"the encoder holds .* series, it names 3"):
        read_encoder(str(path))


def test_the_segmenter_takes_any_series_and_needs_not_be_told_which():
    network, _ = segmenter()
    volume = random_volume()
    with torch.no_grad():
        logits = network(volume)
        assert logits.shape == (2, 3, *PATCH_SIZE) and logits.isfinite().all()
        assert network(volume, shown=[0, 2]).equal(logits)
        for sample in range(2):
            torch.testing.assert_close(network(volume[sample : sample + 1]), logits[sample : sample + 1], rtol=1e-4, atol=1e-5)
        assert network(torch.zeros_like(volume)).isfinite().all()
    network(volume).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    present = torch.ones(1, 3, dtype=torch.bool)
    for series in range(3):
        changed = random_volume(present)
        changed[:, series] += 1
        bottlenecks = (encoded(network, v)[-1] for v in (random_volume(present), changed))
        assert not torch.equal(*bottlenecks)


@pytest.mark.parametrize("pooling", ["attentive", "mean"])
def test_the_classifier_pools_joint_tokens(pooling):
    torch.manual_seed(0)
    network = CSMClassifier(
        3, 2, series=SERIES, channels=(0, 1, 2), token_size=TOKEN_SIZE, **TINY, **JOINT_NETWORK, pooling=pooling
    ).eval()
    # of the second sample, the first and the second series are absent
    volume = random_volume(torch.tensor([[True, True, True], [False, False, True]]))
    features = network.features(volume)
    tokens, present = features.tokens, features.present
    assert tokens.shape == (2, 1, NUM_TOKENS, TINY["width"]) and present.all() and present.shape == (2, 1)
    together = network(volume)
    for sample in range(2):
        torch.testing.assert_close(network(volume[sample : sample + 1]), together[sample : sample + 1], rtol=1e-4, atol=1e-5)
    volume.requires_grad_()
    network(volume).sum().backward()
    assert (volume.grad != 0).all()


# --- trainers ----------------------------------------------------------------------------------------------------------------


def as_joint(entry: dict[str, Any]) -> None:
    """A configuration of MAE3D."""
    entry["architecture"]["arch_kwargs"] |= JOINT_NETWORK
    pretext = {"name": "mae3d", "masking": {"mask_ratio": RATIO, "background": "ignored"}}
    entry["csm"] = merged(entry["csm"], {"pretext": pretext | {"reconstruction": {"normalize_targets": True}}})


def test_pretraining_and_finetuning_run_from_plans_alone(make_trainer: Callable[..., Any]) -> None:
    pretrainer = make_trainer(True, change=as_joint)
    pretrainer.run_training()
    assert isinstance(pretrainer.bare_network, MAE3D)
    log = pretrainer.logger.local_logger.my_fantastic_logging
    assert np.isfinite(log["train_losses"]).all() and np.isfinite(log["error_part_hidden"]).all()
    assert np.isnan(log["error_whole_hidden"]).all()
    pretrainer.perform_actual_validation()
    assert sorted(f.name for f in (Path(pretrainer.output_folder) / "reconstructions").glob("*.png"))
    pretrained = checkpoint.load(Path(pretrainer.output_folder) / "checkpoint_final.pth")["network_weights"]

    finetuner = make_trainer(False, change=as_joint)
    finetuner.run_training()
    trained = checkpoint.load(Path(finetuner.output_folder) / "checkpoint_final.pth")
    assert trained["network_weights"]["encoder.embedding.weight"].shape == pretrained["encoder.embedding.weight"].shape
    again = make_trainer(False, change=as_joint)
    again.initialize()
    again.on_fresh_start()
    assert all(torch.equal(tensor, pretrained[f"encoder.{name}"]) for name, tensor in again.encoder.state_dict().items())

    other = make_trainer(False)
    other.initialize()
    with pytest.raises(UserError, match=r"pretext\.name MAE3D, the plans say CSM"):
        other.on_fresh_start()
