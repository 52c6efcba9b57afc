"""A DICOM segmentation holds what was predicted, at its place in the patient, and refers to the series it was made from."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dicom_codes
from test_dicom import changed, enhanced, of_b_value, volume, write_dicom  # type: ignore[import-not-found]

from nnunet_csm.cli import main
from nnunet_csm.dataset_conversion.dicom_codes import Codes, default_segment, read_codes, save_codes
from nnunet_csm.dataset_conversion.dicom_sources import source_images
from nnunet_csm.dataset_conversion.to_dicom import DicomRequest, reads_as, segmentation, write
from nnunet_csm.errors import UserError
from nnunet_csm.raw.dicom import stack_in

pytest.importorskip("highdicom", reason="the extra [dicom] is not installed")

LABELS: dict[str, Any] = {"background": 0, "tumour": 1, "central gland": 2, "left kidney": 3}
FRAME, PATIENT = "1.2.3.5", "4711"


def write_source(folder: Path, image: sitk.Image, uid: str = "1.2.3.1", **tags: str) -> None:
    """A series of one slice a file, with the attributes of a patient."""
    write_dicom(folder, image, uid, frame=FRAME, **tags)

    def of_patient(data: Dataset, place: int) -> None:
        data.SpecificCharacterSet = "ISO_IR 100"
        data.PatientID, data.PatientName, data.PatientSex, data.StudyID = PATIENT, "Müller^Jürgen", "O", "7"
        data.SliceThickness = 2.5

    changed(folder, of_patient)


def label_map(image: sitk.Image, largest: int = 3) -> sitk.Image:
    """Random labels on the grid of an image; one slice is empty."""
    labels = np.random.default_rng(3).integers(0, largest + 1, image.GetSize()[::-1]).astype(np.uint8)
    labels[1] = 0
    result = sitk.GetImageFromArray(labels)
    result.CopyInformation(image)
    return result


class Predicted:
    """Predictions of one case, its series, and the request to bring them to DICOM."""

    def __init__(self, root: Path, labels: dict[str, Any] | None = None, **more: Any) -> None:
        self.root, self.predictions, self.series, self.output = root, root / "out", root / "dicom", root / "seg"
        self.predictions.mkdir()
        self.image = volume((6, 5, 4))
        write_source(self.series, self.image)
        self.labels = label_map(self.image)
        self.predict(self.labels)
        self.describe(labels or LABELS, **more)

    def describe(self, labels: dict[str, Any], **more: Any) -> None:
        content = {"labels": labels, "channel_names": {"0": "T2w"}, "file_ending": ".nii.gz", "numTraining": 1, **more}
        (self.predictions / "dataset.json").write_text(json.dumps(content))

    def predict(self, labels: sitk.Image, case: str = "a") -> Path:
        path = self.predictions / f"{case}.nii.gz"
        sitk.WriteImage(labels, str(path))
        return path

    def request(self, **changes: Any) -> DicomRequest:
        return DicomRequest(**{"predictions": self.predictions, "dicom": str(self.series), "output": self.output, **changes})

    def write(self, **changes: Any) -> Dataset:
        (file,) = write(self.request(**changes))
        return pydicom.dcmread(file)


@pytest.fixture
def predicted(tmp_path: Path) -> Predicted:
    return Predicted(tmp_path)


def places(image: sitk.Image, *values: int) -> set[tuple[float, ...]]:
    """Where the voxels with these values lie in the patient, mm."""
    found = np.argwhere(np.isin(sitk.GetArrayFromImage(image), values))[:, ::-1]
    return {tuple(np.round(image.TransformIndexToPhysicalPoint(one), 3) + 0.0) for one in found.tolist()}


def places_in(data: Dataset) -> dict[int, set[tuple[float, ...]]]:
    """The same of each segment of a file, by the attributes that a reader has: no part of what wrote it is used."""
    shared = data.SharedFunctionalGroupsSequence[0]
    rows, columns = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
    between_rows, between_columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    found: dict[int, set[tuple[float, ...]]] = {int(one.SegmentNumber): set() for one in data.SegmentSequence}
    planes = data.pixel_array.reshape(-1, data.Rows, data.Columns)
    for plane, group in zip(planes, data.PerFrameFunctionalGroupsSequence, strict=True):
        number = (group if "SegmentIdentificationSequence" in group else shared).SegmentIdentificationSequence[0]
        origin = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float)
        for row, column in np.argwhere(plane):
            place = origin + column * between_columns * rows + row * between_rows * columns
            found[int(number.ReferencedSegmentNumber)].add(tuple(np.round(place, 3) + 0.0))
    return found


# --- voxels and their place --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stored",
    [
        lambda image: image,
        lambda image: sitk.Flip(image, (False, False, True), False),
        lambda image: sitk.DICOMOrient(image, "RAS"),
        lambda image: sitk.PermuteAxes(image, (2, 0, 1)),
        lambda image: sitk.Flip(sitk.PermuteAxes(image, (1, 2, 0)), (True, False, True), False),
    ],
    ids=["as the series", "slices reversed", "RAS", "axes permuted", "permuted and flipped"],
)
def test_every_voxel_is_where_it_was_predicted(predicted: Predicted, stored: Callable[[sitk.Image], sitk.Image]) -> None:
    predicted.predict(stored(predicted.labels))
    found = predicted.write()
    assert places_in(found) == {value: places(predicted.labels, value) for value in (1, 2, 3)}


def test_a_series_without_any_file_in_order_and_with_wrong_distances_in_its_headers(predicted: Predicted) -> None:
    def contradict(data: Dataset, place: int) -> None:
        data.SpacingBetweenSlices = 9
        data.InstanceNumber = 100 - place
        data.ImageOrientationPatient = [str(float(one) + 1e-6 * place) for one in data.ImageOrientationPatient]

    changed(predicted.series, contradict)
    found = predicted.write()
    assert float(found.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices) == pytest.approx(3)
    assert places_in(found) == {value: places(predicted.labels, value) for value in (1, 2, 3)}


def test_regions_are_written_as_nnunet_scores_them_and_may_overlap(tmp_path: Path) -> None:
    regions = {"background": 0, "whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3}
    predicted = Predicted(tmp_path, regions, regions_class_order=[1, 2, 3])
    found = predicted.write()
    assert [one.SegmentLabel for one in found.SegmentSequence] == ["whole tumor", "tumor core", "enhancing tumor"]
    inside = {1: (1, 2, 3), 2: (2, 3), 3: (3,)}
    assert places_in(found) == {number: places(predicted.labels, *values) for number, values in inside.items()}


def test_a_prediction_without_foreground_is_a_segmentation_without_any(predicted: Predicted) -> None:
    predicted.predict(predicted.labels * 0)
    found = predicted.write()
    assert places_in(found) == {1: set(), 2: set(), 3: set()}
    assert len(found.SegmentSequence) == 3


def test_frames_of_an_enhanced_file_are_those_of_the_volume_that_was_segmented(predicted: Predicted) -> None:
    order = [4, 1, 5, 0, 2, 3]  # of places in the file, each with two b-values
    voxels = np.random.default_rng(0).integers(0, 4000, (12, 5, 4))
    file = predicted.root / "enhanced" / "x.dcm"

    def turned(group: Dataset, number: int) -> None:
        """As many scanners write it: orientation and voxels for each frame."""
        measures, plane = Dataset(), Dataset()
        measures.PixelSpacing, plane.ImageOrientationPatient = [0.75, 0.5], [1, 0, 0, 0, 1, 0]
        group.PixelMeasuresSequence, group.PlaneOrientationSequence = [measures], [plane]

    enhanced(file, voxels, [3.0 * order[i // 2] for i in range(12)], of_b_value(lambda i: [800, 0][i % 2]), turned)
    data = pydicom.dcmread(file)
    data.FrameOfReferenceUID = FRAME
    data.SharedFunctionalGroupsSequence = [Dataset()]
    data.save_as(file)
    _, grid = stack_in(file.parent, 1)
    labels = label_map(grid.zeros())
    predicted.predict(labels)
    table = predicted.root / "series.csv"
    table.write_text("case;path;volume\na;enhanced;1\n")
    found = predicted.write(dicom=str(table))
    assert places_in(found) == {value: places(labels, value) for value in (1, 2, 3)}
    for group in found.PerFrameFunctionalGroupsSequence:
        image = group.DerivationImageSequence[0].SourceImageSequence[0]
        source = data.PerFrameFunctionalGroupsSequence[image.ReferencedFrameNumber - 1]
        assert image.ReferencedSOPInstanceUID == data.SOPInstanceUID
        assert source.PlanePositionSequence == group.PlanePositionSequence
        assert source.MRDiffusionSequence[0].DiffusionBValue == 800
    instances = found.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert [one.ReferencedSOPInstanceUID for one in instances] == [data.SOPInstanceUID]


def test_what_does_not_read_as_it_was_written_is_noticed(predicted: Predicted) -> None:
    frames, grid = stack_in(predicted.series)
    masks = sitk.GetArrayFromImage(predicted.labels)[None] == 1
    segment, _ = default_segment(1, "tumour", "red")
    file = predicted.root / "x.dcm"
    segment = segment.__class__(**{**segment.__dict__, "SegmentLabel": "tumour"})
    segmentation(masks, frames, source_images(predicted.series, frames, grid), [segment], Codes()).save_as(file)
    assert reads_as(file, masks, frames)
    assert not reads_as(file, ~masks, frames)
    assert not reads_as(file, masks[:, ::-1], frames)
    assert not reads_as(file, masks, frames[:-1])


# --- what a reader is told ---------------------------------------------------------------------------------------------------


def test_patient_study_and_slices_are_those_of_the_source(predicted: Predicted) -> None:
    (predicted.predictions / "plans.json").write_text(
        json.dumps({"dataset_name": "Dataset030_X", "plans_name": "nnUNetPlans", "configurations": {}})
    )
    found = predicted.write()
    sources = {str(one.SOPInstanceUID): one for one in map(pydicom.dcmread, predicted.series.iterdir())}
    first = next(iter(sources.values()))
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyID", "FrameOfReferenceUID"):
        assert found.get(keyword) == first.get(keyword) != ""
    assert str(found.PatientName) == "Müller^Jürgen"
    assert found.SOPClassUID.name == "Segmentation Storage"
    assert (found.Modality, found.SegmentationType, found.SeriesNumber) == ("SEG", "BINARY", 300)
    assert found.SeriesInstanceUID != first.SeriesInstanceUID
    (referred,) = found.ReferencedSeriesSequence
    assert referred.SeriesInstanceUID == first.SeriesInstanceUID
    assert {one.ReferencedSOPInstanceUID for one in referred.ReferencedInstanceSequence} == set(sources)
    for group in found.PerFrameFunctionalGroupsSequence:
        (derived,) = group.DerivationImageSequence
        (image,) = derived.SourceImageSequence
        position = sources[image.ReferencedSOPInstanceUID].ImagePositionPatient
        assert group.PlanePositionSequence[0].ImagePositionPatient == position
        assert image.PurposeOfReferenceCodeSequence
        assert derived.DerivationCodeSequence
    (shared,) = found.SharedFunctionalGroupsSequence
    measures = shared.PixelMeasuresSequence[0]
    assert (*measures.PixelSpacing, measures.SliceThickness) == (0.75, 0.5, 2.5)
    assert len(shared.PlaneOrientationSequence[0].ImageOrientationPatient) == 6
    for segment in found.SegmentSequence:
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        assert segment.SegmentAlgorithmName == "nnU-Net Dataset030_X nnUNetPlans"
        assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion.startswith("plans ")


def test_a_source_without_what_may_be_empty_is_enough(predicted: Predicted) -> None:
    def bare(data: Dataset, place: int) -> None:
        for keyword in ("PatientID", "PatientName", "PatientSex", "StudyID", "StudyDate", "AccessionNumber", "SliceThickness"):
            data.pop(keyword, None)

    changed(predicted.series, bare)
    assert predicted.write().PatientID == ""


def test_names_of_labels_give_codes_and_what_they_do_not_tell_is_said(
    predicted: Predicted, capsys: pytest.CaptureFixture[str]
) -> None:
    found = predicted.write()
    kinds = [one.SegmentedPropertyTypeCodeSequence[0] for one in found.SegmentSequence]
    categories = [one.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning for one in found.SegmentSequence]
    assert [one.CodeMeaning for one in kinds] == ["Neoplasm", "Tissue", "Kidney"]
    assert [one.CodeValue for one in kinds] == ["108369006", "85756007", "64033007"]
    assert categories == ["Morphologically Abnormal Structure", "Tissue", "Anatomical Structure"]
    assert kinds[2].SegmentedPropertyTypeModifierCodeSequence[0].CodeMeaning == "Left"
    assert len({tuple(one.RecommendedDisplayCIELabValue) for one in found.SegmentSequence}) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("Neoplasm (SCT 108369006); by its name")
    assert "2 central gland: Tissue, Tissue" in lines[1] and "no code is known for that name" in lines[1]


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("Oedema", "Edema"),
        ("non-enhancing tumour", "Non-Enhancing Lesion"),
        ("LV", "Left ventricle"),
        ("left ventricle", "Left ventricle"),
        ("scar", "Scar tissue"),
        ("prostate", "Prostate"),
        ("peripheral zone", "Peripheral zone of the prostate"),
        ("Hippocampus", "Hippocampus"),
        ("label_1", "Tissue"),
        ("", "Tissue"),
        ("left", "Tissue"),
    ],
)
def test_structures_by_name(name: str, meaning: str) -> None:
    assert default_segment(1, name, "red")[0].SegmentedPropertyTypeCodeSequence.CodeMeaning == meaning


def test_codes_of_a_file_are_followed_and_those_that_were_used_can_be_used_again(predicted: Predicted) -> None:
    predicted.write()
    written = predicted.root / "seg.codes.json"
    content = json.loads(written.read_text())
    (entries,) = content["segmentAttributes"]
    assert [(one["labelID"], one["SegmentLabel"]) for one in entries] == [(1, "tumour"), (2, "central gland"), (3, "left kidney")]
    again = predicted.root / "again.json"
    codes = read_codes(written)
    save_codes(codes, list(codes.segments.values()), again)
    assert again.read_text() == written.read_text()

    organ = {"CodeValue": "41216001", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Prostate"}
    side = {"CodeValue": "7771000", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Left"}
    entries[0] |= {
        "SegmentLabel": "läsion",
        "SegmentDescription": "of the peripheral zone",
        "SegmentAlgorithmType": "SEMIAUTOMATIC",
        "SegmentAlgorithmName": "ours",
        "AlgorithmVersion": "3",
        "AnatomicRegionSequence": organ,
        "AnatomicRegionModifierSequence": side,
        "recommendedDisplayRGBValue": [255, 0, 0],
    }
    content |= {
        "segmentAttributes": [entries[:1]],
        "SeriesNumber": "77",
        "SeriesDescription": "lesions",
        "BodyPartExamined": "PROSTATE",
    }
    own = predicted.root / "own.json"
    own.write_text(json.dumps(content))
    found = predicted.write(codes=own, overwrite=True)
    first, second, _ = found.SegmentSequence
    assert (found.SeriesNumber, found.SeriesDescription, found.BodyPartExamined) == (77, "lesions", "PROSTATE")
    assert (first.SegmentLabel, first.SegmentDescription) == ("läsion", "of the peripheral zone")
    assert (first.SegmentAlgorithmType, first.SegmentAlgorithmName) == ("SEMIAUTOMATIC", "ours")
    assert first.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "3"
    assert first.AnatomicRegionSequence[0].CodeMeaning == "Prostate"
    assert first.AnatomicRegionSequence[0].AnatomicRegionModifierSequence[0].CodeMeaning == "Left"
    assert second.SegmentLabel == "central gland"


CODE = {"CodeValue": "85756007", "CodingSchemeDesignator": "SCT", "CodeMeaning": "Tissue"}
SEGMENT = {"labelID": 1, "SegmentedPropertyCategoryCodeSequence": CODE, "SegmentedPropertyTypeCodeSequence": CODE}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({}, "segmentAttributes is None"),
        ({"segmentAttributes": [], "Series": "x"}, "unknown key 'Series'"),
        ({"segmentAttributes": [[SEGMENT | {"labelID": 4}]]}, "labelID 4 is no label of the predictions, which have 1 tumour, 2"),
        ({"segmentAttributes": [[SEGMENT], [SEGMENT]]}, "labelID 1 stands there twice"),
        ({"segmentAttributes": [[SEGMENT | {"Colour": "red"}]]}, "segment 0: unknown Colour"),
        ({"segmentAttributes": [[SEGMENT | {"SegmentLabel": "x" * 65}]]}, "expected 1 to 64 characters for SegmentLabel"),
        ({"segmentAttributes": [[SEGMENT | {"SegmentLabel": "a\\b"}]]}, "none of them a backslash"),
        ({"segmentAttributes": [[SEGMENT | {"SegmentAlgorithmType": "MAGIC"}]]}, "expected 'AUTOMATIC'"),
        ({"segmentAttributes": [[SEGMENT | {"recommendedDisplayRGBValue": [0, 0, 256]}]]}, "0 <= recommendedDisplayRGBValue"),
        ({"segmentAttributes": [[SEGMENT | {"AnatomicRegionModifierSequence": CODE}]]}, "but no AnatomicRegionSequence"),
        ({"segmentAttributes": [[{"labelID": 1}]]}, "missing SegmentedPropertyCategoryCodeSequence"),
        ({"segmentAttributes": [], "SeriesNumber": "0"}, "SeriesNumber is '0', expected a whole number above 0"),
    ],
)
def test_a_file_of_codes_that_cannot_be_followed_is_named(predicted: Predicted, content: dict[str, Any], said: str) -> None:
    file = predicted.root / "codes.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        predicted.write(codes=file)
    assert str(error.value).startswith(str(file)) and said in str(error.value)
    assert not predicted.output.exists()


# --- which series ------------------------------------------------------------------------------------------------------------


def test_series_of_several_cases_come_from_folders_or_from_a_table(predicted: Predicted) -> None:
    other = volume((6, 5, 4), seed=4)
    other.SetOrigin((30.0, 1.0, -8.0))
    write_source(predicted.root / "cases" / "b", other, "1.2.3.2")
    predicted.series.rename(predicted.root / "cases" / "a")
    predicted.predict(label_map(other), "b")
    table = predicted.root / "series.csv"
    table.write_text("Case,Path\na,cases/a\nb,cases/b\nnot predicted,nowhere\n")
    for dicom in (predicted.root / "cases", table):
        written = write(predicted.request(dicom=str(dicom), overwrite=True))
        assert [path.name for path in written] == ["a.dcm", "b.dcm"] == sorted(path.name for path in predicted.output.iterdir())
        for file, image in zip(written, (predicted.image, other), strict=True):
            assert places_in(pydicom.dcmread(file))[1] == places(label_map(image), 1)
    one = write(predicted.request(predictions=predicted.predictions / "b.nii.gz", dicom=str(table), overwrite=True))
    assert [path.name for path in one] == ["b.dcm"] == [path.name for path in predicted.output.iterdir()]


@pytest.fixture
def converted(predicted: Predicted, monkeypatch: pytest.MonkeyPatch) -> Predicted:
    """The same series after `convert table`: T2w is the reference, another series lies elsewhere."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (predicted.root / name).mkdir()
        monkeypatch.setenv(name, str(predicted.root / name))
    adc = volume((6, 5, 4), seed=9)
    adc.SetSpacing((0.6, 0.8, 3.0))
    sitk.WriteImage(adc, str(predicted.root / "adc.nii.gz"))
    table = predicted.root / "table.csv"
    table.write_text("subject,series,path,split\na,T2w,dicom,test\na,ADC,adc.nii.gz,test\nb,T2w,dicom,\n")
    main(["convert", "table", "-i", str(table), "-d", "501", "-name", "X", "-reference", "T2w", "-np", "1"])
    return predicted


def test_a_converted_dataset_knows_the_series(converted: Predicted, capsys: pytest.CaptureFixture[str]) -> None:
    written = converted.root / "nnUNet_raw" / "Dataset501_X"
    for dicom in ("501", "Dataset501_X", str(written), str(written / "csm_manifest.json")):
        assert (
            main(
                [
                    "convert",
                    "to_dicom",
                    "-i",
                    str(converted.predictions),
                    "-dicom",
                    dicom,
                    "-o",
                    str(converted.output),
                    "--overwrite",
                ]
            )
            == 0
        )
        assert places_in(pydicom.dcmread(converted.output / "a.dcm"))[1] == places(converted.labels, 1)
    assert "a: tumour" in capsys.readouterr().out


def test_what_a_dataset_was_converted_from_has_to_be_there_unchanged(converted: Predicted) -> None:
    changed(converted.series, lambda data, place: setattr(data, "PatientID", "somebody else"))
    with pytest.raises(UserError, match="holds other files than when it was converted"):
        converted.write(dicom="501")
    manifest = converted.root / "nnUNet_raw" / "Dataset501_X" / "csm_manifest.json"
    content = json.loads(manifest.read_text())
    content["cases"]["a"]["reference"] = "ADC"
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"reference ADC was converted from .*adc\.nii\.gz, which is no folder of DICOM files"):
        converted.write(dicom="501")
    damaged: Any
    for damaged in ({"a": {"series": {}, "reference": "T2w"}}, {"a": []}, []):
        manifest.write_text(json.dumps({"cases": damaged}))
        with pytest.raises(UserError, match=r"csm_manifest\.json: "):
            converted.write(dicom="501")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("case\na\n", "lacks the column path"),
        ("case,path\na,dicom\na,dicom\n", "line 3: case a stands in an earlier line"),
        ("case,path,volume\na,dicom,first\n", "'volume' is 'first'"),
        ("case,path\nb,dicom\n", "tells of no series for a; give the folder of one series"),
        ("case,path\na,nowhere\n", "line 2: 'path' is nowhere, and"),
        ("case,path\na,series.csv\n", "series.csv is no folder"),
        ("case,path,volume\na,dicom,3\n", "there is none of index 3"),
    ],
)
def test_a_table_of_series_that_cannot_be_followed_is_named(predicted: Predicted, table: str, said: str) -> None:
    file = predicted.root / "series.csv"
    file.write_text(table)
    with pytest.raises(UserError) as error:
        predicted.write(dicom=str(file))
    assert said in str(error.value)


# --- what is refused ---------------------------------------------------------------------------------------------------------


def moved(labels: sitk.Image, millimetres: float) -> sitk.Image:
    result = sitk.Image(labels)
    result.SetOrigin([place + millimetres for place in labels.GetOrigin()])
    return result


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (lambda labels: labels[:, :, 1:], r"has the shape (5, 5, 4), but the series in"),
        (lambda labels: moved(labels, 2), "its header puts it up to 3.5 mm from there"),
        (lambda labels: sitk.Expand(labels, (2, 1, 1)), "is it of that patient?"),
        (lambda labels: labels + 1, "the mask has the value 4, expected one of 0, 1, 2, 3"),
        (lambda labels: sitk.Cast(labels, sitk.sitkFloat32) * 0.25, "expected whole numbers"),
    ],
    ids=["shape", "place", "spacing", "label", "fractions"],
)
def test_a_prediction_that_is_not_on_the_grid_or_of_other_labels_is_refused(
    predicted: Predicted, labels: Callable[[sitk.Image], sitk.Image], said: str
) -> None:
    path = predicted.predict(labels(predicted.labels))
    with pytest.raises(UserError) as error:
        predicted.write()
    assert str(path) in str(error.value) and said in str(error.value)
    assert list(predicted.root.glob("*seg*")) == []


def test_a_header_that_says_no_place_is_refused(predicted: Predicted) -> None:
    voxels = sitk.GetArrayFromImage(predicted.labels).transpose()
    nibabel.save(nibabel.Nifti1Image(voxels, None), predicted.predictions / "a.nii.gz")
    with pytest.raises(UserError, match="holds neither sform nor qform"):
        predicted.write()


def test_a_header_of_two_minds_is_taken_where_the_series_is_and_said(
    predicted: Predicted, capsys: pytest.CaptureFixture[str]
) -> None:
    path = predicted.predictions / "a.nii.gz"
    image = nibabel.Nifti1Image.from_filename(path)
    voxels, affine = np.asanyarray(image.dataobj), image.affine.copy()
    affine[0, 3] += 20
    image.set_sform(affine, 2)
    nibabel.save(nibabel.Nifti1Image(voxels, None, image.header), path)
    assert places_in(predicted.write())[1] == places(predicted.labels, 1)
    assert "its header holds an sform and a qform that are 20 mm apart" in capsys.readouterr().out


def test_a_prediction_of_one_slice_is_no_volume(predicted: Predicted) -> None:
    (predicted.predictions / "a.nii.gz").unlink()
    predicted.describe(LABELS, file_ending=".mha")
    sitk.WriteImage(predicted.labels[:, :, 2], str(predicted.predictions / "a.mha"))
    with pytest.raises(UserError, match=r"a\.mha has the shape \(5, 4\), expected \(z, y, x\)"):
        predicted.write()


def of_one_slice(keyword: str, value: Any) -> Callable[[Dataset, int], None]:
    return lambda data, place: setattr(data, keyword, value) if place == 2 else None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_one_slice("PatientID", "2"), "mixes slices of 2 PatientID in one series"),
        (of_one_slice("StudyInstanceUID", "1.2.9"), "mixes slices of 2 StudyInstanceUID"),
        (of_one_slice("FrameOfReferenceUID", "1.2.9"), "mixes slices of 2 FrameOfReferenceUID"),
        (of_one_slice("SeriesInstanceUID", "1.2.9"), "holds 2 series, not one"),
        (lambda data, place: data.pop("FrameOfReferenceUID"), "has no FrameOfReferenceUID in"),
        (lambda data, place: setattr(data, "PatientSex", "male"), "highdicom cannot follow its headers (ValueError: 'male'"),
    ],
)
def test_a_series_that_cannot_be_referred_to_is_refused(
    predicted: Predicted, change: Callable[[Dataset, int], None], said: str
) -> None:
    changed(predicted.series, change)
    with pytest.raises(UserError) as error:
        predicted.write()
    assert str(predicted.series) in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("each", [3, 1])
def test_a_volume_in_several_enhanced_files_is_refused(predicted: Predicted, each: int) -> None:
    folder = predicted.root / "several"
    for number in range(2):
        file = folder / f"{number}.dcm"
        enhanced(file, np.zeros((each, 5, 4), int), [3.0 * (each * number + i) for i in range(each)])
        data = pydicom.dcmread(file)
        data.FrameOfReferenceUID = FRAME
        data.save_as(file)
    frames, grid = stack_in(folder)
    with pytest.raises(UserError, match="has a volume in 2 enhanced files, expected one"):
        source_images(folder, frames, grid)


def test_one_bad_case_and_nothing_is_written(predicted: Predicted) -> None:
    predicted.predict(moved(predicted.labels, 40), "b")
    for case in "ab":
        write_source(predicted.root / "cases" / case, predicted.image)
    with pytest.raises(UserError, match=r"nothing was written, 1 thing\(s\) to mend:\n.*b\.nii\.gz"):
        write(predicted.request(dicom=str(predicted.root / "cases")))
    table = predicted.root / "series.csv"
    table.write_text("case,path\na,dicom\nb,dicom\n")
    with pytest.raises(UserError, match=r"(?s)2 thing.* is given for other cases, too"):
        write(predicted.request(dicom=str(table)))
    assert list(predicted.root.glob("*seg*")) == []


def test_what_is_there_is_kept(predicted: Predicted) -> None:
    first = predicted.write()
    with pytest.raises(UserError, match="exists and is kept; give --overwrite"):
        predicted.write()
    assert predicted.write(overwrite=True).SOPInstanceUID != first.SOPInstanceUID


def test_without_the_extra_the_command_says_what_to_install(
    predicted: Predicted, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(SystemExit) as ended:
        main(
            [
                "convert",
                "to_dicom",
                "-i",
                str(predicted.predictions),
                "-dicom",
                str(predicted.series),
                "-o",
                str(predicted.output),
            ]
        )
    assert ended.value.code == 2
    assert capsys.readouterr().err == "Error: DICOM segmentations and reports need highdicom; pip install 'nnunet_csm[dicom]'\n"


def test_predictions_without_names_for_their_labels_are_refused(predicted: Predicted) -> None:
    (predicted.predictions / "dataset.json").rename(predicted.root / "dataset.json")
    with pytest.raises(UserError, match=r"give -labels_from a dataset\.json"):
        predicted.write()
    assert predicted.write(labels_from=str(predicted.root)).SegmentSequence[0].SegmentLabel == "tumour"
    with pytest.raises(UserError, match="no such file or folder; give -i what nnUNetv2_predict wrote"):
        predicted.write(predictions=predicted.root / "nowhere")
    (predicted.predictions / "a.nii.gz").unlink()
    with pytest.raises(UserError, match=r"no label map \.nii\.gz"):
        predicted.write(labels_from=str(predicted.root))


def test_regions_that_are_painted_with_one_value_are_refused(tmp_path: Path) -> None:
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    predicted = Predicted(tmp_path, regions, regions_class_order=[2, 2])
    with pytest.raises(UserError, match="expected a value of its own for each region"):
        predicted.write()


def test_the_generic_code_is_one_of_dicom() -> None:
    segment, said = default_segment(1, "what is it", "red")
    assert segment.SegmentedPropertyTypeCodeSequence.CodeValue == dicom_codes.SCT.Tissue.value
    assert said.startswith("no code is known")
