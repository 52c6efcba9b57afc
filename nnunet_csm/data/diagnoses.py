"""Which class each case or lesion has, by `classification.csv`, and splits of them by patient, stratified by class."""

import csv
import math
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from nnunet_csm.errors import UserError
from nnunet_csm.files import whole
from nnunet_csm.listing import file_problem

FILE_NAME = "classification.csv"
COLUMNS = ("case", "class", "mask_label", "patient")
REQUIRED = COLUMNS[:2]
# the last two columns may be absent; spreadsheets of some countries write semicolons
DELIMITERS = ",;\t"
EXPECTED = "expected columns case,class and optionally mask_label,patient"

# words of R, pandas, BIDS and people for a value that is not known; compared without case
NO_VALUE = ("", "na", "n/a", "n.a.", "#n/a", "<na>", "nan", "none", "null", "nil", "-", "--", "?")

# repeats are cut from tenths: eight to train on, one to validate, one to test
NUM_TENTHS = 10


@dataclass(frozen=True)
class Sample:
    """What is classified.

    Attributes:
        case: nnU-Net's name of it.
        class_index: in `ClassTable.classes`.
        mask_label: the sample is where the mask has this value; None for all of the mask (> 0).
        patient: the unit of splitting.
    """

    case: str
    class_index: int
    mask_label: int | None
    patient: str

    @property
    def name(self) -> str:
        """Unique in a table."""
        return self.case if self.mask_label is None else f"{self.case}_{self.mask_label}"


@dataclass(frozen=True)
class ClassTable:
    """The samples of a dataset, sorted by case and mask label. With two classes, the last one is the positive one."""

    classes: tuple[str, ...]
    samples: tuple[Sample, ...]

    def of(self, cases: Iterable[str]) -> tuple[Sample, ...]:
        """Samples of these cases; cases without a class have none."""
        wanted = set(cases)
        return tuple(sample for sample in self.samples if sample.case in wanted)

    def only(self, cases: Iterable[str]) -> "ClassTable":
        """The table of these cases, with all its classes: a file may hold test cases too."""
        return ClassTable(self.classes, self.of(cases))


def told_order(classes: Sequence[str]) -> str:
    """Which class counts as positive, why, and how to choose another."""
    how = f'their order ({", ".join(classes)}) is that of "classes" in the raw dataset.json, else of their names'
    if len(classes) > 2:
        return f"none of {len(classes)} classes counts as positive; {how}"
    return f"{classes[-1]} counts as positive, being last: {how}; to choose, list them there, plan and train again"


def is_no_value(text: str) -> bool:
    """Whether a table says with this that it knows no value; such a word is never a class."""
    return unicodedata.normalize("NFKC", _visible(text)).strip().casefold() in NO_VALUE


def alike_classes(names: Iterable[str]) -> list[str]:
    """Lines about names that differ only in case, spaces, characters that nobody sees, or in how a number is written."""
    spellings: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        spellings[_spelling(name)].append(name)
    how = "differ only in case, spaces, invisible characters, or in how a number is written"
    return [f"the classes {' and '.join(map(ascii, group))} {how}" for group in spellings.values() if len(group) > 1]


def _spelling(name: str) -> str:
    spelling = "".join(unicodedata.normalize("NFKC", _visible(name)).split()).casefold()
    try:
        number = float(spelling)
    except ValueError:
        return spelling
    return repr(number) if math.isfinite(number) else spelling


def _visible(text: str) -> str:
    """Without characters of the kinds format and control, such as a zero-width space; tabs and the like become spaces."""
    spaced = (" " if one.isspace() else one for one in text)
    return "".join(one for one in spaced if unicodedata.category(one) not in ("Cf", "Cc"))


def read_class_table(path: str | Path, classes: Sequence[str] | None = None) -> ClassTable:
    """Read `classification.csv`: a row a case, or a row a lesion.

    Commas, semicolons or tabs; UTF-8 with or without a byte order mark. `mask_label` is empty where the whole mask is meant.
    Without the column `patient` every case is a patient.

    Args:
        path: of the file.
        classes: names in the order of their indices ("classes" of dataset.json); by default those found, in the order of
            numbers when all are integers, else of the alphabet.

    Raises:
        UserError: the file is not such a table; the message names the line.
    """
    path = Path(path)
    samples: list[tuple[int, str, str, int | None, str]] = []
    for line, row in named_rows(path):
        case, name, label = row["case"], row["class"], row.get("mask_label", "")
        patient = row.get("patient", case)
        if name and is_no_value(name) and name not in (classes or ()):
            raise UserError(
                f"{path}: line {line}: class is {name!r} ({case or 'no case'}), a word for no value; take it out, rename it, "
                'or list it in "classes" of dataset.json'
            )
        label, patient = ("" if is_no_value(value) else value for value in (label, patient))
        for column, value in (("case", case), ("class", name), ("patient", patient)):
            if not value:
                raise UserError(f"{path}: line {line}: {column} is empty ({case or 'no case'}); fill it in, or take the row out")
        if label and not (label.isascii() and label.isdigit() and int(label) > 0):
            raise UserError(f"{path}: line {line}: mask_label is {label!r}, expected a label of the mask (1, 2, ...) or nothing")
        samples.append((line, case, name, int(label) if label else None, patient))
    _check_rows(path, samples)
    names = _class_names(path, [(line, name) for line, _, name, _, _ in samples], classes)
    index = {name: i for i, name in enumerate(names)}
    found = (Sample(case, index[name], label, patient) for _, case, name, label, patient in samples)
    return ClassTable(names, tuple(sorted(found, key=lambda sample: (sample.case, sample.mask_label or 0))))


def write_class_table(table: ClassTable, path: Path) -> None:
    """Write what `read_class_table` reads, whole or not at all."""
    with whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for sample in table.samples:
            label = "" if sample.mask_label is None else sample.mask_label
            writer.writerow([sample.case, table.classes[sample.class_index], label, sample.patient])


def stratified_folds(table: ClassTable, num_folds: int = 5, seed: int = 12345) -> list[dict[str, list[str]]]:
    """nnU-Net's `splits_final`: every case is validated once; patients stay whole; classes as evenly as that allows.

    Raises:
        UserError: fewer patients than folds.
    """
    parts = deal(table, num_folds, np.random.default_rng(seed))
    return [{"train": _all_but(parts, fold), "val": sorted(part)} for fold, part in enumerate(parts)]


def repeated_splits(table: ClassTable, num_repeats: int = 10, seed: int = 12345) -> list[dict[str, list[str]]]:
    """Random divisions into training, validation and test as 8:1:1 by patient, stratified by class.

    Every ten repeats rest on one division into tenths, and each tenth is the test side of one of them: ten repeats test
    every patient exactly once.

    Raises:
        UserError: fewer than ten patients.
    """
    splits = []
    for repeat in range(num_repeats):
        shuffle, test = divmod(repeat, NUM_TENTHS)
        parts = deal(table, NUM_TENTHS, np.random.default_rng((seed, shuffle)))
        val = (test + 1) % NUM_TENTHS
        splits.append({"train": _all_but(parts, test, val), "val": sorted(parts[val]), "test": sorted(parts[test])})
    return splits


def split_problems(table: ClassTable, split: Mapping[str, Collection[str]]) -> list[str]:
    """Why a split cannot serve classification, a line each; empty when it can.

    A side has samples of at least two classes, the training side of all of them; no patient is on two sides. Cases without
    a class do not count.
    """
    problems = []
    sides: dict[str, set[str]] = defaultdict(set)
    for side, cases in split.items():
        samples = table.of(cases)
        for sample in samples:
            sides[sample.patient].add(side)
        if side == "unlabelled":
            # whatever they are, nothing is made of it
            continue
        found = {sample.class_index for sample in samples}
        absent = [name for index, name in enumerate(table.classes) if index not in found]
        if not found:
            problems.append(f"{side} has no case with a class")
        elif len(found) == 1:
            problems.append(f"{side} has one class only, {table.classes[found.pop()]}")
        elif side == "train" and absent:
            problems.append(f"train has no sample of {', '.join(absent)}")
    problems += [f"patient {patient} is in {' and '.join(sorted(on))}" for patient, on in sorted(sides.items()) if len(on) > 1]
    return problems


def named_rows(path: Path, required: Collection[str] = REQUIRED, expected: str = EXPECTED) -> list[tuple[int, dict[str, str]]]:
    """Line number and named values of every row that is not blank; names of columns are in lower case.

    Raises:
        UserError: the file cannot be read as such a table, or lacks a required column; `expected` says what it is to have.
    """
    if path.exists() and (problem := file_problem(path)):
        raise UserError(problem)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {expected}, a row a case or a lesion") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as CSV (UTF-8), {expected}") from None
    first = text.lstrip().split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=first.count)
    try:
        lines = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
        rows = [(lines.line_num, [value.strip() for value in row]) for row in lines]
    except csv.Error as error:
        raise UserError(f"{path}: not CSV ({error}); {expected}") from None
    rows = [(line, row) for line, row in rows if any(row)]
    if not rows:
        raise UserError(f"{path}: empty; {expected}")
    header = [name.casefold() for name in rows[0][1]]
    missing = [name for name in required if name not in header]
    if missing:
        raise UserError(f"{path}: no column {', '.join(missing)} among {', '.join(rows[0][1])}; {expected}")
    twice = [name for name in {*COLUMNS, *required} if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}: column {twice[0]} twice; {expected}")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(f"{path}: line {line} has {len(row)} values, the header {len(header)}; give each row one per column")
    if not rows[1:]:
        raise UserError(f"{path}: no row below the header; write a row a case or a lesion")
    return [(line, dict(zip(header, row, strict=True))) for line, row in rows[1:]]


def _check_rows(path: Path, samples: Sequence[tuple[int, str, str, int | None, str]]) -> None:
    """Rows of a case fit each other."""
    first: dict[str, tuple[int, int | None, str]] = {}
    seen: dict[tuple[str, int | None], int] = {}
    for line, case, _, label, patient in samples:
        what = case if label is None else f"{case}, mask_label {label}"
        if (case, label) in seen:
            raise UserError(f"{path}: lines {seen[case, label]} and {line} are both about {what}; keep one of them")
        seen[case, label] = line
        other_line, other_label, other_patient = first.setdefault(case, (line, label, patient))
        if (label is None) != (other_label is None):
            raise UserError(
                f"{path}: lines {other_line} and {line}: {case} has a class for the whole mask and one for a mask_label; "
                "give each of its rows a mask_label, or keep one row without"
            )
        if patient != other_patient:
            raise UserError(
                f"{path}: lines {other_line} and {line}: {case} is of patient {other_patient} and of {patient}; correct one"
            )
    names: dict[str, str] = {}
    for _, case, _, label, _ in samples:
        name = case if label is None else f"{case}_{label}"
        if names.setdefault(name, case) != case:
            raise UserError(f"{path}: {name} is a case and a lesion of {min(names[name], case, key=len)}; rename the case")


def _class_names(path: Path, found: Sequence[tuple[int, str]], classes: Sequence[str] | None) -> tuple[str, ...]:
    """Class names in the order of their indices."""
    names = {name for _, name in found}
    if classes is None:
        if len(names) < 2:
            raise UserError(f"{path}: one class only, {names.pop()}; expected two or more")
        if alike := alike_classes(names):
            raise UserError(f'{path}: {alike[0]}; give them one spelling, or list both in "classes" of dataset.json')
        in_numbers = all(name.isascii() and name.removeprefix("-").isdigit() for name in names)
        return tuple(sorted(names, key=lambda name: (int(name), name)) if in_numbers else sorted(names))
    if isinstance(classes, str) or len(classes) < 2 or len(set(map(str, classes))) < len(classes):
        raise UserError(
            f'"classes" of the dataset.json beside {path} is {classes!r}; expected a list of two or more different names'
        )
    given = tuple(str(name) for name in classes)
    for line, name in found:
        if name not in given:
            raise UserError(f'{path}: line {line}: unknown class {name!r}; "classes" of dataset.json has {", ".join(given)}')
    return given


def deal(table: ClassTable, num_parts: int, rng: np.random.Generator) -> list[list[str]]:
    """Cases in parts of equal size and equal shares of the classes, as far as patients, who stay whole, allow.

    Patients come in random order, those with most samples first. Each goes to the part that has least of the classes it
    brings, and of such parts to the smallest; so none stays empty, as a part without a case has least of everything.
    """
    samples: dict[str, list[Sample]] = defaultdict(list)
    for sample in table.samples:
        samples[sample.patient].append(sample)
    if len(samples) < num_parts:
        raise UserError(
            f"{len(samples)} patients cannot be dealt into {num_parts} parts; take fewer folds, of which repeats of 8:1:1 need "
            f"{NUM_TENTHS}"
        )
    patients = sorted(samples)
    rng.shuffle(patients)
    patients.sort(key=lambda patient: -len(samples[patient]))
    totals = np.maximum(1, _counts(table.samples, table.classes))
    counts = np.zeros((num_parts, len(table.classes)))
    parts: list[list[str]] = [[] for _ in range(num_parts)]
    for patient in patients:
        brought = _counts(samples[patient], table.classes)
        has_of_it = counts @ (brought / totals**2)
        chosen = int(np.lexsort((counts.sum(1), has_of_it))[0])
        counts[chosen] += brought
        parts[chosen] += sorted({sample.case for sample in samples[patient]})
    return parts


def _counts(samples: Iterable[Sample], classes: Sequence[str]) -> Int[np.ndarray, " c"]:
    return np.bincount([sample.class_index for sample in samples], minlength=len(classes))


def _all_but(parts: Sequence[Sequence[str]], *held_out: int) -> list[str]:
    return sorted(case for number, part in enumerate(parts) for case in part if number not in held_out)
