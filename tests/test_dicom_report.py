"""A DICOM report holds what a classifier said, in codes and numbers, and refers to the series it was said of."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dicom_codes
from test_dicom import changed, enhanced, volume  # type: ignore[import-not-found]
from test_dicom_export import FRAME, write_source  # type: ignore[import-not-found]

from nnunet_csm.cli import main
from nnunet_csm.dataset_conversion.dicom_files import DicomRequest
from nnunet_csm.dataset_conversion.to_dicom import write
from nnunet_csm.errors import UserError

highdicom = pytest.importorskip("highdicom", reason="the extra [dicom] is not installed")

CLASSES = "case,mask_label,p_benign,p_malignant,predicted\na,1,0.25,0.75,malignant\na,2,0.9,0.1,benign\n"
NUMBERS = "case,mask_label,predicted,deviation_of_folds\na,,61.5123456,0.5\n"
BENIGN = {"CodeValue": "30807003", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Benign"}
MALIGNANT = {"CodeValue": "21594007", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Malignant"}
FRACTION = {"CodeValue": "10230-1", "CodingSchemeDesignator": "LN", "CodeMeaning": "Left Ventricular Ejection Fraction"}
PERCENT = {"CodeValue": "%", "CodingSchemeDesignator": "UCUM", "CodeMeaning": "Percent"}
HEART = {"CodeValue": "80891009", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Heart"}
RECORD = {
    "dataset": "Dataset121_X",
    "plans": "nnUNetCSMPlans",
    "plans_sha256": "ab" * 32,
    "checkpoints": [{"fold": "0", "sha256": "cd" * 32}, {"fold": "1", "sha256": "ef" * 32}],
}


class Classified:
    """A CSV of `classify`, the series of its case, and the request to bring it to DICOM."""

    def __init__(self, root: Path) -> None:
        self.root, self.table, self.series, self.output = root, root / "predictions.csv", root / "dicom", root / "reports"
        write_source(self.series, volume((6, 5, 4)))
        self.table.write_text(CLASSES)
        self.record(RECORD)

    def record(self, content: Any) -> None:
        self.table.with_suffix(".json").write_text(json.dumps(content))

    def codes(self, **content: Any) -> Path:
        path = self.root / "codes.json"
        path.write_text(json.dumps(content))
        return path

    def write(self, **changes: Any) -> Dataset:
        request = DicomRequest(**{"predictions": self.table, "dicom": str(self.series), "output": self.output, **changes})
        (file,) = write(request)
        return pydicom.dcmread(file)


@pytest.fixture
def classified(tmp_path: Path) -> Classified:
    return Classified(tmp_path)


def groups_of(data: Dataset) -> list[Any]:
    """Measurement groups by highdicom's reader, which checks the template."""
    content = highdicom.sr.ComprehensiveSR.from_dataset(data).content
    found: list[Any] = content.get_image_measurement_groups()
    return found


def texts(item: Dataset) -> list[str]:
    """All texts in the tree of content."""
    here = [str(item.TextValue)] if item.get("ValueType") == "TEXT" else []
    return here + [text for below in item.get("ContentSequence", []) for text in texts(below)]


def test_classes_and_probabilities_are_those_of_the_table_in_the_given_codes(classified: Classified) -> None:
    data = classified.write(codes=classified.codes(classes={"benign": BENIGN, "malignant": MALIGNANT}, site=HEART))
    first, second = groups_of(data)
    assert [group.tracking_identifier for group in (first, second)] == ["a, label 1", "a, label 2"]
    assert first.tracking_uid != second.tracking_uid
    for group, predicted, probabilities in ((first, "Malignant", (0.25, 0.75)), (second, "Benign", (0.9, 0.1))):
        (said,) = group.get_qualitative_evaluations()
        assert (said.name, said.value.meaning) == (dicom_codes.DCM.AssessmentCategory, predicted)
        measured = group.get_measurements()
        assert [(one.name, one.value, one.unit.value) for one in measured] == [
            (dicom_codes.DCM.Probability, probability, "1") for probability in probabilities
        ]
        # of which class each is
        modifiers = [one[0].ContentSequence[0] for one in measured]
        assert [(one.name, one.value.value) for one in modifiers] == [
            (dicom_codes.DCM.Finding, code["CodeValue"]) for code in (BENIGN, MALIGNANT)
        ]
        assert [site.value.meaning for site in group.finding_sites] == ["Heart"]


def test_numbers_have_their_code_and_unit(classified: Classified) -> None:
    classified.table.write_text(NUMBERS)
    (group,) = groups_of(classified.write(codes=classified.codes(measurement=FRACTION, unit=PERCENT)))
    (measured,) = group.get_measurements()
    assert (measured.name.value, measured.value, measured.unit.value) == ("10230-1", 61.5123456, "%")
    assert not group.get_qualitative_evaluations() and group.tracking_identifier == "a"


def test_patient_model_and_slices_stand_in_it_and_that_it_is_no_diagnosis(classified: Classified) -> None:
    data = classified.write()
    sources = {str(one.SOPInstanceUID): one for one in map(pydicom.dcmread, classified.series.iterdir())}
    first = next(iter(sources.values()))
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyID"):
        assert data.get(keyword) == first.get(keyword) != ""
    assert (data.SOPClassUID.name, data.Modality, data.SeriesNumber) == ("Comprehensive SR Storage", "SR", 301)
    assert (data.VerificationFlag, data.PreliminaryFlag, data.CompletionFlag) == ("UNVERIFIED", "PRELIMINARY", "COMPLETE")
    assert data.SeriesDescription == "Classification, not for diagnosis"
    (study,) = data.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == first.SeriesInstanceUID
    assert {one.ReferencedSOPInstanceUID for one in series.ReferencedSOPSequence} == set(sources)
    for group in groups_of(data):
        assert {one.referenced_sop_instance_uid for one in group.source_images} == set(sources)
    said = texts(data)
    assert sum("Not for diagnosis" in text for text in said) == 2
    assert "nnunet_csm Dataset121_X nnUNetCSMPlans" in said
    assert "plans abababababababab, fold 0 cdcdcdcdcdcdcdcd, fold 1 efefefefefefefef" in said
    # the same model is the same observer
    classified.table.with_suffix(".json").unlink()
    assert "not known" in texts(classified.write(overwrite=True))
    if shutil.which("dciodvfy"):
        found = subprocess.run(["dciodvfy", str(classified.output / "a.dcm")], capture_output=True, text=True, check=False)
        assert "Error" not in found.stdout + found.stderr


def test_frames_of_an_enhanced_file_are_referred_to(classified: Classified) -> None:
    file = classified.root / "enhanced" / "x.dcm"
    enhanced(file, np.random.default_rng(0).integers(0, 4000, (3, 5, 4)), [3.0 * place for place in (2, 0, 1)])
    data = pydicom.dcmread(file)
    data.FrameOfReferenceUID = FRAME
    data.save_as(file)
    for group in groups_of(classified.write(dicom=str(file.parent))):
        (image,) = group.source_images
        assert image.referenced_sop_instance_uid == data.SOPInstanceUID and image.referenced_frame_numbers == [2, 3, 1]


def test_without_codes_names_stand_in_a_private_scheme_and_can_be_edited(
    classified: Classified, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["convert", "to_dicom", "-i", str(classified.table), "-dicom", str(classified.series), "-o", str(classified.output)])
    assert "benign (99NNUNET_CSM benign)" in capsys.readouterr().out
    first, _ = groups_of(pydicom.dcmread(classified.output / "a.dcm"))
    value = first.get_qualitative_evaluations()[0].value
    assert (value.value, value.scheme_designator, value.meaning) == ("malignant", "99NNUNET_CSM", "malignant")
    written = classified.root / "reports.codes.json"
    content = json.loads(written.read_text())
    content["classes"]["malignant"] = MALIGNANT
    own = classified.codes(**content)
    first, _ = groups_of(classified.write(codes=own, overwrite=True))
    assert first.get_qualitative_evaluations()[0].value.value == MALIGNANT["CodeValue"]
    assert json.loads(written.read_text()) == content


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("case,mask_label\na,\n", "no column predicted"),
        ("case,mask_label,predicted\n", "no row"),
        ("case,mask_label,p_x,p_y,predicted\na,,0.5,0.5,x\na,,0.5,0.5,y\n", "line 3: a stands in an earlier line"),
        ("case,mask_label,p_x,p_y,predicted\na,,0.5,0.5,z\n", "line 2: predicted is 'z', which has no column of probabilities"),
        ("case,mask_label,p_x,p_y,predicted\na,,0.5,1.5,x\n", "line 2: p_y is '1.5', expected a probability from 0 to 1"),
        ("case,mask_label,predicted\na,,malignant\n", "line 2: predicted is 'malignant', expected a number"),
        ("case,mask_label,predicted\na,,inf\n", "line 2: predicted is 'inf', expected a number"),
        ("case,mask_label,predicted\n../a,,5\n", "line 2: case is '../a', expected a name"),
        (NUMBERS, "nothing tells what they measure; give -codes a JSON"),
    ],
)
def test_a_table_that_is_none_of_a_classifier_is_named(classified: Classified, table: str, said: str) -> None:
    classified.table.write_text(table)
    with pytest.raises(UserError) as error:
        classified.write()
    assert str(classified.table) in str(error.value) and said in str(error.value)
    assert not classified.output.exists()


@pytest.mark.parametrize(
    ("table", "content", "said"),
    [
        (CLASSES, {"classes": {"benign": BENIGN}}, "classes has no code for malignant; add it"),
        (CLASSES, {"classes": {"normal": BENIGN}}, "classes.normal is no class of"),
        (CLASSES, {"classes": {"benign": {"CodeValue": "1"}}}, "missing CodeMeaning, CodingSchemeDesignator"),
        (CLASSES, {"class": {}}, "unknown class"),
        (NUMBERS, {"unit": PERCENT}, "no measurement, the code of what the numbers are"),
        (NUMBERS, {"classes": {"benign": BENIGN}}, "which has numbers and no classes"),
    ],
)
def test_codes_that_cannot_be_followed_are_named(classified: Classified, table: str, content: dict[str, Any], said: str) -> None:
    classified.table.write_text(table)
    with pytest.raises(UserError) as error:
        classified.write(codes=classified.codes(**content))
    assert str(error.value).startswith(str(classified.root / "codes.json")) and said in str(error.value)


def test_what_a_report_cannot_rest_on_is_refused(classified: Classified) -> None:
    classified.table.write_text(CLASSES + "b,,0.5,0.5,benign\n")
    table = classified.root / "series.csv"
    table.write_text("case,path\na,dicom\n")
    with pytest.raises(UserError, match=r"tells of no series for b; give the folder of one series"):
        classified.write(dicom=str(table))
    classified.table.write_text(CLASSES)
    with pytest.raises(UserError, match="-labels_from names the labels of label maps"):
        classified.write(labels_from="121")
    classified.record({"dataset": "X"})
    with pytest.raises(UserError, match="not as nnunet_csm classify writes it"):
        classified.write()
    classified.record(RECORD)
    changed(classified.series, lambda data, place: setattr(data, "PatientSex", "male"))
    with pytest.raises(UserError, match="highdicom cannot follow its headers"):
        classified.write()
    with pytest.raises(UserError, match="no CSV"):
        classified.write(predictions=classified.root / "nowhere.csv")
    assert not classified.output.exists()
