"""`nnunet_csm`: commands beside nnU-Net's, with nnU-Net's flags."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from nnunet_csm import __version__, commands, nnunet
from nnunet_csm.commands import CLASSIFIER, FINETUNER, PRETRAINER
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.machine import num_cores
from nnunet_csm.plans import JOINT_PLANS_NAME, PLANS_NAME, STOCK_PLANS_NAME

NUM_PROCESSES = min(8, num_cores())
# nnU-Net's variables that hold one
NUMBERS = ("nnUNet_def_n_proc", "nnUNet_n_proc_DA", "nnUNet_npp", "nnUNet_nps")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command; a `UserError` ends in exit code 2 without a traceback."""
    args = build_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show a sign must not end what took hours
            stream.reconfigure(errors="replace")
    with exit_on_user_error():
        for variable in NUMBERS:
            if not (value := os.environ.get(variable) or "0").isdigit():
                raise UserError(f"the environment variable {variable} is {value!r}, expected a whole number; correct or unset it")
        command: Callable[[argparse.Namespace], int] = args.run
        if command not in (commands.convert, commands.doctor):
            # a mistyped dataset need not wait for what the command imports
            given = getattr(args, "d", None) or []
            for name in [given] if isinstance(given, str) else given:
                nnunet.dataset_name(name)
        return command(args)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnunet_csm",
        description="Cross-series masking for nnU-Net v2: pretrain on unlabelled multi-series MRI, fine-tune on few labels.",
        epilog='Stock nnUNetv2_... commands do the same once `eval "$(nnunet_csm env)"` was run.',
    )
    parser.add_argument("--version", action="version", version=f"nnunet_csm {__version__}")
    subcommands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], what: str, example: str) -> argparse.ArgumentParser:
        command = subcommands.add_parser(
            name,
            help=what,
            description=what,
            epilog=f"Example: {example}",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    p = add(
        "demo",
        commands.demo,
        "Run everything on a phantom, on two CPU cores, in minutes, with a summary page.",
        "nnunet_csm demo -o csm_demo",
    )
    p.add_argument("-o", default="csm_demo", help="output folder; holds the nnU-Net folders of the demo and summary.html")
    p.add_argument("-seed", type=int, default=0, help="seed of the phantom")

    add(
        "env",
        commands.env,
        "Print the export that lets stock nnUNetv2_... commands find our trainers.",
        'eval "$(nnunet_csm env)"',
    )

    p = add(
        "doctor", commands.doctor, "Check versions, folders, GPU, trainers, and what a dataset lacks.", "nnunet_csm doctor -d 21"
    )
    p.add_argument("-d", help="dataset name or ID")
    p.add_argument("-c", default="3d_fullres", help="configuration")

    p = add(
        "convert",
        commands.convert,
        "A release to an nnU-Net raw dataset: series on one grid, zeros for missing ones, a manifest, splits by patient.",
        "nnunet_csm convert table -i series.csv -d 501 -name Prostate -reference T2w",
    )
    p.add_argument(
        "format",
        choices=("bt_msd", "prostate158", "breast2023", "picai", "table", "bids"),
        help="what is read; docs/conversion.md shows the layout of each",
    )
    p.add_argument("-i", required=True, help="folder of the release; for table, the CSV or TSV file")
    p.add_argument("-d", type=int, required=True, help="ID of the new dataset, 1 to 999")
    p.add_argument("-o", help="where the dataset goes; default: nnUNet_raw")
    p.add_argument("-name", help="name of the new dataset; default: that of the format")
    p.add_argument("-reference", default="finest", help="series whose grid a case gets, or finest")
    p.add_argument("--register", action="store_true", help="move every series rigidly onto the reference where that helps")
    p.add_argument("--overwrite", action="store_true", help="replace a dataset of this name, once the new one is complete")
    p.add_argument("--strict", action="store_true", help="a case that cannot be used is an error, not left out with a report")
    p.add_argument("-np", type=int, default=NUM_PROCESSES, help="processes")
    p.add_argument("-regions", action="store_true", help="bt_msd: overlapping regions WT, TC, ET instead of labels")
    p.add_argument("-task", help="prostate158: prostate, zones or tumor; picai: both, gland or lesion")
    p.add_argument("-labels", nargs="+", metavar="NAME=VALUE", help="table, bids: what the values of the masks mean")
    p.add_argument("-class_column", help="bids: column of participants.tsv with the class")
    p.add_argument("-mask", help="bids: which mask of the derivatives; none for no mask")

    p = add(
        "fingerprint",
        commands.fingerprint,
        "Which series every case has, copies in place of missing ones, intensities, geometry, misaligned series; with a picture.",
        "nnunet_csm fingerprint -d 21 -np 8",
    )
    p.add_argument("-d", nargs="+", required=True, help="dataset names or IDs")
    _add_reading(p)

    p = add(
        "plan",
        commands.plan,
        "Write CSM plans from nnU-Net's plans and the fingerprint; preprocessed data is reused.",
        "nnunet_csm plan -d 21 -gpu_memory_target 40",
    )
    _add_planning(p)

    p = add(
        "classification_check",
        commands.classification_check,
        "Count a dataset's classes by fold and say what is wrong with its classification.csv.",
        "nnunet_csm classification_check -d 21",
    )
    p.add_argument("-d", nargs="+", required=True, help="dataset names or IDs")
    p.add_argument("--strict", action="store_true", help="anything wrong is an error")

    p = add(
        "split",
        commands.split,
        "Write splits_final.json by patient and class: five folds, or repeats of 8:1:1 as in the paper.",
        "nnunet_csm split -d 21 -repeats 10",
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-repeats", type=int, help="this many random splits of 8:1:1 into train, val and test; default: five folds")
    p.add_argument("-seed", type=int, default=12345, help="seed of the splits")
    p.add_argument("--overwrite", action="store_true", help="replace splits that are there")

    p = add(
        "preprocess",
        commands.preprocess,
        "Make the preprocessed images that CSM plans need and that are not there: for joint plans, or without labels.",
        "nnunet_csm preprocess -d 1 21 -p nnUNetCSMJointPlans",
    )
    p.add_argument("-d", nargs="+", required=True, help="dataset names or IDs")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-np", type=int, default=NUM_PROCESSES, help="processes")
    p.add_argument("--overwrite", action="store_true", help="preprocess labelled cases again that are already there")

    p = add(
        "plan_and_preprocess",
        commands.plan_and_preprocess,
        "nnU-Net's fingerprint, plans and preprocessing, then CSM plans; for datasets without labels as well.",
        "nnunet_csm plan_and_preprocess -d 21 -preset B",
    )
    _add_planning(p)
    p.add_argument("--verify_dataset_integrity", action="store_true", help="nnU-Net's thorough check, reads every voxel")

    p = add(
        "pretrain",
        commands.train,
        "Pretrain the encoder on the images of a fold; with joint plans on several datasets, the first of which owns the run.",
        "nnunet_csm pretrain -d 21 -f 0 -device cpu",
    )
    p.add_argument("-d", nargs="+", required=True, help="dataset name or ID; several for joint plans")
    _add_training(p, PRETRAINER)
    p.add_argument(
        "-bank",
        choices=("auto", "gpu", "mapped"),
        help="where the volumes are kept (nnUNet_csm_bank); default: the fastest place they fit in. nnUNet_csm_graphs=f: no "
        "CUDA graphs",
    )

    p = add(
        "finetune",
        commands.train,
        f"Fine-tune a segmenter from the pretrained encoder; with -tr {CLASSIFIER} a classifier.",
        "nnunet_csm finetune -d 21 -f 0 1 2 --npz",
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    _add_training(p, FINETUNER)
    p.add_argument(
        "-encoder",
        help="auto (same fold), all (fold all), scratch, or a checkpoint (nnUNet_csm_encoder); default: what the plans say",
    )

    p = add(
        "predict",
        commands.predict,
        "Segment images as nnUNetv2_predict does, in less time, with a check of the inputs; a case may lack series.",
        "nnunet_csm predict -d 21 -f 0 -i in -o out",
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-i", required=True, help="input folder, with CASE_0000.nii.gz, CASE_0001.nii.gz ...")
    p.add_argument("-o", required=True, help="output folder")
    p.add_argument("-f", nargs="+", default=["0", "1", "2", "3", "4"], help="folds whose predictions are averaged")
    p.add_argument("-tr", default=FINETUNER, help="trainer")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device")
    p.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint name")
    p.add_argument("--save_probabilities", action="store_true", help="write probabilities beside the segmentations")
    p.add_argument("--continue_prediction", action="store_true", help="keep what is already there")
    p.add_argument("-step_size", type=float, default=0.5, help="from tile to tile, as a share of the patch")
    p.add_argument("--disable_tta", action="store_true", help="no mirrored passes: faster, less accurate")
    # nnU-Net's own defaults; `main` says when a variable is no number
    npp, nps = (int(given) if (given := os.environ.get(name, "")).isdigit() else 3 for name in ("nnUNet_npp", "nnUNet_nps"))
    p.add_argument("-npp", type=int, default=npp, help="processes for preprocessing; 0, with -nps 0: all in one process")
    p.add_argument("-nps", type=int, default=nps, help="processes for resampling and export")
    p.add_argument("-num_parts", type=int, default=1, help="number of calls that share the cases")
    p.add_argument("-part_id", type=int, default=0, help="number of this call, from 0")
    p.add_argument("--not_on_device", action="store_true", help="keep image and results in the CPU's memory")
    p.add_argument("--disable_progress_bar", action="store_true", help="no progress bar")

    p = add(
        "classify",
        commands.classify,
        "Probabilities of the classes, from images and masks; with maps of what drove them, series by series.",
        "nnunet_csm classify -d 21 -f 0 1 2 3 4 -i images -m masks -o predictions.csv --maps",
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-i", required=True, help="folder with CASE_0000.nii.gz, CASE_0001.nii.gz ..., as far as a case has them")
    p.add_argument("-m", required=True, help="folder with CASE.nii.gz: masks, such as nnunet_csm predict writes")
    p.add_argument("-o", required=True, help="CSV to write; a JSON beside it tells checkpoints, hashes and software")
    p.add_argument("-f", nargs="+", default=["0", "1", "2", "3", "4"], help="folds whose probabilities are averaged")
    p.add_argument("-tr", default=CLASSIFIER, help="trainer")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint name")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device")
    p.add_argument("--maps", action="store_true", help="also NIfTI and pictures of what drove each decision, by series")
    p.add_argument("--strict", action="store_true", help="a case without a usable mask is an error, not a line in a report")
    p.add_argument("--overwrite", action="store_true", help="replace what is there")

    p = add(
        "fill_missing",
        commands.fill_missing,
        "Write zeros for series that cases lack, or hold a copy in place of, so that stock nnUNetv2_predict reads them.",
        "nnunet_csm fill_missing -d 21 -i images -o images_filled",
    )
    p.add_argument("-d", required=True, help="dataset name or ID: tells the channels and the file ending")
    p.add_argument("-i", required=True, help="input folder, with CASE_0000.nii.gz, CASE_0001.nii.gz ... as far as they are there")
    p.add_argument("-o", required=True, help="output folder; files that are there are linked")
    p.add_argument("--copy", action="store_true", help="copy files instead of linking them")
    p.add_argument("--keep_copies", action="store_true", help="do not take copies of another series for missing series")
    p.add_argument("--overwrite", action="store_true", help="replace the output folder")

    p = add(
        "export_msd",
        commands.export_msd,
        "Pack predictions as the Medical Segmentation Decathlon wants them, after checking every case.",
        "nnunet_csm export_msd -i out -o submission.zip -task Task01_BrainTumour",
    )
    p.add_argument("-i", nargs="+", required=True, help="folders written by nnUNetv2_predict, one for each task")
    p.add_argument("-o", required=True, help="archive to write, ending in .zip")
    p.add_argument("-task", nargs="+", required=True, help="the decathlon's task folders, in the order of -i")
    p.add_argument(
        "-labels_from",
        nargs="+",
        default=[],
        help="dataset.json, its folder, or an nnU-Net dataset, one for each task; default: beside the predictions",
    )
    p.add_argument("-leave_out", nargs="+", default=[], metavar="CASE", help="test cases not to be in the archive")
    p.add_argument("--overwrite", action="store_true", help="replace an archive of that name")

    p = add(
        "evaluate",
        commands.evaluate,
        "Score predictions per label and per region, with tables and overlay pictures.",
        "nnunet_csm evaluate -d 21 -ref labelsTs -pred out -images imagesTs",
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-ref", required=True, help="folder with reference segmentations")
    p.add_argument("-pred", required=True, help="folder with predictions")
    p.add_argument("-o", help="where the tables go; default: the folder of the predictions")
    p.add_argument("-regions", nargs="+", metavar="NAME=1,2", help="regions to score, instead of those the label names imply")
    p.add_argument("-np", type=int, default=1, help="processes; worth it for many large cases")
    p.add_argument("-images", help="folder with the images, for overlay pictures")
    p.add_argument("-overlays", type=int, default=5, help="number of overlay pictures, with -images")

    p = add(
        "evaluate_classes",
        commands.evaluate_classes,
        "Metrics of a classifier over folds or repeats, with intervals over patients, alone or against another training.",
        "nnunet_csm evaluate_classes -pred fold_?/test/predictions.csv -against scratch/fold_?/test/predictions.csv",
    )
    p.add_argument("-pred", nargs="+", required=True, metavar="CSV", help="predictions.csv of each fold or repeat")
    p.add_argument("-against", nargs="+", default=[], metavar="CSV", help="those of another training, in the same order")
    p.add_argument("-o", help="folder for metrics.md, .csv, .json and curves.png")

    p = add(
        "study",
        commands.study,
        "Run a table of methods, label shares and repeats; write it with intervals, as LaTeX and a page; go on where it was.",
        "nnunet_csm study table1 -d 1 -num_gpus 4 -dry_run",
    )
    p.add_argument("file", nargs="?", help="a shipped study, or the path of a JSON file; without it, the shipped ones are listed")
    p.add_argument("-d", help="dataset name or ID")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-o", help="folder of the study; default: study_NAME below the dataset's results")
    p.add_argument(
        "-preset", help="preset of all arms, instead of the study's: demo, S, B, L, few_labels, or the path of a preset file"
    )
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device")
    p.add_argument("-num_gpus", type=int, default=1, help="GPUs of this machine")
    p.add_argument("-jobs", type=int, default=1, help="runs at once on each GPU; on a CPU, or on a cluster, in all")
    p.add_argument(
        "-slurm",
        nargs="*",
        metavar="NAME=VALUE",
        help="every run is a job of SLURM (pip install 'nnunet_csm[slurm]'), with these parameters of submitit: "
        "slurm_partition=gpu timeout_min=600 cpus_per_task=8 ...",
    )
    p.add_argument("-dry_run", action="store_true", help="print the runs and what they will cost")
    p.add_argument("-report_only", action="store_true", help="tables and report of the runs that are done")
    return parser


def _add_reading(p: argparse.ArgumentParser) -> None:
    """How raw images are read."""
    p.add_argument("-np", type=int, default=NUM_PROCESSES, help="processes")
    p.add_argument("--test_images", action="store_true", help="take the images in imagesTs, too; their labels are never read")
    p.add_argument("--strict", action="store_true", help="an unusable file is an error, not a line in a report")
    p.add_argument(
        "-series_alias", nargs="+", default=[], metavar="GIVEN=NAME", help="series names the alias table does not know"
    )


def _add_planning(p: argparse.ArgumentParser) -> None:
    p.add_argument("-d", nargs="+", required=True, help="dataset names or IDs")
    p.add_argument("-c", default="3d_fullres", help="configuration of nnU-Net's plans to build on")
    p.add_argument("-p", default=STOCK_PLANS_NAME, help="nnU-Net's plans to build on")
    p.add_argument(
        "-preset",
        default="auto",
        help="auto (B, or S where memory asks for it), demo, S, B, L, few_labels, mae3d, paper (chosen by the series), or the "
        "path of a preset file",
    )
    p.add_argument("-gpu_memory_target", type=float, metavar="GB", help="GPU memory both trainings have to fit into")
    p.add_argument("--joint", action="store_true", help="one plan for all datasets, to pretrain on them together")
    p.add_argument("-series", nargs="+", metavar="NAME", help="use these series only")
    p.add_argument("-overwrite_plans_name", help=f"name of the new plans; default: {PLANS_NAME}, with --joint {JOINT_PLANS_NAME}")
    p.add_argument("-overwrite_patch_size", nargs=3, type=int, metavar=("Z", "Y", "X"), help="patch size by hand")
    p.add_argument("-overwrite_token_size", nargs=3, type=int, metavar=("Z", "Y", "X"), help="token size by hand")
    p.add_argument(
        "-overwrite_target_spacing",
        nargs=3,
        type=float,
        metavar=("Z", "Y", "X"),
        help="spacing in mm of a joint plan, by hand; default: that of the first dataset",
    )
    _add_reading(p)


def _add_training(p: argparse.ArgumentParser, trainer: str) -> None:
    p.add_argument("-f", nargs="+", default=["0"], help="folds: 0 to 4, or all")
    p.add_argument("-tr", default=trainer, help="trainer")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", help=f"plans; default: {PLANS_NAME}, for several datasets {JOINT_PLANS_NAME}")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device")
    p.add_argument("-num_gpus", type=int, default=1, help="GPUs of this machine; for several machines use torchrun or srun")
    p.add_argument("-accumulate", type=int, metavar="N", help="learn a batch in N parts, for less memory (nnUNet_csm_accumulate)")
    p.add_argument("--c", dest="flag_c", action="store_true", help="continue from the latest checkpoint")
    p.add_argument("--val", dest="flag_val", action="store_true", help="only run the final validation")
    p.add_argument("--npz", dest="flag_npz", action="store_true", help="save probabilities of the final validation")


if __name__ == "__main__":
    sys.exit(main())
