"""`nnunet_csm export_weights`: a trained network as a folder that tells nothing of patients."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_csm import checkpoint, weights_folder
from nnunet_csm.earlier_plans import brought_up
from nnunet_csm.errors import UserError
from nnunet_csm.files import whole_folder, write_text
from nnunet_csm.inference.request import ModelRequest
from nnunet_csm.model.transfer import read_encoder
from nnunet_csm.plans import configuration_of
from nnunet_csm.sharing.card import card
from nnunet_csm.weights_folder import CARD, CONFIG

# entries of a checkpoint that others can use; what only a run that goes on needs is left out
OF_A_NETWORK = (
    "trainer_name",
    "current_epoch",
    "software",
    "series",
    "target",
    "classes",
    "by_mask_label",
    "mask_labels",
    "inference_allowed_mirroring_axes",
)
OF_DATASET = ("channel_names", "modality", "labels", "regions_class_order", "file_ending", "numTraining")
OF_DATASET_IN_WORDS = ("description", "reference", "licence", "release")


@dataclass(frozen=True)
class ExportRequest(ModelRequest):
    """What is to be exported, and where to.

    Attributes:
        output: the folder to write.
        overwrite: replace it.
        onnx: also write `model.onnx`.
        case_names: tell the names of the cases that an encoder was learned from.
    """

    output: Path
    overwrite: bool = False
    onnx: bool = False
    case_names: bool = False


def export_weights(request: ExportRequest) -> list[str]:
    """Write a trained network into a folder, whole or not at all.

    Returns:
        What was written, in words.

    Raises:
        UserError: no such network, several of them, or one without an encoder of ours.
    """
    path = _checkpoint(request)
    saved = checkpoint.load(path)
    read_encoder(str(path))  # says why when there is none of ours in it
    weights, told = saved["network_weights"], for_others(saved, str(path), request.case_names)
    kind = "classifier" if "classes" in saved else "encoder" if "series" in saved else "segmenter"
    with whole_folder(request.output, request.overwrite) as folder:
        others = {}
        if request.onnx:
            from nnunet_csm.sharing.onnx_model import write_onnx

            others["onnx"] = write_onnx(kind, told, weights, folder / "model.onnx")
        weights_folder.write(folder, kind, method_of(saved, str(path)), told, weights, **others)
        described = weights_folder.describe(folder)
        write_text(folder / CARD, card(described, sum(tensor.numel() for tensor in weights.values()), path.parent))
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        names = ", ".join(sorted(file.name for file in folder.iterdir()))
    lines = [f"{request.output}: {kind} ({described.method}) of {path}; {names}; {size:.1f} MiB"]
    if not request.case_names:
        lines.append(
            "Names of cases and paths of this machine are left out; the names of the datasets, and what is said of them, are in"
        )
    lines.append(f"Before it is passed on: read {request.output / CARD}, choose a licence there, and look through {CONFIG}")
    return lines


def _checkpoint(request: ExportRequest) -> Path:
    request = request.of_trained_folds()
    paths = [request.model / f"fold_{fold}" / request.checkpoint_name for fold in request.folds]
    there = [path.parent.name.removeprefix("fold_") for path in paths if path.is_file()]
    if not there:
        raise UserError(f"{paths[0]}: no such checkpoint; train it, or name another with -tr, -p, -f and -chk")
    if len(paths) > 1:
        raise UserError(f"{request.model}: folds {', '.join(there)} are trained, expected one; name it with -f")
    return paths[0]


def method_of(saved: Mapping[str, Any], where: str) -> str:
    """What a network learned from, in words: the name of the pretext comes first."""
    init_args = saved["init_args"]
    entry = brought_up(configuration_of(init_args["plans"], init_args["configuration"], where))
    pretext = entry.get("csm", {}).get("pretext", {}).get("name", "none")
    source = saved.get("encoder_source")
    if source is None:
        return str(pretext)
    return "from scratch" if source == "scratch" else f"{pretext}, fine-tuned"


def for_others(saved: Mapping[str, Any], where: str, case_names: bool = False) -> dict[str, Any]:
    """What a checkpoint has beside its tensors, as far as others need it.

    Names of cases, paths of this machine and reasons of the planner, which may hold them, are not in it.

    Args:
        saved: the checkpoint.
        where: its path, for errors.
        case_names: keep those of the cases that an encoder was learned from.
    """
    init_args = saved["init_args"]
    plans, configuration, dataset_json = (init_args[name] for name in ("plans", "configuration", "dataset_json"))
    entry = copy.deepcopy({k: v for k, v in configuration_of(plans, configuration, where).items() if k != "inherits_from"})
    csm = entry.get("csm", {})
    csm |= {"reasons": {}, "preset": Path(csm.get("preset", "")).name}
    for source in csm.get("sources", ()):
        # without their names: prediction asks how often a series was a copy, see `inference.segmentation.copies_in_training`
        source["absent_series"] = {str(number): absent for number, absent in enumerate(source["absent_series"].values())}
    for block in ("finetuning", "classification"):
        if csm.get(block, {}).get("encoder") not in (None, "auto", "all", "scratch"):
            csm[block]["encoder"] = "auto"
    cases = saved.get("training_cases", ())
    words = {name: dataset_json[name] for name in OF_DATASET_IN_WORDS if isinstance(dataset_json.get(name), str)}
    return checkpoint.plain(
        {name: saved[name] for name in OF_A_NETWORK if name in saved}
        | {
            "init_args": {
                "plans": {**plans, "configurations": {configuration: entry}},
                "configuration": configuration,
                "fold": init_args.get("fold"),
                "dataset_json": {name: dataset_json[name] for name in OF_DATASET if name in dataset_json} | words,
            },
            "num_training_cases": dict(Counter(case.split("/")[0] for case in cases)),
        }
        | ({"training_cases": list(cases)} if case_names else {})
        | (
            {"encoder_source": "scratch" if saved["encoder_source"] == "scratch" else "pretrained"}
            if "encoder_source" in saved
            else {}
        )
    )
