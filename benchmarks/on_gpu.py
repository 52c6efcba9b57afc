"""Ten minutes on a GPU, well spent: does everything work there, and how fast is it? One command, one table, one page of figures.

Stages run one after the other, each in a process of its own with a limit of time; a stage that fails stops no other. What they
find goes into OUT/results.jsonl at once, what they print into OUT/log.txt, and a table of both stands at the end in
OUT/table.txt. Where compiling, graphs or an attention kernel fail, the stages after it run without, and the table says so.

    alive      versions, a compiler, shared memory; the fastest product and copy of this machine
    equal      banks, draws, masks and crops as on the CPU; attention against fp64; steps with graphs as without
    commands   pretrain, SIGKILL, --c; finetune, predict with and without a series, classify
    compiled   preset B through the command: the log must not say that there are no graphs
    speed      steps of pretraining by preset and batch, with and without graphs, beside MONAI; kernels; memory
    predict    one case, nnU-Net's predictor beside ours
    evidence   as many runs of a study as there is time for (-study, -data); a second call with the same -work goes on

    python benchmarks/on_gpu.py -o on_gpu -minutes 9.5
    python benchmarks/on_gpu.py -o on_gpu -only evidence -minutes 4 -study few_labels -data images.tar
    python benchmarks/on_gpu.py -o rehearsal --cpu            # every stage at small size, where there is no GPU
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

STAGES_FILE = Path(__file__).with_name("gpu_stages.py")
# a stage that compiles is told again that it may not
WITHOUT = {"compiles": ("nnUNet_compile", "f"), "graphs": ("nnUNet_csm_graphs", "f")}
WITHOUT["attention"] = ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
WORK = Path(tempfile.gettempdir()) / "nnunet_csm_on_gpu"
# left for the table, and for what evidence leaves behind
SECONDS_AT_THE_END = 12.0
MAX_ARCHIVE = 15 * 2**20


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    """At most; 0 for all that are left."""
    beside: bool = False
    """Runs beside the stages after it, until `speed` begins."""


STAGES = (
    Stage("data", 0, beside=True),
    Stage("alive", 45),
    Stage("cache", 0, beside=True),
    Stage("equal", 100),
    Stage("commands", 130),
    Stage("compiled", 65),
    Stage("speed", 165),
    Stage("predict", 45),
    Stage("evidence", 0),
)


class Session:
    """Runs stages and keeps what they found."""

    def __init__(self, args: argparse.Namespace, log: TextIO) -> None:
        self.args, self.log = args, log
        self.begun = time.monotonic()
        self.out, self.work = args.o.resolve(), args.work.resolve()
        self.results = self.out / "results.jsonl"
        self.environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "ignore", "nnUNet_def_n_proc": "4"}
        if args.cpu:
            # stages run beside each other, and threads that share a core wait for each other
            self.environment |= {"OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1"}
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (self.work / variable).mkdir(parents=True, exist_ok=True)
            self.environment[variable] = str(self.work / variable)
        self.environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(self.work / "inductor"))
        self.running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
        self.ended: dict[str, tuple[float, str]] = {}

    @property
    def left(self) -> float:
        return 60 * self.args.minutes - (time.monotonic() - self.begun) - SECONDS_AT_THE_END

    def start(self, stage: Stage) -> subprocess.Popen[bytes]:
        flags = ["--cpu"] if self.args.cpu else []
        flags += ["-study", self.args.study, "-jobs", str(self.args.jobs)] if stage.name == "evidence" else []
        # without the current folder: a checkout hides the installed package, which has the presets
        command = [sys.executable, "-P", str(STAGES_FILE), stage.name, str(self.work), str(self.results), *flags]
        self.log.write(f"\n=== {stage.name}, after {time.monotonic() - self.begun:.0f} s\n")
        self.log.flush()
        process = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=self.log, start_new_session=True)
        self.running[stage.name] = process, time.monotonic()
        return process

    def run(self, stage: Stage) -> None:
        # a rehearsal has two cores
        limit = min((4 if self.args.cpu else 1) * stage.seconds or self.left, self.left)
        if limit < 15 and not self.args.cpu:
            self.ended[stage.name] = 0.0, "no time left"
            return
        for name in [name for name, (process, _) in self.running.items() if process.poll() is not None]:
            self.end(name)
        for name in list(self.running) if stage.name in ("speed", "predict", "evidence") else ():
            # nothing else is to run while time is taken
            self.end(name, f"stopped when {stage.name} began")
        print(f"{time.monotonic() - self.begun:6.0f} s  {stage.name}", flush=True)
        process = self.start(stage)
        if stage.beside:
            return
        try:
            process.wait(limit)
            self.end(stage.name)
        except subprocess.TimeoutExpired:
            self.end(stage.name, "its time was up")
        self.go_without()

    def end(self, name: str, why: str = "") -> None:
        """Stop a stage, with all it started, where it is still running."""
        process, begun = self.running.pop(name)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            why = why or "stopped at the end"
        elif process.returncode:
            why = f"exit code {process.returncode}"
        self.ended[name] = time.monotonic() - begun, why
        if why and name != "evidence":
            print(f"          {name}: {why}, see {self.out / 'log.txt'}", flush=True)

    def go_without(self) -> None:
        """What failed is not tried again by later stages."""
        failed = {row["check"] for row in self.rows() if row.get("passed") is False}
        for check, (variable, value) in WITHOUT.items():
            if check in failed and self.environment.get(variable) != value:
                self.environment[variable] = value
                # what was compiled with the other choice is not to be taken for it
                self.environment["TORCHINDUCTOR_CACHE_DIR"] += f"_{check}"
                print(f"          from here on without: {variable}={value}", flush=True)

    def rows(self) -> list[dict[str, Any]]:
        lines = self.results.read_text().splitlines() if self.results.is_file() else []
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    def table(self) -> str:
        """A line for each check and figure, after one for each stage."""
        rows, lines = self.rows(), ["a rehearsal on a CPU, in which no GPU was tried"] if self.args.cpu else []
        for name, (seconds, why) in self.ended.items():
            lines.append(f"{name:<10}{seconds:>6.0f} s  {why}")
            for row in (row for row in rows if row["stage"] == name):
                mark = {True: "pass", False: "FAIL", None: ""}[row.get("passed")]
                lines.append(f"    {mark:<5} {row['check']:<46} {row.get('value', '')}")
        failed = [row for row in rows if row.get("passed") is False]
        passed = sum(row.get("passed") is True for row in rows)
        unfinished = [name for name, (_, why) in self.ended.items() if why and name not in ("evidence", "data", "cache")]
        lines.append(f"{passed} checks passed, {len(failed)} failed; stages not finished: {', '.join(unfinished) or 'none'}")
        return "\n".join(lines)

    def keep_evidence(self) -> None:
        """Tables of the study, and what is small enough of its runs, as an archive to go on from elsewhere."""
        files = sorted((f for f in (self.work / "nnUNet_results").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        size = 0
        with tarfile.open(self.out / "evidence.tar.gz", "w:gz", compresslevel=1) as archive:
            for file in files:
                size += file.stat().st_size
                if size > MAX_ARCHIVE:
                    break
                archive.add(file, str(file.relative_to(self.work)))


def unpack(data: Path, work: Path) -> None:
    """Put preprocessed data, and what an earlier call left, where nnU-Net looks for it: a folder or an archive of nnU-Net's."""
    if data.is_dir():
        for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            if (data / variable).is_dir():
                shutil.copytree(data / variable, work / variable, dirs_exist_ok=True)
    else:
        with tarfile.open(data) as archive:
            archive.extractall(work, filter="data")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("-o", type=Path, required=True, help="folder for results.jsonl, log.txt and table.txt")
    parser.add_argument("-minutes", "--minutes", type=float, default=9.5, help="in all (default: 9.5)")
    parser.add_argument("--cpu", action="store_true", help="a rehearsal at small size")
    parser.add_argument("-only", "--only", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("-study", "--study", default="quick", help="for evidence: a shipped study, or its file (default: quick)")
    parser.add_argument(
        "-data",
        "--data",
        type=Path,
        nargs="*",
        default=[],
        help="for evidence: folders or archives with nnUNet_preprocessed/ or nnUNet_raw/",
    )
    parser.add_argument("-jobs", "--jobs", type=int, default=4, help="for evidence: runs at once on the card (default: 4)")
    parser.add_argument(
        "-work", "--work", type=Path, default=WORK, help=f"where stages work; a later call goes on there (default: {WORK})"
    )
    args = parser.parse_args()
    missing = [str(path) for path in args.data if not path.exists()]
    if missing:
        print(
            f"Error: {', '.join(missing)}: no such folder or archive; give -data what holds nnUNet_preprocessed", file=sys.stderr
        )
        return 2
    args.o.mkdir(parents=True, exist_ok=True)
    with (args.o / "log.txt").open("a", encoding="utf-8") as log:
        session = Session(args, log)
        session.results.unlink(missing_ok=True)
        for data in args.data:
            unpack(data, session.work)
        try:
            for stage in STAGES:
                needed = args.only is None or stage.name in args.only
                needed |= stage.name == "data" and bool({"commands", "compiled"} & set(args.only or ()))
                if stage.name == "evidence" and not (args.data or args.cpu or args.only):
                    continue
                if needed:
                    session.run(stage)
        finally:
            for name in list(session.running):
                session.end(name)
            table = session.table()
            (args.o / "table.txt").write_text(table + "\n", encoding="utf-8")
            print(table, flush=True)
            if "evidence" in session.ended:
                session.keep_evidence()
    return 1 if any(row.get("passed") is False for row in session.rows()) else 0


if __name__ == "__main__":
    sys.exit(main())
