"""A pretrained encoder from Python: features of an image, from any subset of its series."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.hub import find_weights
from nnunet_csm.model.encoder import Encoder, Features, build_encoder
from nnunet_csm.model.fusion import mean_over_present
from nnunet_csm.model.tokens import to_map
from nnunet_csm.model.transfer import read_encoder


@dataclass(frozen=True)
class ImageFeatures:
    """What an encoder makes of one image."""

    series: tuple[str, ...]
    """Names, in the order of `tokens`; one for all where the encoder does not keep them apart."""
    tokens: Float[Tensor, "m l e"]
    map: Float[Tensor, "e gz gy gx"]
    """Mean over the series, on the token grid."""

    @property
    def vector(self) -> Float[Tensor, " e"]:
        """Mean over all places."""
        return self.map.flatten(1).mean(1)


class FrozenEncoder:
    """An encoder in evaluation mode, and what its images are to be like.

    Attributes:
        series: names it knows.
        spacing: (z, y, x) in mm that images are to be resampled to, as nnU-Net's preprocessing does.
        token_size: voxels of a token along (z, y, x).
    """

    def __init__(self, encoder: Encoder, token_size: tuple[int, int, int], spacing: Sequence[float]) -> None:
        self.encoder, self.token_size, self.spacing = encoder.eval(), token_size, tuple(spacing)
        self.series = encoder.series

    def to(self, device: torch.device | str) -> "FrozenEncoder":
        """The same on a device."""
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def features(self, images: Mapping[str, np.ndarray | Tensor], normalize: bool = True) -> ImageFeatures:
        """Encode an image, padded with zeros to whole tokens.

        All tokens of all series make one sequence, so a large image is better given in patches.

        Args:
            images: volume (z, y, x) of each series that there is, on one grid with the encoder's spacing.
            normalize: z-score every series over its voxels other than 0, as nnU-Net does for MRI; False when that is done.

        Raises:
            UserError: no series, one that the encoder does not know or that is empty, or volumes of different shapes.
        """
        unknown = [name for name in images if name not in self.series]
        shapes = {name: tuple(image.shape) for name, image in images.items()}
        if not images or unknown or len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 3:
            raise UserError(
                f"images are {shapes or 'none'}; expected volumes (z, y, x) of one shape, of {', '.join(self.series)}"
            )
        device = next(self.encoder.parameters()).device
        volume = torch.zeros(1, len(self.series), *next(iter(shapes.values())), device=device)
        for name, image in images.items():
            voxels = torch.as_tensor(image, dtype=torch.float32, device=device)
            inside = voxels != 0
            if not (inside.any() and torch.isfinite(voxels).all()):
                raise UserError(
                    f"{name} is zero everywhere or holds voxels that are no numbers; leave a series out that is missing"
                )
            if normalize:
                voxels = torch.where(inside, (voxels - voxels[inside].mean()) / voxels[inside].std().clamp(min=1e-8), 0.0)
            volume[0, self.series.index(name)] = voxels
        missing = [-length % edge for length, edge in zip(volume.shape[2:], self.token_size, strict=True)]
        volume = pad(volume, [n for after in reversed(missing) for n in (0, after)])
        shown = [number for number, name in enumerate(self.series) if name in images]
        present = torch.tensor([[name in images for name in self.series]], device=device)
        found: Features = self.encoder.levels(volume, present, 1, shown)[-1]
        names = tuple(self.series[number] for number in shown) if self.encoder.keeps_series_apart else ("all",)
        fused = to_map(mean_over_present(found.tokens, found.present), found.grid)
        return ImageFeatures(names, found.tokens[0], fused[0])


def load_encoder(path: str | Path) -> FrozenEncoder:
    """The encoder in a checkpoint of one of our trainers, or in exported weights, on the CPU.

    Args:
        path: a file, a folder, or a name on Hugging Face's hub that is in the local cache, see `hub.find_weights`.

    Raises:
        UserError: nothing of the kind.
    """
    path = find_weights(str(path))
    pretrained = read_encoder(str(path))
    encoder = build_encoder(pretrained.architecture)
    checkpoint.load_weights(encoder, pretrained.weights, str(path))
    init_args = checkpoint.load(str(path))["init_args"]
    spacing = init_args["plans"]["configurations"][init_args["configuration"]]["spacing"]
    return FrozenEncoder(encoder, pretrained.architecture.token_size, spacing)
