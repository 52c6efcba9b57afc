"""Scores of segmentations, classes and features, whole studies, and how to report them."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from nnunet_csm.cli.flags import CLASSIFIER, FINETUNER, Commands
from nnunet_csm.errors import UserError
from nnunet_csm.plans import PLANS_NAME, STOCK_PLANS_NAME


def declare(commands: Commands) -> None:
    p = commands.add(
        "evaluate",
        "Score segmentations by label and region, with overlay pictures; or a classifier's tables, with intervals over patients.",
        "nnunet_csm evaluate -d 21 -ref labelsTs -pred out -images imagesTs",
        evaluate,
    )
    p.add_argument(
        "-pred", nargs="+", required=True, help="folder with segmentations; or the predictions.csv of each fold or repeat"
    )
    p.add_argument("-o", help="where tables and pictures go; default: the folder of the segmentations, for CSV files nowhere")
    masks = p.add_argument_group("a folder of segmentations, for which -d is needed, and -ref for scores, -images for pictures")
    masks.add_argument("-d", help="dataset name or ID")
    masks.add_argument("-ref", help="folder with reference segmentations; without it, pictures of the first cases alone")
    masks.add_argument("--chill", action="store_true", help="leave out references without a prediction, as nnU-Net's flag does")
    masks.add_argument("-regions", nargs="+", metavar="NAME=1,2", help="regions to score, instead of those the label names imply")
    masks.add_argument("-np", type=int, default=1, help="processes; worth it for many large cases")
    masks.add_argument("-images", help="folder with the images, for overlay pictures")
    masks.add_argument("-overlays", type=int, default=5, help="number of overlay pictures, with -images")
    tables = p.add_argument_group("a classifier's CSV files, as in -pred fold_?/test/predictions.csv")
    tables.add_argument("-against", nargs="+", default=[], metavar="CSV", help="those of another training, in the same order")

    p = commands.add(
        "probe",
        "What linear probes and nearest neighbours tell from embeddings: classes or numbers, patients whole, with intervals.",
        "nnunet_csm probe -i trained.parquet untrained.parquet -targets classification.csv -o probed",
        probe,
    )
    p.add_argument("-i", nargs="+", required=True, help="tables of nnunet_csm embed; all others are compared with the first")
    p.add_argument("-targets", required=True, help="CSV with case, a class or a value, optionally patient and a group")
    p.add_argument("-o", required=True, help="folder to write: tables, predictions, a picture")
    p.add_argument("-class_column", help="column of the classes; default: class or label, where there is one")
    p.add_argument("-value_column", help="column of numbers; default: value, where there is one and no class")
    p.add_argument("-group", metavar="COLUMN", help="also score by what this column says, such as site")
    p.add_argument("-folds", type=int, default=5, help="parts of the patients, each predicted by a probe of the others")
    p.add_argument("-repeats", type=int, default=5, help="divisions into folds")
    p.add_argument("-seed", type=int, default=12345, help="seed of the divisions")
    p.add_argument("--overwrite", action="store_true", help="replace the folder -o")

    p = commands.add(
        "study",
        "Run a table of methods, label shares and repeats; write it with intervals, as LaTeX and a page; go on where it was.",
        "nnunet_csm study table1 -d 1 -num_gpus 4 --dry_run",
        study,
    )
    p.add_argument(
        "file",
        nargs="?",
        help="a shipped study (`nnunet_csm study reconstruction -d 21`: what pretrainings rebuild, PSNR and SSIM), or the path "
        "of a JSON file; without it, the shipped ones are listed",
    )
    p.add_argument("-d", help="dataset name or ID")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=STOCK_PLANS_NAME, help="nnU-Net's plans that all arms build on")
    p.add_argument("-o", help="folder of the study; default: study_NAME below the dataset's results")
    p.add_argument(
        "-preset", help="preset of all arms, instead of the study's: demo, cpu, S, B, L, few_labels, or the path of a preset file"
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
    p.add_argument("--dry_run", "-dry_run", action="store_true", help="print the runs and what they will cost")
    p.add_argument("--report_only", "-report_only", action="store_true", help="tables and report of the runs that are done")

    p = commands.add(
        "cite",
        "A methods section, BibTeX and the CLAIM checklist, from plans and checkpoints; [...] marks what authors must say.",
        "nnunet_csm cite -d 21 -o methods.md",
        cite,
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-tr", default=FINETUNER, help=f"trainer; {CLASSIFIER} for a classifier")
    p.add_argument("-o", help="Markdown file to write; default: print it")
    p.add_argument("--overwrite", action="store_true", help="replace a file of that name")


def evaluate(args: argparse.Namespace) -> int:
    from nnunet_csm.evaluation.command import evaluate_dataset
    from nnunet_csm.heads.runs import evaluate_runs

    paths, output = [Path(path) for path in args.pred], Path(args.o) if args.o else None
    kinds = {path.suffix == ".csv" for path in paths}
    segmented = {"d", "ref", "regions", "images", "chill"}
    given = {name for name in (*segmented, "against") if getattr(args, name)}
    if kinds == {True} and given <= {"against"}:
        evaluate_runs(paths, [Path(path) for path in args.against], output)
    elif kinds == {False} and len(paths) == 1 and (given == {"d", "images"} or {"d", "ref"} <= given <= segmented):
        references, images = (Path(folder) if folder else None for folder in (args.ref, args.images))
        options = (args.regions, args.overlays, images, args.np, args.chill)
        evaluate_dataset(args.d, references, paths[0], output or paths[0], *options)
    else:
        found = " ".join(["-pred", *args.pred, *(f"--{name}" if name == "chill" else f"-{name}" for name in sorted(given))])
        one = "one folder of segmentations, with -d and -ref, or with -d and -images for pictures alone"
        raise UserError(f"{found}: give -pred {one}, or CSV files of a classifier, alone or with -against")
    return 0


def probe(args: argparse.Namespace) -> int:
    from nnunet_csm.evaluation.probe_command import ProbeRequest, probe_embeddings

    request = ProbeRequest(
        embeddings=tuple(Path(path) for path in args.i),
        targets=Path(args.targets),
        output=Path(args.o),
        class_column=args.class_column,
        value_column=args.value_column,
        group_column=args.group,
        num_folds=args.folds,
        num_repeats=args.repeats,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    print(probe_embeddings(request))
    return 0


def study(args: argparse.Namespace) -> int:
    from nnunet_csm.study.command import StudyRequest, list_studies, run_study

    if args.file is None:
        list_studies()
        return 0
    if args.d is None:
        raise UserError("which dataset? give -d; `nnunet_csm study` alone lists the studies")
    request = StudyRequest(
        study=args.file,
        preset=args.preset,
        plans=args.p,
        dataset=args.d,
        configuration=args.c,
        output=Path(args.o) if args.o else None,
        device=args.device,
        num_gpus=args.num_gpus,
        jobs=args.jobs,
        slurm=None if args.slurm is None else _parameters(args.slurm),
    )
    run_study(request, args.dry_run, args.report_only)
    return 0


def _parameters(given: Sequence[str]) -> dict[str, str | int]:
    """NAME=VALUE, numbers as numbers."""
    pairs = [one.partition("=") for one in given]
    if wrong := [name for name, equals, value in pairs if not (equals and name and value)]:
        raise UserError(f"-slurm {wrong[0]!r} is not of the form NAME=VALUE; write for example slurm_partition=gpu")
    return {name: int(value) if value.isdigit() else value for name, _, value in pairs}


def cite(args: argparse.Namespace) -> int:
    from nnunet_csm.citing.command import cite as told
    from nnunet_csm.files import write_text
    from nnunet_csm.inference.request import ModelRequest

    if args.o is not None:
        ModelRequest.check_output(Path(args.o), overwrite=args.overwrite)
    text = told(args.d, args.p, args.c, args.tr)
    if args.o is None:
        print(text)
        return 0
    write_text(Path(args.o), text)
    print(f"written to {args.o}; what stands in [...] is for the authors")
    return 0
