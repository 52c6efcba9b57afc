"""What a pretext is: the one contract between a way to learn without labels and everything that trains, judges and plans it.

A pretext is one file. Its class names the settings it has in the plans, draws what a batch needs beside the images, and gives a
loss; what most have in common has a default here. The plans choose it by a name of `PRETEXTS` or, for one that does not come with
this package, by the dotted path of its class.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.data.draws import Draws
from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import Encoder, check_encoder
from nnunet_csm.model.tokens import grid_size
from nnunet_csm.plans import Architecture, Configuration
from nnunet_csm.schema import Size, from_dict, to_dict

# `csm.pretext.name` in the plans to its class, imported when it is asked for
PRETEXTS = {
    "csm": "nnunet_csm.pretext.csm.CSM",
    "mae3d": "nnunet_csm.pretext.mae3d.MAE3D",
    "maesil": "nnunet_csm.pretext.maesil.MAESIL",
    "dino": "nnunet_csm.pretext.dino.DINO",
    "pcrlv2": "nnunet_csm.pretext.pcrlv2.PCRLv2",
    "vox2vec": "nnunet_csm.pretext.vox2vec.Vox2Vec",
    "ae": "nnunet_csm.pretext.autoencoders.AE",
    "vae": "nnunet_csm.pretext.autoencoders.VAE",
    "vqvae": "nnunet_csm.pretext.autoencoders.VQVAE",
    "none": "nnunet_csm.pretext.none.Nothing",
}

# what a network that rebuilds was given, see `Pretext.rebuilt`
MASKED, NOTHING_HIDDEN = "masked", "nothing hidden"

D = TypeVar("D", bound="Drawn")


@dataclass(frozen=True)
class Setup:
    """What a pretext is built from.

    Attributes:
        architecture: of the encoder, with the series of all sources.
        settings: the pretext's own.
        patch_size: that of pretraining, a multiple of the token size.
    """

    architecture: Architecture
    settings: Any
    patch_size: Size

    @property
    def grid(self) -> Size:
        """Tokens along (z, y, x) of a patch."""
        return grid_size(self.patch_size, self.architecture.token_size)

    @property
    def num_tokens(self) -> int:
        """Tokens of a series in a patch, l."""
        z, y, x = self.grid
        return z * y * x

    @property
    def num_series(self) -> int:
        return len(self.architecture.series)


@dataclass(frozen=True)
class Drawn:
    """What is drawn for a batch beside its images; pretexts add fields. All are tensors whose first axis counts samples."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The fields, in their order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def __getitem__(self: D, samples: slice) -> D:
        """The draws of some samples."""
        return type(self)(*(tensor[samples] for tensor in self.tensors))


@dataclass(frozen=True)
class Batch:
    """Images and what was drawn for them."""

    # crops may have sizes of their own
    volumes: tuple[Float[Tensor, "b s _z _y _x"], ...]
    """A crop of each sample, or several crops, see `Pretext.crop_sizes`."""
    drawn: Drawn

    def __len__(self) -> int:
        return len(self.volumes[0])

    def __getitem__(self, samples: slice) -> "Batch":
        """Some samples."""
        return Batch(tuple(volume[samples] for volume in self.volumes), self.drawn[samples])

    @property
    def args(self) -> tuple[Any, ...]:
        """What `Pretext.forward` takes."""
        return *self.volumes, self.drawn

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, see `of`."""
        return *self.volumes, *self.drawn.tensors

    @staticmethod
    def of(tensors: Sequence[Tensor], num_volumes: int, drawn: type[Drawn]) -> "Batch":
        """The inverse of `tensors`."""
        return Batch(tuple(tensors[:num_volumes]), drawn(*tensors[num_volumes:]))

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; nothing here waits."""
        moved = [tensor.to(device, non_blocking=True) for tensor in self.tensors]
        return Batch.of(moved, len(self.volumes), type(self.drawn))

    def pin_memory(self) -> "Batch":
        """The batch in memory that a GPU reads."""
        return Batch.of([tensor.pin_memory() for tensor in self.tensors], len(self.volumes), type(self.drawn))


class Pretext(nn.Module, ABC):
    """A way to learn an encoder without labels.

    A subclass sets `Settings` and `Draw`, makes `self.encoder` (the one that is transferred, of a teacher where there is one),
    and says how to draw and what the loss is.

    Attributes:
        Settings: a frozen dataclass, the keys of `csm.pretext` in the plans beside `name`.
        Draw: what `draw` gives.
        parts: names of what `validate` gives beside the loss; they are logged and plotted.
        network_draws: whether `forward` draws by torch's own generators (drop path), which the trainer then keys.
        learns: whether there is anything to pretrain.
        encoder: what pretraining is for.
        setup: what it was built from.
    """

    Settings: ClassVar[type]
    Draw: ClassVar[type[Drawn]]
    parts: ClassVar[tuple[str, ...]] = ()
    network_draws: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    encoder: Encoder

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup

    @property
    def settings(self) -> Any:
        """Its own settings."""
        return self.setup.settings

    @classmethod
    def check(cls, settings: Any, architecture: Architecture, where: str) -> None:
        """Raise UserError when settings cannot be, or do not fit the architecture; `where` is what the message names."""

    @classmethod
    def described(cls, setup: Setup, num_present: Mapping[int, int]) -> list[tuple[str, str, str]]:
        """Lines for the plan: what is decided, its value, why. Its name and settings, unless said otherwise.

        Args:
            setup: what it would be built from.
            num_present: a number of series to the number of cases that have that many.
        """
        settings = ", ".join(f"{key} {value}" for key, value in to_dict(setup.settings).items())
        return [("pretext", cls.__name__, settings or "has no settings")]

    @property
    def crop_sizes(self) -> tuple[Size, ...]:
        """Sizes of the crops that are cut of each sample, all of one case, each at a place of its own."""
        return (self.setup.patch_size,)

    def variants(self, present: Bool[Tensor, "c s"]) -> Float[Tensor, "c n"]:
        """How likely each case is to be in each of n kinds of batches.

        All samples of a batch are of one kind, so that its tensors have shapes that are known beforehand. The kind is drawn
        first, then cases by how likely they are to be in one: every case comes as often as the others. Rows sum to 1.
        """
        return torch.ones(len(present), 1, dtype=torch.double)

    @abstractmethod
    def draw(
        self,
        draws: Draws,
        present: Bool[Tensor, "b s"],
        variant: int,
        volumes: tuple[Float[Tensor, "b s _z _y _x"], ...],
        training: bool,
    ) -> Drawn:
        """Draw for a batch, on the device of its images. Nothing here may wait for the device, no shape depend on what is drawn.

        Args:
            draws: source of all randomness.
            present: series that each sample has.
            variant: the kind of the batch, see `variants`.
            volumes: the crops.
            training: whether the batch is learned from; what is not, is the same in every epoch.
        """

    @abstractmethod
    def forward(self, *batch: Any) -> Float[Tensor, ""]:
        """The loss of `Batch.args`, summed over what `weight` counts, so that ranks and parts of a batch add up."""

    def weight(self, drawn: Drawn) -> Tensor:
        """What the summed loss is to be divided by, one number; samples, unless said otherwise."""
        first = drawn.tensors[0]
        return torch.full((), len(first), device=first.device)

    def after_step(self, done: float) -> None:
        """What follows a step of the optimiser, when a share `done` of all steps is done: a teacher, a temperature."""

    def validate(self, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Sums and what they are to be divided by: of the loss, and of `parts`."""
        return {"loss": (self(*batch.args), self.weight(batch.drawn))}

    def warning(self, log: Mapping[str, Sequence[float]]) -> str:
        """What the last entries of `parts` tell that somebody should know; empty when there is nothing."""
        return ""

    def seen_tokens(self, present: Bool[Tensor, "c s"]) -> float:
        """Tokens of a sample that the encoder sees, on average over cases and draws: the budget that methods are compared by."""
        return self.setup.num_tokens * float(present.sum(1).double().mean())

    def example(self, num_samples: int, variant: int) -> Batch:
        """A batch of samples that have every series, with images of noise: what memory, operations and time are measured on."""
        num_series = self.setup.num_series
        volumes = tuple(torch.randn(num_samples, num_series, *size) for size in self.crop_sizes)
        draws = Draws(0, torch.arange(num_samples))
        present = torch.ones(num_samples, num_series, dtype=torch.bool)
        return Batch(volumes, self.draw(draws, present, variant, volumes, training=True))

    def rebuilt(self, batch: Batch) -> dict[str, tuple[Float[Tensor, "1 s z y x"], Bool[Tensor, "1 s z y x"]]]:
        """What it makes of a patch, to be scored; empty when it rebuilds nothing.

        Args:
            batch: of one sample.

        Returns:
            By what the network was given, `MASKED` or `NOTHING_HIDDEN` first in the name: the patch in the units of the input,
            with visible voxels as they are, and which of its voxels were rebuilt, none of absent series.
        """
        return {}

    def picture(self, path: Path, batch: Batch, title: str) -> None:
        """Draw what it makes of the first sample of a batch; nothing, unless said otherwise. The folder need not be there yet."""


def pretext_class(name: str, where: str) -> type[Pretext]:
    """The class of a pretext by its name, or by its dotted path. Raises UserError when there is none."""
    module, _, attribute = PRETEXTS.get(name, name).rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        names = ", ".join(PRETEXTS)
        raise UserError(
            f"{where}.name is {name!r}, expected one of {names}, or the dotted path of a class ({error}); correct it in the plans"
        ) from None
    if not (isinstance(found, type) and issubclass(found, Pretext)):
        raise UserError(f"{where}.name is {name!r}, which is no pretext; derive its class from nnunet_csm.pretext.base.Pretext")
    return found


def read_pretext(block: Mapping[str, Any], architecture: Architecture, where: str) -> tuple[type[Pretext], Any]:
    """The class and the settings of a pretext, from its block in the plans.

    Raises:
        UserError: no such pretext, a key that it has not, or a value that cannot be.
    """
    if not isinstance(block.get("name"), str):
        raise UserError(f"{where} has no name, expected one of {', '.join(PRETEXTS)}, or the dotted path of a class")
    cls = pretext_class(block["name"], where)
    settings: Any = from_dict(cls.Settings, {key: value for key, value in block.items() if key != "name"}, where)
    cls.check(settings, architecture, where)
    return cls, settings


def setup_of(configuration: Configuration, where: str = "plans") -> tuple[type[Pretext], Setup]:
    """The pretext that the plans describe, and what it is built from. Raises UserError as `read_pretext`."""
    check_encoder(configuration, where)
    architecture = configuration.pretraining_architecture
    cls, settings = read_pretext(configuration.csm.pretext, architecture, f"{where}: csm.pretext")
    return cls, Setup(architecture, settings, configuration.csm.pretraining_patch_size)


def learner_of(configuration: Configuration, where: str) -> tuple[type[Pretext], Setup]:
    """Do as `setup_of`, for a training. Raises UserError where there is nothing to learn as well."""
    cls, setup = setup_of(configuration, where)
    if not cls.learns:
        raise UserError(
            f"{where}: csm.pretext.name is {configuration.csm.pretext['name']!r}, so there is nothing to pretrain; fine-tune at "
            f"once from scratch (csm.finetuning.encoder 'scratch'), or plan with another preset"
        )
    return cls, setup
