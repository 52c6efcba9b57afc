"""From a patient's DICOM to what a network says of it in DICOM: convert, predict and classify, to_dicom, and read back."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import SimpleITK as sitk
import torch
from factories import DATASET_JSON, SERIES, checkpoint_of, csm_plans
from nnunet_folders import NnunetFolders
from test_dicom import volume  # type: ignore[import-not-found]
from test_dicom_export import places, places_in, write_source  # type: ignore[import-not-found]

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.cli import main
from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import read_configuration
from nnunet_csm.schema import to_dict

highdicom = pytest.importorskip("highdicom", reason="the extra [dicom] is not installed")

NAME, CLASSES = "Dataset501_Chain", ("benign", "malignant")
CPU = ("-d", "501", "-f", "0", "-device", "cpu")


@pytest.fixture
def images(nnunet_folders: NnunetFolders, tmp_path: Path) -> Path:
    """Two patients converted from DICOM, series on grids of their own, the second without T1w; networks with random weights."""
    rows = ["subject,series,path,split"]
    for number, case in enumerate("ab"):
        for channel, name in enumerate(SERIES):
            if (case, name) != ("b", "T1w"):
                image = volume((7, 14, 18), seed=3 * number + channel)
                image.SetSpacing((0.9 + 0.1 * channel, 1.1, 2.5))
                write_source(tmp_path / case / name, image, f"1.2.3.{number + 1}.{channel + 1}")
                rows.append(f"{case},{name},{case}/{name},test")
    # a dataset has training cases
    rows.append("c,FLAIR,a/FLAIR,")
    (tmp_path / "series.csv").write_text("\n".join(rows) + "\n")
    flags = ["-reference", "FLAIR", "-np", "1"]
    assert main(["convert", "table", "-i", str(tmp_path / "series.csv"), "-d", "501", "-name", "Chain", *flags]) == 0
    plans = csm_plans() | {"foreground_intensity_properties_per_channel": {str(c): {} for c in range(len(SERIES))}}
    settings = read_configuration(plans, "3d_fullres", "plans")
    torch.manual_seed(0)
    segmenter = CSMSegmenter(len(SERIES), 3, **to_dict(settings.architecture))
    classifier = build_classifier(settings, len(SERIES), len(CLASSES))
    torch.nn.init.normal_(classifier.head.weight)
    others = {"classes": list(CLASSES), "by_mask_label": False, "training_cases": []}
    for trainer, network, more in (
        ("nnUNetTrainerCSM", segmenter, {}),
        ("nnUNetTrainerCSMClassifier", classifier, others),
    ):
        model = nnunet_folders.results / NAME / f"{trainer}__nnUNetCSMPlans__3d_fullres"
        (model / "fold_0").mkdir(parents=True)
        saved = checkpoint_of(plans, network.state_dict()) | {"trainer_name": trainer} | more
        checkpoint.save(saved, model / "fold_0" / "checkpoint_final.pth")
        nnunet.save_json(plans, model / "plans.json")
        nnunet.save_json(DATASET_JSON, model / "dataset.json")
    return nnunet_folders.raw / NAME / "imagesTs"


def test_a_patients_dicom_to_segmentations_and_reports_of_it(images: Path, tmp_path: Path) -> None:
    out, table = tmp_path / "out", tmp_path / "predictions.csv"
    assert main(["predict", *CPU, "-i", str(images), "-o", str(out), "-npp", "0", "-nps", "0"]) == 0
    assert main(["convert", "to_dicom", "-i", str(out), "-dicom", "501", "-o", str(tmp_path / "seg")]) == 0
    assert main(["classify", *CPU, "-i", str(images), "-m", str(out), "-o", str(table)]) == 0
    assert main(["convert", "to_dicom", "-i", str(table), "-dicom", "501", "-o", str(tmp_path / "sr")]) == 0
    said = pd.read_csv(table).set_index("case")
    for case in "ab":
        predicted = sitk.ReadImage(str(out / f"{case}.nii.gz"))
        found = pydicom.dcmread(tmp_path / "seg" / f"{case}.dcm")
        # by the attributes that any reader has
        assert places_in(found) == {value: places(predicted, value) for value in (1, 2)}
        assert all(places_in(found).values())
        # and by highdicom's own reader, on the grid of the series
        read = highdicom.seg.segread(tmp_path / "seg" / f"{case}.dcm").get_volume(combine_segments=True)
        source = highdicom.get_volume_from_series([pydicom.dcmread(file) for file in (tmp_path / case / "FLAIR").iterdir()])
        on_source = read.match_geometry(source).array
        # highdicom has slices against the direction of their normal
        assert np.array_equal(on_source[::-1], sitk.GetArrayFromImage(predicted))

        report = highdicom.sr.srread(tmp_path / "sr" / f"{case}.dcm")
        (group,) = report.content.get_image_measurement_groups()
        assert [one.value for one in group.get_measurements()] == said.loc[case, ["p_benign", "p_malignant"]].tolist()
        assert group.get_qualitative_evaluations()[0].value.value == said.loc[case, "predicted"]
        assert report.PatientID == found.PatientID == "4711"
        slices = {pydicom.dcmread(file).SOPInstanceUID for file in (tmp_path / case / "FLAIR").iterdir()}
        assert {one.referenced_sop_instance_uid for one in group.source_images} == slices
    record = json.loads(table.with_suffix(".json").read_text())
    (version,) = (one.value for one in group[0].ContentSequence if one.name == highdicom.sr.CodedConcept("111003", "DCM", "x"))
    assert record["plans_sha256"][:16] in version and record["checkpoints"][0]["sha256"][:16] in version
