"""Time and memory of `nnunet_csm fingerprint` against `nnUNetv2_extract_fingerprint`, on one phantom dataset in one run.

Both read every image with nnU-Net's reader; stock reads the labels as well. Times include the start of Python. Memory is the sum
of resident sets over the command and its processes, sampled from /proc (Linux): shared libraries count once for each process.

    python benchmarks/fingerprint_speed.py -o /tmp/fingerprint_speed -n 500
"""

import argparse
import gzip
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.fingerprint.extraction import case_files, find_reader
from nnunet_csm.fingerprint.measurement import Job, measure
from nnunet_csm.fingerprint.reading import read_case
from nnunet_csm.phantom import LABELS, PhantomSpec, draw_subject

SPEC = PhantomSpec(missing_share=0.1)
ENDING = ".nii.gz"
OURS = """
import sys
from nnunet_csm.fingerprint.command import fingerprint_dataset
fingerprint_dataset(sys.argv[1], (), int(sys.argv[2]))
"""
NUM_CASES_APART = 50
SAMPLING_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_mib: float


def write_dataset(raw: Path, name: str, num_cases: int) -> Path:
    """A raw dataset of nnU-Net's form; the subjects of a smaller one are the first of a larger one."""
    folder = raw / name
    if (folder / "dataset.json").is_file():
        return folder
    for subfolder in ("imagesTr", "labelsTr"):
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        drawn = pool.map(write_case, [folder] * num_cases, range(num_cases), chunksize=4)
        list(tqdm(drawn, desc=name, total=num_cases, unit="case", disable=None))
    channels = {str(channel): series for channel, series in enumerate(SPEC.series)}
    description = {"channel_names": channels, "labels": LABELS, "numTraining": num_cases, "file_ending": ENDING}
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n")
    return folder


def write_case(folder: Path, index: int) -> None:
    subject = draw_subject(SPEC, index)
    name = f"phantom_{index:04d}"
    for channel, series in enumerate(SPEC.series):
        write_volume(np.rint(subject.series[series]).astype(np.int16), folder / "imagesTr" / f"{name}_{channel:04d}{ENDING}")
    write_volume(subject.labels, folder / "labelsTr" / f"{name}{ENDING}")


def write_volume(volume: np.ndarray, path: Path) -> None:
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(SPEC.spacing_mm[::-1])
    sitk.WriteImage(image, str(path), useCompression=True)


def run(command: list[str], environment: dict[str, str], log: Path) -> Run:
    started, peak = time.monotonic(), 0.0
    with log.open("w") as stream, subprocess.Popen(command, env=environment, stdout=stream, stderr=stream) as process:
        while process.poll() is None:
            peak = max(peak, resident_mib(process.pid))
            time.sleep(SAMPLING_SECONDS)
    if process.returncode:
        raise UserError(f"{' '.join(command)} ended with exit code {process.returncode}; see {log}")
    return Run(time.monotonic() - started, peak)


def resident_mib(pid: int) -> float:
    """Memory of a process and all below it; 0 for one that has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        children = " ".join((task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir()).split()
    except (OSError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 + sum(resident_mib(int(child)) for child in children)


def parts_of_a_case(folder: Path) -> tuple[float, float, float]:
    """Milliseconds a case in this process: gzip alone, reading alone, reading and measuring."""
    dataset_json = json.loads((folder / "dataset.json").read_text())
    cases = dict(list(case_files(folder, "imagesTr", dataset_json, len(SPEC.series)).items())[:NUM_CASES_APART])
    reader = find_reader(dataset_json, list(cases.values()))
    jobs = [Job(name, "imagesTr", "", files, SPEC.series, reader, {}) for name, files in cases.items()]
    measure(jobs[0])
    marks = [time.perf_counter()]
    for job in jobs:
        for path in job.files.values():
            gzip.decompress(path.read_bytes())
    marks.append(time.perf_counter())
    for job in jobs:
        read_case(job.files, job.series, job.reader)
    marks.append(time.perf_counter())
    for job in jobs:
        measure(job)
    marks.append(time.perf_counter())
    decompressing, reading, measuring = (1000 * float(seconds) / len(jobs) for seconds in np.diff(marks))
    return decompressing, reading, measuring


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, required=True, help="working folder; phantoms that are there already are used again")
    parser.add_argument("-n", type=int, default=500, help="number of subjects; a tenth of it is the smaller dataset")
    parser.add_argument("-np", type=int, default=2, help="processes of both commands")
    args = parser.parse_args()
    # nnU-Net wants one dataset a number
    root = args.o / f"{args.n}_subjects"
    folders = {variable: root / variable for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    sizes = {901: max(1, args.n // 10), 902: args.n}
    environment = {**os.environ, **{variable: str(folder) for variable, folder in folders.items()}, "PYTHONWARNINGS": "ignore"}
    stock = str(Path(sys.executable).with_name("nnUNetv2_extract_fingerprint"))
    rows = []
    with exit_on_user_error():
        for number, size in sizes.items():
            write_dataset(folders["nnUNet_raw"], f"Dataset{number}_Phantom{size}", size)
        for number, size in sizes.items():
            # measured anew, not read from an earlier run
            (folders["nnUNet_preprocessed"] / f"Dataset{number}_Phantom{size}" / "csm_fingerprint.json").unlink(missing_ok=True)
            commands = {
                "nnUNetv2_extract_fingerprint": [stock, "-d", str(number), "-np", str(args.np), "--clean"],
                "nnunet_csm fingerprint": [sys.executable, "-c", OURS, str(number), str(args.np)],
                "nnunet_csm fingerprint, again": [sys.executable, "-c", OURS, str(number), str(args.np)],
            }
            rows += [(what, size, run(command, environment, root / "log.txt")) for what, command in commands.items()]
    print(f"\n{'':<31}{'cases':>6}{'s':>9}{'cases/s':>9}{'peak MiB':>10}{'to stock':>10}")
    for what, size, done in rows:
        reference = next(other for name, n, other in rows if n == size and name.startswith("nnUNetv2"))
        ratio = reference.seconds / done.seconds
        print(f"{what:<31}{size:>6}{done.seconds:>9.1f}{size / done.seconds:>9.1f}{done.peak_mib:>10.0f}{ratio:>9.2f}x")
    decompressing, reading, measuring = parts_of_a_case(folders["nnUNet_raw"] / f"Dataset902_Phantom{args.n}")
    print(
        f"\none case in one process: {measuring:.1f} ms, of which reading {reading:.1f} ms "
        f"(gzip alone, by zlib: {decompressing:.1f} ms), measuring {measuring - reading:.1f} ms"
    )
    versions = ", ".join(f"{name} {version(name)}" for name in ("nnunet_csm", "nnunetv2", "SimpleITK", "numpy"))
    print(f"{len(SPEC.series)} series of {SPEC.shape}; -np {args.np}; {os.cpu_count()} cores, {processor()}")
    print(f"Python {platform.python_version()}, {versions}; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
