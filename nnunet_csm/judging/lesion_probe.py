"""Whether lesions are found in frozen features: a linear probe on a few labelled cases, beside features that are not learned.

Labels are read here only. Nothing here touches the weights, the mode of the network or a global generator.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import interpolate

from nnunet_csm.data.bank import Bank
from nnunet_csm.data.crops import Crops, cut
from nnunet_csm.data.draws import Purpose, key
from nnunet_csm.data.intensities import foreground
from nnunet_csm.data.stored import open_volumes
from nnunet_csm.errors import UserError
from nnunet_csm.judging.average_precision import LabelledTokens, average_precision
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.fusion import mean_over_present
from nnunet_csm.model.tokens import to_map, to_tokens
from nnunet_csm.plans import Configuration
from nnunet_csm.schema import Size

# subjects of the linear probe; with more labels it would no longer be the question that pretraining is to answer
NUM_TRAINING, NUM_VALIDATION = 10, 20
# patches of a subject, every other one around a labelled voxel; fewer where they would take more memory than this in all
NUM_PATCHES, MAX_BYTES = 8, 2**30
# a linear probe takes at most one part in so many of the time
COST = 30.0


@dataclass(frozen=True)
class LabelledPatches:
    """Patches of some subjects, and what is known of each token place: whether it is lesion."""

    volume: Tensor
    present: Tensor
    lesion: Bool[np.ndarray, "n l"]
    scored: Bool[np.ndarray, "n l"]
    """Not background, and no voxel that nnU-Net is to ignore."""
    subject: np.ndarray

    @staticmethod
    def draw(
        bank: Bank, subjects: Sequence[int], num_patches: int, settings: Configuration, ignored: int | None
    ) -> "LabelledPatches":
        """Patches at fixed places, every other one around a labelled voxel: lesions are rare."""
        size, token_size = settings.csm.pretraining_patch_size, settings.architecture.token_size
        starts: list[list[int]] = []
        labels: list[Tensor] = []
        skipped: list[Tensor] = []
        for subject in subjects:
            segmentation = np.asarray(open_volumes(label_file(bank.files[subject].path))[0])
            # two volumes of 0 and 1, as images are kept
            lesion, skip = (wanted.astype(np.float16) for wanted in (segmentation > 0, segmentation == ignored))
            lesion[skip > 0] = 0
            for start in draw_starts(lesion > 0, size, num_patches, key(settings.csm.seed, Purpose.PROBE, subject)):
                starts.append(start)
                for volume, patches in ((lesion, labels), (skip, skipped)):
                    patches.append(torch.zeros(size, dtype=torch.float16))
                    cut(volume, start, (False, False, False), patches[-1])
        cases = torch.tensor(subjects).repeat_interleave(num_patches)
        # whole batches, of the size for which a bank on the GPU compiles its gathering anyway
        batch_size = settings.csm.pretraining.batch_size
        places = torch.arange(math.ceil(len(cases) / batch_size) * batch_size).clamp(max=len(cases) - 1).split(batch_size)
        parts = []
        for some in places:
            first = torch.tensor(starts)[some].to(bank.device)
            crops = Crops(first, torch.zeros_like(first, dtype=torch.bool))
            # a batch's memory may be lent again
            parts.append(bank.cut(cases[some].to(bank.device), crops, size).cpu().clone())
        volume = torch.cat(parts)[: len(cases)]
        shares = [
            to_tokens(torch.stack(patches)[:, None].float(), token_size)[:, 0].mean(-1).numpy() for patches in (labels, skipped)
        ]
        visible = foreground(to_tokens(volume.float(), token_size)).flatten(3).any(3).any(1).numpy()
        return LabelledPatches(
            volume, bank.series_present.cpu()[cases], shares[0] > 0.5, visible & (shares[1] == 0), cases.numpy()
        )

    @property
    def labels(self) -> LabelledTokens:
        return LabelledTokens(self.lesion[self.scored], np.repeat(self.subject, self.scored.sum(1)))

    def statistics(self, settings: Configuration) -> Float[np.ndarray, "m f"]:
        """Mean and deviation of every token, for each series."""
        tokens = to_tokens(self.volume.float(), settings.architecture.token_size)
        both = torch.cat([tokens.mean(-1), tokens.std(-1)], 1)
        return both.transpose(1, 2).numpy()[self.scored]

    @torch.no_grad()
    def features(self, encoder: Encoder, settings: Configuration, autocast: Callable[[], Any], batch_size: int) -> np.ndarray:
        """Features of the encoder, all tokens visible, mean over the present series of a place: (m, e)."""
        device, grid = next(encoder.parameters()).device, settings.pretraining_grid
        found = []
        for volume, present in zip(self.volume.split(batch_size), self.present.split(batch_size), strict=True):
            with autocast():
                found.append(place_features(encoder, volume.to(device), present.to(device), grid).float().cpu())
        return torch.cat(found).numpy()[self.scored]


def place_features(
    encoder: Encoder, volume: Float[Tensor, "b s z y x"], present: Bool[Tensor, "b s"], grid: Size
) -> Float[Tensor, "b l e"]:
    """Features of a frozen encoder that sees everything, at each place of the token grid."""
    features = encoder.levels(volume.float(), present)[-1]
    found = to_map(mean_over_present(features.tokens, features.present), features.grid)
    if features.grid != grid:
        found = interpolate(found, grid, mode="trilinear")
    return found.flatten(2).transpose(1, 2)


def draw_starts(lesion: Bool[np.ndarray, "z y x"], size: Sequence[int], num: int, seed: int) -> list[list[int]]:
    """First voxels of patches that lie within the volume where they fit: every other one holds a labelled voxel, if any."""
    draws = np.random.default_rng(seed)
    where = np.argwhere(lesion)
    starts = []
    for number in range(num):
        room = np.array(lesion.shape) - size
        start = draws.integers(np.minimum(room, 0), np.maximum(room, 0) + 1)
        if number % 2 and len(where):
            # the voxel anywhere within the patch
            centred = where[draws.integers(len(where))] - draws.integers(np.zeros(3, int), size)
            start = np.clip(centred, np.minimum(room, 0), np.maximum(room, 0))
        starts.append([int(first) for first in start])
    return starts


def label_file(image: Path) -> Path:
    """nnU-Net's preprocessed labels of a case."""
    return image.with_name(f"{image.name.removesuffix('.b2nd')}_seg.b2nd")


class LinearProbe:
    """Average precision of lesions found in frozen features, on held-out subjects, beside two that nothing was learned for.

    Attributes:
        untrained: that of the encoder before the first step.
        statistics: that of the mean and deviation of tokens.
        prevalence: that of chance.
    """

    def __init__(
        self,
        training: LabelledPatches,
        validation: LabelledPatches,
        settings: Configuration,
        autocast: Callable[[], Any],
        batch_size: int,
    ) -> None:
        self.training, self.validation = training, validation
        self.settings, self.autocast, self.batch_size = settings, autocast, batch_size
        self.prevalence = float(validation.labels.lesion.mean())
        self.statistics = self._precision(training.statistics(settings), validation.statistics(settings))
        self.untrained = float("nan")
        self.seconds, self.ended = 0.0, 0.0

    def of(self, encoder: Encoder) -> float:
        """Average precision of an encoder as it is now."""
        started, training = time.monotonic(), encoder.training
        encoder.eval()
        features = (
            side.features(encoder, self.settings, self.autocast, self.batch_size) for side in (self.training, self.validation)
        )
        precision = self._precision(next(features), next(features))
        encoder.train(training)
        self.ended = time.monotonic()
        self.seconds = self.ended - started
        return precision

    @property
    def due(self) -> bool:
        return time.monotonic() - self.ended >= COST * self.seconds

    def _precision(self, training: np.ndarray, validation: np.ndarray) -> float:
        return average_precision(training, self.training.labels, validation, self.validation.labels.lesion)


def draw_linear_probe(
    train_bank: Bank,
    val_bank: Bank,
    settings: Configuration,
    preprocessed: Path,
    ignored: int | None,
    autocast: Any,
    batch_size: int,
) -> LinearProbe:
    """The probe of a run, on cases of its first dataset.

    Raises:
        UserError: there are no labels to probe with.
    """
    source = settings.csm.sources[0]
    folder = preprocessed / source.dataset / source.data_identifier
    sides = []
    for bank in (train_bank, val_bank):
        labelled = [
            n for n, f in enumerate(bank.files) if source.labelled and f.path.parent == folder and label_file(f.path).is_file()
        ]
        sides.append(np.random.default_rng(key(settings.csm.seed, Purpose.PROBE)).permutation(labelled).tolist())
    sides[0] = sides[0][:NUM_TRAINING]
    if train_bank is val_bank:
        # fold all: the encoder saw everybody's images, but labels are still held out
        sides[1] = [subject for subject in sides[1] if subject not in sides[0]]
    sides[1] = sides[1][:NUM_VALIDATION]
    if not all(sides):
        raise UserError(f"{folder}: no labels on {'the training' if not sides[0] else 'the validation'} side of the fold")
    patch_bytes = 2 * len(settings.pretraining_architecture.series) * int(np.prod(settings.csm.pretraining_patch_size))
    num_patches = max(2, min(NUM_PATCHES, MAX_BYTES // (patch_bytes * sum(map(len, sides)))))
    training, validation = (
        LabelledPatches.draw(bank, side, num_patches, settings, ignored)
        for bank, side in zip((train_bank, val_bank), sides, strict=True)
    )
    for side in (training, validation):
        if not 0 < side.labels.lesion.sum() < len(side.labels.lesion):
            raise UserError(f"{folder}: no token of the probed patches is labelled in more than half of its voxels, or all are")
    return LinearProbe(training, validation, settings, autocast, batch_size)
