"""`nnunet_csm container`: a folder from which a container with a trained model is built."""

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from importlib.resources import files
from pathlib import Path
from typing import Literal

import jinja2
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import nnunet_csm
from nnunet_csm import checkpoint, nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.files import whole_folder, write_text
from nnunet_csm.inference.ensemble import TRAINER as CLASSIFIER
from nnunet_csm.inference.request import ModelRequest
from nnunet_csm.inference.segmentation import TRAINER as SEGMENTER
from nnunet_csm.raw.series import canonical_series
from nnunet_csm.schema import to_dict
from nnunet_csm.sharing.contained import CHECKPOINT, FOMO26, INTERFACE, Interface
from nnunet_csm.sharing.export import for_others

# PyTorch's builds without CUDA; and what only builds with it need, which PyPI's torch asks for
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OF_CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")
# template -> its name in the folder
TEMPLATES = {
    "Dockerfile": "Dockerfile",
    "Apptainer.def": "Apptainer.def",
    "README.md": "README.md",
    "dockerignore": ".dockerignore",
}


@dataclass(frozen=True)
class ContainerRequest(ModelRequest):
    """What goes into the container, and where the folder is written.

    Attributes:
        device: of the container: cpu or cuda.
        interface: what the container is given and gives, see `contained.Interface`.
        output: the folder.
        overwrite: replace it.
    """

    interface: Literal["plain", "fomo26", "grand-challenge"]
    output: Path
    overwrite: bool = False


def write_container(request: ContainerRequest) -> list[str]:
    """Write the folder, whole or not at all.

    Returns:
        What was written and what is left to do, in words.

    Raises:
        UserError: no such model, one of a trainer that is not ours, or one that the interface has no place for.
    """
    if request.trainer not in (SEGMENTER, CLASSIFIER):
        raise UserError(f"-tr {request.trainer}: expected {SEGMENTER} or {CLASSIFIER}, whose predictions a container can make")
    request = request.of_trained_folds()
    dataset = nnunet.dataset_name(request.dataset)
    with whole_folder(request.output, request.overwrite) as folder:
        model = folder / "model" / dataset / request.model.name
        for fold in request.folds:
            path = request.model / f"fold_{fold}" / request.checkpoint_name
            if not path.is_file():
                raise UserError(f"{path}: no such checkpoint; train it, or name another with -tr, -p, -f and -chk")
            saved = checkpoint.load(path)
            told = for_others(saved, str(path))
            (model / f"fold_{fold}").mkdir(parents=True)
            checkpoint.save(told | {"network_weights": saved["network_weights"]}, model / f"fold_{fold}" / CHECKPOINT)
        dataset_json = told["init_args"]["dataset_json"]
        nnunet.save_json(told["init_args"]["plans"], model / "plans.json")
        nnunet.save_json(dataset_json, model / "dataset.json")
        names = nnunet.channel_names(dataset_json)
        interface = interface_of(request, dataset, names, told.get("classes", ()))
        nnunet.save_json(to_dict(interface), folder / INTERFACE)
        shutil.copytree(Path(nnunet_csm.__file__).parent, folder / "nnunet_csm", ignore=shutil.ignore_patterns("__pycache__"))
        source, pinned = files("nnunet_csm.sharing").joinpath("container_files"), pinned_requirements()
        write_text(folder / "predict.py", source.joinpath("predict.py").read_text(encoding="utf-8"))
        write_text(folder / "LICENSE", license_text())
        write_text(folder / "requirements.txt", "".join(f"{name}=={version}\n" for name, version in pinned.items()))
        flags = "".join(f" --{flag} /input/{flag}.nii.gz" for flag in interface.inputs) + " --output /output/result"
        ending = ".txt" if request.trainer == CLASSIFIER else ".nii.gz"
        index = "" if request.device == "cuda" else f" --index-url {CPU_INDEX}"
        packages = " ".join(f"{name}=={pinned[name]}" for name in ("torch", "torchvision"))
        values = {
            "python": f"{sys.version_info.major}.{sys.version_info.minor}",
            "install_torch": f"pip install --no-cache-dir {packages}{index}",
            "kind": "Classifier" if request.trainer == CLASSIFIER else "Segmenter",
            "dataset": dataset,
            "series": ", ".join(names),
            "ending": dataset_json["file_ending"],
            "arguments": flags + ending if request.interface == "fomo26" else "",
            "version": nnunet_csm.__version__,
            **to_dict(interface),
        }
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        for template, name in TEMPLATES.items():
            text = source.joinpath(template).read_text(encoding="utf-8")
            write_text(folder / name, environment.from_string(text).render({"dataset": dataset} | values))
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    lines = [f"{request.output}: folds {', '.join(request.folds)} of {request.model}, {size:.1f} MiB; README.md there goes on"]
    if interface.inputs and (never := [name for name in names if name not in interface.inputs.values()]):
        lines.append(f"The interface gives no {', '.join(never)}: the model will have zeros there, in every case")
    if request.interface == "grand-challenge":
        lines.append(f"Before it is built: put the sockets of your algorithm into {request.output / INTERFACE}")
    if request.trainer == CLASSIFIER and interface.mask is None:
        lines.append(
            "The classifier is given no mask and takes all voxels that are not 0, which is right only if it was trained so; "
            f"otherwise name one in {request.output / INTERFACE}"
        )
    return lines


def interface_of(request: ContainerRequest, dataset: str, names: Sequence[str], classes: Sequence[str]) -> Interface:
    """What the container is given and gives, as far as it follows from the model.

    Raises:
        UserError: the interface has no series of the model, or no place for so many classes.
    """
    classifier = request.trainer == CLASSIFIER
    inputs, mask, output = dict[str, str](), None, ""
    if request.interface == "fomo26":
        canonical = {match.canonical: match.given for match in canonical_series(names)}
        inputs = {flag: canonical[series] for flag, series in FOMO26.items() if series in canonical}
        if not inputs:
            raise UserError(f"series {', '.join(names)}: FOMO26 gives {', '.join(FOMO26.values())}; take another interface")
        if classifier and len(classes) not in (0, 2):
            raise UserError(
                f"classes {', '.join(classes)}: FOMO26 asks for a number, or a probability of two classes; take another interface"
            )
    elif request.interface == "grand-challenge":
        inputs = {f"images/{re.sub(r'[^a-z0-9]+', '-', name.casefold()).strip('-')}": name for name in names}
        said = "probability.json" if classes else "value.json"
        mask, output = ("images/mask", said) if classifier else (None, "images/segmentation/output.mha")
    elif classifier:
        mask = "masks"
    device: Literal["cpu", "cuda"] = "cuda" if request.device == "cuda" else "cpu"
    model = (dataset, request.trainer, request.plans, request.configuration, request.folds)
    return Interface(request.interface, *model, device, inputs, mask, output)


def pinned_requirements() -> Mapping[str, str]:
    """All packages that this one needs here, without extras and CUDA's libraries: name to version, sorted."""
    found, left = dict[str, str](), ["nnunet_csm"]
    while left:
        name = canonicalize_name(left.pop())
        if name in found or OF_CUDA.fullmatch(name):
            continue
        package = distribution(name)
        # +cu130 and the like tell of a build; another one of the same version is taken
        found[name] = Version(package.version).public
        needed = [Requirement(text) for text in package.requires or ()]
        left += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    del found[canonicalize_name("nnunet_csm")]
    return dict(sorted(found.items()))


def license_text() -> str:
    """The licence of this package, as it was installed."""
    path = next(file for file in distribution("nnunet_csm").files or () if file.name == "LICENSE")
    return Path(str(path.locate())).read_text(encoding="utf-8")
