"""Every benchmark measures something: the smallest run of each on a CPU prints its table.

Of `benchmarks/memory.py`, see test_memory.py.
"""

import contextlib
import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


class Threads(ThreadPoolExecutor):
    """Stands in for processes, each of which would import torch anew; what they are given must still travel to one."""

    def __init__(self, max_workers: int = 1, mp_context: Any = None) -> None:
        super().__init__(max_workers)

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))
        return super().submit(function, *arguments, **options)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A benchmark as a module, without GPU, MONAI and processes of its own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "monai", None)

    def load(name: str) -> Any:
        module = import_module(name)
        monkeypatch.setattr(module, "ProcessPoolExecutor", Threads, raising=False)
        return module

    return load


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a benchmark prints when called with these arguments."""

    def run(module: Any, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        assert not module.main()
        return capsys.readouterr().out

    return run


def numbers(table: str, row: str) -> list[float]:
    """Those of the row with this name."""
    line = next(line for line in table.splitlines() if re.match(rf" *{re.escape(row)}( |$)", line))
    return [float(number) for number in re.findall(r"\d+(?:\.\d+)?(?:e[+-]\d+)?", line.replace(row, "", 1))]


def test_pretraining(load, printed, monkeypatch, tmp_path):
    module = load("pretrain_speed")
    monkeypatch.setattr(module, "NUM_CASES", 2)
    # a large product takes seconds
    monkeypatch.setattr(module, "peak_operations", lambda device: 1e12)
    table = printed(module, "--cpu", "-n", 1, "-only", "CSM demo 4 32 16", "-o", tmp_path / "speed")
    assert "pip install monai" in table
    assert min(numbers(table, "CSM demo")) > 0
    row = json.loads((tmp_path / "speed.json").read_text())["rows"][0]
    assert row["crops_per_second"] > 0 and (tmp_path / "speed.png").is_file()


OTHERS: dict[str, dict[str, Any]] = {
    "MAE3D": {"network": {"encoder": {"kind": "joint_vit"}}, "pretext": {"name": "mae3d"}},
    "HiddenMeans": {"pretext": {"name": "own_pretext.HiddenMeans"}},
}


@pytest.mark.parametrize("what", OTHERS)
def test_pretraining_by_any_pretext(what, load, printed, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS.with_name("examples"))
    module = load("pretrain_speed")
    monkeypatch.setattr(module, "NUM_CASES", 2)
    monkeypatch.setattr(module, "peak_operations", lambda device: 1e12)
    preset = tmp_path / "own.json"
    preset.write_text(json.dumps({"inherits_from": "demo", "description": what, **OTHERS[what]}))
    table = printed(module, "--cpu", "-n", 1, "-presets", preset)
    assert min(numbers(table, f"{what} own")) > 0


def test_finetuning(load, printed, monkeypatch):
    module = load("finetune_speed")
    monkeypatch.setattr(module, "CPU_ROWS", [module.Row("demo", (16, 16, 16), 8, 2)])
    table = printed(module, "--cpu", "-n", 1)
    assert "pip install monai" in table
    milliseconds, gib = numbers(table, "demo")[-2:]
    assert milliseconds > 0 and gib > 0
    assert numbers(table, "augmentation of (16, 16, 16):")[0] > 0


def test_finetuning_beside_monai(load, printed, monkeypatch, tmp_path):
    module = load("finetune_speed")
    monkeypatch.setattr(module, "CPU_ROWS", [module.Row("demo", (16, 16, 16), 8, 2)])
    monkeypatch.setitem(sys.modules, "monai", SimpleNamespace(__spec__="installed"))
    monkeypatch.setattr(module, "monai_step", module.our_step)
    table = printed(module, "--cpu", "-n", 1, "-o", tmp_path / "speed")
    assert "pip install monai" not in table
    row = json.loads((tmp_path / "speed.json").read_text())["rows"][0]
    ratio = row["monai"]["seconds"] / row["ours"]["seconds"]
    assert numbers(table, "demo")[-3] == pytest.approx(ratio, abs=0.01)


def test_growth(load, printed, monkeypatch):
    module = load("scaling")
    pretraining = load("pretrain_speed")
    shape = (24, 28, 24)
    tiny = pretraining.Row("demo", 2, 16, 4, shape, 8)
    monkeypatch.setattr(module, "rows", lambda cpu: (tiny, tiny))
    for name, value in {"NUM_CASES": 2, "SHAPE": shape, "NUM_SERIES": 2}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(pretraining, "NUM_CASES", 2)

    def alone(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        """What torchrun is given, as a single rank."""
        with monkeypatch.context() as changed, contextlib.redirect_stdout(io.StringIO()) as out:
            changed.setattr(sys, "argv", command[command.index(module.__file__) :])
            return subprocess.CompletedProcess(command, module.main(), out.getvalue(), "")

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=alone))
    subjects, ranks = printed(module, "--cpu", "-n", 1).split("ranks")
    # but for seconds to open, which may round to 0
    assert all(min(numbers(subjects, str(number))[3:]) > 0 for number in (2, 20, 200))
    assert all(min(numbers(ranks, str(number))) > 0 for number in (1, 2, 4))


@pytest.mark.slow
def test_two_ranks_share_a_batch(load):
    assert load("scaling").with_ranks(2, True, 1)["crops_per_second"] > 0


def test_cutting(load, printed, monkeypatch, tmp_path):
    module = load("loader_speed")
    monkeypatch.setattr(module, "SHAPE", (24, 32, 24))
    sizes = ("-n", 2, "-patch", 16, 16, 16, "-batch", 2, "-threads", 1)
    table = printed(module, "-o", tmp_path, *sizes, "-s", 0.05, "-turns", 1)
    for bank in ("nnU-Net's loader", "mapped"):
        _, _, crops_per_second, *_ = numbers(table, bank)
        assert crops_per_second > 0
    rows = json.loads((tmp_path / "loader_speed.json").read_text())["rows"]
    assert all(row["crops_per_second"] > 0 and row["to_nnunet"] > 0 for row in rows)


def test_prediction(load, printed, monkeypatch, tmp_path):
    module = load("predict_speed")
    monkeypatch.setattr(module, "PATCH_SIZES", {"demo": (16, 16, 16)})
    case = ("-device", "cpu", "-preset", "demo", "-shape", 16, 24, 24, "-mirroring", "off")
    table = printed(module, *case, "-o", tmp_path / "speed")
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    for missing, row in zip(("none", "T1w", "T1w, T1ce"), rows, strict=True):
        assert len(numbers(table, missing)) == 13
        assert min(row["ours"].values()) > 0 and min(row["stock"].values()) > 0
        assert row["labels_differ"] < 0.01


def test_fingerprint(load, printed, monkeypatch, tmp_path):
    module = load("fingerprint_speed")
    measured = module.run

    def run(command: list[str], *where: Any) -> Any:
        """nnU-Net's command, which takes half a minute, is only looked for."""
        stock = command[0].endswith("nnUNetv2_extract_fingerprint")
        assert Path(command[0]).is_file()
        return measured([sys.executable, "-c", "import numpy"] if stock else command, *where)

    monkeypatch.setattr(module, "run", run)
    table = printed(module, "-o", tmp_path, "-n", 2, "-np", 1)
    for command in ("nnUNetv2_extract_fingerprint", "nnunet_csm fingerprint", "nnunet_csm fingerprint, again"):
        cases, seconds, _, peak, ratio = numbers(table, command)
        assert cases == 1 and seconds > 0 and peak > 0 and ratio > 0
    assert min(numbers(table, "one case in one process:")[:3]) > 0


def test_threshold(load, printed, nnunet_folders):
    folder = load("fingerprint_speed").write_dataset(nnunet_folders.raw, "Dataset021_Tiny", 2)
    shutil.copytree(folder / "imagesTr", folder / "imagesTs")
    table = printed(load("threshold_baseline"), "-d", 21, "-ref", folder / "labelsTr")
    assert all(0 < numbers(table, f"phantom_{number:04d}")[0] < 1 for number in range(2))
    # the cases of training are those of the test
    training, test = (re.search(rf"{part}.*?mean Dice (\d\.\d+)", table) for part in ("threshold", "test"))
    assert training and test and training[1] == test[1]


def test_decoder_speed(printed: Callable[..., str], load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    module = load("decoder_speed")
    monkeypatch.setattr(module, "ROWS", module.ROWS[:1])
    table = printed(module, "-n", 1)
    row = next(line for line in table.splitlines() if line.startswith("demo"))
    assert all(float(number) > 0 for number in row.split()[1:])


def test_a_stage_leaves_its_findings_and_one_that_fails_stops_no_other(
    load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = load("on_gpu")
    stages = tmp_path / "stages.py"
    stages.write_text(
        "import json, sys\n"
        "name, work, results, *flags = sys.argv[1:]\n"
        "row = {'stage': name, 'check': 'graphs', 'value': 'seen', 'passed': name != 'alive'}\n"
        "open(results, 'a').write(json.dumps(row) + chr(10))\n"
        "import os\n"
        "print(name, flags, os.environ.get('nnUNet_csm_graphs'))\n"
        "sys.exit(name == 'alive')\n"
    )
    monkeypatch.setattr(module, "STAGES_FILE", stages)
    monkeypatch.delenv("nnUNet_csm_graphs", raising=False)
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "-o", str(tmp_path / "out"), "--cpu", "-only", "alive", "equal"])
    assert module.main() == 1
    table, log = ((tmp_path / "out" / name).read_text() for name in ("table.txt", "log.txt"))
    assert "rehearsal" in table and "alive" in table and "exit code 1" in table and "1 checks passed, 1 failed" in table
    # what failed is not tried again
    assert "alive ['--cpu'] None" in log and "equal ['--cpu'] f" in log
    assert "nnUNet_csm_graphs=f" in capsys.readouterr().out


def test_stages_of_a_gpu_are_tried_on_a_cpu(load: Callable[[str], Any], tmp_path: Path) -> None:
    module = load("stages_equal")
    stage = module.Stage("alive", tmp_path, tmp_path / "results.jsonl", True, "quick", 1)
    module.alive(stage)
    module.attention(stage)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {"product", "math, masked, 192 keys"} <= {row["check"] for row in rows}
    assert all(row["passed"] for row in rows if "keys" in row["check"])

    def breaks() -> tuple[bool, str]:
        raise RuntimeError("the device is gone\nmore")

    stage.attempt("broken", breaks)
    last = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[-1])
    assert last["passed"] is False and last["value"] == "RuntimeError: the device is gone"
