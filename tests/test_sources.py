"""Pretraining draws on any number of datasets, keeps to the folds of each, and never trains on what a fold holds back."""

import json
import pickle
from typing import Any

import blosc2
import numpy as np
import pytest
from factories import source_of
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_csm.data.sources import case_names, check_preprocessed, fold_files, split
from nnunet_csm.errors import UserError
from nnunet_csm.planning.preprocessing import is_preprocessed, preprocessed_cases, remeasured

SERIES = ("FLAIR", "T1w", "T2w", "ADC")


@pytest.fixture
def preprocessed(tmp_path):
    """Three datasets: two labelled ones, which share a case name, and one without labels."""

    def make(dataset, identifier, names):
        folder = tmp_path / dataset / identifier
        folder.mkdir(parents=True)
        for name in names:
            (folder / f"{name}.b2nd").touch()
            (folder / f"{name}_seg.b2nd").touch()
            (folder / f"{name}.pkl").write_bytes(pickle.dumps({}))

    make("Dataset001_A", "x", [f"case{n}" for n in range(10)])
    make("Dataset002_B", "x", [f"case{n}" for n in range(5)])
    make("Dataset003_C", "x_unlabelled", ["one", "two"])
    return tmp_path


A = source_of(("FLAIR", "T1w"), dataset="Dataset001_A", data_identifier="x")
B = source_of(("T2w", "FLAIR"), dataset="Dataset002_B", data_identifier="x", absent_series={"case3": ("T2w",)})
C = source_of(("ADC",), dataset="Dataset003_C", data_identifier="x_unlabelled", labelled=False)


def test_images_of_another_spacing_than_the_plans_are_not_taken_for_preprocessed(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    folder = tmp_path / "Dataset003_C" / "x_unlabelled"
    folder.mkdir(parents=True)
    # (x, y, z) of the file were turned to (z, x, y): 20 x 30 x 6 voxels of 1 x 1 x 4 mm, at 2 mm in plane
    blosc2.asarray(np.zeros((1, 6, 10, 15), np.float32), urlpath=str(folder / "one.b2nd"))
    noted = {"spacing": [1.0, 1.0, 4.0], "shape_after_cropping_and_before_resampling": (6, 20, 30)}
    (folder / "one.pkl").write_bytes(pickle.dumps(noted))
    entry = {"preprocessor_name": "DefaultPreprocessor", "spacing": [4.0, 2.0, 2.0]}

    def plans(**changes):
        made: dict[str, Any] = {"plans_name": "Mine", "dataset_name": "Dataset003_C", "transpose_forward": [2, 0, 1]}
        made["configurations"] = {"3d_fullres": {**entry, **changes}}
        return C, made, "3d_fullres"

    assert preprocessed_cases(*plans()) == ["one"] and is_preprocessed(*plans())
    # of 2-D plans the slices keep their own distance
    assert is_preprocessed(*plans(spacing=[2.0, 2.0]))
    with pytest.raises(
        UserError, match=r"one has 6 x 10 x 15 voxels, expected 6 x 20 x 30.*4 x 1 x 1 mm.*-preprocess_only Mine --ov"
    ):
        preprocessed_cases(*plans(spacing=[4.0, 1.0, 1.0]))
    assert not is_preprocessed(*plans(spacing=[4.0, 1.0, 1.0]))
    # nobody knows what another preprocessor makes
    assert is_preprocessed(*plans(spacing=[4.0, 1.0, 1.0], preprocessor_name="Mine"))


def names(files):
    return [f.name for f in files]


@pytest.mark.parametrize("fold", range(5))
def test_every_labelled_dataset_keeps_to_its_own_folds_and_images_without_labels_train_in_all(preprocessed, fold):
    training, validation = fold_files([A, B, C], SERIES, preprocessed, fold)
    assert not set(names(training)) & set(names(validation))
    for dataset, num_cases in (("Dataset001_A", 10), ("Dataset002_B", 5)):
        expected = generate_crossval_split([f"case{n}" for n in range(num_cases)], 12345, 5)[fold]
        for files, side in ((training, "train"), (validation, "val")):
            assert [n for n in names(files) if n.startswith(dataset)] == [f"{dataset}/{case}" for case in expected[side]]
    assert {"Dataset003_C/one", "Dataset003_C/two"} <= set(names(training))
    assert len({f.path for f in training + validation}) == 17


def test_fold_all_has_every_case_on_both_sides(preprocessed):
    training, validation = fold_files([A, B, C], SERIES, preprocessed, "all")
    assert training == validation and len(training) == 17


def test_a_dataset_without_labels_alone_is_split_as_nnunet_splits(preprocessed):
    source = source_of(("ADC",), dataset="Dataset001_A", data_identifier="x", labelled=False)
    training, validation = fold_files([source], SERIES, preprocessed, 1)
    assert (len(training), len(validation)) == (8, 2)


def test_series_are_found_by_name_in_the_channels_of_each_dataset(preprocessed):
    training, _ = fold_files([A, B, C], SERIES, preprocessed, "all")
    channels = {f.name: f.channels for f in training}
    assert channels["Dataset001_A/case0"] == (0, 1, None, None)
    assert channels["Dataset002_B/case0"] == (1, None, 0, None)
    assert channels["Dataset003_C/one"] == (None, None, None, 0)
    # a copy in place of a missing series
    assert channels["Dataset002_B/case3"] == (1, None, None, None)


def test_the_splits_of_the_user_are_used_and_new_ones_written_for_later_fine_tuning(preprocessed):
    path = preprocessed / "Dataset001_A" / "splits_final.json"
    fold_files([A], SERIES, preprocessed, 0)
    assert json.loads(path.read_text()) == generate_crossval_split([f"case{n}" for n in range(10)], 12345, 5)
    path.write_text(json.dumps([{"train": ["case7"], "val": ["case2"]}]))
    training, validation = fold_files([A], SERIES, preprocessed, 0)
    assert names(training) == ["Dataset001_A/case7"] and names(validation) == ["Dataset001_A/case2"]
    with pytest.raises(UserError, match=r"splits_final\.json: has 1 folds, fold 1"):
        split(preprocessed / "Dataset001_A", ["case7"], 1)


def test_a_folder_whose_preprocessing_was_stopped_is_not_taken_for_whole(preprocessed):
    folder = preprocessed / "Dataset001_A"
    (folder / "gt_segmentations").mkdir()
    for n in range(11):
        (folder / "gt_segmentations" / f"case{n}.nii.gz").touch()
    with pytest.raises(
        UserError, match=r"10 cases, case10 is missing.*nnunet_csm plan_and_preprocess -d Dataset001_A -preprocess_only"
    ):
        fold_files([A], SERIES, preprocessed, 0)
    assert not (folder / "splits_final.json").exists()
    (preprocessed / "Dataset003_C" / "x_unlabelled.manifest.json").write_text('{"all_cases": ["one", "two", "three"]}')
    (preprocessed / "Dataset003_C" / "x_unlabelled" / ".three.b2nd").touch()
    with pytest.raises(UserError, match="three is missing"):
        fold_files([C], SERIES, preprocessed, "all")


def test_a_first_preprocessing_that_was_killed_is_known_by_the_raw_dataset(preprocessed, tmp_path, monkeypatch):
    raw = tmp_path / "raw" / "Dataset001_A"
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True)
    for n in range(10):
        (raw / "imagesTr" / f"case{n}_0000.nii.gz").touch()
        (raw / "labelsTr" / f"case{n}.nii.gz").touch()
    described = {
        "channel_names": {"0": "FLAIR"},
        "labels": {"background": 0, "tumour": 1},
        "file_ending": ".nii.gz",
        "numTraining": 10,
    }
    (raw / "dataset.json").write_text(json.dumps(described))
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    folder = preprocessed / "Dataset001_A" / "x"
    assert len(case_names(A, preprocessed)) == 10  # nnU-Net was about to copy the labels
    (folder / "case4.pkl").write_bytes(pickle.dumps(list(range(999)))[:-1])
    with pytest.raises(UserError, match=r"10 cases, case4 is missing or not whole: preprocessing was stopped; run `nnunet_csm"):
        check_preprocessed([A], "Dataset001_A", preprocessed)
    for file in folder.glob("case[789]*"):
        file.unlink()
    with pytest.raises(UserError, match=r"7 cases, case4 \(and 3 more\) is missing"):
        check_preprocessed([A], "Dataset001_A", preprocessed)
    with pytest.raises(UserError, match=r"7 cases, case7 \(and 2 more\) is missing"):
        fold_files([A], SERIES, preprocessed, "all")
    # without the raw images nobody can tell
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert len(case_names(A, preprocessed)) == 7


def test_too_few_cases_for_folds_and_an_empty_folder_are_errors_with_a_remedy(preprocessed):
    with pytest.raises(UserError, match=r"Dataset003_C: 2 cases cannot be split into 5 folds.*fold all"):
        fold_files([C], SERIES, preprocessed, 0)
    missing = source_of(("ADC",), dataset="Dataset003_C", data_identifier="gone")
    with pytest.raises(UserError, match="nnunet_csm plan_and_preprocess -d Dataset003_C"):
        fold_files([missing], SERIES, preprocessed, "all")


def test_a_fingerprint_of_nnunet_that_was_cut_off_is_measured_again(nnunet_folders):
    paths = [nnunet_folders.preprocessed / name / "dataset_fingerprint.json" for name in ("Dataset001_Cut", "Dataset002_Whole")]
    for path, text in zip(paths, ('{"spacings": [[1.0', '{"spacings": []}'), strict=True):
        path.parent.mkdir()
        path.write_text(text)
    (line,) = remeasured(["Dataset001_Cut", "Dataset002_Whole", "Dataset003_New"])
    assert str(paths[0]) in line and [path.exists() for path in paths] == [False, True]
