"""Checkpoints: plain Python and tensors, written whole or not at all, read without executing anything."""

import os
import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunet_csm import __version__
from nnunet_csm.errors import UserError
from nnunet_csm.files import whole

# what a run leaves that the next one in its folder must not be taken for
OF_A_RUN = ("checkpoint_*.pth", "encoder_share.json", "progress.png")


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
    """Read a checkpoint onto the CPU with `weights_only=True`.

    Raises:
        UserError: no such file, or not a checkpoint of ours.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint")
    remedy = "expected a checkpoint written by one of our trainers (nnUNetTrainerCSM...)"
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever bytes that are no checkpoint may lead to
        raise UserError(f"{path}: not readable as a checkpoint ({type(error).__name__}); {remedy}") from error
    if not isinstance(checkpoint, dict) or not {"network_weights", "init_args", "trainer_name"} <= set(checkpoint):
        raise UserError(f"{path}: a file of tensors but not a training checkpoint; {remedy}")
    return checkpoint


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
