"""Dice, sensitivity, precision and volumes of a folder of predicted segmentations, per label and per region."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jaxtyping import Int
from joblib import Parallel, delayed
from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.regions import Structure, foreground_of, structures_of
from nnunet_csm.evaluation.scores import METRICS, Scores
from nnunet_csm.listing import files_in

# Headers hold float32: 0.1 % is far above their rounding and far below any real difference.
SPACING_TOLERANCE = 1e-3


def evaluate_folder(
    reference_folder: str | Path,
    prediction_folder: str | Path,
    dataset_json: Mapping[str, Any],
    regions: Mapping[str, Sequence[int]] | None = None,
    num_processes: int = 1,
    progress_bar: bool = True,
) -> Scores:
    """Score every case of `reference_folder` against the file of the same name in `prediction_folder`.

    `dataset_json` is nnU-Net's; `regions` (name -> label values) replaces `regions_of` its labels. Voxels whose reference is the
    'ignore' label count nowhere. `num_processes` above 1 starts that many processes.

    Raises:
        UserError: a prediction is missing, the two files of a case differ in shape or spacing, or a file holds a label that
            dataset.json does not name.
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
    if missing := sorted(references.keys() - predictions.keys()):
        shown = ", ".join(references[case].name for case in missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"{prediction_folder}: no prediction for {len(missing)} of {len(references)} references ({shown}); "
            "predict them, or take their references out of the reference folder"
        )
    score = delayed(_score_case)
    jobs = (score(case, file, predictions[case], structures, sorted(declared), ignore) for case, file in references.items())
    scored = Parallel(n_jobs=max(1, min(num_processes, len(references))), return_as="generator")(jobs)
    bar = tqdm(scored, total=len(references), desc="evaluating", unit="case", disable=not progress_bar)
    table = pd.DataFrame([row for rows in bar for row in rows], columns=["case", "structure", "kind", *METRICS])
    return Scores(table, structures, not_scored=tuple(sorted(predictions.keys() - references.keys())))


def _files_in(folder: Path, file_ending: str) -> dict[str, Path]:
    """Case to its file, sorted."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds the segmentations")
    files = files_in(folder, file_ending)
    if not files:
        raise UserError(f"{folder}: no file ends with {file_ending}; give the folder that holds the segmentations")
    return {path.name.removesuffix(file_ending): path for path in files}


def _score_case(
    case: str,
    reference_file: Path,
    prediction_file: Path,
    structures: Sequence[Structure],
    declared: Sequence[int],
    ignore: int | None,
) -> list[dict[str, Any]]:
    """Rows of `Scores.table`. Everything follows from one joint count of labels, so a region costs no pass over the voxels."""
    reference, spacing = _read_segmentation(reference_file, declared)
    prediction, prediction_spacing = _read_segmentation(prediction_file, declared)
    remedy = "export the prediction on the grid of the reference"
    if reference.shape != prediction.shape:
        raise UserError(
            f"{prediction_file} has shape (z, y, x) {prediction.shape}, its reference {reference_file} has {reference.shape}; "
            f"{remedy}"
        )
    if not np.allclose(spacing, prediction_spacing, rtol=SPACING_TOLERANCE, atol=0):
        raise UserError(
            f"{prediction_file} has spacing (x, y, z) {prediction_spacing} mm, its reference {reference_file} has {spacing} mm; "
            f"{remedy}"
        )
    # voxels with reference label i and predicted label j, at (i, j)
    size = max(declared) + 1
    counts = np.bincount((reference * size + prediction).ravel(), minlength=size**2).reshape(size, size)
    if ignore is not None:
        counts[ignore] = 0
    ml_per_voxel = float(np.prod(spacing)) / 1000

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
    return rows


def _read_segmentation(file: Path, declared: Sequence[int]) -> tuple[Int[np.ndarray, "z y x"], tuple[float, float, float]]:
    """Labels, each of them declared, and spacing in mm as (x, y, z)."""
    try:
        image = sitk.ReadImage(str(file))
    except RuntimeError as error:
        raise UserError(f"{file}: cannot be read as an image; write it again") from error
    values = sitk.GetArrayFromImage(image)
    if values.ndim != 3:
        raise UserError(f"{file}: {values.ndim}-D image found, a 3-D segmentation expected; give one label map a case")
    segmentation = values.astype(np.intp)
    is_label_map = segmentation.min() >= 0 and (values.dtype.kind in "iu" or np.array_equal(segmentation, values))
    if not is_label_map:
        raise UserError(
            f"{file}: values from {values.min()} to {values.max()} found, whole labels from 0 on expected; give label maps"
        )
    if undeclared := sorted(set(np.flatnonzero(np.bincount(segmentation.ravel())).tolist()) - set(declared)):
        raise UserError(
            f"{file}: labels {undeclared} found, dataset.json names {list(declared)}; use the dataset.json of these segmentations"
        )
    return segmentation, image.GetSpacing()


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else np.nan
