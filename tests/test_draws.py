"""Batches are functions of their key: whoever makes them, where, and whenever."""

import threading
import time
from itertools import count, islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnunet_csm.data.draws import Draws, Purpose, What, ahead, batches, generator, key, seed_everything

CPU = torch.device("cpu")
MORE_WORKERS_THAN_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create")

# --- keys --------------------------------------------------------------------------------------------------------------------


def make_batch(epoch, step):
    return torch.rand(3, generator=generator(key(7, Purpose.TRAINING, epoch, step, 0))), (epoch, step)


def drawn(num_workers=0, first_epoch=0, make=make_batch):
    return list(batches(make, first_epoch, 3, 4, num_workers, pin_memory=False))


def same(some, others):
    return len(some) == len(others) and all(a[0].equal(b[0]) and a[1] == b[1] for a, b in zip(some, others, strict=True))


@MORE_WORKERS_THAN_CORES
def test_batches_do_not_depend_on_who_makes_them():
    assert same(drawn(num_workers=2), drawn())


def test_batches_come_in_order():
    assert [number for _, number in drawn()] == [(epoch, step) for epoch in range(3) for step in range(4)]


def test_a_resumed_run_gets_the_batches_of_one_that_was_not_killed():
    assert same(drawn(first_epoch=1), drawn()[4:])
    assert drawn(first_epoch=3) == []


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 2))
def test_a_key_is_a_seed_and_belongs_to_one_draw(epoch, step, rank):
    mine = key(1, Purpose.TRAINING, epoch, step, rank)
    assert 0 <= mine < 2**63
    assert mine == key(1, Purpose.TRAINING, epoch, step, rank)
    others = [(2, Purpose.TRAINING, epoch, step), (1, Purpose.VALIDATION, epoch, step), (1, Purpose.NETWORK, epoch, step)]
    others += [(1, Purpose.TRAINING, epoch + 1, step), (1, Purpose.TRAINING, epoch, step + 1)]
    assert mine not in {key(*other, rank) for other in others} | {key(1, Purpose.TRAINING, epoch, step, rank + 1)}


def test_the_generators_nnunet_draws_from_are_keyed_too():
    def draw():
        seed_everything(key(1, Purpose.TRAINING, 2, 3, 0))
        return np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


# --- numbers -----------------------------------------------------------------------------------------------------------------


def numbers(seed=1, places=range(6), what=What.POSITION, num=5):
    return Draws(seed, torch.tensor(places)).integers(what, num)


def test_a_number_depends_on_key_place_and_what_is_drawn_and_on_nothing_else():
    assert numbers(places=[2, 4]).equal(numbers()[[2, 4]])
    assert numbers(num=3).equal(numbers()[:, :3])
    assert numbers(seed=torch.tensor(1)).equal(numbers())
    different = [numbers(), numbers(seed=2), numbers(what=What.FLIP), numbers(places=range(6, 12))]
    assert torch.cat([n.ravel() for n in different]).unique().numel() == 4 * numbers().numel()


def test_numbers_are_uniform_and_of_no_sign():
    drawn = Draws(3, torch.arange(2000)).uniform(What.TOKENS, 50)
    assert drawn.min() >= 0 and drawn.max() < 1
    share = torch.histc(drawn, 20, 0, 1) / drawn.numel()
    assert (share - 0.05).abs().max() < 5 * (0.05 / drawn.numel()) ** 0.5
    # neighbours in the batch, and numbers of one sample
    for one, other in ((drawn[1:], drawn[:-1]), (drawn[:, 1:], drawn[:, :-1])):
        assert abs(torch.corrcoef(torch.stack([one.ravel(), other.ravel()]))[0, 1]) < 5 / drawn.numel() ** 0.5


# --- threads -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_threads_give_the_batches_in_order_however_long_each_takes(num_threads):
    def make(number):
        time.sleep(0.01 * (number % 3 == 0))
        return number

    assert list(ahead(make, range(20), num_threads, CPU)) == list(range(20))


def test_threads_make_only_so_many_batches_ahead_and_stop_when_closed():
    made: list[int] = []
    before = threading.active_count()
    made_ahead = ahead(made.append, count(), 2, CPU)
    for _ in range(3):
        next(made_ahead)
    time.sleep(0.05)
    assert len(made) <= 3 + 2 + 2 and threading.active_count() > before
    made_ahead.close()
    assert threading.active_count() == before


def test_large_batches_are_made_by_fewer_threads():
    made: list[int] = []
    made_ahead = ahead(made.append, count(), 16, CPU, batch_bytes=2**31)
    next(made_ahead)
    time.sleep(0.05)
    assert len(made) <= 5
    made_ahead.close()


@pytest.mark.parametrize("num_threads", [0, 2])
def test_an_error_in_a_thread_is_raised_in_the_place_of_its_batch(num_threads):
    def make(number):
        if number == 3:
            raise ValueError(f"batch {number} cannot be made")
        return number

    before = threading.active_count()
    made = ahead(make, range(9), num_threads, CPU)
    assert list(islice(made, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="batch 3 cannot be made"):
        next(made)
    assert threading.active_count() == before
