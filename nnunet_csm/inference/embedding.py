"""`nnunet_csm embed`: what a trained encoder, frozen, makes of raw images: a vector a case, and maps on the images' grid."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_csm import checkpoint, nnunet, weights_folder
from nnunet_csm.data.lesions import Placement
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.embeddings import check_format, embeddings_of, write_embeddings
from nnunet_csm.files import whole, whole_folder
from nnunet_csm.host_files import check_dataset_json
from nnunet_csm.hub import find_weights
from nnunet_csm.inference.classification import (
    MAP_ENDING,
    NUM_AHEAD,
    cases_in,
    first_of,
    made_ahead,
    masks_without_images,
)
from nnunet_csm.inference.ensemble import CaseToClassify, look_at_mask
from nnunet_csm.inference.frame import Frame
from nnunet_csm.inference.request import ModelRequest
from nnunet_csm.inference.segmentation import complete_cases
from nnunet_csm.machine import keep_freed_memory
from nnunet_csm.model.frozen import FrozenEncoder, ImageFeatures, frozen_encoder, untrained_encoder
from nnunet_csm.plans import Configuration, configuration_of, read_configuration
from nnunet_csm.raw.cases import write_image
from nnunet_csm.raw.check import files_by_case
from nnunet_csm.raw.volumes import READABLE_ENDINGS, sha256

# of random weights
SEED = 0
# a channel of the images that is not looked at
LEFT_OUT = "-"
JOIN = "+"


@dataclass(frozen=True)
class EmbedRequest(ModelRequest):
    """What is to be embedded by what.

    Attributes:
        images: folder with CASE_0000.nii.gz ..., as far as a case has the series.
        output: the table to write; the JSON beside it has its name, maps are in a folder of its name and `_dense`.
        encoder: a checkpoint of any of our trainings, or exported weights (`hub.find_weights`); None for that of the dataset,
            plans and fold.
        series: of each channel of the images, as the encoder names it, or `LEFT_OUT`; None: as in the encoder's dataset.
        masks: folder with CASE.nii.gz, over which features are pooled; None: over the images' foreground.
        dense: also write the features of all places.
        untrained: random weights of the same plans.
        step_size: from tile to tile, as a share of the tile.
        overwrite: replace what is there.
    """

    images: Path
    output: Path
    encoder: Path | None = None
    series: tuple[str, ...] | None = None
    masks: Path | None = None
    dense: bool = False
    untrained: bool = False
    step_size: float = 0.5
    overwrite: bool = False

    def __post_init__(self) -> None:
        if bool(self.dataset) == bool(self.encoder):
            raise UserError("which encoder? give -d with -p, -tr and -f, or the path of a checkpoint with -encoder, one of both")
        if not 0 < self.step_size <= 1:
            raise UserError(
                f"a step size of {self.step_size}; expected a share of the tile, above 0 and up to 1, with -step_size"
            )

    @property
    def record(self) -> Path:
        return self.output.with_suffix(".json")

    @property
    def dense_folder(self) -> Path:
        return self.output.with_name(f"{self.output.stem}_dense")

    @property
    def checkpoint(self) -> Path:
        """The one checkpoint that is asked for.

        Raises:
            UserError: there is none, or several, whose features are of different networks.
        """
        if self.encoder is not None:
            return find_weights(str(self.encoder))
        return self.of_one_fold("features of several networks have no mean")


@dataclass(frozen=True)
class Origin:
    """An encoder, and what its images are preprocessed by.

    Attributes:
        channels: of the images of its dataset, by the series that it looks at there.
        training_cases: those that it was trained on, as far as its checkpoint tells.
        provenance: for the record.
    """

    encoder: FrozenEncoder
    settings: Configuration
    plans: dict[str, Any]
    configuration: str
    dataset_json: dict[str, Any]
    training_cases: frozenset[str]
    provenance: dict[str, Any]

    @property
    def channels(self) -> dict[str, int]:
        architecture = self.settings.architecture
        return dict(zip(architecture.series, architecture.channels, strict=True))


def load_origin(request: EmbedRequest) -> Origin:
    """The encoder that is asked for. Without weights (`untrained`), plans in the preprocessed folder will do.

    Raises:
        UserError: no such checkpoint or plans, or one without an encoder of ours.
    """
    torch.manual_seed(SEED)
    if request.untrained and request.encoder is None:
        folder = nnunet.folder("nnUNet_preprocessed") / nnunet.dataset_name(request.dataset)
        file, remedy = folder / f"{request.plans}.json", "write it with `nnunet_csm plan`, or choose plans with -p"
        plans, configuration = nnunet.read_plans(file, remedy), request.configuration
        dataset_json = nnunet.read_dataset_json(folder / "dataset.json", remedy)
        settings = read_configuration(plans, configuration, str(file))
        encoder = untrained_encoder(settings, configuration_of(plans, configuration, str(file))["spacing"])
        provenance = {"plans_file": str(file), "sha256": sha256(file)}
    else:
        file = request.checkpoint
        return origin_of(checkpoint.load(file), file, trained=not request.untrained)
    return _readable(Origin(encoder, settings, plans, configuration, dataset_json, frozenset(), provenance), file)


def origin_of(saved: Mapping[str, Any], file: Path, trained: bool = True) -> Origin:
    """The encoder in what `checkpoint.load` has read of `file`; random weights, if not `trained`. Raises as `load_origin`."""
    plans, configuration = saved["init_args"]["plans"], saved["init_args"]["configuration"]
    dataset_json = saved["init_args"].get("dataset_json") or {}
    check_dataset_json(dataset_json, f"{file}: dataset.json")
    settings = read_configuration(plans, configuration, str(file))
    encoder = frozen_encoder(saved, str(file), trained)
    cases = frozenset(saved.get("training_cases", ())) if trained else frozenset()
    # of exported weights the JSON tells the hash of the tensors
    told = file / weights_folder.CONFIG if file.is_dir() else file
    provenance = {"checkpoint": str(file), "sha256": sha256(told)}
    provenance |= {key: saved[key] for key in ("trainer_name", "current_epoch", "software") if key in saved}
    return _readable(Origin(encoder, settings, plans, configuration, dataset_json, cases, provenance), file)


def _readable(origin: Origin, file: Path) -> Origin:
    if (ending := origin.dataset_json["file_ending"]) not in READABLE_ENDINGS:
        known = ", ".join(READABLE_ENDINGS)
        raise UserError(f"{file}: its images end in {ending}, which this command cannot read; expected {known}")
    return origin


def embed(request: EmbedRequest) -> list[str]:
    """Embed all cases of a folder; nothing is written unless all is well.

    Returns:
        Lines to print.

    Raises:
        UserError: no such encoder, images that cannot be used, output that is there, or no case with a usable mask.
    """
    check_format(request.output)
    request.check_output(request.output, request.record, overwrite=request.overwrite)
    if request.masks is not None and not request.masks.is_dir():
        raise UserError(f"the folder of masks {request.masks} does not exist; give -m a folder with a mask for every case")
    device, origin = request.torch_device(), load_origin(request)
    if device.type == "cpu":
        keep_freed_memory()
    origin.encoder.to(device)
    found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}
    left_out: dict[str, str] = {}
    with (
        in_its_channels(request, origin) as arranged,
        complete_cases(arranged, origin.dataset_json, origin.settings, request.images) as images,
        whole_folder(request.dense_folder, request.overwrite) if request.dense else nullcontext() as maps,
    ):
        cases = cases_in(images, request.masks or images, origin.dataset_json)
        prepared = made_ahead(lambda case: prepare(case, origin, request.masks is not None), cases, NUM_AHEAD)
        with closing(prepared):
            for case, made in zip(tqdm(cases, "embedding", unit="case", disable=None), prepared, strict=True):
                if isinstance(made, str):
                    left_out[case.name] = made
                    continue
                features = origin.encoder.features(made.volumes, False, made.where, request.step_size)
                vector = features.vector.cpu().numpy()
                if not np.isfinite(vector).all():
                    raise UserError(f"{case.name}: the encoder gives NaN; its training diverged, take another checkpoint")
                found[case.name] = tuple(made.volumes), vector
                if maps is not None:
                    write_dense(maps / f"{case.name}{MAP_ENDING}", features, made.frame, origin)
        if not found:
            raise UserError(f"no case of {request.images} can be embedded: {first_of(left_out)}")
    seen = {one.split("/")[-1] for one in origin.training_cases}
    record = _record(request, origin, {name: series for name, (series, _) in found.items()}, left_out, seen)
    table = embeddings_of({name: (JOIN.join(series), vector) for name, (series, vector) in found.items()})
    request.record.parent.mkdir(parents=True, exist_ok=True)
    with whole(request.record) as temporary:
        # where the table cannot be written, the record stays as it was, too
        temporary.write_text(json.dumps(record, indent=4), encoding="utf-8")
        write_embeddings(table, request.output)
    lines = [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    if request.masks is not None:
        lines += masks_without_images(request.masks, cases)
    if both := seen & set(found):
        lines.append(f"{len(both)} cases have the names of cases that the encoder was trained on, such as {min(both)}")
    lines.append(f"{len(found)} cases in {request.output}, {len(vector)} features each; {len(left_out)} left out")
    return [*lines, f"features of all places are in {request.dense_folder}"] if request.dense else lines


@dataclass(frozen=True)
class Prepared:
    """A case as the encoder sees it: preprocessed volumes (z, y, x) of the series it has, and what is pooled over."""

    volumes: dict[str, Float[np.ndarray, "z y x"]]
    where: Bool[np.ndarray, "z y x"]
    frame: Frame


def prepare(case: CaseToClassify, origin: Origin, with_mask: bool) -> Prepared | str:
    """Preprocess a case as nnU-Net does; a sentence that says why, where it cannot be used.

    Foreground is where nnU-Net sees an image: any series other than 0, holes filled.
    """
    reason, _, mask_file = look_at_mask(case) if with_mask else ("", [], None)
    if reason:
        return reason
    manager = PlansManager(origin.plans)
    volume, segmentation, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(file) for file in case.images],
        str(mask_file) if mask_file else None,
        manager,
        manager.get_configuration(origin.configuration),
        origin.dataset_json,
    )
    where = segmentation[0] > 0 if with_mask else segmentation[0] >= 0
    if not where.any():
        return f"{case.mask}: nothing of the mask is left at the spacing of the plans, or where images are"
    volumes = {name: volume[channel] for name, channel in origin.channels.items() if volume[channel].any()}
    placement = Placement((0.0, 0.0, 0.0), 1.0, origin.encoder.patch_size)
    return Prepared(volumes, where, Frame.of(placement, volume.shape[1:], properties, manager))


def write_dense(path: Path, features: ImageFeatures, frame: Frame, origin: Origin) -> None:
    """The map of a case as NIfTI, a vector a voxel, a voxel a token, where the token lies in the image."""
    maps = features.map.permute(1, 2, 3, 0).cpu().numpy()
    write_image(frame.image(maps, origin.encoder.token_size), path)


@contextmanager
def in_its_channels(request: EmbedRequest, origin: Origin) -> Iterator[Path]:
    """The folder of the images or, where `series` names their channels, a temporary one with the channels of the encoder.

    Raises:
        UserError: a series that the encoder does not know, or a channel without a name.
    """
    if request.series is None:
        yield request.images
        return
    named = [name for name in request.series if name != LEFT_OUT]
    known = origin.channels
    if not named or len(set(named)) < len(named) or not set(named) <= set(known):
        raise UserError(
            f"-series {' '.join(request.series)}: expected for each channel of the images another of {', '.join(known)}, or "
            f"{LEFT_OUT} where it is left out"
        )
    ending = origin.dataset_json["file_ending"]
    cases, problems = files_by_case(request.images, request.series, ending)
    if problems:
        raise UserError(problems[0])
    files = {
        f"{case}_{known[name]:04d}{ending}": file
        for case, of_case in cases.items()
        for channel, file in of_case.items()
        if (name := request.series[channel]) != LEFT_OUT
    }
    with linked(files, request.images) as arranged:
        yield arranged


@contextmanager
def linked(files: Mapping[str, Path], images: Path) -> Iterator[Path]:
    """A temporary folder with links of other names to files of `images`; errors name the files."""
    with TemporaryDirectory(prefix="nnunet_csm_") as temporary:
        for name, file in files.items():
            (Path(temporary) / name).symlink_to(file.resolve())
        try:
            yield Path(temporary)
        except UserError as error:
            text = str(error)
            for name, file in files.items():
                text = text.replace(str(Path(temporary) / name), str(file))
            raise UserError(text.replace(temporary, str(images))) from None


def _record(
    request: EmbedRequest,
    origin: Origin,
    series: Mapping[str, Sequence[str]],
    left_out: Mapping[str, str],
    seen: set[str],
) -> dict[str, Any]:
    """What the table rests on."""
    encoder = origin.encoder
    return {
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": checkpoint.software(),
        "images": str(request.images.resolve()),
        "masks": str(request.masks.resolve()) if request.masks else None,
        "encoder": {"untrained": request.untrained, **origin.provenance},
        "dataset": origin.plans["dataset_name"],
        "plans": origin.plans["plans_name"],
        "configuration": origin.configuration,
        "spacing": list(encoder.spacing),
        "patch_size": list(encoder.patch_size),
        "token_size": list(encoder.token_size),
        "step_size": request.step_size,
        "series": list(encoder.series),
        "cases": {name: {"series": list(of), "seen_in_training": name in seen} for name, of in series.items()},
        "left_out": dict(left_out),
    }
