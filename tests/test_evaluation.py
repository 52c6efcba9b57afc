import json

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics, compute_metrics_on_folder
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from sklearn.linear_model import LinearRegression, Ridge

from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.regions import parse_regions, regions_of
from nnunet_csm.evaluation.scores import Scores
from nnunet_csm.evaluation.segmentation import evaluate_folder
from nnunet_csm.judging.voxel_regression import RidgeBaseline

GLIOMA = {"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumour": 3}


def write(folder, case, array, spacing=(1.0, 1.0, 1.0)):
    folder.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(folder / f"{case}.nii.gz"))


def random_pair(seed, num_labels=4, shape=(5, 6, 7)):
    """A reference, and a prediction that is right in about three quarters of the voxels."""
    rng = np.random.default_rng(seed)
    reference = rng.integers(0, num_labels, shape)
    other = rng.integers(0, num_labels, shape)
    return reference, np.where(rng.random(shape) < 0.75, reference, other)


@pytest.fixture
def folders(tmp_path):
    """Three glioma cases; in the last one nothing enhances, in reference or prediction."""
    for seed in range(3):
        reference, prediction = random_pair(seed)
        if seed == 2:
            reference[reference == 3] = prediction[prediction == 3] = 0
        write(tmp_path / "reference", f"case_{seed}", reference, (0.5, 1.0, 2.0))
        write(tmp_path / "prediction", f"case_{seed}", prediction, (0.5, 1.0, 2.0))
    return tmp_path / "reference", tmp_path / "prediction"


def evaluate(folders, labels=GLIOMA, **options) -> Scores:
    dataset = {"labels": labels, "file_ending": options.pop("file_ending", ".nii.gz")}
    return evaluate_folder(folders[0], folders[1], dataset, num_processes=1, **options)


def test_regions_of_a_glioma_follow_the_names_of_its_labels():
    core = {"tumour core (TC, BraTS: necrotic + enhancing)": (2, 3), "tumour core (TC, paper: necrotic only)": (2,)}
    assert regions_of(GLIOMA) == {"whole tumour (WT)": (1, 2, 3), **core, "enhancing tumour (ET)": (3,)}
    brats = {"background": 0, "NCR": 1, "Peritumoral Oedema": 2, "ET": 4, "ignore": 5}
    assert list(regions_of(brats).values()) == [(1, 2, 4), (1, 4), (1,), (4,)]


def test_regions_of_other_datasets():
    assert regions_of({"background": 0, "anterior": 1, "posterior": 2, "ignore": 3}) == {"foreground": (1, 2)}
    assert regions_of({"background": 0, "tumour": 1}) == {}
    assert regions_of({"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}) == {"whole": (1, 2), "core": (2,)}


def test_parse_regions():
    assert parse_regions(["WT=1,2,3", "tumour core = 3, 2"]) == {"WT": (1, 2, 3), "tumour core": (2, 3)}
    for wrong in ("WT", "WT=", "=1", "WT=a", "WT=1,,2"):
        with pytest.raises(UserError, match="-regions"):
            parse_regions([wrong])
    with pytest.raises(UserError, match="twice"):
        parse_regions(["A=1", "A=2"])


LABELS_OF_DATASETS = [GLIOMA, {"background": 0, "a": 1, "b": 2, "ignore": 3}, {"background": 0, "ab": [1, 2], "c": 3}]


@pytest.mark.parametrize("labels", LABELS_OF_DATASETS)
def test_dice_is_that_of_nnunet(folders, labels):
    scores = evaluate(folders, labels)
    for case, ours in scores.table.groupby("case"):
        files = [str(folder / f"{case}.nii.gz") for folder in folders]
        keys = [structure.labels for structure in scores.structures]
        theirs = compute_metrics(*files, SimpleITKIO(), keys, labels.get("ignore"))["metrics"]
        np.testing.assert_allclose(ours["dice"], [theirs[key]["Dice"] for key in keys], rtol=1e-12)


def test_means_are_those_of_nnunet(folders):
    scores = evaluate(folders)
    theirs = compute_metrics_on_folder(*map(str, folders), None, SimpleITKIO(), ".nii.gz", [1, 2, 3], num_processes=1)
    means = scores.summary()["mean"]
    assert scores.foreground_mean == pytest.approx(theirs["foreground_mean"]["Dice"], rel=1e-12)
    assert [means[name] for name in list(GLIOMA)[1:]] == pytest.approx([theirs["mean"][i]["Dice"] for i in (1, 2, 3)], rel=1e-12)


def test_two_processes_find_what_one_does(folders):
    dataset = {"labels": GLIOMA, "file_ending": ".nii.gz"}
    pd.testing.assert_frame_equal(
        evaluate_folder(folders[0], folders[1], dataset, num_processes=2).table, evaluate(folders).table
    )


def test_empty_structures_and_volumes(tmp_path):
    both, one = np.zeros((2, 3, 4), int), np.zeros((2, 3, 4), int)
    both[0], one[1] = 1, 2
    write(tmp_path / "reference", "a", both, (2.0, 5.0, 10.0))
    write(tmp_path / "prediction", "a", both + one, (2.0, 5.0, 10.0))
    labels = {"background": 0, "a": 1, "b": 2, "c": 3}
    scores = evaluate((tmp_path / "reference", tmp_path / "prediction"), labels)
    table = scores.table.set_index("structure")
    assert table.loc["a", "dice"] == 1 and table.loc["b", "dice"] == 0 and np.isnan(table.loc["c", "dice"])
    assert np.isnan(table.loc["b", "sensitivity"]) and table.loc["b", "precision"] == 0 and np.isnan(table.loc["c", "precision"])
    assert table.loc["foreground", "sensitivity"] == 1 and table.loc["foreground", "precision"] == 0.5
    assert table.loc["a", "reference_ml"] == pytest.approx(1.2) and table.loc["foreground", "predicted_ml"] == pytest.approx(2.4)
    assert scores.summary()["n"].to_dict() == {"a": 1, "b": 1, "c": 0, "foreground": 1, "foreground mean": 1}
    assert np.isnan(scores.foreground_mean)


def test_ignored_voxels_change_nothing(folders):
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(folders[0] / "case_0.nii.gz")))
    prediction = sitk.GetArrayFromImage(sitk.ReadImage(str(folders[1] / "case_0.nii.gz")))
    reference[:, :3], labels = 4, {**GLIOMA, "ignore": 4}
    write(folders[0], "case_0", reference, (0.5, 1.0, 2.0))
    before = evaluate(folders, labels).table
    prediction[:, :3] = (prediction[:, :3] + 1) % 4
    write(folders[1], "case_0", prediction, (0.5, 1.0, 2.0))
    pd.testing.assert_frame_equal(evaluate(folders, labels).table, before)


def test_given_regions_replace_the_derived_ones(folders):
    scores = evaluate(folders, regions={"core": (2, 3)})
    assert [s.name for s in scores.structures] == [*list(GLIOMA)[1:], "core"]
    with pytest.raises(UserError, match=r"\[7\]"):
        evaluate(folders, regions={"core": (2, 7)})
    with pytest.raises(UserError, match="another name"):
        evaluate(folders, regions={"edema": (1,)})


def test_saved_files_agree_with_the_scores(folders, tmp_path):
    write(folders[1], "case_9", np.zeros((5, 6, 7)))
    scores = evaluate(folders)
    assert scores.not_scored == ("case_9",)
    scores.save(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["evaluation.csv", "evaluation.json", "evaluation.md"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "evaluation.csv"), scores.table)
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["foreground_mean"] == scores.foreground_mean and content["not_scored"] == ["case_9"]
    assert content["cases"]["case_2"]["enhancing tumour"]["dice"] is None and content["dice"]["enhancing tumour"]["n"] == 2
    markdown = (tmp_path / "out" / "evaluation.md").read_text()
    assert "case_9" in markdown and f"{scores.foreground_mean:.4f}" in markdown
    for table in (part for part in markdown.split("\n\n") if part.startswith("|")):
        assert len({len(line) for line in table.strip().splitlines()}) == 1


def test_errors_name_the_files_and_the_remedy(folders, tmp_path):
    write(folders[1], "case_1", np.zeros((5, 6, 8)), (0.5, 1.0, 2.0))
    with pytest.raises(UserError, match=r"prediction/case_1.*\(5, 6, 8\).*reference/case_1.*\(5, 6, 7\)"):
        evaluate(folders)
    write(folders[1], "case_1", np.zeros((5, 6, 7)), (0.5, 1.0, 2.5))
    with pytest.raises(UserError, match=r"prediction/case_1.*2\.5.*reference/case_1.*2\.0"):
        evaluate(folders)
    write(folders[1], "case_1", np.full((5, 6, 7), 9), (0.5, 1.0, 2.0))
    with pytest.raises(UserError, match=r"case_1.*\[9\]"):
        evaluate(folders)
    (folders[1] / "case_1.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot be read"):
        evaluate(folders)
    (folders[1] / "case_1.nii.gz").unlink()
    with pytest.raises(UserError, match=r"1 of 3 references \(case_1\.nii\.gz\).*--chill"):
        evaluate(folders)
    scores = evaluate(folders, chill=True)
    assert list(scores.dice.index) == ["case_0", "case_2"] and scores.not_predicted == ("case_1",)
    assert "Left out: 1 of 3 references" in scores.to_markdown()
    with pytest.raises(UserError, match="no such folder"):
        evaluate((tmp_path / "nowhere", folders[1]))
    with pytest.raises(UserError, match="no file ends with"):
        evaluate(folders, file_ending=".nrrd")
    with pytest.raises(UserError, match="nnUNetv2_convert_MSD_dataset"):
        evaluate(folders, {"0": "background", "1": "edema"})
    with pytest.raises(UserError, match="no 'labels' found"):
        evaluate_folder(folders[0], folders[1], {"file_ending": ".nii.gz"})


@pytest.fixture(scope="module")
def crops():
    """Crops of four correlated series with large means, of unequal sizes."""
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(4, 4))
    return [1000 + np.einsum("st,tzyx->szyx", mixing, rng.normal(i, 1, (4, 2, 3, 5 + i))) for i in range(6)]


def subsets(others):
    return [tuple(o for bit, o in enumerate(others) if number >> bit & 1) for number in range(2 ** len(others))]


@pytest.mark.parametrize("hidden", range(4))
def test_ridge_is_least_squares_for_every_visible_subset(crops, hidden):
    voxels = np.concatenate([crop.reshape(4, -1) for crop in crops], axis=1).T
    exact, shrunk = RidgeBaseline(alpha=0.0).fit(crops), RidgeBaseline(alpha=0.3).fit(iter(crops))
    new = (crops[0] + 1).reshape(4, -1).T
    for visible in subsets([s for s in range(4) if s != hidden]):
        ours = [new[:, visible] @ weights + mean for weights, mean in (f.coefficients(visible, hidden) for f in (exact, shrunk))]
        if not visible:
            np.testing.assert_allclose(ours, voxels[:, hidden].mean())
            continue
        x, y = voxels[:, visible], voxels[:, hidden]
        for one, theirs in zip(ours, (LinearRegression(), Ridge(alpha=0.3 * len(y))), strict=True):
            np.testing.assert_allclose(one, theirs.fit(x, y).predict(new[:, visible]), rtol=1e-9)


def test_ridge_leaves_out_crops_without_a_series(crops):
    lacking = crops[0].copy()
    lacking[2] = 0
    baseline = RidgeBaseline().fit([lacking, *crops])
    np.testing.assert_array_equal(baseline.covariance, RidgeBaseline().fit(crops).covariance)
    with pytest.raises(UserError, match="1 given"):
        RidgeBaseline().fit([lacking])
