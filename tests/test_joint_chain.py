"""Two datasets with different series: planned together, preprocessed for it, pretrained on once, fine-tuned each."""

import json
import shutil

import pytest
from nnunet_folders import TINY_PRESET

from nnunet_csm import checkpoint
from nnunet_csm.plans import JOINT_PLANS_NAME, read_configuration

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("joint_chain")]

OTHER = "Dataset902_Other"


@pytest.fixture(scope="module")
def joint(planned_dataset):
    """The phantom and a second dataset made of it: two of its series in another order, one under a name of its own."""
    raw = planned_dataset.folders.raw
    for subfolder in ("imagesTr", "labelsTr"):
        (raw / OTHER / subfolder).mkdir(parents=True)
    for label in (raw / planned_dataset.name / "labelsTr").iterdir():
        shutil.copy(label, raw / OTHER / "labelsTr")
        case = label.name.removesuffix(".nii.gz")
        for channel, source in enumerate((1, 2)):
            source_file = raw / planned_dataset.name / "imagesTr" / f"{case}_{source:04d}.nii.gz"
            shutil.copy(source_file, raw / OTHER / "imagesTr" / f"{case}_{channel:04d}.nii.gz")
    described = json.loads((raw / planned_dataset.name / "dataset.json").read_text())
    (raw / OTHER / "dataset.json").write_text(json.dumps({**described, "channel_names": {"0": "T1", "1": "DWI"}}))
    flags = ("-d", "900", "902", "--joint", "-weights", "3", "1", "-preset", str(TINY_PRESET), "-np", "1")
    planned_dataset.check("nnunet_csm", "plan_and_preprocess", *flags)
    yield planned_dataset
    shutil.rmtree(raw / OTHER)
    shutil.rmtree(planned_dataset.folders.preprocessed / OTHER)


def settings_of(dataset, name):
    path = dataset.folders.preprocessed / name / f"{JOINT_PLANS_NAME}.json"
    return read_configuration(json.loads(path.read_text()), "3d_fullres", str(path))


def test_both_plans_agree_in_what_the_encoder_sees(joint):
    mine, other = settings_of(joint, joint.name), settings_of(joint, OTHER)
    assert mine.architecture.series == ("FLAIR", "T1w", "T1ce") and other.architecture.series == ("T1w", "DWI")
    assert mine.pretraining_architecture == other.pretraining_architecture
    assert mine.pretraining_architecture.series == ("FLAIR", "T1w", "T1ce", "DWI")
    assert mine.patch_size == other.patch_size and mine.csm.sources == other.csm.sources
    assert [source.weight for source in mine.csm.sources] == [3.0, 1.0]
    for name in (joint.name, OTHER):
        data = joint.folders.preprocessed / name / mine.csm.sources[0].data_identifier
        assert len([f for f in data.glob("*.b2nd") if not f.name.endswith("_seg.b2nd")]) == 6


def test_one_encoder_learns_from_both_and_starts_the_fine_tuning_of_either(joint):
    said = joint.check("nnunet_csm", "pretrain", "-d", "900", "902", "-device", "cpu")
    assert said.count("in 75.0% of the draws") == 1 and said.count("in 25.0% of the draws") == 1
    folder = f"__{JOINT_PLANS_NAME}__3d_fullres/fold_0"
    path = joint.folders.results / joint.name / f"nnUNetTrainerCSMPretrain{folder}" / "checkpoint_final.pth"
    saved = checkpoint.load(path)
    assert saved["series"] == ("FLAIR", "T1w", "T1ce", "DWI")
    assert {case.split("/")[0] for case in saved["training_cases"]} == {joint.name, OTHER}
    for name in (joint.name, OTHER):
        out = joint.check("nnunet_csm", "finetune", "-d", name, "-p", JOINT_PLANS_NAME, "-device", "cpu")
        assert f"Encoder from {path}" in out and "validation scores of this run are too good" not in out
        assert "new series" not in out
        assert (joint.folders.results / name / f"nnUNetTrainerCSM{folder}" / "checkpoint_final.pth").is_file()


def test_plans_for_other_datasets_are_refused(joint):
    done = joint.run("nnunet_csm", "pretrain", "-d", "902", "900", "-device", "cpu")
    assert done.returncode == 2 and "the first of which owns the run" in done.stderr and "Traceback" not in done.stderr
