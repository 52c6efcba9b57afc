"""Make the images that CSM plans name and that are not there."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

from nnunet_csm import nnunet
from nnunet_csm.data.resampled import check_resampled
from nnunet_csm.data.sources import case_names
from nnunet_csm.errors import UserError
from nnunet_csm.planning.unlabelled import preprocess_images
from nnunet_csm.plans import Source, configuration_of, read_configuration
from nnunet_csm.pretext.base import learner_of


def preprocessed_cases(source: Source, plans: Mapping[str, Any], configuration: str) -> list[str]:
    """Sorted identifiers of a source's cases.

    Raises:
        UserError: none, fewer than there are to be, or preprocessed for another spacing.
    """
    preprocessed = nnunet.folder("nnUNet_preprocessed")
    names = case_names(source, preprocessed, source.labelled)
    entry = configuration_of(plans, configuration, str(plans["plans_name"]))
    flags = f"-d {source.dataset} -c {configuration} -preprocess_only {plans['plans_name']} --overwrite"
    remedy = f"preprocess again with `nnunet_csm plan_and_preprocess {flags}`"
    check_resampled(preprocessed / source.dataset / source.data_identifier, names, plans, entry, remedy)
    return names


def is_preprocessed(source: Source, plans: Mapping[str, Any], configuration: str) -> bool:
    """Whether all cases of a source are there, as the plans want them."""
    try:
        return bool(preprocessed_cases(source, plans, configuration))
    except UserError:
        return False


def preprocess_datasets(
    datasets: Sequence[str], configuration: str, plans_name: str, num_processes: int, overwrite: bool
) -> None:
    """Labelled images by nnU-Net, others as it would.

    Raises:
        UserError: no such plans, or images that cannot be used.
    """
    for dataset in datasets:
        name = nnunet.dataset_name(dataset)
        folder, raw = nnunet.folder("nnUNet_preprocessed") / name, nnunet.folder("nnUNet_raw") / name
        path = folder / f"{plans_name}.json"
        remedy = f"plan with `nnunet_csm plan -d {dataset}`"
        plans = nnunet.read_json(path, remedy)
        settings = read_configuration(plans, configuration, str(path))
        dataset_json = nnunet.read_dataset_json(folder / "dataset.json", remedy)
        for source in settings.csm.sources:
            output = folder / source.data_identifier
            if source.dataset != name:
                continue
            if not source.labelled:
                num_done = preprocess_images(raw, source.subset, dataset_json, plans, configuration, output, num_processes)
                print(f"{output}: {num_done} cases preprocessed, the others were there")
            elif overwrite or not is_preprocessed(source, plans, configuration):
                preprocess_labelled(name, configuration, plans_name, output, num_processes)
            else:
                print(f"{output}: already there")


def preprocess_labelled(dataset: str, configuration: str, plans_name: str, output: Path, num_processes: int) -> None:
    """nnU-Net's preprocessing; an interrupted one leaves no folder that looks complete."""
    try:
        preprocess_dataset(nnunet.dataset_id(dataset), plans_name, (configuration,), (num_processes,))
    except BaseException:
        for file in output.glob("*.b2nd"):
            file.unlink()
        raise


def remeasured(names: Sequence[str]) -> list[str]:
    """Have nnU-Net measure datasets again whose fingerprint was cut off, by a full disk or a kill: it would take what is there.

    Returns:
        Lines to print.
    """
    lines = []
    for name in names:
        path = nnunet.folder("nnUNet_preprocessed") / name / "dataset_fingerprint.json"
        if path.is_file():
            try:
                nnunet.read_json(path, "measure it again")
            except UserError as error:
                path.unlink()
                lines.append(f"{error}: done")
    return lines


def check_plans(datasets: Sequence[str], plans_name: str, configuration: str, finetuning: bool) -> str:
    """The dataset that a training writes its results for.

    Raises:
        UserError: no plans, plans that draw on other datasets than those named, or fine-tuning without labels.
    """
    names = [nnunet.dataset_name(dataset) for dataset in datasets]
    path = nnunet.folder("nnUNet_preprocessed") / names[0] / f"{plans_name}.json"
    ids = " ".join(datasets)
    remedy = f"plan with `nnunet_csm plan_and_preprocess -d {ids}{' --joint' if len(names) > 1 else ''}`"
    plans = nnunet.read_json(path, remedy)
    settings = read_configuration(plans, configuration, str(path))
    sources = settings.csm.sources
    for source in sources:
        if (path.parent.with_name(source.dataset) / source.data_identifier).is_dir():  # else the trainer says what is missing
            preprocessed_cases(source, plans, configuration)
    if not finetuning:
        learner_of(settings, str(path))
    # nnU-Net reads it before our trainers begin
    nnunet.read_dataset_json(path.with_name("dataset.json"), remedy)
    drawn_on = list(dict.fromkeys(source.dataset for source in sources))
    if not finetuning and (drawn_on[0] != names[0] or (len(names) > 1 and set(drawn_on) != set(names))):
        raise UserError(f"{path}: made for {', '.join(drawn_on)}, the first of which owns the run, not for -d {ids}; {remedy}")
    if finetuning and not any(source.labelled for source in sources if source.dataset == names[0]):
        raise UserError(f"{names[0]}: has no labels to fine-tune on; fine-tune another dataset from its encoder with -encoder")
    return names[0]
