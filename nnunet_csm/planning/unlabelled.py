"""Images without labels: nnU-Net's plans and nnU-Net's preprocessing where its own commands want a labelsTr.

nnU-Net's `ExperimentPlanner` and `DefaultPreprocessor` do the work; here is only who calls them, and where the result goes.
"""

import os
import shutil
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.fingerprint.extraction import case_files
from nnunet_csm.fingerprint.record import Fingerprint, Subset, as_nnunet_fingerprint
from nnunet_csm.machine import in_processes

# nnU-Net's tools want a label to plan for; nothing of ours reads it
PLACEHOLDER_LABELS = {"background": 0, "foreground": 1}
# what preprocessed images depend on
PREPROCESSING_KEYS = (
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "preprocessor_name",
)
PREPROCESSING_KEYS_OF_PLANS = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
CASES_BETWEEN_MANIFESTS = 20
ENDINGS = (".b2nd", "_seg.b2nd", ".pkl")


def plan_without_labels(dataset: str, dataset_json: Mapping[str, Any], fingerprint: Fingerprint) -> None:
    """Write what `nnUNetv2_plan_experiment` writes, from a fingerprint that no label went into."""
    folder = nnunet.folder("nnUNet_preprocessed") / dataset
    folder.mkdir(parents=True, exist_ok=True)
    nnunet.save_json(as_nnunet_fingerprint(fingerprint), folder / "dataset_fingerprint.json")
    planner = ExperimentPlanner(dataset)
    num_training = sum(case.subset == "imagesTr" for case in fingerprint.cases.values())
    completed = {**dataset_json, "labels": dataset_json.get("labels") or PLACEHOLDER_LABELS, "numTraining": num_training}
    planner.dataset_json = completed
    planner.plan_experiment()
    # the planner has copied the raw one
    nnunet.save_json(completed, folder / "dataset.json")


def image_files(raw: Path, subset: Subset, dataset_json: Mapping[str, Any]) -> dict[str, list[str]]:
    """Case to the files of its channels.

    Raises:
        UserError: no case, or one without a file for every channel.
    """
    num_channels = len(nnunet.channel_names(dataset_json))
    cases = case_files(raw, subset, dataset_json, num_channels)
    for name, files in cases.items():
        if len(files) != num_channels:
            raise UserError(
                f"{raw / subset}: case {name} has {len(files)} files, expected {num_channels} channels; "
                f"write zeros for missing series with `nnunet_csm predict --fill_missing_only`"
            )
    return {name: [str(files[channel]) for channel in sorted(files)] for name, files in cases.items()}


def preprocess_images(
    raw: Path,
    subset: Subset,
    dataset_json: Mapping[str, Any],
    plans: Mapping[str, Any],
    configuration: str,
    output: Path,
    num_processes: int,
) -> int:
    """Preprocess images as nnU-Net would, without a segmentation, into a folder of its own with a manifest beside it.

    Goes on where an earlier run was stopped; starts anew when the plans or a source file changed.

    Returns:
        How many cases were done in this call.
    """
    entry = PlansManager(dict(plans)).get_configuration(configuration).configuration
    made_with = {key: entry[key] for key in PREPROCESSING_KEYS} | {key: plans[key] for key in PREPROCESSING_KEYS_OF_PLANS}
    cases = image_files(raw, subset, dataset_json)
    manifest: dict[str, Any] = {"subset": subset, "preprocessing": made_with, "software": checkpoint.software(), "cases": {}}
    manifest["all_cases"] = sorted(cases)
    # beside the folder: nnU-Net tells the kind of its data by the endings of all files in it
    path = output.with_name(f"{output.name}.manifest.json")
    earlier = nnunet.read_json(path, "move it away") if path.is_file() else None
    if earlier is not None and earlier["preprocessing"] == made_with:
        manifest["cases"] = earlier["cases"]
    elif output.is_dir():
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    done, sources = manifest["cases"], {name: _identity(files) for name, files in cases.items()}
    for name in [name for name in done if done[name] != sources.get(name)]:
        del done[name]
    for file in output.glob("*.b2nd"):
        if file.name.removesuffix(".b2nd").removesuffix("_seg") not in done:
            file.unlink()
    left = {name: files for name, files in cases.items() if name not in done}
    nnunet.save_json(manifest, path)
    preprocess = partial(
        _preprocess_case, plans=dict(plans), configuration=configuration, dataset_json=dict(dataset_json), output=output
    )
    with closing(in_processes(preprocess, list(left.items()), num_processes)) as made:
        try:
            for number, ((name, _), _) in enumerate(tqdm(made, f"preprocessing {subset}", len(left), disable=None, unit="case")):
                done[name] = sources[name]
                if number % CASES_BETWEEN_MANIFESTS == 0:
                    nnunet.save_json(manifest, path)
        finally:
            nnunet.save_json(manifest, path)
    return len(left)


def _identity(files: list[str]) -> list[dict[str, Any]]:
    """Path, bytes and time of change: a changed source is noticed without reading it."""
    return [{"file": file, "bytes": (stat := os.stat(file)).st_size, "changed": stat.st_mtime} for file in files]


def _preprocess_case(
    case: tuple[str, list[str]], plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], output: Path
) -> None:
    """One case by nnU-Net's preprocessor; the images come last, since they are what says that a case is there."""
    name, files = case
    manager = PlansManager(plans)
    preprocessor = DefaultPreprocessor(verbose=False)
    temporary = output / f".{name}"
    # a label file of None: as for a case to be predicted
    preprocessor.run_case_save(
        str(temporary),
        files,
        None,
        manager,
        manager.get_configuration(configuration),
        dataset_json,
    )
    for ending in reversed(ENDINGS):
        os.replace(f"{temporary}{ending}", output / f"{name}{ending}")
