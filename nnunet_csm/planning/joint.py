"""One plan for several datasets: the same spacing, tokens and normalisation, so that one encoder serves all of them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunet_csm.planning.planner import Decision, base_configuration

FALLBACK_NORMALIZATION = "ZScoreNormalization"


@dataclass(frozen=True)
class Member:
    """A dataset of a joint plan: nnU-Net's plans and fingerprint of it, and its series by channel."""

    base_plans: Mapping[str, Any]
    nnunet_fingerprint: Mapping[str, Any]
    channels: Mapping[str, int]


def joint_base_plans(
    members: Sequence[Member], configuration: str, plans_name: str, spacing: Sequence[float] | None
) -> tuple[list[dict[str, Any]], list[Decision]]:
    """nnU-Net's plans of every member, made to agree in all that an encoder sees.

    Args:
        members: the first owns the run.
        configuration: of nnU-Net's plans of each.
        plans_name: of the joint plans; names the preprocessed data too.
        spacing: mm along (z, y, x) after transposition, by hand; else that of the first member.

    Returns:
        Base plans by member, and the decisions they share.
    """
    entries = [base_configuration(m.base_plans, configuration, f"plans of {m.base_plans['dataset_name']}") for m in members]
    owner = members[0].base_plans["dataset_name"]
    common, why = (list(spacing), "by hand") if spacing is not None else (entries[0]["spacing"], f"that of {owner}, the first")
    shape = median_shape(members, common)
    schemes = joint_normalization(members, entries)
    # other settings, another folder: plans never meet data that was preprocessed for others
    made_of = json.dumps([common, schemes, [list(m.base_plans["transpose_forward"]) for m in members]])
    identifier = f"{plans_name}_{configuration}_{hashlib.sha256(made_of.encode()).hexdigest()[:8]}"
    plans = []
    for member, entry in zip(members, entries, strict=True):
        names = {channel: name for name, channel in member.channels.items()}
        # channels without a name of ours are not used; nnU-Net still normalises them
        chosen = [
            schemes.get(names.get(channel, ""), (scheme, masked))
            for channel, (scheme, masked) in enumerate(
                zip(entry["normalization_schemes"], entry["use_mask_for_norm"], strict=True)
            )
        ]
        entry = {
            **deepcopy(entries[0]),
            "data_identifier": identifier,
            "spacing": [float(s) for s in common],
            "median_image_size_in_voxels": shape,
            "normalization_schemes": [scheme for scheme, _ in chosen],
            "use_mask_for_norm": [masked for _, masked in chosen],
        }
        plans.append({**deepcopy(dict(member.base_plans)), "configurations": {configuration: entry}})
    others = ", ".join(f"{m.base_plans['dataset_name']} {_mm(e['spacing'])}" for m, e in zip(members, entries, strict=True))
    normalization = ", ".join(f"{name} {scheme}{' in its mask' if masked else ''}" for name, (scheme, masked) in schemes.items())
    return plans, [
        Decision("spacing", f"{_mm(common)} mm", f"{why}; nnU-Net's own: {others}"),
        Decision("normalisation", normalization, "as nnU-Net planned where all agree; within the nonzero mask only if all do"),
    ]


def median_shape(members: Sequence[Member], spacing: Sequence[float]) -> list[float]:
    """Median shape of all cases of all members, in voxels of the joint spacing, after each member's own transposition of axes."""
    shapes = []
    for member in members:
        order = list(member.base_plans["transpose_forward"])
        fingerprint = member.nnunet_fingerprint
        sizes = np.array(fingerprint["shapes_after_crop"], float) * np.array(fingerprint["spacings"], float)
        shapes.append(sizes[:, order] / np.array(spacing))
    return [float(n) for n in np.median(np.concatenate(shapes), axis=0)]


def joint_normalization(members: Sequence[Member], entries: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, bool]]:
    """Series to nnU-Net's scheme and whether the nonzero mask is used, one for all members."""
    found: dict[str, list[tuple[str, bool]]] = {}
    for member, entry in zip(members, entries, strict=True):
        for name, channel in member.channels.items():
            found.setdefault(name, []).append((entry["normalization_schemes"][channel], entry["use_mask_for_norm"][channel]))
    masked = all(use for pairs in found.values() for _, use in pairs)
    return {
        name: (pairs[0][0] if len({scheme for scheme, _ in pairs}) == 1 else FALLBACK_NORMALIZATION, masked)
        for name, pairs in found.items()
    }


def _mm(spacing: Sequence[float]) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing)
