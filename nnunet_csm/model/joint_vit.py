"""The ViT on joint tokens, which hold the voxels of all series at their place (UNETR's and MAE3D's)."""

import math
from collections.abc import Mapping, Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from nnunet_csm.model.encoder import Features, Transferred, numbers_by_name
from nnunet_csm.model.tokens import all_tokens, coordinates, grid_size, join, select, separate, to_tokens
from nnunet_csm.model.vit import ViT
from nnunet_csm.plans import Architecture


class JointViT(ViT):
    """Encode tokens of one series, number 0, that hold the voxels of all; absent series are zeros in them."""

    keeps_series_apart = False

    @classmethod
    def layout(cls, architecture: Architecture) -> tuple[int, int]:
        return 1, len(architecture.series) * math.prod(architecture.token_size)

    def levels(
        self,
        volume: Float[Tensor, "b s z y x"],
        present: Bool[Tensor, "b s"],
        num_levels: int = 1,
        shown: Sequence[int] | None = None,
    ) -> list[Features]:
        """Features as of any encoder; there is nothing to mask or leave out."""
        grid = grid_size((volume.shape[2], volume.shape[3], volume.shape[4]), self.token_size)
        index = all_tokens(1, grid, len(volume), volume.device)
        tokens = select(join(to_tokens(volume, self.token_size)), index)
        encoded = self(tokens, coordinates(index, grid), None, self.taps(num_levels))
        return [Features(f[:, None], present.any(1, keepdim=True), grid, None) for f in encoded]

    @classmethod
    def num_series_in(cls, weights: Mapping[str, Tensor], architecture: Architecture) -> float:
        return weights["embedding.weight"].shape[1] / math.prod(architecture.token_size)

    @classmethod
    def carried(
        cls, weights: Mapping[str, Tensor], source: Architecture, target: Architecture, origin: str
    ) -> tuple[dict[str, Tensor], list[Transferred]]:
        """Columns of the token embedding for each series by its name; one that the pretraining did not have is an error."""
        numbers = numbers_by_name(source, target, origin, "joint tokens hold")
        weight = weights["embedding.weight"]
        # a row is laid out as a joint token is
        by_name = separate(weight[:, None, None], len(source.series))[:, numbers]
        shape = (len(weight), by_name.shape[-1])
        report = [Transferred(f"embedding.weight[{name}]", shape, f"by name, from {name}") for name in target.series]
        return {**weights, "embedding.weight": join(by_name)[:, 0, 0]}, report
