"""Draws keyed by (seed, purpose, epoch, step): a batch is a function of its key, whoever makes it, where, and whenever.

A run that was killed and resumed, or that has another number of workers or ranks, therefore gets the batches of one that was not.
"""

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass
from enum import IntEnum
from functools import cached_property, partial
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

Batch = TypeVar("Batch")
Key = TypeVar("Key")

# of each worker process, or of all threads beyond those they are at work on; and of all of them together
BATCHES_AHEAD = 2
BYTES_AHEAD = 8 * 2**30

# of SplitMix64 (Steele, Lea and Flood 2014), as signed integers
GOLDEN = 0x9E3779B97F4A7C15 - 2**64
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


class Purpose(IntEnum):
    """What a draw is for; draws for different purposes are independent."""

    TRAINING = 0
    VALIDATION = 1
    NETWORK = 2
    PROBE = 4
    MASKED_LOSS = 5
    IMPUTATION = 6


class What(IntEnum):
    """What is drawn for a sample; different things are drawn independently. `TOKENS` is a pretext's, for whatever it draws."""

    NUM_SHOWN = 0
    CASE = 1
    POSITION = 2
    FLIP = 3
    SERIES = 4
    TOKENS = 5


@dataclass(frozen=True)
class Draws:
    """Random numbers of some samples of a batch.

    A number depends on the key, the sample's place in the whole batch and what is drawn, on nothing else: ranks that share a
    batch draw their own samples only, and a GPU draws what a CPU would.
    """

    key: int | Int[Tensor, ""]
    samples: Int[Tensor, " b"]
    """Places in the batch of all ranks. The numbers are drawn on this tensor's device."""

    @cached_property
    def _seeds(self) -> Int[Tensor, "b w"]:
        """A seed for everything that is drawn for a sample."""
        what = torch.arange(len(What), device=self.samples.device)
        return _scrambled(_scrambled(self.samples[:, None] * len(What) + what) + self.key)

    def integers(self, what: What, num: int, first: int = 0) -> Int[Tensor, "b n"]:
        """Uniform on [0, 2**63), by SplitMix64 with a counter, which begins at `first`, instead of a state."""
        steps = torch.arange(first + 1, first + num + 1, device=self.samples.device) * GOLDEN
        return _scrambled(self._seeds[:, int(what), None] + steps) & (2**63 - 1)

    def uniform(self, what: What, num: int, first: int = 0) -> Float[Tensor, "b n"]:
        """Uniform on [0, 1), multiples of 2**-24, so that every float is exact; `first` as for `integers`."""
        return (self.integers(what, num, first) >> 39).float() * 2.0**-24

    def normal(self, what: What, num: int, first: int = 0) -> Float[Tensor, "b n"]:
        """Normal with a deviation of 1, by Box and Muller, two of each of the integers from `first` on.

        A GPU draws what a CPU would but for the rounding of logarithm, sine and cosine.
        """
        drawn = self.integers(what, (num + 1) // 2, first)
        # 24 bits for the length, half a step from 0, and 24 others for the angle
        length = (-2 * ((drawn >> 39).float() * 2.0**-24 + 2.0**-25).log()).sqrt()
        angle = (drawn & (2**24 - 1)).float() * (2 * math.pi * 2.0**-24)
        return torch.cat([length * angle.cos(), length * angle.sin()], dim=1)[:, :num]


def _scrambled(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """SplitMix64's output function. Right shifts of signed integers copy the sign, so it is masked away."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * SECOND
    return x ^ ((x >> 31) & (2**33 - 1))


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


def ahead(
    make: Callable[[Key], Batch], keys: Iterable[Key], num_threads: int, device: torch.device, batch_bytes: int = 0
) -> Generator[Batch, None, None]:
    """The batches `make(key)` in order, made ahead by threads when there are any, and on `device` when they are handed out.

    For what is made outside Python's lock, by torch, numpy or a decompressor; `batches` is for the rest. Closing the iterator
    stops the threads; an exception in one of them is raised here, in the place of its batch. Copies to a GPU run beside its
    work, on a stream of their own.

    Args:
        make: gives a tensor, an object of tensors with `to` and `pin_memory`, or a tuple of these; anything if `device` is a CPU.
        keys: may be endless.
        batch_bytes: size of a batch; with it, no more threads run than keep what is made ahead below `BYTES_AHEAD`.
    """
    if num_threads and batch_bytes:
        num_threads = min(num_threads, max(1, BYTES_AHEAD // batch_bytes - BATCHES_AHEAD))
    if device.type != "cuda":
        return _made_by_threads(make, iter(keys), num_threads, None) if num_threads else (make(key) for key in keys)

    def make_pinned(key: Key) -> Batch:
        return _pinned(make(key))

    gpu = torch.cuda.current_device() if device.index is None else device.index
    made = _made_by_threads(make_pinned, iter(keys), num_threads, gpu) if num_threads else (make(key) for key in keys)
    return _copied(made, device)


def _made_by_threads(
    make: Callable[[Key], Batch], keys: Iterator[Key], num_threads: int, gpu: int | None
) -> Generator[Batch, None, None]:
    # memory is pinned for the GPU of the thread, which is the first one unless told
    here = None if gpu is None else partial(torch.cuda.set_device, gpu)
    threads = ThreadPoolExecutor(num_threads, thread_name_prefix="ahead", initializer=here)
    submitted = (threads.submit(make, key) for key in keys)
    try:
        waiting = deque(islice(submitted, num_threads + BATCHES_AHEAD - 1))
        while True:
            waiting.extend(islice(submitted, 1))
            if not waiting:
                return
            # without keeping hold of it
            yield waiting.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)


def _copied(made: Generator[Batch, None, None], device: torch.device) -> Generator[Batch, None, None]:
    """The batches on a GPU, one of them on its way while the one before is used."""
    stream = torch.cuda.Stream(device)
    waiting: deque[tuple[Batch, torch.cuda.Event]] = deque()

    def handed_out(batch: Batch, copied: torch.cuda.Event) -> Batch:
        user = torch.cuda.current_stream(device)
        user.wait_event(copied)
        for tensor in _tensors(batch):
            # allocated on another stream, which must not give its memory to the next batch while it is used on this one
            tensor.record_stream(user)
        return batch

    with closing(made):
        for batch in made:
            with torch.cuda.stream(stream):
                waiting.append((_moved(batch, device), stream.record_event()))
            if len(waiting) == BATCHES_AHEAD:
                yield handed_out(*waiting.popleft())
        while waiting:
            yield handed_out(*waiting.popleft())


def _pinned(batch: Any) -> Any:
    if isinstance(batch, tuple):
        return tuple(_pinned(part) for part in batch)
    try:
        return batch.pin_memory()
    except RuntimeError:
        # no more memory can be pinned: the copy waits
        return batch


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, tuple):
        return tuple(_moved(part, device) for part in batch)
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch.to(device)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif is_dataclass(batch):
        yield from (tensor for field in fields(batch) for tensor in _tensors(getattr(batch, field.name)))
    elif isinstance(batch, tuple):
        yield from (tensor for part in batch for tensor in _tensors(part))
