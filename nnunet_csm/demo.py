"""`nnunet_csm demo`: the whole chain on a phantom, by the commands a user would type, and a page that shows every stage."""

import os
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_json

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.figures.overlays import save_overlay
from nnunet_csm.figures.page import Page, Table
from nnunet_csm.judging.kinds import HIDDEN_WHOLE
from nnunet_csm.phantom import PhantomSpec, write_task
from nnunet_csm.processes import run_command

DATASET, NAME, CONFIGURATION, FOLD = "900", "Dataset900_Phantom", "3d_fullres", "0"
PLANS, PRESET = "nnUNetCSMPlans", "phantom"
NUM_TRAINING, NUM_TEST = 40, 10
CONVERT = "nnunetv2.dataset_conversion.convert_MSD_dataset:entry_point"
UNTRAINED = "nnunet_csm.inference.untrained:main"


class Demo:
    """Folders of one demo and the stages done so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.times: list[tuple[str, float]] = []
        folders = {variable: str(folder / variable) for variable in nnunet.FOLDER_VARIABLES}
        # two cores: no more processes than that, each of nnU-Net's starts a Python of its own
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet")}
        self.environment = {**inherited, **folders, "nnUNet_def_n_proc": "2", "PYTHONWARNINGS": "ignore"}
        self.environment[nnunet.TRAINER_VARIABLE] = str(nnunet.TRAINER_FOLDER)
        for path in folders.values():
            Path(path).mkdir(parents=True)

    @property
    def raw(self) -> Path:
        return self.folder / "nnUNet_raw" / NAME

    @property
    def preprocessed(self) -> Path:
        return self.folder / "nnUNet_preprocessed" / NAME

    def results(self, trainer: str) -> Path:
        return self.folder / "nnUNet_results" / NAME / f"{trainer}__{PLANS}__{CONFIGURATION}" / f"fold_{FOLD}"

    def stage(self, title: str, *command: str) -> None:
        """Run one command and show its output; its time goes into the summary."""
        number = len(self.times) + 1
        shown = shlex.join(command[1:] if command[1] == "nnunet_csm" else ("python", *command))
        print(f"\n=== {number}. {title}\n$ {shown}", flush=True)
        started = time.monotonic()
        code = run_command(command, self.environment)
        self.times.append((title, time.monotonic() - started))
        if code:
            raise UserError(f"the demo stopped at {title!r} (exit code {code}, see above); run `nnunet_csm doctor`")


def run_demo(folder: Path, seed: int) -> None:
    """Make a phantom, plan, pretrain, fine-tune, predict, evaluate, and write summary.html.

    Raises:
        UserError: the folder exists and is not empty, or a stage failed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another with -o, or move it away")
    folder = folder.resolve()
    print(
        f"This makes a phantom of {NUM_TRAINING + NUM_TEST} subjects and four series, pretrains a small encoder on its images,\n"
        f"fine-tunes it for segmentation, predicts and scores {NUM_TEST} test subjects: about 10 minutes on two CPU cores.\n"
        f"All of it goes to {folder}"
    )
    demo = Demo(folder)
    started = time.monotonic()
    task = write_task(PhantomSpec(missing_share=0.1, seed=seed), folder, NUM_TRAINING, NUM_TEST, int(DATASET), "Phantom")
    predicted, untrained = folder / "predictions", folder / "predictions_untrained"
    references, images = str(task / "labelsTs"), str(demo.raw / "imagesTs")
    common = ("-d", DATASET, "-f", FOLD, "-device", "cpu")

    demo.stage("convert", "-m", "nnunet_csm.nnunet", CONVERT, "-i", str(task), "-np", "2")
    demo.stage("plan and preprocess", "-m", "nnunet_csm", "plan_and_preprocess", "-d", DATASET, "-preset", PRESET, "-np", "2")
    demo.stage("pretrain", "-m", "nnunet_csm", "pretrain", *common)
    demo.stage("fine-tune", "-m", "nnunet_csm", "finetune", *common)
    demo.stage("predict", "-m", "nnunet_csm", "predict", *common, "-i", images, "-o", str(predicted))
    demo.stage(
        "predict with an untrained network",
        "-m",
        "nnunet_csm.nnunet",
        UNTRAINED,
        str(demo.results("nnUNetTrainerCSM")),
        images,
        str(untrained),
    )
    evaluate = ("-m", "nnunet_csm", "evaluate", "-d", DATASET, "-ref", references)
    demo.stage("evaluate", *evaluate, "-pred", str(predicted), "-images", images, "-overlays", "3")
    demo.stage("evaluate the untrained network", *evaluate, "-pred", str(untrained))

    page = summarize(demo, task, predicted, untrained, time.monotonic() - started)
    page.save(folder / "summary.html")
    print(f"\nDone in {time.monotonic() - started:.0f} s. All stages, with pictures and scores: {folder}/summary.html")


def summarize(demo: Demo, task: Path, predicted: Path, untrained: Path, seconds: float) -> Page:
    """The page of all stages, from the files they wrote."""
    csm = load_json(str(demo.preprocessed / f"{PLANS}.json"))["configurations"][CONFIGURATION]["csm"]
    pretraining, finetuning = demo.results("nnUNetTrainerCSMPretrain"), demo.results("nnUNetTrainerCSM")
    errors = pd.read_csv(pretraining / "validation" / "reconstruction.csv")
    scores, floor = (load_json(str(f / "evaluation.json")) for f in (predicted, untrained))
    lead = (
        "Everything below was made by one command, from a phantom: multi-series MRI computed from tissue parameters and signal "
        f"equations. It took {seconds / 60:.1f} minutes."
    )
    page = Page("Cross-series masking, demo", lead)
    # a subject that has every series and shows every label
    subjects = pd.read_csv(task / "cases.csv")
    series = [c for c in subjects.columns if c not in ("case", "split", "enhancing")]
    full = subjects[(subjects["split"] == "Tr") & subjects[series].all(axis=1) & subjects["enhancing"].astype(bool)]
    case = task / "imagesTr" / f"{full['case'].iloc[0]}.nii.gz"
    page.section(
        "The phantom",
        "One training subject. Oedema shows in FLAIR, the enhancing part in T1ce only. One series in ten is missing.",
        images=[(phantom_picture(case, demo.folder / "phantom.png"), case.name)],
    )
    decisions = [(name, value, reason) for name, (value, reason) in csm["reasons"].items()]
    page.section(
        "The plan",
        "Written by the planner from nnU-Net's fingerprint.",
        [Table(pd.DataFrame(decisions, columns=["decision", "value", "reason"]))],
    )
    pictures = sorted((pretraining / "reconstructions").glob("*.png"))
    whole = errors[(errors["left_visible"] == HIDDEN_WHOLE) & (errors["series"] == "all")].iloc[0]
    page.section(
        "Pretraining",
        f"On series hidden whole, where another series is visible, the mean squared error is {whole['network']:.3f}; "
        f"the best voxel-wise linear map (ridge regression on the series visible at the voxel) reaches {whole['linear']:.3f}, "
        f"that of whole tokens {whole['token_linear']:.3f}, the mean {whole['mean']:.3f}. "
        "Subjects of the validation fold, foreground voxels, z-scored units.",
        [Table(errors)],
        [
            (pretraining / "progress.png", "Loss, errors, learning rate and speed"),
            *((p, p.stem) for p in (*pictures[:1], *pictures[-2:])),
        ],
    )
    page.section("Fine-tuning", "nnU-Net's own progress picture.", images=[(finetuning / "progress.png", "Loss and pseudo Dice")])
    page.section(
        "Test subjects",
        "Dice by label and by region, beside the same network without any training.",
        [score_table(scores, floor), case_table(predicted / "evaluation.csv")],
        [(p, p.stem) for p in sorted((predicted / "overlays").glob("*.png"))],
    )
    page.section("Time", facts=[(name, f"{t:.0f} s") for name, t in demo.times])
    return page


def phantom_picture(case: Path, path: Path) -> Path:
    """Series and labels of one subject of the decathlon task."""
    image, label = sitk.ReadImage(str(case)), sitk.ReadImage(str(case.parent.parent / "labelsTr" / case.name))
    dataset = load_json(str(case.parent.parent / "dataset.json"))
    volume = sitk.GetArrayFromImage(image).astype(np.float32)
    series = [dataset["modality"][key] for key in sorted(dataset["modality"], key=int)]
    names = {int(value): name for value, name in dataset["labels"].items() if int(value)}
    x, y, z = image.GetSpacing()[:3]
    save_overlay(path, volume, series, None, sitk.GetArrayFromImage(label), names, case.name.split(".")[0], (z, y, x), "labels")
    return path


def score_table(scores: dict[str, Any], floor: dict[str, Any]) -> Table:
    table = pd.DataFrame.from_dict(scores["dice"], orient="index")[["mean", "median", "n"]].astype({"n": object})
    table["untrained"] = pd.DataFrame.from_dict(floor["dice"], orient="index")["mean"]
    table.loc["foreground mean"] = [scores["foreground_mean"], float("nan"), "", floor["foreground_mean"]]
    return Table(table.rename(columns={"mean": "mean Dice"}).rename_axis("structure").reset_index())


def case_table(path: Path) -> Table:
    return Table(pd.read_csv(path).pivot(index="case", columns="structure", values="dice").reset_index())
