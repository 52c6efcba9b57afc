"""A whole series of an image from the others, by the encoder and the decoder of cross-series masked pretraining."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nnunet_csm import checkpoint
from nnunet_csm.data.draws import Draws, Purpose, key
from nnunet_csm.errors import UserError
from nnunet_csm.model.tiling import Tiling, weights_of
from nnunet_csm.model.tokens import to_volume
from nnunet_csm.plans import Configuration
from nnunet_csm.pretext.base import setup_of
from nnunet_csm.pretext.csm import CSM, AugmentedMask
from nnunet_csm.pretext.masking import apart

# of a tile that are rebuilt at a time, for want of memory
DRAWS_AT_A_TIME = 8


@dataclass(frozen=True)
class Imputed:
    """Made up series of an image, in the units of its preprocessed voxels."""

    image: Float[Tensor, "m z y x"]
    deviation: Float[Tensor, "m z y x"] | None
    """Over the draws of visible tokens; None where nothing was drawn."""


class Imputer:
    """A pretext that rebuilds hidden series, and the tiles of an image that it does so in.

    Attributes:
        series: that it knows.
    """

    def __init__(self, pretext: CSM) -> None:
        self.pretext = pretext.eval()
        self.series = pretext.setup.architecture.series

    def to(self, device: torch.device | str) -> "Imputer":
        """The same on a device."""
        self.pretext.to(device)
        return self

    @torch.no_grad()
    def impute(
        self, volume: Float[Tensor, "s z y x"], given: Sequence[str], wanted: Sequence[str], num_draws: int, step_size: float
    ) -> Imputed:
        """Rebuild series tile by tile, as large as the patches of pretraining; where tiles overlap, take means by weights.

        Args:
            volume: preprocessed; series that are not given may hold anything, which is not looked at.
            given: names of series that are there.
            wanted: names of others.
            num_draws: how often visible tokens of each tile are drawn as in training; the result is the mean. With 0, a tile is
                rebuilt once, from all tokens of the series given.
            step_size: from tile to tile, as a share of the tile.
        """
        setup = self.pretext.setup
        there = torch.tensor([name in given for name in self.series], device=volume.device)
        tiling = Tiling.of(volume.shape[1:], setup.patch_size, setup.architecture.token_size)
        padded = tiling.pad(torch.where(there[:, None, None, None], volume, 0.0))
        weight = weights_of(setup.patch_size, volume.device)
        total = torch.zeros(2, len(wanted), *padded.shape[1:], device=volume.device)
        total_weight = torch.zeros(padded.shape[1:], device=volume.device)
        for number, place in enumerate(tiling.places(step_size)):
            voxels = tiling.voxels(place)
            patch = padded[:, *voxels]
            rebuilt = torch.cat(list(self._rebuilt(patch, there, wanted, number, num_draws)))
            total[:, :, *voxels] += torch.stack([rebuilt.mean(0), rebuilt.std(0, correction=0)]) * weight
            total_weight[voxels] += weight
        within = tuple(
            slice(place.start, place.start + n) for place, n in zip(tiling.voxels(tiling.within), volume.shape[1:], strict=True)
        )
        image, deviation = (total / total_weight)[:, :, *within]
        return Imputed(image, deviation if num_draws else None)

    def _rebuilt(
        self, patch: Float[Tensor, "s z y x"], there: Tensor, wanted: Sequence[str], number: int, num_draws: int
    ) -> Iterator[Float[Tensor, "n m z y x"]]:
        """The wanted series of a tile, once for each draw, some draws at a time."""
        setup = self.pretext.setup
        for first in range(0, max(num_draws, 1), DRAWS_AT_A_TIME):
            samples = torch.arange(first, min(first + DRAWS_AT_A_TIME, max(num_draws, 1)), device=patch.device)
            volumes = patch.expand(len(samples), *patch.shape)
            mask = self._mask(Draws(key(0, Purpose.IMPUTATION, number), samples), volumes, there, wanted, bool(num_draws))
            tokens, grid = self.pretext.tokens_of(volumes)
            predicted = self.pretext.predicted(tokens, mask, grid).float()
            yield to_volume(predicted.unflatten(1, (len(wanted), -1)), grid, setup.architecture.token_size)

    def _mask(
        self, draws: Draws, volumes: Float[Tensor, "n s z y x"], there: Tensor, wanted: Sequence[str], drawn: bool
    ) -> AugmentedMask:
        """All tokens of the wanted series asked for; those of the series given visible as in training, or all of them."""
        num_samples, num_tokens = len(volumes), self.pretext.setup.num_tokens
        numbers = torch.arange(num_tokens, device=volumes.device)
        asked = torch.cat([self.series.index(name) * num_tokens + numbers for name in wanted]).expand(num_samples, -1)
        present = there.expand(num_samples, -1)
        num_given = int(there.sum())
        if drawn:
            mask = self.pretext.draw(draws, present, num_given - 1, (volumes,), training=False)
            return replace(mask, asked=asked)
        hidden = ~present[..., None].expand(-1, -1, num_tokens)
        visible, _ = apart(hidden.flatten(1), num_given * num_tokens)
        return AugmentedMask(hidden, hidden, visible, asked, volumes.new_zeros(num_samples, len(self.series), 0))


def imputer_in(saved: Mapping[str, Any], settings: Configuration, source: str) -> Imputer:
    """The pretext in what `checkpoint.load` has read; `source` is the path that errors name.

    Raises:
        UserError: no decoder in it, or one that was not trained to rebuild the voxels of series that are hidden whole.
    """
    remedy = "give the checkpoint of a pretraining by CSM (-tr nnUNetTrainerCSMPretrain), with a preset such as B or cpu"
    if not any(name.startswith("decoder.") for name in saved["network_weights"]) or "series" not in saved:
        raise UserError(f"{source}: holds no decoder of pretraining, which rebuilds series; {remedy}")
    # before a class of another name is imported: the checkpoint may come from anybody
    if (name := settings.csm.pretext.get("name")) != "csm":
        raise UserError(f"{source}: was pretrained by {name!r}, which does not rebuild a series from the others; {remedy}")
    _, setup = setup_of(settings, source)
    if setup.settings.masking.hidden_series != "rebuilt":
        raise UserError(
            f"{source}: its training rebuilt no series that was hidden whole (csm.pretext.masking.hidden_series is "
            f"{setup.settings.masking.hidden_series!r}); {remedy}"
        )
    if setup.settings.reconstruction.normalize_targets:
        raise UserError(
            f"{source}: its decoder gives no mean or deviation of tokens (csm.pretext.reconstruction.normalize_targets is true), "
            f"so it makes no image; {remedy}"
        )
    pretext = CSM(setup)
    checkpoint.load_weights(pretext, saved["network_weights"], source)
    return Imputer(pretext)
