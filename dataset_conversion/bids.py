"""A BIDS folder: the standard names, walked without pybids; masks from its derivatives, a class from participants.tsv.

    participants.tsv                                  participant_id, and the column of -class_column
    sub-01/[ses-pre/]anat/sub-01[_ses-pre]_T1w.nii.gz
                          sub-01[_ses-pre]_ce-gad_T1w.nii.gz          T1ce
                          sub-01[_ses-pre]_acq-tra_run-1_T2w.nii.gz   one of several T2w: see below
                     dwi/ sub-01[_ses-pre]_dwi.nii.gz .bval           4-D: the first volume with its session's highest b
                          sub-01[_ses-pre]_ADC.nii.gz
    derivatives/PIPELINE/sub-01/[ses-pre/]anat/sub-01[_ses-pre]_label-lesion_mask.nii.gz   or _dseg.nii.gz, or beside the images

A case is a session, or a subject without sessions; the patient is the subject. Where a session has several files of one series,
the one of the mask's run, acquisition, ... is taken, of such the one with the fewest entities and the lowest run, and the others
are named. A mask that names a run, ... or a space that no image of its case has leaves the case out. Where there are masks of
several kinds (label-lesion_mask, desc-brain_mask, ...), `-mask` says which.

Source: https://bids-specification.readthedocs.io (magnetic resonance imaging; derivatives: masks and segmentations).
"""

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunet_csm.errors import UserError
from nnunet_csm.listing import all_below
from nnunet_csm.raw.series import canonical_series
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Diagnosis, Mask, Release, Volume

from . import layout
from .masks import inferred_labels, labels_of, parse_labels, values_in
from .sheets import read_sheet, words_for_none

DATATYPES = ("anat", "dwi", "swi", "perf")
# Suffixes that are one 3-D picture (or a diffusion series) to a network; others (bold, asl, maps of relaxation) are not read.
SUFFIXES = ("T1w", "T2w", "FLAIR", "PDw", "PD", "T2starw", "T2star", "dwi", "trace", "ADC", "swi", "SWI")
MASK_SUFFIXES = ("mask", "dseg")
# What a mask's name says of the mask itself; all else (run, acq, ce, ...) says which image it was drawn on.
OF_MASKS = ("label", "desc", "space", "res", "den", "atlas", "seg")
OWN_SPACES = ("orig", "native", "individual", "scanner")  # the space of the images, beside one called as an image is (T1w)
# s/mm²; some scanners write 5 or 50 for volumes without diffusion weighting, which show the opposite contrast
HIGHEST_B0 = 50.0


@dataclass(frozen=True)
class _Name:
    """A BIDS file name: `sub-01_ce-gad_T1w.nii.gz` has the entities {"sub": "01", "ce": "gad"} and the suffix T1w."""

    path: Path
    entities: Mapping[str, str]
    suffix: str

    @property
    def case(self) -> str:
        return "_".join(f"{key}-{self.entities[key]}" for key in ("sub", "ses") if key in self.entities)

    def drawn_on(self, image: "_Name") -> bool:
        """Whether a mask can have been drawn on an image: all that it names of the image is so."""
        return all(image.entities.get(key) == value for key, value in self.entities.items() if key not in OF_MASKS)

    def contradicts(self, image: "_Name") -> list[str]:
        """Entities that mask and image both name, and name differently."""
        return [key for key, value in self.entities.items() if key not in OF_MASKS and image.entities.get(key, value) != value]

    @property
    def rank(self) -> tuple[int, int, str]:
        """Order in which files of one series are preferred: plain before special, then the first run."""
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
    patients = {f"sub-{files[0].entities['sub']}" for files in found.values()}
    classes, doubts = _classes(release / "participants.tsv", class_column, patients) if class_column else ({}, [])
    masks, kind, left_out, lines, notes = _masks(release, found, mask)
    doubts += lines
    mask_of = {identifier: one.path for identifier, one in masks.items()}
    names = given or _label_names(mask_of, kind, left_out)
    dataset_labels, mapping = labels_of(mask_of, names, release)
    cases = list[Case]()
    for identifier, files in sorted(found.items()):
        if identifier in left_out:
            continue
        images, lines = _images(identifier, files, masks.get(identifier))
        doubts += lines
        if not images:
            reason = lines[0] if lines else f"{files[0].path.parent} holds no series that can be read"
            left_out[identifier] = reason
            continue
        patient = f"sub-{files[0].entities['sub']}"
        painted = (Mask(Volume(mask_of[identifier]), mapping),) if identifier in mask_of else ()
        diagnoses = (Diagnosis(classes[patient]),) if patient in classes else ()
        cases.append(Case(identifier, patient, images, painted, diagnoses))
    layout.require_cases(cases, release, left_out.values())
    series = tuple(one for one in _known_order() if any(one in case.images for case in cases))
    dataset = Dataset(layout.dataset_name(dataset_id, name), series, dataset_labels)
    return Release(dataset, tuple(cases), left_out, tuple(doubts), tuple(notes))


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
    if entities.get("run", "").isdecimal():
        entities["run"] = str(int(entities["run"]))  # run-01 is run-1
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


def _images(identifier: str, files: Sequence[_Name], mask: _Name | None) -> tuple[dict[str, Volume], list[str]]:
    """One volume a series, those that the mask was drawn on first, and lines about the files that were not taken."""
    by_series: dict[str, list[_Name]] = defaultdict(list)
    for file in files:
        series = _canonical(file.suffix)
        by_series["T1ce" if series == "T1w" and "ce" in file.entities else series].append(file)
    images, lines = dict[str, Volume](), list[str]()
    for series, candidates in by_series.items():
        volumes, highest = dict[Path, Volume](), dict[Path, float]()
        for file in candidates:
            try:
                volumes[file.path], highest[file.path] = _volume(file)
            except CaseError as error:
                lines.append(f"{identifier}: no {series} from {file.path.name}, because {error}")
        if not volumes:
            continue

        def preferred(file: _Name, highest: Mapping[Path, float] = highest) -> tuple[object, ...]:
            # a plain FLAIR is the FLAIR; one after contrast is taken where there is no other
            after_contrast = "ce" in file.entities and file.suffix != "T1w"
            return mask is not None and not mask.drawn_on(file), -highest[file.path], after_contrast, *file.rank

        first, *others = sorted((file for file in candidates if file.path in volumes), key=preferred)
        images[series] = volumes[first.path]
        if others:
            lines.append(f"{identifier}: {series} is {first.path.name}, not {', '.join(file.path.name for file in others)}")
        if mask and (keys := mask.contradicts(first)):
            lines.append(f"{identifier}: {series} is {first.path.name}, of another {keys[0]} than the mask {mask.path.name}")
    return images, lines


def _volume(file: _Name) -> tuple[Volume, float]:
    """The volume of a file that is taken and, of a diffusion series, its b-value (the highest); 0 where none is known.

    Raises `CaseError` for volumes without diffusion weighting and for a `.bval` that does not fit.
    """
    bval = file.path.parent / f"{layout.stem(file.path)}.bval"
    if file.suffix != "dwi" or not file.path.exists():  # a link to nothing leaves the case out when it is read
        return Volume(file.path), 0.0
    shape = layout.shape_of(file.path)
    num_volumes = shape[0] if len(shape) == 4 else 1
    if not bval.is_symlink() and not bval.is_file():
        if num_volumes > 1:
            msg = f"{file.path} has several volumes, but no {bval.name} beside it that says which has the highest b-value"
            raise CaseError(msg)
        if any(re.fullmatch("b0+", value.casefold()) for value in file.entities.values()):
            raise CaseError(f"{file.path} is called b = 0, which is not diffusion-weighted")
        return Volume(file.path, None if len(shape) == 3 else 0), 0.0
    layout.existing(bval, str(bval))
    try:
        b_values = [float(value) for value in bval.read_text(encoding="utf-8-sig").split()]
    except (OSError, ValueError):
        b_values = []
    if not b_values or not all(math.isfinite(value) and value >= 0 for value in b_values):
        raise CaseError(f"{bval} holds no b-values, expected a number from 0 on for each volume")
    if len(b_values) != num_volumes:
        raise CaseError(f"{bval} holds {len(b_values)} b-values, but {file.path.name} has {num_volumes} volumes; correct one")
    if (highest := max(b_values)) <= HIGHEST_B0:
        raise CaseError(f"{bval} tells of b = {highest:g} at most, which is not diffusion-weighted")
    return Volume(file.path, b_values.index(highest) if len(shape) == 4 else None), highest


def _classes(path: Path, column: str, patients: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Patient to class, and lines about rows and patients that do not find each other. Raises `UserError` without any class.

    The standard wants sub-01; many files have 01, and spreadsheets make 1 of it.
    """
    by_number: dict[str, list[str]] = defaultdict(list)
    for patient in sorted(patients):
        by_number[_number(patient)].append(patient)
    classes, rows_of = dict[str, str](), dict[str, int]()
    unknown, guessed = list[str](), list[str]()
    rows = read_sheet(path, ("participant_id", column))
    for row in rows:
        given = row.require("participant_id")
        patient = f"sub-{given.removeprefix('sub-')}"
        if patient not in patients:
            same_number = by_number.get(_number(patient), [])
            if len(same_number) != 1:
                unknown.append(given)
                continue
            patient = same_number[0]
            guessed.append(f"{given} is {patient}")
        if patient in rows_of:
            raise row.error(f"{given} is {patient}, which line {rows_of[patient]} is about already; keep one of them")
        rows_of[patient] = row.line
        if value := row.get(column):
            classes[patient] = value
    if not classes:
        msg = f"{path} tells the class ({column}) of none of the {len(patients)} subjects, such as {min(patients)}"
        others = f"; its rows are of {', '.join(unknown[:3])}" if unknown else ""
        raise UserError(f"{msg}{others}; fill it in, or leave -class_column out")
    without = sorted(set(patients) - rows_of.keys())
    said = {"taken by number": guessed, "rows of no subject": unknown, "subjects without a row": without}
    lines = [f"{path}: {what}: {', '.join(which)}" for what, which in said.items() if which]
    return classes, [*lines, *(f"{path}: {line}" for line in words_for_none(rows, column))]


def _number(patient: str) -> str:
    """What is left of sub-007 without zeros in front."""
    return patient.removeprefix("sub-").lstrip("0")


def _masks(
    release: Path, found: Mapping[str, Sequence[_Name]], wanted: str | None
) -> tuple[dict[str, _Name], str, dict[str, str], list[str], list[str]]:
    """Identifier to mask, their kind ("" without), cases with no mask but one of another image, doubts, and notes."""
    kinds: dict[str, dict[str, list[_Name]]] = defaultdict(lambda: defaultdict(list))
    misplaced: dict[str, dict[str, str]] = defaultdict(dict)
    strangers = list[str]()
    for path in () if wanted == "none" else sorted(_perhaps_masks(release)):
        file = _parsed(path)
        if file is None and layout.stem(path) and not layout.is_hidden(path) and re.search("mask|seg|roi|lesion", path.name):
            strangers.append(str(path.relative_to(release)))
        if file is None or file.suffix not in MASK_SUFFIXES or "task" in file.entities:  # functional images are not read
            continue
        if file.case not in found:
            strangers.append(str(path.relative_to(release)))
            continue
        kind = "_".join([*(f"{key}-{file.entities[key]}" for key in ("label", "desc") if key in file.entities), file.suffix])
        if problem := _belongs_elsewhere(file, found[file.case]):
            misplaced[kind][file.case] = problem
        else:
            kinds[kind][file.case].append(file)
    lines = list[str]()
    listed = ", ".join(strangers[:5]) + (f" and {len(strangers) - 5} more" if len(strangers) > 5 else "")
    notes = [f"files that look like masks but are of no case or not of BIDS' form: {listed}"] if strangers else []
    known: Mapping[str, Collection[str]] = kinds if wanted in kinds or (kinds and not wanted) else {**misplaced, **kinds}
    if wanted == "none" or not known:
        if wanted not in (None, "none"):
            raise UserError(f"-mask {wanted}: {release / 'derivatives'} holds no masks at all")
        return {}, "", {}, lines, notes
    if wanted not in known and (wanted or len(known) > 1):
        counted = ", ".join(f"{kind} ({len(masks)})" for kind, masks in sorted(known.items()))
        raise UserError(f"{release / 'derivatives'} holds masks of the kinds {counted}; choose with -mask KIND, or -mask none")
    kind = wanted or next(iter(known))
    chosen = dict[str, _Name]()
    for identifier, masks in kinds[kind].items():
        chosen[identifier], *others = sorted(masks, key=lambda mask: mask.rank)
        if others and _images_of(chosen[identifier]) == _images_of(others[0]):
            pair = f"{chosen[identifier].path} and {others[0].path}"
            raise UserError(f"{identifier} has two masks of the kind {kind}: {pair}; remove one")
        if others:
            names = ", ".join(mask.path.name for mask in others)
            lines.append(f"{identifier}: the mask is {chosen[identifier].path.name}, not {names}")
    return chosen, kind, {case: why for case, why in misplaced[kind].items() if case not in chosen}, lines, notes


def _perhaps_masks(release: Path) -> Iterator[Path]:
    for subject in release.glob("sub-*"):
        yield from all_below(subject)
    yield from (path for path in all_below(release / "derivatives") if path.name.startswith("sub-"))


def _images_of(mask: _Name) -> dict[str, str]:
    return {key: value for key, value in mask.entities.items() if key not in OF_MASKS}


def _belongs_elsewhere(mask: _Name, images: Sequence[_Name]) -> str:
    """Why a mask cannot be that of a case with these images; "" when it can."""
    space = mask.entities.get("space", OWN_SPACES[0])
    if space not in OWN_SPACES and space not in {image.suffix for image in images}:
        return f"its mask {mask.path} is in the space {space}, not in that of an image; give one in the space of the images"
    if any(mask.drawn_on(image) for image in images):
        return ""
    names = ", ".join(image.path.name for image in images)
    return (
        f"its mask {mask.path} is of another run, acquisition, ... than each of its images: {names}; rename it, or add the image"
    )


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
