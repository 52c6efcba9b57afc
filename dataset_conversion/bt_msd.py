"""Task01_BrainTumour of the Medical Segmentation Decathlon; other MRI tasks of the decathlon have the same layout.

    Task01_BrainTumour/
      dataset.json                 modality {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}, labels, training, test
      imagesTr/BRATS_001.nii.gz    4-D, one volume a series in the order of `modality`; 3-D in tasks with one series
      labelsTr/BRATS_001.nii.gz    1 edema, 2 non-enhancing tumor, 3 enhancing tumour
      imagesTs/BRATS_485.nii.gz    no labels in the release; a folder labelsTs is read where somebody has it

Source: http://medicaldecathlon.com and Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 2022,
https://doi.org/10.1038/s41467-022-30695-9. The release does not say which cases are of one patient: every case counts as one.
"""

import codecs
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_csm.errors import UserError
from nnunet_csm.nnunet import channel_names
from nnunet_csm.raw.series import canonical_series
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Mask, Release, Volume
from nnunet_csm.schema import parse_json

from . import layout

# The regions of the BraTS challenge, whole to inner as nnU-Net paints them, and what the labels must be called for them to hold.
REGIONS: Mapping[str, int | tuple[int, ...]] = {
    "background": 0,
    "whole tumor": (1, 2, 3),
    "tumor core": (2, 3),
    "enhancing tumor": 3,
}
REGION_LABELS = {1: ("edema", "oedema"), 2: ("non-enhancing",), 3: ("enhancing",)}


def read(release: Path, dataset_id: int, name: str, *, regions: bool = False) -> Release:
    """Cases of a decathlon task. `regions`: whole tumor, tumor core, enhancing tumor instead of the three labels.

    Raises `UserError` when `dataset.json` or a folder is missing or says something else than the decathlon's do.
    """
    layout.require_folder(release)
    task = _task(release)
    series = canonical_series(channel_names(task))
    labels = _labels(release, task["labels"])
    if regions:
        _check_regions(release, labels)
    cases, left_out = list[Case](), dict[str, str]()
    for entry, test in [*((entry, False) for entry in task["training"]), *((entry, True) for entry in task.get("test", []))]:
        identifier, image, label = _files(release, entry, test)
        try:
            cases.append(_case(identifier, image, label, [match.canonical for match in series], labels, test))
        except CaseError as error:
            left_out[identifier] = str(error)
    layout.require_cases(cases, release, left_out.values())
    dataset = Dataset(
        layout.dataset_name(dataset_id, name or str(task.get("name", release.name))),
        tuple(match.canonical for match in series),
        REGIONS if regions else labels,
        (1, 2, 3) if regions else None,
        {key: str(task[key]) for key in ("description", "reference", "licence", "release") if key in task},
    )
    names = ", ".join(match.canonical if match.known else f"{match.canonical} (unknown, kept)" for match in series)
    return Release(dataset, tuple(cases), left_out, notes=(f"series: {names}", *_unlisted(release, cases, left_out)))


def _task(release: Path) -> dict[str, Any]:
    path = release / "dataset.json"
    if not path.is_file():
        raise layout.other_layout(release, "dataset.json of a decathlon task")
    # those of some releases begin with a byte order mark
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    task: dict[str, Any] = parse_json(content, str(path), "unpack the archive again")
    for key, kind in (("modality", dict), ("labels", dict), ("training", list)):
        if not isinstance(task.get(key), kind):
            raise UserError(f"{path} has no {key!r} as the decathlon's have; is it a dataset in nnU-Net's own form already?")
    if not (release / "imagesTr").is_dir():
        raise layout.other_layout(release, "imagesTr")
    return task


def _labels(release: Path, given: Mapping[str, str]) -> dict[str, int]:
    """{"0": "background", "1": "edema", ...} the other way round, as nnU-Net has it."""
    try:
        labels = {str(label): int(value) for value, label in given.items()}
    except ValueError as error:
        msg = f"{release / 'dataset.json'} has the labels {dict(given)}; the decathlon's keys are numbers ({error})"
        raise UserError(msg) from error
    if sorted(labels.values()) != list(range(len(given))) or labels.get("background") != 0:
        msg = f"{release / 'dataset.json'} has the labels {dict(given)}; nnU-Net needs 0 background, 1, 2, ... and distinct names"
        raise UserError(msg)
    return labels


def _check_regions(release: Path, labels: Mapping[str, int]) -> None:
    name_of = {value: label.casefold() for label, value in labels.items()}
    if set(name_of) != {0, 1, 2, 3} or not all(name_of[value].startswith(names) for value, names in REGION_LABELS.items()):
        found = f"{release / 'dataset.json'} has {dict(labels)}"
        raise UserError(f"--regions is about 1 edema, 2 non-enhancing tumor, 3 enhancing tumour; {found}")


def _files(release: Path, entry: Any, test: bool) -> tuple[str, Path, Path | None]:
    """Identifier, image and label of an entry of `training` ({"image", "label"}) or of `test` (a path)."""
    image = entry.get("image") if isinstance(entry, dict) else entry
    if not isinstance(image, str) or (identifier := layout.stem(Path(image))) is None:
        raise UserError(f"{release / 'dataset.json'} lists {entry!r}; expected the path of a volume under 'image'")
    if not test:
        given = entry.get("label") if isinstance(entry, dict) else None
        if not isinstance(given, str | None):
            raise UserError(f"{release / 'dataset.json'} lists {entry!r}; expected the path of a mask under 'label'")
        return identifier, release / image, release / given if given else None
    label = release / "labelsTs" / Path(image).name
    return identifier, release / image, label if os.path.lexists(label) else None


def _case(identifier: str, image: Path, label: Path | None, series: list[str], labels: Mapping[str, int], test: bool) -> Case:
    for path in (image, *([label] if label else [])):
        layout.existing(path, f"{path.name}, which dataset.json names,")
    shape = layout.shape_of(image)
    num_volumes = shape[0] if len(shape) == 4 else 1
    if num_volumes != len(series):
        raise CaseError(f"{image} holds {num_volumes} volumes, but dataset.json names {len(series)} series ({', '.join(series)})")
    images = {one: Volume(image, index if len(shape) == 4 else None) for index, one in enumerate(series)}
    masks = (Mask(Volume(label), {value: value for value in labels.values() if value}),) if label else ()
    return Case(identifier, identifier, images, masks, test=test)


def _unlisted(release: Path, cases: list[Case], left_out: dict[str, str]) -> list[str]:
    """Images that are there, but not in `dataset.json`: they are not read, and somebody should know."""
    listed = {case.identifier for case in cases} | left_out.keys()
    folders = [release / "imagesTr", release / "imagesTs"]
    paths = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if not layout.is_hidden(path)]
    extra = sorted({stem for path in paths if (stem := layout.stem(path))} - listed)
    return [f"not read: {len(extra)} images that dataset.json does not list, such as {extra[0]}"] if extra else []
