"""What an encoder is to the networks built on it, whatever is inside, and which kinds there are."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.errors import UserError
from nnunet_csm.model.tokens import Size
from nnunet_csm.plans import Architecture

# `encoder.kind` in the plans to its class, imported when it is asked for
ENCODERS = {"vit": "nnunet_csm.model.vit.ViT", "joint_vit": "nnunet_csm.model.joint_vit.JointViT"}


@dataclass(frozen=True)
class Features:
    """What an encoder makes of a patch at one of its levels."""

    tokens: Float[Tensor, "b m l e"]
    """For each of m series that the encoder keeps apart, or for all in one (m = 1)."""
    present: Bool[Tensor, "b m"]
    """The features of an absent series mean nothing."""
    grid: Size
    """Places along (z, y, x)."""
    series: tuple[int, ...] | None
    """Numbers of the m series; None for all of them, or all in one."""


@dataclass(frozen=True)
class Transferred:
    """What became of one tensor of the downstream encoder."""

    name: str
    shape: tuple[int, ...]
    how: str


class Encoder(nn.Module, ABC):
    """Encodes patches of any subset of its series.

    Args:
        architecture: which series, and sizes.
        drop_path: share of the samples in which a branch is left out while training, as far as the kind knows it.

    Attributes:
        series: names, in the order in which patches have them.
        width: of the features of every level.
        keeps_series_apart: whether there are features for each series.
    """

    keeps_series_apart = True
    series: tuple[str, ...]
    width: int

    def __init__(self, architecture: Architecture, drop_path: float = 0.0) -> None:
        super().__init__()
        self.series = architecture.series

    @abstractmethod
    def levels(
        self,
        volume: Float[Tensor, "b s z y x"],
        present: Bool[Tensor, "b s"],
        num_levels: int = 1,
        shown: Sequence[int] | None = None,
    ) -> list[Features]:
        """Features of whole patches, at some levels, the last of which is the encoder's end.

        Args:
            volume: patches; absent series are all zero.
            present: series that each sample has.
            num_levels: how many.
            shown: numbers of the series that are present in every sample, when no sample has any other: the others are then
                left out. When None, samples may differ, and nobody looks at absent series, which is the same up to rounding.
        """

    @abstractmethod
    def stages(self) -> list[list[nn.Parameter]]:
        """Parameters from the input on, for learning rates that decay towards it; those that are not named belong to the last."""

    @abstractmethod
    def compiled_parts(self) -> Iterator[nn.Module]:
        """What is compiled, see `compilation.py`."""

    @classmethod
    @abstractmethod
    def num_series_in(cls, weights: Mapping[str, Tensor], architecture: Architecture) -> float:
        """How many series some weights were made for."""

    @classmethod
    @abstractmethod
    def carried(
        cls, weights: Mapping[str, Tensor], source: Architecture, target: Architecture, origin: str
    ) -> tuple[dict[str, Tensor], list[Transferred]]:
        """Weights for other series or another order of them, by name, and a row for every piece that was placed by name.

        Raises:
            UserError: they cannot do for these series; `origin` is where they come from.
        """


def encoder_class(architecture: Architecture) -> type[Encoder]:
    """The class of a kind of encoder. Raises UserError when there is no such kind."""
    kind = architecture.encoder.kind
    if kind not in ENCODERS:
        raise UserError(
            f"encoder.kind in arch_kwargs is {kind!r}, expected one of {', '.join(ENCODERS)}; correct it in the plans"
        )
    module, _, name = ENCODERS[kind].rpartition(".")
    found: type[Encoder] = getattr(import_module(module), name)
    return found


def build_encoder(architecture: Architecture, drop_path: float = 0.0) -> Encoder:
    """The encoder that the plans describe, as drawn."""
    return encoder_class(architecture)(architecture, drop_path)
