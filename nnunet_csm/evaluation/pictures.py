"""Pictures of predictions over nnU-Net's raw images, read as scores read them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_csm.errors import UserError
from nnunet_csm.figures.overlays import save_methods, save_overlay
from nnunet_csm.listing import files_in, uncertainty_map
from nnunet_csm.raw.geometry import upright
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.raw.volumes import read_volume


def save_overlays_of_folder(
    raw_image_folder: str | Path,
    reference_folder: str | Path | None,
    prediction_folder: str | Path,
    series_names: Sequence[str],
    label_names: Mapping[int, str],
    out_folder: str | Path,
    num_cases: int,
    file_ending: str,
) -> list[Path]:
    """Draw the first `num_cases` predictions by name over nnU-Net's raw images, as out_folder/{case}.png; returns these paths.

    `series_names` are in the order of the channels; one that a case has no file of is drawn as absent. Images are turned as
    `raw.geometry.upright` says, whatever the file's orientation. A map that `predict --uncertainty` has left is drawn
    beside the segmentation. Raises UserError when a case has no image or no segmentation, or when its files are not on one grid.
    """
    prediction_folder, raw_image_folder = Path(prediction_folder), Path(raw_image_folder)
    predictions = files_in(prediction_folder, file_ending)
    if not predictions:
        raise UserError(f"{prediction_folder}: no prediction ends with {file_ending}; give the folder that holds the predictions")
    drawn = []
    for prediction_file in predictions[:num_cases]:
        case = prediction_file.name.removesuffix(file_ending)
        channels = [raw_image_folder / f"{case}_{channel:04d}{file_ending}" for channel in range(len(series_names))]
        grid_file = next((file for file in channels if file.is_file()), channels[0])
        grid = _read_upright(grid_file)
        prediction = _read_on_grid(prediction_file, grid, grid_file)
        reference_file = None if reference_folder is None else Path(reference_folder) / prediction_file.name
        reference = None if reference_file is None else _read_on_grid(reference_file, grid, grid_file)
        # a series that `predict` did without
        volume = [_read_on_grid(file, grid, grid_file) if file.is_file() else np.zeros_like(prediction) for file in channels]
        map_file = uncertainty_map(prediction_folder / case)
        uncertain = _read_on_grid(map_file, grid, grid_file) if map_file.is_file() else None
        spacing = grid.GetSpacing()[::-1]
        out_file = Path(out_folder) / f"{case}.png"
        shown = (np.stack(volume), series_names, reference, prediction, label_names, case, spacing)
        save_overlay(out_file, *shown, uncertainty=uncertain)
        drawn.append(out_file)
    return drawn


def save_methods_of_case(
    path: str | Path,
    image_file: Path,
    reference_file: Path,
    prediction_files: Mapping[str, Path],
    label_names: Mapping[int, str],
    title: str,
    notes: Mapping[str, str],
) -> None:
    """One case under several methods, see `figures.overlays.save_methods`; all files are turned upright.

    Raises UserError when a file is missing or its grid is not that of the image.
    """
    image = _read_upright(image_file)
    files = {"reference": reference_file, **prediction_files}
    segmentations = {name: _read_on_grid(file, image, image_file) for name, file in files.items()}
    x, y, z = image.GetSpacing()
    save_methods(path, sitk.GetArrayFromImage(image), segmentations, label_names, title, notes, (z, y, x))


def _read_upright(file: Path) -> sitk.Image:
    if not file.is_file():
        msg = f"{file}: no such file, expected for a picture of its case; check the folders of images, references and predictions"
        raise UserError(msg)
    return upright(read_volume(Volume(file)))


def _read_on_grid(file: Path, grid: sitk.Image, grid_file: Path) -> np.ndarray:
    """The (z, y, x) array of `file`, which must have the shape of `grid`."""
    image = grid if file == grid_file else _read_upright(file)
    if image.GetSize() != grid.GetSize():
        raise UserError(f"{file} has size (x, y, z) {image.GetSize()}, {grid_file} has {grid.GetSize()}; give files on one grid")
    return sitk.GetArrayFromImage(image)
