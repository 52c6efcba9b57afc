"""What the networks built on an encoder share: nnU-Net's channels go in, and the planned series among them are used."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.errors import UserError
from nnunet_csm.model.encoder import Encoder, build_encoder
from nnunet_csm.model.tokens import Size
from nnunet_csm.plans import parse_architecture


def series_present(volume: Float[Tensor, "b s z y x"]) -> Bool[Tensor, "b s"]:
    """A series is present when any of its voxels differs from 0; where none is, all count as present.

    nnU-Net's prediction passes nothing but voxels, and a series that is all zero stays so through its preprocessing.
    """
    present = (volume != 0).flatten(2).any(2)
    return present | ~present.any(1, keepdim=True)


class PlannedNetwork(nn.Module):
    """A network on the encoder that the plans describe.

    Args:
        input_channels: of nnU-Net's tensor.
        arch_kwargs: the fields of `plans.Architecture`, as nnU-Net passes them.

    Raises:
        UserError: channels that are not the planned series.
    """

    encoder: Encoder

    def __init__(self, input_channels: int, arch_kwargs: dict[str, Any]) -> None:
        super().__init__()
        a = self.architecture = parse_architecture(arch_kwargs, "architecture.arch_kwargs")
        if len(a.channels) != len(a.series) or input_channels <= max(a.channels):
            planned = ", ".join(f"{name} in channel {channel}" for name, channel in zip(a.series, a.channels, strict=False))
            raise UserError(f"{input_channels} input channels, but the plans have {planned}; plan again with `nnunet_csm plan`")
        self.input_channels, self.channels = input_channels, list(a.channels)
        self.token_size: Size = a.token_size
        self.encoder = build_encoder(a, a.drop_path)

    def present_series(self, volume: Float[Tensor, "b n z y x"]) -> tuple[Float[Tensor, "b s z y x"], Bool[Tensor, "b s"]]:
        """The planned series of patches with nnU-Net's channels, and which of them are present."""
        volume = self.planned_series(volume)
        return volume, series_present(volume)

    def planned_series(self, volume: Float[Tensor, "b n z y x"]) -> Float[Tensor, "b s z y x"]:
        """The planned series, in their order, of patches with nnU-Net's channels.

        Raises:
            ValueError: another number of channels than the network was planned for.
        """
        if volume.shape[1] != self.input_channels:
            raise ValueError(
                f"the input has {volume.shape[1]} channels, the network was planned for {self.input_channels} "
                f"({', '.join(self.architecture.series)} are used); give an all-zero volume for a series a patient does not have"
            )
        if self.channels == list(range(self.input_channels)):
            return volume
        return torch.stack([volume[:, channel] for channel in self.channels], dim=1)
