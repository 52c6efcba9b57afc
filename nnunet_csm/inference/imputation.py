"""`nnunet_csm impute`: series that a study lacks, made up from those that it has, by a pretraining's encoder and decoder."""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
import torch
from jaxtyping import Bool, Float
from nnunetv2.preprocessing.cropping.cropping import create_nonzero_mask
from tqdm import tqdm

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.imputation import markdown_of, score_image
from nnunet_csm.figures.imputation import save_imputation
from nnunet_csm.files import whole_folder
from nnunet_csm.inference.classification import NUM_AHEAD, cases_in, made_ahead
from nnunet_csm.inference.embedding import Origin, Prepared, linked, origin_of, prepare
from nnunet_csm.inference.ensemble import CaseToClassify
from nnunet_csm.inference.request import ModelRequest
from nnunet_csm.inference.segmentation import complete_cases
from nnunet_csm.inference.training_scans import TrainingScans, training_scans, voxels_of, z_scored
from nnunet_csm.machine import keep_freed_memory
from nnunet_csm.plans import configuration_of
from nnunet_csm.pretext.imputation import Imputer, imputer_in
from nnunet_csm.raw.cases import write_image
from nnunet_csm.raw.check import files_by_case, no_case
from nnunet_csm.raw.geometry import Grid
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.raw.volumes import read_volume

# in the header of every file; NIfTI has room for 79 letters
MARK = "IMPUTED by nnunet_csm: made up, not acquired. Not for diagnosis."
WARNING = (
    "Imputed series are made up from the others by a network: what only the missing series would show is not in them, and what "
    "they show need not be there. Not for diagnosis."
)
ENDING = ".nii.gz"
RECORD, COMPLETE = "imputed.json", "images_with_imputed"
# as nnU-Net's plans call it
NORMALISED = "ZScoreNormalization"


@dataclass(frozen=True)
class ImputeRequest(ModelRequest):
    """What is to be made up by what.

    Attributes:
        images: folder with CASE_0000.nii.gz ..., as far as a case has the series.
        output: folder to write.
        series: names of those to be made up in every case; a case that has one is treated as if it had not. None: those that
            a case lacks.
        num_draws: how often visible tokens are drawn as in training; 0: all are visible, once.
        z_scores: write z-scores, no intensities.
        score: compare with the scanned series where a case has it.
        for_prediction: also write a folder of complete cases.
        step_size: from tile to tile, as a share of the tile.
        overwrite: replace what is there.
    """

    images: Path
    output: Path
    series: tuple[str, ...] | None = None
    num_draws: int = 0
    z_scores: bool = False
    score: bool = False
    for_prediction: bool = False
    step_size: float = 0.5
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.step_size <= 1:
            raise UserError(
                f"a step size of {self.step_size}; expected a share of the tile, above 0 and up to 1, with -step_size"
            )
        if self.num_draws < 0 or self.num_draws == 1:
            raise UserError(f"{self.num_draws} draws; expected 2 or more with -draws, or 0 to show all tokens once")
        if self.score and self.series is None:
            raise UserError("--score compares with series that are there; name those to be hidden and made up with -series")


@dataclass
class Written:
    """What has been made of a case."""

    given: tuple[str, ...]
    imputed: dict[str, str] = field(default_factory=dict)
    """File by series."""
    hidden_on_purpose: list[str] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)


def impute(request: ImputeRequest) -> list[str]:
    """Make up series of all cases of a folder; the output has its name when it is whole.

    Returns:
        Lines to print.

    Raises:
        UserError: no such checkpoint, or one without a decoder; images that cannot be used, output that is there, nothing to do.
    """
    device = request.torch_device()
    file = request.of_one_fold("one network makes up one image")
    saved = checkpoint.load(file)
    origin = origin_of(saved, file)
    imputer = imputer_in(saved, origin.settings, str(file)).to(device)
    known, asked = origin.channels, request.series or ()
    if len(set(asked)) < len(asked) or not set(asked) <= set(known) or set(asked) == set(known):
        raise UserError(f"-series {' '.join(asked)}: expected some of {', '.join(known)}, each once, and not all of them")
    ending, names = origin.dataset_json["file_ending"], nnunet.channel_names(origin.dataset_json)
    if asked:
        print(f"-series: {', '.join(asked)} is hidden from the network in every case, and counts as having no file below")
    files, shown = _files(request, names, ending, {known[name] for name in asked})
    scans = None if request.z_scores and not request.score else _scans(origin)
    if scans is not None:
        scans.check(asked or tuple(known))
    if device.type == "cpu":
        keep_freed_memory()
    written: dict[str, Written] = {}
    with (
        whole_folder(request.output, request.overwrite) as folder,
        linked(shown, request.images) as arranged,
        complete_cases(arranged, origin.dataset_json, origin.settings, request.images) as images,
    ):
        cases = cases_in(images, images, origin.dataset_json)
        prepared = made_ahead(lambda case: prepare(case, origin, False), cases, NUM_AHEAD)
        with closing(prepared):
            for case, made in zip(tqdm(cases, "imputing", unit="case", disable=None), prepared, strict=True):
                assert isinstance(made, Prepared)
                wanted = asked or tuple(name for name in known if name not in made.volumes)
                maker = Maker(request, origin, imputer, scans, folder)
                written[case.name] = maker.make(case, made, wanted, files[case.name])
        if not any(one.imputed for one in written.values()):
            raise UserError(
                f"{request.images}: no case lacks a series of {', '.join(known)}; name one with -series, to make it up anyway"
            )
        record = _record(request, origin, scans, written)
        (folder / RECORD).write_text(json.dumps(record, indent=4), encoding="utf-8")
        rows = [{"case": case, **row} for case, one in written.items() for row in one.scores]
        if request.score and not rows:
            raise UserError(f"{request.images}: no case has {', '.join(asked)}; --score needs cases that have what is made up")
        if rows:
            table = pd.DataFrame(rows)
            table.to_csv(folder / "scores.csv", index=False)
            (folder / "scores.md").write_text(markdown_of(table), encoding="utf-8")
    return _lines(request, origin, written)


def _files(
    request: ImputeRequest, names: Sequence[str], ending: str, hidden: set[int]
) -> tuple[dict[str, dict[int, Path]], dict[str, Path]]:
    """All files by case and channel, and by their names those of channels that are not hidden."""
    if not request.images.is_dir():
        raise UserError(f"the input folder {request.images} does not exist; give -i the folder with the images")
    cases, problems = files_by_case(request.images, names, ending)
    if problems or not cases:
        raise UserError(problems[0] if problems else no_case(request.images, ending))
    if bare := [case for case, of_case in cases.items() if set(of_case) <= hidden]:
        raise UserError(f"{request.images}: case {bare[0]} has nothing but what -series names; it needs a file of another series")
    return cases, {file.name: file for of_case in cases.values() for channel, file in of_case.items() if channel not in hidden}


def _masked(origin: Origin) -> dict[str, bool]:
    """Whether nnU-Net normalises a series within its foreground only."""
    configuration = configuration_of(origin.plans, origin.configuration, origin.provenance["checkpoint"])
    return {name: configuration["use_mask_for_norm"][channel] for name, channel in origin.channels.items()}


def _scans(origin: Origin) -> TrainingScans:
    """Raw images of the training cases, measured."""
    configuration = configuration_of(origin.plans, origin.configuration, origin.provenance["checkpoint"])
    schemes = [configuration["normalization_schemes"][channel] for channel in origin.channels.values()]
    if set(schemes) != {NORMALISED}:
        raise UserError(
            f"{origin.provenance['checkpoint']}: series are normalised by {', '.join(schemes)}, and intensities are known only "
            f"for {NORMALISED}; give --z_scores, without --score, to write normalised values"
        )
    dataset = origin.plans["dataset_name"]
    cases = [name.split("/")[-1] for name in origin.training_cases if name.split("/")[0] == dataset]
    folder, ending = nnunet.folder("nnUNet_raw") / dataset, origin.dataset_json["file_ending"]
    return training_scans(folder, cases, origin.channels, list(_masked(origin).values()), ending)


@dataclass(frozen=True)
class Maker:
    """Makes up series of cases, and writes them into `folder`."""

    request: ImputeRequest
    origin: Origin
    imputer: Imputer
    scans: TrainingScans | None
    folder: Path

    def make(self, case: CaseToClassify, made: Prepared, wanted: Sequence[str], files: Mapping[int, Path]) -> Written:
        """One case; `files` are all that it has, those that were hidden on purpose among them."""
        done, channels = Written(tuple(made.volumes)), self.origin.channels
        if wanted:
            given = voxels_of([case.images[channels[name]] for name in made.volumes])
            grid = Grid.of(read_volume(Volume(case.images[channels[done.given[0]]])))
            inside = create_nonzero_mask(given)
            images, deviations = self._rebuilt(made, wanted, grid, inside)
            for name in wanted:
                self._write(case.name, name, images[name], deviations.get(name), grid, inside, done)
                shown = dict(zip(done.given, given, strict=True))
                true = self._true(name, files.get(channels[name]), grid, shown)
                self._draw(case.name, name, shown, true, images[name], deviations.get(name), inside, grid)
                if true is not None:
                    done.hidden_on_purpose.append(name)
                    if self.request.score:
                        done.scores += self._scores(name, shown, true, images[name], inside)
        if self.request.for_prediction:
            self._complete(case.name, done, files)
        return done

    def _rebuilt(
        self, made: Prepared, wanted: Sequence[str], grid: Grid, inside: Bool[np.ndarray, "z y x"]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Images and their deviations on the grid of the files, as z-scores, 0 outside."""
        shape, device = next(iter(made.volumes.values())).shape, next(self.imputer.pretext.parameters()).device
        volume = torch.zeros(len(self.imputer.series), *shape)
        for name, voxels in made.volumes.items():
            volume[self.imputer.series.index(name)] = torch.from_numpy(voxels)
        of = self.imputer.impute(volume.to(device), tuple(made.volumes), wanted, self.request.num_draws, self.request.step_size)
        if not of.image.isfinite().all():
            raise UserError(f"{self.origin.provenance['checkpoint']}: gives NaN; its training diverged, take another checkpoint")

        def on_grid(maps: torch.Tensor | None) -> dict[str, np.ndarray]:
            if maps is None:
                return {}
            images = [made.frame.on_grid(one.cpu().numpy(), (1, 1, 1), grid) for one in maps]
            return {name: sitk.GetArrayFromImage(image) * inside for name, image in zip(wanted, images, strict=True)}

        return on_grid(of.image), on_grid(of.deviation)

    def _write(
        self,
        case: str,
        name: str,
        z_scores: Float[np.ndarray, "z y x"],
        deviation: Float[np.ndarray, "z y x"] | None,
        grid: Grid,
        inside: Bool[np.ndarray, "z y x"],
        done: Written,
    ) -> None:
        unit, voxels = "_z_scores", z_scores
        if not self.request.z_scores:
            assert self.scans is not None
            unit, voxels = "", self.scans.as_scanned(name, z_scores) * inside
        done.imputed[name] = f"{case}_{self.origin.channels[name]:04d}_imputed{unit}{ENDING}"
        write_image(marked(voxels, grid), self.folder / done.imputed[name])
        if deviation is not None:
            write_image(marked(deviation, grid), self.folder / f"{case}_{name}_disagreement{ENDING}")

    def _true(
        self, name: str, file: Path | None, grid: Grid, given: Mapping[str, np.ndarray]
    ) -> Float[np.ndarray, "z y x"] | None:
        """The z-scores of a series that the case has, and that was hidden on purpose."""
        if file is None or self.request.series is None:
            return None
        image = read_volume(Volume(file))
        if not Grid.of(image).same_as(grid):
            raise UserError(f"{file} is on another grid than the other series; resample all files of a case to one grid")
        voxels = sitk.GetArrayFromImage(image).astype(np.float32)
        for other, one in given.items():
            if np.array_equal(one, voxels):
                raise UserError(f"{file} holds the voxels of {other}, too: one is a copy of the other; leave the copy out of -i")
        if voxels.min() == voxels.max():
            return None
        masked = _masked(self.origin)
        return z_scored(np.stack([*given.values(), voxels]), [masked[one] for one in (*given, name)])[0][-1]

    def _draw(
        self,
        case: str,
        name: str,
        given: Mapping[str, np.ndarray],
        true: np.ndarray | None,
        image: np.ndarray,
        deviation: np.ndarray | None,
        inside: np.ndarray,
        grid: Grid,
    ) -> None:
        title = f"{case}: {name} is imputed, not acquired. Not for diagnosis."
        path = self.folder / f"{case}_{name}_imputed.png"
        save_imputation(path, given, true, image, deviation, inside, grid.spacing, name, title)

    def _scores(
        self,
        name: str,
        given: Mapping[str, np.ndarray],
        true: Float[np.ndarray, "z y x"],
        image: Float[np.ndarray, "z y x"],
        inside: Bool[np.ndarray, "z y x"],
    ) -> list[dict[str, Any]]:
        """Of what was made up, of the mean of all scans, and of the best linear map from what was given at the same voxel."""
        assert self.scans is not None
        made = {"imputed": image, "mean": np.zeros_like(image)}
        series = list(self.origin.channels)
        if self.scans.linear is not None:
            numbers = tuple(series.index(one) for one in given)
            weights, intercept = self.scans.linear.coefficients(numbers, series.index(name))
            masked = _masked(self.origin)
            scored, _ = z_scored(np.stack(list(given.values())), [masked[one] for one in given])
            made["linear map"] = (np.tensordot(weights, scored, 1) + intercept).astype(np.float32)
            made["mean"] += np.float32(self.scans.linear.mean[series.index(name)])
        background = self.scans.z_scores[name][0]
        outside = {key: np.where(inside, one, background).astype(np.float32) for key, one in made.items()}
        shown = "+".join(given)
        return [{"series": name, "given": shown, **row} for row in score_image(true, outside, inside)]

    def _complete(self, case: str, done: Written, files: Mapping[int, Path]) -> None:
        """The case with all its series for `predict`: made up ones, and links to the others."""
        ending, folder = self.origin.dataset_json["file_ending"], self.folder / COMPLETE
        folder.mkdir(exist_ok=True)
        for name, channel in self.origin.channels.items():
            target = folder / f"{case}_{channel:04d}{ending}"
            if name in done.imputed and ending == ENDING:
                # the link tells what it leads to
                target.symlink_to(Path("..") / done.imputed[name])
            elif name in done.imputed:
                image = sitk.ReadImage(str(self.folder / done.imputed[name]))
                write_image(marked(sitk.GetArrayFromImage(image), Grid.of(image)), target)
            elif name in done.given:
                target.symlink_to(files[channel].resolve())


def marked(voxels: Float[np.ndarray, "z y x"], grid: Grid) -> sitk.Image:
    """An image whose header says that it is made up."""
    image = sitk.GetImageFromArray(voxels.astype(np.float32))
    grid.put_on(image)
    for entry in ("ITK_FileNotes", "descrip"):
        image.SetMetaData(entry, MARK)
    return image


def _record(
    request: ImputeRequest, origin: Origin, scans: TrainingScans | None, written: Mapping[str, Written]
) -> dict[str, Any]:
    """What the images rest on."""
    seen = {name.split("/")[-1] for name in origin.training_cases}
    measured = scans is not None and not request.z_scores
    return {
        "warning": WARNING,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": checkpoint.software(),
        "images": str(request.images.resolve()),
        "decoder": origin.provenance,
        "dataset": origin.plans["dataset_name"],
        "plans": origin.plans["plans_name"],
        "configuration": origin.configuration,
        "patch_size": list(origin.encoder.patch_size),
        "step_size": request.step_size,
        "draws": request.num_draws,
        "intensities": f"z-scores by quantiles of {scans.num_cases} training cases" if scans and measured else "z-scores",
        "disagreement": "standard deviation over draws, in z-scores" if request.num_draws else None,
        "cases": {
            name: {
                "given": list(one.given),
                "imputed": one.imputed,
                "hidden_on_purpose": one.hidden_on_purpose,
                "seen_in_training": name in seen,
            }
            for name, one in written.items()
        },
    }


def _lines(request: ImputeRequest, origin: Origin, written: Mapping[str, Written]) -> list[str]:
    lines = [
        f"{case}: {', '.join(one.imputed)} from {', '.join(one.given)}" if one.imputed else f"{case}: lacks nothing"
        for case, one in written.items()
    ]
    if both := {name.split("/")[-1] for name in origin.training_cases} & set(written):
        lines.append(f"{len(both)} cases have the names of cases that the network was trained on, such as {min(both)}")
    if request.for_prediction:
        lines.append(f"{request.output / COMPLETE} is for `nnunet_csm predict -i`; in it imputed series stand for scanned ones")
    num_images = sum(len(one.imputed) for one in written.values())
    return [*lines, f"{num_images} imputed series in {request.output}. {WARNING}"]
