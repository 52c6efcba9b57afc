"""The stages of `on_gpu.py`, each run as `python -P gpu_stages.py STAGE WORK RESULTS`."""

import argparse
import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from steps import MASKING, architecture_of, bare_pretrainer, masked_batch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nnunet_csm.plans import Reconstruction

# the phantom's dataset, and how it is planned: for the commands, and as large as it gets for the compiled run
DATASET, SMALL, LARGE = "900", "Small", "Large"
SUBJECT_SHAPE, NUM_TRAINING, NUM_TEST = (24, 48, 48), 10, 3
PRESETS: dict[str, dict[str, Any]] = {
    SMALL: {
        "inherits_from": "demo",
        "description": "a few steps",
        "pretraining": {"num_crops": 12 * 40 * 16, "iterations_per_epoch": 40, "val_iterations_per_epoch": 2},
        "finetuning": {"num_crops": 60, "iterations_per_epoch": 10, "val_iterations_per_epoch": 2},
        "classification": {"schedule": {"num_crops": 160, "passes": None, "iterations_per_epoch": 10}},
    },
    LARGE: {
        "inherits_from": "B",
        "description": "a hundred steps",
        "pretraining": {"num_crops": 100 * 64, "min_steps": 0, "iterations_per_epoch": 50, "val_iterations_per_epoch": 2},
    },
}
CONVERT = "from nnunetv2.dataset_conversion.convert_MSD_dataset import entry_point; entry_point()"


class Stage:
    """What a stage needs to know, and where it writes what it finds."""

    def __init__(self, name: str, work: Path, results: Path, cpu: bool, study: str, jobs: int) -> None:
        self.name, self.work, self.results, self.cpu, self.study, self.jobs = name, work, results, cpu, study, jobs
        self.device = torch.device("cpu" if cpu else "cuda")

    def found(self, check: str, value: object = "", passed: bool | None = None) -> None:
        """One line of the results, flushed: the process may be killed at any time."""
        row = {"stage": self.name, "check": check, "value": str(value), "passed": passed}
        with self.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)

    def attempt(self, check: str, do: Callable[[], tuple[bool | None, object]]) -> None:
        """A check that may fail in any way, and stops no other."""
        try:
            passed, value = do()
        except Exception as error:
            import traceback

            traceback.print_exc()
            passed, value = False, f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0][:160]}"
        self.found(check, value, passed)

    def command(self, *arguments: str, code: str = "") -> None:
        """Run a command of the package, or a line of Python."""
        how = ["-c", code] if code else ["-m", "nnunet_csm"]
        subprocess.run([sys.executable, "-P", *how, *arguments], check=True, stdin=subprocess.DEVNULL)

    @property
    def compiles(self) -> bool:
        """Whether networks are compiled, as trainers would decide."""
        from nnunet_csm.machine import why_not_compiled

        return not why_not_compiled(self.device.type)

    def on(self) -> list[str]:
        return ["-device", self.device.type]

    @property
    def prepared(self) -> Path:
        return self.work / "prepared"


def wait_for(path: Path, seconds: float, process: subprocess.Popen[bytes] | None = None) -> None:
    """Until another process has written it."""
    end = time.monotonic() + seconds
    while not path.exists():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"the process that was to write {path.name} ended with exit code {process.returncode}")
        if time.monotonic() > end:
            raise TimeoutError(f"{path} did not come within {seconds:.0f} s")
        time.sleep(0.2)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(do: Callable[[], object], device: torch.device, num: int) -> float:
    """The fastest of some calls."""
    best = float("inf")
    for _ in range(num):
        synchronize(device)
        begun = time.perf_counter()
        do()
        synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best


# --- data and alive ----------------------------------------------------------------------------------------------------------


def data(stage: Stage) -> None:
    """A phantom with classes, converted, planned and preprocessed; beside the first stages, since it takes the CPU only."""
    from nnunet_csm.phantom import PhantomSpec, write_task

    if stage.prepared.exists():
        return
    spec = PhantomSpec(shape=SUBJECT_SHAPE, spacing_mm=(5.0, 3.5, 3.5), diagnoses=True)
    task = stage.work / f"Task{DATASET}_Phantom"
    if not task.exists():
        write_task(spec, stage.work, NUM_TRAINING, NUM_TEST)
    raw = Path(os.environ["nnUNet_raw"]) / f"Dataset{DATASET}_Phantom"
    if not raw.exists():
        stage.command("-i", str(task), "-np", "2", code=CONVERT)
    shutil.copy(task / "classification.csv", raw)
    for name, preset in PRESETS.items():
        path = stage.work / f"{name}.json"
        path.write_text(json.dumps(preset))
        first = ["plan_and_preprocess"] if name == SMALL else ["plan"]
        stage.command(*first, "-d", DATASET, "-preset", str(path), "-overwrite_plans_name", name)
    stage.prepared.touch()
    write_large_cases(stage)


def write_large_cases(stage: Stage) -> None:
    """What `speed` reads."""
    from pretrain_speed import write_cases

    folder = stage.work / "large_cases"
    folder.mkdir(exist_ok=True)
    write_cases(folder, rows_of(stage)[0][1].shape)
    (folder / "whole").touch()


def empty(stage: Stage) -> None:
    """Free what trainers of earlier rows held, some of it in cycles."""
    gc.collect()
    if not stage.cpu:
        torch.cuda.empty_cache()


def alive(stage: Stage) -> None:
    from nnunet_csm.machine import why_not_compiled

    stage.found("torch, Python", f"{torch.__version__}, {sys.version.split()[0]}")
    if not stage.cpu:
        properties = torch.cuda.get_device_properties(0)
        stage.found("card", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {torch.version.cuda}")
        stage.found("free", f"{torch.cuda.mem_get_info()[0] / 2**30:.1f} GiB")
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    stage.found("gcc, Python.h", f"{shutil.which('gcc')}, {headers.is_file()}")
    stage.found("/dev/shm", f"{shutil.disk_usage('/dev/shm').total / 2**30:.1f} GiB; {os.cpu_count()} cores")
    if not stage.cpu:
        stage.attempt("compiles", lambda: (not (why := why_not_compiled("cuda")), why or "an addition"))
    n, dtype = (1024, torch.float32) if stage.cpu else (8192, torch.bfloat16)
    a = torch.randn(n, n, device=stage.device, dtype=dtype)
    stage.found("product", f"{2 * n**3 / seconds_of(lambda: a @ a, stage.device, 10) / 1e12:.2f} TFLOP/s")
    source = torch.empty(2**24 if stage.cpu else 2**33, dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)
    speed = 2 * source.numel() / seconds_of(lambda: target.copy_(source), stage.device, 5) / 1e12
    stage.found("copy, read and written", f"{speed:.2f} TB/s")


# --- equal -------------------------------------------------------------------------------------------------------------------


def equal(stage: Stage) -> None:
    from nnunet_csm.data.draws import Purpose
    from nnunet_csm.training.pretraining import MaskedBatches

    banks = open_banks(stage)
    row = small_row(stage)
    from pretrain_speed import settings_of

    batches = {
        name: MaskedBatches(bank, settings_of(row, 100), Purpose.TRAINING, range(row.batch_size)) for name, bank in banks.items()
    }

    def same() -> tuple[bool, str]:
        for step in range(12):
            expected, found = batches["mapped"](0, step), batches["gpu"](0, step)
            tensors = zip((expected[0], *expected[1].tensors), (found[0], *found[1].tensors), strict=True)
            for number, (one, other) in enumerate(tensors):
                if not one.equal(other.cpu()):
                    return False, f"tensor {number} of step {step} differs"
        return True, "12 batches: volumes and masks to the bit"

    stage.attempt("bank: gpu as mapped", same)
    graphs(stage, batches["gpu"], row)
    attention(stage)


def small_row(stage: Stage) -> Any:
    from pretrain_speed import Row

    return Row("CSM", "demo", 4, 32, 16, (70, 85, 70), 8)


def open_banks(stage: Stage) -> dict[str, Any]:
    """Both kinds, on the same files."""
    from pretrain_speed import MAX_SERIES, NUM_CASES, write_cases

    from nnunet_csm.data.bank import CaseFile, GpuBank, MappedBank, read

    folder = stage.work / "cases"
    if not (folder / f"case{NUM_CASES - 1}_seg.b2nd").exists():
        folder.mkdir(exist_ok=True)
        write_cases(folder, small_row(stage).shape)
    files = [CaseFile(f"case{n}", folder / f"case{n}.b2nd", MAX_SERIES, (0, 1, 2, 3)) for n in range(NUM_CASES)]
    contents = read(files)
    return {"mapped": MappedBank(contents, not stage.cpu), "gpu": GpuBank(contents, stage.device)}


def attention(stage: Stage) -> None:
    """Each kernel, forward and backward, against fp64: with a mask at lengths of which some are 64 modulo 128."""
    kinds = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
    unused: list[tuple[str, Callable[[], tuple[bool, str]]]] = []
    # the last as in the decoder, with other queries than keys
    for masked, length, num_keys in (
        (False, 192, 192),
        (False, 864, 864),
        (True, 192, 192),
        (True, 864, 864),
        (False, 224, 27),
    ):
        torch.manual_seed(0)
        given = [torch.randn(2, 4, n, 64).bfloat16().double() for n in (length, num_keys, num_keys)]
        mask = torch.rand(2, 1, 1, length) < 0.5 if masked else None
        expected = outcome(given, mask)
        for kind in kinds[:1] + kinds[3:] if stage.cpu else kinds:
            if masked and kind is SDPBackend.FLASH_ATTENTION and not stage.cpu:
                continue

            compare = partial(off_by, kind, given, mask, expected, stage.device)
            name = f"{kind.name.lower()}, {'masked, ' if masked else ''}{num_keys} keys"
            if masked and kind is SDPBackend.CUDNN_ATTENTION:
                # may fail (pytorch issue 196678), and is kept out of masked calls
                unused.append((f"{name} (not used)", compare))
            else:
                stage.attempt("attention" if kind is SDPBackend.CUDNN_ATTENTION else name, compare)
    for name, call in unused:
        # last, since an error of the device would go on in what comes after
        try:
            stage.found(name, call()[1])
        except Exception as error:
            stage.found(name, type(error).__name__)


def off_by(
    kind: SDPBackend, given: list[Tensor], mask: Tensor | None, expected: list[Tensor], device: torch.device
) -> tuple[bool, str]:
    """How far a kernel in bf16 is from what is expected."""
    with sdpa_kernel([kind]):
        found = outcome([tensor.to(device, torch.bfloat16) for tensor in given], None if mask is None else mask.to(device))
    pairs = zip(found, expected, strict=True)
    off = max(float((one.cpu().double() - other).norm() / other.norm()) for one, other in pairs)
    return off < 0.05, f"off by {off:.4f} of its norm, forward and gradients"


def outcome(given: list[Tensor], mask: Tensor | None) -> list[Tensor]:
    """Attention's result and the gradients of its inputs."""
    query, key, value = (tensor.detach().requires_grad_() for tensor in given)
    result = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return [result.detach(), *torch.autograd.grad(result.square().sum(), (query, key, value))]


def graphs(stage: Stage, batches: Any, row: Any) -> None:
    """Steps with graphs against steps without, from one seed; then a capture that fails."""
    a = architecture_of(4, (row.token_edge,) * 3, width=192, depth=3, num_heads=3, features=8, drop_path=0.0)
    decoder = Reconstruction(96, 2, 3, False, rebuilt_share=0.25)
    said: list[str] = []

    def trained(with_graphs: bool, num_steps: int, rate: float = 1e-3, draws: bool = True) -> tuple[Any, list[float]]:
        torch.manual_seed(0)
        trainer = bare_pretrainer(a, decoder, stage.device, stage.compiles, with_graphs and not stage.cpu)
        trainer.train_batches = batches
        if trainer.graphed is not None:
            trainer.graphed.report = trainer.graphed_with_draws.report = said.append
            trainer.graphed_with_draws.failed = not draws
        for group in trainer.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        losses = [trainer.learn(given(trainer, number)) for number in range(num_steps)]
        return trainer, [float(loss) for loss in losses]

    def given(trainer: Any, number: int) -> Any:
        keys = trainer.graphed is not None and batches.bank.where == "gpu"
        return batches.batch_key(0, number) if keys else batches(0, number)

    num_steps, expected = 12 if stage.cpu else 60, []

    def alone() -> tuple[bool, str]:
        expected.extend(trained(False, num_steps)[1])
        how = "compiled" if stage.compiles else "not compiled"
        return expected[-1] < expected[0], f"{how}, {num_steps} steps: loss {expected[0]:.3f} to {expected[-1]:.3f}"

    # where parts of a network do not compile although an addition does, later stages do without
    stage.attempt("compiles" if stage.compiles else "steps", alone)

    def compare(draws: bool) -> tuple[bool, str]:
        trainer, losses = trained(True, num_steps, draws=draws)
        off = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
        if stage.cpu:
            return off == 0, f"losses differ by {off:.1e}; no graphs on a CPU"
        num_graphs = len((trainer.graphed_with_draws if draws else trainer.graphed).graphs)
        return (
            off < 1e-3 and num_graphs == 3 and not said,
            f"losses differ by {off:.1e}; {num_graphs} graphs; {said or 'none lost'}",
        )

    if stage.cpu:
        stage.attempt("the same steps twice", lambda: compare(draws=False))
    else:
        stage.attempt("graphs", lambda: compare(draws=False))
        stage.attempt("graphs that make their batch", lambda: compare(draws=True))

    def unchanged() -> tuple[bool, str]:
        trainer, _ = trained(True, num_steps)
        for group in trainer.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(0.0)
            else:
                group["lr"] = 0.0
        before = [p.detach().clone() for p in trainer.network.parameters()]
        for number in range(num_steps, num_steps + 12):
            trainer.learn(given(trainer, number))
        after = list(trainer.network.parameters())
        same = all(one.equal(other) for one, other in zip(before, after, strict=True))
        return same, f"weights after {num_steps} steps, and 12 more at a learning rate of 0"

    stage.attempt("learning rate is read anew", unchanged)
    if not stage.cpu:
        stage.attempt("memory after a failed capture", lambda: failed_capture(a, decoder, stage, batches))


def failed_capture(a: Any, decoder: Reconstruction, stage: Stage, batches: Any) -> tuple[bool, str]:
    trainer = bare_pretrainer(a, decoder, stage.device, False, True)
    trainer.train_batches, trainer.graphed_with_draws.failed = batches, True
    said: list[str] = []
    trainer.graphed.report = said.append
    step = trainer.graphed.step

    def waits(*tensors: Tensor) -> Tensor:
        loss = step(*tensors)
        if torch.cuda.is_current_stream_capturing():
            float(loss)
        return loss

    trainer.graphed.step = waits
    reserved = []
    for number in range(80):
        trainer.learn(batches(0, number))
        reserved.append(torch.cuda.memory_reserved())
    torch.cuda.synchronize()
    grown = reserved[-1] / reserved[29]
    return bool(said) and grown < 1.05, f"{reserved[-1] / 2**20:.0f} MiB, {grown:.3f} of that 50 steps before; {said[:1]}"


# --- commands ----------------------------------------------------------------------------------------------------------------


def commands(stage: Stage) -> None:
    wait_for(stage.prepared, 180)
    results = Path(os.environ["nnUNet_results"]) / f"Dataset{DATASET}_Phantom"
    images = Path(os.environ["nnUNet_raw"]) / f"Dataset{DATASET}_Phantom" / "imagesTs"
    masks = stage.work / f"Task{DATASET}_Phantom" / "labelsTs"
    common = ["-d", DATASET, "-p", SMALL, *stage.on()]

    def interrupted() -> tuple[bool, str]:
        folder = results / f"nnUNetTrainerCSMPretrain__{SMALL}__3d_fullres" / "fold_0"
        run = [sys.executable, "-P", "-m", "nnunet_csm", "pretrain", *common]
        with subprocess.Popen(run, stdin=subprocess.DEVNULL) as process:
            try:
                wait_for(folder / "checkpoint_latest.pth", 100, process)
            finally:
                process.kill()
        stage.command("pretrain", *common, "--c")
        return (folder / "checkpoint_final.pth").is_file(), "a checkpoint after SIGKILL and --c"

    def finetuned(*flags: str, trainer: str) -> tuple[bool, str]:
        stage.command("finetune", *common, *flags)
        folder = results / f"{trainer}__{SMALL}__3d_fullres" / "fold_0" / "validation"
        return (folder / "summary.json").is_file(), "with its final validation"

    def predicted(missing: bool) -> tuple[bool, str]:
        source, out = images, stage.work / f"predicted_{missing}"
        if missing:
            source = stage.work / "without_T1w"
            shutil.copytree(images, source, dirs_exist_ok=True)
            for file in source.glob("*_0001.nii.gz"):
                file.unlink()
        shutil.rmtree(out, ignore_errors=True)
        stage.command("predict", *common, "-f", "0", "-i", str(source), "-o", str(out), "-npp", "1", "-nps", "1")
        return len(list(out.glob("*.nii.gz"))) == NUM_TEST, f"{NUM_TEST} cases{', without T1w' if missing else ''}"

    def classified() -> tuple[bool, str]:
        out = stage.work / "classes.csv"
        flags = ["-f", "0", "-i", str(images), "-m", str(masks), "-o", str(out), "--overwrite"]
        stage.command("classify", *common, *flags)
        return len(out.read_text().splitlines()) == NUM_TEST + 1, f"{NUM_TEST} cases"

    stage.attempt("pretrain, killed, --c", interrupted)
    # `equal` and `compiled` try it; a few steps are not worth the seconds
    os.environ["nnUNet_compile"] = "f"
    classifier = "nnUNetTrainerCSMClassifier"

    def segmentation() -> None:
        stage.attempt("finetune", lambda: finetuned(trainer="nnUNetTrainerCSM"))
        stage.attempt("predict", lambda: predicted(False))
        stage.attempt("predict, a series missing", lambda: predicted(True))

    def classification() -> None:
        stage.attempt("finetune, classifier", lambda: finetuned("-tr", classifier, trainer=classifier))
        stage.attempt("classify", classified)

    with ThreadPoolExecutor(2) as both:
        for done in [both.submit(segmentation), both.submit(classification)]:
            done.result()


# --- speed -------------------------------------------------------------------------------------------------------------------


def rows_of(stage: Stage) -> list[tuple[str, Any, bool]]:
    """Name, row, and whether graphs may be used; the most wanted first."""
    from pretrain_speed import Row

    if stage.cpu:
        small: dict[str, Any] = {"shape": (70, 85, 70), "token_edge": 8}
        return [("demo, batch 6", Row("CSM", "demo", 4, 32, 6, **small), True)]
    named = [("B", 64, True), ("B", 6, True), ("B", 6, False), ("B", 64, False), ("B", 256, True), ("S", 64, True)]
    return [(f"{p}, batch {b}{'' if g else ', no graphs'}", Row("CSM", p, 4, 96, b), g) for p, b, g in named]


def cache(stage: Stage) -> None:
    """Compile what `speed` will run, beside the stages before it, into one cache."""
    if stage.cpu:
        compiled_on_cpu(stage)
        return
    for name, row, with_graphs in rows_of(stage):
        if with_graphs and stage.compiles:
            # or shapes of other batches would be compiled for all batches, which `speed` will not ask for
            torch._dynamo.reset()
            begun = time.monotonic()
            trainer = bare_pretrainer(row.architecture, row.reconstruction, stage.device, True, False)
            for num_shown in (1, 2, 3):
                share = row.reconstruction.rebuilt_share
                volume, mask = masked_batch(row.architecture, row.patch_size, row.batch_size, num_shown, share)
                loss = trainer.learn((volume.to(stage.device).half(), mask.to(stage.device)))
                if num_shown == 1:
                    first = float(loss)
                    stage.found(f"first step from nothing: {name}", f"{time.monotonic() - begun:.1f} s, loss {first:.3f}")
            torch.cuda.synchronize()
            stage.found(f"compiled: {name}", f"{time.monotonic() - begun:.1f} s")
            del trainer, volume, mask
            empty(stage)


def compiled_on_cpu(stage: Stage) -> None:
    """The same code through the compiler of CPUs, on a network of a few numbers."""
    a = architecture_of(2, (4, 4, 4), width=24, depth=2, num_heads=2, features=4, drop_path=0.0)
    begun = time.monotonic()
    trainer = bare_pretrainer(a, Reconstruction(24, 1, 2, False, 0.25), stage.device, True, False)
    loss = float(trainer.learn(masked_batch(a, (8, 8, 8), 2, 1, 0.25)))
    stage.found("compiled, on a CPU", f"{time.monotonic() - begun:.1f} s, loss {loss:.3f}", bool(np.isfinite(loss)))


def speed(stage: Stage) -> None:
    import pretrain_speed

    from nnunet_csm.pretext.memory import CUDA_CONTEXT, pretraining_memory

    folder, rows = stage.work / "large_cases", rows_of(stage)
    if not (folder / "whole").exists():
        write_large_cases(stage)
    num_steps, graphs_wanted = 5 if stage.cpu else 60, os.environ.get("nnUNet_csm_graphs", "t")
    for name, row, with_graphs in rows:

        def step(row: Any = row, with_graphs: bool = with_graphs) -> tuple[bool | None, str]:
            os.environ["nnUNet_csm_graphs"] = graphs_wanted if with_graphs else "f"
            torch._dynamo.reset()
            found = pretrain_speed.measure(row, str(folder), num_steps, stage.device.type, stage.compiles)
            memory = pretraining_memory(row.architecture, row.reconstruction, MASKING, row.patch_size, row.batch_size)
            rate = found["crops_per_second"]
            return None, (
                f"{rate:.1f} crops/s, {1000 * row.batch_size / rate:.2f} ms; first step {found['first_step']:.1f} s; peak "
                f"{found['peak'] / 2**30:.2f} GiB, predicted {memory.total / 2**30:.2f} beside {CUDA_CONTEXT / 2**30:.0f}; "
                f"volumes: {found['where']}"
            )

        stage.attempt(f"step: {name}", step)
        os.environ["nnUNet_csm_graphs"] = graphs_wanted
        empty(stage)
    _, row, _ = rows[0]
    stage.attempt("kernels of a step", lambda: (None, kernels(stage, row, folder)))
    try:
        import monai  # noqa: F401
    except ImportError:
        stage.found("MONAI's MAE", "not installed")
        return
    for batch_size in dict.fromkeys((row.batch_size, 6)):
        other = dataclasses.replace(row, what="MONAI", batch_size=batch_size)

        def beside(row: Any = other) -> tuple[bool | None, str]:
            found = pretrain_speed.measure(row, str(folder), num_steps, stage.device.type, not stage.cpu)
            return None, f"{found['crops_per_second']:.1f} crops/s; peak {found['peak'] / 2**30:.2f} GiB"

        stage.attempt(f"MONAI's MAE, {other.preset}, batch {other.batch_size}", beside)


def kernels(stage: Stage, row: Any, folder: Path) -> str:
    """What the device does in ten steps, into the log; how long it has nothing to do, and the loader alone."""
    from pretrain_speed import csm_steps
    from torch.profiler import ProfilerActivity, profile

    torch._dynamo.reset()
    step, _ = csm_steps(row, folder, 100, stage.device, stage.compiles)
    for _ in range(2 if stage.cpu else 40):
        step()
    synchronize(stage.device)
    activity = ProfilerActivity.CPU if stage.cpu else ProfilerActivity.CUDA
    num_steps = 2 if stage.cpu else 10
    with profile(activities=[activity]) as profiled:
        begun = time.perf_counter()
        for _ in range(num_steps):
            step()
        synchronize(stage.device)
        elapsed = time.perf_counter() - begun
    averages = profiled.key_averages()
    order = "self_cpu_time_total" if stage.cpu else "self_device_time_total"
    print(averages.table(sort_by=order, row_limit=25, max_name_column_width=90), flush=True)
    busy = sum(getattr(one, order) for one in averages) / 1e6
    num_kernels = sum(one.count for one in averages if getattr(one, order) > 0) / num_steps
    milliseconds = 1000 * elapsed / num_steps
    return f"{milliseconds:.2f} ms a step, idle {1 - busy / elapsed:.1%}, {num_kernels:.0f} kernels (by time in the log)"


# --- predict, compiled, evidence ---------------------------------------------------------------------------------------------


def predict(stage: Stage) -> None:
    import predict_speed

    preset, shape = ("demo", (40, 60, 60)) if stage.cpu else ("B", (96, 160, 160))
    folder = stage.work / "case"
    folder.mkdir(exist_ok=True)
    predict_speed.write_case(folder, shape)
    plans = predict_speed.plans_of(preset, shape, 1.0)
    for missing in ((), predict_speed.SERIES[1:2]):

        def both(missing: tuple[str, ...] = missing) -> tuple[bool, str]:
            mirrored = not stage.cpu
            stock, ours = (
                predict_speed.measure(who, plans, folder, missing, mirrored, stage.device.type, 1) for who in (True, False)
            )
            differ = predict_speed.share_of_different_voxels(folder)
            # untrained networks in bf16 have many near ties
            return differ < (1e-4 if stage.cpu else 2e-2), (
                f"network {stock.network:.2f} s stock, {ours.network:.2f} s ours, {stock.network / ours.network:.2f} times; "
                f"whole case {stock.total / ours.total:.2f} times; labels differ in {differ:.1e} of the voxels"
            )

        stage.attempt(f"predict, {', '.join(missing) or 'nothing'} missing", both)


def compiled(stage: Stage) -> None:
    wait_for(stage.prepared, 60)
    name = SMALL if stage.cpu else LARGE
    fold = "1"

    def whole() -> tuple[bool, str]:
        begun = time.monotonic()
        stage.command("pretrain", "-d", DATASET, "-p", name, "-f", fold, *stage.on())
        results = Path(os.environ["nnUNet_results"]) / f"Dataset{DATASET}_Phantom"
        folder = results / f"nnUNetTrainerCSMPretrain__{name}__3d_fullres" / f"fold_{fold}"
        log = "\n".join(path.read_text() for path in folder.glob("training_log_*.txt"))
        wrong = [text for text in ("No CUDA graphs", "Not compiled") if text in log]
        rates = [line.split(": ")[-1] for line in log.splitlines() if "crops/s" in line]
        how = "neither compiled nor in graphs, on a CPU" if stage.cpu else ", ".join(wrong) or "compiled, in graphs"
        return not wrong, f"{time.monotonic() - begun:.0f} s in all; {rates[-1] if rates else 'no epoch'}; {how}"

    stage.attempt(f"pretrain {name} by the command", whole)


def evidence(stage: Stage) -> None:
    """Runs of a study until this process is killed; those that are done are not done again."""
    given = {path.name for variable in ("nnUNet_preprocessed", "nnUNet_raw") for path in Path(os.environ[variable]).iterdir()}
    datasets = sorted(name for name in given if name.startswith("Dataset") and not name.endswith("_Phantom"))
    if not datasets and not stage.cpu:
        stage.found("study", "no dataset in --data", False)
        return
    # as many workers as there are cores for each run
    os.environ["nnUNet_n_proc_DA"] = str(max(1, (os.cpu_count() or 1) // stage.jobs - 1))
    for dataset in datasets or [f"Dataset{DATASET}_Phantom"]:
        if not (Path(os.environ["nnUNet_preprocessed"]) / dataset / "nnUNetPlans.json").is_file():
            stage.command("plan_and_preprocess", "-d", dataset)
        flags = ["-dry_run"] if stage.cpu else ["-jobs", str(stage.jobs)]
        stage.command("study", stage.study, "-d", dataset, *stage.on(), *flags)
        stage.found("study", f"{stage.study} on {dataset}: {'would run' if stage.cpu else 'every run is done'}", True)


STAGES = {f.__name__: f for f in (data, alive, cache, equal, commands, speed, predict, compiled, evidence)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("work", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--study", default="quick")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    stage = Stage(args.stage, args.work, args.results, args.cpu, args.study, args.jobs)
    if args.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    STAGES[args.stage](stage)


if __name__ == "__main__":
    main()
