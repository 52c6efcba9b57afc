"""Prediction with what its members say one by one: how uncertain every voxel is, and the volumes that each of them finds.

A member is the network of one fold on one mirrored pass. One is held at a time: probabilities are summed, and volumes stay.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from jaxtyping import Float, Int
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape as convert
from scipy.special import entr
from torch import Tensor

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.regions import Structure, structures_of
from nnunet_csm.export import export_whole, is_whole
from nnunet_csm.files import workplace, write_text
from nnunet_csm.inference.sliding_window import BatchedPredictor
from nnunet_csm.listing import uncertainty_map
from nnunet_csm.raw.cases import FILE_ENDING, write_image
from nnunet_csm.raw.geometry import fit, grid_of_array
from nnunet_csm.raw.volumes import READABLE_ENDINGS, look_at

COLUMNS = ("case", "structure", "kind", "ml", "low_ml", "high_ml", "members")


@dataclass(frozen=True)
class Opinions:
    """What the members say of a case.

    Attributes:
        logits: their mean, as nnU-Net exports it.
        entropy: of their mean probabilities, on the array that nnU-Net made of the image; see `entropy`.
        counts: voxels of each label in what each member alone would have segmented.
    """

    logits: Float[Tensor, "c _ _ _"]
    entropy: Float[np.ndarray, "z y x"]
    counts: Int[np.ndarray, "members labels"]


def predict_with_members(
    predictor: BatchedPredictor, outputs: Mapping[Path, Sequence[str]], table: Path, save_probabilities: bool
) -> None:
    """Segment cases; write a map of each into the folder of `table`, and into `table` a row for each of its structures.

    Cases are taken one after the other, in this process; a case is done when it stands in the table.

    Args:
        outputs: files of a case by the path of its output, without the ending.
        table: the CSV; rows of other cases in it are kept.

    Raises:
        UserError: files without a geometry, or something that cannot be written.
    """
    dataset_json, plans, configuration = predictor.dataset_json, predictor.plans_manager, predictor.configuration_manager
    ending = dataset_json["file_ending"]
    if ending not in READABLE_ENDINGS:
        known = ", ".join(READABLE_ENDINGS)
        raise UserError(f"--uncertainty: files that end in {ending} have no place for maps to lie; expected one of {known}")
    structures, num_members = structures_of(dataset_json["labels"], None), 0
    preprocessor = configuration.preprocessor_class(verbose=False)
    output = next(iter(outputs)).parent
    table.parent.mkdir(parents=True, exist_ok=True)
    for name, content in (("dataset.json", dataset_json), ("plans.json", plans.plans)):
        nnunet.save_json(content, output / name)  # as stock does, for nnU-Net's other commands
    with workplace(output) as unfinished:
        for path, files in outputs.items():
            print(f"\nPredicting {path.name}:")
            data, _, properties = preprocessor.run_case(list(files), None, plans, configuration, dataset_json)
            found = ask_members(predictor, torch.from_numpy(data), properties)
            export_whole(unfinished, found.logits, properties, configuration, plans, dataset_json, str(path), save_probabilities)
            begun, map_file = unfinished / f"map{FILE_ENDING}", uncertainty_map(path)
            write_image(laid_on(Path(files[0]), found.entropy, properties), begun)
            begun.replace(map_file)
            segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(path.with_name(f"{path.name}{ending}"))))
            counts = np.bincount(segmentation.ravel(), minlength=found.counts.shape[1])
            rows = volumes(structures, counts, found.counts, float(np.prod(properties["spacing"])) / 1000)
            _write_rows(table, path.name, rows)
            num_members = len(found.counts)
    print(f"uncertainty by {num_members} member{'s' * (num_members > 1)}: maps and {table.name} in {table.parent}")
    if num_members == 1:
        print("one member (one fold, no mirrored pass): it is the entropy of its probabilities, and volumes have no interval")


def ask_members(predictor: BatchedPredictor, data: Float[Tensor, "n z y x"], properties: dict[str, Any]) -> Opinions:
    """Predict a preprocessed image with each member; sums are in fp32.

    Raises:
        UserError: a network that gives no numbers.
    """
    labels = predictor.label_manager
    logits, probabilities, counts = torch.empty(0), np.empty(0), list[np.ndarray]()
    for member in predictor.members(data):
        segmentation, given = convert(
            member, predictor.plans_manager, predictor.configuration_manager, labels, properties, return_probabilities=True
        )
        if counts:
            logits += member
            probabilities += given
        else:
            logits, probabilities = member.float(), given
        counts.append(np.bincount(segmentation.ravel(), minlength=max(labels.all_labels) + 1))
    probabilities /= len(counts)
    if not np.isfinite(probabilities).all():
        raise UserError("a network gives NaN; its training has diverged: train it again, or leave out its fold with -f")
    return Opinions(logits / len(counts), entropy(probabilities, labels.has_regions), np.stack(counts))


def entropy(probabilities: Float[np.ndarray, "c z y x"], of_regions: bool) -> Float[np.ndarray, "z y x"]:
    """Entropy of each voxel, 0 where all is certain, 1 where nothing is known.

    Of classes that exclude each other: over all of them, divided by log c. Of regions, which overlap: the largest of theirs, each
    of inside or outside and divided by log 2, so that doubt about one region counts in full however many others there are.
    """
    if of_regions:
        found, most = reduce(np.maximum, (entr(one) + entr(1 - one) for one in probabilities)), np.log(2)
    else:
        found, most = sum(entr(one) for one in probabilities), np.log(len(probabilities))
    return np.clip(found / most, 0, 1).astype(np.float32)


def laid_on(file: Path, voxels: Float[np.ndarray, "z y x"], properties: Mapping[str, Any]) -> sitk.Image:
    """The array that nnU-Net made of a file as an image on that file's grid, voxel by voxel."""
    image = sitk.GetImageFromArray(voxels)
    own = grid_of_array(properties, voxels.shape)
    own.put_on(image)
    turned = fit([own], look_at(file).places)
    assert turned is not None, f"{file} is not where nnU-Net has read it"
    return turned.applied(image)


def volumes(
    structures: Sequence[Structure], counts: Int[np.ndarray, " labels"], of_members: Int[np.ndarray, "members labels"], ml: float
) -> list[dict[str, Any]]:
    """A row for each structure: what is segmented, and the smallest and largest volume that a member alone would have segmented.

    Args:
        counts: voxels of each label in the segmentation.
        of_members: those under each member; the ends stay empty where there is but one.
        ml: volume of a voxel.
    """
    rows = []
    for structure in structures:
        inside = list(structure.labels)
        each = of_members[:, inside].sum(1) * ml
        low, high = (each.min(), each.max()) if len(each) > 1 else (np.nan, np.nan)
        values = {"ml": counts[inside].sum() * ml, "low_ml": low, "high_ml": high, "members": len(each)}
        rows.append({"structure": structure.name, "kind": structure.kind, **values})
    return rows


def cases_in_table(table: Path) -> set[str]:
    """Cases that have rows in a table, and a map beside it that can be read to its end."""
    cases = set(_read_rows(table)["case"]) if table.is_file() else set()
    maps = {case: uncertainty_map(table.parent.with_name(case)) for case in cases}
    reader = SimpleITKIO()
    return {case for case, file in maps.items() if is_whole(file.with_suffix("").with_suffix(""), FILE_ENDING, reader, False)}


def _read_rows(table: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(table, converters={"case": str})[list(COLUMNS)]
    except (ValueError, KeyError) as error:
        raise UserError(f"{table}: not a table of volumes ({error}); move it away, and predict again") from None


def _write_rows(table: Path, case: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Put the rows of a case into the table, in place of those that it has of that case."""
    own = pd.DataFrame([{"case": case, **row} for row in rows], columns=COLUMNS)
    if table.is_file():
        before = _read_rows(table)
        own = pd.concat([before[before["case"] != case], own])
    write_text(table, own.sort_values("case", kind="stable").to_csv(index=False, float_format="%.3f"))
