"""A folder of weights that load elsewhere: `model.safetensors` and `config.json`, in which nothing can be executed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from nnunet_csm.errors import UserError, reason
from nnunet_csm.files import sha256_of_file, write_text
from nnunet_csm.schema import Name, Within, from_dict, parse_json, to_dict

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
VERSION = 1
REMEDY = "export the weights again, or get the folder again"


@dataclass(frozen=True)
class Description:
    """What `config.json` holds.

    Attributes:
        kind: encoder (of a pretraining), segmenter or classifier.
        method: what it learned from: the name of a pretext, or of others' weights.
        images: what images are to be like, see `images_of`.
        checkpoint: what a checkpoint of ours has beside its tensors, the plans among it.
        sha256: of the other files, by name.
        onnx: inputs and outputs of `model.onnx`, where there is one.
    """

    format: Literal["nnunet_csm"]
    version: Annotated[int, Within(1, VERSION)]
    kind: Literal["encoder", "segmenter", "classifier"]
    method: str
    images: dict[str, Any]
    checkpoint: dict[str, Any]
    sha256: dict[Name, str]
    onnx: dict[str, Any] | None = None


def is_one(path: str | Path) -> bool:
    """Whether a path is such a folder."""
    return (Path(path) / CONFIG).is_file()


def images_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Series and their channels, spacing in mm, sizes in voxels along (z, y, x), and normalisation, as the plans have them.

    Args:
        saved: what a checkpoint has beside its tensors, with one configuration in its plans, which inherits nothing.

    Raises:
        KeyError, TypeError: it has not.
    """
    plans = saved["init_args"]["plans"]
    entry = plans["configurations"][saved["init_args"]["configuration"]]
    network = entry["architecture"]["arch_kwargs"]
    # an encoder takes the series in their order; it may know more of them than the plans' dataset has
    series = list(saved.get("series", network["series"]))
    channels = network["channels"] if series == list(network["series"]) else range(len(series))
    return {
        "series": series,
        "channels": dict(zip(series, channels, strict=True)),
        "spacing": list(entry["spacing"]),
        "patch_size": list((entry["csm"]["classification"] if "classes" in saved else entry)["patch_size"]),
        "token_size": list(network["token_size"]),
        "normalization_schemes": list(entry.get("normalization_schemes", [])),
        "use_mask_for_norm": list(entry.get("use_mask_for_norm", [])),
        "transpose_forward": list(plans.get("transpose_forward", [0, 1, 2])),
    }


def write(folder: Path, kind: str, method: str, saved: Mapping[str, Any], weights: Mapping[str, Tensor], **others: Any) -> None:
    """Write weights and their description into a folder that is there, without a card.

    Args:
        folder: what else is in it is named in the description, with its hash.
        kind, method: see `Description`.
        saved: what a checkpoint has beside its tensors; see `images_of`.
        weights: of the network.
        others: `onnx` of the description.
    """
    # safetensors refuses what shares memory, as tied weights do, and writes files that nobody else may read
    alone = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    (folder / WEIGHTS).write_bytes(save(alone))
    plain = json.loads(json.dumps(saved))
    hashes = {file.name: sha256_of_file(file) for file in sorted(folder.iterdir())}
    content = {"format": "nnunet_csm", "version": VERSION, "kind": kind, "method": method, "images": images_of(plain)}
    described = from_dict(Description, {**content, "checkpoint": plain, "sha256": hashes, **others}, CONFIG)
    write_text(folder / CONFIG, json.dumps(to_dict(described), indent=2, ensure_ascii=False) + "\n")


def describe(folder: Path) -> Description:
    """Read `config.json`.

    Raises:
        UserError: there is none, or it is not ours, or contradicts itself.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no {CONFIG} in it; expected a folder written by `nnunet_csm export_weights`")
    data = parse_json(path.read_bytes(), str(path), REMEDY)
    if data.get("format") != "nnunet_csm":
        raise UserError(
            f"{path}: a description of other weights, expected those of `nnunet_csm export_weights`; weights of some others are "
            f"brought in with `nnunet_csm import_weights`"
        )
    described: Description = from_dict(Description, data, str(path))
    try:
        told = images_of(described.checkpoint)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its plans are not whole ({type(error).__name__}: {reason(error)}); {REMEDY}") from None
    if different := [name for name in {**told, **described.images} if told.get(name) != described.images.get(name)]:
        name = different[0]
        raise UserError(
            f"{path}: images.{name} is {described.images.get(name)}, its plans say {told.get(name)}; it was changed: {REMEDY}"
        )
    return described


def read(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds that such a folder was made of, as far as it is in there.

    Raises:
        UserError: no such folder, or one that is not whole or was changed.
    """
    described, path = describe(folder), folder / WEIGHTS
    if not path.is_file():
        raise UserError(f"{path}: no such file; {REMEDY}")
    if (found := sha256_of_file(path)) != (expected := described.sha256.get(WEIGHTS)):
        raise UserError(f"{path}: its SHA-256 is {found}, {CONFIG} says {expected}; it is damaged, or of others: {REMEDY}")
    return {**described.checkpoint, "network_weights": load_tensors(path, REMEDY)}


def load_tensors(path: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        UserError: no such file, or not of that format; `remedy` says what to do.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not readable as safetensors ({reason(error)}); {remedy}") from None
