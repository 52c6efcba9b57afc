"""Errors of a pretext on the hidden tokens of some batches, and of the linear maps that it is compared with."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnunet_csm.data.intensities import foreground
from nnunet_csm.judging.kinds import KINDS, error_table, kinds_of, num_voxels, squared_errors
from nnunet_csm.judging.linear_maps import LinearMaps
from nnunet_csm.judging.token_regression import CHUNK, HELD_OUT
from nnunet_csm.pretext.base import Batch
from nnunet_csm.pretext.masking import Mask
from nnunet_csm.pretext.rebuilding import Rebuilding, Rebuilt

# what is logged of every epoch: tokens by the loss, then foreground voxels by `KINDS`
LOGGED_TOKENS = ("error_part_hidden", "error_whole_hidden")
LOGGED_ERRORS = ("hidden_whole", "hidden_whole_alone", "hidden_part")

Rebuild = Callable[[Tensor, Mask], Rebuilt]


@dataclass(frozen=True)
class HiddenTokens:
    """What is to be rebuilt of a batch, in the units of the loss.

    With normalised targets the network is not asked for the mean and the deviation of a token, so linear maps are not either.
    """

    truth: Float[Tensor, "b s l v"]
    inside: Bool[Tensor, "b s l v"]
    """Foreground, the voxels that are scored."""
    present: Bool[Tensor, "b s"]
    shift: Float[Tensor, "b #s l 1"]
    scale: Float[Tensor, "b #s l 1"]

    @staticmethod
    def of(volume: Float[Tensor, "b s z y x"], pretext: Rebuilding) -> "HiddenTokens":
        tokens = pretext.tokens_of(volume)[0].float()
        present = tokens.flatten(2).any(2)
        shift, scale = pretext.units(tokens, present)
        truth = (tokens - shift) / scale * present[..., None, None]
        return HiddenTokens(truth, foreground(tokens) & present[..., None, None], present, shift, scale)

    def errors(self, rebuilt: Float[Tensor, "b s l v"], kinds: Bool[Tensor, "c b s l"]) -> Float[Tensor, "c s"]:
        """Squared errors of voxels as the network gives them."""
        return squared_errors(self.truth, (rebuilt.float() - self.shift) / self.scale, self.inside, kinds)


def unpacked(batch: Batch) -> tuple[Tensor, Mask]:
    """Patches and their mask."""
    (volume,), mask = batch.volumes, batch.drawn
    assert isinstance(mask, Mask)
    return volume, mask


def parts_of(batch: Batch, pretext: Rebuilding) -> Iterator[Batch]:
    """The batch, some samples at a time.

    So many that memory does not grow with the batch: scores and linear maps work on all voxels in full precision.
    """
    num = samples_at_a_time(len(batch), pretext)
    return (batch[first : first + num] for first in range(0, len(batch), num))


def samples_at_a_time(batch_size: int, pretext: Rebuilding) -> int:
    """See `parts_of`."""
    return max(1, min(CHUNK // pretext.setup.num_tokens, batch_size // HELD_OUT))


def validation_sums(batch: Batch, rebuild: Rebuild, pretext: Rebuilding) -> dict[str, tuple[Tensor, Tensor]]:
    """Errors of a validation batch and what they are to be divided by, to be summed over batches and ranks.

    The batch is rebuilt and scored some samples at a time.

    Returns:
        By name: `loss`, of tokens `LOGGED_TOKENS`, of foreground voxels `LOGGED_ERRORS`.
    """
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for part in parts_of(batch, pretext):
        volume, mask = unpacked(part)
        rebuilt = rebuild(volume, mask)
        hidden = HiddenTokens.of(volume, pretext)
        kinds = kinds_of(mask.hidden, hidden.present)
        whole = mask.series_hidden[..., None]
        tokens = [mask.rebuilt & ~whole, mask.rebuilt & whole]
        of_tokens = torch.stack([torch.where(these, rebuilt.error, 0.0).sum().double() for these in tokens])
        sums.append(torch.cat([of_tokens, hidden.errors(rebuilt.tokens, kinds).sum(1)]))
        num_tokens = torch.stack([these.sum() for these in tokens]).double()
        counts.append(torch.cat([num_tokens, num_voxels(hidden.inside, kinds).sum(1)]))
    total, num = torch.stack(sums).sum(0), torch.stack(counts).sum(0)
    by_name = dict(zip((*LOGGED_TOKENS, *LOGGED_ERRORS), zip(total, num, strict=True), strict=True))
    return {"loss": (total[:2].sum(), num[:2].sum()), **by_name}


class HiddenErrors:
    """Sums of squared errors on hidden tokens over some batches: of the network, and of the linear maps when there are any.

    They are summed up on `device`, some samples at a time.
    """

    def __init__(self, pretext: Rebuilding, maps: LinearMaps | None, device: torch.device) -> None:
        self.pretext, self.maps, self.device = pretext, maps, device
        self.series = pretext.setup.architecture.series
        self.counts = torch.zeros(len(KINDS), len(self.series), dtype=torch.double)
        self.sums: dict[str, Tensor] = {}

    def add(self, batch: Batch, rebuild: Rebuild | None = None) -> None:
        """Score a batch, wherever it is; without `rebuild`, the linear maps only."""
        for part in parts_of(batch, self.pretext):
            self._add_part(*unpacked(part.to(self.device)), rebuild)

    def _add_part(self, volume: Tensor, mask: Mask, rebuild: Rebuild | None) -> None:
        batch = HiddenTokens.of(volume, self.pretext)
        kinds = kinds_of(mask.hidden, batch.present)
        self.counts += num_voxels(batch.inside, kinds).cpu()
        if rebuild is not None:
            self._add("network", batch.errors(rebuild(volume, mask).tokens, kinds))
        if self.maps is not None:
            for name, estimate in self.maps.estimates(batch.truth, ~mask.hidden, batch.present).items():
                self._add(name, squared_errors(batch.truth, estimate, batch.inside, kinds))

    def _add(self, name: str, sums: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + sums.cpu()

    def table(self) -> pd.DataFrame:
        """Columns left_visible, series, voxels, network, linear, token_linear, mean, as far as there are any."""
        return error_table(self.series, self.counts, self.sums)

    def by_kind(self, estimate: str) -> list[float]:
        """Mean squared errors of an estimate, by `KINDS`; NaN where there is none."""
        nothing = torch.full_like(self.counts, float("nan"))
        means: list[float] = (self.sums.get(estimate, nothing).sum(1) / self.counts.sum(1)).tolist()
        return means
