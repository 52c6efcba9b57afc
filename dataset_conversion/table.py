"""Any dataset from a table: one row a volume. CSV (commas or semicolons) or TSV, in UTF-8.

    subject,series,path,volume,mask,class,patient,split
    S1,T2w,S1/t2.nii.gz,,S1/lesion.nii.gz,malignant,,
    S1,ADC,S1/functional.nii.gz,1,,,,
    S2,,S2/dicom/series_4,,S2/lesion.nii.gz,benign,,test

| column | |
|---|---|
| `subject` | the case; becomes its file name |
| `series` | T1w, T1ce, T2w, FLAIR, DWI, ADC, ... or an alias of one; an unknown name is kept. Empty: from the DICOM attributes |
| `path` | NIfTI, NRRD, MHA, or a folder with one DICOM series; relative to the table |
| `volume` | optional: which volume of a 4-D file, from 0 |
| `mask` | optional: the subject's mask, in one of its rows or in all |
| `class` | optional: the subject's class, in one of its rows or in all |
| `patient` | optional: the unit of splitting, where a patient is several subjects (visits); the subject by default |
| `split` (or `test`) | optional: train, val or test (1 or 0); test goes to imagesTs, val is training data to nnU-Net |

Masks mean what `-labels NAME=VALUE ...` says. Without it the masks are read, and their values are called label_1, label_2, ...
The layout is ours.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.raw.dicom import series_name
from nnunet_csm.raw.series import SeriesMatch, canonical_series
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Diagnosis, Mask, Release, Volume

from . import layout
from .masks import inferred_labels, labels_of, parse_labels, values_in
from .sheets import Row, read_sheet, words_for_none

NO_SUCH_TABLE = "; expected a row a file, with the columns subject, series, path; docs/conversion.md makes it of a row a subject"
# that are told at once
MOST_PROBLEMS = 10
IS_TEST = {"": "", "train": "", "training": "", "val": "", "valid": "", "validation": "", "0": "", "no": "", "false": ""}
SPLITS = {**IS_TEST, "test": "test", "1": "test", "yes": "test", "true": "test"}


@dataclass
class _Subject:
    """What the rows read so far say of a subject; `lines` tells where a series stands."""

    images: dict[str, Volume] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)
    said: dict[str, tuple[str, int]] = field(default_factory=dict)
    problem: str | None = None

    def get(self, column: str) -> str:
        return self.said.get(column, ("", 0))[0]


def read(release: Path, dataset_id: int, name: str, *, labels: Sequence[str] = ()) -> Release:
    """Cases of a table. `release` is the table; `labels` as typed: ["edema=1", "tumour=2"].

    A subject with a file that is missing, or with a DICOM folder that cannot be named, is left out. Raises `UserError` for what
    the table itself gets wrong: columns, values, a series twice, rows of a subject that contradict each other.
    """
    if not (release.is_file() or release.is_symlink()):
        raise UserError(f"{release} is not a file; give -i the table, a CSV or TSV with the columns subject, series, path")
    given = parse_labels(labels)
    subjects, matches = dict[str, _Subject](), dict[str, SeriesMatch]()
    rows = read_sheet(release, ("subject", "series", "path"), NO_SUCH_TABLE)
    problems = list[str]()
    for row in rows:
        try:
            _add(subjects, row, matches)
        except UserError as error:
            problems.append(str(error))
    if problems:
        more = f"; and {len(problems) - MOST_PROBLEMS} more" if len(problems) > MOST_PROBLEMS else ""
        raise UserError("; ".join(problems[:MOST_PROBLEMS]) + more)
    layout.require_cases(list(subjects), release, ())
    masks, left_out = dict[str, Path](), dict[str, str]()
    values = set[int]()
    for identifier, subject in tqdm(subjects.items(), desc="reading masks", unit="subject", disable=bool(given)):
        try:
            if subject.problem:
                raise CaseError(subject.problem)
            if mask := subject.get("mask"):
                path = _existing(release, mask, subject.said["mask"][1], "mask")
                values |= set() if given else values_in(path)
                masks[identifier] = path
        except CaseError as error:
            left_out[identifier] = str(error)
    file_labels = given or inferred_labels(values)
    dataset_labels, mapping = labels_of(masks, file_labels, release)
    cases = [
        _case(identifier, subject, masks.get(identifier), mapping)
        for identifier, subject in subjects.items()
        if identifier not in left_out
    ]
    layout.require_cases(cases, release, left_out.values())
    series = tuple(dict.fromkeys(one for subject in subjects.values() for one in subject.images))
    used = tuple(one for one in series if any(one in case.images for case in cases))
    dataset = Dataset(layout.dataset_name(dataset_id, name), used, dataset_labels)
    notes = [*words_for_none(rows, "class"), *_about_series(matches)]
    return Release(dataset, tuple(cases), left_out, notes=(*notes, *_about_labels(file_labels, mapping)))


def _add(subjects: dict[str, _Subject], row: Row, matches: dict[str, SeriesMatch]) -> None:
    """Note what a row says; a problem with its file leaves the subject out, whatever its other rows say."""
    identifier = row.require("subject")
    if not layout.usable_name(identifier):
        raise row.error(f"subject {identifier!r} cannot be a file name; use letters, digits, '.', '-' and '_'")
    subject = subjects.setdefault(identifier, _Subject())
    _note(subject, row, "mask", row.get("mask"))
    _note(subject, row, "class", row.get("class"))
    _note(subject, row, "patient", row.get("patient"))
    side = row.choose("split", SPLITS) or row.choose("test", SPLITS)
    _note(subject, row, "split", side or ("train" if row.get("split") or row.get("test") else ""))
    index = row.get("volume")
    if index and not index.isdecimal():
        raise row.error(f"'volume' is {index!r}; give the number of a volume in a 4-D file, from 0, or nothing")
    try:
        path = _existing(row.path, row.require("path"), row.line, "path")
        match = _series(row, path, matches)
    except CaseError as error:
        subject.problem = subject.problem or str(error)
        return
    if match.canonical in subject.images:
        first = subject.lines[match.canonical]
        raise row.error(f"subject {identifier} has the series {match.canonical} in line {first} already; keep one, or rename one")
    subject.images[match.canonical] = Volume(path, int(index) if index else None)
    subject.lines[match.canonical] = row.line


def _note(subject: _Subject, row: Row, column: str, value: str) -> None:
    """Every row of a subject may say it, or one of them, but all that do must say the same."""
    if not value:
        return
    said, line = subject.said.setdefault(column, (value, row.line))
    if said != value:
        raise row.error(f"{column!r} is {value!r}, but {said!r} in line {line} for the same subject {row.get('subject')}")


def _existing(table: Path, given: str, line: int, column: str) -> Path:
    return layout.existing(table.parent / given, f"{table} line {line}: {column} {given}")


def _series(row: Row, path: Path, matches: dict[str, SeriesMatch]) -> SeriesMatch:
    given = row.get("series")
    if not given:
        if not path.is_dir():
            raise row.error(f"'series' is empty, and {row.get('path')} is no DICOM folder that could name it; fill it in")
        if (named := series_name(path)) is None:
            raise CaseError(f"{row.place}: the DICOM attributes in {row.get('path')} do not tell the series; fill in 'series'")
        given = named
    return matches.setdefault(given, canonical_series([given])[0])


def _case(identifier: str, subject: _Subject, mask: Path | None, mapping: Mapping[int, int]) -> Case:
    return Case(
        identifier,
        subject.get("patient") or identifier,
        subject.images,
        (Mask(Volume(mask), mapping),) if mask else (),
        (Diagnosis(subject.get("class")),) if subject.get("class") else (),
        subject.get("split") == "test",
    )


def _about_series(matches: Mapping[str, SeriesMatch]) -> list[str]:
    renamed = [f"{match.given} is {match.canonical}" for match in matches.values() if match.given != match.canonical]
    unknown = [match.given for match in matches.values() if not match.known]
    lines = [f"series: {', '.join(renamed)}"] if renamed else []
    return [*lines, f"unknown series, kept as named: {', '.join(unknown)}"] if unknown else lines


def _about_labels(file_labels: Mapping[str, int], mapping: Mapping[int, int]) -> list[str]:
    """Values change where nnU-Net wants no gap; whoever compares with the files must know."""
    changed = [
        f"{name}: {value} becomes {mapping[value]}" for name, value in file_labels.items() if mapping.get(value, value) != value
    ]
    return [f"labels: {', '.join(changed)}"] if changed else []
