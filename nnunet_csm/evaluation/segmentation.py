"""Dice, sensitivity, precision and volumes of a folder of predicted segmentations, per label and per region."""

import json
import multiprocessing
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jaxtyping import Int
from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.files import write_text

# What releases of BraTS call the three parts of a glioma. Names are compared as `_plain_name` writes them.
BRATS_PARTS: dict[str, frozenset[str]] = {
    "oedema": frozenset(
        {
            "edema",
            "ed",
            "peritumoral",
            "peritumoral edema",
            "peritumoral edematous tissue",
            "peritumoral edematous invaded tissue",
            "snfh",
            "surrounding non enhancing flair hyperintensity",
        }
    ),
    "necrotic": frozenset(
        {
            "non enhancing",
            "non enhancing tumor",
            "non enhancing tumor core",
            "nonenhancing tumor",
            "nonenhancing tumor core",
            "necrosis",
            "necrotic",
            "necrotic core",
            "necrotic tumor",
            "necrotic tumor core",
            "necrotic and non enhancing tumor",
            "necrotic and non enhancing tumor core",
            "necrotic non enhancing tumor core",
            "ncr",
            "net",
            "netc",
            "ncr net",
        }
    ),
    "enhancing": frozenset({"enhancing", "enhancing tumor", "gd enhancing tumor", "et"}),
}

# Region: (short name for the columns of a table, its parts). arXiv 2412.07387 takes the necrotic part alone as the tumour core,
# BraTS adds the enhancing part, and published numbers mix the two: both are always given.
BRATS_REGIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "whole tumour (WT)": ("WT", ("oedema", "necrotic", "enhancing")),
    "tumour core (TC, BraTS: necrotic + enhancing)": ("TC (BraTS)", ("necrotic", "enhancing")),
    "tumour core (TC, paper: necrotic only)": ("TC (paper)", ("necrotic",)),
    "enhancing tumour (ET)": ("ET", ("enhancing",)),
}

METRICS = ("dice", "sensitivity", "precision", "reference_ml", "predicted_ml")

# Headers hold float32: 0.1 % is far above their rounding and far below any real difference.
SPACING_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Structure:
    """What one Dice is about: a label or a region, as the set of label values it is made of."""

    name: str
    kind: str
    labels: tuple[int, ...]
    in_foreground_mean: bool

    @property
    def labels_text(self) -> str:
        return "+".join(str(label) for label in self.labels)

    @property
    def short_name(self) -> str:
        return BRATS_REGIONS[self.name][0] if self.name in BRATS_REGIONS else self.name


@dataclass(frozen=True)
class Scores:
    """The scores of a folder.

    `table` has one row a case and structure: case, structure, kind ("label" or "region"), dice, sensitivity, precision, and
    reference_ml and predicted_ml in millilitres. Dice is NaN where reference and prediction are both empty, sensitivity where the
    reference is, precision where the prediction is. `not_scored` names predictions without a reference.
    """

    table: pd.DataFrame
    structures: tuple[Structure, ...]
    not_scored: tuple[str, ...] = ()

    @property
    def foreground_mean(self) -> float:
        """nnU-Net's foreground_mean: mean over the labels (regions, of a region-based dataset) of the mean Dice over cases.

        As in nnU-Net, it is NaN when one of them is empty in every case.
        """
        means = [_statistics(self._dice(structure))["mean"] for structure in self.structures if structure.in_foreground_mean]
        return float(np.mean(means))

    def summary(self) -> pd.DataFrame:
        """Statistics of Dice, a row per structure: kind, labels, mean, median, sd (n - 1), min, n; last, the foreground mean.

        n counts the cases in which Dice is defined. The last row's n is the number of all cases.
        """
        rows: list[dict[str, Any]] = [
            {
                "structure": structure.name,
                "kind": structure.kind,
                "labels": structure.labels_text,
                **_statistics(self._dice(structure)),
            }
            for structure in self.structures
        ]
        averaged = [structure for structure in self.structures if structure.in_foreground_mean]
        rows.append(
            {
                "structure": "foreground mean",
                "kind": f"mean of {averaged[0].kind}s",
                "labels": ", ".join(structure.labels_text for structure in averaged),
                "mean": self.foreground_mean,
                "median": np.nan,
                "sd": np.nan,
                "min": np.nan,
                "n": len(self.cases),
            }
        )
        return pd.DataFrame(rows).set_index("structure")

    def to_markdown(self) -> str:
        """Summary and Dice by case as Markdown tables with aligned columns, for a terminal as much as for a page."""
        summary = self.summary()
        statistics = [
            [str(name), row["labels"], *(_number(row[column]) for column in ("mean", "median", "sd", "min")), str(row["n"])]
            for name, row in summary.iterrows()
        ]
        columns = {structure.short_name: self._dice(structure) for structure in self.structures}
        by_case = [[case, *(_number(dice[case]) for dice in columns.values())] for case in self.cases]
        parts = [
            f"Dice of {len(self.cases)} case{'s' if len(self.cases) != 1 else ''}; "
            "a case without the structure in reference and prediction is left out (n)",
            _aligned_table(["structure", "labels", "mean", "median", "sd", "min", "n"], statistics),
            "Dice by case",
            _aligned_table(["case", *columns], by_case),
        ]
        if self.not_scored:
            parts.append("Not scored, no reference: " + ", ".join(self.not_scored))
        return "\n\n".join(parts) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write evaluation.csv (a row a case and structure), evaluation.md and evaluation.json; NaN is null in JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        by_case = {
            case: {row["structure"]: {metric: _json_number(row[metric]) for metric in METRICS} for _, row in rows.iterrows()}
            for case, rows in self.table.groupby("case", sort=False)
        }
        structures = {
            structure.name: {
                "kind": structure.kind,
                "labels": list(structure.labels),
                **{name: _json_number(value) for name, value in _statistics(self._dice(structure)).items()},
            }
            for structure in self.structures
        }
        content = {
            "foreground_mean": _json_number(self.foreground_mean),
            "dice": structures,
            "cases": by_case,
            "not_scored": list(self.not_scored),
        }
        write_text(folder / "evaluation.csv", self.table.to_csv(index=False))
        write_text(folder / "evaluation.md", self.to_markdown())
        write_text(folder / "evaluation.json", json.dumps(content, indent=2, allow_nan=False) + "\n")

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(self.table["case"]))

    def _dice(self, structure: Structure) -> pd.Series:
        """Dice by case name."""
        rows = self.table[self.table["structure"] == structure.name]
        return rows.set_index("case")["dice"]


def regions_of(labels: Mapping[str, int | Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The regions to score for the `labels` of an nnU-Net dataset.json, as region name -> label values.

    A region-based dataset: its own regions. Labels that are the three parts of a glioma: BraTS's regions, with the tumour core
    as BraTS and as arXiv 2412.07387 define it. Else the union of all labels, where there are at least two. 'ignore' is no label.
    """
    foreground = _foreground_of(labels)
    if _is_region_based(foreground):
        return foreground
    parts = {
        part: [label for name, values in foreground.items() if _plain_name(name) in aliases for label in values]
        for part, aliases in BRATS_PARTS.items()
    }
    if all(parts.values()):
        return {
            region: tuple(sorted(label for part in its_parts for label in parts[part]))
            for region, (_, its_parts) in BRATS_REGIONS.items()
        }
    if len(foreground) >= 2:
        return {"foreground": tuple(sorted(label for values in foreground.values() for label in values))}
    return {}


def parse_regions(definitions: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read what follows a -regions flag: ["WT=1,2,3", "ET=3"] -> {"WT": (1, 2, 3), "ET": (3,)}. Raises UserError."""
    regions: dict[str, tuple[int, ...]] = {}
    for definition in definitions:
        match = re.fullmatch(r"\s*([^=]*[^=\s])\s*=\s*(\d+(?:\s*,\s*\d+)*)\s*", definition)
        if match is None:
            msg = f"-regions: cannot read {definition!r}; write a name, '=' and label values joined by commas, e.g. WT=1,2,3"
            raise UserError(msg)
        name = match[1]
        if name in regions:
            msg = f"-regions: {name!r} is defined twice; give each region a name of its own"
            raise UserError(msg)
        regions[name] = tuple(sorted({int(label) for label in match[2].split(",")}))
    return regions


def evaluate_folder(
    reference_folder: str | Path,
    prediction_folder: str | Path,
    dataset_json: str | Path | Mapping[str, Any],
    regions: Mapping[str, Sequence[int]] | None = None,
    file_ending: str | None = None,
    num_processes: int = 1,
    progress_bar: bool = True,
) -> Scores:
    """Score every case of `reference_folder` against the file of the same name in `prediction_folder`.

    `dataset_json` is nnU-Net's, as a path or read; `regions` (name -> label values) replaces `regions_of` its labels;
    `file_ending` replaces the dataset's. Voxels whose reference is the 'ignore' label count nowhere. `num_processes` above 1
    starts that many processes. Raises UserError when a prediction is missing, when the two files of a case differ in shape or
    spacing, or when a file holds a label that dataset.json does not name.
    """
    dataset, source = _read_dataset_json(dataset_json)
    labels = dataset["labels"]
    structures = _structures_of(labels, regions, source)
    ignore = labels.get("ignore")
    declared = {0, *(label for values in _foreground_of(labels).values() for label in values)}
    declared.update(() if ignore is None else (int(ignore),))

    file_ending = file_ending or dataset.get("file_ending", ".nii.gz")
    reference_names = _names_in(Path(reference_folder), file_ending)
    prediction_names = _names_in(Path(prediction_folder), file_ending)
    missing = sorted(set(reference_names) - set(prediction_names))
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        msg = (
            f"{prediction_folder}: no prediction for {len(missing)} of {len(reference_names)} references ({shown}); "
            "predict them, or take their references out of the reference folder"
        )
        raise UserError(msg)

    score = partial(_score_case, structures=structures, declared=tuple(sorted(declared)), ignore=ignore, source=source)
    references = [Path(reference_folder) / name for name in reference_names]
    predictions = [Path(prediction_folder) / name for name in reference_names]
    cases = [name.removesuffix(file_ending) for name in reference_names]
    progress = partial(tqdm, total=len(cases), desc="evaluating", unit="case", disable=not progress_bar)
    if num_processes > 1:
        # spawn: forking a process that holds CUDA or running threads may hang.
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(num_processes, len(cases)), mp_context=spawn) as pool:
            rows = [row for found in progress(pool.map(score, cases, references, predictions)) for row in found]
    else:
        rows = [row for found in progress(map(score, cases, references, predictions)) for row in found]
    not_scored = sorted(set(prediction_names) - set(reference_names))
    return Scores(
        table=pd.DataFrame(rows, columns=["case", "structure", "kind", *METRICS]),
        structures=structures,
        not_scored=tuple(name.removesuffix(file_ending) for name in not_scored),
    )


def _plain_name(name: str) -> str:
    """Lower case, American, words of letters only: 'Non-enhancing Tumour' -> 'non enhancing tumor'."""
    american = name.lower().replace("tumour", "tumor").replace("oedema", "edema")
    return re.sub(r"[^a-z]+", " ", american).strip()


def _foreground_of(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> label values, without background and ignore. `labels` may be as found in a file; raises UserError."""
    foreground: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        values = tuple(sorted(set(value))) if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(label, int) for label in values):
            msg = (
                f"labels of dataset.json: {name!r} is {value!r}, expected an integer or a list of integers; "
                "convert an MSD dataset.json with nnUNetv2_convert_MSD_dataset"
            )
            raise UserError(msg)
        if name != "ignore" and values != (0,):
            foreground[name] = values
    return foreground


def _is_region_based(foreground: Mapping[str, tuple[int, ...]]) -> bool:
    """nnU-Net's rule: a list of one label is a label."""
    return any(len(values) > 1 for values in foreground.values())


def _structures_of(labels: Mapping[str, Any], regions: Mapping[str, Sequence[int]] | None, source: str) -> tuple[Structure, ...]:
    """What the dataset trains on, then the regions that are not among it."""
    foreground = _foreground_of(labels)
    if not foreground:
        msg = f"{source}: 'labels' names no foreground label, found {dict(labels)}; add the labels to score"
        raise UserError(msg)
    region_based = _is_region_based(foreground)
    kind = "region" if region_based else "label"
    structures = [Structure(name, kind, values, in_foreground_mean=True) for name, values in foreground.items()]
    if regions is None:
        regions = {} if region_based else regions_of(labels)
    declared = {label for values in foreground.values() for label in values}
    for name, values in regions.items():
        unknown = sorted(set(values) - declared)
        if unknown:
            msg = f"region {name!r} holds labels {unknown}, {source} names only {sorted(declared)}; correct -regions"
            raise UserError(msg)
        if name in foreground:
            msg = f"region {name!r} has the name of a label in {source}; give it another name with -regions"
            raise UserError(msg)
        structures.append(Structure(name, "region", tuple(values), in_foreground_mean=False))
    return tuple(structures)


def _read_dataset_json(dataset_json: str | Path | Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Content and the name under which errors speak of it."""
    if isinstance(dataset_json, Mapping):
        dataset, source = dataset_json, "dataset.json"
    else:
        source = str(dataset_json)
        try:
            dataset = json.loads(Path(dataset_json).read_text(encoding="utf-8"))
        except OSError as error:
            msg = f"{source}: cannot be read ({error.strerror}); give the dataset.json of the nnU-Net raw dataset"
            raise UserError(msg) from error
        except json.JSONDecodeError as error:
            msg = f"{source}: line {error.lineno} is not JSON ({error.msg}); correct the file"
            raise UserError(msg) from error
    if not isinstance(dataset, Mapping) or not isinstance(dataset.get("labels"), Mapping):
        msg = f"{source}: no 'labels' found, expected a table of label names and values; give the dataset.json of the raw dataset"
        raise UserError(msg)
    return dataset, source


def _names_in(folder: Path, file_ending: str) -> list[str]:
    if not folder.is_dir():
        msg = f"{folder}: no such folder; give the folder that holds the segmentations"
        raise UserError(msg)
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith(file_ending) and not path.name.startswith("."))
    if not names:
        msg = f"{folder}: no file ends with {file_ending}; give the folder that holds the segmentations, or another file ending"
        raise UserError(msg)
    return names


def _score_case(
    case: str,
    reference_file: Path,
    prediction_file: Path,
    structures: Sequence[Structure],
    declared: Sequence[int],
    ignore: int | None,
    source: str,
) -> list[dict[str, Any]]:
    """Rows of `Scores.table`. Everything follows from one joint count of labels, so a region costs no pass over the voxels."""
    reference, spacing = _read_segmentation(reference_file, declared, source)
    prediction, prediction_spacing = _read_segmentation(prediction_file, declared, source)
    if reference.shape != prediction.shape:
        msg = (
            f"{prediction_file} has shape (z, y, x) {prediction.shape}, its reference {reference_file} has {reference.shape}; "
            "export the prediction on the grid of the reference"
        )
        raise UserError(msg)
    if not np.allclose(spacing, prediction_spacing, rtol=SPACING_TOLERANCE, atol=0):
        msg = (
            f"{prediction_file} has spacing (x, y, z) {prediction_spacing} mm, its reference {reference_file} has {spacing} mm; "
            "export the prediction on the grid of the reference"
        )
        raise UserError(msg)
    counts = _joint_counts(reference, prediction, declared)
    if ignore is not None:
        counts[declared.index(ignore)] = 0
    ml_per_voxel = float(np.prod(spacing)) / 1000

    rows = []
    for structure in structures:
        inside = np.isin(declared, structure.labels)
        num_both = int(counts[np.ix_(inside, inside)].sum())
        num_reference = int(counts[inside].sum())
        num_predicted = int(counts[:, inside].sum())
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


def _read_segmentation(
    file: Path, declared: Sequence[int], source: str
) -> tuple[Int[np.ndarray, "z y x"], tuple[float, float, float]]:
    """Labels, each of them declared, and spacing in mm as (x, y, z)."""
    try:
        image = sitk.ReadImage(str(file))
    except RuntimeError as error:
        msg = f"{file}: cannot be read as an image; write it again"
        raise UserError(msg) from error
    values = sitk.GetArrayFromImage(image)
    if values.ndim != 3:
        msg = f"{file}: {values.ndim}-D image found, a 3-D segmentation expected; give one label map a case"
        raise UserError(msg)
    segmentation = values.astype(np.intp)
    is_label_map = segmentation.min() >= 0 and (values.dtype.kind in "iu" or np.array_equal(segmentation, values))
    if not is_label_map:
        msg = f"{file}: values from {values.min()} to {values.max()} found, whole labels from 0 on expected; give label maps"
        raise UserError(msg)
    undeclared = sorted(set(np.flatnonzero(np.bincount(segmentation.ravel())).tolist()) - set(declared))
    if undeclared:
        msg = f"{file}: labels {undeclared} found, {source} names {list(declared)}; use the dataset.json of these segmentations"
        raise UserError(msg)
    return segmentation, image.GetSpacing()


def _joint_counts(
    reference: Int[np.ndarray, "z y x"], prediction: Int[np.ndarray, "z y x"], declared: Sequence[int]
) -> Int[np.ndarray, "k k"]:
    """Voxels with reference label declared[i] and predicted label declared[j], at (i, j)."""
    num_labels = len(declared)
    position = np.zeros(max(declared) + 1, dtype=np.intp)
    position[list(declared)] = np.arange(num_labels)
    joint = position[reference] * num_labels + position[prediction]
    return np.bincount(joint.ravel(), minlength=num_labels**2).reshape(num_labels, num_labels)


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else np.nan


def _statistics(values: pd.Series) -> dict[str, Any]:
    """NaN does not count; sd divides by n - 1, and is NaN for one case."""
    return {
        "mean": float(values.mean()),
        "median": float(values.median()),
        "sd": float(values.std()),
        "min": float(values.min()),
        "n": int(values.count()),
    }


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.4f}"


def _json_number(value: float | int) -> float | int | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else value


def _aligned_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: first column to the left, the others to the right."""
    widths = [max(3, *(len(row[column]) for row in [header, *rows])) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first, *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]) + " |"

    rule = "| " + " | ".join(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]) + " |"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])
