"""The fingerprint of a raw dataset: every case read once, by all cores, one in memory a process, and again only if it changed.

Records are appended to a partial file as cases are done, so that a run that was stopped goes on; the fingerprint itself is
written in one piece at the end.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import closing, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from jaxtyping import Float
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.files import write_text
from nnunet_csm.fingerprint.measurement import Job, measure, nonzero_box
from nnunet_csm.fingerprint.originals import name_copies
from nnunet_csm.fingerprint.reading import SeriesImage, read_case
from nnunet_csm.fingerprint.record import (
    VERSION,
    CaseRecord,
    Fingerprint,
    Subset,
    distance,
    read_fingerprint,
    save_fingerprint,
    voxels_before,
    with_manifest,
)
from nnunet_csm.listing import files_in
from nnunet_csm.machine import in_processes
from nnunet_csm.raw.geometry import upright
from nnunet_csm.raw.manifest import read_manifest
from nnunet_csm.schema import from_dict

# Cases tried for one that a reader can read.
EXAMPLES = 20


def extract(
    raw_folder: Path,
    dataset_json: Mapping[str, Any],
    series: Sequence[str],
    output: Path,
    subsets: Sequence[Subset] = ("imagesTr",),
    num_processes: int = 1,
    strict: bool = False,
) -> Fingerprint:
    """Measure every case of the subsets, write `output`, and return what was written.

    Args:
        raw_folder: nnUNet_raw/DatasetXXX_Name; labels are not read.
        dataset_json: its dataset.json.
        series: canonical names, in the order of the channels.
        output: `csm_fingerprint.json`; what it already holds of unchanged files is used.
        strict: a file that cannot be read, or a case whose files disagree, is an error.

    Raises:
        UserError: no case; no file that a reader of nnU-Net can read; with `strict`, a case with a problem.
    """
    files = {subset: case_files(raw_folder, subset, dataset_json, len(series)) for subset in subsets}
    twice = sorted(set.intersection(*(set(cases) for cases in files.values()))) if len(files) > 1 else []
    if twice:
        raise UserError(f"{raw_folder}: case {twice[0]} is in {' and in '.join(files)} ({len(twice)} such); rename one of them")
    output.parent.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(raw_folder)
    keys = {name: _key(paths, series) for cases in files.values() for name, paths in cases.items()}
    partial = output.with_name(f"{output.name}l.partial")
    known = {**_records_of_fingerprint(output), **_records_of_partial(partial)}
    done = {name: known[name] for name, key in keys.items() if name in known and known[name].key == key}
    left = {(subset, name): paths for subset, cases in files.items() for name, paths in cases.items() if name not in done}
    if left:
        reader = find_reader(dataset_json, [paths for cases in files.values() for paths in cases.values()])
        jobs = [
            Job(name, subset, keys[name], paths, tuple(series), reader, voxels_before(manifest, name))
            for (subset, name), paths in left.items()
        ]
        _write_partial(partial, done)
        progress = tqdm(total=len(keys), initial=len(done), desc="fingerprint", unit="case", disable=None)
        with (
            partial.open("a", encoding="utf-8") as stream,
            progress,
            closing(in_processes(measure, jobs, num_processes)) as measured,
        ):
            for job, record in measured:
                done[job.name] = record
                stream.write(_as_line(job.name, record))
                stream.flush()
                progress.update()
    cases = name_copies({name: done[name] for name in keys}, series)
    fingerprint = with_manifest(Fingerprint(VERSION, raw_folder.name, tuple(series), cases), manifest)
    if strict:
        _refuse_problems(fingerprint)
    save_fingerprint(fingerprint, output)
    partial.unlink(missing_ok=True)
    return fingerprint


def case_files(raw_folder: Path, subset: Subset, dataset_json: Mapping[str, Any], num_series: int) -> dict[str, dict[int, Path]]:
    """Case to the files of its channels that are there, as nnU-Net finds them.

    Raises:
        UserError: no case.
    """
    ending, folder = dataset_json["file_ending"], raw_folder / subset
    if "dataset" in dataset_json and subset == "imagesTr":
        listed = {name: case["images"] for name, case in sorted(dataset_json["dataset"].items())}
        paths = {
            name: {channel: raw_folder / os.path.expandvars(image) for channel, image in enumerate(images[:num_series])}
            for name, images in listed.items()
        }
    else:
        names = sorted({file.name.removesuffix(ending)[: -len("_0000")] for file in files_in(folder, ending)})
        paths = {
            str(name): {channel: folder / f"{name}_{channel:04d}{ending}" for channel in range(num_series)} for name in names
        }
    if not paths:
        raise UserError(f"{folder}: no image called CASE_0000{ending}; convert the dataset, or check nnUNet_raw")
    return {name: {channel: path for channel, path in of.items() if path.is_file()} for name, of in paths.items()}


def find_reader(dataset_json: Mapping[str, Any], cases: Sequence[Mapping[int, Path]]) -> type[BaseReaderWriter]:
    """nnU-Net's reader for the dataset. It tries one on a file, which may be a broken one: then on the next case's.

    Raises:
        UserError: no reader for any of the first cases.
    """
    examples = [str(next(iter(files.values()))) for files in cases if files][:EXAMPLES]
    for example in examples:
        try:
            # it prints the traceback of every reader that fails
            with redirect_stderr(StringIO()):
                return determine_reader_writer_from_dataset_json(dict(dataset_json), example, verbose=False)
        except RuntimeError:
            continue
    tried = examples[0] if examples else "no file at all"
    raise UserError(f"{tried}: none of nnU-Net's readers can read it, nor {max(0, len(examples) - 1)} others; are they complete?")


def _key(files: Mapping[int, Path], series: Sequence[str]) -> str:
    """Changes with the files of a case, and with what is made of them."""
    seen = [(channel, str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for channel, path in files.items()]
    return hashlib.sha256(json.dumps([VERSION, list(series), seen]).encode()).hexdigest()[:16]


def _records_of_fingerprint(path: Path) -> dict[str, CaseRecord]:
    """Nothing where there is no fingerprint, or one of another version: it is made again."""
    try:
        return read_fingerprint(path).cases
    except UserError:
        return {}


def _records_of_partial(path: Path) -> dict[str, CaseRecord]:
    """What an earlier run got done; a last line that was cut off is left out."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            records[entry["case"]] = from_dict(CaseRecord, entry["record"], str(path))
        except (ValueError, KeyError, TypeError):
            continue
    return records


def _as_line(name: str, record: CaseRecord) -> str:
    return json.dumps({"case": name, "record": dataclasses.asdict(record)}, allow_nan=False) + "\n"


def _write_partial(path: Path, records: Mapping[str, CaseRecord]) -> None:
    """Start with whole lines only."""
    write_text(path, "".join(_as_line(name, record) for name, record in records.items()))


def _refuse_problems(fingerprint: Fingerprint) -> None:
    lines = [f"case {name}: {problem}" for name, case in fingerprint.cases.items() for problem in case.problems]
    lines += [
        f"case {name}: {series} has {record.num_invalid} NaN or infinite voxels"
        for name, case in fingerprint.cases.items()
        for series, record in case.series.items()
        if record.num_invalid
    ]
    if lines:
        raise UserError(f"{lines[0]} ({len(lines)} such)" if len(lines) > 1 else lines[0])


def example_case(fingerprint: Fingerprint) -> str:
    """The case to look at: that of the series furthest off others; else the first complete one; else the one with most series."""
    return max(fingerprint.cases, key=lambda name: _worth_showing(fingerprint.cases[name]))


def example_slices(
    raw_folder: Path, dataset_json: Mapping[str, Any], fingerprint: Fingerprint, name: str
) -> tuple[dict[str, Float[np.ndarray, "y x"]], float]:
    """A slice of each series of the case `name` that could be read, and the height of a voxel over its width.

    The middle of what is not 0 in any series of a shape, turned as `raw.geometry.upright` says where the file has a direction.
    """
    case = fingerprint.cases[name]
    files = case_files(raw_folder, case.subset, dataset_json, len(fingerprint.series))
    volumes, _, _ = read_case(files[name], fingerprint.series, find_reader(dataset_json, [files[name]]))
    slices, aspect = {}, 1.0
    turned = {series: _turned(volume) for series, volume in volumes.items()}
    for series, (voxels, (_, height, width)) in turned.items():
        along = nonzero_box([other for other, _ in turned.values() if other.shape == voxels.shape])[0]
        slices[series] = np.nan_to_num(voxels[(along.start + along.stop) // 2])
        aspect = float(height / width)
    return slices, aspect


def _worth_showing(case: CaseRecord) -> tuple[float, bool, int]:
    """The further off a series, the more; then whole cases without a problem; then those with most series."""
    records = case.series.values()
    furthest = max((distance(record.shift_mm) for record in records if record.shift_mm is not None), default=0.0)
    whole = not case.problems and all(record.absent is None for record in records)
    return furthest, whole, sum(record.shape is not None for record in records)


def _turned(volume: SeriesImage) -> tuple[Float[np.ndarray, "z y x"], tuple[float, ...]]:
    """Voxels and spacing (z, y, x), upright; as they are for readers that tell no direction."""
    if volume.affine is None:
        return volume.voxels, volume.spacing
    image = sitk.GetImageFromArray(volume.voxels)
    image.SetSpacing(volume.spacing[::-1])
    try:
        image.SetDirection((volume.affine[:3, :3] / volume.spacing[::-1]).ravel())
    except RuntimeError:  # not orthonormal
        return volume.voxels, volume.spacing
    image = upright(image)
    return sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]
