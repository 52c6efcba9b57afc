"""Bootstrap by counts: a resample is how often it draws each patient, or each repeat, and every statistic takes weights.

Intervals are percentile intervals (Efron 1979) over resamples in which the statistic is defined; NaN is what is not.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Real

CONFIDENCE = 0.95
SEED = 12345
# of weights held at a time
LARGEST_BLOCK = 2**20


def drawn(rng: np.random.Generator, size: int, num_resamples: int) -> Float[np.ndarray, "n size"]:
    """How often each of `size` is in each resample of as many, with replacement."""
    return rng.multinomial(size, np.full(size, 1 / size), size=num_resamples).astype(np.float64)


def drawn_weights(patient: Int[np.ndarray, " n"], num_resamples: int, seed: int) -> Iterator[Float[np.ndarray, "r n"]]:
    """How often each sample is in each resample: as often as its patient was drawn. In blocks, to spare memory."""
    rng = np.random.default_rng(seed)
    at_once = max(1, LARGEST_BLOCK // len(patient))
    for start in range(0, num_resamples, at_once):
        yield drawn(rng, int(patient.max()) + 1, min(at_once, num_resamples - start))[:, patient]


def drawn_within(rng: np.random.Generator, groups: Real[np.ndarray, " r"], num_resamples: int) -> Float[np.ndarray, "n r"]:
    """How often each member of a group is in each resample: groups are drawn, then as many members of each as it has."""
    names, group = np.unique(groups, return_inverse=True)
    times = drawn(rng, len(names), num_resamples)
    counts = np.zeros((num_resamples, len(groups)))
    for number in range(len(names)):
        members = np.flatnonzero(group == number)
        num_drawn = (times[:, number] * len(members)).astype(np.int64)
        counts[:, members] = rng.multinomial(num_drawn, np.full(len(members), 1 / len(members)))
    return counts


def interval(resampled: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "2 ..."]:
    """Ends of the interval over the first axis; NaN where fewer than half of the resamples are defined, or there are none."""
    is_defined = ~np.isnan(resampled)
    enough = is_defined.any(0) & (is_defined.sum(0) >= len(resampled) / 2)
    ends = np.full((2, *enough.shape), np.nan)
    ends[:, enough] = np.nanquantile(resampled[:, enough], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return ends


def two_sided_p(resampled: Float[np.ndarray, " n"]) -> float:
    """Twice the smaller share on one side of 0, never below 2 / (n + 1); NaN where fewer than half of the resamples are."""
    defined = resampled[~np.isnan(resampled)]
    if defined.size < resampled.size / 2:
        return np.nan
    fewer = min(np.count_nonzero(defined <= 0), np.count_nonzero(defined >= 0))
    return min(1.0, 2 * (fewer + 1) / (len(defined) + 1))


def ratio(numerator: Real[np.ndarray, "..."], denominator: Real[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Divide; NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)


def mean_of_defined(values: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Mean over values that are not NaN; NaN where there is none."""
    return ratio(np.nansum(values, axis=axis), (~np.isnan(values)).sum(axis=axis))


def estimates_dict(estimates: pd.DataFrame) -> dict[str, dict[str, float | None]]:
    """Estimates, rows value, low and high, a column a metric, as JSON has them; NaN is None."""
    return estimates.astype(object).where(estimates.notna(), None).to_dict()


def estimates_markdown(columns: Mapping[str, pd.DataFrame], titles: Mapping[str, str], digits: str = ".3f") -> str:
    """A row a metric, a column a set of estimates."""
    texts = pd.DataFrame({name: estimates.apply(estimate_text, digits=digits) for name, estimates in columns.items()})
    return str(texts.rename(index=titles).rename_axis("metric").to_markdown(disable_numparse=True)) + "\n"


def estimate_text(estimate: pd.Series, digits: str = ".3f") -> str:
    """Write `value`, `low` and `high` as 0.912 (0.851 to 0.960); a dash where there is no value."""
    if np.isnan(estimate["value"]):
        return "-"
    value, low, high = (f"{estimate[name]:{digits}}" for name in ("value", "low", "high"))
    return value if np.isnan(estimate["low"]) else f"{value} ({low} to {high})"
