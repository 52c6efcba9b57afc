"""What a classifier says as DICOM structured reports: a Comprehensive SR by TID 1500 for each case, that refers to its series.

A sample (a case, or a lesion of it) is a measurement group: the predicted class as a code and the probability of every class, or
the number with its unit; the model (TID 4019), the slices of the source, and that it is not for diagnosis.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dicom_codes
from pydicom.uid import generate_uid

from nnunet_csm import __version__, nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.repeats import PROBABILITY, classes_of
from nnunet_csm.files import write_text
from nnunet_csm.raw.dicom import stack_in
from nnunet_csm.raw.dicom_frames import Frame
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.schema import Name, from_dict, read_value, to_dict

from .dicom_codes import Code, Long
from .dicom_files import DicomRequest, concept, equipment, following, highdicom_library, write_cases
from .dicom_sources import source_images

NOTE = "Made by research software, not reviewed by a person. Not for diagnosis."
# of names that nobody gave a code: private, as DICOM has it, by the two digits
SCHEME = "99NNUNET_CSM"
SERIES_NUMBER = 301
MEASUREMENTS = Code.of(dicom_codes.DCM.ImagingMeasurements)
REMEDY = "give -i the CSV that nnunet_csm classify writes"


@dataclass(frozen=True)
class ReportCodes:
    """What a report is in DICOM's words.

    Attributes:
        procedure: what was done to the patient.
        evaluation: what the predicted class is.
        classes: by their names in the CSV.
        measurement: what the number is, of a model of numbers.
        unit: of the number.
        site: where in the body; None to say nothing.
    """

    procedure: Code = field(default_factory=lambda: Code.of(dicom_codes.SCT.ImagingProcedure))
    evaluation: Code = field(default_factory=lambda: Code.of(dicom_codes.DCM.AssessmentCategory))
    classes: dict[str, Code] = field(default_factory=dict)
    measurement: Code | None = None
    unit: Code = field(default_factory=lambda: Code.of(dicom_codes.UCUM.NoUnits))
    site: Code | None = None


@dataclass(frozen=True)
class Sample:
    """A row of the CSV: the name of what was classified, the predicted class and the probability of each, or a number."""

    name: str
    predicted: str
    probabilities: Mapping[str, float]
    number: float | None = None


def write(request: DicomRequest) -> list[Path]:
    """Write a report of every case of a CSV, and beside the folder the codes that were used.

    Raises:
        UserError: anything is wrong with the CSV, the codes or any case; nothing is written then.
    """
    if request.labels_from is not None:
        raise UserError(f"-labels_from names the labels of label maps, and {request.predictions} is a table; leave it out")
    samples = read_samples(request.predictions)
    codes = _codes(request, next(iter(samples.values()))[0])
    algorithm = _algorithm(request.predictions.with_suffix(".json"))

    def write_case(case: str, volume: Volume, file: Path) -> str:
        frames, grid = stack_in(volume.path, volume.index)
        with following(volume):
            data = report(samples[case], frames, source_images(volume.path, frames, grid), codes, algorithm)
            data.save_as(file, enforce_file_format=True)
        if not reads_as(file, samples[case], codes):
            raise UserError(f"{file.name} does not read as it was written; is the disk full or damaged?")
        return ", ".join(f"{sample.name} {sample.predicted}" for sample in samples[case]) + f"; of {volume.path}"

    write_cases(request, dict.fromkeys(samples, request.predictions), write_case)
    used = {key: value for key, value in to_dict(codes).items() if value is not None}
    write_text(request.used_codes, json.dumps(used, indent=2, ensure_ascii=False) + "\n")
    print(f"{request.output}: {len(samples)} report(s), read back and found equal; their codes stand in {request.used_codes}")
    return [request.output / f"{case}.dcm" for case in samples]


def read_samples(path: Path) -> dict[str, list[Sample]]:
    """Read what `classify` wrote, by case.

    Raises:
        UserError: no such file, or not such a table; the message names column and line.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no CSV ({error}); {REMEDY}") from None
    if (missing := [name for name in ("case", "mask_label", "predicted") if name not in table]) or table.empty:
        raise UserError(f"{path}: no {f'column {missing[0]}' if missing else 'row'}; {REMEDY}")
    classes = classes_of(table)
    found: dict[str, list[Sample]] = {}
    for line, row in enumerate(table.to_dict("records"), 2):
        number = partial(_number, row, place=f"{path}: line {line}")
        if classes and row["predicted"] not in classes:
            what = f"predicted is {row['predicted']!r}, which has no column of probabilities"
            raise UserError(f"{path}: line {line}: {what}; expected one of {', '.join(classes)}; {REMEDY}")
        name = f"{row['case']}, label {row['mask_label']}" if row["mask_label"] else row["case"]
        probabilities = {one: number(PROBABILITY + one, most=1, least=0) for one in classes}
        sample = Sample(name, row["predicted"], probabilities, None if classes else number("predicted"))
        if sample.name in [other.name for other in found.get(row["case"], [])]:
            raise UserError(f"{path}: line {line}: {sample.name} stands in an earlier line already; keep one of them")
        found.setdefault(read_value(Name, row["case"], f"{path}: line {line}: case"), []).append(sample)
    return found


def _number(row: Mapping[str, str], column: str, place: str, least: float = -np.inf, most: float = np.inf) -> float:
    value = float(pd.to_numeric(row[column], errors="coerce"))
    if not (np.isfinite(value) and least <= value <= most):
        expected = "a number" if most == np.inf else "a probability from 0 to 1"
        raise UserError(f"{place}: {column} is {row[column]!r}, expected {expected}; {REMEDY}")
    return value


def _codes(request: DicomRequest, sample: Sample) -> ReportCodes:
    """What `-codes` has, all of it; without it the classes' names in a private scheme. Prints which."""
    classes = list(sample.probabilities)
    if request.codes is None:
        if not classes:
            raise UserError(
                f"{request.predictions} has numbers, and nothing tells what they measure; give -codes a JSON with the codes "
                '"measurement" and "unit", each of CodeValue, CodingSchemeDesignator and CodeMeaning'
            )
        names = {name: read_value(Long, name, f"{request.predictions}: the class") for name in classes}
        codes = ReportCodes(classes={name: Code(name, SCHEME, name) for name in names})
        said = "their names, in a private scheme: edit the codes that are written, and give them to -codes"
    else:
        remedy = "correct it; the file that this command writes beside its output is an example"
        codes = from_dict(ReportCodes, nnunet.read_json(request.codes, remedy), str(request.codes))
        said = f"as {request.codes} has them"
        if unknown := [name for name in codes.classes if name not in classes]:
            known = ", ".join(classes) or "numbers and no classes"
            raise UserError(f"{request.codes}: classes.{unknown[0]} is no class of {request.predictions}, which has {known}")
        if lacking := [name for name in classes if name not in codes.classes]:
            raise UserError(f"{request.codes}: classes has no code for {lacking[0]}; add it")
        if not classes and codes.measurement is None:
            raise UserError(f"{request.codes}: no measurement, the code of what the numbers are; add it, and their unit")
    listed = [f"{name}: {code}" for name, code in codes.classes.items()] or [f"{codes.measurement}, in {codes.unit.CodeMeaning}"]
    print(f"{'; '.join(listed)}; {said}")
    return codes


def _algorithm(record: Path) -> tuple[str, str]:
    """Name and version of the model, as far as the JSON that `classify` writes beside the CSV tells."""
    if not record.is_file():
        return "nnunet_csm classify", "not known"
    content = nnunet.read_json(record, "classify again")
    try:
        name = f"nnunet_csm {content['dataset']} {content['plans']}"
        hashes = [f"fold {one['fold']} {one['sha256'][:16]}" for one in content["checkpoints"]]
        return name, f"plans {content['plans_sha256'][:16]}, {', '.join(hashes)}"
    except (KeyError, TypeError) as error:
        raise UserError(f"{record}: not as nnunet_csm classify writes it ({error!r}); classify again") from None


def report(
    samples: Sequence[Sample], frames: Sequence[Frame], sources: Sequence[Dataset], codes: ReportCodes, algorithm: tuple[str, str]
) -> Dataset:
    """A Comprehensive SR with a measurement group for each sample of one case.

    Args:
        samples: of the case.
        frames: of the volume.
        sources: as `source_images` gives them.
        codes: of what is said.
        algorithm: name and version of the model.
    """
    highdicom = highdicom_library()
    sr = highdicom.sr
    observer = sr.ObserverContext(
        dicom_codes.DCM.Device,
        sr.DeviceObserverIdentifyingAttributes(
            generate_uid(entropy_srcs=list(algorithm)),
            name=algorithm[0],
            manufacturer_name="nnunet_csm",
            model_name="nnunet_csm classify",
            serial_number=__version__,
        ),
    )
    # of an enhanced file, the frames of this volume
    numbers = [frame.number + 1 for frame in frames] if len(sources) == 1 else None
    slices = [sr.SourceImageForMeasurementGroup(one.SOPClassUID, one.SOPInstanceUID, numbers) for one in sources]
    # without its family: readers, highdicom's among them, take a code for an evaluation
    identified = sr.AlgorithmIdentification(*algorithm)
    data: Dataset = sr.ComprehensiveSR(
        evidence=sources,
        content=sr.MeasurementReport(
            sr.ObservationContext(observer_device_context=observer),
            concept(codes.procedure),
            [_group(sample, codes, identified, slices) for sample in samples],
        ),
        series_instance_uid=highdicom.UID(),
        series_number=SERIES_NUMBER,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        is_complete=True,
        series_description="Classification, not for diagnosis",
        **equipment("nnunet_csm convert to_dicom"),
    )
    return data


def _group(sample: Sample, codes: ReportCodes, algorithm: Any, slices: Sequence[Any]) -> Any:
    """The measurement group (TID 1501) of one sample."""
    sr = highdicom_library().sr
    said, measurements = [], []
    for name, probability in sample.probabilities.items():
        measurement = sr.Measurement(dicom_codes.DCM.Probability, probability, dicom_codes.UCUM.NoUnits)
        modifier = sr.CodeContentItem(dicom_codes.DCM.Finding, concept(codes.classes[name]), "HAS CONCEPT MOD")
        measurement[0].ContentSequence = sr.ContentSequence([modifier])
        measurements.append(measurement)
    if sample.number is None:
        said = [sr.QualitativeEvaluation(concept(codes.evaluation), concept(codes.classes[sample.predicted]))]
    else:
        assert codes.measurement is not None
        measurements = [sr.Measurement(concept(codes.measurement), sample.number, concept(codes.unit))]
    group = sr.MeasurementsAndQualitativeEvaluations(
        sr.TrackingIdentifier(uid=highdicom_library().UID(), identifier=sample.name),
        algorithm_id=algorithm,
        finding_sites=[sr.FindingSite(concept(codes.site))] if codes.site else None,
        measurements=measurements,
        qualitative_evaluations=said,
        source_images=slices,
    )
    group[0].ContentSequence.append(sr.TextContentItem(dicom_codes.DCM.Comment, NOTE, "CONTAINS"))
    return group


def reads_as(file: Path, samples: Sequence[Sample], codes: ReportCodes) -> bool:
    """Whether a report says of each sample the class and the numbers that the table has, in its order."""
    content = pydicom.dcmread(file).ContentSequence
    (measurements,) = (item for item in content if _code(item.ConceptNameCodeSequence) == MEASUREMENTS)
    if len(measurements.ContentSequence) != len(samples):
        return False
    for sample, group in zip(samples, measurements.ContentSequence, strict=True):
        items = group.ContentSequence
        numbers = [float(item.MeasuredValueSequence[0].NumericValue) for item in items if item.ValueType == "NUM"]
        named = [item for item in items if _code(item.ConceptNameCodeSequence) == codes.evaluation]
        said = [] if sample.number is not None else [codes.classes[sample.predicted]]
        expected = [sample.number] if sample.number is not None else list(sample.probabilities.values())
        # DICOM's decimals are rounded to 16 characters
        equal = len(numbers) == len(expected) and np.allclose(numbers, expected, rtol=1e-9, atol=0)
        if not equal or [_code(item.ConceptCodeSequence) for item in named] != said:
            return False
    return True


def _code(sequence: Sequence[Dataset]) -> Code:
    """The code that an item of content holds."""
    (item,) = sequence
    return Code(item.get("CodeValue") or item.get("LongCodeValue"), item.CodingSchemeDesignator, item.CodeMeaning)
