"""How much of a segmentation comes through the encoder: the same patches, segmented with the encoder's features of others.

A segmenter that can do without its encoder cannot gain by pretraining, however good that is (docs/experiments.md, E4).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from nnunet_csm import nnunet
from nnunet_csm.model.segmenter import CSMSegmenter, in_bf16

FILE = "encoder_share.json"
# an encoder that brings less of the Dice is hardly used
HARDLY = 0.05
# nnU-Net's names for voxels found, wrongly found and missed, by class
COUNTS = ("tp_hard", "fp_hard", "fn_hard")
WAYS = ("own_features", "features_of_others")


class FeaturesOfOthers(nn.Module):
    """The segmenter; every patch is decoded with the encoder's features of the patch at its place in the batch before.

    nnU-Net's batches hold foreground at the same places, so patches with lesions mostly get features of others with lesions,
    seldom of the same patient. Each rank exchanges its own.

    Attributes:
        exchanged: whether the last batch was; the first has its own features.
    """

    def __init__(self, segmenter: CSMSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter
        self.before: list[Tensor] | None = None
        self.exchanged = False

    def forward(self, volume: Float[Tensor, "b n z y x"]) -> Float[Tensor, "b c z y x"]:
        with in_bf16(volume.device.type):
            volume, present = self.segmenter.present_series(volume)
            own = [level.main for level in self.segmenter.encode(volume, present)]
            self.exchanged = self.before is not None
            others, self.before = self.before or own, own
            return self.segmenter.decode(volume, others).main.float()


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
    """Dice of the voxels of all patches together, mean over the classes that are in them; None when none is."""
    found, wrong, missed = sums.swapaxes(0, 1)
    there = (found + missed)[0] > 0
    if not there.any():
        return dict.fromkeys(WAYS)
    dice = (2 * found[:, there] / (2 * found + wrong + missed)[:, there]).mean(axis=1)
    return dict(zip(WAYS, map(float, dice), strict=True))


def share(dice: Mapping[str, float | None]) -> float | None:
    """The part of the Dice that is lost with the features of others; None where there is no Dice to lose."""
    own, others = map(dice.get, WAYS)
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
        line += "; it hardly reads its encoder, and what does not cannot gain by pretraining: docs/experiments.md, E4 and E8"
    return line


def read(folder: Path) -> dict[str, float | None]:
    """What a fine-tuning left in its folder; nothing where there is nothing."""
    path = folder / FILE
    return nnunet.read_json(path, "fine-tune again") if path.is_file() else {}
