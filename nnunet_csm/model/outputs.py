"""What parts of a segmenter give while it learns, where a method learns from more than the segmentation."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """A part's result, and what the loss takes beside it; parts that have nothing beside it give the result itself.

    There is something beside it in training mode only: nnU-Net's validation and prediction get logits and nothing else.
    """

    main: Tensor
    """A map (b, e, gz, gy, gx) of a fusion, or logits (b, c, z, y, x)."""
    others: tuple[tuple[Tensor, float], ...] = ()
    """Further logits on any grid, each with its weight in the loss, in which the segmentation has 1."""
    penalty: Tensor | None = None
    """One number that is added to the loss."""

    @staticmethod
    def of(result: "Tensor | Outputs") -> "Outputs":
        """The result of a part that may have nothing beside it."""
        return Outputs(result) if isinstance(result, Tensor) else result


def total_loss(result: Tensor | Outputs, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The loss of a segmentation and of what stands beside it, by `loss` of logits at full resolution."""
    main, others, penalty = Outputs.of(result)
    total = loss(main)
    for logits, weight in others:
        total = total + weight * loss(logits)
    return total if penalty is None else total + penalty
