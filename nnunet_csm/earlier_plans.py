"""Plans of earlier versions, as the present one has them."""

from collections.abc import Mapping
from typing import Any

VERSION = 3


# knobs of the network that are gone, and what plans say where they were not turned (docs/experiments.md, E20)
GONE = {"normalized_taps": False, "decoder_init": "torch"}


def network_brought_up(kwargs: Any) -> Any:
    """nnU-Net's `arch_kwargs` as plans have them now: `joint_tokens` told two kinds of encoder apart, and two knobs are gone."""
    if not isinstance(kwargs, Mapping):
        return kwargs
    kwargs = {key: value for key, value in kwargs.items() if key not in GONE or value != GONE[key]}
    if "joint_tokens" not in kwargs:
        return kwargs
    others = {key: value for key, value in kwargs.items() if key != "joint_tokens"}
    return {**others, "encoder": {"kind": "joint_vit" if kwargs["joint_tokens"] else "vit"}}


def brought_up(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """A configuration as version 3 has it: version 2 had two pretexts, told apart by `joint_tokens`, their settings in `csm`."""
    csm = entry.get("csm")
    if not isinstance(csm, Mapping) or csm.get("version") != 2 or not isinstance(csm.get("masking"), Mapping):
        return entry
    others = {key: value for key, value in csm.items() if key not in ("masking", "reconstruction")}
    pretext = {"name": "csm", "masking": csm["masking"], "reconstruction": csm.get("reconstruction")}
    if network_brought_up(entry["architecture"]["arch_kwargs"]).get("encoder") == {"kind": "joint_vit"}:
        of_places = {key: value for key, value in csm["masking"].items() if key not in ("places", "hidden_series")}
        pretext |= {"name": "mae3d", "masking": of_places}
    return {**entry, "csm": {**others, "version": VERSION, "pretext": pretext}}
