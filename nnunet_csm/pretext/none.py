"""No pretext: plans of a network that is trained from scratch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.pretext.base import Drawn, Pretext, Setup

REFUSED = (
    "csm.pretext.name is 'none': there is nothing to pretrain; train from scratch (csm.finetuning.encoder 'scratch'; in an arm "
    'of a study "pretrained": false), or plan with another preset'
)


@dataclass(frozen=True)
class Settings:
    """There are none."""


class Nothing(Pretext):
    """Learns nothing; the trainer of pretrainings refuses such plans."""

    Settings, Draw = Settings, Drawn
    learns = False

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.encoder = build_encoder(setup.architecture)

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        return [("pretext", "none", "trained from scratch: fine-tune at once, what is said of pretraining has no effect")]

    def draw(self, *batch: Any, **options: Any) -> NoReturn:
        raise UserError(REFUSED)

    def forward(self, *batch: Any) -> NoReturn:
        raise UserError(REFUSED)
