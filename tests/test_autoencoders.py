"""Autoencoders: what their bottlenecks and losses are, how codes move, and that they train, go on and transfer as any pretext."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import PATCH_SIZE, base_plans, csm_plans, facts_of
from scipy.stats import entropy
from test_learning import SPEC, volumes
from test_trainers import goes_on_and_transfers
from torch.distributions import Normal, kl_divergence

from nnunet_csm.data.draws import Draws
from nnunet_csm.data.intensities import foreground, percentile_range, scaled
from nnunet_csm.errors import UserError
from nnunet_csm.planning.facts import Wishes
from nnunet_csm.planning.planner import plan
from nnunet_csm.plans import Architecture, EncoderSettings, read_configuration
from nnunet_csm.pretext.autoencoders import VAE, VQVAE, Autoencoder, Candidates, kl_from_standard_normal, nearest, perplexity
from nnunet_csm.pretext.base import NOTHING_HIDDEN, Batch, Setup, pretext_class, setup_of
from nnunet_csm.pretext.cost import pretraining_cost
from nnunet_csm.pretext.memory import pretraining_memory

NAMES = ("ae", "vae", "vqvae")
NETWORK: dict[str, Any] = {"width": 16, "depth": 1, "decoder": "unet", "encoder": {"kind": "residual_unet", "base": 4}}
# a small codebook, so that codes are used
SMALL: dict[str, dict[str, Any]] = {"ae": {}, "vae": {}, "vqvae": {"num_codes": 6, "code_width": 5, "idle_steps": 3}}


def plans(name: str = "ae", **changes: Any) -> dict[str, Any]:
    made = csm_plans()
    entry = made["configurations"]["3d_fullres"]
    entry["architecture"]["arch_kwargs"] |= NETWORK
    entry["csm"]["pretext"] = {"name": name} | SMALL[name] | changes
    return made


def build(name: str = "ae", **changes: Any) -> Any:
    torch.manual_seed(0)
    pretext, setup = setup_of(read_configuration(plans(name, **changes), "3d_fullres", "plans.json"))
    return pretext(setup)


def batch_of(pretext: Autoencoder, num: int = 4, seed: int = 3) -> Batch:
    """Samples of which the second lacks a series."""
    num_series = pretext.setup.num_series
    volume = torch.randn(num, num_series, *pretext.setup.patch_size, generator=torch.Generator().manual_seed(seed))
    volume[1:2, 2:] = 0
    present = volume.flatten(2).any(2)
    return Batch((volume,), pretext.draw(Draws(seed, torch.arange(num)), present, 0, (volume,), True))


# --- intensities ----------------------------------------------------------------------------------------------------------------


def test_intensities_are_scaled_by_percentiles_of_the_foreground() -> None:
    volume = torch.randn(2, 3, *PATCH_SIZE)
    volume[0, 0, :2] = 0
    volume[1, 2] = 0
    volume[1, 1] = 2.5
    low, high = percentile_range(volume)
    for sample, series in ((0, 0), (0, 1), (1, 0)):
        inside = volume[sample, series][foreground(volume)[sample, series]].numpy()
        found = low[sample, series].item(), high[sample, series].item()
        assert found == pytest.approx(np.percentile(inside, (0.5, 99.5)), rel=1e-5)
    shown = scaled(volume, low, high)
    assert shown.min() == 0 and shown.max() == 1 and torch.isfinite(shown).all()
    # an empty and a constant series have no range of their own
    assert ((high - low)[1, 1:] == 1).all()
    torch.testing.assert_close(percentile_range(volume.half())[0], low, rtol=0, atol=2e-3)


# --- loss -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_that_of_present_series(name: str) -> None:
    pretext = build(name).eval()
    batch = batch_of(pretext)
    (volume,) = batch.volumes
    image, terms = pretext.image(volume, batch.drawn)
    assert image.shape == volume.shape
    target = scaled(volume, *percentile_range(volume))
    expected = (image - target).square().flatten(2).mean(2)
    expected = torch.stack([of_sample[: 2 if number == 1 else 3].mean() for number, of_sample in enumerate(expected)])
    torch.testing.assert_close(pretext.terms(*batch.args)["error"], expected)
    weight = {"ae": {}, "vae": {"kl": 1e-6}, "vqvae": {"commitment": 0.25}}[name]
    assert terms.keys() == weight.keys()
    total = expected + sum(weight[term] * values for term, values in terms.items())
    torch.testing.assert_close(pretext(*batch.args), total.sum())
    assert pretext.weight(batch.drawn) == 4


def test_what_comes_out_for_an_absent_series_has_no_loss() -> None:
    pretext = build()
    batch = batch_of(pretext)[1:2]
    pretext(*batch.args).backward()
    gradient = pretext.head[-1].weight.grad
    assert gradient[:2].any() and not gradient[2].any()
    nothing = replace(batch, volumes=(torch.zeros_like(batch.volumes[0]),))
    drawn = pretext.draw(Draws(0, torch.arange(1)), torch.ones(1, 3, dtype=torch.bool), 0, nothing.volumes, True)
    assert pretext(nothing.volumes[0], drawn) == 0


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_batch_add_up_and_draws_of_a_sample_are_its_own(name: str) -> None:
    pretext = build(name).eval()
    batch = batch_of(pretext)
    torch.testing.assert_close(pretext(*batch[:1].args) + pretext(*batch[1:].args), pretext(*batch.args))
    again = pretext.draw(Draws(3, torch.arange(1, 4)), torch.ones(3, 3, dtype=torch.bool), 0, (batch.volumes[0][1:],), True)
    assert all(one.equal(two) for one, two in zip(again.tensors, batch[1:].drawn.tensors, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_one_series_and_thin_axes_do(name: str) -> None:
    network = Architecture(
        ("T1w",), (0,), (2, 8, 8), 16, 1, 2, 4, 0.0, decoder="unet", encoder=EncoderSettings("residual_unet", base=4)
    )
    cls = pretext_class(name, "")
    pretext: Any = cls(Setup(network, cls.Settings(**SMALL[name]), (4, 24, 16)))
    batch = batch_of(pretext, 2)
    pretext(*batch.args).backward()
    # everything learns
    assert all(parameter.grad is not None for parameter in pretext.parameters())
    assert pretext.seen_tokens(torch.ones(5, 1, dtype=torch.bool)) == 12


def test_the_shipped_ones_are_equally_large() -> None:
    sizes = []
    for name in NAMES:
        made, decisions = plan(base_plans(), "3d_fullres", facts_of(), "p", Wishes(name))
        pretext, setup = setup_of(read_configuration(made, "3d_fullres", "p.json"))
        with torch.device("meta"):
            sizes.append(sum(parameter.numel() for parameter in pretext(setup).parameters()))
        assert any(decision.name == "bottleneck" and pretext.__name__ in decision.value for decision in decisions)
        # the same patches and steps
        assert setup.patch_size == (96, 96, 96) and setup.architecture.token_size == (16, 16, 16)
    assert max(sizes) < 1.1 * min(sizes)


@pytest.mark.parametrize("name", NAMES)
def test_bottlenecks_are_where_they_should_be(name: str) -> None:
    pretext = build(name)
    seen: list[torch.Tensor] = []
    pretext.from_latent.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    pretext(*batch_of(pretext, 2).args)
    # tokens are 2 x 4 x 2 voxels, of 4 x 12 x 10
    assert seen[0].shape[1:] == ((5, 4, 6, 10) if name == "vqvae" else (8, 2, 3, 5))


# --- the variational one --------------------------------------------------------------------------------------------------------


def test_the_divergence_is_that_of_torchs_distributions() -> None:
    mean, log_variance = torch.randn(3, 5), torch.randn(3, 5)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(kl_from_standard_normal(mean, log_variance), expected)
    pretext = build("vae")
    told = torch.randn(2, 16, 2, 3, 5)
    _, terms = pretext.bottleneck(told, None)
    of_latents = kl_from_standard_normal(*told.chunk(2, 1)).flatten(1).sum(1)
    torch.testing.assert_close(terms["kl"], of_latents / math.prod(PATCH_SIZE))


def test_log_variances_are_clamped() -> None:
    pretext = build("vae")
    told = torch.zeros(1, 16, 2, 3, 5)
    told[:, 8:12], told[:, 12:] = 1e6, -1e6
    told.requires_grad_()
    kept, terms = pretext.bottleneck(told, None)
    assert torch.isfinite(kept).all() and torch.isfinite(terms["kl"]).all()
    # beyond 20 and below -30
    assert float(kept[:, :4].std()) == pytest.approx(math.exp(10), rel=0.3)
    assert float(kept[:, 4:].std()) < 1e-5
    terms["kl"].sum().backward()
    assert told.grad is not None and not told.grad[:, 8:].any()


def test_it_is_the_mean_that_is_looked_at() -> None:
    pretext = build("vae")
    batch = batch_of(pretext)
    one, two = (pretext.image(*batch.args)[0] for _ in range(2))
    assert not one.equal(two)
    pretext.eval()
    one, two = (pretext.image(*batch.args)[0] for _ in range(2))
    assert one.equal(two)
    told = torch.randn(2, 16, 2, 3, 5)
    assert pretext.bottleneck(told, None)[0].equal(told[:, :8])
    found = pretext.validate(batch)
    assert found.keys() == {"loss", *VAE.parts} and found["loss"][0] == pretext(*batch.args)


# --- the codebook ---------------------------------------------------------------------------------------------------------------


def test_the_nearest_code_is_found() -> None:
    vectors, codes = torch.randn(2, 7, 5), torch.randn(6, 5)
    assert nearest(vectors, codes).equal(torch.cdist(vectors, codes[None]).argmin(-1))


def test_perplexity_counts_codes() -> None:
    assert float(perplexity(torch.full((8,), 3.0))) == pytest.approx(8)
    assert float(perplexity(torch.eye(8)[2])) == pytest.approx(1)
    uses = torch.rand(8)
    assert float(perplexity(uses)) == pytest.approx(math.exp(entropy(uses.numpy())))


def test_the_gradient_goes_straight_through() -> None:
    pretext = build("vqvae", commitment=0.0)
    told = torch.randn(2, 5, 4, 6, 10, requires_grad=True)
    kept, _ = pretext.bottleneck(told, batch_of(pretext, 2).drawn)
    # what is given on is codes, each that of its place
    torch.testing.assert_close(kept[1, :, 2, 3, 4], pretext.codes[nearest(told[1:, :, 2, 3, 4][None], pretext.codes)[0, 0]])
    weight = torch.randn_like(kept)
    (kept * weight).sum().backward()
    assert told.grad is not None and told.grad.equal(weight)


def test_the_commitment_draws_what_is_told_to_its_codes_and_codes_have_no_gradient() -> None:
    pretext = build("vqvae")
    told = torch.randn(2, 5, 4, 6, 10, requires_grad=True)
    _, terms = pretext.bottleneck(told, batch_of(pretext, 2).drawn)
    vectors = told.detach().flatten(2).mT
    distance = vectors - pretext.codes[nearest(vectors, pretext.codes)]
    torch.testing.assert_close(terms["commitment"], distance.square().mean((1, 2)))
    terms["commitment"].sum().backward()
    assert told.grad is not None
    torch.testing.assert_close(told.grad.flatten(2).mT, 2 * distance / distance[0].numel())
    assert not pretext.codes.requires_grad


def test_codes_are_running_means() -> None:
    pretext = build("vqvae", idle_steps=9)
    before = copy.deepcopy(pretext)
    told = torch.randn(4, 5, 4, 6, 10)
    pretext.bottleneck(told, batch_of(pretext).drawn)
    vectors = told.flatten(2).mT.flatten(0, 1)
    numbers = nearest(vectors[None], before.codes)[0]
    pretext.after_step(0.1)
    uses = torch.stack([0.99 + 0.01 * (numbers == code).sum() for code in range(6)])
    totals = torch.stack([0.99 * before.codes[code] + 0.01 * vectors[numbers == code].sum(0) for code in range(6)])
    smoothed = (uses + 1e-5) / (uses.sum() + 6e-5) * uses.sum()
    torch.testing.assert_close(pretext.uses, uses)
    torch.testing.assert_close(pretext.codes, totals / smoothed[:, None])
    assert not pretext.counted.any() and not pretext.summed.any() and (pretext.best_rank == -1).all()


def test_parts_of_a_batch_move_codes_as_the_whole_does() -> None:
    whole, parts = build("vqvae"), build("vqvae")
    batch = batch_of(whole)
    whole(*batch.args)
    for part in (batch[:1], batch[1:3], batch[3:]):
        parts(*part.args)
    for name in ("counted", "summed", "best_rank", "candidates"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_codes_that_nobody_uses_become_what_is_kept_somewhere_in_the_batch() -> None:
    pretext = build("vqvae")
    pretext.codes[2:] = 1e4
    pretext.totals.copy_(pretext.codes)
    told = torch.randn(4, 5, 4, 6, 10)
    vectors = told.flatten(2).mT
    for step in range(3):
        drawn = pretext.draw(Draws(step, torch.arange(4)), torch.ones(4, 3, dtype=torch.bool), 0, (told,), True)
        assert isinstance(drawn, Candidates)
        assert (pretext.codes[2:] > 1e3).all()
        pretext.bottleneck(told, drawn)
        pretext.after_step(0.0)
    # the sample with the highest rank, at its place
    samples = drawn.rank.argmax(0)
    places = (drawn.place[samples, torch.arange(6)] * vectors.shape[1]).long()
    assert pretext.codes[2:].equal(vectors[samples, places][2:]) and (pretext.codes[:2].abs() < 5).all()
    assert pretext.totals[2:].equal(pretext.codes[2:]) and (pretext.uses[2:] == 1).all() and not pretext.idle.any()
    assert len({tuple(code) for code in pretext.codes.tolist()}) == 6


def test_validation_does_not_move_the_codebook() -> None:
    pretext = build("vqvae").eval()
    batch, before = batch_of(pretext), copy.deepcopy(pretext.state_dict())
    found = pretext.validate(batch)
    assert found.keys() == {"loss", *VQVAE.parts}
    assert float(found["perplexity"][0] / found["perplexity"][1]) == pytest.approx(6)
    assert not pretext.counted.any() and (pretext.best_rank == -1).all()
    assert all(tensor.equal(before[name]) for name, tensor in pretext.state_dict().items())


# --- scoring, pictures, settings, training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_everything_is_rebuilt_in_the_units_of_the_input(name: str, tmp_path: Path) -> None:
    pretext = build(name).eval()
    batch = batch_of(pretext)[1:2]
    ((given, (image, where)),) = pretext.rebuilt(batch).items()
    assert given == NOTHING_HIDDEN and where[:, :2].all() and not where[:, 2].any()
    bounds = percentile_range(batch.volumes[0])
    error = (pretext.image(*batch.args)[0] - (image - bounds[0]) / (bounds[1] - bounds[0])).abs().max()
    assert error < 1e-4
    pretext.picture(tmp_path / "pictures" / "a.png", batch, "a patch")
    assert (tmp_path / "pictures" / "a.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("ae", {"latent_channels": 0}, "latent_channels is 0, expected 1 <= latent_channels"),
        ("vae", {"kl_weight": -1e-6}, "kl_weight is -1e-06, expected 0 <= kl_weight"),
        ("vqvae", {"num_codes": 0}, "num_codes is 0"),
        ("vqvae", {"decay": 1.0}, "decay is 1.0, expected 0 <= decay < 1"),
        ("ae", {"masking": {}}, "unknown masking"),
    ],
)
def test_settings_that_cannot_be_are_told(name: str, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(name, **changes)


def test_another_encoder_is_refused() -> None:
    made = csm_plans()
    made["configurations"]["3d_fullres"]["csm"]["pretext"] = {"name": "ae"}
    with pytest.raises(UserError, match="set it to 'residual_unet'"):
        setup_of(read_configuration(made, "3d_fullres", "plans.json"))


@pytest.mark.parametrize("name", NAMES)
def test_memory_and_cost_are_predicted(name: str) -> None:
    configuration = read_configuration(plans(name), "3d_fullres", "plans.json")
    cls, setup = setup_of(configuration)
    small, large = (pretraining_memory(cls, setup, num) for num in (2, 8))
    assert small.states == large.states and 0 < small.activations < large.activations
    assert pretraining_cost(configuration, torch.ones(2, 3, dtype=torch.bool)).operations_per_crop > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_few_steps_rebuild_phantoms_that_were_never_seen_better(name: str) -> None:
    torch.manual_seed(0)
    network = Architecture(
        SPEC.series, (0, 1, 2), (4, 8, 8), 32, 1, 4, 4, 0.0, decoder="unet", encoder=EncoderSettings("residual_unet", base=8)
    )
    cls = pretext_class(name, "")
    pretext: Any = cls(Setup(network, cls.Settings(), SPEC.shape))
    optimizer = torch.optim.AdamW(pretext.parameters(), lr=3e-3)
    present = torch.ones(4, 3, dtype=torch.bool)

    def batch(subjects: range, step: int) -> Batch:
        volume = volumes(subjects)
        return Batch((volume,), pretext.draw(Draws(step, torch.arange(4)), present, 0, (volume,), True))

    training, others = batch(range(4), 0), batch(range(4, 8), 0)

    def validation() -> float:
        pretext.eval()
        with torch.no_grad():
            total, num = pretext.validate(others)["loss"]
        pretext.train()
        return float(total / num)

    before = validation()
    for step in range(40):
        optimizer.zero_grad()
        drawn = pretext.draw(Draws(step, torch.arange(4)), present, 0, training.volumes, True)
        (pretext(*training.volumes, drawn) / 4).backward()
        optimizer.step()
        pretext.after_step(step / 40)
    assert validation() < 0.5 * before


@pytest.mark.parametrize("name", ["ae", "vae", "vqvae"])
def test_it_trains_goes_on_after_a_kill_and_transfers(make_trainer: Callable[..., Any], name: str) -> None:
    def change(entry: dict[str, Any]) -> None:
        entry["architecture"]["arch_kwargs"] |= NETWORK

    given: dict[str, Any] = {"pretext": {"name": name} | SMALL[name], "change": change}
    whole = make_trainer(True, **given)
    whole.run_training()
    log = whole.logger.local_logger.my_fantastic_logging
    assert all(len(log[part]) == whole.num_epochs for part in whole.pretext.parts)
    assert list(Path(whole.output_folder).glob("reconstructions/*.png"))
    goes_on_and_transfers(make_trainer, whole, **given)
