"""Calibration of segmentations: of the voxels that are given a structure with probability p, is a share p of that structure?"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jaxtyping import Bool, Float

from nnunet_csm.data.properties import read_properties
from nnunet_csm.errors import UserError, reason
from nnunet_csm.evaluation.bootstrap import ratio
from nnunet_csm.evaluation.class_metrics import NUM_BINS, bins_of
from nnunet_csm.evaluation.classification import SUM_TOLERANCE
from nnunet_csm.evaluation.regions import Structure, foreground_of, is_region_based
from nnunet_csm.evaluation.scores import markdown
from nnunet_csm.figures.classification import Reliability, save_reliability
from nnunet_csm.files import write_text
from nnunet_csm.listing import files_in
from nnunet_csm.machine import in_processes
from nnunet_csm.raw.geometry import fit, grid_of_array
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.raw.volumes import look_at, read_volume

# Voxels whose probability is lower are no foreground: nearly all of an image, so certain that with them any error is small.
LEAST = 0.01
# of the foregrounds of a segmentation and of the probabilities it was made of, which postprocessing may have changed
LEAST_DICE = 0.5
REMEDY = "predict again with --save_probabilities, or move .npz and .pkl to another folder"


@dataclass(frozen=True)
class Calibration:
    """Sums over the voxels of all cases together.

    Attributes:
        names: of the structures.
        sums: voxels, their probabilities and those inside the reference; bins are those below `LEAST`, then `NUM_BINS` of equal
            width for the others.
        num_cases: that have probabilities, and in all.
    """

    names: tuple[str, ...]
    sums: Float[np.ndarray, "structures bins 3"]
    num_cases: tuple[int, int]

    def table(self) -> pd.DataFrame:
        """A row a structure: expected calibration errors of the foreground and of whole images, what is missed, voxels.

        An error is the mean over bins of |mean probability - share inside|, weighted by voxels (Naeini 2015, class-wise as in
        Nixon 2019). Foreground are voxels with a probability of at least `LEAST`, whatever the reference: choosing by it would
        make perfect probabilities look wrong. `missed` is the share of the reference that lies elsewhere.
        """
        below, *bins = np.moveaxis(self.sums, 1, 0)
        foreground = np.stack(bins)
        everywhere = np.concatenate([foreground[:1] + below, foreground[1:]])
        inside = self.sums[..., 2].sum(1)
        columns = {"calibration_error": _error(foreground), "of_whole_images": _error(everywhere)}
        columns |= {"missed": ratio(below[:, 2], inside), "voxels": foreground[..., 0].sum(0).astype(int)}
        return pd.DataFrame(columns, index=pd.Index(self.names, name="structure"))

    def to_markdown(self) -> str:
        given, number = self.num_cases
        of = f"{given} of {number} cases" if given < number else f"{number} cases"
        said = f"Calibration of {of}, where a structure is given at least {LEAST:g}"
        return f"{said}\n\n{markdown(self.table(), num_text=1)}\n"

    def save(self, folder: Path) -> None:
        """Write calibration.csv and calibration.png."""
        write_text(folder / "calibration.csv", self.table().to_csv())
        curves = []
        for name, error, sums in zip(self.names, self.table()["calibration_error"], self.sums[:, 1:], strict=True):
            filled = sums[sums[:, 0] > 0]
            if len(filled):
                counts, predicted, observed = filled.T
                curves.append(Reliability(name, f"{error:.3f}", predicted / counts, observed / counts, counts.astype(int)))
        title = f"Reliability of voxels given at least {LEAST:g} (larger dots: more)"
        save_reliability(folder / "calibration.png", curves, title)


def _error(sums: Float[np.ndarray, "bins structures 3"]) -> Float[np.ndarray, " structures"]:
    return ratio(np.abs(sums[..., 1] - sums[..., 2]).sum(0), sums[..., 0].sum(0))


def calibration_sums(probability: Float[np.ndarray, "..."], inside: Bool[np.ndarray, "..."]) -> Float[np.ndarray, "bins 3"]:
    """The sums of `Calibration` of some voxels and one structure."""
    probability = probability.ravel()
    bins = np.where(probability < LEAST, 0, bins_of(probability) + 1)
    columns = (None, probability, inside.ravel())
    return np.stack([np.bincount(bins, one, NUM_BINS + 1) for one in columns], axis=1).astype(np.float64)


def calibrate_folder(
    references: Path,
    predictions: Path,
    dataset_json: Mapping[str, Any],
    structures: Sequence[Structure],
    num_processes: int = 1,
) -> Calibration | None:
    """Compare probabilities that lie beside segmentations, as --save_probabilities writes them, with references.

    Returns:
        None where no case with a reference has probabilities. Regions that a region-based network has no output for are left out.

    Raises:
        UserError: files that cannot be read, of another dataset or on another grid, or not those of the segmentation.
    """
    ending = dataset_json["file_ending"]
    cases = [file.name.removesuffix(ending) for file in files_in(references, ending)]
    jobs = [case for case in cases if (predictions / f"{case}.npz").is_file()]
    if not jobs:
        return None
    labels = dataset_json["labels"]
    num_channels, channels = channels_of(labels, structures)
    known = [one for one in structures if one in channels]
    add_up = partial(
        _sums_of_case,
        folders=(references, predictions),
        ending=ending,
        num_channels=num_channels,
        channels=[(one.labels, channels[one]) for one in known],
        region_based=is_region_based(foreground_of(labels)),
        ignore=labels.get("ignore"),
    )
    with closing(in_processes(add_up, jobs, num_processes)) as found:
        sums = np.sum([one for _, one in found], axis=0)
    return Calibration(tuple(one.name for one in known), sums, (len(jobs), len(cases)))


def channels_of(labels: Mapping[str, Any], structures: Sequence[Structure]) -> tuple[int, dict[Structure, list[int]]]:
    """How many channels nnU-Net's probabilities have, and those that make up a structure: its own, or those of its labels."""
    foreground = foreground_of(labels)
    if is_region_based(foreground):
        names = list(foreground)
        return len(names), {one: [names.index(one.name)] for one in structures if one.name in foreground}
    values = sorted({0, *(label for one in foreground.values() for label in one)})
    return len(values), {one: [values.index(label) for label in one.labels] for one in structures}


def _sums_of_case(
    case: str,
    folders: tuple[Path, Path],
    ending: str,
    num_channels: int,
    channels: Sequence[tuple[Sequence[int], Sequence[int]]],
    region_based: bool,
    ignore: int | None,
) -> Float[np.ndarray, "structures bins 3"]:
    references, predictions = folders
    file = predictions / f"{case}.npz"
    try:
        with np.load(file) as content:
            probabilities = content["probabilities"]
    except Exception as error:  # whatever half a file, or another one, leads to
        raise UserError(f"{file}: no probabilities can be read from it ({reason(error)}); {REMEDY}") from None
    properties = read_properties(file.with_suffix(".pkl"), REMEDY)
    if probabilities.ndim != 4 or len(probabilities) != num_channels:
        expected = f"({num_channels}, z, y, x) by the labels of dataset.json"
        raise UserError(f"{file}: probabilities of the shape {probabilities.shape}, expected {expected}; {REMEDY}")
    if not (probabilities.min() >= 0 and probabilities.max() <= 1 + SUM_TOLERANCE):
        raise UserError(f"{file}: values that are no numbers from 0 to 1, expected probabilities; {REMEDY}")
    reference, segmentation = references / f"{case}{ending}", predictions / f"{case}{ending}"
    places, own = look_at(reference).places, grid_of_array(properties, probabilities.shape[1:])
    laid, of_segmentation = fit([own], places), look_at(segmentation).fit_to(look_at(reference))
    if laid is None or of_segmentation is None:
        raise UserError(f"{file}: lies elsewhere than its reference {reference}; {REMEDY}")
    on_grid = [sitk.GetArrayFromImage(laid.applied(sitk.GetImageFromArray(one))) for one in probabilities]
    truth = sitk.GetArrayFromImage(read_volume(Volume(reference)))
    predicted = sitk.GetArrayFromImage(of_segmentation.applied(read_volume(Volume(segmentation)))) > 0
    argued = np.max(on_grid, axis=0) > 0.5 if region_based else np.argmax(on_grid, axis=0) > 0
    if 2 * (predicted & argued).sum() < LEAST_DICE * (predicted.sum() + argued.sum()):
        raise UserError(f"{file}: the probabilities are not those of {segmentation.name}, other voxels are likely; {REMEDY}")
    counted = np.ones(truth.shape, bool) if ignore is None else truth != ignore
    return np.stack(
        [
            calibration_sums(np.sum([on_grid[one] for one in given], axis=0)[counted], np.isin(truth, labels)[counted])
            for labels, given in channels
        ]
    )
