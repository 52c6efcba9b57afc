"""The paper's presets stand on their own: what the other presets become never changes what "the paper" means."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from nnunet_csm.errors import UserError
from nnunet_csm.planning.presets import Preset, merged, paper_preset, preset_names, read_preset
from nnunet_csm.pretext import csm, mae3d
from nnunet_csm.pretext.base import Pretext, read_pretext
from nnunet_csm.pretext.masking import Masking
from nnunet_csm.pretext.rebuilding import Reconstruction
from nnunet_csm.schema import from_dict

# section IV-A of arXiv 2412.07387: series, edge of the patch, epochs of pretraining
PAPER = {
    "bt_msd": (("FLAIR", "T1w", "T1ce", "T2w"), 96, 8000),
    "breast2023": (("T1ce", "DWI", "T2w"), 48, 2000),
    "prostate158": (("T2w", "DWI", "ADC"), 48, 2000),
}


HEARTS = "studies/few_labels_hearts.json"


def pretext_of(preset: Preset) -> tuple[type[Pretext], Any]:
    """Its pretext's class and settings."""
    return read_pretext(preset.pretext, preset.architecture(("T1w",), (0,), (16, 16, 16)), "preset")


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
    network = preset.architecture(series, tuple(range(len(series))), (16, 16, 16))
    assert (network.width, network.depth, network.num_heads) == (768, 12, 12)  # ViT-B
    assert preset.token_size == (16, 16, 16)  # "/16"
    pretext, settings = pretext_of(preset)
    assert pretext is csm.CSM
    assert settings.masking == Masking(mask_ratio=0.875, places="independent", hidden_series="rebuilt")

    pretraining = preset.pretraining
    assert (pretraining.passes, pretraining.num_crops, pretraining.batch_size) == (num_epochs, None, 6)
    # Adam: AdamW without weight decay; "cosine decay starting at 1e-3", so without a warm-up
    assert (pretraining.learning_rate, pretraining.weight_decay, pretraining.warmup) == (1e-3, 0.0, 0.0)

    finetuning = preset.finetuning
    assert (finetuning.batch_size, finetuning.learning_rate, finetuning.weight_decay) == (6, 5e-3, 0.01)


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_preset_holds_what_docs_paper_md_says_of_the_open_points(name: str) -> None:
    preset = read_preset(name)
    vit_b = {"width": 768, "depth": 12, "num_heads": 12, "features": 16, "drop_path": 0.0}
    # of what the paper does not say, MAE's
    assert preset.network == vit_b | {"encoder": {"positions": "mae", "series_embedding_std": 0.02, "query_key_gain": 0.0}}
    assert pretext_of(preset)[1].reconstruction == Reconstruction(width=384, depth=4, num_heads=6, normalize_targets=False)
    assert preset.pretraining_grid is None  # pretraining on the patch of fine-tuning
    assert preset.pretraining.betas == preset.finetuning.betas == (0.9, 0.999)
    assert preset.pretraining.layer_decay == preset.finetuning.layer_decay == 1.0
    assert preset.pretraining.iterations_per_epoch == 1000
    assert (preset.finetuning.num_crops, preset.finetuning.passes) == (100_000, None)
    assert (preset.finetuning.warmup, preset.finetuning.iterations_per_epoch) == (0.0, 250)
    assert (preset.encoder, preset.mirroring) == ("auto", True)


def test_the_papers_datasets_are_found_by_their_series_in_any_order() -> None:
    assert {paper_preset(series[::-1]) for series, _, _ in PAPER.values()} == set(PAPER)


def test_the_preset_for_cpus_is_what_gained_on_hearts_but_for_the_patch_of_pretraining() -> None:
    shipped, study = (json.loads((files("nnunet_csm.presets") / name).read_text()) for name in ("cpu.json", HEARTS))
    del shipped["description"], study["changes"]["pretraining_grid"]
    assert shipped == {"inherits_from": study["preset"], **study["changes"]}


@pytest.mark.parametrize("name", preset_names())
def test_no_preset_inherits_from_a_paper_preset(name: str) -> None:
    content = json.loads((files("nnunet_csm.presets") / f"{name}.json").read_text())
    assert content.get("inherits_from") not in PAPER


def write(path: Path, content: dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return str(path)


def test_what_a_preset_says_of_itself_is_not_said_of_one_that_changes_it(tmp_path: Path) -> None:
    child = read_preset(write(tmp_path / "child.json", {"inherits_from": "cpu", "ema": 0.9}))
    assert child.description == f"changed from: {read_preset('cpu').description}"
    assert read_preset(write(tmp_path / "own.json", {"inherits_from": "cpu", "description": "mine"})).description == "mine"


def test_a_file_inherits_from_a_file_beside_it(tmp_path: Path) -> None:
    write(tmp_path / "folder" / "half.json", {"inherits_from": "S", "pretext": {"masking": {"mask_ratio": 0.5}}})
    child = read_preset(write(tmp_path / "folder" / "child.json", {"inherits_from": "half.json", "ema": 0.9}))
    assert (child.pretext["masking"]["mask_ratio"], child.ema) == (0.5, 0.9) and child.network == read_preset("S").network


def test_another_pretext_takes_over_what_it_knows_of_the_settings(tmp_path: Path) -> None:
    b = read_preset("B")
    network = {"encoder": {"kind": "joint_vit"}}
    changes = {"name": "mae3d", "reconstruction": {"depth": 2}}
    child = read_preset(write(tmp_path / "a.json", {"inherits_from": "B", "network": network, "pretext": changes}))
    pretext, settings = pretext_of(child)
    assert pretext is mae3d.MAE3D
    assert settings.masking == mae3d.PlaceMasking(b.pretext["masking"]["mask_ratio"])
    assert settings.reconstruction == from_dict(Reconstruction, b.pretext["reconstruction"] | {"depth": 2}, "B")
    # nothing of the other is lost when the name stays, or is repeated
    for same in ({}, {"name": "csm"}):
        kept = merged({"pretext": b.pretext}, {"pretext": same | {"masking": {"places": "shared"}}})["pretext"]
        assert kept == b.pretext | {"masking": b.pretext["masking"] | {"places": "shared"}}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"network": {"joint_tokens": True}}, r"encoder\.kind in arch_kwargs is 'joint_vit'; set it to 'vit'"),
        ({"pretext": {"name": "other"}}, "pretext.name is 'other', expected one of csm, mae3d"),
        ({"pretext": {"name": 3}}, "pretext has no name, expected one of csm, mae3d"),
        ({"pretext": {"name": "mae3d"}}, r"encoder\.kind in arch_kwargs is 'vit'; set it to 'joint_vit'"),
        ({"pretext": {"mask": 1}}, "pretext: unknown mask"),
        ({"network": {"encoder": {"gain": 1}}}, "encoder: unknown gain"),
        ({"network": {"series": ["T1w"], "dropout": 0.1}}, "network: unknown dropout"),
    ],
)
def test_settings_that_are_not_where_they_belong_are_named_with_the_file(tmp_path: Path, content: Any, complaint: str) -> None:
    path = write(tmp_path / "a.json", {"inherits_from": "B"} | content)
    with pytest.raises(UserError, match=complaint) as caught:
        read_preset(path)
    assert path in str(caught.value)


@pytest.mark.parametrize(
    ("parent", "complaint"),
    [("b.json", "inherits from it"), ("a.json", "inherits from it"), ("paper", "no preset 'paper'"), (3, "3")],
)
def test_what_cannot_be_inherited_is_named(tmp_path: Path, parent: Any, complaint: str) -> None:
    write(tmp_path / "b.json", {"inherits_from": "a.json"})
    with pytest.raises(UserError, match=complaint) as caught:
        read_preset(write(tmp_path / "a.json", {"inherits_from": parent}))
    assert "auto" not in str(caught.value)


def test_settings_of_the_pretext_are_read_where_earlier_versions_had_them(tmp_path, capsys):
    now, earlier = tmp_path / "now.json", tmp_path / "earlier.json"
    now.write_text(json.dumps({"inherits_from": "demo", "pretext": {"masking": {"mask_ratio": 0.625}}}))
    earlier.write_text(json.dumps({"inherits_from": "demo", "masking": {"mask_ratio": 0.625}}))
    assert read_preset(str(earlier)).pretext == read_preset(str(now)).pretext != read_preset("demo").pretext
    assert capsys.readouterr().out.splitlines() == [
        f'preset {earlier}: masking are read as parts of "pretext", where they belong now'
    ]
