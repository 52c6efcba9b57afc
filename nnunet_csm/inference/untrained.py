"""Predict with the network of a trained model at its initial weights: what a score is worth that owes nothing to learning."""

import sys
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_csm import nnunet
from nnunet_csm.model.segmenter import CSMSegmenter


def main() -> None:
    """`FOLD_FOLDER INPUTS OUTPUTS` on the command line: segment as `nnUNetv2_predict -device cpu` would."""
    fold_folder, inputs, outputs = map(Path, sys.argv[1:])
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(fold_folder.parent), (fold_folder.name.removeprefix("fold_"),))
    torch.manual_seed(0)
    network = CSMSegmenter(
        len(nnunet.channel_names(predictor.dataset_json)),
        predictor.label_manager.num_segmentation_heads,
        **predictor.configuration_manager.network_arch_init_kwargs,
    )
    predictor.list_of_parameters = [network.state_dict()]
    predictor.predict_from_files(str(inputs), str(outputs), num_processes_preprocessing=2, num_processes_segmentation_export=2)
