"""An encoder loaded from Python: any subset of series, and checkpoints of plans before version 3."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nnunet_csm
from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.model.frozen import FrozenEncoder


@pytest.fixture
def saved(make_trainer: Callable[..., Any], tmp_path: Path) -> Path:
    trainer = make_trainer(True)
    trainer.initialize()
    trainer.open_banks()
    path = tmp_path / "encoder.pth"
    trainer.save_checkpoint(str(path))
    return path


def images(names: tuple[str, ...], shape: tuple[int, int, int] = (7, 13, 18)) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    return {name: draws.normal(2.0, 3.0, shape) for name in names}


def test_features_of_an_image_do_not_depend_on_series_that_are_not_given(saved: Path) -> None:
    encoder = nnunet_csm.load_encoder(saved)
    assert encoder.series == ("FLAIR", "T1w", "T1ce") and encoder.token_size == (2, 4, 4) and encoder.spacing == (8.0, 5.0, 5.0)
    every = images(encoder.series)
    found = encoder.features(every)
    assert found.tokens.shape == (3, 4 * 4 * 5, 24) and found.map.shape == (24, 4, 4, 5) and found.vector.shape == (24,)
    some = encoder.features({name: every[name] for name in ("T1ce", "FLAIR")})
    assert some.series == ("FLAIR", "T1ce") and some.tokens.shape[0] == 2
    assert not torch.allclose(some.tokens[0], found.tokens[0])
    # the map is the mean over the given series
    torch.testing.assert_close(some.map.flatten(1).T, some.tokens.mean(0))


def test_scale_and_offset_of_a_series_are_taken_out_unless_it_is_normalised(saved: Path) -> None:
    encoder = nnunet_csm.load_encoder(saved)
    one = images(("T1w",))["T1w"]
    expected = encoder.features({"T1w": one}).vector
    torch.testing.assert_close(encoder.features({"T1w": 5 * one + 100}).vector, expected, rtol=1e-4, atol=1e-5)
    normal = (one - one.mean()) / one.std(ddof=1)
    torch.testing.assert_close(encoder.features({"T1w": normal}, normalize=False).vector, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({}, "none"),
        ({"PET": np.ones((4, 4, 4))}, "FLAIR, T1w, T1ce"),
        ({"T1w": np.ones((4, 4, 4)), "FLAIR": np.ones((4, 4, 8))}, "one shape"),
        ({"T1w": np.zeros((4, 4, 4))}, "T1w is zero"),
        ({"T1w": np.full((4, 4, 4), np.nan)}, "no numbers"),
    ],
)
def test_what_cannot_be_encoded_is_told(saved: Path, given: dict[str, np.ndarray], complaint: str) -> None:
    encoder: FrozenEncoder = nnunet_csm.load_encoder(saved)
    with pytest.raises(UserError, match=complaint):
        encoder.features(given)


def test_a_checkpoint_of_plans_of_version_2_loads(saved: Path, tmp_path: Path) -> None:
    content = checkpoint.load(saved)
    entry = content["init_args"]["plans"]["configurations"]["3d_fullres"]
    kwargs, csm = entry["architecture"]["arch_kwargs"], entry["csm"]
    del kwargs["encoder"]
    kwargs["joint_tokens"] = False
    pretext = csm.pop("pretext")
    csm |= {"version": 2, "masking": pretext["masking"], "reconstruction": pretext["reconstruction"]}
    checkpoint.save(content, str(tmp_path / "old.pth"))
    given = images(("T1w", "FLAIR"))
    old, new = (nnunet_csm.load_encoder(path).features(given).tokens for path in (tmp_path / "old.pth", saved))
    assert torch.equal(old, new)


def test_importing_the_package_does_not_wait_for_torch() -> None:
    import subprocess
    import sys

    code = "import sys, nnunet_csm; nnunet_csm.__version__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
