"""The folder of this file is what `nnUNet_extTrainer` points to: nnU-Net looks here for our trainers."""

from nnunet_csm.training.classification import nnUNetTrainerCSMClassifier
from nnunet_csm.training.pretraining import nnUNetTrainerCSMPretrain
from nnunet_csm.training.segmentation import nnUNetTrainerCSM
from nnunet_csm.training.yardstick import nnUNetTrainerCSMYardstick

__all__ = ["nnUNetTrainerCSM", "nnUNetTrainerCSMClassifier", "nnUNetTrainerCSMPretrain", "nnUNetTrainerCSMYardstick"]
