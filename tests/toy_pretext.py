"""A pretext of another kind than those that come with the package: noise for masks, a teacher for targets."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.pretext.base import Batch, Drawn, Pretext, Setup


@dataclass(frozen=True)
class Settings:
    momentum: float
    noise: float = 0.5


@dataclass(frozen=True)
class Strength(Drawn):
    strength: Tensor


class Agreement(Pretext):
    Settings, Draw, parts = Settings, Strength, ("spread",)

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.student, self.encoder = build_encoder(setup.architecture), build_encoder(setup.architecture)
        self.encoder.load_state_dict(self.student.state_dict())
        self.encoder.requires_grad_(False)

    def draw(self, draws: Draws, present: Tensor, variant: int, volumes: tuple[Tensor, ...], training: bool) -> Strength:
        return Strength(draws.uniform(What.TOKENS, volumes[0].numel() // len(volumes[0])).view_as(volumes[0]))

    def forward(self, *batch: Any) -> Tensor:
        volume, drawn = batch[0].float(), batch[-1]
        present = volume.flatten(2).any(2)
        noisy = volume + self.settings.noise * (drawn.strength - 0.5) * (volume != 0)
        seen, target = (encoder.levels(v, present)[-1].tokens for encoder, v in ((self.student, noisy), (self.encoder, volume)))
        return (seen - target).square().mean((1, 2, 3)).sum()

    def validate(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        volume = batch.volumes[0].float()
        features = self.encoder.levels(volume, volume.flatten(2).any(2))[-1].tokens
        weight = self.weight(batch.drawn)
        return {"loss": (self(*batch.args), weight), "spread": (features.std(2).mean((1, 2)).sum(), weight)}

    @torch.no_grad()
    def after_step(self, done: float) -> None:
        for mine, students in zip(self.encoder.parameters(), self.student.parameters(), strict=True):
            mine.lerp_(students, 1 - self.settings.momentum)
