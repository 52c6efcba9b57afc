"""A segmenter or classifier from its checkpoint or from exported weights, without the folders of nnU-Net."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.lesions import measure_names, measured_labels
from nnunet_csm.errors import UserError
from nnunet_csm.heads.base import head_in
from nnunet_csm.hub import find_weights
from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import configuration_of, read_architecture, read_configuration


def load_network(path: str | Path) -> nn.Module:
    """The segmenter or classifier in a checkpoint or in exported weights, on the CPU, in evaluation mode.

    Args:
        path: a file, a folder, or a name on Hugging Face's hub that is in the local cache, see `hub.find_weights`.

    Returns:
        A module that takes patches (b, n, z, y, x) with nnU-Net's channels, an absent series all zero, and gives logits, or
        numbers in the unit of the targets.

    Raises:
        UserError: nothing of the kind, or an encoder by itself.
    """
    path = find_weights(str(path))
    saved = checkpoint.load(path)
    if "series" in saved and "classes" not in saved:
        raise UserError(f"{path}: an encoder by itself; load it with nnunet_csm.load_encoder")
    network, _, _ = build(saved, str(path))
    checkpoint.load_weights(network, saved["network_weights"], str(path))
    return network.eval()


def build(saved: Mapping[str, Any], where: str) -> tuple[nn.Module, dict[str, tuple[int, ...]], dict[str, Any]]:
    """The network of a checkpoint as drawn, shapes of its inputs without the batch, and what its output is.

    Args:
        saved: what the checkpoint has beside its tensors.
        where: its path, for errors.

    Raises:
        UserError: a network that is not ours.
    """
    init_args = saved["init_args"]
    plans, configuration, dataset_json = (init_args[name] for name in ("plans", "configuration", "dataset_json"))
    read_architecture(plans, configuration, where)
    labels = PlansManager(plans).get_label_manager(dataset_json)
    entry, num_channels = configuration_of(plans, configuration, where), len(nnunet.channel_names(dataset_json))
    if "classes" not in saved:
        num_classes, patch = labels.num_segmentation_heads, tuple(entry["patch_size"])
        network: nn.Module = CSMSegmenter(num_channels, num_classes, **entry["architecture"]["arch_kwargs"])
        probabilities = "sigmoid, one for each region" if labels.has_regions else "softmax over the labels"
        output = {"shape": [num_classes, *patch], "probabilities": probabilities, "labels": dataset_json["labels"]}
        return network, {"volume": (num_channels, *patch)}, {"name": "logits", **output}
    settings = read_configuration(plans, configuration, where)
    num_measures = len(measure_names(measured_labels(labels, bool(saved["by_mask_label"]))))
    head = head_in(saved)
    classifier = build_classifier(settings, num_channels, head.num_outputs, num_measures, head.in_units)
    # the last channel is then the mask
    shape = num_channels + int(classifier.takes_mask), *settings.csm.classification.patch_size
    inputs: dict[str, tuple[int, ...]] = {"volume": shape}
    if classifier.measures is not None:
        inputs["measures"] = (num_measures,)
    name = head.said_name if head.in_units else "logits"
    return classifier, inputs, {"name": name, "shape": [head.num_outputs], **head.described()}
