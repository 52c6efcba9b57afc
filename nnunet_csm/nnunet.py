"""nnU-Net as the host: its folders, its datasets, its commands."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from batchgenerators.utilities.file_and_folder_operations import load_json
from batchgenerators.utilities.file_and_folder_operations import save_json as save_as_json
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_csm.errors import FOLDER_VARIABLES as FOLDER_VARIABLES
from nnunet_csm.errors import UserError
from nnunet_csm.files import whole
from nnunet_csm.processes import follow_parent, run_command, stoppable

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


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """A JSON file that an earlier step has to have written."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; {remedy}")
    try:
        return load_json(str(path))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); {remedy}") from None


def save_json(data: Any, path: Path) -> None:
    """Write a JSON file whole or not at all."""
    with whole(path) as temporary:
        save_as_json(data, str(temporary), sort_keys=False)


def read_splits(path: Path) -> list[dict[str, list[str]]]:
    """`splits_final.json`: cases by side, for every fold."""
    splits: Any = read_json(path, "write it again with `nnunet_csm split -d ID --overwrite`, or delete it")
    return splits


def channel_names(dataset_json: Mapping[str, Any]) -> list[str]:
    """The dataset's own names of its series, in the order of the channels.

    Raises:
        UserError: there are none, or they are not numbered from 0.
    """
    names = dataset_json.get("channel_names") or dataset_json.get("modality")
    if not names:
        raise UserError('dataset.json has no channel_names; nnU-Net\'s format wants {"0": "FLAIR", "1": "T1w", ...}')
    channels = [str(channel) for channel in range(len(names))]
    if set(names) != set(channels):
        raise UserError(f"channel_names has the keys {sorted(names)}, not {channels}; number the channels from 0 in dataset.json")
    return [names[channel] for channel in channels]


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
