"""DINO: what its views, loss, teacher and centre are, and that it trains, goes on and transfers as any pretext."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import csm_plans
from test_trainers import goes_on_and_transfers, weights
from torch import Tensor

from nnunet_csm.data.draws import Draws
from nnunet_csm.errors import UserError
from nnunet_csm.judging.probe import LOGGED_PRECISION, Probe
from nnunet_csm.model.encoder import Features
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext.base import Batch, setup_of
from nnunet_csm.pretext.cost import pretraining_cost
from nnunet_csm.pretext.dino import DINO, Head, HeadSettings, agreement, collapsed, deviation, mean_token
from nnunet_csm.pretext.memory import pretraining_memory
from nnunet_csm.pretext.views import NUM_GLOBAL, Views, cut_views

HEAD = {"hidden": 16, "bottleneck": 8, "num_prototypes": 12}
BLOCK: dict[str, Any] = {"name": "dino", "views": {"num_local": 3}, "head": HEAD, "drop_path": 0.2}


def plans(kind: str = "joint_vit", **changes: Any) -> dict[str, Any]:
    made = csm_plans(architecture={"encoder": {"kind": kind}}, pretext="csm" if kind == "vit" else "mae3d")
    made["configurations"]["3d_fullres"]["csm"]["pretext"] = BLOCK | changes
    return made


def build(kind: str = "joint_vit", **changes: Any) -> DINO:
    torch.manual_seed(0)
    configuration = read_configuration(plans(kind, **changes), "3d_fullres", "plans.json")
    pretext, setup = setup_of(configuration)
    made = pretext(setup)
    assert isinstance(made, DINO)
    return made


def batch_of(pretext: DINO, num: int = 4, training: bool = True, seed: int = 3) -> Batch:
    """Samples of which the second lacks a series."""
    volume = torch.randn(num, 3, *pretext.setup.patch_size, generator=torch.Generator().manual_seed(seed))
    volume[1, 2] = 0
    present = volume.flatten(2).any(2)
    return Batch((volume,), pretext.draw(Draws(seed, torch.arange(num)), present, 0, (volume,), training))


def without_noise(batch: Batch) -> Batch:
    assert isinstance(batch.drawn, Views)
    return replace(batch, drawn=replace(batch.drawn, noise=torch.zeros_like(batch.drawn.noise)))


# --- loss -----------------------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_18_pairs() -> None:
    random = torch.Generator().manual_seed(0)
    targets, told = torch.randn(3, 2, 7, generator=random).softmax(-1), torch.randn(3, 10, 7, generator=random)
    pairs = [
        -(targets[:, teacher] * told[:, student].log_softmax(-1)).sum(-1)
        for teacher in range(2)
        for student in range(10)
        if student != teacher
    ]
    assert len(pairs) == 18
    torch.testing.assert_close(agreement(targets, told), torch.stack(pairs).mean(0))


@pytest.mark.parametrize("kind", ["joint_vit", "vit"])
def test_the_loss_is_that_of_views_one_by_one(kind: str) -> None:
    pretext = build(kind).eval()
    pretext.centre.normal_()
    batch = batch_of(pretext, training=False)
    (volume,), drawn = batch.volumes, batch.drawn
    present = volume.flatten(2).any(2)

    def outputs(encoder: Any, head: Head, view: Tensor) -> Tensor:
        features = encoder.levels(view, present)[-1]
        mean = torch.stack([tokens[there].mean((0, 1)) for tokens, there in zip(features.tokens, features.present, strict=True)])
        return head(mean[:, None])[:, 0]

    assert isinstance(drawn, Views)
    large, small = pretext.views(volume, drawn)
    assert large.shape == (4, NUM_GLOBAL, 3, 4, 12, 10) and small.shape == (4, 3, 3, 4, 8, 4)
    views = [*large.unbind(1), *small.unbind(1)]
    expected = torch.zeros(4)
    for one in range(2):
        target = ((outputs(pretext.encoder, pretext.teacher_head, views[one]) - pretext.centre) / 0.04).softmax(-1)
        for other in range(5):
            if other != one:
                told = (outputs(pretext.student, pretext.head, views[other]) / 0.1).log_softmax(-1)
                expected = expected - (target * told).sum(-1) / 8
    torch.testing.assert_close(pretext(*batch.args), expected.sum(), rtol=1e-4, atol=1e-4)


def test_parts_of_a_batch_add_up() -> None:
    pretext = build(drop_path=0.0)
    batch = without_noise(batch_of(pretext))
    whole = pretext(*batch.args)
    told = pretext.told.clone()
    pretext.told.zero_()
    torch.testing.assert_close(pretext(*batch[:1].args) + pretext(*batch[1:].args), whole)
    torch.testing.assert_close(pretext.told, told)
    assert pretext.weight(batch.drawn) == 4


def test_prototypes_have_length_one_and_wait() -> None:
    head = Head(6, HeadSettings(**HEAD))
    features = torch.randn(2, 3, 6)
    scores = head(features)
    assert scores.abs().max() <= 1 + 1e-6
    with torch.no_grad():
        head.prototypes.mul_(3)
    torch.testing.assert_close(head(features), scores)
    for learns in (0.0, 1.0):
        head.learns.fill_(learns)
        head.zero_grad()
        head(features).square().sum().backward()
        assert head.prototypes.grad is not None and bool(head.prototypes.grad.any()) == bool(learns)
        assert all(p.grad is not None and p.grad.any() for p in head.layers.parameters())


# --- views ----------------------------------------------------------------------------------------------------------------------


def test_a_view_of_everything_is_the_patch() -> None:
    volume, ones = torch.randn(2, 3, 4, 6, 5), torch.ones(2, 1, 3)
    size = (4, 6, 5)
    torch.testing.assert_close(cut_views(volume, ones, 0 * ones, size)[:, 0], volume, rtol=1e-4, atol=1e-5)
    for axis in range(3):
        flipped = ones.clone()
        flipped[..., axis] = -1
        seen = cut_views(volume, flipped, 0 * ones, size)[:, 0]
        torch.testing.assert_close(seen, volume.flip(2 + axis), rtol=1e-4, atol=1e-5)


def test_a_view_of_a_part_is_that_part() -> None:
    volume = torch.randn(1, 2, 4, 8, 6)
    # of two views of a sample, the second: the last half of y, the first of x
    half_edge = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 0.5, 0.5]]])
    centre = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 0.5, -0.5]]])
    seen = cut_views(volume, half_edge, centre, (4, 4, 3))
    torch.testing.assert_close(seen[:, 1], volume[:, :, :, 4:, :3], rtol=1e-4, atol=1e-5)


def test_views_stay_within_the_patch_and_have_the_shares_that_are_asked_for() -> None:
    pretext = build()
    drawn = batch_of(pretext, 500).drawn
    assert isinstance(drawn, Views)
    assert (drawn.half_edge.abs() + drawn.centre.abs() <= 1 + 1e-6).all()
    share = drawn.half_edge.abs().prod(-1)
    for part, low, high in ((share[:, :2], 0.4, 1.0), (share[:, 2:], 0.05, 0.4)):
        assert low - 1e-6 <= part.min() < low + 0.02 and high - 0.02 < part.max() <= high + 1e-6
    flips = (drawn.half_edge < 0).float().mean((0, 1))
    assert ((flips - 0.5).abs() < 0.05).all()
    # contrast or noise, never both; smoothing by the kind of view
    contrast, noisy = drawn.factor != 1, drawn.noise > 0
    assert not (contrast & noisy).any() and not (drawn.shift != 0)[noisy].any()
    for found in (contrast, noisy):
        assert abs(found.float().mean() - 0.4) < 0.03
    smoothed = (drawn.smoothing != 0).float().mean((0, 2))
    torch.testing.assert_close(smoothed, torch.tensor([1.0, 0.1, 0.5, 0.5, 0.5]), rtol=0, atol=0.06)
    # each series by itself
    assert (drawn.smoothing[:, 0, 0] != drawn.smoothing[:, 0, 1]).any()


def test_absent_series_stay_zero_in_all_views() -> None:
    pretext = build()
    batch = batch_of(pretext)
    drawn = batch.drawn
    assert isinstance(drawn, Views)
    everything = replace(drawn, noise=torch.ones_like(drawn.noise), shift=torch.ones_like(drawn.shift))
    for views in pretext.views(batch.volumes[0], everything):
        assert not views[1, :, 2].any() and views[1, :, :2].flatten(2).std(2).min() > 0.5
        assert views[0].flatten(2).any(2).all()


def test_draws_of_a_sample_do_not_depend_on_the_others() -> None:
    pretext, volume = build(), torch.randn(4, 3, 4, 12, 10)
    present = torch.ones(4, 3, dtype=torch.bool)
    whole = pretext.draw(Draws(5, torch.arange(4)), present, 0, (volume,), True)
    part = pretext.draw(Draws(5, torch.arange(2, 4)), present[2:], 0, (volume[2:],), True)
    assert all(one[2:].equal(two) for one, two in zip(whole.tensors, part.tensors, strict=True))


def test_validation_has_no_noise_and_is_the_same_every_time() -> None:
    pretext = build().eval()
    batch = batch_of(pretext, training=False)
    assert isinstance(batch.drawn, Views) and not batch.drawn.noise.any() and batch_of(pretext).drawn.tensors[4].any()
    first, second = pretext.validate(batch), pretext.validate(batch)
    assert first.keys() == {"loss", *DINO.parts}
    assert all(torch.equal(first[name][0], second[name][0]) for name in first)


# --- teacher --------------------------------------------------------------------------------------------------------------------


def test_the_teacher_starts_as_the_student_and_has_no_gradient() -> None:
    pretext = build()
    encoder, head, student, students_head = pretext.encoder, pretext.teacher_head, pretext.student, pretext.head
    for mine, others in ((encoder, student), (head, students_head)):
        assert all(one.equal(two) for one, two in zip(mine.parameters(), others.parameters(), strict=True))
    pretext(*batch_of(pretext).args).backward()
    assert all(p.grad is None and not p.requires_grad for part in (encoder, head) for p in part.parameters())
    assert all(p.grad is not None for part in (student, students_head) for p in part.parameters())
    # only the student leaves branches out
    names = {name.rpartition(".")[0] for name, module in pretext.named_modules() if type(module).__name__ == "DropPath"}
    assert names and all(name.startswith("student.") for name in names)


def test_teacher_centre_and_temperature_follow_their_formulas() -> None:
    pretext = build(momentum=0.9, teacher_temperature=[0.04, 0.07], temperature_warmup=0.5, frozen_share=0.25)
    before = copy.deepcopy(pretext)
    with torch.no_grad():
        for parameter in (*pretext.student.parameters(), *pretext.head.parameters()):
            parameter.add_(torch.randn_like(parameter))
    batch = batch_of(pretext)
    _, outputs, _ = pretext.compared(*batch.args)
    pretext.told.zero_()
    pretext(*batch.args)
    # what noise changes in the outputs is little
    mean = pretext.told[:-1] / pretext.told[-1]
    assert pretext.told[-1] == 8 and torch.allclose(mean, outputs.mean((0, 1)), atol=0.05)
    assert pretext.head.learns == 0 and float(pretext.temperature) == pytest.approx(0.04)
    pretext.after_step(0.25)
    momentum = 1 - 0.1 * (1 + math.cos(math.pi * 0.25)) / 2
    for name, found in pretext.encoder.named_parameters():
        old, student = before.encoder.get_parameter(name), pretext.student.get_parameter(name)
        torch.testing.assert_close(found, momentum * old + (1 - momentum) * student)
    torch.testing.assert_close(pretext.centre, 0.1 * mean)
    assert not pretext.told.any() and float(pretext.temperature) == pytest.approx(0.055) and pretext.head.learns == 1
    # a step at the end moves nothing but the centre
    kept = copy.deepcopy(pretext.encoder.state_dict())
    pretext.after_step(1.0)
    assert all(torch.allclose(tensor, kept[name]) for name, tensor in pretext.encoder.state_dict().items())
    assert float(pretext.temperature) == pytest.approx(0.07)


def test_validation_does_not_move_the_centre() -> None:
    pretext, batch = build(), batch_of(build())
    for training in (True, False):
        pretext.train(training).validate(batch)
        assert not pretext.told.any()
    pretext.eval()(*batch.args)
    assert not pretext.told.any() and not pretext.centre.any()
    pretext.train()(*batch.args)
    assert pretext.told.any()


# --- collapse -------------------------------------------------------------------------------------------------------------------


def test_constant_features_are_a_collapse() -> None:
    one, many = torch.ones(6, 2, 4), torch.randn(6, 2, 400)
    assert deviation(one) == 0 and float(deviation(many)) == pytest.approx(1.0, abs=0.1) and deviation(many[:1]) == 0
    most = math.log(4096)
    assert collapsed(0.5 * most, 0.0, 4096)
    assert not collapsed(0.5 * most, 0.3, 4096) and not collapsed(0.5 * most, float("nan"), 4096)
    # an even distribution, and one prototype, whatever is shown
    assert collapsed(most, 0.3, 4096) and collapsed(0.0, 0.3, 4096)


def test_a_collapse_is_told_in_the_log() -> None:
    pretext = build().eval()
    probe = Probe(pretext, read_configuration(plans(), "3d_fullres", "plans.json").csm.pretraining, None)

    def said() -> str:
        found = {name: float(total / num) for name, (total, num) in pretext.validate(batch_of(pretext, 4, False)).items()}
        log = {name: [value] for name, value in found.items()} | {"val_losses": [found["loss"]], LOGGED_PRECISION: [float("nan")]}
        return probe.said(log)

    assert "WARNING" not in said()
    torch.nn.init.zeros_(pretext.encoder.get_parameter("norm.weight"))
    torch.nn.init.ones_(pretext.encoder.get_parameter("norm.bias"))
    assert "WARNING: the teacher tells samples no longer apart" in said()


def test_features_of_absent_series_do_not_count() -> None:
    tokens, present = torch.randn(2, 3, 5, 4), torch.tensor([[True, True, True], [True, False, True]])
    found = mean_token(Features(tokens, present, (1, 1, 5), None))
    torch.testing.assert_close(found, torch.stack([tokens[0].mean((0, 1)), tokens[1, ::2].mean((0, 1))]))


# --- settings, memory, training -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"views": {"num_local": 0}}, "views.num_local is 0, expected 1 <= num_local"),
        ({"views": {"local_grid": [2, 0, 2]}}, r"views.local_grid\[1\] is 0, expected 1 <= local_grid"),
        ({"views": {"global_scale": [0.5, 0.4]}}, "views.global_scale is 0.5, 0.4"),
        ({"views": {"smoothed": [1.0, 0.1, 1.5]}}, r"views.smoothed\[2\] is 1.5, expected 0 <= smoothed"),
        ({"views": {"noise": -0.1}}, "views.noise is -0.1, expected 0 <= noise"),
        ({"head": HEAD | {"num_prototypes": 1}}, "head.num_prototypes is 1, expected 2 <= num_prototypes"),
        ({"momentum": 1.1}, "momentum is 1.1"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"teacher_temperature": [0.0, 0.04]}, r"teacher_temperature\[0\] is 0.0, expected 0 < teacher_temperature"),
        ({"masking": {}}, "unknown masking"),
    ],
)
def test_settings_that_cannot_be_are_told(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        build(**changes)


def test_grids_follow_the_patch_unless_they_are_set() -> None:
    assert build().sizes == ((4, 12, 10), (4, 8, 4))
    assert build(views={"global_grid": [2, 2, 4], "local_grid": [1, 2, 1]}).sizes == ((4, 8, 8), (2, 8, 2))


def test_the_plan_tells_and_tokens_of_all_views_are_counted() -> None:
    joint, apart = build(), build("vit")
    lines = {what: f"{value}; {why}" for what, value, why in DINO.described(joint.setup, {3: 4})}
    assert "2 of 2 x 3 x 5 and 3 of 2 x 2 x 2 tokens" in lines["views"] and "12; " in lines["prototypes"]
    present = torch.tensor([[True, True, True], [True, False, False]])
    assert joint.seen_tokens(present) == 4 * 30 + 3 * 8 and apart.seen_tokens(present) == 2 * joint.seen_tokens(present)


def test_memory_and_cost_are_predicted() -> None:
    setup = build().setup
    small, large = (pretraining_memory(DINO, setup, num) for num in (2, 8))
    assert small.states == large.states and 0 < small.activations < large.activations
    settings = read_configuration(plans(), "3d_fullres", "plans.json")
    assert pretraining_cost(settings, torch.ones(2, 3, dtype=torch.bool)).operations_per_crop > 0


def make_joint(entry: dict[str, Any]) -> None:
    entry["architecture"]["arch_kwargs"]["encoder"] = {"kind": "joint_vit"}


def test_it_trains_goes_on_after_a_kill_and_transfers(make_trainer: Callable[..., Any]) -> None:
    given: dict[str, Any] = {"pretext": BLOCK, "change": make_joint}
    whole = make_trainer(True, **given)
    whole.run_training()
    expected = weights(whole.output_folder)
    log = whole.logger.local_logger.my_fantastic_logging
    assert all(len(log[name]) == whole.num_epochs for name in DINO.parts) and min(log["feature_deviation"]) > 0
    optimized = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for part in (whole.encoder, whole.pretext.teacher_head) for p in part.parameters()}
    assert expected["centre"].any() and not expected["encoder.norm.bias"].equal(expected["student.norm.bias"])
    goes_on_and_transfers(make_trainer, whole, **given)
