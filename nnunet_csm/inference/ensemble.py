"""The classifiers of some folds: loading, what they see of a case, and what they decide."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from jaxtyping import Float
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor
from tqdm import tqdm

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.diagnoses import Sample
from nnunet_csm.data.lesions import cut_sample, measure_names, measured_labels, measures_of, sample_mask
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.temperature import at_temperature
from nnunet_csm.heads.base import Head, head_in
from nnunet_csm.inference.frame import Frame
from nnunet_csm.inference.request import ModelRequest
from nnunet_csm.model.attribution import series_shares, token_maps
from nnunet_csm.model.classifier import MOST_DEVIATIONS, CSMClassifier, build_classifier, predictions
from nnunet_csm.model.planned import series_present
from nnunet_csm.plans import Configuration, read_configuration
from nnunet_csm.raw.cases import write_image
from nnunet_csm.raw.geometry import described_misfit
from nnunet_csm.raw.subjects import CaseError, Volume
from nnunet_csm.raw.volumes import READABLE_ENDINGS, look_at, nnunet_sees, read_volume, sha256

TRAINER = "nnUNetTrainerCSMClassifier"
# nnU-Net keeps segmentations as 16-bit integers
LARGEST_LABEL = 2**15 - 1


@dataclass(frozen=True)
class Ensemble:
    """The classifiers of some folds, and what they share.

    Attributes:
        head: what their outputs are.
        by_mask_label: labels of a mask are samples of their own, as in training.
        mask_labels: those that training had samples of; None where a checkpoint does not tell, and any label is classified.
        members: fold to classifier.
        provenance: of each of them, for the record.
        temperature: of their probabilities.
    """

    settings: Configuration
    plans: PlansManager
    configuration: ConfigurationManager
    dataset_json: dict[str, Any]
    head: Head
    by_mask_label: bool
    mask_labels: frozenset[int] | None
    members: dict[str, CSMClassifier]
    provenance: list[dict[str, Any]]
    device: torch.device
    temperature: float = 1.0

    @property
    def series(self) -> tuple[str, ...]:
        return self.settings.architecture.series

    @property
    def measured_labels(self) -> tuple[int, ...]:
        """Labels whose volumes are among the measures of a mask."""
        return measured_labels(self.plans.get_label_manager(self.dataset_json), self.by_mask_label)


@dataclass(frozen=True)
class CaseToClassify:
    """Where a case lies: `images` in the order of the channels, all of them there; the mask may be missing."""

    name: str
    images: tuple[Path, ...]
    mask: Path


@dataclass(frozen=True)
class Patch:
    """A sample as the classifiers see it.

    Attributes:
        sample: its class or number is not known, and is 0.
        voxels: (1, n, z, y, x).
        measures: (1, f), of the mask.
        frame: where they are on the grid of the files.
    """

    sample: Sample
    voxels: Tensor
    measures: Tensor
    frame: Frame


@dataclass(frozen=True)
class Decision:
    """What the ensemble says of a sample.

    Attributes:
        by_fold: what each says, see `Head.said`.
        shares: of the series in the decision; empty without maps.
        temperature: at which each fold's probabilities are averaged.
    """

    sample: Sample
    series_present: tuple[str, ...]
    by_fold: dict[str, Float[np.ndarray, " c"]]
    shares: dict[str, float]
    temperature: float = 1.0

    @property
    def said(self) -> Float[np.ndarray, " c"]:
        return at_temperature(np.stack(list(self.by_fold.values())), self.temperature).mean(0)


def load_ensemble(request: ModelRequest) -> Ensemble:
    """The classifiers of all folds asked for, in evaluation mode.

    Raises:
        UserError: a fold that was not trained, with other plans or classes than the others, or by another trainer.
    """
    remedy = f"train with `nnUNetv2_train {request.dataset} {request.configuration} FOLD -tr {TRAINER} -p {request.plans}`"
    dataset_json = nnunet.read_dataset_json(request.model / "dataset.json", remedy)
    if dataset_json["file_ending"] not in READABLE_ENDINGS:
        known = ", ".join(READABLE_ENDINGS)
        raise UserError(f"files that end in {dataset_json['file_ending']} cannot be classified; convert them to one of {known}")
    plans_file = request.model / "plans.json"
    plans = nnunet.read_json(plans_file, remedy)
    settings = read_configuration(plans, request.configuration, str(plans_file))
    device = request.torch_device()
    manager = PlansManager(plans)
    configuration = manager.get_configuration(request.configuration)
    members: dict[str, CSMClassifier] = {}
    provenance: list[dict[str, Any]] = []
    heads: dict[Path, tuple[Head, bool]] = {}
    mask_labels: set[int] | None = set()
    for fold in dict.fromkeys(request.folds):
        path = request.model / f"fold_{fold}" / request.checkpoint_name
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint; {remedy}, or choose trained folds with -f")
        saved = checkpoint.load(path)
        _check_checkpoint(saved, path, settings, configuration)
        heads[path] = head_in(saved), bool(saved["by_mask_label"])
        mask_labels = mask_labels | set(saved["mask_labels"]) if mask_labels is not None and "mask_labels" in saved else None
        labels = measured_labels(manager.get_label_manager(dataset_json), heads[path][1])
        num_channels, num_measures = len(nnunet.channel_names(dataset_json)), len(measure_names(labels))
        head = heads[path][0]
        network = build_classifier(settings, num_channels, head.num_outputs, num_measures, head.in_units)
        checkpoint.load_weights(network, saved["network_weights"], str(path))
        members[fold] = network.eval().to(device)
        entry: dict[str, Any] = {"fold": fold, "file": str(path), "sha256": sha256(path)}
        provenance.append(entry | {key: saved[key] for key in ("current_epoch", "encoder_source", "software") if key in saved})
    if len({(one.target, one.classes, by) for one, by in heads.values()}) > 1:
        found = (f"{path} knows {one.known()}{' by mask label' if by else ''}" for path, (one, by) in heads.items())
        raise UserError("; ".join(found) + "; train them alike")
    head, by_mask_label = next(iter(heads.values()))
    seen = None if mask_labels is None else frozenset(mask_labels)
    return Ensemble(settings, manager, configuration, dataset_json, head, by_mask_label, seen, members, provenance, device)


def prepare(case: CaseToClassify, ensemble: Ensemble) -> tuple[list[Patch], dict[str, str]]:
    """Preprocess a case as nnU-Net does and cut the patch of each of its samples.

    Returns:
        The patches, and why other samples (or the case) cannot be cut, by name.
    """
    reason, labels, mask_file = look_at_mask(case)
    if reason:
        return [], {case.name: reason}
    volume, segmentation, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(file) for file in case.images], str(mask_file), ensemble.plans, ensemble.configuration, ensemble.dataset_json
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
        voxels, placement = cut_sample(volume, mask, settings)
        if not voxels[list(ensemble.settings.architecture.channels)].any():
            left_out[sample.name] = f"none of {', '.join(ensemble.series)}, which the classifier looks at, is present"
            continue
        measures = measures_of(mask, segmentation[0], ensemble.measured_labels)[None]
        if far := _unlike_training(measures, ensemble):
            left_out[sample.name] = f"{case.mask}: {far}"
            continue
        frame = Frame.of(placement, volume.shape[1:], properties, ensemble.plans)
        patches.append(Patch(sample, voxels[None], measures, frame))
    return patches, left_out


def decide(patch: Patch, ensemble: Ensemble, with_maps: bool) -> tuple[Decision, Float[Tensor, "s gz gy gx"]]:
    """What the folds say of a sample and, of what they say together, the mean of their maps (empty without maps).

    Each says a mean over flips when the plans ask for mirroring; maps are of the patch as it is.
    """
    voxels, measures = patch.voxels.to(ensemble.device), patch.measures.to(ensemble.device)
    mirror = ensemble.settings.csm.finetuning.mirroring
    head, members = ensemble.head, ensemble.members
    by_fold = {fold: predictions(one, voxels, measures, mirror, head.said)[0].cpu().numpy() for fold, one in members.items()}
    broken = [fold for fold, one in by_fold.items() if not np.isfinite(one).all()]
    if broken:
        raise UserError(f"{patch.sample.name}: the classifier of fold {broken[0]} gives NaN; its training diverged, train again")
    channels = list(ensemble.settings.architecture.channels)
    present = series_present(voxels[:, channels])[0].tolist()
    shown = tuple(name for name, is_there in zip(ensemble.series, present, strict=True) if is_there)
    decision = Decision(patch.sample, shown, by_fold, {}, ensemble.temperature)
    if not with_maps:
        return decision, torch.empty(0, 0, 0, 0)
    score = partial(head.explained, said=decision.said)
    maps = torch.stack([token_maps(one, voxels, score, measures=measures) for one in members.values()]).mean(0)
    shares = dict(zip(ensemble.series, series_shares(maps)[0].tolist(), strict=True))
    return replace(decision, shares=shares), maps[0].cpu()


def _unlike_training(measures: Float[Tensor, "1 f"], ensemble: Ensemble) -> str:
    """Say what about the size of a mask no training sample was like; empty where all is well, or the heads do not see it."""
    for fold, member in ensemble.members.items():
        if member.measures is None:
            return ""
        far = member.measures.standardized(measures.to(ensemble.device))[0].abs()
        worst = int(far.argmax())
        if far[worst] > MOST_DEVIATIONS:
            name, found, usual = measure_names(ensemble.measured_labels)[worst], measures[0, worst], member.measures.mean[worst]
            if name.startswith("presence"):
                what = f"{name} in the mask is {found:.0f} (1: there), {usual:.2f} on average"
            else:
                what = f"the mask's {name} is {found.expm1():.0f} voxels at the spacing of the plans, about {usual.expm1():.0f}"
            return f"{what} in the training of fold {fold}, whose head looks at it; give a mask with the labels of dataset.json"
    return ""


def _check_checkpoint(saved: Mapping[str, Any], path: Path, settings: Configuration, configuration: ConfigurationManager) -> None:
    if "classes" not in saved:
        raise UserError(
            f"{path}: a network of {saved['trainer_name']}, which predicts no class and no number; "
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
            for name in ("patch_size", "margin", "scale", "pooling", "mask_features")
        },
    }
    for what, (one, other) in pairs.items():
        if one != other:
            raise UserError(f"{path}: {what} is {one}, plans.json of the model says {other}; train again, or restore the plans")


def look_at_mask(case: CaseToClassify) -> tuple[str, list[int], Path]:
    """Why a mask cannot be used (empty when it can), the labels in it, and the file that has it on the grid of the images."""
    if not case.mask.is_file():
        return f"{case.mask}: no such mask", [], case.mask
    try:
        mask, look, expected = read_volume(Volume(case.mask)), look_at(case.mask), look_at(case.images[0])
    except CaseError as error:
        return str(error), [], case.mask
    fit = look.fit_to(expected)
    if fit is None:
        misfit = described_misfit(look.places[0], expected.places[0], case.images[0].name)
        return f"{case.mask} is on another grid: it {misfit}; resample it to that grid", [], case.mask
    values = np.unique(sitk.GetArrayViewFromImage(mask))
    wrong = [value for value in values if value != np.round(value) or value > LARGEST_LABEL]
    if wrong:
        return (
            f"{case.mask}: the mask has the value {wrong[0]:g}, expected whole numbers up to {LARGEST_LABEL}, a label each",
            [],
            case.mask,
        )
    labels = [int(value) for value in values if value > 0]
    if not labels:
        return f"{case.mask}: the mask is empty", [], case.mask
    if fit.upright and nnunet_sees(case.mask, look):
        return "", labels, case.mask
    ending = next(one for one in READABLE_ENDINGS if case.mask.name.endswith(one))
    # beside the images, whose folder is a temporary one
    file = case.images[0].with_name(f"{case.name}_mask{ending}")
    write_image(fit.applied(mask), file)
    tqdm.write(f"{case.mask}: {fit.said}")
    return "", labels, file
