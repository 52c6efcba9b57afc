"""Seconds and memory for one patch on one core: an exported segmenter in onnxruntime beside the same in torch.

nnunet_csm export_weights -d 30 -tr nnUNetTrainerCSM -f 0 -o weights --onnx
python benchmarks/onnx_speed.py weights -n 25
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def torch_pass(folder: Path, volume: np.ndarray) -> Callable[[], Any]:
    import torch

    import nnunet_csm

    torch.set_num_threads(1)
    network, patch = nnunet_csm.load_network(folder), torch.from_numpy(volume)
    return torch.inference_mode()(lambda: network(patch))


def onnx_pass(folder: Path, volume: np.ndarray) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"volume": volume})


def measure(what: str, folder: Path, count: int) -> str:
    """A row of the table: CPU time, of which other processes of the machine take nothing, and the peak of this process."""
    shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))["onnx"]["inputs"]["volume"][1:]
    volume = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    run = {"torch": torch_pass, "onnxruntime": onnx_pass}[what](folder, volume)
    run()
    times = []
    for _ in range(count):
        start = time.process_time()
        run()
        times.append(1000 * (time.process_time() - start))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"| {what} | {min(times):.0f} ms | {np.median(times):.0f} ms | {peak:.0f} MiB |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of `nnunet_csm export_weights --onnx`, of a segmenter")
    parser.add_argument("-n", type=int, default=25, help="passes; default: 25")
    parser.add_argument("-only", choices=("torch", "onnxruntime"), help="measure one, in this process")
    args = parser.parse_args()
    if args.only:
        print(measure(args.only, args.folder, args.n))
        return
    print("| | fastest | median | peak of the process |\n|---|---|---|---|", flush=True)
    for what in ("torch", "onnxruntime"):
        # each in a process of its own, whose memory is its own
        subprocess.run([sys.executable, __file__, str(args.folder), "-n", str(args.n), "-only", what], check=True)


if __name__ == "__main__":
    main()
