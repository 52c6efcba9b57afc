"""A pretrained encoder from Python: features of an image, from any subset of its series."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.hub import find_weights
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.tiling import Tiling, triple, weights_of, with_zeros
from nnunet_csm.model.tokens import Size, to_map, to_tokens
from nnunet_csm.model.transfer import encoder_in
from nnunet_csm.plans import Architecture, Configuration, configuration_of, read_configuration


@dataclass(frozen=True)
class ImageFeatures:
    """What an encoder makes of one image. Places where no tile shows anything have features of 0."""

    series: tuple[str, ...]
    """Names, in the order of `tokens`; one for all where the encoder does not keep them apart."""
    tokens: Float[Tensor, "m l e"]
    map: Float[Tensor, "e gz gy gx"]
    """Mean over the series, on the token grid, which begins at the image's first voxel."""
    share: Float[Tensor, "gz gy gx"]
    """Of each token's voxels, those that count for `vector`."""

    @property
    def vector(self) -> Float[Tensor, " e"]:
        """Mean over all places, each by its share."""
        return (self.map * self.share).flatten(1).sum(1) / self.share.sum()


class FrozenEncoder:
    """An encoder in evaluation mode, and what its images are to be like.

    Attributes:
        series: names it knows.
        spacing: (z, y, x) in mm that images are to be resampled to, as nnU-Net's preprocessing does.
        token_size: voxels of a token along (z, y, x).
        patch_size: voxels of a tile, those that its training saw at once.
    """

    def __init__(self, architecture: Architecture, patch_size: Size, spacing: Sequence[float]) -> None:
        self.encoder = build_encoder(architecture).eval()
        self.token_size, self.patch_size, self.spacing = architecture.token_size, patch_size, tuple(spacing)
        self.series = architecture.series

    def to(self, device: torch.device | str) -> "FrozenEncoder":
        """The same on a device."""
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def features(
        self,
        images: Mapping[str, np.ndarray | Tensor],
        normalize: bool = True,
        where: Bool[np.ndarray, "z y x"] | None = None,
        step_size: float = 0.5,
    ) -> ImageFeatures:
        """Encode an image tile by tile, as large as the patches of training, padded with zeros as they were.

        Tiles begin at whole tokens and overlap; where they do, features are means by weights that fall from the middle of a tile.

        Args:
            images: volume (z, y, x) of each series that there is, on one grid with the encoder's spacing.
            normalize: z-score every series over its voxels other than 0, as nnU-Net does for MRI; False when that is done.
            where: voxels that count for the vector of the image; those other than 0 in any series by default.
            step_size: from tile to tile, as a share of the tile; at least a token.

        Raises:
            UserError: no series, one that the encoder does not know or that is empty, volumes of different shapes, or no
                voxel to count.
        """
        unknown = [name for name in images if name not in self.series]
        shapes = {name: tuple(image.shape) for name, image in images.items()}
        if not images or unknown or len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 3:
            raise UserError(
                f"images are {shapes or 'none'}; expected volumes (z, y, x) of one shape, of {', '.join(self.series)}"
            )
        device = next(self.encoder.parameters()).device
        shape = next(iter(shapes.values()))
        volume = torch.zeros(len(self.series), *shape, device=device)
        inside = torch.zeros(shape, dtype=torch.bool, device=device)
        for name, image in images.items():
            voxels = torch.as_tensor(image, dtype=torch.float32, device=device)
            there = voxels != 0
            if not (there.any() and torch.isfinite(voxels).all()):
                raise UserError(
                    f"{name} is zero everywhere or holds voxels that are no numbers; leave a series out that is missing"
                )
            if normalize:
                voxels = torch.where(there, (voxels - voxels[there].mean()) / voxels[there].std().clamp(min=1e-8), 0.0)
            volume[self.series.index(name)], inside = voxels, inside | there
        counted = inside if where is None else torch.as_tensor(where, device=device)
        if counted.shape != inside.shape or not counted.any():
            raise UserError(
                f"the mask has shape {tuple(counted.shape)} and {int(counted.sum())} voxels, images have shape {shape}; give a "
                f"mask on their grid that is not empty"
            )
        return self._features(volume, counted, [name in images for name in self.series], step_size)

    def _features(
        self, volume: Float[Tensor, "s z y x"], counted: Bool[Tensor, "z y x"], given: Sequence[bool], step_size: float
    ) -> ImageFeatures:
        tiling = Tiling.of(counted.shape, self.patch_size, self.token_size)
        image = tiling.pad(volume)
        present = torch.tensor([given], device=volume.device)
        shown = [number for number, is_there in enumerate(given) if is_there]
        weight = weights_of(tiling.tile, volume.device)
        total: Tensor | None = None
        total_weight = torch.zeros(tiling.padded, device=volume.device)
        for place in tiling.places(step_size):
            patch = image[:, *tiling.voxels(place)]
            if not patch.any():
                continue
            found = self.encoder.levels(patch[None], present, 1, shown)[-1]
            maps = to_map(found.tokens[0], found.grid)
            if total is None:
                total = torch.zeros(*maps.shape[:2], *tiling.padded, device=volume.device)
            total[:, :, *place] += maps * weight
            total_weight[place] += weight
        assert total is not None
        maps = (total / total_weight.clamp(min=torch.finfo(torch.float32).tiny))[:, :, *tiling.within]
        all_voxels = with_zeros(counted[None].float(), (0, 0, 0), tiling.grid, self.token_size)
        share = to_tokens(all_voxels[None], self.token_size).mean(-1)
        shown_names = tuple(self.series[number] for number in shown)
        names = shown_names if self.encoder.keeps_series_apart else ("all",)
        return ImageFeatures(names, maps.flatten(2).transpose(1, 2), maps.mean(0), share.view(tiling.grid))


def load_encoder(path: str | Path) -> FrozenEncoder:
    """The encoder in a checkpoint of one of our trainers, or in exported weights, on the CPU.

    Args:
        path: a file, a folder, or a name on Hugging Face's hub that is in the local cache, see `hub.find_weights`.

    Raises:
        UserError: nothing of the kind.
    """
    path = find_weights(str(path))
    return frozen_encoder(checkpoint.load(path), str(path))


def frozen_encoder(saved: Mapping[str, Any], source: str, trained: bool = True) -> FrozenEncoder:
    """The encoder in what `checkpoint.load` has read; `source` is the path that errors name.

    With `trained` False, its weights are random.
    """
    pretrained = encoder_in(saved, source)
    plans, name = saved["init_args"]["plans"], saved["init_args"]["configuration"]
    entry = configuration_of(plans, name, source)
    patch_size = triple(entry["patch_size"])
    if "csm" in entry:  # not in encoders of others
        csm = read_configuration(plans, name, source).csm
        if "classes" in saved:
            patch_size = csm.classification.patch_size
        elif "series" in saved:  # of pretraining
            patch_size = csm.pretraining_patch_size
    encoder = FrozenEncoder(pretrained.architecture, patch_size, entry["spacing"])
    if trained:
        checkpoint.load_weights(encoder.encoder, pretrained.weights, source)
    return encoder


def untrained_encoder(settings: Configuration, spacing: Sequence[float]) -> FrozenEncoder:
    """The encoder that plans would pretrain, with random weights."""
    return FrozenEncoder(settings.pretraining_architecture, settings.csm.pretraining_patch_size, spacing)
