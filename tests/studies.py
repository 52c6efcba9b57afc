"""Studies of the tests: of the planned phantom's six cases."""

from typing import Any

from nnunet_folders import TINY_PRESET

from nnunet_csm.data.diagnoses import ClassTable, Sample
from nnunet_csm.study.runs import Run

JOINT = {"network": {"encoder": {"kind": "joint_vit"}}, "pretext": {"name": "mae3d", "masking": {"mask_ratio": 0.75}}}
AUTOENCODER = {
    "name": "AE",
    "changes": {
        "network": {"width": 16, "depth": 1, "decoder": "unet", "encoder": {"kind": "residual_unet", "base": 4}},
        "pretext": {"name": "ae"},
    },
}
SCRATCH, MAE3D, CSM = {"name": "scratch", "pretrained": False}, {"name": "MAE3D", "changes": JOINT}, {"name": "CSM"}
FOREST = {"name": "forest", "mask_volumes": ["labelsTr"]}


def spec(**given: Any) -> dict[str, Any]:
    """A study of the test dataset's six cases in two folds."""
    return {
        "description": "of the tests",
        "task": "segmentation",
        "preset": str(TINY_PRESET),
        "repeats": {"kind": "folds", "number": 2},
        "labels": [1.0],
        "arms": [SCRATCH, CSM],
        **given,
    }


def reconstruction(*arms: Any, **given: Any) -> dict[str, Any]:
    """A study of what pretrainings rebuild."""
    return spec(**({"task": "reconstruction", "arms": list(arms) or [CSM]} | given))


def make_table(num_patients: int, num_positive: int, cases_each: int = 1) -> ClassTable:
    samples = [
        Sample(f"case{p:03d}_{c}", int(p < num_positive), None, f"patient{p:03d}")
        for p in range(num_patients)
        for c in range(cases_each)
    ]
    return ClassTable(("no", "yes"), tuple(samples))


def make_run(name: str, needs: str | None = None) -> Run:
    return Run(name, "fine-tuning", "d", "c", "p", "t", 0, needs, None, (), 0, 0.0)
