"""What segments are in DICOM's words: codes from a file in dcmqi's form, or from the name of a label.

The file is that of dcmqi (`itkimage2segimage`, and its web page): attributes of the series, and for each `labelID` the codes of
what it is. Without one, names of labels are looked up in the context groups of the DICOM standard, as pydicom holds them;
dicom_names.json has further names for some of their concepts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from matplotlib.colors import to_rgb
from pydicom.sr import coding
from pydicom.sr.codedict import codes as dicom_codes

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.regions import plain_name
from nnunet_csm.files import write_text
from nnunet_csm.schema import Count, Within, from_dict, read_value, to_dict

# Context group -> category of what is in it. Earlier ones win: a scar is a tissue, whatever else it is.
CATEGORIES = {
    "cid7194": "MorphologicallyAbnormalStructure",
    "cid7191": "Tissue",
    "cid7192": "AnatomicalStructure",
    "cid6300": "AnatomicalStructure",  # the prostate's zones
    "cid12305": "AnatomicalStructure",  # the heart's parts
    "cid3010": "AnatomicalStructure",  # its chambers
    "cid4031": "AnatomicalStructure",
}
SIDES = ("left", "right")
# sequence -> what says more of its code
MODIFIERS = {
    "SegmentedPropertyTypeCodeSequence": "SegmentedPropertyTypeModifierCodeSequence",
    "AnatomicRegionSequence": "AnatomicRegionModifierSequence",
}
# what dcmqi writes into every file, beside segments
OF_SERIES = (
    *("ContentCreatorName", "ContentLabel", "ContentDescription", "SeriesDescription", "SeriesNumber", "InstanceNumber"),
    *("BodyPartExamined", "ClinicalTrialSeriesID", "ClinicalTrialTimePointID", "ClinicalTrialCoordinatingCenterName"),
)
DEFAULTS_OF_SERIES = {
    "ContentCreatorName": "",
    "ContentLabel": "SEGMENTATION",
    "SeriesDescription": "Segmentation",
    "SeriesNumber": "300",
    "InstanceNumber": "1",
}


@dataclass(frozen=True)
class Words:
    """A text that DICOM takes as one value of at most `most` characters."""

    most: int

    def allows(self, value: str) -> bool:
        return bool(value.strip()) and len(value) <= self.most and value.isprintable() and "\\" not in value

    def told(self, name: str) -> str:
        return f"1 to {self.most} characters for {name}, none of them a backslash or a line break"


Short = Annotated[str, Words(16)]
Long = Annotated[str, Words(64)]
Colour = Annotated[int, Within(0, 255)]


@dataclass(frozen=True)
class Code:
    """A concept of a coding scheme; the fields are DICOM's keywords."""

    CodeValue: Long
    CodingSchemeDesignator: Short
    CodeMeaning: Long

    @classmethod
    def of(cls, code: coding.Code) -> "Code":
        return cls(code.value, code.scheme_designator, code.meaning)

    def __str__(self) -> str:
        return f"{self.CodeMeaning} ({self.CodingSchemeDesignator} {self.CodeValue})"


@dataclass(frozen=True)
class Segment:
    """What one label or region is, by dcmqi's keys; `AlgorithmVersion` is DICOM's, which dcmqi has not.

    `labelID` is the value of a label in the predictions, of a region the one that it is painted with.
    """

    labelID: Count  # noqa: N815
    SegmentedPropertyCategoryCodeSequence: Code
    SegmentedPropertyTypeCodeSequence: Code
    SegmentLabel: Long | None = None
    SegmentDescription: Long | None = None
    SegmentAlgorithmType: Literal["AUTOMATIC", "SEMIAUTOMATIC", "MANUAL"] = "AUTOMATIC"
    SegmentAlgorithmName: Long | None = None
    AlgorithmVersion: Long | None = None
    SegmentedPropertyTypeModifierCodeSequence: Code | None = None
    AnatomicRegionSequence: Code | None = None
    AnatomicRegionModifierSequence: Code | None = None
    recommendedDisplayRGBValue: tuple[Colour, Colour, Colour] | None = None  # noqa: N815

    def __str__(self) -> str:
        what = (self.SegmentedPropertyCategoryCodeSequence.CodeMeaning, self.SegmentedPropertyTypeModifierCodeSequence)
        category, side = what[0], f" {what[1].CodeMeaning.lower()}" if what[1] else ""
        return f"{self.labelID} {self.SegmentLabel}: {category},{side} {self.SegmentedPropertyTypeCodeSequence}"


@dataclass(frozen=True)
class Codes:
    """What goes into segmentations beside masks.

    Attributes:
        series: attributes of the series by keyword.
        segments: by their value, as far as a file has them.
        algorithm: name and version where a segment has none. They are those of one folder of predictions, and so no part of the
            file that is written to be used again.
    """

    series: Mapping[str, str] = field(default_factory=lambda: DEFAULTS_OF_SERIES)
    segments: Mapping[int, Segment] = field(default_factory=dict)
    algorithm: tuple[str, str] = ("nnU-Net", "not known")


def read_codes(path: Path) -> Codes:
    """A file in dcmqi's form. Raises UserError for keys, codes or lengths that cannot be, and for a label twice."""
    content = nnunet.read_json(path, "correct it; the file that this command writes beside its output is an example")
    known = ("@schema", "segmentAttributes", *OF_SERIES)
    if unknown := sorted(set(content) - set(known)):
        raise UserError(f"{path}: unknown key {unknown[0]!r}, expected {', '.join(known)}; correct it")
    series = {key: read_value(Long, content[key], f"{path}: {key}") for key in OF_SERIES if content.get(key)}
    for key in ("SeriesNumber", "InstanceNumber"):
        if not series.get(key, "1").isdecimal() or int(series.get(key, "1")) < 1:
            raise UserError(f"{path}: {key} is {series[key]!r}, expected a whole number above 0; correct it")
    groups = read_value(tuple[tuple[dict[str, Any], ...], ...], content.get("segmentAttributes"), f"{path}: segmentAttributes")
    segments: dict[int, Segment] = {}
    for number, entry in enumerate(entry for group in groups for entry in group):
        segment = from_dict(Segment, entry, f"{path}: segment {number}")
        if segment.labelID in segments:
            raise UserError(f"{path}: labelID {segment.labelID} stands there twice; give each label or region one entry")
        if segment.AnatomicRegionModifierSequence and not segment.AnatomicRegionSequence:
            raise UserError(
                f"{path}: segment {number} has an AnatomicRegionModifierSequence, but no AnatomicRegionSequence; add it"
            )
        segments[segment.labelID] = segment
    return Codes(DEFAULTS_OF_SERIES | series, segments)


def save_codes(codes: Codes, segments: Sequence[Segment], path: Path) -> None:
    """Write what was used, in the form in which it is read."""
    entries = [{key: value for key, value in to_dict(segment).items() if value is not None} for segment in segments]
    write_text(path, json.dumps({**codes.series, "segmentAttributes": [entries]}, indent=2, ensure_ascii=False) + "\n")


def default_segment(value: int, name: str, colour: str) -> tuple[Segment, str]:
    """What a label is by its name, in a colour of matplotlib, and how that is known; tissue, as in 3D Slicer, where it is not."""
    concepts, words = _concepts(), plain_name(name).split()
    sides, tissue = [word for word in words if word in SIDES], Code.of(dicom_codes.SCT.Tissue)
    category, kind = concepts.get(" ".join(words)) or (None, None)
    side = None
    if kind is None and len(sides) == 1:
        category, kind = concepts.get(" ".join(word for word in words if word not in SIDES)) or (None, None)
        side = Code.of(getattr(dicom_codes.SCT, sides[0].capitalize())) if kind else None
    red, green, blue = (round(255 * one) for one in to_rgb(colour))
    segment = Segment(
        value,
        category or tissue,
        kind or tissue,
        SegmentedPropertyTypeModifierCodeSequence=side,
        recommendedDisplayRGBValue=(red, green, blue),
    )
    return (
        segment,
        "by its name" if kind else "no code is known for that name: edit the codes that are written, and give them to -codes",
    )


@cache
def _concepts() -> dict[str, tuple[Code, Code]]:
    """Plain name -> category and type."""
    found: dict[str, tuple[Code, Code]] = {}
    for group, category in reversed(CATEGORIES.items()):
        of_group = getattr(dicom_codes, group).concepts.values()
        found |= {plain_name(code.meaning): (Code.of(getattr(dicom_codes.cid7150, category)), Code.of(code)) for code in of_group}
    more = json.loads(Path(__file__).with_name("dicom_names.json").read_text(encoding="utf-8"))
    return found | {name: found[plain_name(meaning)] for meaning, names in more.items() for name in names}
