"""Counts what is compiled while steps of pretraining are captured, against a stand-in for the CUDA runtime; prints JSON."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from steps import architecture_of, bare_pretrainer, masked_batch

from nnunet_csm.data.draws import Draws
from nnunet_csm.model.compilation import parts
from nnunet_csm.plans import Masking, Reconstruction
from nnunet_csm.pretext import mae3d
from nnunet_csm.pretext.mae3d import MAE3D
from nnunet_csm.pretext.masking import ask_some

PATCH_SIZE, BATCH_SIZE, NUM_STEPS = (32, 32, 32), 4, 20

counter = CompileCounterWithBackend("aot_eager")
within: list[int] = []


@contextmanager
def capture(graph: Any, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
    before = counter.frame_count
    yield
    within.append(counter.frame_count - before)
    graph.replay = lambda: None


def count(joint: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    counter.frame_count = 0
    within.clear()
    said: list[str] = []
    a = architecture_of(4, (8, 8, 8), width=48, depth=2, num_heads=4, features=8, drop_path=0.0)
    decoder = Reconstruction(48, 1, 4, False, rebuilt_share=0.25)
    trainer = bare_pretrainer(a, decoder, torch.device("cpu"), compiled=False, graphs=True)
    if joint:
        network = MAE3D(dataclasses.replace(a, joint_tokens=True), decoder)
        trainer.network = trainer.learning_network = network
        trainer.optimizer.param_groups[0]["params"] = list(network.parameters())
    trainer.graphed.report = said.append
    for part in parts(trainer.network):
        part.compile(backend=counter)
    for number in range(NUM_STEPS):
        volume, mask = masked_batch(a, PATCH_SIZE, BATCH_SIZE, number % 3 + 1, decoder.rebuilt_share)
        if joint:
            draws, present = Draws(number, torch.arange(BATCH_SIZE)), torch.ones(BATCH_SIZE, 4, dtype=torch.bool)
            mask = ask_some(mae3d.draw_mask(draws, present, 64, Masking(0.75, "shared", "none")), draws, 0.25, 4)
        trainer.learn((volume.half(), mask))
    return {"all": counter.frame_count, "captures": len(within), "within": sum(within), "given up": said}


stream = SimpleNamespace(wait_stream=lambda _: None)
stand_ins: dict[str, Any] = {
    "Stream": lambda: stream,
    "current_stream": lambda: stream,
    "stream": lambda _: nullcontext(),
    "set_stream": lambda _: None,
    "graph_pool_handle": lambda: 0,
    "synchronize": lambda: None,
    "empty_cache": lambda: None,
    "CUDAGraph": SimpleNamespace,
    "graph": capture,
}
for name, stand_in in stand_ins.items():
    setattr(torch.cuda, name, stand_in)
print(json.dumps({"CSM": count(joint=False), "MAE3D": count(joint=True)}))
