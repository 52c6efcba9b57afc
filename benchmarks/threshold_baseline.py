"""What a single threshold on one series reaches: the floor that a trained segmenter has to beat.

The series is z-scored over its nonzero voxels in every case; the threshold with the best mean Dice over the training cases is
applied to the test cases. Foreground is every label above 0.

    python benchmarks/threshold_baseline.py -d 21 -series 0 -ref Task21_GliomaLGG/labelsTs
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_csm import nnunet
from nnunet_csm.errors import exit_on_user_error


def read(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def cases(images: Path, labels: Path, channel: int, ending: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, z-scored series and foreground of every case that has a label."""
    for label in tqdm(sorted(labels.glob(f"*{ending}")), desc=images.name, unit="case", disable=None):
        name = label.name.removesuffix(ending)
        volume = read(images / f"{name}_{channel:04d}{ending}").astype(np.float32)
        inside = volume != 0
        if inside.any():
            volume[inside] = (volume[inside] - volume[inside].mean()) / volume[inside].std()
        yield name, np.where(inside, volume, -np.inf), read(label) > 0


def dice(found: np.ndarray, expected: np.ndarray) -> float:
    both = found.sum() + expected.sum()
    return 2 * float((found & expected).sum()) / float(both) if both else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, help="dataset name or ID")
    parser.add_argument("-series", type=int, default=0, help="channel number")
    parser.add_argument("-ref", type=Path, required=True, help="reference segmentations of imagesTs")
    args = parser.parse_args()
    with exit_on_user_error():
        raw = nnunet.folder("nnUNet_raw") / nnunet.dataset_name(args.d)
        ending = nnunet.read_json(raw / "dataset.json", "convert the dataset first")["file_ending"]
    thresholds = np.arange(0.0, 4.0, 0.05)
    training = [
        [dice(volume > t, label) for t in thresholds]
        for _, volume, label in cases(raw / "imagesTr", raw / "labelsTr", args.series, ending)
    ]
    means = np.nanmean(training, axis=0)
    best = float(thresholds[means.argmax()])
    scores = {n: dice(v > best, label) for n, v, label in cases(raw / "imagesTs", args.ref, args.series, ending)}
    for name, score in scores.items():
        print(f"{name:<24} {score:.3f}")
    values = np.array(list(scores.values()))
    print(f"threshold {best:.2f} (mean Dice {means.max():.3f} over {len(training)} training cases)")
    print(f"test: mean Dice {np.nanmean(values):.3f}, median {np.nanmedian(values):.3f}, n {np.isfinite(values).sum()}")


if __name__ == "__main__":
    main()
