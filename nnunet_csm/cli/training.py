"""Pretraining and fine-tuning."""

import argparse
import contextlib
import os
from collections.abc import Sequence

from nnunet_csm import nnunet
from nnunet_csm.cli.flags import CLASSIFIER, FINETUNER, PRETRAINER, Commands
from nnunet_csm.errors import UserError
from nnunet_csm.plans import JOINT_PLANS_NAME, PLANS_NAME


def declare(commands: Commands) -> None:
    p = commands.add(
        "pretrain",
        "Pretrain the encoder on the images of a fold; with joint plans on several datasets, the first of which owns the run.",
        "nnunet_csm pretrain -d 21 -f 0 -device cpu",
        train,
    )
    p.add_argument("-d", nargs="+", required=True, help="dataset name or ID; several for joint plans")
    _add_training(p, PRETRAINER)
    p.add_argument(
        "-bank",
        choices=("auto", "gpu", "mapped"),
        help="where the volumes are kept (nnUNet_csm_bank); default: the fastest place they fit in. nnUNet_csm_graphs=f: no "
        "CUDA graphs",
    )

    p = commands.add(
        "finetune",
        f"Fine-tune a segmenter from the pretrained encoder; with -tr {CLASSIFIER} a classifier.",
        "nnunet_csm finetune -d 21 -f 0 1 2 --npz",
        train,
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    _add_training(p, FINETUNER)
    p.add_argument(
        "-encoder",
        help="auto (same fold), all (fold all), scratch, a checkpoint, a folder of export_weights, or OWNER/NAME in the cache of "
        "Hugging Face's hub (nnUNet_csm_encoder); default: what the plans say",
    )
    p.add_argument(
        "--download",
        action="store_const",
        const="1",
        help="fetch OWNER/NAME from the hub where the cache has it not (nnUNet_csm_download=1)",
    )


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
