"""The classifier: the cross-series encoder, pooling of the tokens of present series, a linear head."""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.model.encoder import Features
from nnunet_csm.model.fusion import build_fusion, fusion_class
from nnunet_csm.model.outputs import Outputs
from nnunet_csm.model.planned import PlannedNetwork
from nnunet_csm.plans import Configuration
from nnunet_csm.schema import to_dict

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


class CSMClassifier(PlannedNetwork):
    """Classify a patch from any subset of its series.

    Args are nnU-Net's `input_channels`, the number of classes, `pooling` of `plans.Classification` and the fields of
    `plans.Architecture` (of which `features`, `decoder` and `stem` belong to the segmenter and have no effect here; a fusion that
    `weighs` series makes one token of those of a place before they are pooled, without what it learns from beside it).

    Raises:
        ValueError: channels that are not the planned series.
    """

    def __init__(
        self, input_channels: int, num_classes: int, pooling: Literal["attentive", "mean"] = "attentive", **arch_kwargs: Any
    ) -> None:
        super().__init__(input_channels, arch_kwargs)
        width = self.encoder.width
        # of a pyramid's features, not every number of heads is a divisor
        num_heads = math.gcd(width, self.architecture.num_heads)
        self.pooling = AttentivePooling(width, num_heads) if pooling == "attentive" else MeanPooling()
        self.fusion: nn.Module | None = None
        num_series = len(self.architecture.series)
        if self.encoder.keeps_series_apart and num_series > 1 and fusion_class(self.architecture.fusion_settings).weighs:
            self.fusion = build_fusion(self.architecture.fusion_settings, num_series, width)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)

    def forward(self, volume: Float[Tensor, "b n z y x"]) -> Float[Tensor, "b c"]:
        """Logits of a patch with nnU-Net's channels, of which the planned series are used; absent series are all zero."""
        features = self.features(volume)
        return self.classify(features.tokens, features.present)

    def features(self, volume: Float[Tensor, "b n z y x"]) -> Features:
        """Features of all tokens, and which series are present; fused ones are of one, which always is."""
        found = self.encoder.levels(*self.present_series(volume))[-1]
        if self.fusion is None:
            return found
        fused = Outputs.of(self.fusion(found.tokens, found.present, found.grid, found.series)).main
        return Features(fused.flatten(2).mT[:, None], found.present.any(1, keepdim=True), found.grid, None)

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
