"""Counts what is compiled while steps of pretraining are captured, against a stand-in for the CUDA runtime; prints JSON."""

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

from steps import bare_pretrainer, batch_of, method_of, variants_of

from nnunet_csm.model.compilation import parts

DEVICE, PATCH_SIZE, BATCH_SIZE, NUM_STEPS = torch.device("cpu"), (32, 32, 32), 4, 20
NETWORK = {"width": 48, "depth": 2, "num_heads": 4, "features": 8, "drop_path": 0.0}
DECODER = {"width": 48, "depth": 1, "num_heads": 4, "normalize_targets": False, "rebuilt_share": 0.25}

counter = CompileCounterWithBackend("aot_eager")
within: list[int] = []


@contextmanager
def capture(graph: Any, pool: object, stream: object, capture_error_mode: str) -> Iterator[None]:
    before = counter.frame_count
    yield
    within.append(counter.frame_count - before)
    graph.replay = lambda: None


def count(preset: str) -> dict[str, Any]:
    torch._dynamo.reset()
    counter.frame_count = 0
    within.clear()
    said: list[str] = []
    method = method_of(preset, 4, (8, 8, 8), PATCH_SIZE, network=NETWORK, pretext={"reconstruction": DECODER})
    trainer = bare_pretrainer(method, DEVICE, compiled=False, graphs=True)
    trainer.graphed.report = said.append
    for part in parts(trainer.network):
        part.compile(backend=counter)
    variants = list(variants_of(trainer.pretext))
    for number in range(NUM_STEPS):
        trainer.learn(batch_of(trainer.pretext, BATCH_SIZE, variants[number % len(variants)], DEVICE))
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
print(json.dumps({"CSM": count("B"), "MAE3D": count("mae3d")}))
