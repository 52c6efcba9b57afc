"""The classifier: the cross-series encoder, pooling of the tokens of present series, a linear head."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.segmenter import series_present
from nnunet_csm.model.tokens import Size, all_tokens, coordinates, grid_size, join, select, to_tokens
from nnunet_csm.plans import Configuration, to_dict

# all classes equally likely before the first step, and yet a gradient for the encoder
HEAD_STD = 0.01


class MeanPooling(nn.Module):
    """The mean over all tokens of present series."""

    def forward(self, tokens: Float[Tensor, "b s l e"], present: Bool[Tensor, "b s"]) -> Float[Tensor, "b e"]:
        weight = (present / present.sum(1, keepdim=True)).to(tokens.dtype)
        return torch.einsum("bsle,bs->be", tokens, weight) / tokens.shape[2]


class AttentivePooling(nn.Module):
    """Cross-attention of one learned query to the tokens of present series (as in V-JEPA's probe, Bardes et al. 2024).

    The score of a token under a fixed query is linear in the token, so that query and keys are one layer. Scores start at
    zero: pooling begins as the mean.
    """

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, num_heads, bias=False)
        self.value = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.score.weight)
        nn.init.xavier_uniform_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, tokens: Float[Tensor, "b s l e"], present: Bool[Tensor, "b s"]) -> Float[Tensor, "b e"]:
        attention = self.attention(tokens, present)
        values = self.value(tokens).unflatten(-1, (attention.shape[-1], -1))
        pooled = torch.einsum("bslh,bslhd->bhd", attention.to(values.dtype), values)
        return self.norm(pooled.flatten(1))

    def attention(self, tokens: Float[Tensor, "b s l e"], present: Bool[Tensor, "b s"]) -> Float[Tensor, "b s l h"]:
        """What each head looks at; sums to 1 over series and places, 0 at absent series."""
        scores = self.score(tokens).float().masked_fill(~present[:, :, None, None], -math.inf)
        return scores.flatten(1, 2).softmax(1).view_as(scores)


class CSMClassifier(nn.Module):
    """Classify a patch from any subset of its series.

    Args are nnU-Net's `input_channels`, the number of classes, the fields of `plans.Architecture` (of which `features`,
    `decoder`, `stem` and `fusion` belong to the segmenter and have no effect here), and `pooling` of `plans.Classification`.

    Raises:
        ValueError: channels that are not the planned series.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        series: Sequence[str],
        channels: Sequence[int],
        token_size: Sequence[int],
        width: int,
        depth: int,
        num_heads: int,
        features: int,
        drop_path: float,
        joint_tokens: bool = False,
        decoder: str = "unetr",
        stem: str = "full",
        fusion: str = "mean",
        pooling: Literal["attentive", "mean"] = "attentive",
    ) -> None:
        super().__init__()
        if len(channels) != len(series) or input_channels <= max(channels):
            raise ValueError(
                f"{input_channels} input channels, but the plans have series {', '.join(series)} in channels "
                f"{', '.join(map(str, channels))}; plan again with `nnunet_csm plan`"
            )
        self.input_channels, self.channels = input_channels, list(channels)
        tz, ty, tx = token_size
        self.token_size: Size = (tz, ty, tx)
        self.encoder = Encoder(series, token_size, width, depth, num_heads, drop_path, joint_tokens)
        self.pooling = AttentivePooling(width, num_heads) if pooling == "attentive" else MeanPooling()
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, volume: Float[Tensor, "b n z y x"]) -> Float[Tensor, "b c"]:
        """Logits of a patch with nnU-Net's channels, of which the planned series are used; absent series are all zero."""
        return self.classify(*self.forward_features(volume))

    def forward_features(self, volume: Float[Tensor, "b n z y x"]) -> tuple[Float[Tensor, "b s l e"], Bool[Tensor, "b s"]]:
        """Features of all tokens, and which series are present: the features of an absent one mean nothing.

        Joint tokens are those of one series (s = 1), which is present.
        """
        if volume.shape[1] != self.input_channels:
            raise ValueError(
                f"the input has {volume.shape[1]} channels, the network was planned for {self.input_channels} "
                f"({', '.join(self.encoder.series)} are used); give an all-zero volume for a series a patient does not have"
            )
        volume = torch.stack([volume[:, channel] for channel in self.channels], dim=1)
        present = series_present(volume)
        b, s = present.shape
        grid = grid_size((volume.shape[2], volume.shape[3], volume.shape[4]), self.token_size)
        tokens = to_tokens(volume, self.token_size)
        if self.encoder.joint_tokens:
            tokens, present, s = join(tokens), present.any(1, keepdim=True), 1
        index = all_tokens(s, grid, b, volume.device)
        tokens = select(tokens, index)
        # absent tokens are masked, not dropped, so that every sample of a batch has the same length
        attend = present.repeat_interleave(math.prod(grid), dim=1) if s > 1 else None
        features = self.encoder(tokens, coordinates(index, grid), attend)[-1]
        return features.unflatten(1, (s, -1)), present

    def classify(self, tokens: Float[Tensor, "b s l e"], present: Bool[Tensor, "b s"]) -> Float[Tensor, "b c"]:
        """Logits from the features of all tokens."""
        return self.head(self.pooling(tokens, present))


def build_classifier(settings: Configuration, input_channels: int, num_classes: int) -> CSMClassifier:
    """The classifier that the plans describe."""
    return CSMClassifier(
        input_channels, num_classes, **to_dict(settings.architecture), pooling=settings.csm.classification.pooling
    )


@torch.no_grad()
def probabilities(
    classifier: Callable[[Tensor], Tensor], volume: Float[Tensor, "b n z y x"], mirror: bool
) -> Float[Tensor, "b c"]:
    """Class probabilities; with `mirror`, their mean over the eight flips of the patch (nnU-Net's test-time augmentation)."""
    num_flipped = range(4) if mirror else range(1)
    flips = [axes for count in num_flipped for axes in itertools.combinations((2, 3, 4), count)]
    total = sum(classifier(volume.flip(axes) if axes else volume).float().softmax(1) for axes in flips)
    assert isinstance(total, Tensor)
    return total / len(flips)
