"""What tissues are, how series are measured, and the signal that the one gives in the other; the numbers are in tissues.json."""

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal, TypeVar

import numpy as np

Value = TypeVar("Value", float, np.ndarray)

CLASSES = ("benign", "malignant")  # T1 and T2 are both short or both long; one is short and one is long

# Longitudinal relaxivity of a common gadolinium chelate in blood at 37 degrees C, 1.5 to 3 T (manufacturers' range 3.5 to 5).
RELAXIVITY_PER_MMOL_S = 4.5


@dataclass(frozen=True)
class Tissue:
    """What the signal equations need to know of a tissue."""

    proton_density: float  # relative to water
    t1_ms: float
    t2_ms: float
    adc: float  # 1e-6 mm2/s
    uptake_mmol_l: float = 0.0  # contrast agent in the tissue after injection


@dataclass(frozen=True)
class Acquisition:
    """How one series is measured; fields its equation does not use stay 0."""

    equation: Literal["gradient echo", "spin echo", "inversion recovery", "diffusion", "ADC map"]
    voxel_mm: tuple[float, float, float]  # (z, y, x); finer than the common grid has no effect
    tr_ms: float = 0.0
    te_ms: float = 0.0
    ti_ms: float = 0.0
    flip_deg: float = 0.0
    b_s_mm2: float = 0.0
    after_contrast: bool = False


_TABLES = json.loads(files("nnunet_csm.phantom").joinpath("tissues.json").read_text(encoding="utf-8"))

# Healthy tissue: rounded from the range of published relaxometry at 3 T (white matter T1 800 to 1100 ms, grey matter 1300
# to 1800 ms, T2 70 to 110 ms) and of clinical ADC maps. Lesions: within the wider ranges published for gliomas, and chosen
# there so that series complement one another: oedema's proton density offsets its T1 (isointense to white matter in T1w),
# the core's T1 offsets its T2 (isointense to oedema in FLAIR), enhancing and restricted tumour are oedema but for uptake
# and ADC.
TISSUES = {name: Tissue(**row) for name, row in _TABLES["tissues"].items()}
# (T1 is long, T2 is long) to the core of a phantom with diagnoses. T1w tells the one and T2w the other (a long T1 costs T2w
# signal, and proton density makes up for it), and the class is whether they agree: neither by itself tells more than chance.
# FLAIR, which weighs both, does.
CORES = {tuple(word == "long" for word in kind.split()): Tissue(**row) for kind, row in _TABLES["cores"].items()}
# Typical clinical protocols at 3 T, by the canonical name of the series. FLAIR's inversion time is where CSF gives no signal:
# TI = T1 (ln 2 - ln(1 + exp(-TR / T1))).
ACQUISITIONS = {name: Acquisition(**row) for name, row in _TABLES["acquisitions"].items()}


def signal(acquisition: Acquisition, tissue: Tissue, water: Value) -> Value:
    """Noise-free signal of a pure tissue, in units of fully relaxed water (ADC map: 1e-6 mm2/s).

    `water` is the relative excess of free water over the tissue's usual, a number or an array of any shape: it prolongs T1
    and T2 together and raises proton density by a third of that, as within-tissue variation does in relaxometry.
    Contrast agent shortens T1 by 1/T1' = 1/T1 + r1 C.
    """
    pd = tissue.proton_density * (1 + water / 3)
    t1_ms = tissue.t1_ms * (1 + water)
    t2_ms = tissue.t2_ms * (1 + water)
    if acquisition.after_contrast:
        t1_ms = 1 / (1 / t1_ms + RELAXIVITY_PER_MMOL_S * tissue.uptake_mmol_l / 1000)
    recovered, echo = np.exp(-acquisition.tr_ms / t1_ms), np.exp(-acquisition.te_ms / t2_ms)
    match acquisition.equation:
        case "gradient echo":  # spoiled, in the steady state (Ernst's equation); T2 stands in for T2*
            flip = math.radians(acquisition.flip_deg)
            return pd * (math.sin(flip) * (1 - recovered) / (1 - math.cos(flip) * recovered)) * echo
        case "spin echo":
            return pd * (1 - recovered) * echo
        case "inversion recovery":  # signed, since partial volumes add before the magnitude is taken
            return pd * (1 - 2 * np.exp(-acquisition.ti_ms / t1_ms) + recovered) * echo
        case "diffusion":  # Stejskal and Tanner's equation on a T2-weighted echo
            return pd * (1 - recovered) * echo * math.exp(-acquisition.b_s_mm2 * tissue.adc * 1e-6)
        case "ADC map":
            return 0 * pd + tissue.adc
