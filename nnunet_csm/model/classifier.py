"""The classifier: the cross-series encoder, pooling of the tokens of present series, a linear head for classes or numbers."""

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
from nnunet_csm.model.tokens import to_tokens
from nnunet_csm.plans import Configuration
from nnunet_csm.schema import to_dict

# all classes equally likely before the first step, and yet a gradient for the encoder
HEAD_STD = 0.01
# a mask that is further from those of the training is classified as one that far from them
MOST_DEVIATIONS = 5.0


class MeanPooling(nn.Module):
    """The mean over all tokens of present series."""

    def forward(self, tokens: Float[Tensor, "b s l e"], present: Bool[Tensor, "b s"]) -> Float[Tensor, "b e"]:
        weight = (present / present.sum(1, keepdim=True)).to(tokens.dtype)
        return torch.einsum("bsle,bs->be", tokens, weight) / tokens.shape[2]


class MaskPooling(nn.Module):
    """The mean over tokens of present series, each weighing as much as the share of its voxels that the mask covers."""

    def forward(
        self, tokens: Float[Tensor, "b s l e"], present: Bool[Tensor, "b s"], cover: Float[Tensor, "b l"]
    ) -> Float[Tensor, "b e"]:
        # only shares of the sum count: a gain, as training varies all channels by, cancels out. Where a patch at one scale for
        # all holds the hollow of a large mask, all tokens count
        share = cover.clamp_min(torch.finfo(torch.float32).tiny)
        weight = present[:, :, None] * (share / share.sum(1, keepdim=True))[:, None] / present.sum(1)[:, None, None]
        return torch.einsum("bsle,bsl->be", tokens, weight.to(tokens.dtype))


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


class StandardizedMeasures(nn.Module):
    """How large masks are and which labels they have (`data/lesions.py`), in units of the training samples' deviation, from
    their mean. What is NaN, as the volume of a label that is absent, counts as the mean.

    Mean and deviation are buffers, so that a checkpoint holds them. The vector is scaled to the length that pooled features
    have, so that the head learns from both as fast.

    Args:
        num_measures: of a mask.
        width: of the pooled features.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, num_measures: int, width: int) -> None:
        super().__init__()
        self.gain = math.sqrt(width / num_measures)
        self.register_buffer("mean", torch.zeros(num_measures))
        self.register_buffer("deviation", torch.ones(num_measures))

    def fit(self, measures: Float[Tensor, "m f"]) -> None:
        """Take mean and deviation of the training samples, the latter as if one more were 1 away: a factor e in size, a label
        more or less. So a few samples that are alike make no narrow rule. What none of them has tells nothing, and is 0.
        """
        count = measures.isfinite().sum(0)
        self.mean.copy_(measures.nanmean(0).nan_to_num())
        squares = (measures - self.mean).nan_to_num().square().sum(0)
        self.deviation.copy_(((squares + 1) / (count + 1)).sqrt().masked_fill(count == 0, math.inf))

    def forward(self, measures: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        return self.gain * self.standardized(measures).clamp(-MOST_DEVIATIONS, MOST_DEVIATIONS)

    def standardized(self, measures: Float[Tensor, "b f"]) -> Float[Tensor, "b f"]:
        """Measures in deviations from the mean, however far."""
        return ((measures - self.mean) / self.deviation).masked_fill(measures.isnan(), 0.0)


class Units(nn.Module):
    """Outputs in the units of the targets, of which the layer before knows only deviations from the mean.

    Mean and deviation of the training targets are buffers, so that a checkpoint holds them.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, num_outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_outputs))
        self.register_buffer("deviation", torch.ones(num_outputs))

    def fit(self, targets: Float[Tensor, "m c"]) -> None:
        """Take mean and deviation of the training targets, which differ."""
        self.mean.copy_(targets.mean(0))
        self.deviation.copy_(targets.std(0, correction=0))

    def forward(self, outputs: Float[Tensor, "b c"]) -> Float[Tensor, "b c"]:
        return self.mean + self.deviation * outputs.float()


class CSMClassifier(PlannedNetwork):
    """Predict classes or numbers from a patch with any subset of its series.

    Args are nnU-Net's `input_channels`, the number of outputs (classes), `pooling` of `plans.Classification`, how many measures
    of a mask the head sees, whether outputs are `in_units` of the targets, and the fields of `plans.Architecture` (of which
    `features`, `decoder` and `stem` belong to the segmenter and have no effect here; a fusion that `weighs` series makes one
    token of those of a place before they are pooled, without what it learns from beside it). With `pooling` "mask", patches have
    one more channel, the last: the share of each voxel that the mask covers.

    Raises:
        ValueError: channels that are not the planned series.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        pooling: Literal["attentive", "mean", "mask"] = "attentive",
        num_measures: int = 0,
        in_units: bool = False,
        **arch_kwargs: Any,
    ) -> None:
        super().__init__(input_channels, arch_kwargs)
        width = self.encoder.width
        self.takes_mask = pooling == "mask"
        self.pooling = build_pooling(pooling, width, self.architecture.num_heads)
        self.fusion: nn.Module | None = None
        num_series = len(self.architecture.series)
        if self.encoder.keeps_series_apart and num_series > 1 and fusion_class(self.architecture.fusion_settings).weighs:
            self.fusion = build_fusion(self.architecture.fusion_settings, num_series, width)
        self.measures = StandardizedMeasures(num_measures, width) if num_measures else None
        self.head = nn.Linear(width + num_measures, num_classes)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        nn.init.zeros_(self.head.bias)
        self.units = Units(num_classes) if in_units else None

    def forward(self, volume: Float[Tensor, "b n z y x"], measures: Float[Tensor, "b f"] | None = None) -> Float[Tensor, "b c"]:
        """Outputs of a patch with nnU-Net's channels, of which the planned series are used; absent series are all zero.

        `measures` are those of the patch's mask; a network whose head does not see them needs none and ignores them.
        """
        cover = None
        if self.takes_mask:
            volume, mask = volume[:, :-1], volume[:, -1:]
            cover = to_tokens(mask, self.token_size).mean(-1)[:, 0]
        features = self.features(volume)
        return self.classify(features.tokens, features.present, cover, measures)

    def features(self, volume: Float[Tensor, "b n z y x"]) -> Features:
        """Features of all tokens, and which series are present; fused ones are of one, which always is."""
        found = self.encoder.levels(*self.present_series(volume))[-1]
        if self.fusion is None:
            return found
        fused = Outputs.of(self.fusion(found.tokens, found.present, found.grid, found.series)).main
        return Features(fused.flatten(2).mT[:, None], found.present.any(1, keepdim=True), found.grid, None)

    def classify(
        self,
        tokens: Float[Tensor, "b s l e"],
        present: Bool[Tensor, "b s"],
        cover: Float[Tensor, "b l"] | None = None,
        measures: Float[Tensor, "b f"] | None = None,
    ) -> Float[Tensor, "b c"]:
        """Outputs (logits, or numbers in the units of the targets) from the features of all tokens."""
        pooled = self.pooling(tokens, present) if cover is None else self.pooling(tokens, present, cover)
        if self.measures is not None:
            pooled = torch.cat([pooled, self.measures(measures).to(pooled)], dim=1)
        outputs = self.head(pooled)
        return outputs if self.units is None else self.units(outputs)


def build_pooling(pooling: Literal["attentive", "mean", "mask"], width: int, num_heads: int) -> nn.Module:
    """The pooling of a name in the plans."""
    if pooling == "attentive":
        # of a pyramid's features, not every number of heads is a divisor
        return AttentivePooling(width, math.gcd(width, num_heads))
    return MeanPooling() if pooling == "mean" else MaskPooling()


def build_classifier(
    settings: Configuration, input_channels: int, num_classes: int, num_measures: int = 0, in_units: bool = False
) -> CSMClassifier:
    """The classifier that the plans describe; its head sees the measures of a mask when they say so."""
    return CSMClassifier(
        input_channels,
        num_classes,
        **to_dict(settings.architecture),
        pooling=settings.csm.classification.pooling,
        num_measures=num_measures if settings.csm.classification.mask_features else 0,
        in_units=in_units,
    )


@torch.no_grad()
def predictions(
    classifier: Callable[[Tensor, Tensor], Tensor],
    volume: Float[Tensor, "b n z y x"],
    measures: Float[Tensor, "b f"],
    mirror: bool,
    said: Callable[[Tensor], Tensor],
) -> Float[Tensor, "b c"]:
    """What `said` makes of outputs; with `mirror`, its mean over the eight flips (nnU-Net's test-time augmentation)."""
    num_flipped = range(4) if mirror else range(1)
    flips = [axes for count in num_flipped for axes in itertools.combinations((2, 3, 4), count)]
    total = sum(said(classifier(volume.flip(axes) if axes else volume, measures).float()) for axes in flips)
    assert isinstance(total, Tensor)
    return total / len(flips)
