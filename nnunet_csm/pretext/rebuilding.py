"""Pretexts that hide tokens and rebuild them: what they share, from the loss to the pictures (paper Eq. 1 and 2)."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nnunet_csm.figures.reconstructions import save_reconstruction
from nnunet_csm.model.planned import series_present
from nnunet_csm.model.tokens import Size, grid_size, select, to_tokens, to_volume, to_voxels
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import MASKED, NOTHING_HIDDEN, Batch, Drawn, Pretext
from nnunet_csm.pretext.masking import Mask, apart
from nnunet_csm.schema import Depth, ShareAboveZero, Width, check_width


@dataclass(frozen=True)
class Reconstruction:
    """The decoder of pretraining, thrown away afterwards, and its targets.

    Attributes:
        width: of its blocks.
        depth: number of them.
        num_heads: of their attention.
        normalize_targets: rebuild every token normalised by its own mean and deviation (MAE's), not the voxels as they are.
        rebuilt_share: of the hidden tokens, those that a training step asks for, drawn anew in every step; validation asks for
            all.
        head: one last layer for all series, or one for each.
        same_place: how what is visible of other series at a hidden token's place comes to it beside attention, see
            `model/reconstruction.py`; not with joint tokens.
    """

    width: Width
    depth: Depth
    num_heads: Width
    normalize_targets: bool
    rebuilt_share: ShareAboveZero = 1.0
    head: Literal["shared", "by_series"] = "shared"
    same_place: Literal["none", "linear", "gains"] = "none"

    def check(self, where: str) -> None:
        """Raise UserError when there can be no such decoder."""
        check_width(self.width, self.num_heads, where)

    @property
    def told(self) -> tuple[str, str, str]:
        """A line for the plan."""
        target = "each token by its own mean and deviation" if self.normalize_targets else "z-scored voxels"
        some = "" if self.rebuilt_share == 1.0 else f"; a step rebuilds {self.rebuilt_share:.0%} of the hidden tokens"
        some += "" if self.same_place == "none" else f"; other series at a token's place: {self.same_place}"
        return "reconstruction", f"decoder {self.width} x {self.depth}", f"light, thrown away afterwards; target: {target}{some}"


@dataclass(frozen=True)
class Rebuilt:
    """What the decoder made of a batch."""

    error: Float[Tensor, "b s l"]
    """Mean squared error of every token that was asked for; 0 elsewhere."""
    tokens: Float[Tensor, "b s l v"]
    """Voxels in the units of the input: rebuilt where they were asked for, else as they are."""

    @staticmethod
    def of(tokens: Float[Tensor, "b s l v"], asked: Int[Tensor, "b m"], error: Tensor, rebuilt: Tensor) -> "Rebuilt":
        """Put the errors and voxels of the asked tokens in their places."""
        flat = tokens.float().flatten(1, 2)
        filled = flat.scatter(1, asked[..., None].expand_as(rebuilt), rebuilt)
        errors = flat.new_zeros(flat.shape[:2]).scatter(1, asked, error)
        return Rebuilt(errors.view(tokens.shape[:3]), filled.view_as(tokens))


class TokenError(nn.Module):
    """Mean squared error of each token, in full precision; a module so that it is compiled as the others are."""

    def forward(self, predicted: Float[Tensor, "b m v"], target: Float[Tensor, "b m v"]) -> Float[Tensor, "b m"]:
        return (predicted.float() - target).square().mean(-1)


class Rebuilding(Pretext):
    """A pretext whose draws are masks, and whose loss is the mean squared error of hidden tokens.

    It is judged by the errors of hidden voxels, beside linear maps, and shown as pictures. A subclass also makes `self.error`, a
    `TokenError`, and its settings have a `reconstruction`.
    """

    Draw: ClassVar[type[Mask]] = Mask
    error: TokenError

    @classmethod
    def check(cls, settings: Any, architecture: Architecture, where: str) -> None:
        settings.reconstruction.check(f"{where}.reconstruction")

    @property
    def learns_whole_series(self) -> bool:
        """Whether series are hidden whole, and rebuilt."""
        return False

    @abstractmethod
    def predicted(self, tokens: Float[Tensor, "b s l v"], mask: Mask, grid: Size) -> Float[Tensor, "b m v"]:
        """What the decoder makes of the asked tokens."""

    @abstractmethod
    def moments(self, tokens: Float[Tensor, "b n l v"], present: Bool[Tensor, "b n"]) -> tuple[Tensor, Tensor]:
        """Mean and deviation that normalised targets are normalised by, each (b, n or 1, l, 1).

        Args:
            tokens: voxels of l places in n series.
            present: series that each sample has.
        """

    def forward(self, *batch: Any) -> Float[Tensor, ""]:
        """Sum over the tokens to be rebuilt of their errors, each weighed as in `Mask.weight`."""
        volume, mask = batch
        return (self.errors(volume, mask) * mask.weight).sum()

    def weight(self, drawn: Drawn) -> Tensor:
        """The number of tokens to be rebuilt."""
        assert isinstance(drawn, Mask)
        return drawn.rebuilt.sum()

    def errors(self, volume: Float[Tensor, "b s z y x"], mask: Mask) -> Float[Tensor, "b m"]:
        """Rebuild the tokens that the mask asks for from the visible ones, and compare: the mean squared error of each.

        The target is the voxels as in the paper's Eq. 2 or, as an option, each token normalised (MAE's).
        """
        tokens, grid = self.tokens_of(volume)
        _, _, target = self.targets(tokens, mask)
        return self.error(self.predicted(tokens, mask, grid), target)

    def rebuild(self, volume: Float[Tensor, "b s z y x"], mask: Mask) -> Rebuilt:
        """The same with the rebuilt voxels, to be looked at and scored."""
        tokens, grid = self.tokens_of(volume)
        mean, scale, target = self.targets(tokens, mask)
        predicted = self.predicted(tokens, mask, grid)
        return Rebuilt.of(tokens, mask.asked, self.error(predicted, target), predicted.float() * scale + mean)

    def tokens_of(self, volume: Float[Tensor, "b s z y x"]) -> tuple[Float[Tensor, "b s l v"], Size]:
        """Tokens of patches, and how many there are along (z, y, x)."""
        token_size = self.setup.architecture.token_size
        return to_tokens(volume, token_size), grid_size((volume.shape[2], volume.shape[3], volume.shape[4]), token_size)

    def targets(
        self, tokens: Float[Tensor, "b s l v"], mask: Mask
    ) -> tuple[Tensor | float, Tensor | float, Float[Tensor, "b m v"]]:
        """What is subtracted from the voxels of each asked token, what they are divided by, and the outcome."""
        truth = select(tokens, mask.asked).float()
        if not self.settings.reconstruction.normalize_targets:
            return 0.0, 1.0, truth
        mean, scale = self.moments_of_asked(truth, tokens)
        return mean, scale, (truth - mean) / scale

    def moments_of_asked(
        self, truth: Float[Tensor, "b m v"], tokens: Float[Tensor, "b s l v"]
    ) -> tuple[Float[Tensor, "b m 1"], Float[Tensor, "b m 1"]]:
        """`moments` of the asked tokens, which each stand for themselves unless said otherwise."""
        everywhere = torch.ones(len(truth), 1, dtype=torch.bool, device=truth.device)
        mean, scale = self.moments(truth[:, None], everywhere)
        return mean[:, 0], scale[:, 0]

    def units(
        self, tokens: Float[Tensor, "b s l v"], present: Bool[Tensor, "b s"]
    ) -> tuple[Float[Tensor, "b n l 1"], Float[Tensor, "b n l 1"]]:
        """What turns the voxels of every token into the units of the loss: the mean and the deviation, for each series or one."""
        if self.settings.reconstruction.normalize_targets:
            return self.moments(tokens, present)
        shift = tokens.new_zeros(len(tokens), 1, tokens.shape[2], 1)
        return shift, torch.ones_like(shift)

    def nothing_hidden(self, mask: Mask, present: Bool[Tensor, "1 s"]) -> Mask:
        """A mask with all tokens of present series visible and asked for, which no training step has.

        Args:
            mask: of the same sample, as drawn.
            present: series that it has.
        """
        shown = present[..., None].expand_as(mask.hidden)
        visible, _ = apart(~shown.flatten(1), int(shown.sum()))
        return replace(mask, hidden=~shown, rebuilt=shown, visible=visible, asked=visible)

    @torch.no_grad()
    def rebuilt(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """The hidden tokens of present series by the others, and all of them with none hidden ("r = 0").

        Of normalised targets the network is not asked for mean and deviation: it is given the true ones, and its names say so.
        """
        (volume,), mask = batch.volumes, batch.drawn
        assert isinstance(mask, Mask) and len(batch) == 1
        given = "; mean and deviation of tokens given" if self.settings.reconstruction.normalize_targets else ""
        present = series_present(volume)
        there, token_size = present[..., None].expand_as(mask.hidden), self.setup.architecture.token_size
        masks = {MASKED: (mask, mask.hidden & there), NOTHING_HIDDEN: (self.nothing_hidden(mask, present), there)}
        sizes = self.setup.grid, token_size
        return {
            f"{name}{given}": (to_volume(self.rebuild(volume, shown).tokens, *sizes), to_voxels(rebuilt, *sizes))
            for name, (shown, rebuilt) in masks.items()
        }

    @torch.no_grad()
    def picture(self, path: Path, batch: Batch, title: str) -> None:
        """The patch, what the encoder saw, what was rebuilt and the difference, a row for each series."""
        (volume,), mask = batch.volumes, batch.drawn
        assert isinstance(mask, Mask)
        grid, token_size = self.setup.grid, self.setup.architecture.token_size
        hidden = to_voxels(mask.hidden, grid, token_size)
        rebuilt = to_volume(self.rebuild(volume, mask).tokens, grid, token_size)
        patch, hidden_voxels, filled = (t[0].cpu().numpy() for t in (volume, hidden, rebuilt.float()))
        present = np.asarray(patch.any(axis=(1, 2, 3)))
        path.parent.mkdir(exist_ok=True)
        save_reconstruction(path, patch, hidden_voxels, filled, self.setup.architecture.series, present, title)


def masked_mean(error: Float[Tensor, "b m"], mask: Mask) -> Float[Tensor, ""]:
    """Mean over the tokens to be rebuilt; 0 when there are none (one series, nothing hidden)."""
    return (error * mask.weight).sum() / mask.rebuilt.sum().clamp(min=1)


def own_moments(tokens: Float[Tensor, "b n l v"]) -> tuple[Float[Tensor, "b n l 1"], Float[Tensor, "b n l 1"]]:
    """Mean and deviation of each token over its voxels."""
    return tokens.mean(-1, keepdim=True), (tokens.var(-1, keepdim=True) + 1e-6).sqrt()
