"""The examples run, and what they leave behind is what they say."""

import json
import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

import nnunet_csm
from nnunet_csm.data.draws import Draws
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.planning.presets import read_preset
from nnunet_csm.pretext.base import Batch, Pretext, Setup, read_pretext
from nnunet_csm.pretext.memory import pretraining_memory

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_pretraining_without_nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = EXAMPLES / "pretrain.py", tmp_path / "encoder.pt"
    monkeypatch.setattr("sys.argv", [str(script), "-n", "40", "-o", str(out)])
    names = runpy.run_path(str(script), run_name="__main__")
    first, last = (float(line.split("held out ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()[:2])
    assert last < 0.8 * first
    build_encoder(names["ENCODER"]).load_state_dict(torch.load(out, weights_only=True))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pretext:
    """The pretext of `own_pretext.py`, by a preset as its docstring has it, on three series."""
    monkeypatch.syspath_prepend(EXAMPLES)
    said = (EXAMPLES / "own_pretext.py").read_text()
    preset = json.loads(said[said.index("{") : said.index("}}") + 2])
    preset["pretext"]["num_hidden"] = 2
    (tmp_path / "own.json").write_text(json.dumps(preset))
    read = read_preset(str(tmp_path / "own.json"))
    architecture = read.architecture(("FLAIR", "T1w", "T1ce"), (0, 1, 2), (4, 4, 4))
    cls, settings = read_pretext(read.pretext, architecture, "own.json")
    torch.manual_seed(0)
    return cls(Setup(architecture, settings, (8, 8, 12)))


def test_a_pretext_of_ones_own_hides_series_that_are_there_and_leaves_one(own: Pretext) -> None:
    present = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 1]], dtype=torch.bool).repeat(20, 1)
    volumes = (torch.randn(len(present), 3, 8, 8, 12),)
    drawn = own.draw(Draws(0, torch.arange(len(present))), present, 0, volumes, True)
    shown, hidden = drawn.tensors
    assert (shown ^ hidden).equal(present) and not (shown & hidden).any()
    assert shown.sum(1).eq(1).all()
    assert (shown[::3].any(0) & hidden[::3].any(0)).all()
    assert own.weight(drawn) == 20 * (2 + 1)
    assert own.seen_tokens(present) == own.setup.num_tokens


def test_a_pretext_of_ones_own_learns_and_parts_of_its_batch_add_up(own: Pretext) -> None:
    batch = own.example(4, 0)
    # each sample as bright as its number, in all series
    batch = Batch((batch.volumes[0] + torch.arange(4.0)[:, None, None, None, None],), batch.drawn)
    whole = own(*batch.args)
    parts = own(*batch[:1].args) + own(*batch[1:].args)
    torch.testing.assert_close(whole, parts)
    optimizer = torch.optim.AdamW(own.parameters(), 1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = own(*batch.args) / own.weight(batch.drawn)
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * whole / own.weight(batch.drawn)
    assert pretraining_memory(type(own), own.setup, 4).total > 0
    assert own.described(own.setup, {3: 4}) == [("pretext", "HiddenMeans", "num_hidden 2")]


def test_features_of_some_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Given to a stand-in for the encoder: images at its spacing; what it gives is kept."""
    given: dict[str, np.ndarray] = {}

    def features(images: dict[str, np.ndarray]) -> SimpleNamespace:
        given.update(images)
        return SimpleNamespace(tokens=torch.zeros(2, 8, 6), map=torch.ones(6, 2, 2, 2), vector=torch.ones(6))

    encoder = SimpleNamespace(series=("FLAIR", "T1w", "T2w"), token_size=(4, 4, 4), spacing=(2.0, 1.0, 1.0), features=features)
    monkeypatch.setattr(nnunet_csm, "load_encoder", lambda path: encoder, raising=False)
    for name, slice_thickness in {"flair": 2.0, "t1": 4.0}.items():
        image = sitk.GetImageFromArray(np.random.default_rng(0).normal(100, 10, (8, 10, 12)))
        image.SetSpacing((1.0, 1.0, slice_thickness))
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    images = [f"FLAIR={tmp_path / 'flair.nii.gz'}", f"T1w={tmp_path / 't1.nii.gz'}"]
    script, out = str(EXAMPLES / "features.py"), tmp_path / "features.pt"
    monkeypatch.setattr("sys.argv", [script, "checkpoint_final.pth", *images, "-o", str(out)])
    runpy.run_path(script, run_name="__main__")
    assert "tokens (2, 8, 6)" in capsys.readouterr().out
    assert {series: volume.shape for series, volume in given.items()} == {"FLAIR": (8, 10, 12), "T1w": (16, 10, 12)}
    assert given["FLAIR"].mean() == pytest.approx(100, abs=2)
    assert torch.load(out, weights_only=True)["map"].shape == (6, 2, 2, 2)
