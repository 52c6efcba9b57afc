"""nnU-Net as the host: its folders, its datasets, its commands."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import save_json as save_as_json
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_csm.errors import FOLDER_VARIABLES as FOLDER_VARIABLES
from nnunet_csm.errors import UserError, reason
from nnunet_csm.files import whole
from nnunet_csm.host_files import FOLDS, check_channels, check_dataset_json, check_plans, check_splits
from nnunet_csm.listing import argument_problem
from nnunet_csm.processes import follow_parent, run_command, stoppable
from nnunet_csm.schema import parse_json

TRAINER_VARIABLE = "nnUNet_extTrainer"
NUM_FOLDS, SPLIT_SEED = 5, 12345  # of its own splits
TRAINER_FOLDER = Path(__file__).parent / "nnunet_ext"


def trainer_path() -> str:
    """What `nnUNet_extTrainer` must be for nnU-Net to find our trainers, keeping what the user has there."""
    folders = [f for f in os.environ.get(TRAINER_VARIABLE, "").split(os.pathsep) if f and Path(f) != TRAINER_FOLDER]
    return os.pathsep.join([str(TRAINER_FOLDER), *folders])


def folder(variable: str) -> Path:
    """One of nnU-Net's three folders.

    Raises:
        UserError: the environment variable is not set.
    """
    if variable not in os.environ:
        raise UserError(f"{variable} is not set; nnU-Net needs {', '.join(FOLDER_VARIABLES)}: export {variable}=/a/folder")
    return Path(os.environ[variable])


def dataset_name(name_or_id: str) -> str:
    """`DatasetXXX_Name` of a dataset given by name or number.

    Raises:
        UserError: no such dataset in nnU-Net's folders.
    """
    for variable in FOLDER_VARIABLES:
        folder(variable)
    try:
        return maybe_convert_to_dataset_name(int(name_or_id) if name_or_id.isdigit() else name_or_id)
    except (RuntimeError, ValueError, AssertionError):
        where = " or ".join(str(folder(variable)) for variable in FOLDER_VARIABLES)
        raise UserError(f"no dataset {name_or_id!r} in {where}; convert it, or check nnUNet_raw") from None


def dataset_id(name: str) -> int:
    """The number in `DatasetXXX_Name`."""
    return int(name.removeprefix("Dataset").split("_")[0])


def read_json(path: Path, remedy: str, kind: type = dict) -> Any:
    """A JSON file that an earlier step has to have written; see `schema.parse_json`."""
    if problem := argument_problem(str(path)):
        raise UserError(problem)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({reason(error)}); {remedy}") from None
    return parse_json(content, str(path), remedy, kind)


def save_json(data: Any, path: Path) -> None:
    """Write a JSON file whole or not at all."""
    with whole(path) as temporary:
        save_as_json(data, str(temporary), sort_keys=False)


def read_splits(path: Path) -> list[dict[str, list[str]]]:
    """`splits_final.json`: cases by side, for every fold.

    Raises:
        UserError: no such file, or folds that are none, or in which a case stands twice.
    """
    remedy = f"correct it ({FOLDS}), or write it again with `nnunet_csm split -d ID --overwrite`"
    splits: list[dict[str, list[str]]] = read_json(path, remedy, list)
    check_splits(splits, str(path))
    return splits


def read_dataset_json(path: Path, remedy: str) -> dict[str, Any]:
    """`dataset.json`, with what nnU-Net needs of it.

    Raises:
        UserError: no such file, or one that nnU-Net cannot follow.
    """
    content: dict[str, Any] = read_json(path, remedy)
    check_dataset_json(content, str(path))
    return content


def read_plans(path: Path, remedy: str) -> dict[str, Any]:
    """Plans of nnU-Net's or ours.

    Raises:
        UserError: no such file, or what is to be a name in it is a path.
    """
    plans: dict[str, Any] = read_json(path, remedy)
    check_plans(plans, str(path))
    return plans


def path_of_plans(plans: Mapping[str, Any]) -> str:
    """Where errors say that plans are that a trainer was given. Raises UserError when they are none."""
    check_plans(plans, "the plans")
    name, preprocessed = f"{plans['plans_name']}.json", os.environ.get("nnUNet_preprocessed")
    return name if preprocessed is None else os.path.join(preprocessed, plans["dataset_name"], name)


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """The dataset's own names of its series, in the order of the channels.

    Raises:
        UserError: there are none, or they are not numbered from 0.
    """
    return check_channels(dataset_json, "dataset.json")


def run_apart(entry_point: str, arguments: Sequence[str]) -> int:
    """Do as `run`, in a process of its own.

    Returns:
        Its exit code.
    """
    return run_command(["-m", "nnunet_csm.nnunet", entry_point, *arguments])


def run(entry_point: str, arguments: Sequence[str]) -> None:
    """Run one of nnU-Net's commands in this process, with our trainers within its reach.

    Args:
        entry_point: "module:function" as in nnU-Net's own console scripts.
        arguments: command line without the program's name.
    """
    os.environ[TRAINER_VARIABLE] = trainer_path()
    module, function = entry_point.split(":")
    before = sys.argv
    sys.argv = [function, *arguments]
    try:
        getattr(importlib.import_module(module), function)()
    finally:
        sys.argv = before


if __name__ == "__mp_main__":
    follow_parent()
elif __name__ == "__main__":
    # `python -m nnunet_csm.nnunet ENTRY_POINT [ARGUMENTS ...]`: such a command in a process of its own, see `run_apart`
    with stoppable("see the command that started it"):
        run(sys.argv[1], sys.argv[2:])
