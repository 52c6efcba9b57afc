"""Batches of a pretext: cases, crops and whatever the pretext draws, each a function of (epoch, step, place in the batch)."""

import math
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nnunet_csm.data.bank import Bank
from nnunet_csm.data.crops import Crops, draw_crops
from nnunet_csm.data.draws import Draws, Purpose, What, ahead, key
from nnunet_csm.machine import num_workers
from nnunet_csm.pretext.base import Batch, Pretext
from nnunet_csm.schema import Size


class Batches:
    """Some samples of batches.

    All samples of a batch are of one kind (`Pretext.variants`). The kind is drawn first, then cases by how likely each would have
    drawn it; every case and every kind keep their probabilities. In training, cases weigh what their source does
    (`Bank.weights`). Everything is drawn where the volumes are.
    """

    def __init__(self, bank: Bank, pretext: Pretext, seed: int, purpose: Purpose, samples: range) -> None:
        self.bank, self.pretext, self.seed, self.purpose = bank, pretext, seed, purpose
        self.samples = torch.arange(samples.start, samples.stop, device=bank.device)
        weights = pretext.variants(bank.series_present.cpu())
        if purpose == Purpose.TRAINING:
            # of a case in all kinds together; what is only looked at is the same whatever sources weigh
            weights = weights * torch.tensor(bank.weights, dtype=weights.dtype)[:, None]
        self.of_variants, self.cumulative = weights.sum(0).cumsum(0), weights.cumsum(0).to(bank.device)

    def __call__(self, epoch: int, step: int) -> Batch:
        return self.make(*self.batch_key(epoch, step))

    def ahead(self, steps: Iterable[tuple[int, int]], device: torch.device) -> Iterator[Batch]:
        """The batches of some (epoch, step) on the device of the network, made ahead by threads where that helps."""
        # a bank on the GPU cuts there; beside a network on the same CPU cores, threads would only be in its way
        threads = num_workers(device) if self.bank.where != "gpu" else 0
        voxels = self.bank.series_present.shape[1] * sum(map(math.prod, self.pretext.crop_sizes))
        return ahead(lambda at: self(*at), steps, threads, device, 2 * len(self.samples) * voxels)

    def batch_key(self, epoch: int, step: int) -> tuple[int, int]:
        """What a batch is a function of: the key of its draws, and its kind."""
        seed = key(self.seed, self.purpose, epoch, step)
        # one for all samples, of all ranks; drawn on the CPU, since shapes depend on it
        return seed, int(pick(self.of_variants, Draws(seed, torch.zeros(1, dtype=torch.long)), What.NUM_SHOWN))

    def make(self, seed: int | Tensor, variant: int) -> Batch:
        """The batch of a key. When that is a tensor on the bank's device, nothing here waits for the device or reads from it."""
        draws = Draws(seed, self.samples)
        chosen = pick(self.cumulative[:, variant].contiguous(), draws, What.CASE)
        volumes = tuple(self.cut(draws, chosen, size, number) for number, size in enumerate(self.pretext.crop_sizes))
        present = self.bank.series_present[chosen]
        return Batch(volumes, self.pretext.draw(draws, present, variant, volumes, self.purpose != Purpose.VALIDATION))

    def cut(self, draws: Draws, chosen: Int[Tensor, " b"], size: Size, number: int) -> Float[Tensor, "b s z y x"]:
        """Crop number so many of every sample."""
        crops: Crops = draw_crops(draws, self.bank.shapes[chosen], size, self.bank.occupancy[chosen], number)
        return self.bank.cut(chosen, crops, size)


def pick(cumulative: Float[Tensor, " n"], draws: Draws, what: What) -> Int[Tensor, " b"]:
    """Draw for each sample the number of an entry, by its weight, given running sums of weights; those of weight 0 never are."""
    return torch.searchsorted(cumulative, draws.uniform(what, 1)[:, 0].double() * cumulative[-1], right=True)
