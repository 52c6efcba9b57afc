"""What a study needs to know of its dataset: patients, series, and plans for any preset."""

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_csm import nnunet
from nnunet_csm.data.diagnoses import FILE_NAME, ClassTable
from nnunet_csm.errors import UserError
from nnunet_csm.planning.classification import take_class_table, training_cases
from nnunet_csm.planning.command import Found, look_at, planned
from nnunet_csm.planning.facts import Wishes
from nnunet_csm.planning.request import PlanRequest
from nnunet_csm.plans import PLANS_NAME, STOCK_PLANS_NAME, Configuration, configuration_of, parse_configuration
from nnunet_csm.raw.manifest import patients_of
from nnunet_csm.schema import Size
from nnunet_csm.study.divisions import everybody

# between the series of a subset
JOIN = "+"
# of a hash, in names
HASH_LENGTH = 8


class Dataset:
    """What a study needs to know of its dataset."""

    def __init__(
        self,
        dataset: str,
        configuration: str,
        folder: Path,
        base_plans: str = STOCK_PLANS_NAME,
        test_images: bool = False,
        study: str = "",
    ) -> None:
        """
        Args:
            dataset: name or ID.
            configuration: nnU-Net's.
            folder: of the study.
            base_plans: nnU-Net's plans that those of all arms build on.
            test_images: whether pretraining draws on imagesTs as well.
            study: name or file, which errors name.
        """
        self.study = study
        self.name, self.configuration, self.folder = nnunet.dataset_name(dataset), configuration, folder
        self.request = PlanRequest(configuration, base_plans, PLANS_NAME, test_images=test_images)
        self.known: dict[str, dict[str, Any]] = {}

    @cached_property
    def found(self) -> Found:
        raw = nnunet.folder("nnUNet_raw") / self.name
        if not (raw / "dataset.json").is_file():
            raise UserError(f"{raw / 'dataset.json'}: no such file; a study tests on raw images, put the dataset there")
        with contextlib.redirect_stdout(io.StringIO()):
            found = look_at(self.name, [self.name], self.request)
        if not found.labelled:
            raise UserError(f"{self.name} has no labels; a study fine-tunes and tests")
        if odd := [name for name in found.channels if "/" in name or JOIN in name]:
            raise UserError(f"{self.name}: series {odd[0]!r} cannot name a file; rename it in dataset.json, without / and {JOIN}")
        return found

    @cached_property
    def classes(self) -> ClassTable:
        """Cases with a class or number, and their patients.

        Raises:
            UserError: there is no class table.
        """
        table = take_class_table(self.name, self.found.dataset_json)
        if table is None:
            path = nnunet.folder("nnUNet_raw") / self.name / FILE_NAME
            raise UserError(f"{path}: no such file; a study of classes needs it: case,class (or value)[,mask_label,patient]")
        return table

    @cached_property
    def table(self) -> ClassTable:
        """All cases by patient, as class table and manifest tell; any other case is a patient of its own."""
        table = take_class_table(self.name, self.found.dataset_json)
        return everybody(table, training_cases(self.name), patients_of(nnunet.folder("nnUNet_raw") / self.name))

    def described(self) -> str:
        """A line for the user, who may know better how many patients there are."""
        cases, patients = ({getattr(sample, of) for sample in self.table.samples} for of in ("case", "patient"))
        line = f"{self.name}: {len(cases)} cases of {len(patients)} patients, series {', '.join(self.series)}"
        if len(cases) == len(patients):
            line += f" (patients with several cases are told by the column patient of {FILE_NAME}, or by what `convert` wrote)"
        return line

    def stock_plans(self, name: str) -> dict[str, Any]:
        """nnU-Net's own plans.

        Raises:
            UserError: they are not there, or without this configuration.
        """
        path = nnunet.folder("nnUNet_preprocessed") / self.name / f"{name}.json"
        plans = nnunet.read_plans(path, f"plan and preprocess with nnU-Net's {name} first")
        configuration_of(plans, self.configuration, str(path))
        return plans

    @cached_property
    def present(self) -> dict[str, tuple[str, ...]]:
        """Series that each case of imagesTr has."""
        assert self.found.fingerprint is not None
        return {
            case: tuple(name for name, one in record.series.items() if one.absent is None)
            for case, record in self.found.fingerprint.cases.items()
            if record.subset == "imagesTr"
        }

    @property
    def series(self) -> tuple[str, ...]:
        return tuple(self.found.channels)

    def presence(self, series: Sequence[str]) -> Bool[Tensor, "c s"]:
        """Which of some series the cases have; cases with none of them are left out."""
        has = torch.tensor([[name in names for name in series] for names in self.present.values()])
        return has[has.any(1)]

    @property
    def num_classes(self) -> int:
        """Output channels of a segmenter."""
        manager = PlansManager(dict(self.found.base_plans)).get_label_manager(dict(self.found.dataset_json))
        return int(manager.num_segmentation_heads)

    def plans(self, preset: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """What `nnunet_csm plan` would write for a preset with changes; a copy to be changed further."""
        content = {"inherits_from": str(Path(preset).resolve()) if preset.endswith(".json") else preset, **changes}
        digest = hashed(content)
        if digest not in self.known:
            path = self.folder / "presets" / f"{digest}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            nnunet.save_json(content, path)
            try:
                ((_, plans, _),) = planned([self.found], self.request, Wishes(preset=str(path)))
            except UserError as error:
                words = str(error).replace(f"preset {path}", f"preset {preset} with its changes, ")
                raise UserError(f"study {self.study}: {words}") from None
            # the folder of a study may be moved
            text = json.dumps(plans, ensure_ascii=False).replace(str(path), f"{preset}, changed ({digest})")
            self.known[digest] = json.loads(text)
        return deepcopy(self.known[digest])

    def settings(self, plans: Mapping[str, Any]) -> Configuration:
        return parse_configuration(plans["configurations"][self.configuration], plans["plans_name"])


def common_patch(settings: Sequence[Configuration]) -> Size:
    """The largest patch of whole tokens of all of them that lies in each one's patch of pretraining."""
    sizes = np.array([one.csm.pretraining_patch_size for one in settings])
    tokens = np.lcm.reduce([one.architecture.token_size for one in settings])
    z, y, x = (np.maximum(sizes.min(0) // tokens, 1) * tokens).tolist()
    return z, y, x


def hashed(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=list)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]
