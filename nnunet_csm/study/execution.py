"""Doing a run: train, predict the test cases, score them; and doing many, on the GPUs of a machine or on a cluster."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import torch
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.segmentation import evaluate_folder
from nnunet_csm.files import write_text
from nnunet_csm.judging import encoder_share
from nnunet_csm.machine import num_cores
from nnunet_csm.processes import run_command
from nnunet_csm.raw.check import load_dataset_json
from nnunet_csm.study.runs import CLASSIFIER, PRETRAINER, YARDSTICK, Evaluation, Run
from nnunet_csm.training.yardstick import SECONDS_FILE

RECORD = "record.json"
TRAIN = "nnunetv2.run.run_training:run_training_entry"
PREDICT = "nnunetv2.inference.predict_from_raw_data:predict_entry_point"
SCORE = "nnunet_csm.study.scoring:main"


@dataclass(frozen=True)
class Place:
    """Where a run is done.

    `gpu`: one of several, as CUDA_VISIBLE_DEVICES names it; None for a CPU, or when a cluster has set which is to be seen.
    """

    device: str
    gpu: str | None = None
    num_threads: int | None = None


def read_records(folder: Path, runs: Iterable[Run]) -> dict[str, dict[str, Any]]:
    """What is known of the runs that are done, with all tests that are asked for now."""
    records = {}
    for run in runs:
        path = folder / "runs" / run.id / RECORD
        if path.is_file():
            record = nnunet.read_json(path, "move it away, and the run is done again")
            if record.get("tests") == [one.name for one in run.tests]:
                records[run.id] = record
    return records


def execute(run: Run, study: Path, place: Place) -> None:
    """Do what is left to do of a run. The record is written last: a run is done when it has one.

    Raises:
        UserError: a step failed; its messages are in log.txt of the run.
    """
    folder = study / "runs" / run.id
    folder.mkdir(parents=True, exist_ok=True)
    train(run, folder, place)
    record: dict[str, Any] = {
        **nnunet.read_json(folder / "train.json", "move it away, and the run is done again"),
        "kind": run.kind,
        "plans": run.plans_name,
        "fold": run.fold,
        "results": str(run.folder),
        "software": checkpoint.software(),
        "tests": [one.name for one in run.tests],
    }
    if run.kind == "fine-tuning":
        record["validation"] = validation_score(run)
        record["encoder_share"] = encoder_share.share(encoder_share.read(run.folder))
    elif run.tests:
        weights = run.folder / "checkpoint_final.pth"
        step(folder / "score.json", place, SCORE, str(weights), str(folder), place.device)
    tables = [test(run, one, folder, place) for one in run.tests if run.kind == "fine-tuning"]
    if tables:
        if run.trainer != CLASSIFIER:
            write_text(folder / "scores.csv", pd.concat(tables, ignore_index=True).to_csv(index=False))
        measured = [nnunet.read_json(path, "move it away") for path in folder.glob("predict_*.json")]
        record["prediction_seconds"] = sum(one["seconds"] for one in measured)
        record["prediction_peak_memory_gb"] = max((one["peak_memory_gb"] for one in measured), default=None)
    nnunet.save_json({**record, "seconds": trained_seconds(run, record["seconds"])}, folder / RECORD)


def train(run: Run, folder: Path, place: Place) -> None:
    begun = any(run.folder.glob("checkpoint_*.pth"))
    flags = ["-p", run.plans_name, "-device", place.device, *(["--c"] if begun else [])]
    if run.trainer == YARDSTICK:
        step(folder / "train.json", place, TRAIN, run.dataset, run.configuration, str(run.fold), "-tr", run.trainer, *flags)
        return
    command = "pretrain" if run.trainer == PRETRAINER else "finetune"
    common = ["-d", run.dataset, "-c", run.configuration, "-f", str(run.fold), "-tr", run.trainer]
    # said even when there is none: the user's environment may name one
    encoder = ["-encoder", str(run.encoder or "scratch")] if run.kind == "fine-tuning" else []
    step(folder / "train.json", place, command, *common, *encoder, *flags)


def step(path: Path, place: Place, *command: str) -> None:
    """One command in a process of its own, which writes `path` when it is done; nothing when it was done before."""
    if path.is_file():
        return
    folder, name = path.parent, path.stem
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    if place.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = place.gpu
    if place.num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(place.num_threads)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        code = run_command(["-m", "nnunet_csm.study.measured", str(path), *command], environment, log)
    if code or not path.is_file():
        raise UserError(
            f"run {folder.name}: {name} ended with exit code {code}, see {folder / 'log.txt'}; mend that, and start "
            f"the study again to go on"
        )


def test(run: Run, one: Evaluation, folder: Path, place: Place) -> pd.DataFrame:
    """Predict and score the test cases with the series given; columns tested, and those of an evaluation.

    Classes are scored when all are collected: of them the table has the predictions.
    """
    raw = nnunet.folder("nnUNet_raw") / run.dataset
    dataset_json = load_dataset_json(raw)
    predictions = folder / "predictions" / one.name
    with TemporaryDirectory(prefix="nnunet_csm_study_") as temporary:
        images, references = (Path(temporary) / name for name in ("images", "references"))
        link_cases(raw, dataset_json, one, images, references)
        if run.trainer == CLASSIFIER:
            return classify(run, images, references, class_predictions(folder, one), place).assign(tested=one.name)
        if not predictions.is_dir():
            predict(run, images, predictions, folder, place)
        table = evaluate_folder(references, predictions, dataset_json, progress_bar=False).table
    return table.assign(tested=one.name)


def predict(run: Run, images: Path, predictions: Path, folder: Path, place: Place) -> None:
    """Write into a folder that gets its name when it is whole: a killed export leaves files that read as images."""
    begun = predictions.with_name(f".{predictions.name}.tmp")
    done = folder / f"predict_{predictions.name}.json"
    for path in (begun, done):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    begun.parent.mkdir(parents=True, exist_ok=True)
    command = PREDICT if run.trainer == YARDSTICK else "predict"
    model = ["-d", run.dataset, "-c", run.configuration, "-p", run.plans_name, "-tr", run.trainer, "-f", str(run.fold)]
    # on a CPU the network takes all cores, and processes beside it take long to start
    processes = ["-npp", "0", "-nps", "0"] if place.device == "cpu" and command == "predict" else []
    io = ["-i", str(images), "-o", str(begun), "-device", place.device]
    # the log of a run is a file
    step(done, place, command, *model, *io, *processes, "--disable_progress_bar")
    begun.replace(predictions)


def class_predictions(folder: Path, one: Evaluation) -> Path:
    """Where a run's folder has the probabilities of classes of a test."""
    return folder / "predictions" / f"{one.name}.csv"


def classify(run: Run, images: Path, masks: Path, predictions: Path, place: Place) -> pd.DataFrame:
    """Write probabilities of classes, around the reference masks."""
    model = ["-d", run.dataset, "-c", run.configuration, "-p", run.plans_name, "-tr", run.trainer, "-f", str(run.fold)]
    io = ["-i", str(images), "-m", str(masks), "-o", str(predictions), "-device", place.device, "--overwrite"]
    step(predictions.parents[1] / f"predict_{predictions.stem}.json", place, "classify", *model, *io)
    return pd.read_csv(predictions)


def link_cases(raw: Path, dataset_json: Mapping[str, Any], one: Evaluation, images: Path, references: Path) -> None:
    """Links to the images of the test cases, of the given series only, and to their reference segmentations."""
    images.mkdir()
    references.mkdir()
    ending = dataset_json["file_ending"]
    files = get_filenames_of_train_images_and_targets(str(raw), dict(dataset_json))
    for case, channels in one.channels.items():
        for channel in channels:
            path = Path(files[case]["images"][channel])
            (images / f"{case}_{channel:04d}{ending}").symlink_to(path.resolve())
        (references / f"{case}{ending}").symlink_to(Path(files[case]["label"]).resolve())


def validation_score(run: Run) -> float:
    """Mean Dice of the validation cases, AUC, or - MAE: what settings are chosen by. Never of test cases."""
    remedy = f"move away {run.folder} and the study's runs/{run.id}, and it is done again"
    summary = nnunet.read_json(run.folder / "validation" / "summary.json", remedy)
    if run.trainer == CLASSIFIER:
        metrics = summary["metrics"]
        return float(metrics["auc"]["value"]) if "auc" in metrics else -float(metrics["mae"]["value"])
    return float(np.nan_to_num(summary["foreground_mean"]["Dice"]))


def trained_seconds(run: Run, seconds: float) -> float:
    """What the epochs took, of all starts of a training that was interrupted.

    `seconds` where stock nnU-Net did not write it down.
    """
    if run.trainer == YARDSTICK:
        path = run.folder / SECONDS_FILE
        return float(nnunet.read_json(path, "train again")["seconds"]) if path.is_file() else seconds
    log = checkpoint.load(run.folder / "checkpoint_final.pth")["logging"]
    ends, starts = log["epoch_end_timestamps"], log["epoch_start_timestamps"]
    return float(sum(end - start for start, end in zip(starts, ends, strict=True)))


Launch = Callable[[Run], None]


def local(study: Path, device: str, num_gpus: int, jobs: int) -> tuple[Launch, int]:
    """Runs on this machine, `jobs` at once on each GPU, or on the CPU; and how many go at once."""
    free: Queue[Place] = Queue()
    if device == "cuda":
        places = [Place(device, gpu) for _ in range(jobs) for gpu in visible_gpus(num_gpus)]
    else:
        threads = max(1, num_cores() // jobs)
        places = [Place(device, num_threads=threads) for _ in range(jobs)]
    for place in places:
        free.put(place)

    def launch(run: Run) -> None:
        place = free.get()
        try:
            execute(run, study, place)
        finally:
            free.put(place)

    return launch, len(places)


def visible_gpus(num_gpus: int) -> list[str]:
    """Names of the first GPUs that are to be seen.

    Raises:
        UserError: there are fewer.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(torch.cuda.device_count())] if given is None else given.split(",")
    names = names[: torch.cuda.device_count()]
    if len(names) < num_gpus:
        raise UserError(f"-num_gpus {num_gpus}: this machine shows {len(names)}; see nvidia-smi and CUDA_VISIBLE_DEVICES")
    return names[:num_gpus]


def cluster(study: Path, device: str, parameters: Mapping[str, Any], jobs: int, kind: str | None = None) -> tuple[Launch, int]:
    """Runs as jobs of SLURM, through submitit, `jobs` queued at once.

    Args:
        study: folder that all nodes see, as nnU-Net's folders are.
        device: of the nodes.
        parameters: of submitit's executor, such as slurm_partition, timeout_min, cpus_per_task.
        kind: of submitit's executor; "slurm" when None, "local" to try it.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("a study on SLURM needs submitit: pip install 'nnunet_csm[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=study / "slurm" / "%j", cluster=kind or "slurm")
    except RuntimeError as error:
        raise UserError(f"no SLURM here ({error}); start the study where sbatch is found, or leave out -slurm") from None
    given = {"gpus_per_node": 1 if device == "cuda" else 0, **parameters}
    try:
        executor.update_parameters(**given)
    # submitit's errors for parameters that it does not know, or not with this value
    except (NameError, NotImplementedError, TypeError, ValueError) as error:
        raise UserError(f"submitit does not take {given}: {str(error).splitlines()[0]} Correct -slurm.") from None

    def launch(run: Run) -> None:
        job = executor.submit(execute, run, study, Place(device))
        try:
            job.result()
        except submitit.core.utils.UncompletedJobError as error:
            raise UserError(f"{run.id}: {str(error).splitlines()[0]}; see {job.paths.stderr}") from None

    return launch, jobs


def perform(runs: Sequence[Run], done: Iterable[str], launch: Launch, num_at_once: int) -> Iterator[tuple[Run, UserError | None]]:
    """Do runs, each after the one it needs; those that need one that failed are left out.

    Returns:
        Runs as they end, and why they failed if they did.
    """
    finished, failed = set(done), set[str]()
    left = [run for run in runs if run.id not in finished]
    under_way: dict[Future[None], Run] = {}
    with ThreadPoolExecutor(num_at_once, thread_name_prefix="run") as threads:
        while left or under_way:
            left = [run for run in left if run.needs not in failed]
            ready = [run for run in left if run.needs is None or run.needs in finished][: num_at_once - len(under_way)]
            left = [run for run in left if run not in ready]
            under_way |= {threads.submit(launch, run): run for run in ready}
            if not under_way:
                return
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                run = under_way.pop(future)
                try:
                    future.result()
                except Exception as error:  # whatever it is, other runs go on and what is done is reported
                    failed.add(run.id)
                    told = error if isinstance(error, UserError) else UserError(f"run {run.id}: {type(error).__name__}: {error}")
                    yield run, told
                else:
                    finished.add(run.id)
                    yield run, None
