"""Fingerprint, plans, splits, preprocessing."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nnunet_csm import nnunet
from nnunet_csm.cli.flags import NUM_PROCESSES, Commands
from nnunet_csm.errors import UserError
from nnunet_csm.plans import JOINT_PLANS_NAME, PLANS_NAME, STOCK_PLANS_NAME

if TYPE_CHECKING:
    from nnunet_csm.planning.facts import Wishes
    from nnunet_csm.planning.request import PlanRequest


def declare(commands: Commands) -> None:
    p = commands.add(
        "fingerprint",
        "Which series every case has, copies in place of missing ones, intensities, geometry, misaligned series; with a picture.",
        "nnunet_csm fingerprint -d 21 -np 8",
        fingerprint,
    )
    p.add_argument("-d", nargs="+", required=True, help="dataset names or IDs")
    _add_reading(p)

    p = commands.add(
        "plan",
        "Write CSM plans from nnU-Net's plans and the fingerprint; preprocessed data is reused.",
        "nnunet_csm plan -d 21 -gpu_memory_target 40",
        plan,
    )
    _add_planning(p)

    p = commands.add(
        "split",
        "Write splits_final.json by patient and class (or number): five folds, or repeats of 8:1:1 as in the paper.",
        "nnunet_csm split -d 21 -repeats 10",
        split,
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-repeats", type=int, help="this many random splits of 8:1:1 into train, val and test; default: five folds")
    p.add_argument("-seed", type=int, default=12345, help="seed of the splits")
    p.add_argument("--overwrite", action="store_true", help="replace splits that are there")

    p = commands.add(
        "plan_and_preprocess",
        "nnU-Net's fingerprint, plans and preprocessing, then CSM plans; for datasets without labels as well.",
        "nnunet_csm plan_and_preprocess -d 21 -preset B",
        plan_and_preprocess,
    )
    _add_planning(p)
    p.add_argument("--verify_dataset_integrity", action="store_true", help="nnU-Net's thorough check, reads every voxel")
    p.add_argument(
        "-preprocess_only",
        nargs="?",
        const=PLANS_NAME,
        metavar="PLANS",
        help=f"plan nothing: make the images that these CSM plans name and that are not there; without a name {PLANS_NAME}",
    )
    p.add_argument("--overwrite", action="store_true", help="also make again what is there")


def fingerprint(args: argparse.Namespace) -> int:
    from nnunet_csm.fingerprint.command import fingerprint_dataset

    for dataset in args.d:
        fingerprint_dataset(dataset, args.series_alias, args.np, args.test_images, args.strict)
    return 0


def plan(args: argparse.Namespace) -> int:
    from nnunet_csm.planning.command import plan_datasets

    for line in plan_datasets(args.d, *_asked(args)):
        print(line)
    return 0


def _asked(args: argparse.Namespace) -> tuple["PlanRequest", "Wishes"]:
    """The flags of planning."""
    from nnunet_csm.planning.facts import Wishes
    from nnunet_csm.planning.request import PlanRequest

    request = PlanRequest(
        configuration=args.c,
        base_plans_name=args.p,
        plans_name=_plans_name(args),
        aliases=tuple(args.series_alias),
        joint=args.joint,
        weights=tuple(args.weights or ()),
        test_images=args.test_images,
        target_spacing=tuple(args.overwrite_target_spacing) if args.overwrite_target_spacing else None,
        num_processes=args.np,
        strict=args.strict,
    )
    wishes = Wishes(
        preset=args.preset,
        patch_size=tuple(args.overwrite_patch_size) if args.overwrite_patch_size else None,
        token_size=tuple(args.overwrite_token_size) if args.overwrite_token_size else None,
        series=tuple(args.series) if args.series else None,
        gpu_memory_target=args.gpu_memory_target,
    )
    return request, wishes


def _plans_name(args: argparse.Namespace) -> str:
    return args.overwrite_plans_name or (JOINT_PLANS_NAME if args.joint else PLANS_NAME)


def split(args: argparse.Namespace) -> int:
    from nnunet_csm.planning.classification import split_dataset

    split_dataset(args.d, args.repeats, args.seed, args.overwrite)
    return 0


def plan_and_preprocess(args: argparse.Namespace) -> int:
    from nnunet_csm.planning.command import plan_datasets
    from nnunet_csm.planning.facts import Wishes
    from nnunet_csm.planning.preprocessing import preprocess_datasets, remeasured
    from nnunet_csm.planning.request import PlanRequest, check_raw, check_request, described
    from nnunet_csm.raw.check import has_labels

    asked = _asked(args)
    if args.preprocess_only:
        nothing = PlanRequest(args.c, STOCK_PLANS_NAME, PLANS_NAME, num_processes=args.np), Wishes()
        if asked != nothing or args.verify_dataset_integrity:
            raise UserError(
                "-preprocess_only takes plans as they are; give no flag of planning with it, or plan again without it"
            )
        preprocess_datasets(args.d, args.c, args.preprocess_only, args.np, args.overwrite)
        return 0
    # what is wrong with the images is said before what is wrong with a preset
    for name in dict.fromkeys(nnunet.dataset_name(dataset) for dataset in args.d):
        check_raw(name, args.np)
    names = check_request(args.d, *asked)
    if labelled := [name for name in names if has_labels(described(name)[0])]:
        for line in remeasured(labelled):
            print(line)
        _plan_and_preprocess_by_nnunet(labelled, args)
    plan_datasets(args.d, *asked)
    # what is not planned jointly was preprocessed by nnU-Net just now
    preprocess_datasets(names, args.c, _plans_name(args), args.np, args.overwrite and args.joint)
    return 0


def _plan_and_preprocess_by_nnunet(names: Sequence[str], args: argparse.Namespace) -> None:
    """nnU-Net's fingerprint, plans and data; for other plans than its default ones, which have planners of their own, data."""
    entry = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints"
    flags = ["-d", *(str(nnunet.dataset_id(name)) for name in names), "-c", args.c, "-np", str(args.np)]
    if args.p == STOCK_PLANS_NAME:
        flags += ["-npfp", str(args.np), *(["--verify_dataset_integrity"] if args.verify_dataset_integrity else [])]
        nnunet.run(f"{entry}:plan_and_preprocess_entry", [*flags, *(["--no_pp"] if args.joint else [])])
        return
    for name in names:
        path = nnunet.folder("nnUNet_preprocessed") / name / f"{args.p}.json"
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; make it with nnU-Net's planner of that name first, as nnUNetv2_plan_and_preprocess "
                f"-d {nnunet.dataset_id(name)} -pl nnUNetPlannerResEncM --no_pp makes nnUNetResEncUNetMPlans"
            )
    if not args.joint:
        nnunet.run(f"{entry}:preprocess_entry", [*flags, "-plans_name", args.p])


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
        help="auto (B, S where memory asks for it, cpu where there is no CUDA device), demo, cpu, S, B, L, few_labels, paper "
        "(chosen by the series), for comparison "
        "mae3d, dino, pcrlv2, vox2vec, ae, vae, vqvae, maesil, nemesis, unime, bm_mae, a2fseg, or the path of a preset file",
    )
    p.add_argument("-gpu_memory_target", type=float, metavar="GB", help="GPU memory both trainings have to fit into")
    p.add_argument("--joint", action="store_true", help="one plan for all datasets, to pretrain on them together")
    p.add_argument(
        "-weights", nargs="+", type=float, help="with --joint, for each dataset: how often one of its cases is drawn; default: 1"
    )
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
