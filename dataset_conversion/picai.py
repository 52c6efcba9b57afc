"""PI-CAI: Public Training and Development Dataset, 1,500 biparametric MRI of the prostate from 1,476 patients.

    picai_public_images_fold0/ ... fold4/    or all patients in one folder, at any depth below the release
      10000/10000_1000000_t2w.mha  _adc.mha _hbv.mha  _cor.mha _sag.mha      PATIENT/PATIENT_STUDY_SERIES, each on its own grid
    picai_labels/                            or picai_labels-main/
      clinical_information/marksheet.csv     patient_id, study_id, ..., case_ISUP, case_csPCa (YES: ISUP >= 2, or NO)
      csPCa_lesion_delineations/human_expert/resampled/10000_1000000.nii.gz  on the T2W grid; 0, or ISUP grade 2, 3, 4, 5
      csPCa_lesion_delineations/human_expert/Pooch25/10008_1000008.nii.gz    205 further cases; 0 or 1 (ISUP >= 2)
      anatomical_delineations/whole_gland/AI/{Bosma22b,Guerbet23}/10000_1000000.nii.gz

Source: https://pi-cai.grand-challenge.org, https://doi.org/10.5281/zenodo.6624726 (images),
https://github.com/DIAGNijmegen/picai_labels (labels). A case is a study; studies of one patient stay together. The coronal
and sagittal T2W are not read: they show other places of the same series.
"""

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from nnunet_csm.errors import UserError
from nnunet_csm.listing import all_below
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Diagnosis, Mask, Release, Volume

from . import layout
from .sheets import read_sheet

SERIES = {"t2w": "T2w", "adc": "ADC", "hbv": "DWI"}
IMAGE_NAME = re.compile(r"(?P<patient>\d+)_(?P<study>\d+)_(?P<series>t2w|adc|hbv)\.mha")
LESION_FOLDERS = tuple(Path("csPCa_lesion_delineations/human_expert") / name for name in ("resampled", "Pooch25"))
GLAND_FOLDER = Path("anatomical_delineations/whole_gland/AI")
GLAND_FOLDERS = (GLAND_FOLDER / "Bosma22b", GLAND_FOLDER / "Guerbet23", GLAND_FOLDER)  # the first release had no subfolders
LABELS: Mapping[str, Mapping[str, int]] = {
    "both": {"background": 0, "prostate": 1, "lesion": 2},
    "gland": {"background": 0, "prostate": 1},
    "lesion": {"background": 0, "lesion": 1},
}
ABOUT = {
    "description": "PI-CAI: Public Training and Development Dataset",
    "reference": "https://doi.org/10.5281/zenodo.6624726",
    "licence": "CC BY-NC 4.0",
}


def read(release: Path, dataset_id: int, name: str, *, task: str = "both") -> Release:
    """Studies of PI-CAI, each "significant" (csPCa, ISUP >= 2) or "insignificant".

    `task`: what the mask is: "both" (the gland, and the lesions painted over it), "gland", or "lesion". Raises `UserError`.
    """
    layout.require_folder(release)
    if task not in LABELS:
        raise UserError(f"-task {task!r} is unknown; choose from {', '.join(LABELS)}")
    studies = _studies(release)
    labels_folder = _labels_folder(release)
    classes = _classes(labels_folder / "clinical_information" / "marksheet.csv")
    cases, left_out = list[Case](), dict[str, str]()
    for (patient, study), images in sorted(studies.items()):
        identifier = f"{patient}_{study}"
        try:
            masks = _masks(labels_folder, identifier, task)
            if identifier not in classes:
                raise CaseError(f"{identifier} is not in marksheet.csv, so that its class is unknown")
            cases.append(Case(identifier, patient, images, masks, (Diagnosis(classes[identifier]),)))
        except CaseError as error:
            left_out[identifier] = str(error)
    layout.require_cases(cases, release, left_out.values())
    significant = sum(case.diagnoses[0].name == "significant" for case in cases)
    dataset = Dataset(layout.dataset_name(dataset_id, name), tuple(SERIES.values()), LABELS[task], about=ABOUT)
    notes = [f"{significant} significant, {len(cases) - significant} insignificant"]
    if without := sorted(classes.keys() - {f"{patient}_{study}" for patient, study in studies}):
        notes.append(f"{len(without)} studies of marksheet.csv have no images here, such as {without[0]}")
    return Release(dataset, tuple(cases), left_out, notes=tuple(notes))


def _studies(release: Path) -> dict[tuple[str, str], dict[str, Volume]]:
    """(patient, study) to its volumes in the order of SERIES."""
    found: dict[tuple[str, str], dict[str, Volume]] = defaultdict(dict)
    for path in sorted(path for path in all_below(release) if path.name.endswith(".mha")):
        if (match := IMAGE_NAME.fullmatch(path.name)) is None:
            continue
        images = found[match["patient"], match["study"]]
        series = SERIES[match["series"]]
        if series in images:
            raise UserError(f"{path.name} is there twice, in {images[series].path.parent} and {path.parent}; remove one of them")
        images[series] = Volume(path)
    if not found:
        raise layout.other_layout(release, "images such as picai_public_images_fold0/10000/10000_1000000_t2w.mha")
    return {key: {one: images[one] for one in SERIES.values() if one in images} for key, images in found.items()}


def _labels_folder(release: Path) -> Path:
    """The checkout of picai_labels: the release itself or a folder in it."""
    folders = [path for path in (release, *sorted(release.iterdir())) if (path / "clinical_information").is_dir()]
    if not folders:
        looked_for = "picai_labels/clinical_information (git clone https://github.com/DIAGNijmegen/picai_labels into the release)"
        raise layout.other_layout(release, looked_for)
    return folders[0]


def _classes(marksheet: Path) -> dict[str, str]:
    """Identifier to class."""
    rows = read_sheet(marksheet, ("patient_id", "study_id", "case_csPCa"))
    choices = {"yes": "significant", "no": "insignificant"}
    classes: dict[str, str] = {}
    for row in rows:
        identifier = f"{row.require('patient_id')}_{row.require('study_id')}"
        if identifier in classes:
            raise row.error(f"study {identifier} is there twice; remove one of its lines")
        classes[identifier] = row.choose("case_csPCa", choices)
    return classes


def _masks(labels_folder: Path, identifier: str, task: str) -> tuple[Mask, ...]:
    """Masks in the order they are painted. Raises `CaseError` where the release has none: a blank would say there is nothing."""
    gland = _first(labels_folder, GLAND_FOLDERS, identifier)
    lesion = _first(labels_folder, LESION_FOLDERS, identifier)
    if task != "lesion" and gland is None:
        raise CaseError(f"{identifier} has no gland mask in {labels_folder / GLAND_FOLDERS[0]} or {GLAND_FOLDERS[1].name}")
    if task != "gland" and lesion is None:
        raise CaseError(f"{identifier} has no lesion mask in {labels_folder / LESION_FOLDERS[0]} or {LESION_FOLDERS[1].name}")
    label = LABELS[task]
    masks = []
    if "prostate" in label and gland:
        masks.append(Mask(Volume(gland), {1: label["prostate"]}))
    if "lesion" in label and lesion:
        masks.append(Mask(Volume(lesion), dict.fromkeys((1, 2, 3, 4, 5), label["lesion"])))
    return tuple(masks)


def _first(labels_folder: Path, folders: tuple[Path, ...], identifier: str) -> Path | None:
    paths = (labels_folder / folder / f"{identifier}.nii.gz" for folder in folders)
    return next((path for path in paths if os.path.lexists(path)), None)
