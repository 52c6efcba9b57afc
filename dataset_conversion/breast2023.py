"""Breast lesions, benign or malignant, in the shape of the paper's in-house Breast2023; bring your own data in this layout.

    RELEASE/
      lesions.csv                    one row a lesion, several lesions a patient
      images/PATIENT/T1ce.nii.gz     also DWI, T2w; a series the patient does not have is left out
      masks/P001_1.nii.gz            on the grid of any of the patient's series

    patient,lesion,class,mask,value,split
    P001,1,malignant,masks/P001_1.nii.gz,,train
    P001,2,benign,masks/P001_2.nii.gz,,train
    P002,1,benign,masks/P002.nii.gz,1,test
    P002,2,benign,masks/P002.nii.gz,2,test

`mask` is relative to lesions.csv. `value` is the lesion's value in a mask file that several lesions share; without it the file
holds one value above 0. `split` is optional, train or test. NIfTI, NRRD or MHA; an image may be a folder with a DICOM series.

Source: Section IV of the paper (arXiv 2412.07387): 515 lesions with T1ce, DWI, T2w, delineated by radiologists and confirmed by
pathology, split by patient. It does not describe files; the layout is ours. A case is a patient; its lesions are 1, 2, ... in
its mask, and nnU-Net's label is the region "lesion" that joins them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Diagnosis, Mask, Release, Volume

from . import layout
from .masks import voxels
from .sheets import Row, read_sheet

SERIES = ("T1ce", "DWI", "T2w")
CLASSES = {"benign": "benign", "malignant": "malignant"}
SPLITS = {"": "train", "train": "train", "test": "test"}


def read(release: Path, dataset_id: int, name: str) -> Release:
    """One case a patient, with one diagnosis a lesion. Reads the masks, to find lesions that overlap. Raises `UserError`."""
    layout.require_folder(release)
    if not (release / "lesions.csv").is_file() or not (release / "images").is_dir():
        raise layout.other_layout(release, "lesions.csv and images/")
    by_patient = _by_patient(read_sheet(release / "lesions.csv", ("patient", "lesion", "class", "mask")))
    cases, left_out, doubts, notes = list[Case](), dict[str, str](), list[str](), list[str]()
    for patient, rows in tqdm(by_patient.items(), desc="reading lesion masks", unit="patient"):
        try:
            case, overlaps = _case(release, patient, rows)
        except CaseError as error:
            left_out[patient] = str(error)
            continue
        cases.append(case)
        doubts += overlaps
    layout.require_cases(cases, release, left_out.values())
    if unlisted := sorted(path.name for path in (release / "images").iterdir() if _is_unlisted(path, by_patient)):
        notes.append(f"not read: {len(unlisted)} patients with images, but no row in lesions.csv, such as {unlisted[0]}")
    most = max(len(case.diagnoses) for case in cases)
    # joined in a region: the numbers of lesions tell lesions apart, they are nothing a segmenter could learn
    labels: dict[str, int | tuple[int, ...]] = {"background": 0, "lesion": tuple(range(1, most + 1)) if most > 1 else 1}
    dataset = Dataset(layout.dataset_name(dataset_id, name), SERIES, labels, (1,) if most > 1 else None)
    return Release(dataset, tuple(cases), left_out, tuple(doubts), (_count(cases), *notes))


def _by_patient(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows in the order of the table; raises `UserError` for what the table itself gets wrong."""
    by_patient: dict[str, list[Row]] = {}
    for row in rows:
        patient, lesion = row.require("patient"), row.require("lesion")
        if not layout.usable_name(patient):
            raise row.error(f"patient {patient!r} cannot be a file name; use letters, digits, '.', '-' and '_'")
        earlier = by_patient.setdefault(patient, [])
        for other in earlier:
            if other.get("lesion") == lesion:
                raise row.error(f"lesion {lesion} of patient {patient} is in line {other.line} already")
            if row.choose("split", SPLITS) != other.choose("split", SPLITS):
                raise row.error(f"patient {patient} is of another split than in line {other.line}; splits are by patient")
        row.require("mask")
        row.choose("class", CLASSES)
        if not (row.get("value") or "1").isdecimal() or row.get("value") == "0":
            raise row.error(f"'value' is {row.get('value')!r}; give the lesion's value in the mask, 1 or more")
        earlier.append(row)
    return by_patient


def _case(release: Path, patient: str, rows: Sequence[Row]) -> tuple[Case, list[str]]:
    """The case, and lines about lesions that overlap."""
    folder = release / "images" / patient
    images = {series: Volume(path) for series in SERIES if (path := layout.volume_named(folder, series))}
    if not images:
        msg = f"{folder} holds none of {', '.join(SERIES)}; there is {layout.listing(folder) if folder.is_dir() else 'no folder'}"
        raise CaseError(msg)
    arrays = {path: voxels(path) for path in dict.fromkeys(_mask_path(row) for row in rows)}
    values: dict[Path, dict[int, int]] = {path: {} for path in arrays}
    regions = list[tuple[Row, np.ndarray]]()
    overlaps = list[str]()
    for label, row in enumerate(rows, start=1):
        path = _mask_path(row)
        value = _value(row, arrays[path])
        if value in values[path]:
            raise CaseError(f"{row.place}: lesion {row.get('lesion')} has the file and value of another one")
        values[path][value] = label
        region = arrays[path] == value
        overlaps += [line for other, earlier in regions if (line := _overlap(row, region, other, earlier))]
        regions.append((row, region))
    diagnoses = tuple(Diagnosis(row.choose("class", CLASSES), label) for label, row in enumerate(rows, start=1))
    masks = tuple(Mask(Volume(path), values[path]) for path in arrays)
    return Case(patient, patient, images, masks, diagnoses, rows[0].choose("split", SPLITS) == "test"), overlaps


def _mask_path(row: Row) -> Path:
    return row.path.parent / row.get("mask")


def _value(row: Row, array: np.ndarray) -> int:
    """The lesion's value in its mask."""
    found = [int(value) for value in np.unique(array) if value]
    if not found or (row.get("value") and int(row.get("value")) not in found):
        what = f"value {row.get('value')}" if found else "voxel above 0"
        raise CaseError(f"{row.place}: {row.get('mask')} has no {what}")
    if not row.get("value") and len(found) > 1:
        raise CaseError(f"{row.place}: {row.get('mask')} has the values {found}; say in the column 'value' which is the lesion")
    return int(row.get("value") or found[0])


def _overlap(row: Row, region: np.ndarray, other: Row, earlier: np.ndarray) -> str | None:
    """Later lesions are painted over earlier ones. Masks of other shapes are not compared: their voxels are not the same."""
    if region.shape != earlier.shape or not (count := int((region & earlier).sum())):
        return None
    if count == int(earlier.sum()):
        raise CaseError(
            f"{row.path} lines {other.line} and {row.line}: lesion {row.get('lesion')} covers lesion {other.get('lesion')} wholly"
        )
    lesions = f"lesions {other.get('lesion')} and {row.get('lesion')}"
    return f"{row.get('patient')}: {lesions} overlap in {count} voxels, which can go to one of them only"


def _is_unlisted(path: Path, by_patient: Mapping[str, object]) -> bool:
    return path.is_dir() and not layout.is_hidden(path) and path.name not in by_patient


def _count(cases: Sequence[Case]) -> str:
    names = [diagnosis.name for case in cases for diagnosis in case.diagnoses]
    return f"{len(names)} lesions of {len(cases)} patients: {names.count('malignant')} malignant, {names.count('benign')} benign"
