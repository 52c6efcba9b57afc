"""A pretext that rebuilds beside linear maps, which are fitted when they are first asked for."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nnunet_csm.errors import UserError
from nnunet_csm.judging.hidden_errors import HiddenErrors, HiddenTokens, Rebuild, samples_at_a_time
from nnunet_csm.judging.linear_maps import LinearMaps, sets_of_series
from nnunet_csm.judging.token_regression import HELD_OUT, MAX_TOKENS, TokenRidge
from nnunet_csm.judging.voxel_regression import RidgeBaseline
from nnunet_csm.pretext.base import Batch
from nnunet_csm.pretext.rebuilding import Rebuilding

# patches to fit linear maps to
MAX_FITTED = 640
# of series, each with maps of its own
MAX_SETS = 4


class Comparison:
    """Errors of a pretext and of linear maps on the same patches.

    Args:
        pretext: the network.
        training: a batch of training cases by its number, of all ranks' places.
        batch_size: of all ranks.
        device: where errors are summed up and maps are fitted.
        report: takes the line that says why there are no maps.
    """

    def __init__(
        self,
        pretext: Rebuilding,
        training: Callable[[int], Batch],
        batch_size: int,
        device: torch.device,
        report: Callable[[str], object],
    ) -> None:
        self.pretext, self.training, self.batch_size = pretext, training, batch_size
        self.device, self.report = device, report

    @cached_property
    def maps(self) -> LinearMaps | None:
        """Linear maps; None when there are too few patches, or memory does not do."""
        try:
            return fit_linear_maps(lambda step: self.training(step).volumes[0], self.pretext, self.batch_size, self.device)
        except (UserError, torch.OutOfMemoryError) as error:
            self.report(f"No comparison with linear maps: {str(error).splitlines()[0]}")
            return None

    def errors(self, batches: Callable[[], Iterable[Batch]], rebuild: Rebuild | None = None) -> HiddenErrors:
        """Sums over some batches: of the linear maps, as far as memory does, and with `rebuild` of the network."""
        try:
            return self._errors(batches, rebuild)
        except torch.OutOfMemoryError as error:
            if self.maps is None:
                raise
            self.report(f"No comparison with linear maps: {str(error).splitlines()[0]}")
        # only here, where the exception no longer keeps the tensors of its frames
        self.maps = None
        return self._errors(batches, rebuild)

    def _errors(self, batches: Callable[[], Iterable[Batch]], rebuild: Rebuild | None) -> HiddenErrors:
        found = HiddenErrors(self.pretext, self.maps, self.device)
        for batch in batches():
            found.add(batch, rebuild)
        return found


def fit_linear_maps(volume: Callable[[int], Tensor], pretext: Rebuilding, batch_size: int, device: torch.device) -> LinearMaps:
    """The voxel-wise and the per-token ridge regression, on patches of training cases, for each set of series they hold.

    Args:
        volume: a batch by its number, anywhere; each is asked for a few times.
        pretext: whose units the errors are to have.
        batch_size: of all ranks.
        device: where the maps are fitted, to some samples at a time.

    Raises:
        UserError: no patch, or hardly one, shows anything.
    """
    # some are background, or lack a series
    num_patches = min(2 * MAX_TOKENS // pretext.setup.num_tokens, MAX_FITTED)
    num_batches = max(HELD_OUT, math.ceil(num_patches / batch_size))

    def parts() -> Iterator[HiddenTokens]:
        for number in range(num_batches):
            for part in volume(number).split(samples_at_a_time(batch_size, pretext)):
                yield HiddenTokens.of(part.to(device), pretext)

    fitted: dict[tuple[int, ...], TokenRidge] = {}
    too_few: UserError | None = None
    for series in sets_of_series(held_together(parts()), MAX_SETS):
        try:
            voxelwise = RidgeBaseline().fit(voxels_of(parts(), series))
            fitted[series] = TokenRidge(voxelwise, pretext.setup.architecture.token_size).fit(tokens_of(parts(), series))
        except UserError as error:
            too_few = too_few or error
    if not fitted:
        raise too_few or UserError("no patch shows anything")
    return LinearMaps(fitted)


def held_together(parts: Iterable[HiddenTokens]) -> Counter[tuple[bool, ...]]:
    """Which series patches hold, and how many patches."""
    return Counter(tuple(present) for part in parts for present in part.present.tolist())


def voxels_of(parts: Iterable[HiddenTokens], series: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Voxels of each patch at which one of the series is scored."""
    rows = list(series)
    for part in parts:
        for truth, inside in zip(part.truth[:, rows], part.inside[:, rows].any(1), strict=True):
            if inside.any():
                yield truth[:, inside].cpu().numpy()[:, :, None, None]


def tokens_of(parts: Iterable[HiddenTokens], series: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens of patches that hold these series, and their voxels that are scored, where there are any."""
    rows = list(series)
    for part in parts:
        full = part.present[:, rows].all(1)
        truth, inside = (t[full][:, rows].transpose(1, 2).flatten(0, 1) for t in (part.truth, part.inside))
        somewhere = inside.flatten(1).any(1)
        yield truth[somewhere], inside[somewhere]
