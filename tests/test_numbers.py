"""Numbers as targets: read or refused with their line, dealt evenly, standardised and back, learned, scored, compared, drawn."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from factories import PATCH_SIZE, SERIES, TINY, TOKEN_SIZE, checkpoint_of, csm_plans
from PIL import Image
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn

from nnunet_csm import weights_folder
from nnunet_csm.data.diagnoses import ClassTable, Sample, read_class_table, strata_of, write_class_table
from nnunet_csm.data.splits import repeated_splits, split_problems, stratified_folds
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.number_metrics import TITLES, evaluate_numbers
from nnunet_csm.heads.base import HEADS, head_class, head_in, head_of
from nnunet_csm.heads.numbers import Numbers, StandardizedLoss
from nnunet_csm.heads.runs import evaluate_runs
from nnunet_csm.inference import classification
from nnunet_csm.model.attribution import token_maps
from nnunet_csm.model.classifier import CSMClassifier, Units, build_classifier
from nnunet_csm.planning.classification import fold_lines
from nnunet_csm.plans import read_configuration
from nnunet_csm.sharing import network as sharing_network
from nnunet_csm.sharing.card import card
from nnunet_csm.sharing.contained import _write_decision
from nnunet_csm.sharing.export import for_others
from nnunet_csm.study.collection import with_classes
from nnunet_csm.study.divisions import divide, everybody, labelled
from nnunet_csm.study.spec import Repeats, num_labelled


def table_of(values: np.ndarray, per_patient: int = 1) -> ClassTable:
    strata = strata_of(values.tolist()).tolist()
    rows = enumerate(zip(strata, values.tolist(), strict=True))
    return ClassTable((), tuple(Sample(f"c{n:03d}", s, None, f"p{n // per_patient}", (v,)) for n, (s, v) in rows), "value")


# --- tables and splits -------------------------------------------------------------------------------------------------------


def test_a_table_of_numbers_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "classification.csv"
    path.write_text("Case;Value;patient\na;61.5;P\nb;-1e-7;P\nc;20;Q\n")
    table = read_class_table(path)
    assert table.classes == () and table.target == "value"
    assert [(one.case, one.numbers, one.patient) for one in table.samples] == [
        ("a", (61.5,), "P"),
        ("b", (-1e-7,), "P"),
        ("c", (20.0,), "Q"),
    ]
    # names of classes in dataset.json are of another table
    assert read_class_table(path, ["x", "y"]) == table
    write_class_table(table, path)
    assert read_class_table(path) == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("case,class,value\na,x,1\nb,y,2\n", "columns class and value are both there"),
        ("case,age\na,1\n", "no column class or value among case, age"),
        ("case,value,value\na,1,2\n", "column value twice"),
        ("case,value\na,1\nb,old\n", "line 3: value is 'old', expected a number such as 61.5.*take the row out"),
        ("case,value\na,1\nb,NA\n", "line 3: value is 'NA'"),
        ("case,value\na,1\nb,inf\n", "line 3: value is 'inf'"),
        ("case;value\na;1\nb;2,5\n", "line 3: value is '2,5'"),
        ("case,value\na,1\nb,\n", r"line 3: value is empty \(b\)"),
        ("case,value\na,3\nb,3.0\n", "value is 3 throughout"),
        ("case,value\na,3\na,4\n", "lines 2 and 3 are both about a"),
    ],
)
def test_a_bad_table_is_refused_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "classification.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as refused:
        read_class_table(path)
    assert str(path) in str(refused.value)


def test_folds_and_repeats_keep_patients_whole_and_numbers_alike() -> None:
    values = np.random.default_rng(0).lognormal(3, 1, 100)
    table = table_of(values, per_patient=2)
    for splits in (stratified_folds(table), repeated_splits(table)):
        for split in splits:
            assert not split_problems(table, split)
    value = {sample.case: sample.numbers[0] for sample in table.samples}
    parts = [[value[case] for case in fold["val"]] for fold in stratified_folds(table)]
    assert sorted(v for part in parts for v in part) == sorted(values.tolist())
    # each part has low and high ones as all have
    low, high = np.quantile(values, [0.2, 0.8])
    for part in parts:
        assert 2 <= np.sum(np.array(part) <= low) <= 6 and 2 <= np.sum(np.array(part) >= high) <= 6


def test_what_no_number_can_be_learned_from_is_said() -> None:
    table = table_of(np.array([1.0, 1.0, 2.0, 3.0]))
    assert split_problems(table, {"train": ["c000", "c001"], "val": ["c002"]}) == ["train has no sample of different values"]
    assert split_problems(table, {"train": ["c000", "c002"], "val": []}) == ["val has no case with a value"]
    assert split_problems(table, {"train": ["c000", "c002"], "val": ["c003"]}) == []
    assert table.counted(table.samples) == "4 values from 1 to 3, mean 1.75, deviation 0.8292"


def test_a_study_divides_a_dataset_of_numbers_with_and_without_cases_beside() -> None:
    table = table_of(np.arange(30.0))
    for cases in ([], [f"d{number}" for number in range(10)]):
        everyone = everybody(table, cases, {})
        division = divide(everyone, Repeats("folds", 3))[0]
        assert len(division.train) + len(division.val) + len(division.test) == 30 + len(cases)
        assert len(labelled(everyone, division, 0.5, 0)) == num_labelled(0.5, len(division.train))


# --- learning ----------------------------------------------------------------------------------------------------------------


def test_every_target_has_a_head_that_its_checkpoint_gives_back() -> None:
    for target in HEADS:
        assert head_class(target).target == target
    head = head_of(table_of(np.arange(5.0)))
    assert isinstance(head, Numbers) and isinstance(head_in({"target": "value", "classes": []}), Numbers)
    # of a checkpoint from before there were numbers
    assert head_in({"classes": ["a", "b"]}).num_outputs == 2


def build(**changes: Any) -> CSMClassifier:
    torch.manual_seed(0)
    of_dataset = {"series": SERIES, "channels": (0, 1, 2), "token_size": TOKEN_SIZE}
    return CSMClassifier(len(SERIES), 1, in_units=True, **(TINY | of_dataset | changes))


def test_outputs_are_standardised_targets_brought_back() -> None:
    targets = torch.tensor([[20.0], [50.0], [81.5]])
    units = Units(1)
    units.fit(targets)
    standardised = (targets - targets.mean()) / targets.std(correction=0)
    torch.testing.assert_close(units(standardised), targets)
    head, network, loss = Numbers(), build(), StandardizedLoss()
    head.fit(loss, network, targets, None)  # type: ignore[arg-type]
    # an untrained network says the mean, up to its small initial weights
    outputs = network(torch.randn(2, len(SERIES), *PATCH_SIZE))
    assert (outputs - targets.mean()).abs().max() < 0.2 * targets.std()
    expected = nn.functional.smooth_l1_loss(standardised, torch.zeros(3, 1), reduction="none").sum(1)
    torch.testing.assert_close(loss(targets, targets.mean().expand(3, 1)), expected)
    assert {"units.mean", "units.deviation"} <= network.state_dict().keys()
    # classes know of no units: their checkpoints are as they were
    assert not any(name.startswith("units") for name in CSMClassifier(3, 2, **TINY, **vars_of()).state_dict())


def vars_of() -> dict[str, Any]:
    return {"series": SERIES, "channels": (0, 1, 2), "token_size": TOKEN_SIZE}


def test_a_number_is_learned_and_its_map_adds_up_to_it_in_its_unit() -> None:
    network, head = build().train(), Numbers()
    loss = head.build_loss(None)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)

    def drawn(num: int) -> tuple[Tensor, Tensor]:
        volume = 0.3 * torch.randn(num, len(SERIES), *PATCH_SIZE, generator=g)
        brightness = torch.rand(num, 1, generator=g)
        volume[:, 1] += brightness[:, :, None, None]
        return volume, 1000 + 200 * brightness

    head.fit(loss, network, drawn(500)[1], None)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3)
    for _ in range(80):
        volume, targets = drawn(16)
        optimizer.zero_grad()
        loss(network(volume), targets).mean().backward()
        optimizer.step()
    network.eval()
    volume, targets = drawn(32)
    with torch.no_grad():
        found = head.score(targets.numpy(), network(volume).numpy())
        added = network(volume) - network(1e-4 * volume)
    assert found["r"] > 0.9 and found["mae"] < 25
    maps = token_maps(network, volume[:4], lambda outputs: head.explained(outputs, np.zeros(1)))
    torch.testing.assert_close(maps.sum((1, 2, 3, 4)), added[:4, 0], rtol=0.05, atol=2.0)


def test_the_best_checkpoint_has_the_lowest_error() -> None:
    assert Numbers().rank({"mae": 2.0}) > Numbers().rank({"mae": 3.0})


def test_folds_are_averaged_and_their_deviation_is_told() -> None:
    head, by_fold = Numbers(), np.array([[[1.0], [5.0]], [[3.0], [5.0]]])
    assert head.spread(by_fold)["deviation_of_folds"].tolist() == pytest.approx([2**0.5, 0])
    assert head.spread(by_fold[:1]) == {}
    assert head.predicted(by_fold.mean(0))["predicted"].tolist() == [2, 5]


# --- elsewhere ---------------------------------------------------------------------------------------------------------------


def test_an_exported_network_gives_numbers_in_their_unit(tmp_path: Path) -> None:
    plans = csm_plans(classification={"patch_size": list(PATCH_SIZE)})
    network = build_classifier(read_configuration(plans, "3d_fullres", "plans"), len(SERIES), 1, in_units=True).eval()
    assert network.units is not None
    network.units.fit(torch.tensor([[20.0], [90.0]]))
    others = {"target": "value", "classes": [], "by_mask_label": False, "encoder_source": "scratch"}
    told = for_others(checkpoint_of(plans, {}) | others, "checkpoint")
    assert told["target"] == "value"
    made, _, output = sharing_network.build(told, "checkpoint")
    made.load_state_dict(network.state_dict())
    volume = torch.randn(1, len(SERIES), *PATCH_SIZE)
    assert torch.equal(made.eval()(volume), network(volume)) and output["shape"] == [1] and "values" in output
    weights_folder.write(tmp_path, "classifier", "none", told, network.state_dict())
    text = card(weights_folder.describe(tmp_path), 1)
    assert "| predicts | numbers |" in text


def test_a_container_writes_the_number(tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("case,mask_label,predicted,deviation_of_folds\ncase,,53.25,1.5\n")
    path = _write_decision(None, tmp_path / "predictions.csv", tmp_path / "decision")  # type: ignore[arg-type]
    assert json.loads(path.read_text()) == 53.25


def test_doctor_describes_the_numbers_of_a_fold() -> None:
    table = table_of(np.array([10.0, 20.0, 30.0, 40.0]))
    (line,) = fold_lines(table, [{"train": ["c000", "c001", "c003"], "val": ["c002"]}])
    assert line == (
        "fold 0: train 3 values from 10 to 40, mean 23.33, deviation 12.47; val 1 values from 30 to 30, mean 30, deviation 0"
    )


def test_a_study_joins_what_was_predicted_of_a_part_of_the_series_with_the_true_numbers(tmp_path: Path) -> None:
    (tmp_path / "one.csv").write_text("case,mask_label,predicted\nc002,,31.5\nc000,,12\n")
    found = with_classes(tmp_path / "one.csv", table_of(np.array([10.0, 20.0, 30.0])))
    assert found[["case", "value", "predicted", "patient"]].values.tolist() == [["c002", 30, 31.5, "p2"], ["c000", 10, 12, "p0"]]


# --- scores ------------------------------------------------------------------------------------------------------------------


def test_the_line_of_truth_on_prediction_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(0)
    predicted = rng.normal(50, 10, 60)
    values = 12 + 0.6 * predicted + rng.normal(0, 3, 60)
    (found,) = evaluate_numbers(values, [predicted], [str(n) for n in range(60)], [0] * 60)
    line = LinearRegression().fit(predicted[:, None], values)
    assert found["slope"]["value"] == pytest.approx(line.coef_[0]) and found["intercept"]["value"] == pytest.approx(
        line.intercept_
    )
    assert found["slope"]["low"] < 0.6 < found["slope"]["high"]
    assert found["mae"]["value"] == pytest.approx(np.abs(values - predicted).mean())


def write_predictions(path: Path, fold: int, error: float) -> Path:
    rng = np.random.default_rng(fold)
    value = rng.normal(60, 12, 12)
    rows = {
        "case": [f"c{fold}{n}" for n in range(12)],
        "mask_label": "",
        "patient": [f"p{fold}{n // 2}" for n in range(12)],
        "value": value,
        "predicted": value + error * rng.normal(size=12),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_folds_are_scored_and_compared_on_the_same_patients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = ([write_predictions(tmp_path / f"{e}_{k}.csv", k, e) for k in range(3)] for e in (2.0, 9.0))
    evaluate_runs(good, [], tmp_path / "alone")
    content = json.loads((tmp_path / "alone" / "metrics.json").read_text())
    assert content["num_samples"] == 36 and content["num_patients"] == 18 and set(content["metrics"]) == set(TITLES)
    assert content["metrics"]["mae"]["low"] < content["metrics"]["mae"]["value"] < content["metrics"]["mae"]["high"]
    picture = np.asarray(Image.open(tmp_path / "alone" / "curves.png").convert("RGB"))
    assert picture.std() > 5
    evaluate_runs(good, bad, tmp_path / "both")
    said = capsys.readouterr().out
    assert "3 runs; 36 samples of 18 patients" in said and "| predictions - against" in said and "slope of truth" in said
    rows = pd.read_csv(tmp_path / "both" / "metrics.csv").set_index("metric")
    assert rows["high"]["mae"] < 0 and rows["difference"]["mae"] == pytest.approx(rows["second"]["mae"] - rows["first"]["mae"])


def test_what_cannot_be_scored_or_compared_is_refused(tmp_path: Path) -> None:
    path, other = write_predictions(tmp_path / "a.csv", 0, 1.0), write_predictions(tmp_path / "b.csv", 1, 1.0)
    with pytest.raises(UserError, match="do not predict the samples"):
        evaluate_runs([path], [other], None)
    classes = tmp_path / "c.csv"
    classes.write_text("case,mask_label,patient,class,p_a,p_b,predicted\nx,,x,a,0.5,0.5,a\n")
    with pytest.raises(UserError, match="no column value"):
        evaluate_runs([path], [classes], None)
    changed = pd.read_csv(path).assign(value=lambda table: table["value"] + 1)
    changed.to_csv(other, index=False)
    with pytest.raises(UserError, match="do not predict the samples"):
        evaluate_runs([path], [other], None)
    changed.assign(predicted="none").to_csv(other, index=False)
    with pytest.raises(UserError, match="'none' in column predicted, line 2, expected numbers"):
        evaluate_runs([other], [], None)


def test_numbers_have_no_temperature() -> None:
    request: Any = SimpleNamespace(checkpoint_name="checkpoint_final.pth", model=Path("model"))
    ensemble: Any = SimpleNamespace(head=Numbers(), members={})
    with pytest.raises(UserError, match="--calibrated is for probabilities of classes, model gives values"):
        classification._temperature(request, ensemble)
