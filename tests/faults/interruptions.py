"""Kill a command, stop it, or let its disk be full, at a random moment; then run it again and compare with an undisturbed run.

    PYTHONPATH=tests:tests/faults python tests/faults/interruptions.py -n 60 -o interruptions.csv

After SIGKILL or a full disk, going on gives what an undisturbed run gives. SIGTERM and Ctrl-C end a command with one line, exit
code 143 or 130, and every process that it started; a full disk ends it with exit code 2 and a line.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
import workshop
from damage import remove
from tqdm import tqdm
from workshop import CLASSIFIER, PRE, PREDICT, PRETRAINED, RAW, RESULTS, SEGMENTER, TASK, TRAIN

TIMEOUT = 480.0  # seconds: a study starts processes of its own, which import for long
PATIENCE = 10.0  # seconds that children have to end in
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass(frozen=True)
class Run:
    """A command, what it makes, and how it goes on where it was."""

    arguments: tuple[str, ...]
    makes: tuple[str, ...]
    again: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join(word for word in self.arguments if word[0] not in "-0123456789")[:40]


WITH_PROCESSES = ("-npp", "1", "-nps", "1", "--disable_tta", "--disable_progress_bar")
RUNS = (
    Run(("convert", "bt_msd", "-i", TASK, "-d", "901", "-np", "2"), ("raw/Dataset901_Phantom",)),
    Run(
        ("convert", "table", "-i", "sheet/series.csv", "-d", "902", "-name", "Table", "-labels", "tumour=1", "-np", "1"),
        ("raw/Dataset902_Table",),
    ),
    Run(("fingerprint", "-d", "900", "-np", "2"), (f"{PRE}/csm_fingerprint.json",)),
    Run(("plan_and_preprocess", "-d", "900", "-preset", "tiny.json", "-np", "2"), (PRE,)),
    Run(("pretrain", *TRAIN), (PRETRAINED,), again=("--c",)),
    Run(("finetune", *TRAIN), (SEGMENTER,), again=("--c",)),
    Run(("finetune", *TRAIN, "-tr", "nnUNetTrainerCSMClassifier"), (CLASSIFIER,), again=("--c",)),
    Run(("predict", *PREDICT, "-o", "out", *WITH_PROCESSES), ("out",), again=("--continue_prediction",)),
    Run(("classify", *PREDICT, "-m", "predicted", "-o", "out/classes.csv"), ("out",), again=("--overwrite",)),
    Run(
        ("evaluate", "-d", "900", "-ref", f"{TASK}/labelsTs", "-pred", "predicted", "-images", f"{RAW}/imagesTs", "-o", "out"),
        ("out",),
    ),
    Run(
        ("convert", "to_msd", "-i", "predicted", "-o", "out.zip", "-task", TASK, "-labels_from", f"{RAW}/dataset.json"),
        ("out.zip",),
        again=("--overwrite",),
    ),
    Run(("study", "scratch.json", "-d", "900", "-device", "cpu", "-preset", "tiny.json"), (f"{RESULTS}/study_scratch",)),
)


def contents(root: Path, run: Run) -> dict[str, Any]:
    """What a run has made, by file, as far as two runs have to agree: voxels, weights, tables."""
    paths = [path for made in run.makes for path in ([root / made] if (root / made).is_file() else (root / made).rglob("*"))]
    files = sorted(path for path in paths if path.is_file() and "previous_" not in str(path))
    found: dict[str, Any] = {}
    for path in files:
        try:
            found[str(path.relative_to(root))] = _content(path)
        except (RuntimeError, ValueError, OSError) as error:  # not whole
            found[str(path.relative_to(root))] = str(error)
    return {name: content for name, content in found.items() if content is not None}


def _content(path: Path) -> Any:
    if path.name.startswith(".") or path.name in ("debug.json", "predict_from_raw_data_args.json"):
        return None
    if "study_" in str(path):  # names of runs follow from where the preset lies
        return path.read_text("utf-8") if path.name == "summary.csv" else None
    if path.name.endswith(".nii.gz"):
        return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).tobytes()
    if path.name == "checkpoint_final.pth":
        weights = torch.load(path, weights_only=True, map_location="cpu")["network_weights"]
        return b"".join(weights[name].float().numpy().tobytes() for name in sorted(weights))
    if path.suffix == ".b2nd":
        import blosc2

        return np.asarray(blosc2.open(str(path), mode="r")[:]).tobytes()
    if path.suffix == ".json":
        return json.dumps(_lasting(json.loads(path.read_text("utf-8"))), sort_keys=True)
    if path.suffix == ".csv" and path.name != "probe.csv":
        return path.read_text("utf-8")
    return path.name if path.suffix in (".pkl", ".zip") else None


def _lasting(data: Any) -> Any:
    """Without what says when, where and for how long."""
    if isinstance(data, Mapping):
        passing = ("time", "date", "seconds", "created", "written", "folder", "path", "sha256", "file", "key")
        return {key: _lasting(value) for key, value in data.items() if not any(word in key.lower() for word in passing)}
    if isinstance(data, list):
        return [_lasting(value) for value in data]
    return re.sub(r"/tmp/[^ ]*|20\d\d-\d\d-\d\d[T ][\d:.]*", "", data) if isinstance(data, str) else data


def family(group: int) -> list[int]:
    """Processes of a group that are not over."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rpartition(") ")[2].split()[:3]
        except (OSError, ValueError):
            continue
        if int(of) == group and state != "Z":
            members.append(int(stat.parent.name))
    return members


@dataclass(frozen=True)
class Interruption:
    run: Run
    kind: str  # "kill", "SIGTERM", "SIGINT" or "full disk"
    moment: float  # share of the time, or of the largest file, that an undisturbed run takes

    def __str__(self) -> str:
        return f"{self.run.name} | {self.kind} | {self.moment:.2f}"


KINDS = ("kill", "SIGTERM", "SIGINT", "full disk")


def drawn(number: int, seed: int = 0, kinds: tuple[str, ...] = KINDS) -> list[Interruption]:
    """Interruptions of every run in every way, at moments of a fixed draw."""
    rng = random.Random(seed)
    every = [(run, kind) for kind in kinds for run in RUNS]
    return [Interruption(*every[i % len(every)], rng.uniform(0.02, 0.98)) for i in range(number)]


@dataclass
class Undisturbed:
    """What runs make, how long they take and how large their files are."""

    base: Path

    def __post_init__(self) -> None:
        self.known: dict[str, tuple[dict[str, Any], float, int]] = {}

    def of(self, run: Run) -> tuple[dict[str, Any], float, int]:
        if run.name not in self.known:
            with TemporaryDirectory(dir=self.base.parent) as folder:
                root = prepared(run, self.base, Path(folder) / "w")
                begun = time.monotonic()
                code, said = workshop.run(root, run.arguments, TIMEOUT)
                assert code == 0, said
                seconds = time.monotonic() - begun
                made = [p.stat().st_size for name in run.makes for p in [root / name, *(root / name).rglob("*")] if p.is_file()]
                self.known[run.name] = contents(root, run), seconds, max(made)
        return self.known[run.name]


def prepared(run: Run, base: Path, root: Path) -> Path:
    shutil.copytree(base, root)
    for name in run.makes:
        remove(root / name)
    return root


def tried(case: Interruption, undisturbed: Undisturbed) -> tuple[str, str]:
    """Interrupt a run, go on, compare.

    Returns:
        "" or what is wrong; and what was said.
    """
    expected, seconds, largest = undisturbed.of(case.run)
    with TemporaryDirectory(dir=undisturbed.base.parent, ignore_cleanup_errors=True) as folder:
        root = prepared(case.run, undisturbed.base, Path(folder) / "w")
        if case.kind == "full disk":
            code, said = workshop.run(root, case.run.arguments, TIMEOUT, limit=int(case.moment * largest))
            # its messages go to a file as well
            wrong = (
                ""
                if code == 0 or (code == 2 and "Traceback" not in said and re.search("room|disk full", said))
                else f"exit code {code}"
            )
        else:
            wrong, said = _stopped(case, root, case.moment * seconds)
        # a study makes the folder of a step anew
        hidden = [path for path in root.rglob(".*") if path.name.endswith((".tmp", ".partial"))]
        unfinished = [path.name for path in hidden if "study_" not in str(path)]
        if not wrong and unfinished and case.kind != "kill":
            wrong = f"left {unfinished[0]}"
        first = said
        done = contents(root, case.run) == expected
        code, said = workshop.run(root, [*case.run.arguments, *case.run.again], TIMEOUT)
        refused = code == 2 and done and "exist" in said  # it had ended before it was interrupted
        if not wrong and code != 0 and not refused:
            wrong = f"going on ends with exit code {code}"
        if not wrong and (differing := _differing(contents(root, case.run), expected)):
            wrong = f"not equal after going on: {', '.join(differing[:3])}"
        return wrong, f"{first}\n---- going on\n{said}"


def _differing(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def _stopped(case: Interruption, root: Path, seconds: float) -> tuple[str, str]:
    """Send a signal after some time, and wait for the end of all processes."""
    said = root / "said"
    said.unlink(missing_ok=True)
    process = workshop.start(root, case.run.arguments)
    process.join(seconds)
    over = process.exitcode is not None
    number = {"kill": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}[case.kind]
    if not over and process.pid is not None:
        os.kill(process.pid, number)
    process.join(PATIENCE)
    text = said.read_text("utf-8", errors="replace") if said.exists() else ""
    left = family(process.pid or 0)
    until = time.monotonic() + PATIENCE
    while left and time.monotonic() < until:
        time.sleep(0.1)
        left = family(process.pid or 0)
    for member in left:
        os.kill(member, signal.SIGKILL)
    # what a killed study has started goes on, and is waited for by the next one
    if left and not (case.kind == "kill" and case.run.arguments[0] == "study"):
        return f"{len(left)} processes left", text
    if over or case.kind == "kill":
        return "", text
    if process.exitcode not in (CODES[number], 0):
        return f"exit code {process.exitcode}", text
    return "a traceback" if re.search(r"^Traceback|^  File ", text, re.MULTILINE) else "", text


def all_tried(cases: list[Interruption], base: Path) -> Iterator[tuple[Interruption, str, str]]:
    undisturbed = Undisturbed(base)
    for case in tqdm(cases, unit="case"):
        yield case, *tried(case, undisturbed)


def main() -> int:
    parser = argparse.ArgumentParser(description="Interrupt commands and go on.")
    parser.add_argument("-n", type=int, default=48, help="number of cases")
    parser.add_argument("-seed", type=int, default=0, help="of the moments")
    parser.add_argument("-kinds", nargs="+", default=KINDS, choices=KINDS, help="ways of being interrupted")
    parser.add_argument("-only", default="", help="cases whose name holds this")
    parser.add_argument("-base", type=Path, help="keep the dataset there, and take it from there")
    parser.add_argument("-o", type=Path, default=Path("interruptions.csv"), help="table of all cases")
    args = parser.parse_args()
    # a shell starts what runs in the background with it ignored, and so would be the commands
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with TemporaryDirectory() as folder:
        base = args.base or Path(folder) / "base"
        if not base.is_dir():
            workshop.build(base)
        rows = []
        for case, wrong, said in all_tried([c for c in drawn(args.n, args.seed, tuple(args.kinds)) if args.only in str(c)], base):
            rows.append((case.run.name, case.kind, case.moment, wrong, said))
            if wrong:
                tqdm.write(f"{case}: {wrong}\n    {said.strip().splitlines()[-1:]}")
    pd.DataFrame(rows, columns=["run", "kind", "moment", "wrong", "said"]).to_csv(args.o, index=False)
    good = Counter(kind for _, kind, _, wrong, _ in rows if not wrong)
    counts = Counter(row[1] for row in rows)
    print(", ".join(f"{kind}: {good[kind]} of {number} well" for kind, number in counts.items()), f"; {args.o}")
    return int(sum(good.values()) < len(rows))


if __name__ == "__main__":
    sys.exit(main())
