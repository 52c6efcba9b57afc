"""What is scored of a segmentation: labels, the regions that a dataset or its labels imply, and those asked for by -regions."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nnunet_csm.errors import UserError

# What releases of BraTS call the three parts of a glioma, as `plain_name` writes it.
BRATS_PARTS = {
    "oedema": r"ed(ema)?|peritumoral( edema(tous( invaded)? tissue)?)?|snfh|surrounding non enhancing flair hyperintensity",
    "necrotic": r"necrosis|ncr( net)?|netc?|(necrotic|(necrotic (and )?)?non ?enhancing)( tumor)?( core)?",
    "enhancing": r"(gd )?enhancing( tumor)?|et",
}

# Region: (short name for the columns of a table, its parts). arXiv 2412.07387 takes the necrotic part alone as the tumour core,
# BraTS adds the enhancing part, and published numbers mix the two: both are always given.
BRATS_REGIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "whole tumour (WT)": ("WT", ("oedema", "necrotic", "enhancing")),
    "tumour core (TC, BraTS: necrotic + enhancing)": ("TC (BraTS)", ("necrotic", "enhancing")),
    "tumour core (TC, paper: necrotic only)": ("TC (paper)", ("necrotic",)),
    "enhancing tumour (ET)": ("ET", ("enhancing",)),
}


@dataclass(frozen=True)
class Structure:
    """What one Dice is about: a label or a region, as the set of label values it is made of."""

    name: str
    kind: str
    labels: tuple[int, ...]
    in_foreground_mean: bool

    @property
    def labels_text(self) -> str:
        return "+".join(str(label) for label in self.labels)


def short_name(structure: str) -> str:
    """A structure's name for the columns of a table."""
    return BRATS_REGIONS[structure][0] if structure in BRATS_REGIONS else structure


def regions_of(labels: Mapping[str, int | Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """The regions to score for the `labels` of an nnU-Net dataset.json, as region name -> label values.

    A region-based dataset: its own regions. Labels that are the three parts of a glioma: BraTS's regions, with the tumour core
    as BraTS and as arXiv 2412.07387 define it. Else the union of all labels, where there are at least two. 'ignore' is no label.
    """
    foreground = foreground_of(labels)
    if is_region_based(foreground):
        return foreground
    parts = {
        part: [label for name, values in foreground.items() if re.fullmatch(pattern, plain_name(name)) for label in values]
        for part, pattern in BRATS_PARTS.items()
    }
    if all(parts.values()):
        return {
            region: tuple(sorted(label for part in its_parts for label in parts[part]))
            for region, (_, its_parts) in BRATS_REGIONS.items()
        }
    if len(foreground) >= 2:
        return {"foreground": tuple(sorted(label for values in foreground.values() for label in values))}
    return {}


def parse_regions(definitions: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Read what follows a -regions flag: ["WT=1,2,3", "ET=3"] -> {"WT": (1, 2, 3), "ET": (3,)}. Raises UserError."""
    regions: dict[str, tuple[int, ...]] = {}
    for definition in definitions:
        match = re.fullmatch(r"\s*([^=]*[^=\s])\s*=\s*(\d+(?:\s*,\s*\d+)*)\s*", definition)
        if match is None:
            raise UserError(
                f"-regions: cannot read {definition!r}; write a name, '=' and label values joined by commas, e.g. WT=1,2,3"
            )
        if match[1] in regions:
            raise UserError(f"-regions: {match[1]!r} is defined twice; give each region a name of its own")
        regions[match[1]] = tuple(sorted({int(label) for label in match[2].split(",")}))
    return regions


def plain_name(name: str) -> str:
    """Lower case, American, words of letters only: 'Non-enhancing Tumour' -> 'non enhancing tumor'."""
    american = name.lower().replace("tumour", "tumor").replace("oedema", "edema")
    return re.sub(r"[^a-z]+", " ", american).strip()


def foreground_of(labels: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> label values, without background and ignore. `labels` may be as found in a file; raises UserError."""
    foreground: dict[str, tuple[int, ...]] = {}
    for name, value in labels.items():
        values = tuple(sorted(set(value))) if isinstance(value, (list, tuple)) else (value,)
        if not all(isinstance(label, int) for label in values):
            raise UserError(
                f"labels of dataset.json: {name!r} is {value!r}, expected an integer or a list of integers; "
                "convert an MSD dataset.json with nnUNetv2_convert_MSD_dataset"
            )
        if name != "ignore" and values != (0,):
            foreground[name] = values
    return foreground


def is_region_based(foreground: Mapping[str, tuple[int, ...]]) -> bool:
    """nnU-Net's rule: a list of one label is a label."""
    return any(len(values) > 1 for values in foreground.values())


def structures_of(labels: Mapping[str, Any], regions: Mapping[str, Sequence[int]] | None) -> tuple[Structure, ...]:
    """What a dataset with these `labels` trains on, then the regions that are not among it, or those given. Raises UserError."""
    foreground = foreground_of(labels)
    if not foreground:
        raise UserError(f"dataset.json: 'labels' names no foreground label, found {dict(labels)}; add the labels to score")
    region_based = is_region_based(foreground)
    kind = "region" if region_based else "label"
    structures = [Structure(name, kind, values, in_foreground_mean=True) for name, values in foreground.items()]
    if regions is None:
        regions = {} if region_based else regions_of(labels)
    declared = {label for values in foreground.values() for label in values}
    for name, values in regions.items():
        if unknown := sorted(set(values) - declared):
            raise UserError(
                f"region {name!r} holds labels {unknown}, dataset.json names only {sorted(declared)}; correct -regions"
            )
        if name in foreground:
            raise UserError(f"region {name!r} has the name of a label in dataset.json; give it another name with -regions")
        structures.append(Structure(name, "region", tuple(values), in_foreground_mean=False))
    return tuple(structures)
