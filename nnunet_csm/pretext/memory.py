"""How much GPU memory pretraining and fine-tuning take, predicted without a GPU.

The networks and losses themselves run, forward and backward, on torch's fake tensors: shapes, types and lifetimes are real,
nothing is stored or computed. So the prediction follows every change of the model. `Ledger` books what such a step takes. Three
things differ on a GPU, and are put in:

* Parts of the network are compiled (`model/compilation.py`). A chain of pointwise operations is then one kernel, and what is
  passed along in it is not written to memory unless something else needs it. The rules are those of `KERNELS`, `REDUCTIONS` and
  `SUMS`.
* torch's caching allocator rounds up, see `allocated`.
* Libraries take scratch memory, see `scratch` and `CUBLAS`.

Taken from torch's sources: the allocator's rounding, cuBLAS's workspace, the fp32 gradients of attention. Checked on a CPU
(tests/test_memory.py, `benchmarks/memory.py --cpu`): the books, for steps with and without torch.compile. Assumed as long as
`benchmarks/memory.py` has not run on a GPU: cuDNN's scratch memory, and that `MARGIN` covers what is left. Not covered:
memory outside torch's allocator (CUDA context and loaded kernels, 0.5 to 1 GiB), other algorithms that cuDNN tries out in the
first step (it takes what is free), and prediction of whole volumes.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunet_csm.model.compilation import parts
from nnunet_csm.model.outputs import total_loss
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.plans import Architecture
from nnunet_csm.pretext.base import Pretext, Setup
from nnunet_csm.pretext.rebuilding import Rebuilding, masked_mean
from nnunet_csm.schema import Size, to_dict

MIB, GIB = 2**20, 2**30

# a weight in fp32 and Adam's two moments; gradients come and go within the step, the books have them
COPIES_OF_WEIGHTS = 3
# aten/src/ATen/cuda/CublasHandlePool.cpp: 32 MiB for each handle on Hopper (other architectures less), and autograd's thread
# has a handle of its own
CUBLAS = 2 * 32 * MIB
# what torch's allocator does not count: the CUDA context and loaded kernels (assumed)
CUDA_CONTEXT = GIB
# for what the books cannot see: blocks that the allocator does not split, chains that were not fused, libraries on a CPU
MARGIN = 0.05

aten = torch.ops.aten
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward
CONVOLUTIONS = {aten.convolution, aten.convolution_backward}
# not fused with what comes before or after, so what they read and make is in memory: products, attention, convolutions,
# backward passes of norms; and cross entropy, which nnU-Net does not compile
KERNELS = CONVOLUTIONS | {
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten._scaled_dot_product_flash_attention_for_cpu,
    ATTENTION_BACKWARD,
    aten.native_layer_norm_backward,
    aten.native_batch_norm_backward,
    aten._log_softmax,
    aten._log_softmax_backward_data,
    aten.nll_loss2d_forward,
    aten.nll_loss2d_backward,
}
# fused with what comes after, but what they read is in memory: it is passed over twice, or kept for the backward pass
REDUCTIONS = {aten.native_layer_norm, aten.native_batch_norm, aten.pow}
# fused with what comes before, but what they make has several readers: the residual stream and its gradient
SUMS = {aten.add}

Batch = TypeVar("Batch")
Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Backend:
    """How a step is run.

    Attributes:
        autocast: products, attention and convolutions in 16 bits.
        compiled: the network and the Dice loss through torch.compile.
        cuda: with CUDA's allocator and libraries.
    """

    autocast: bool
    compiled: bool
    cuda: bool


TRAINING = Backend(autocast=True, compiled=True, cuda=True)
"""What our trainers do on a GPU, unless nnU-Net's variable `nnUNet_compile` says otherwise."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment of a training step at which most are taken.

    Attributes:
        states: weights in fp32 and the optimiser's moments.
        activations: the batch, what is kept for the backward pass, gradients, and what passes through.
        workspace: cuBLAS's memory, and the margin. (That of convolutions and attention is taken and given back within the
            step and counts as activations.)
    """

    states: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return self.states + self.activations + self.workspace

    def __str__(self) -> str:
        parts = (("weights and optimiser", self.states), ("activations", self.activations), ("workspace", self.workspace))
        return f"{self.total / GIB:.1f} GiB ({', '.join(f'{name} {size / GIB:.1f}' for name, size in parts)})"


@lru_cache
def pretraining_memory(pretext: type[Pretext], setup: Setup, batch_size: int, backend: Backend = TRAINING) -> Memory:
    """Peak of a pretraining step on the kind of batch that takes most: the last that samples with every series can be in.

    Args:
        pretext: what is learned from.
        setup: what it is built from.
        batch_size: samples.
        backend: how the step is run.
    """
    with torch.device("meta"):
        drawn_for = pretext(setup)
    variants = drawn_for.variants(torch.ones(1, setup.num_series, dtype=torch.bool))[0]
    last = int(variants.nonzero().max())

    def loss(network: nn.Module, batch: Any, ledger: "Ledger") -> Tensor:
        if not isinstance(network, Rebuilding):
            value: Tensor = network(*batch.args)
            return value
        volume, mask = batch.args
        error = network.errors(volume, mask)
        # what a compiled network returns is in memory
        ledger.write(error)
        return masked_mean(error, mask)

    return _step(lambda: pretext(setup), lambda network: network.example(batch_size, last), loss, backend)


@lru_cache
def finetuning_memory(
    architecture: Architecture,
    num_classes: int,
    patch_size: Size,
    batch_size: int,
    num_channels: int | None = None,
    backend: Backend = TRAINING,
) -> Memory:
    """Peak of a fine-tuning step with nnU-Net's Dice and cross-entropy loss.

    Args:
        architecture: the segmenter.
        num_classes: channels of its output (nnU-Net's `num_segmentation_heads`).
        patch_size: a multiple of the token size.
        batch_size: samples.
        num_channels: of the dataset; None when those of the architecture are all.
        backend: how the step is run.
    """
    input_channels = num_channels or 1 + max(architecture.channels)
    dice_and_cross_entropy = DC_and_CE_loss(
        {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, dice_class=MemoryEfficientSoftDiceLoss
    )

    def make_batch(network: nn.Module) -> tuple[Tensor, Tensor]:
        target = torch.empty(batch_size, 1, *patch_size, dtype=torch.int16)
        return torch.empty(batch_size, input_channels, *patch_size), target

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor], ledger: "Ledger") -> Tensor:
        def loss_of(logits: Tensor) -> Tensor:
            ledger.write(logits)
            # Dice is compiled too
            ledger.fuse = backend.compiled
            # autocast on a GPU takes softmax in fp32, that on a CPU does not
            return dice_and_cross_entropy(logits.float() if backend.cuda else logits, batch[1])

        return total_loss(network(batch[0]), loss_of)

    def build() -> nn.Module:
        return CSMSegmenter(input_channels, num_classes, **to_dict(architecture))

    return _step(build, make_batch, loss, backend)


def _step(
    build: Callable[[], Network],
    make_batch: Callable[[Network], Batch],
    loss: Callable[[Network, Batch, "Ledger"], Tensor],
    backend: Backend,
) -> Memory:
    """Run one training step on fake tensors and read the books."""
    ledger = Ledger(backend.cuda)
    with FakeTensorMode(), ledger:
        network = build()
        weights = ledger.live
        batch = make_batch(network)
        ledger.peak = ledger.live
        if backend.compiled:
            for part in parts(network):
                part.register_forward_pre_hook(ledger.enter_compiled)
                part.register_forward_hook(ledger.leave_compiled)
        # on a CPU, since autocast and autograd refuse tensors of a GPU that is not there
        with torch.autocast("cpu", torch.bfloat16, enabled=backend.autocast):
            value = loss(network, batch, ledger)
        # most of which is that of compiled parts
        ledger.fuse = backend.compiled
        value.backward()
        ledger.write(*(p.grad for p in network.parameters() if p.grad is not None))
    states, activations = COPIES_OF_WEIGHTS * weights, ledger.peak - weights
    workspace = math.ceil(MARGIN * (states + activations)) + (CUBLAS if backend.cuda else 0)
    return Memory(states, activations, workspace)


class Ledger(TorchDispatchMode):
    """Books of the memory that tensors take, kept from the operations that torch runs.

    A storage is booked when it is made, or while `fuse` is set, once it has to be in memory. It is struck out when torch frees
    it and nothing is still to be computed from it.

    Attributes:
        live: bytes taken now.
        peak: most so far.
        fuse: whether operations run as in a compiled network.
    """

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda = cuda
        self.live = self.peak = 0
        self.fuse = False
        self.sizes: dict[int, int] = {}
        # of storages not in memory: what they are computed from, which has to stay for as long
        self.sources: dict[int, list[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operation, read, made = func.overloadpacket, _tensors((args, kwargs)), _tensors(result)
        in_memory = not self.fuse or operation in KERNELS
        if in_memory or operation in REDUCTIONS:
            self.write(*read)
        sources = None if in_memory or operation in SUMS else [tensor.untyped_storage() for tensor in read]
        for tensor in made:
            self._enter(tensor.untyped_storage(), sources)
        self.peak = max(self.peak, self.live + scratch(operation, read, made, self.cuda))
        return result

    def enter_compiled(self, part: nn.Module, inputs: Any) -> None:
        """Note what comes before the forward pass of a part that is compiled; what it is given is in memory."""
        self.write(*_tensors(inputs))
        self.fuse = True

    def leave_compiled(self, part: nn.Module, inputs: Any, outputs: Any) -> None:
        """Note what comes after it; what it gives is in memory."""
        self.write(*_tensors(outputs))
        self.fuse = False

    def write(self, *tensors: Tensor) -> None:
        """Book tensors that were so far passed along within a kernel."""
        for tensor in tensors:
            key = tensor.untyped_storage()._cdata
            if key in self.sources:
                self._book(self.sizes[key])
                del self.sources[key]

    def _enter(self, storage: torch.UntypedStorage, sources: list[torch.UntypedStorage] | None) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = allocated(storage.nbytes()) if self.cuda else storage.nbytes()
        weakref.finalize(storage, self._strike_out, key)
        if sources is None:
            self._book(self.sizes[key])
        else:
            self.sources[key] = sources

    def _book(self, num_bytes: int) -> None:
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

    def _strike_out(self, key: int) -> None:
        size = self.sizes.pop(key)
        if self.sources.pop(key, None) is None:
            self.live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def allocated(num_bytes: int) -> int:
    """What torch's caching allocator counts for a tensor (c10/cuda/CUDACachingAllocator.cpp).

    Multiples of 512 bytes; from 10 MiB on, memory is asked for in units of 2 MiB, and a rest of up to 1 MiB stays unused.
    """
    rounded = math.ceil(num_bytes / 512) * 512
    rest = -rounded % (2 * MIB)
    return rounded + rest if rounded >= 10 * MIB and rest <= MIB else rounded


def scratch(operation: Any, read: list[Tensor], made: list[Tensor], cuda: bool) -> int:
    """Bytes that an operation takes while it runs, beside its results.

    Attention's backward pass on a GPU sums the gradients of query, key and value in fp32 (torch's flash and memory-efficient
    kernels do). Convolutions work on copies, in a layout of their own, of what they read and make: measured for oneDNN on a
    CPU, assumed for cuDNN, whose tensor-core kernels want channels last.
    """
    if operation is ATTENTION_BACKWARD and cuda:
        return 4 * sum(tensor.numel() for tensor in made)
    if operation in CONVOLUTIONS:
        return sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))
    return 0
