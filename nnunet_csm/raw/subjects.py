"""What a reader of a release hands over: cases, where their volumes lie, what their masks and classes mean."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nnunet_csm.errors import UserError


@dataclass(frozen=True)
class Volume:
    """One 3-D volume of a release: a file, one volume of a 4-D file, or a folder with one DICOM series.

    Attributes:
        path: NIfTI, NRRD, MHA, or a folder of DICOM files.
        index: of the volume in a 4-D file, from 0; None when the file must be 3-D.
    """

    path: Path
    index: int | None = None


@dataclass(frozen=True)
class Mask:
    """A mask and what its values mean: `values` maps a value of the file to a label of the dataset.

    A value above 0 that is not in `values` is an error. Masks of a case are painted in order, later ones over earlier ones.
    """

    volume: Volume
    values: Mapping[int, int]


@dataclass(frozen=True)
class Diagnosis:
    """A row of classification.csv: a class of the case, or of one lesion of it (`mask_label` is its label in the mask)."""

    name: str
    mask_label: int | None = None


@dataclass(frozen=True)
class Case:
    """One case to be written.

    Attributes:
        identifier: nnU-Net's name of the case.
        patient: the unit of splitting; cases of one patient stay on one side.
        images: canonical series name to its volume; a series the patient does not have is left out.
        masks: empty when there is none.
        diagnoses: empty when there is none.
        test: goes to imagesTs, its mask to labelsTs.
    """

    identifier: str
    patient: str
    images: Mapping[str, Volume]
    masks: tuple[Mask, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    test: bool = False


@dataclass(frozen=True)
class Dataset:
    """What `dataset.json` says.

    Attributes:
        name: DatasetXXX_Name.
        series: canonical names, in the order of the channels.
        labels: nnU-Net's: name to value, or to a list of values for regions; {} when no case has a mask.
        regions_class_order: nnU-Net's, with regions only.
        about: further entries of dataset.json (description, reference, licence).
    """

    name: str
    series: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]
    regions_class_order: tuple[int, ...] | None = None
    about: Mapping[str, str] = field(default_factory=dict)


class CaseError(UserError):
    """A case that cannot be used: it is left out with a report, or ends the conversion with `--strict`."""


@dataclass(frozen=True)
class Release:
    """What a reader of `dataset_conversion/` found in a release.

    Attributes:
        dataset: what `dataset.json` will say.
        cases: those that can be used, as far as the reader can tell without reading every voxel.
        left_out: identifiers of those that cannot, and why.
        doubts: lines about what the release leaves open and how it was decided; errors with `--strict`.
        notes: further lines to print: what was counted, renamed, ignored.
    """

    dataset: Dataset
    cases: tuple[Case, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    doubts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
