"""One short script a dataset, from a release to nnU-Net's raw folder; installed as `nnunet_csm.dataset_conversion`.

Every script has one function `read(release, dataset_id, name, *, options) -> Release`. Scripts only read: `nnunet_csm.raw.writer`
puts what they found on one grid and writes it. The ways out are `to_msd` (a decathlon submission) and `to_dicom`.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_csm.errors import UserError
from nnunet_csm.raw.subjects import Release
from nnunet_csm.raw.writer import Report, write_dataset

# script -> the dataset's name when none is given; "" = the name in the release
FORMATS: Mapping[str, str] = {
    "bt_msd": "",
    "prostate158": "Prostate158",
    "breast2023": "Breast2023",
    "picai": "PICAI",
    "table": "Table",
    "bids": "BIDS",
}


def read_release(
    format_name: str, release: Path, dataset_id: int, name: str | None, options: Mapping[str, Any], strict: bool = False
) -> Release:
    """What the script `format_name` finds in a release.

    `options` are the flags that were given, by the name of the script's keyword. With `strict`, a case that would be left out
    is an error. Raises `UserError` for a release that is not of the format.
    """
    read = importlib.import_module(f"{__name__}.{format_name}").read
    found: Release = read(release, dataset_id, name or FORMATS[format_name], **options)
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
