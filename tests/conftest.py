"""What every test stands on: shape checks, a quiet machine, and nnU-Net's three folders."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# before anything reads them: no worker processes for augmentation and one for the rest, no window for pictures, one thread a
# process, since tests run side by side
os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}

import hypothesis
import pytest
import torch
from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook
from nnunet_folders import NUM_TEST, NUM_TRAINING, TINY_PRESET, NnunetFolders, PlannedDataset
from warm_processes import spawn_warm

CHECKED_ROOMS = ("nnunet_csm.model", "nnunet_csm.pretext", "nnunet_csm.data", "nnunet_csm.evaluation", "nnunet_csm.judging")

# an int will do for a float, as in mypy
typechecker = beartype(conf=BeartypeConf(is_pep484_tower=True))

# the hook sees only what is imported after it
assert not any(name.startswith(CHECKED_ROOMS) for name in sys.modules)
install_import_hook(CHECKED_ROOMS, f"{__name__}.typechecker")

torch.set_num_threads(1)
spawn_warm()

# a busy machine is no failure, and the same commit draws the same examples
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NnunetFolders:
    """Empty nnU-Net folders of this test's own; nnU-Net reads the variables each time it needs them."""
    folders = NnunetFolders(tmp_path / "nnUNet_raw", tmp_path / "nnUNet_preprocessed", tmp_path / "nnUNet_results")
    for folder in (folders.raw, folders.preprocessed, folders.results):
        folder.mkdir()
        monkeypatch.setenv(folder.name, str(folder))
    return folders


@pytest.fixture(scope="session")
def planned_dataset(tmp_path_factory: pytest.TempPathFactory) -> PlannedDataset:
    from nnunet_csm import nnunet
    from nnunet_csm.phantom import PhantomSpec, write_task

    root = tmp_path_factory.mktemp("planned")
    folders = NnunetFolders(root / "nnUNet_raw", root / "nnUNet_preprocessed", root / "nnUNet_results")
    environment = {
        **os.environ,
        "nnUNet_n_proc_DA": "1",
        "nnUNet_extTrainer": nnunet.trainer_path(),
        "PYTHONWARNINGS": "ignore",
    }
    for folder in (folders.raw, folders.preprocessed, folders.results):
        folder.mkdir()
        environment[folder.name] = str(folder)
    spec = PhantomSpec(series=("FLAIR", "T1w", "T1ce"), shape=(16, 32, 32), spacing_mm=(8.0, 5.0, 5.0), missing_share=0.2)
    task = write_task(spec, root, NUM_TRAINING, NUM_TEST)
    dataset = PlannedDataset(folders, environment, task)
    dataset.check("nnUNetv2_convert_MSD_dataset", "-i", str(task), "-np", "1")
    dataset.check("nnUNetv2_plan_and_preprocess", "-d", "900", "-c", "3d_fullres", "-np", "1", "-npfp", "1")
    dataset.check("nnunet_csm", "plan", "-d", "900", "-preset", str(TINY_PRESET))
    return dataset


@pytest.fixture
def make_trainer(planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Trainers of the planned phantom that write to a results folder of this test's own.

    `change` may edit the configuration of the plans, keywords replace keys of its `csm`.
    """
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    from nnunet_csm.training.pretraining import nnUNetTrainerCSMPretrain
    from nnunet_csm.training.segmentation import nnUNetTrainerCSM

    # nnU-Net draws one after every epoch; test_chain.py looks at them
    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)
    folders = NnunetFolders(planned_dataset.folders.raw, planned_dataset.folders.preprocessed, tmp_path / "nnUNet_results")
    for folder in vars(folders).values():
        monkeypatch.setenv(folder.name, str(folder))
    preprocessed = folders.preprocessed / planned_dataset.name

    def make(
        pretraining: bool,
        fold: int | str = 0,
        resume: bool = False,
        change: Callable[[dict[str, Any]], None] | None = None,
        **csm: Any,
    ) -> Any:
        plans = json.loads((preprocessed / "nnUNetCSMPlans.json").read_text())
        entry = plans["configurations"]["3d_fullres"]
        entry["csm"] |= csm
        if change is not None:
            change(entry)
        plans["continue_training"] = resume
        dataset_json = json.loads((preprocessed / "dataset.json").read_text())
        trainer = nnUNetTrainerCSMPretrain if pretraining else nnUNetTrainerCSM
        return trainer(plans, "3d_fullres", fold, dataset_json, torch.device("cpu"))

    return make


@pytest.fixture
def studied(planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The planned phantom as a study sees it."""
    from nnunet_csm.study.dataset import Dataset

    for name, value in planned_dataset.environment.items():
        if name.startswith("nnUNet"):
            monkeypatch.setenv(name, value)
    return Dataset("900", "3d_fullres", tmp_path)


@pytest.fixture
def expand(studied: Any) -> Callable[..., Any]:
    """The runs of a study of it, see `studies.spec`; `records` are of those that are done."""
    from studies import spec

    from nnunet_csm.study.expansion import Expansion
    from nnunet_csm.study.spec import parse_study

    def expand(records: Mapping[str, Mapping[str, Any]] | None = None, **given: Any) -> Any:
        return Expansion(parse_study(spec(**given), "study"), "s", studied, records or {}).expand()

    return expand
