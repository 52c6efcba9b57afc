"""Prostate158: 158 biparametric MRI of the prostate at 3 T, with anatomy and tumour masks.

    prostate158_train/
      train.csv valid.csv     ID,t2,adc,dwi,t2_anatomy_reader1,t2_tumor_reader1,adc_tumor_reader1,...; paths relative to the CSV
      train/020/t2.nii.gz adc.nii.gz dwi.nii.gz
                t2_anatomy_reader1.nii.gz    1 central gland (central and transition zone), 2 peripheral zone
                adc_tumor_reader1.nii.gz     suspicious for cancer (PI-RADS 4 or 5), values above 0
                empty.nii.gz                 in place of a tumour mask where there is no tumour
    prostate158_test/         the same with test.csv and test/001 ... (19 cases, two readers)

Source: Adams et al., Computers in Biology and Medicine 2022, https://doi.org/10.1016/j.compbiomed.2022.105817;
https://doi.org/10.5281/zenodo.6481141 (train), https://doi.org/10.5281/zenodo.6592345 (test),
https://github.com/kbressem/prostate158. A case is a patient; training and validation go to imagesTr, test to imagesTs.
"""

from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Diagnosis, Mask, Release, Volume

from . import layout
from .masks import values_in
from .sheets import Row, read_sheet

COLUMNS = {"T2w": "t2", "ADC": "adc", "DWI": "dwi"}
ANATOMY, TUMORS = "t2_anatomy_reader1", ("adc_tumor_reader1", "t2_tumor_reader1")
CENTRAL_GLAND, PERIPHERAL_ZONE = 1, 2
LABELS: Mapping[str, Mapping[str, int]] = {
    "prostate": {"background": 0, "prostate": 1},
    "zones": {"background": 0, "central gland": 1, "peripheral zone": 2},
    "tumor": {"background": 0, "tumor": 1},
}
ABOUT = {
    "description": "Prostate158: biparametric MRI of the prostate at 3 T",
    "reference": "https://doi.org/10.1016/j.compbiomed.2022.105817",
}


def read(release: Path, dataset_id: int, name: str, *, task: str = "prostate") -> Release:
    """Cases of Prostate158, each malignant (its first reader marked a tumour) or benign.

    `task`: what the mask is: "prostate" (as in the paper: the region that is classified), "zones", or "tumor" (the ADC's
    tumour mask, empty in benign cases). Tumour masks are read, which takes a minute. Raises `UserError`.
    """
    layout.require_folder(release)
    if task not in LABELS:
        raise UserError(f"-task {task!r} is unknown; choose from {', '.join(LABELS)}")
    cases, left_out, seen = list[Case](), dict[str, str](), dict[str, Row]()
    for row, test in tqdm(_rows(release), desc="reading tumour masks", unit="case"):
        identifier = row.require("ID").zfill(3)
        if identifier in seen:
            raise row.error(f"ID {identifier} is in {seen[identifier].path} line {seen[identifier].line} already; remove one")
        seen[identifier] = row
        try:
            cases.append(_case(identifier, row, task, test))
        except CaseError as error:
            left_out[identifier] = str(error)
    layout.require_cases(cases, release, left_out.values())
    malignant = sum(case.diagnoses[0].name == "malignant" for case in cases)
    dataset = Dataset(layout.dataset_name(dataset_id, name), tuple(COLUMNS), LABELS[task], about=ABOUT)
    return Release(dataset, tuple(cases), left_out, notes=(f"{malignant} malignant, {len(cases) - malignant} benign",))


def _rows(release: Path) -> list[tuple[Row, bool]]:
    """Rows of the three tables, each with whether it is of the test set; at least one table must be there."""
    required = ("ID", *COLUMNS.values(), ANATOMY, TUMORS[0])
    rows = list[tuple[Row, bool]]()
    for split in ("train", "valid", "test"):
        # the archives unpack to prostate158_train/ and prostate158_test/, the latter twice with some tools
        paths = sorted({path for depth in ("", "*/", "*/*/") for path in release.glob(f"{depth}{split}.csv")})
        if len(paths) > 1:
            raise UserError(f"{release} holds {split}.csv more than once: {', '.join(map(str, paths))}; remove the copies")
        rows += [(row, split == "test") for path in paths for row in read_sheet(path, required)]
    if not rows:
        raise layout.other_layout(release, "train.csv, valid.csv or test.csv (here or in prostate158_train/, prostate158_test/)")
    return rows


def _case(identifier: str, row: Row, task: str, test: bool) -> Case:
    images = {series: Volume(_file(row, column)) for series, column in COLUMNS.items() if row.get(column)}
    if not images:
        raise CaseError(f"{row.place} names no image")
    tumors = {column: values_in(path) for column, path in ((column, _file(row, column)) for column in TUMORS if row.get(column))}
    diagnosis = Diagnosis("malignant" if any(tumors.values()) else "benign")
    return Case(identifier, identifier, images, (_mask(row, task, tumors),), (diagnosis,), test)


def _mask(row: Row, task: str, tumors: Mapping[str, frozenset[int]]) -> Mask:
    if task == "tumor" and row.get(TUMORS[0]):
        # 1 in some files, 3 in others: every value above 0 is tumour
        return Mask(Volume(_file(row, TUMORS[0])), dict.fromkeys(tumors[TUMORS[0]], 1))
    if task == "tumor" and any(tumors.values()):
        raise CaseError(f"{row.place} names a tumour mask on T2w, but none on ADC")
    values = {
        "prostate": {CENTRAL_GLAND: 1, PERIPHERAL_ZONE: 1},
        "zones": {CENTRAL_GLAND: 1, PERIPHERAL_ZONE: 2},
        "tumor": {CENTRAL_GLAND: 0, PERIPHERAL_ZONE: 0},  # nothing but background: the reader saw no tumour
    }[task]
    if not row.get(ANATOMY):
        raise CaseError(f"{row.place} names no mask under {ANATOMY}")
    return Mask(Volume(_file(row, ANATOMY)), values)


def _file(row: Row, column: str) -> Path:
    return layout.existing(row.path.parent / row.get(column), f"{row.place}: {column} {row.get(column)}")
