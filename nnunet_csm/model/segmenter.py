"""The segmenter: what nnU-Net builds from CSM plans for fine-tuning and prediction, on the encoder (paper III-C, IV-A)."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from nnunet_csm.model.decoders import LightDecoder, Skip, UNETRDecoder, conv_block, level_strides
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.model.fusion import SeriesProjections, mean_over_present
from nnunet_csm.model.tokens import Size, all_tokens, coordinates, grid_size, join, select, to_map, to_tokens

# where the gate of the raw voxels starts: the encoder's features come first, and the stem still gets a gradient
GATE = 1e-5


def series_present(volume: Float[Tensor, "b s z y x"]) -> Bool[Tensor, "b s"]:
    """A series is present when any of its voxels differs from 0; where none is, all count as present.

    nnU-Net's prediction passes nothing but voxels, and a series that is all zero stays so through its preprocessing.
    """
    present = (volume != 0).flatten(2).any(2)
    return present | ~present.any(1, keepdim=True)


def in_bf16(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast on a GPU, where it is on, takes bf16.

    nnU-Net validates and predicts under fp16, which activations of a large ViT can exceed; we train in bf16.
    """
    autocast = device_type == "cuda" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, torch.bfloat16) if autocast else nullcontext()


class CSMSegmenter(nn.Module):
    """Segment a patch from any subset of its series.

    Args are nnU-Net's (`input_channels`, `num_classes`, `deep_supervision`) and the fields of `plans.Architecture`.

    Raises:
        ValueError: channels that are not the planned series, or deep supervision, which this network has not.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        series: Sequence[str],
        channels: Sequence[int],
        token_size: Sequence[int],
        width: int,
        depth: int,
        num_heads: int,
        features: int,
        drop_path: float,
        joint_tokens: bool = False,
        decoder: Literal["unetr", "light"] = "unetr",
        stem: Literal["full", "gated", "none"] = "full",
        fusion: Literal["mean", "projected"] = "mean",
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if len(channels) != len(series) or input_channels <= max(channels):
            planned = ", ".join(f"{name} in channel {channel}" for name, channel in zip(series, channels, strict=False))
            raise ValueError(f"{input_channels} input channels, but the plans have {planned}; plan again with `nnunet_csm plan`")
        if deep_supervision:
            raise ValueError("CSMSegmenter has no deep supervision; train it with nnUNetTrainerCSM")
        strides = level_strides(token_size)
        kernel_sizes: list[Size] = [(3 if z > 1 else 1, 3 if y > 1 else 1, 3 if x > 1 else 1) for z, y, x in strides]
        widths = [features * 2**level for level in range(len(strides))]
        self.input_channels, self.channels = input_channels, list(channels)
        tz, ty, tx = token_size
        self.token_size: Size = (tz, ty, tx)
        self.taps = [round(depth * (level + 1) / len(strides)) for level in range(len(strides))]
        self.encoder = Encoder(series, token_size, width, depth, num_heads, drop_path, joint_tokens)
        self.fusions: nn.ModuleList | None = None
        if fusion == "projected" and len(series) > 1 and not joint_tokens:
            self.fusions = nn.ModuleList(SeriesProjections(len(series), width) for _ in self.taps)
        self.stem: nn.Module | None = None
        self.stem_gate: nn.Parameter | None = None
        # no part of the weights: a trained network is open
        self.stem_opening: Tensor | None
        self.register_buffer("stem_opening", None, persistent=False)
        if decoder == "light":
            self.skips = nn.ModuleList()
            self.decoder: nn.Module = LightDecoder(width, len(self.taps), widths, strides, num_classes)
            return
        if stem != "none":
            # the first layer holds all weights that belong to a series
            self.stem = nn.Sequential(nn.Conv3d(len(series), features, 1), conv_block(features, features, kernel_sizes[0]))
        if stem == "gated":
            self.stem_gate = nn.Parameter(torch.full((1,), GATE))
        self.skips = nn.ModuleList(
            Skip(width, widths[level], strides[level:][::-1], kernel_sizes[level:][::-1]) for level in range(1, len(strides))
        )
        self.decoder = UNETRDecoder(width, widths, strides, kernel_sizes, num_classes, finest_skip=stem != "none")

    def forward(self, volume: Float[Tensor, "b n z y x"], shown: Sequence[int] | None = None) -> Float[Tensor, "b c z y x"]:
        """Logits of a patch with nnU-Net's channels, of which the planned series are used; absent series are all zero.

        Args:
            volume: patches.
            shown: numbers of the planned series that are present in every sample, when no sample has any other, as
                `series_present` counts: tokens of the others are then left out. When None, samples may differ; absent
                tokens are masked in attention, which gives the same features up to rounding. Joint tokens hold all series
                in any case.
        """
        with in_bf16(volume.device.type):
            volume, present = self.present_series(volume)
            logits = self.decode(volume, self.encode(volume, present, shown))
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def present_series(self, volume: Float[Tensor, "b n z y x"]) -> tuple[Float[Tensor, "b s z y x"], Bool[Tensor, "b s"]]:
        """The planned series of patches with nnU-Net's channels, and which of them are present."""
        volume = self.planned_series(volume)
        present = series_present(volume)
        return volume * present[:, :, None, None, None].to(volume.dtype), present

    def decode(
        self, volume: Float[Tensor, "b s z y x"], features: Sequence[Float[Tensor, "b e gz gy gx"]]
    ) -> Float[Tensor, "b c z y x"]:
        """Logits from the voxels of the series and the features of `encode`."""
        if isinstance(self.decoder, LightDecoder):
            return self.decoder(features)
        *taps, bottleneck = features
        skips = [self.from_voxels(volume), *(skip(tap) for skip, tap in zip(self.skips, taps, strict=True))]
        return self.decoder(bottleneck, skips)

    def from_voxels(self, volume: Float[Tensor, "b s z y x"]) -> Float[Tensor, "b c z y x"] | None:
        """The skip at full resolution, the only way past the encoder; None when there is none."""
        if self.stem is None:
            return None
        x = self.stem(volume)
        for factor in (self.stem_gate, self.stem_opening):
            # in the precision of the map, which autocast would otherwise raise to that of the factor
            x = x if factor is None else x * factor.to(x.dtype)
        return x

    def open_stem(self, opening: float) -> None:
        """Let voxels come past the encoder in full (1), in part, or not at all (0); while training, see `Finetuning`."""
        if self.stem_opening is None:
            self.stem_opening = torch.ones((), device=self.encoder.embedding.weight.device)
        self.stem_opening.fill_(opening)

    def planned_series(self, volume: Float[Tensor, "b n z y x"]) -> Float[Tensor, "b s z y x"]:
        """The planned series, in their order, of patches with nnU-Net's channels.

        Raises:
            ValueError: another number of channels than the network was planned for.
        """
        if volume.shape[1] != self.input_channels:
            raise ValueError(
                f"the input has {volume.shape[1]} channels, the network was planned for {self.input_channels} "
                f"({', '.join(self.encoder.series)} are used); give an all-zero volume for a series a patient does not have"
            )
        if self.channels == list(range(self.input_channels)):
            return volume
        return torch.stack([volume[:, channel] for channel in self.channels], dim=1)

    def encode(
        self, volume: Float[Tensor, "b s z y x"], present: Bool[Tensor, "b s"], shown: Sequence[int] | None = None
    ) -> list[Float[Tensor, "b e gz gy gx"]]:
        """Features of the encoder at its taps, fused over the present series to maps on the token grid.

        With joint tokens there is nothing to mask and nothing to fuse: absent series are the zeros they are in `volume`.
        """
        b, s = present.shape
        grid = grid_size((volume.shape[2], volume.shape[3], volume.shape[4]), self.token_size)
        if self.encoder.joint_tokens:
            index = all_tokens(1, grid, b, volume.device)
            tokens = select(join(to_tokens(volume, self.token_size)), index)
            return [to_map(f, grid) for f in self.encoder(tokens, coordinates(index, grid), None, self.taps)]
        index = all_tokens(s, grid, b, volume.device)
        attend = None
        if shown is not None:
            # a stack of slices: a list as an index would be copied to the GPU
            index = torch.cat([index.unflatten(1, (s, -1))[:, number] for number in shown], dim=1)
            present = torch.stack([present[:, number] for number in shown], dim=1)
        elif s > 1:
            # masked, not left out, so that every sample of a batch has the same length
            attend = present.repeat_interleave(math.prod(grid), dim=1)
        tokens = select(to_tokens(volume, self.token_size), index)
        num_series = present.shape[1]
        encoded = self.encoder(tokens, coordinates(index, grid), attend, self.taps)
        features = [f.unflatten(1, (num_series, -1)) for f in encoded]
        if self.fusions is None:
            return [to_map(mean_over_present(f, present), grid) for f in features]
        return [to_map(fuse(f, present, shown), grid) for fuse, f in zip(self.fusions, features, strict=True)]
