"""`nnunet_csm demo`: many studies without labels and five with, on a phantom, by the commands a user would type; and a page.

It asks what a pretraining is for: the same fine-tuning from scratch stands beside it, with all series and with one missing.
"""

import os
import shlex
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from batchgenerators.utilities.file_and_folder_operations import load_json

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.bootstrap import SEED, drawn, interval
from nnunet_csm.evaluation.pictures import save_methods_of_case
from nnunet_csm.figures.overlays import save_overlay
from nnunet_csm.figures.page import Page, Table
from nnunet_csm.judging.kinds import HIDDEN_WHOLE
from nnunet_csm.phantom import PhantomSpec, write_task
from nnunet_csm.processes import run_command

DATASET, NAME, CONFIGURATION, FOLD = "900", "Dataset900_Phantom", "3d_fullres", "0"
PRESET, SPEC = "phantom_demo", PhantomSpec(missing_share=0.1, snr=5.0, ventricles=True)
# plans of the two segmenters, which differ in where their encoder begins
ARMS = {"pretrained": "nnUNetCSMPlans", "from scratch": "nnUNetCSMPlansScratch"}
# of the training subjects, those that fine-tuning learns from, those that watch it, and those of which only images are used
NUM_LABELLED, NUM_WATCHING, NUM_UNLABELLED, NUM_TEST = 5, 3, 40, 20
MISSING, SHOWN = "FLAIR", "T2w"  # series that is to be missing, and that pictures show
COMPLETE, WITHOUT = "all series", f"{MISSING} missing"
CONVERT = "nnunetv2.dataset_conversion.convert_MSD_dataset:entry_point"
NUM_RESAMPLES = 2000
# of the stages, about, on two cores
MINUTES = {"convert, plan and preprocess": 1, "pretrain": 4, "fine-tune twice": 1.5, "predict four times and evaluate": 1}


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

    def results(self, trainer: str, plans: str = ARMS["pretrained"]) -> Path:
        return self.folder / "nnUNet_results" / NAME / f"{trainer}__{plans}__{CONFIGURATION}" / f"fold_{FOLD}"

    def predicted(self, arm: str, given: str) -> Path:
        return self.folder / f"predictions_{arm}_{given}".replace(" ", "_")

    def stage(self, title: str, *command: str) -> None:
        """Run one command and show its output; its time goes into the summary."""
        self.side_by_side(title, {title: command})

    def side_by_side(self, title: str, commands: Mapping[str, tuple[str, ...]]) -> None:
        """Run commands at once and show the output of the first; that of others goes to files. A thread each, if several."""
        files = [
            None,
            *(self.folder / f"{title}, {name}.log".replace(", ", " ").replace(" ", "_") for name in list(commands)[1:]),
        ]
        print(f"\n=== {len(self.times) + 1}. {title}")
        for command, file in zip(commands.values(), files, strict=True):
            shown = shlex.join(command[1:] if command[1] == "nnunet_csm" else ("python", *command))
            print("$", shown if file is None else f"{shown} > {shlex.quote(str(file))}", flush=True)
        environment = self.environment | ({"OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1"} if len(commands) > 1 else {})
        started = time.monotonic()
        with ExitStack() as stack, ThreadPoolExecutor(len(commands)) as pool:
            logs = [file and stack.enter_context(file.open("w", encoding="utf-8")) for file in files]
            codes = list(pool.map(lambda command, log: run_command(command, environment, log), commands.values(), logs))
        self.times.append((title, time.monotonic() - started))
        for name, code, file in zip(commands, codes, files, strict=True):
            if code:
                which = title if name == title else f"{title}, {name}"
                raise UserError(
                    f"the demo stopped at {which!r} (exit code {code}, see {file or 'above'}); run `nnunet_csm doctor`"
                )


def run_demo(folder: Path, seed: int) -> None:
    """Make a phantom, plan, pretrain, fine-tune with it and from scratch, predict with and without a series; write summary.html.

    Raises:
        UserError: the folder exists and is not empty, or a stage failed.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; choose another with -o, or move it away")
    folder = folder.resolve()
    num_training = NUM_LABELLED + NUM_WATCHING + NUM_UNLABELLED
    stages = ", ".join(f"{stage} {minutes:g} min" for stage, minutes in MINUTES.items())
    print(
        f"A phantom of {num_training + NUM_TEST} subjects and four series. A small encoder is pretrained on the images of "
        f"{NUM_LABELLED + NUM_UNLABELLED} of them;\na segmenter learns from the {NUM_LABELLED} of these that are labelled, once "
        f"from that encoder and once from scratch, while {NUM_WATCHING} more watch;\nboth segment {NUM_TEST} test subjects, with "
        f"all series and with {MISSING} missing. On two CPU cores about: {stages}.\nAll of it goes to {folder}"
    )
    demo = Demo(folder)
    started = time.monotonic()
    spec = replace(SPEC, seed=seed)
    task = write_task(spec, folder, num_training, NUM_TEST, int(DATASET), "Phantom")
    command, common = ("-m", "nnunet_csm"), ("-d", DATASET, "-f", FOLD, "-device", "cpu")
    scratch = ARMS["from scratch"]

    demo.stage("convert", "-m", "nnunet_csm.nnunet", CONVERT, "-i", str(task), "-np", "2")
    demo.stage("plan and preprocess", *command, "plan_and_preprocess", "-d", DATASET, "-preset", PRESET, "-np", "2")
    keep_labels_of_few(demo.preprocessed)
    demo.stage("plan once more", *command, "plan", "-d", DATASET, "-preset", PRESET, "-overwrite_plans_name", scratch)
    demo.stage("pretrain", *command, "pretrain", *common)
    # of the two segmenters, at once: networks so small gain little from a second core
    start = {"pretrained": (), "from scratch": ("-encoder", "scratch")}
    demo.side_by_side(
        "fine-tune", {arm: (*command, "finetune", *common, "-p", plans, *start[arm]) for arm, plans in ARMS.items()}
    )
    images = {COMPLETE: demo.raw / "imagesTs", WITHOUT: without_series(demo.raw / "imagesTs", folder / "images_incomplete")}
    for given, of_test in images.items():
        outputs = {arm: str(demo.predicted(arm, given)) for arm in ARMS}
        # small images: processes of their own would take longer to start than their work does
        few = ("-i", str(of_test), "-npp", "0", "-nps", "0")
        predict = {arm: (*command, "predict", *common, "-p", plans, *few, "-o", outputs[arm]) for arm, plans in ARMS.items()}
        demo.side_by_side(f"predict, {given}", predict)
        scored = (*command, "evaluate", "-d", DATASET, "-ref", str(task / "labelsTs"), "-pred")
        demo.side_by_side(f"evaluate, {given}", {arm: (*scored, output) for arm, output in outputs.items()})

    page = summarize(demo, task, time.monotonic() - started)
    page.save(folder / "summary.html")
    print(f"\n{verdict(scores_of(demo), hidden_whole(hidden_errors(demo)))}")
    print(f"Done in {time.monotonic() - started:.0f} s. All stages, with pictures: {folder}/summary.html")


def keep_labels_of_few(preprocessed: Path) -> None:
    """Write a fold in which few subjects are labelled; of the others fine-tuning sees nothing, and pretraining the images."""
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (preprocessed / "gt_segmentations").glob("*.nii.gz"))
    labelled, watching = cases[:NUM_LABELLED], cases[NUM_LABELLED : NUM_LABELLED + NUM_WATCHING]
    fold = {"train": labelled, "val": watching, "unlabelled": cases[NUM_LABELLED + NUM_WATCHING :]}
    nnunet.save_json([fold], preprocessed / "splits_final.json")


def without_series(images: Path, folder: Path) -> Path:
    """Links to the images of a folder, but for those of the series that is to be missing."""
    folder.mkdir()
    channel = SPEC.series.index(MISSING)
    for file in images.iterdir():
        if not file.name.endswith(f"_{channel:04d}.nii.gz"):
            (folder / file.name).symlink_to(file)
    return folder


def scores_of(demo: Demo) -> pd.DataFrame:
    """Dice of each test subject, its mean over labels: a column for each arm and what it was given."""
    tables = {each: pd.read_csv(demo.predicted(*each) / "evaluation.csv") for each in product(ARMS, (COMPLETE, WITHOUT))}
    return pd.DataFrame({each: table[table["kind"] == "label"].groupby("case")["dice"].mean() for each, table in tables.items()})


def gain(scores: pd.DataFrame, given: str) -> str:
    """Pretrained less from scratch, in points, with its interval over test subjects."""
    points = 100 * (scores["pretrained", given] - scores["from scratch", given]).to_numpy()
    low, high = interval(drawn(np.random.default_rng(SEED), len(points), NUM_RESAMPLES) @ points / len(points))
    return f"{points.mean():+.1f} points ({low:.1f} to {high:.1f})"


def hidden_errors(demo: Demo) -> pd.DataFrame:
    return pd.read_csv(demo.results("nnUNetTrainerCSMPretrain") / "validation" / "reconstruction.csv")


def hidden_whole(errors: pd.DataFrame) -> pd.Series:
    """Errors on series hidden whole, where another is visible."""
    return errors[(errors["left_visible"] == HIDDEN_WHOLE) & (errors["series"] == "all")].iloc[0]


def verdict(scores: pd.DataFrame, whole: pd.Series) -> str:
    """What pretraining brought, in a sentence for each way of testing, and how well it rebuilds."""
    means = scores.mean()
    brought = [
        f"With {given}: Dice {means['from scratch', given]:.3f} from scratch, {means['pretrained', given]:.3f} pretrained, "
        f"{gain(scores, given)} over {len(scores)} test subjects."
        for given in (COMPLETE, WITHOUT)
    ]
    less = 1 - whole["network"] / min(whole["linear"], whole["token_linear"], whole["mean"])
    rebuilds = f"{less:.0%} better than" if less >= 0.005 else f"{-less:.0%} worse than" if less <= -0.005 else "as well as"
    return "\n".join([*brought, f"Pretraining rebuilds hidden series {rebuilds} the best linear map of what else is visible."])


def summarize(demo: Demo, task: Path, seconds: float) -> Page:
    """The page of all stages, from the files they wrote."""
    csm = load_json(str(demo.preprocessed / f"{ARMS['pretrained']}.json"))["configurations"][CONFIGURATION]["csm"]
    schedule = csm["finetuning_schedule"]
    steps = schedule["num_epochs"] * schedule["iterations_per_epoch"]
    pretraining, scores, errors = demo.results("nnUNetTrainerCSMPretrain"), scores_of(demo), hidden_errors(demo)
    whole = hidden_whole(errors)
    lead = (
        "Everything below was made by one command, from a phantom: multi-series MRI computed from tissue parameters and signal "
        f"equations. {NUM_LABELLED} of {NUM_LABELLED + NUM_UNLABELLED} training subjects are labelled. It took "
        f"{seconds / 60:.1f} minutes."
    )
    page = Page("Cross-series masking, demo", lead)
    page.section(
        "What pretraining brought",
        f"{verdict(scores, whole)}\nBoth segmenters had the same fine-tuning, of {steps} steps, and their decoder reads the "
        "encoder's features alone. The intervals are over subjects: what another seed of the fine-tuning does is not in them.",
        [arm_table(demo)],
        [(compared(demo, task, scores, given), f"{given}, the test subject of median gain") for given in (COMPLETE, WITHOUT)],
    )
    # a subject that has every series and shows every label
    subjects = pd.read_csv(task / "cases.csv")
    series = [c for c in subjects.columns if c not in ("case", "split", "enhancing")]
    full = subjects[(subjects["split"] == "Tr") & subjects[series].all(axis=1) & subjects["enhancing"].astype(bool)]
    case = task / "imagesTr" / f"{full['case'].iloc[0]}.nii.gz"
    page.section(
        "The phantom",
        "One training subject. Oedema shows in FLAIR, the tumour's rim in T1ce only; the ventricles' fluid is as bright as that "
        "between the folds of the brain, so that only its place tells it. One series in ten is missing.",
        images=[(phantom_picture(case, demo.folder / "phantom.png"), case.name)],
    )
    decisions = [(name, value, reason) for name, (value, reason) in csm["reasons"].items()]
    page.section(
        "The plan",
        "Written by the planner from nnU-Net's fingerprint.",
        [Table(pd.DataFrame(decisions, columns=["decision", "value", "reason"]))],
    )
    pictures = sorted((pretraining / "reconstructions").glob("*.png"))
    page.section(
        "Pretraining",
        f"On series hidden whole, where another series is visible, the mean squared error is {whole['network']:.3f}; "
        f"the best voxel-wise linear map (ridge regression on the series visible at the voxel) reaches {whole['linear']:.3f}, "
        f"that of whole tokens {whole['token_linear']:.3f}, the mean {whole['mean']:.3f}. "
        "Subjects that nothing learned from, foreground voxels, z-scored units.",
        [Table(errors)],
        [
            (pretraining / "progress.png", "Loss, errors, learning rate and speed"),
            *((p, p.stem) for p in (*pictures[:1], *pictures[-2:])),
        ],
    )
    curves = [(demo.results("nnUNetTrainerCSM", plans) / "progress.png", arm) for arm, plans in ARMS.items()]
    page.section("Fine-tuning", "nnU-Net's own progress pictures.", images=curves)
    page.section("Test subjects", "Mean Dice over labels.", [Table(per_subject(scores))])
    page.section("Time", facts=[(name, f"{t:.0f} s") for name, t in demo.times])
    return page


def compared(demo: Demo, task: Path, scores: pd.DataFrame, given: str) -> Path:
    """A picture of one test subject under both segmenters: the one of median gain among those that have the series shown."""
    has_series = pd.read_csv(task / "cases.csv").set_index("case")[SHOWN].astype(bool)
    shown = scores[has_series[scores.index]].xs(given, axis=1, level=1)
    gains = (shown["pretrained"] - shown["from scratch"]).sort_values()
    case = gains.index[len(gains) // 2]
    path = demo.folder / f"{case}_{given}.png".replace(" ", "_")
    image = demo.raw / "imagesTs" / f"{case}_{SPEC.series.index(SHOWN):04d}.nii.gz"
    predicted = {arm: demo.predicted(arm, given) / f"{case}.nii.gz" for arm in reversed(ARMS)}
    names = {value: name for name, value in load_json(str(demo.raw / "dataset.json"))["labels"].items()}
    dice = {arm: f"Dice {shown.loc[case, arm]:.2f}" for arm in ARMS}
    title = f"{case}, {given}"
    save_methods_of_case(path, image, task / "labelsTs" / f"{case}.nii.gz", predicted, names, title, dice)
    return path


def arm_table(demo: Demo) -> Table:
    """Mean Dice of each structure, a column for each segmenter and what it was given."""
    found = {
        f"{arm}, {given}": {
            name: one["mean"] for name, one in load_json(str(demo.predicted(arm, given) / "evaluation.json"))["dice"].items()
        }
        for given, arm in product((COMPLETE, WITHOUT), ARMS)
    }
    return Table(pd.DataFrame(found).rename_axis("structure").reset_index())


def per_subject(scores: pd.DataFrame) -> pd.DataFrame:
    return scores.set_axis([f"{arm}, {given}" for arm, given in scores.columns], axis=1).rename_axis("case").reset_index()


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
