"""Prediction of one case: `BatchedPredictor` beside nnU-Net's own predictor, with the same weights, in one run.

Each is measured in a process of its own, from files to files: reading, preprocessing (crop, normalisation, resampling), network
(the sliding window), export (resampling back, labels, file). On a GPU the network runs once before it is timed. Peak memory
is that of torch on a GPU, and that of the process on a CPU. The case is a phantom; a missing series is all zero.

    python benchmarks/predict_speed.py -o predict_speed                          # also predict_speed.json
    python benchmarks/predict_speed.py -device cpu -preset demo -shape 80 120 120  # small, where there is no GPU
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_csm.inference.sliding_window import BatchedPredictor
from nnunet_csm.machine import keep_freed_memory
from nnunet_csm.model.segmenter import CSMSegmenter
from nnunet_csm.phantom import LABELS, PhantomSpec, draw_subject
from nnunet_csm.planning.presets import read_preset
from nnunet_csm.plans import NETWORK_CLASS
from nnunet_csm.schema import Size, to_dict

SERIES = PhantomSpec().series
# what the planner makes of a preset for four series at 1 mm
PATCH_SIZES: dict[str, Size] = {"demo": (48, 48, 64), "S": (96, 96, 96), "B": (96, 96, 96)}
DATASET_JSON = {"channel_names": dict(enumerate(SERIES)), "labels": LABELS, "file_ending": ".nii.gz"}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds of the phases of one case, and bytes at the peak."""

    reading: float
    preprocessing: float
    network: float
    export: float
    peak: int

    @property
    def total(self) -> float:
        return self.reading + self.preprocessing + self.network + self.export


def plans_of(preset: str, shape: Size, spacing_mm: float) -> dict[str, Any]:
    """nnU-Net's plans with the network of a preset: as much of them as prediction reads."""
    read = read_preset(preset)
    architecture = read.architecture(SERIES, tuple(range(len(SERIES))), (read.token_edge,) * 3)
    resampling = {"order_z": 0, "force_separate_z": None}
    configuration: dict[str, Any] = {
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": PATCH_SIZES[preset],
        "spacing": [spacing_mm] * 3,
        "normalization_schemes": ["ZScoreNormalization"] * len(SERIES),
        "use_mask_for_norm": [True] * len(SERIES),
        "architecture": {"network_class_name": NETWORK_CLASS, "arch_kwargs": to_dict(architecture), "_kw_requires_import": []},
    }
    for what, order, is_seg in (("data", 3, False), ("seg", 1, True), ("probabilities", 1, False)):
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        configuration[f"resampling_fn_{what}_kwargs"] = {"is_seg": is_seg, "order": order, **resampling}
    return {
        "dataset_name": "Dataset999_Speed",
        "plans_name": "Speed",
        "original_median_shape_after_transp": shape,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(channel): {} for channel in range(len(SERIES))},
        "configurations": {"3d_fullres": configuration},
    }


def write_case(folder: Path, shape: Size) -> None:
    """The series of a phantom at 1 mm, and one all zero."""
    subject = draw_subject(PhantomSpec(shape=shape, spacing_mm=(1.0, 1.0, 1.0)), 0)
    for name, volume in {**subject.series, "zeros": np.zeros(shape)}.items():
        sitk.WriteImage(sitk.GetImageFromArray(np.rint(volume).astype(np.int16)), str(folder / f"{name}.nii.gz"))


def measure(
    stock: bool, plans: dict[str, Any], folder: Path, missing: tuple[str, ...], mirroring: bool, device_name: str, num_runs: int
) -> Measured:
    """Predict the case in `folder` and leave the segmentation there."""
    device = torch.device(device_name)
    on_gpu = device.type == "cuda"
    if not stock and not on_gpu:
        keep_freed_memory()
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    torch.manual_seed(0)
    network = CSMSegmenter(len(SERIES), len(LABELS), **configuration.network_arch_init_kwargs)
    with redirect_stdout(sys.stderr):
        predictor = (nnUNetPredictor if stock else BatchedPredictor)(device=device, use_mirroring=mirroring, allow_tqdm=False)
    predictor.manual_initialization(
        network, manager, configuration, [network.state_dict()], DATASET_JSON, "nnUNetTrainerCSM", (0, 1, 2)
    )
    marks = [time.perf_counter()]
    files = [str(folder / f"{'zeros' if name in missing else name}.nii.gz") for name in SERIES]
    image, properties = manager.image_reader_writer_class().read_images(files)
    marks.append(time.perf_counter())
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(image, None, properties, manager, configuration, DATASET_JSON)
    marks.append(time.perf_counter())
    runs = []
    for _ in range(num_runs + on_gpu):
        begun = time.perf_counter()
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data)).numpy()
        runs.append(time.perf_counter() - begun)
    exporting = time.perf_counter()
    output = str(folder / ("stock" if stock else "ours"))
    export_prediction_from_logits(logits, properties, configuration, manager, DATASET_JSON, output)
    export = time.perf_counter() - exporting
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reading, preprocessing = (float(seconds) for seconds in np.diff(marks))
    return Measured(reading, preprocessing, min(runs[on_gpu:]), export, peak)


def share_of_different_voxels(folder: Path) -> float:
    stock, ours = (sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{who}.nii.gz"))) for who in ("stock", "ours"))
    return float((stock != ours).mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-device", default="cuda", choices=("cuda", "cpu"), help="default: cuda")
    parser.add_argument("-preset", default="B", choices=tuple(PATCH_SIZES), help="default: B")
    parser.add_argument("-shape", nargs=3, type=int, default=(155, 240, 240), metavar=("Z", "Y", "X"), help="voxels of the case")
    parser.add_argument("-spacing", type=float, default=1.0, help="mm that the network works at; the case has 1 mm")
    parser.add_argument("-n", type=int, default=1, help="runs of the network, of which the fastest counts (default: 1)")
    parser.add_argument("-mirroring", choices=("on", "off", "both"), default="both", help="default: both")
    parser.add_argument("-o", help="writes this name with .json")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("Error: no CUDA device; measure on a machine with one, or give -device cpu and a small -shape", file=sys.stderr)
        return 2
    plans, shape = plans_of(args.preset, args.shape, args.spacing), tuple(args.shape)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    versions = ", ".join(f"{package} {version(package)}" for package in ("nnunet_csm", "nnunetv2", "torch"))
    machine = f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, {versions}"
    patch = " x ".join(map(str, PATCH_SIZES[args.preset]))
    lines = [
        f"{machine}; load {os.getloadavg()[0]:.1f}",
        f"preset {args.preset}, patch {patch}, {len(SERIES)} series of {' x '.join(map(str, shape))}",
        f"{'':<26}{'network, s':^22}{'whole case, s':^22}{'peak, GiB':^14}{'labels':>9}   ours spends on",
        f"{'series missing, passes':<26}{'stock':>7}{'ours':>7}{'ratio':>7} {'stock':>7}{'ours':>7}{'ratio':>7} "
        f"{'stock':>7}{'ours':>6}{'differ':>10}   network, resampling etc., reading",
    ]
    print("\n".join(lines))
    rows = []
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_case(folder, args.shape)
        for mirroring in {"both": (True, False), "on": (True,), "off": (False,)}[args.mirroring]:
            for missing in ((), SERIES[1:2], SERIES[1:3]):
                found = {}
                for who in ("stock", "ours"):
                    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh_process:
                        job = fresh_process.submit(
                            measure, who == "stock", plans, folder, missing, mirroring, args.device, args.n
                        )
                        found[who] = job.result()
                differ = share_of_different_voxels(folder)
                print(as_line(missing, mirroring, found["stock"], found["ours"], differ), flush=True)
                measured = {who: dataclasses.asdict(one) for who, one in found.items()}
                rows.append({"missing": missing, "mirroring": mirroring, "labels_differ": differ, **measured})
    if args.o:
        settings = {"preset": args.preset, "patch_size": PATCH_SIZES[args.preset], "shape": shape, "device": args.device}
        Path(f"{args.o}.json").write_text(json.dumps({"machine": machine, **settings, "rows": rows}, indent=1))
    return 0


def as_line(missing: tuple[str, ...], mirroring: bool, stock: Measured, ours: Measured, differ: float) -> str:
    pairs = ((stock.network, ours.network), (stock.total, ours.total))
    seconds = " ".join(f"{a:>7.2f}{b:>7.2f}{a / b:>6.2f}x" for a, b in pairs)
    shares = (ours.network, ours.preprocessing + ours.export, ours.reading)
    spent = ", ".join(f"{share / ours.total:.0%}" for share in shares)
    passes = 8 if mirroring else 1
    return (
        f"{', '.join(missing) or 'none':<22}{passes:>4}{seconds} {stock.peak / 2**30:>7.2f}{ours.peak / 2**30:>6.2f}"
        f"{differ:>10.1e}   {spent}"
    )


if __name__ == "__main__":
    sys.exit(main())
