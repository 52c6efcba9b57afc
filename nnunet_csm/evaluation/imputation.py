"""How near a made up series is to the one that was scanned, beside what needs no network."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from nnunet_csm.data.intensities import foreground, percentile_range, scaled
from nnunet_csm.evaluation.reconstruction import mean_where, psnr, similarity

SCORES = {
    "psnr_foreground": "PSNR, foreground",
    "psnr": "PSNR, all",
    "ssim_foreground": "SSIM, foreground",
    "ssim": "SSIM, all",
}
DECIMALS = {"psnr_foreground": 2, "psnr": 2, "ssim_foreground": 4, "ssim": 4}


def score_image(
    true: Float[np.ndarray, "z y x"], made: Mapping[str, Float[np.ndarray, "z y x"]], inside: Bool[np.ndarray, "z y x"]
) -> Iterator[dict[str, Any]]:
    """A row for each image of `made`, by its name: `SCORES`, as studies of reconstruction have them of patches.

    The 0.5th and the 99.5th percentile of the true foreground become 0 and 1, and all is clipped to that.

    Args:
        true: z-scored.
        made: z-scored by what the network was given, not by `true`.
        inside: foreground of what was given; what is scored is the box around it.
    """
    box = tuple(slice(where.min(), where.max() + 1) for where in np.nonzero(inside))
    volume = torch.from_numpy(np.ascontiguousarray(true[box]))[None, None]
    bounds, counted = percentile_range(volume, exact=True), foreground(volume)[0, 0].numpy() & inside[box]
    truth, everywhere = scaled(volume, *bounds)[0, 0].numpy(), np.ones_like(counted)
    for name, image in made.items():
        rebuilt = scaled(torch.from_numpy(np.ascontiguousarray(image[box]))[None, None], *bounds)[0, 0].numpy()
        similar = similarity(truth, rebuilt)
        yield {
            "image": name,
            "psnr_foreground": psnr(truth, rebuilt, counted),
            "psnr": psnr(truth, rebuilt, everywhere),
            "ssim_foreground": mean_where(similar, counted),
            "ssim": mean_where(similar, everywhere),
        }


def markdown_of(scores: pd.DataFrame) -> str:
    """Means over cases, then every case; `scores` has case, series, given, image and `SCORES`."""
    means = scores.groupby(["series", "image"], sort=False)[list(SCORES)].mean().reset_index()
    counts = scores.groupby("series")["case"].nunique()
    num_cases = ", ".join(f"{series}: {count} cases" for series, count in counts.items())
    return f"Means ({num_cases})\n\n{_table(means)}\n\nEvery case\n\n{_table(scores)}\n"


def _table(rows: pd.DataFrame) -> str:
    texts = rows.assign(**{name: rows[name].map(f"{{:.{DECIMALS[name]}f}}".format) for name in SCORES}).rename(columns=SCORES)
    lines = [list(texts), ["---"] * len(texts.columns), *texts.astype(str).to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
