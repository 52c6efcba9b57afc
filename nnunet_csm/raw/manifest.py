"""The manifest of a converted dataset: where every image came from, on which grid it was, what was done to it."""

import json
import platform
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnunet_csm import __version__
from nnunet_csm.nnunet import save_json

MANIFEST = "csm_manifest.json"
# the first word of what was done to a series, and how the summary says it
DONE = {
    "kept": "kept",
    "resampled": "resampled by header",
    "turned": "turned to the axes of the image",
    "registered": "registered",
    "zeros:": "missing, written as zeros",
}
NOT_ZERO = "has another background than 0, which nnU-Net and this package take for it (--zero_background shifts it)"
NUM_LISTED = 10  # cases named in the summary; left_out.csv has all


def save_manifest(
    folder: Path, name: str, how: Mapping[str, Any], entries: Mapping[str, Any], left_out: Mapping[str, str]
) -> None:
    """Write down `how` the dataset `name` was made; `entries` are those of `cases.write_case`, by case."""
    manifest = {
        "dataset": name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": software(),
        "axes": "x, y, z in mm, as in SimpleITK",
        "reference": how["reference"],
        "registered": how["register"],
        "zero_background": how["zero_background"],
        "cases": entries,
        "left_out": left_out,
    }
    save_json(manifest, folder / MANIFEST)


def software(*more: str) -> dict[str, str]:
    """Versions that what is written depends on, and those of `more` packages."""
    packages = ("SimpleITK", "nibabel", "pydicom", "numpy", "scikit-learn", *more)
    return {"nnunet_csm": __version__, "python": platform.python_version(), **{one: version(one) for one in packages}}


def read_manifest(raw_folder: Path) -> dict[str, Any]:
    """What was written down of a dataset; {} for datasets that were not converted by this package."""
    try:
        manifest = json.loads((raw_folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def patients_of(raw_folder: Path) -> dict[str, str]:
    """Case to its patient, as far as the manifest tells."""
    cases = read_manifest(raw_folder).get("cases")
    entries = cases.items() if isinstance(cases, Mapping) else ()
    return {case: str(entry["patient"]) for case, entry in entries if isinstance(entry, Mapping) and entry.get("patient")}


def summary(entries: Mapping[str, Mapping[str, Any]], series: Sequence[str]) -> Iterator[str]:
    """Lines to print: how many cases have a series, on whose grid they are, and what registration did."""
    for name in series:
        records = {case: entry["series"][name] for case, entry in entries.items()}
        counts = Counter(record["done"].split(" ")[0] for record in records.values())
        yield f"  {name}: {', '.join(f'{counts[word]} {what}' for word, what in DONE.items() if counts[word])}"
        if all_zero := [case for case, record in records.items() if "all zero" in record["done"]]:
            yield f"  {name} is all zero, taken as missing: {_listed(all_zero)}"
        backgrounds = {case: record["background"] for case, record in records.items() if "background" in record}
        if backgrounds:
            shifted = all(one["shifted_to_zero"] for one in backgrounds.values())
            values = [f"{case} ({one['value']:g})" for case, one in backgrounds.items()]
            yield f"  {name} {'was shifted from another background to 0' if shifted else NOT_ZERO}: {_listed(values)}"
        moves = {case: record["registration"] for case, record in records.items() if "registration" in record}
        if moved := [f"{case} ({_moved(move, name)})" for case, move in moves.items() if move["used"]]:
            yield f"  {name} moved onto the reference: {_listed(moved)}"
        if refused := [f"{case} ({move['refused']}{_shared(move, name)})" for case, move in moves.items() if not move["used"]]:
            yield f"  {name} left where the header puts it, registration refused: {_listed(refused)}"

    masks = {case: entry["masks"] for case, entry in entries.items() if entry["masks"]}
    if masks:
        counts = Counter(mask["done"].split(" ")[0].rstrip(",") for of_case in masks.values() for mask in of_case)
        yield f"  masks: {', '.join(f'{counts[word]} {what}' for word, what in DONE.items() if counts[word])}"
    if changed := [f"{case} ({mask['done']})" for case, of_case in masks.items() for mask in of_case if mask["done"] != "kept"]:
        yield f"  masks not kept as they are: {_listed(changed)}"
    headers: dict[str, list[str]] = {}
    for case, entry in entries.items():
        for record in (*entry["series"].values(), *entry["masks"]):
            for remark in record.get("header", ()):
                headers.setdefault(remark, []).append(f"{case} ({Path(record['source']).name})")
    for remark, files in headers.items():
        yield f"  header {remark}: {_listed(files)}"


def _moved(move: Mapping[str, Any], name: str) -> str:
    """How far a series was moved, and whose transform it is where series of one scan share it."""
    length = sum(mm**2 for mm in move["translation_mm"]) ** 0.5
    degrees = max(abs(angle) for angle in move["rotation_degrees"])
    return f"{length:.1f} mm, {degrees:.1f} degrees{_shared(move, name)}"


def _shared(move: Mapping[str, Any], name: str) -> str:
    others = [one for one in move["together"] if one != name]
    return f"; together with {', '.join(others)}, of one scan, by the transform of {move['found_with']}" if others else ""


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NUM_LISTED
    return ", ".join(names[:NUM_LISTED]) + (f" and {more} more" if more > 0 else "")
