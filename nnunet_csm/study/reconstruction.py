"""What pretrainings rebuild: scores of their runs as a table, the same patches side by side, and the page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from nnunet_csm.figures.page import Page
from nnunet_csm.figures.reconstructions import save_methods_of_patch
from nnunet_csm.study.collection import named
from nnunet_csm.study.dataset import Dataset
from nnunet_csm.study.layout import TableLayout
from nnunet_csm.study.runs import Row
from nnunet_csm.study.scoring import NUM_PATCHES, SCORES, SLICES
from nnunet_csm.study.tables import Tables, cost_tables, mean_and_sd

# heading and decimals of what is averaged over patches and series; the last is a ratio of two such means
MEASURES = {
    "psnr_foreground": ("PSNR, foreground", 2),
    "psnr": ("PSNR, all", 2),
    "ssim_foreground": ("SSIM, foreground", 4),
    "ssim": ("SSIM, all", 4),
    "border_ratio": ("Border ratio", 3),
}
BEST = [name for name in MEASURES if name != "border_ratio"]

METHODS = f"""Scored are {NUM_PATCHES} patches of every test case, the same for all methods; what each hides of them is drawn as
in its training. Nobody learned from these patients. Each series is scored by itself where there is something of it: its
intensities are scaled so that the 0.5th and the 99.5th percentile of its foreground in the patch are 0 and 1, and clipped to that
range, the true ones and the rebuilt ones alike. Foreground are voxels that are neither 0 nor the lowest of the patch.

PSNR has a peak of 1. SSIM is scikit-image's in 3-D, with a Gaussian of 1.5 voxels, 11 wide, and a data range of 1; images are
reflected at the border of the patch. Both are given for the foreground and for all voxels, of which background may be most and is
easy. A score is the mean over the patches and series of a case, then over cases; the table has mean and standard deviation
(n - 1) over repeats.

"Hidden voxels" are those that were rebuilt from the others; "whole patch" has the visible voxels pasted in. With "nothing hidden"
(r = 0) a masked method is given all tokens and asked for all of them, which its decoder was never trained for; an autoencoder
sees everything and rebuilds it, as in its training. Only these rows compare all methods on one task. Masked rows hide what each
method hides: the column "Hidden" is the share of the voxels, and the best are bold only where it is the same for all.

The border ratio tells of fixed patterns: how much the error (rebuilt minus true) changes on average from a voxel to the next
across borders of the method's own tokens, over how much it changes within them, both voxels being foreground and scored; the
mean is taken along each axis, then over axes. Without a pattern it is 1."""


def collect_scores(name: str, rows: Sequence[Row], dataset: Dataset) -> pd.DataFrame:
    """A row for every patch, series and way of scoring of the runs that are done; empty when there is none."""
    patients = {sample.case: sample.patient for sample in dataset.table.samples}
    found = []
    for row in rows:
        path = dataset.folder / "runs" / row.run / SCORES
        if path.is_file():
            scores = pd.read_csv(path, dtype={"case": str})
            patient = scores["case"].map(lambda case: patients.get(case, case))
            found.append(scores.assign(**named(name, row), patient=patient))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def summarize_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """A row for each task and arm: arm, given, scored, num_repeats, num_patients, hidden, and of `MEASURES` mean and _sd."""
    task = ["given", "scored", "arm"]
    by_case = scores.groupby([*task, "repeat", "case"], sort=False)
    cases = by_case[["hidden", *MEASURES.keys() - {"border_ratio"}, "across_borders", "within_tokens"]].mean()
    cases["border_ratio"] = cases["across_borders"] / cases["within_tokens"]
    by_arm = cases.groupby([*task, "repeat"], sort=False)[["hidden", *MEASURES]].mean().groupby(task, sort=False)
    spread = by_arm[[*MEASURES]].std().add_suffix("_sd")
    counts = scores.groupby(task, sort=False).agg(num_repeats=("repeat", "nunique"), num_patients=("patient", "nunique"))
    return pd.concat([counts, by_arm.mean(), spread], axis=1).reset_index()


def score_table(name: str, summary: pd.DataFrame) -> TableLayout:
    """Methods below each other, a block for each task."""
    task = summary.groupby(["given", "scored"], sort=False).ngroup()
    ordered = summary.assign(task=task).sort_values("task", kind="stable", ignore_index=True)
    texts = {
        heading: [
            mean_and_sd(mean, sd, digits, digits) for mean, sd in zip(ordered[measure], ordered[f"{measure}_sd"], strict=True)
        ]
        for measure, (heading, digits) in MEASURES.items()
    }
    names = {
        "Given": ordered["given"],
        "Scored": ordered["scored"],
        "Method": ordered["arm"],
        "Hidden": ordered["hidden"].map(lambda share: f"{100 * share:.1f} %"),
    }
    cells = pd.DataFrame({**names, **texts})
    of_task = ordered.assign(shares=cells["Hidden"]).groupby("task")
    alike = (of_task["shares"].transform("nunique") == 1) & (of_task["arm"].transform("size") > 1)
    best = np.zeros(cells.shape, bool)
    for measure in BEST:
        heading, digits = MEASURES[measure]
        printed = ordered[measure].round(digits)
        best[:, list(cells).index(heading)] = alike & (printed == printed.groupby(ordered["task"]).transform("max"))
    blocks = tuple(np.flatnonzero(ordered["task"].diff() != 0).tolist())
    repeats, patients = ordered["num_repeats"].max(), ordered["num_patients"].max()
    caption = (
        f"{name}: rebuilt patches of {patients} patients, intensities from 0 to 1 by the 0.5th and 99.5th percentile of the "
        f"foreground; PSNR in dB, SSIM in 3-D, change of the error across borders of tokens over that within (1: no pattern); "
        f"mean ± standard deviation over {repeats} repeat{'s' if repeats > 1 else ''}"
    )
    return TableLayout(name, "reconstruction", caption, cells, len(names), best, blocks)


def write_reconstruction_report(
    folder: Path,
    title: str,
    scores: pd.DataFrame,
    costs: pd.DataFrame,
    slices: Mapping[str, Path],
    pictures: Sequence[tuple[Path, str]] = (),
    text: str = "",
) -> Path:
    """Write tables (`Tables.save`), figures/ and report.html into `folder`; returns the page.

    Args:
        scores: as `collect_scores`, not empty.
        costs: as `make_tables`.
        slices: file of slices that scoring left, by arm.
        pictures: (path, caption) of the pretrainings.
        text: the first lines of the page.
    """
    summary, (name, *_) = summarize_scores(scores), scores["table"]
    by_arm, of_study = cost_tables(costs)
    tables = Tables(summary, pd.DataFrame(), by_arm, (score_table(name, summary), *of_study))
    tables.save(folder)
    page = Page(title, text)
    page.section(name, tables=[layout.to_page() for layout in tables.layouts if layout.table])
    if drawn := list(draw_patches(folder / "figures", slices)):
        page.section("The same patches", "Differences run from black at 0 to white at 0.25.", images=drawn)
    if pictures:
        page.section("Pretraining", images=pictures)
    if of_study:
        page.section("Cost", tables=[layout.to_page() for layout in of_study])
    page.section("How this was computed", METHODS)
    page.save(folder / "report.html")
    return folder / "report.html"


def draw_patches(figures: Path, slices: Mapping[str, Path]) -> Iterator[tuple[Path, str]]:
    """A picture for every patch and series of which all arms kept slices."""
    of_arms: dict[str, dict[str, Any]] = {arm: torch.load(path, weights_only=True) for arm, path in slices.items()}
    for case in next(iter(of_arms.values()), {}):
        for series in of_arms[next(iter(of_arms))][case]:
            found = {arm: kept[case][series] for arm, kept in of_arms.items() if series in kept.get(case, {})}
            true = next(iter(found.values()))["true"].numpy()
            if all(np.array_equal(one["true"], true) for one in found.values()):
                path = figures / f"patch_{case}_{series}.png"
                rebuilt = {
                    arm: {given: (image.numpy(), where.numpy()) for given, (image, where) in one["rebuilt"].items()}
                    for arm, one in found.items()
                }
                save_methods_of_patch(path, true, rebuilt, f"{case}, {series}")
                yield path, f"{case}, {series}: the middle slice of a patch"


def slices_of(rows: Sequence[Row], folder: Path) -> dict[str, Path]:
    """Files of slices of the first division, by arm, as far as its runs are done."""
    files = {row.arm: folder / "runs" / row.run / SLICES for row in rows if row.division == 0}
    return {arm: path for arm, path in files.items() if path.is_file()}
