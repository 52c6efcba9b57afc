"""Calibration of segmentations, and temperatures of classifiers."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.special import softmax
from sklearn.calibration import calibration_curve

from nnunet_csm import cli
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.calibration import Calibration, calibrate_folder, calibration_sums
from nnunet_csm.evaluation.class_metrics import NUM_BINS
from nnunet_csm.evaluation.command import evaluate_dataset
from nnunet_csm.evaluation.regions import structures_of
from nnunet_csm.evaluation.temperature import at_temperature, fit, fit_on_folds

LABELS = {"background": 0, "edema": 1, "tumor": 2}
SHAPE, SPACING = (4, 6, 5), (1.0, 2.0, 3.0)


def errors(*sums) -> pd.DataFrame:
    return Calibration(tuple("abc"[: len(sums)]), np.stack(sums), (1, 1)).table()


# --- calibration errors ------------------------------------------------------------------------------------------------------


def test_the_error_by_hand():
    # two bins of foreground: 0.2 where 1 of 2 is inside, 0.8 where 2 of 2 are; below it nine voxels, one of them inside
    probability = np.array([0.2, 0.2, 0.8, 0.8, *[0.001] * 9])
    inside = np.array([1, 0, 1, 1, 1, *[0] * 8], bool)
    row = errors(calibration_sums(probability, inside)).loc["a"]
    assert row["calibration_error"] == pytest.approx((2 * 0.3 + 2 * 0.2) / 4)
    assert row["missed"] == 1 / 4 and row["voxels"] == 4
    # of the whole image, the first bin has them, too
    assert row["of_whole_images"] == pytest.approx((2 * 0.3 + 2 * 0.2 + abs(0.009 - 1)) / 13)


def test_perfect_probabilities_have_nearly_no_error_and_wrong_ones_have_theirs():
    rng = np.random.default_rng(0)
    probability = rng.beta(0.3, 0.6, 200_000)
    inside = rng.random(200_000) < probability
    assert errors(calibration_sums(probability, inside)).loc["a", "calibration_error"] < 0.01
    overconfident = at_temperature(np.stack([1 - probability, probability], -1), 0.5)[:, 1]
    assert errors(calibration_sums(overconfident, inside)).loc["a", "calibration_error"] > 0.04


@given(st.integers(0, 1000))
def test_bins_are_those_of_scikit_learn_and_add_up_over_cases(seed):
    rng = np.random.default_rng(seed)
    probability, inside = rng.random(300), rng.random(300) < 0.4
    sums = calibration_sums(probability, inside)
    np.testing.assert_allclose(
        calibration_sums(probability[:100], inside[:100]) + calibration_sums(probability[100:], inside[100:]), sums
    )
    everywhere = np.concatenate([sums[:1] + sums[1:2], sums[2:]])
    observed, predicted = calibration_curve(inside, probability, n_bins=NUM_BINS)
    filled = everywhere[everywhere[:, 0] > 0]
    np.testing.assert_allclose(filled[:, 1] / filled[:, 0], predicted)
    np.testing.assert_allclose(filled[:, 2] / filled[:, 0], observed)


# --- folders -----------------------------------------------------------------------------------------------------------------


def write_case(root, case, labels=LABELS, seed=0, probabilities=True):
    """A reference, a segmentation and, as nnU-Net leaves them, probabilities and properties."""
    rng = np.random.default_rng(seed)
    regions = any(isinstance(value, list) for value in labels.values())
    logits = rng.normal(0, 2, (2 if regions else 3, *SHAPE))
    given = 1 / (1 + np.exp(-logits)) if regions else softmax(logits, axis=0)
    truth = rng.integers(0, 3, SHAPE)
    segmentation = (given.max(0) > 0.5).astype(int) if regions else given.argmax(0)
    for folder, voxels in (("ref", truth), ("pred", segmentation)):
        (root / folder).mkdir(exist_ok=True)
        image = sitk.GetImageFromArray(voxels.astype(np.uint8))
        image.SetSpacing(SPACING)
        sitk.WriteImage(image, str(root / folder / f"{case}.nii.gz"))
    if probabilities:
        np.savez_compressed(root / "pred" / f"{case}.npz", probabilities=given.astype(np.float32))
        properties = {"sitk_stuff": {"spacing": SPACING, "origin": (0.0, 0.0, 0.0), "direction": tuple(np.eye(3).ravel())}}
        (root / "pred" / f"{case}.pkl").write_bytes(pickle.dumps(properties | {"spacing": list(SPACING[::-1])}))
    return given, truth


def calibrated(root, labels=LABELS, regions=None, num_processes=1):
    dataset_json = {"labels": labels, "file_ending": ".nii.gz"}
    return calibrate_folder(root / "ref", root / "pred", dataset_json, structures_of(labels, regions), num_processes)


def test_a_folder_is_the_sum_of_its_cases_and_a_region_that_of_its_labels(tmp_path):
    cases = [write_case(tmp_path, case, seed=seed) for seed, case in enumerate("xy")]
    write_case(tmp_path, "z", probabilities=False)
    found = calibrated(tmp_path)
    assert found.names == ("edema", "tumor", "foreground") and found.num_cases == (2, 3)
    for index, inside in enumerate([[1], [2], [1, 2]]):
        expected = sum(calibration_sums(given[inside].sum(0), np.isin(truth, inside)) for given, truth in cases)
        np.testing.assert_allclose(found.sums[index], expected, rtol=1e-5)
    assert "2 of 3 cases" in found.to_markdown()
    found.save(tmp_path)
    table = pd.read_csv(tmp_path / "calibration.csv", index_col="structure")
    np.testing.assert_allclose(table["calibration_error"], found.table()["calibration_error"])
    assert Image.open(tmp_path / "calibration.png").size[0] > 400


def test_a_region_based_network_has_a_channel_a_region_and_ignored_voxels_count_nowhere(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    given, truth = write_case(tmp_path, "x", labels)
    found = calibrated(tmp_path, labels)
    assert found.names == ("whole", "core")
    np.testing.assert_allclose(found.sums[1], calibration_sums(given[1], truth == 2), rtol=1e-5)
    assert calibrated(tmp_path, labels, {"rim": (1,)}).names == ("whole", "core")
    image = sitk.ReadImage(str(tmp_path / "ref" / "x.nii.gz"))
    truth[:2] = 3
    ignoring = sitk.GetImageFromArray(truth.astype(np.uint8))
    ignoring.CopyInformation(image)
    sitk.WriteImage(ignoring, str(tmp_path / "ref" / "x.nii.gz"))
    np.testing.assert_allclose(calibrated(tmp_path, labels).sums[1], calibration_sums(given[1][2:], truth[2:] == 2), rtol=1e-5)


def test_probabilities_come_to_the_axes_of_the_reference(tmp_path):
    write_case(tmp_path, "x")
    expected = calibrated(tmp_path).sums
    for folder in ("ref", "pred"):
        path = str(tmp_path / folder / "x.nii.gz")
        sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(path), "PIR"), path)
    np.testing.assert_allclose(calibrated(tmp_path).sums, expected)


def test_without_probabilities_there_is_no_line_and_no_file(tmp_path, nnunet_folders, capsys):
    (nnunet_folders.raw / "Dataset001_Tiny").mkdir()
    described = {"labels": LABELS, "channel_names": {"0": "T1w"}, "file_ending": ".nii.gz", "numTraining": 1}
    (nnunet_folders.raw / "Dataset001_Tiny" / "dataset.json").write_text(json.dumps(described))
    write_case(tmp_path, "x", probabilities=False)
    evaluate_dataset("1", tmp_path / "ref", tmp_path / "pred", tmp_path / "out")
    assert "alibration" not in capsys.readouterr().out and not (tmp_path / "out" / "calibration.csv").exists()
    write_case(tmp_path, "x")
    evaluate_dataset("1", tmp_path / "ref", tmp_path / "pred", tmp_path / "out")
    assert "Calibration of 1 cases" in capsys.readouterr().out
    assert (tmp_path / "out" / "calibration.csv").is_file() and (tmp_path / "out" / "calibration.png").is_file()


def test_without_references_there_are_pictures_alone(tmp_path, nnunet_folders, capsys):
    (nnunet_folders.raw / "Dataset001_Tiny").mkdir()
    described = {"labels": LABELS, "channel_names": {"0": "T1w"}, "file_ending": ".nii.gz", "numTraining": 1}
    (nnunet_folders.raw / "Dataset001_Tiny" / "dataset.json").write_text(json.dumps(described))
    write_case(tmp_path, "x")
    (tmp_path / "ref").rename(tmp_path / "images")
    (tmp_path / "images" / "x.nii.gz").rename(tmp_path / "images" / "x_0000.nii.gz")
    flags = ["-d", "1", "-pred", str(tmp_path / "pred"), "-images", str(tmp_path / "images")]
    assert cli.main(["evaluate", *flags, "-o", str(tmp_path / "out")]) == 0
    assert "1 overlay pictures in" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").rglob("*.*")] == ["x.png"]


def spoil_file(folder):
    (folder / "x.npz").write_bytes(b"no archive")


def spoil_channels(folder):
    np.savez(folder / "x.npz", probabilities=np.zeros((5, *SHAPE), np.float32))


def spoil_values(folder):
    np.savez(folder / "x.npz", probabilities=np.full((3, *SHAPE), np.nan, np.float32))


def spoil_origin(folder):
    background = np.load(folder / "x.npz")["probabilities"][0]
    np.savez(folder / "x.npz", probabilities=np.stack([1 - background, background / 2, background / 2]))


def spoil_grid(folder):
    np.savez(folder / "x.npz", probabilities=np.full((3, 2, 6, 5), 0.3, np.float32))


def spoil_properties(folder):
    (folder / "x.pkl").unlink()


@pytest.mark.parametrize(
    "spoil, words",
    [
        (spoil_file, "no probabilities can be read"),
        (spoil_channels, r"shape \(5, 4, 6, 5\), expected \(3, z, y, x\)"),
        (spoil_values, "no numbers from 0 to 1"),
        (spoil_origin, r"not those of x\.nii\.gz"),
        (spoil_grid, "lies elsewhere"),
        (spoil_properties, "not readable"),
    ],
)
def test_probabilities_that_cannot_be_used_are_named_with_a_remedy(tmp_path, spoil, words):
    write_case(tmp_path, "x")
    spoil(tmp_path / "pred")
    with pytest.raises(UserError, match=rf"x\.(npz|pkl).*{words}.*--save_probabilities") as error:
        calibrated(tmp_path)
    assert "preprocess the dataset" not in str(error.value)


# --- temperatures ------------------------------------------------------------------------------------------------------------


def drawn(temperature, num_samples=4000, num_classes=3, seed=0):
    """Labels, and probabilities that are right at this temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (num_samples, num_classes))
    labels = (softmax(logits, axis=1).cumsum(1) < rng.random((num_samples, 1))).sum(1)
    return labels, softmax(logits * temperature, axis=1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_that_was_there_is_found(temperature):
    labels, probabilities = drawn(temperature)
    found = fit(labels, probabilities)
    assert found == pytest.approx(temperature, rel=0.07)
    np.testing.assert_allclose(at_temperature(probabilities, temperature), drawn(1.0)[1], atol=5e-3)


@given(st.floats(0.1, 10), st.integers(0, 100))
def test_a_temperature_keeps_order_and_sums_and_1_keeps_all(temperature, seed):
    probabilities = softmax(np.random.default_rng(seed).normal(0, 1, (5, 4)), axis=1)
    after = at_temperature(probabilities, temperature)
    np.testing.assert_allclose(after.sum(1), 1)
    assert (after.argsort(1) == probabilities.argsort(1)).all()
    assert (after.max(1) <= probabilities.max(1) + 1e-12).all() == (temperature >= 1)
    assert at_temperature(probabilities, 1) is probabilities


def test_what_no_temperature_fits_is_said():
    labels = np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match="hardly a sample is wrong"):
        fit(labels, np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.4, 0.6]]))
    with pytest.raises(ValueError, match="nothing of the classes"):
        fit(labels, np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]))


def write_folds(root, temperature=2.5, num_folds=3, same_patients=False):
    labels, probabilities = drawn(temperature, 300, 2)
    folders = []
    for fold, chosen in enumerate(np.array_split(np.arange(300), num_folds)):
        folders.append(root / f"fold_{fold}")
        (folders[-1] / "validation").mkdir(parents=True)
        rows = {
            "case": [f"c{i}" for i in chosen],
            "mask_label": "",
            "patient": [f"p{i % 50 if same_patients else i}" for i in chosen],
        }
        rows |= {
            "class": np.array(["no", "yes"])[labels[chosen]],
            "p_no": probabilities[chosen, 0],
            "p_yes": probabilities[chosen, 1],
        }
        pd.DataFrame(rows).to_csv(folders[-1] / "validation" / "predictions.csv", index=False)
    return folders


def test_calibration_is_judged_on_folds_that_the_temperature_has_not_seen(tmp_path):
    folders = write_folds(tmp_path)
    found = fit_on_folds(folders, ("no", "yes"))
    assert found.value > 1.5 and found.num_samples == 300
    assert found.judged.loc["after", "log_loss"] < found.judged.loc["before", "log_loss"]
    assert found.judged.loc["after", "calibration_error"] < found.judged.loc["before", "calibration_error"]
    assert "less certain" in found.lines()[0] and "->" in found.lines()[1]
    json.dumps(found.to_dict())
    # the patients of one fold are taken in parts
    alone = fit_on_folds(folders[:1], ("no", "yes"))
    assert alone.judged.loc["after", "log_loss"] < alone.judged.loc["before", "log_loss"]
    assert replace(found, value=0.5).lines()[0].endswith("more certain")


def test_folds_that_give_no_temperature_are_named(tmp_path):
    folders = write_folds(tmp_path / "a")
    with pytest.raises(UserError, match="classes no, yes, the checkpoints know yes, no"):
        fit_on_folds(folders, ("yes", "no"))
    path = folders[1] / "validation" / "predictions.csv"
    table = pd.read_csv(path)
    for folder in folders:
        table[table["class"] == "no"].to_csv(folder / "validation" / "predictions.csv", index=False)
    with pytest.raises(UserError, match=r"no sample is yes.*more folds"):
        fit_on_folds(folders, ("no", "yes"))
    path.unlink()
    with pytest.raises(UserError, match=r"fold_1/validation/predictions\.csv: no such file.*--val"):
        fit_on_folds(folders, ("no", "yes"))
    with pytest.raises(UserError, match="fold_all: has no patients"):
        fit_on_folds([tmp_path / "fold_all"], ("no", "yes"))
    with pytest.raises(UserError, match="the same patients are in every part"):
        fit_on_folds(write_folds(tmp_path / "b", same_patients=True), ("no", "yes"))
