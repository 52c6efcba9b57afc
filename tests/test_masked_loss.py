"""The pretext's own loss beside a segmentation's: on the same encoder, resumed to the bit, and never on held-out cases."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import JOINT_NETWORK
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.training.masked_loss import share_weights

MAE3D = {
    "name": "mae3d",
    "masking": {"mask_ratio": 0.75},
    "reconstruction": {"width": 24, "depth": 1, "num_heads": 2, "normalize_targets": True},
}


@pytest.fixture
def make(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Segmentation trainers, from scratch unless told; keywords are changes to `csm.finetuning`."""
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")

    def made(
        weight: float = 0.5, resume: bool = False, change: Callable[[dict[str, Any]], None] | None = None, **knobs: Any
    ) -> Any:
        def changed(entry: dict[str, Any]) -> None:
            entry["csm"]["finetuning"] |= {"masked_loss_weight": weight, **knobs}
            if change is not None:
                change(entry)

        return make_trainer(False, resume=resume, change=changed)

    return made


def saved_by(trainer: Any) -> dict[str, Any]:
    return checkpoint.load(Path(trainer.output_folder) / "checkpoint_final.pth")


def assert_equal(found: Any, expected: Any) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def joint(entry: dict[str, Any]) -> None:
    entry["architecture"]["arch_kwargs"] |= JOINT_NETWORK
    entry["csm"]["pretext"] = MAE3D


class KilledError(Exception):
    """Stands in for a kill: nothing is saved on the way out."""


@pytest.mark.parametrize("change", [None, joint], ids=["CSM", "MAE3D"])
def test_a_killed_run_goes_on_to_the_bit(make: Callable[..., Any], change: Any) -> None:
    whole = make(change=change, ema=0.9)
    whole.run_training()
    expected = saved_by(whole)
    killed = make(change=change, ema=0.9)
    original = killed.train_step

    def train_step(batch: Any) -> dict:
        if killed.iteration == 4:
            raise KilledError
        return original(batch)

    killed.train_step = train_step
    with pytest.raises(KilledError):
        killed.run_training()
    resumed = make(change=change, ema=0.9, resume=True)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 1
    resumed.run_training()
    found = saved_by(resumed)
    for part in ("network_weights", "learning_weights", "masked_loss_weights"):
        assert_equal(found[part], expected[part])
    for name in ("train_losses", "val_losses"):
        assert found["logging"][name] == expected["logging"][name]


def test_without_a_weight_a_run_is_what_it_was(make: Callable[..., Any], make_trainer: Callable[..., Any]) -> None:
    def before(entry: dict[str, Any]) -> None:
        del entry["csm"]["finetuning"]["masked_loss_weight"]

    old = make_trainer(False, change=before)
    old.run_training()
    expected = saved_by(old)
    new = make(0.0)
    new.run_training()
    found = saved_by(new)
    assert new.masked is None
    assert found.keys() == expected.keys() and "masked_loss_weights" not in found
    assert_equal(found["network_weights"], expected["network_weights"])


def test_stock_prediction_reads_the_checkpoint(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", nnunet.trainer_path())
    trainer = make()
    trainer.run_training()
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    patch = torch.randn(1, trainer.num_input_channels, *trainer.settings.patch_size)
    trainer.bare_network.eval()
    with torch.no_grad():
        assert predictor.network.eval()(patch).equal(trainer.bare_network(patch))


def test_its_gradient_is_added_to_that_of_the_segmentation(make: Callable[..., Any]) -> None:
    """Linear in the weight, on the encoder; the segmenter's decoder learns as without, and predicts without what rebuilds."""
    gradients: dict[float, dict[str, torch.Tensor]] = {}
    names = set()
    for weight in (0.0, 0.5, 1.0):
        trainer = make(weight)
        trainer.initialize()
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.max_gradient_norm = 1e9
        trainer.train_step(next(trainer.dataloader_train))
        names.add(tuple(trainer.bare_network.state_dict()))
        gradients[weight] = {name: p.grad.clone() for name, p in trainer.bare_network.named_parameters() if p.grad is not None}
    assert len(names) == 1
    for name, plain in gradients[0.0].items():
        once, twice = (gradients[weight][name] - plain for weight in (0.5, 1.0))
        torch.testing.assert_close(twice, 2 * once, rtol=1e-3, atol=1e-6)
        assert name.startswith("encoder.") or once.abs().max() < 1e-7, name
    moved = [name for name, plain in gradients[0.0].items() if not torch.allclose(gradients[1.0][name], plain)]
    assert {"encoder.embedding.weight", "encoder.blocks.0.attn.qkv.weight"} <= set(moved)


def test_the_loss_is_that_of_pretraining_on_the_segmenters_weights(make: Callable[..., Any]) -> None:
    trainer = make()
    trainer.initialize()
    masked = trainer.masked
    masked.open_images()
    (batch,) = masked.parts()
    assert len(batch) == trainer.settings.csm.pretraining.batch_size
    # a step of training asks for all or some, never as validation does
    expected = masked.pretext(*batch.args) / masked.pretext.weight(batch.drawn)
    torch.testing.assert_close(masked(batch) / trainer.schedule.batch_size, 0.5 * expected)
    (later,) = masked.parts()
    assert not later.volumes[0].equal(batch.volumes[0])
    shared = dict(masked.pretext.encoder.named_parameters())
    assert all(shared[name] is parameter for name, parameter in trainer.encoder.named_parameters())
    # drop path is the segmentation's
    assert any(type(m).__name__ == "DropPath" for m in trainer.encoder.modules())
    assert not any(type(m).__name__ == "DropPath" for m in masked.pretext.modules())
    learned = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(learned) == len(set(learned))
    everything = {id(p) for part in (trainer.bare_network, masked.pretext) for p in part.parameters()}
    assert set(learned) == everything


def test_learned_in_parts_it_is_the_same(make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    losses = []
    for num_parts in (1, 2):
        monkeypatch.setenv("nnUNet_csm_accumulate", str(num_parts))
        trainer = make()
        trainer.initialize()
        trainer.masked.open_images()
        parts = trainer.masked.parts()
        assert len(parts) == num_parts
        losses.append(sum(trainer.masked(part).item() for part in parts))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def opened(trainer: Any) -> Any:
    trainer.initialize()
    trainer.masked.open_images()
    return trainer.masked


def in_dataset(trainer: Any, cases: Sequence[str]) -> list[str]:
    return sorted(f"{trainer.plans_manager.dataset_name}/{case}" for case in cases)


def test_it_draws_on_the_training_cases_of_its_fold_and_no_others(make: Callable[..., Any]) -> None:
    trainer = make()
    masked, (training, validation) = opened(trainer), trainer.do_split()
    assert sorted(masked.bank.names) == in_dataset(trainer, training)
    assert not set(masked.bank.names) & set(in_dataset(trainer, validation))


def test_images_without_labels_are_told_in_the_splits(make: Callable[..., Any]) -> None:
    """As a study has them where labels are few: the segmentation knows nothing of them."""
    trainer = make()
    training, validation = trainer.do_split()
    path = Path(trainer.preprocessed_dataset_folder_base) / "splits_few.json"
    few = [{"train": training[:2], "val": validation[:1], "test": validation[1:], "unlabelled": training[2:]}]
    try:
        path.write_text(json.dumps(few))
        trainer = make(change=lambda entry: entry["csm"].update(splits=path.name))
        masked = opened(trainer)
        assert trainer.do_split()[0] == training[:2]
        assert sorted(masked.bank.names) == in_dataset(trainer, training)
        path.write_text(json.dumps([few[0] | {"unlabelled": ["nobody"]}]))
        with pytest.raises(UserError, match="unlabelled names nobody"):
            opened(make(change=lambda entry: entry["csm"].update(splits=path.name)))
    finally:
        path.unlink()


def test_a_segmenter_of_fewer_series_hides_and_rebuilds_these(make: Callable[..., Any]) -> None:
    def fewer(entry: dict[str, Any]) -> None:
        network = entry["architecture"]["arch_kwargs"]
        network["series"], network["channels"] = network["series"][1:], network["channels"][1:]

    trainer = make(change=fewer)
    masked = opened(trainer)
    (batch,) = masked.parts()
    assert batch.volumes[0].shape[1] == len(trainer.settings.architecture.series) == 2
    masked(batch).backward()
    gradient = trainer.encoder.series_embedding.grad
    assert gradient is not None and gradient.shape[0] == 2 and gradient.any(1).all()


@pytest.mark.parametrize(
    ("network", "pretext"),
    [
        ({}, {"name": "none"}),
        ({}, {"name": "dino", "head": {"hidden": 16, "bottleneck": 8, "num_prototypes": 12}}),
    ],
    ids=["none", "dino"],
)
def test_a_pretext_whose_loss_does_not_reach_the_encoder_is_refused(
    make: Callable[..., Any], capsys: pytest.CaptureFixture[str], network: dict[str, Any], pretext: dict[str, Any]
) -> None:
    trainer = make(change=lambda entry: entry["csm"].update(pretext=pretext))
    with pytest.raises(SystemExit) as stop:
        trainer.run_training()
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"masked_loss_weight is 0.5, but no loss of the pretext '{pretext['name']}' reaches its encoder" in said


@pytest.mark.parametrize("like", [True, False], ids=["the same", "another decoder"])
def test_what_rebuilds_goes_on_from_the_pretraining(
    make: Callable[..., Any], make_trainer: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, like: bool
) -> None:
    pretraining = make_trainer(True)
    pretraining.run_training()
    # by its path, as another recipe is taken only so
    monkeypatch.setenv("nnUNet_csm_encoder", str(Path(pretraining.output_folder) / "checkpoint_final.pth"))

    def change(entry: dict[str, Any]) -> None:
        entry["csm"]["pretext"]["reconstruction"]["depth"] = 1 if like else 2

    trainer = make(change=change)
    trainer.initialize()
    drawn = {name: tensor.clone() for name, tensor in trainer.masked.own_weights().items()}
    trainer.on_fresh_start()
    expected = {n: t for n, t in pretraining.pretext.state_dict().items() if not n.startswith("encoder.")} if like else drawn
    assert_equal(trainer.masked.own_weights(), expected)
    pretrained = pretraining.encoder.state_dict()
    assert_equal(trainer.masked.pretext.encoder.state_dict(), pretrained)
    said = "goes on from" if like else "starts as drawn"
    assert f"weight 0.5; its decoder {said}" in Path(trainer.log_file).read_text()


def test_a_frozen_encoder_stays_while_what_rebuilds_learns(
    make: Callable[..., Any], make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer(True).run_training()
    monkeypatch.setenv("nnUNet_csm_encoder", "auto")
    trainer = make(frozen_share=0.99)
    states: list[tuple[torch.Tensor, torch.Tensor]] = []
    original = trainer.learn

    def learn(batch: Any) -> torch.Tensor:
        loss: torch.Tensor = original(batch)
        states.append((trainer.first_layer(), trainer.masked.pretext.decoder.mask_token.detach().clone()))
        return loss

    trainer.learn = learn
    trainer.run_training()
    (encoder, decoder), *others = states[:-1]
    assert all(encoder.equal(one) and not decoder.equal(other) for one, other in others)


def test_what_follows_a_step_follows_it(make: Callable[..., Any]) -> None:
    """A codebook moves, whose pretext rebuilds through a convolutional encoder."""

    def vqvae(entry: dict[str, Any]) -> None:
        network = {"width": 16, "depth": 1, "decoder": "unet", "encoder": {"kind": "residual_unet", "base": 4}}
        entry["architecture"]["arch_kwargs"] |= network
        entry["csm"]["pretext"] = {"name": "vqvae", "num_codes": 12, "code_width": 5, "idle_steps": 2}

    trainer = make(change=vqvae)
    trainer.initialize()
    before = trainer.masked.pretext.codes.clone()
    trainer.run_training()
    assert not trainer.masked.pretext.codes.equal(before)
    assert_equal(trainer.masked.own_weights(), saved_by(trainer)["masked_loss_weights"])


def test_a_run_does_not_go_on_with_another_weight_or_pretext(
    make: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make()
    trainer.run_training()
    path = str(Path(trainer.output_folder) / "checkpoint_final.pth")

    def hides_less(entry: dict[str, Any]) -> None:
        entry["csm"]["pretext"]["masking"]["mask_ratio"] = 0.6

    for other, said in (
        (make(0.25, resume=True), "masked_loss_weight is 0.5"),
        (make(resume=True, change=hides_less), "pretext is"),
    ):
        with pytest.raises(SystemExit):
            other.load_checkpoint(path)
        assert said in capsys.readouterr().err


def test_encoders_share_weights_and_nothing_else() -> None:
    one, other = (nn.Sequential(nn.Linear(2, 2), nn.Dropout(p)) for p in (0.0, 0.5))
    share_weights(one, other)  # type: ignore[arg-type]
    assert one[0].weight is other[0].weight and one[0].bias is other[0].bias
    assert one[1].p == 0.0
