"""`nnunet_csm classify`: raw images and masks to class probabilities, and maps of what every series adds to the decision."""

import csv
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Float
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor
from tqdm import tqdm

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.crops import Size
from nnunet_csm.data.diagnoses import Sample
from nnunet_csm.data.lesions import Placement, cut_around, sample_mask
from nnunet_csm.errors import UserError
from nnunet_csm.figures.activation import save_activation
from nnunet_csm.inference.segmentation import complete_cases
from nnunet_csm.model.attribution import series_shares, token_maps
from nnunet_csm.model.classifier import CSMClassifier, build_classifier, probabilities
from nnunet_csm.model.segmenter import series_present
from nnunet_csm.plans import Configuration, read_configuration
from nnunet_csm.raw.grid import Grid
from nnunet_csm.raw.subjects import CaseError, Volume
from nnunet_csm.raw.volumes import READABLE_ENDINGS, read_volume, sha256
from nnunet_csm.raw.writer import whole_folder, write_image

TRAINER = "nnUNetTrainerCSMClassifier"
MAP_ENDING = ".nii.gz"
# cases that are preprocessed while the networks look at another one, each by a thread; two were no faster than one
NUM_AHEAD = 1
# nnU-Net keeps segmentations as 16-bit integers
LARGEST_LABEL = 2**15 - 1

Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True)
class ClassifyRequest:
    """What is to be classified by what.

    Attributes:
        dataset: name or ID; with trainer, plans and configuration, it names the folder of the model as in nnU-Net.
        folds: whose probabilities are averaged.
        images: folder with CASE_0000.nii.gz ..., as far as a case has the series.
        masks: folder with CASE.nii.gz, such as labels or what a segmenter has predicted.
        output: the CSV to write; the JSON beside it has its name, maps are in a folder of its name and `_maps`.
        maps: write what every series adds to the decision, as NIfTI and as pictures.
        strict: a sample that cannot be classified is an error, not a line in a report.
        overwrite: replace what is there.
    """

    dataset: str
    trainer: str
    plans: str
    configuration: str
    folds: tuple[str, ...]
    checkpoint_name: str
    images: Path
    masks: Path
    output: Path
    device: str
    maps: bool = False
    strict: bool = False
    overwrite: bool = False

    @property
    def model(self) -> Path:
        name = nnunet.dataset_name(self.dataset)
        return nnunet.folder("nnUNet_results") / name / f"{self.trainer}__{self.plans}__{self.configuration}"

    @property
    def record(self) -> Path:
        return self.output.with_suffix(".json")

    @property
    def map_folder(self) -> Path:
        return self.output.with_name(f"{self.output.stem}_maps")


@dataclass(frozen=True)
class Ensemble:
    """The classifiers of some folds, and what they share.

    Attributes:
        by_mask_label: labels of a mask are samples of their own, as in training.
        mask_labels: those that training had samples of; None where a checkpoint does not tell, and any label is classified.
        members: fold to classifier.
        provenance: of each of them, for the record.
    """

    settings: Configuration
    plans: PlansManager
    configuration: ConfigurationManager
    dataset_json: dict[str, Any]
    classes: tuple[str, ...]
    by_mask_label: bool
    mask_labels: frozenset[int] | None
    members: dict[str, CSMClassifier]
    provenance: list[dict[str, Any]]
    device: torch.device

    @property
    def series(self) -> tuple[str, ...]:
        return self.settings.architecture.series


@dataclass(frozen=True)
class CaseFiles:
    """Where a case lies: `images` in the order of the channels, all of them there; the mask may be missing."""

    name: str
    images: tuple[Path, ...]
    mask: Path


@dataclass(frozen=True)
class Patch:
    """A sample as the classifiers see it.

    Attributes:
        sample: its class is not known, and is 0.
        voxels: (1, n, z, y, x).
        frame: where they are on the grid of the files.
    """

    sample: Sample
    voxels: Tensor
    frame: "Frame"


@dataclass(frozen=True)
class Decision:
    """What the ensemble says of a sample.

    Attributes:
        by_fold: probabilities of the classes.
        shares: of the series in the decision for the most probable class; empty without maps.
    """

    sample: Sample
    series_present: tuple[str, ...]
    by_fold: dict[str, Float[np.ndarray, " c"]]
    shares: dict[str, float]

    @property
    def probabilities(self) -> Float[np.ndarray, " c"]:
        return np.mean(list(self.by_fold.values()), axis=0)

    @property
    def class_index(self) -> int:
        return int(self.probabilities.argmax())


def classify(request: ClassifyRequest) -> list[str]:
    """Classify all cases of a folder; nothing is written unless all is well.

    Returns:
        Lines to print.

    Raises:
        UserError: no such model, a model that does not classify, images that cannot be used, output that is there; with
            `strict`, a sample without a usable mask; no sample at all.
    """
    _check_output(request)
    ensemble = load_ensemble(request)
    decisions: list[Decision] = []
    left_out: dict[str, str] = {}
    with (
        complete_cases(request.images, ensemble.dataset_json, ensemble.settings) as images,
        whole_folder(request.map_folder, request.overwrite) if request.maps else nullcontext() as maps,
    ):
        cases = _cases(images, request.masks, ensemble.dataset_json)
        with closing(made_ahead(lambda case: prepare(case, ensemble), cases, NUM_AHEAD)) as prepared:
            for case, (patches, unusable) in zip(tqdm(cases, "classifying", unit="case", disable=None), prepared, strict=True):
                left_out |= unusable
                if request.strict and left_out:
                    raise UserError(f"{_first(left_out)}; leave out --strict to classify the other samples")
                for patch in patches:
                    decision, added = decide(patch, ensemble, with_maps=request.maps)
                    decisions.append(decision)
                    if maps is not None:
                        write_maps(maps, decision, added, patch.frame, case, ensemble)
        if not decisions:
            raise UserError(f"no sample of {request.images} can be classified: {_first(left_out)}")
    _write_table(request.output, decisions, ensemble.classes)
    nnunet.save_json(_record(request, ensemble, decisions, left_out), request.record)
    lines = [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    lines += _masks_without_images(request.masks, cases)
    counts = {one: sum(ensemble.classes[d.class_index] == one for d in decisions) for one in ensemble.classes}
    listed = ", ".join(f"{count} {one}" for one, count in counts.items())
    lines.append(f"{len(decisions)} samples in {request.output}: {listed}; {len(left_out)} left out")
    return [*lines, f"maps are in {request.map_folder}"] if request.maps else lines


def load_ensemble(request: ClassifyRequest) -> Ensemble:
    """The classifiers of all folds asked for, in evaluation mode.

    Raises:
        UserError: a fold that was not trained, with other plans or classes than the others, or by another trainer.
    """
    remedy = f"train with `nnUNetv2_train {request.dataset} {request.configuration} FOLD -tr {TRAINER} -p {request.plans}`"
    dataset_json = nnunet.read_json(request.model / "dataset.json", remedy)
    if dataset_json["file_ending"] not in READABLE_ENDINGS:
        known = ", ".join(READABLE_ENDINGS)
        raise UserError(f"files that end in {dataset_json['file_ending']} cannot be classified; convert them to one of {known}")
    plans_file = request.model / "plans.json"
    plans = nnunet.read_json(plans_file, remedy)
    settings = read_configuration(plans, request.configuration, str(plans_file))
    device = _device(request.device)
    manager = PlansManager(plans)
    configuration = manager.get_configuration(request.configuration)
    members: dict[str, CSMClassifier] = {}
    provenance: list[dict[str, Any]] = []
    told: dict[Path, tuple[tuple[str, ...], bool]] = {}
    mask_labels: set[int] | None = set()
    for fold in dict.fromkeys(request.folds):
        path = request.model / f"fold_{fold}" / request.checkpoint_name
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint; {remedy}, or choose trained folds with -f")
        saved = checkpoint.load(path)
        _check_checkpoint(saved, path, settings, configuration)
        told[path] = (tuple(saved["classes"]), bool(saved["by_mask_label"]))
        mask_labels = mask_labels | set(saved["mask_labels"]) if mask_labels is not None and "mask_labels" in saved else None
        network = build_classifier(settings, len(nnunet.channel_names(dataset_json)), len(saved["classes"]))
        network.load_state_dict(saved["network_weights"])
        members[fold] = network.eval().to(device)
        entry: dict[str, Any] = {"fold": fold, "file": str(path), "sha256": sha256(path)}
        provenance.append(entry | {key: saved[key] for key in ("current_epoch", "encoder_source", "software") if key in saved})
    if len(set(told.values())) > 1:
        found = (f"{path} knows {', '.join(names)}{' by mask label' if by else ''}" for path, (names, by) in told.items())
        raise UserError("; ".join(found) + "; train them alike")
    classes, by_mask_label = next(iter(told.values()))
    labels = None if mask_labels is None else frozenset(mask_labels)
    return Ensemble(settings, manager, configuration, dataset_json, classes, by_mask_label, labels, members, provenance, device)


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


def prepare(case: CaseFiles, ensemble: Ensemble) -> tuple[list[Patch], dict[str, str]]:
    """Preprocess a case as nnU-Net does and cut the patch of each of its samples.

    Returns:
        The patches, and why other samples (or the case) cannot be cut, by name.
    """
    reason, labels = _look_at_mask(case)
    if reason:
        return [], {case.name: reason}
    volume, segmentation, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(file) for file in case.images], str(case.mask), ensemble.plans, ensemble.configuration, ensemble.dataset_json
    )
    settings = ensemble.settings.csm.classification
    patches: list[Patch] = []
    left_out: dict[str, str] = {}
    for label in labels if ensemble.by_mask_label else (None,):
        sample = Sample(case.name, 0, label, case.name)
        if label is not None and ensemble.mask_labels is not None and label not in ensemble.mask_labels:
            known = ", ".join(map(str, sorted(ensemble.mask_labels)))
            left_out[sample.name] = f"{case.mask}: training had no sample of label {label}, only of {known}"
            continue
        mask = sample_mask(sample, segmentation[0])
        if not mask.any():
            left_out[sample.name] = f"{case.mask}: nothing of the mask is left at the spacing of the plans, or where images are"
            continue
        voxels, placement = cut_around(volume, mask, settings.patch_size, settings.margin)
        if not voxels[list(ensemble.settings.architecture.channels)].any():
            left_out[sample.name] = f"none of {', '.join(ensemble.series)}, which the classifier looks at, is present"
            continue
        patches.append(Patch(sample, voxels[None], Frame.of(placement, volume.shape[1:], properties, ensemble.plans)))
    return patches, left_out


def decide(patch: Patch, ensemble: Ensemble, with_maps: bool) -> tuple[Decision, Float[Tensor, "s gz gy gx"]]:
    """Probabilities of a sample and, for its most probable class, the mean of the folds' maps (empty without maps).

    Probabilities are means over flips when the plans ask for mirroring; maps are of the patch as it is.
    """
    voxels = patch.voxels.to(ensemble.device)
    mirror = ensemble.settings.csm.finetuning.mirroring
    by_fold = {fold: probabilities(one, voxels, mirror)[0].cpu().numpy() for fold, one in ensemble.members.items()}
    broken = [fold for fold, one in by_fold.items() if not np.isfinite(one).all()]
    if broken:
        raise UserError(f"{patch.sample.name}: the classifier of fold {broken[0]} gives NaN; its training diverged, train again")
    channels = list(ensemble.settings.architecture.channels)
    present = series_present(voxels[:, channels])[0].tolist()
    shown = tuple(name for name, is_there in zip(ensemble.series, present, strict=True) if is_there)
    decision = Decision(patch.sample, shown, by_fold, {})
    if not with_maps:
        return decision, torch.empty(0, 0, 0, 0)
    maps = torch.stack([token_maps(one, voxels, decision.class_index) for one in ensemble.members.values()]).mean(0)
    shares = dict(zip(ensemble.series, series_shares(maps)[0].tolist(), strict=True))
    return replace(decision, shares=shares), maps[0].cpu()


# --- maps on the grid of the files -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where the voxels of a patch are: `first + step * i` in the array that nnU-Net has read, and where that array is.

    Attributes:
        first, step: along the axes of that array, in its voxels.
        axes: of the patch, in the order of the array (nnU-Net's `transpose_backward`).
        grid: of the array; it may have other axes than the file, when nnU-Net's reader reorients.
    """

    first: tuple[float, float, float]
    step: tuple[float, float, float]
    axes: tuple[int, int, int]
    grid: Grid

    @classmethod
    def of(cls, placement: Placement, shape: Sequence[int], properties: Mapping[str, Any], plans: PlansManager) -> "Frame":
        """Undo, from the last to the first, what preprocessing did: cut, resample, crop, transpose.

        `shape` is that of the preprocessed volume, from which the patch was cut.
        """
        cropped = properties["shape_after_cropping_and_before_resampling"]
        axes = tuple(int(axis) for axis in plans.transpose_backward)
        first, step = [], []
        for axis in axes:
            scale = cropped[axis] / shape[axis]
            begin = properties["bbox_used_for_cropping"][axis][0]
            # resampling lets the edges of the first voxels coincide, not their centres
            first.append(float(begin + (placement.start[axis] + 0.5) * scale - 0.5))
            step.append(float(placement.factor * scale))
        size = [int(properties["shape_before_cropping"][axis]) for axis in axes]
        return cls(_triple(first), _triple(step), _triple(axes), _grid_of_array(properties, size))

    def on_grid(self, maps: Float[np.ndarray, "gz gy gx"], token_size: Size, grid: Grid) -> sitk.Image:
        """A map of tokens as an image on `grid`: linear between the tokens' centres, 0 outside the patch."""
        edges = [token_size[axis] for axis in self.axes]
        image = sitk.GetImageFromArray(maps.transpose(self.axes).astype(np.float32))
        centre = [f + s * (e - 1) / 2 for f, s, e in zip(self.first, self.step, edges, strict=True)]
        array = self.grid.zeros()
        image.SetOrigin(array.TransformContinuousIndexToPhysicalPoint(centre[::-1]))
        lengths = zip(self.grid.spacing, self.step[::-1], edges[::-1], strict=True)
        image.SetSpacing([spacing * step * edge for spacing, step, edge in lengths])
        image.SetDirection(self.grid.direction)
        identity = sitk.Transform(3, sitk.sitkIdentity)
        return sitk.Resample(image, grid.size, identity, sitk.sitkLinear, grid.origin, grid.spacing, grid.direction, 0.0)


def _grid_of_array(properties: Mapping[str, Any], size: Sequence[int]) -> Grid:
    """Geometry of the array that nnU-Net's readers made of a file, by what they note of it; `size` is (z, y, x)."""
    shape = tuple(reversed(size))
    if "sitk_stuff" in properties:
        noted = properties["sitk_stuff"]
        return Grid(shape, tuple(noted["spacing"]), tuple(noted["origin"]), tuple(noted["direction"]))
    noted = properties["nibabel_stuff"]
    # ITK's world has x and y reversed
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ noted.get("reoriented_affine", noted["original_affine"])
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    direction = (affine[:3, :3] / spacing).flatten()
    return Grid(shape, tuple(spacing.tolist()), tuple(affine[:3, 3].tolist()), tuple(direction.tolist()))


def write_maps(
    folder: Path,
    decision: Decision,
    maps: Float[Tensor, "s gz gy gx"],
    frame: Frame,
    case: CaseFiles,
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
    upright = [_upright(image) for image in images]
    segmentation = sitk.GetArrayFromImage(_upright(read_volume(Volume(case.mask))))
    x, y, z = upright[0].GetSpacing()
    verdict = f"{ensemble.classes[decision.class_index]}, probability {decision.probabilities.max():.2f}"
    save_activation(
        folder / f"{name_of_sample}.png",
        np.stack([sitk.GetArrayFromImage(image) for image in upright]),
        np.stack([sitk.GetArrayFromImage(_upright(image)) for image in on_grid]),
        sample_mask(decision.sample, segmentation),
        ensemble.series,
        [decision.shares[name] for name in ensemble.series],
        f"{name_of_sample}: {verdict}",
        (z, y, x),
    )


def _upright(image: sitk.Image) -> sitk.Image:
    """A picture shows the patient's right on its left, whatever the file's orientation."""
    return sitk.DICOMOrient(image, "LPS")


def _triple(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    z, y, x = values
    return z, y, x


# --- what can be wrong -------------------------------------------------------------------------------------------------------


def _check_output(request: ClassifyRequest) -> None:
    nnunet.dataset_name(request.dataset)
    if request.output.suffix != ".csv":
        raise UserError(f"{request.output} is to be a table; give -o a name that ends in .csv")
    for path in (request.output, request.record):
        if path.exists() and not request.overwrite:
            raise UserError(f"{path} exists and is kept; give --overwrite to replace it, or another name")
    if request.map_folder.is_dir() and any(request.map_folder.iterdir()) and not request.maps:
        raise UserError(f"{request.map_folder} has maps of other predictions; give --maps --overwrite, or move it away")
    folder = next(folder for folder in request.output.absolute().parents if folder.exists())
    if request.output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        wrong = request.output if request.output.is_dir() else folder
        raise UserError(f"{request.output} cannot be written because of {wrong}; give -o a file in a folder you may write to")
    if not request.masks.is_dir():
        raise UserError(f"the folder of masks {request.masks} does not exist; give -m a folder with a mask for every case")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device found; classify on the CPU with -device cpu, or check the driver with nvidia-smi")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("no Apple GPU (mps) found; classify on the CPU with -device cpu")
    return torch.device(name)


def _check_checkpoint(saved: Mapping[str, Any], path: Path, settings: Configuration, configuration: ConfigurationManager) -> None:
    if "classes" not in saved:
        raise UserError(
            f"{path}: a network of {saved['trainer_name']}, which gives no class probabilities; "
            f"choose one of {TRAINER} with -tr, or segment with `nnunet_csm predict`"
        )
    init_args = saved["init_args"]
    found = read_configuration(init_args["plans"], init_args["configuration"], str(path))
    preprocessing = PlansManager(init_args["plans"]).get_configuration(init_args["configuration"])
    pairs = {
        "network": (found.architecture, settings.architecture),
        "spacing": (list(preprocessing.spacing), list(configuration.spacing)),
        "normalization_schemes": (preprocessing.normalization_schemes, configuration.normalization_schemes),
        **{
            f"classification.{name}": (getattr(found.csm.classification, name), getattr(settings.csm.classification, name))
            for name in ("patch_size", "margin", "pooling")
        },
    }
    for what, (one, other) in pairs.items():
        if one != other:
            raise UserError(f"{path}: {what} is {one}, plans.json of the model says {other}; train again, or restore the plans")


def _look_at_mask(case: CaseFiles) -> tuple[str, list[int]]:
    """Why a mask cannot be used (empty when it can), and the labels in it."""
    if not case.mask.is_file():
        return f"{case.mask}: no such mask", []
    try:
        mask = read_volume(Volume(case.mask))
    except CaseError as error:
        return str(error), []
    grid, expected = Grid.of(mask), Grid.of(read_volume(Volume(case.images[0])))
    if not grid.same_as(expected):
        return f"{case.mask} is on a grid of {grid}, the images on one of {expected}; resample it to theirs", []
    values = np.unique(sitk.GetArrayViewFromImage(mask))
    wrong = [value for value in values if value != np.round(value) or value > LARGEST_LABEL]
    if wrong:
        return f"{case.mask}: the mask has the value {wrong[0]:g}, expected whole numbers up to {LARGEST_LABEL}, a label each", []
    labels = [int(value) for value in values if value > 0]
    return ("", labels) if labels else (f"{case.mask}: the mask is empty", [])


def _first(left_out: Mapping[str, str]) -> str:
    name, reason = next(iter(left_out.items()))
    return f"{name}: {reason}" + (f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else "")


# --- files -------------------------------------------------------------------------------------------------------------------


def _cases(images: Path, masks: Path, dataset_json: Mapping[str, Any]) -> list[CaseFiles]:
    """All cases of a folder in which none lacks a channel."""
    ending, num_channels = dataset_json["file_ending"], len(nnunet.channel_names(dataset_json))
    first = f"_0000{ending}"
    names = sorted(f.name.removesuffix(first) for f in images.glob(f"*{first}") if not f.name.startswith("."))
    channels = [f"_{channel:04d}{ending}" for channel in range(num_channels)]
    return [CaseFiles(name, tuple(images / f"{name}{one}" for one in channels), masks / f"{name}{ending}") for name in names]


def _masks_without_images(folder: Path, cases: Sequence[CaseFiles]) -> list[str]:
    """A line that says so: images may have another ending, or lie elsewhere."""
    files = {f.name for f in folder.iterdir() if f.name.endswith(READABLE_ENDINGS) and not f.name.startswith(".")}
    others = sorted(files - {case.mask.name for case in cases})
    return [f"{len(others)} files in {folder} are masks of no image, such as {others[0]}"] if others else []


def _write_table(path: Path, decisions: Sequence[Decision], classes: Sequence[str]) -> None:
    """A row a sample: case, mask_label (empty for the whole mask), a probability for every class, the most probable class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["case", "mask_label", *(f"p_{name}" for name in classes), "predicted"])
        for decision in decisions:
            label = "" if decision.sample.mask_label is None else decision.sample.mask_label
            numbers = [f"{probability:.6f}" for probability in decision.probabilities]
            writer.writerow([decision.sample.case, label, *numbers, classes[decision.class_index]])
    temporary.replace(path)


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
        "classes": ensemble.classes,
        "checkpoints": ensemble.provenance,
        "samples": [
            {
                "case": decision.sample.case,
                "mask_label": decision.sample.mask_label,
                "series_present": decision.series_present,
                "probabilities_by_fold": {fold: one.tolist() for fold, one in decision.by_fold.items()},
                "series_shares": decision.shares,
            }
            for decision in decisions
        ],
        "left_out": dict(left_out),
    }
