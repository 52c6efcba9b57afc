"""Dice, sensitivity, precision and volumes of a folder of predicted segmentations, per label and per region."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jaxtyping import Int
from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.regions import Structure, foreground_of, structures_of
from nnunet_csm.evaluation.scores import METRICS, Scores
from nnunet_csm.listing import files_in
from nnunet_csm.machine import in_processes
from nnunet_csm.raw.geometry import described_misfit
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.raw.volumes import look_at, read_volume

LARGEST_LABEL = 2**16 - 1  # what nnU-Net writes


def evaluate_folder(
    reference_folder: str | Path,
    prediction_folder: str | Path,
    dataset_json: Mapping[str, Any],
    regions: Mapping[str, Sequence[int]] | None = None,
    num_processes: int = 1,
    progress_bar: bool = True,
    chill: bool = False,
) -> Scores:
    """Score every case of `reference_folder` against the file of the same name in `prediction_folder`.

    `dataset_json` is nnU-Net's; `regions` (name -> label values) replaces `regions_of` its labels. Voxels whose reference is the
    'ignore' label count nowhere. `num_processes` above 1 starts that many processes. A prediction stored with other axes is
    turned to those of its reference. With `chill`, as in nnU-Net, references without a prediction are left out.

    Raises:
        UserError: a prediction is missing, or with `chill` all are, the two files of a case lie on different grids, or a file is
            damaged or holds a label that dataset.json does not name.
    """
    labels = dataset_json.get("labels")
    if not isinstance(labels, Mapping):
        raise UserError(
            "dataset.json: no 'labels' found, expected a table of label names and values; give that of the raw dataset"
        )
    structures, ignore = structures_of(labels, regions), labels.get("ignore")
    declared = {0, *(label for values in foreground_of(labels).values() for label in values)}
    declared.update(() if ignore is None else (int(ignore),))

    file_ending = dataset_json.get("file_ending", ".nii.gz")
    references, predictions = (_files_in(Path(folder), file_ending) for folder in (reference_folder, prediction_folder))
    missing = sorted(references.keys() - predictions.keys())
    if missing and not (chill and len(missing) < len(references)):
        shown = ", ".join(references[case].name for case in missing[:5]) + (", ..." if len(missing) > 5 else "")
        remedy = "predict them" if len(missing) == len(references) else "predict them, or leave them out with --chill"
        number = f"{len(missing)} of {len(references)} references"
        raise UserError(f"{prediction_folder}: no prediction for {number} ({shown}); {remedy}")
    references = {case: file for case, file in references.items() if case in predictions}
    score = partial(_score_case, structures=structures, declared=sorted(declared), ignore=ignore)
    jobs = [(case, file, predictions[case]) for case, file in references.items()]
    with closing(in_processes(score, jobs, num_processes)) as scored:
        bar = tqdm(scored, total=len(references), desc="evaluating", unit="case", disable=not progress_bar)
        found = dict(bar)
    rows = [row for job in jobs for row in found[job][0]]
    brought = {case: said for case, *files in jobs if (said := found[case, *files][1]) != "kept"}
    table = pd.DataFrame(rows, columns=["case", "structure", "kind", *METRICS])
    return Scores(table, structures, tuple(sorted(predictions.keys() - references.keys())), tuple(missing), brought)


def _files_in(folder: Path, file_ending: str) -> dict[str, Path]:
    """Case to its file, sorted."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds the segmentations")
    files = files_in(folder, file_ending)
    if not files:
        raise UserError(f"{folder}: no file ends with {file_ending}; give the folder that holds the segmentations")
    return {path.name.removesuffix(file_ending): path for path in files}


def _score_case(
    job: tuple[str, Path, Path],
    structures: Sequence[Structure],
    declared: Sequence[int],
    ignore: int | None,
) -> tuple[list[dict[str, Any]], str]:
    """Rows of `Scores.table` for a case, its reference and its prediction, and how the prediction came to the reference's grid.

    Everything follows from one joint count of labels, so a region costs no pass over the voxels.
    """
    case, reference_file, prediction_file = job
    reference_image, prediction_image = (read_volume(Volume(file)) for file in (reference_file, prediction_file))
    places, predicted_places = look_at(reference_file), look_at(prediction_file)
    fit = predicted_places.fit_to(places)
    if fit is None:
        misfit = described_misfit(predicted_places.places[0], places.places[0], f"its reference {reference_file}")
        raise UserError(f"{prediction_file} {misfit}; export the prediction on the grid of the reference")
    reference = _labels(reference_image, reference_file, declared)
    prediction = _labels(fit.applied(prediction_image), prediction_file, declared)
    # voxels with reference label i and predicted label j, at (i, j)
    size = max(declared) + 1
    counts = np.bincount((reference * size + prediction).ravel(), minlength=size**2).reshape(size, size)
    if ignore is not None:
        counts[ignore] = 0
    ml_per_voxel = float(np.prod(places.places[0].spacing)) / 1000

    rows = []
    for structure in structures:
        inside = list(structure.labels)
        num_both = int(counts[np.ix_(inside, inside)].sum())
        num_reference, num_predicted = int(counts[inside].sum()), int(counts[:, inside].sum())
        rows.append(
            {
                "case": case,
                "structure": structure.name,
                "kind": structure.kind,
                "dice": _ratio(2 * num_both, num_reference + num_predicted),
                "sensitivity": _ratio(num_both, num_reference),
                "precision": _ratio(num_both, num_predicted),
                "reference_ml": num_reference * ml_per_voxel,
                "predicted_ml": num_predicted * ml_per_voxel,
            }
        )
    return rows, fit.said


def _labels(image: sitk.Image, file: Path, declared: Sequence[int]) -> Int[np.ndarray, "z y x"]:
    """The labels of an image, each of them declared."""
    values = sitk.GetArrayFromImage(image)
    lowest, highest = values.min(), values.max()
    segmentation = values.astype(np.intp) if lowest >= 0 and highest <= LARGEST_LABEL else None
    if segmentation is None or not (values.dtype.kind in "iu" or np.array_equal(segmentation, values)):
        raise UserError(f"{file}: values from {lowest} to {highest} found, whole labels from 0 on expected; give label maps")
    if undeclared := sorted(set(np.flatnonzero(np.bincount(segmentation.ravel())).tolist()) - set(declared)):
        raise UserError(
            f"{file}: labels {undeclared} found, dataset.json names {list(declared)}; use the dataset.json of these segmentations"
        )
    return segmentation


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else np.nan
