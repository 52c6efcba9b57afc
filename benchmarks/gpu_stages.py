"""The stages of `on_gpu.py`, each run as `python -P gpu_stages.py STAGE WORK RESULTS`."""

import argparse
import os
import sys
from pathlib import Path

# which -P leaves out
sys.path.insert(0, str(Path(__file__).parent))

from stage import Stage
from stages_commands import commands, compiled, data, evidence
from stages_equal import alive, equal
from stages_speed import cache, predict, speed

STAGES = {f.__name__: f for f in (data, alive, cache, equal, commands, speed, predict, compiled, evidence)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("-study", default="quick")
    parser.add_argument("-jobs", type=int, default=1)
    args = parser.parse_args()
    stage = Stage(args.stage, args.work, args.results, args.cpu, args.study, args.jobs)
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    STAGES[args.stage](stage)


if __name__ == "__main__":
    main()
