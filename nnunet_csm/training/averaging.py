"""The exponential moving average of a network's weights, which validation and prediction may use in place of the last ones."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """Average the weights of `network` after each step; `network` keeps its own, but within `in_charge`.

    The decay rises to `decay` as (1 + n) / (10 + n) with the number n of the step, or the weights before the first step would
    weigh most in a short training. Not torch's `AveragedModel`: a second network, with such a number on the CPU that each step
    would move to the GPU.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay = network, decay
        self.weights: dict[str, Tensor] = {}
        self.start()

    def start(self) -> None:
        """Begin from the network's weights as they are now."""
        self.weights = {name: parameter.detach().clone() for name, parameter in self.network.named_parameters()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """The average of a run that goes on."""
        for name, average in self.weights.items():
            average.copy_(weights[name])

    def update(self, step: int) -> None:
        """Take in the network's weights after `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current: list[Tensor | nn.Parameter] = list(self.network.parameters())
        get_ema_multi_avg_fn(decay)(list(self.weights.values()), current, step)

    def state_dict(self) -> dict[str, Tensor]:
        """The network's, with the averaged weights, on the CPU: another copy might not fit on the GPU.

        A weight that the network has under several names stays one.
        """
        copies: dict[tuple[int, torch.Size], Tensor] = {}
        with self.in_charge():
            state = self.network.state_dict()
            for tensor in state.values():
                at = tensor.data_ptr(), tensor.shape
                if at not in copies:
                    copies[at] = tensor.to("cpu", copy=True)
        return {name: copies[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}

    @contextmanager
    def in_charge(self) -> Iterator[None]:
        """The network has the averaged weights; afterwards its own again, to the bit."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the network's weights and the averaged ones, in place."""
        for name, parameter in self.network.named_parameters():
            own = parameter.clone()
            parameter.copy_(self.weights[name])
            self.weights[name].copy_(own)
