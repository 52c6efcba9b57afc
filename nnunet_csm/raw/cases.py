"""One case on one grid, and written: zeros for a missing series, masks painted over each other, a note of what was done."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_csm.errors import UserError, reason
from nnunet_csm.raw.background import background_of, shifted_to_zero
from nnunet_csm.raw.geometry import Grid
from nnunet_csm.raw.grid import (
    labels_of,
    laid_on_a_series,
    reference_series,
    refuse_doubtful_places,
    refuse_loss,
    refuse_misplaced,
    resampled,
)
from nnunet_csm.raw.registration import Registration, register_rigidly
from nnunet_csm.raw.subjects import Case, CaseError, Dataset, Volume
from nnunet_csm.raw.volumes import Look, described, is_empty, look_of, read_volume, read_volumes, refuse_constant, scan_of, sha256

FILE_ENDING = ".nii.gz"


def write_case(
    case: Case, dataset: Dataset, folder: Path, reference: str, register: bool, zero_background: bool
) -> dict[str, Any] | str:
    """Write a case and return its entry in the manifest, or the reason why it cannot be used; then nothing of it is written.

    Whatever libraries raise on the images of a case is a reason to leave out that case, not to end all others.
    """
    try:
        images, label, entry = _on_one_grid(case, dataset, reference, register, zero_background)
    except CaseError as error:
        return str(error)
    except Exception as error:
        files = ", ".join(described(volume) for volume in case.images.values())
        return str(
            CaseError(f"{files} cannot be brought to one grid ({type(error).__name__}: {reason(error)}); export them again")
        )
    side = "Ts" if case.test else "Tr"
    for channel, name in enumerate(dataset.series):
        write_image(images[name], folder / f"images{side}" / f"{case.identifier}_{channel:04d}{FILE_ENDING}")
    if label is not None:
        write_image(label, folder / f"labels{side}" / f"{case.identifier}{FILE_ENDING}")
    return entry


def _on_one_grid(
    case: Case, dataset: Dataset, reference: str, register: bool, zero_background: bool
) -> tuple[dict[str, sitk.Image], sitk.Image | None, dict[str, Any]]:
    """Every series of the dataset, the label image (None without masks) and the entry in the manifest."""
    names = [name for name in dataset.series if name in case.images]
    images = dict(zip(names, read_volumes([case.images[name] for name in names]), strict=True))
    present = {name: image for name, image in images.items() if not is_empty(image)}
    if not present:
        raise CaseError(
            "every image is all zero, that is, missing" if images else "the case has no image; add one, or leave it out"
        )
    for name, image in present.items():
        refuse_constant(image, case.images[name])
    backgrounds = {name: value for name, image in present.items() if (value := background_of(image)) is not None}
    if zero_background:
        present |= {name: shifted_to_zero(present[name], value) for name, value in backgrounds.items()}
    grids = {name: Grid.of(image) for name, image in present.items()}
    reference_name = reference_series(grids, reference)
    grid = grids[reference_name]
    looks = {name: look_of(case.images[name], image) for name, image in present.items()}
    refuse_doubtful_places({name: (described(case.images[name]), look) for name, look in looks.items()})
    for name in present:
        refuse_misplaced(grids[name], grid, described(case.images[name]), reference_name)
    registrations = _registered(case, present, reference_name) if register else {}
    transforms = {name: found.transform for name, found in registrations.items() if not found.refused}
    records: dict[str, dict[str, Any]] = {}
    results: dict[str, sitk.Image] = {}
    for name in dataset.series:
        if name not in present:
            why = "the file is all zero" if name in images else "series missing"
            results[name] = grid.zeros()
            records[name] = {**(_origin(case.images[name], images[name]) if name in images else {}), "done": f"zeros: {why}"}
            continue
        records[name] = {**_origin(case.images[name], present[name]), "header": list(looks[name].remarks)}
        if name != reference_name:
            records[name]["overlap"] = round(grids[name].overlap(grid), 3)
        if name in backgrounds:
            records[name]["background"] = {"value": backgrounds[name], "shifted_to_zero": zero_background}
        if name in registrations:
            records[name]["registration"] = registrations[name].to_dict()
        results[name] = resampled(present[name], grid, transform=transforms.get(name))
        records[name]["done"] = _done(grids[name], grid, "linearly", name in transforms)
        if is_empty(results[name]):
            msg = f"{described(case.images[name])}: nothing but zeros is left on the grid of {reference_name} ({grid})"
            raise CaseError(f"{msg}; does its header belong to this study?")
    label, mask_records = _painted(case, dataset, reference_name, looks, transforms)
    entry = {
        "patient": case.patient,
        "test": case.test,
        "reference": reference_name,
        "after": grid.to_dict(),
        "series": records,
        "masks": mask_records,
    }
    return results, label, entry


def _registered(case: Case, images: Mapping[str, sitk.Image], reference_name: str) -> dict[str, Registration]:
    """Every series but the reference, those of one grid and one scan together."""
    grids = {name: Grid.of(image) for name, image in images.items()}
    scans = {name: scan_of(case.images[name]) for name in images}
    groups: list[dict[str, sitk.Image]] = []
    for name, image in images.items():
        if name == reference_name:
            continue
        for group in groups:
            first = next(iter(group))
            if grids[name].same_as(grids[first]) and scans[name] == scans[first]:
                group[name] = image
                break
        else:
            groups.append({name: image})
    found = [register_rigidly(group, images[reference_name]) for group in groups]
    return {name: one for of_group in found for name, one in of_group.items()}


def _painted(
    case: Case, dataset: Dataset, reference_name: str, looks: Mapping[str, Look], transforms: Mapping[str, sitk.Transform]
) -> tuple[sitk.Image | None, list[dict[str, Any]]]:
    """The masks of a case on the reference's grid, later ones over earlier ones; one on the grid of a series moves with it."""
    if not case.masks:
        if dataset.labels and not case.test:
            remedy = "add one, or make it a test case (in a table: `test` in the column split)"
            raise CaseError(f"the case has no mask, but the dataset has labels; {remedy}")
        return None, []
    grid = looks[reference_name].places[0]
    label, records = grid.zeros(), []
    for mask in case.masks:
        before, what = labels_of(read_volume(mask.volume), mask), described(mask.volume)
        look = look_of(mask.volume, before)
        laid, series, said = laid_on_a_series(before, look, looks, reference_name, what)
        transform = transforms.get(series)
        after = resampled(laid, grid, nearest=True, transform=transform)
        refuse_loss(laid, after, what)
        label = sitk.Maximum(sitk.Mask(label, after == 0), after)
        done = _done(Grid.of(laid), grid, "by nearest neighbour", transform is not None)
        done = ", ".join([said] * (said != "kept") + [done] * (done != "kept")) or "kept"
        records.append({**_origin(mask.volume, before), "done": done, "header": list(look.remarks), "values": dict(mask.values)})
    present = set(np.unique(sitk.GetArrayViewFromImage(label)).tolist())
    for diagnosis in case.diagnoses:
        if diagnosis.mask_label is not None and diagnosis.mask_label not in present:
            msg = f"the class {diagnosis.name} is of mask label {diagnosis.mask_label}, but the mask of the case has "
            raise CaseError(f"{msg}{', '.join(map(str, sorted(present - {0}))) or 'no label'}; correct the mask or the table")
    return label, records


def _origin(volume: Volume, image: sitk.Image) -> dict[str, Any]:
    """Where a volume came from, and its grid there."""
    path = volume.path.absolute()  # not where a link leads: git-annex has keys there, not names
    status = path.stat()
    digest = _cached_sha256(path, status.st_size, status.st_mtime_ns)
    return {"source": str(path), "index": volume.index, "sha256": digest, "before": Grid.of(image).to_dict()}


@cache
def _cached_sha256(path: Path, size: int, time: int) -> str:
    """One reading for all series of a 4-D file; size and time stand for its content."""
    return sha256(path)


def _done(before: Grid, after: Grid, how: str, registered: bool) -> str:
    if registered:
        return f"registered and resampled {how} from {before}"
    return "kept" if before.same_as(after) else f"resampled {how} from {before}"


def write_image(image: sitk.Image, path: Path) -> None:
    """Write, read again, compare. Raises `UserError`."""
    try:
        sitk.WriteImage(image, str(path), useCompression=True)
        again = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise UserError(f"{path} cannot be written ({reason(error)}); is the disk full?") from error
    same = np.array_equal(sitk.GetArrayViewFromImage(again), sitk.GetArrayViewFromImage(image))
    if not (same and Grid.of(again).same_as(Grid.of(image))):
        raise UserError(f"{path} does not read as it was written; is the disk full or damaged?")
