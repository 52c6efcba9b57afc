"""The examples run, and what they leave behind is what they say."""

import runpy
from pathlib import Path

import pytest
import torch

from nnunet_csm.model.encoder import build_encoder

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_pretraining_without_nnunet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script, out = EXAMPLES / "pretrain.py", tmp_path / "encoder.pt"
    monkeypatch.setattr("sys.argv", [str(script), "-n", "40", "-o", str(out)])
    names = runpy.run_path(str(script), run_name="__main__")
    first, last = (float(line.split("held out ")[1].split()[0]) for line in capsys.readouterr().out.splitlines()[:2])
    assert last < 0.8 * first
    build_encoder(names["ENCODER"]).load_state_dict(torch.load(out, weights_only=True))
