"""What an encoder is to the networks built on it, whatever is inside, and which kinds there are."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.errors import UserError
from nnunet_csm.model.tokens import Size
from nnunet_csm.plans import Architecture, Configuration

# `encoder.kind` in the plans to its class, imported when it is asked for
ENCODERS = {
    "vit": "nnunet_csm.model.vit.ViT",
    "joint_vit": "nnunet_csm.model.joint_vit.JointViT",
    "plain_unet": "nnunet_csm.model.pyramid.PlainUNet",
    "residual_unet": "nnunet_csm.model.pyramid.ResidualUNet",
    "fpn": "nnunet_csm.model.pyramid.FPN",
    "unet_by_series": "nnunet_csm.model.unet_by_series.UNetBySeries",
}


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
        width: of the features that `levels` gives of one level.
        level_widths: of the features of each level of several.
        keeps_series_apart: whether there are features for each series.
        attends: whether its cost grows faster than the number of tokens.
        decoders: segmenters' decoders that can read it, see `plans.Architecture`.
    """

    keeps_series_apart = True
    attends = True
    decoders: ClassVar[tuple[str, ...]] = ()
    series: tuple[str, ...]
    width: int
    level_widths: list[int]

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
            num_levels: 1, or as many as there are `level_widths`.
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
    def check(cls, architecture: Architecture, where: str) -> None:
        """Raise UserError when there can be no such encoder; `where` is what the message names."""

    @classmethod
    @abstractmethod
    def num_blocks(cls, architecture: Architecture) -> int:
        """Number of blocks from the input on, which can be transferred by themselves: of `stages` without the first."""

    @classmethod
    @abstractmethod
    def told(cls, architecture: Architecture) -> str:
        """Its size in words, for the plan."""

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


def check_encoder(configuration: Configuration, where: str) -> None:
    """Raise UserError when plans ask for an encoder that there cannot be, or for blocks that it has not."""
    architecture, num_blocks = configuration.architecture, configuration.csm.finetuning.transferred_blocks
    found = encoder_class(architecture)
    found.check(architecture, f"{where}: arch_kwargs")
    most = found.num_blocks(architecture)
    if num_blocks is not None and not 0 <= num_blocks <= most:
        raise UserError(f"{where}: csm.finetuning.transferred_blocks is {num_blocks}, the encoder has {most}; null is all")


def build_encoder(architecture: Architecture, drop_path: float = 0.0) -> Encoder:
    """The encoder that the plans describe, as drawn."""
    return encoder_class(architecture)(architecture, drop_path)


def numbers_by_name(source: Architecture, target: Architecture, origin: str, how: str) -> list[int]:
    """Where the series of `target` stand in weights that hold all series of `source` in one layer.

    Series that are not used are left out, as if they were absent.

    Raises:
        UserError: the pretraining did not have one; `origin` is where the weights come from, `how` what they do with series.
    """
    lacking = [name for name in target.series if name not in source.series]
    if lacking:
        raise UserError(
            f"{origin}: its {how} {', '.join(source.series)}, this run also needs {', '.join(lacking)}; plan "
            f"with -series {' '.join(source.series)}, or pretrain on all of them"
        )
    return [source.series.index(name) for name in target.series]
