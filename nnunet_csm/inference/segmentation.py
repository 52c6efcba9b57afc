"""What is checked and completed before nnU-Net predicts: its own errors come late, after files were written."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.inference.missing import fill_missing
from nnunet_csm.model.transfer import read_encoder
from nnunet_csm.plans import Configuration, read_architecture, read_configuration
from nnunet_csm.raw.check import check_inputs
from nnunet_csm.raw.volumes import READABLE_ENDINGS


def check_before_prediction(
    dataset: str, trainer: str, plans: str, configuration: str, folds: Sequence[str], checkpoint_name: str
) -> tuple[dict[str, Any], Configuration]:
    """Look for the model's files.

    Returns:
        dataset.json of the model, and its settings.

    Raises:
        UserError: a fold that was not trained, or with another network than the plans have.
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
    settings = read_configuration(nnunet.read_json(plans_file, remedy), configuration, str(plans_file))
    return nnunet.read_json(model / "dataset.json", remedy), settings


@contextmanager
def complete_cases(inputs: Path, dataset_json: Mapping[str, Any], settings: Configuration) -> Iterator[Path]:
    """A temporary folder with the images of all cases, zeros for series that a case lacks or has a copy of another in place of.

    Raises:
        UserError: no case, a channel the model does not have, or series of different shapes.
    """
    names, ending = nnunet.channel_names(dataset_json), dataset_json["file_ending"]
    with TemporaryDirectory(prefix="nnunet_csm_") as temporary:
        folder = inputs
        if ending in READABLE_ENDINGS:
            folder = Path(temporary) / "images"
            by_channel = {channel: name for source in settings.csm.sources[:1] for name, channel in source.channels.items()}
            canonical = [by_channel.get(channel, name) for channel, name in enumerate(names)]
            needed = settings.architecture.series
            for line in fill_missing(inputs, folder, canonical, ending, num_copies=copies_in_training(settings), needed=needed):
                print(line.replace(str(folder), "the folder that is read"))
        for line in check_inputs(folder, names, ending):
            print(line.replace(str(folder), str(inputs)))
        yield folder


def copies_in_training(settings: Configuration) -> Counter[str]:
    """Series to the number of training cases that held it only as a copy of another one."""
    return Counter(name for source in settings.csm.sources for absent in source.absent_series.values() for name in absent)
