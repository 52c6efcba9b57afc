"""Replayed steps learn from the batch they are given, and where graphs cannot be had, steps are launched.

Against a stand-in for the CUDA runtime: what the GPU makes of it is not tested here.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from nnunet_csm.training import graphs
from nnunet_csm.training.graphs import NUM_ORDINARY, GraphedSteps, why_no_graphs

GPU = torch.device("cuda")


class Runtime:
    """Records what is done between the beginning and the end of a capture, and does it when the graph is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capturing: SimpleNamespace | None = None
        self.modes: list[str] = []
        self.num_launched = 0
        self.failure: Callable[[bool], None] = lambda _: None
        self.end_fails = False
        self.released: list[object] = []
        stream = SimpleNamespace(wait_stream=lambda _: None)
        stand_ins = {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda _: nullcontext(),
            "set_stream": lambda _: None,
            "graph_pool_handle": lambda: 0,
            "synchronize": lambda: None,
            "empty_cache": lambda: None,
            "CUDAGraph": lambda: SimpleNamespace(replay=None),
            "graph": self.capture,
        }
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(graphs, "release", self.released.append)

    @contextmanager
    def capture(self, graph, pool, stream, capture_error_mode):
        self.modes.append(capture_error_mode)
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None
        if self.end_fails:
            raise RuntimeError("the capture is no longer valid")

    def step(self, batch: Tensor, mask: Tensor) -> Tensor:
        """The loss is the sum of what is not masked."""
        self.failure(self.capturing is not None)
        loss = torch.zeros(())

        def work() -> None:
            loss.copy_(batch[~mask].sum())

        if self.capturing is None:
            self.num_launched += 1
            work()
        else:
            self.capturing.replay = work
        return loss


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    return Runtime(monkeypatch)


def batches(num: int) -> list[tuple[Tensor, Tensor]]:
    """Of two shapes in turn."""
    return [(torch.full((size,), float(n)), torch.arange(size) == 0) for n in range(num) for size in (3, 5)]


def losses(steps: GraphedSteps, given: list[tuple[Tensor, Tensor]]) -> list[float]:
    # read at the end, as the trainer does
    return [float(loss) for loss in [steps(batch) for batch in given]]


def expected(given: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(batch[~mask].sum()) for batch, mask in given]


def test_each_batch_gives_its_own_loss_and_few_steps_are_launched(runtime: Runtime) -> None:
    said: list[str] = []
    given = batches(8)
    assert losses(GraphedSteps(runtime.step, said.append), given) == expected(given)
    # one more, by which it is seen that nothing is compiled any more
    assert runtime.num_launched == 2 * (NUM_ORDINARY + 1) and not said
    # threads that make batches go on beside a capture
    assert runtime.modes == ["thread_local"] * 2


@pytest.mark.parametrize("end_fails", [False, True])
def test_a_step_that_cannot_be_captured_is_launched_and_the_cause_is_said_once(runtime: Runtime, end_fails: bool) -> None:
    def failure(capturing: bool) -> None:
        if capturing:
            raise RuntimeError("the step reads from the device\nmore")

    runtime.failure, runtime.end_fails = failure, end_fails
    said: list[str] = []
    given = batches(8)
    assert losses(GraphedSteps(runtime.step, said.append), given) == expected(given)
    assert runtime.num_launched == len(given)
    assert said == ["No CUDA graphs, each step is launched from Python: the step reads from the device"]
    # a capture that ended well has given back what it held
    assert len(runtime.released) == end_fails


def test_graphs_make_room_for_a_step_that_finds_no_memory(runtime: Runtime) -> None:
    said: list[str] = []
    steps = GraphedSteps(runtime.step, said.append)
    (small, large), tight = batches(1), batches(6)[0::2]
    assert losses(steps, tight) == expected(tight) and steps.graphs

    def failure(capturing: bool) -> None:
        if steps.graphs:
            raise torch.OutOfMemoryError("CUDA out of memory")

    runtime.failure = failure
    assert losses(steps, [large, small]) == expected([large, small])
    assert not steps.graphs and len(said) == 1 and "memory" in said[0]


def test_a_step_without_memory_before_any_graph_is_an_error(runtime: Runtime) -> None:
    def failure(capturing: bool) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    runtime.failure = failure
    with pytest.raises(torch.OutOfMemoryError):
        GraphedSteps(runtime.step, print)(batches(1)[0])


def test_graphs_are_for_one_gpu_that_learns_a_batch_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not why_no_graphs(GPU, 1, 1)
    assert all(why_no_graphs(*others) for others in ((torch.device("cpu"), 1, 1), (GPU, 2, 1), (GPU, 1, 2)))
    monkeypatch.setenv("nnUNet_csm_graphs", "f")
    assert "nnUNet_csm_graphs" in why_no_graphs(GPU, 1, 1)


def test_a_step_that_would_be_compiled_within_a_capture_is_launched_and_changes_nothing(runtime: Runtime) -> None:
    said: list[str] = []

    def failure(capturing: bool) -> None:
        # as torch does under "fail_on_recompile"
        if torch._dynamo.eval_frame._stance.stance == "fail_on_recompile":
            raise RuntimeError("Detected recompile")

    runtime.failure = failure
    given = batches(8)
    assert losses(GraphedSteps(runtime.step, said.append), given) == expected(given)
    assert not runtime.modes and len(said) == 1 and "Detected recompile" in said[0]


def test_layouts_have_graphs_of_their_own(runtime: Runtime) -> None:
    steps = GraphedSteps(runtime.step, print)
    whole = torch.arange(12.0).view(4, 3)
    for batch in (whole, whole.T.contiguous().T):
        for _ in range(NUM_ORDINARY + 3):
            assert float(steps((batch, batch < 4))) == float(whole[whole >= 4].sum())
    assert len(steps.graphs) == 2
    # what a graph reads from lies as what it was captured for
    assert [inputs[0].stride() for inputs in steps.inputs.values()] == [(3, 1), (1, 4)]


def test_what_is_no_tensor_has_a_graph_of_its_own(runtime: Runtime) -> None:
    def step(seed: Tensor, factor: int) -> Tensor:
        return runtime.step(seed[None] * factor, torch.zeros(1, dtype=torch.bool))

    steps = GraphedSteps(step, print)
    for _ in range(NUM_ORDINARY + 1):
        assert [float(steps((torch.tensor(5.0),), factor)) for factor in (1, 2)] == [5.0, 10.0]
    assert len(steps.graphs) == 2


@pytest.mark.slow
def test_nothing_is_compiled_within_a_capture() -> None:
    """Pretraining's own step, CSM's and MAE3D's, whose parts a counting backend compiles, on masks as they are drawn."""
    # in a process of its own: the shape checks of these tests cannot be compiled
    command = [sys.executable, str(Path(__file__).parent / "count_compilations.py")]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    counted = json.loads(finished.stdout.splitlines()[-1])
    for name in ("CSM", "MAE3D"):
        # at first there was something to compile, in captures nothing, and there were captures
        assert counted[name]["all"] > 0 and counted[name]["captures"] > 0 and counted[name]["within"] == 0
        assert not counted[name]["given up"]
