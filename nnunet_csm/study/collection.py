"""What the runs of a study left, as tables: results of every test case, predictions of classes, costs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nnunet_csm.data.diagnoses import ClassTable
from nnunet_csm.evaluation.regions import BRATS_REGIONS
from nnunet_csm.heads.base import head_of
from nnunet_csm.study.dataset import Dataset
from nnunet_csm.study.execution import class_predictions
from nnunet_csm.study.runs import ALL, CLASSIFIER, Row, Run

# of the two tumour cores in use, the paper's is reported when a study names it
PAPERS_CORE = next(name for name in BRATS_REGIONS if "paper" in name)


def collect_results(name: str, rows: Sequence[Row], dataset: Dataset, structures: Sequence[str]) -> pd.DataFrame:
    """Dice, a row per tested case and structure of every row whose run is done; empty when there is none.

    Args:
        name: of the study.
        rows: of the table.
        dataset: with the folder of the study.
        structures: to report, see `Study.structures`.
    """
    patients = {sample.case: sample.patient for sample in dataset.table.samples}
    folder, ending = dataset.folder, dataset.found.dataset_json["file_ending"]
    found = []
    for row in rows:
        path = folder / "runs" / row.run / "scores.csv"
        if not path.is_file():
            continue
        scores = reported(pd.read_csv(path, dtype={"case": str}), structures)
        predictions = f"runs/{row.run}/predictions/" + scores["tested"] + "/" + scores["case"] + ending
        patient = scores["case"].map(lambda case: patients.get(case, case))
        # a network of one series is tested on that one
        tested = scores["tested"] if row.finetuned == ALL else row.finetuned
        found.append(scores.assign(**named(name, row), tested=tested, patient=patient, prediction=predictions))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def reported(scores: pd.DataFrame, structures: Sequence[str]) -> pd.DataFrame:
    """The rows of the structures to report."""
    wanted = scores["structure"].isin(structures)
    if not wanted.any():
        kind = "region" if (scores["kind"] == "region").any() else "label"
        wanted = (scores["kind"] == kind) & (scores["structure"] != PAPERS_CORE)
    return scores[wanted]


def collect_predictions(name: str, rows: Sequence[Row], runs: Mapping[str, Run], dataset: Dataset) -> pd.DataFrame:
    """Probabilities of classes, or numbers, of all test samples, a row each; empty when there are none.

    Those with all series are the trainer's own; those with a part of them are in the folder of the study.
    """
    found = []
    for row in rows:
        run = runs[row.run]
        path = run.folder / "test" / "predictions.csv"
        if run.trainer == CLASSIFIER and path.is_file():
            predictions = head_of(dataset.classes).read([path]).drop(columns="run")
            found.append(predictions.assign(**named(name, row), tested=row.finetuned))
            for one in run.tests:
                of_part = with_classes(class_predictions(dataset.folder / "runs" / run.id, one), dataset.classes)
                found.append(of_part.assign(**named(name, row), tested=one.name))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def with_classes(path: Path, table: ClassTable) -> pd.DataFrame:
    """What `classify` has written, with classes or true numbers, and patients; labels of a mask without one are left out."""
    found = pd.read_csv(path, dtype={"case": str, "mask_label": str}, keep_default_na=False)
    known = pd.DataFrame(
        {
            "case": [sample.case for sample in table.samples],
            "mask_label": ["" if sample.mask_label is None else str(sample.mask_label) for sample in table.samples],
            "patient": [sample.patient for sample in table.samples],
            **head_of(table).truth(np.array([sample.numbers or sample.class_index for sample in table.samples])),
        }
    )
    return found.merge(known, on=["case", "mask_label"])


def named(name: str, row: Row) -> dict[str, Any]:
    return {
        "table": name,
        "arm": row.arm,
        "labels": row.labels,
        "num_labelled": row.num_labelled,
        "division": row.division,
        "repeat": row.repeat,
        "finetuned": row.finetuned,
    }


def collect_costs(rows: Sequence[Row], runs: Mapping[str, Run], records: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """A row per stage of every run that is done, for each row of the table it serves."""
    found = []
    for row in rows:
        run = runs[row.run]
        for stage in (runs.get(run.needs or ""), run):
            if stage is None or stage.id not in records:
                continue
            record = records[stage.id]
            common = {"run": stage.id, "arm": row.arm, "labels": row.labels, "repeat": row.repeat, "plans": stage.plans_name}
            common |= {"device": record["device"], "peak_memory_gb": record["peak_memory_gb"]}
            counted = {"num_crops": stage.num_crops, "visible_tokens": stage.visible_tokens}
            # of a segmenter only
            share = record.get("encoder_share")
            found.append({**common, **counted, "kind": stage.kind, "seconds": record["seconds"], "encoder_share": share})
            if "prediction_seconds" in record:
                none = {"num_crops": 0, "visible_tokens": 0.0}
                none["peak_memory_gb"] = record.get("prediction_peak_memory_gb", float("nan"))
                found.append({**common, **none, "kind": "prediction", "seconds": record["prediction_seconds"]})
    costs = pd.DataFrame(found)
    return costs if costs.empty else costs.astype({"encoder_share": float})
