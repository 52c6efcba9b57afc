"""The segmenter: what nnU-Net builds from CSM plans for fine-tuning and prediction, on the encoder (paper III-C, IV-A)."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import interpolate

from nnunet_csm.errors import UserError
from nnunet_csm.model.adaptive import AdaptiveDecoder
from nnunet_csm.model.decoders import LightDecoder, LinearHead, NonlinearHead, Skip, UNETRDecoder, conv_block
from nnunet_csm.model.fusion import build_fusion
from nnunet_csm.model.outputs import Outputs
from nnunet_csm.model.planned import PlannedNetwork, series_present
from nnunet_csm.model.tokens import level_kernels, level_strides

# where the gate of the raw voxels starts: the encoder's features come first, and the stem still gets a gradient
GATE = 1e-5


def in_bf16(device_type: str) -> AbstractContextManager[object]:
    """A context in which autocast on a GPU, where it is on, takes bf16.

    nnU-Net validates and predicts under fp16, which activations of a large ViT can exceed; we train in bf16.
    """
    autocast = device_type == "cuda" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, torch.bfloat16) if autocast else nullcontext()


class CSMSegmenter(PlannedNetwork):
    """Segment a patch from any subset of its series.

    Args are nnU-Net's (`input_channels`, `num_classes`, `deep_supervision`) and the fields of `plans.Architecture`.

    Raises:
        ValueError: channels that are not the planned series, or deep supervision, which this network has not.
        UserError: a decoder that cannot read this kind of encoder.
    """

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False, **arch_kwargs: Any) -> None:
        super().__init__(input_channels, arch_kwargs)
        if deep_supervision:
            raise ValueError("CSMSegmenter has no deep supervision; train it with nnUNetTrainerCSM")
        a, encoder = self.architecture, self.encoder
        if a.decoder not in encoder.decoders:
            raise UserError(
                f"decoder in arch_kwargs is {a.decoder!r}, but encoder.kind {a.encoder.kind!r} takes one of "
                f"{', '.join(encoder.decoders)}; correct one of them"
            )
        strides = level_strides(a.token_size)
        kernel_sizes = level_kernels(strides)
        num_fused = len(a.series) if encoder.keeps_series_apart else 1
        if (a.decoder == "adaptive") != (a.fusion_settings.name == "apart"):
            raise UserError(
                f"decoder in arch_kwargs is {a.decoder!r}, fusion {a.fusion_settings.name!r}; the decoder 'adaptive' takes the "
                f"fusion 'apart', and no other does: correct one of them"
            )
        fusion, ends = a.fusion_settings, [*[None] * (len(encoder.level_widths) - 1), num_classes]
        self.fusions = nn.ModuleList(
            build_fusion(fusion, num_fused, width, end) for width, end in zip(encoder.level_widths, ends, strict=True)
        )
        self.stem: nn.Module | None = None
        self.stem_gate: nn.Parameter | None = None
        # of a network that still learns to need its encoder, see `open_stem`; None: open
        self.stem_opening: Tensor | None
        self.register_buffer("stem_opening", None)
        self.register_load_state_dict_pre_hook(_take_opening)
        self.skips = nn.ModuleList()
        widths = [a.features * 2**level for level in range(len(strides))]
        self.decoder: nn.Module
        match a.decoder:
            case "light":
                self.decoder = LightDecoder(encoder.width, len(strides), widths, strides, num_classes)
            case "linear":
                self.decoder = LinearHead(encoder.level_widths, num_classes)
            case "nonlinear":
                self.decoder = NonlinearHead(encoder.level_widths, num_classes)
            case "unet":
                *finer, coarsest = encoder.level_widths
                self.decoder = UNETRDecoder(coarsest, finer, strides, kernel_sizes, num_classes)
            case "adaptive":
                self.decoder = AdaptiveDecoder(encoder.level_widths, strides, a.depth, len(a.series), num_classes)
            case "unetr":
                self.bring_up(widths)
                self.decoder = UNETRDecoder(
                    encoder.width, widths, strides, kernel_sizes, num_classes, finest_skip=a.stem != "none"
                )
        if fusion.refinement != "none":
            if not isinstance(self.decoder, UNETRDecoder):
                raise UserError(
                    f"fusion.refinement in arch_kwargs is {fusion.refinement!r}, but decoder {a.decoder!r} has no features at "
                    f"full resolution to refine; make it 'none', or set decoder to 'unetr' or 'unet'"
                )
            self.decoder.refine(kernel_sizes[0], fusion.refinement)

    def bring_up(self, widths: Sequence[int]) -> None:
        """Make what brings a map to each level of UNETR's decoder: the voxels to the finest, levels of the ViT to the others."""
        a, strides = self.architecture, level_strides(self.architecture.token_size)
        kernel_sizes = level_kernels(strides)
        if a.stem != "none":
            # the first layer holds all weights that belong to a series
            self.stem = nn.Sequential(
                nn.Conv3d(len(a.series), a.features, 1), conv_block(a.features, a.features, kernel_sizes[0])
            )
        if a.stem == "gated":
            self.stem_gate = nn.Parameter(torch.full((1,), GATE))
        self.skips.extend(
            Skip(self.encoder.width, widths[level], strides[level:][::-1], kernel_sizes[level:][::-1])
            for level in range(1, len(strides))
        )

    def forward(
        self, volume: Float[Tensor, "b n z y x"], shown: Sequence[int] | None = None
    ) -> Float[Tensor, "b c z y x"] | Outputs:
        """Logits of a patch with nnU-Net's channels, of which the planned series are used; absent series are all zero.

        While it learns, with what its fusion and its head learn from beside them, where there is any.

        Args:
            volume: patches.
            shown: numbers of the planned series that are present in every sample, when no sample has any other, as
                `series_present` counts, see `Encoder.levels`.
        """
        with in_bf16(volume.device.type):
            volume, present = self.present_series(volume)
            levels = self.encode(volume, present, shown)
            decoded = self.decode(volume, [level.main for level in levels])
            beside = [output for part in (decoded, *levels) for output in part.others]
            others = tuple((interpolate(logits, volume.shape[2:], mode="trilinear"), weight) for logits, weight in beside)
        logits = decoded.main.float() if decoded.main.dtype == torch.bfloat16 else decoded.main
        penalties = [part.penalty for part in (decoded, *levels) if part.penalty is not None]
        if not (others or penalties):
            return logits
        return Outputs(logits, others, torch.stack(penalties).sum() if penalties else None)

    def decode(self, volume: Float[Tensor, "b s z y x"], features: Sequence[Float[Tensor, "b _e _z _y _x"]]) -> Outputs:
        """Logits from the voxels of the series and the maps of `encode`."""
        if isinstance(self.decoder, AdaptiveDecoder):
            return Outputs.of(self.decoder(features, series_present(volume)))
        if not isinstance(self.decoder, UNETRDecoder):
            return Outputs.of(self.decoder(features))
        *taps, bottleneck = features
        if self.architecture.decoder == "unet":
            return Outputs.of(self.decoder(bottleneck, taps))
        skips = [self.from_voxels(volume), *(skip(tap) for skip, tap in zip(self.skips, taps, strict=True))]
        return Outputs.of(self.decoder(bottleneck, skips))

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
        """Let voxels come past the encoder in full (1), in part, or not at all (0); while training, see `Finetuning`.

        It is saved with the weights: those of a training's first part were never used with an open stem.
        """
        if self.stem_opening is None:
            self.stem_opening = torch.ones((), device=next(self.parameters()).device)
        self.stem_opening.fill_(opening)

    def encode(
        self, volume: Float[Tensor, "b s z y x"], present: Bool[Tensor, "b s"], shown: Sequence[int] | None = None
    ) -> list[Outputs]:
        """Maps of the encoder's levels, fused over the present series."""
        levels = self.encoder.levels(volume, present, len(self.fusions), shown)
        return [Outputs.of(fuse(f.tokens, f.present, f.grid, f.series)) for fuse, f in zip(self.fusions, levels, strict=True)]


def _take_opening(segmenter: CSMSegmenter, weights: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before weights are loaded: they say how far the stem is open, or say nothing where it is open."""
    opening = weights.setdefault(f"{prefix}stem_opening", torch.ones(()))
    if segmenter.stem_opening is None and opening < 1:
        segmenter.open_stem(1.0)
    if segmenter.stem_opening is None:
        del weights[f"{prefix}stem_opening"]
