"""Steps captured in CUDA graphs: a small batch then costs the GPU's work, not Python's."""

import os
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress

import torch
from torch import Tensor

# ordinary steps before a capture: libraries choose their kernels, memory is allocated, networks are compiled
NUM_ORDINARY = 3
VARIABLE = "nnUNet_csm_graphs"


def why_no_graphs(device: torch.device, num_ranks: int, num_parts: int) -> str:
    """Empty when steps can be captured."""
    if device.type != "cuda":
        return "there is no GPU"
    if num_ranks > 1:
        return "gradients are exchanged with other ranks"
    if num_parts > 1:
        return "gradients are accumulated"
    return f"switched off by {VARIABLE}" if os.environ.get(VARIABLE, "t").lower() in ("f", "false", "0") else ""


class GraphedSteps:
    """Runs a step of training on tensors of a few layouts, and replays it from the fifth time on that one comes.

    A graph holds everything from the gradients' reset to the optimiser, so the step may neither wait for the device nor read
    from it. Where capturing fails, or the memory that graphs hold is needed, all further steps are ordinary ones.
    """

    def __init__(self, step: Callable[..., Tensor], report: Callable[[str], object], what: str = "each step") -> None:
        """
        Args:
            step: from a batch's tensors, and what is no tensor of it, to its loss.
            report: takes the line that says why graphs are not used.
            what: is then launched from Python, in that line.
        """
        self.step, self.report, self.what = step, report, what
        self.ordinary: Counter[Hashable] = Counter()
        # by layout: what a step reads from, and the graph with its loss
        self.inputs: dict[Hashable, list[Tensor]] = {}
        self.graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.failed = False

    def __call__(self, tensors: Sequence[Tensor], *others: Hashable) -> Tensor:
        """The loss of a batch, on the device."""
        if self.failed:
            return self.launched(tensors, others)
        # a compiled network is compiled anew for other strides, and for a view in place of a tensor of its own: so ordinary
        # steps, too, read from where a graph will
        layout = (*others, *((tensor.shape, tensor.stride()) for tensor in tensors))
        if layout not in self.inputs:
            self.inputs[layout] = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in tensors]
        for mine, given in zip(self.inputs[layout], tensors, strict=True):
            mine.copy_(given)
        self.ordinary[layout] += 1
        if self.ordinary[layout] <= NUM_ORDINARY:
            return self.launched(self.inputs[layout], others)
        if layout not in self.graphs:
            return self.captured(layout, others)
        graph, loss = self.graphs[layout]
        graph.replay()
        # the next replay writes into the same memory
        return loss.clone()

    def launched(self, tensors: Sequence[Tensor], others: Sequence[Hashable]) -> Tensor:
        """The loss of an ordinary step.

        What graphs work in is no memory for ordinary steps, so those of a new layout need theirs beside it.
        """
        try:
            return self.on_other_stream(tensors, others)
        except torch.OutOfMemoryError:
            if not self.graphs:
                raise
        # only here, where the exception no longer keeps the tensors of its frames; the step did not reach its end, which is
        # the optimiser's, and can be made again
        self.give_up("there is no memory for graphs of all shapes")
        return self.on_other_stream(tensors, others)

    def on_other_stream(self, tensors: Sequence[Tensor], others: Sequence[Hashable]) -> Tensor:
        """Run a step on another stream, as captures need it of the steps before them."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.step(*tensors, *others)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def captured(self, layout: Hashable, others: Sequence[Hashable]) -> Tensor:
        """The loss of one more ordinary step, of which a graph is recorded then.

        So whatever would be compiled within the capture is found out before it.
        """
        inputs = self.inputs[layout]
        try:
            with torch.compiler.set_stance("fail_on_recompile"):
                loss = self.launched(inputs, others)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # it did not reach the optimiser
            self.give_up(first_line(error))
            return self.on_other_stream(inputs, others)
        if not self.failed and (why_not := self.capture(layout, inputs, others)):
            self.give_up(why_not)
        return loss

    def capture(self, layout: Hashable, inputs: list[Tensor], others: Sequence[Hashable]) -> str:
        """Record a step without running it.

        Returns:
            Why that failed; else empty.
        """
        graph, before, loss = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), None
        failure: RuntimeError | None = None
        try:
            # of this thread only: those that make batches ahead pin memory whenever they like, which would end the capture
            # and, worse, their work
            with (
                torch.compiler.set_stance("fail_on_recompile"),
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"),
            ):
                try:
                    loss = self.step(*inputs, *others)
                except RuntimeError as error:
                    # held back, so that the capture is ended as one that went well
                    failure = error
        except RuntimeError as error:
            # not every version of torch leaves the stream of a capture whose end failed, nor its memory
            torch.cuda.set_stream(before)
            release(self.pool)
            return first_line(failure or error)
        if failure is not None or loss is None:
            return first_line(failure) if failure else "the step gave no loss"
        self.graphs[layout] = graph, loss
        return ""

    def give_up(self, why: str) -> None:
        """Release the graphs and their memory."""
        self.failed = True
        torch.cuda.synchronize()
        self.graphs.clear()
        self.inputs.clear()
        torch.cuda.empty_cache()
        self.report(f"No CUDA graphs, {self.what} is launched from Python: {why}")


def release(pool: tuple[int, int]) -> None:
    """Take the allocator out of a capture whose end failed: torch leaves it within, and every step would take new memory."""
    device = torch.cuda.current_device()
    for function in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        # where torch has left it itself, or knows no such function
        with suppress(RuntimeError, AttributeError):
            getattr(torch._C, function)(device, pool)


def first_line(error: BaseException) -> str:
    """What an error says, in a line."""
    return (str(error).strip() or repr(error)).splitlines()[0]
