"""What a plan is made from: what is known of the dataset, what the user wishes, and what is decided for which reason."""

from dataclasses import dataclass
from typing import Literal

from nnunet_csm.plans import Source
from nnunet_csm.schema import Size


@dataclass(frozen=True)
class Facts:
    """What is known of a dataset beside nnU-Net's plans.

    Attributes:
        channels: series name to its channel, of all series of the dataset.
        num_cases: training cases.
        num_classes: output channels of a segmenter.
        num_with_series: series name to the number of training cases that have it.
        num_present: a number of series to the number of training cases that have that many.
        sources: what pretraining draws on, restricted to the series it is to see.
        num_pretraining_cases: cases of all sources.
        data_note: said of the preprocessed data.
        num_samples: cases or lesions with a class; 0 when there is no class.
        classes: their classes in order.
        mask_extent_mm: (z, y, x) that three quarters of their masks do not exceed; None when there is none.
        large_mask_mm: (z, y, x) that all but the largest masks do not exceed.
    """

    channels: dict[str, int]
    num_cases: int
    num_classes: int
    num_with_series: dict[str, int]
    num_present: dict[int, int]
    sources: tuple[Source, ...]
    num_pretraining_cases: int
    data_note: str = "as nnU-Net preprocesses it"
    num_samples: int = 0
    classes: tuple[str, ...] = ()
    mask_extent_mm: tuple[float, float, float] | None = None
    large_mask_mm: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class Wishes:
    """What the user decides.

    Attributes:
        preset: a preset, "auto", or "paper".
        patch_size: instead of the planner's.
        token_size: instead of the planner's.
        series: a part of the dataset's.
        gpu_memory_target: GiB that both trainings have to fit into.
        why: said of the sizes given here.
        device: cuda, or cpu where the machine has no CUDA device; "auto" then chooses for it, without `gpu_memory_target`.
    """

    preset: str = "auto"
    patch_size: Size | None = None
    token_size: Size | None = None
    series: tuple[str, ...] | None = None
    gpu_memory_target: float | None = None
    why: str = "by hand"
    device: Literal["cuda", "cpu"] = "cuda"


@dataclass(frozen=True)
class Decision:
    """A line of the plan."""

    name: str
    value: str
    reason: str
