"""`nnunet_csm fingerprint`: measure a raw dataset, print what is worth knowing, draw it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from nnunet_csm import nnunet
from nnunet_csm.figures.fingerprint import State, save_fingerprint_picture
from nnunet_csm.fingerprint.extraction import example_case, example_slices, extract
from nnunet_csm.fingerprint.record import (
    ALL_ZERO,
    CONSTANT,
    FILE_NAME,
    CaseRecord,
    Fingerprint,
    SeriesRecord,
    Subset,
    absent_series,
    backgrounds,
    cases_of,
    distance,
    misaligned,
    num_present,
    problems,
)
from nnunet_csm.raw.check import load_dataset_json
from nnunet_csm.raw.series import canonical_series, parse_aliases

PICTURE_NAME = "csm_fingerprint.png"
# Of each kind; the rest is in the file.
NUM_LINES_PRINTED = 30


def fingerprint_dataset(
    dataset: str, aliases: Sequence[str] = (), num_processes: int = 1, test_images: bool = False, strict: bool = False
) -> None:
    """Write `csm_fingerprint.json` and its picture into nnUNet_preprocessed; print series, incomplete cases and problems.

    Raises:
        UserError: no such dataset, nothing readable in it, or with `strict` a case with a problem.
    """
    name = nnunet.dataset_name(dataset)
    dataset_json = load_dataset_json(nnunet.folder("nnUNet_raw") / name)
    series = [match.canonical for match in canonical_series(nnunet.channel_names(dataset_json), parse_aliases(aliases))]
    fingerprint = take_fingerprint(name, dataset_json, series, test_images, num_processes, strict)
    folder = nnunet.folder("nnUNet_preprocessed") / name
    print(f"{_title(fingerprint)}\n\n{summary(fingerprint).to_string()}\n")
    for line in findings(fingerprint):
        print(line)
    print(f"\nwritten to {folder / FILE_NAME}\npicture    {folder / PICTURE_NAME}, with {_shown(fingerprint)}")


def take_fingerprint(
    name: str, dataset_json: Mapping[str, Any], series: Sequence[str], test_images: bool, num_processes: int, strict: bool
) -> Fingerprint:
    """Measure what is new or changed since the last time, and write the file and the picture.

    Args:
        name: DatasetXXX_Name; its raw images must be there.
        dataset_json: of the raw dataset.
        series: canonical names, in the order of the channels.
        test_images: those of imagesTs, too.
        num_processes: that measure cases.
        strict: a case with a problem is an error.
    """
    raw, folder = nnunet.folder("nnUNet_raw") / name, nnunet.folder("nnUNet_preprocessed") / name
    subsets: tuple[Subset, ...] = ("imagesTr", "imagesTs") if test_images else ("imagesTr",)
    fingerprint = extract(raw, dataset_json, series, folder / FILE_NAME, subsets, num_processes, strict)
    slices, aspect = example_slices(raw, dataset_json, fingerprint, example_case(fingerprint))
    states = {name: tuple(_state(record) for record in case.series.values()) for name, case in fingerprint.cases.items()}
    save_fingerprint_picture(folder / PICTURE_NAME, _title(fingerprint), series, states, slices, _shown(fingerprint), aspect)
    return fingerprint


def findings(fingerprint: Fingerprint) -> list[str]:
    """Lines to print: how many cases are complete, what the others lack, and what is wrong."""
    return [*_presence_lines(fingerprint), *_problem_lines(fingerprint)]


def _title(fingerprint: Fingerprint) -> str:
    return f"{fingerprint.dataset}: {_cases(len(fingerprint.cases))}, {len(fingerprint.series)} series"


def _shown(fingerprint: Fingerprint) -> str:
    """The case of the picture, and which of its series lie off."""
    name = example_case(fingerprint)
    off = [f"{series} {distance(mm):.1f} mm off" for series, mm in misaligned(fingerprint).get(name, {}).items()]
    return f"{name} ({', '.join(off)})" if off else name


def summary(fingerprint: Fingerprint) -> pd.DataFrame:
    """A row a series, over all cases: how many have it and why others do not, geometry, intensities (medians over cases)."""
    rows = {name: _row([case.series[name] for case in fingerprint.cases.values()]) for name in fingerprint.series}
    return pd.DataFrame.from_dict(rows, orient="index")


def _row(records: Sequence[SeriesRecord]) -> dict[str, object]:
    there = [record for record in records if record.absent is None]
    intensities = [record.intensities for record in there if record.intensities is not None]
    before = [record.before for record in there if record.before is not None]
    counts: dict[str, object] = {
        "present": len(there),
        "share": f"{len(there) / len(records):.1%}",
        "all zero": sum(record.flat == ALL_ZERO for record in records),
        "constant": sum(record.flat == CONSTANT for record in records),
        "copies": sum(record.absent is not None and record.flat is None for record in records),
        "unreadable": sum(record.shape is None for record in records),
        "NaN": sum(record.num_invalid > 0 for record in records),
        "off": sum(record.shift_mm is not None for record in records),
    }
    counts["spacing"] = _median([record.spacing for record in there if record.spacing is not None], "{:.3g}")
    if before:
        counts["spacing before"] = _median([one.spacing for one in before], "{:.3g}")
        fields = [[n * mm for n, mm in zip(one.size, one.spacing, strict=True)] for one in before]
        counts["field before"] = _median(fields, "{:.0f}")
    for percentile in (0.5, 50.0, 99.5):
        values = [one.at(percentile) for one in intensities]
        counts[f"p{percentile:g}"] = f"{np.median(values):.4g}" if values else ""
    return counts


def _median(rows: Sequence[Sequence[float]], pattern: str) -> str:
    """Axis by axis, (z, y, x)."""
    return " x ".join(pattern.format(value) for value in np.median(rows, axis=0)) if rows else ""


def _presence_lines(fingerprint: Fingerprint) -> list[str]:
    """How many cases are incomplete, and each of them."""
    lines = []
    for subset in dict.fromkeys(case.subset for case in fingerprint.cases.values()):
        counts = num_present(fingerprint, subset)
        found = ", ".join(f"{counts[n]} with {n}" for n in sorted(counts, reverse=True))
        lines.append(f"{subset}: {_cases(len(cases_of(fingerprint, subset)))}; {found} of {len(fingerprint.series)} series")
    incomplete = absent_series(fingerprint)
    if incomplete:
        lines.append(f"\n{_cases(len(incomplete))} incomplete:")
        described = [f"  {name}: no {_reasons(fingerprint.cases[name])}" for name in incomplete]
        lines += _first(described)
    return lines


def _reasons(case: CaseRecord) -> str:
    return ", ".join(f"{name} ({record.absent})" for name, record in case.series.items() if record.absent is not None)


def _problem_lines(fingerprint: Fingerprint) -> list[str]:
    found = [*_background_lines(fingerprint), *problems(fingerprint)]
    if not found:
        return ["\nno other problem"] if absent_series(fingerprint) else ["\nno problem"]
    shifted = len(misaligned(fingerprint))
    return [f"\nto look at{f' ({_cases(shifted)} misaligned)' if shifted else ''}:", *_first([f"  {line}" for line in found])]


def _background_lines(fingerprint: Fingerprint) -> list[str]:
    """What is said of series whose background is not 0, once for the whole dataset."""
    lines = []
    for name, cases in backgrounds(fingerprint).items():
        case, value = next(iter(cases.items()))
        lines.append(f"{name} has another background than 0 in {_cases(len(cases))}, such as {value:g} in {case}")
    remedy = "nnU-Net and nnunet_csm take 0 for background; `nnunet_csm convert table --zero_background` shifts the values"
    return [*lines, remedy] if lines else []


def _first(lines: Sequence[str]) -> list[str]:
    more = len(lines) - NUM_LINES_PRINTED
    return [*lines[:NUM_LINES_PRINTED], *([f"  ... and {more} more"] if more > 0 else [])]


def _cases(number: int) -> str:
    return "1 case" if number == 1 else f"{number} cases"


def _state(record: SeriesRecord) -> State:
    if record.absent is None:
        return "present" if record.shift_mm is None else "misaligned"
    if record.flat is None:
        return "copy"
    if record.flat in (ALL_ZERO, CONSTANT):
        return "absent" if record.flat == ALL_ZERO else "constant"
    return "unusable"
