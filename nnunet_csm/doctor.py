"""What is installed, what nnU-Net finds, and what to do about what is missing."""

import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.diagnoses import FILE_NAME
from nnunet_csm.errors import UserError
from nnunet_csm.fingerprint.labels import check_label_values
from nnunet_csm.machine import num_cores
from nnunet_csm.planning.classification import check_classification
from nnunet_csm.planning.preprocessing import preprocessed_cases
from nnunet_csm.planning.request import split_lines
from nnunet_csm.plans import PLANS_NAME, read_configuration
from nnunet_csm.raw.check import check_dataset, has_labels, load_dataset_json

TRAINERS = ("nnUNetTrainerCSMPretrain", "nnUNetTrainerCSM", "nnUNetTrainerCSMClassifier")


@dataclass(frozen=True)
class Finding:
    """One line of the report; `remedy` is empty when all is well, else `mark`: MISSING, WRONG, UNUSABLE (a file), optional."""

    what: str
    found: str
    remedy: str = ""
    mark: str = "MISSING"

    def __str__(self) -> str:
        mark = self.mark if self.remedy else "ok"
        return f"{mark:<8} {self.what:<34} {self.found}" + (f"\n{'':<8} -> {self.remedy}" if self.remedy else "")


def examine(datasets: Sequence[str], configuration: str) -> Iterator[Finding]:
    """Versions, devices, folders, trainers; of each dataset also its files, classes, plans and checkpoints."""
    yield from installation()
    yield from folders()
    for dataset in datasets:
        yield from of_dataset(dataset, configuration)


def installation() -> Iterator[Finding]:
    for name, installed in checkpoint.software().items():
        yield Finding(name, installed)
    for name in ("SimpleITK", "batchgenerators", "acvl-utils", "torchvision"):
        try:
            yield Finding(name, version(name))
        except PackageNotFoundError:
            yield Finding(name, "not installed", f"pip install {name}")
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("GPU", f"{torch.cuda.get_device_name(0)}, {memory:.0f} GiB, bf16 {torch.cuda.is_bf16_supported()}")
    else:
        yield Finding(
            "GPU",
            "none",
            "train with -device cpu (`nnunet_csm plan` takes the preset cpu by itself), or check nvidia-smi and the torch build",
            "optional",
        )
    yield Finding("CPU", f"{num_cores()} cores, {platform.machine()}, {torch.get_num_threads()} torch threads")


def folders() -> Iterator[Finding]:
    for variable in nnunet.FOLDER_VARIABLES:
        try:
            path = nnunet.folder(variable)
        except UserError as error:
            yield Finding(variable, "not set", str(error))
            continue
        yield Finding(variable, str(path), "" if path.is_dir() else f"mkdir -p {path}")
    listed = os.environ.get(nnunet.TRAINER_VARIABLE, "")
    known = str(nnunet.TRAINER_FOLDER) in listed.split(os.pathsep)
    remedy = "" if known else 'eval "$(nnunet_csm env)", for stock nnUNetv2_... commands'
    yield Finding(nnunet.TRAINER_VARIABLE, listed or "not set", remedy, "optional")
    for name in TRAINERS:
        folder = str(nnunet.TRAINER_FOLDER)
        found = recursive_find_python_class(folder, name, None, base_folder=folder, cleanup_imports_from_base_folder=True)
        yield Finding(name, "found as nnU-Net finds it" if found else "not found", "" if found else "install nnunet_csm again")


def of_dataset(name_or_id: str, configuration: str) -> Iterator[Finding]:
    try:
        name = nnunet.dataset_name(name_or_id)
    except UserError as error:
        yield Finding(f"dataset {name_or_id}", "not found", str(error))
        return
    raw, preprocessed = nnunet.folder("nnUNet_raw") / name, nnunet.folder("nnUNet_preprocessed") / name
    if raw.is_dir():
        try:
            dataset_json = load_dataset_json(raw)
            lines = check_dataset(raw, dataset_json)
            if has_labels(dataset_json):
                lines += [*check_label_values(raw, dataset_json, num_cores()), *split_lines(name)]
            for line in lines:
                yield Finding(name, line)
            yield Finding(name, "raw files complete")
        except UserError as error:
            yield Finding(name, "raw files", str(error), "UNUSABLE")
    yield from of_classes(name)
    plans_file = preprocessed / f"{PLANS_NAME}.json"
    try:
        plans = nnunet.read_json(
            plans_file, f"nnUNetv2_plan_and_preprocess -d {name_or_id} -c {configuration}, then nnunet_csm plan"
        )
        settings = read_configuration(plans, configuration, str(plans_file))
    except UserError as error:
        yield Finding("CSM plans", "not usable", str(error), "UNUSABLE" if plans_file.exists() else "MISSING")
        return
    yield Finding("CSM plans", f"preset {settings.csm.preset}, {', '.join(settings.architecture.series)}")
    for source in settings.csm.sources:
        try:
            num_cases = len(preprocessed_cases(source, plans, configuration))
            yield Finding("preprocessed cases", f"{num_cases} in {source.dataset}/{source.data_identifier}")
        except UserError as error:
            yield Finding("preprocessed cases", "not complete", str(error))
    results = nnunet.folder("nnUNet_results") / name
    for trainer in TRAINERS:
        done = sorted(
            f.parent.name for f in Path(results).glob(f"{trainer}__{PLANS_NAME}__{configuration}/fold_*/checkpoint_final.pth")
        )
        yield Finding(trainer, f"finished: {', '.join(done) or 'no fold'}")


def of_classes(name: str) -> Iterator[Finding]:
    """The class table of a raw dataset, when it has one."""
    path = nnunet.folder("nnUNet_raw") / name / FILE_NAME
    if not path.is_file():
        return
    try:
        counted, wrong = check_classification(name)
    except UserError as error:
        yield Finding(FILE_NAME, "not usable", str(error), "UNUSABLE")
        return
    for line in counted:
        yield Finding(FILE_NAME, line)
    for problem in wrong:
        yield Finding(FILE_NAME, problem, f"mend it, or correct {path}", "WRONG")
