"""Checkpoints: plain Python and tensors, written whole or not at all, read without executing anything."""

import os
import platform
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_csm import __version__, weights_folder
from nnunet_csm.errors import UserError, reason
from nnunet_csm.files import whole

# what a run leaves that the next one in its folder must not be taken for
OF_A_RUN = ("checkpoint_*.pth", "encoder_share.json", "progress.png")
# what every checkpoint of a training has
ENTRIES = {"network_weights": dict, "init_args": dict, "trainer_name": str}


def software() -> dict[str, str]:
    """Versions a result depends on."""
    packages = ("torch", "nnunetv2", "timm", "numpy", "batchgeneratorsv2", "dynamic-network-architectures")
    return {"nnunet_csm": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


def plain(value: Any) -> Any:
    """Replace numpy scalars and arrays by Python's own, so that a checkpoint loads with `weights_only=True`."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value)
    if isinstance(value, Path):
        return str(value)
    return value


def save(checkpoint: dict[str, Any], path: str | Path, first: bool = False) -> Path | None:
    """Write to a temporary name, then rename: a killed run leaves the old file or the new one.

    Args:
        checkpoint: what is saved.
        path: of the file.
        first: of a run; those of an earlier one are moved away, once this one is written.

    Returns:
        The folder they went to, see `move_away`.
    """
    with whole(path) as temporary:
        torch.save(plain(checkpoint), temporary)
        moved = move_away(Path(path).parent) if first else None
    return moved


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, or what a folder of exported weights holds of one.

    Raises:
        UserError: no such file or folder, or not one of ours.
    """
    remedy = "expected a checkpoint written by one of our trainers (nnUNetTrainerCSM...)"
    checkpoint = weights_folder.read(Path(path)) if Path(path).is_dir() else load_tensors(path, remedy)
    if not isinstance(checkpoint, dict) or not ENTRIES.keys() <= set(checkpoint):
        raise UserError(f"{path}: a file of tensors but not a training checkpoint; {remedy}")
    wrong = [name for name, kind in ENTRIES.items() if not isinstance(checkpoint[name], kind)]
    init_args, weights = checkpoint["init_args"], checkpoint["network_weights"]
    if not wrong and not (isinstance(init_args.get("plans"), dict) and isinstance(init_args.get("configuration"), str)):
        wrong = ["init_args"]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} in it is not what a training writes; {remedy}")
    check_weights(weights, f"{path}: network_weights", remedy)
    return checkpoint


def check_weights(weights: Any, where: str, remedy: str) -> None:
    """Raise UserError for what is no dictionary of tensors by name, or holds numbers that are none."""
    if not isinstance(weights, dict) or not all(isinstance(k, str) and isinstance(one, Tensor) for k, one in weights.items()):
        raise UserError(f"{where} in it is not what a training writes; {remedy}")
    if infinite := [name for name, one in weights.items() if one.is_floating_point() and not one.isfinite().all()]:
        raise UserError(
            f"{where}: {infinite[0]} holds NaN or infinite numbers, expected weights; take another checkpoint, or train again"
        )


def load_tensors(path: str | Path, remedy: str) -> Any:
    """What `torch.save` wrote, onto the CPU with `weights_only=True`.

    Raises:
        UserError: no such file, or nothing that can be read so; `remedy` says what is expected.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        refuse_inflating(Path(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # whatever bytes that are no checkpoint may lead to
        raise UserError(f"{path}: not readable as a checkpoint ({type(error).__name__}); {remedy}") from error


def refuse_inflating(path: Path) -> None:
    """Refuse an archive that grows when it is read, before it is: torch stores every record as it is, and each once.

    Raises:
        UserError: it is compressed, or its records are larger than the file.
        BadZipFile: it is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    total = sum(record.file_size for record in records)
    if packed or total > path.stat().st_size:
        what = f"the record {packed[0]!r} is compressed" if packed else f"its records are {total:,} bytes long"
        raise UserError(f"{path}: {what}, in a file of {path.stat().st_size:,}; torch writes no such checkpoint, it is not read")


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put weights into a network. Raises UserError, which names `source`, when they are another network's."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{source}: weights that do not fit the network of the plans ({reason(error)}); train again") from None


@contextmanager
def going_on(path: str | Path) -> Iterator[None]:
    """Say in a line that a run cannot go on from a checkpoint: of another network, or with what no training writes."""
    try:
        yield
    except UserError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{path}: a run cannot go on from it ({said}); restore the plans, or train afresh without --c") from None


def move_away(folder: str | Path) -> Path | None:
    """Move the checkpoints of an earlier run, and what tells of them, into `previous_<time>`: none is taken for the new run's.

    Returns:
        The folder they went to, or None when there were none.
    """
    stale = sorted(file for name in OF_A_RUN for file in Path(folder).glob(name))
    if not stale:
        return None
    target = Path(folder) / f"previous_{datetime.now():%Y%m%d_%H%M%S_%f}"
    target.mkdir()
    for file in stale:
        os.replace(file, target / file.name)
    return target
