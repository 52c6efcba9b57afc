"""A pretext that rebuilds beside linear maps, which are fitted when they are first asked for."""

from collections.abc import Callable, Iterable
from functools import cached_property

import torch

from nnunet_csm.errors import UserError
from nnunet_csm.judging.hidden_errors import HiddenErrors, Rebuild
from nnunet_csm.judging.linear_maps import fit_linear_maps
from nnunet_csm.judging.token_regression import TokenRidge
from nnunet_csm.pretext.base import Batch
from nnunet_csm.pretext.rebuilding import Rebuilding


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
    def maps(self) -> TokenRidge | None:
        """Linear maps; None when hardly any patch holds every series, or memory does not do."""
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
