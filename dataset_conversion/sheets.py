"""Tables that come with a release, as CSV or TSV: rows that know the line they stand in."""

import csv
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nnunet_csm.data.diagnoses import is_no_value
from nnunet_csm.errors import UserError
from nnunet_csm.listing import file_problem


@dataclass(frozen=True)
class Row:
    """A row of a table; `values` by the column's name in lower case, stripped."""

    path: Path
    line: int
    values: Mapping[str, str]

    @property
    def place(self) -> str:
        return f"{self.path} line {self.line}"

    def get(self, column: str) -> str:
        """The value, "" where there is none, or a word that says so."""
        value = self.values.get(column.casefold(), "")
        return "" if is_no_value(value) else value

    def require(self, column: str) -> str:
        """The value; raises `UserError` where there is none."""
        if not (value := self.get(column)):
            raise self.error(f"{column!r} is empty; every row needs one: fill it, or take the row out where there is nothing")
        return value

    def choose(self, column: str, choices: Mapping[str, str]) -> str:
        """What `choices` says of the value (in lower case); raises `UserError` where it says nothing."""
        value = self.get(column).casefold()
        if value not in choices:
            known = ", ".join(choice or "(empty)" for choice in choices)
            raise self.error(f"{column!r} is {self.get(column)!r}; known are {known}")
        return choices[value]

    def error(self, problem: str) -> UserError:
        return UserError(f"{self.place}: {problem}")


def read_sheet(path: Path, required: Collection[str], remedy: str = "") -> list[Row]:
    """Rows of a table that has the columns `required`, in any case and order; empty lines are skipped.

    Commas, semicolons or tabs between values (the header tells), UTF-8 with or without a byte order mark. `remedy` ends the
    message about a table that lacks a column. Raises `UserError`.
    """
    if os.path.lexists(path) and (problem := file_problem(path)):
        raise UserError(problem)
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            header_line = stream.readline()
            stream.seek(0)
            reader = csv.reader(stream, delimiter=max("\t;,", key=header_line.count))
            lines = [(reader.line_num, [value.strip() for value in values]) for values in reader]
    except OSError as error:
        msg = f"{path} cannot be read ({error.strerror}); it should be a CSV or TSV with the columns {', '.join(required)}"
        raise UserError(msg) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV or TSV in UTF-8 ({error}); save the table as 'CSV UTF-8'") from error
    lines = [(line, values) for line, values in lines if any(values)]
    if not lines:
        raise UserError(f"{path} is empty; it should have the columns {', '.join(required)}")
    header = [name.casefold() for name in lines[0][1]]
    _check_header(path, header, required, remedy)
    return [_row(path, line, header, values) for line, values in lines[1:]]


def _check_header(path: Path, header: list[str], required: Collection[str], remedy: str) -> None:
    missing = [column for column in required if column.casefold() not in header]
    if missing:
        what = f"the columns {', '.join(missing)}" if len(missing) > 1 else f"the column {missing[0]}"
        raise UserError(f"{path} lacks {what}; found {', '.join(name for name in header if name)}{remedy}")
    twice = {name for name in header if name and header.count(name) > 1}
    if twice:
        raise UserError(f"{path} has the column {min(twice)} twice; keep one of them")


def _row(path: Path, line: int, header: list[str], values: list[str]) -> Row:
    if len(values) > len(header):
        raise UserError(
            f"{path} line {line}: has {len(values)} values, but the header has {len(header)}; quote values that hold a separator"
        )
    named = zip(header, values, strict=False)  # a short line ends in empty values
    return Row(path, line, dict(named))


def words_for_none(rows: Iterable[Row], column: str) -> list[str]:
    """A line that tells which words of a column were taken for no value; none where it is empty, or has BIDS' word for that."""
    values = [row.values.get(column.casefold(), "") for row in rows]
    words = Counter(value for value in values if value not in ("", "n/a") and is_no_value(value))
    listed = ", ".join(f"{word!r} in {number} {'row' if number == 1 else 'rows'}" for word, number in sorted(words.items()))
    return [f"{column!r}: taken for no value: {listed}"] if words else []
