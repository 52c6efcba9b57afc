"""What `nnunet_csm plan` was asked for, and what can be said against it before anything is read or preprocessed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.fingerprint.extraction import case_files
from nnunet_csm.fingerprint.labels import check_label_values
from nnunet_csm.host_files import check_known
from nnunet_csm.planning.classification import training_cases
from nnunet_csm.planning.facts import Wishes
from nnunet_csm.planning.presets import read_preset
from nnunet_csm.raw.check import check_dataset, has_labels, load_dataset_json
from nnunet_csm.raw.manifest import patients_of
from nnunet_csm.raw.series import SeriesMatch, canonical_series, parse_aliases
from nnunet_csm.schema import Name, read_value


@dataclass(frozen=True)
class PlanRequest:
    """The command line, beside the sizes (`Wishes`)."""

    configuration: str
    base_plans_name: str
    plans_name: str
    aliases: tuple[str, ...] = ()
    joint: bool = False
    weights: tuple[float, ...] = ()
    test_images: bool = False
    target_spacing: tuple[float, float, float] | None = None
    num_processes: int = 1
    strict: bool = False


def check_request(datasets: Sequence[str], request: PlanRequest, wishes: Wishes) -> list[str]:
    """Names of the datasets.

    Raises:
        UserError: settings that contradict each other, a preset, series, alias or test images that are not there.
    """
    names = [nnunet.dataset_name(dataset) for dataset in datasets]
    if len(set(names)) < len(names):
        raise UserError(f"-d {' '.join(datasets)}: names a dataset twice; its cases would count twice")
    for flag, plans_name in (("-overwrite_plans_name", request.plans_name), ("-p", request.base_plans_name)):
        read_value(Name, plans_name, flag)
    if request.plans_name == request.base_plans_name:
        raise UserError(f"{request.plans_name}.json holds nnU-Net's plans, which are kept; give another -overwrite_plans_name")
    if request.joint and len(datasets) < 2:
        raise UserError("--joint plans for several datasets at once; give at least two with -d, the one to fine-tune on first")
    if request.weights and not (request.joint and len(request.weights) == len(names) and all(w > 0 for w in request.weights)):
        raise UserError(
            f"-weights {' '.join(f'{w:g}' for w in request.weights)}: expected, with --joint, a number above 0 for each of the "
            f"{len(names)} datasets of -d"
        )
    if request.target_spacing is not None and not request.joint:
        raise UserError("-overwrite_target_spacing belongs to --joint; for one dataset give it to nnUNetv2_plan_experiment")
    if request.target_spacing is not None and min(request.target_spacing) <= 0:
        raise UserError(f"-overwrite_target_spacing {request.target_spacing}: expected three numbers above 0, in mm")
    if wishes.gpu_memory_target is not None and wishes.gpu_memory_target <= 0:
        raise UserError(f"-gpu_memory_target {wishes.gpu_memory_target:g}: expected GiB above 0")
    if wishes.preset not in ("auto", "paper"):
        read_preset(wishes.preset)
    known = set[str]()
    for name in names:
        known |= {match.canonical for match in series_of(name, names, request)}
        raw = nnunet.folder("nnUNet_raw") / name
        if request.test_images:
            dataset_json = load_dataset_json(raw)
            case_files(raw, "imagesTs", dataset_json, len(nnunet.channel_names(dataset_json)))
    unknown = [one for one in wishes.series or () if one not in known]
    if unknown:
        raise UserError(f"-series {' '.join(unknown)}: no dataset of -d has it; there are {', '.join(sorted(known))}")
    return names


def series_of(name: str, names: Sequence[str], request: PlanRequest) -> list[SeriesMatch]:
    """Canonical names of a dataset's channels; an alias need fit only one of the datasets.

    Raises:
        UserError: an alias that fits none of them, or two channels that get one name.
    """
    aliases = parse_aliases(request.aliases)
    spelled = {one: [str(channel).casefold() for channel in nnunet.channel_names(described(one)[0])] for one in names}
    for given in aliases:
        if not any(given.casefold() in channels for channels in spelled.values()):
            raise UserError(
                f"-series_alias {given}=...: no dataset has a channel of that name; see channel_names in dataset.json"
            )
    mine = {given: target for given, target in aliases.items() if given.casefold() in spelled[name]}
    return canonical_series(nnunet.channel_names(described(name)[0]), mine)


def described(name: str) -> tuple[dict[str, Any], bool]:
    """`dataset.json` of a dataset, and whether it is that of the raw folder; else it is the preprocessed one's."""
    raw = nnunet.folder("nnUNet_raw") / name
    if (raw / "dataset.json").is_file():
        return load_dataset_json(raw), True
    path = nnunet.folder("nnUNet_preprocessed") / name / "dataset.json"
    return nnunet.read_dataset_json(path, "run nnUNetv2_plan_and_preprocess first"), False


def check_raw(name: str, num_processes: int) -> None:
    """Look at the headers of all raw files, at the values of masks, and at the splits, before hours of preprocessing.

    Raises:
        UserError: a file that is missing or does not fit, a value that has no name, or splits that nnU-Net would refuse.
    """
    folder = nnunet.folder("nnUNet_raw") / name
    dataset_json = load_dataset_json(folder)
    for line in check_dataset(folder, dataset_json):
        print(line)
    if has_labels(dataset_json):
        for line in [*check_label_values(folder, dataset_json, num_processes), *split_lines(name)]:
            print(line)
    mine, used = folder / "splits_final.json", nnunet.folder("nnUNet_preprocessed") / name / "splits_final.json"
    if mine.is_file() and used.is_file() and not _same_splits(mine, used):
        raise UserError(
            f"{used}: other splits than {mine}; networks and encoders trained so far rest on the former: "
            f"keep them by moving the latter away, or move the former away and train again"
        )


def split_lines(name: str) -> list[str]:
    """Lines to print of a labelled dataset's splits: patients on two sides, as far as the converter's manifest tells.

    Raises:
        UserError: splits that nnU-Net would refuse, or that name cases which are not there.
    """
    raw, lines = nnunet.folder("nnUNet_raw") / name, dict[str, None]()
    cases, patients = training_cases(name), patients_of(raw)
    for path in (raw / "splits_final.json", nnunet.folder("nnUNet_preprocessed") / name / "splits_final.json"):
        for number, fold in enumerate(nnunet.read_splits(path) if path.is_file() else ()):
            check_known(fold, cases, f"{path}: fold {number}")
            sides = ({patients.get(case, case) for case in fold[side]} for side in ("train", "val"))
            if both := sorted(set.intersection(*sides)):
                lines[f"fold {number}: patient {both[0]} is in train and in val ({len(both)} such); scores are too good"] = None
    return list(lines)


def _same_splits(mine: Path, used: Path) -> bool:
    pairs = zip(nnunet.read_splits(mine), nnunet.read_splits(used), strict=False)
    return all(set(a[side]) == set(b[side]) for a, b in pairs for side in ("train", "val"))
