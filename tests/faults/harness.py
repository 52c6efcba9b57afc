"""Damage a file, run a command that reads it, and judge what comes of it; many times, by a fixed draw.

    PYTHONPATH=tests:tests/faults python tests/faults/harness.py -n 1000 -o faults.csv

Nothing may end in a traceback, by a signal or not at all; what is refused is refused with exit code 2 and a line that names the
file; what is certainly wrong is not taken without a word; and nothing in a file is executed.
"""

import argparse
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import workshop
from damage import EXECUTED, Damage, remove
from joblib import Parallel, delayed
from tqdm import tqdm
from workshop import COMMANDS, Command

TIMEOUT = 60.0  # seconds: far more than any of these commands takes
GOOD = ("refused", "left out", "said", "accepted")
FAULTS = ("traceback", "signal", "hang", "exit code", "file not named", "taken without a word", "executed")


@dataclass(frozen=True)
class Case:
    command: Command
    pattern: str
    damage: Damage
    seed: int

    def __str__(self) -> str:
        return f"{self.command.name} | {self.pattern} | {self.damage.name} | {self.seed}"


@dataclass(frozen=True)
class Outcome:
    verdict: str  # one of GOOD or FAULTS
    damage: str  # what was done, to which file
    said: str

    @property
    def fault(self) -> bool:
        return self.verdict in FAULTS


def drawn(number: int, seed: int = 0) -> list[Case]:
    """Cases by a fixed draw: every kind of damage of every file of every command once, in random order, then all again."""
    rng = random.Random(seed)
    every = [(c, pattern, d) for c in COMMANDS for pattern, damages in c.reads.items() for d in damages]
    cases: list[Case] = []
    while len(cases) < number:
        cases += [Case(*kind, rng.randrange(10**6)) for kind in rng.sample(every, len(every))]
    return cases[:number]


def prepared(command: Command, base: Path, root: Path) -> Path:
    """Copy the workshop, without what the command makes."""
    shutil.copytree(base, root)
    for name in command.before:
        remove(root / name)
    return root


def undamaged(command: Command, base: Path, folder: Path) -> Outcome:
    root = prepared(command, base, folder / "w")
    code, said = workshop.run(root, command.arguments, TIMEOUT)
    return Outcome("accepted" if code == 0 else "exit code", "nothing", said)


def tried(case: Case, base: Path) -> Outcome:
    """Run a case in a copy of the workshop."""
    rng = random.Random(case.seed)
    with TemporaryDirectory(dir=base.parent) as folder:
        root = prepared(case.command, base, Path(folder) / "w")
        file = rng.choice(sorted(root.glob(case.pattern)) or sorted(p for p in root.glob(f"{case.pattern}*/*") if p.is_file()))
        if file.is_dir():
            file = rng.choice(sorted(file.iterdir()))
        what = f"{file.relative_to(root)}: {case.damage.apply(file, rng)}"
        code, said = workshop.run(root, case.command.arguments, TIMEOUT)
        said = said.replace(str(root), "")
        return Outcome(judged(case, code, said, file, any(root.rglob(EXECUTED))), what, said)


def judged(case: Case, code: int | None, said: str, file: Path, executed: bool) -> str:
    """One word for what came of it."""
    if executed:
        return "executed"
    if code is None:
        return "hang"
    if code < 0:
        return "signal"
    if re.search(r"^Traceback|terminate called", said, re.MULTILINE):
        return "traceback"
    # a case is named as well as its files are, a series by its folder
    case_name = re.sub(r"(_\d{4}|_seg|_T\dw|_dwi|_label-lesion_mask|_mask)?\.(nii\.gz|bval|b2nd|pkl|pt)$", "", file.name)
    known = (file.name, case_name, "/".join(file.parts[-3:-1]))
    errors = "\n".join(re.split(r"^Error: ", said, flags=re.MULTILINE)[1:])
    if code == 2:
        return "refused" if any(name in errors for name in known) else "file not named"
    if code != 0:
        return "exit code"
    lines = [line for line in said.splitlines() if any(name in line for name in known)]
    if "left out" in said and lines:
        return "left out"
    if lines and case.damage.wrong:
        return "said"
    return "taken without a word" if case.damage.wrong else "accepted"


def all_tried(cases: Sequence[Case], base: Path, jobs: int = 1) -> Iterator[tuple[Case, Outcome]]:
    outcomes = Parallel(n_jobs=jobs, prefer="threads", return_as="generator")(delayed(tried)(case, base) for case in cases)
    yield from zip(cases, tqdm(outcomes, total=len(cases), unit="case"), strict=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Damage files and see what comes of it.")
    parser.add_argument("-n", type=int, default=1000, help="number of cases")
    parser.add_argument("-seed", type=int, default=0, help="of the draw")
    parser.add_argument("-j", type=int, default=2, help="cases at once")
    parser.add_argument("-only", default="", help="cases whose name holds this")
    parser.add_argument("-base", type=Path, help="keep the dataset there, and take it from there")
    parser.add_argument("-o", type=Path, default=Path("faults.csv"), help="table of all cases")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        base = args.base or Path(folder) / "base"
        if not base.is_dir():
            workshop.build(base)
        cases = [case for case in drawn(args.n, args.seed) if args.only in str(case)]
        rows = []
        for case, outcome in all_tried(cases, base, args.j):
            rows.append(
                (case.command.name, case.pattern, case.damage.name, case.seed, outcome.verdict, outcome.damage, outcome.said)
            )
            if outcome.fault:
                tqdm.write(f"{outcome.verdict}: {case}\n    {outcome.damage}\n    {outcome.said.strip().splitlines()[-1:]}")
    names = ["command", "file", "damage", "seed", "verdict", "what", "said"]
    pd.DataFrame(rows, columns=names).to_csv(args.o, index=False)
    counts = Counter(row[4] for row in rows)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()), f"of {len(rows)}; {args.o}")
    return int(any(counts[fault] for fault in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
