"""What `nnunet_csm cite` says is what plans and checkpoints hold, and what they do not tell stands in brackets."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_folders import NUM_TEST, NUM_TRAINING, PlannedDataset

from nnunet_csm import __version__, checkpoint, cli
from nnunet_csm.citing.command import DECODER_PAPERS, FUSION_PAPERS, PRESET_PAPERS, PRETEXT_PAPERS, claim_items, references
from nnunet_csm.planning.presets import preset_names
from nnunet_csm.pretext.base import PRETEXTS

ROOT = Path(__file__).parents[1]
PLANS, FINETUNER, PRETRAINER = "nnUNetCSMPlans", "nnUNetTrainerCSM", "nnUNetTrainerCSMPretrain"


@pytest.fixture
def cited(planned_dataset: PlannedDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Cite the planned phantom, with results of this test's own."""
    for name, value in planned_dataset.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "results").mkdir()

    def cite(*flags: str) -> str:
        assert cli.main(["cite", "-d", "900", "-o", str(tmp_path / "methods.md"), "--overwrite", *flags]) == 0
        return (tmp_path / "methods.md").read_text(encoding="utf-8")

    return cite


def train(dataset: PlannedDataset, results: Path, trainer: str, fold: str = "0", **told: Any) -> Path:
    """A checkpoint as a finished training leaves it, of a network without weights."""
    plans = json.loads((dataset.folders.preprocessed / dataset.name / f"{PLANS}.json").read_text())
    folder = results / dataset.name / f"{trainer}__{PLANS}__3d_fullres" / f"fold_{fold}"
    folder.mkdir(parents=True)
    saved = {
        "network_weights": {"w": torch.zeros(1)},
        "init_args": {"plans": plans, "configuration": "3d_fullres", "device": "cpu"},
        "trainer_name": trainer,
        "current_epoch": 7,
        "software": {**checkpoint.software(), "torch": "9.8.7"},
        "logging": {"epoch_start_timestamps": [0.0, 100.0], "epoch_end_timestamps": [60.0, 160.0]},
    }
    checkpoint.save(saved | told, folder / "checkpoint_final.pth")
    return folder


def test_what_authors_have_written_is_kept(cited, tmp_path, capsys) -> None:
    (tmp_path / "methods.md").write_text("edited")
    with pytest.raises(SystemExit):
        cli.main(["cite", "-d", "900", "-o", str(tmp_path / "methods.md")])
    assert "exists and is kept; give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "methods.md").read_text() == "edited"


def test_before_any_training_it_says_what_is_planned_and_marks_the_rest(cited, planned_dataset) -> None:
    text = cited()
    assert f"{NUM_TRAINING} labelled cases" in text and f"and {NUM_TEST} in imagesTs" in text and "FLAIR, T1w, T1ce" in text
    assert "[which folds: no training is finished]" in text and "[hours]" in text and "[device]" in text
    assert "preset" in text and PLANS in text and f"nnunet_csm {__version__}" in text


def test_what_checkpoints_tell_is_said(cited, planned_dataset, tmp_path) -> None:
    encoder = train(planned_dataset, tmp_path / "results", PRETRAINER, training_cases=["a", "b", "c"])
    for fold in ("0", "3"):
        train(planned_dataset, tmp_path / "results", FINETUNER, fold, encoder_source=str(encoder / "checkpoint_final.pth"))
    text = cited()
    assert "PyTorch 9.8.7" in text and "images of 3 training cases" in text
    assert "in folds 0, 3" in text and "in fold 0," in text
    # 7 epochs of 3 steps, of 4 and of 2 samples; see tiny.json
    assert "21 steps of 4 (84 patches)" in text and "21 steps of 2 (42 patches)" in text
    assert "2 min a fold on a CPU" in text
    assert "[@csm]" in text and "@misc{csm," in text and "@inproceedings{mae3d," not in text


def test_of_an_encoder_that_is_not_here_nothing_is_told(cited, planned_dataset, tmp_path) -> None:
    train(planned_dataset, tmp_path / "results", PRETRAINER, training_cases=["a", "b", "c"])
    elsewhere = f"/gone/{planned_dataset.name}/{PRETRAINER}__Others__3d_fullres/fold_0/checkpoint_final.pth"
    folder = train(planned_dataset, tmp_path / "results", FINETUNER, encoder_source=elsewhere)
    assert "images of [number] training cases" in cited()
    moved = elsewhere.replace("Others", PLANS)
    checkpoint.save(checkpoint.load(folder / "checkpoint_final.pth") | {"encoder_source": moved}, folder / "checkpoint_final.pth")
    assert "images of 3 training cases" in cited()


def test_a_run_from_scratch_cites_no_pretraining(cited, planned_dataset, tmp_path) -> None:
    train(planned_dataset, tmp_path / "results", PRETRAINER, training_cases=["a"])
    train(planned_dataset, tmp_path / "results", FINETUNER, encoder_source="scratch")
    text = cited()
    assert "trained from scratch" in text and "@misc{csm," not in text and "pretrained without" not in text


def test_the_plans_of_the_run_count_not_those_that_were_made_since(cited, planned_dataset, tmp_path) -> None:
    folder = train(planned_dataset, tmp_path / "results", FINETUNER, encoder_source="scratch")
    saved = checkpoint.load(folder / "checkpoint_final.pth")
    saved["init_args"]["plans"]["configurations"]["3d_fullres"]["csm"]["seed"] = 4711
    checkpoint.save(saved, folder / "checkpoint_final.pth")
    assert "seed 4711" in cited()


def test_a_gpu_is_named_by_what_nnunet_wrote_of_it(cited, planned_dataset, tmp_path) -> None:
    init_args = {"configuration": "3d_fullres", "device": "cuda:0"}
    plans = json.loads((planned_dataset.folders.preprocessed / planned_dataset.name / f"{PLANS}.json").read_text())
    folder = train(planned_dataset, tmp_path / "results", FINETUNER, init_args=init_args | {"plans": plans})
    (folder / "debug.json").write_text('{"gpu_name": "Imaginary 9000"}')
    assert "on Imaginary 9000" in cited()


def test_without_a_file_it_is_printed(cited, capsys) -> None:
    written = cited()
    capsys.readouterr()
    assert cli.main(["cite", "-d", "900"]) == 0
    assert capsys.readouterr().out.strip() == written.strip()


def test_the_checklist_has_all_items_each_once(cited) -> None:
    rows = re.findall(r"^\| +(\d+) \|", cited(), flags=re.MULTILINE)
    assert rows == list(claim_items()) == [str(number) for number in range(1, 43)]


def test_every_paper_that_may_be_cited_is_there_and_every_method_has_one() -> None:
    papers = PRETEXT_PAPERS | PRESET_PAPERS | DECODER_PAPERS | FUSION_PAPERS
    assert {key for keys in papers.values() for key in keys} | {"nnunet", "nnunet_csm", "vit", "claim"} == set(references())
    assert set(PRETEXTS) - set(PRETEXT_PAPERS) == {"ae", "none"}
    assert set(PRESET_PAPERS) <= set(preset_names())


def test_references_agree_with_the_citation_file() -> None:
    """CITATION.cff is not installed; what it names is in ours."""
    said, entries = (ROOT / "CITATION.cff").read_text(encoding="utf-8"), references()
    for name in re.findall(r"family-names: (\S+)", said):
        assert name in entries["csm"] + entries["nnunet"]
    assert f"version: {__version__}" in said and f"version = {{{__version__}}}" in entries["nnunet_csm"]
    assert "2412.07387" in said and "2412.07387" in entries["csm"]


def test_entries_are_balanced_bibtex() -> None:
    for key, entry in references().items():
        assert re.match(rf"@\w+\{{{key},\n", entry) and entry.endswith("\n}")
        assert entry.count("{") == entry.count("}")
