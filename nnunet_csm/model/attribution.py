"""Which tokens of which series a classifier's decision rests on: integrated gradients, summed over every token.

M. Sundararajan, A. Taly and Q. Yan, "Axiomatic attribution for deep networks", ICML 2017. The paper shows class activation
maps by series (figure 5) and does not say how they were made. Grad-CAM (Selvaraju et al., ICCV 2017) weighs the tokens that
leave the encoder; by then attention has carried what one series shows to the others, most of all to the same place in them, so
that it would credit series with what they were told. Here the gradient is taken at the voxels, before anything is mixed, and
the map is complete: it sums to what the patch adds to the log odds of the class, over a patch without contrast.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from nnunet_csm.model.classifier import CSMClassifier
from nnunet_csm.model.tokens import grid_size, to_map, to_tokens

# attention turns to what it has found at some contrast, and at once: fewer steps miss it
NUM_STEPS = 64


def log_odds(logits: Float[Tensor, "b c"], class_index: int) -> Float[Tensor, " b"]:
    """Log odds of one class against all others."""
    others = [other for other in range(logits.shape[1]) if other != class_index]
    return logits[:, class_index] - logits[:, others].logsumexp(1)


def token_maps(
    classifier: CSMClassifier,
    volume: Float[Tensor, "b n z y x"],
    score: Callable[[Tensor], Tensor],
    num_steps: int = NUM_STEPS,
    measures: Float[Tensor, "b f"] | None = None,
) -> Float[Tensor, "b s gz gy gx"]:
    """What every token adds to a score of the outputs, such as the log odds of a class; below 0 where it makes it less.

    The path runs from no contrast (all voxels 0, the mean of nnU-Net's z-scores) to the patch; which series are present does not
    change on it, nor does what the classifier is told of the mask. Absent series get 0.

    Args:
        classifier: in evaluation mode.
        volume: patches as the classifier takes them.
        score: of the outputs (b, c), a number of each sample (b,), that is explained.
        num_steps: places on the path at which gradients are taken.
        measures: of the mask, as the classifier takes them.
    """
    assert not classifier.training, "drop path would make the map a matter of chance"
    images, mask = volume[:, : classifier.input_channels], volume[:, classifier.input_channels :]
    gradient = torch.zeros_like(volume)
    for step in range(num_steps):
        with torch.enable_grad():
            scaled = torch.cat([images * ((step + 0.5) / num_steps), mask], dim=1).requires_grad_()
            total = score(classifier(scaled, measures)).sum()
        gradient += torch.autograd.grad(total, scaled)[0]
    added = (volume * gradient / num_steps)[:, classifier.channels]
    grid = grid_size((volume.shape[2], volume.shape[3], volume.shape[4]), classifier.token_size)
    return to_map(to_tokens(added, classifier.token_size).sum(-1).transpose(1, 2), grid)


def series_shares(maps: Float[Tensor, "b s gz gy gx"]) -> Float[Tensor, "b s"]:
    """Share of each series in all that speaks for or against the class; they sum to 1, or are 0 where nothing speaks."""
    strength = maps.abs().sum((2, 3, 4))
    return strength / strength.sum(1, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
