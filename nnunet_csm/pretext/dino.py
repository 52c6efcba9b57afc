"""DINO in 3-D: a student tells of small views what its own average, the teacher, tells of large ones (Caron et al., ICCV 2021).

Views are cut from one patch on the device, so that banks, crops and their draws are those of every pretext. docs/methods.md says
which numbers are published and which are ours.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_csm.data.draws import Draws
from nnunet_csm.model.encoder import Encoder, Features, build_encoder
from nnunet_csm.model.planned import series_present
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import Batch, Pretext, Setup
from nnunet_csm.pretext.views import NUM_GLOBAL, Views, ViewSettings, changed, cut_views, draw_views, global_and_local
from nnunet_csm.schema import Positive, Share, ShareBelowOne, Size, Width, Within

# features that differ less than this from sample to sample, of 1 where they have nothing in common
SAME_FEATURES = 0.01
# of the entropy of an even distribution: what a collapsed teacher is beyond
LEAST_ENTROPY, MOST_ENTROPY = 0.001, 0.999


@dataclass(frozen=True)
class HeadSettings:
    """Sizes of the projection that is thrown away afterwards.

    Attributes:
        hidden: width of its two hidden layers.
        bottleneck: of what is normalised.
        num_prototypes: that views are told apart by.
    """

    hidden: Width = 2048
    bottleneck: Width = 256
    num_prototypes: Annotated[int, Within(2, 2**20)] = 4096


@dataclass(frozen=True)
class Settings:
    """What is compared, and how the teacher follows.

    Attributes:
        drop_path: of the student's encoder; the teacher has none.
        momentum: of the teacher at the start; 1 at the end, by a cosine.
        student_temperature: of the student's softmax.
        teacher_temperature: of the teacher's at the start, and from the end of its warm-up on.
        temperature_warmup: share of the steps over which it rises linearly.
        centre_momentum: of the mean that is taken from the teacher's outputs.
        frozen_share: of the steps, the first, in which the prototypes do not learn.
    """

    views: ViewSettings = field(default_factory=ViewSettings)
    head: HeadSettings = HeadSettings()
    drop_path: ShareBelowOne = 0.1
    momentum: Share = 0.996
    student_temperature: Positive = 0.1
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.04)
    temperature_warmup: Share = 0.0
    centre_momentum: Share = 0.9
    frozen_share: Share = 0.01


class Head(nn.Module):
    """How near features are to each prototype: the cosine, of an output and a row of `prototypes` scaled to length 1."""

    learns: Tensor

    def __init__(self, width: int, settings: HeadSettings) -> None:
        super().__init__()
        hidden, bottleneck = settings.hidden, settings.bottleneck
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        for name, parameter in self.layers.named_parameters():
            nn.init.normal_(parameter, std=0.02 if name.endswith("weight") else 0.0)
        self.prototypes = nn.Parameter(torch.randn(settings.num_prototypes, bottleneck))
        # a tensor, so that a graph reads it
        self.register_buffer("learns", torch.ones(()))

    def forward(self, features: Float[Tensor, "b n e"]) -> Float[Tensor, "b n k"]:
        outputs = self.layers(features)
        # divided by a temperature of 0.04, 16 bits would not tell much
        with torch.autocast(outputs.device.type, enabled=False):
            prototypes = torch.lerp(self.prototypes.detach(), self.prototypes, self.learns)
            return F.linear(F.normalize(outputs.float(), dim=-1), F.normalize(prototypes, dim=-1))


class DINO(Pretext):
    """Student and teacher, each an encoder and a head; the teacher's encoder is what is transferred."""

    Settings, Draw, parts = Settings, Views, ("teacher_entropy", "feature_deviation")
    # drop path, and the voxels of noise
    network_draws = True
    centre: Tensor
    temperature: Tensor
    told: Tensor

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        a, s = setup.architecture, setup.settings
        self.student, self.encoder = build_encoder(a, s.drop_path), build_encoder(a)
        self.head, self.teacher_head = Head(self.encoder.width, s.head), Head(self.encoder.width, s.head)
        for mine, students in ((self.encoder, self.student), (self.teacher_head, self.head)):
            mine.load_state_dict(students.state_dict())
            mine.requires_grad_(False)
        self.register_buffer("centre", torch.zeros(s.head.num_prototypes))
        self.register_buffer("temperature", torch.tensor(s.teacher_temperature[0]))
        # by the teacher in this step: the sum of its outputs and, at the end, their number
        self.register_buffer("told", torch.zeros(s.head.num_prototypes + 1), persistent=False)
        self.head.learns.fill_(s.frozen_share == 0.0)

    @classmethod
    def check(cls, settings: Any, architecture: Architecture, where: str) -> None:
        settings.views.check(f"{where}.views")

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        s, v, head = setup.settings, setup.settings.views, setup.settings.head
        large, small = (" x ".join(map(str, grid)) for grid in v.grids(setup.grid))
        (low, high), (least, most) = v.global_scale, v.local_scale
        first, last = s.teacher_temperature
        rises = f", to {last:g} within {s.temperature_warmup:.0%} of the steps" if first != last else ""
        return [
            (
                "views",
                f"{NUM_GLOBAL} of {large} and {v.num_local} of {small} tokens",
                f"{low:.0%} to {high:.0%} and {least:.0%} to {most:.0%} of a patch, which every series changes in by itself",
            ),
            (
                "prototypes",
                str(head.num_prototypes),
                f"head {head.hidden} x 2, {head.bottleneck}, on the mean of a view's tokens, thrown away afterwards",
            ),
            (
                "teacher",
                f"momentum {s.momentum:g} to 1",
                f"transferred; temperature {first:g}{rises}; student: {s.student_temperature:g}, drop path {s.drop_path:g}",
            ),
        ]

    @property
    def sizes(self) -> tuple[Size, Size]:
        """Voxels along (z, y, x) of a global and of a local view."""
        return self.settings.views.sizes(self.setup.grid, self.setup.architecture.token_size)

    def draw(
        self, draws: Draws, present: Bool[Tensor, "b s"], variant: int, volumes: tuple[Tensor, ...], training: bool
    ) -> Views:
        return draw_views(draws, self.settings.views, present.shape[1], training)

    def views(self, volume: Float[Tensor, "b s z y x"], drawn: Views) -> tuple[Tensor, Tensor]:
        """The global and the local views of patches, each (b, n, s, z, y, x)."""
        # volumes come as fp16
        made = [
            changed(cut_views(volume.float(), part.half_edge, part.centre, size), part)
            for part, size in zip(global_and_local(drawn), self.sizes, strict=True)
        ]
        return made[0], made[1]

    def features(
        self, encoder: Encoder, views: Float[Tensor, "b n s z y x"], present: Bool[Tensor, "b s"]
    ) -> Float[Tensor, "b n e"]:
        """The mean of the tokens of each view, over the series that its patch has."""
        num_views = views.shape[1]
        of_views = present[:, None].expand(-1, num_views, -1).flatten(0, 1)
        return mean_token(encoder.levels(views.flatten(0, 1), of_views)[-1]).unflatten(0, (-1, num_views))

    def compared(self, volume: Float[Tensor, "b s z y x"], drawn: Views) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each sample (b), the teacher's outputs (b, 2, k), and its features (b, 2, e)."""
        present = series_present(volume)
        large, small = self.views(volume, drawn)
        with torch.no_grad():
            features = self.features(self.encoder, large, present)
            outputs = self.teacher_head(features)
        seen = torch.cat([self.features(self.student, views, present) for views in (large, small)], 1)
        told = self.head(seen) / self.settings.student_temperature
        return agreement(self.targets(outputs), told), outputs, features

    def targets(self, outputs: Float[Tensor, "b n k"]) -> Float[Tensor, "b n k"]:
        """What the student is to say: the teacher's outputs, centred and sharpened."""
        return ((outputs - self.centre) / self.temperature).softmax(-1)

    def forward(self, *batch: Any) -> Float[Tensor, ""]:
        """The sum over samples; while training, what the teacher told is kept for the centre."""
        loss, outputs, _ = self.compared(*batch)
        if self.training:
            told = outputs.flatten(0, 1)
            self.told += torch.cat([told.sum(0), told.new_full((1,), len(told))])
        return loss.sum()

    def validate(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        loss, outputs, features = self.compared(*batch.args)
        num, targets = self.weight(batch.drawn), self.targets(outputs)
        entropy = -torch.xlogy(targets, targets).sum(-1).mean(1)
        # of one sample there is none
        several = num * (num > 1)
        return {
            "loss": (loss.sum(), num),
            "teacher_entropy": (entropy.sum(), num),
            "feature_deviation": (deviation(features) * several, several),
        }

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        s = self.settings
        teacher: list[Tensor] = [*self.encoder.parameters(), *self.teacher_head.parameters()]
        student: list[Tensor] = [*self.student.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(teacher, student, (1 - s.momentum) * (1 + math.cos(math.pi * done)) / 2)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.told)
        self.centre.lerp_(self.told[:-1] / self.told[-1].clamp(min=1), 1 - s.centre_momentum)
        self.told.zero_()
        first, last = s.teacher_temperature
        risen = min(done / s.temperature_warmup, 1.0) if s.temperature_warmup > 0 else 1.0
        self.temperature.fill_(first + (last - first) * risen)
        self.head.learns.fill_(done >= s.frozen_share)

    def warning(self, log: Mapping[str, Sequence[float]]) -> str:
        entropy, spread = (log[name][-1] for name in self.parts)
        if not collapsed(entropy, spread, self.settings.head.num_prototypes):
            return ""
        return (
            f"the teacher tells samples no longer apart (entropy {entropy:.3f} of at most "
            f"{math.log(self.settings.head.num_prototypes):.3f}, features deviate by {spread:.4f}): stop, and plan with another "
            f"pretext.teacher_temperature, pretext.centre_momentum or a smaller learning rate"
        )

    def seen_tokens(self, present: Bool[Tensor, "c s"]) -> float:
        """Tokens of all views: of the global ones twice, since the teacher sees them too."""
        large, small = map(math.prod, self.settings.views.grids(self.setup.grid))
        num_series = float(present.sum(1).double().mean()) if self.encoder.keeps_series_apart else 1.0
        return num_series * (2 * NUM_GLOBAL * large + self.settings.views.num_local * small)


def mean_token(features: Features) -> Float[Tensor, "b e"]:
    """The mean over places, and over the series that are present."""
    weight = features.present[..., None].float()
    return (features.tokens.float().mean(2) * weight).sum(1) / weight.sum(1).clamp(min=1)


def agreement(targets: Float[Tensor, "b g k"], told: Float[Tensor, "b n k"]) -> Float[Tensor, " b"]:
    """Cross-entropy between every target and every view but its own, the first g being those the targets are of; the mean.

    The sum over views is taken first: g (n - 1) pairs cost what g do.
    """
    log = told.log_softmax(-1)
    num_targets, num_views = targets.shape[1], told.shape[1]
    others = log.sum(1, keepdim=True) - log[:, :num_targets]
    return -(targets * others).sum((1, 2)) / (num_targets * (num_views - 1))


def deviation(features: Float[Tensor, "b n e"]) -> Float[Tensor, ""]:
    """How features of length 1 differ from sample to sample, the mean over views: 0 when equal, 1 with nothing in common."""
    features = F.normalize(features, dim=-1)
    squares = (features - features.mean(0)).square().sum((0, 2)) / max(len(features) - 1, 1)
    return squares.sqrt().mean()


def collapsed(entropy: float, deviation: float, num_prototypes: int) -> bool:
    """Whether a teacher says the same of everything.

    Args:
        entropy: the mean of its distributions', in nats.
        deviation: of its features, see `deviation`; NaN when unknown.
        num_prototypes: of its head.
    """
    share = entropy / math.log(num_prototypes)
    return not LEAST_ENTROPY <= share <= MOST_ENTROPY or deviation < SAME_FEATURES
