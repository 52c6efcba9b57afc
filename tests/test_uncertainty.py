"""Uncertainty of segmentations: entropy and volumes of the members, and what is asked for changes nothing that is not."""

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from factories import DATASET_JSON
from hypothesis import given
from hypothesis import strategies as st
from nibabel import Nifti1Image, as_closest_canonical
from scipy.special import softmax
from test_sliding_window import image, predictor, request_  # noqa: F401, a fixture

from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.regions import structures_of
from nnunet_csm.inference.segmentation import predict
from nnunet_csm.inference.uncertainty import entropy, volumes

# --- entropy -----------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 6), st.integers(0, 5))
def test_entropy_is_0_where_all_is_certain_and_1_where_nothing_is_known(num_classes, certain):
    probabilities = np.full((num_classes, 1, 1, 2), 1 / num_classes, np.float32)
    probabilities[:, 0, 0, 0] = np.arange(num_classes) == certain % num_classes
    np.testing.assert_allclose(entropy(probabilities, of_regions=False)[0, 0], [0, 1], atol=1e-6)


def test_entropy_of_regions_is_that_of_the_most_doubtful_one():
    # certain, in doubt about one region of three, in doubt about all
    regions = np.array([[1, 1, 0.5], [0, 0.5, 0.5], [0, 0, 0.5]], np.float32)[:, None, None]
    np.testing.assert_allclose(entropy(regions, of_regions=True)[0, 0], [0, 1, 1], atol=1e-6)
    alone = entropy(regions[:1] * 0 + 0.1, of_regions=True)[0, 0, 0]
    assert alone == pytest.approx(-(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)), abs=1e-6)


@given(st.integers(0, 1000))
def test_members_that_disagree_are_less_certain_than_they_are_on_their_own(seed):
    members = softmax(np.random.default_rng(seed).normal(0, 3, (4, 3, 2, 2, 2)), axis=1)
    together = entropy(members.mean(0), of_regions=False)
    assert (together >= np.mean([entropy(one, False) for one in members], axis=0) - 1e-6).all()
    assert together.min() >= 0 and together.max() <= 1


# --- members -----------------------------------------------------------------------------------------------------------------


def test_each_fold_and_each_mirrored_pass_is_a_member_and_their_mean_is_the_prediction():
    # in the corners of an image, weights are near the smallest number of fp16, in which nnU-Net sums
    host, volume = predictor(axes=(0, 2), folds=3, use_gaussian=False), image()
    # the first fold's are the network's own tensors, which loading another fold changes
    host.list_of_parameters = copy.deepcopy(host.list_of_parameters)
    expected = host.predict_logits_from_preprocessed_data(volume)
    members = list(host.members(volume))
    assert len(members) == 3 * 4
    assert not any(torch.equal(one, another) for i, one in enumerate(members) for another in members[:i])
    torch.testing.assert_close(sum(one.float() for one in members) / 12, expected.float(), rtol=2e-3, atol=3e-3)
    # and it is as it was
    assert torch.equal(host.predict_logits_from_preprocessed_data(volume), expected)


def test_a_member_is_what_its_fold_predicts_without_mirroring():
    volume = image()
    alone = predictor(axes=(1,), use_mirroring=False).predict_logits_from_preprocessed_data(volume)
    first, second = predictor(axes=(1,)).members(volume)
    assert torch.equal(first, alone) and not torch.equal(second, alone)
    (only,) = predictor(axes=(1,), use_mirroring=False).members(volume)
    assert torch.equal(only, alone)


# --- the command -------------------------------------------------------------------------------------------------------------


def of_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_maps_lie_on_the_images_and_the_table_holds_what_members_would_have_written(request_, tmp_path):  # noqa: F811
    plain = replace(request_, output=tmp_path / "plain", save_probabilities=True)
    predict(plain)
    asked = replace(request_, uncertainty=True, save_probabilities=True)
    predict(asked)
    beside = sorted(path.name for path in plain.output.iterdir() if path.name != "predict_from_raw_data_args.json")
    assert sorted(path.name for path in request_.output.iterdir()) == sorted([*beside, "uncertainty"])
    table = pd.read_csv(request_.output / "uncertainty" / "volumes.csv").set_index(["case", "structure"])
    # two folds, two mirrored axes
    assert (table["members"] == 8).all() and table.index.levels[1].tolist() == ["edema", "foreground", "tumor"]
    alone = []
    for fold in ("0", "1"):
        one = replace(request_, folds=(fold,), mirroring=False, output=tmp_path / fold, uncertainty=True)
        predict(one)
        alone.append(pd.read_csv(one.volume_table).set_index(["case", "structure"]))
    for of_fold in alone:
        assert of_fold[["low_ml", "high_ml"]].isna().all(axis=None) and (of_fold["members"] == 1).all()
        assert (table["low_ml"] <= of_fold["ml"] + 1e-9).all() and (of_fold["ml"] <= table["high_ml"] + 1e-9).all()
    for case in range(3):
        files = [folder / f"case{case}.nii.gz" for folder in (request_.output, plain.output)]
        found, expected = (sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files)
        probabilities = [np.load(file.with_name(f"case{case}.npz"))["probabilities"] for file in files]
        assert (np.abs(probabilities[0] - probabilities[1]) < 3e-3).mean() > 0.95
        assert (found == expected).mean() > 0.95
        ml_per_voxel = np.prod(sitk.ReadImage(str(files[0])).GetSpacing()) / 1000
        assert table.loc[(f"case{case}", "tumor"), "ml"] == pytest.approx((found == 2).sum() * ml_per_voxel, abs=1e-3)
        uncertain = Nifti1Image.from_filename(request_.output / "uncertainty" / f"case{case}_uncertainty.nii.gz")
        np.testing.assert_allclose(uncertain.affine, Nifti1Image.from_filename(files[0]).affine)
        values = uncertain.get_fdata().T
        assert values.shape == found.shape and 0 <= values.min() < values.max() <= 1
        # members with probabilities like these are not far apart
        assert np.abs(values - entropy(probabilities[0], False)).mean() < 0.1


def test_what_was_asked_for_without_uncertainty_is_the_same_to_the_last_bit(request_, tmp_path):  # noqa: F811
    predict(request_)
    predict(replace(request_, uncertainty=True, output=tmp_path / "asked"))
    again = replace(request_, output=tmp_path / "again")
    predict(again)
    before, after = of_folder(request_.output), of_folder(again.output)
    before.pop("predict_from_raw_data_args.json"), after.pop("predict_from_raw_data_args.json")
    assert before == after and not (again.output / "uncertainty").exists()


@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient"])
def test_a_map_follows_a_file_with_other_axes(request_, reader):  # noqa: F811
    """Whatever reader has turned the array, entropy is where the segmentation's border is."""
    model = request_.model / "plans.json"
    model.write_text(model.read_text().replace("SimpleITKIO", reader))
    for file in request_.images.iterdir():
        image = sitk.PermuteAxes(sitk.ReadImage(str(file)), (2, 0, 1))
        sitk.WriteImage(sitk.Flip(image, (True, False, False), False), str(file))
    predict(replace(request_, uncertainty=True, save_probabilities=True, mirroring=False, folds=("0",)))
    segmentation = Nifti1Image.from_filename(request_.output / "case0.nii.gz")
    uncertain = Nifti1Image.from_filename(request_.output / "uncertainty" / "case0_uncertainty.nii.gz")
    np.testing.assert_allclose(uncertain.affine, segmentation.affine, atol=1e-6)
    # with one member it is a function of the probabilities, which nnU-Net leaves in the axes of its array
    expected = entropy(np.load(request_.output / "case0.npz")["probabilities"], False)
    if reader == "NibabelIO":
        np.testing.assert_allclose(uncertain.get_fdata(), expected.T, atol=1e-5)
    else:
        assert sorted(uncertain.shape) == sorted(expected.shape)
        reoriented = as_closest_canonical(uncertain).get_fdata()
        np.testing.assert_allclose(reoriented, expected.T, atol=1e-5)


def test_parts_have_tables_of_their_own_and_what_is_there_is_kept(request_):  # noqa: F811
    asked = replace(request_, uncertainty=True, mirroring=False)
    predict(replace(asked, num_parts=2, part_id=1))
    table = request_.output / "uncertainty" / "volumes_1_of_2.csv"
    assert set(pd.read_csv(table)["case"]) == {"case1"}
    whole = replace(asked, output=request_.output.with_name("whole"))
    predict(replace(whole, num_parts=1))
    maps = sorted((whole.output / "uncertainty").glob("*.nii.gz"))
    times = [path.stat().st_mtime_ns for path in maps]
    content = whole.volume_table.read_text()
    maps[1].unlink()
    predict(replace(whole, continue_prediction=True))
    assert [path.stat().st_mtime_ns == before for path, before in zip(maps, times, strict=True)] == [True, False, True]
    assert whole.volume_table.read_text() == content


def test_a_map_of_an_earlier_prediction_does_not_stay_beside_a_new_one(request_):  # noqa: F811
    predict(replace(request_, uncertainty=True, mirroring=False, folds=("0",)))
    with pytest.raises(UserError, match=r"case0_uncertainty\.nii\.gz is of an earlier prediction.*--uncertainty"):
        predict(request_)


def test_a_table_that_is_none_is_named(request_):  # noqa: F811
    asked = replace(request_, uncertainty=True, mirroring=False, folds=("0",))
    asked.volume_table.parent.mkdir(parents=True)
    asked.volume_table.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"volumes\.csv: not a table of volumes.*move it away"):
        predict(asked)


def test_volumes_of_labels_and_regions_by_hand():
    structures = structures_of(DATASET_JSON["labels"], None)
    counts, members = np.array([90, 6, 4]), np.array([[90, 8, 2], [92, 3, 5]])
    found = {row["structure"]: (row["ml"], row["low_ml"], row["high_ml"]) for row in volumes(structures, counts, members, 0.5)}
    assert found == {"edema": (3, 1.5, 4), "tumor": (2, 1, 2.5), "foreground": (5, 4, 5)}
