"""Is a pretraining worth going on with? Errors by what was visible, linear maps, lesions in features, and when to stop."""

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import blosc2
import factories
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunet_folders import PlannedDataset
from sklearn.linear_model import Ridge

from nnunet_csm.data.bank import open_bank
from nnunet_csm.data.stored import CaseFile
from nnunet_csm.errors import UserError
from nnunet_csm.judging.average_precision import LabelledTokens, average_precision
from nnunet_csm.judging.comparison import fit_linear_maps
from nnunet_csm.judging.hidden_errors import (
    LOGGED_ERRORS,
    LOGGED_TOKENS,
    HiddenErrors,
    HiddenTokens,
    samples_at_a_time,
    validation_sums,
)
from nnunet_csm.judging.kinds import (
    HIDDEN_PART,
    HIDDEN_WHOLE,
    HIDDEN_WHOLE_ALONE,
    KINDS,
    error_table,
    kinds_of,
    num_voxels,
    squared_errors,
)
from nnunet_csm.judging.lesion_probe import LabelledPatches, draw_starts, label_file, place_features
from nnunet_csm.judging.linear_maps import LinearMaps, sets_of_series
from nnunet_csm.judging.plateau import judge
from nnunet_csm.judging.probe import Probe
from nnunet_csm.judging.token_regression import TokenRidge, cell_size
from nnunet_csm.judging.voxel_regression import RidgeBaseline
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.tokens import to_tokens
from nnunet_csm.pretext.base import Batch
from nnunet_csm.pretext.masking import Mask
from nnunet_csm.pretext.rebuilding import Rebuilt

EPOCHS = np.arange(40)
MEAN, LINEAR = 1.0, 0.6
TRIVIAL = {"mean": MEAN, "voxel-wise linear map": LINEAR}


def curve(tau: float, lowest: float = 0.4, noise: float = 0.0) -> np.ndarray:
    errors = lowest + (MEAN - lowest) * np.exp(-EPOCHS / tau)
    return errors + np.random.default_rng(0).normal(scale=noise, size=len(errors))


@pytest.mark.parametrize("noise", [0.0, 0.005])
@pytest.mark.parametrize(("tau", "trend"), [(20.0, "falling"), (3.0, "flat")])
def test_a_curve_that_still_falls_is_told_from_a_flat_one(tau: float, trend: str, noise: float) -> None:
    verdict = judge(list(curve(tau, noise=noise)), 100, TRIVIAL)
    assert verdict.trend == trend
    assert not verdict.behind


def test_flat_since_names_the_epoch_from_which_on_it_is() -> None:
    errors = curve(3.0)
    since = judge(list(errors), 100, TRIVIAL).since
    learned = MEAN - errors.min()
    assert errors[since] - errors.min() < 0.03 * learned
    assert errors[since - 2] - errors.min() > 0.02 * learned


def test_a_curve_that_turns_is_rising_since_its_lowest_epoch() -> None:
    errors = 0.4 + 0.002 * (EPOCHS - 20.0) ** 2 / 4
    verdict = judge(list(errors), 100, TRIVIAL)
    assert (verdict.trend, verdict.since) == ("rising", 20)


def test_one_bad_epoch_changes_nothing() -> None:
    errors = curve(3.0)
    errors[-2] += 0.5
    assert judge(list(errors), 100, TRIVIAL).trend == "flat"


def test_few_epochs_are_too_early_and_a_run_above_the_linear_map_is_useless_only_after_a_tenth() -> None:
    stuck = [MEAN] * 12
    assert judge(stuck[:3], 100, TRIVIAL).trend == "early"
    assert not judge(stuck[:10], 100, TRIVIAL).behind
    verdict = judge(stuck[:11], 100, TRIVIAL)
    assert verdict.behind == "voxel-wise linear map" and verdict.unlearned and verdict.trend == "flat"
    # nothing is known to compare with
    assert not judge(stuck, 12, {"mean": math.nan}).behind and not judge(stuck, 12, {"mean": math.nan}).unlearned


def test_a_run_whose_printed_error_is_below_the_maps_is_not_called_worse_than_they_are() -> None:
    falling = [1.0, 0.95, 0.9, 0.8, 0.7, 0.65, 0.55, 0.45]  # the last below the map, the median of the last three above it
    assert judge(falling, 10, {"mean": MEAN, "voxel-wise linear map": 0.5}).behind == ""
    assert judge([*falling, 0.56], 10, {"mean": MEAN, "voxel-wise linear map": 0.5}).behind == "voxel-wise linear map"


def test_a_pretraining_that_learned_nothing_is_never_praised_even_where_the_linear_maps_are_worse_than_the_mean() -> None:
    stuck, worse_maps = [MEAN] * 20, {"mean": MEAN, "voxel-wise linear map": 1.2, "linear map of tokens": 1.3}
    said = str(judge(stuck, 20, worse_maps))
    assert said.startswith("no better than the mean") and "too few steps" in said and "stopping" not in said
    between = judge([*curve(3.0, lowest=0.7)], 100, {"mean": MEAN, "voxel-wise linear map": 0.8, "linear map of tokens": 0.6})
    assert "worse than the linear map of tokens" in str(between) and "stopping" not in str(between)
    assert "stopping would cost little" in str(judge([*curve(3.0)], 100, TRIVIAL))


@pytest.mark.parametrize("errors", [curve(20.0), curve(3.0), 0.4 + 0.002 * (EPOCHS - 20.0) ** 2 / 4])
def test_epochs_from_before_there_were_probes_shift_the_others_and_are_not_judged(errors: np.ndarray) -> None:
    alone, padded = (judge([math.nan] * num + list(errors), 100, TRIVIAL) for num in (0, 7))
    assert (padded.trend, padded.since, padded.gain) == (alone.trend, alone.since + 7, alone.gain)
    assert padded.share == pytest.approx(0.47)
    for num in (0, 5):
        early = judge([math.nan] * 40 + list(errors[:num]), 100, TRIVIAL)
        assert (early.trend, early.since) == ("early", 39 + num)


@given(st.integers(0, 2**32 - 1))
def test_every_hidden_token_of_a_present_series_is_of_one_kind(seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    present = torch.rand(3, 4, generator=draws) < 0.7
    whole = torch.rand(3, 4, generator=draws) < 0.4
    hidden = (torch.rand(3, 4, 6, generator=draws) < 0.5) | whole[..., None] | ~present[..., None]
    kinds = kinds_of(hidden, present)
    assert torch.equal(kinds.sum(0), (hidden & present[..., None]).long())


def test_kinds_by_hand() -> None:
    hidden = torch.tensor([[[True, True, True], [False, True, True], [True, False, True]]])
    kinds = dict(zip(KINDS, kinds_of(hidden, torch.ones(1, 3, dtype=torch.bool))[:, 0].tolist(), strict=True))
    assert kinds[HIDDEN_WHOLE] == [[True, True, False], [False] * 3, [False] * 3]
    assert kinds[HIDDEN_WHOLE_ALONE] == [[False, False, True], [False] * 3, [False] * 3]
    assert kinds[HIDDEN_PART] == [[False] * 3, [False, True, True], [True, False, True]]


def test_the_table_holds_means_over_the_scored_voxels() -> None:
    draws = torch.Generator().manual_seed(0)
    truth, estimate = torch.rand(2, 2, 2, 3, 5, generator=draws)
    inside = torch.rand(2, 2, 3, 5, generator=draws) < 0.5
    hidden = torch.tensor([[[True] * 3, [False, True, True]]] * 2)
    kinds = kinds_of(hidden, torch.ones(2, 2, dtype=torch.bool))
    table = error_table(("a", "b"), num_voxels(inside, kinds), {"network": squared_errors(truth, estimate, inside, kinds)})
    rows = table.set_index(["left_visible", "series"])
    part = (truth - estimate).square()[:, 1, 1:][inside[:, 1, 1:]]
    assert rows.loc[(HIDDEN_PART, "b"), "voxels"] == len(part)
    assert rows.loc[(HIDDEN_PART, "all"), "network"] == pytest.approx(float(part.mean()), rel=1e-5)
    assert (HIDDEN_PART, "a") not in rows.index
    whole = (truth - estimate).square()[:, 0, 0][inside[:, 0, 0]]
    assert rows.loc[(HIDDEN_WHOLE, "a"), "network"] == pytest.approx(float(whole.mean()), rel=1e-5)


TOKEN_SIZE = (2, 4, 2)


def correlated(num: int = 400, num_series: int = 3, seed: int = 0) -> torch.Tensor:
    """Tokens (n, s, v): the last series is the first one, one voxel further along the token, and noise."""
    draws = torch.Generator().manual_seed(seed)
    tokens = torch.randn(num, num_series, math.prod(TOKEN_SIZE), generator=draws)
    tokens[:, -1] = tokens[:, 0].roll(1, dims=-1) + 0.1 * tokens[:, -1]
    return tokens + torch.arange(num_series)[:, None]


def voxelwise(tokens: torch.Tensor) -> RidgeBaseline:
    return RidgeBaseline().fit([tokens.transpose(0, 1).flatten(1)[:, :, None, None].numpy()])


def fitted(tokens: torch.Tensor, **arguments: Any) -> TokenRidge:
    ridge = TokenRidge(voxelwise(tokens), TOKEN_SIZE, **{k: v for k, v in arguments.items() if k == "max_inputs"})
    alphas = {k: v for k, v in arguments.items() if k == "alphas"}
    return ridge.fit([(part, torch.ones_like(part, dtype=torch.bool)) for part in tokens.split(100)], **alphas)


def test_the_token_map_is_the_ridge_regression_of_what_the_voxelwise_map_leaves_over() -> None:
    tokens = correlated()
    ridge = fitted(tokens, alphas=(0.3,))
    patch = tokens[:, :, None]
    visible = torch.tensor([True, True, False])[None, :, None].expand(len(tokens), -1, 1)
    linear, token_linear = ridge.estimates(patch, visible)
    weights, intercept = ridge.voxelwise.coefficients((0, 1), 2)
    by_hand = torch.einsum("nsv,s->nv", tokens[:, :2], torch.from_numpy(weights).float()) + intercept
    torch.testing.assert_close(linear[:, 2, 0], by_hand)
    inputs, left_over = tokens[:, :2].flatten(1).numpy(), (tokens[:, 2] - by_hand).numpy()
    alpha = 0.3 * len(tokens) * inputs.var(0).mean()
    expected = Ridge(alpha=alpha).fit(inputs, left_over).predict(inputs)
    np.testing.assert_allclose((token_linear - linear)[:, 2, 0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("telling", [True, False])
def test_one_huge_batch_is_held_out_in_part(telling: bool) -> None:
    tokens = correlated(5000) if telling else torch.randn(5000, 3, 16, generator=torch.Generator().manual_seed(2))
    ridge = TokenRidge(voxelwise(tokens), TOKEN_SIZE).fit([(tokens, torch.ones_like(tokens, dtype=torch.bool))])
    assert math.isinf(ridge.alpha) != telling
    # what was held out to choose is fitted to in the end
    assert ridge.num_tokens == 5000


def test_maps_of_an_earlier_fit_are_forgotten() -> None:
    noise, tokens = torch.randn(400, 3, 16, generator=torch.Generator().manual_seed(2)), correlated()
    inside = torch.ones(100, 3, 16, dtype=torch.bool)
    ridge = TokenRidge(voxelwise(tokens), TOKEN_SIZE).fit([(part, inside) for part in noise.split(100)], (0.1,))
    ridge.estimates(tokens[:, :, None], torch.ones(400, 3, 1, dtype=torch.bool))
    ridge.fit([(part, inside) for part in tokens.split(100)], (0.1, math.inf))
    assert ridge.alpha == 0.1


def test_too_few_tokens_to_hold_any_out_are_an_error() -> None:
    tokens = correlated(50)
    inside = torch.ones_like(tokens, dtype=torch.bool)
    with pytest.raises(UserError, match="too few patches hold every series"):
        TokenRidge(voxelwise(tokens), TOKEN_SIZE).fit([(tokens[:0], inside[:0]), (tokens, inside)])


def test_every_voxel_has_the_voxelwise_map_of_what_is_visible_at_its_place() -> None:
    tokens = correlated(20)
    patch = tokens.unflatten(0, (4, 5)).transpose(1, 2)
    visible = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    ridge = fitted(correlated())
    linear, _ = ridge.estimates(patch, visible)
    for b, s, place in np.ndindex(4, 3, 5):
        shown = tuple(other for other in range(3) if other != s and visible[b, other, place])
        weights, intercept = ridge.voxelwise.coefficients(shown, s)
        by_hand = torch.from_numpy(weights).float() @ patch[b, list(shown), place] + intercept
        torch.testing.assert_close(linear[b, s, place], by_hand)


def test_it_sees_what_a_voxelwise_map_cannot_and_only_what_is_visible() -> None:
    ridge, fresh = fitted(correlated()), correlated(seed=1)
    visible = torch.ones(len(fresh), 3, 1, dtype=torch.bool)
    estimates = ridge.estimates(fresh[:, :, None], visible)
    errors = [float((estimate[:, 2, 0] - fresh[:, 2]).square().mean()) for estimate in estimates]
    assert errors[1] < 0.05 < 0.9 < errors[0]
    visible[:, 0] = False
    hidden = fresh.clone()
    hidden[:, 0] = 1e6
    for one, other in zip(ridge.estimates(fresh[:, :, None], visible), ridge.estimates(hidden[:, :, None], visible), strict=True):
        assert torch.equal(one[:, 1:], other[:, 1:])


def test_where_tokens_add_nothing_the_two_maps_are_nearly_one() -> None:
    noise = torch.randn(400, 3, 16, generator=torch.Generator().manual_seed(2))
    linear, token_linear = fitted(noise).estimates(noise[:, :, None], torch.ones(400, 3, 1, dtype=torch.bool))
    assert float((linear - token_linear).square().mean()) < 0.05


def test_voxels_that_are_not_scored_are_no_targets() -> None:
    tokens = correlated()
    inside = torch.ones_like(tokens, dtype=torch.bool)
    inside[..., ::2] = False
    ridge = TokenRidge(voxelwise(tokens), TOKEN_SIZE).fit(zip(tokens.split(200), inside.split(200), strict=True), (0.1,))
    spoiled = tokens.clone()
    spoiled[:, 2, ::2] += 1000
    other = TokenRidge(ridge.voxelwise, TOKEN_SIZE).fit(zip(spoiled.split(200), inside.split(200), strict=True), (0.1,))
    visible = torch.tensor([True, True, False])[None, :, None].expand(len(tokens), -1, 1)
    one, two = (fit.estimates(tokens[:, :, None], visible)[1][:, 2] for fit in (ridge, other))
    torch.testing.assert_close(one, two)


@given(st.tuples(*[st.sampled_from([1, 2, 4, 8, 16])] * 3), st.integers(1, 600))
def test_cells_divide_the_token_and_are_no_more_than_asked_for(token_size: tuple[int, int, int], most: int) -> None:
    cell = cell_size(token_size, most)
    num_cells = math.prod(token_size) // math.prod(cell)
    assert all(t % c == 0 for t, c in zip(token_size, cell, strict=True))
    assert num_cells <= most and (num_cells * 2 > most or num_cells == math.prod(token_size))


def test_with_pooled_inputs_it_is_still_no_worse_than_the_voxelwise_map() -> None:
    ridge, fresh = fitted(correlated(), max_inputs=12), correlated(seed=1)
    assert math.prod(ridge.cell) == 4
    estimates = ridge.estimates(fresh[:, :, None], torch.ones(len(fresh), 3, 1, dtype=torch.bool))
    errors = [float((estimate[:, 2, 0] - fresh[:, 2]).square().mean()) for estimate in estimates]
    assert errors[1] < errors[0]


def test_average_precision_of_features_that_tell_and_that_do_not() -> None:
    draws = np.random.default_rng(0)
    lesion, fresh = draws.random(2000) < 0.2, draws.random(2000) < 0.2
    labels = LabelledTokens(lesion, np.arange(2000) % 4)
    noise = draws.normal(size=(2, 2000, 5))
    telling = noise + 8 * np.stack([lesion, fresh])[..., None]
    assert average_precision(telling[0], labels, telling[1], fresh) > 0.99
    assert average_precision(noise[0], labels, noise[1], fresh) == pytest.approx(0.2, abs=0.05)
    assert math.isnan(average_precision(noise[0], labels, noise[1], np.zeros(2000, dtype=bool)))
    for bad in (math.nan, math.inf):
        diverged = np.where(np.arange(5) == 2, bad, noise[0])
        assert math.isnan(average_precision(diverged, labels, noise[1], fresh))
        assert math.isnan(average_precision(noise[1], labels, diverged, fresh))


@given(st.integers(0, 2**32 - 1))
def test_every_other_patch_holds_a_labelled_voxel(seed: int) -> None:
    lesion = np.zeros((5, 20, 9), bool)
    lesion[4, 17, 0] = True
    size = (6, 8, 4)
    for number, start in enumerate(draw_starts(lesion, size, 6, seed)):
        box = tuple(slice(max(first, 0), first + edge) for first, edge in zip(start, size, strict=True))
        assert lesion[box].size == 5 * 8 * 4
        assert lesion[box].any() or number % 2 == 0


def test_labels_are_those_of_the_patches(tmp_path: Path) -> None:
    """Images that are their own labels, in patches beyond the edge too; ignored voxels are neither."""
    settings = factories.settings()
    draws, files = np.random.default_rng(0), []
    for number in range(3):
        blocks = draws.random((1, 4, 5, 4)) < 0.3
        label = blocks.repeat(2, 1).repeat(4, 2).repeat(2, 3).astype(np.int16)
        image = np.repeat(label, 3, 0).astype(np.float32) + draws.random((3, *label.shape[1:]), np.float32) * 0.1 + 0.1
        label[:, :2] = 9
        path = tmp_path / f"{number}.b2nd"
        blosc2.asarray(np.ascontiguousarray(image), urlpath=str(path), mode="w")
        blosc2.asarray(np.ascontiguousarray(label), urlpath=str(label_file(path)), mode="w")
        files.append(CaseFile(str(number), path, 3, (0, 1, 2)))
    bank = open_bank(files, torch.device("cpu"))
    patches = LabelledPatches.draw(bank, [0, 2], 5, settings, ignored=9)
    assert patches.volume.shape == (10, 3, *settings.csm.pretraining_patch_size)
    means = patches.statistics(settings)
    assert means.shape == (patches.scored.sum(), 6)
    in_image = to_shares(patches.volume, settings) > 0.5
    assert np.array_equal(in_image[patches.scored], patches.lesion[patches.scored])
    assert 0 < patches.labels.lesion.sum() < len(patches.labels.lesion)
    assert set(patches.labels.subject) == {0, 2}
    assert not patches.lesion[~patches.scored].any()


def to_shares(volume: torch.Tensor, settings: Any) -> np.ndarray:
    from nnunet_csm.model.tokens import to_tokens

    return (to_tokens(volume.float(), settings.architecture.token_size)[:, 0] > 0.9).float().mean(-1).numpy()


@pytest.mark.parametrize("joint", [False, True])
def test_features_of_a_place_do_not_depend_on_an_absent_series(joint: bool) -> None:
    settings = factories.settings(**(factories.JOINT if joint else {}))
    encoder, grid = build_encoder(settings.architecture).eval(), settings.pretraining_grid
    volume = torch.randn(2, 3, *settings.csm.pretraining_patch_size)
    volume[1, 2] = 0
    present = torch.tensor([[True] * 3, [True, True, False]])
    with torch.no_grad():
        features = place_features(encoder, volume, present, grid)
        assert features.shape == (2, math.prod(grid), encoder.width)
        if not joint:
            volume[1, 2] = 100.0
            torch.testing.assert_close(place_features(encoder, volume, present, grid), features)


def test_with_normalised_targets_maps_know_neither_mean_nor_deviation() -> None:
    plain = factories.pretext_of(factories.settings())
    normalised = factories.pretext_of(factories.settings(reconstruction={"normalize_targets": True}))
    volume = torch.randn(2, 3, *plain.setup.patch_size) * 3 + 5
    volume[0, 1] = 0
    truth = HiddenTokens.of(volume, normalised)
    rebuilt = truth.truth * truth.scale + truth.shift
    kinds = torch.ones(3, *truth.truth.shape[:3], dtype=torch.bool)
    # the network's voxels come back in the units of the loss
    assert float(truth.errors(rebuilt, kinds).sum()) < 1e-6
    present = truth.truth[truth.present]
    assert float(present.mean(-1).abs().max()) < 1e-4
    assert not truth.truth[~truth.present].any() and not truth.inside[~truth.present].any()
    assert float(HiddenTokens.of(volume, plain).truth.mean()) > 3


def masked_batch(pretext: Any, num: int) -> Batch:
    """Of each sample one series is hidden whole, others in part."""
    draws = torch.Generator().manual_seed(0)
    volume = torch.randn(num, 3, *pretext.setup.patch_size, generator=draws)
    hidden = torch.rand(num, 3, pretext.setup.num_tokens, generator=draws) < 0.5
    hidden[:, 1] = True
    # which tokens the network sees, and which enter the loss, plays no part here
    return Batch((volume,), Mask(hidden, hidden, *torch.zeros(2, num, 0, dtype=torch.long)))


def test_batches_are_scored_and_fitted_to_in_parts_of_which_the_whole_comes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = factories.settings()
    pretext, batch_size = factories.pretext_of(settings), settings.csm.pretraining.batch_size
    most = samples_at_a_time(batch_size, pretext)
    batch = masked_batch(pretext, batch_size)
    assert len(batch) > 3 * most
    (volume,), mask = batch.volumes, batch.drawn
    assert isinstance(mask, Mask)
    whole = HiddenTokens.of(volume, pretext)
    kinds = kinds_of(mask.hidden, whole.present)
    sizes: list[int] = []
    of = HiddenTokens.of

    def counted(some: torch.Tensor, of_pretext: Any) -> HiddenTokens:
        sizes.append(len(some))
        return of(some, of_pretext)

    def off_by_two(some: torch.Tensor, _: Mask) -> Rebuilt:
        tokens = to_tokens(some, settings.architecture.token_size)
        return Rebuilt(torch.full(tokens.shape[:3], 4.0), tokens + 2)

    monkeypatch.setattr(HiddenTokens, "of", counted)
    maps = fit_linear_maps(partial(always, volume), pretext, batch_size, torch.device("cpu"))
    errors = HiddenErrors(pretext, maps, torch.device("cpu"))
    errors.add(batch, off_by_two)
    found = validation_sums(batch, off_by_two, pretext)
    assert list(found) == ["loss", *LOGGED_TOKENS, *LOGGED_ERRORS]
    for total, count in found.values():
        torch.testing.assert_close(total, 4 * count)
    counts = [float(count) for _, count in found.values()]
    assert counts[0] == sum(counts[1:3]) == mask.rebuilt.sum() and sum(counts[3:]) == errors.counts.sum()
    assert max(sizes) == most
    assert torch.equal(errors.counts, num_voxels(whole.inside, kinds))
    torch.testing.assert_close(errors.sums["network"], 4 * errors.counts)
    for name, estimate in maps.estimates(whole.truth, ~mask.hidden, whole.present).items():
        torch.testing.assert_close(errors.sums[name], squared_errors(whole.truth, estimate, whole.inside, kinds))


def always(volume: torch.Tensor, _: int) -> torch.Tensor:
    return volume


def test_patches_of_two_datasets_have_the_maps_of_their_own_series() -> None:
    """No patch holds all: each dataset is estimated as if it were alone, and has a mean of its own."""
    pretext = factories.pretext_of(factories.settings())
    volume = masked_batch(pretext, 8).volumes[0].clone()
    volume[:4, 2:], volume[4:, :1] = 0, 0
    together = fit_linear_maps(partial(always, volume), pretext, 8, torch.device("cpu"))
    assert set(together.fitted) == {(0, 1), (1, 2)}
    batch = HiddenTokens.of(volume, pretext)
    visible = torch.rand(batch.truth.shape[:3], generator=torch.Generator().manual_seed(3)) < 0.5
    found = together.estimates(batch.truth, visible, batch.present)
    for rows, series in ((slice(0, 4), (0, 1)), (slice(4, 8), (1, 2))):
        of_one = volume[rows].repeat(2, 1, 1, 1, 1)
        alone = fit_linear_maps(partial(always, of_one), pretext, 8, torch.device("cpu"))
        assert set(alone.fitted) == {series}
        expected = alone.estimates(batch.truth[rows], visible[rows], batch.present[rows])
        for name, estimate in expected.items():
            torch.testing.assert_close(found[name][rows, list(series)], estimate[:, list(series)], rtol=1e-4, atol=1e-4)


def test_a_patch_with_series_of_two_sets_takes_the_larger_part_and_means_of_the_rest() -> None:
    one, two = fitted(correlated()), fitted(correlated(seed=1)[:, 1:])
    maps, tokens = LinearMaps({(0, 1, 2): one, (3, 4): two}), torch.randn(1, 6, 1, math.prod(TOKEN_SIZE))
    present = torch.tensor([[True, True, False, True, False, True]])
    found = maps.estimates(tokens, present[..., None], present)
    expected = one.estimates(tokens[:, :3], present[:, :3, None])
    assert torch.equal(found["linear"][:, :3], expected[0]) and torch.equal(found["token_linear"][:, :3], expected[1])
    # of a patch with the last two series alone, the smaller set's
    present[0, :3] = False
    assert torch.equal(
        maps.estimates(tokens, present[..., None], present)["linear"][:, 3:5],
        two.estimates(tokens[:, 3:5], present[:, 3:5, None])[0],
    )
    means = torch.tensor([*one.voxelwise.mean, *two.voxelwise.mean, 0.0])[:, None, None].float()
    for name in ("mean", "linear", "token_linear"):
        torch.testing.assert_close(found[name][0, 3:], means[3:].expand(-1, 1, tokens.shape[3]))


def test_a_set_has_maps_where_more_patches_hold_it_than_hold_more_besides() -> None:
    held: dict[tuple[bool, ...], int] = {(True, True, False): 3, (True, False, False): 2, (False, True, True): 5}
    held[False, False, False] = 9
    assert sets_of_series(held, 4) == [(1, 2), (0, 1)] and sets_of_series(held, 1) == [(1, 2)]
    held[True, True, True] = 3
    # three patches hold the first two series and nothing else, and three all
    assert sets_of_series(held, 4) == [(1, 2), (0, 1, 2)]
    held[True, True, True] = 100
    assert sets_of_series(held, 4) == [(0, 1, 2)]


def judged_by(probe: Probe) -> str:
    """What is left visible where the judged error is taken."""
    return KINDS[LOGGED_ERRORS.index(probe.judged)]


@pytest.mark.parametrize(("hidden_series", "judged"), [("rebuilt", HIDDEN_WHOLE), ("ignored", HIDDEN_PART)])
def test_a_run_is_judged_by_what_it_learns_to_rebuild(hidden_series: str, judged: str) -> None:
    settings = factories.settings(masking={"hidden_series": hidden_series})
    pretext = factories.pretext_of(settings)
    errors = HiddenErrors(pretext, None, torch.device("cpu"))
    errors.add(masked_batch(pretext, 2))
    assert judged_by(Probe(pretext, settings.csm.pretraining, errors)) == judged


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.bare_network.state_dict().items()}


def test_the_probe_changes_no_weight(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_csm.training import pretraining

    probed = make_trainer(True)
    probed.run_training()
    probed.perform_actual_validation()
    table = pd.read_csv(Path(probed.output_folder) / "probe.csv")
    assert table["epoch"].tolist() == list(range(probed.num_epochs))
    assert table["lesion_precision"].iloc[[0, -1]].notna().all()
    assert table[["hidden_whole", "hidden_whole_linear", "hidden_whole_token_linear", "hidden_whole_mean"]].notna().all(None)
    final = pd.read_csv(Path(probed.output_folder) / "validation" / "reconstruction.csv")
    assert list(final.columns) == ["left_visible", "series", "voxels", "network", "linear", "token_linear", "mean"]
    expected = weights(probed)
    shutil.rmtree(probed.output_folder)

    bare = make_trainer(True)

    def no_labels(*_: Any) -> None:
        raise UserError("none")

    monkeypatch.setattr(pretraining, "draw_linear_probe", no_labels)
    bare.run_training()
    found = weights(bare)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert pd.read_csv(Path(bare.output_folder) / "probe.csv")["lesion_precision"].isna().all()


def test_the_untrained_encoder_is_that_of_the_start_and_no_generator_moves(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(True)
    trainer.initialize()
    trainer.open_banks()
    start = {name: tensor.clone() for name, tensor in trainer.encoder.state_dict().items()}
    torch.manual_seed(3)
    state, numpy_state, mode = torch.get_rng_state(), str(np.random.get_state()), trainer.network.training
    probe = trainer.start_probe()
    precision = probe.precision(trainer.encoder, 0)
    assert torch.equal(torch.get_rng_state(), state) and str(np.random.get_state()) == numpy_state
    assert trainer.network.training == mode and trainer.encoder.training == mode
    untrained = trainer.untrained_encoder().state_dict()
    assert all(torch.equal(untrained[name], start[name]) for name in start)
    # nothing was learned yet
    assert precision == pytest.approx(probe.linear_probe.untrained)
    assert not any(parameter.grad is not None for parameter in trainer.network.parameters())


def test_a_run_that_was_killed_and_goes_on_writes_the_same_rows_but_for_time(make_trainer: Callable[..., Any]) -> None:
    whole = make_trainer(True)
    whole.run_training()
    path = Path(whole.output_folder) / "probe.csv"
    expected = pd.read_csv(path)
    shutil.rmtree(whole.output_folder)

    killed = make_trainer(True)
    step = killed.train_step

    def train_step(batch: Any) -> dict:
        if killed.current_epoch == 1:
            raise KeyboardInterrupt
        return step(batch)

    killed.train_step = train_step
    with pytest.raises(KeyboardInterrupt):
        killed.run_training()
    assert len(pd.read_csv(path)) == 1
    resumed = make_trainer(True, resume=True)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    resumed.run_training()
    columns = [name for name in expected if name != "lesion_precision"]
    pd.testing.assert_frame_equal(pd.read_csv(path)[columns], expected[columns])
    assert not list(path.parent.glob(".probe*"))


@pytest.mark.parametrize(
    "place",
    [
        "judging.comparison.fit_linear_maps",
        "judging.token_regression.TokenRidge.estimates",
        "training.pretraining.draw_linear_probe",
    ],
)
def test_without_memory_for_a_comparison_it_says_so_and_goes_on(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nand more")

    monkeypatch.setattr(f"nnunet_csm.{place}", fail)
    trainer = make_trainer(True)
    trainer.initialize()
    trainer.open_banks()
    said: list[str] = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *line, **_: said.append(" ".join(map(str, line))))
    probe = trainer.start_probe()
    missing = "No linear probe" if place.endswith("draw_linear_probe") else "No comparison with linear maps"
    assert [line for line in said if "out of memory" in line] == [f"{missing}: CUDA out of memory. Tried to allocate 2 GiB."]
    assert (probe.linear_probe is None) == place.endswith("draw_linear_probe")
    assert np.isnan(probe.baselines["linear"]).all() == (not place.endswith("draw_linear_probe"))
    # errors of the network are still judged, by the kind that they would be
    assert judged_by(probe) == HIDDEN_WHOLE


def test_without_labels_it_says_so(
    make_trainer: Callable[..., Any], planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessed = tmp_path / "nnUNet_preprocessed"
    shutil.copytree(planned_dataset.folders.preprocessed, preprocessed)
    for label in (preprocessed / planned_dataset.name).rglob("*_seg.b2nd"):
        label.unlink()
    trainer = make_trainer(True)
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    trainer.initialize()
    trainer.open_banks()
    said: list[str] = []
    monkeypatch.setattr(trainer, "print_to_log_file", lambda *line, **_: said.append(" ".join(map(str, line))))
    assert trainer.start_probe().linear_probe is None
    assert any("No linear probe" in line and "no labels" in line for line in said)
