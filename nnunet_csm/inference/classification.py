"""`nnunet_csm classify`: raw images and masks to classes or numbers, and maps of what every series adds to the decision."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import SimpleITK as sitk
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.lesions import sample_mask
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.temperature import Temperature, fit_on_folds
from nnunet_csm.figures.activation import save_activation
from nnunet_csm.files import whole, whole_folder
from nnunet_csm.heads.base import Head
from nnunet_csm.inference.ensemble import CaseToClassify, Decision, Ensemble, decide, load_ensemble, prepare
from nnunet_csm.inference.frame import Frame
from nnunet_csm.inference.request import ModelRequest
from nnunet_csm.inference.segmentation import complete_cases
from nnunet_csm.listing import files_in, is_hidden
from nnunet_csm.raw.cases import write_image
from nnunet_csm.raw.geometry import Grid, upright
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.raw.volumes import READABLE_ENDINGS, read_volume, sha256
from nnunet_csm.schema import Name, read_value

# of which the training's final validation is
FINAL_CHECKPOINT = "checkpoint_final.pth"
MAP_ENDING = ".nii.gz"
# cases that are preprocessed while the networks look at another one, each by a thread; two were no faster than one
NUM_AHEAD = 1

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class ClassifyRequest(ModelRequest):
    """What is to be classified by what.

    Attributes:
        images: folder with CASE_0000.nii.gz ..., as far as a case has the series.
        masks: folder with CASE.nii.gz, such as labels or what a segmenter has predicted.
        output: the CSV to write; the JSON beside it has its name, maps are in a folder of its name and `_maps`.
        maps: write what every series adds to the decision, as NIfTI and as pictures.
        calibrated: give probabilities at a temperature that is fitted on what the folds' trainings predicted in validation.
        strict: a sample that cannot be classified is an error, not a line in a report.
        overwrite: replace what is there.
    """

    images: Path
    masks: Path
    output: Path
    maps: bool = False
    calibrated: bool = False
    strict: bool = False
    overwrite: bool = False

    @property
    def record(self) -> Path:
        return self.output.with_suffix(".json")

    @property
    def map_folder(self) -> Path:
        return self.output.with_name(f"{self.output.stem}_maps")


def classify(request: ClassifyRequest) -> list[str]:
    """Classify all cases of a folder; nothing is written unless all is well.

    Returns:
        Lines to print.

    Raises:
        UserError: no such model, a model that does not classify, images that cannot be used, output that is there; with
            `strict`, a sample without a usable mask; no sample at all.
    """
    request = request.of_trained_folds()
    _check_output(request)
    ensemble = load_ensemble(request)
    temperature = _temperature(request, ensemble) if request.calibrated else None
    if temperature is not None:
        ensemble = replace(ensemble, temperature=temperature.value)
    for name in ensemble.series if request.maps else ():
        read_value(Name, name, "--maps writes a file for each series; the series")
    decisions: list[Decision] = []
    left_out: dict[str, str] = {}
    with (
        complete_cases(request.images, ensemble.dataset_json, ensemble.settings) as images,
        whole_folder(request.map_folder, request.overwrite) if request.maps else nullcontext() as maps,
    ):
        cases = cases_in(images, request.masks, ensemble.dataset_json)
        with closing(made_ahead(lambda case: prepare(case, ensemble), cases, NUM_AHEAD)) as prepared:
            for case, (patches, unusable) in zip(tqdm(cases, "classifying", unit="case", disable=None), prepared, strict=True):
                left_out |= unusable
                if request.strict and left_out:
                    raise UserError(f"{first_of(left_out)}; leave out --strict to classify the other samples")
                for patch in patches:
                    decision, added = decide(patch, ensemble, with_maps=request.maps)
                    decisions.append(decision)
                    if maps is not None:
                        write_maps(maps, decision, added, patch.frame, case, ensemble)
        if not decisions:
            raise UserError(f"no sample of {request.images} can be classified: {first_of(left_out)}")
    _write_table(request.output, decisions, ensemble.head)
    record = _record(request, ensemble, decisions, left_out)
    nnunet.save_json(record | {"temperature": temperature and temperature.to_dict()}, request.record)
    lines = temperature.lines() if temperature is not None else []
    lines += [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    lines += masks_without_images(request.masks, cases)
    listed = ensemble.head.summary(np.stack([decision.said for decision in decisions]))
    lines.append(f"{len(decisions)} samples in {request.output}: {listed}; {len(left_out)} left out")
    lines.append(ensemble.head.told())
    return [*lines, f"maps are in {request.map_folder}"] if request.maps else lines


def made_ahead(make: Callable[[Given], Made], given: Iterable[Given], num_ahead: int) -> Generator[Made]:
    """`make` of each, in order; while one is used, threads make the next `num_ahead`.

    What `make` raises comes at its turn. Close the iterator to stop early: it waits for what is being made and begins no more.
    """
    pool = ThreadPoolExecutor(num_ahead)
    waiting: deque[Future[Made]] = deque()
    try:
        for one in given:
            waiting.append(pool.submit(make, one))
            if len(waiting) > num_ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def write_maps(
    folder: Path,
    decision: Decision,
    maps: Float[Tensor, "s gz gy gx"],
    frame: Frame,
    case: CaseToClassify,
    ensemble: Ensemble,
) -> None:
    """`NAME_SERIES.nii.gz` on the grid of the images for every series that is present, and `NAME.png`."""
    architecture = ensemble.settings.architecture
    name_of_sample = decision.sample.name
    images = [read_volume(Volume(case.images[channel])) for channel in architecture.channels]
    grid = Grid.of(images[0])
    on_grid = [frame.on_grid(one, architecture.token_size, grid) for one in maps.numpy()]
    for name, image in zip(ensemble.series, on_grid, strict=True):
        if name in decision.series_present:
            write_image(image, folder / f"{name_of_sample}_{name}{MAP_ENDING}")
    turned = [upright(image) for image in images]
    segmentation = sitk.GetArrayFromImage(upright(read_volume(Volume(case.mask))))
    x, y, z = turned[0].GetSpacing()
    save_activation(
        folder / f"{name_of_sample}.png",
        np.stack([sitk.GetArrayFromImage(image) for image in turned]),
        np.stack([sitk.GetArrayFromImage(upright(image)) for image in on_grid]),
        sample_mask(decision.sample, segmentation),
        ensemble.series,
        [decision.shares[name] for name in ensemble.series],
        f"{name_of_sample}: {ensemble.head.verdict(decision.said)}",
        (z, y, x),
        ensemble.head.sides,
    )


# --- what can be wrong -------------------------------------------------------------------------------------------------------


def _check_output(request: ClassifyRequest) -> None:
    nnunet.dataset_name(request.dataset)
    if request.output.suffix != ".csv":
        raise UserError(f"{request.output} is to be a table; give -o a name that ends in .csv")
    request.check_output(request.output, request.record, overwrite=request.overwrite)
    if request.map_folder.is_dir() and any(request.map_folder.iterdir()) and not request.maps:
        raise UserError(f"{request.map_folder} has maps of other predictions; give --maps --overwrite, or move it away")
    if not request.masks.is_dir():
        raise UserError(f"the folder of masks {request.masks} does not exist; give -m a folder with a mask for every case")


def _temperature(request: ClassifyRequest, ensemble: Ensemble) -> Temperature:
    if request.checkpoint_name != FINAL_CHECKPOINT:
        raise UserError(
            f"--calibrated: validation is that of {FINAL_CHECKPOINT}, -chk names {request.checkpoint_name}; leave one of them out"
        )
    if not ensemble.head.classes:
        raise UserError(
            f"--calibrated is for probabilities of classes, {request.model} gives {ensemble.head.said_name}; leave it out"
        )
    return fit_on_folds([request.model / f"fold_{fold}" for fold in ensemble.members], ensemble.head.classes)


def first_of(left_out: Mapping[str, str]) -> str:
    name, reason = next(iter(left_out.items()))
    return f"{name}: {reason}" + (f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else "")


# --- files -------------------------------------------------------------------------------------------------------------------


def cases_in(images: Path, masks: Path, dataset_json: Mapping[str, Any]) -> list[CaseToClassify]:
    """All cases of a folder in which none lacks a channel."""
    ending, num_channels = dataset_json["file_ending"], len(nnunet.channel_names(dataset_json))
    first = f"_0000{ending}"
    names = [file.name.removesuffix(first) for file in files_in(images, first)]
    channels = [f"_{channel:04d}{ending}" for channel in range(num_channels)]
    return [CaseToClassify(name, tuple(images / f"{name}{one}" for one in channels), masks / f"{name}{ending}") for name in names]


def masks_without_images(folder: Path, cases: Sequence[CaseToClassify]) -> list[str]:
    """A line that says so: images may have another ending, or lie elsewhere."""
    files = {f.name for f in folder.iterdir() if f.name.endswith(READABLE_ENDINGS) and not is_hidden(f)}
    others = sorted(files - {case.mask.name for case in cases})
    return [f"{len(others)} files in {folder} are masks of no image, such as {others[0]}"] if others else []


def _write_table(path: Path, decisions: Sequence[Decision], head: Head) -> None:
    """A row a sample: case, mask_label (empty for the whole mask), what is predicted, how far the folds are apart."""
    samples = [decision.sample for decision in decisions]
    table = pd.DataFrame({"case": [sample.case for sample in samples], "mask_label": [sample.mask_label for sample in samples]})
    table["mask_label"] = table["mask_label"].astype("Int64")
    columns = head.predicted(np.stack([decision.said for decision in decisions]))
    by_fold = np.stack([list(decision.by_fold.values()) for decision in decisions], axis=1)
    table = table.assign(**columns, **head.spread(by_fold))
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as temporary:
        table.to_csv(temporary, index=False, float_format=head.float_format)


def _record(
    request: ClassifyRequest, ensemble: Ensemble, decisions: Sequence[Decision], left_out: Mapping[str, str]
) -> dict[str, Any]:
    """What the table rests on."""
    settings = ensemble.settings
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": checkpoint.software(),
        "images": str(request.images.resolve()),
        "masks": str(request.masks.resolve()),
        "dataset": ensemble.plans.dataset_name,
        "trainer": request.trainer,
        "plans": request.plans,
        "plans_sha256": sha256(request.model / "plans.json"),
        "configuration": request.configuration,
        "device": request.device,
        "mask_labels": sorted(ensemble.mask_labels) if ensemble.by_mask_label and ensemble.mask_labels is not None else None,
        "mirroring": settings.csm.finetuning.mirroring,
        "patch_size": settings.csm.classification.patch_size,
        "series": ensemble.series,
        "target": ensemble.head.target,
        "classes": ensemble.head.classes,
        "checkpoints": ensemble.provenance,
        "samples": [
            {
                "case": decision.sample.case,
                "mask_label": decision.sample.mask_label,
                "series_present": decision.series_present,
                f"{ensemble.head.said_name}_by_fold": {fold: one.tolist() for fold, one in decision.by_fold.items()},
                "series_shares": decision.shares,
            }
            for decision in decisions
        ],
        "left_out": dict(left_out),
    }
