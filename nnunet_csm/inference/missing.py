"""Cases to be predicted that lack a series: stock nnU-Net expects a file for every channel, and ours reads zeros as absent."""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from nnunet_csm.errors import UserError
from nnunet_csm.files import whole_folder
from nnunet_csm.fingerprint.measurement import measure_series, nonzero_box
from nnunet_csm.fingerprint.reading import SeriesImage
from nnunet_csm.fingerprint.record import ALL_ZERO, CONSTANT
from nnunet_csm.raw.cases import write_image
from nnunet_csm.raw.check import files_by_case, no_case
from nnunet_csm.raw.geometry import Grid, described_misfit
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.raw.volumes import READABLE_ENDINGS, look_at, nnunet_sees, read_volume


def fill_missing(
    inputs: Path,
    outputs: Path,
    channel_names: Sequence[str],
    file_ending: str,
    copies: bool = True,
    copy_files: bool = False,
    overwrite: bool = False,
    num_copies: Mapping[str, int] | None = None,
    needed: Sequence[str] | None = None,
) -> list[str]:
    """A folder for stock prediction: every case of `inputs` with a file for every channel, all zero where the series is missing.

    Args:
        inputs: holds CASE_XXXX.ending; at least one channel a case.
        outputs: is written; must be empty or not be there, without `overwrite`.
        channel_names: of the model, in channel order.
        file_ending: such as ".nii.gz".
        copies: write zeros for a series that is a copy of an earlier channel, or constant: releases fill gaps that way.
        copy_files: copy the files that are there; otherwise they are linked.
        overwrite: replace `outputs` when it holds nothing but files of this kind.
        num_copies: series to how often it was a copy in training; of equal series the one that rarely was is the original.
        needed: series of which a case must have one; all when None.

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
    cases, problems = files_by_case(inputs, channel_names, file_ending)
    if problems or not cases:
        raise UserError(problems[0] if problems else no_case(inputs, file_ending))
    _refuse_other_files(outputs, file_ending, overwrite)
    lines, notes = list[str](), list[str]()
    with whole_folder(outputs, overwrite) as folder:
        for identifier, files in tqdm(cases.items(), desc="fill missing series", unit="case"):
            empty, replaced = _without_a_series(files, channel_names, num_copies or {}) if copies else ((), {})
            shown = [name for c, name in enumerate(channel_names) if c in files and c not in replaced and c not in empty]
            if not set(shown) & set(needed or channel_names):
                raise UserError(
                    f"{inputs}: case {identifier} shows {', '.join(shown) or 'nothing'}, and the model uses "
                    f"{', '.join(needed or channel_names)}; give one of them, or move the case to another folder"
                )
            for channel in range(len(channel_names)):
                target = folder / f"{identifier}_{channel:04d}{file_ending}"
                if channel not in files or channel in replaced:
                    write_image(Grid.of(read_volume(Volume(files[min(files)]))).zeros(), target)
                    continue
                look = look_at(files[channel])
                notes += [f"{files[channel]} {remark}" for remark in look.remarks]
                if not nnunet_sees(files[channel], look):
                    write_image(read_volume(Volume(files[channel])), target)
                    notes.append(
                        f"{files[channel]} is written anew with axes at right angles, as nnU-Net would read it otherwise"
                    )
                elif copy_files:
                    shutil.copyfile(files[channel], target)
                else:
                    target.symlink_to(files[channel].resolve())
            reasons = [f"{name} (no file)" for channel, name in enumerate(channel_names) if channel not in files]
            reasons += [f"{channel_names[channel]} ({what})" for channel, what in replaced.items()]
            if reasons:
                lines.append(f"{identifier}: zeros for {', '.join(reasons)}")
    complete = len(cases) - len(lines)
    return [*notes, *lines, f"{len(cases)} cases in {outputs}: {complete} complete, {len(lines)} filled with zeros"]


def _refuse_other_files(outputs: Path, ending: str, overwrite: bool) -> None:
    """A folder is replaced as a whole: not one with other things in it."""
    if not (overwrite and outputs.is_dir()):
        return
    others = sorted(path.name for path in outputs.iterdir() if not re.fullmatch(r".+_\d{4}" + re.escape(ending), path.name))
    if others:
        raise UserError(f"{outputs} holds {others[0]}, which is no CASE_0000{ending}, and is kept; give -o another folder")


def _without_a_series(
    files: Mapping[int, Path], names: Sequence[str], num_copies: Mapping[str, int]
) -> tuple[list[int], dict[int, str]]:
    """Channels that are all zero, and those that show no series of their own, with what they show.

    Of equal series the one that was a copy least often in training is the original; the first, where that says nothing.
    """
    images = {channel: read_volume(Volume(path)) for channel, path in files.items()}
    first = min(files)
    looks = {channel: look_at(path) for channel, path in files.items()}
    for channel in images:
        if not looks[channel].on_grid_of(looks[first]):
            misfit = described_misfit(looks[channel].places[0], looks[first].places[0], str(files[first]))
            raise UserError(f"{files[channel]} is on another grid: it {misfit}; resample all files of a case to one grid")
    spacing = images[first].GetSpacing()[::-1]
    volumes = {
        names[channel]: SeriesImage(sitk.GetArrayFromImage(image).astype(np.float32), spacing, None)
        for channel, image in images.items()
    }
    records = measure_series(volumes, nonzero_box([volume.voxels for volume in volumes.values()]))
    replaced = {channel: CONSTANT for channel in files if records[names[channel]].flat == CONSTANT}
    for channel in sorted(files, key=lambda c: (num_copies.get(names[c], 0), c)):
        originals = [c for c in files if names[c] in records[names[channel]].twins and c not in replaced]
        replaced |= {c: f"a copy of {names[channel]}" for c in originals if channel not in replaced}
    return [channel for channel in files if records[names[channel]].flat == ALL_ZERO], dict(sorted(replaced.items()))
