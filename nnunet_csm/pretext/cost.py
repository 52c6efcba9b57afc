"""What trainings will cost, before they are begun: operations counted on the networks themselves, at a speed measured here."""

import time
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nnunet_csm.errors import UserError
from nnunet_csm.machine import num_threads
from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.outputs import total_loss
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import Configuration, Schedule
from nnunet_csm.pretext.base import setup_of
from nnunet_csm.schema import to_dict

# of the speed of large matrix products that whole training steps reach (docs/performance.md)
SHARE_OF_PEAK = 0.5
# and the most and the least of it: of wide networks on many tokens, and of narrow ones or convolutions
EXTREMES = (0.7, 0.2)
# what plans for CPU cores start from
CPU_PRESET = "cpu"
SECONDS_OF_UNITS = {"weeks": 604800, "days": 86400, "hours": 3600, "minutes": 60}


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of a training, and crops."""

    num_crops: int
    operations_per_crop: float

    def seconds(self, speed: float, share_of_peak: float = SHARE_OF_PEAK) -> float:
        return self.num_crops * self.operations_per_crop / (share_of_peak * speed)

    def time_on(self, device: torch.device) -> str:
        """How long it takes on a device of this machine, from the least to the most, in words."""
        speed = measured_speed(device)
        return in_words(*(self.seconds(speed, share) for share in EXTREMES))


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


def training_cost(settings: Configuration, schedule: Schedule, num_classes: int) -> Cost:
    """Operations of the training that follows `schedule`, one of these settings', where all cases have all series."""
    csm = settings.csm
    if schedule is csm.pretraining:
        return pretraining_cost(settings, torch.ones(1, len(settings.pretraining_architecture.series), dtype=torch.bool))
    num_channels = max(settings.architecture.channels) + 1
    return finetuning_cost(settings, num_channels, num_classes, schedule is csm.classification.schedule)


def counted(network: torch.nn.Module, *inputs: object) -> float:
    """Operations of a step, forward and backward."""
    # as products: torch does not count the kernel that attention has on a CPU
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        total_loss(network(*inputs), Tensor.sum).backward()
    return float(counter.get_total_flops())


def measured_speed(device: torch.device) -> float:
    """Operations a second of one large matrix product, in the precision and with the threads that trainings have there."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads(1))
    # on a CPU the time that its threads had: what else runs now will not run for weeks
    clock, num = (time.perf_counter, 1) if device.type == "cuda" else (time.process_time, num_threads(1))
    a = torch.randn(n, n, device=device, dtype=dtype)
    speeds = []
    for _ in range(6):
        started = clock()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        speeds.append(2 * n**3 * num / (clock() - started))
    torch.set_num_threads(before)
    return max(speeds)


def in_words(least: float, most: float) -> str:
    """Seconds as `2 to 6 hours`, in the largest unit of which there is one at least."""
    unit, length = next((one for one in SECONDS_OF_UNITS.items() if least >= one[1]), ("minutes", 60))
    first, last = (max(1, round(seconds / length)) for seconds in (least, most))
    return f"{first} to {last} {unit}" if first < last else f"about {first} {unit if first > 1 else unit[:-1]}"


def device_name(device: torch.device) -> str:
    """The device as users know it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{num_threads(1)} core{'s' if num_threads(1) > 1 else ''} of this machine"


def check_device(device: torch.device, settings: Configuration, schedule: Schedule, num_classes: int) -> None:
    """Raise UserError, with what the training would take without, when it is to run on CUDA and there is none."""
    if device.type != "cuda" or torch.cuda.is_available():
        return
    cpu = torch.device("cpu")
    taken = training_cost(settings, schedule, num_classes).time_on(cpu)
    smaller = "" if settings.csm.preset == CPU_PRESET else f" (`nnunet_csm plan -preset {CPU_PRESET}` makes plans for CPU cores)"
    raise UserError(
        f"no CUDA device found; train on the CPU with -device cpu, which takes {taken} by these plans on {device_name(cpu)}"
        f"{smaller}, or check the driver with nvidia-smi"
    )
