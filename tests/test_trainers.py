"""Training runs in this process: resume, determinism, what is read, where the encoder comes from."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_folders import PlannedDataset


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """test_chain.py and test_mae3d.py look at them."""
    monkeypatch.setattr("nnunet_csm.training.pretraining.nnUNetTrainerCSMPretrain.save_pictures", lambda _: None)


def weights(folder: str, name: str = "checkpoint_final.pth") -> dict[str, torch.Tensor]:
    from nnunet_csm import checkpoint

    return checkpoint.load(Path(folder) / name)["network_weights"]


class KilledError(Exception):
    """Stands in for a kill: nothing is saved on the way out."""


def kill_in(trainer: Any, epoch: int, step: int) -> None:
    original = trainer.train_step

    def train_step(batch: Any) -> dict:
        if trainer.current_epoch == epoch and trainer.iteration % trainer.num_iterations_per_epoch == step:
            raise KilledError
        return original(batch)

    trainer.train_step = train_step


def goes_on_and_transfers(make_trainer: Callable[..., Any], whole: Any, **given: Any) -> None:
    """A pretraining that is killed and goes on ends as `whole` did, which was not, and fine-tuning starts from its encoder."""
    expected = weights(whole.output_folder)
    shutil.rmtree(whole.output_folder)
    killed = make_trainer(True, **given)
    kill_in(killed, epoch=1, step=1)
    with pytest.raises(KilledError):
        killed.run_training()
    # what happens meanwhile does not matter
    torch.rand(7)
    resumed = make_trainer(True, resume=True, **given)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    resumed.run_training()
    found = weights(resumed.output_folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    finetuner = make_trainer(False, **given)
    finetuner.initialize()
    finetuner.on_fresh_start()
    assert all(tensor.equal(expected[f"encoder.{name}"]) for name, tensor in finetuner.encoder.state_dict().items())


@pytest.mark.parametrize("pretraining", [True, False])
def test_killed_in_mid_epoch_and_resumed_equals_uninterrupted(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, pretraining: bool
) -> None:
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")
    whole = make_trainer(pretraining)
    whole.run_training()
    expected = weights(whole.output_folder)
    shutil.rmtree(whole.output_folder)

    killed = make_trainer(pretraining)
    kill_in(killed, epoch=1, step=1)
    with pytest.raises(KilledError):
        killed.run_training()
    resumed = make_trainer(pretraining, resume=True)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 1
    resumed.run_training()
    found = weights(resumed.output_folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_pretraining_sees_training_cases_of_its_fold_only_and_no_label(
    make_trainer: Callable[..., Any], planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preprocessed = tmp_path / "nnUNet_preprocessed"
    shutil.copytree(planned_dataset.folders.preprocessed, preprocessed)
    for label in (preprocessed / planned_dataset.name).rglob("*_seg.b2nd"):
        label.unlink()
    trainer = make_trainer(True, fold=1)
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    trainer.preprocessed_dataset_folder_base = str(preprocessed / planned_dataset.name)
    trainer.preprocessed_dataset_folder = str(preprocessed / planned_dataset.name / "nnUNetPlans_3d_fullres")
    trainer.run_training()
    training, validation = trainer.do_split()
    assert trainer.train_batches.bank.names == [f"{planned_dataset.name}/{case}" for case in sorted(training)]
    assert trainer.val_batches.bank.names == [f"{planned_dataset.name}/{case}" for case in sorted(validation)]
    assert not set(training) & set(validation)


@pytest.mark.parametrize("pretraining", [True, False])
def test_trainers_on_a_cpu_keep_the_memory_they_free(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, pretraining: bool
) -> None:
    from nnunet_csm.training import trainer as host

    calls: list[bool] = []
    monkeypatch.setattr(host, "keep_freed_memory", lambda: calls.append(True))
    make_trainer(pretraining)
    assert calls == [True]


def test_fold_all_pretrains_on_every_case(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(True, fold="all")
    trainer.initialize()
    trainer.get_dataloaders()
    assert len(trainer.train_batches.bank) == 6


def test_finetuning_starts_from_the_encoder_of_its_fold(make_trainer: Callable[..., Any]) -> None:
    pretrainer = make_trainer(True)
    pretrainer.run_training()
    pretrained = weights(pretrainer.output_folder)
    finetuner = make_trainer(False)
    finetuner.initialize()
    finetuner.on_fresh_start()
    for name, tensor in finetuner.encoder.state_dict().items():
        assert torch.equal(tensor, pretrained[f"encoder.{name}"])
    assert finetuner.encoder_source.endswith("fold_0/checkpoint_final.pth")


def test_an_encoder_of_another_recipe_is_not_taken_unless_it_is_named(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_csm.errors import UserError

    make_trainer(True).run_training()
    recipe = make_trainer(False).settings.csm
    masking = {**recipe.pretext["masking"], "mask_ratio": 0.6}
    for changed, said in (
        (
            {"pretext": {**recipe.pretext, "masking": masking}},
            r"checkpoint_final.pth: .*pretext.masking .*0.5.*0.6.*made anew since",
        ),
        ({"pretraining": replace(recipe.pretraining, num_epochs=77)}, r"pretraining.num_epochs \d+, the plans say 77"),
    ):
        finetuner = make_trainer(False)
        finetuner.initialize()
        finetuner.settings = replace(finetuner.settings, csm=replace(recipe, **changed))
        with pytest.raises(UserError, match=said) as error:
            finetuner.on_fresh_start()
        chosen = re.search(r"nnUNet_csm_encoder=(\S+)\)", str(error.value))
        assert chosen is not None
        monkeypatch.setenv("nnUNet_csm_encoder", chosen[1])
        finetuner.on_fresh_start()
        monkeypatch.delenv("nnUNet_csm_encoder")


def test_a_missing_encoder_is_an_error_that_offers_fold_all(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_csm.errors import UserError

    make_trainer(True, fold="all").run_training()
    finetuner = make_trainer(False, fold=2)
    finetuner.initialize()
    with pytest.raises(UserError, match="nnUNet_csm_encoder=all") as error:
        finetuner.on_fresh_start()
    assert "validation images" in str(error.value) and "scratch" in str(error.value)
    monkeypatch.setenv("nnUNet_csm_encoder", "all")
    finetuner.on_fresh_start()
    assert "fold_all" in finetuner.encoder_source


def test_an_encoder_of_a_stopped_pretraining_is_offered_by_its_path(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_csm.errors import UserError

    pretrainer = make_trainer(True)
    kill_in(pretrainer, epoch=1, step=0)
    with pytest.raises(KilledError):
        pretrainer.run_training()
    finetuner = make_trainer(False)
    finetuner.initialize()
    with pytest.raises(UserError, match="no pretrained encoder; finish the pretraining") as error:
        finetuner.on_fresh_start()
    offered = f"{pretrainer.output_folder}/checkpoint_best.pth"
    assert f"nnUNet_csm_encoder={offered}" in str(error.value)
    monkeypatch.setenv("nnUNet_csm_encoder", offered)
    finetuner.on_fresh_start()
    assert finetuner.encoder_source == offered


@pytest.mark.parametrize("splits_file", ["splits_final.json", "csm_splits.json"])
def test_folds_are_those_of_the_file_and_an_encoder_that_saw_their_test_cases_is_warned_about(
    make_trainer: Callable[..., Any],
    planned_dataset: PlannedDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    splits_file: str,
) -> None:
    from nnunet_csm.training.pretrained import held_out_cases

    preprocessed = tmp_path / "nnUNet_preprocessed"
    shutil.copytree(planned_dataset.folders.preprocessed, preprocessed)
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    folder = preprocessed / planned_dataset.name
    names = sorted(f.name.removesuffix(".nii.gz") for f in (folder / "gt_segmentations").glob("*.nii.gz"))
    folds = [{"train": names[:3], "val": names[3:4], "test": names[4:]}, {"train": names[:5], "val": names[5:]}]
    for name in {"splits_final.json", splits_file}:
        (folder / name).write_text(json.dumps(folds))
    # an encoder that saw a test case of fold 0, and no other held-out one of either fold
    pretrainer = make_trainer(True, splits=splits_file)
    pretrainer.initialize()
    pretrainer.open_banks()
    saw = [f"{planned_dataset.name}/{case}" for case in names[:3] + names[4:5]]
    monkeypatch.setattr(pretrainer, "provenance", lambda: {"training_cases": saw, "series": pretrainer.series})
    pretrainer.save_checkpoint(str(tmp_path / "encoder.pth"))
    monkeypatch.setenv("nnUNet_csm_encoder", str(tmp_path / "encoder.pth"))
    for fold, held_out in ((0, names[3:]), (1, names[5:])):
        finetuner = make_trainer(False, fold, splits=splits_file)
        finetuner.initialize()
        assert list(held_out_cases(finetuner)) == held_out
        capsys.readouterr()
        finetuner.on_fresh_start()
        assert ("saw the images (never the labels) of 1 held-out cases" in capsys.readouterr().out) == (fold == 0)
    beyond = make_trainer(False, 2, splits=splits_file)
    with pytest.raises(SystemExit) as stop:
        beyond.do_split()
    assert stop.value.code == 2
    assert f"{splits_file}: has 2 folds, fold 2 is not among them" in capsys.readouterr().err


def test_weights_given_by_hand_stay_in_charge(make_trainer: Callable[..., Any]) -> None:
    finetuner = make_trainer(False)
    finetuner.initialize()
    with torch.no_grad():
        for parameter in finetuner.network.parameters():
            parameter.add_(1.0)
    before = {k: v.clone() for k, v in finetuner.network.state_dict().items()}
    finetuner.on_fresh_start()
    assert all(torch.equal(before[k], v) for k, v in finetuner.network.state_dict().items())


def test_a_fresh_run_moves_old_checkpoints_away_when_it_has_one(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")
    trainer = make_trainer(False)
    stale = Path(trainer.output_folder) / "checkpoint_final.pth"
    stale.write_bytes(b"an earlier run")
    plans = Path(trainer.output_folder_base) / "plans.json"
    plans.write_text("of the earlier run")
    kill_in(trainer, epoch=0, step=1)
    with pytest.raises(KilledError):
        trainer.run_training()
    # it can be used until there is another, but it is not what would be gone on with
    assert stale.read_bytes() == b"an earlier run" and plans.read_text() == "of the earlier run"
    later = make_trainer(False)
    later.current_epoch = 1
    with pytest.raises(SystemExit):
        later.run_training()
    assert "a run that was begun afresh ended before its first checkpoint" in capsys.readouterr().err
    trainer = make_trainer(False)
    kill_in(trainer, epoch=1, step=1)
    with pytest.raises(KilledError):
        trainer.run_training()
    assert not stale.exists() and json.loads(plans.read_text())["plans_name"]
    assert not (Path(trainer.output_folder) / "begun_afresh.txt").exists()
    moved = list(Path(trainer.output_folder).glob("previous_*/checkpoint_final.pth"))
    assert [f.read_bytes() for f in moved] == [b"an earlier run"]


def test_a_step_without_memory_ends_with_the_remedies(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(True)

    def learn(_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(trainer, "learn", learn)
    with pytest.raises(SystemExit) as stop:
        trainer.run_training()
    said = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert said.startswith("Error: no GPU memory for a step: CUDA out of memory. Tried to allocate 2.00 GiB. Learn")
    assert "nnUNet_csm_accumulate=2" in said and "nnUNet_csm_bank=mapped" in said


def test_missing_splits_are_those_of_nnunet(
    make_trainer: Callable[..., Any], planned_dataset: PlannedDataset, tmp_path: Path
) -> None:
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    given = planned_dataset.folders.preprocessed / planned_dataset.name
    found = []
    for do_split in (type(make_trainer(False)).do_split, nnUNetTrainer.do_split):
        trainer = make_trainer(False, fold=1)
        folder = tmp_path / do_split.__qualname__
        shutil.copytree(given / "nnUNetPlans_3d_fullres", folder / "nnUNetPlans_3d_fullres")
        trainer.preprocessed_dataset_folder_base = str(folder)
        trainer.preprocessed_dataset_folder = str(folder / "nnUNetPlans_3d_fullres")
        sides = do_split(trainer)
        found.append((tuple(map(list, sides)), json.loads((folder / "splits_final.json").read_text())))
    assert found[0] == found[1]


def test_resuming_with_other_plans_is_refused(make_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(True)
    trainer.run_training()
    other = make_trainer(True, resume=True)
    object.__setattr__(other.settings.architecture, "width", 48)
    with pytest.raises(SystemExit) as stop:
        other.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert stop.value.code == 2
    assert "width is 24, the plans say 48" in capsys.readouterr().err
