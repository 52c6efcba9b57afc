"""What a container of `nnunet_csm container` does: read what it is given, predict, write what is asked for; nothing else.

It writes to the output and to the temporary folder, needs no network and no variable, and starts no process beside its own.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import pandas as pd
import SimpleITK as sitk
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder

from nnunet_csm import nnunet
from nnunet_csm.errors import UserError, exit_on_user_error
from nnunet_csm.files import whole
from nnunet_csm.inference.classification import ClassifyRequest, classify
from nnunet_csm.inference.ensemble import TRAINER as CLASSIFIER
from nnunet_csm.inference.segmentation import (
    PredictRequest,
    build_predictor,
    case_name,
    complete_cases,
    load_model,
    write_predictions,
)
from nnunet_csm.listing import files_in
from nnunet_csm.processes import stoppable
from nnunet_csm.raw.cases import write_image
from nnunet_csm.raw.geometry import Grid
from nnunet_csm.raw.grid import resampled
from nnunet_csm.raw.subjects import Volume
from nnunet_csm.raw.volumes import READABLE_ENDINGS, read_volume
from nnunet_csm.schema import Name, from_dict

INTERFACE, CHECKPOINT = "interface.json", "checkpoint_final.pth"
REMEDY = "write it with nnunet_csm container"
# flags of FOMO26's tasks 1 to 5, by which it gives a case's series; what they are to us
FOMO26 = {"flair": "FLAIR", "dwi": "DWI", "adc": "ADC", "t2s": "T2starw", "swi": "SWI", "t1": "T1w", "t2": "T2w"}
CASE = "case"


@dataclass(frozen=True)
class Interface:
    """`interface.json`.

    Attributes:
        interface: plain: folders of cases, named as nnU-Net's; fomo26: one case, a flag for each series and one for the output;
            grand-challenge: one case, a folder (socket) for each series, each with one file of any name.
        dataset, trainer, plans, configuration, folds: of the model.
        device: cpu or cuda.
        inputs: flag or folder to the name of a channel of the model; of a plain interface nothing.
        mask: flag or folder of a classifier's mask; None: all voxels where any series is not 0.
        output: file in the output folder, for grand-challenge.
    """

    interface: Literal["plain", "fomo26", "grand-challenge"]
    dataset: Name
    trainer: Name
    plans: Name
    configuration: Name
    folds: tuple[Name, ...]
    device: Literal["cpu", "cuda"]
    inputs: dict[str, str]
    mask: str | None
    output: str


def main(folder: Path, arguments: list[str] | None = None) -> int:
    """Predict what the command line names.

    Args:
        folder: holds `interface.json` and, through nnU-Net's variables, the model.
        arguments: of the command line; None: this process's.

    Returns:
        0; what is wrong for a user ends in exit code 2 and a line, as in all commands.
    """
    with stoppable("nothing is half-written, run it again"), exit_on_user_error(Path("/output")):
        path = folder / INTERFACE
        interface = from_dict(Interface, nnunet.read_json(path, REMEDY), str(path))
        args = _parser(interface).parse_args(arguments)
        with TemporaryDirectory(prefix="nnunet_csm_") as temporary:
            if interface.interface == "plain":
                masks, output = args.i / (interface.mask or ""), args.o
                if interface.trainer == CLASSIFIER:
                    output = output / "predictions.csv"
                _predict(interface, args.i, masks, output, args.seconds_per_case)
            else:
                _predict_one_case(interface, args, Path(temporary))
    return 0


def _parser(interface: Interface) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="predict.py", description=__doc__, allow_abbrev=False)
    if interface.interface == "fomo26":
        for flag in sorted({*FOMO26, *interface.inputs, *([interface.mask] if interface.mask else [])}):
            parser.add_argument(f"--{flag}", dest=flag, type=Path, help=f"image: {interface.inputs.get(flag, 'not used')}")
        parser.add_argument("--output", type=Path, required=True, help="file to write")
    else:
        parser.add_argument("-i", type=Path, default=Path("/input"), help="folder with what is given")
        parser.add_argument("-o", type=Path, default=Path("/output"), help="folder to write to")
    parser.add_argument("-seconds_per_case", type=float, help="the log says which cases took longer")
    return parser


def _predict(interface: Interface, images: Path, masks: Path, output: Path, limit: float | None) -> None:
    """Predict a folder of cases, as `nnunet_csm predict` or `classify` would.

    Args:
        output: the folder for segmentations, or the CSV of a classifier.
    """
    model = (interface.dataset, interface.trainer, interface.plans, interface.configuration)
    named = (*model, interface.folds, CHECKPOINT, interface.device, images)
    if interface.trainer == CLASSIFIER:
        request = ClassifyRequest(*named, masks, output, overwrite=True)
        with _timed("all cases", limit):
            print(*classify(request), sep="\n")
        return
    _segment(PredictRequest(*named, output, progress_bar=False), limit)


def _segment(request: PredictRequest, limit: float | None) -> None:
    """As `inference.segmentation.predict`, case by case."""
    model = load_model(request)
    with complete_cases(request.images, model.dataset_json, model.settings) as images:
        predictor = build_predictor(request, model)
        for files in create_lists_from_splitted_dataset_folder(str(images), model.dataset_json["file_ending"]):
            case = case_name(files, model)
            with _timed(case, limit):
                write_predictions(predictor, {request.output / case: files}, request)


@contextmanager
def _timed(case: str, limit: float | None) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds = time.monotonic() - start
    print(
        f"{case}: {seconds:.1f} s" + (f", longer than {limit:g} s" if limit is not None and seconds > limit else ""), flush=True
    )


# --- challenges, which give one case -----------------------------------------------------------------------------------------


def _predict_one_case(interface: Interface, args: argparse.Namespace, temporary: Path) -> None:
    """Predict a case whose series lie in files of any name, in a temporary folder, and give the result its place."""
    model = nnunet.folder("nnUNet_results") / interface.dataset
    dataset_json = nnunet.read_dataset_json(
        model / f"{interface.trainer}__{interface.plans}__{interface.configuration}" / "dataset.json", REMEDY
    )
    names, ending = nnunet.channel_names(dataset_json), dataset_json["file_ending"]
    given, mask = _files_given(interface, args, names)
    images, masks = temporary / "images", temporary / "masks"
    images.mkdir()
    masks.mkdir()
    grid, inside = None, np.zeros((), bool)
    for channel, name in enumerate(names):
        if name not in given:
            continue
        image = read_volume(Volume(given[name]))
        grid = grid or Grid.of(image)
        if not Grid.of(image).same_as(grid):
            print(f"{given[name]}: resampled to the grid of the first series")
        image = resampled(image, grid)
        inside = inside | (sitk.GetArrayViewFromImage(image) != 0)
        write_image(image, images / f"{CASE}_{channel:04d}{ending}")
    assert grid is not None
    if interface.trainer == CLASSIFIER:
        marked = sitk.GetImageFromArray(inside.astype(np.uint8))
        grid.put_on(marked)
        if mask is not None:
            marked = resampled(read_volume(Volume(mask)), grid, nearest=True)
        write_image(marked, masks / f"{CASE}{ending}")
        made = temporary / "predictions.csv"
    else:
        made = temporary / "out"
    _predict(interface, images, masks, made, args.seconds_per_case)
    output = args.output if interface.interface == "fomo26" else args.o / interface.output
    output.parent.mkdir(parents=True, exist_ok=True)
    if interface.trainer == CLASSIFIER:
        made = _write_decision(interface, made, temporary / "decision")
    elif not output.name.endswith(ending):
        segmented = read_volume(Volume(made / f"{CASE}{ending}"))
        made = temporary / output.name
        write_image(segmented, made)
    else:
        made = made / f"{CASE}{ending}"
    with whole(output) as unfinished:
        shutil.copyfile(made, unfinished)


def _files_given(interface: Interface, args: argparse.Namespace, names: list[str]) -> tuple[dict[str, Path], Path | None]:
    """The file of each series that is given, and that of the mask.

    Raises:
        UserError: none of the model's series, two files for one, a series that the model does not have, or no mask.
    """
    if unknown := set(interface.inputs.values()) - set(names):
        raise UserError(f"{INTERFACE}: inputs name {sorted(unknown)[0]!r}; expected series of the model: {', '.join(names)}")
    if interface.interface == "fomo26":
        found = {
            flag: path for flag, path in vars(args).items() if path is not None and flag not in ("output", "seconds_per_case")
        }
    else:
        found = dict(_in_sockets(args.i, [*interface.inputs, *([interface.mask] if interface.mask else [])]))
    mask = found.pop(interface.mask, None) if interface.mask else None
    if interface.mask and mask is None:
        raise UserError(f"no {interface.mask} is given; the classifier looks around a mask: give it")
    given = dict[str, Path]()
    for where, path in found.items():
        name = interface.inputs.get(where)
        if name is None:
            print(f"{where} is left out: the model has no such series")
        elif name in given:
            raise UserError(f"{given[name]} and {path} are both {name}; give one of them")
        else:
            given[name] = path
    if not given:
        raise UserError(f"no series is given; expected one or more of {', '.join(interface.inputs)}")
    return given, mask


def _in_sockets(folder: Path, sockets: list[str]) -> Iterator[tuple[str, Path]]:
    for socket in sockets:
        images = [path for path in files_in(folder / socket, "") if path.name.endswith(READABLE_ENDINGS)]
        if len(images) > 1:
            raise UserError(f"{folder / socket} holds {len(images)} images, expected one; give one case a run")
        yield from ((socket, path) for path in images)


def _write_decision(interface: Interface, table: Path, path: Path) -> Path:
    """A number: what is predicted, or the probability of the last of two classes; of more classes an object of them by name."""
    rows: list[Mapping[str, Any]] = pd.read_csv(table).to_dict("records")
    if len(rows) != 1:
        raise UserError(f"the classifier has {len(rows)} samples of this case, one for each label of the mask; expected one")
    found = {name.removeprefix("p_"): value for name, value in rows[0].items() if name.startswith("p_")}
    told = found if len(found) > 2 else [*found.values()][-1] if found else rows[0]["predicted"]
    path.write_text(f"{json.dumps(told)}\n", encoding="utf-8")
    return path
