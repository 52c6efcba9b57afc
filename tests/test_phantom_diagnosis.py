"""On phantoms whose class is known to the voxel: what the classifier finds, in which series, and where its map says it looked."""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import csm_plans
from nnunet_folders import NnunetFolders
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_csm.model.attribution import log_odds, series_shares, token_maps
from nnunet_csm.model.tokens import to_tokens
from nnunet_csm.phantom import LABELS, PhantomSpec, draw_subject

SERIES = ("T1w", "T2w")
CORE = LABELS["non-enhancing tumor"]
NUM_CASES, NUM_TRAINING = 300, 150
TOKEN_SIZE = (2, 4, 4)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("phantom_diagnosis")]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    """A folder of preprocessed cases, and two class tables: one that only both series tell, one that T1w tells."""
    folder = tmp_path_factory.mktemp("diagnosis") / "nnUNet_preprocessed" / "Dataset001_Tiny"
    data = folder / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True)
    (folder / "gt_segmentations").mkdir()
    spec = PhantomSpec(series=SERIES, shape=(20, 40, 40), spacing_mm=(6.5, 4.5, 4.5), diagnoses=True, bias=0.0)
    both: dict[str, str] = {}
    t1w: dict[str, float] = {}
    for index in range(NUM_CASES):
        subject = draw_subject(spec, index)
        core = subject.labels == CORE
        if core.sum() < 4 or subject.diagnosis is None:
            continue
        volume = np.stack([subject.series[name] for name in SERIES])
        for series in volume:
            inside = series[subject.brain]
            series[subject.brain] = (inside - inside.mean()) / inside.std()
        labels = subject.labels[None].astype(np.int16)
        sizes: dict[str, Any] = {}
        for suffix, array in (("", volume), ("_seg", labels)):
            sizes[f"blocks{suffix}"], sizes[f"chunks{suffix}"] = comp_blosc2_params(array.shape, (8, 16, 16))
        case = f"case{index:03d}"
        nnUNetDatasetBlosc2.save_case(volume, labels, {"spacing": [1, 1, 1]}, str(data / case), **sizes)
        both[case], t1w[case] = subject.diagnosis, float(np.median(volume[0][core]))
    middle = float(np.median(list(t1w.values())))
    bright = {case: "bright" if value > middle else "dark" for case, value in t1w.items()}
    cases = list(both)
    splits = [{"train": cases[:NUM_TRAINING], "val": cases[NUM_TRAINING:]}]
    (folder / "splits_final.json").write_text(json.dumps(splits))
    (folder / "dataset_fingerprint.json").write_text("{}")
    return folder, {"both": both, "bright": bright}


@pytest.fixture
def train(
    drawn: tuple[Path, dict[str, dict[str, str]]], nnunet_folders: NnunetFolders, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Train a small classifier from scratch on patches around cores; returns its trainer."""
    from nnunet_csm.training.classification import nnUNetTrainerCSMClassifier

    folder, tables = drawn
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    monkeypatch.setenv("nnUNet_csm_encoder", "scratch")
    dataset_json = {
        "channel_names": {str(channel): name for channel, name in enumerate(SERIES)},
        "labels": {"background": 0} | {f"label {n}": n for n in (1, 2, 3)},
        "numTraining": NUM_CASES,
        "file_ending": ".nii.gz",
    }

    def run(table: str, series: Sequence[str], patch_size: tuple[int, int, int], num_steps: int) -> Any:
        rows = [f"{case},{name},{CORE}" for case, name in tables[table].items()]
        (folder / "classification.csv").write_text("\n".join(["case,class,mask_label", *rows]) + "\n")
        schedule = {"num_epochs": 2, "iterations_per_epoch": num_steps // 2, "batch_size": 16, "learning_rate": 1e-3}
        plans = csm_plans(
            series=SERIES,
            token_size=TOKEN_SIZE,
            patch_size=(8, 16, 16),
            # as `plan -series` writes it
            architecture={"series": list(series), "channels": [SERIES.index(name) for name in series], "width": 48, "depth": 2},
            classification={
                "patch_size": list(patch_size),
                "label_smoothing": 0.0,
                "schedule": schedule | {"val_iterations_per_epoch": 1, "layer_decay": 1.0} | OPTIMIZER,
            },
        )
        plans["continue_training"] = False
        trainer = nnUNetTrainerCSMClassifier(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
        trainer.run_training()
        return trainer

    return run


OPTIMIZER = {"warmup": 0.1, "weight_decay": 0.05, "betas": [0.9, 0.999]}


def auc(trainer: Any) -> float:
    return trainer.logger.local_logger.my_fantastic_logging["auc"][-1]


def test_a_class_that_two_series_tell_together_is_found_with_both_and_with_neither_alone(train: Callable[..., Any]) -> None:
    assert auc(train("both", SERIES, (4, 8, 8), 400)) > 0.85
    for one in SERIES:
        assert auc(train("both", (one,), (4, 8, 8), 400)) < 0.6


def test_the_map_falls_on_the_planted_lesion_and_on_the_planted_series(train: Callable[..., Any]) -> None:
    trainer = train("bright", SERIES, (8, 16, 16), 160)
    assert auc(trainer) > 0.95
    network = trainer.network.eval()
    bright = trainer.table.classes.index("bright")
    chosen = (trainer.val_volumes.targets == bright).nonzero()[:24, 0]
    patches = torch.cat([trainer.val_volumes.patches(int(n), int(n) + 1) for n in chosen])
    maps = token_maps(network, patches, partial(log_odds, class_index=bright))
    shares = series_shares(maps).mean(0)
    assert shares[SERIES.index("T1w")] > 0.6

    # the patch is centred on the core, which is a small part of it
    core = torch.stack([mask_of(trainer, int(n)) for n in chosen])
    on_core = to_tokens(core[:, None].float(), TOKEN_SIZE).mean(-1)[:, 0] > 0
    strength = maps[:, SERIES.index("T1w")].abs().flatten(1)
    share = (strength * on_core).sum(1) / strength.sum(1)
    assert share.mean() > 2 * on_core.float().mean()


def mask_of(trainer: Any, number: int) -> torch.Tensor:
    """The core in the patch of a validation sample."""
    from nnunet_csm.data.lesions import cut_around

    sample = trainer.val_volumes.samples[number]
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, [sample.case])
    mask = np.asarray(dataset.load_case(sample.case)[1][0]) == CORE
    settings = trainer.classification
    return cut_around(mask[None].astype(np.float32), mask, settings.patch_size, settings.margin)[0][0] > 0.5
