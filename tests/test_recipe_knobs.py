"""The knobs of the fine-tuning recipe: each does what it says, and nothing changes where it is not set."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import PATCH_SIZE, SERIES, TINY, TOKEN_SIZE, csm_plans, facts_of, pretext_of, settings
from torch import nn

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.encoder import Encoder, build_encoder, check_encoder
from nnunet_csm.model.segmenter import GATE, CSMSegmenter
from nnunet_csm.model.transfer import PretrainedEncoder, as_table, transfer
from nnunet_csm.planning.facts import Wishes
from nnunet_csm.planning.planner import plan
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext import memory
from nnunet_csm.training.averaging import WeightAverage
from nnunet_csm.training.optimization import build_optimizer
from nnunet_csm.training.segmentation import drop_series, stem_opening


def segmenter(stem: Any = "full", **network: Any) -> CSMSegmenter:
    torch.manual_seed(0)
    of_dataset = {"series": SERIES, "channels": (0, 1, 2), "token_size": TOKEN_SIZE}
    return CSMSegmenter(len(SERIES), 3, **of_dataset, **TINY, stem=stem, **network).eval()


def volume(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, len(SERIES), *PATCH_SIZE, generator=torch.Generator().manual_seed(seed))


# --- the stem ----------------------------------------------------------------------------------------------------------------


def test_a_gate_adds_one_number_and_open_it_is_the_full_stem() -> None:
    full, gated = segmenter("full"), segmenter("gated")
    assert set(gated.state_dict()) - set(full.state_dict()) == {"stem_gate"}
    assert all(tensor.equal(gated.state_dict()[name]) for name, tensor in full.state_dict().items())
    assert gated.stem_gate is not None
    assert gated.stem_gate.tolist() == pytest.approx([GATE])
    with torch.no_grad():
        closed = gated(volume())
        gated.stem_gate.fill_(1.0)
        assert torch.equal(gated(volume()), full(volume()))
    assert not torch.allclose(closed, full(volume()))


def reaches_past_the_encoder(network: CSMSegmenter) -> float:
    """How much the logits change with the voxels when the encoder's features do not."""
    features = network.encode(volume(), torch.ones(2, len(SERIES), dtype=torch.bool))
    network.encode = lambda *_: features  # type: ignore[method-assign]
    with torch.no_grad():
        return float((network(volume(1)) - network(volume(2))).abs().max())


def test_raw_voxels_reach_the_output_in_full_hardly_or_not_at_all() -> None:
    full, gated, none = (reaches_past_the_encoder(segmenter(stem)) for stem in ("full", "gated", "none"))
    assert full > 0.1
    assert 0 < gated < full / 100
    assert none == 0


@pytest.mark.parametrize("stem", ["gated", "none"])
def test_all_weights_of_every_stem_learn(stem: str) -> None:
    network = segmenter(stem)
    network(volume()).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    # a bias before a norm has no effect in any of the networks
    assert [name for name in silent if "conv.bias" not in name] == []


def test_without_a_stem_there_is_less_to_learn_and_to_store() -> None:
    gated, none = segmenter("gated").state_dict(), segmenter("none").state_dict()
    assert not any("stem" in name for name in none)
    assert sum(t.numel() for t in none.values()) < sum(t.numel() for t in gated.values())
    kinds = [settings(architecture={"stem": stem}).architecture for stem in ("full", "gated", "none")]
    full, gate, less = (memory.finetuning_memory(kind, 3, PATCH_SIZE, 2) for kind in kinds)
    assert less.states < full.states < gate.states
    assert less.total < full.total <= gate.total


def test_the_classifier_has_no_stem() -> None:
    names = [set(build_classifier(settings(architecture={"stem": s}), 3, 2).state_dict()) for s in ("full", "gated", "none")]
    assert names[0] == names[1] == names[2]


# --- settings ----------------------------------------------------------------------------------------------------------------


def test_plans_from_before_the_knobs_read_as_their_defaults() -> None:
    plans = csm_plans()
    entry = plans["configurations"]["3d_fullres"]
    for name in ("stem", "decoder", "fusion"):
        del entry["architecture"]["arch_kwargs"][name]
    for name in ("frozen_share", "stem_closed_share", "transferred_blocks", "ema", "series_dropout", "masked_loss_weight"):
        del entry["csm"]["finetuning"][name]
    assert read_configuration(plans, "3d_fullres", "plans") == settings()
    found = settings()
    finetuning = found.csm.finetuning
    knobs = (found.architecture.stem, found.architecture.decoder, found.architecture.fusion)
    assert knobs == ("full", "unetr", "mean")
    assert (finetuning.frozen_share, finetuning.stem_closed_share, finetuning.transferred_blocks, finetuning.ema) == (
        0,
        0,
        None,
        0,
    )


@pytest.mark.parametrize(("knob", "unturned", "turned"), [("normalized_taps", False, True), ("decoder_init", "torch", "he")])
def test_plans_with_a_knob_that_is_gone_are_read_where_it_was_not_turned(knob: str, unturned: object, turned: object) -> None:
    plans = csm_plans()
    network = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    network[knob] = unturned
    assert read_configuration(plans, "3d_fullres", "plans") == settings()
    assert CSMSegmenter(len(SERIES), 3, **network).state_dict().keys() == segmenter().state_dict().keys()
    network[knob] = turned
    with pytest.raises(UserError, match=knob):
        read_configuration(plans, "3d_fullres", "plans")


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        ("frozen_share", 1.0),
        ("stem_closed_share", 1.0),
        ("ema", -0.1),
        ("ema", 1),
        ("series_dropout", 1.1),
        ("masked_loss_weight", -0.5),
    ],
)
def test_values_that_cannot_be_name_themselves(knob: str, value: float) -> None:
    with pytest.raises(UserError, match=f"finetuning.{knob} is {value}"):
        settings(finetuning={knob: value})


def test_more_blocks_than_there_are_cannot_be_transferred() -> None:
    with pytest.raises(UserError, match="transferred_blocks is 4, the encoder has 3"):
        check_encoder(settings(finetuning={"transferred_blocks": 4}), "plans")


@pytest.mark.parametrize("network", [{"stem": "none"}, {"decoder": "light"}])
def test_a_stem_that_is_not_there_cannot_be_closed(network: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"stem_closed_share is 0\.5, but the network has no stem"):
        settings(architecture=network, finetuning={"stem_closed_share": 0.5})


@pytest.mark.parametrize(
    ("done", "closed", "expected"),
    [(0.1, 0.5, 0.0), (0.5, 0.5, 0.0), (0.55, 0.5, 0.5), (0.6, 0.5, 1.0), (1.0, 0.5, 1.0), (1.0, 0.95, 1.0), (0.97, 0.94, 0.5)],
)
def test_a_stem_stays_closed_and_then_opens(done: float, closed: float, expected: float) -> None:
    assert stem_opening(done, closed) == pytest.approx(expected)


def test_a_closed_stem_lets_nothing_past_the_encoder_and_an_open_one_all() -> None:
    full = segmenter("full")
    expected = full(volume())
    full.open_stem(1.0)
    assert full(volume()).equal(expected)
    full.open_stem(0.0)
    assert reaches_past_the_encoder(full) == 0


@pytest.mark.parametrize("opening", [0.0, 0.4, 1.0])
def test_weights_say_how_far_the_stem_was_open(opening: float) -> None:
    saved, other = segmenter("full"), segmenter("full")
    assert "stem_opening" not in saved.state_dict()
    saved.open_stem(opening)
    other.load_state_dict(saved.state_dict())
    assert other(volume()).equal(saved(volume()))
    # trained networks cost nothing more than before
    assert (other.stem_opening is None) == (opening == 1)
    # weights without it, of a network that was never closed, open it again
    other.load_state_dict(segmenter("full").state_dict())
    assert other(volume()).equal(segmenter("full")(volume()))


def test_a_preset_file_reaches_the_plans(tmp_path: Path) -> None:
    from factories import GuessedMemory, base_plans

    preset = {"inherits_from": "S", "network": {"stem": "gated"}, "frozen_share": 0.1, "transferred_blocks": 8, "ema": 0.999}
    preset |= {"stem_closed_share": 0.4, "series_dropout": 0.3, "masked_loss_weight": 0.2}
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    wishes = Wishes(str(tmp_path / "preset.json"))
    plans, decisions = plan(base_plans(), "3d_fullres", facts_of(), "nnUNetCSMPlans", wishes, GuessedMemory())
    planned = read_configuration(plans, "3d_fullres", "plans")
    finetuning = planned.csm.finetuning
    assert (finetuning.frozen_share, finetuning.transferred_blocks, finetuning.ema) == (0.1, 8, 0.999)
    assert (finetuning.stem_closed_share, finetuning.series_dropout, finetuning.masked_loss_weight) == (0.4, 0.3, 0.2)
    told = {decision.name: decision.value for decision in decisions}
    assert "first 10%" in told["frozen encoder"] and "first 40%" in told["stem of raw voxels"]
    assert "30%" in told["series dropped"] and "weight 0.2" in told["loss of the pretext"]
    assert (told["transferred blocks"], told["weights of the segmenter"]) == ("the first 8", "averaged, decay 0.999")
    assert planned.architecture.stem == planned.pretraining_architecture.stem == "gated"


# --- transferred blocks ------------------------------------------------------------------------------------------------------


def encoder(seed: int) -> Encoder:
    torch.manual_seed(seed)
    made = build_encoder(settings().architecture)
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("num_blocks", [0, 2, 3, None])
def test_the_first_blocks_are_loaded_and_the_others_stay(num_blocks: int | None) -> None:
    architecture, source, target = settings().architecture, encoder(1), encoder(2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    rows = transfer(PretrainedEncoder("file", architecture, source.state_dict()), target, architecture, num_blocks)
    loaded = {name for name, tensor in target.state_dict().items() if tensor.equal(source.state_dict()[name])}
    stayed = {name for name, tensor in target.state_dict().items() if tensor.equal(before[name])}
    num_loaded = architecture.depth if num_blocks is None else num_blocks
    expected = {n for n in before if n.startswith(("embedding", "series_embedding"))}
    expected |= {n for n in before if n.startswith("blocks.") and int(n.split(".")[1]) < num_loaded}
    expected |= {n for n in before if n.startswith("norm.")} if num_loaded == architecture.depth else set()
    assert loaded == expected
    assert stayed == set(before) - expected
    table = as_table(rows).splitlines()
    assert sum("starts as drawn" in line for line in table if "blocks." in line) == architecture.depth - num_loaded


# --- weight decay ------------------------------------------------------------------------------------------------------------


def test_norms_biases_series_embeddings_mask_token_and_gate_do_not_decay() -> None:
    s = settings()
    by_series = settings(architecture={"encoder": {"embedding": "by_series"}}, reconstruction={"head": "by_series"})
    for network in (segmenter("gated"), pretext_of(s), pretext_of(by_series), build_classifier(s, 3, 2)):
        optimizer = build_optimizer(network, network.encoder, s.csm.finetuning_schedule)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        normed = {id(p) for m in network.modules() if isinstance(m, nn.LayerNorm | nn.InstanceNorm3d) for p in m.parameters()}
        for name, parameter in network.named_parameters():
            spared = ("bias", "series_embedding", "mask_token", "stem_gate")
            expected = 0.0 if id(parameter) in normed or name.endswith(spared) else s.csm.finetuning_schedule.weight_decay
            assert decay[id(parameter)] == expected, name


# --- the average of the weights ----------------------------------------------------------------------------------------------


def test_the_average_is_the_recursion_and_gives_the_network_back() -> None:
    network = nn.Linear(3, 2)
    average = WeightAverage(network, decay=0.5)
    expected = network.weight.detach().clone()
    for step in range(1, 9):
        with torch.no_grad():
            network.weight.normal_()
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach()
    own = network.weight.detach().clone()
    with average.in_charge():
        assert torch.allclose(network.weight, expected)
    assert torch.equal(network.weight, own)
    assert torch.allclose(average.weights["weight"], expected)


def test_what_is_saved_is_the_average_in_copies_that_are_shared_as_in_the_network() -> None:
    linear = nn.Linear(3, 3)
    network = nn.Sequential(linear, nn.BatchNorm1d(3))
    network.add_module("again", linear)
    average = WeightAverage(network, decay=0.5)
    own = linear.weight.detach().clone()
    average.weights["0.weight"].fill_(5.0)
    saved = average.state_dict()
    assert saved.keys() == network.state_dict().keys()
    assert (saved["0.weight"] == 5.0).all() and saved["0.weight"] is saved["again.weight"]
    assert torch.equal(linear.weight, own)
    with torch.no_grad():
        linear.bias.fill_(7.0)
    assert not (saved["0.bias"] == 7.0).any()


# --- trainings ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make_finetuner(make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Segmentation trainers with knobs set; their encoder is a file of random weights."""
    bare = make_trainer(False)
    torch.manual_seed(7)
    model = pretext_of(bare.settings)
    saved = {
        "network_weights": model.state_dict(),
        "init_args": {"plans": bare.plans_manager.plans, "configuration": "3d_fullres"},
        "trainer_name": "nnUNetTrainerCSMPretrain",
    }
    checkpoint.save(saved, tmp_path / "encoder.pth")
    monkeypatch.setenv("nnUNet_csm_encoder", str(tmp_path / "encoder.pth"))

    def make(resume: bool = False, stem: str = "full", **knobs: Any) -> Any:
        def change(entry: dict[str, Any]) -> None:
            entry["architecture"]["arch_kwargs"]["stem"] = stem
            entry["csm"]["finetuning"] |= knobs

        return make_trainer(False, resume=resume, change=change)

    return make


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.bare_network.state_dict().items()}


def saved_by(trainer: Any, name: str = "checkpoint_final.pth") -> dict[str, Any]:
    return checkpoint.load(Path(trainer.output_folder) / name)


class KilledError(Exception):
    """Stands in for a kill: nothing is saved on the way out."""


def kill_after(trainer: Any, num_steps: int) -> None:
    original = trainer.train_step

    def train_step(batch: Any) -> dict:
        if trainer.iteration == num_steps:
            raise KilledError
        return original(batch)

    trainer.train_step = train_step


def test_with_all_knobs_a_killed_run_goes_on_to_the_bit(make_finetuner: Callable[..., Any]) -> None:
    # 9 steps in 3 epochs: the kill falls between the last checkpoint and the end of the frozen part
    knobs = {
        "stem": "gated",
        "stem_closed_share": 0.5,
        "frozen_share": 0.6,
        "transferred_blocks": 2,
        "ema": 0.9,
        "series_dropout": 0.5,
    }
    whole = make_finetuner(**knobs)
    whole.run_training()
    expected = saved_by(whole)
    killed = make_finetuner(**knobs)
    kill_after(killed, 4)
    with pytest.raises(KilledError):
        killed.run_training()
    resumed = make_finetuner(resume=True, **knobs)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 1
    resumed.run_training()
    found = saved_by(resumed)
    for part in ("network_weights", "learning_weights"):
        assert found[part].keys() == expected[part].keys()
        assert all(torch.equal(found[part][name], tensor) for name, tensor in expected[part].items())
    assert found["logging"]["val_losses"] == expected["logging"]["val_losses"]
    assert not all(torch.equal(found["learning_weights"][n], t) for n, t in found["network_weights"].items())


def test_the_trainer_opens_the_stem_step_by_step(make_finetuner: Callable[..., Any]) -> None:
    trainer = make_finetuner(stem_closed_share=0.5)
    openings: list[float] = []
    original = trainer.learn

    def learn(batch: Any) -> torch.Tensor:
        openings.append(float(trainer.bare_network.stem_opening))
        return original(batch)

    trainer.learn = learn
    trainer.run_training()
    # 9 steps: after 4 of them the half is not over, 5 of them are 0.556 of all
    assert openings == pytest.approx([0, 0, 0, 0, (5 / 9 - 0.5) / 0.1, 1, 1, 1, 1], abs=1e-6)


def test_a_checkpoint_of_a_closed_stem_predicts_with_a_closed_one(make_finetuner: Callable[..., Any]) -> None:
    trainer = make_finetuner(stem_closed_share=0.9)
    kill_after(trainer, 4)
    with pytest.raises(KilledError):
        trainer.run_training()
    weights = torch.load(Path(trainer.output_folder) / "checkpoint_best.pth", weights_only=False)["network_weights"]
    predicting = make_finetuner(stem_closed_share=0.9)
    predicting.initialize()
    predicting.network.load_state_dict(weights)
    assert predicting.bare_network.stem_opening == 0


def test_dropped_series_are_as_many_as_masking_hides_and_never_all() -> None:
    image = torch.arange(1.0, 6.0)[:, None, None, None].repeat(1, 2, 2, 2)
    image[3] = 0
    lost: Counter[tuple[int, ...]] = Counter()
    for seed in range(3000):
        dropped = image.clone()
        drop_series(dropped, (0, 1, 3, 4), 0.75, seed)
        again = image.clone()
        drop_series(again, (0, 1, 3, 4), 0.75, seed)
        assert dropped.equal(again)
        absent = [c for c in (0, 1, 4) if not dropped[c].any()]
        assert all(dropped[c].equal(image[c]) for c in range(5) if c not in absent)
        lost[tuple(absent)] += 1
    sizes = Counter({n: sum(count for which, count in lost.items() if len(which) == n) for n in range(4)})
    assert sizes[3] == 0
    assert [sizes[n] / 3000 for n in range(3)] == pytest.approx([0.25, 0.375, 0.375], abs=0.03)
    # each series and each pair as likely
    assert all(count / 3000 == pytest.approx(0.125, abs=0.025) for which, count in lost.items() if which)


def test_a_sample_with_one_series_keeps_it() -> None:
    image = torch.zeros(3, 2, 2, 2)
    image[1] = 1
    for seed in range(20):
        drop_series(image, (0, 1, 2), 0.99, seed)
    assert image[1].all()


def test_training_patches_lose_series_and_validation_patches_do_not(make_finetuner: Callable[..., Any]) -> None:
    trainer = make_finetuner(series_dropout=0.9)
    channels = list(trainer.settings.architecture.channels)
    shown: dict[str, list[torch.Tensor]] = {"train_step": [], "validation_step": []}
    for name, seen in shown.items():
        original = getattr(trainer, name)

        def step(batch: Any, original: Any = original, seen: Any = seen) -> Any:
            seen.append((batch["data"][:, channels] != 0).flatten(2).any(2))
            return original(batch)

        setattr(trainer, name, step)
    trainer.run_training()
    training, validation = (torch.cat(seen) for seen in shown.values())
    assert training.any(1).all() and (~training).any(1).float().mean() > 0.5
    assert (~validation).any(1).float().mean() < (~training).any(1).float().mean()


def test_a_frozen_encoder_stays_and_the_rest_learns_until_it_thaws(make_finetuner: Callable[..., Any]) -> None:
    trainer = make_finetuner(frozen_share=0.5)
    states: list[dict[str, torch.Tensor]] = []
    original = trainer.train_step

    def train_step(batch: Any) -> dict:
        states.append(weights(trainer))
        return original(batch)

    trainer.train_step = train_step
    trainer.run_training()
    states.append(weights(trainer))
    pretrained = checkpoint.load(trainer.encoder_source)["network_weights"]
    num_frozen = round(0.5 * 9)
    for number, state in enumerate(states):
        of_encoder = {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}
        same = [name for name, tensor in of_encoder.items() if tensor.equal(pretrained[name])]
        assert len(same) == len(of_encoder) if number <= num_frozen else len(same) < len(of_encoder) / 2
        assert number == 0 or not state["decoder.seg_layers.0.weight"].equal(states[number - 1]["decoder.seg_layers.0.weight"])
    # neither decayed nor remembered while it was frozen
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {9, 9 - num_frozen}


def test_the_encoder_learns_slower_towards_its_input(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step of a training, whatever nnU-Net's loop does to the rates: AdamW's first steps have the size of the rate."""
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")

    def change(entry: dict[str, Any]) -> None:
        entry["csm"]["finetuning_schedule"] |= {"layer_decay": 0.75, "weight_decay": 0.0, "warmup": 0.0}

    trainer = make_trainer(False, change=change)
    rates: list[dict[str, float]] = []
    original = trainer.learn

    def learn(batch: Any) -> torch.Tensor:
        before = {name: p.detach().clone() for name, p in trainer.bare_network.named_parameters()}
        loss: torch.Tensor = original(batch)
        moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in trainer.bare_network.named_parameters()}
        names = {id(p): name for name, p in trainer.bare_network.named_parameters()}
        rates.append({names[id(p)]: group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]})
        if len(rates) == 1:
            for name, rate in rates[0].items():
                # where there is a gradient
                assert moved[name] == pytest.approx(rate, rel=0.02) or moved[name] < 0.98 * rate, name
            assert moved["encoder.embedding.weight"] == pytest.approx(rates[0]["encoder.embedding.weight"], rel=0.02)
        return loss

    trainer.learn = learn
    trainer.run_training()
    depth = trainer.settings.architecture.depth
    powers = {"encoder.embedding.weight": depth + 1, "encoder.norm.weight": 0, "stem.0.weight": 0}
    powers |= {f"encoder.blocks.{number}.attn.qkv.weight": depth - number for number in range(depth)}
    assert len(rates) == 9
    for step in rates:
        top = step["decoder.seg_layers.0.weight"]
        assert all(step[name] == pytest.approx(top * 0.75**power) for name, power in powers.items())
    assert rates[0]["stem.0.weight"] > rates[4]["stem.0.weight"] > rates[8]["stem.0.weight"] > 0


def test_from_scratch_nothing_is_frozen(make_finetuner: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")
    with_share, without = make_finetuner(frozen_share=0.5), make_finetuner()
    with_share.run_training()
    expected = weights(with_share)
    without.run_training()
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(without).items())


def test_the_average_changes_no_step_and_is_what_is_saved_and_validated(make_finetuner: Callable[..., Any]) -> None:
    plain = make_finetuner()
    plain.run_training()
    last = saved_by(plain)
    averaging = make_finetuner(ema=0.9)
    averaging.run_training()
    saved = saved_by(averaging)
    assert "learning_weights" not in last
    assert all(torch.equal(saved["learning_weights"][name], tensor) for name, tensor in last["network_weights"].items())
    used = saved["network_weights"]
    assert all(torch.equal(averaging.average.weights[name], used[name]) for name in averaging.average.weights)
    assert any(not torch.equal(used[name], tensor) for name, tensor in last["network_weights"].items())
    assert saved["logging"]["train_losses"] == last["logging"]["train_losses"]
    assert saved["logging"]["val_losses"] != last["logging"]["val_losses"]


def test_a_loaded_average_validates_as_the_one_that_was_saved(make_finetuner: Callable[..., Any]) -> None:
    trainer = make_finetuner(ema=0.9)
    trainer.run_training()
    loaded = make_finetuner(resume=True, ema=0.9)
    loaded.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    saved = saved_by(trainer)
    with loaded.averaged():
        assert all(torch.equal(saved["network_weights"][name], tensor) for name, tensor in weights(loaded).items())
    assert all(torch.equal(saved["learning_weights"][name], tensor) for name, tensor in weights(loaded).items())


def test_a_run_does_not_go_on_with_another_decay(make_finetuner: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_finetuner()
    trainer.run_training()
    other = make_finetuner(resume=True, ema=0.9)
    with pytest.raises(SystemExit) as stop:
        other.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert stop.value.code == 2
    assert "ema is 0.0, the plans say 0.9" in capsys.readouterr().err
