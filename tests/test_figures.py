import re
import threading

import matplotlib
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.pictures import save_overlays_of_folder
from nnunet_csm.figures.canvas import COARSE_LEVELS, COLOURS, EMPTY
from nnunet_csm.figures.curves import Panel, save_curves
from nnunet_csm.figures.overlays import _fullest_slice, save_overlay
from nnunet_csm.figures.page import Page, Table
from nnunet_csm.figures.reconstructions import HIDDEN_COLOUR, save_reconstruction, save_restoration

NAMES = ("FLAIR", "T1w", "T2w")
LABELS = {0: "background", 1: "oedema", 2: "core"}


def as_drawn(colour: str) -> tuple[int, ...]:
    return tuple(COARSE_LEVELS[int(colour[i : i + 2], 16)] for i in (1, 3, 5))


def share_of(path, colour: str) -> float:
    """Share of the picture's pixels that have exactly this colour."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    return float((pixels == as_drawn(colour)).all(axis=-1).mean())


@pytest.fixture
def study():
    """Three series on a (6, 20, 24) grid with two labels on slices 3 and 4."""
    rng = np.random.default_rng(0)
    volume = rng.normal(100, 20, (3, 6, 20, 24)).astype(np.float32)
    reference = np.zeros((6, 20, 24), int)
    reference[3, 5:12, 6:14] = 1
    reference[4, 6:9, 7:10] = 2
    reference[3, 7:9, 8:11] = 2
    return volume, reference, np.roll(reference, 1, axis=2)


def test_the_slice_shown_is_one_with_every_label(study):
    _, reference, _ = study
    reference[1], reference[5] = 3, 0  # the largest area, and a label beside the two others
    assert _fullest_slice(reference, (1, 2)) == 3
    reference[4] = np.where(reference[4] == 2, 2, 1)  # nearly all of the one, and more of the other
    assert _fullest_slice(reference, (1, 2)) == 4
    assert _fullest_slice(reference, (3,)) == 1
    assert _fullest_slice(reference, (7,)) == 3 and _fullest_slice(reference, ()) == 3


def test_overlay_with_and_without_reference(study, tmp_path):
    volume, reference, prediction = study
    save_overlay(tmp_path / "new" / "a.png", volume, NAMES, reference, prediction, LABELS, "case", (3.0, 1.0, 1.0))
    save_overlay(tmp_path / "new" / "b.png", volume, NAMES, None, prediction, LABELS, "case")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.png", "b.png"]
    for path in (tmp_path / "new").iterdir():
        width, height = Image.open(path).size
        assert 500 <= width <= 1000 and 500 <= height <= 1200 and path.stat().st_size < 300_000
        assert all(share_of(path, colour) > 1e-4 for colour in COLOURS[:2])  # in the legend, where nothing shines through
        assert np.mean(np.ptp(np.asarray(Image.open(path), dtype=int), axis=-1) > 40) > 0.01
        assert share_of(path, EMPTY) < 0.01


def test_uncertainty_has_a_column_of_its_own_and_changes_no_other(study, tmp_path):
    volume, reference, prediction = study
    given = (volume, NAMES, reference, prediction, LABELS, "case")
    pictures = {}
    for name, uncertain in (("none", None), ("certain", np.zeros(reference.shape)), ("doubt", np.ones(reference.shape))):
        save_overlay(tmp_path / f"{name}.png", *given, uncertainty=uncertain)
        pictures[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    assert pictures["certain"].shape == pictures["doubt"].shape != pictures["none"].shape
    changed = (pictures["certain"] != pictures["doubt"]).any(axis=(0, 2)).nonzero()[0]
    assert changed.size and changed.min() > 0.78 * pictures["doubt"].shape[1]


def test_overlay_follows_the_spacing(study, tmp_path):
    volume, reference, prediction = study
    heights = []
    for y_spacing in (1.0, 2.0):
        save_overlay(tmp_path / "a.png", volume, NAMES, reference, prediction, LABELS, "case", (3.0, y_spacing, 1.0))
        heights.append(Image.open(tmp_path / "a.png").height)
    assert heights[1] > 1.6 * heights[0]


def test_overlay_of_an_absent_series_and_of_nothing_segmented(study, tmp_path):
    volume, reference, prediction = study
    volume[1] = 0
    save_overlay(tmp_path / "a.png", volume, NAMES, reference * 0, prediction * 0, LABELS, "case")
    # A third of the panels, which fill most of the picture.
    assert 0.15 < share_of(tmp_path / "a.png", EMPTY) < 0.34


def write(path, array):
    image = sitk.GetImageFromArray(array)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    image.SetSpacing((1.0, 1.5, 3.0))
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))


def test_overlays_of_a_folder(study, tmp_path):
    volume, reference, prediction = study
    for case in ("a", "b"):
        for channel, series in enumerate(volume):
            write(tmp_path / "images" / f"{case}_{channel:04d}.nii.gz", series)
        write(tmp_path / "labels" / f"{case}.nii.gz", reference.astype(np.uint8))
        write(tmp_path / "predicted" / f"{case}.nii.gz", prediction.astype(np.uint8))
    folders = (tmp_path / "images", tmp_path / "labels", tmp_path / "predicted")
    drawn = save_overlays_of_folder(*folders, NAMES, LABELS, tmp_path / "out", num_cases=1, file_ending=".nii.gz")
    assert drawn == [tmp_path / "out" / "a.png"] and drawn[0].is_file()
    write(tmp_path / "predicted" / "uncertainty" / "a_uncertainty.nii.gz", uncertain := (prediction > 0).astype(np.float32))
    (with_map,) = save_overlays_of_folder(*folders, NAMES, LABELS, tmp_path / "mapped", num_cases=1, file_ending=".nii.gz")
    # The files run from left to right and from back to front; the picture is that of the turned arrays.
    turned = [array[..., ::-1, ::-1] for array in (volume, reference, prediction)]
    save_overlay(tmp_path / "turned.png", turned[0], NAMES, turned[1], turned[2], LABELS, "a", (3.0, 1.5, 1.0))
    np.testing.assert_array_equal(np.asarray(Image.open(drawn[0])), np.asarray(Image.open(tmp_path / "turned.png")))
    given = (turned[0], NAMES, turned[1], turned[2], LABELS, "a", (3.0, 1.5, 1.0))
    save_overlay(tmp_path / "turned.png", *given, uncertainty=uncertain[..., ::-1, ::-1])
    np.testing.assert_array_equal(np.asarray(Image.open(with_map)), np.asarray(Image.open(tmp_path / "turned.png")))

    write(tmp_path / "labels" / "a.nii.gz", reference[:, 1:].astype(np.uint8))
    with pytest.raises(UserError, match=r"labels/a\.nii\.gz.*images/a_0000"):
        save_overlays_of_folder(*folders, NAMES, LABELS, tmp_path / "out", 1, ".nii.gz")
    for file in (tmp_path / "images").glob("a_*.nii.gz"):
        file.unlink()
    with pytest.raises(UserError, match=r"a_0000\.nii\.gz: no such file"):
        save_overlays_of_folder(*folders, NAMES, LABELS, tmp_path / "out", 1, ".nii.gz")
    with pytest.raises(UserError, match="no prediction"):
        save_overlays_of_folder(*folders, NAMES, LABELS, tmp_path / "out", 1, ".nrrd")


@pytest.mark.parametrize("channel", [0, 2])
def test_a_series_without_a_file_is_drawn_as_one_that_is_absent(study, tmp_path, channel):
    volume, reference, prediction = study
    volume[channel] = 0
    for number, series in enumerate(volume):
        write(tmp_path / "images" / f"a_{number:04d}.nii.gz", series)
    write(tmp_path / "labels" / "a.nii.gz", reference.astype(np.uint8))
    write(tmp_path / "predicted" / "a.nii.gz", prediction.astype(np.uint8))
    folders = (tmp_path / "images", tmp_path / "labels", tmp_path / "predicted")
    (whole,) = save_overlays_of_folder(*folders, NAMES, LABELS, tmp_path / "whole", 1, ".nii.gz")
    (tmp_path / "images" / f"a_{channel:04d}.nii.gz").unlink()
    (lacking,) = save_overlays_of_folder(*folders, NAMES, LABELS, tmp_path / "lacking", 1, ".nii.gz")
    np.testing.assert_array_equal(np.asarray(Image.open(lacking)), np.asarray(Image.open(whole)))


def test_reconstruction_shows_hidden_and_absent(tmp_path):
    rng = np.random.default_rng(0)
    patch = rng.normal(size=(3, 4, 16, 16)).astype(np.float32)
    patch[2] = 0
    hidden = np.zeros(patch.shape, bool)
    hidden[0, :, :8] = True
    hidden[1:] = True
    present = np.array([True, True, False])
    save_reconstruction(tmp_path / "a.png", patch, hidden, patch * 0.5, NAMES, present, "epoch 3")
    width, height = Image.open(tmp_path / "a.png").size
    assert 800 <= width <= 1000 and 500 <= height <= 800 and (tmp_path / "a.png").stat().st_size < 300_000
    # One panel and a half of twelve are hidden, one row of three is absent.
    panel = 190 * 190 / (width * height)
    assert share_of(tmp_path / "a.png", HIDDEN_COLOUR) == pytest.approx(1.5 * panel, rel=0.05)
    assert share_of(tmp_path / "a.png", EMPTY) == pytest.approx(4 * panel, rel=0.05)


def test_restorations_have_a_row_per_series(tmp_path):
    view = np.random.default_rng(0).random((3, 6, 20, 20), dtype=np.float32)
    present = np.array([True, False, True])
    save_restoration(tmp_path / "a.png", view, 3 * view - 1, np.zeros_like(view), NAMES, present, "epoch 3")
    width, height = Image.open(tmp_path / "a.png").size
    panel = 190 * 190 / (width * height)
    # nothing was restored, in two rows; one row of three is absent
    assert share_of(tmp_path / "a.png", "#000000") == pytest.approx(2 * panel, rel=0.15)
    assert share_of(tmp_path / "a.png", EMPTY) == pytest.approx(4 * panel, rel=0.05)


def test_curves_are_drawn_for_any_history(tmp_path):
    nan = float("nan")
    panels = [
        Panel("loss", {"training": [1.0, 0.5, 0.2], "validation": [nan, 0.6, nan]}, "epoch", "MSE", log=True),
        Panel("nothing yet", {"training": []}, "epoch", "MSE", log=True),
        Panel("no line", {}, "epoch", "s"),
    ]
    for num_panels in (1, 2, 3):
        save_curves(tmp_path / "progress.png", panels[:num_panels])
        assert Image.open(tmp_path / "progress.png").size == (900, 600)
    assert [p.name for p in tmp_path.iterdir()] == ["progress.png"]


def test_drawing_leaves_matplotlib_as_it_was_and_runs_in_threads(tmp_path):
    before = dict(matplotlib.rcParams)
    panels = [Panel("loss", {"training": [1.0, 0.5, 0.2]}, "epoch", "MSE")]
    threads = [threading.Thread(target=save_curves, args=(tmp_path / f"{i}.png", panels)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(matplotlib.rcParams) == before
    assert len({(tmp_path / f"{i}.png").read_bytes() for i in range(3)}) == 1


def test_page_holds_its_images_and_refers_to_nothing_outside(tmp_path):
    save_curves(tmp_path / "loss.png", [Panel("loss", {"training": [1.0, 0.5]}, "epoch", "MSE")])
    page = Page("Demo", "One.\n\nTwo.")
    table = Table(pd.DataFrame({"structure": ["oedema", "core"], "mean": [0.81234, float("nan")], "n": [3, 0]}), "Dice")
    page.section("Loss", "Falls.", tables=[table], images=[(tmp_path / "loss.png", "The loss")], facts=[("epochs", 2)])
    page.save(tmp_path / "out" / "page.html")
    (tmp_path / "loss.png").unlink()
    html = (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["page.html"]
    sources = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html)
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,iVBOR")
    assert not re.search(r"https?:|//|url\(|@import|<script|<link", html.replace(sources[0], ""))
    assert html.count('class="lead"') == 2 and "<dt>epochs</dt><dd>2</dd>" in html
    assert '<td>oedema</td><td class="number">0.812</td><td class="number">3</td>' in html and '<td class="number">–</td>' in html


def test_page_escapes_everything_it_is_given(tmp_path):
    save_curves(tmp_path / "a.png", [Panel("loss", {}, "epoch", "MSE")])
    bad = '<script>alert("x")</script>'
    page = Page(bad, bad)
    page.section(bad, bad, [Table(pd.DataFrame({bad: [bad]}), bad)], [(tmp_path / "a.png", bad)], [(bad, bad)])
    page.save(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in html and 'alert("' not in html and html.count("&lt;script&gt;") == 12


def test_page_tells_of_images_it_cannot_embed(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.png"):
        Page("Demo").section("Loss", images=[(tmp_path / "nothing.png", "")])
    with pytest.raises(UserError, match=r"\.tiff"):
        Page("Demo").section("Loss", images=[(tmp_path / "a.tiff", "")])
