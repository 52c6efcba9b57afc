"""What nnU-Net's files have to say before anything follows them: dataset.json, splits_final.json, plans.

nnU-Net reads them as they are, and answers a mistake with a traceback in a worker, hours later. Nothing here reads a file.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nnunet_csm.errors import UserError
from nnunet_csm.schema import Count, Index, Name, Positive, read_value, shown

# of a network, `_kw_requires_import` names arguments that nnU-Net imports
LIBRARY_CLASS = re.compile(r"(torch\.nn(\.modules\.\w+)?|dynamic_network_architectures\.building_blocks\.\w+)\.[A-Z]\w*")
LIBRARY_NETWORK = re.compile(r"dynamic_network_architectures\.architectures\.\w+\.[A-Z]\w*")
# nnU-Net's keys, where they are there at all
OF_PLANS: dict[str, Any] = {
    "dataset_name": Name,
    "plans_name": Name,
    "transpose_forward": tuple[Index, ...],
    "transpose_backward": tuple[Index, ...],
    "image_reader_writer": Name,
    "label_manager": Name,
    "experiment_planner_used": Name,
    "foreground_intensity_properties_per_channel": dict[str, dict[str, Any]],
    "configurations": dict[Name, dict[str, Any]],
}
OF_CONFIGURATION: dict[str, Any] = {
    "data_identifier": Name,
    "inherits_from": Name,
    "preprocessor_name": Name,
    "batch_size": Count,
    "patch_size": tuple[Count, ...],
    "spacing": tuple[Positive, ...],
    "median_image_size_in_voxels": tuple[Positive, ...],
    "normalization_schemes": tuple[Name, ...],
    "use_mask_for_norm": tuple[bool, ...],
    "batch_dice": bool,
    **{f"resampling_fn_{what}": Name for what in ("data", "seg", "probabilities")},
    **{f"resampling_fn_{what}_kwargs": dict[str, Any] for what in ("data", "seg", "probabilities")},
    "architecture": dict[str, Any],
}


# --- dataset.json ------------------------------------------------------------------------------------------------------------


def check_dataset_json(content: Mapping[str, Any], where: str, labelled: bool = True) -> None:
    """Raise UserError for a dataset.json that nnU-Net cannot follow; `where` is its path.

    Only that of a raw dataset may be without labels (`labelled` False): images to pretrain on.
    """
    for key in ("labels", "file_ending"):
        if key not in content:
            raise UserError(f"{where} has no {key!r}, only {', '.join(map(shown, sorted(content)))}; add it")
    check_channels(content, where)
    ending = read_value(Name, content["file_ending"], f"{where}: file_ending")
    if not re.fullmatch(r"(\.\w+)+", ending):
        raise UserError(f"{where}: file_ending is {ending!r}, expected one that begins with a dot, such as .nii.gz; correct it")
    check_labels(content["labels"], content.get("regions_class_order"), where)
    if labelled and not content["labels"]:
        raise UserError(f'{where}: labels is {{}}, expected "background": 0 and a label at least; plan and preprocess again')
    if "numTraining" in content:
        read_value(Index, content["numTraining"], f"{where}: numTraining")
    for name, case in read_value(dict[Name, dict[str, Any]], content.get("dataset", {}), f"{where}: dataset").items():
        read_value(tuple[str, ...], case.get("images"), f"{where}: dataset.{name}.images")
        if "label" in case:
            read_value(str, case["label"], f"{where}: dataset.{name}.label")


def check_channels(content: Mapping[str, Any], where: str) -> list[str]:
    """The dataset's own names of its series, in the order of the channels.

    Raises:
        UserError: there are none, or they are not numbered from 0, or one is no name or named twice.
    """
    names = content.get("channel_names") or content.get("modality")
    if not names:
        raise UserError(f'{where} has no channel_names; nnU-Net\'s format wants {{"0": "FLAIR", "1": "T1w", ...}}')
    names = read_value(dict[str, str], names, f"{where}: channel_names")
    channels = [str(channel) for channel in range(len(names))]
    if set(names) != set(channels):
        raise UserError(
            f"{where}: channel_names has the keys {', '.join(sorted(names))}, expected {', '.join(channels)}: channels count "
            f"from 0, as in CASE_0000; correct the keys and, where they count from 1 as well, the numbers in the names of files"
        )
    return [names[channel] for channel in channels]


def check_labels(labels: Any, regions_class_order: Any, where: str) -> None:
    """Raise UserError for labels that nnU-Net's label manager, or its loss, would refuse; {} stands for images only."""
    labels = read_value(dict[str, Any], labels, f"{where}: labels")
    if not labels:
        return
    if all(name.strip().isdigit() for name in labels) and all(isinstance(value, str) for value in labels.values()):
        turned = {value: int(name) for name, value in labels.items()}
        raise UserError(
            f"{where}: labels are the decathlon's way round, {shown(labels)}; nnU-Net wants names first: write "
            f'"labels": {str(turned).replace(chr(39), chr(34))}'
        )
    values = {name: _label_values(name, value, where) for name, value in labels.items()}
    if values.get("background") != (0,) or isinstance(labels["background"], list):
        found = f"background is {shown(labels['background'])}" if "background" in labels else f"no background in {shown(labels)}"
        raise UserError(f'{where}: labels: {found}; expected "background": 0 among them; correct it')
    ignored = values.pop("ignore", None)
    regions = {name: of for name, of in values.items() if len(set(of)) > 1}
    known = sorted({value for of in values.values() for value in of})
    if ignored is not None and (len(ignored) != 1 or ignored[0] != known[-1] + 1):
        raise UserError(
            f"{where}: labels: ignore is {shown(labels['ignore'])}, expected {known[-1] + 1}, one more than the highest of the "
            f"others; number the labels so, in the masks as well"
        )
    if regions:
        _check_regions(values, regions_class_order, known, where)
        return
    names: dict[int, str] = {}
    for name, (value, *_) in values.items():
        if names.setdefault(value, name) != name:
            raise UserError(f"{where}: labels: {names[value]} and {name} are both {value}; give each a value of its own")
    if known != list(range(len(known))):
        missing = min(set(range(len(known))) - set(known))
        raise UserError(
            f"{where}: labels have the values {', '.join(map(str, known))}, but not {missing}; expected 0, 1, 2, ... without a "
            f"gap: number them so, in the masks as well (or name {missing}, where masks hold it)"
        )


def _label_values(name: str, value: Any, where: str) -> tuple[int, ...]:
    """The values in masks that a label or region stands for."""
    found: tuple[int, ...] = read_value(
        tuple[Index, ...], value if isinstance(value, list) else [value], f"{where}: labels.{name}"
    )
    if not found:
        raise UserError(f"{where}: labels.{name} is [], expected a whole number, or those of a region; correct it")
    return found


def _check_regions(values: Mapping[str, Sequence[int]], order: Any, known: Sequence[int], where: str) -> None:
    """Regions overlap: `regions_class_order` says which value is written where several are found."""
    named = [name for name, of in values.items() if set(of) != {0}]
    expected = f"a list of {len(named)} values, one for each of {', '.join(named)}"
    if order is None:
        raise UserError(f"{where}: labels hold regions, but there is no regions_class_order; add it: {expected}")
    found = read_value(tuple[Index, ...], order, f"{where}: regions_class_order")
    if len(found) != len(named) or set(found) - set(known):
        raise UserError(
            f"{where}: regions_class_order is {shown(list(found))}, expected {expected}, of {', '.join(map(str, known))}"
        )


# --- splits_final.json -------------------------------------------------------------------------------------------------------

FOLDS = '[{"train": ["CASE", ...], "val": ["CASE", ...]}, ...]'


def check_splits(folds: Sequence[Any], where: str) -> None:
    """Raise UserError for folds that are none, or in which a case stands twice; `where` is their file."""
    if not folds:
        raise UserError(f"{where}: holds no fold, expected {FOLDS}")
    for number, fold in enumerate(folds):
        what = f"{where}: fold {number}"
        if not isinstance(fold, Mapping) or not {"train", "val"} <= set(fold):
            raise UserError(f"{what} is {shown(fold)}, expected train and val: {FOLDS}; correct it")
        sides = {side: read_value(tuple[Name, ...], cases, f"{what}.{side}") for side, cases in fold.items()}
        for side in ("train", "val"):
            if not sides[side]:
                raise UserError(f"{what}: {side} is empty; move cases there")
        count = Counter(case for cases in sides.values() for case in cases)
        if twice := [case for case, times in count.items() if times > 1]:
            on = [side for side, cases in sides.items() for case in cases if case == twice[0]]
            remedy = "keep it on one side, or train on all cases with fold all" if len(set(on)) > 1 else "keep it once"
            raise UserError(f"{what}: {twice[0]} is in {' and in '.join(on)} ({len(twice)} such); {remedy}")


def check_known(fold: Mapping[str, Iterable[str]], known: Iterable[str], where: str) -> None:
    """Raise UserError for a case of a fold that a dataset has not; `where` names the fold."""
    there = set(known)
    for side in ("train", "val", "unlabelled"):
        if strangers := [case for case in fold.get(side, ()) if case not in there]:
            like = f", such as {min(there)}" if there else ""
            raise UserError(
                f"{where}: {side} names {strangers[0]} ({len(strangers)} such), which is no case of the dataset; names of cases "
                f"have no ending and no channel{like}: correct it"
            )


# --- plans -------------------------------------------------------------------------------------------------------------------


def check_plans(plans: Mapping[str, Any], where: str) -> None:
    """Raise UserError for what in nnU-Net's part of a plans file is of another kind: above all a name that is a path."""
    for key, hint in OF_PLANS.items():
        if key in plans:
            read_value(hint, plans[key], f"{where}: {key}")
        elif key in ("dataset_name", "plans_name", "configurations"):
            raise UserError(f"{where}: no {key}; is it a file of plans? Plan again")
    for key in ("transpose_forward", "transpose_backward"):
        if sorted(plans.get(key, (0, 1, 2))) != [0, 1, 2]:
            raise UserError(f"{where}: {key} is {plans[key]}, expected 0, 1 and 2 in some order; plan again")
    configurations = plans["configurations"]
    for name, entry in configurations.items():
        for key, hint in OF_CONFIGURATION.items():
            if key in entry:
                read_value(hint, entry[key], f"{where}: configurations.{name}.{key}")
        together = {"spacing": "patch_size", "use_mask_for_norm": "normalization_schemes"}
        for key, other in together.items():
            if key in entry and other in entry and len(entry[key]) != len(entry[other]):
                found = f"{key} has {len(entry[key])} values, {other} {len(entry[other])}"
                raise UserError(f"{where}: configurations.{name}: {found}; expected as many: plan again")
        seen, heir = {name}, entry
        while "inherits_from" in heir:
            parent = heir["inherits_from"]
            if parent in seen or parent not in configurations:
                found = f"{parent!r}, which inherits from it" if parent in seen else f"{parent!r}, which is not there"
                raise UserError(f"{where}: configurations.{name} inherits from {found}; plan again")
            seen.add(parent)
            heir = configurations[parent]


def check_network(architecture: Mapping[str, Any], where: str, own: str | None = None) -> None:
    """Refuse a network that is neither `own` nor nnU-Net's: its class, and classes among its arguments, are imported by name.

    Raises:
        UserError: anything else is named; `where` is the `architecture` of a configuration.
    """
    name = architecture.get("network_class_name")
    if not isinstance(name, str) or not (name == own if own else LIBRARY_NETWORK.fullmatch(name)):
        expected = own or "dynamic_network_architectures.architectures.MODULE.CLASS"
        raise UserError(f"{where}.network_class_name is {shown(name)}, expected {expected}; nothing else is imported: plan again")
    arguments = read_value(dict[str, Any], architecture.get("arch_kwargs"), f"{where}.arch_kwargs")
    imported = read_value(tuple[str, ...], architecture.get("_kw_requires_import"), f"{where}._kw_requires_import")
    for key in imported:
        value = arguments.get(key)
        if own or (value is not None and not (isinstance(value, str) and LIBRARY_CLASS.fullmatch(value))):
            raise UserError(
                f"{where}._kw_requires_import names {key!r}, {shown(value)}: only classes of torch.nn and of nnU-Net are"
            )
