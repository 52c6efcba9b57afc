"""What a study will cost, before it is begun: operations counted on the networks themselves, at a speed measured here."""

import time
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import Configuration, to_dict
from nnunet_csm.pretext.csm import CSM
from nnunet_csm.pretext.mae3d import MAE3D
from nnunet_csm.pretext.masking import Mask, num_asked

# of the speed of large matrix products that whole training steps reach (docs/performance.md)
SHARE_OF_PEAK = 0.5
# a step is forward and backward, and the latter has two products for each of the former
FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a training, and crops."""

    num_crops: int
    operations_per_crop: float

    def seconds(self, speed: float) -> float:
        return self.num_crops * self.operations_per_crop / (SHARE_OF_PEAK * speed)


def pretraining_cost(settings: Configuration, visible_tokens: float) -> Cost:
    """Of a pretraining that shows the encoder so many tokens of a crop on average."""
    csm, a = settings.csm, settings.pretraining_architecture
    grid = settings.pretraining_grid
    num_tokens, num_series = grid[0] * grid[1] * grid[2], len(a.series)
    with torch.device("meta"):
        network = (MAE3D if a.joint_tokens else CSM)(a, csm.reconstruction)
        volume = torch.empty(1, num_series, *csm.pretraining_patch_size)
        hidden = torch.empty(1, num_series, num_tokens, dtype=torch.bool)
        visible, joined = round(visible_tokens), num_series if a.joint_tokens else 1
        asked = num_asked(num_series // joined * num_tokens - visible, csm.reconstruction.rebuilt_share) * joined
        mask = Mask(hidden, hidden, *(torch.empty(1, num, dtype=torch.long) for num in (visible, asked)))
        operations = counted(network, volume, mask)
    return Cost(csm.pretraining.num_iterations * csm.pretraining.batch_size, operations)


def finetuning_cost(settings: Configuration, num_channels: int, num_classes: int, classifies: bool) -> Cost:
    """Of a fine-tuning on patches of all planned series."""
    classification = settings.csm.classification
    schedule = classification.schedule if classifies else settings.csm.finetuning_schedule
    with torch.device("meta"):
        if classifies:
            network: torch.nn.Module = build_classifier(settings, num_channels, num_classes)
        else:
            network = CSMSegmenter(num_channels, num_classes, **to_dict(settings.architecture))
        patch = classification.patch_size if classifies else settings.patch_size
        operations = counted(network, torch.empty(1, num_channels, *patch))
    return Cost(schedule.num_iterations * schedule.batch_size, operations)


def counted(network: torch.nn.Module, *inputs: object) -> float:
    """Operations of a step with one crop."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(*inputs)
    return float(FORWARD_AND_BACKWARD * counter.get_total_flops())


def measured_speed(device: torch.device) -> float:
    """Operations a second of one large matrix product, in the precision that trainings use there."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(n, n, device=device, dtype=dtype)
    speeds = []
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        speeds.append(2 * n**3 / (time.perf_counter() - started))
    return max(speeds)
