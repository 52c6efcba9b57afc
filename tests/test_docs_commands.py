"""Every block of shell commands in README and docs runs as it is written, page by page, or says above it why it does not.

A page is run in a folder with phantoms under the names that the docs use, its blocks one after the other, in one shell. Three
things differ from a user's: commands start warm, what takes a device and names none gets the CPU, and every preset is cut down
to a network and a number of steps that take a second.
"""

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import SimpleITK as sitk
import warm_processes

from nnunet_csm.cli import build_parser
from nnunet_csm.phantom import PhantomSpec, write_task

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# the reason why a block is not run stands in the line above it
BLOCK = re.compile(r"(?:^<!-- not run: (?P<why>[^\n]*\S) -->\n)?^```bash\n(?P<commands>.*?)^```", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- *not run", re.IGNORECASE)
# commands in a fence of another kind would be run by nobody
HIDDEN = re.compile(r"^```(?:sh|shell|console|zsh)\n|^```\w*\n(?:(?!```).*\n)*?\$ \w", re.MULTILINE)
PROGRAMS = (
    "nnunet_csm",
    "python",
    *(f"nnUNetv2_{name}" for name in (
        "convert_MSD_dataset", "plan_and_preprocess", "plan_experiment", "preprocess", "train", "predict", "evaluate_folder",
        "accumulate_crossval_results", "find_best_configuration", "export_model_to_zip", "install_pretrained_model_from_zip",
    )),
)  # fmt: skip
# of stock commands; of ours the parser tells
TAKES_DEVICE = {("nnUNetv2_train",), ("nnUNetv2_predict",)}
SECONDS = 1800
SMALL = PhantomSpec(shape=(16, 32, 32), spacing_mm=(8.0, 5.0, 5.0))
SCHEDULE = {"passes": None, "min_steps": 0, "iterations_per_epoch": 1, "val_iterations_per_epoch": 1, "batch_size": 2}
CUT_DOWN: dict[str, Any] = {
    "network": {"width": 24, "depth": 4, "num_heads": 2, "features": 4},
    "token_edge": 4,
    "max_patch_voxels": 4096,
    # what judges a pretraining counts patches
    "pretraining": {**SCHEDULE, "num_crops": 32, "batch_size": 16},
    "finetuning": {**SCHEDULE, "num_crops": 2},
    "classification": {"schedule": {**SCHEDULE, "num_crops": 2}},
    "mirroring": False,
}
# of pretexts that have one
DECODER = {"reconstruction": {"width": 24, "depth": 1, "num_heads": 2}}


@dataclass(frozen=True)
class Block:
    """Commands of a page; `why` says why they are not run, and is empty where they are."""

    line: int
    commands: str
    why: str


def blocks_of(text: str) -> list[Block]:
    return [
        Block(text.count("\n", 0, found.start("commands")) + 1, found["commands"], found["why"] or "")
        for found in BLOCK.finditer(text)
    ]


# --- what is run, and what is not --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_blocks_that_are_run_or_say_why_not(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    hidden = [found[0] for found in HIDDEN.finditer(text)]
    assert not hidden, "commands in a block that is not ```bash"
    marked = [block for block in blocks_of(text) if block.why]
    assert len(MARK.findall(text)) == len(marked), "a mark without a reason, or not in the line above a block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_scripts_that_are_shown_exist(page: Path) -> None:
    scripts = re.findall(r"python3? ((?:benchmarks|examples|tests)/[\w/]+\.py)", page.read_text(encoding="utf-8"))
    assert not [script for script in scripts if not (ROOT / script).is_file()]


def test_a_mark_and_its_reason_are_told_from_a_block_that_runs() -> None:
    text = "<!-- not run: needs a GPU -->\n```bash\na\n```\nwords\n```bash\nb\nc\n```\n"
    assert blocks_of(text) == [Block(3, "a\n", "needs a GPU"), Block(7, "b\nc\n", "")]
    assert HIDDEN.search("```text\nresult\n$ nnunet_csm plan -d 1\n```\n") and not HIDDEN.search(text)
    assert MARK.search("<!-- not run -->\n```bash\na\n```") and not blocks_of("<!-- not run -->\n```bash\na\n```")[0].why


# --- a folder with everything that pages name --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nnU-Net's folders with datasets 1, 21 and 502, the first two preprocessed, and beside them what pages take as given."""
    root = tmp_path_factory.mktemp("world")
    environment = environment_of(root)
    glioma = write_task(replace(SMALL, series=("FLAIR", "T1w", "T1ce"), missing_share=0.2), root, 10, 2, 21, "GliomaLGG")
    tumours = write_task(SMALL, root, 5, 1, 1, "BrainTumour")
    shutil.copytree(glioma, root / "Task30_MyoPS")
    for task in (glioma, tumours):
        check(warm("nnUNetv2_convert_MSD_dataset", ["-i", str(task), "-np", "1"], root, environment))
    planned = ["-d", "21", "1", "-c", "3d_fullres", "-np", "1", "-npfp", "1"]
    check(warm("nnUNetv2_plan_and_preprocess", planned, root, environment))
    raw = root / "nnUNet_raw"
    shutil.copytree(raw / "Dataset021_GliomaLGG" / "imagesTs", root / "imagesTs")
    shutil.copytree(glioma / "labelsTs", root / "labelsTs")
    unlabelled = raw / "Dataset502_Unlabelled"
    shutil.copytree(raw / "Dataset021_GliomaLGG" / "imagesTr", unlabelled / "imagesTr")
    described = json.loads((raw / "Dataset021_GliomaLGG" / "dataset.json").read_text())
    (unlabelled / "dataset.json").write_text(json.dumps(described | {"labels": {}}))
    predictions = root / "predictions"
    shutil.copytree(tumours / "labelsTs", predictions)
    shutil.copy(raw / "Dataset001_BrainTumour" / "dataset.json", predictions)
    write_table(root, raw / "Dataset001_BrainTumour", tumours)
    (root / "hearts.json").write_text('{"inherits_from": "demo"}')
    (root / "small.json").write_text('{"inherits_from": "demo", "classification": {"patch_size": [8, 8, 8]}}')
    for folder in ("benchmarks", "examples", "tests", "plans"):
        (root / folder).symlink_to(ROOT / folder)
    return root


def write_table(root: Path, dataset: Path, task: Path) -> None:
    """series.csv and prostate.csv, with T2w, ADC and DWI, a mask and a class of every subject; images and masks to classify."""
    rows = []
    for folder in ("images", "masks", "files"):
        (root / folder).mkdir()
    for number in range(20):
        source = sorted((dataset / "labelsTr").glob("*.nii.gz"))[number % 5]
        mask = sitk.ReadImage(str(source)) > 0
        name, case = f"S{number:02d}", source.name.removesuffix(".nii.gz")
        sitk.WriteImage(mask, str(root / "files" / f"{name}_mask.nii.gz"))
        for channel, series in enumerate(("T2w", "ADC", "DWI")):
            image = dataset / "imagesTr" / f"{case}_{channel:04d}.nii.gz"
            voxels = sitk.ReadImage(str(image)) + number
            sitk.WriteImage(voxels, str(root / "files" / f"{name}_{series}.nii.gz"))
            row = {"subject": name, "series": series, "path": f"files/{name}_{series}.nii.gz"}
            rows.append(row | {"mask": f"files/{name}_mask.nii.gz", "class": ("benign", "malignant")[number % 2]})
            if number < 2:
                shutil.copy(root / row["path"], root / "images" / f"{name}_{channel:04d}.nii.gz")
                shutil.copy(root / "files" / f"{name}_mask.nii.gz", root / "masks" / f"{name}.nii.gz")
    for table in ("series.csv", "prostate.csv"):
        pd.DataFrame(rows).to_csv(root / table, index=False)


def environment_of(root: Path) -> dict[str, str]:
    folders = {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        Path(folder).mkdir(exist_ok=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet")}
    quiet = {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_npp": "1", "nnUNet_nps": "1", "PYTHONWARNINGS": "ignore"}
    return inherited | folders | quiet


# --- programs that start warm ------------------------------------------------------------------------------------------------


def act(program: str, arguments: list[str], folder: str) -> int | None:
    """A console command, or a script by `python`, in a folder."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    from nnunet_csm.planning import presets

    os.chdir(folder)
    # a picture takes long, and a model is exported with it
    LocalLogger.plot_progress_png = lambda _, output: Path(output, "progress.png").touch()
    read = presets.read_inherited

    def read_cut_down(*given: Any, **named: Any) -> dict[str, Any]:
        content = read(*given, **named)
        if not named.get("root", True):
            return content
        known = "reconstruction" in content["pretext"]
        return presets.merged(content, CUT_DOWN | ({"pretext": DECODER} if known else {}))

    presets.read_inherited = read_cut_down
    if program != "python":
        return warm_processes.console_command(program, *arguments)
    sys.argv = arguments
    sys.path.insert(0, str(Path(arguments[0]).parent))
    runpy.run_path(arguments[0], run_name="__main__")
    return 0


def warm(program: str, arguments: list[str], folder: Path, environment: dict[str, str]) -> tuple[int | None, str, str]:
    said, errors = (folder / f".{kind}_{threading.get_ident()}" for kind in ("stdout", "stderr"))
    process = warm_processes.start(act, (program, with_device(program, arguments), str(folder)), environment, said, errors)
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
    told = [path.read_text("utf-8") if path.exists() else "" for path in (said, errors)]
    for path in (said, errors):
        path.unlink(missing_ok=True)
    return process.exitcode, *told


def check(done: tuple[int | None, str, str]) -> None:
    assert done[0] == 0, "".join(done[1:])[-3000:]


def with_device(program: str, arguments: list[str]) -> list[str]:
    """The arguments, with the CPU where a device may be named and none is."""
    takes = (program,) in TAKES_DEVICE
    if program == "nnunet_csm":
        actions = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
        takes = bool(arguments) and arguments[0] in actions and "-device" in actions[arguments[0]]._option_string_actions
    return [*arguments, "-device", "cpu"] if takes and "-device" not in arguments and "--help" not in arguments else arguments


SHIM = """#!{python} -IS
import os, sys
from multiprocessing.connection import Client
with Client({address!r}) as server:
    server.send((os.path.basename(sys.argv[0]), sys.argv[1:], os.getcwd(), dict(os.environ)))
    code, said, errors = server.recv()
sys.stdout.write(said)
sys.stderr.write(errors)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the programs that pages call; each asks this process for a warm one."""
    folder = tmp_path_factory.mktemp("bin")
    listener = Listener(str(folder / "socket"))

    def serve(connection: Connection) -> None:
        program, arguments, where, environment = connection.recv()
        connection.send(warm(program, arguments, Path(where), environment))

    def accept() -> None:
        # until the listener is closed
        with suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept(),), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    for program in PROGRAMS:
        shim = folder / program
        shim.write_text(SHIM.format(python=sys.executable, address=str(folder / "socket")))
        shim.chmod(0o755)
    yield folder
    listener.close()


RUN = [page for page in PAGES if any(not block.why for block in blocks_of(page.read_text(encoding="utf-8")))]


@pytest.mark.slow
@pytest.mark.xdist_group("docs")
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_commands_run_as_they_are_written(page: Path, world: Path, programs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "user"
    shutil.copytree(world, folder, symlinks=True)
    environment = environment_of(folder)
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    blocks = [block for block in blocks_of(page.read_text(encoding="utf-8")) if not block.why]
    for there in made_by("".join(block.commands for block in blocks), folder):
        shutil.rmtree(there)
    # one shell, as one terminal; what is printed last tells the block that failed
    script = "".join(f"echo '--- line {block.line}'\n{block.commands}" for block in blocks)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",  # whatever the locale is
        timeout=SECONDS,
    )
    assert done.returncode == 0, f"{page.name}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def made_by(commands: str, folder: Path) -> list[Path]:
    """Datasets and folders that commands make, and that are there from other pages: no converter replaces any."""
    numbers = re.findall(r"(?:convert_MSD_dataset -i Task|convert \w+ .*-d )(\d+)", commands)
    datasets = [path for number in numbers for path in folder.glob(f"nnUNet_*/Dataset{int(number):03d}_*")]
    return [*datasets, *(folder / name for name in set(re.findall(r"-o (\w+)", commands)) if (folder / name).is_dir())]
