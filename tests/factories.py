"""What several tests are made of: plans as the planner writes them, for data and networks of a few voxels."""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nnunet_csm.data.bank import Bank
from nnunet_csm.data.crops import Crops, Occupancy
from nnunet_csm.planning.facts import Facts, Wishes
from nnunet_csm.planning.planner import plan
from nnunet_csm.planning.presets import merged
from nnunet_csm.plans import Architecture, Configuration, Source, read_configuration
from nnunet_csm.pretext import csm as csm_pretext
from nnunet_csm.pretext import mae3d
from nnunet_csm.pretext.base import Pretext, Setup, setup_of
from nnunet_csm.pretext.masking import Mask, Masking
from nnunet_csm.pretext.memory import Memory
from nnunet_csm.pretext.rebuilding import Reconstruction
from nnunet_csm.schema import Size
from nnunet_csm.training.pretraining import nnUNetTrainerCSMPretrain
from nnunet_csm.training.segmentation import nnUNetTrainerCSM

Request = TypeVar("Request")

SERIES = ("FLAIR", "T1w", "T2w")
# an order of tokens that is mixed up shows on a grid with three different edges
GRID_SIZE = (2, 3, 5)
TOKEN_SIZE = (2, 4, 2)
PATCH_SIZE = (4, 12, 10)
TINY = {"width": 24, "depth": 3, "num_heads": 2, "features": 4, "drop_path": 0.0}
TINY_DECODER = {"width": 12, "depth": 1, "num_heads": 2}
MASKING = Masking(mask_ratio=0.875, places="independent", hidden_series="rebuilt")
# changes that make plans of CSM those of MAE3D
JOINT_NETWORK: dict[str, Any] = {"encoder": {"kind": "joint_vit"}}
JOINT: dict[str, Any] = {"architecture": JOINT_NETWORK, "pretext": "mae3d", "masking": {"mask_ratio": 0.75}}

DATASET_JSON = {
    "channel_names": {str(channel): name for channel, name in enumerate(SERIES)},
    "labels": {"background": 0, "edema": 1, "tumor": 2},
    "numTraining": 10,
    "file_ending": ".nii.gz",
}


def base_plans(
    shape: Sequence[float] = (120, 160, 140), spacing: Sequence[float] = (1.0, 1.0, 1.0), num_series: int = 3
) -> dict[str, Any]:
    """Plans of nnU-Net 2.8 for a dataset with this median shape and spacing, as it would write them."""
    fullres = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [96, 128, 112],
        "median_image_size_in_voxels": [float(n) for n in shape],
        "spacing": list(spacing),
        "normalization_schemes": ["ZScoreNormalization"] * num_series,
        "use_mask_for_norm": [True] * num_series,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        "resampling_fn_seg_kwargs": {"is_seg": True, "order": 1, "order_z": 0, "force_separate_z": None},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {"n_stages": 5, "features_per_stage": [32, 64, 128, 256, 320]},
            "_kw_requires_import": [],
        },
        "batch_dice": False,
    }
    lowres = {**copy.deepcopy(fullres), "data_identifier": "nnUNetPlans_3d_lowres", "next_stage": "3d_cascade_fullres"}
    return {
        "dataset_name": "Dataset001_Tiny",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": list(spacing),
        "original_median_shape_after_transp": [round(n) for n in shape],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "2d": {"data_identifier": "nnUNetPlans_2d", "batch_size": 12, "patch_size": [128, 112]},
            "3d_lowres": lowres,
            "3d_fullres": fullres,
            "3d_fullres_batch_4": {"inherits_from": "3d_fullres", "batch_size": 4},
            "3d_cascade_fullres": {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"},
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def source_of(series: Sequence[str], **changes: Any) -> Source:
    """The preprocessed data of `base_plans`, with one channel for each of the series."""
    values: dict[str, Any] = {
        "dataset": "Dataset001_Tiny",
        "subset": "imagesTr",
        "labelled": True,
        "data_identifier": "nnUNetPlans_3d_fullres",
        "num_channels": len(series),
        "channels": {name: channel for channel, name in enumerate(series)},
        "absent_series": {},
    }
    return Source(**(values | changes))


def facts_of(series: Sequence[str] = SERIES, num_cases: int = 10, **changes: Any) -> Facts:
    """A dataset in which every case has every series."""
    source = source_of(series)
    values: dict[str, Any] = {
        "channels": source.channels,
        "num_cases": num_cases,
        "num_classes": 3,
        "num_with_series": dict.fromkeys(series, num_cases),
        "num_present": {len(series): num_cases},
        "sources": (source,),
        "num_pretraining_cases": num_cases,
    }
    return Facts(**(values | changes))


class GuessedMemory:
    """Stands in for `pretext/memory.py`, which takes a second: grows with all that memory grows with."""

    def pretraining_memory(self, pretext: type[Pretext], setup: Setup, batch_size: int) -> Memory:
        tuning = self.finetuning_memory(setup.architecture, 1, setup.patch_size, batch_size, None)
        return Memory(tuning.states, tuning.activations // 8, 0)

    def finetuning_memory(
        self, architecture: Architecture, num_classes: int, patch_size: Size, batch_size: int, num_channels: int | None
    ) -> Memory:
        num_tokens = len(architecture.series) * math.prod(
            p // t for p, t in zip(patch_size, architecture.token_size, strict=True)
        )
        weights = 12 * architecture.depth * architecture.width**2
        activations = batch_size * (40 * num_tokens * architecture.width * architecture.depth + 400 * math.prod(patch_size))
        return Memory(16 * weights, activations, 0)


class KnownBank(Bank):
    """Stands in for a bank: of its cases only the series are known, and `patches` makes crops of some cases in a size."""

    def __init__(
        self, series_present: Tensor, patches: Callable[[Tensor, Size], Tensor], weights: Sequence[float] | None = None
    ) -> None:
        self.device, self.patches = torch.device("cpu"), patches
        self.weights = list(weights or [1.0] * len(series_present))
        self.series_present, self.shapes = series_present, torch.full((len(series_present), 3), 12)
        self.occupancy = Occupancy.of([np.ones((2, 2, 2), bool)] * len(series_present))

    def cut(self, cases: Tensor, crops: Crops, patch_size: Size) -> Tensor:
        return self.patches(cases, patch_size)


def csm_plans(
    series: Sequence[str] = SERIES,
    token_size: Size = TOKEN_SIZE,
    patch_size: Size = PATCH_SIZE,
    architecture: Mapping[str, Any] | None = None,
    reconstruction: Mapping[str, Any] | None = None,
    masking: Mapping[str, Any] | None = None,
    pretext: str = "csm",
    **csm: Any,
) -> dict[str, Any]:
    """What `nnunet_csm plan -preset B` writes and JSON gives back, with a network of a few weights.

    `architecture`, `reconstruction`, `masking` and `csm` are changes to those parts, `pretext` is the name of one.
    A classifier's head sees no measures of the mask unless they ask for it.
    """
    base = base_plans(num_series=len(series))
    wishes = Wishes("B", patch_size, token_size)
    plans, _ = plan(base, "3d_fullres", facts_of(series), "nnUNetCSMPlans", wishes, GuessedMemory())
    plans = json.loads(json.dumps(plans))
    entry = plans["configurations"]["3d_fullres"]
    network = entry["architecture"]
    network["arch_kwargs"] = merged(network["arch_kwargs"], TINY | dict(architecture or {}))
    block = {"name": pretext, "masking": masking or {}, "reconstruction": TINY_DECODER | dict(reconstruction or {})}
    entry["csm"]["classification"]["mask_features"] = False
    entry["csm"] = merged(entry["csm"], csm | {"pretext": block})
    return plans


def as_version_2(plans: dict[str, Any]) -> dict[str, Any]:
    """Plans as version 2 had them: every key written, one masking for both pretexts, which a key of the network told apart."""
    plans = copy.deepcopy(plans)
    entry = plans["configurations"]["3d_fullres"]
    network, csm = entry["architecture"]["arch_kwargs"], entry["csm"]
    network["joint_tokens"] = network.pop("encoder")["kind"] == "joint_vit"
    pretext = csm.pop("pretext")
    csm["version"] = 2
    csm["masking"] = {"places": "shared", "hidden_series": "none", "background": "rebuilt"} | pretext["masking"]
    csm["reconstruction"] = pretext["reconstruction"]
    return plans


def settings(**changes: Any) -> Configuration:
    """As `csm_plans`, read and validated."""
    return read_configuration(csm_plans(**changes), "3d_fullres", "nnUNetCSMPlans.json")


def checkpoint_of(plans: dict[str, Any], weights: Mapping[str, Any]) -> dict[str, Any]:
    """What our trainers save, as far as others read it."""
    return {
        "network_weights": dict(weights),
        "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": DATASET_JSON},
        "trainer_name": nnUNetTrainerCSM.__name__,
    }


def pretraining_request(kind: type[Request], images: Path, output: Path, /, **changes: Any) -> Request:
    """What a command is asked for that takes the pretraining of the tiny dataset to some images."""
    values: dict[str, Any] = {
        "dataset": "" if "encoder" in changes else "1",
        "trainer": nnUNetTrainerCSMPretrain.__name__,
        "plans": "nnUNetCSMPlans",
        "configuration": "3d_fullres",
        "folds": (),
        "checkpoint_name": "checkpoint_final.pth",
        "images": images,
        "output": output,
        "device": "cpu",
        "overwrite": True,
    }
    return kind(**(values | changes))


def pretext_of(configuration: Configuration) -> Any:
    """The pretext that plans describe, with weights as drawn."""
    pretext, setup = setup_of(configuration)
    return pretext(setup)


def masking_of(configuration: Configuration) -> Any:
    """What the pretext of some plans hides."""
    return setup_of(configuration)[1].settings.masking


def make_csm(
    architecture: Architecture, reconstruction: Reconstruction, masking: Masking = MASKING, patch_size: Size = PATCH_SIZE
) -> csm_pretext.CSM:
    """CSM without plans."""
    return csm_pretext.CSM(Setup(architecture, csm_pretext.Settings(masking, reconstruction), patch_size))


def make_mae3d(
    architecture: Architecture, reconstruction: Reconstruction, mask_ratio: float = 0.75, patch_size: Size = PATCH_SIZE
) -> mae3d.MAE3D:
    """MAE3D without plans, on joint tokens."""
    return mae3d.MAE3D(Setup(architecture, mae3d.Settings(mae3d.PlaceMasking(mask_ratio), reconstruction), patch_size))


def loss_of(model: Any, volume: Tensor, mask: Mask) -> Tensor:
    """What pretraining descends on."""
    return model(volume, mask) / model.weight(mask).clamp(min=1)
