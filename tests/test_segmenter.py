"""The segmenter knows series by name, sees nothing of absent ones, and stays finite on whatever tile nnU-Net gives it."""

import io
import math
from typing import Any

import pytest
import torch
from factories import DATASET_JSON, JOINT_NETWORK, PATCH_SIZE, SERIES, TINY, TOKEN_SIZE, csm_plans
from factories import settings as read_settings
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_csm.model.fusion import MeanFusion, ProjectedFusion, mean_over_present
from nnunet_csm.model.planned import series_present
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.model.tokens import level_strides
from nnunet_csm.training.optimization import build_optimizer, build_scheduler

NUM_CLASSES = 4
OF_DATASET: dict[str, Any] = {"series": SERIES, "channels": (0, 1, 2), "token_size": TOKEN_SIZE}
LIGHT: dict[str, Any] = {"decoder": "light", "fusion": "projected"}


def build(series=SERIES, token_size=TOKEN_SIZE, channels=None, input_channels=None, **changes):
    torch.manual_seed(0)
    channels = tuple(range(len(series)) if channels is None else channels)
    of_dataset = {"series": series, "channels": channels, "token_size": token_size}
    return CSMSegmenter(input_channels or len(series), NUM_CLASSES, **(TINY | of_dataset | changes)).eval()


def random_volume(b=2, absent=(), patch_size=PATCH_SIZE, s=3):
    volume = torch.randn(b, s, *patch_size, generator=torch.Generator().manual_seed(1))
    volume[:, list(absent)] = 0
    return volume


def per_series(network):
    """The weights that belong to a series: their name, and the axis along which the series are."""
    axes = {"encoder.series_embedding": 0}
    axes |= {"stem.0.weight": 1} if network.stem is not None else {}
    axes |= {name: 0 for name in network.state_dict() if name.startswith("fusions.")}
    assert axes.keys() <= network.state_dict().keys()
    return axes


@torch.no_grad()
def logits(network, volume):
    return network(volume)


# --- series by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"features": 4}, {"features": 3}, {"fusion": "projected"}, LIGHT])
def test_series_in_another_order_give_the_same_logits(changes):
    order = [2, 0, 1]
    network, permuted = build(**changes), build([SERIES[n] for n in order], **changes)
    weights = network.state_dict()
    weights |= {name: weights[name].index_select(axis, torch.tensor(order)) for name, axis in per_series(network).items()}
    permuted.load_state_dict(weights)
    volume = random_volume()
    torch.testing.assert_close(logits(permuted, volume[:, order]), logits(network, volume), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"fusion": "projected"}, {"decoder": "light"}, LIGHT])
def test_an_absent_series_influences_nothing(changes):
    network, volume = build(**changes), random_volume(absent=[1])
    before = logits(network, volume)
    weights = network.state_dict()
    for name, axis in per_series(network).items():
        weights[name].select(axis, 1).normal_(std=5)
    assert logits(network, volume).equal(before)
    assert not logits(network, random_volume()).equal(before)


def test_a_sample_with_an_absent_series_does_not_depend_on_its_batch():
    network, volume = build(), random_volume(3)
    volume[1, 2] = 0
    torch.testing.assert_close(logits(network, volume)[1:2], logits(network, volume[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"fusion": "projected"}, LIGHT])
@pytest.mark.parametrize("absent", [(), (1,), (0, 2)])
def test_tokens_of_absent_series_left_out_or_masked_give_the_same_logits(absent, changes):
    network, volume = build(**changes), random_volume(absent=absent)
    shown = [number for number in range(3) if number not in absent]
    encoded = []
    network.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(inputs[0].shape[1]))
    with torch.no_grad():
        dropped, masked = network(volume, shown), network(volume)
    torch.testing.assert_close(dropped, masked, rtol=1e-4, atol=1e-5)
    assert encoded[0] * 3 == encoded[1] * len(shown)


def test_the_mean_is_over_the_series_that_are_present():
    features = torch.randn(2, 3, 5, 4)
    fused = mean_over_present(features, torch.tensor([[True, False, True], [False, True, False]]))
    torch.testing.assert_close(fused[0], (features[0, 0] + features[0, 2]) / 2)
    torch.testing.assert_close(fused[1], features[1, 1])


def test_projections_tell_series_apart_from_the_start_and_keep_the_size_of_features():
    features, present = torch.randn(50, 3, 5, 16), torch.ones(50, 3, dtype=torch.bool)
    present[0, 1] = False
    torch.manual_seed(0)
    fuse = ProjectedFusion(3, 16)
    with torch.no_grad():
        maps = [fuse(some, present, (1, 1, 5)) for some in (features, features[:, [2, 1, 0]])]
        fused, exchanged = (found.flatten(2).transpose(1, 2) for found in maps)
        # what differs from one series to the next is kept, in all
        assert fused[1:].square().mean().item() == pytest.approx(features[1:].square().mean().item(), rel=0.1)
        for weight in fuse.weight:
            torch.testing.assert_close(weight @ weight.T, 3 * torch.eye(16))
    torch.testing.assert_close(mean_over_present(features, present)[1], mean_over_present(features[:, [2, 1, 0]], present)[1])
    assert not torch.allclose(fused[1], exchanged[1])
    by_hand = (features[0, 0] @ fuse.weight[0] + features[0, 2] @ fuse.weight[2]) / 2
    torch.testing.assert_close(fused[0], by_hand)


@pytest.mark.parametrize("token_size", [(4, 4, 4), (1, 4, 4), (2, 8, 8), (8, 8, 2), (16, 16, 16), (2, 1, 1)])
@pytest.mark.parametrize("kind", [{}, JOINT_NETWORK], ids=["vit", "joint_vit"])
def test_the_light_decoder_reads_nothing_but_the_features(token_size, kind):
    depth = max(4, max(token_size).bit_length())
    network = build(token_size=token_size, depth=depth, **kind, **LIGHT)
    patch_size = tuple(2 * t for t in token_size)
    volume = random_volume(patch_size=patch_size)
    with torch.no_grad():
        volume, present = network.present_series(volume)
        features = [level.main for level in network.encode(volume, present)]
        found = network.decode(volume, features).main
        assert found.shape == (2, NUM_CLASSES, *patch_size)
        assert network.decode(torch.zeros_like(volume), features).main.equal(found)
        # a token's voxels come from its features alone
        changed = [torch.cat([f[..., :1] + 1, f[..., 1:]], dim=-1) for f in features]
        same = network.decode(volume, changed).main == found
    assert same[..., token_size[-1] :].all() and not same[..., : token_size[-1]].all()
    assert network.stem is None and network.stem_gate is None and not len(network.skips)


def test_all_weights_of_the_light_decoder_learn_and_other_class_counts_load():
    network = build(**LIGHT)
    network(random_volume()).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    heads = [name for name in network.state_dict() if ".seg_layers." in name]
    torch.manual_seed(0)
    other = CSMSegmenter(3, NUM_CLASSES + 1, **OF_DATASET, **TINY, **LIGHT)
    assert len(heads) == 2
    assert {n for n, t in network.state_dict().items() if t.shape != other.state_dict()[n].shape} <= set(heads)


def test_without_several_series_there_is_nothing_to_project():
    for network in (build(SERIES[:1], fusion="projected"), build(**JOINT_NETWORK, fusion="projected"), build(fusion="mean")):
        assert all(isinstance(fuse, MeanFusion) for fuse in network.fusions) and not len(list(network.fusions.parameters()))
    assert all(isinstance(fuse, ProjectedFusion) for fuse in build(fusion="projected").fusions)
    # one for every level
    assert len(build(fusion="projected").fusions) == len(build().fusions) == math.log2(max(TOKEN_SIZE))


@pytest.mark.parametrize("fusion", [MeanFusion, ProjectedFusion])
def test_a_fusion_of_some_series_is_that_of_all_with_the_others_absent(fusion):
    features, absent = torch.randn(2, 3, 30, 8), torch.tensor([[True, False, True]] * 2)
    fuse = fusion(3, 8)
    some = fuse(features[:, [0, 2]], absent[:, [0, 2]], (2, 3, 5), (0, 2))
    assert some.shape == (2, 8, 2, 3, 5)
    torch.testing.assert_close(some, fuse(features, absent, (2, 3, 5)))


def test_a_series_is_present_when_a_voxel_differs_from_zero_and_all_are_when_none_does():
    volume = torch.zeros(3, 3, *PATCH_SIZE)
    volume[0, 1, 0, 3, 9] = -1e-3
    volume[1] = 1
    assert series_present(volume).tolist() == [[False, True, False], [True] * 3, [True] * 3]


def test_another_number_of_channels_is_refused_and_the_series_are_named():
    with pytest.raises(ValueError, match=r"2 channels.*FLAIR, T1w, T2w.*all-zero volume"):
        build()(random_volume()[:, :2])
    with pytest.raises(ValueError, match=r"2 input channels.*T2w in channel 2"):
        CSMSegmenter(2, NUM_CLASSES, **OF_DATASET, **TINY)


def test_only_the_planned_series_are_used_from_the_channels_they_stand_in():
    volume = random_volume(s=4)
    chosen = build(("T2w", "FLAIR"), channels=(3, 1), input_channels=4)
    expected = logits(build(("T2w", "FLAIR")), volume[:, [3, 1]])
    assert logits(chosen, volume).equal(expected)
    volume[:, [0, 2]] = 7
    assert logits(chosen, volume).equal(expected)


def test_deep_supervision_is_refused():
    with pytest.raises(ValueError, match="nnUNetTrainerCSM"):
        CSMSegmenter(3, NUM_CLASSES, **OF_DATASET, **TINY, deep_supervision=True)


# --- shapes and numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token_size", [(16, 16, 16), (8, 16, 16), (4, 16, 16), (4, 8, 8), (1, 8, 8), (2, 4, 4), (2, 1, 1)])
def test_logits_have_the_resolution_of_the_patch_whatever_the_token(token_size):
    patch_size = tuple(g * t for g, t in zip((1, 2, 3), token_size, strict=True))
    network = build(SERIES[:2], token_size, depth=5, features=2, width=12)
    output = logits(network, random_volume(1, patch_size=patch_size, s=2))
    assert isinstance(output, torch.Tensor)
    assert output.shape == (1, NUM_CLASSES, *patch_size)
    assert output.isfinite().all()


@given(st.tuples(*[st.sampled_from([1, 2, 4, 8, 16])] * 3).filter(lambda t: max(t) > 1))
def test_strides_multiply_to_the_token_and_a_short_edge_is_halved_last(token_size):
    strides = level_strides(token_size)
    assert tuple(math.prod(axis) for axis in zip(*strides, strict=True)) == token_size
    assert len(strides) == math.log2(max(token_size))
    assert all(set(axis) <= {1, 2} and list(axis) == sorted(axis) for axis in zip(*strides, strict=True))


@pytest.mark.parametrize("depth", [4, 5, 6, 7, 12])
def test_taps_lie_at_equal_shares_of_the_depth_and_end_with_the_last_block(depth):
    network = build(token_size=(2, 16, 4), depth=depth, width=6, num_heads=1, features=1)
    taps = network.encoder.taps(4)
    assert taps[-1] == depth
    assert sorted(set(taps)) == taps
    assert all(abs(tap - depth * share) <= 0.5 for tap, share in zip(taps, (0.25, 0.5, 0.75, 1), strict=True))
    volume = random_volume(1, patch_size=(2, 16, 8))
    assert [level.main.shape for level in network.encode(volume, series_present(volume))] == [(1, 6, 1, 1, 2)] * 4


@pytest.mark.parametrize("absent", [(), (0,), (0, 2), (0, 1, 2)])
def test_tiles_that_are_zero_in_part_or_whole_give_finite_logits_and_gradients(absent):
    network = build(drop_path=0.1).train()
    output = network(random_volume(absent=absent))
    output.square().mean().backward()
    assert output.isfinite().all()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_every_weight_of_the_segmenter_learns():
    network = build().train()
    network(random_volume()).square().sum().backward()
    # biases aside: one on all keys moves no attention, and one before an instance norm is taken off again
    weights = {name: p for name, p in network.named_parameters() if not name.endswith("bias")}
    assert not [name for name, p in weights.items() if p.grad is None or not p.grad.any()]


def test_the_state_loads_without_executing_anything():
    network, file = build(), io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = CSMSegmenter(3, NUM_CLASSES, **OF_DATASET, **TINY).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert logits(other, random_volume()).equal(logits(network, random_volume()))


# --- in nnU-Net's hands ------------------------------------------------------------------------------------------------------


def predictor(mirror_axes=None):
    manager = PlansManager(csm_plans())
    configuration = manager.get_configuration("3d_fullres")
    torch.manual_seed(0)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        len(SERIES),
        manager.get_label_manager(DATASET_JSON).num_segmentation_heads,
        deep_supervision=False,
    )
    host = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    host.manual_initialization(network, manager, configuration, None, DATASET_JSON, "nnUNetTrainerCSM", mirror_axes)
    return host


def test_nnunet_predicts_a_patch_as_the_network_does():
    host, patch = predictor(), random_volume(1)
    host.use_gaussian = False  # in the corners, its weights are near the smallest number of fp16
    expected = logits(host.network.eval(), patch)[0]
    torch.testing.assert_close(host.predict_sliding_window_return_logits(patch[0]).float(), expected, rtol=1e-2, atol=1e-2)


def test_nnunet_predicts_an_image_with_background_tiles_and_an_absent_series():
    image = torch.zeros(len(SERIES), 8, 24, 13)
    # the second half of the rows is background, as under nnU-Net's nonzero mask, and T1w was not acquired
    image[:, :, :12] = random_volume(1, patch_size=(8, 12, 13))[0]
    image[1] = 0
    output = predictor((2,)).predict_sliding_window_return_logits(image).float()
    assert output.shape == (3, 8, 24, 13)
    assert output.isfinite().all()
    # far from being the same everywhere
    assert output[:, :, :12].std() > 1e-3


def test_nnunet_predicts_an_image_smaller_than_the_patch():
    output = predictor().predict_sliding_window_return_logits(torch.randn(len(SERIES), 3, 5, 7))
    assert output.shape == (3, 3, 5, 7)
    assert output.isfinite().all()


def test_nnunet_is_told_what_to_do_about_a_missing_channel():
    with pytest.raises(ValueError, match=r"planned for 3 .*give an all-zero volume"):
        predictor().predict_sliding_window_return_logits(torch.randn(2, *PATCH_SIZE))


# --- optimisation ------------------------------------------------------------------------------------------------------------


def optimizer_of(network, **schedule):
    chosen = read_settings(finetuning_schedule=schedule).csm.finetuning_schedule
    return build_optimizer(network, network.encoder, chosen), chosen


def groups_by_name(network, optimizer):
    names = {id(p): name for name, p in network.named_parameters()}
    return {names[id(p)]: group for group in optimizer.param_groups for p in group["params"]}


def test_every_weight_is_optimised_once():
    network = build()
    optimizer, _ = optimizer_of(network, layer_decay=0.75)
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in network.parameters())


def test_weights_decay_and_biases_norms_and_embeddings_do_not():
    network = build()
    optimizer, schedule = optimizer_of(network, weight_decay=0.07)
    groups = groups_by_name(network, optimizer)
    norms = {
        f"{m}.{p}"
        for m, module in network.named_modules()
        if isinstance(module, nn.LayerNorm | nn.InstanceNorm3d)
        for p in ("weight", "bias")
    }
    for name, group in groups.items():
        exempt = name.endswith("bias") or name in norms or name == "encoder.series_embedding"
        assert group["weight_decay"] == (0.0 if exempt else schedule.weight_decay), name


def test_learning_rates_fall_towards_the_input_of_the_encoder():
    network = build()
    optimizer, schedule = optimizer_of(network, layer_decay=0.5, learning_rate=0.01)
    build_scheduler(optimizer, schedule).step_update(schedule.num_iterations // 2)
    groups, depth = groups_by_name(network, optimizer), network.encoder.depth
    top = groups["decoder.seg_layers.0.weight"]["lr"]
    expected = {"encoder.embedding.weight": depth + 1, "encoder.series_embedding": depth + 1, "encoder.norm.weight": 0}
    expected |= {f"encoder.blocks.{n}.attn.qkv.weight": depth - n for n in range(depth)}
    for name, power in expected.items():
        assert groups[name]["lr"] == pytest.approx(top * 0.5**power), name
    # nnU-Net prints and draws the rate of the first group
    assert optimizer.param_groups[0]["lr"] == top == max(group["lr"] for group in optimizer.param_groups)


def test_the_learning_rate_warms_up_linearly_then_falls_to_zero_as_a_cosine():
    network = build()
    optimizer, schedule = optimizer_of(
        network, num_epochs=4, iterations_per_epoch=50, warmup=0.1, learning_rate=0.02, layer_decay=1.0
    )
    scheduler, rates = build_scheduler(optimizer, schedule), []
    for iteration in range(1, schedule.num_iterations + 1):
        scheduler.step_update(iteration)
        rates.append(optimizer.param_groups[0]["lr"])
    num_warm = 20
    assert rates[: num_warm - 1] == pytest.approx([0.02 * n / num_warm for n in range(1, num_warm)])
    cosine = [0.01 * (1 + math.cos(math.pi * n / 181)) for n in range(181)]
    assert rates[num_warm - 1 :] == pytest.approx(cosine)
    assert max(rates) == pytest.approx(0.02) and 0 < rates[-1] < 1e-5


def test_without_warm_up_the_first_iteration_has_the_full_rate():
    network = build()
    optimizer, schedule = optimizer_of(network, num_epochs=10, iterations_per_epoch=100, warmup=0.0, learning_rate=0.005)
    build_scheduler(optimizer, schedule).step_update(1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005, rel=1e-4)
