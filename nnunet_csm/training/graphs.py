"""Steps captured in CUDA graphs: a small batch then costs the GPU's work, not Python's."""

import os
from collections import Counter
from collections.abc import Callable, Sequence

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
    """Runs a step of training on batches of a few shapes, and replays it from the fourth time on that a shape comes.

    A graph holds everything from the gradients' reset to the optimiser, so the step may neither wait for the device nor read
    from it. Where capturing fails, or the memory that graphs hold is needed, all further steps are ordinary ones.
    """

    def __init__(self, step: Callable[..., Tensor], report: Callable[[str], object]) -> None:
        """
        Args:
            step: from a batch's tensors to its loss.
            report: takes the line that says why graphs are not used.
        """
        self.step, self.report = step, report
        self.ordinary: Counter[tuple] = Counter()
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.failed = False

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """The loss of a batch, on the device."""
        shapes = tuple(tensor.shape for tensor in tensors)
        if self.failed or self.ordinary[shapes] < NUM_ORDINARY:
            self.ordinary[shapes] += 1
            return self.launched(tensors)
        why_not = "" if shapes in self.graphs else self.capture(shapes, tensors)
        if why_not:
            self.give_up(why_not)
            return self.on_other_stream(tensors)
        graph, inputs, loss = self.graphs[shapes]
        for mine, given in zip(inputs, tensors, strict=True):
            mine.copy_(given)
        graph.replay()
        # the next replay writes into the same memory
        return loss.clone()

    def launched(self, tensors: Sequence[Tensor]) -> Tensor:
        """The loss of an ordinary step.

        What graphs work in is no memory for ordinary steps, so those of a new shape need theirs beside it.
        """
        try:
            return self.on_other_stream(tensors)
        except torch.OutOfMemoryError:
            if not self.graphs:
                raise
        # only here, where the exception no longer keeps the tensors of its frames; the step did not reach its end, which is
        # the optimiser's, and can be made again
        self.give_up("there is no memory for graphs of all shapes")
        return self.on_other_stream(tensors)

    def on_other_stream(self, tensors: Sequence[Tensor]) -> Tensor:
        """As captures need it of the steps before them."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            loss = self.step(*tensors)
        torch.cuda.current_stream().wait_stream(self.stream)
        return loss

    def capture(self, shapes: tuple, tensors: Sequence[Tensor]) -> str:
        """Record a step without running it.

        Returns:
            Why that failed; else empty.
        """
        graph, inputs = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in tensors]
        before = torch.cuda.current_stream()
        try:
            # of this thread only: those that make batches ahead pin memory whenever they like, which would end the capture
            # and, worse, their work
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                loss = self.step(*inputs)
        except RuntimeError as error:
            # not every version of torch leaves the stream of a capture whose end failed
            torch.cuda.set_stream(before)
            # the error of the end says less than the one before it
            return str(error.__context__ if isinstance(error.__context__, RuntimeError) else error).splitlines()[0]
        self.graphs[shapes] = graph, inputs, loss
        return ""

    def give_up(self, why: str) -> None:
        """Release the graphs and their memory."""
        self.failed = True
        torch.cuda.synchronize()
        self.graphs.clear()
        torch.cuda.empty_cache()
        self.report(f"No CUDA graphs, each step is launched from Python: {why}")
