"""Whether a pretraining is worth going on with: errors beside linear maps, lesions found in frozen features, and when to stop.

Labels are read for the linear probe only. Nothing here touches the weights, the mode of the network or a global generator.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nnunet_csm.data.bank import Bank, open_volumes
from nnunet_csm.data.crops import Crops, cut
from nnunet_csm.data.draws import Purpose, key
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.hidden import (
    HIDDEN_PART,
    HIDDEN_WHOLE,
    KINDS,
    error_table,
    foreground,
    kinds_of,
    num_voxels,
    squared_errors,
)
from nnunet_csm.evaluation.linear_probe import LabelledTokens, average_precision
from nnunet_csm.evaluation.plateau import Verdict, judge
from nnunet_csm.evaluation.reconstruction import RidgeBaseline
from nnunet_csm.evaluation.token_regression import CHUNK, HELD_OUT, MAX_TOKENS, TokenRidge
from nnunet_csm.figures.curves import Panel
from nnunet_csm.files import write_text
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.fusion import mean_over_present
from nnunet_csm.model.tokens import all_tokens, coordinates, join, select, to_tokens
from nnunet_csm.plans import Configuration
from nnunet_csm.pretext.csm import Rebuilt
from nnunet_csm.pretext.mae3d import moments
from nnunet_csm.pretext.masking import Mask

# patches to fit linear maps to
MAX_FITTED = 640
# subjects of the linear probe; with more labels it would no longer be the question that pretraining is to answer
NUM_TRAINING, NUM_VALIDATION = 10, 20
# patches of a subject, every other one around a labelled voxel; fewer where they would take more memory than this in all
NUM_PATCHES, MAX_BYTES = 8, 2**30
# a linear probe takes at most one part in so many of the time
COST = 30.0

# by `KINDS`, as nnU-Net's logger has them: foreground voxels, one number an epoch
LOGGED_ERRORS = ("hidden_whole", "hidden_whole_alone", "hidden_part")
LOGGED_PRECISION = "lesion_precision"
ESTIMATES = ("linear", "token_linear", "mean")


@dataclass(frozen=True)
class HiddenTokens:
    """What is to be rebuilt of a batch, in the units of the loss.

    With normalised targets the network is not asked for the mean and the deviation of a token, so linear maps are not either.
    """

    truth: Float[Tensor, "b s l v"]
    inside: Bool[Tensor, "b s l v"]
    """Foreground, the voxels that are scored."""
    present: Bool[Tensor, "b s"]
    shift: Float[Tensor, "b #s l 1"]
    scale: Float[Tensor, "b #s l 1"]

    @staticmethod
    def of(volume: Float[Tensor, "b s z y x"], settings: Configuration) -> "HiddenTokens":
        tokens = to_tokens(volume, settings.architecture.token_size).float()
        present = tokens.flatten(2).any(2)
        if not settings.csm.reconstruction.normalize_targets:
            shift, scale = (
                tokens.new_zeros(len(tokens), 1, tokens.shape[2], 1),
                tokens.new_ones(len(tokens), 1, tokens.shape[2], 1),
            )
        elif settings.architecture.joint_tokens:
            shift, scale = moments(tokens, present)
        else:
            shift, scale = tokens.mean(-1, keepdim=True), (tokens.var(-1, keepdim=True) + 1e-6).sqrt()
        truth = (tokens - shift) / scale * present[..., None, None]
        return HiddenTokens(truth, foreground(tokens) & present[..., None, None], present, shift, scale)

    def errors(self, rebuilt: Float[Tensor, "b s l v"], kinds: Bool[Tensor, "c b s l"]) -> Float[Tensor, "c s"]:
        """Of voxels as the network gives them."""
        return squared_errors(self.truth, (rebuilt.float() - self.shift) / self.scale, self.inside, kinds)


def samples_at_a_time(settings: Configuration) -> int:
    """So many that memory does not grow with the batch: scores and linear maps work on all voxels in full precision."""
    return max(1, min(CHUNK // math.prod(settings.pretraining_grid), settings.csm.pretraining.batch_size // HELD_OUT))


def parts_of(num_samples: int, settings: Configuration) -> Iterator[slice]:
    """The samples of a batch, some at a time."""
    num = samples_at_a_time(settings)
    return (slice(first, first + num) for first in range(0, num_samples, num))


def fit_linear_maps(volume: Callable[[int], Tensor], settings: Configuration, device: torch.device) -> TokenRidge:
    """The voxel-wise and the per-token ridge regression, on patches of training cases.

    Args:
        volume: a batch by its number, anywhere; each is asked for twice.
        settings: of the run.
        device: where the maps are fitted, to some samples at a time.

    Raises:
        UserError: no patch, or hardly one, holds every series.
    """

    # some are background, or lack a series
    num_patches = min(2 * MAX_TOKENS // math.prod(settings.pretraining_grid), MAX_FITTED)
    num_batches = max(HELD_OUT, math.ceil(num_patches / settings.csm.pretraining.batch_size))

    def parts() -> Iterator[HiddenTokens]:
        for number in range(num_batches):
            for part in volume(number).split(samples_at_a_time(settings)):
                yield HiddenTokens.of(part.to(device), settings)

    def voxels() -> Iterator[np.ndarray]:
        for part in parts():
            for truth, inside in zip(part.truth, part.inside.any(1), strict=True):
                if inside.any():
                    yield truth[:, inside].cpu().numpy()[:, :, None, None]

    def tokens() -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts():
            full = part.present.all(1)
            truth, inside = (t[full].transpose(1, 2).flatten(0, 1) for t in (part.truth, part.inside))
            somewhere = inside.flatten(1).any(1)
            yield truth[somewhere], inside[somewhere]

    return TokenRidge(RidgeBaseline().fit(voxels()), settings.architecture.token_size).fit(tokens())


def validation_sums(
    volume: Float[Tensor, "b s z y x"], mask: Mask, rebuild: Callable[[Tensor, Mask], Rebuilt], settings: Configuration
) -> dict[str, Tensor]:
    """Errors of a validation batch and what they are to be divided by, to be summed over batches and ranks.

    The batch is rebuilt and scored some samples at a time.

    Returns:
        `sums` and `counts`, each first of tokens by the loss, of series visible elsewhere and hidden whole, then of foreground
        voxels by `KINDS` and series.
    """
    sums: list[Tensor] = []
    counts: list[Tensor] = []
    for part in parts_of(len(volume), settings):
        some, hidden = volume[part], mask[part]
        rebuilt = rebuild(some, hidden)
        batch = HiddenTokens.of(some, settings)
        kinds = kinds_of(hidden.hidden, batch.present)
        whole = hidden.series_hidden[..., None]
        tokens = [hidden.rebuilt & ~whole, hidden.rebuilt & whole]
        of_tokens = torch.stack([torch.where(these, rebuilt.error, 0.0).sum().double() for these in tokens])
        sums.append(torch.cat([of_tokens, batch.errors(rebuilt.tokens, kinds).flatten()]))
        num_tokens = torch.stack([these.sum() for these in tokens]).double()
        counts.append(torch.cat([num_tokens, num_voxels(batch.inside, kinds).flatten()]))
    return {"sums": torch.stack(sums).sum(0), "counts": torch.stack(counts).sum(0)}


class HiddenErrors:
    """Sums of squared errors on hidden tokens over some batches: of the network, and of the linear maps when there are any.

    They are summed up on `device`, some samples at a time.
    """

    def __init__(self, settings: Configuration, maps: TokenRidge | None, device: torch.device) -> None:
        self.settings, self.maps, self.device = settings, maps, device
        self.series = settings.pretraining_architecture.series
        self.counts = torch.zeros(len(KINDS), len(self.series), dtype=torch.double)
        self.sums: dict[str, Tensor] = {}

    def add(
        self, volume: Float[Tensor, "b s z y x"], mask: Mask, rebuild: Callable[[Tensor, Mask], Rebuilt] | None = None
    ) -> None:
        """Score a batch, wherever it is; without `rebuild`, the linear maps only."""
        for part in parts_of(len(volume), self.settings):
            self._add_part(volume[part].to(self.device), mask[part].to(self.device), rebuild)

    def _add_part(self, volume: Tensor, mask: Mask, rebuild: Callable[[Tensor, Mask], Rebuilt] | None) -> None:
        batch = HiddenTokens.of(volume, self.settings)
        kinds = kinds_of(mask.hidden, batch.present)
        self.counts += num_voxels(batch.inside, kinds).cpu()
        if rebuild is not None:
            self._add("network", batch.errors(rebuild(volume, mask).tokens, kinds))
        if self.maps is not None:
            linear, token_linear = self.maps.estimates(batch.truth, ~mask.hidden)
            mean = torch.from_numpy(self.maps.voxelwise.mean).to(batch.truth)[:, None, None]
            for name, estimate in (("linear", linear), ("token_linear", token_linear), ("mean", mean)):
                self._add(name, squared_errors(batch.truth, estimate, batch.inside, kinds))

    def _add(self, name: str, sums: Tensor) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + sums.cpu()

    def table(self) -> pd.DataFrame:
        """Columns left_visible, series, voxels, network, linear, token_linear, mean, as far as there are any."""
        return error_table(self.series, self.counts, self.sums)


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
        """Of the encoder, all tokens visible, mean over the present series of a place: (m, e)."""
        device = next(encoder.parameters()).device
        found = []
        for volume, present in zip(self.volume.split(batch_size), self.present.split(batch_size), strict=True):
            with autocast():
                found.append(place_features(encoder, volume.to(device), present.to(device), settings).float().cpu())
        return torch.cat(found).numpy()[self.scored]


def place_features(
    encoder: Encoder, volume: Float[Tensor, "b s z y x"], present: Bool[Tensor, "b s"], settings: Configuration
) -> Float[Tensor, "b l e"]:
    """Features of a frozen encoder that sees everything."""
    tokens = to_tokens(volume.float(), settings.architecture.token_size)
    if encoder.joint_tokens:
        tokens, present = join(tokens), present.any(1, keepdim=True)
    b, s, num_tokens, _ = tokens.shape
    index = all_tokens(s, settings.pretraining_grid, b, volume.device)
    features = encoder(
        select(tokens, index), coordinates(index, settings.pretraining_grid), present.repeat_interleave(num_tokens, 1)
    )[-1]
    return mean_over_present(features.unflatten(1, (s, num_tokens)), present)


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
        """That of an encoder as it is now."""
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


class Probe:
    """What a run is compared with, and what is said, drawn and written of it after every epoch.

    Attributes:
        baselines: errors of the linear maps and of the mean on the validation patches of every epoch, by estimate, then by
            `KINDS`; NaN when no map could be fitted, or for a kind that there is not.
        linear_probe: None when there are no labels.
    """

    def __init__(
        self, settings: Configuration, maps: TokenRidge | None, batches: Iterable[tuple[Tensor, Mask]], device: torch.device
    ) -> None:
        self.settings = settings
        self.linear_probe: LinearProbe | None = None
        errors = HiddenErrors(settings, maps, device)
        for batch in batches:
            errors.add(*batch)
        nothing = torch.full_like(errors.counts, float("nan"))
        by_kind = {name: errors.sums.get(name, nothing).sum(1) / errors.counts.sum(1) for name in ESTIMATES}
        self.baselines: dict[str, list[float]] = {name: values.tolist() for name, values in by_kind.items()}
        # what cross-series learning is about; with one series, or joint tokens, none is hidden whole, and where those that are
        # stay out of the loss the network never learns to rebuild them
        whole, learned = KINDS.index(HIDDEN_WHOLE), settings.csm.masking.hidden_series == "rebuilt"
        self.judged = whole if learned and errors.counts[whole].sum() else KINDS.index(HIDDEN_PART)

    def precision(self, encoder: Encoder, epoch: int) -> float:
        """That of the linear probe, in the first and the last epoch and as often as its cost allows; NaN in others."""
        probe, last = self.linear_probe, self.settings.csm.pretraining.num_epochs - 1
        return probe.of(encoder) if probe is not None and (epoch in (0, last) or probe.due) else float("nan")

    def verdict(self, log: Mapping[str, Sequence[float]]) -> Verdict:
        linear, mean = self.baselines["linear"][self.judged], self.baselines["mean"][self.judged]
        return judge(log[LOGGED_ERRORS[self.judged]], self.settings.csm.pretraining.num_epochs, mean, linear)

    def said(self, log: Mapping[str, Sequence[float]]) -> str:
        """Of the last epoch, one line, and one more when lesions were probed."""
        beside = ", ".join(f"{name.replace('_', ' ')} {self.baselines[name][self.judged]:.4f}" for name in reversed(ESTIMATES))
        error = log[LOGGED_ERRORS[self.judged]][-1]
        lines = [f"Probe: {KINDS[self.judged]}, foreground: {error:.4f} ({beside}); {self.verdict(log)}"]
        precision, probe = log[LOGGED_PRECISION][-1], self.linear_probe
        if probe is not None and np.isfinite(precision):
            lines.append(
                f"Probe: lesions in frozen features, average precision {precision:.3f} (untrained encoder {probe.untrained:.3f}, "
                f"mean and deviation of tokens {probe.statistics:.3f}, chance {probe.prevalence:.3f})"
            )
        return "\n".join(lines)

    def panels(self, log: Mapping[str, Sequence[float]]) -> list[Panel]:
        """The judged error beside the linear maps, and the linear probe beside what nothing was learned for."""
        epochs = len(log[LOGGED_PRECISION])
        errors = {"network": log[LOGGED_ERRORS[self.judged]]} | {
            name: [self.baselines[estimate][self.judged]] * epochs
            for estimate, name in (
                ("mean", "mean"),
                ("linear", "voxel-wise linear map"),
                ("token_linear", "linear map of tokens"),
            )
        }
        panels = [Panel(KINDS[self.judged], errors, "epoch", "mean squared error, foreground")]
        if self.linear_probe is not None:
            found = {
                "encoder": log[LOGGED_PRECISION],
                "untrained encoder": [self.linear_probe.untrained] * epochs,
                "mean and deviation": [self.linear_probe.statistics] * epochs,
            }
            panels.append(Panel("Lesions found by a linear probe", found, "epoch", "average precision"))
        return panels

    def save(self, log: Mapping[str, Sequence[float]], path: Path) -> None:
        """One row per epoch, all of them written again from the log, which is in the checkpoints: a resumed run repeats none.

        Columns: epoch from 0, crops, then for each of `LOGGED_ERRORS` the network's and those of `ESTIMATES`, then the
        precisions; empty where there is none.
        """
        schedule, probe = self.settings.csm.pretraining, self.linear_probe
        epochs = np.arange(len(log[LOGGED_PRECISION]))
        table = pd.DataFrame({"epoch": epochs, "crops": (epochs + 1) * schedule.iterations_per_epoch * schedule.batch_size})
        for kind, name in enumerate(LOGGED_ERRORS):
            table[name] = log[name]
            for estimate in ESTIMATES:
                table[f"{name}_{estimate}"] = self.baselines[estimate][kind]
        table[LOGGED_PRECISION] = log[LOGGED_PRECISION]
        for name in ("untrained", "statistics", "prevalence"):
            table[f"{LOGGED_PRECISION}_{name}"] = float("nan") if probe is None else getattr(probe, name)
        write_text(path, table.to_csv(index=False))
