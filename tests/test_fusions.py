"""Adaptive and deformable fusion: who counts how much, where features are taken from, and what is learned beside."""

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import GRID_SIZE, PATCH_SIZE, SERIES, TINY, TOKEN_SIZE, settings
from torch import Tensor
from torch.nn import functional as F

from nnunet_csm.errors import UserError
from nnunet_csm.model.adaptive import BRANCH_WEIGHT, AdaptiveFusion
from nnunet_csm.model.deformable import COARSE_WEIGHT, DeformableFusion, PartialConv, RefinedHead, roughness, sampled
from nnunet_csm.model.fusion import Fusion, build_fusion, mean_over_present
from nnunet_csm.model.outputs import Outputs, total_loss
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.model.tokens import to_map
from nnunet_csm.model.transfer import PretrainedEncoder, transfer
from nnunet_csm.plans import FusionSettings
from nnunet_csm.pretext import memory

WIDTH, NUM_CLASSES = 8, 4
METHODS: dict[str, Any] = {
    "adaptive": "adaptive",
    "deformable": "deformable",
    "refined": {"name": "deformable", "refinement": "share", "smoothness": 0.01},
}
BOTH = pytest.mark.parametrize("cls", [AdaptiveFusion, DeformableFusion])
ALL = pytest.mark.parametrize("fusion", METHODS.values(), ids=METHODS)


def make(cls: type[Fusion], num_classes: int | None = None) -> Any:
    torch.manual_seed(0)
    fuse = cls(3, WIDTH, num_classes)
    # offsets begin at zero, which hides much
    for parameter in fuse.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return fuse


def some_features(b: int = 2, m: int = 3, requires_grad: bool = False) -> Tensor:
    made = torch.randn(b, m, math.prod(GRID_SIZE), WIDTH, generator=torch.Generator().manual_seed(1))
    return made.requires_grad_(requires_grad)


def presence(*rows: str) -> Tensor:
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def segmenter(fusion: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    of_dataset: dict[str, Any] = {"series": SERIES, "channels": (0, 1, 2), "token_size": TOKEN_SIZE}
    return CSMSegmenter(3, NUM_CLASSES, **(TINY | of_dataset | {"fusion": fusion} | changes))


def volume(*absent: tuple[int, int]) -> Tensor:
    made = torch.randn(2, 3, *PATCH_SIZE, generator=torch.Generator().manual_seed(2))
    for sample, series in absent:
        made[sample, series] = 0
    return made


def mean_square(logits: Tensor) -> Tensor:
    return logits.square().mean()


# --- what series count -------------------------------------------------------------------------------------------------------


def weights_of(fuse: Any, features: Tensor, present: Tensor) -> Tensor:
    if isinstance(fuse, AdaptiveFusion):
        maps = [to_map(of_one, GRID_SIZE) for of_one in features.unbind(1)]
        return fuse.adaptive.weights(maps, to_map(mean_over_present(features, present), GRID_SIZE), present)
    aligned = to_map(features.flatten(0, 1), GRID_SIZE)
    return fuse.weights(aligned, aligned, present)


@BOTH
def test_weights_sum_to_one_over_present_series_and_a_series_alone_has_one(cls: type[Fusion]) -> None:
    weight = weights_of(make(cls), some_features(3), presence("111", "101", "010"))
    torch.testing.assert_close(weight.sum(1), torch.ones_like(weight[:, 0]))
    assert weight[1, 1].eq(0).all() and weight[2, 1].eq(1).all() and weight[2, [0, 2]].eq(0).all()
    assert weight[0].std() > 1e-3
    assert weight.shape[2] == (WIDTH if cls is AdaptiveFusion else 1)


@BOTH
def test_an_absent_series_gets_no_gradient_and_changes_nothing(cls: type[Fusion]) -> None:
    fuse, features, present = make(cls, NUM_CLASSES), some_features(requires_grad=True), presence("101", "011")
    result = Outputs.of(fuse(features, present, GRID_SIZE))
    total_loss(result, mean_square).backward()
    assert features.grad is not None
    reached = features.grad.abs().flatten(2).amax(2) > 0
    assert reached.equal(present)
    others = torch.where(present[:, :, None, None], features, 100.0)
    assert Outputs.of(fuse(others, present, GRID_SIZE)).main.equal(result.main)


@BOTH
def test_a_fusion_of_some_series_is_that_of_all_with_the_others_absent(cls: type[Fusion]) -> None:
    fuse, features, present = make(cls).eval(), some_features(), presence("101", "101")
    some = fuse(features[:, [0, 2]], present[:, [0, 2]], GRID_SIZE, (0, 2))
    assert some.shape == (2, WIDTH, *GRID_SIZE)
    torch.testing.assert_close(some, fuse(features, present, GRID_SIZE))


def test_adaptive_fusion_knows_no_order_of_series() -> None:
    fuse, features, present, order = make(AdaptiveFusion).eval(), some_features(), presence("111", "110"), [2, 0, 1]
    permuted = copy.deepcopy(fuse)
    permuted.adaptive.weigh = torch.nn.ModuleList(fuse.adaptive.weigh[number] for number in order)
    torch.testing.assert_close(permuted(features[:, order], present[:, order], GRID_SIZE), fuse(features, present, GRID_SIZE))


def test_a_series_alone_is_its_own_average() -> None:
    fuse, features = make(AdaptiveFusion).eval(), some_features()
    found = fuse(features, presence("010", "010"), GRID_SIZE)
    alone = to_map(features[:, 1], GRID_SIZE)
    torch.testing.assert_close(found, fuse.adaptive.output(torch.cat([alone, alone], dim=1)))


# --- offsets -----------------------------------------------------------------------------------------------------------------


def test_deformable_fusion_begins_without_moving_anything_and_learns_to() -> None:
    fuse, features = DeformableFusion(3, WIDTH), some_features()
    maps = to_map(features.flatten(0, 1), GRID_SIZE).unflatten(0, (2, 3))
    weight = fuse.weights(maps[:, :1].expand_as(maps).flatten(0, 1), maps.flatten(0, 1), presence("111", "111"))
    found = fuse(features, presence("111", "111"), GRID_SIZE)
    torch.testing.assert_close(found, maps[:, 0] + (weight * maps).sum(1))
    found.square().sum().backward()
    learned = dict(fuse.named_parameters())
    assert all(learned[name].grad.any() for name in ("offset.3.weight", "offset.3.bias"))  # type: ignore[union-attr]


def test_the_reference_is_the_first_present_series_and_is_not_moved() -> None:
    fuse, features = make(DeformableFusion), some_features()
    found = fuse(features, presence("010", "001"), GRID_SIZE)
    torch.testing.assert_close(found, 2 * to_map(torch.stack([features[0, 1], features[1, 2]]), GRID_SIZE))


def test_no_offset_is_the_identity_to_the_bit() -> None:
    maps = torch.randn(2, 3, *GRID_SIZE) * 1e3
    assert sampled(maps, torch.zeros(2, 3, *GRID_SIZE)).equal(maps)


def test_offsets_sample_as_torch_does_also_beyond_the_border() -> None:
    maps, offsets = torch.randn(2, 5, *GRID_SIZE), torch.rand(2, 3, *GRID_SIZE) * 2 - 1
    places = torch.stack(torch.meshgrid(*map(torch.arange, GRID_SIZE), indexing="ij")) + offsets
    scaled = places * 2 / (torch.tensor(GRID_SIZE) - 1)[:, None, None, None] - 1
    expected = F.grid_sample(maps, scaled.flip(1).movedim(1, -1), align_corners=True, padding_mode="border")
    torch.testing.assert_close(sampled(maps, offsets), expected, rtol=1e-4, atol=1e-5)


def test_offsets_are_at_most_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from nnunet_csm.model import deformable

    largest = []

    def watched(maps: Tensor, offsets: Tensor) -> Tensor:
        largest.append(float(offsets.detach().abs().max()))
        return sampled(maps, offsets)

    monkeypatch.setattr(deformable, "sampled", watched)
    make(DeformableFusion)(some_features() * 100, presence("111", "011"), GRID_SIZE)
    assert 0.9 < largest[0] <= 1


def test_roughness_is_that_of_present_series_and_none_where_all_move_alike() -> None:
    offsets, present = torch.randn(2, 3, 3, *GRID_SIZE), presence("110", "001")
    expected, places = 0.0, list(itertools.product(*map(range, GRID_SIZE)))
    for sample, series in present.nonzero().tolist():
        for place, axis in itertools.product(places, range(3)):
            following = tuple(p + (a == axis) for a, p in enumerate(place))
            if following in places:
                expected += float((offsets[sample, series, :, *following] - offsets[sample, series, :, *place]).square().sum())
    assert float(roughness(offsets, present)) == pytest.approx(expected / (3 * len(places)), rel=1e-4)
    assert roughness(torch.ones(2, 3, 3, *GRID_SIZE), present) == 0
    assert roughness(torch.randn(2, 3, 3, 1, 1, 1), present) == 0


# --- uncertain voxels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_size", [(3, 3, 3), (1, 3, 3)])
def test_a_partial_convolution_counts_known_voxels_only_as_if_all_were(kernel_size: tuple[int, int, int]) -> None:
    layer, features, known = PartialConv(2, kernel_size), torch.randn(1, 2, 4, 5, 3), torch.rand(1, 1, 4, 5, 3) < 0.15
    found, reached = layer(features, known)
    for place in itertools.product(range(4), range(5), range(3)):
        total, count = torch.zeros(2), 0
        for i, j, k in itertools.product(*map(range, kernel_size)):
            z, y, x = (p + step - edge // 2 for p, step, edge in zip(place, (i, j, k), kernel_size, strict=True))
            if all(0 <= t < n for t, n in zip((z, y, x), (4, 5, 3), strict=True)) and known[0, 0, z, y, x]:
                total, count = total + layer.conv.weight[:, :, i, j, k] @ features[0, :, z, y, x], count + 1
        expected = F.leaky_relu(total * math.prod(kernel_size) / max(1, count))
        torch.testing.assert_close(found[0, :, *place], expected, rtol=1e-4, atol=1e-5)
        assert bool(reached[0, 0, *place]) == (count > 0)


def test_certain_voxels_and_those_out_of_reach_keep_their_features() -> None:
    head, features = RefinedHead(3, NUM_CLASSES, (3, 3, 3), "threshold"), torch.randn(1, 3, 1, 1, 12)
    uncertain = torch.zeros(1, 1, 1, 1, 12, dtype=torch.bool)
    uncertain[..., 2:] = True
    found = head.inpainted(features, uncertain)
    kept = (found == features).all(1)[0, 0, 0].tolist()
    # three convolutions reach three voxels
    assert kept == [True] * 2 + [False] * 3 + [True] * 7
    assert head.inpainted(features, torch.ones_like(uncertain)).equal(features)
    assert head.inpainted(features, torch.zeros_like(uncertain)).equal(features)


def test_uncertain_voxels_are_those_of_high_entropy_or_the_tenth_of_a_sample_with_the_highest() -> None:
    logits = torch.randn(2, NUM_CLASSES, 4, 5, 10)
    logits[0] *= 20
    shares = logits.softmax(1)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum(1, keepdim=True) / math.log(NUM_CLASSES)
    assert RefinedHead(1, NUM_CLASSES, (3, 3, 3), "threshold").uncertain(logits).equal(entropy > 0.5)
    head = RefinedHead(1, NUM_CLASSES, (3, 3, 3), "share")
    found = head.uncertain(logits)
    assert found.flatten(1).sum(1).tolist() == [20, 20]
    assert all(e[f].min() > e[~f].max() for e, f in zip(entropy, found, strict=True))
    assert not head.uncertain(torch.zeros_like(logits)).any()


# --- what is learned beside the segmentation ---------------------------------------------------------------------------------


@ALL
def test_logits_of_an_evaluation_are_those_of_training_and_nothing_else(fusion: Any) -> None:
    network, patches = segmenter(fusion), volume((0, 1))
    learned, used = network.train()(patches), network.eval()(patches)
    assert isinstance(used, Tensor) and used.shape == (2, NUM_CLASSES, *PATCH_SIZE)
    main = Outputs.of(learned)
    torch.testing.assert_close(main.main, used)
    assert all(logits.shape == used.shape for logits, _ in main.others)


def test_series_and_average_count_as_published() -> None:
    learned = Outputs.of(segmenter("adaptive")(volume()))
    # v_0 : 1, where v_0 is the weight of the finest of five levels, the coarsest of which does not count
    assert pytest.approx(1 / (8 / 15)) == BRANCH_WEIGHT
    assert [weight for _, weight in learned.others] == [BRANCH_WEIGHT] * 4 and learned.penalty is None
    total = total_loss(learned, mean_square)
    branches = sum(mean_square(logits) for logits, _ in learned.others)
    torch.testing.assert_close(8 / 15 * total, 8 / 15 * mean_square(learned.main) + branches)


def test_an_absent_series_segments_nothing() -> None:
    network = segmenter("adaptive")
    average, *of_series = [logits for logits, _ in Outputs.of(network(volume((0, 1)))).others]
    assert of_series[1][0].equal(average[0]) and not of_series[1][1].allclose(average[1])
    # and the average gets no gradient for it
    of_series[1][0].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in network.parameters())


def test_the_first_segmentation_counts_half_and_offsets_as_set() -> None:
    learned = Outputs.of(segmenter(METHODS["refined"])(volume()))
    assert [weight for _, weight in learned.others] == [COARSE_WEIGHT] == [0.5]
    assert learned.penalty == 0
    moved = segmenter(METHODS["refined"])
    for fuse in moved.fusions:
        torch.nn.init.normal_(fuse.offset[-1].weight)
    again = Outputs.of(moved(volume()))
    assert again.penalty is not None and again.penalty > 0
    expected = mean_square(again.main) + 0.5 * mean_square(again.others[0][0]) + again.penalty
    torch.testing.assert_close(total_loss(again, mean_square), expected)


def test_branches_teach_the_encoder() -> None:
    network = segmenter("adaptive")
    for logits, weight in Outputs.of(network(volume())).others:
        network.zero_grad()
        (weight * mean_square(logits)).backward(retain_graph=True)
        assert network.encoder.embedding.weight.grad.abs().sum() > 0


@ALL
@pytest.mark.parametrize("absent", [(), ((0, 1),), ((0, 0), (1, 0)), ((0, 0), (0, 1), (1, 0), (1, 1))])
def test_whatever_series_a_batch_has_all_parameters_have_a_gradient(fusion: Any, absent: tuple) -> None:
    """Or ranks would wait for each other."""
    network = segmenter(fusion)
    total_loss(network(volume(*absent)), mean_square).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@ALL
@pytest.mark.parametrize("changes", [{}, {"stem": "gated"}, {"stem": "none"}, {"decoder": "light"}], ids=str)
def test_every_weight_of_a_fusion_learns(fusion: Any, changes: dict) -> None:
    if fusion == METHODS["refined"] and "decoder" in changes:
        with pytest.raises(UserError, match=r"fusion\.refinement in arch_kwargs is 'share', but decoder 'light'"):
            segmenter(fusion, **changes)
        return
    network = segmenter(fusion, **changes)
    for fuse in network.fusions:
        if isinstance(fuse, DeformableFusion):
            # with no weights after them, hidden features get no gradient in the first step
            torch.nn.init.normal_(dict(fuse.named_parameters())["offset.3.weight"], std=0.1)
    total_loss(network(volume()), mean_square).backward()
    # a bias before a norm has no effect, nor has one that all series' scores have in common
    silent = [name for name, p in network.named_parameters() if (p.grad is None or not p.grad.any()) and ".bias" not in name]
    assert silent == []


@ALL
@pytest.mark.parametrize("absent", [(), (1,), (0, 2)])
def test_tokens_of_absent_series_left_out_or_masked_give_the_same_logits(fusion: Any, absent: tuple[int, ...]) -> None:
    network, patches = segmenter(fusion).eval(), volume(*itertools.product(range(2), absent))
    with torch.no_grad():
        dropped = network(patches, [number for number in range(3) if number not in absent])
        torch.testing.assert_close(dropped, network(patches), rtol=1e-4, atol=1e-4)


@ALL
def test_a_sample_does_not_depend_on_its_batch(fusion: Any) -> None:
    network, patches = segmenter(fusion).eval(), volume((1, 0))
    with torch.no_grad():
        torch.testing.assert_close(network(patches)[1:], network(patches[1:]), rtol=1e-4, atol=1e-4)


@ALL
def test_bf16_is_near_fp32(fusion: Any) -> None:
    network, patches = segmenter(fusion), volume((0, 2))
    exact = total_loss(network(patches), mean_square)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = total_loss(network(patches), lambda logits: mean_square(logits.float()))
    rounded.backward()
    assert float(rounded) == pytest.approx(float(exact), rel=0.05)


# --- among the rest ----------------------------------------------------------------------------------------------------------


def test_the_encoder_is_that_of_any_other_fusion() -> None:
    mean, others = segmenter("mean"), [segmenter(fusion) for fusion in METHODS.values()]
    architecture = settings().architecture
    for other in others:
        rows = transfer(PretrainedEncoder("file", architecture, mean.encoder.state_dict()), other.encoder, other.architecture)
        assert {row.how for row in rows} == {"loaded"} | {row.how for row in rows if "[" in row.name}
    # what was trained before there were these still loads
    kept = {name for name in mean.state_dict() if not name.startswith("decoder.seg_layers")}
    assert all(kept <= set(other.state_dict()) for other in others)
    assert {name.split(".")[0] for other in others for name in set(other.state_dict()) - kept} == {"fusions", "decoder"}


@ALL
def test_other_class_counts_load_but_for_the_last_layers(fusion: Any) -> None:
    torch.manual_seed(0)
    of_dataset: dict[str, Any] = {"series": SERIES, "channels": (0, 1, 2), "token_size": TOKEN_SIZE, "fusion": fusion}
    other = CSMSegmenter(3, NUM_CLASSES + 1, **TINY, **of_dataset).state_dict()
    # nnU-Net's -pretrained_weights leaves these out, by name
    assert all(
        tensor.shape == other[name].shape or ".seg_layers." in name for name, tensor in segmenter(fusion).state_dict().items()
    )


def test_a_block_with_a_name_only_is_the_name() -> None:
    with torch.no_grad():
        assert segmenter({"name": "adaptive"}).eval()(volume()).equal(segmenter("adaptive").eval()(volume()))
    read = settings(architecture={"fusion": {"name": "deformable", "smoothness": 0.01}}).architecture
    assert read.fusion_settings == FusionSettings("deformable", "none", 0.01)
    assert settings().architecture.fusion_settings == FusionSettings()


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"name": "adaptive", "radius": 2}, r"fusion: unknown radius; expected exactly name, refinement, smoothness"),
        ({"name": "deformable", "refinement": "all"}, r"fusion\.refinement is 'all', expected 'none' \| 'threshold' \| 'share'"),
    ],
)
def test_a_block_that_cannot_be_is_refused_when_it_is_read(block: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        settings(architecture={"fusion": block})


@pytest.mark.parametrize(("name", "smoothness"), [("adaptive", 0.01), ("deformable", -1.0)])
def test_offsets_that_are_not_there_cannot_be_smooth(name: str, smoothness: float) -> None:
    with pytest.raises(UserError, match=rf"fusion\.smoothness in arch_kwargs is {smoothness:g} with fusion '{name}'"):
        build_fusion(FusionSettings(name, smoothness=smoothness), 3, WIDTH)


def test_memory_counts_what_is_learned_beside() -> None:
    kinds = ["mean", "deformable", METHODS["refined"], "adaptive"]
    needs = [memory.finetuning_memory(settings(architecture={"fusion": kind}).architecture, 4, (32, 32, 32), 2) for kind in kinds]
    plain, deformable, refined, adaptive = (need.activations for need in needs)
    assert plain < deformable < refined and plain < adaptive
    assert all(need.states > needs[0].states for need in needs[1:])


@pytest.mark.parametrize("fusion", ["adaptive", METHODS["refined"]], ids=["adaptive", "refined"])
def test_a_trainer_learns_and_validates_with_them(
    fusion: Any, make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")

    def change(entry: dict[str, Any]) -> None:
        entry["architecture"]["arch_kwargs"]["fusion"] = fusion
        entry["csm"]["finetuning"]["series_dropout"] = 0.5

    trainer = make_trainer(False, change=change)
    trainer.initialize()
    before = copy.deepcopy(trainer.bare_network.state_dict())
    trainer.run_training()
    after = trainer.bare_network.state_dict()
    assert any(not after[name].equal(before[name]) for name in before if name.startswith("fusions."))
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_overlapping_regions_cannot_be_refined(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")

    def change(entry: dict[str, Any]) -> None:
        entry["architecture"]["arch_kwargs"]["fusion"] = METHODS["refined"]

    trainer = make_trainer(False, change=change)
    trainer.initialize()
    trainer.label_manager._has_regions = True
    with pytest.raises(UserError, match=r"trained on regions.*make it 'none'"):
        trainer.on_fresh_start()
