"""What a study will cost, before it is begun: operations counted on the networks themselves, at a speed measured here."""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.outputs import total_loss
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import Configuration
from nnunet_csm.pretext.base import setup_of
from nnunet_csm.schema import to_dict

# of the speed of large matrix products that whole training steps reach (docs/performance.md)
SHARE_OF_PEAK = 0.5


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a training, and crops."""

    num_crops: int
    operations_per_crop: float

    def seconds(self, speed: float) -> float:
        return self.num_crops * self.operations_per_crop / (SHARE_OF_PEAK * speed)


def mean_seen_tokens(settings: Configuration, present: Bool[Tensor, "c s"]) -> float:
    """Tokens of a pretraining crop that the encoder sees, over cases and draws."""
    pretext, setup = setup_of(settings)
    with torch.device("meta"):
        network = pretext(setup)
    return network.seen_tokens(present)


def pretraining_cost(settings: Configuration, present: Bool[Tensor, "c s"]) -> Cost:
    """Operations of a pretraining on cases with these series, on average over the kinds of its batches."""
    pretext, setup = setup_of(settings)
    schedule, operations = settings.csm.pretraining, 0.0
    # tensors that say they lie on a CPU, which autocast asks for
    fake = FakeTensorMode()
    with fake:
        network = pretext(setup)
    for variant, share in enumerate(network.variants(present).mean(0).tolist()):
        if share > 0:
            with fake:
                # batch norms refuse a single crop
                operations += share * counted(network, *network.example(2, variant).args) / 2
    return Cost(schedule.num_iterations * schedule.batch_size, operations)


def finetuning_cost(settings: Configuration, num_channels: int, num_classes: int, classifies: bool) -> Cost:
    """Operations of a fine-tuning on patches of all planned series."""
    classification = settings.csm.classification
    schedule = classification.schedule if classifies else settings.csm.finetuning_schedule
    patch = classification.patch_size if classifies else settings.patch_size
    with FakeTensorMode():
        if classifies:
            network: torch.nn.Module = build_classifier(settings, num_channels, num_classes)
            num_channels += classification.pooling == "mask"
        else:
            network = CSMSegmenter(num_channels, num_classes, **to_dict(settings.architecture))
        operations = counted(network, torch.empty(1, num_channels, *patch))
    return Cost(schedule.num_iterations * schedule.batch_size, operations)


def counted(network: torch.nn.Module, *inputs: object) -> float:
    """Operations of a step, forward and backward."""
    # as products: torch does not count the kernel that attention has on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        total_loss(network(*inputs), Tensor.sum).backward()
    return float(counter.get_total_flops())


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
