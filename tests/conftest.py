"""What every test stands on: shape checks, a quiet machine, and nnU-Net's three folders."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

# before anything reads them: no worker processes for augmentation, no window for pictures
os.environ["nnUNet_n_proc_DA"] = "0"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

CHECKED_ROOMS = ("nnunet_csm.model", "nnunet_csm.pretext", "nnunet_csm.data", "nnunet_csm.evaluation")

# an int will do for a float, as in mypy
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))

# the hook sees only what is imported after it
assert not any(name.startswith(CHECKED_ROOMS) for name in sys.modules)
install_import_hook(CHECKED_ROOMS, f"{__name__}.typechecker")

torch.set_num_threads(2)


@dataclass(frozen=True)
class NnunetFolders:
    raw: Path
    preprocessed: Path
    results: Path


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NnunetFolders:
    """Empty nnU-Net folders of this test's own; nnU-Net reads the variables each time it needs them."""
    folders = NnunetFolders(tmp_path / "nnUNet_raw", tmp_path / "nnUNet_preprocessed", tmp_path / "nnUNet_results")
    for folder in (folders.raw, folders.preprocessed, folders.results):
        folder.mkdir()
        monkeypatch.setenv(folder.name, str(folder))
    return folders
