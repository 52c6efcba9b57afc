"""Cases to be predicted that lack a series: stock nnU-Net expects a file for every channel, and ours reads zeros as absent."""

import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.raw.grid import Grid
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.raw.volumes import READABLE_ENDINGS, is_empty, read_volume
from nnunet_csm.raw.writer import whole_folder, write_image

# Two series of one anatomy correlate at 0.9 at most; a copy that went through another resampling or data type, at more than this.
COPY_CORRELATION = 0.9999


def fill_missing(
    inputs: Path,
    outputs: Path,
    channel_names: Sequence[str],
    file_ending: str,
    copies: bool = True,
    copy_files: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """A folder for stock prediction: every case of `inputs` with a file for every channel, all zero where the series is missing.

    Args:
        inputs: holds CASE_XXXX.ending; at least one channel a case.
        outputs: is written; must be empty or not be there, without `overwrite`.
        channel_names: of the model, in channel order.
        file_ending: such as ".nii.gz".
        copies: write zeros for a series that is a copy of an earlier channel: releases fill gaps that way.
        copy_files: copy the files that are there; otherwise they are linked.
        overwrite: replace `outputs` when it holds nothing but files of this kind.

    Returns:
        Lines to print: what was filled, a case a line.

    Raises:
        UserError: a channel the model does not have, no case, a file that cannot be read, channels of a case on different grids.
    """
    if not inputs.is_dir():
        raise UserError(f"the input folder {inputs} does not exist; give -i the folder with the images")
    if file_ending not in READABLE_ENDINGS:
        raise UserError(
            f"files that end in {file_ending} have no geometry to copy; expected one of {', '.join(READABLE_ENDINGS)}"
        )
    if inputs.resolve() == outputs.resolve():
        raise UserError(f"the input folder {inputs} is kept as it is; give -o another folder")
    cases = _cases(inputs, channel_names, file_ending)
    _refuse_other_files(outputs, file_ending, overwrite)
    lines = []
    with whole_folder(outputs, overwrite) as folder:
        for identifier, files in tqdm(cases.items(), desc="fill missing series", unit="case"):
            originals = _copies(files) if copies else {}
            for channel in range(len(channel_names)):
                target = folder / f"{identifier}_{channel:04d}{file_ending}"
                if channel not in files or channel in originals:
                    _write_zeros(target, files[min(files)])
                elif copy_files:
                    shutil.copyfile(files[channel], target)
                else:
                    target.symlink_to(files[channel].resolve())
            reasons = [f"{name} (no file)" for channel, name in enumerate(channel_names) if channel not in files]
            reasons += [f"{channel_names[c]} (a copy of {channel_names[o]})" for c, o in originals.items()]
            if reasons:
                lines.append(f"{identifier}: zeros for {', '.join(reasons)}")
    complete = len(cases) - len(lines)
    return [*lines, f"{len(cases)} cases in {outputs}: {complete} complete, {len(lines)} filled with zeros"]


def is_copy(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two series hold the same image, up to scale and offset, data type and a trace of noise; all-zero ones never do.

    Compared where either differs from 0: a common background would make any two series look alike.
    """
    if a.shape != b.shape or not (a.any() and b.any()):
        return False
    if np.array_equal(a, b):
        return True
    shown = (a != 0) | (b != 0)
    u, v = (voxels[shown].astype(np.float64) for voxels in (a, b))
    u -= u.mean()
    v -= v.mean()
    norm = np.sqrt((u @ u) * (v @ v))
    return bool(norm > 0 and (u @ v) / norm > COPY_CORRELATION)


def _cases(folder: Path, channel_names: Sequence[str], ending: str) -> dict[str, dict[int, Path]]:
    """Case to channel to file, both in order."""
    pattern = re.compile(r"(?P<identifier>.+)_(?P<channel>\d{4})" + re.escape(ending))
    cases: dict[str, dict[int, Path]] = {}
    for path in sorted(path for path in folder.iterdir() if path.name.endswith(ending) and not path.name.startswith(".")):
        match = pattern.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path} has no channel in its name; call it CASE_0000{ending} for channel 0, and so on")
        channel = int(match["channel"])
        if channel >= len(channel_names):
            names = ", ".join(f"{number:04d} {name}" for number, name in enumerate(channel_names))
            raise UserError(f"{path} is of channel {channel}, which the model does not have ({names}); rename or remove it")
        cases.setdefault(match["identifier"], {})[channel] = path
    if not cases:
        raise UserError(f"{folder} holds no image called CASE_0000{ending}; check -i and the file ending of the dataset")
    return cases


def _refuse_other_files(outputs: Path, ending: str, overwrite: bool) -> None:
    """A folder is replaced as a whole: not one with other things in it."""
    if not (overwrite and outputs.is_dir()):
        return
    others = sorted(path.name for path in outputs.iterdir() if not re.fullmatch(r".+_\d{4}" + re.escape(ending), path.name))
    if others:
        raise UserError(f"{outputs} holds {others[0]}, which is no CASE_0000{ending}, and is kept; give -o another folder")


def _copies(files: Mapping[int, Path]) -> dict[int, int]:
    """Channel that is a copy to the earlier channel it is a copy of."""
    images = {channel: read_volume(Volume(path)) for channel, path in files.items()}
    first = min(files)
    for channel, image in images.items():
        if not Grid.of(image).same_as(Grid.of(images[first])):
            found = f"{files[channel]} is on a grid of {Grid.of(image)}, {files[first]} on one of {Grid.of(images[first])}"
            raise UserError(f"{found}; resample all files of a case to one grid")
    if all(is_empty(image) for image in images.values()):
        raise UserError(
            f"{files[first]} and the other files of the case are all zero; give at least one series, or remove the case"
        )
    arrays = {channel: sitk.GetArrayViewFromImage(image) for channel, image in images.items()}
    originals: dict[int, int] = {}
    for earlier, later in combinations(sorted(arrays), 2):
        if later not in originals and earlier not in originals and is_copy(arrays[earlier], arrays[later]):
            originals[later] = earlier
    return originals


def _write_zeros(path: Path, like: Path) -> None:
    write_image(Grid.of(read_volume(Volume(like))).zeros(), path)
