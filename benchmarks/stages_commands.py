"""Stages of `on_gpu.py` that run the commands: data, commands, compiled, evidence."""

import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stage import Stage, wait_for
from stages_speed import write_large_cases

from nnunet_csm.phantom import PhantomSpec, write_task

# the phantom's dataset, and how it is planned: for the commands, and as large as it gets for the compiled run
DATASET, SMALL, LARGE = "900", "Small", "Large"
SUBJECT_SHAPE, NUM_TRAINING, NUM_TEST = (24, 48, 48), 10, 3
PRESETS: dict[str, dict[str, Any]] = {
    SMALL: {
        "inherits_from": "demo",
        "description": "a few steps",
        "pretraining": {"num_crops": 12 * 40 * 16, "iterations_per_epoch": 40, "val_iterations_per_epoch": 2},
        "finetuning": {"num_crops": 60, "iterations_per_epoch": 10, "val_iterations_per_epoch": 2},
        "classification": {"schedule": {"num_crops": 160, "passes": None, "iterations_per_epoch": 10}},
    },
    LARGE: {
        "inherits_from": "B",
        "description": "a hundred steps",
        "pretraining": {"num_crops": 100 * 64, "min_steps": 0, "iterations_per_epoch": 50, "val_iterations_per_epoch": 2},
    },
}
CONVERT = "from nnunetv2.dataset_conversion.convert_MSD_dataset import entry_point; entry_point()"


def data(stage: Stage) -> None:
    """A phantom with classes, converted, planned and preprocessed; beside the first stages, since it takes the CPU only."""
    if stage.prepared.exists():
        return
    spec = PhantomSpec(shape=SUBJECT_SHAPE, spacing_mm=(5.0, 3.5, 3.5), diagnoses=True)
    task = stage.work / f"Task{DATASET}_Phantom"
    if not task.exists():
        write_task(spec, stage.work, NUM_TRAINING, NUM_TEST)
    raw = Path(os.environ["nnUNet_raw"]) / f"Dataset{DATASET}_Phantom"
    if not raw.exists():
        stage.command("-i", str(task), "-np", "2", code=CONVERT)
    shutil.copy(task / "classification.csv", raw)
    for name, preset in PRESETS.items():
        path = stage.work / f"{name}.json"
        path.write_text(json.dumps(preset))
        first = ["plan_and_preprocess"] if name == SMALL else ["plan"]
        stage.command(*first, "-d", DATASET, "-preset", str(path), "-overwrite_plans_name", name)
    stage.prepared.touch()
    write_large_cases(stage)


def commands(stage: Stage) -> None:
    wait_for(stage.prepared, 180)
    results = Path(os.environ["nnUNet_results"]) / f"Dataset{DATASET}_Phantom"
    images = Path(os.environ["nnUNet_raw"]) / f"Dataset{DATASET}_Phantom" / "imagesTs"
    masks = stage.work / f"Task{DATASET}_Phantom" / "labelsTs"
    common = ["-d", DATASET, "-p", SMALL, *stage.on()]

    def interrupted() -> tuple[bool, str]:
        folder = results / f"nnUNetTrainerCSMPretrain__{SMALL}__3d_fullres" / "fold_0"
        run = [sys.executable, "-P", "-m", "nnunet_csm", "pretrain", *common]
        with subprocess.Popen(run, stdin=subprocess.DEVNULL) as process:
            try:
                wait_for(folder / "checkpoint_latest.pth", 100, process)
            finally:
                process.kill()
        stage.command("pretrain", *common, "--c")
        return (folder / "checkpoint_final.pth").is_file(), "a checkpoint after SIGKILL and --c"

    def finetuned(*flags: str, trainer: str) -> tuple[bool, str]:
        stage.command("finetune", *common, *flags)
        folder = results / f"{trainer}__{SMALL}__3d_fullres" / "fold_0" / "validation"
        return (folder / "summary.json").is_file(), "with its final validation"

    def predicted(missing: bool) -> tuple[bool, str]:
        source, out = images, stage.work / f"predicted_{missing}"
        if missing:
            source = stage.work / "without_T1w"
            shutil.copytree(images, source, dirs_exist_ok=True)
            for file in source.glob("*_0001.nii.gz"):
                file.unlink()
        shutil.rmtree(out, ignore_errors=True)
        stage.command("predict", *common, "-f", "0", "-i", str(source), "-o", str(out), "-npp", "1", "-nps", "1")
        return len(list(out.glob("*.nii.gz"))) == NUM_TEST, f"{NUM_TEST} cases{', without T1w' if missing else ''}"

    def classified() -> tuple[bool, str]:
        out = stage.work / "classes.csv"
        flags = ["-f", "0", "-i", str(images), "-m", str(masks), "-o", str(out), "--overwrite"]
        stage.command("classify", *common, *flags)
        return len(out.read_text().splitlines()) == NUM_TEST + 1, f"{NUM_TEST} cases"

    stage.attempt("pretrain, killed, --c", interrupted)
    # `equal` and `compiled` try it; a few steps are not worth the seconds
    os.environ["nnUNet_compile"] = "f"
    classifier = "nnUNetTrainerCSMClassifier"

    def segmentation() -> None:
        stage.attempt("finetune", lambda: finetuned(trainer="nnUNetTrainerCSM"))
        stage.attempt("predict", lambda: predicted(False))
        stage.attempt("predict, a series missing", lambda: predicted(True))

    def classification() -> None:
        stage.attempt("finetune, classifier", lambda: finetuned("-tr", classifier, trainer=classifier))
        stage.attempt("classify", classified)

    with ThreadPoolExecutor(2) as both:
        for done in [both.submit(segmentation), both.submit(classification)]:
            done.result()


def compiled(stage: Stage) -> None:
    wait_for(stage.prepared, 60)
    name = SMALL if stage.cpu else LARGE
    fold = "1"

    def whole() -> tuple[bool, str]:
        begun = time.monotonic()
        stage.command("pretrain", "-d", DATASET, "-p", name, "-f", fold, *stage.on())
        results = Path(os.environ["nnUNet_results"]) / f"Dataset{DATASET}_Phantom"
        folder = results / f"nnUNetTrainerCSMPretrain__{name}__3d_fullres" / f"fold_{fold}"
        log = "\n".join(path.read_text() for path in folder.glob("training_log_*.txt"))
        wrong = [text for text in ("No CUDA graphs", "Not compiled") if text in log]
        rates = [line.split(": ")[-1] for line in log.splitlines() if "crops/s" in line]
        how = "neither compiled nor in graphs, on a CPU" if stage.cpu else ", ".join(wrong) or "compiled, in graphs"
        return not wrong, f"{time.monotonic() - begun:.0f} s in all; {rates[-1] if rates else 'no epoch'}; {how}"

    stage.attempt(f"pretrain {name} by the command", whole)


def evidence(stage: Stage) -> None:
    """Runs of a study until this process is killed; those that are done are not done again."""
    given = {path.name for variable in ("nnUNet_preprocessed", "nnUNet_raw") for path in Path(os.environ[variable]).iterdir()}
    datasets = sorted(name for name in given if name.startswith("Dataset") and not name.endswith("_Phantom"))
    if not datasets and not stage.cpu:
        stage.found("study", "no dataset in -data", False)
        return
    # as many workers as there are cores for each run
    os.environ["nnUNet_n_proc_DA"] = str(max(1, (os.cpu_count() or 1) // stage.jobs - 1))
    for dataset in datasets or [f"Dataset{DATASET}_Phantom"]:
        if not (Path(os.environ["nnUNet_preprocessed"]) / dataset / "nnUNetPlans.json").is_file():
            stage.command("plan_and_preprocess", "-d", dataset)
        flags = ["--dry_run"] if stage.cpu else ["-jobs", str(stage.jobs)]
        stage.command("study", stage.study, "-d", dataset, *stage.on(), *flags)
        stage.found("study", f"{stage.study} on {dataset}: {'would run' if stage.cpu else 'every run is done'}", True)
