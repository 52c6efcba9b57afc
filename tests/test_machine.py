"""What a process takes of its machine."""

import ctypes
import os
import resource
import sys

import pytest
import torch

from nnunet_csm.errors import UserError
from nnunet_csm.machine import in_processes, keep_freed_memory, num_cores, num_threads


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="memory is glibc's")
def test_memory_that_was_freed_is_used_again():
    num_pages = 4 * 2**24 // resource.getpagesize()
    keep_freed_memory()
    # an aligned block does not always fit where one of its size was: a few are on the heap before none is new
    for _ in range(20):
        torch.zeros(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.zeros(2**24)
    # otherwise each of them would be cleared by the system
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 5 * num_pages


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are given by Linux")
def test_cores_are_those_that_the_process_was_given(monkeypatch):
    given = os.sched_getaffinity(0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        os.sched_setaffinity(0, {min(given)})
        assert num_cores() == 1 and num_threads(1) == num_threads(4) == 1
    finally:
        os.sched_setaffinity(0, given)
    assert num_cores() == len(given) and num_threads(1) == len(given)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert num_threads(2) == 3


@pytest.mark.parametrize("num_processes", [1, 2])
def test_processes_make_each_once(num_processes: int) -> None:
    assert sorted(in_processes(abs, range(-20, 0), num_processes)) == [(number, -number) for number in range(-20, 0)]


def test_a_killed_process_is_named() -> None:
    with pytest.raises(UserError, match=r"one of 2 processes was killed.*fewer processes \(-np\)"):
        list(in_processes(os._exit, [1, 1], 2))
