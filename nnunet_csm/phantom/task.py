"""Subjects as a task of the Medical Segmentation Decathlon."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.files import whole_folder
from nnunet_csm.phantom.anatomy import Triple
from nnunet_csm.phantom.subject import PhantomSpec, Subject, draw_subject


def _as_image(volume: np.ndarray, spacing_mm: Triple) -> sitk.Image:
    """(z, y, x) array with spacing in the same order to an image with the identity direction."""
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(spacing_mm[::-1])
    return image


def _write_case(spec: PhantomSpec, subject: Subject, image_path: Path, label_path: Path) -> None:
    """The series as one 4-D int16 image in the order of `spec.series`, as MSD stores them, and the labels."""
    volumes = [_as_image(np.rint(subject.series[name]).astype(np.int16), spec.spacing_mm) for name in spec.series]
    sitk.WriteImage(sitk.JoinSeries(volumes, 0.0, 1.0), str(image_path), useCompression=True)
    sitk.WriteImage(_as_image(subject.labels, spec.spacing_mm), str(label_path), useCompression=True)


def write_task(
    spec: PhantomSpec, folder: Path, num_training: int, num_test: int, task_id: int = 900, name: str = "Phantom"
) -> Path:
    """Write a Medical Segmentation Decathlon task to `folder`/TaskXXX_Name and return that path.

    Subjects 0 to num_training - 1 are training cases, the next num_test are test cases. Besides MSD's files there are
    labelsTs and `cases.csv`: which series each case has (an absent one is stored as zeros) and whether its tumour
    enhances; with diagnoses also `classification.csv`, for nnU-Net's raw dataset folder, and `classes_test.csv`. The
    task appears whole or not at all. Raises UserError where it exists already or its name would not convert.
    """
    folder = Path(folder)
    target = folder / f"Task{task_id:02d}_{name}"
    if target.exists():
        raise UserError(f"{target} exists; move it away, or choose another task id or name")
    if not name.isalnum():
        raise UserError(
            f"task name {name!r} must be letters and digits only, as nnUNetv2_convert_MSD_dataset splits at underscores"
        )
    if num_training < 1 or num_test < 0:
        raise UserError(f"num_training {num_training} must be at least 1 and num_test {num_test} at least 0")

    cases = [f"phantom_{index:03d}" for index in range(num_training + num_test)]
    rows = []
    with whole_folder(target, overwrite=False) as task:
        for subfolder in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (task / subfolder).mkdir()
        for index, case in enumerate(tqdm(cases, desc=target.name, unit="subject")):
            split = "Tr" if index < num_training else "Ts"
            subject = draw_subject(spec, index)
            _write_case(spec, subject, task / f"images{split}" / f"{case}.nii.gz", task / f"labels{split}" / f"{case}.nii.gz")
            present = {series: int(subject.present[series]) for series in spec.series}
            rows.append(
                {"case": case, "split": split, **present, "enhancing": int(subject.enhancing), "class": subject.diagnosis}
            )
        table = pd.DataFrame(rows)
        table.drop(columns="class").to_csv(task / "cases.csv", index=False)
        if spec.diagnoses:
            for split, file in (("Tr", "classification.csv"), ("Ts", "classes_test.csv")):
                table.loc[table["split"] == split, ["case", "class"]].to_csv(task / file, index=False)
        description = _dataset_json(spec, name, cases[:num_training], cases[num_training:])
        (task / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    return target


def _dataset_json(spec: PhantomSpec, name: str, training: list[str], test: list[str]) -> dict[str, object]:
    """MSD's description of a task; "modality" is its own word for series."""
    return {
        "name": name,
        "description": "Synthetic multi-series brain MRI with gliomas",
        "reference": f"nnunet_csm.phantom, seed {spec.seed}",
        "licence": "generated, no subject's data",
        "release": "1.0",
        "tensorImageSize": "4D",
        "modality": {str(channel): series for channel, series in enumerate(spec.series)},
        "labels": {str(value): label for value, label in enumerate(("background", *spec.labelled))},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [{"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in training],
        "test": [f"./imagesTs/{case}.nii.gz" for case in test],
    }
