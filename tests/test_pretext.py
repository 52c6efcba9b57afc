"""A pretext from elsewhere, named in the plans by its dotted path, is trained, judged, carried and studied as ours are."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from nnunet_folders import TINY_PRESET, PlannedDataset
from test_trainers import KilledError, goes_on_and_transfers, kill_in, weights

from nnunet_csm.errors import UserError
from nnunet_csm.pretext.base import PRETEXTS, pretext_class

TOY = {"name": "toy_pretext.Agreement", "momentum": 0.9}


def test_it_trains_resumes_and_is_judged(make_trainer: Callable[..., Any]) -> None:
    whole = make_trainer(True, pretext=TOY)
    whole.run_training()
    expected = weights(whole.output_folder)
    log = whole.logger.local_logger.my_fantastic_logging
    assert len(log["spread"]) == whole.num_epochs and min(log["spread"]) > 0
    table = pd.read_csv(Path(whole.output_folder) / "probe.csv")
    assert {"val_losses", "spread", "lesion_precision"} <= set(table)
    assert (Path(whole.output_folder) / "progress.png").is_file()
    # the teacher follows and has no gradient
    student, teacher = (expected[f"{who}.embedding.weight"] for who in ("student", "encoder"))
    assert not torch.equal(student, teacher)
    optimized = {id(p) for group in whole.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in whole.pretext.encoder.parameters()}
    shutil.rmtree(whole.output_folder)

    killed = make_trainer(True, pretext=TOY)
    kill_in(killed, epoch=1, step=1)
    with pytest.raises(KilledError):
        killed.run_training()
    resumed = make_trainer(True, resume=True, pretext=TOY)
    resumed.load_checkpoint(str(Path(killed.output_folder) / "checkpoint_latest.pth"))
    resumed.run_training()
    found = weights(resumed.output_folder)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def joint(entry: dict[str, Any]) -> None:
    entry["architecture"]["arch_kwargs"]["encoder"] = {"kind": "joint_vit"}


@pytest.mark.parametrize("masking", [{"name": "mae3d"}, {"name": "maesil", "noise": [0.0, 0.1]}])
def test_maskers_of_joint_tokens_go_on_after_a_kill(make_trainer: Callable[..., Any], masking: dict[str, Any]) -> None:
    decoder = {"width": 12, "depth": 1, "num_heads": 2, "normalize_targets": False}
    given: dict[str, Any] = {
        "pretext": {"masking": {"mask_ratio": 0.5}, "reconstruction": decoder, **masking},
        "change": joint,
    }
    whole = make_trainer(True, **given)
    whole.run_training()
    goes_on_and_transfers(make_trainer, whole, **given)


def test_a_path_of_its_own_place_and_augmentation_go_on_after_a_kill(make_trainer: Callable[..., Any]) -> None:
    knobs: dict[str, Any] = {
        "pretext": {
            "name": "csm",
            "masking": {"mask_ratio": 0.5, "places": "independent", "hidden_series": "rebuilt"},
            "reconstruction": {"width": 12, "depth": 1, "num_heads": 2, "normalize_targets": False, "same_place": "gains"},
            "augmentation": 0.3,
        }
    }
    whole = make_trainer(True, **knobs)
    whole.run_training()
    goes_on_and_transfers(make_trainer, whole, **knobs)


def test_its_teacher_is_what_fine_tuning_starts_from(make_trainer: Callable[..., Any]) -> None:
    pretrainer = make_trainer(True, pretext=TOY)
    pretrainer.run_training()
    pretrained = weights(pretrainer.output_folder)
    finetuner = make_trainer(False, pretext=TOY)
    finetuner.initialize()
    finetuner.on_fresh_start()
    for name, tensor in finetuner.encoder.state_dict().items():
        assert torch.equal(tensor, pretrained[f"encoder.{name}"])


def test_a_study_has_it_beside_ours_with_its_cost(
    planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nnunet_csm.pretext.cost import pretraining_cost
    from nnunet_csm.study.dataset import Dataset
    from nnunet_csm.study.expansion import Expansion
    from nnunet_csm.study.spec import parse_study

    for name, value in planned_dataset.environment.items():
        if name.startswith("nnUNet"):
            monkeypatch.setenv(name, value)
    dataset = Dataset("900", "3d_fullres", tmp_path)
    study = parse_study(
        {
            "description": "",
            "task": "segmentation",
            "preset": str(TINY_PRESET),
            "repeats": {"kind": "folds", "number": 2},
            "labels": [1.0],
            "arms": [{"name": "CSM"}, {"name": "toy", "changes": {"pretext": TOY}}],
        },
        "study",
    )
    runs = Expansion(study, "s", dataset, {}).expand()
    pretrainings = {row.arm: runs.runs[runs.runs[row.run].needs or ""] for row in runs.rows}
    settings = {arm: dataset.settings(runs.plans[run.plans_name]) for arm, run in pretrainings.items()}
    # what CSM alone has is left behind
    assert settings["toy"].csm.pretext == TOY
    assert pretrainings["toy"].visible_tokens > pretrainings["CSM"].visible_tokens
    present = dataset.presence(dataset.series)
    assert pretraining_cost(settings["toy"], present).operations_per_crop > 0


def test_memory_is_predicted_for_it(make_trainer: Callable[..., Any]) -> None:
    from nnunet_csm.pretext.memory import pretraining_memory

    trainer = make_trainer(True, pretext=TOY)
    small, large = (pretraining_memory(trainer.pretext_class, trainer.setup, batch).total for batch in (2, 8))
    assert 0 < small < large


@pytest.mark.parametrize(
    ("name", "complaint"), [("csn", "csm, mae3d"), ("toy_pretext.Nothing", "Nothing"), ("toy_pretext.Settings", "no pretext")]
)
def test_a_name_that_is_no_pretext_is_told(name: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        pretext_class(name, "plans: csm.pretext")


@pytest.mark.parametrize("name", PRETEXTS)
def test_the_registry_names_what_there_is(name: str) -> None:
    found = pretext_class(name, "")
    # there is no class of the name None
    assert found.__name__.lower() == name if found.learns else name == "none"
