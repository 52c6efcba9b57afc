"""Is every file there and does it fit? From headers only, in seconds, before hours of preprocessing or half a prediction."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_csm.errors import UserError
from nnunet_csm.host_files import check_dataset_json
from nnunet_csm.listing import files_in, hidden_in
from nnunet_csm.nnunet import channel_names, read_json
from nnunet_csm.raw import nifti
from nnunet_csm.raw.geometry import CrookedError, Grid
from nnunet_csm.raw.subjects import CaseError
from nnunet_csm.raw.volumes import Look, look_at, read_header

# What nnU-Net reads with SimpleITK; files of other kinds are only checked for being there.
HEADER_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")

ABSENT_SERIES_REMEDY = (
    "for a series the patient does not have, write an all-zero volume with the same geometry: nnunet_csm treats it as absent"
)


def load_dataset_json(folder: Path) -> dict[str, Any]:
    """`dataset.json` of a raw dataset folder, with the keys that nnU-Net needs. Raises `UserError`."""
    path = folder / "dataset.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; check nnUNet_raw and the dataset's ID")
    dataset_json: dict[str, Any] = read_json(path, "it names the channels, the labels and the file ending")
    if "modality" in dataset_json and "channel_names" not in dataset_json:
        msg = f"{path} is of the decathlon's form ('modality'); convert the folder with nnUNetv2_convert_MSD_dataset -i {folder}"
        raise UserError(msg)
    check_dataset_json(dataset_json, str(path), labelled=False)
    return dataset_json


def has_labels(dataset_json: Mapping[str, Any]) -> bool:
    """Whether a dataset is to be fine-tuned on; `"labels": {}` says that it only has images."""
    return bool(dataset_json["labels"])


def check_dataset(folder: Path, dataset_json: Mapping[str, Any] | None = None) -> list[str]:
    """Check that every training case of `nnUNet_raw/DatasetXXX_Name` has every file, on one grid; without labels if it has none.

    Reads `dataset.json` from the folder unless it is given. Returns lines to print: what was found, then what nnU-Net lets pass
    but may be a mistake. Raises `UserError` with the first problem and how many follow.
    """
    if dataset_json is None:
        dataset_json = load_dataset_json(folder)
    names, ending = channel_names(dataset_json), dataset_json["file_ending"]
    reader = dataset_json.get("overwrite_image_reader_writer")
    if "dataset" in dataset_json:
        return _checked(folder, _listed_cases(folder, dataset_json["dataset"]), [], names, ending, reader)
    for part in ("imagesTr", "labelsTr"):
        if (folder / part).is_dir() and (hidden := hidden_in(folder / part, ending)):
            raise UserError(_about_hidden(hidden))
    if not (folder / "imagesTr").is_dir():
        raise UserError(f"{folder / 'imagesTr'} is missing; an nnU-Net raw dataset has imagesTr, labelsTr and dataset.json")
    if not has_labels(dataset_json):
        return [*check_inputs(folder / "imagesTr", names, ending), "no labels in dataset.json: images to pretrain on"]
    if not (folder / "labelsTr").is_dir():
        raise UserError(f'{folder / "labelsTr"} is missing; where there are images only, write "labels": {{}} in dataset.json')
    _refuse_patients_as_channels(folder, ending)
    cases, problems = _found_cases(folder / "imagesTr", names, ending, labels=folder / "labelsTr")
    lines = _checked(folder / "imagesTr", cases, problems, names, ending, reader)
    if dataset_json.get("numTraining", len(cases)) != len(cases):
        lines.append(f"numTraining is {dataset_json['numTraining']} in dataset.json, but imagesTr holds {len(cases)} cases")
    return lines


def check_inputs(folder: Path, names: Sequence[str], file_ending: str) -> list[str]:
    """Check a folder of images to be predicted (`case_0000.nii.gz`, ...): as `check_dataset`, without labels."""
    if not folder.is_dir():
        raise UserError(f"the input folder {folder} does not exist; give -i the folder with the images")
    cases, problems = _found_cases(folder, names, file_ending, labels=None)
    return _checked(folder, cases, problems, names, file_ending)


@dataclass(frozen=True)
class _Case:
    """`images` in channel order, as they are expected; `label` is None where none is expected."""

    identifier: str
    images: tuple[Path, ...]
    label: Path | None


def _checked(
    folder: Path, cases: Sequence[_Case], problems: Sequence[str], names: Sequence[str], ending: str, reader: str | None = None
) -> list[str]:
    """Lines to print, or `UserError` with the first problem and the number of further ones.

    `reader` is the one that dataset.json asks for; without, nnU-Net takes the first that reads the first image.
    """
    if not (cases or problems):
        raise UserError(no_case(folder, ending))
    problems, notes, remarks = list(problems), list[str](), list[str]()
    all_headers, first_headers = dict[Path, Look](), dict[str, Look]()
    turns = "Reorient" in (reader or "")
    for case in cases:
        problems += _missing_files(case, names)
        headers, unreadable = _read_headers(case) if ending.endswith(HEADER_ENDINGS) else ({}, [])
        problems += [*unreadable, *_grid_problems(case, headers, turns)]
        notes += _shifted_files(headers)
        remarks += [f"{path} {remark}" for path, header in headers.items() for remark in header.remarks]
        all_headers |= headers
        if headers:
            first_headers[case.identifier] = next(iter(headers.values()))
    if reader is None:
        problems += _unlike_the_first(list(all_headers))
    if problems:
        raise UserError(_first(problems))
    count = "1 case" if len(cases) == 1 else f"{len(cases)} cases"
    label = " and a label" if cases[0].label else ""
    lines = [f"{count} in {folder}, each with files of {', '.join(names)} (all zero where it lacks the series){label}"]
    mixed = [] if turns else list(_mixed_orientations(first_headers))
    return [*lines, *(_first(some) for some in (notes, remarks, mixed) if some)]


def _refuse_patients_as_channels(folder: Path, ending: str) -> None:
    """Raise `UserError` for P_0000, P_0001, ... that are patients, as their labels show, and would be read as channels of one."""
    for label in files_in(folder / "labelsTr", ending):
        case, channel = label.name.removesuffix(ending)[:-5], label.name.removesuffix(ending)[-5:]
        one_name = folder / "imagesTr" / label.name
        if re.fullmatch(r"_\d{4}", channel) and one_name.is_file() and not (label.parent / f"{case}{ending}").is_file():
            raise UserError(
                f"{one_name} would be channel {channel[1:]} of a case {case}, but {label} is a label of the same name; where "
                f"{case}{channel} is a case, call its images {case}{channel}_0000{ending}, and so on"
            )


def _about_hidden(hidden: Sequence[Path]) -> str:
    """nnU-Net lists the folder itself, and takes such a file for an image."""
    first, more = hidden[0], f" (and {len(hidden) - 1} more there)" if len(hidden) > 1 else ""
    if first.name.startswith("._"):
        what = "one of the twins that macOS writes beside files, no image"
        return f"{first}{more} is {what}, which nnU-Net takes for one; move the files that begin with ._ out of {first.parent}"
    return f"{first}{more} is hidden, and nnU-Net takes it for an image all the same; move it elsewhere, or give it another name"


def _first(messages: Sequence[str]) -> str:
    return messages[0] + (f" (and {len(messages) - 1} more)" if len(messages) > 1 else "")


def files_by_case(folder: Path, names: Sequence[str], ending: str) -> tuple[dict[str, dict[int, Path]], list[str]]:
    """Case to channel to file, both in order, and the files that nnU-Net would take for something else than they are."""
    pattern = re.compile(r"(?P<identifier>.+)_(?P<channel>\d{4})" + re.escape(ending))
    cases, problems = dict[str, dict[int, Path]](), list[str]()
    for path in files_in(folder, ending):
        match = pattern.fullmatch(path.name)
        if match is None:
            problems.append(f"{path} has no channel in its name; call it CASE_0000{ending} for channel 0, and so on")
            continue
        channel = int(match["channel"])
        if channel >= len(names):
            known = ", ".join(f"{number:04d} {name}" for number, name in enumerate(names))
            problems.append(f"{path} is of channel {channel}, but channel_names has {known}; rename it, or add its channel there")
        cases.setdefault(match["identifier"], {})[channel] = path
    return dict(sorted(cases.items())), problems


def _found_cases(folder: Path, names: Sequence[str], ending: str, labels: Path | None) -> tuple[list[_Case], list[str]]:
    """Cases by file name, and what is wrong with names of files."""
    found, problems = files_by_case(folder, names, ending)
    cases = [
        _Case(
            identifier,
            tuple(folder / f"{identifier}_{channel:04d}{ending}" for channel in range(len(names))),
            None if labels is None else labels / f"{identifier}{ending}",
        )
        for identifier in found
    ]
    return cases, problems


def _listed_cases(folder: Path, dataset: Mapping[str, Mapping[str, Any]]) -> list[_Case]:
    """Cases that dataset.json lists one by one; relative to the folder, environment variables expanded, as in nnU-Net."""

    def absolute(path: str) -> Path:
        return folder / os.path.expandvars(path)

    return [
        _Case(
            identifier,
            tuple(absolute(image) for image in case["images"]),
            absolute(case["label"]) if "label" in case else None,
        )
        for identifier, case in sorted(dataset.items())
    ]


def _missing_files(case: _Case, names: Sequence[str]) -> Iterator[str]:
    if len(case.images) != len(names):
        yield f"case {case.identifier} lists {len(case.images)} images, but the dataset has the channels {', '.join(names)}"
        return
    for path, name in zip(case.images, names, strict=True):
        if not path.is_file():
            yield f"{path} is missing: the {name} of case {case.identifier}; {ABSENT_SERIES_REMEDY}"
    if case.label is not None and not case.label.is_file():
        yield f"{case.label} is missing: the label of case {case.identifier}; add it, or move the images to imagesTs"


def _read_headers(case: _Case) -> tuple[dict[Path, Look], list[str]]:
    """Headers of the files that are there, and what is wrong with those that have none of use."""
    headers, problems = {}, []
    for path in (*case.images, *([case.label] if case.label else [])):
        if not path.is_file():
            continue
        if path.stat().st_size == 0:
            problems.append(f"{path} is empty; copy it again")
            continue
        try:
            header = _read_header(path)
        except CaseError as error:
            problems.append(str(error))
            continue
        if len(header.shape) == 3:
            headers[path] = header
        else:
            problems.append(
                f"{path} has the shape {header.shape}; give each series its own 3-D file (see nnUNetv2_convert_MSD_dataset)"
            )
    return headers, problems


def _grid_problems(case: _Case, headers: Mapping[Path, Look], turns: bool) -> Iterator[str]:
    """Files whose voxels, in the order in which they are stored, are not those of the case's first file.

    `turns`: nnU-Net's reader turns all files to one order of axes, so that they may be stored in several.
    """
    remedy = f"resample all files of case {case.identifier} to one grid"
    for path, header in headers.items():
        first, expected = next(iter(headers.items()))
        found, wanted = header.places[0], expected.places[0]
        if header.shape != expected.shape:
            yield f"{path} has the shape {header.shape}, but {first} has {expected.shape} (z, y, x); {remedy}"
        elif not np.allclose(found.spacing, wanted.spacing):
            spacings = f"{found.spacing[::-1]}, but {first} has {wanted.spacing[::-1]}"
            yield f"{path} has the spacing {spacings} (z, y, x in mm); {remedy}"
        elif not turns and header.placed and expected.placed and not _orientations(header) & _orientations(expected):
            axes = f"is stored with axes {found.orientation}, but {first} with {wanted.orientation}"
            yield f"{path} {axes}, and nnU-Net reads voxels in the order in which they are stored; {remedy}"


def _orientations(header: Look) -> set[str]:
    return {grid.orientation for grid in header.places}


def _shifted_files(headers: Mapping[Path, Look]) -> Iterator[str]:
    """Files that lie more than a voxel from where the case's first file lies; nnU-Net reads them as if they overlapped."""
    for path, header in headers.items():
        first, expected = next(iter(headers.items()))
        if not (header.placed and expected.placed) or header.shape != expected.shape:
            continue
        shift = min(one.apart(other) for one in header.places for other in expected.places)
        if shift > max(expected.places[0].spacing):
            yield f"the header of {path} puts it {shift:.1f} mm from {first}; look with nnUNetv2_plot_overlay_pngs"


def _read_header(path: Path) -> Look:
    try:
        return look_at(path)
    except CrookedError:
        if not path.name.endswith(nifti.ENDINGS):
            raise
        # nnU-Net reads voxels and spacing with nibabel, which minds no axes
        header = nifti.read_header(path)
        size = header.shape[::-1][:3]
        return Look(header.shape, (Grid(size, header.spacing, (0.0, 0.0, 0.0), tuple(np.eye(3).flatten())),), placed=False)


def _mixed_orientations(first_headers: Mapping[str, Look]) -> Iterator[str]:
    """Cases whose axes are not those of most, which a network without much mirroring has to learn one by one."""
    cases: dict[str, list[str]] = {}
    for case, header in first_headers.items():
        if header.placed:
            cases.setdefault(header.places[0].orientation, []).append(case)
    if len(cases) > 1:
        listed = ", ".join(f"{len(some)} {axes} (such as {some[0]})" for axes, some in sorted(cases.items()))
        yield f"voxels are stored with different axes: {listed}; nnU-Net does not turn them, store all cases alike where you can"


def _unlike_the_first(files: Sequence[Path]) -> Iterator[str]:
    """Files that SimpleITK refuses, when nnU-Net chooses it because it reads the first file of the dataset."""
    refused = [path for path in files if path.name.endswith(nifti.ENDINGS) and not _itk_reads(path)]
    if refused and files[0] not in refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        yield (
            f"{refused[0]}{more} has axes that SimpleITK refuses, with which nnU-Net reads all files as it can read {files[0]}; "
            'write "overwrite_image_reader_writer": "NibabelIO" into dataset.json, or straighten the axes'
        )


def _itk_reads(path: Path) -> bool:
    try:
        read_header(path)
    except CaseError:
        return False
    return True


def no_case(folder: Path, ending: str) -> str:
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    listing = f"found {len(found)} other entries, such as {found[0]}" if found else "the folder is empty"
    return f"{folder} holds no image called CASE_0000{ending}; {listing}"
