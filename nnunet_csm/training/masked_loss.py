"""The pretext's own loss beside that of a segmentation, so that the encoder does not unlearn what it was pretrained for.

After SSAT (Das et al., "Limited data, unlimited potential", WACV 2024), which trains a ViT for its task and to rebuild its images
at the same time. Here the images are those that pretraining of the fold learns from, cut and hidden as there.
"""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_csm import checkpoint, nnunet, weights_folder
from nnunet_csm.data.bank import open_bank
from nnunet_csm.data.draws import Purpose, seed_everything
from nnunet_csm.data.sources import fold_files
from nnunet_csm.errors import UserError
from nnunet_csm.machine import slices
from nnunet_csm.model.compilation import compile_parts
from nnunet_csm.model.encoder import Encoder
from nnunet_csm.plans import configuration_of
from nnunet_csm.pretext.base import Batch, setup_of
from nnunet_csm.pretext.batches import Batches
from nnunet_csm.training.trainer import CSMTrainer

# of the plans: what a training with this loss rests on beside its own
RESTS_ON = frozenset({"masked_loss_weight", "sources", "pretraining_patch_size", "pretext", "pretraining"})


class MaskedLoss:
    """The pretext of the plans on the encoder of a segmenter: the same weights, without drop path, as in pretraining.

    It knows the segmenter's series. Where pretraining knew others as well, they are left out here.

    Args:
        trainer: whose network is built. What follows a step in pretraining (a codebook) follows its steps.

    Attributes:
        pretext: its encoder's weights are the segmenter's own.

    Raises:
        UserError: a pretext that has no loss, or none that the encoder learns from.
    """

    def __init__(self, trainer: CSMTrainer) -> None:
        self.trainer, settings = trainer, trainer.settings
        self.weight = settings.csm.finetuning.masked_loss_weight
        found, setup = setup_of(settings, trainer.plans_manager.plans_name)
        seed_everything(trainer.key(Purpose.MASKED_LOSS))
        self.pretext = found(replace(setup, architecture=settings.architecture)).to(trainer.device)
        if not (found.learns and all(parameter.requires_grad for parameter in self.pretext.encoder.parameters())):
            raise UserError(
                f"{trainer.plans_manager.plans_name}: csm.finetuning.masked_loss_weight is {self.weight:g}, but no loss of the "
                f"pretext {settings.csm.pretext['name']!r} reaches its encoder; make it 0, or plan with a pretext that hides and "
                f"rebuilds, such as 'csm'"
            )
        share_weights(self.pretext.encoder, trainer.encoder)
        if trainer.compiles:
            compile_parts(self.pretext)
        ranks = trainer.ranks
        for name, parameter in self.pretext.named_parameters():
            if ranks.num_ranks > 1 and parameter.requires_grad and not name.startswith("encoder."):
                # those of the encoder are exchanged with the segmenter's
                parameter.register_hook(lambda gradient: ranks.sum(gradient) / ranks.num_ranks)
        self.sum = torch.zeros((), device=trainer.device)

    def learned_with(self, segmenter: nn.Module) -> nn.Module:
        """All that learns, each weight once."""
        return nn.ModuleList([segmenter, self.pretext])

    def after_steps_of(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the pretext told of every step."""
        trainer = self.trainer
        optimizer.register_step_post_hook(lambda *_: self.pretext.after_step(trainer.iteration / trainer.schedule.num_iterations))

    def own_weights(self) -> dict[str, Tensor]:
        """Those that the segmenter has not."""
        return {name: tensor for name, tensor in self.pretext.state_dict().items() if not name.startswith("encoder.")}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what `own_weights` gave."""
        shared = {name: tensor for name, tensor in self.pretext.state_dict().items() if name.startswith("encoder.")}
        self.pretext.load_state_dict(shared | dict(weights))

    def start(self) -> None:
        """Begin as the pretraining ended that the segmenter's encoder comes from, where that had the same pretext and series."""
        source, settings = self.trainer.encoder_source, self.trainer.settings
        saved = checkpoint.load(source) if os.path.isfile(source) or weights_folder.is_one(source) else None
        if saved is not None and self.rebuilds_alike(saved, source):
            self.load({name: tensor for name, tensor in saved["network_weights"].items() if not name.startswith("encoder.")})
            said = f"goes on from {source}"
        else:
            said = "starts as drawn: there is none of the same pretext, sizes and series to go on from"
        what = f"Masked loss of {settings.csm.pretext['name']} beside the segmentation's, weight {self.weight:g}"
        self.trainer.print_to_log_file(f"{what}; its decoder {said}")

    def rebuilds_alike(self, saved: Mapping[str, Any], source: str) -> bool:
        """Whether a checkpoint's own weights are of the same pretext, and fit."""
        csm = configuration_of(saved["init_args"]["plans"], saved["init_args"]["configuration"], source).get("csm", {})
        settings, mine, theirs = self.trainer.settings, self.pretext.state_dict(), saved["network_weights"]
        return (
            csm.get("pretext", {}).get("name") == settings.csm.pretext["name"]
            and tuple(saved.get("series", ())) == settings.architecture.series
            and {name: tensor.shape for name, tensor in theirs.items()} == {name: tensor.shape for name, tensor in mine.items()}
        )

    def open_images(self) -> None:
        """Make batches of the images of the fold that pretraining learns from, from the trainer's epoch on."""
        trainer, csm = self.trainer, self.trainer.settings.csm
        preprocessed, series = nnunet.folder("nnUNet_preprocessed"), trainer.settings.architecture.series
        files, _ = fold_files(csm.sources, series, preprocessed, trainer.fold, csm.splits)
        # a GPU is left to the segmenter
        self.bank = open_bank(files, trainer.device, "mapped")
        trainer.print_to_log_file(f"Masked loss on {len(self.bank.names)} cases; {self.bank.reason}")
        if self.bank.left_out:
            trainer.print_to_log_file(f"WARNING: left out, as all series are zero there: {', '.join(self.bank.left_out)}")
        samples = trainer.ranks.samples_of(csm.pretraining.batch_size)
        batches = Batches(self.bank, self.pretext, csm.seed, Purpose.MASKED_LOSS, samples)
        epochs, steps = range(trainer.current_epoch, trainer.num_epochs), range(trainer.num_iterations_per_epoch)
        self.batches = batches.ahead(((epoch, step) for epoch in epochs for step in steps), trainer.device)

    def parts(self) -> list[Batch]:
        """The batch of the coming step, in parts as the segmentation's is learned in."""
        batch = next(self.batches)
        self.divisor = self.trainer.ranks.sum(self.pretext.weight(batch.drawn)).clamp(min=1)
        return [batch[samples] for samples in slices(len(batch), min(self.trainer.num_parts, len(batch)))]

    def __call__(self, part: Batch) -> Tensor:
        """The weighted loss of a part, times the samples of a segmentation's batch, by which the trainer divides."""
        loss = self.pretext(*part.args) / self.divisor
        self.sum += loss.detach()
        return self.weight * self.trainer.schedule.batch_size * loss

    def said(self) -> str:
        """A line for the log, on the steps since the last one."""
        mean = float(self.trainer.ranks.sum(self.sum)) / self.trainer.num_iterations_per_epoch
        self.sum.zero_()
        return f"masked_loss {mean:.4f}, {self.weight:g} of it in train_loss"


def share_weights(encoder: Encoder, owner: Encoder) -> None:
    """Put the parameters of one encoder into another of the same architecture: they learn together."""
    theirs = dict(owner.named_parameters())
    assert theirs.keys() == dict(encoder.named_parameters()).keys()
    for name, parameter in theirs.items():
        module, _, leaf = name.rpartition(".")
        setattr(encoder.get_submodule(module), leaf, parameter)
