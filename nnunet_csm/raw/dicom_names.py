"""The name of a series from its DICOM attributes."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources

from nnunet_csm.raw.series import alias_table

_TABLE = json.loads(resources.files("nnunet_csm.raw").joinpath("dicom_words.json").read_text(encoding="utf-8"))
KEYWORDS: tuple[str, ...] = tuple(_TABLE["keywords"])
# Words of descriptions that the alias table, which is about names of channels, does not have. "tirm" is a FLAIR or a STIR: the
# inversion time decides; with "t1" it is inversion recovery with the weighting of T1.
DESCRIPTION_WORDS: dict[str, str] = _TABLE["descriptions"]
# No series of their own: planning images, and images computed from others.
OTHER_WORDS = frozenset(_TABLE["other"])
CONTRAST_WORDS, NO_CONTRAST_WORDS = frozenset(_TABLE["contrast"]), frozenset(_TABLE["no_contrast"])
# Names that say more than others where a description has several of equal length: "t2 flair" is a FLAIR.
SPECIFIC_FIRST: list[str] = _TABLE["specific_first"]


def name_from_attributes(attributes: Mapping[str, str]) -> str | None:
    """`series_name` on attributes by keyword (`KEYWORDS`); a missing one is left out or empty. Times in ms, b-value in s/mm²."""
    if attributes.get("Modality", "MR") not in ("MR", ""):
        return None
    texts = [attributes.get(key, "") for key in ("SeriesDescription", "ProtocolName")]
    words = [word for text in texts for word in _words(text)]
    if OTHER_WORDS & set(words):
        return None
    name = (
        _from_image_type(attributes.get("ImageType", ""))
        or next((found for text in texts if (found := _from_text(text))), None)
        or _from_b_value(attributes)
        or _from_timing(attributes)
    )
    return "T1ce" if name == "T1w" and _has_contrast(attributes, words) else name


def _from_image_type(image_type: str) -> str | None:
    parts = {part.strip().upper() for part in image_type.split("\\")}
    if parts & {"ADC", "ADC_UNSPECIFIED"}:
        return "ADC"
    return "DWI" if parts & {"TRACEW", "DIFFUSION"} else None


def _from_text(text: str) -> str | None:
    """The longest run of words that names a series; among runs of equal length the more specific name."""
    words = _words(text)
    names = _names_in_descriptions()
    for length in range(len(words), 0, -1):
        runs = ("".join(words[start : start + length]) for start in range(len(words) - length + 1))
        found = {names[run] for run in runs if run in names}
        if found:
            return min(found, key=lambda name: SPECIFIC_FIRST.index(name) if name in SPECIFIC_FIRST else 0)
    return None


def _names_in_descriptions() -> dict[str, str]:
    table = {alias: canonical for canonical, aliases in alias_table().items() for alias in (canonical, *aliases)}
    return {"".join(_words(alias)): canonical for alias, canonical in {**table, **DESCRIPTION_WORDS}.items()}


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[\s_\-/.,;:()\[\]]+", text.casefold()) if word]


def _has_contrast(attributes: Mapping[str, str], words: Sequence[str]) -> bool:
    """Words win over ContrastBolusAgent, which some scanners keep filled for the whole study."""
    if NO_CONTRAST_WORDS & set(words):
        return False
    agent = attributes.get("ContrastBolusAgent", "").strip().casefold()
    return bool(CONTRAST_WORDS & set(words)) or agent not in ("", "none", "no", "n/a", "no contrast")


def _from_b_value(attributes: Mapping[str, str]) -> str | None:
    b_value = _number(attributes.get("DiffusionBValue", ""))
    return "DWI" if b_value is not None and b_value > 0 else None


def _from_timing(attributes: Mapping[str, str]) -> str | None:
    """Weighting by the usual ranges for spin and gradient echo at 1.5 and 3 T; None between the ranges and for echo-planar."""
    sequence = {part.strip() for part in attributes.get("ScanningSequence", "").split("\\")}
    echo, repetition, inversion = (_number(attributes.get(key, "")) for key in ("EchoTime", "RepetitionTime", "InversionTime"))
    if echo is None or repetition is None or "EP" in sequence:
        return None
    if "GR" in sequence and "SE" not in sequence:
        if echo >= 15:
            return "T2starw"
        return "T1w" if inversion and echo < 10 else None  # without inversion it may be spoiled, balanced or an angiogram
    if inversion and inversion >= 1500 and echo >= 60:
        return "FLAIR"
    if inversion and inversion <= 300 and repetition >= 2000:
        return "STIR"
    if inversion or not sequence & {"SE", "RM"}:
        return None
    if echo < 30:
        return "T1w" if repetition < 1200 else "PDw" if repetition >= 1800 else None
    return "T2w" if echo >= 60 and repetition >= 1500 else None


def _number(text: str) -> float | None:
    try:
        return float(text.split("\\")[0])
    except ValueError:
        return None
