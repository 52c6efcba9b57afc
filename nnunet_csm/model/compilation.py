"""Compiling networks part by part: the blocks of a ViT are equal, so that one is compiled for all of them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nnunet_csm.model.encoder import Encoder

# layouts that one piece of code is compiled for: encoder and decoder, the first number of visible tokens, any other, with and
# without masks and gradients. torch's own limit is 8, and what comes beyond is not compiled, without a word
MAX_VARIANTS = 64


def compile_parts(network: Any) -> None:
    """Have the parts of a network compiled when they first run, in place.

    Compiled whole, ViT-B/16 takes minutes for every number of visible tokens; so it takes as long as its decoder and one block.
    """
    torch._dynamo.config.recompile_limit = MAX_VARIANTS
    # parts are smaller than what ranks exchange at once; cut up further they would gain nothing
    torch._dynamo.config.optimize_ddp = False
    for part in parts(network):
        part.compile()


def parts(network: Any) -> Iterator[nn.Module]:
    """The parts that encoders name, and every other part as a whole."""
    for child in network.children():
        if isinstance(child, Encoder):
            yield from child.compiled_parts()
        elif isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield child


def uncompiled() -> Any:
    """A context in which compiled parts run as they are written: for shapes that come a few times."""
    return torch.compiler.set_stance("force_eager")
