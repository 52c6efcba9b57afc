"""A BIDS folder: the standard names, walked without pybids; masks from its derivatives, a class from participants.tsv.

    participants.tsv                                  participant_id, and the column of -class_column
    sub-01/[ses-pre/]anat/sub-01[_ses-pre]_T1w.nii.gz
                          sub-01[_ses-pre]_ce-gad_T1w.nii.gz          T1ce
                          sub-01[_ses-pre]_acq-tra_run-1_T2w.nii.gz   one of several T2w: see below
                     dwi/ sub-01[_ses-pre]_dwi.nii.gz .bval           4-D: the first volume with the highest b-value
                          sub-01[_ses-pre]_ADC.nii.gz
    derivatives/PIPELINE/sub-01/[ses-pre/]anat/sub-01[_ses-pre]_label-lesion_mask.nii.gz   or _dseg.nii.gz

A case is a session, or a subject without sessions; the patient is the subject. Where a session has several files of one series,
the one with the fewest entities and the lowest run is taken and the others are named. Where the derivatives hold masks of
several kinds (label-lesion_mask, desc-brain_mask, ...), `-mask` says which.

Source: https://bids-specification.readthedocs.io (magnetic resonance imaging; derivatives: masks and segmentations).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_csm.errors import UserError
from nnunet_csm.raw.series import canonical_series
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Diagnosis, Mask, Release, Volume

from . import layout
from .masks import inferred_labels, labels_of, parse_labels, values_in
from .sheets import read_sheet

DATATYPES = ("anat", "dwi", "swi", "perf")
# Suffixes that are one 3-D picture (or a diffusion series) to a network; others (bold, asl, maps of relaxation) are not read.
SUFFIXES = ("T1w", "T2w", "FLAIR", "PDw", "PD", "T2starw", "T2star", "dwi", "trace", "ADC", "swi", "SWI")
MASK_SUFFIXES = ("mask", "dseg")


@dataclass(frozen=True)
class _Name:
    """A BIDS file name: `sub-01_ce-gad_T1w.nii.gz` has the entities {"sub": "01", "ce": "gad"} and the suffix T1w."""

    path: Path
    entities: Mapping[str, str]
    suffix: str

    @property
    def case(self) -> str:
        return "_".join(f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities)

    @property
    def rank(self) -> tuple[int, int, str]:
        """Of several files of one series the least is taken: plain before special, then the first run."""
        special = len(self.entities.keys() - {"sub", "ses", "run", "ce"})
        run = self.entities.get("run", "0")
        return special, int(run) if run.isdecimal() else 0, self.path.name


def read(
    release: Path,
    dataset_id: int,
    name: str,
    *,
    class_column: str | None = None,
    mask: str | None = None,
    labels: Sequence[str] = (),
) -> Release:
    """Cases of a BIDS folder.

    `class_column` of participants.tsv is the class; `mask` the kind of mask ("label-lesion_mask"), "none" for no masks; `labels`
    as typed (["edema=1"]), by default the value 1 of a `_mask` by its label, the values of a `_dseg` as label_1, ...
    Raises `UserError`.
    """
    layout.require_folder(release)
    given = parse_labels(labels)
    found = _files_by_case(release)
    classes = _classes(release / "participants.tsv", class_column) if class_column else {}
    mask_of, kind = _masks(release, found, mask)
    cases, left_out, doubts = list[Case](), dict[str, str](), list[str]()
    names = given or _label_names(mask_of, kind, left_out)
    dataset_labels, mapping = labels_of(mask_of, names, release)
    for identifier, files in sorted(found.items()):
        if identifier in left_out:
            continue
        images, lines = _images(identifier, files)
        doubts += lines
        if not images:
            left_out[identifier] = f"{files[0].path.parent} holds no series that can be read"
            continue
        patient = f"sub-{files[0].entities['sub']}"
        masks = (Mask(Volume(mask_of[identifier]), mapping),) if identifier in mask_of else ()
        diagnoses = (Diagnosis(classes[patient]),) if patient in classes else ()
        cases.append(Case(identifier, patient, images, masks, diagnoses))
    layout.require_cases(cases, release, left_out.values())
    series = tuple(one for one in _known_order() if any(one in case.images for case in cases))
    dataset = Dataset(layout.dataset_name(dataset_id, name), series, dataset_labels)
    return Release(dataset, tuple(cases), left_out, tuple(doubts))


def _known_order() -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(one for suffix in SUFFIXES for one in (_canonical(suffix), *(["T1ce"] if suffix == "T1w" else [])))
    )


def _canonical(suffix: str) -> str:
    return canonical_series([suffix])[0].canonical


def _parsed(path: Path) -> _Name | None:
    """The parts of a file name; None when it is no volume or not of BIDS' form."""
    stem = None if layout.is_hidden(path) else layout.stem(path)
    if stem is None:
        return None
    *pairs, suffix = stem.split("_")
    entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
    return _Name(path, entities, suffix) if len(entities) == len(pairs) and "sub" in entities else None


def _files_by_case(release: Path) -> dict[str, list[_Name]]:
    found: dict[str, list[_Name]] = defaultdict(list)
    for depth in ("sub-*", "sub-*/ses-*"):
        for datatype in DATATYPES:
            for path in sorted(release.glob(f"{depth}/{datatype}/*")):
                file = _parsed(path)
                if file and file.suffix in SUFFIXES and file.entities.get("part", "mag") == "mag":
                    found[file.case].append(file)
    if not found:
        raise layout.other_layout(release, "images such as sub-01/anat/sub-01_T1w.nii.gz")
    return found


def _images(identifier: str, files: Sequence[_Name]) -> tuple[dict[str, Volume], list[str]]:
    """One volume a series, and lines about the files that were not taken."""
    by_series: dict[str, list[_Name]] = defaultdict(list)
    for file in files:
        series = _canonical(file.suffix)
        by_series["T1ce" if series == "T1w" and "ce" in file.entities else series].append(file)
    images, lines = dict[str, Volume](), list[str]()
    for series, candidates in by_series.items():
        # a plain FLAIR is the FLAIR; one after contrast is taken where there is no other
        first, *others = sorted(candidates, key=lambda file: ("ce" in file.entities and file.suffix != "T1w", *file.rank))
        try:
            images[series] = _volume(first)
        except CaseError as error:
            lines.append(f"{identifier}: no {series}, because {error}")
            continue
        if others:
            lines.append(f"{identifier}: {series} is {first.path.name}, not {', '.join(file.path.name for file in others)}")
    return images, lines


def _volume(file: _Name) -> Volume:
    """A diffusion series with a `.bval` beside it gives its first volume of the highest b-value."""
    stem = layout.stem(file.path)
    bval = file.path.parent / f"{stem}.bval"
    if file.suffix != "dwi":
        return Volume(file.path)
    if not bval.is_file():
        if len(layout.shape_of(file.path)) == 3:
            return Volume(file.path)
        raise CaseError(f"{file.path} has several volumes, but no {bval.name} beside it that says which has the highest b-value")
    try:
        b_values = [float(value) for value in bval.read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        b_values = []
    if not b_values:
        raise CaseError(f"{bval} holds no b-values")
    return Volume(file.path, b_values.index(max(b_values)) if len(b_values) > 1 else None)


def _classes(path: Path, column: str) -> dict[str, str]:
    rows = read_sheet(path, ("participant_id", column))
    # the standard wants sub-01; many files have 01
    return {f"sub-{row.require('participant_id').removeprefix('sub-')}": row.get(column) for row in rows if row.get(column)}


def _masks(release: Path, found: Mapping[str, object], wanted: str | None) -> tuple[dict[str, Path], str]:
    """Identifier to mask, and the kind of the masks; {} and "" where there are none, or none are wanted."""
    kinds: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in sorted((release / "derivatives").rglob("sub-*")):
        file = _parsed(path)
        if wanted == "none" or file is None or file.suffix not in MASK_SUFFIXES or file.case not in found:
            continue
        kind = "_".join([*(f"{key}-{file.entities[key]}" for key in ("label", "desc") if key in file.entities), file.suffix])
        if file.case in kinds[kind] and kind == (wanted or kind):
            raise UserError(f"{file.case} has two masks of the kind {kind}: {kinds[kind][file.case]} and {path}; remove one")
        kinds[kind][file.case] = path
    if wanted == "none" or not kinds:
        if wanted not in (None, "none"):
            raise UserError(f"-mask {wanted}: {release / 'derivatives'} holds no masks at all")
        return {}, ""
    if wanted not in kinds and (wanted or len(kinds) > 1):
        counted = ", ".join(f"{kind} ({len(masks)})" for kind, masks in sorted(kinds.items()))
        raise UserError(f"{release / 'derivatives'} holds masks of the kinds {counted}; choose with -mask KIND, or -mask none")
    kind = wanted or next(iter(kinds))
    return kinds[kind], kind


def _label_names(mask_of: Mapping[str, Path], kind: str, left_out: dict[str, str]) -> dict[str, int]:
    """Names of values: that of a binary mask stands in its name, those of a segmentation are found by reading all of them."""
    if kind.endswith("mask"):
        entity = kind.removesuffix("mask").rstrip("_").partition("-")[2]
        return {entity.partition("_")[0] or "mask": 1}
    values = set[int]()
    for identifier, path in mask_of.items():
        try:
            values |= values_in(path)
        except CaseError as error:
            left_out[identifier] = str(error)
    return inferred_labels(values)
