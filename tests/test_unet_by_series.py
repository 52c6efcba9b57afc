"""A2FSeg's network: a U-Net for each series, their average and adaptive fusion; its epochs; what is said of its pretraining."""

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factories import PATCH_SIZE, SERIES, TINY, TOKEN_SIZE, GuessedMemory, base_plans, facts_of, settings
from torch import Tensor

from nnunet_csm.data.draws import Purpose
from nnunet_csm.errors import UserError
from nnunet_csm.model.outputs import Outputs, total_loss
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.model.transfer import PretrainedEncoder, transfer
from nnunet_csm.planning.facts import Wishes
from nnunet_csm.planning.planner import plan
from nnunet_csm.plans import Architecture, read_configuration
from nnunet_csm.training.segmentation import AugmentedBatches

NUM_CLASSES = 4
NETWORK: dict[str, Any] = TINY | {
    "width": 12,
    "depth": 2,
    "decoder": "adaptive",
    "fusion": "apart",
    "encoder": {"kind": "unet_by_series", "base": 6},
}


def segmenter(series: tuple[str, ...] = SERIES, token_size: tuple[int, int, int] = TOKEN_SIZE, **changes: Any) -> Any:
    torch.manual_seed(0)
    channels = tuple(range(len(series)))
    return CSMSegmenter(
        len(series), NUM_CLASSES, **(NETWORK | {"series": series, "channels": channels, "token_size": token_size} | changes)
    )


def volume(*absent: tuple[int, int], size: tuple[int, int, int] = PATCH_SIZE) -> Tensor:
    made = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    for sample, series in absent:
        made[sample, series] = 0
    return made


def mean_square(logits: Tensor) -> Tensor:
    return logits.square().mean()


@pytest.mark.parametrize("token_size", [(2, 4, 2), (1, 8, 8), (2, 1, 1)])
def test_logits_of_an_evaluation_are_those_of_training_and_nothing_else(token_size: tuple[int, int, int]) -> None:
    z, y, x = size = (2 * token_size[0], 2 * token_size[1], 2 * token_size[2])
    network, patches = segmenter(token_size=token_size), volume((0, 1), size=size)
    learned, used = Outputs.of(network.train()(patches)), network.eval()(patches)
    assert isinstance(used, Tensor) and used.shape == (2, NUM_CLASSES, z, y, x)
    torch.testing.assert_close(learned.main, used)
    # the average and three U-Nets, at every level but the coarsest of the way up
    num_levels = max(1, max(token_size).bit_length() - 2)
    assert [weight for _, weight in learned.others] == [0.5**level for level in range(num_levels) for _ in range(4)]
    assert all(logits.shape == used.shape for logits, _ in learned.others)


@pytest.mark.parametrize("absent", [(), ((0, 1),), ((0, 0), (1, 0)), ((0, 0), (0, 1), (1, 0), (1, 1))])
def test_whatever_series_a_batch_has_all_parameters_have_a_gradient(absent: tuple) -> None:
    network = segmenter()
    total_loss(network(volume(*absent)), mean_square).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    learns = [any(p.grad.any() for p in branch.parameters()) for branch in network.encoder.branches]
    assert learns == [any((sample, series) not in absent for sample in range(2)) for series in range(3)]


def test_every_weight_learns() -> None:
    network = segmenter()
    total_loss(network(volume()), mean_square).backward()
    # a bias before a norm has no effect
    assert [name for name, p in network.named_parameters() if not p.grad.any() and not name.endswith("bias")] == []


def test_an_absent_series_changes_nothing() -> None:
    network, patches = segmenter().eval(), volume((0, 1), (1, 1))
    with torch.no_grad():
        before = network(patches)
        for parameter in network.encoder.branches[1].parameters():
            parameter.normal_()
        assert network(patches).equal(before)


@pytest.mark.parametrize("absent", [(), (1,), (0, 2)])
def test_absent_series_left_out_or_masked_give_the_same_logits(absent: tuple[int, ...]) -> None:
    network, patches = segmenter().eval(), volume(*itertools.product(range(2), absent))
    with torch.no_grad():
        dropped = network(patches, [number for number in range(3) if number not in absent])
        torch.testing.assert_close(dropped, network(patches), rtol=1e-4, atol=1e-5)


def test_series_in_another_order_give_the_same_logits() -> None:
    order = [2, 0, 1]
    network, permuted = segmenter().eval(), segmenter(tuple(SERIES[number] for number in order)).eval()
    rows = transfer(
        PretrainedEncoder("file", network.architecture, network.encoder.state_dict()), permuted.encoder, permuted.architecture
    )
    assert {row.how for row in rows} == {f"by name, from {name}" for name in SERIES}
    of_decoder = network.decoder.state_dict()
    permuted.decoder.load_state_dict(of_decoder)
    weigh = torch.nn.ModuleList(network.decoder.adaptive.weigh[number] for number in order)
    permuted.decoder.adaptive.weigh.load_state_dict(weigh.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(permuted(volume()[:, order]), network(volume()), rtol=1e-4, atol=1e-5)


def test_other_class_counts_load_but_for_the_last_layers() -> None:
    network = segmenter()
    other = CSMSegmenter(3, NUM_CLASSES + 1, **(NETWORK | {"series": SERIES, "channels": (0, 1, 2), "token_size": TOKEN_SIZE}))
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    assert all(tensor.shape == shapes[name] or ".seg_layers." in name for name, tensor in network.state_dict().items())


def test_a_series_without_a_unet_is_refused() -> None:
    source, target = segmenter(SERIES[:2]), segmenter()
    pretrained = PretrainedEncoder("file", source.architecture, source.encoder.state_dict())
    with pytest.raises(UserError, match=r"its U-Nets are for FLAIR, T1w, this run also needs T2w"):
        transfer(pretrained, target.encoder, target.architecture)


def test_one_series_is_its_own_average() -> None:
    network = segmenter(SERIES[:1])
    learned = Outputs.of(network(volume()[:, :1]))
    assert len(learned.others) == 2
    with torch.no_grad():
        assert network.eval()(volume()[:, :1]).equal(network(volume()[:, :1], [0]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"fusion": "mean"},
            r"decoder in arch_kwargs is 'adaptive', fusion 'mean'; the decoder 'adaptive' takes the fusion 'apart'",
        ),
        ({"decoder": "unet"}, r"decoder in arch_kwargs is 'unet', but encoder\.kind 'unet_by_series' takes one of adaptive"),
        ({"encoder": {"kind": "vit"}, "decoder": "unetr"}, r"fusion 'apart'; the decoder 'adaptive' takes"),
    ],
)
def test_its_parts_belong_together(changes: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        segmenter(**changes)


def a2fseg() -> Any:
    plans, decisions = plan(base_plans(), "3d_fullres", facts_of(), "nnUNetCSMPlans", Wishes("a2fseg"), GuessedMemory())
    return plans, read_configuration(plans, "3d_fullres", "plans"), {decision.name: decision.value for decision in decisions}


def test_its_preset_has_the_published_channels_and_epochs() -> None:
    _, planned, told = a2fseg()
    a: Architecture = planned.architecture
    assert told["network"].startswith("a U-Net for each series: 32, 64, 128, 256, 320, 320 channels, 2 blocks at each level")
    assert told["series dropped"] == "one or more, in 100% of the training samples of every second epoch"
    assert told["pretext"] == "none" and told["GPU memory, pretraining"].startswith("0.0 GiB")
    assert (max(a.token_size), planned.csm.finetuning.encoder) == (32, "scratch")


def test_there_is_nothing_to_pretrain(make_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        make_trainer(True, pretext={"name": "none"})
    assert "csm.pretext.name is 'none', so there is nothing to pretrain; fine-tune at once" in capsys.readouterr().err


@pytest.mark.parametrize(("epochs", "expected"), [("all", [2, 2, 2, 2]), ("alternating", [0, 2, 0, 2])])
def test_series_are_dropped_in_every_or_every_second_epoch(epochs: str, expected: list[int]) -> None:
    made = {"data": torch.ones(1, 3, 2, 2, 2), "target": torch.zeros(1, 1, 2, 2, 2)}
    loader: Any = SimpleNamespace(
        oversample_foreground_percent=0.0, generate_train_batch=lambda: {name: tensor.clone() for name, tensor in made.items()}
    )
    batches = AugmentedBatches(loader, 2, range(2), 0, Purpose.TRAINING, (0, 1, 2), 1.0, epochs)
    lost = [int((batches(epoch, 0)["data"].flatten(2) == 0).all(2).any(1).sum()) for epoch in range(4)]
    assert lost == expected


def test_a_trainer_learns_and_validates_with_it(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def change(entry: dict[str, Any]) -> None:
        entry["architecture"]["arch_kwargs"] |= {name: value for name, value in NETWORK.items() if name not in TINY}
        entry["architecture"]["arch_kwargs"] |= {"width": 12, "depth": 1}
        entry["csm"]["finetuning"] |= {"encoder": "scratch", "series_dropout": 1.0, "series_dropout_epochs": "alternating"}

    trainer = make_trainer(False, change=change, pretext={"name": "none"})
    trainer.run_training()
    assert all(tensor.isfinite().all() for tensor in trainer.bare_network.state_dict().values())


def test_plans_without_the_epochs_read_as_before() -> None:
    assert settings().csm.finetuning.series_dropout_epochs == "all"
