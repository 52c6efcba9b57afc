"""What several tests are made of: plans as the planner writes them, for data and networks of a few voxels."""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from nnunet_csm.planning.planner import Facts, Wishes, plan
from nnunet_csm.plans import Architecture, Configuration, Masking, Reconstruction, Source, read_configuration
from nnunet_csm.pretext.csm import masked_mean
from nnunet_csm.pretext.masking import Mask
from nnunet_csm.pretext.memory import Memory
from nnunet_csm.schema import Size
from nnunet_csm.training.segmentation import nnUNetTrainerCSM

SERIES = ("FLAIR", "T1w", "T2w")
# an order of tokens that is mixed up shows on a grid with three different edges
GRID_SIZE = (2, 3, 5)
TOKEN_SIZE = (2, 4, 2)
PATCH_SIZE = (4, 12, 10)
TINY = {"width": 24, "depth": 3, "num_heads": 2, "features": 4, "drop_path": 0.0}
TINY_DECODER = {"width": 12, "depth": 1, "num_heads": 2}

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

    def pretraining_memory(
        self, architecture: Architecture, reconstruction: Reconstruction, masking: Masking, patch_size: Size, batch_size: int
    ) -> Memory:
        tuning = self.finetuning_memory(architecture, 1, patch_size, batch_size, None)
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


def csm_plans(
    series: Sequence[str] = SERIES,
    token_size: Size = TOKEN_SIZE,
    patch_size: Size = PATCH_SIZE,
    architecture: Mapping[str, Any] | None = None,
    reconstruction: Mapping[str, Any] | None = None,
    **csm: Any,
) -> dict[str, Any]:
    """What `nnunet_csm plan -preset B` writes and JSON gives back, with a network of a few weights.

    `architecture`, `reconstruction` and `csm` are changes to those parts.
    """
    base = base_plans(num_series=len(series))
    wishes = Wishes("B", patch_size, token_size)
    plans, _ = plan(base, "3d_fullres", facts_of(series), "nnUNetCSMPlans", wishes, GuessedMemory())
    plans = json.loads(json.dumps(plans))
    entry = plans["configurations"]["3d_fullres"]
    entry["architecture"]["arch_kwargs"] |= TINY | dict(architecture or {})
    entry["csm"]["reconstruction"] |= TINY_DECODER | dict(reconstruction or {})
    for key, value in csm.items():
        entry["csm"][key] = entry["csm"][key] | value if isinstance(value, Mapping) else value
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


def loss_of(model: Any, volume: Tensor, mask: Mask) -> Tensor:
    """What pretraining descends on."""
    return masked_mean(model(volume, mask), mask)
