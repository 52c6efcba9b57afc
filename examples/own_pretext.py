"""A pretext of one's own: hide one or more series whole, and guess from the others how bright each of their tokens is.

It stands in a file of the user's; nothing in the package knows of it. A preset names it by its dotted path, here `own.json`:

    {"inherits_from": "demo", "description": "means of hidden series",
     "pretext": {"name": "own_pretext.HiddenMeans", "num_hidden": 1}}

    export PYTHONPATH=examples                     # the folder of this file
    nnunet_csm plan -d 21 -preset own.json -overwrite_plans_name Own
    nnunet_csm pretrain -d 21 -p Own -f 0
    nnunet_csm finetune -d 21 -p Own -f 0          # with the encoder that was learned
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nnunet_csm.data.draws import Draws, What
from nnunet_csm.model.encoder import build_encoder
from nnunet_csm.model.fusion import mean_over_present
from nnunet_csm.model.tokens import to_tokens
from nnunet_csm.pretext.base import Drawn, Pretext, Setup


@dataclass(frozen=True)
class Settings:
    """Keys of `pretext` in the preset, beside its name."""

    num_hidden: int = 1


@dataclass(frozen=True)
class Hidden(Drawn):
    """What is drawn for a batch: the series that the encoder sees and those that are guessed, each (b, s)."""

    shown: Tensor
    hidden: Tensor


class HiddenMeans(Pretext):
    """Learns with any encoder, for which only `Encoder.levels` is used."""

    Settings, Draw = Settings, Hidden

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.encoder = build_encoder(setup.architecture)
        self.head = nn.Linear(self.encoder.width, setup.num_series)

    def draw(self, draws: Draws, present: Tensor, variant: int, volumes: tuple[Tensor, ...], training: bool) -> Hidden:
        """Hide `num_hidden` of the present series, or fewer, so that one is left."""
        order = draws.integers(What.SERIES, present.shape[1]).masked_fill(~present, 2**63 - 1)
        hidden = order.argsort(1).argsort(1) < (present.sum(1, keepdim=True) - 1).clamp(max=self.settings.num_hidden)
        return Hidden(present & ~hidden, hidden)

    def forward(self, *batch: Any) -> Tensor:
        """Squared error of the means of tokens, summed over the hidden series of all samples."""
        volume, drawn = batch
        # images come as fp16
        shown = volume.float() * drawn.shown[..., None, None, None]
        features = self.encoder.levels(shown, drawn.shown)[-1]
        guessed = self.head(mean_over_present(features.tokens, features.present)).transpose(1, 2)  # (b, s, l)
        means = to_tokens(volume, self.setup.architecture.token_size).float().mean(-1)  # (b, s, l)
        return ((guessed.float() - means).square().mean(-1) * drawn.hidden).sum()

    def weight(self, drawn: Drawn) -> Tensor:
        """The number of hidden series, which the sum is divided by."""
        assert isinstance(drawn, Hidden)
        return drawn.hidden.sum()

    def seen_tokens(self, present: Tensor) -> float:
        """Those of the shown series."""
        num_present = present.sum(1)
        num_shown = num_present - (num_present - 1).clamp(max=self.settings.num_hidden)
        return self.setup.num_tokens * float(num_shown.double().mean())
