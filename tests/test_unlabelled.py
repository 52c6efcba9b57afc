"""Images without labels are preprocessed to the voxels that nnU-Net makes of them, and pretraining draws on them."""

import json
import shutil

import blosc2
import numpy as np
import pytest
from nnunet_folders import NUM_TEST, NUM_TRAINING, TINY_PRESET

from nnunet_csm.plans import PLANS_NAME, read_configuration

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("unlabelled")]

BARE = "Dataset901_Bare"
FOLDER = "nnUNetPlans_3d_fullres_unlabelled"
MANIFEST = f"{FOLDER}.manifest.json"


def volumes(folder):
    return {f.name: blosc2.open(str(f))[:] for f in sorted(folder.glob("*.b2nd")) if not f.name.endswith("_seg.b2nd")}


@pytest.fixture(scope="module")
def bare(planned_dataset):
    """The phantom's training images as a dataset that never had a label."""
    raw = planned_dataset.folders.raw
    shutil.copytree(raw / planned_dataset.name / "imagesTr", raw / BARE / "imagesTr")
    described = json.loads((raw / planned_dataset.name / "dataset.json").read_text())
    (raw / BARE / "dataset.json").write_text(json.dumps({**described, "labels": {}}))
    planned_dataset.check("nnunet_csm", "plan_and_preprocess", "-d", "901", "-preset", str(TINY_PRESET), "-np", "1")
    yield planned_dataset.folders.preprocessed / BARE
    shutil.rmtree(raw / BARE)
    shutil.rmtree(planned_dataset.folders.preprocessed / BARE)


def test_the_voxels_are_those_that_nnunet_makes_of_labelled_images(planned_dataset, bare):
    expected = volumes(planned_dataset.folders.preprocessed / planned_dataset.name / "nnUNetPlans_3d_fullres")
    found = volumes(bare / FOLDER)
    assert len(found) == NUM_TRAINING and found.keys() == expected.keys()
    for name, volume in found.items():
        assert np.array_equal(volume, expected[name]), name
    manifest = json.loads((bare / MANIFEST).read_text())
    assert manifest["cases"].keys() == {name.removesuffix(".b2nd") for name in found}
    assert all(len(files) == 3 for files in manifest["cases"].values())


def test_only_what_is_missing_or_changed_is_made_again(planned_dataset, bare):
    folder = bare / FOLDER
    names = sorted(volumes(folder))
    made = {name: (folder / name).stat().st_mtime_ns for name in names}
    (folder / names[0]).unlink()
    manifest = json.loads((bare / MANIFEST).read_text())
    del manifest["cases"][names[0].removesuffix(".b2nd")]
    (bare / MANIFEST).write_text(json.dumps(manifest))
    # a file that a killed run left half-written
    (folder / ".half.b2nd").touch()
    image = planned_dataset.folders.raw / BARE / "imagesTr" / names[1].replace(".b2nd", "_0000.nii.gz")
    image.touch()
    out = planned_dataset.check("nnunet_csm", "plan_and_preprocess", "-d", "901", "-preprocess_only", "-np", "1")
    assert "2 cases preprocessed" in out
    again = {name: (folder / name).stat().st_mtime_ns for name in names}
    assert {name for name in names if again[name] != made[name]} == set(names[:2])
    assert len(volumes(folder)) == NUM_TRAINING


def test_pretraining_runs_on_images_without_labels(planned_dataset, bare):
    planned_dataset.check("nnunet_csm", "pretrain", "-d", "901", "-f", "all", "-device", "cpu")
    results = planned_dataset.folders.results / BARE / f"nnUNetTrainerCSMPretrain__{PLANS_NAME}__3d_fullres" / "fold_all"
    assert (results / "checkpoint_final.pth").is_file()


def test_test_images_are_drawn_on_by_flag_only_and_in_training_alone(planned_dataset):
    folder = planned_dataset.folders.preprocessed / planned_dataset.name
    plain = json.loads((folder / f"{PLANS_NAME}.json").read_text())
    assert [s["subset"] for s in plain["configurations"]["3d_fullres"]["csm"]["sources"]] == ["imagesTr"]
    name = "nnUNetCSMPlans_test_images"
    flags = ("-preset", str(TINY_PRESET), "-overwrite_plans_name", name, "--test_images", "-np", "1")
    out = planned_dataset.check("nnunet_csm", "plan", "-d", "900", *flags)
    assert "not preprocessed yet: nnunet_csm plan_and_preprocess" in out and "--test_images" not in out
    lost = f"those drew on {planned_dataset.name}/imagesTs in pretraining, these do not; give --test_images for that"
    without = [flag for flag in flags if flag != "--test_images"]
    assert lost in planned_dataset.check("nnunet_csm", "plan", "-d", "900", *without)
    out = planned_dataset.check("nnunet_csm", "plan_and_preprocess", "-d", "900", *flags)
    assert "not preprocessed yet" not in out and f"{NUM_TEST} cases preprocessed" in out
    settings = read_configuration(json.loads((folder / f"{name}.json").read_text()), "3d_fullres", name)
    assert [s.subset for s in settings.csm.sources] == ["imagesTr", "imagesTs"]
    assert len(volumes(folder / "nnUNetPlans_3d_fullres_imagesTs")) == NUM_TEST
    out = planned_dataset.check("nnunet_csm", "pretrain", "-d", "900", "-p", name, "-device", "cpu")
    num_training = NUM_TRAINING - 2 + NUM_TEST  # fold 0 of 6 cases holds 2 back
    assert f"Pretraining on {num_training} cases" in out
