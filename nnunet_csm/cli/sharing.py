"""Trained networks on their way to others, and theirs to us."""

import argparse
from pathlib import Path

from nnunet_csm.cli.flags import CLASSIFIER, FINETUNER, PRETRAINER, Commands, add_model, model_flags
from nnunet_csm.plans import PLANS_NAME


def declare(commands: Commands) -> None:
    p = commands.add(
        "export_weights",
        "A trained network as a folder that loads elsewhere: safetensors, JSON, a model card; with --onnx for other runtimes.",
        "nnunet_csm export_weights -d 21 -f 0 -o weights",
        export_weights,
    )
    p.add_argument("-d", required=True, help="dataset name or ID")
    p.add_argument("-f", help="fold; needed where several are trained")
    p.add_argument("-tr", default=PRETRAINER, help=f"trainer; {FINETUNER} for a segmenter, {CLASSIFIER} for a classifier")
    p.add_argument("-c", default="3d_fullres", help="configuration")
    p.add_argument("-p", default=PLANS_NAME, help="plans")
    p.add_argument("-chk", default="checkpoint_final.pth", help="checkpoint name")
    p.add_argument("-o", required=True, help="folder to write")
    p.add_argument(
        "--onnx", action="store_true", help="also model.onnx, of a segmenter or classifier, compared with the original"
    )
    p.add_argument(
        "--case_names", action="store_true", help="tell which cases were learned from, so that scores on them are warned of"
    )
    p.add_argument("--overwrite", action="store_true", help="replace the folder -o")

    p = commands.add(
        "container",
        "A folder from which a container (Docker, Podman, Apptainer) with a trained model is built.",
        "nnunet_csm container -d 21 -f 0 -o container",
        container,
    )
    add_model(p, FINETUNER, device=False)
    p.add_argument("-o", required=True, help="folder to write")
    p.add_argument(
        "-interface",
        default="plain",
        choices=("plain", "fomo26", "grand-challenge"),
        help="what the container is given and gives: folders named as nnU-Net's, or one case as these challenges do",
    )
    p.add_argument("--gpu", action="store_true", help="with CUDA, for a GPU; default: without, for CPUs")
    p.add_argument("--overwrite", action="store_true", help="replace the folder -o")

    p = commands.add(
        "import_weights",
        "A pretrained encoder of others as such a folder, for finetune -encoder; all of its tensors, or an error.",
        "nnunet_csm import_weights -from bm_mae -i bmmae.pth -o bm_mae",
        import_weights,
    )
    p.add_argument("-from", dest="origin", required=True, choices=("bm_mae",), help="whose it is")
    p.add_argument("-i", required=True, help="their file, of torch.save or safetensors")
    p.add_argument("-o", required=True, help="folder to write")
    p.add_argument("--overwrite", action="store_true", help="replace the folder -o")


def export_weights(args: argparse.Namespace) -> int:
    from nnunet_csm.sharing.export import ExportRequest
    from nnunet_csm.sharing.export import export_weights as run_export

    given = argparse.Namespace(**{**vars(args), "f": args.f and [args.f], "device": "cpu"})
    chosen = {"output": Path(args.o), "overwrite": args.overwrite, "onnx": args.onnx, "case_names": args.case_names}
    for line in run_export(ExportRequest(**model_flags(given), **chosen)):
        print(line)
    return 0


def container(args: argparse.Namespace) -> int:
    from nnunet_csm.sharing.container import ContainerRequest, write_container

    given = argparse.Namespace(**{**vars(args), "device": "cuda" if args.gpu else "cpu"})
    chosen = {"interface": args.interface, "output": Path(args.o), "overwrite": args.overwrite}
    for line in write_container(ContainerRequest(**model_flags(given), **chosen)):
        print(line)
    return 0


def import_weights(args: argparse.Namespace) -> int:
    from nnunet_csm.sharing.others import import_weights as run_import

    for line in run_import(args.origin, Path(args.i), Path(args.o), args.overwrite):
        print(line)
    return 0
