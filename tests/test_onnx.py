"""A segmenter and a classifier as ONNX models: labels in onnxruntime are torch's, whatever series a patch lacks."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import DATASET_JSON, PATCH_SIZE, SERIES, checkpoint_of, csm_plans
from jaxtyping import config

from nnunet_csm import weights_folder
from nnunet_csm.files import sha256_of_file
from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import read_configuration
from nnunet_csm.schema import to_dict
from nnunet_csm.sharing import onnx_model

for package in onnx_model.PACKAGES:
    pytest.importorskip(package, reason="the extra [onnx] is not installed")

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def shapes_are_not_checked() -> Iterator[None]:
    """While torch traces, a batch of any size is a symbol, which is no int."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


def subsets() -> list[list[int]]:
    """Channels that are zero: none, one or two of three, and all."""
    return [list(absent) for count in range(4) for absent in itertools.combinations(range(len(SERIES)), count)]


def drawn(batch_size: int, absent: list[int], num_channels: int = len(SERIES)) -> torch.Tensor:
    volume = torch.randn(batch_size, num_channels, *PATCH_SIZE, generator=torch.Generator().manual_seed(len(absent)))
    # another sample of the batch has all
    volume[-1, absent] = 0
    return volume


def written(kind: str, saved: dict[str, Any], tmp_path: Path) -> tuple[Any, dict[str, Any]]:
    """The model in onnxruntime, and what the folder says of it."""
    weights = saved.pop("network_weights")
    told = onnx_model.write_onnx(kind, saved, weights, tmp_path / "model.onnx")
    weights_folder.write(tmp_path, kind, "csm", saved, weights, onnx=told)
    described = weights_folder.describe(tmp_path)
    assert described.sha256["model.onnx"] == sha256_of_file(tmp_path / "model.onnx")
    assert json.loads((tmp_path / "config.json").read_text())["onnx"] == told
    return onnx_model.open_session(tmp_path / "model.onnx"), told


def test_labels_of_a_segmenter(tmp_path: Path) -> None:
    plans = csm_plans()
    torch.manual_seed(0)
    settings = read_configuration(plans, "3d_fullres", "plans")
    network = CSMSegmenter(len(SERIES), 3, **to_dict(settings.architecture)).eval()
    # a stem that is half open is part of the network
    network.open_stem(0.5)
    session, told = written("segmenter", checkpoint_of(plans, network.state_dict()), tmp_path)
    assert told["inputs"] == {"volume": ["batch", 3, *PATCH_SIZE]} and told["outputs"] == {"logits": ["batch", 3, *PATCH_SIZE]}
    assert told["labels"] == DATASET_JSON["labels"]
    for absent, batch_size in itertools.product(subsets(), (1, 2, 3)):
        volume = drawn(batch_size, absent)
        with torch.no_grad():
            expected = network(volume).numpy()
        (found,) = session.run(None, {"volume": volume.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-3)
        # but where two classes are as good as equal
        margin = np.diff(np.sort(expected, axis=1)[:, -2:], axis=1)[:, 0]
        assert ((found.argmax(1) == expected.argmax(1)) | (margin < 1e-4)).all()


@pytest.mark.parametrize("pooling", ["attentive", "mask"])
def test_classes_of_a_classifier(tmp_path: Path, pooling: str) -> None:
    plans = csm_plans(classification={"patch_size": list(PATCH_SIZE), "pooling": pooling, "mask_features": pooling == "mask"})
    settings = read_configuration(plans, "3d_fullres", "plans")
    torch.manual_seed(0)
    # lengths of a box, volumes of all and of the two labels, and whether these are there
    num_measures = 8
    network = build_classifier(settings, len(SERIES), 2, num_measures).eval()
    saved = checkpoint_of(plans, network.state_dict()) | {"classes": ["benign", "malignant"], "by_mask_label": False}
    session, told = written("classifier", saved, tmp_path)
    assert told["classes"] == ["benign", "malignant"] and told["outputs"] == {"logits": ["batch", 2]}
    for absent in subsets():
        volume = drawn(2, absent)
        given = {"volume": volume}
        if pooling == "mask":
            measures = torch.rand(2, num_measures)
            measures[0, 4] = torch.nan
            given = {"volume": torch.cat([volume, (volume[:, :1] > 0).float()], dim=1), "measures": measures}
        with torch.no_grad():
            expected = network(*given.values()).numpy()
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert (found.argmax(1) == expected.argmax(1)).all()


def test_numbers_of_a_classifier_have_their_unit_and_name(tmp_path: Path) -> None:
    plans = csm_plans(classification={"patch_size": list(PATCH_SIZE)})
    network = build_classifier(read_configuration(plans, "3d_fullres", "plans"), len(SERIES), 1, in_units=True).eval()
    assert network.units is not None
    network.units.fit(torch.tensor([[20.0], [60.0]]))
    saved = checkpoint_of(plans, network.state_dict()) | {"classes": [], "target": "value", "by_mask_label": False}
    session, told = written("classifier", saved, tmp_path)
    assert told["outputs"] == {"values": ["batch", 1]} and "unit" in told["values"] and "probabilities" not in told
    volume = drawn(2, [])
    with torch.no_grad():
        expected = network(volume).numpy()
    np.testing.assert_allclose(session.run(["values"], {"volume": volume.numpy()})[0], expected, rtol=1e-5)
