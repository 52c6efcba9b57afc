"""The classifier's trainer: resume, who is seen when, what is left out, what is refused, what it writes."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from nnunet_folders import PlannedDataset

from nnunet_csm.inference.classification import ClassifyRequest, classify

ROWS = ("benign", "malignant") * 3


@pytest.fixture
def preprocessed(planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the planned phantom with classes, and results of this test's own; encoders are not looked for."""
    shutil.copytree(planned_dataset.folders.preprocessed, tmp_path / "nnUNet_preprocessed")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "nnUNet_preprocessed"))
    monkeypatch.setenv("nnUNet_raw", str(planned_dataset.folders.raw))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nnUNet_results"))
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")
    folder = tmp_path / "nnUNet_preprocessed" / planned_dataset.name
    write_table(folder, [f"{case},{name}" for case, name in zip(cases_of(folder), ROWS, strict=True)])
    one = cases_of(folder)
    repeats = [{"train": one[:4], "val": one[4:]}, {"train": one[:2], "val": one[2:4], "test": one[4:]}]
    (folder / "splits_final.json").write_text(json.dumps(repeats))
    return folder


def cases_of(folder: Path) -> list[str]:
    return sorted(f.name.removesuffix("_seg.b2nd") for f in folder.rglob("*_seg.b2nd"))


def write_table(folder: Path, rows: list[str], header: str = "case,class") -> None:
    (folder / "classification.csv").write_text("\n".join([header, *rows]) + "\n")


@pytest.fixture
def make_trainer(preprocessed: Path) -> Callable[..., Any]:
    from nnunet_csm.training.classification import nnUNetTrainerCSMClassifier
    from nnunet_csm.training.pretraining import nnUNetTrainerCSMPretrain

    def make(fold: int | str = 0, resume: bool = False, pretraining: bool = False, **changes: Any) -> Any:
        plans = json.loads((preprocessed / "nnUNetCSMPlans.json").read_text())
        plans["configurations"]["3d_fullres"]["csm"]["classification"] |= changes
        plans["continue_training"] = resume
        dataset_json = json.loads((preprocessed / "dataset.json").read_text())
        trainer = nnUNetTrainerCSMPretrain if pretraining else nnUNetTrainerCSMClassifier
        made = trainer(plans, "3d_fullres", fold, dataset_json, torch.device("cpu"))
        return made

    return make


def saved(trainer: Any, name: str = "checkpoint_final.pth") -> dict[str, Any]:
    from nnunet_csm import checkpoint

    return checkpoint.load(Path(trainer.output_folder) / name)


class KilledError(Exception):
    """Stands in for a kill: nothing is saved on the way out."""


@pytest.mark.parametrize(("values", "metric"), [(None, "auc"), ((20.5, 61, 33, 80, 45, 70.25), "mae")])
def test_killed_in_mid_epoch_and_resumed_equals_uninterrupted(
    make_trainer: Callable[..., Any], preprocessed: Path, values: Sequence[float] | None, metric: str
) -> None:
    if values is not None:
        rows = [f"{case},{value}" for case, value in zip(cases_of(preprocessed), values, strict=True)]
        write_table(preprocessed, rows, "case,value")
    whole = make_trainer()
    whole.run_training()
    expected = saved(whole)
    shutil.rmtree(whole.output_folder)

    killed = make_trainer()
    original = killed.train_step

    def train_step(batch: Any) -> dict:
        if killed.iteration == killed.num_iterations_per_epoch + 1:
            raise KilledError
        return original(batch)

    killed.train_step = train_step
    with pytest.raises(KilledError):
        killed.run_training()
    resumed = make_trainer(resume=True)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    assert resumed.current_epoch == 1
    resumed.run_training()
    found = saved(resumed)
    assert all(torch.equal(found["network_weights"][name], tensor) for name, tensor in expected["network_weights"].items())
    assert found["logging"][metric] == expected["logging"][metric]
    assert found["_best_ema"] == expected["_best_ema"]


def test_a_run_leaves_predictions_scores_and_pictures_of_every_held_out_side(
    make_trainer: Callable[..., Any], preprocessed: Path
) -> None:
    trainer = make_trainer(fold=1)
    trainer.run_training()
    trainer.perform_actual_validation()
    folder, cases = Path(trainer.output_folder), cases_of(preprocessed)
    assert (folder / "progress.png").is_file()
    assert {"checkpoint_final.pth", "checkpoint_best.pth"} <= {f.name for f in folder.iterdir()}
    for side, expected in (("validation", cases[2:4]), ("test", cases[4:])):
        table = pd.read_csv(folder / side / "predictions.csv")
        assert list(table) == ["case", "mask_label", "patient", "class", "p_benign", "p_malignant", "predicted"]
        assert table["case"].tolist() == expected
        assert table["class"].tolist() == ["benign", "malignant"]
        np.testing.assert_allclose(table["p_benign"] + table["p_malignant"], 1, atol=1e-6)
        assert table["predicted"].tolist() == np.where(table["p_malignant"] > 0.5, "malignant", "benign").tolist()
        summary = json.loads((folder / side / "summary.json").read_text())
        right_order = table["p_malignant"][1] > table["p_malignant"][0]
        assert summary["metrics"]["auc"]["value"] == float(right_order)
        assert summary["num_samples"] == {"benign": 1, "malignant": 1}
        assert (folder / side / "curves.png").is_file()

    checkpoint = saved(trainer)
    assert checkpoint["classes"] == ["benign", "malignant"] and checkpoint["encoder_source"] == "scratch"
    assert tuple(checkpoint["series"]) == ("FLAIR", "T1w", "T1ce")
    assert [name.split("/")[1] for name in checkpoint["training_cases"]] == cases[:2]

    before = (folder / "validation" / "predictions.csv").read_bytes()
    shutil.rmtree(folder / "validation")
    alone = make_trainer(fold=1)
    alone.load_checkpoint(str(folder / "checkpoint_final.pth"))
    alone.perform_actual_validation()
    assert (folder / "validation" / "predictions.csv").read_bytes() == before


def test_the_best_checkpoint_has_the_highest_auc_and_of_those_the_lowest_loss(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer()
    log, kept = trainer.logger.local_logger.my_fantastic_logging, []
    trainer.num_epochs = 100
    trainer.save_checkpoint = lambda name: kept.append(trainer.current_epoch) if name.endswith("checkpoint_best.pth") else None
    trainer.save_progress = lambda: None
    epochs = [(0.5, 0.4), (0.7, 0.9), (0.7, 1.0), (0.7, 0.8), (0.6, 0.1), (float("nan"), 0.1)]
    for auc, loss in epochs:
        for name, value in {"auc": auc, "val_losses": loss, "train_losses": 1.0}.items():
            log[name].append(value)
        for name in ("average_precision", "balanced_accuracy"):
            log[name].append(0.5)
        trainer.on_epoch_end()
    assert kept == [0, 1, 3]


def test_it_starts_from_the_encoder_of_its_fold(make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_csm_encoder")
    trainer = make_trainer()
    with pytest.raises(SystemExit) as stop:
        trainer.run_training()
    assert stop.value.code == 2
    pretrainer = make_trainer(pretraining=True)
    pretrainer.run_training()
    pretrained = saved(pretrainer)["network_weights"]
    fresh = make_trainer()
    fresh.initialize()
    fresh.on_fresh_start()
    assert all(torch.equal(tensor, pretrained[f"encoder.{name}"]) for name, tensor in fresh.encoder.state_dict().items())


def test_a_frozen_encoder_keeps_its_weights_while_the_head_learns(make_trainer: Callable[..., Any]) -> None:
    trainer = make_trainer(freeze_encoder=True, pooling="mean")
    trainer.initialize()
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    trainer.run_training()
    after = trainer.network.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"head.weight", "head.bias", "measures.mean", "measures.deviation"}
    assert not trainer.encoder.training


def test_every_sample_of_the_training_side_is_seen_as_often_and_no_other(
    make_trainer: Callable[..., Any], preprocessed: Path
) -> None:
    trainer = make_trainer()
    trainer.initialize()
    trainer.get_dataloaders()
    from nnunet_csm.training.classification import VariedSamples

    volumes = trainer.read_side("train")
    assert [sample.case for sample in volumes.samples] == cases_of(preprocessed)[:4]
    assert [sample.case for sample in trainer.val_volumes.samples] == cases_of(preprocessed)[4:]
    batches = VariedSamples(volumes, trainer.settings, trainer.samples)
    orders = torch.stack([batches.order(epoch) for epoch in range(30)])
    assert all(order.bincount().tolist() == [2, 2, 2, 2] for order in orders)
    assert len(orders.unique(dim=0)) > 20
    assert torch.equal(batches(3, 1)[1].gain, batches(3, 1)[1].gain)
    assert not torch.equal(batches(3, 1)[1].gain, batches(3, 2)[1].gain)


def test_classes_weigh_as_much_as_they_are_rare(make_trainer: Callable[..., Any], preprocessed: Path) -> None:
    one = cases_of(preprocessed)
    write_table(preprocessed, [f"{case},{name}" for case, name in zip(one, ("b", "b", "b", "m", "b", "m"), strict=True)])
    trainer = make_trainer()
    trainer.initialize()
    trainer.get_dataloaders()
    assert trainer.loss.weight.tolist() == pytest.approx([4 / 6, 4 / 2])
    plain = make_trainer(class_weights=False, label_smoothing=0.0)
    plain.initialize()
    plain.get_dataloaders()
    assert plain.loss.weight is None and plain.loss.label_smoothing == 0.0


def test_classes_are_counted_among_the_samples_that_train(make_trainer: Callable[..., Any], preprocessed: Path) -> None:
    one = cases_of(preprocessed)
    # two of four samples of a have no mask
    rows = [f"{one[0]},a,1", f"{one[0]},b,2", f"{one[1]},a,1", f"{one[2]},a,77", f"{one[3]},a,77"]
    write_table(preprocessed, [*rows, f"{one[4]},a,1", f"{one[5]},b,1"], "case,class,mask_label")
    trainer = make_trainer()
    trainer.initialize()
    trainer.get_dataloaders()
    assert trainer.loss.weight.tolist() == pytest.approx([3 / 4, 3 / 2])


@pytest.mark.parametrize("by_label", [False, True])
def test_prediction_from_raw_files_gives_what_validation_gave_whatever_is_made_of_the_mask(
    make_trainer: Callable[..., Any], preprocessed: Path, planned_dataset: PlannedDataset, tmp_path: Path, by_label: bool
) -> None:
    changes = {"scale": 1.3, "mask_features": True, "pooling": "mask"}
    if by_label:
        rows = [f"{case},{'ab'[label - 1]},{label}" for case in cases_of(preprocessed) for label in (1, 2)]
        write_table(preprocessed, rows, "case,class,mask_label")
    trainer = make_trainer(**changes)
    trainer.run_training()
    trainer.perform_actual_validation()
    measures = trainer.network.measures
    torch.testing.assert_close(measures.mean, trainer.read_side("train").measures.nanmean(0).nan_to_num())
    assert len(measures.mean) == 4 + (0 if by_label else 2 * len(trainer.label_manager.foreground_labels))
    raw, model = planned_dataset.folders.raw / planned_dataset.name, Path(trainer.output_folder).parent
    (tmp_path / "images").mkdir()
    expected = pd.read_csv(Path(trainer.output_folder) / "validation" / "predictions.csv")
    for case in set(expected["case"]):
        for image in (raw / "imagesTr").glob(f"{case}_*"):
            (tmp_path / "images" / image.name).symlink_to(image)
    plans = json.loads((model / "plans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["csm"]["classification"]["scale"] == 1.3
    request = ClassifyRequest(
        dataset=planned_dataset.name,
        trainer="nnUNetTrainerCSMClassifier",
        plans="nnUNetCSMPlans",
        configuration="3d_fullres",
        folds=("0",),
        checkpoint_name="checkpoint_final.pth",
        images=tmp_path / "images",
        masks=raw / "labelsTr",
        output=tmp_path / "found.csv",
        device="cpu",
    )
    classify(request)
    found = pd.read_csv(tmp_path / "found.csv")
    columns = ["case", "mask_label", *(name for name in expected if name.startswith("p_"))]
    pd.testing.assert_frame_equal(found[columns], expected[columns], check_dtype=False, atol=2e-6, rtol=0)


def test_lesions_of_a_case_are_samples_and_what_has_no_class_or_mask_is_left_out_with_a_report(
    make_trainer: Callable[..., Any], preprocessed: Path
) -> None:
    one = cases_of(preprocessed)
    rows = [f"{one[0]},a,1,p", f"{one[0]},b,2,p", f"{one[1]},a,1,q", f"{one[1]},b,77,q", f"{one[4]},a,1,r", f"{one[5]},b,1,s"]
    write_table(preprocessed, rows, "case,class,mask_label,patient")
    trainer = make_trainer()
    trainer.run_training()
    assert saved(trainer)["by_mask_label"]
    volumes = trainer.read_side("train")
    assert [sample.name for sample in volumes.samples] == [f"{one[0]}_1", f"{one[0]}_2", f"{one[1]}_1"]
    log = Path(trainer.log_file).read_text()
    assert f"left out, without a class: {one[2]}, {one[3]}" in log
    assert f"{one[1]}_77 is left out: its mask is empty" in log


@pytest.mark.parametrize(
    "rows, complaint",
    [
        (None, "no such file"),
        ([f"{{{n}}},{name}" for n, name in enumerate(ROWS)] + ["stranger,benign"], "1 cases were not preprocessed: stranger"),
        ([f"{{{n}}},{'ab'[n == 5]}" for n in range(6)], "train has one class only, a"),
        ([f"{{{n}}},{'ab'[n % 2]},{'pqrspt'[n]}" for n in range(6)], "patient p is in train and val"),
    ],
)
def test_what_cannot_be_learned_ends_before_training_with_exit_code_2(
    make_trainer: Callable[..., Any],
    preprocessed: Path,
    capsys: pytest.CaptureFixture[str],
    rows: list[str] | None,
    complaint: str,
) -> None:
    if rows is None:
        (preprocessed / "classification.csv").unlink()
    else:
        header = "case,class,patient" if rows[0].count(",") == 2 else "case,class"
        write_table(preprocessed, [row.format(*cases_of(preprocessed)) for row in rows], header)
    with pytest.raises(SystemExit) as stop:
        make_trainer()
    assert stop.value.code == 2
    assert complaint in capsys.readouterr().err


def test_resuming_with_other_classes_is_refused(
    make_trainer: Callable[..., Any], preprocessed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer()
    trainer.run_training()
    table = preprocessed / "classification.csv"
    table.write_text(table.read_text().replace("benign", "normal"))
    other = make_trainer(resume=True)
    with pytest.raises(SystemExit) as stop:
        other.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert stop.value.code == 2
    assert "it learned the classes benign, malignant" in capsys.readouterr().err


def test_numbers_are_learned_judged_and_predicted_from_raw_files(
    make_trainer: Callable[..., Any], preprocessed: Path, planned_dataset: PlannedDataset, tmp_path: Path
) -> None:
    cases, values = cases_of(preprocessed), (20.5, 61, 33, 80, 45, 70.25)
    write_table(preprocessed, [f"{case},{value}" for case, value in zip(cases, values, strict=True)], "case,value")
    trainer = make_trainer()
    trainer.run_training()
    trainer.perform_actual_validation()
    folder, expected = Path(trainer.output_folder), saved(trainer)
    weights = expected["network_weights"]
    assert expected["target"] == "value" and expected["classes"] == [] and weights["head.weight"].shape[0] == 1
    assert weights["units.mean"].item() == pytest.approx(np.mean(values[:4]))
    assert weights["units.deviation"].item() == pytest.approx(np.std(values[:4]))
    table = pd.read_csv(folder / "validation" / "predictions.csv")
    assert list(table) == ["case", "mask_label", "patient", "value", "predicted"] and table["value"].tolist() == [45, 70.25]
    summary = json.loads((folder / "validation" / "summary.json").read_text())
    assert summary["metrics"]["mae"]["value"] == pytest.approx((table["value"] - table["predicted"]).abs().mean())
    assert expected["logging"]["mae"][-1] > 0 and expected["_best_ema"][0] == -min(expected["logging"]["mae"])
    assert (folder / "validation" / "curves.png").is_file() and (folder / "progress.png").is_file()

    raw, model = planned_dataset.folders.raw / planned_dataset.name, folder.parent
    (tmp_path / "images").mkdir()
    for image in (one for case in cases[4:] for one in (raw / "imagesTr").glob(f"{case}_*")):
        (tmp_path / "images" / image.name).symlink_to(image)
    shutil.copytree(folder, model / "fold_1")
    named = (planned_dataset.name, "nnUNetTrainerCSMClassifier", "nnUNetCSMPlans", "3d_fullres", ("0", "1"))
    request = ClassifyRequest(
        *named, "checkpoint_final.pth", "cpu", tmp_path / "images", raw / "labelsTr", tmp_path / "found.csv", maps=True
    )
    lines = classify(request)
    found = pd.read_csv(tmp_path / "found.csv")
    assert list(found) == ["case", "mask_label", "predicted", "deviation_of_folds"] and not found["deviation_of_folds"].any()
    np.testing.assert_allclose(found["predicted"], table["predicted"], atol=1e-3)
    assert any("2 samples in" in line and "mean" in line for line in lines)
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["target"] == "value" and set(record["samples"][0]["values_by_fold"]) == {"0", "1"}
    assert (tmp_path / "found_maps" / f"{cases[4]}.png").is_file()


def test_going_on_with_numbers_where_classes_were_learned_is_refused(
    make_trainer: Callable[..., Any], preprocessed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer()
    trainer.run_training()
    write_table(preprocessed, [f"{case},{value}" for value, case in enumerate(cases_of(preprocessed))], "case,value")
    with pytest.raises(SystemExit):
        make_trainer(resume=True).load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    assert "it learned the classes benign, malignant, classification.csv has numbers" in capsys.readouterr().err


def test_stock_prediction_is_sent_elsewhere(make_trainer: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer()
    with pytest.raises(SystemExit) as stop:
        type(trainer).build_network_architecture(
            trainer.plans_manager, trainer.configuration_manager, 3, 3, enable_deep_supervision=False
        )
    assert stop.value.code == 2
    assert "nnunet_csm classify" in capsys.readouterr().err
