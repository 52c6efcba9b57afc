"""The way out to a hospital: predictions as DICOM segmentations that refer to the series they were made from.

A segmentation has the frames, the patient and the study of its source. Voxels are laid on the source's grid one by one, turned or
flipped where the file has other axes, and never interpolated: a prediction on another grid is refused. What is written is read
back by pydicom and compared, plane by plane at its place in the patient. What a classifier says becomes a report: `dicom_report`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes as dicom_codes

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.regions import foreground_of
from nnunet_csm.figures.canvas import COLOURS
from nnunet_csm.listing import files_in
from nnunet_csm.raw.dicom import stack_in
from nnunet_csm.raw.dicom_frames import Frame
from nnunet_csm.raw.geometry import described_misfit, fit
from nnunet_csm.raw.grid import labels_of
from nnunet_csm.raw.subjects import CaseError, Mask, Volume
from nnunet_csm.raw.volumes import look_at, read_volume, sha256
from nnunet_csm.schema import read_value

from . import dicom_report
from .dicom_codes import MODIFIERS, Codes, Long, Segment, default_segment, read_codes, save_codes
from .dicom_files import DicomRequest, concept, equipment, following, highdicom_library, write_cases
from .dicom_sources import source_images
from .msd_task import labels_file

SAME_PLACE = 1e-3  # mm; DICOM's decimals are rounded to 16 characters


@dataclass(frozen=True)
class Structure:
    """A segment to write: its voxels are those with one of `values` in a label map."""

    values: tuple[int, ...]
    segment: Segment


def write(request: DicomRequest) -> list[Path]:
    """Write a DICOM segmentation of every prediction, and beside the folder the codes that were used.

    Raises:
        UserError: anything is wrong with any case; nothing is written then.
    """
    highdicom_library()
    if request.predictions.suffix == ".csv":
        return dicom_report.write(request)
    paths, content, ending = _predictions(request)
    codes = replace(Codes() if request.codes is None else read_codes(request.codes), algorithm=_algorithm(request.folder))
    structures = _structures(content, codes, request)
    cases = {path.name.removesuffix(ending): path for path in paths}

    def write_case(case: str, volume: Volume, file: Path) -> str:
        return _write_case(cases[case], volume, structures, codes, file)

    write_cases(request, cases, write_case)
    save_codes(codes, [structure.segment for structure in structures], request.used_codes)
    said = f"read back and found equal; their codes stand in {request.used_codes}, to be edited"
    print(f"{request.output}: {len(cases)} segmentation(s), {said}")
    return [request.output / f"{case}.dcm" for case in cases]


def _predictions(request: DicomRequest) -> tuple[list[Path], dict[str, Any], str]:
    """Label maps, the dataset.json that names their labels, and the ending of their names."""
    if not request.folder.is_dir():
        raise UserError(f"{request.predictions}: no such file or folder; give -i what nnUNetv2_predict wrote")
    file = labels_file(request.folder, request.labels_from)
    content = nnunet.read_dataset_json(file, "give -labels_from a dataset.json, or the name or ID of an nnU-Net dataset")
    ending = str(content["file_ending"])
    paths = [request.predictions] if request.predictions.is_file() else files_in(request.folder, ending)
    if not paths or not paths[0].name.endswith(ending):
        raise UserError(f"{request.predictions}: no label map {ending}, as {file} says; give -i what nnUNetv2_predict wrote")
    return paths, content, ending


def _structures(content: Mapping[str, Any], codes: Codes, request: DicomRequest) -> list[Structure]:
    """Labels, or regions as nnU-Net scores them, which may overlap; each with its codes. Prints which, and why those."""
    foreground = foreground_of(content["labels"])
    regions = any(len(values) > 1 for values in foreground.values())
    painted = content["regions_class_order"] if regions else [values[0] for values in foreground.values()]
    found = dict(zip(painted, foreground.items(), strict=True))
    if len(found) < len(foreground):
        raise UserError(
            f"dataset.json: regions_class_order is {painted}, expected a value of its own for each region; correct it"
        )
    if unknown := sorted(set(codes.segments) - set(found)):
        known = ", ".join(f"{value} {name}" for value, (name, _) in sorted(found.items()))
        raise UserError(f"{request.codes}: labelID {unknown[0]} is no label of the predictions, which have {known}; correct it")
    structures = []
    for number, (value, (name, values)) in enumerate(sorted(found.items())):
        segment, said = codes.segments.get(value), f"as {request.codes} has it"
        if segment is None:
            segment, said = default_segment(value, name, COLOURS[number % len(COLOURS)])
        label = segment.SegmentLabel or read_value(Long, name, f"dataset.json: labels.{name}")
        segment = replace(segment, SegmentLabel=label)
        print(f"{segment}; {said}")
        structures.append(Structure(values, segment))
    return structures


def _algorithm(folder: Path) -> tuple[str, str]:
    """Name and version of what made the predictions, as far as the plans beside them tell."""
    plans = folder / "plans.json"
    if not plans.is_file():
        return "nnU-Net", "not known"
    content = nnunet.read_plans(plans, "predict again")
    return f"nnU-Net {content['dataset_name']} {content['plans_name']}"[:64], f"plans {sha256(plans)[:16]}"


def _write_case(path: Path, volume: Volume, structures: Sequence[Structure], codes: Codes, file: Path) -> str:
    """Write the segmentation of one case and compare the file; what is in it, in a line. Raises `CaseError`."""
    frames, grid = stack_in(volume.path, volume.index)
    values = {value: value for structure in structures for value in structure.values}
    prediction, look = labels_of(read_volume(Volume(path)), Mask(Volume(path), values)), look_at(path)
    if not look.placed:
        raise CaseError(f"{path} holds neither sform nor qform: where it lies is not known; predict from images that say it")
    found = fit(look.places, [grid])
    if found is None:
        misfit = described_misfit(look.places[0], grid, f"the series in {volume.path}")
        raise CaseError(
            f"{path} {misfit}; is it of that patient? give the series whose grid the case's images had (the reference of their "
            "conversion), or bring the prediction to its grid first, by nearest neighbour"
        )
    label_map = sitk.GetArrayFromImage(found.applied(prediction))
    masks = np.stack([np.isin(label_map, structure.values) for structure in structures])
    with following(volume):
        sources = source_images(volume.path, frames, grid)
        data = segmentation(masks, frames, sources, [structure.segment for structure in structures], codes)
        data.save_as(file, enforce_file_format=True)
    if not reads_as(file, masks, frames):
        raise UserError(f"{file.name} does not read as it was written; is the disk full or damaged?")
    sizes = zip(structures, masks.sum((1, 2, 3)) * grid.voxel_volume / 1000, strict=True)
    listed = ", ".join(f"{structure.segment.SegmentLabel} {ml:.2f} ml" for structure, ml in sizes)
    doubts = "".join(f"; its header {remark}" for remark in look.remarks)
    return f"{listed}; voxels {found.said}, on {len(frames)} slices of {volume.path}{doubts}"


def segmentation(
    masks: np.ndarray, frames: Sequence[Frame], sources: Sequence[Dataset], segments: Sequence[Segment], codes: Codes
) -> Dataset:
    """A DICOM segmentation of `masks` (segments, z, y, x), z in the order of the frames.

    Args:
        sources: as `source_images` gives them.
        segments: in the order of the masks, each with a label.
        codes: what else is to be in it.
    """
    highdicom = highdicom_library()
    data: Dataset = highdicom.seg.Segmentation(
        sources,
        np.moveaxis(masks, 0, -1),
        "BINARY",
        [_description(number, segment, codes.algorithm) for number, segment in enumerate(segments, 1)],
        series_instance_uid=highdicom.UID(),
        series_number=int(codes.series["SeriesNumber"]),
        sop_instance_uid=highdicom.UID(),
        instance_number=int(codes.series["InstanceNumber"]),
        **equipment("nnunet_csm convert to_dicom"),
    )
    for keyword, text in codes.series.items():
        setattr(data, keyword, text)
    if len(sources) == 1:  # an enhanced file, of which highdicom knows the frames of this volume only
        groups = data.PerFrameFunctionalGroupsSequence
        images = [group.DerivationImageSequence[0].SourceImageSequence[0] for group in groups]
        for image in {id(image): image for image in images}.values():  # segments share that of a plane
            image.ReferencedFrameNumber = frames[int(image.ReferencedFrameNumber) - 1].number + 1
    return data


def _description(number: int, segment: Segment, algorithm: tuple[str, str]) -> Dataset:
    """An item of the SegmentSequence; name and version of the `algorithm` where the segment has none."""
    highdicom = highdicom_library()
    name, version = segment.SegmentAlgorithmName or algorithm[0], segment.AlgorithmVersion or algorithm[1]
    family = dicom_codes.cid7162.ArtificialIntelligence
    region, colour = segment.AnatomicRegionSequence, segment.recommendedDisplayRGBValue
    description: Dataset = highdicom.seg.SegmentDescription(
        number,
        segment.SegmentLabel,
        concept(segment.SegmentedPropertyCategoryCodeSequence),
        concept(segment.SegmentedPropertyTypeCodeSequence),
        segment.SegmentAlgorithmType,
        highdicom.AlgorithmIdentificationSequence(name, family, version),
        anatomic_regions=[concept(region)] if region else None,
        display_color=highdicom.color.CIELabColor.from_rgb(*colour) if colour else None,
    )
    if segment.SegmentDescription:
        description.SegmentDescription = segment.SegmentDescription
    for of, modifier in MODIFIERS.items():
        if code := getattr(segment, modifier):
            setattr(description[of][0], modifier, [concept(code)])
    return description


def reads_as(file: Path, masks: np.ndarray, frames: Sequence[Frame]) -> bool:
    """Whether a segmentation holds `masks` (segments, z, y, x), each plane where its frame lies in the patient."""
    data = pydicom.dcmread(file)
    positions = np.array([frame.position for frame in frames])
    shared = data.SharedFunctionalGroupsSequence[0]
    found = np.zeros_like(masks)
    for plane, group in zip(data.pixel_array.reshape(-1, *masks.shape[2:]), data.PerFrameFunctionalGroupsSequence, strict=True):
        number = (group if "SegmentIdentificationSequence" in group else shared).SegmentIdentificationSequence[0]
        apart = np.linalg.norm(positions - group.PlanePositionSequence[0].ImagePositionPatient, axis=1)
        if apart.min() > SAME_PLACE:
            return False
        found[number.ReferencedSegmentNumber - 1, apart.argmin()] |= plane.astype(bool)
    return np.array_equal(found, masks)
