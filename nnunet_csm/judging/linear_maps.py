"""The linear maps that a pretext which rebuilds is compared with: what is linear need not be learned by a ViT."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from nnunet_csm.judging.hidden_errors import HiddenTokens, samples_at_a_time
from nnunet_csm.judging.token_regression import HELD_OUT, MAX_TOKENS, TokenRidge
from nnunet_csm.judging.voxel_regression import RidgeBaseline
from nnunet_csm.pretext.rebuilding import Rebuilding

# patches to fit linear maps to
MAX_FITTED = 640


def fit_linear_maps(volume: Callable[[int], Tensor], pretext: Rebuilding, batch_size: int, device: torch.device) -> TokenRidge:
    """The voxel-wise and the per-token ridge regression, on patches of training cases.

    Args:
        volume: a batch by its number, anywhere; each is asked for twice.
        pretext: whose units the errors are to have.
        batch_size: of all ranks.
        device: where the maps are fitted, to some samples at a time.

    Raises:
        UserError: no patch, or hardly one, holds every series.
    """

    # some are background, or lack a series
    num_patches = min(2 * MAX_TOKENS // pretext.setup.num_tokens, MAX_FITTED)
    num_batches = max(HELD_OUT, math.ceil(num_patches / batch_size))

    def parts() -> Iterator[HiddenTokens]:
        for number in range(num_batches):
            for part in volume(number).split(samples_at_a_time(batch_size, pretext)):
                yield HiddenTokens.of(part.to(device), pretext)

    def voxels() -> Iterator[np.ndarray]:
        for part in parts():
            for truth, inside in zip(part.truth, part.inside.any(1), strict=True):
                if inside.any():
                    yield truth[:, inside].cpu().numpy()[:, :, None, None]

    def tokens() -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts():
            full = part.present.all(1)
            truth, inside = (t[full].transpose(1, 2).flatten(0, 1) for t in (part.truth, part.inside))
            somewhere = inside.flatten(1).any(1)
            yield truth[somewhere], inside[somewhere]

    return TokenRidge(RidgeBaseline().fit(voxels()), pretext.setup.architecture.token_size).fit(tokens())
