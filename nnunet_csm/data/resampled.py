"""Whether preprocessed images have the spacing that plans ask for: those of plans that were made anew stay as they were."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

from nnunet_csm.data.properties import read_properties
from nnunet_csm.data.stored import open_volumes
from nnunet_csm.errors import UserError

# that are looked at: nnU-Net empties the folder before it preprocesses, so that all are of the same plans
NUM_CASES = 20
# nnU-Net's name for the shape that its resampling began with
BEFORE = "shape_after_cropping_and_before_resampling"


def check_resampled(folder: Path, cases: Sequence[str], plans: Mapping[str, Any], entry: Mapping[str, Any], remedy: str) -> None:
    """Compare the shape of some cases with what nnU-Net's resampling would make of them.

    Args:
        folder: of nnU-Net's preprocessed cases.
        cases: there.
        plans, entry: the plans, and their configuration with its inheritance resolved.
        remedy: how to preprocess again.

    Raises:
        UserError: a case of another shape.
    """
    if entry.get("preprocessor_name") != "DefaultPreprocessor":
        return  # who knows what another one does
    spacing, axes = list(entry["spacing"]), plans["transpose_forward"]
    for case in cases[:: 1 + len(cases) // NUM_CASES]:
        properties = read_properties(folder / f"{case}.pkl")
        if BEFORE not in properties:
            continue
        original = [properties["spacing"][axis] for axis in axes]
        wanted = [*original[: len(axes) - len(spacing)], *spacing]
        expected = [int(n) for n in compute_new_shape(properties[BEFORE], original, wanted)]
        found = list(open_volumes(folder / f"{case}.b2nd").shape[1:])
        if found != expected:
            shapes = (" x ".join(map(str, shape)) for shape in (found, expected))
            raise UserError(
                f"{folder}: {case} has {next(shapes)} voxels, expected {next(shapes)} at the plans' spacing of "
                f"{' x '.join(f'{s:.3g}' for s in wanted)} mm: it was preprocessed for other plans; {remedy}"
            )
