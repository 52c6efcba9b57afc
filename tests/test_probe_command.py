"""`nnunet_csm probe`: what simple models tell from embeddings, with patients kept whole."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.stats import pearsonr
from sklearn.metrics import mean_absolute_error, r2_score

from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.embeddings import embeddings_of, read_embeddings, write_embeddings
from nnunet_csm.evaluation.number_metrics import evaluate_numbers, measure
from nnunet_csm.evaluation.probe_command import ProbeRequest, probe_embeddings
from nnunet_csm.evaluation.probing import PROBES, folds_of, read_targets

NUM_CASES, NUM_FEATURES = 60, 6
CASES = [f"case_{number:02d}" for number in range(NUM_CASES)]


def embed(path: Path, features: np.ndarray, cases: list[str] = CASES) -> Path:
    write_embeddings(embeddings_of({case: ("FLAIR", row) for case, row in zip(cases, features, strict=True)}), path)
    return path


def targets(path: Path, **columns: object) -> Path:
    pd.DataFrame({"case": CASES, **columns}).to_csv(path, index=False)
    return path


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(NUM_CASES, NUM_FEATURES))


@pytest.fixture
def classes() -> np.ndarray:
    return np.array(["a", "b", "c"])[np.arange(NUM_CASES) % 3]


def request(tmp_path: Path, *embeddings: Path, **changes: object) -> ProbeRequest:
    values = {"num_repeats": 1, "output": tmp_path / "probed", "targets": tmp_path / "targets.csv", **changes}
    return ProbeRequest(embeddings=embeddings, **values)  # type: ignore[arg-type]


def scores_of(tmp_path: Path) -> pd.DataFrame:
    return pd.read_csv(tmp_path / "probed" / "probe.csv").set_index(["embedding", "probe", "group", "metric"])


def test_separable_classes_are_told_and_noise_is_at_chance(tmp_path, classes):
    separable = noise(0) + 20 * np.eye(NUM_FEATURES)[np.arange(NUM_CASES) % 3]
    files = [embed(tmp_path / "told.csv", separable), embed(tmp_path / "noise.csv", noise(1))]
    targets(tmp_path / "targets.csv", **{"class": classes})
    text = probe_embeddings(request(tmp_path, *files))
    scores = scores_of(tmp_path)
    for probe in PROBES:
        for metric, chance in (("accuracy", 1 / 3), ("balanced_accuracy", 1 / 3), ("auc", 1 / 2)):
            assert scores.loc[("told", probe, "all", metric), "value"] == 1
            _, low, high = scores.loc[("noise", probe, "all", metric), ["value", "low", "high"]]
            assert low < chance < high
    differences = pd.read_csv(tmp_path / "probed" / "differences.csv")
    assert set(differences["baseline"]) == {"told"} and (differences["high"] < 0).all()
    predictions = pd.read_csv(tmp_path / "probed" / "predictions.csv")
    assert np.allclose(predictions[["p_a", "p_b", "p_c"]].sum(axis=1), 1)
    one = predictions[(predictions["embedding"] == "told") & (predictions["probe"] == PROBES[0])]
    assert sorted(one["case"]) == CASES and sorted(one["fold"].unique()) == [0, 1, 2, 3, 4]
    assert "20 a, 20 b, 20 c" in text and "Differences to told" in text
    assert np.asarray(Image.open(tmp_path / "probed" / "embedding.png")).std() > 5
    with pytest.raises(UserError, match="exists and is kept"):
        probe_embeddings(request(tmp_path, *files))


def test_numbers_are_told_by_group(tmp_path):
    features = noise(0)
    values = features @ np.arange(NUM_FEATURES) + 100
    targets(tmp_path / "targets.csv", value=values, site=["x", "y"] * 30)
    probe_embeddings(request(tmp_path, embed(tmp_path / "one.npz", features), group_column="site"))
    scores = scores_of(tmp_path)
    assert scores.loc[("one", "linear", "all", "r2"), "value"] > 0.99
    assert (
        scores.loc[("one", "linear", "x", "r"), "value"] > 0.99 and scores.loc[("one", "linear", "x", "mae"), "num_cases"] == 30
    )
    assert not (tmp_path / "probed" / "differences.csv").exists()


def test_metrics_of_numbers_are_those_of_libraries_and_a_weight_is_a_repetition():
    draws = np.random.default_rng(0)
    values = draws.normal(size=40)
    said = values + draws.normal(size=40)
    times = draws.integers(0, 3, 40)
    runs = [np.arange(20), np.arange(20, 40)]
    (found,) = measure(values, said, times[None].astype(float), runs)
    again, said_again = values.repeat(times), said.repeat(times)
    r = [pearsonr(values[run].repeat(times[run]), said[run].repeat(times[run])).statistic for run in runs]
    line = np.polynomial.Polynomial.fit(said_again, again, 1).convert().coef[::-1]
    assert found == pytest.approx([mean_absolute_error(again, said_again), np.mean(r), r2_score(again, said_again), *line])
    first, second, difference = evaluate_numbers(values, [said, values], list(map(str, range(40))), [0] * 40)
    assert second["mae"].tolist() == [0, 0, 0] and difference.loc["value", "mae"] == -first.loc["value", "mae"]
    assert (first.loc["low"] < first.loc["value"]).all() and (first.loc["value"] < first.loc["high"]).all()
    (constant,) = evaluate_numbers(np.ones(40), [np.ones(40)], list(map(str, range(40))), [0] * 40)
    assert constant["r"].isna().all() and constant["r2"].isna().all()


@pytest.mark.parametrize("column", ["class", "value"])
def test_no_fold_splits_a_patient(tmp_path, column):
    patients = [f"p{number // 3}" for number in range(NUM_CASES)]
    told = np.random.default_rng(0).permutation(NUM_CASES) if column == "value" else np.arange(NUM_CASES) // 3 % 2
    path = targets(tmp_path / "targets.csv", **{column: told, "patient": patients})
    found, _ = read_targets(path)
    by_case = found.table["patient"].to_numpy()
    folds = folds_of(found, 5, 2, 0)
    assert len(folds) == 10 and sorted(np.concatenate([fold.test for fold in folds])) == sorted([*range(NUM_CASES)] * 2)
    for fold in folds:
        assert not set(by_case[fold.training]) & set(by_case[fold.test])
        for learned, chosen_by in fold.inner:
            # counted within the training side
            of_training = by_case[fold.training]
            assert not set(of_training[learned]) & set(of_training[chosen_by])


def test_cases_that_a_table_lacks_are_left_out_and_told(tmp_path, classes):
    targets(tmp_path / "targets.csv", label=["NA", *classes[1:]])
    files = [embed(tmp_path / "a.npz", noise(0)), embed(tmp_path / "b.csv", noise(1)[:-1], CASES[:-1])]
    (tmp_path / "a.json").write_text(
        json.dumps({"encoder": {"checkpoint": "x.pth"}, "cases": {"case_01": {"seen_in_training": True}}})
    )
    text = probe_embeddings(request(tmp_path, *files))
    assert "1 cases without a target are left out, such as case_00" in text
    assert "1 cases without an embedding in every table are left out, such as case_59" in text
    assert "label: 58 cases of 58 patients" in text and "a: x.pth; its training has seen 1 of 1 cases" in text


@pytest.mark.parametrize(
    ("columns", "changes", "words"),
    [
        ({"grade": ["a", "b"] * 30}, {}, "no column class/label/value among case, grade"),
        ({"class": ["a", "b"] * 30}, {"group_column": "site"}, "no column site"),
        ({"class": ["a", "b"] * 30}, {"class_column": "class", "value_column": "class"}, "one target at a time"),
        ({"class": ["a"] * 60}, {}, "1 classes, 60 patients of a"),
        ({"class": ["a"] * 58 + ["b"] * 2}, {}, "2 classes, 2 patients of b"),
        ({"class": ["a", "A"] * 30}, {}, "differ only in case"),
        ({"value": ["1", "many"] * 30}, {}, "line 3: value is 'many', expected a number"),
        ({"class": ["NA"] * 60}, {}, "no case has a value"),
        ({"class": ["a", "b"] * 30}, {"num_folds": 1}, "expected 3 folds"),
    ],
)
def test_what_cannot_be_probed_is_told(tmp_path, columns, changes, words):
    targets(tmp_path / "targets.csv", **columns)
    with pytest.raises(UserError, match=words):
        probe_embeddings(request(tmp_path, embed(tmp_path / "a.csv", noise(0)), **changes))
    assert not (tmp_path / "probed").exists()


def test_a_case_twice_or_of_nobody_is_told(tmp_path, classes):
    file = embed(tmp_path / "a.csv", noise(0))
    path = targets(tmp_path / "targets.csv", **{"class": classes})
    path.write_text(path.read_text() + "case_00,a\n")
    with pytest.raises(UserError, match="line 62: case_00 is there twice"):
        probe_embeddings(request(tmp_path, file))
    targets(path, **{"class": classes})
    others = embed(tmp_path / "b.csv", noise(0), [f"other_{case}" for case in CASES])
    with pytest.raises(UserError, match="no case is in all of them"):
        probe_embeddings(request(tmp_path, file, others))


# --- the files ---------------------------------------------------------------------------------------------------------------


def test_all_formats_hold_the_same_numbers(tmp_path):
    pytest.importorskip("pyarrow")
    features = noise(0).astype(np.float32)
    # names that look like numbers, or like nothing
    cases = ["001", "NA", *CASES[2:]]
    parquet, csv, npz = (read_embeddings(embed(tmp_path / f"one{end}", features, cases)) for end in (".parquet", ".csv", ".npz"))
    for table in (parquet, csv, npz):
        assert list(table.index) == cases and np.array_equal(table.to_numpy(), features)


def test_parquet_asks_for_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'nnunet_csm\[parquet\]'"):
        read_embeddings(tmp_path / "one.parquet")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "case\n", r"\.parquet, \.csv, \.npz"),
        ("gone.csv", None, "cannot be read"),
        ("a.csv", "case,f0\na,1\na,2\n", "a is there twice"),
        ("a.csv", "case,f0\na,nan\n", "holds NaN"),
        ("a.csv", "case,f0\n", "nothing in it"),
        ("a.csv", "name,f0\na,1\n", "not readable as embeddings"),
        ("a.csv", "case,f0\na,x\n", "not readable as embeddings"),
        ("a.npz", "no archive", "not readable as embeddings"),
        ("a.parquet", "no parquet", "not readable as embeddings"),
    ],
)
def test_what_are_no_embeddings_is_told(tmp_path, name, content, words):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words):
        read_embeddings(tmp_path / name)
