"""Labels of a dataset from the values of its mask files, for releases that do not say what the values mean."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_csm.errors import UserError
from nnunet_csm.raw.subjects import CaseError, Volume
from nnunet_csm.raw.volumes import read_volume


def voxels(path: Path) -> np.ndarray:
    """Voxels (z, y, x) of a mask. Raises `CaseError` when the file cannot be read or holds fractions or negative values."""
    array = sitk.GetArrayFromImage(read_volume(Volume(path)))
    if not np.isfinite(array).all() or (array != np.round(array)).any() or array.min() < 0:
        raise CaseError(f"{path} is no mask: it holds values that are not 0, 1, 2, ...; is it a probability map or an image?")
    return array.astype(np.int64)


def values_in(path: Path) -> frozenset[int]:
    """Values above 0 of a mask. Raises `CaseError`, as `voxels`."""
    return frozenset(int(value) for value in np.unique(voxels(path)) if value > 0)


def parse_labels(flags: Sequence[str]) -> dict[str, int]:
    """`-labels NAME=VALUE` as typed to {name: value of the files}. Raises `UserError`."""
    labels: dict[str, int] = {}
    for flag in flags:
        name, separator, value = (part.strip() for part in flag.rpartition("="))
        if not (separator and name and value.isdecimal() and int(value) > 0):
            raise UserError(
                f"-labels {flag!r} is not of the form NAME=VALUE with a value above 0; write for example -labels edema=1 tumour=2"
            )
        if name in labels or int(value) in labels.values() or name == "background":
            raise UserError(f"-labels {flag!r}: each name and each value can be given once, and background is 0 already")
        labels[name] = int(value)
    return labels


def inferred_labels(values: Iterable[int]) -> dict[str, int]:
    """Names for values nobody named: label_1, label_2, ... after the value in the files."""
    return {f"label_{value}": value for value in sorted(set(values))}


def labels_of(masks: Mapping[str, Path], labels: Mapping[str, int], release: Path) -> tuple[dict[str, int], dict[int, int]]:
    """`consecutive` labels of a dataset with these masks; none where there is no mask. Raises `UserError` when all are empty."""
    if masks and not labels:
        what = f"all {len(masks)} masks are empty"
        raise UserError(f"{release}: {what}; say what their values would mean with -labels NAME=VALUE")
    return consecutive(labels) if masks else ({}, {})


def consecutive(labels: Mapping[str, int]) -> tuple[dict[str, int], dict[int, int]]:
    """nnU-Net's labels, which must be 0, 1, 2, ... without a gap, and the map from the values of the files to them.

    Labels are in ascending order of the values: {"necrosis": 1, "enhancing": 4} becomes 1 and 2.
    """
    ordered = sorted(labels.items(), key=lambda item: item[1])
    numbered = {name: number for number, (name, _) in enumerate(ordered, start=1)}
    return {"background": 0, **numbered}, {value: numbered[name] for name, value in ordered}
