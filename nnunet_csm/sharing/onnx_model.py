"""A segmenter or classifier as an ONNX model: whoever runs it needs neither this package nor torch."""

import importlib.util
import logging
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.sharing.network import build

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OPSET = 18
# of an output, as a share of the largest one: rounding in another order; labels then differ where two logits are as close
MOST_DIFFERENCE = 1e-3


def write_onnx(kind: str, saved: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Export a network and compare it with the original on patches that have all series, and that lack one.

    Args:
        kind: of the network, see `weights_folder.Description`.
        saved: what a checkpoint has beside its tensors.
        weights: of the network.
        path: of the model.

    Returns:
        Its inputs and outputs, for the description.

    Raises:
        UserError: an encoder by itself, packages that are not installed, or a network that cannot be exported.
    """
    if kind == "encoder":
        raise UserError("--onnx: an encoder without a segmenter or classifier; fine-tune one and name its trainer with -tr")
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"--onnx needs {', '.join(missing)}; pip install 'nnunet_csm[onnx]'")
    network, inputs, output = build(saved, "the checkpoint")
    checkpoint.load_weights(network, weights, "the checkpoint")
    network.eval()
    name, shape = output.pop("name"), output.pop("shape")
    example = draw(inputs, 2)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), torch.no_grad():
        # torch's of its own parts, and its log of every step
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(
                network,
                tuple(example.values()),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                external_data=False,
                input_names=list(inputs),
                output_names=[name],
                dynamic_shapes=tuple({0: batch} for _ in inputs),
            )
        except torch.onnx.OnnxExporterError as error:
            raise UserError(
                f"this network cannot be exported to ONNX ({str(error).splitlines()[0]}); leave out --onnx"
            ) from error
    assert program is not None
    program.save(str(path))
    compare(network, inputs, path)
    told = {given: ["batch", *one] for given, one in inputs.items()}
    return {"opset": OPSET, "inputs": told, "outputs": {name: ["batch", *shape]}, **output}


def draw(inputs: Mapping[str, tuple[int, ...]], batch_size: int) -> dict[str, Tensor]:
    """Inputs with smooth patterns, of which the last sample lacks the first series."""
    drawn = {}
    for name, shape in inputs.items():
        numbers = torch.arange(batch_size * math.prod(shape), dtype=torch.float32).view(batch_size, *shape)
        drawn[name] = (0.37 * numbers).sin() + (0.0011 * numbers).cos()
    if drawn["volume"].shape[1] > 1:
        drawn["volume"][-1, 0] = 0
    return drawn


def compare(network: nn.Module, inputs: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Raise UserError when onnxruntime computes something else of a model than torch does, in batches of 1 and 3."""
    session = open_session(path)
    for batch_size in (1, 3):
        given = draw(inputs, batch_size)
        with torch.no_grad():
            expected = network(*given.values()).numpy()
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        most = float(np.abs(found - expected).max())
        if not most <= MOST_DIFFERENCE * max(1.0, float(np.abs(expected).max())):
            raise UserError(
                f"{path.name}: onnxruntime's outputs differ from torch's by up to {most:g}; nothing was written: leave out --onnx"
            )


def open_session(path: Path) -> Any:
    """The model in onnxruntime, on one core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
