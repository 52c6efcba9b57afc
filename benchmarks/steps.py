"""The trainers' own steps, without folders around them: what the benchmarks of this folder measure."""

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from nnunet_csm.machine import keep_freed_memory
from nnunet_csm.model.compilation import compile_parts
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.model.tokens import all_tokens, coordinates, select
from nnunet_csm.model.vit import of_series
from nnunet_csm.planning.presets import merged, read_preset
from nnunet_csm.plans import Schedule
from nnunet_csm.pretext.base import Batch, Pretext, Setup, read_pretext
from nnunet_csm.schema import Size, to_dict
from nnunet_csm.training.graphs import GraphedSteps
from nnunet_csm.training.optimization import build_optimizer
from nnunet_csm.training.pretraining import nnUNetTrainerCSMPretrain
from nnunet_csm.training.ranks import Ranks
from nnunet_csm.training.segmentation import nnUNetTrainerCSM

NUM_CLASSES = 4
SCHEDULE = Schedule(
    num_epochs=1,
    iterations_per_epoch=1000,
    val_iterations_per_epoch=0,
    batch_size=1,
    learning_rate=1e-4,
    warmup=0.0,
    weight_decay=0.05,
    betas=(0.9, 0.95),
    layer_decay=1.0,
)


class MaskedDecoder(ReconstructionDecoder):
    """The decoder as it was first, with the same weights: all tokens in the sequence, and a mask in attention.

    What is measured, and tested, against it is told apart by this class alone.
    """

    def forward(self, encoded: Tensor, visible: Tensor, asked: Tensor, grid: Size, beside: Tensor | None = None) -> Tensor:
        assert beside is None, "it had no same_place"
        index = all_tokens(len(self.series_embedding), grid, len(encoded), encoded.device)
        place, embedded = coordinates(index, grid), self.embedding(encoded)
        x = self.mask_token.to(embedded.dtype).expand(*index.shape, self.width)
        x = x.scatter(1, visible[..., None].expand_as(embedded), embedded)
        x = x + of_series(self.series_embedding, place[..., 0]) + self.positions(place)
        attend = torch.zeros_like(index, dtype=torch.bool).scatter(1, visible, True)[:, None, None, :]
        for block in self.blocks:
            x = Block.forward(block, x, attn_mask=attend)  # type: ignore[arg-type]
        return select(self.head(self.norm(x))[:, None], asked)


class Method(NamedTuple):
    """A pretext, and what it is built from."""

    pretext: type[Pretext]
    setup: Setup

    def build(self) -> Pretext:
        return self.pretext(self.setup)


def method_of(
    preset: str,
    num_series: int,
    token_size: Size,
    patch_size: Size,
    network: Mapping[str, Any] | None = None,
    pretext: Mapping[str, Any] | None = None,
) -> Method:
    """What a preset pretrains, on some series and sizes; `network` and `pretext` are changes to these keys of its file."""
    read = read_preset(preset)
    read = replace(read, network=merged(read.network, network or {}), pretext=merged(read.pretext, pretext or {}))
    series = tuple(f"series{number}" for number in range(num_series))
    architecture = read.architecture(series, tuple(range(num_series)), token_size, f"preset {preset}")
    cls, settings = read_pretext(read.pretext, architecture, f"preset {preset}: pretext")
    return Method(cls, Setup(architecture, settings, patch_size))


def variants_of(pretext: Pretext) -> dict[int, float]:
    """The kinds of batches that samples with every series can be in, and how likely each is."""
    likely = pretext.variants(torch.ones(1, pretext.setup.num_series, dtype=torch.bool))[0].tolist()
    return {variant: share for variant, share in enumerate(likely) if share > 0}


def batch_of(pretext: Pretext, num_samples: int, variant: int, device: torch.device) -> Batch:
    """`Pretext.example` as the trainer gets it from a bank: on the device, images in fp16."""
    batch = pretext.example(num_samples, variant).to(device)
    return replace(batch, volumes=tuple(volume.half() for volume in batch.volumes))


def _bare(trainer_class: Any, network: nn.Module, device: torch.device, compiled: bool) -> Any:
    """A trainer that has what its step reads, and nothing else."""
    if device.type == "cpu":
        keep_freed_memory()
    trainer: Any = trainer_class.__new__(trainer_class)
    trainer.device, trainer.ranks, trainer.num_parts = device, Ranks(), 1
    trainer.network = trainer.learning_network = network
    if compiled:
        compile_parts(network)
    trainer.optimizer = build_optimizer(network, network.encoder, SCHEDULE)  # type: ignore[arg-type]
    trainer.compiles = compiled
    return trainer


def bare_pretrainer(method: Method, device: torch.device, compiled: bool, graphs: bool) -> Any:
    """`learn(batch)` is a step of pretraining."""
    trainer = _bare(nnUNetTrainerCSMPretrain, method.build().to(device), device, compiled)
    trainer.settings = SimpleNamespace(architecture=method.setup.architecture)
    trainer.graphed = GraphedSteps(trainer.launched_step, print) if graphs else None
    if graphs:
        trainer.graphed_with_draws = GraphedSteps(trainer.drawn_step, print, "what makes a batch")
        for group in trainer.optimizer.param_groups:
            group["lr"] = torch.full((), group["lr"], device=device)
    return trainer


def bare_finetuner(setup: Setup, device: torch.device, compiled: bool) -> Any:
    """`learn({"data": volume, "target": labels})` is a step of fine-tuning."""
    network = CSMSegmenter(setup.num_series, NUM_CLASSES, **to_dict(setup.architecture)).to(device)
    trainer = _bare(nnUNetTrainerCSM, network, device, compiled)
    trainer.label_manager = SimpleNamespace(has_regions=False, ignore_label=None)
    trainer.configuration_manager = SimpleNamespace(batch_dice=False)
    trainer.is_ddp, trainer.enable_deep_supervision = False, False
    trainer.loss = nnUNetTrainer._build_loss(trainer)
    if compiled:
        trainer.loss.dc = torch.compile(trainer.loss.dc)
    return trainer


def labelled_batch(setup: Setup, batch_size: int) -> dict[str, Tensor]:
    target = torch.randint(0, NUM_CLASSES, (batch_size, 1, *setup.patch_size), dtype=torch.int16)
    return {"data": torch.randn(batch_size, setup.num_series, *setup.patch_size), "target": target}
