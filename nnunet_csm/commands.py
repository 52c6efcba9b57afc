"""What each subcommand does with its flags: one short function each, no logic."""

import argparse
import contextlib
import importlib
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.plans import JOINT_PLANS_NAME, PLANS_NAME, STOCK_PLANS_NAME

if TYPE_CHECKING:
    from nnunet_csm.planning.facts import Wishes
    from nnunet_csm.planning.request import PlanRequest

PRETRAINER, FINETUNER, CLASSIFIER = "nnUNetTrainerCSMPretrain", "nnUNetTrainerCSM", "nnUNetTrainerCSMClassifier"

# every command imports what it runs when it runs: `nnunet_csm --help` must not wait for torch


def env(args: argparse.Namespace) -> int:
    print(f"export {nnunet.TRAINER_VARIABLE}={shlex.quote(nnunet.trainer_path())}")
    return 0


def doctor(args: argparse.Namespace) -> int:
    from nnunet_csm.doctor import examine

    findings = []
    for finding in examine(args.d or (), args.c):
        findings.append(finding)
        print(finding, flush=True)
    missing = sum(bool(f.remedy) for f in findings)
    print(f"{missing} to look at" if missing else "all is well")
    unusable = [finding.remedy for finding in findings if finding.mark == "UNUSABLE"]
    if unusable:
        raise UserError("; ".join(unusable))
    return 2 if args.strict and any(f.remedy and f.mark != "optional" for f in findings) else 0


def fingerprint(args: argparse.Namespace) -> int:
    from nnunet_csm.fingerprint.command import fingerprint_dataset

    for dataset in args.d:
        fingerprint_dataset(dataset, args.series_alias, args.np, args.test_images, args.strict)
    return 0


def plan(args: argparse.Namespace) -> int:
    from nnunet_csm.planning.command import plan_datasets

    plan_datasets(args.d, *_asked(args))
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
    plan(args)
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


def train(args: argparse.Namespace) -> int:
    from nnunet_csm.training.ranks import leave, started

    with started(args.device, args.num_gpus) as ranks, contextlib.ExitStack() as stack:
        if ranks.rank:
            # what all ranks print alike is printed once
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        code = _train(args, ranks.num_ranks)
    return leave(ranks, code)


def _train(args: argparse.Namespace, num_ranks: int) -> int:
    from nnunet_csm.planning.preprocessing import check_plans

    for name in ("encoder", "download", "accumulate", "bank"):
        if getattr(args, name, None) is not None:
            # where nnU-Net's own commands take it from
            os.environ[f"nnUNet_csm_{name}"] = str(getattr(args, name))
    if num_ranks > 1 and len(args.f) > 1:
        raise UserError(f"torchrun and srun train one fold a call, -f names {len(args.f)}; call once for each")
    datasets = [args.d] if isinstance(args.d, str) else args.d
    plans_name = args.p or (PLANS_NAME if len(datasets) == 1 else JOINT_PLANS_NAME)
    name = check_plans(datasets, plans_name, args.c, finetuning=args.tr != PRETRAINER)
    for fold in args.f:
        flags = [name, args.c, fold, "-tr", args.tr, "-p", plans_name, "-device", args.device, "-num_gpus", str(args.num_gpus)]
        flags += [f"--{flag}" for flag in ("c", "val", "npz") if getattr(args, f"flag_{flag}")]
        entry_point = "nnunetv2.run.run_training:run_training_entry"
        if len(args.f) == 1:
            _run_ranks(entry_point, flags)
        # nnU-Net's command can run once in a process: it sets the number of torch's threads
        elif code := nnunet.run_apart(entry_point, flags):
            return code
    return 0


def _run_ranks(entry_point: str, flags: Sequence[str]) -> None:
    """Run nnU-Net's command, which starts a process for each of several GPUs.

    Raises:
        UserError: one of them ended without a word.
    """
    from torch.multiprocessing import ProcessExitedException

    try:
        nnunet.run(entry_point, flags)
    except ProcessExitedException as error:
        if error.exit_code == 2:
            # it has said why
            raise SystemExit(2) from None
        how = error.signal_name or f"exit code {error.exit_code}"
        raise UserError(
            f"rank {error.error_index} ended with {how}, and the others with it; see why, then go on from the latest checkpoint "
            f"with --c, on any number of ranks"
        ) from None


def predict(args: argparse.Namespace) -> int:
    if args.fill_missing_only:
        return _fill_missing(args)
    if given := [f"--{flag}" for flag in ("copy", "keep_copies", "overwrite") if getattr(args, flag)]:
        raise UserError(f"{', '.join(given)}: only with --fill_missing_only; predict replaces what is in -o by itself")
    from nnunet_csm.inference.segmentation import PredictRequest
    from nnunet_csm.inference.segmentation import predict as run_segmenter

    run_segmenter(
        PredictRequest(
            **_model_flags(args),
            images=Path(args.i),
            output=Path(args.o),
            step_size=args.step_size,
            mirroring=not args.disable_tta,
            save_probabilities=args.save_probabilities,
            continue_prediction=args.continue_prediction,
            num_preprocessing=args.npp,
            num_export=args.nps,
            num_parts=args.num_parts,
            part_id=args.part_id,
            on_device=not args.not_on_device,
            progress_bar=not args.disable_progress_bar,
        )
    )
    return 0


def _fill_missing(args: argparse.Namespace) -> int:
    """Complete images for stock prediction."""
    from nnunet_csm.inference.missing import fill_missing
    from nnunet_csm.raw.check import load_dataset_json

    name = nnunet.dataset_name(args.d)
    folders = [nnunet.folder(variable) / name for variable in ("nnUNet_preprocessed", "nnUNet_raw")]
    described = load_dataset_json(next((f for f in folders if os.path.lexists(f / "dataset.json")), folders[-1]))
    names, ending = nnunet.channel_names(described), described["file_ending"]
    for line in fill_missing(Path(args.i), Path(args.o), names, ending, not args.keep_copies, args.copy, args.overwrite):
        print(line)
    return 0


def classify(args: argparse.Namespace) -> int:
    from nnunet_csm.inference.classification import ClassifyRequest
    from nnunet_csm.inference.classification import classify as run_classifier

    request = ClassifyRequest(
        **_model_flags(args),
        images=Path(args.i),
        masks=Path(args.m),
        output=Path(args.o),
        maps=args.maps,
        strict=args.strict,
        overwrite=args.overwrite,
    )
    for line in run_classifier(request):
        print(line)
    return 0


def embed(args: argparse.Namespace) -> int:
    from nnunet_csm.inference.embedding import EmbedRequest
    from nnunet_csm.inference.embedding import embed as run_encoder

    request = EmbedRequest(
        **_model_flags(args),
        images=Path(args.i),
        output=Path(args.o),
        encoder=Path(args.encoder) if args.encoder else None,
        series=tuple(args.series) if args.series else None,
        masks=Path(args.m) if args.m else None,
        dense=args.dense,
        untrained=args.untrained,
        step_size=args.step_size,
        overwrite=args.overwrite,
    )
    for line in run_encoder(request):
        print(line)
    return 0


def impute(args: argparse.Namespace) -> int:
    from nnunet_csm.inference.imputation import ImputeRequest
    from nnunet_csm.inference.imputation import impute as run_imputation

    request = ImputeRequest(
        **_model_flags(args),
        images=Path(args.i),
        output=Path(args.o),
        series=tuple(args.series) if args.series else None,
        num_draws=args.draws,
        z_scores=args.z_scores,
        score=args.score,
        for_prediction=args.for_prediction,
        step_size=args.step_size,
        overwrite=args.overwrite,
    )
    for line in run_imputation(request):
        print(line)
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


def _model_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that name a trained model, and its device."""
    return {
        "dataset": args.d or "",
        "trainer": args.tr,
        "plans": args.p,
        "configuration": args.c,
        "folds": tuple(args.f or ()),
        "checkpoint_name": args.chk,
        "device": args.device,
    }


def evaluate(args: argparse.Namespace) -> int:
    from nnunet_csm.evaluation.command import evaluate_dataset
    from nnunet_csm.heads.runs import evaluate_runs

    paths, output = [Path(path) for path in args.pred], Path(args.o) if args.o else None
    kinds = {path.suffix == ".csv" for path in paths}
    given = {name for name in ("d", "ref", "regions", "images", "against") if getattr(args, name)}
    if kinds == {True} and given <= {"against"}:
        evaluate_runs(paths, [Path(path) for path in args.against], output)
    elif kinds == {False} and len(paths) == 1 and {"d", "ref"} <= given and "against" not in given:
        images = Path(args.images) if args.images else None
        evaluate_dataset(args.d, Path(args.ref), paths[0], output or paths[0], args.regions, args.overlays, images, args.np)
    else:
        found = " ".join(["-pred", *args.pred, *(f"-{name}" for name in sorted(given))])
        known = "one folder of segmentations, with -d and -ref, or CSV files of a classifier, alone or with -against"
        raise UserError(f"{found}: give -pred {known}")
    return 0


def convert(args: argparse.Namespace) -> int:
    options = {name: getattr(args, name, None) for name in ("regions", "task", "labels", "class_column", "mask")}
    # installed beside the package, see setup.py
    importlib.import_module("nnunet_csm.dataset_conversion").convert(
        args.format,
        Path(args.i),
        Path(args.o) if args.o else nnunet.folder("nnUNet_raw"),
        args.dataset_id,
        args.name,
        {name: value for name, value in options.items() if value not in (None, False)},
        reference=args.reference,
        register=args.register,
        zero_background=args.zero_background,
        overwrite=args.overwrite,
        strict=args.strict,
        num_processes=args.np,
    )
    return 0


def convert_to_msd(args: argparse.Namespace) -> int:
    predictions, tasks = [Path(i) for i in args.i], [Path(task) for task in args.task]
    to_msd = importlib.import_module("nnunet_csm.dataset_conversion.to_msd")
    to_msd.write(predictions, Path(args.o), tasks, args.labels_from, args.leave_out, args.overwrite)
    return 0


def export_weights(args: argparse.Namespace) -> int:
    from nnunet_csm.sharing.export import ExportRequest
    from nnunet_csm.sharing.export import export_weights as run_export

    given = argparse.Namespace(**{**vars(args), "f": args.f and [args.f], "device": "cpu"})
    chosen = {"output": Path(args.o), "overwrite": args.overwrite, "onnx": args.onnx, "case_names": args.case_names}
    for line in run_export(ExportRequest(**_model_flags(given), **chosen)):
        print(line)
    return 0


def container(args: argparse.Namespace) -> int:
    from nnunet_csm.sharing.container import ContainerRequest, write_container

    given = argparse.Namespace(**{**vars(args), "device": "cuda" if args.gpu else "cpu"})
    chosen = {"interface": args.interface, "output": Path(args.o), "overwrite": args.overwrite}
    for line in write_container(ContainerRequest(**_model_flags(given), **chosen)):
        print(line)
    return 0


def import_weights(args: argparse.Namespace) -> int:
    from nnunet_csm.sharing.others import import_weights as run_import

    for line in run_import(args.origin, Path(args.i), Path(args.o), args.overwrite):
        print(line)
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

    text = told(args.d, args.p, args.c, args.tr)
    if args.o is None:
        print(text)
        return 0
    write_text(Path(args.o), text)
    print(f"written to {args.o}; what stands in [...] is for the authors")
    return 0


def demo(args: argparse.Namespace) -> int:
    from nnunet_csm.demo import run_demo

    run_demo(Path(args.o), args.seed)
    return 0
