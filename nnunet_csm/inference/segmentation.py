"""What is checked before nnU-Net predicts: its own errors come late, after files were written."""

from collections.abc import Sequence
from pathlib import Path

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.model.transfer import read_encoder
from nnunet_csm.plans import read_architecture
from nnunet_csm.raw.check import check_inputs


def check_before_prediction(
    dataset: str, trainer: str, plans: str, configuration: str, folds: Sequence[str], inputs: str, checkpoint_name: str
) -> None:
    """Look for the model's files and at the headers of all inputs.

    Raises:
        UserError: a fold that was not trained, a case that lacks a channel file, or series of different shapes.
    """
    name = nnunet.dataset_name(dataset)
    model = nnunet.folder("nnUNet_results") / name / f"{trainer}__{plans}__{configuration}"
    remedy = f"train with `nnunet_csm finetune -d {dataset} -f {' '.join(folds)}`, or choose trained folds with -f"
    paths = [model / f"fold_{fold}" / checkpoint_name for fold in folds]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint; {remedy}")
    plans_file = model / "plans.json"
    expected = read_architecture(nnunet.read_json(plans_file, remedy), configuration, str(plans_file))
    for path in paths:
        found = read_encoder(str(path)).architecture
        if found != expected:
            raise UserError(f"{path}: a network with {found}, {plans_file} says {expected}; {remedy}")
    dataset_json = nnunet.read_json(model / "dataset.json", remedy)
    for line in check_inputs(Path(inputs), nnunet.channel_names(dataset_json), dataset_json["file_ending"]):
        print(line)
