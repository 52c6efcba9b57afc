"""The paper's presets stand on their own: what the other presets become never changes what "the paper" means."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from nnunet_csm.errors import UserError
from nnunet_csm.planning.presets import Preset, PresetNetwork, paper_preset, preset_names, read_preset
from nnunet_csm.plans import Masking, Reconstruction
from nnunet_csm.schema import from_dict

# section IV-A of arXiv 2412.07387: series, edge of the patch, epochs of pretraining
PAPER = {
    "bt_msd": (("FLAIR", "T1w", "T1ce", "T2w"), 96, 8000),
    "breast2023": (("T1ce", "DWI", "T2w"), 48, 2000),
    "prostate158": (("T2w", "DWI", "ADC"), 48, 2000),
}


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_preset_inherits_nothing(name: str) -> None:
    content = json.loads((files("nnunet_csm.presets") / f"{name}.json").read_text())
    assert "inherits_from" not in content
    # complete and without unknown keys, all by itself
    assert from_dict(Preset, content, name) == read_preset(name)


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_preset_holds_what_the_paper_states(name: str) -> None:
    preset = read_preset(name)
    series, edge, num_epochs = PAPER[name]
    assert preset.series == series
    assert preset.patch_size == (edge, edge, edge)
    assert (preset.network.width, preset.network.depth, preset.network.num_heads) == (768, 12, 12)  # ViT-B
    assert preset.token_size == (16, 16, 16)  # "/16"
    assert preset.masking == Masking(mask_ratio=0.875, places="independent", hidden_series="rebuilt")

    pretraining = preset.pretraining
    assert (pretraining.passes, pretraining.num_crops, pretraining.batch_size) == (num_epochs, None, 6)
    # Adam: AdamW without weight decay; "cosine decay starting at 1e-3", so without a warm-up
    assert (pretraining.learning_rate, pretraining.weight_decay, pretraining.warmup) == (1e-3, 0.0, 0.0)

    finetuning = preset.finetuning
    assert (finetuning.batch_size, finetuning.learning_rate, finetuning.weight_decay) == (6, 5e-3, 0.01)


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_preset_holds_what_docs_paper_md_says_of_the_open_points(name: str) -> None:
    preset = read_preset(name)
    assert preset.network == PresetNetwork(width=768, depth=12, num_heads=12, features=16, drop_path=0.0)
    assert preset.reconstruction == Reconstruction(width=384, depth=4, num_heads=6, normalize_targets=False)
    assert preset.pretraining_grid is None  # pretraining on the patch of fine-tuning
    assert preset.pretraining.betas == preset.finetuning.betas == (0.9, 0.999)
    assert preset.pretraining.layer_decay == preset.finetuning.layer_decay == 1.0
    assert preset.pretraining.iterations_per_epoch == 1000
    assert (preset.finetuning.num_crops, preset.finetuning.passes) == (100_000, None)
    assert (preset.finetuning.warmup, preset.finetuning.iterations_per_epoch) == (0.0, 250)
    assert (preset.encoder, preset.mirroring) == ("auto", True)


def test_the_papers_datasets_are_found_by_their_series_in_any_order() -> None:
    assert {paper_preset(series[::-1]) for series, _, _ in PAPER.values()} == set(PAPER)


@pytest.mark.parametrize("name", preset_names())
def test_no_preset_inherits_from_a_paper_preset(name: str) -> None:
    content = json.loads((files("nnunet_csm.presets") / f"{name}.json").read_text())
    assert content.get("inherits_from") not in PAPER


def write(path: Path, content: dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def test_a_file_inherits_from_a_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "half.json", {"inherits_from": "S", "masking": {"mask_ratio": 0.5}})
    child = read_preset(write(tmp_path / "folder" / "child.json", {"inherits_from": "half.json", "ema": 0.9}))
    assert (child.masking.mask_ratio, child.ema) == (0.5, 0.9) and child.network == read_preset("S").network


@pytest.mark.parametrize(
    ("parent", "complaint"),
    [("b.json", "inherits from it"), ("a.json", "inherits from it"), ("paper", "no preset 'paper'"), (3, "3")],
)
def test_what_cannot_be_inherited_is_named(tmp_path: Path, parent: Any, complaint: str) -> None:
    write(tmp_path / "b.json", {"inherits_from": "a.json"})
    with pytest.raises(UserError, match=complaint) as caught:
        read_preset(write(tmp_path / "a.json", {"inherits_from": parent}))
    assert "auto" not in str(caught.value)
