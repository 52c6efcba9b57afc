"""Draws keyed by (seed, purpose, epoch, step, rank): a batch is a function of its key, whoever makes it and whenever.

A run that was killed and resumed, or that has another number of workers, therefore gets the batches of one that was not.
"""

import random
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = TypeVar("Batch")

# of each worker, and of all of them together
BATCHES_AHEAD = 2
BYTES_AHEAD = 8 * 2**30


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    TRAINING = 0
    VALIDATION = 1
    NETWORK = 2


def key(seed: int, purpose: Purpose, *numbers: int) -> int:
    """A 63-bit seed for one draw."""
    high, low = np.random.SeedSequence((seed, purpose, *numbers)).generate_state(2, np.uint32)
    return (int(high) << 31) ^ int(low)


def generator(seed: int) -> torch.Generator:
    """A CPU generator in the state given by a key."""
    return torch.Generator().manual_seed(seed)


def seed_everything(seed: int) -> None:
    """Put the global generators, which nnU-Net's augmentation draws from, into the state given by a key."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class _Keys(Sampler[tuple[int, int]]):
    def __init__(self, first_epoch: int, num_epochs: int, num_steps: int) -> None:
        self.epochs, self.num_steps = range(first_epoch, num_epochs), num_steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((epoch, step) for epoch in self.epochs for step in range(self.num_steps))


class _Batches(Dataset[Batch], Generic[Batch]):
    def __init__(self, make_batch: Callable[[int, int], Batch]) -> None:
        self.make_batch = make_batch

    def __getitem__(self, epoch_and_step: tuple[int, int]) -> Batch:
        return self.make_batch(*epoch_and_step)


def batches(
    make_batch: Callable[[int, int], Batch],
    first_epoch: int,
    num_epochs: int,
    num_steps: int,
    num_workers: int,
    pin_memory: bool,
    batch_bytes: int = 0,
) -> Iterator[Batch]:
    """The batches `make_batch(epoch, step)` in order, made ahead by worker processes when there are any.

    With `batch_bytes`, the size of a batch, no more workers run than keep the batches made ahead below `BYTES_AHEAD`.
    """
    if num_workers and batch_bytes:
        num_workers = min(num_workers, max(1, BYTES_AHEAD // (BATCHES_AHEAD * batch_bytes)))
    loader: DataLoader[Batch] = DataLoader(
        _Batches(make_batch),
        batch_size=None,
        sampler=_Keys(first_epoch, num_epochs, num_steps),
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=_unchanged,
        prefetch_factor=BATCHES_AHEAD if num_workers else None,
    )
    return iter(loader)


def _unchanged(batch: Batch) -> Batch:
    return batch
