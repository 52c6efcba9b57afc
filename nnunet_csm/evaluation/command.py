"""`nnunet_csm evaluate`: tables, files and pictures for a folder of predictions."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_csm import nnunet
from nnunet_csm.evaluation.calibration import calibrate_folder
from nnunet_csm.evaluation.pictures import save_overlays_of_folder
from nnunet_csm.evaluation.regions import parse_regions
from nnunet_csm.evaluation.segmentation import evaluate_folder


def evaluate_dataset(
    dataset: str,
    references: Path | None,
    predictions: Path,
    out_folder: Path,
    regions: Sequence[str] | None = None,
    num_overlays: int = 0,
    images: Path | None = None,
    num_processes: int = 1,
    chill: bool = False,
) -> None:
    """Score predictions by label and region, print the tables, write them, and draw overlays when images are given.

    Writes evaluation.csv, evaluation.md, evaluation.json and overlays/CASE.png to `out_folder`; calibration.csv and
    calibration.png where probabilities lie beside segmentations. Without references there are pictures alone.
    """
    name = nnunet.dataset_name(dataset)
    candidates = [nnunet.folder(v) / name / "dataset.json" for v in ("nnUNet_raw", "nnUNet_preprocessed")]
    path = next((c for c in candidates if os.path.lexists(c)), candidates[0])
    dataset_json = nnunet.read_dataset_json(path, "nnU-Net needs it to read the dataset")
    if references is not None:
        own = parse_regions(regions) if regions else None
        scores = evaluate_folder(references, predictions, dataset_json, own, num_processes, chill=chill)
        scores.save(out_folder)
        print(scores.to_markdown())
        print(f"written to {out_folder}/evaluation.csv, .md and .json")
        calibration = calibrate_folder(references, predictions, dataset_json, scores.structures, num_processes)
        if calibration is not None:
            calibration.save(out_folder)
            print(f"\n{calibration.to_markdown()}\nwritten to {out_folder}/calibration.csv and .png")
    if images is not None and num_overlays:
        series = nnunet.channel_names(dataset_json)
        labels = names_to_draw(dataset_json)
        drawn = save_overlays_of_folder(
            images, references, predictions, series, labels, out_folder / "overlays", num_overlays, dataset_json["file_ending"]
        )
        print(f"{len(drawn)} overlay pictures in {out_folder}/overlays")


def names_to_draw(dataset_json: Mapping[str, Any]) -> dict[int, str]:
    """Names of the label values in a segmentation file: for regions, the values nnU-Net writes for them."""
    names = [name for name in dataset_json["labels"] if name not in ("background", "ignore")]
    if "regions_class_order" in dataset_json:
        return dict(zip(dataset_json["regions_class_order"], names, strict=True))
    return {dataset_json["labels"][name]: name for name in names}
