"""One short script a dataset, from a release to nnU-Net's raw folder; installed as `nnunet_csm.dataset_conversion`.

Every script has one function `read(release, dataset_id, name, *, options) -> Release`. Scripts only read: `nnunet_csm.raw.writer`
puts what they found on one grid and writes it.
"""

import importlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnunet_csm.errors import UserError
from nnunet_csm.raw.subjects import Release
from nnunet_csm.raw.writer import Report, write_dataset

# name -> (what it reads, the dataset's name when none is given)
FORMATS: Mapping[str, tuple[str, str]] = {
    "bt_msd": ("the decathlon's Task01_BrainTumour, or another of its MRI tasks", ""),  # "" = the name in the release
    "prostate158": ("Prostate158 as on Zenodo", "Prostate158"),
    "breast2023": ("breast lesions in the shape of the paper's Breast2023", "Breast2023"),
    "picai": ("PI-CAI's public training data with picai_labels", "PICAI"),
    "table": ("any dataset from a CSV or TSV, DICOM folders included", "Table"),
    "bids": ("a BIDS folder, masks in its derivatives", "BIDS"),
}


def read_release(
    format_name: str, release: Path, dataset_id: int, name: str | None, options: Mapping[str, Any], strict: bool = False
) -> Release:
    """What the script `format_name` finds in a release.

    `options` are the flags that were given, by the name of the script's keyword. With `strict`, a case that would be left out
    is an error. Raises `UserError` for an unknown format, for an option the format does not take, and for a release that is not
    of the format.
    """
    taken = options_of(format_name)
    for option in options:
        if option not in taken:
            known = f"its options are {', '.join(f'-{known}' for known in taken)}" if taken else "it has no options"
            raise UserError(f"{format_name} has no option -{option}; {known}")
    found = _script(format_name)(release, dataset_id, name or FORMATS[format_name][1], **options)
    if strict and (problems := [*(f"{case}: {reason}" for case, reason in found.left_out.items()), *found.doubts]):
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{problems[0]}{more}; without --strict the conversion goes on and reports it")
    return found


def convert(
    format_name: str,
    release: Path,
    raw_folder: Path,
    dataset_id: int,
    name: str | None,
    options: Mapping[str, Any],
    *,
    strict: bool,
    **writing: Any,
) -> Report:
    """Read a release, write the dataset, print what was found and done; `writing` are the settings of `write_dataset`."""
    found = read_release(format_name, release, dataset_id, name, options, strict)
    report = write_dataset(found.cases, found.dataset, raw_folder, strict=strict, left_out=found.left_out, **writing)
    for line in (*found.notes, *found.doubts, *report.lines):
        print(line)
    return report


def options_of(format_name: str) -> tuple[str, ...]:
    """The keywords that a script's `read` takes beside the release, the dataset's ID and its name."""
    parameters = inspect.signature(_script(format_name)).parameters.values()
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def _script(format_name: str) -> Callable[..., Release]:
    if format_name not in FORMATS:
        raise UserError(f"there is no format {format_name!r}; choose from {', '.join(FORMATS)}")
    read: Callable[..., Release] = importlib.import_module(f"{__name__}.{format_name}").read
    return read
