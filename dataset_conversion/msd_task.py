"""A task of the decathlon with predictions for it: its test images, its labels, and which predicted value means which."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError

ENDING = ".nii.gz"


@dataclass(frozen=True)
class Task:
    """A task of the decathlon, and predictions for it.

    Attributes:
        predictions: folder as nnUNetv2_predict leaves it.
        images: test case to its file, without those left out.
        problems: where the release's list, its folder and the predictions differ.
        labels: the task's foreground values -> names.
        to_task: predicted value -> the task's value, as `labels_source` has it.
    """

    name: str
    predictions: Path
    images: dict[str, Path]
    left_out: tuple[str, ...]
    problems: tuple[str, ...]
    labels: dict[int, str]
    to_task: dict[int, int]
    labels_source: str

    def __str__(self) -> str:
        values = {task: value for value, task in self.to_task.items()}
        notes = {
            task: "" if task == values.get(task) else f" (predicted as {values.get(task, 'nothing')})" for task in self.labels
        }
        shown = ", ".join(f"{task} {name}{notes[task]}" for task, name in self.labels.items())
        return f"{self.name}: {shown}; predicted values are those of {self.labels_source}"


def read_task(folder: Path, predictions: Path, labels_from: str | None, excluded: frozenset[str]) -> Task:
    """Read a task folder of the decathlon's release, and what the predicted values mean in it.

    Raises:
        UserError: the folder is not of the release, or the predictions have labels that it does not have.
    """
    remedy = "give -task the path of the decathlon's folder as it was downloaded, e.g. /data/Task01_BrainTumour"
    # as given: a link to the folder may be called as the task while the folder is not
    name, path = os.path.basename(os.path.abspath(folder)), folder / "dataset.json"
    if not predictions.is_dir():
        raise UserError(f"{predictions}: no such folder; give -i the folder that nnUNetv2_predict wrote")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder (looked in {folder.absolute().parent}); {remedy}")
    if not re.fullmatch(r"Task\d\d_\w+", name):
        raise UserError(f"{folder}: the archive's folder is named as the task, and {name!r} is not of its form; {remedy}")
    content = nnunet.read_json(path, remedy)
    if not isinstance(content.get("test"), list) or not isinstance(content.get("labels"), dict):
        raise UserError(f"{path}: no list of 'test' images or no 'labels', found {sorted(content)}; {remedy}")
    # an entry is a path or {"image": path}
    paths = [entry.get("image") if isinstance(entry, dict) else entry for entry in content["test"]]
    if strange := [entry for entry, of in zip(content["test"], paths, strict=True) if not isinstance(of, str)]:
        raise UserError(f"{path}: lists {strange[0]!r} under 'test', expected the path of an image; {remedy}")
    listed = _cases(Path(str(of)) for of in paths)
    there = _cases((folder / "imagesTs").glob("*"))
    images = {case: folder / "imagesTs" / f"{case}{ENDING}" for case in sorted((listed | there) - excluded)}
    if not images:
        raise UserError(f"{folder / 'imagesTs'}: no image to be scored; {remedy}")
    problems = [
        f"{images[case]} is missing, but dataset.json lists it; download the task again, or use -leave_out {case}"
        if case in listed
        else f"{images[case]} is not among the test images of dataset.json; remove it, or use -leave_out {case}"
        for case in sorted(set(images) & (listed ^ there))
    ]
    for case in sorted(_cases(predictions.iterdir()) - listed - there):
        problems.append(f"{predictions / case}{ENDING} is of no test image of {name}; remove it from the folder")
    names = _label_names(content["labels"], path)
    labels = {value: label for value, label in names.items() if value}
    left_out, matched = tuple(sorted((listed | there) & excluded)), match_labels(names, path, predictions, labels_from)
    return Task(name, predictions, images, left_out, tuple(problems), labels, *matched)


def _cases(paths: Iterable[Path]) -> set[str]:
    """Cases by file name, without what macOS leaves in archives (._) and what nnU-Net's converter skips as well (_)."""
    names = {path.name for path in paths if path.name.endswith(ENDING)}
    return {name.removesuffix(ENDING) for name in names if not name.startswith((".", "_"))}


def labels_file(predictions: Path, labels_from: str | None) -> Path:
    """The dataset.json that says what predicted values mean: the one beside them, or a file, its folder, or a dataset.

    Raises:
        UserError: no such dataset.
    """
    source = predictions if labels_from is None else Path(labels_from)
    if not source.exists() and source.suffix != ".json":
        source = nnunet.folder("nnUNet_raw") / nnunet.dataset_name(str(source))
    return source / "dataset.json" if source.is_dir() else source


def match_labels(
    names: Mapping[int, str], names_file: Path, predictions: Path, labels_from: str | None
) -> tuple[dict[int, int], str]:
    """Match the predicted values to those of the task, which are called `names` in `names_file`, by the names of the labels.

    Models trained on regions predict the values of `regions_class_order`, which have no names; they are kept.

    Returns:
        Predicted value to the task's value, and where that stands.

    Raises:
        UserError: a name that the task does not have.
    """
    source = labels_file(predictions, labels_from)
    if labels_from is None and not source.is_file():
        return {value: value for value in names}, f"{names_file}: {predictions} holds no dataset.json"
    content = nnunet.read_json(source, "give -labels_from a dataset.json, or the name or ID of an nnU-Net dataset")
    labels = content.get("labels")
    if not isinstance(labels, dict):
        raise UserError(f"{source}: no 'labels' found, expected a table of label names and values")
    expected = ", ".join(f"{value} {name}" for value, name in names.items())
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        order = {0, *(int(value) for value in content.get("regions_class_order", ()))}
        if unknown := sorted(order - set(names)):
            raise UserError(f"{source}: regions_class_order has the values {unknown}, but {names_file} has {expected}")
        return {value: value for value in sorted(order)}, f"the regions of {source}"
    values = {_plain(name): value for value, name in names.items()}
    to_task = {0: 0}
    for value, name in _label_names(labels, source).items():
        if value and _plain(name) not in values:
            raise UserError(
                f"{source}: label {name!r} ({value}) is not in {names_file}, which has {expected}; "
                f"give -labels_from a dataset.json with the task's names, the task's own when the predicted values are its own"
            )
        if value:
            to_task[value] = values[_plain(name)]
    return to_task, str(source)


def _label_names(labels: Mapping[str, Any], source: Path) -> dict[int, str]:
    """Value -> name, of the decathlon's form ({"1": "edema"}) or of nnU-Net's ({"edema": 1}), by rising value; no "ignore"."""
    decathlon = all(key.isdecimal() for key in labels)
    pairs = labels.items() if decathlon else ((v[0] if isinstance(v, list) and v else v, k) for k, v in labels.items())
    try:
        names = {int(value): str(name) for value, name in pairs if name != "ignore"}
    except (TypeError, ValueError):
        raise UserError(f"{source}: labels {dict(labels)}, expected a whole number for each name") from None
    if len({_plain(name) for name in names.values()}) < len(names) or len(names) < len(labels) - ("ignore" in labels):
        raise UserError(f"{source}: labels {dict(labels)} have a name or a value twice; correct the file")
    return dict(sorted(names.items()))


def _plain(name: str) -> str:
    return " ".join(name.casefold().split())
