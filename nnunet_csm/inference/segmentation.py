"""Prediction: what is checked and completed before nnU-Net predicts (its own errors come late, after files were written), and
nnU-Net's prediction with a faster sliding window.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.export import FAILED, is_whole, whole_exports
from nnunet_csm.inference.missing import fill_missing
from nnunet_csm.inference.request import ModelRequest
from nnunet_csm.inference.sliding_window import BatchedPredictor
from nnunet_csm.inference.uncertainty import cases_in_table, predict_with_members
from nnunet_csm.listing import UNCERTAINTY, uncertainty_map
from nnunet_csm.machine import keep_freed_memory, num_threads
from nnunet_csm.plans import Configuration, read_architecture, read_configuration
from nnunet_csm.processes import no_worker_left
from nnunet_csm.raw.check import check_inputs
from nnunet_csm.raw.volumes import READABLE_ENDINGS

TRAINER = "nnUNetTrainerCSM"


@dataclass(frozen=True)
class PredictRequest(ModelRequest):
    """What is to be segmented by what; as the flags of `nnUNetv2_predict`.

    Attributes:
        images: folder with CASE_0000.nii.gz ..., as far as a case has the series.
        output: folder to write to.
        step_size: from tile to tile, as a share of the patch.
        mirroring: average over mirrored passes, along the axes that training mirrored.
        continue_prediction: keep what is already there and whole.
        num_preprocessing, num_export: processes beside the network; with 0 and 0 everything is done in this one.
        num_parts, part_id: of every `num_parts` cases take the one with this number.
        on_device: keep image and results in GPU memory.
        uncertainty: write maps and volumes of all members, too; everything is then done in this process.
    """

    images: Path
    output: Path
    step_size: float = 0.5
    mirroring: bool = True
    save_probabilities: bool = False
    continue_prediction: bool = False
    num_preprocessing: int = 3
    num_export: int = 3
    num_parts: int = 1
    part_id: int = 0
    on_device: bool = True
    progress_bar: bool = True
    uncertainty: bool = False

    @property
    def volume_table(self) -> Path:
        """The CSV of volumes; calls that share the cases have one each, as they may run at the same time."""
        part = f"_{self.part_id}_of_{self.num_parts}" if self.num_parts > 1 else ""
        return self.output / UNCERTAINTY / f"volumes{part}.csv"

    def __post_init__(self) -> None:
        if not 0 < self.step_size <= 1:
            raise UserError(
                f"a step size of {self.step_size}; expected a share of the patch, above 0 and up to 1, with -step_size"
            )
        if not 0 <= self.part_id < self.num_parts:
            raise UserError(f"part {self.part_id} of {self.num_parts}; -part_id counts from 0 to -num_parts - 1")
        if min(self.num_preprocessing, self.num_export) < 0 or (self.num_preprocessing == 0) != (self.num_export == 0):
            found = f"{self.num_preprocessing} processes for preprocessing and {self.num_export} for export"
            raise UserError(f"{found}; give -npp and -nps at least 1 each, or 0 both to do without")


@dataclass(frozen=True)
class Model:
    """What a folder of nnU-Net's results holds, and the checkpoints of the folds asked for."""

    folder: Path
    dataset_json: dict[str, Any]
    plans: dict[str, Any]
    settings: Configuration
    checkpoints: tuple[dict[str, Any], ...]


def predict(request: PredictRequest) -> None:
    """Segment all cases of a folder, as `nnUNetv2_predict` would.

    Raises:
        UserError: no such model, or images that cannot be used; nothing has been written then.
    """
    request = request.of_trained_folds()
    model = load_model(request)
    request.torch_device()  # said before the images are read, which takes long
    with complete_cases(request.images, model.dataset_json, model.settings) as images:
        predictor = build_predictor(request, model)
        cases = create_lists_from_splitted_dataset_folder(str(images), model.dataset_json["file_ending"])
        outputs = {request.output / case_name(files, model): files for files in cases[request.part_id :: request.num_parts]}
        if request.continue_prediction:
            outputs = left_to_do(outputs, model, request)
        if outputs and request.uncertainty:
            predict_with_members(predictor, outputs, request.volume_table, request.save_probabilities)
        elif outputs:
            write_predictions(predictor, outputs, request)


def case_name(files: Sequence[str], model: Model) -> str:
    """From the files of a case, which end in a channel and the ending."""
    return Path(files[0]).name.removesuffix(f"_0000{model.dataset_json['file_ending']}")


def left_to_do(outputs: Mapping[Path, list[str]], model: Model, request: PredictRequest) -> dict[Path, list[str]]:
    """The cases whose output is not there, or not whole: it is read."""
    ending, reader = model.dataset_json["file_ending"], PlansManager(model.plans).image_reader_writer_class()
    done = {out for out in outputs if is_whole(out, ending, reader, request.save_probabilities)}
    if request.uncertainty:
        with_volumes = cases_in_table(request.volume_table)
        done = {out for out in done if out.name in with_volumes}
    print(f"{len(done)} of {len(outputs)} cases are there and whole; {len(outputs) - len(done)} are left to be predicted")
    return {out: files for out, files in outputs.items() if out not in done}


def write_predictions(predictor: BatchedPredictor, outputs: Mapping[Path, list[str]], request: PredictRequest) -> None:
    """Predict cases.

    Args:
        outputs: files of a case by the path of its output, without the ending.

    Raises:
        UserError: an output cannot be written, a process beside this one was killed, or a map of uncertainty that is there
            would stay beside another segmentation.
    """
    if stale := next((file for path in outputs if (file := uncertainty_map(path)).exists()), None):
        raise UserError(f"{stale} is of an earlier prediction; give --uncertainty to replace it, too, or another folder with -o")
    given = list(outputs.values()), [str(path) for path in outputs], request.save_probabilities
    with whole_exports(predict_from_raw_data, request.output) as unfinished, no_worker_left():
        predictor.given_up = unfinished / FAILED
        # with a single case there is nothing to overlap, and starting processes takes longer than many a network
        if request.num_preprocessing == 0 or len(outputs) == 1:
            predictor.predict_from_files_sequential(*given)
            return
        try:
            predictor.predict_from_files(
                *given,
                num_processes_preprocessing=min(request.num_preprocessing, len(outputs)),
                num_processes_segmentation_export=min(request.num_export, len(outputs)),
            )
        except RuntimeError as error:
            if "worker" not in str(error):
                raise
            remedy = "go on with --continue_prediction and fewer of them (-npp, -nps)"
            raise UserError(f"a process beside this one was killed, most likely for want of memory; {remedy}") from None


def load_model(request: ModelRequest) -> Model:
    """Read the checkpoints, without executing anything in them, and what stands beside them.

    Raises:
        UserError: a fold that was not trained, or with another network than the plans have.
    """
    folder = request.model
    folds = " ".join(request.folds)
    remedy = f"train with `nnunet_csm finetune -d {request.dataset} -f {folds}`, or choose trained folds with -f"
    paths = [folder / f"fold_{fold}" / request.checkpoint_name for fold in request.folds]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint; {remedy}")
    plans_file = folder / "plans.json"
    plans = nnunet.read_json(plans_file, remedy)
    expected = read_architecture(plans, request.configuration, str(plans_file))
    checkpoints = []
    for path in paths:
        loaded = checkpoint.load(path)
        trained = loaded["init_args"]
        found = read_architecture(trained["plans"], trained["configuration"], str(path))
        if found != expected:
            raise UserError(f"{path}: a network with {found}, {plans_file} says {expected}; {remedy}")
        # without the moments of the optimiser, which are twice as large
        checkpoints.append({key: loaded.get(key) for key in ("network_weights", "inference_allowed_mirroring_axes")})
    settings = read_configuration(plans, request.configuration, str(plans_file))
    return Model(folder, nnunet.read_dataset_json(folder / "dataset.json", remedy), plans, settings, tuple(checkpoints))


def build_predictor(request: PredictRequest, model: Model) -> BatchedPredictor:
    """A predictor with the weights of all folds, on the device asked for.

    Raises:
        UserError: no such device, or weights that are not those of the planned network.
    """
    device = request.torch_device()
    if device.type == "cuda":
        torch.set_num_threads(1)  # as stock: the CPU's other cores are for the other processes
    elif device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), num_threads(1)))  # torch does not know a container's share
        keep_freed_memory()
    predictor = BatchedPredictor(
        tile_step_size=request.step_size,
        use_mirroring=request.mirroring,
        perform_everything_on_device=request.on_device,
        device=device,
        allow_tqdm=request.progress_bar,
    )
    if request.trainer != TRAINER:
        # somebody's own, who may build another network: nnU-Net imports all its trainers to find it, which takes seconds
        os.environ[nnunet.TRAINER_VARIABLE] = nnunet.trainer_path()
        predictor.initialize_from_trained_model_folder(str(model.folder), request.folds, request.checkpoint_name)
        return predictor
    plans = PlansManager(model.plans)
    configuration = plans.get_configuration(request.configuration)
    network = get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        len(nnunet.channel_names(model.dataset_json)),
        plans.get_label_manager(model.dataset_json).num_segmentation_heads,
        deep_supervision=False,
    )
    weights = [loaded["network_weights"] for loaded in model.checkpoints]
    for fold, of_fold in zip(request.folds, weights, strict=True):
        checkpoint.load_weights(network, of_fold, str(model.folder / f"fold_{fold}" / request.checkpoint_name))
    mirroring_axes = model.checkpoints[0]["inference_allowed_mirroring_axes"]
    predictor.manual_initialization(network, plans, configuration, weights, model.dataset_json, request.trainer, mirroring_axes)
    return predictor


@contextmanager
def complete_cases(
    inputs: Path, dataset_json: Mapping[str, Any], settings: Configuration, called: Path | None = None
) -> Iterator[Path]:
    """A temporary folder with the images of all cases, zeros for series that a case lacks or has a copy of another in place of.

    What is printed of `inputs` is said of the folder `called`, where it is a temporary one itself.

    Raises:
        UserError: no case, a channel the model does not have, or series of different shapes.
    """
    names, ending = nnunet.channel_names(dataset_json), dataset_json["file_ending"]
    with TemporaryDirectory(prefix="nnunet_csm_") as temporary:
        folder = inputs
        if ending in READABLE_ENDINGS:
            folder = Path(temporary) / "images"
            by_channel = {channel: name for source in settings.csm.sources[:1] for name, channel in source.channels.items()}
            canonical = [by_channel.get(channel, name) for channel, name in enumerate(names)]
            needed = settings.architecture.series
            for line in fill_missing(inputs, folder, canonical, ending, num_copies=copies_in_training(settings), needed=needed):
                print(line.replace(str(folder), "the folder that is read"))
        for line in check_inputs(folder, names, ending):
            print(line.replace(str(folder), str(called or inputs)))
        yield folder


def copies_in_training(settings: Configuration) -> Counter[str]:
    """Series to the number of training cases that held it only as a copy of another one."""
    return Counter(name for source in settings.csm.sources for absent in source.absent_series.values() for name in absent)
