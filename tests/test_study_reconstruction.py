"""Studies of reconstructions: what scores are on images made for it, the same patches for all, and what the tables say."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from factories import JOINT, JOINT_NETWORK, PATCH_SIZE, TOKEN_SIZE, KnownBank, csm_plans
from PIL import Image
from scipy.ndimage import gaussian_filter

from nnunet_csm.data.draws import Draws
from nnunet_csm.evaluation.reconstruction import error_steps, psnr, similarity
from nnunet_csm.figures.reconstructions import save_methods_of_patch
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext.base import MASKED, NOTHING_HIDDEN, Batch, setup_of
from nnunet_csm.study.dataset import common_patch
from nnunet_csm.study.reconstruction import score_table, summarize_scores, write_reconstruction_report
from nnunet_csm.study.scoring import HIDDEN_VOXELS, NUM_PATCHES, WHOLE_PATCH, Patch, patches

EDGES = (2, 4, 3)
SHAPE = (12, 16, 15)
EVERYWHERE = np.ones(SHAPE, bool)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


# --- scores of images ---------------------------------------------------------------------------------------------------------


def test_psnr_is_that_of_the_mean_squared_error_where_it_counts() -> None:
    true, where = random(*SHAPE), random(*SHAPE, seed=1) < 0.3
    assert psnr(true, true + 0.1, where) == pytest.approx(20)
    rebuilt = np.where(where, true + 0.01, 5.0)
    assert psnr(true, rebuilt, where) == pytest.approx(40)
    assert np.isnan(psnr(true, true, where)) and np.isnan(psnr(true, rebuilt, np.zeros(SHAPE, bool)))


def test_ssim_is_wangs_with_a_gaussian() -> None:
    true, rebuilt = random(*SHAPE), random(*SHAPE, seed=1)

    def mean(image: np.ndarray) -> np.ndarray:
        return gaussian_filter(image, 1.5, radius=5, mode="reflect")

    a, b = mean(true), mean(rebuilt)
    variances = mean(true**2) - a**2 + mean(rebuilt**2) - b**2
    together = mean(true * rebuilt) - a * b
    expected = (2 * a * b + 1e-4) * (2 * together + 9e-4) / ((a**2 + b**2 + 1e-4) * (variances + 9e-4))
    np.testing.assert_allclose(similarity(true, rebuilt), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(similarity(true, true), 1.0)
    # a patch thinner than the window
    assert similarity(random(4, 16, 16), random(4, 16, 16, seed=1)).shape == (4, 16, 16)


def blocks(seed: int = 0) -> np.ndarray:
    """One value a token."""
    grid = [size // edge for size, edge in zip(SHAPE, EDGES, strict=True)]
    values = random(*grid, seed=seed)
    for axis, edge in enumerate(EDGES):
        values = values.repeat(edge, axis)
    return values


def test_an_error_without_a_pattern_has_a_border_ratio_of_one() -> None:
    across, within = error_steps(random(60, 64, 60), np.ones((60, 64, 60), bool), EDGES)
    assert across / within == pytest.approx(1, abs=0.01)
    # also where one axis is smoother than the others, and tokens are shorter there
    smooth = gaussian_filter(random(120, 64, 60), (3, 0, 0))
    across, within = error_steps(smooth, np.ones(smooth.shape, bool), EDGES)
    assert across / within == pytest.approx(1, abs=0.02)


def test_steps_at_borders_of_tokens_are_a_pattern() -> None:
    across, within = error_steps(blocks(), EVERYWHERE, EDGES)
    assert across > 0.2 and within == 0
    noisy = blocks() + 0.1 * random(*SHAPE, seed=1)
    across, within = error_steps(noisy, EVERYWHERE, EDGES)
    assert across / within > 5
    # the borders of other tokens are none
    across, within = error_steps(np.roll(noisy, 1, axis=2), EVERYWHERE, (12, 16, 3))
    assert across / within < 1


def test_steps_are_counted_where_both_voxels_count_by_hand() -> None:
    error = np.zeros((1, 1, 6))
    error[0, 0] = [0, 1, 4, 6, 7, 7]
    where = np.array([[[True, True, True, True, True, False]]])
    # steps 1, 3, 2, 1; tokens of two voxels begin at 2 and 4
    assert error_steps(error, where, (1, 1, 2)) == pytest.approx(((3 + 1) / 2, (1 + 2) / 2))
    assert np.isnan(error_steps(error, np.zeros_like(where), (1, 1, 2))).all()
    # one token has no borders
    assert np.isnan(error_steps(error, where, (1, 1, 6))).all()


# --- what pretexts rebuild ----------------------------------------------------------------------------------------------------


def pretext_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    plans = csm_plans(**(JOINT if kind == "mae3d" else {}), **changes)
    block = plans["configurations"]["3d_fullres"]["csm"]["pretext"]
    if kind == "maesil":
        plans = csm_plans(architecture=JOINT_NETWORK, pretext="mae3d", **changes)
        block = plans["configurations"]["3d_fullres"]["csm"]["pretext"]
        block |= {"name": "maesil", "masking": {"mask_ratio": 0.3}, "noise": [0.1]}
    pretext, setup = setup_of(read_configuration(plans, "3d_fullres", "plans.json"))
    return pretext(setup).eval()


def patch_of(pretext: Any, seed: int = 1) -> Batch:
    """A patch without its second series."""
    volume = torch.randn(1, 3, *PATCH_SIZE, generator=torch.Generator().manual_seed(seed)).half()
    volume[:, 1] = 0
    present = volume.flatten(2).any(2)
    return Batch((volume,), pretext.draw(Draws(seed, torch.arange(1)), present, 0, (volume,), False))


@pytest.mark.parametrize("kind", ["csm", "mae3d", "maesil"])
def test_what_was_visible_stays_and_with_nothing_hidden_everything_is_rebuilt(kind: str) -> None:
    pretext = pretext_of(kind)
    batch = patch_of(pretext)
    (volume,) = batch.volumes
    found = pretext.rebuilt(batch)
    assert list(found) == [MASKED, NOTHING_HIDDEN]
    image, hidden = found[MASKED]
    assert image.shape == hidden.shape == volume.shape and hidden.any() and not hidden.all()
    seen = ~hidden
    # what an absent series is said to be does not matter
    seen[:, 1] = False
    assert image[seen].equal(volume[seen].float()) and not hidden[:, 1].any()
    # the pretext's own reconstruction, of every hidden token
    errors = (image - volume.float()).square()[hidden].mean()
    mask: Any = batch.drawn
    expected = pretext.rebuild(volume, mask).error
    assert float(errors) == pytest.approx(
        float(expected[mask.hidden & ~torch.tensor([[[False], [True], [False]]])].mean()), rel=1e-4
    )
    image, everything = found[NOTHING_HIDDEN]
    assert everything[:, ::2].all() and not everything[:, 1].any()
    assert (image != volume.float())[:, ::2].float().mean() > 0.99


@pytest.mark.parametrize("kind", ["csm", "mae3d"])
def test_with_nothing_hidden_the_network_is_given_every_present_token(kind: str) -> None:
    pretext = pretext_of(kind)
    batch = patch_of(pretext)
    present = torch.tensor([[True, False, True]])
    mask = pretext.nothing_hidden(batch.drawn, present)
    shape = mask.hidden.shape
    if kind == "csm":
        assert mask.visible.tolist() == mask.asked.tolist() == [[*range(30), *range(60, 90)]]
        assert mask.hidden.equal(~present[..., None].expand(shape))
    else:
        assert mask.visible.tolist() == [[*range(30)]] and mask.asked.tolist() == [[*range(90)]] and not mask.hidden.any()
    assert mask.rebuilt.equal(present[..., None].expand(shape))


def test_that_true_moments_are_given_is_said() -> None:
    pretext = pretext_of("csm", reconstruction={"normalize_targets": True})
    names = list(pretext.rebuilt(patch_of(pretext)))
    assert all(name.endswith("mean and deviation of tokens given") for name in names)


def test_patches_do_not_depend_on_the_method() -> None:
    present = torch.tensor([[True, True, True], [True, False, True]])

    def cut(cases: torch.Tensor, size: Any) -> torch.Tensor:
        return torch.stack([torch.full((3, *size), float(case)) for case in cases])

    bank = KnownBank(present, cut)
    seen = {}
    for kind in ("csm", "mae3d"):
        found = list(patches(bank, pretext_of(kind)))
        assert len(found) == 2 * NUM_PATCHES
        seen[kind] = torch.cat([batch.volumes[0] for batch in found])
        again = list(patches(bank, pretext_of(kind)))
        assert all(
            a.equal(b) for one, two in zip(found, again, strict=True) for a, b in zip(one.tensors, two.tensors, strict=True)
        )
    assert seen["csm"].equal(seen["mae3d"])
    masks: list[Any] = [batch.drawn for batch in patches(bank, pretext_of("csm"))]
    shown = [int((~mask.hidden.all(2)).sum()) for mask in masks]
    # of three series one or two are hidden whole, of two one
    assert set(shown) == {1, 2} and set(shown[NUM_PATCHES:]) == {1}


def test_a_patch_is_scored_on_hidden_voxels_and_whole() -> None:
    pretext = pretext_of("csm")
    batch = patch_of(pretext)
    scores = pd.DataFrame(Patch.of(batch.volumes[0], pretext.rebuilt(batch), pretext.setup.architecture).scores())
    # not of the absent series
    assert set(scores["series"]) == {"FLAIR", "T2w"} and len(scores) == 2 * 3
    assert set(zip(scores["given"], scores["scored"], strict=True)) == {
        (MASKED, HIDDEN_VOXELS),
        (MASKED, WHOLE_PATCH),
        (NOTHING_HIDDEN, WHOLE_PATCH),
    }
    hidden, pasted = (scores[(scores["given"] == MASKED) & (scores["scored"] == name)] for name in (HIDDEN_VOXELS, WHOLE_PATCH))
    assert (pasted["psnr"].to_numpy() >= hidden["psnr"].to_numpy()).all()
    # visible voxels have no error
    share = hidden["hidden"].to_numpy()
    assert pasted["psnr"].to_numpy() == pytest.approx(hidden["psnr"].to_numpy() - 10 * np.log10(share))
    perfect = {MASKED: (batch.volumes[0].float(), torch.ones_like(batch.volumes[0], dtype=torch.bool))}
    exact = pd.DataFrame(Patch.of(batch.volumes[0], perfect, pretext.setup.architecture).scores())
    assert exact["psnr"].isna().all() and exact["ssim"].tolist() == pytest.approx([1.0] * 4)


# --- tables and page ------------------------------------------------------------------------------------------------------------


def made_scores(num_repeats: int = 2) -> pd.DataFrame:
    tasks = [(MASKED, HIDDEN_VOXELS, 0.75), (MASKED, WHOLE_PATCH, 0.75), (NOTHING_HIDDEN, WHOLE_PATCH, 0.0)]
    rows = [
        (
            "t",
            arm,
            repeat,
            f"c{case}",
            f"p{case}",
            series,
            given,
            scored,
            hidden,
            20 + level + case,
            25 + level,
            0.5,
            0.6,
            0.2,
            0.1,
        )
        for level, arm in enumerate(("A & B", "AE"))
        for repeat in range(num_repeats)
        for case in range(2)
        for series in ("T1w", "T2w")
        for given, scored, hidden in (tasks if arm != "AE" else tasks[2:])
    ]
    columns = "table arm repeat case patient series given scored hidden psnr_foreground psnr ssim_foreground ssim"
    return pd.DataFrame(rows, columns=[*columns.split(), "across_borders", "within_tokens"])


def test_tasks_are_blocks_and_the_best_are_bold_where_all_hide_as_much() -> None:
    summary = summarize_scores(made_scores())
    found = score_table("t", summary)
    cells = found.cells
    assert list(cells["Method"]) == ["A & B", "A & B", "A & B", "AE"] and found.blocks == (0, 1, 2)
    assert list(cells["Hidden"]) == ["75.0 %", "75.0 %", "0.0 %", "0.0 %"]
    # cases, then repeats
    assert cells["PSNR, foreground"][0] == "20.50 ± 0.00" and cells["Border ratio"][0] == "2.000 ± 0.000"
    bold = {(int(row), cells.columns[column]) for row, column in zip(*np.nonzero(found.best), strict=True)}
    assert {name for row, name in bold if row == 3} >= {"PSNR, foreground", "PSNR, all"} and {row for row, _ in bold} <= {2, 3}
    assert "±" not in score_table("t", summarize_scores(made_scores(1))).cells["PSNR, all"][0]
    # one method that hides more
    uneven = made_scores()
    more = uneven[uneven["arm"] == "A & B"].assign(arm="C", hidden=0.9)
    assert not score_table("t", summarize_scores(pd.concat([uneven, more]))).best[:4].any()


def slices(seed: int) -> dict[str, Any]:
    true, hidden = torch.from_numpy(random(8, 10)).float(), torch.from_numpy(random(8, 10, seed=seed) < 0.5)
    rebuilt = {NOTHING_HIDDEN: (true * 0.5, torch.ones_like(hidden))}
    return {"c0": {"T1w": {"true": true, "rebuilt": ({MASKED: (true * 0.7, hidden)} if seed else {}) | rebuilt}}}


def test_the_page_has_tables_and_the_same_patches_side_by_side(tmp_path: Path) -> None:
    files = {}
    for number, arm in enumerate(("AE", "A & B")):
        files[arm] = tmp_path / f"{number}.pt"
        torch.save(slices(number), files[arm])
    page = write_reconstruction_report(tmp_path, "Study t", made_scores(), pd.DataFrame(), files, text="What it is.")
    text = page.read_text(encoding="utf-8")
    assert "The same patches" in text and "hidden voxels" in text and text.count("<img") == 1
    assert {"summary.csv", "tables.md", "tables.tex"} <= {file.name for file in tmp_path.iterdir()}
    assert not (tmp_path / "comparisons.csv").exists()
    assert r"A \& B" in (tmp_path / "tables.tex").read_text(encoding="utf-8") and "| A & B" in (tmp_path / "tables.md").read_text(
        encoding="utf-8"
    )


def test_a_picture_has_a_row_for_every_method(tmp_path: Path) -> None:
    true = random(16, 20)
    everything = (true, np.ones(true.shape, bool))
    one = {"AE": {NOTHING_HIDDEN: everything}}
    two = one | {"CSM": {MASKED: (true * 0.5, true > 0.5), NOTHING_HIDDEN: everything}}
    heights = []
    for number, rows in enumerate((one, two)):
        save_methods_of_patch(tmp_path / f"{number}.png", true, rows, "c, T1w")
        heights.append(Image.open(tmp_path / f"{number}.png").size[1])
    assert heights[1] > 1.5 * heights[0]


def test_patches_are_whole_tokens_of_all() -> None:
    def configuration(patch: Any, token: Any) -> Any:
        return read_configuration(csm_plans(patch_size=patch, token_size=token), "3d_fullres", "p.json")

    assert common_patch([configuration((16, 48, 32), (4, 8, 8)), configuration((20, 44, 40), (2, 4, 4))]) == (16, 40, 32)
    assert common_patch([configuration(PATCH_SIZE, TOKEN_SIZE)]) == PATCH_SIZE
