"""The values that masks hold: nnU-Net looks at them only when it is asked to, and trains on what it has no class for."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_csm.errors import UserError, reason
from nnunet_csm.fingerprint.extraction import find_reader
from nnunet_csm.machine import in_processes
from nnunet_csm.raw import nifti

# masks that are read sooner than a process has started
FEW = 50
# more are no labels, and all of an image given in place of its mask would be many
MOST_VALUES = 1000


@dataclass(frozen=True)
class _Read:
    """What is in a mask, or why it cannot be read."""

    values: tuple[float, ...]
    problem: str = ""


def check_label_values(raw_folder: Path, dataset_json: Mapping[str, Any], num_processes: int) -> list[str]:
    """Read every mask of a raw dataset, once, and compare its values with those that dataset.json names.

    Returns:
        Lines to print: labels that no mask holds.

    Raises:
        UserError: a mask that cannot be read, or one with a value that has no name.
    """
    masks, named = label_files(raw_folder, dataset_json), values_of(dataset_json["labels"])
    reader = find_reader(dataset_json, [{0: path} for path in masks])
    found: dict[float, tuple[Path, int]] = {}
    unreadable: dict[Path, str] = {}
    num_processes = num_processes if len(masks) > FEW else 1
    for path, read in in_processes(partial(_read_mask, reader), masks, num_processes):
        if read.problem:
            unreadable[path] = read.problem
        for value in read.values:
            first, number = found.get(value, (path, 0))
            found[value] = min(first, path), number + 1
    if unreadable:
        path = min(unreadable)
        raise UserError(f"{path}: cannot be read ({unreadable[path]}; {len(unreadable)} such); copy it again")
    known = ", ".join(f"{value} {name}" for value, name in sorted(named.items()))
    if strange := sorted(set(found) - set(named)):
        path, number = found[strange[0]]
        values = ", ".join(f"{value:g}" for value in strange[:5])
        raise UserError(
            f"{path}: the mask holds the value {strange[0]:g} ({number} masks do; values without a name: {values}), but labels "
            f"of {raw_folder / 'dataset.json'} name {known}; name it there, or correct the masks"
        )
    never = [f"{value} ({name})" for value, name in sorted(named.items()) if value not in found and name != "ignore"]
    return [f"no mask of {raw_folder.name} holds {', '.join(never)}, which dataset.json names"] if never else []


def values_of(labels: Mapping[str, Any]) -> dict[int, str]:
    """Value to its name; to those of all its regions, where labels are regions."""
    names: dict[int, list[str]] = {}
    for name, value in labels.items():
        for one in value if isinstance(value, list) else [value]:
            names.setdefault(one, []).append(name)
    return {value: " and ".join(of) for value, of in names.items()}


def label_files(raw_folder: Path, dataset_json: Mapping[str, Any]) -> list[Path]:
    """The masks of the training cases, as nnU-Net finds them."""
    if "dataset" in dataset_json:
        listed = [case["label"] for _, case in sorted(dataset_json["dataset"].items()) if "label" in case]
        return [raw_folder / os.path.expandvars(label) for label in listed]
    ending = dataset_json["file_ending"]
    return sorted(path for path in (raw_folder / "labelsTr").glob(f"*{ending}") if not path.name.startswith("."))


def _read_mask(reader: type[BaseReaderWriter], path: Path) -> _Read:
    try:
        # of which ITK reads what is missing, or no number, as 0
        is_nifti = path.name.endswith(nifti.ENDINGS)
        mask = nifti.read_voxels(nifti.read_header(path)) if is_nifti else reader().read_seg(str(path))[0]
    except MemoryError:
        raise
    except Exception as error:  # the readers' libraries raise whatever they like
        return _Read((), reason(error))
    # numpy's would sort all voxels
    return _Read(tuple(float(value) for value in pd.unique(mask.ravel())[:MOST_VALUES]))
