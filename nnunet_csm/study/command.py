"""`nnunet_csm study`: do what is missing of a table, then write its tables and report."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.command import names_to_draw
from nnunet_csm.files import write_text
from nnunet_csm.pretext.cost import Cost, finetuning_cost, measured_speed, pretraining_cost
from nnunet_csm.schema import to_dict
from nnunet_csm.study.collection import collect_costs, collect_predictions, collect_results
from nnunet_csm.study.dataset import Dataset
from nnunet_csm.study.execution import cluster, local, perform, read_records
from nnunet_csm.study.expansion import Expansion
from nnunet_csm.study.forest import forest_predictions
from nnunet_csm.study.reconstruction import collect_scores, slices_of, write_reconstruction_report
from nnunet_csm.study.report import CaseFiles, write_report
from nnunet_csm.study.runs import Run, Runs
from nnunet_csm.study.spec import Study, read_study, study_names


@dataclass(frozen=True)
class StudyRequest:
    """The command line.

    Attributes:
        study: a shipped study, or the path of a file.
        preset: instead of the study's.
        plans: nnU-Net's, that those of all arms build on.
        dataset: name or ID.
        output: folder of the study; below the results of the dataset when None.
        num_gpus, jobs: runs at once are their product, or `jobs` on a CPU and on a cluster.
        slurm: parameters of submitit's executor; None for this machine.
    """

    study: str
    preset: str | None
    plans: str
    dataset: str
    configuration: str
    output: Path | None
    device: str
    num_gpus: int
    jobs: int
    slurm: Mapping[str, Any] | None


def run_study(request: StudyRequest, dry_run: bool, report_only: bool) -> None:
    """Do the runs of a study that are not done yet, and write tables and report.

    With `dry_run`, print the runs and what they will cost, and train nothing; with `report_only`, only the report.

    Raises:
        UserError: a study or dataset that cannot be used, or runs that failed; the others are done and reported by then.
    """
    study = read_study(request.study)
    name = study_name(request.study)
    if request.preset is not None:
        study = replace(study, preset=request.preset)
    if request.device == "cuda" and request.slurm is None and not (dry_run or report_only or torch.cuda.is_available()):
        raise UserError("no CUDA device found; study on the CPU with -device cpu, on a cluster with -slurm, or see nvidia-smi")
    if min(request.num_gpus, request.jobs) < 1:
        raise UserError(f"-num_gpus {request.num_gpus} -jobs {request.jobs}: expected 1 or more of each")
    results = nnunet.folder("nnUNet_results") / nnunet.dataset_name(request.dataset)
    folder = request.output or results / f"study_{name}"
    folder.mkdir(parents=True, exist_ok=True)
    dataset = Dataset(request.dataset, request.configuration, folder.resolve(), request.plans, study.test_images, request.study)
    print(f"{name}: {study.description}\n{dataset.described()}")
    runs, records = expanded(study, name, dataset)
    if dry_run:
        print(announcement(runs, records, study, dataset, request))
        return
    failures: list[str] = []
    while not report_only:
        missing = [run for run in runs.runs.values() if run.id not in records]
        if not missing:
            break
        write_plans(runs, dataset)
        failures = do(missing, runs, records, dataset.folder, request)
        if failures:
            break
        # what was waited for may be known now
        runs, records = expanded(study, name, dataset)
    nnunet.save_json({"study": to_dict(study), "dataset": dataset.name, "chosen": chosen(runs)}, folder / "study.json")
    report(study, name, dataset, runs, records | read_records(dataset.folder, runs.runs.values()))
    if failures:
        more = f"; and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise UserError(f"{len(failures)} runs failed: {failures[0]}{more}")


def study_name(given: str) -> str:
    """The name of a study in folders and plans. Two underscores part the names in nnU-Net's folders."""
    text = "".join(c if c.isalnum() else "_" if c == "_" else "-" for c in Path(given).name.removesuffix(".json"))
    return "_".join(part for part in text.split("_") if part) or "study"


def list_studies() -> None:
    """Print the shipped studies and what they are."""
    for name in study_names():
        print(f"{name:<18} {read_study(name).description}")


def expanded(study: Study, name: str, dataset: Dataset) -> tuple[Runs, dict[str, dict[str, Any]]]:
    """The runs of a study by now, and the records of those that are done."""
    records: dict[str, dict[str, Any]] = {}
    while True:
        runs = Expansion(study, name, dataset, records).expand()
        known = read_records(dataset.folder, runs.runs.values())
        if known.keys() <= records.keys():
            return runs, known
        # runs that are done may tell of further ones
        records |= known


def write_plans(runs: Runs, dataset: Dataset) -> None:
    """Plans and splits where nnU-Net's trainers look for them."""
    folder = nnunet.folder("nnUNet_preprocessed") / dataset.name
    for name, splits in runs.splits.items():
        nnunet.save_json(splits, folder / name)
    for name, plans in runs.plans.items():
        nnunet.save_json(plans, folder / f"{name}.json")


def do(missing: Sequence[Run], runs: Runs, records: Mapping[str, Any], folder: Path, request: StudyRequest) -> list[str]:
    """Do runs, say what came of each, and return why some failed."""
    if request.slurm is None:
        launch, at_once = local(folder, request.device, request.num_gpus, request.jobs)
    else:
        launch, at_once = cluster(folder, request.device, request.slurm, request.jobs)
    failures = []
    with tqdm(total=len(runs.runs), initial=len(runs.runs) - len(missing), desc="runs", unit="run", dynamic_ncols=True) as bar:
        for run, error in perform(missing, records, launch, at_once):
            if error is not None:
                failures.append(str(error))
                bar.write(f"FAILED {error}")
            else:
                bar.write(f"{run.id} {run.kind}, {told(run, read_records(folder, [run]).get(run.id, {}), runs)}")
            bar.update()
    return failures


def told(run: Run, record: Mapping[str, Any], runs: Runs) -> str:
    """A run in half a line."""
    rows = [row for row in runs.rows if run.id in (row.run, runs.runs[row.run].needs)]
    arms = ", ".join(dict.fromkeys(row.arm for row in rows)) or "search"
    shares = {row.labels for row in rows if row.run == run.id and run.kind == "fine-tuning"}
    what = f"{arms}{f' with {max(shares):.0%} of the labels' if shares else ''}, division {run.fold}"
    score = f", validation {record['validation']:.3f}" if "validation" in record else ""
    return f"{what}: {record.get('seconds', 0.0) / 60:.1f} min{score}"


def announcement(runs: Runs, records: Mapping[str, Any], study: Study, dataset: Dataset, request: StudyRequest) -> str:
    """The runs, and what those that are left will take."""
    speed = measured_speed(torch.device(request.device if torch.cuda.is_available() else "cpu"))
    costs: dict[str, Cost | None] = {}
    lines, seconds = [], 0.0
    for run in runs.runs.values():
        if run.plans_name not in costs:
            costs[run.plans_name] = cost_of(run, runs.plans[run.plans_name], study, dataset)
        cost = costs[run.plans_name]
        takes = cost.seconds(speed) if cost else 60 * runs.plans[run.plans_name]["csm_yardstick"]["minutes"]
        done = run.id in records
        seconds += 0 if done else takes
        state = f"done in {records[run.id]['seconds'] / 60:.1f} min" if done else f"about {takes / 60:.1f} min"
        rows = [row for row in runs.rows if run.id in (row.run, runs.runs[row.run].needs)]
        arms = ", ".join(dict.fromkeys(row.arm for row in rows)) or "search"
        crops = f"{run.num_crops:,} crops of {run.visible_tokens:.0f} visible tokens" if run.num_crops else run.trainer
        lines.append(f"{run.id}  {run.kind:<11}  {arms}; division {run.fold}; {crops}; {state}")
    counts = Counter(run.kind for run in runs.runs.values())
    lines += [f"later, when the runs above have told: {what}" for what in runs.waiting]
    at_once = request.jobs * (request.num_gpus if request.device == "cuda" and request.slurm is None else 1)
    planned = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    hours = seconds / 3600
    lines.append(
        f"{planned}; {len(records)} done; about {hours:.1f} hours of training left, {hours / at_once:.1f} with {at_once} at once "
        f"(operations at half the speed of this machine's matrix product, {speed / 1e12:.3g} TFLOP/s; prediction not counted)"
    )
    return "\n".join(lines)


def cost_of(run: Run, plans: Mapping[str, Any], study: Study, dataset: Dataset) -> Cost | None:
    """Cost of a training of ours; None for stock nnU-Net."""
    if "csm_yardstick" in plans:
        return None
    settings = dataset.settings(plans)
    if run.kind == "pretraining":
        return pretraining_cost(settings, dataset.presence(settings.pretraining_architecture.series))
    classifies = study.task == "classification"
    num_classes = len(dataset.classes.classes) or 1 if classifies else dataset.num_classes
    return finetuning_cost(settings, len(dataset.series), num_classes, classifies)


def chosen(runs: Runs) -> list[dict[str, Any]]:
    """The settings that a search chose, by arm, label share and division."""
    return [{"arm": arm, "labels": share, "division": fold, **values} for (arm, share, fold), values in runs.chosen.items()]


def report(study: Study, name: str, dataset: Dataset, runs: Runs, records: Mapping[str, Mapping[str, Any]]) -> None:
    """Write results.csv, predictions.csv, costs.csv, the tables and report.html."""
    folder = dataset.folder
    costs = collect_costs(runs.rows, runs.runs, records)
    done = sum(row.run in records for row in runs.rows)
    text = f"{study.description}. Dataset {dataset.name}, {done} of {len(runs.rows)} runs of the tables are done."
    if study.task == "reconstruction":
        results, predictions = collect_scores(name, runs.rows, dataset), pd.DataFrame()
    else:
        results = collect_results(name, runs.rows, dataset, study.structures)
        of_networks = collect_predictions(name, [row for row in runs.rows if row.run in records], runs.runs, dataset)
        predictions = pd.concat([of_networks, forest_predictions(name, study, dataset)], ignore_index=True)
    if results.empty and predictions.empty:
        print("no run is done yet, there is nothing to report")
        return
    for file, table in (("results.csv", results), ("predictions.csv", predictions), ("costs.csv", costs)):
        if not table.empty:
            write_text(folder / file, table.to_csv(index=False))
    if not results.empty and study.structures and not set(study.structures) & set(results["structure"]):
        shown = ", ".join(dict.fromkeys(results["structure"]))
        text += f" The dataset has none of the structures to report ({', '.join(study.structures)}); shown: {shown}."
    title, pictures = f"Study {name}", list(reconstructions(runs))
    if study.task == "reconstruction":
        page = write_reconstruction_report(folder, title, results, costs, slices_of(runs.rows, folder), pictures, text)
    else:
        page = write_report(
            folder,
            title,
            results,
            predictions,
            costs,
            study.baseline_arm,
            cases=case_files(dataset),
            pictures=pictures,
            text=f"{text} Settings that were searched for: {chosen(runs)}." if runs.chosen else text,
        )
    print(f"{text}\n{(folder / 'tables.md').read_text(encoding='utf-8')}\nTables and pictures: {page}")


def case_files(dataset: Dataset) -> CaseFiles | None:
    """Images to draw predictions on: of the first series; none for a dataset that lists its files, which lie anywhere."""
    if "dataset" in dataset.found.dataset_json:
        return None
    raw, dataset_json = nnunet.folder("nnUNet_raw") / dataset.name, dataset.found.dataset_json
    return CaseFiles(raw / "imagesTr", raw / "labelsTr", 0, names_to_draw(dataset_json), dataset_json["file_ending"])


def reconstructions(runs: Runs) -> Iterator[tuple[Path, str]]:
    """The last picture of every pretraining of the first division, and how it went."""
    for run in runs.runs.values():
        if run.kind == "pretraining" and run.fold == 0:
            arms = dict.fromkeys(row.arm for row in runs.rows if run.id in (row.run, runs.runs[row.run].needs))
            last = sorted((run.folder / "reconstructions").glob("*_0.png"))[-1:]
            for path in (*last, run.folder / "progress.png"):
                if path.is_file():
                    yield path, f"{', '.join(arms)}: {path.stem}"
