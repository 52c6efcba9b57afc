"""The trainers' own steps, without folders around them: what the benchmarks of this folder measure."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from nnunet_csm.data.draws import Draws
from nnunet_csm.machine import keep_freed_memory
from nnunet_csm.model.compilation import compile_parts
from nnunet_csm.model.encoder import of_series, sine_cosine
from nnunet_csm.model.reconstruction import ReconstructionDecoder
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.model.tokens import all_tokens, coordinates, select
from nnunet_csm.plans import Architecture, Masking, Reconstruction, Schedule
from nnunet_csm.pretext.csm import CSM
from nnunet_csm.pretext.masking import Mask, ask_some, draw_mask
from nnunet_csm.pretext.memory import max_shown_series
from nnunet_csm.schema import Size, to_dict
from nnunet_csm.training.graphs import GraphedSteps
from nnunet_csm.training.optimization import build_optimizer
from nnunet_csm.training.pretraining import nnUNetTrainerCSMPretrain
from nnunet_csm.training.ranks import Ranks
from nnunet_csm.training.segmentation import nnUNetTrainerCSM

NUM_CLASSES = 4
MASKING = Masking(mask_ratio=0.875, places="independent", hidden_series="rebuilt")
SCHEDULE = Schedule(1, 1000, 0, 1, 1e-4, 0.0, 0.05, (0.9, 0.95), 1.0)


class MaskedDecoder(ReconstructionDecoder):
    """The decoder as it was first, with the same weights: all tokens in the sequence, and a mask in attention.

    What is measured, and tested, against it is told apart by this class alone.
    """

    def forward(self, encoded: Tensor, visible: Tensor, asked: Tensor, grid: Size) -> Tensor:
        index = all_tokens(len(self.series_embedding), grid, len(encoded), encoded.device)
        place, embedded = coordinates(index, grid), self.embedding(encoded)
        x = self.mask_token.to(embedded.dtype).expand(*index.shape, self.width)
        x = x.scatter(1, visible[..., None].expand_as(embedded), embedded)
        x = x + of_series(self.series_embedding, place[..., 0]) + sine_cosine(place, self.width)
        attend = torch.zeros_like(index, dtype=torch.bool).scatter(1, visible, True)[:, None, None, :]
        for block in self.blocks:
            x = Block.forward(block, x, attn_mask=attend)  # type: ignore[arg-type]
        return select(self.head(self.norm(x))[:, None], asked)


def architecture_of(num_series: int, token_size: Size, **network: Any) -> Architecture:
    series = tuple(f"series{i}" for i in range(num_series))
    return Architecture(series=series, channels=tuple(range(num_series)), token_size=token_size, **network)


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


def bare_pretrainer(a: Architecture, reconstruction: Reconstruction, device: torch.device, compiled: bool, graphs: bool) -> Any:
    """`learn((volume, mask))` is a step of pretraining."""
    trainer = _bare(nnUNetTrainerCSMPretrain, CSM(a, reconstruction).to(device), device, compiled)
    trainer.settings = SimpleNamespace(architecture=a)
    trainer.graphed = GraphedSteps(trainer.launched_step, print) if graphs else None
    if graphs:
        trainer.graphed_with_draws = GraphedSteps(trainer.drawn_step, print, "what makes a batch")
        for group in trainer.optimizer.param_groups:
            group["lr"] = torch.full((), group["lr"], device=device)
    return trainer


def bare_finetuner(a: Architecture, device: torch.device, compiled: bool) -> Any:
    """`learn({"data": volume, "target": labels})` is a step of fine-tuning."""
    network = CSMSegmenter(len(a.series), NUM_CLASSES, **to_dict(a)).to(device)
    trainer = _bare(nnUNetTrainerCSM, network, device, compiled)
    trainer.label_manager = SimpleNamespace(has_regions=False, ignore_label=None)
    trainer.configuration_manager = SimpleNamespace(batch_dice=False)
    trainer.is_ddp, trainer.enable_deep_supervision = False, False
    trainer.loss = nnUNetTrainer._build_loss(trainer)
    if compiled:
        trainer.loss.dc = torch.compile(trainer.loss.dc)
    return trainer


def labelled_batch(num_series: int, patch_size: Size, batch_size: int) -> dict[str, Tensor]:
    target = torch.randint(0, NUM_CLASSES, (batch_size, 1, *patch_size), dtype=torch.int16)
    return {"data": torch.randn(batch_size, num_series, *patch_size), "target": target}


def masked_batch(
    a: Architecture,
    patch_size: Size,
    batch_size: int,
    num_shown: int | None = None,
    share: float = 1.0,
    mask_ratio: float = MASKING.mask_ratio,
) -> tuple[Tensor, Mask]:
    """With as many visible tokens as there ever are, unless told otherwise."""
    s = len(a.series)
    num_tokens = math.prod(p // t for p, t in zip(patch_size, a.token_size, strict=True))
    present = torch.ones(batch_size, s, dtype=torch.bool)
    num_shown = num_shown or max_shown_series(s, MASKING)
    draws, masking = Draws(0, torch.arange(batch_size)), dataclasses.replace(MASKING, mask_ratio=mask_ratio)
    mask = draw_mask(draws, present, num_shown, num_tokens, masking)
    return torch.randn(batch_size, s, *patch_size), ask_some(mask, draws, share)
