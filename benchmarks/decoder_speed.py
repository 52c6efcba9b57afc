"""A step of pretraining by what its decoder does: before and after, in one run, on one CPU thread or a GPU.

"masked" is the decoder of the first versions: keys and values of all tokens, and a mask in attention (`steps.MaskedDecoder`).
"visible" makes those of the visible tokens only, which gives the same numbers; "a quarter" also rebuilds only a quarter of the
hidden tokens. The step is the trainer's, without drawing and cutting; each figure is the median over some steps, averaged over
the numbers of hidden series. The last column runs under bf16 where the processor has it.

    python benchmarks/decoder_speed.py               # demo, the study few_labels' network and S
    python benchmarks/decoder_speed.py -n 3 -only S
"""

import argparse
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from steps import MaskedDecoder, bare_pretrainer, batch_of, method_of, variants_of

from nnunet_csm.machine import has_bf16
from nnunet_csm.pretext.base import Batch
from nnunet_csm.schema import Size


@dataclass(frozen=True)
class Row:
    name: str
    preset: str
    num_series: int
    token_size: Size
    patch_size: Size
    mask_ratio: float
    batch_size: int


ROWS = (
    Row("demo", "demo", 3, (4, 8, 8), (16, 32, 32), 0.5, 16),
    Row("few_labels (study)", "demo", 3, (4, 8, 8), (16, 32, 32), 0.75, 16),
    Row("S", "S", 4, (16, 16, 16), (96, 96, 96), 0.875, 16),
)


def milliseconds(row: Row, masked: bool, share: float, bf16: bool, num_steps: int, device: torch.device) -> float:
    """Of a step, as a mean over the numbers of hidden series."""
    changes = {"masking": {"mask_ratio": row.mask_ratio}, "reconstruction": {"rebuilt_share": share}}
    method = method_of(row.preset, row.num_series, row.token_size, row.patch_size, pretext=changes)
    torch.manual_seed(0)
    trainer = bare_pretrainer(method, device, compiled=device.type == "cuda", graphs=False)
    trainer.autocast = lambda: torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    if masked:
        trainer.network.decoder.__class__ = MaskedDecoder
    medians = []
    for variant in variants_of(trainer.pretext):
        batch = batch_of(trainer.pretext, row.batch_size, variant, device)
        times = [step_time(trainer, batch, device) for _ in range(num_steps + 1)][1:]
        medians.append(1000 * statistics.median(times))
    return statistics.mean(medians)


def step_time(trainer: Any, batch: Batch, device: torch.device) -> float:
    """Seconds; of the processor on a CPU, so that other programs do not count."""
    if device.type == "cpu":
        begun = time.process_time()
        trainer.learn(batch)
        return time.process_time() - begun
    torch.cuda.synchronize()
    begun = time.perf_counter()
    trainer.learn(batch)
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=5, help="steps measured for each number of hidden series (default: 5)")
    parser.add_argument("-only", "--only", default="", help="rows whose name begins so")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, under bf16")
    args = parser.parse_args()
    if args.gpu and not torch.cuda.is_available():
        print("Error: no CUDA device; leave out --gpu to measure on the CPU", file=sys.stderr)
        return 2
    device = torch.device("cuda" if args.gpu else "cpu")
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}; milliseconds a step")
    print(
        f"{'':<20}{'batch':>6}{'masked':>10}{'visible':>10}{'ratio':>7}{'a quarter':>11}{'ratio':>7}{'in bf16':>10}{'ratio':>7}"
    )
    for row in ROWS:
        if not row.name.startswith(args.only):
            continue
        before, visible, quarter = (
            milliseconds(row, masked, share, args.gpu, args.n, device)
            for masked, share in ((True, 1.0), (False, 1.0), (False, 0.25))
        )
        line = f"{row.name:<20}{row.batch_size:>6}{before:>10.1f}{visible:>10.1f}{before / visible:>7.2f}"
        line += f"{quarter:>11.1f}{before / quarter:>7.2f}"
        if has_bf16() and not args.gpu:
            narrow = milliseconds(row, False, 0.25, True, args.n, device)
            line += f"{narrow:>10.1f}{before / narrow:>7.2f}"
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
