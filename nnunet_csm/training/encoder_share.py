"""How much of a segmentation comes through the encoder: the same patches, segmented with the encoder's features of others.

A segmenter that can do without its encoder cannot gain by pretraining, however good that is (docs/experiments.md, E4).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_csm import nnunet
from nnunet_csm.model.segmenter import CSMSegmenter

FILE = "encoder_share.json"
# an encoder that brings less of the Dice is hardly used
HARDLY = 0.05
# nnU-Net's names for voxels found, wrongly found and missed, by class
COUNTS = ("tp_hard", "fp_hard", "fn_hard")


class FeaturesOfOthers(nn.Module):
    """The segmenter; every patch is decoded with the encoder's features of the one before it, also of the batch before.

    Attributes:
        exchanged: whether the last batch was; a first one of a single patch cannot be.
    """

    def __init__(self, segmenter: CSMSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.last: list[Tensor] | None = None
        self.exchanged = False

    def forward(self, volume: Float[Tensor, "b n z y x"]) -> Float[Tensor, "b c z y x"]:
        volume, present = self.segmenter.present_series(volume)
        own = self.segmenter.encode(volume, present)
        self.exchanged = len(volume) > 1 or self.last is not None
        before = self.last or [features[-1:] for features in own]
        self.last = [features[-1:] for features in own]
        others = [torch.cat([first, features[:-1]]) for first, features in zip(before, own, strict=True)]
        return self.segmenter.decode(volume, others)


class EncoderShare:
    """What nnU-Net's validation counts of the same batches with their own features and, by `network`, with those of others."""

    def __init__(self, segmenter: CSMSegmenter) -> None:
        self.network = FeaturesOfOthers(segmenter)
        self.sums: Float[np.ndarray, "way count c"] | None = None

    def add(self, own: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        """The outputs of a batch of nnU-Net's `validation_step`."""
        if self.network.exchanged:
            counts = np.array([[outputs[name] for name in COUNTS] for outputs in (own, others)], dtype=np.float64)
            self.sums = counts if self.sums is None else self.sums + counts


def as_dice(sums: Float[np.ndarray, "way count c"]) -> dict[str, float | None]:
    """nnU-Net's pseudo Dice, of the voxels of all patches together and mean over classes; None without any foreground."""
    dice: dict[str, float | None] = {}
    for name, (found, wrong, missed) in zip(("own_features", "features_of_others"), sums, strict=True):
        total = 2 * found + wrong + missed
        dice[name] = float(np.mean((2 * found[total > 0]) / total[total > 0])) if total.any() else None
    return dice


def share(dice: Mapping[str, float | None]) -> float | None:
    """The part of the Dice that is lost with the features of others; None where there is no Dice to lose."""
    own, others = dice.get("own_features"), dice.get("features_of_others")
    return None if not own or others is None else 1.0 - others / own


def said(dice: Mapping[str, float | None]) -> str:
    """A line for the log; empty where there is nothing to say."""
    lost = share(dice)
    if lost is None:
        return ""
    line = (
        f"Encoder's share: {lost:.0%} (pseudo Dice {dice['own_features']:.3f}, with the encoder's features of other patches "
        f"{dice['features_of_others']:.3f})"
    )
    if lost < HARDLY:
        line += "; this segmenter can do without its encoder, so pretraining cannot help it"
    return line


def read(folder: Path) -> dict[str, float | None]:
    """What a fine-tuning left in its folder; nothing where there is nothing."""
    path = folder / FILE
    return nnunet.read_json(path, "fine-tune again") if path.is_file() else {}
