"""What the volumes of a mask's labels tell of its class, without any image: a forest, as a row beside networks.

It is fitted to the labelled training samples of every division and predicts its test samples, as networks do. It takes seconds
and is done again for every report. No setting of it is chosen, so that it needs no validation.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

from nnunet_csm import nnunet
from nnunet_csm.data.diagnoses import Sample
from nnunet_csm.data.lesions import measured_labels, sample_mask
from nnunet_csm.errors import UserError
from nnunet_csm.heads.base import head_of
from nnunet_csm.raw.subjects import CaseError, Volume
from nnunet_csm.raw.volumes import read_volume
from nnunet_csm.study.collection import named
from nnunet_csm.study.dataset import Dataset
from nnunet_csm.study.divisions import SEED, divide, labelled
from nnunet_csm.study.runs import ALL, Row
from nnunet_csm.study.spec import Study

NUM_TREES = 500


def forest_predictions(name: str, study: Study, dataset: Dataset) -> pd.DataFrame:
    """Predict the test samples of all arms that ask for it, with the columns of `collect_predictions`; empty when none does."""
    found = [pd.DataFrame()]
    for arm in (arm for arm in study.arms if arm.mask_volumes):
        table, volumes = dataset.classes, volumes_of(dataset, arm.mask_volumes)
        divisions, head = enumerate(divide(table, study.repeats)), head_of(table)
        for (number, division), share, seed in product(divisions, study.labels, range(study.repeats.seeds)):
            cases = labelled(table, division, share, seed)
            training, test = ([one for one in table.of(side) if one in volumes] for side in (cases, division.test))
            (seen, targets), (unseen, truth) = (
                ([volumes[one] for one in side], np.array([one.numbers or one.class_index for one in side]))
                for side in (training, test)
            )
            said = np.zeros((len(test), head.num_outputs))
            if table.classes:
                forest = RandomForestClassifier(NUM_TREES, class_weight="balanced", random_state=SEED + seed).fit(seen, targets)
                said[:, forest.classes_] = forest.predict_proba(unseen)
            else:
                said[:, 0] = RandomForestRegressor(NUM_TREES, random_state=SEED + seed).fit(seen, targets[:, 0]).predict(unseen)
            columns: dict[str, Any] = {
                "case": [one.case for one in test],
                "mask_label": ["" if one.mask_label is None else str(one.mask_label) for one in test],
                "patient": [one.patient for one in test],
                **head.truth(truth),
                **head.predicted(said),
            }
            row = Row("", arm.name, share, len(cases), number, number * study.repeats.seeds + seed, ALL)
            found.append(pd.DataFrame(columns).assign(**named(name, row), tested=ALL))
    return pd.concat(found, ignore_index=True)


def volumes_of(dataset: Dataset, folders: Sequence[str]) -> dict[Sample, list[float]]:
    """Sample to the volumes of its mask and of each of its labels, mm3, in all folders; samples with an empty mask are left out.

    Raises:
        UserError: a folder without the mask of a case.
    """
    dataset_json, table = dataset.found.dataset_json, dataset.classes
    labels = PlansManager(dict(dataset.found.base_plans)).get_label_manager(dict(dataset_json))
    measured = measured_labels(labels, any(sample.mask_label is not None for sample in table.samples))
    volumes: dict[Sample, list[float]] = {sample: [] for sample in table.samples}
    for folder, case in product(folders, sorted({sample.case for sample in table.samples})):
        path = nnunet.folder("nnUNet_raw") / dataset.name / folder / f"{case}{dataset_json['file_ending']}"
        try:
            image = read_volume(Volume(path))
        except CaseError as error:
            raise UserError(f"{error}; mask_volumes needs a mask for every case, put it there or name another folder") from None
        segmentation, voxel = sitk.GetArrayFromImage(image), float(np.prod(image.GetSpacing()))
        for sample in table.of([case]):
            counted = [np.count_nonzero(sample_mask(sample, segmentation))]
            counted += [np.count_nonzero(segmentation == label) for label in measured]
            volumes[sample] += [voxel * count for count in counted]
    return {sample: found for sample, found in volumes.items() if found[0] > 0}
