"""InfoNCE of voxels seen in two views, made in rows: the matrix of all similarities is never whole in memory."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# rows of the matrix that are in memory together
ROWS = 1024
# of a similarity over the temperature that does not count; finite, so that a row of none has a gradient
NEVER = -1e4


def contrast(outputs: Float[Tensor, "2 m d"], valid: Bool[Tensor, " m"], temperature: float) -> Float[Tensor, ""]:
    """InfoNCE summed over voxels, the mean of both directions: a voxel of one view is told by its output in the other.

    It is told from all voxels of the other view, and from those of its own but itself. Rows are made once more for the gradient.
    Similarities are of 32 bits under autocast, too: over a temperature of 0.1, 16 would not tell much.

    Args:
        outputs: of m voxels in two views, of length 1.
        valid: voxels that count, as what is told and as what it is told from.
        temperature: of the softmax.
    """
    num, everything, counted = len(valid), outputs.flatten(0, 1), valid.repeat(2)
    with torch.autocast(outputs.device.type, enabled=False):
        sharpened = everything / temperature
        totals = [
            # without reading random numbers' state, which would wait for the device
            checkpoint(log_total, sharpened, everything, counted, row, use_reentrant=False, preserve_rng_state=False)
            for row in range(0, 2 * num, ROWS)
        ]
        own = (outputs[0] * outputs[1]).sum(-1) / temperature
    return ((torch.cat(totals).view(2, num).mean(0) - own) * valid).sum()


def log_total(
    sharpened: Float[Tensor, "k d"], everything: Float[Tensor, "k d"], counted: Bool[Tensor, " k"], first: int
) -> Float[Tensor, " r"]:
    """For the rows from `first` on, the logarithm of the summed exponentials of similarities to all that count but itself."""
    number = torch.arange(len(everything), device=everything.device)
    rows = slice(first, first + ROWS)
    others = counted & (number != number[rows, None])
    return (sharpened[rows] @ everything.T).masked_fill(~others, NEVER).logsumexp(1)


def retrieved(outputs: Float[Tensor, "2 m d"], valid: Bool[Tensor, " m"]) -> Float[Tensor, ""]:
    """How many voxels of the first view have none in the second whose output is nearer than their own."""
    (ones, others), number = outputs, torch.arange(len(valid), device=outputs.device)
    with torch.autocast(outputs.device.type, enabled=False):
        nearest = [(some @ others.T).masked_fill(~valid, NEVER).argmax(1) for some in ones.split(ROWS)]
    return ((torch.cat(nearest) == number) & valid).sum().float()
