"""Which class, or number, each case or lesion has, by `classification.csv`."""

import csv
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from nnunet_csm.errors import UserError
from nnunet_csm.files import whole
from nnunet_csm.listing import file_problem

FILE_NAME = "classification.csv"
COLUMNS = ("case", "class", "mask_label", "patient")
# by target, the columns of its numbers; classes are names
NUMBERS = {"value": ("value",)}
TARGETS = ("class", *NUMBERS)
# the last two columns may be absent; spreadsheets of some countries write semicolons
DELIMITERS = ",;\t"
EXPECTED = "expected columns case,class (or, for numbers, value) and optionally mask_label,patient"

# words of R, pandas, BIDS and people for a value that is not known; compared without case
NO_VALUE = ("", "na", "n/a", "n.a.", "#n/a", "<na>", "nan", "none", "null", "nil", "-", "--", "?")


# parts of like numbers that splits are stratified by
NUM_STRATA = 5


@dataclass(frozen=True)
class Sample:
    """What is classified.

    Attributes:
        case: nnU-Net's name of it.
        class_index: in `ClassTable.classes`; of numbers, the part of like ones.
        mask_label: the sample is where the mask has this value; None for all of the mask (> 0).
        patient: the unit of splitting.
        numbers: to be learned in place of a class.
    """

    case: str
    class_index: int
    mask_label: int | None
    patient: str
    numbers: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Unique in a table."""
        return self.case if self.mask_label is None else f"{self.case}_{self.mask_label}"


@dataclass(frozen=True)
class ClassTable:
    """The samples of a dataset, sorted by case and mask label. With two classes, the last one is the positive one.

    Attributes:
        classes: their names; none where numbers are learned.
        target: what is learned, one of `TARGETS`.
    """

    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    target: str = "class"

    @property
    def num_strata(self) -> int:
        """How many classes, or parts of like numbers, splits are stratified by."""
        return len(self.classes) or NUM_STRATA

    def of(self, cases: Iterable[str]) -> tuple[Sample, ...]:
        """Samples of these cases; cases without a class have none."""
        wanted = set(cases)
        return tuple(sample for sample in self.samples if sample.case in wanted)

    def only(self, cases: Iterable[str]) -> "ClassTable":
        """The table of these cases, with all its classes: a file may hold test cases too."""
        return ClassTable(self.classes, self.of(cases), self.target)

    def lacking(self, samples: Iterable[Sample]) -> list[str]:
        """What is not to be learned from these samples alone: classes without a sample, or a second number."""
        found = {sample.numbers or sample.class_index for sample in samples}
        if self.classes:
            return [name for index, name in enumerate(self.classes) if index not in found]
        return [] if len(found) > 1 else ["different values"]

    def counted(self, samples: Sequence[Sample]) -> str:
        """Samples by class, or how their numbers are distributed, in words."""
        if self.classes:
            counts = Counter(sample.class_index for sample in samples)
            return ", ".join(f"{counts[index]} {name}" for index, name in enumerate(self.classes))
        return f"{len(samples)} values" + (f" {spread_text([one.numbers[0] for one in samples])}" if samples else "")


def spread_text(values: Sequence[float] | Float[np.ndarray, " n"]) -> str:
    """How numbers are distributed: from 20.5 to 81, mean 53.1, deviation 12.2."""
    low, high, mean, deviation = (f"{value:.4g}" for value in (min(values), max(values), np.mean(values), np.std(values)))
    return f"from {low} to {high}, mean {mean}, deviation {deviation}"


def strata_of(values: Sequence[float]) -> Int[np.ndarray, " n"]:
    """The part of like numbers that each is in, `NUM_STRATA` parts of as many each; equal ones are told apart by nothing."""
    return pd.qcut(pd.Series(values), NUM_STRATA, labels=False, duplicates="drop").fillna(0).to_numpy(np.int64)


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
    Without the column `patient` every case is a patient. A column `value` in place of `class` holds numbers.

    Args:
        path: of the file.
        classes: names in the order of their indices ("classes" of dataset.json); by default those found, in the order of
            numbers when all are integers, else of the alphabet. Of no meaning for numbers.

    Raises:
        UserError: the file is not such a table; the message names the line.
    """
    path = Path(path)
    samples: list[tuple[int, str, str, int | None, str]] = []
    rows = named_rows(path)
    target = _target(path, rows[0][1])
    for line, row in rows:
        case, name, label = row["case"], row[target], row.get("mask_label", "")
        patient = row.get("patient", case)
        if target == "class" and name and is_no_value(name) and name not in (classes or ()):
            raise UserError(
                f"{path}: line {line}: class is {name!r} ({case or 'no case'}), a word for no value; take it out, rename it, "
                'or list it in "classes" of dataset.json'
            )
        label, patient = ("" if is_no_value(value) else value for value in (label, patient))
        for column, value in (("case", case), (target, name), ("patient", patient)):
            if not value:
                raise UserError(f"{path}: line {line}: {column} is empty ({case or 'no case'}); fill it in, or take the row out")
        if label and not (label.isascii() and label.isdigit() and int(label) > 0):
            raise UserError(f"{path}: line {line}: mask_label is {label!r}, expected a label of the mask (1, 2, ...) or nothing")
        samples.append((line, case, name, int(label) if label else None, patient))
    _check_rows(path, samples)
    if target in NUMBERS:
        return _of_numbers(path, target, rows, samples)
    names = _class_names(path, [(line, name) for line, _, name, _, _ in samples], classes)
    index = {name: i for i, name in enumerate(names)}
    found = (Sample(case, index[name], label, patient) for _, case, name, label, patient in samples)
    return ClassTable(names, tuple(sorted(found, key=lambda sample: (sample.case, sample.mask_label or 0))))


def write_class_table(table: ClassTable, path: Path) -> None:
    """Write what `read_class_table` reads, whole or not at all."""
    with whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["case", *NUMBERS.get(table.target, ("class",)), *COLUMNS[2:]])
        for sample in table.samples:
            label = "" if sample.mask_label is None else sample.mask_label
            what = sample.numbers or (table.classes[sample.class_index],)
            writer.writerow([sample.case, *what, label, sample.patient])


def named_rows(path: Path, required: Collection[str] = ("case",), expected: str = EXPECTED) -> list[tuple[int, dict[str, str]]]:
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
    twice = [name for name in {*COLUMNS, *TARGETS, *required} if header.count(name) > 1]
    if twice:
        raise UserError(f"{path}: column {twice[0]} twice; {expected}")
    for line, row in rows[1:]:
        if len(row) != len(header):
            raise UserError(f"{path}: line {line} has {len(row)} values, the header {len(header)}; give each row one per column")
    if not rows[1:]:
        raise UserError(f"{path}: no row below the header; write a row a case or a lesion")
    return [(line, dict(zip(header, row, strict=True))) for line, row in rows[1:]]


def _target(path: Path, header: Collection[str]) -> str:
    """What the columns of a table are the target of."""
    found = [target for target in TARGETS if target in header]
    if not found:
        raise UserError(f"{path}: no column {' or '.join(TARGETS)} among {', '.join(header)}; {EXPECTED}")
    if len(found) > 1:
        raise UserError(
            f"{path}: columns {' and '.join(found)} are both there, one of them is learned; rename the other one, or keep it in "
            f"another file"
        )
    return found[0]


def _of_numbers(
    path: Path,
    target: str,
    rows: Sequence[tuple[int, dict[str, str]]],
    samples: Sequence[tuple[int, str, str, int | None, str]],
) -> ClassTable:
    """The table of a target that is numbers, of all `NUMBERS` columns of it."""
    columns = NUMBERS[target]
    otherwise = "take the row out, and its case is left out"
    numbers = [
        tuple(number(row[column], f"{path}: line {line}: {column}", otherwise) for column in columns) for line, row in rows
    ]
    if len(set(numbers)) < 2:
        raise UserError(f"{path}: {target} is {numbers[0][0]:g} throughout; expected different numbers")
    strata = strata_of([first for first, *_ in numbers]).tolist()
    parts = zip(samples, strata, numbers, strict=True)
    found = [Sample(case, stratum, label, patient, values) for (_, case, _, label, patient), stratum, values in parts]
    return ClassTable((), tuple(sorted(found, key=lambda sample: (sample.case, sample.mask_label or 0))), target)


def number(text: str, where: str, otherwise: str) -> float:
    """Read a finite number; the error says `where` (file, line and column) and what to do if not to correct it."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where} is {text!r}, expected a number such as 61.5; correct it, or {otherwise}")
    return value


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
