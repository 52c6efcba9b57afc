"""What plans, checkpoints and the files beside them tell of a run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.data.diagnoses import FILE_NAME as CLASSES
from nnunet_csm.data.diagnoses import read_class_table
from nnunet_csm.fingerprint import record
from nnunet_csm.planning.classification import test_cases, training_cases
from nnunet_csm.plans import Configuration, Schedule, read_configuration
from nnunet_csm.raw.manifest import patients_of

PRETRAINER, CLASSIFIER = "nnUNetTrainerCSMPretrain", "nnUNetTrainerCSMClassifier"


@dataclass(frozen=True)
class Stage:
    """A training, by its finished folds: what their checkpoints say beside the weights, and the names of its GPUs."""

    saved: dict[str, Mapping[str, Any]]
    gpus: tuple[str, ...]

    @property
    def folds(self) -> list[str]:
        return list(self.saved)

    @property
    def epochs(self) -> set[int]:
        return {epoch for one in self.saved.values() if isinstance(epoch := one.get("current_epoch"), int)}

    @property
    def devices(self) -> list[str]:
        """Names of the GPUs, or "a CPU"."""
        kinds = {str(one["init_args"].get("device")) for one in self.saved.values()}
        return [*self.gpus, *(["a CPU"] if "cpu" in kinds else [])]

    @property
    def hours(self) -> float:
        """Mean over folds of the time that epochs took; NaN where logs do not tell."""
        logs = [one.get("logging") or {} for one in self.saved.values()]
        pairs = [zip(log.get("epoch_start_timestamps", ()), log.get("epoch_end_timestamps", ()), strict=False) for log in logs]
        return sum(end - start for epochs in pairs for start, end in epochs) / 3600 / max(1, len(logs)) or math.nan


def read_stage(folder: Path) -> Stage:
    """The finished folds of a training; `folder` is TRAINER__PLANS__CONFIGURATION.

    Raises:
        UserError: a checkpoint that is none.
    """
    saved, gpus = dict[str, Mapping[str, Any]](), set[str]()
    for path in sorted(folder.glob("fold_*/checkpoint_final.pth")):
        content = checkpoint.load(path)
        weights = {"network_weights", "optimizer_state", "learning_weights"}
        saved[path.parent.name.removeprefix("fold_")] = {key: value for key, value in content.items() if key not in weights}
        if content["init_args"].get("device") != "cpu" and (path.parent / "debug.json").is_file():
            told = nnunet.read_json(path.parent / "debug.json", "nnU-Net wrote it at the start; move it away")
            gpus |= {str(told["gpu_name"])} if told.get("gpu_name") else set()
    return Stage(saved, tuple(sorted(gpus)))


@dataclass(frozen=True)
class Run:
    """A dataset's pretraining and fine-tuning with some plans.

    Attributes:
        dataset: DatasetXXX_Name.
        plans_name: ours.
        configuration: of the plans.
        trainer: that fine-tunes.
    """

    dataset: str
    plans_name: str
    configuration: str
    trainer: str

    @cached_property
    def plans(self) -> dict[str, Any]:
        """Those of the fine-tuning, else of the pretraining; where nothing is trained, those that are there now."""
        for stage in (self.finetuning, self.pretraining):
            for saved in stage.saved.values():
                plans: dict[str, Any] = saved["init_args"]["plans"]
                return plans
        path = nnunet.folder("nnUNet_preprocessed") / self.dataset / f"{self.plans_name}.json"
        return nnunet.read_plans(path, f"plan with `nnunet_csm plan -d {nnunet.dataset_id(self.dataset)}`")

    @cached_property
    def settings(self) -> Configuration:
        return read_configuration(self.plans, self.configuration, self.plans_name)

    @cached_property
    def stock(self) -> dict[str, Any]:
        """What of the configuration is nnU-Net's."""
        found: dict[str, Any] = self.plans["configurations"][self.configuration]
        return found

    @cached_property
    def finetuning(self) -> Stage:
        return read_stage(self.results(self.trainer, self.dataset))

    @cached_property
    def pretraining(self) -> Stage:
        """The one that fine-tuning started from, also where results have moved; none where that is not here."""
        if not self.finetuning.saved:
            return read_stage(self.results(PRETRAINER, self.dataset))
        encoders = sorted({Path(str(one.get("encoder_source", ""))) for one in self.finetuning.saved.values()})
        folders = [path.parent.parent for path in encoders if path.suffix == ".pth"]
        moved = [nnunet.folder("nnUNet_results") / folder.parent.name / folder.name for folder in folders]
        there = next((folder for folder in (*folders, *moved) if folder.is_dir()), None)
        return Stage({}, ()) if there is None else read_stage(there)

    @property
    def from_scratch(self) -> bool:
        """Whether it is known that no encoder was transferred."""
        sources = [one.get("encoder_source") for one in self.finetuning.saved.values()]
        return bool(sources) and all(one == "scratch" for one in sources)

    def results(self, trainer: str, dataset: str) -> Path:
        return nnunet.folder("nnUNet_results") / dataset / f"{trainer}__{self.plans_name}__{self.configuration}"

    @property
    def schedule(self) -> Schedule:
        """Of fine-tuning."""
        csm = self.settings.csm
        return csm.classification.schedule if self.trainer == CLASSIFIER else csm.finetuning_schedule

    @cached_property
    def software(self) -> dict[str, str]:
        """Versions that the trainings ran with; several, where folds differ. Those that run now, where nothing is trained."""
        told = [
            one["software"] for stage in (self.pretraining, self.finetuning) for one in stage.saved.values() if "software" in one
        ]
        names = dict.fromkeys(name for one in told or [checkpoint.software()] for name in one)
        return {
            name: " and ".join(sorted({one[name] for one in told or [checkpoint.software()] if name in one})) for name in names
        }

    @cached_property
    def cases(self) -> list[str]:
        """Labelled cases; none where the raw dataset is not there."""
        raw = nnunet.folder("nnUNet_raw") / self.dataset
        return training_cases(self.dataset) if (raw / "dataset.json").is_file() else []

    @cached_property
    def num_test(self) -> int:
        """Cases in imagesTs; none where the raw dataset is not there."""
        raw = nnunet.folder("nnUNet_raw") / self.dataset
        return len(test_cases(self.dataset)) if (raw / "imagesTs").is_dir() else 0

    @cached_property
    def num_patients(self) -> int | None:
        """Patients of the labelled cases, as the class table or `convert` told; None where neither did."""
        raw = nnunet.folder("nnUNet_raw") / self.dataset
        told = patients_of(raw)
        if (raw / CLASSES).is_file():
            table = read_class_table(raw / CLASSES)
            told |= {sample.case: sample.patient for sample in table.samples}
        known = {told[case] for case in self.cases if case in told}
        return len(known) if self.cases and set(self.cases) <= told.keys() else None

    @cached_property
    def num_incomplete(self) -> int | None:
        """Labelled cases that lack a series, as the fingerprint tells."""
        path = nnunet.folder("nnUNet_preprocessed") / self.dataset / record.FILE_NAME
        return len(record.absent_series(record.read_fingerprint(path), "imagesTr")) if path.is_file() else None

    @cached_property
    def splits(self) -> Sequence[Mapping[str, Sequence[str]]]:
        path = nnunet.folder("nnUNet_preprocessed") / self.dataset / self.settings.csm.splits
        return nnunet.read_splits(path) if path.is_file() else []
