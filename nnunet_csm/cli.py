"""`nnunet_csm`: commands beside nnU-Net's, with nnU-Net's flags."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from nnunet_csm import __version__, nnunet
from nnunet_csm.errors import exit_on_user_error
from nnunet_csm.plans import PLANS_NAME

PRETRAINER, FINETUNER = "nnUNetTrainerCSMPretrain", "nnUNetTrainerCSM"

# every command imports what it runs when it runs: `nnunet_csm --help` must not wait for torch


def env(args: argparse.Namespace) -> int:
    print(f"export {nnunet.TRAINER_VARIABLE}={shlex.quote(nnunet.trainer_path())}")
    return 0


def doctor(args: argparse.Namespace) -> int:
    from nnunet_csm.doctor import examine

    findings = []
    for finding in examine(args.d, args.c):
        findings.append(finding)
        print(finding, flush=True)
    missing = sum(bool(f.remedy) for f in findings)
    print(f"{missing} to look at" if missing else "all is well")
    return 0


def plan(args: argparse.Namespace) -> int:
    from nnunet_csm.planning.command import plan_dataset

    for dataset in args.d:
        plan_dataset(
            dataset,
            args.c,
            args.p,
            args.overwrite_plans_name,
            args.preset,
            args.series_alias,
            tuple(args.overwrite_patch_size) if args.overwrite_patch_size else None,
            tuple(args.overwrite_token_size) if args.overwrite_token_size else None,
        )
    return 0


def plan_and_preprocess(args: argparse.Namespace) -> int:
    from nnunet_csm.planning.command import check_raw

    for dataset in args.d:
        check_raw(dataset)
    flags = ["-d", *args.d, "-c", args.c, "-np", str(args.np), "-npfp", str(args.np)]
    flags += ["--verify_dataset_integrity"] if args.verify_dataset_integrity else []
    nnunet.run("nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_and_preprocess_entry", flags)
    return plan(args)


def train(args: argparse.Namespace) -> int:
    from nnunet_csm.training.segmentation import ENCODER_VARIABLE

    if getattr(args, "encoder", None):
        os.environ[ENCODER_VARIABLE] = args.encoder
    name = nnunet.dataset_name(args.d)
    nnunet.read_json(
        nnunet.folder("nnUNet_preprocessed") / name / f"{args.p}.json", f"plan with `nnunet_csm plan_and_preprocess -d {args.d}`"
    )
    for fold in args.f:
        flags = [name, args.c, fold, "-tr", args.tr, "-p", args.p, "-device", args.device, "-num_gpus", str(args.num_gpus)]
        flags += [f"--{flag}" for flag in ("c", "val", "npz") if getattr(args, f"flag_{flag}")]
        entry_point = "nnunetv2.run.run_training:run_training_entry"
        if len(args.f) == 1:
            nnunet.run(entry_point, flags)
        # nnU-Net's command can run once in a process: it sets the number of torch's threads
        elif code := nnunet.run_apart(entry_point, flags):
            return code
    return 0


def predict(args: argparse.Namespace) -> int:
    from nnunet_csm.inference.segmentation import check_before_prediction

    check_before_prediction(args.d, args.tr, args.p, args.c, args.f, args.i, args.chk)
    flags = ["-d", args.d, "-i", args.i, "-o", args.o, "-f", *args.f, "-tr", args.tr, "-p", args.p, "-c", args.c]
    flags += ["-device", args.device, "-chk", args.chk]
    flags += ["--save_probabilities"] if args.save_probabilities else []
    flags += ["--continue_prediction"] if args.continue_prediction else []
    nnunet.run("nnunetv2.inference.predict_from_raw_data:predict_entry_point", flags)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from nnunet_csm.evaluation.command import evaluate_dataset

    images = Path(args.images) if args.images else None
    evaluate_dataset(
        args.d, Path(args.ref), Path(args.pred), Path(args.o or args.pred), args.regions, args.overlays, images, args.np
    )
    return 0


def demo(args: argparse.Namespace) -> int:
    from nnunet_csm.demo import run_demo

    run_demo(Path(args.o), args.seed)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command; a `UserError` ends in exit code 2 without a traceback."""
    args = build_parser().parse_args(arguments)
    with exit_on_user_error():
        command: Callable[[argparse.Namespace], int] = args.run
        return command(args)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnunet_csm",
        description="Cross-series masking for nnU-Net v2: pretrain on unlabelled multi-series MRI, fine-tune on few labels.",
        epilog='Stock nnUNetv2_... commands do the same once `eval "$(nnunet_csm env)"` was run.',
    )
    parser.add_argument("--version", action="version", version=f"nnunet_csm {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int], what: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
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
        demo,
        "Run everything on a phantom, on two CPU cores, in minutes, with a summary page.",
        "nnunet_csm demo -o csm_demo",
    )
    p.add_argument("-o", default="csm_demo", help="output folder; holds the nnU-Net folders of the demo and summary.html")
    p.add_argument("-seed", type=int, default=0, help="seed of the phantom")

    add("env", env, "Print the export that lets stock nnUNetv2_... commands find our trainers.", 'eval "$(nnunet_csm env)"')

    p = add("doctor", doctor, "Check versions, folders, GPU, trainers, and what a dataset lacks.", "nnunet_csm doctor -d 21")
    p.add_argument("-d", help="dataset name or ID")
    p.add_argument("-c", default="3d_fullres", help="configuration")

    p = add("plan", plan, "Write CSM plans from nnU-Net's plans; preprocessed data is reused.", "nnunet_csm plan -d 21 -preset S")
    _add_planning(p)

    p = add(
        "plan_and_preprocess",
        plan_and_preprocess,
        "nnU-Net's fingerprint, plans and preprocessing, then CSM plans.",
        "nnunet_csm plan_and_preprocess -d 21 -preset B",
    )
    _add_planning(p)
    p.add_argument("-np", type=int, default=min(8, os.cpu_count() or 1), help="processes")
    p.add_argument("--verify_dataset_integrity", action="store_true", help="nnU-Net's thorough check, reads every voxel")

    p = add("pretrain", train, "Pretrain the encoder on the images of a fold.", "nnunet_csm pretrain -d 21 -f 0 -device cpu")
    _add_training(p, PRETRAINER)

    p = add("finetune", train, "Fine-tune a segmenter from the pretrained encoder.", "nnunet_csm finetune -d 21 -f 0 1 2 --npz")
    _add_training(p, FINETUNER)
    p.add_argument("-encoder", help="auto (same fold), all (fold all), scratch, or a checkpoint; default: what the plans say")

    p = add(
        "predict",
        predict,
        "Segment images; nnUNetv2_predict after a check of the inputs.",
        "nnunet_csm predict -d 21 -f 0 -i in -o out",
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-i", required=True, help="input folder, with CASE_0000.nii.gz, CASE_0001.nii.gz ...")
    p.add_argument("-o", required=True, help="output folder")
    p.add_argument("-f", nargs="+", default=["0", "1", "2", "3", "4"], help="folds whose predictions are averaged")
    p.add_argument("-tr", default=FINETUNER, help="trainer")
    _add_common(p)
    p.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint name")
    p.add_argument("--save_probabilities", action="store_true", help="write probabilities beside the segmentations")
    p.add_argument("--continue_prediction", action="store_true", help="keep what is already there")

    p = add(
        "evaluate",
        evaluate,
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
    return parser


def _add_planning(p: argparse.ArgumentParser) -> None:
    p.add_argument("-d", nargs="+", required=True, help="dataset names or IDs")
    p.add_argument("-c", default="3d_fullres", help="configuration of nnU-Net's plans to build on")
    p.add_argument("-p", default="nnUNetPlans", help="nnU-Net's plans to build on")
    p.add_argument("-preset", default="B", help="demo, S, B, L, paper (chosen by the series), or the path of a preset file")
    p.add_argument("-overwrite_plans_name", default=PLANS_NAME, help="name of the new plans")
    p.add_argument("-overwrite_patch_size", nargs=3, type=int, metavar=("Z", "Y", "X"), help="patch size by hand")
    p.add_argument("-overwrite_token_size", nargs=3, type=int, metavar=("Z", "Y", "X"), help="token size by hand")
    p.add_argument(
        "-series_alias", nargs="+", default=[], metavar="GIVEN=NAME", help="series names the alias table does not know"
    )


def _add_training(p: argparse.ArgumentParser, trainer: str) -> None:
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-f", nargs="+", default=["0"], help="folds: 0 to 4, or all")
    p.add_argument("-tr", default=trainer, help="trainer")
    _add_common(p)
    p.add_argument("-num_gpus", type=int, default=1, help="number of GPUs")
    p.add_argument("--c", dest="flag_c", action="store_true", help="continue from the latest checkpoint")
    p.add_argument("--val", dest="flag_val", action="store_true", help="only run the final validation")
    p.add_argument("--npz", dest="flag_npz", action="store_true", help="save probabilities of the final validation")


def _add_common(p: argparse.ArgumentParser) -> None:
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-device", default="cuda", choices=("cuda", "cpu", "mps"), help="device")


if __name__ == "__main__":
    sys.exit(main())
