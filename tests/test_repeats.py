"""Folds and repeats of a classifier are read as they were written and scored as one, alone or against another training."""

import json

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from nnunet_csm import cli
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.repeats import classes_of, read_runs
from nnunet_csm.heads.runs import evaluate_runs

CLASSES = ("benign", "malignant")
NUM_RUNS, NUM_SAMPLES = 3, 12


def write(folder, seed, skill, **changes):
    """Predictions of some runs; the numbers of cases look like numbers on purpose."""
    paths = []
    for run in range(NUM_RUNS):
        rng = np.random.default_rng([seed, run])
        truth = np.arange(NUM_SAMPLES) % 2
        score = 1 / (1 + np.exp(-(skill * (truth - 0.5) + rng.normal(size=NUM_SAMPLES))))
        table = pd.DataFrame(
            {
                "case": [f"{run}{n:02d}" for n in range(NUM_SAMPLES)],
                "mask_label": pd.array([None] * NUM_SAMPLES, dtype="Int64"),
                "patient": [f"{run}{n // 2:02d}" for n in range(NUM_SAMPLES)],
                "class": [CLASSES[t] for t in truth],
                "p_benign": 1 - score,
                "p_malignant": score,
                "predicted": [CLASSES[int(s > 0.5)] for s in score],
            }
        ).rename(columns=changes)
        folder.mkdir(exist_ok=True)
        paths.append(folder / f"{run}.csv")
        table.to_csv(paths[-1], index=False)
    return paths


def test_the_auc_is_the_mean_of_the_runs_own(tmp_path, capsys):
    paths = write(tmp_path / "a", 0, 2.0)
    assert cli.main(["evaluate", "-pred", *map(str, paths), "-o", str(tmp_path / "out")]) == 0
    expected = np.mean([roc_auc_score(t["class"] == "malignant", t["p_malignant"]) for t in map(pd.read_csv, paths)])
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["metrics"]["auc"]["value"] == pytest.approx(expected)
    assert found["num_patients"] == NUM_RUNS * NUM_SAMPLES // 2
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"metrics.json", "metrics.csv", "metrics.md", "curves.png"}
    assert f"{expected:.3f} (" in capsys.readouterr().out


def test_a_difference_is_predictions_less_what_they_are_compared_with(tmp_path):
    good, bad = write(tmp_path / "good", 0, 4.0), write(tmp_path / "bad", 1, 0.0)
    evaluate_runs(good, bad, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    difference = found["difference"]["auc"]
    assert difference["value"] == pytest.approx(
        found["second"]["metrics"]["auc"]["value"] - found["first"]["metrics"]["auc"]["value"]
    )
    assert difference["low"] > 0


def test_cases_and_lesions_are_read_as_text(tmp_path):
    runs = read_runs(write(tmp_path / "a", 0, 1.0))
    assert tuple(runs.loc[0, ["run", "case", "mask_label"]]) == (0, "000", "") and runs["patient"][2] == "001"
    assert list(runs["run"]) == [run for run in range(NUM_RUNS) for _ in range(NUM_SAMPLES)]
    assert classes_of(runs) == CLASSES


def test_what_cannot_be_read_or_compared_is_said(tmp_path):
    paths = write(tmp_path / "a", 0, 1.0)
    with pytest.raises(UserError, match=r"gone\.csv: no such file"):
        read_runs([tmp_path / "gone.csv"])
    with pytest.raises(UserError, match="no column patient"):
        read_runs(write(tmp_path / "b", 0, 1.0, patient="who"))
    with pytest.raises(UserError, match=r"probabilities of benign, awful, .* has benign, malignant"):
        read_runs([*paths, *write(tmp_path / "c", 0, 1.0, p_malignant="p_awful")])
    with pytest.raises(UserError, match="same folds of both trainings"):
        evaluate_runs(paths, paths[::-1], None)


@pytest.mark.parametrize("found", ["NA", "", "=1+1", "1.5", "-0.1", "nan"])
def test_what_is_no_probability_is_named_by_line(tmp_path, found):
    path = write(tmp_path, 0, 1.0)[0]
    table = pd.read_csv(path, dtype=str)
    table.loc[3, "p_malignant"] = found
    table.to_csv(path, index=False)
    with pytest.raises(UserError, match=r"0\.csv: .* in column p_malignant, line 5, expected probabilities from 0 to 1"):
        read_runs([path])
