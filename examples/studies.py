"""Studies as they come from an archive, and the table of them that `nnunet_csm convert table` reads: made-up brains with gliomas.

    python examples/studies.py -o studies                    # twelve labelled ones, two of them for the test: series.csv
    python examples/studies.py -o studies -unlabelled 24     # and unlabelled.csv

Every study is a folder with a file for each series that it has, on a grid of its own, and a mask of the tumour, drawn on
FLAIR. One series in ten is missing, and its row with it.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk

from nnunet_csm.phantom import PhantomSpec, draw_subject

# as an archive calls them -> name of the series, and the spacing in mm along (x, y, z) that they are stored at
FILES = {"flair": ("FLAIR", (2.5, 2.5, 4.0)), "t1gd": ("T1ce", (2.5, 2.5, 3.0)), "t2_tse": ("T2w", (2.0, 2.0, 5.0))}
SPEC = PhantomSpec(series=("FLAIR", "T1ce", "T2w"), shape=(24, 48, 48), missing_share=0.1)
NUM_LABELLED, NUM_TEST = 12, 2


def as_image(volume: np.ndarray) -> sitk.Image:
    """A volume (z, y, x) at the phantom's spacing."""
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(SPEC.spacing_mm[::-1])
    return image


def write_study(folder: Path, index: int, labelled: bool) -> list[dict[str, str]]:
    """Files of one study in a folder of its own, which is made; rows of the table, one a series, with paths relative to it."""
    subject = draw_subject(SPEC, index)
    folder.mkdir(parents=True)
    if labelled:
        sitk.WriteImage(as_image((subject.labels > 0).astype(np.uint8)), str(folder / "mask.nii.gz"))
    rows = []
    for file, (series, spacing) in FILES.items():
        if not subject.present[series]:
            continue
        image = as_image(np.rint(subject.series[series]).astype(np.int16))
        size = [round(n * old / new) for n, old, new in zip(image.GetSize(), image.GetSpacing(), spacing, strict=True)]
        frame = image.GetOrigin(), spacing, image.GetDirection()
        sitk.WriteImage(sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, *frame), str(folder / f"{file}.nii.gz"))
        mask = f"{folder.name}/mask.nii.gz" if labelled else ""
        rows.append({"subject": folder.name, "series": file, "path": f"{folder.name}/{file}.nii.gz", "mask": mask, "split": ""})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", default="studies", help="folder, which is made; default: studies")
    parser.add_argument("-unlabelled", type=int, default=0, metavar="N", help="this many further ones, without masks")
    args = parser.parse_args()
    out = Path(args.o)
    labelled = [write_study(out / f"S{index + 1:02d}", index, True) for index in range(NUM_LABELLED)]
    for rows in labelled[-NUM_TEST:]:
        for row in rows:
            row["split"] = "test"
    unlabelled = [write_study(out / f"U{index + 1:03d}", NUM_LABELLED + index, False) for index in range(args.unlabelled)]
    for name, studies in {"series.csv": labelled, "unlabelled.csv": unlabelled}.items():
        if studies:
            pd.DataFrame([row for rows in studies for row in rows]).to_csv(out / name, index=False)
            print(f"{len(studies)} studies in {out / name}")


if __name__ == "__main__":
    main()
