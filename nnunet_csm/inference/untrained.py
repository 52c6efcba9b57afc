"""Predict with the network of a trained model at its initial weights: what a score is worth that owes nothing to learning."""

import sys
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_csm import nnunet
from nnunet_csm.model.segmenter import CSMSegmenter


def predict_untrained(fold_folder: Path, inputs: Path, outputs: Path, seed: int = 0) -> None:
    """Segment `inputs` as `nnUNetv2_predict -device cpu` would, with weights as drawn before training."""
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(fold_folder.parent), (fold_folder.name.removeprefix("fold_"),))
    manager = predictor.configuration_manager
    torch.manual_seed(seed)
    network = CSMSegmenter(
        len(nnunet.channel_names(predictor.dataset_json)),
        predictor.label_manager.num_segmentation_heads,
        **manager.network_arch_init_kwargs,
    )
    predictor.list_of_parameters = [network.state_dict()]
    predictor.predict_from_files(str(inputs), str(outputs), num_processes_preprocessing=2, num_processes_segmentation_export=2)


def main() -> None:
    """`FOLD_FOLDER INPUTS OUTPUTS` on the command line."""
    fold_folder, inputs, outputs = map(Path, sys.argv[1:])
    predict_untrained(fold_folder, inputs, outputs)
