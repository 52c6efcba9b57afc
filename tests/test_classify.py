"""`nnunet_csm classify`: from raw files to probabilities, and maps that lie on the raw files' grid where the patch was cut."""

import hashlib
import json
import re
import shutil
import threading
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from factories import DATASET_JSON, SERIES, TOKEN_SIZE, checkpoint_of, csm_plans
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from PIL import Image
from torch import nn

from nnunet_csm import checkpoint
from nnunet_csm.data.lesions import cut_around
from nnunet_csm.errors import UserError
from nnunet_csm.figures.activation import save_activation
from nnunet_csm.inference.classification import ClassifyRequest, classify, made_ahead
from nnunet_csm.inference.ensemble import TRAINER
from nnunet_csm.inference.frame import Frame
from nnunet_csm.model.classifier import build_classifier
from nnunet_csm.model.tokens import grid_size, to_map, to_tokens
from nnunet_csm.plans import read_configuration
from nnunet_csm.raw.geometry import Grid

CLASSES = ("benign", "malignant")
# the axes of the file are neither those of the patient nor those of the plans
TRANSPOSE = {"transpose_forward": [1, 2, 0], "transpose_backward": [2, 0, 1]}
PATCH_SIZE = (8, 16, 12)
# of the plans, in mm: far enough from that of the file that half a voxel matters
COARSE = (1.8, 1.9, 2.0)
SHAPE = (48, 52, 50)
SPACING = (1.2, 0.9, 1.1)
ORIGIN = (-20.0, 35.0, 12.0)
DIRECTION = tuple(sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.4, (0, 0, 0)).GetMatrix())


def plans_of(spacing=(1.0, 1.3, 1.2), **classification):
    plans = csm_plans(classification={"patch_size": list(PATCH_SIZE), **classification}) | TRANSPOSE
    plans["configurations"]["3d_fullres"]["spacing"] = list(spacing)
    plans["foreground_intensity_properties_per_channel"] = {str(channel): {} for channel in range(len(SERIES))}
    return plans


def save(path: Path, voxels: np.ndarray) -> sitk.Image:
    image = sitk.GetImageFromArray(voxels)
    Grid(voxels.shape[::-1], SPACING, ORIGIN, DIRECTION).put_on(image)
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))
    return image


def box(shape, low, high):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 1
    return mask


# --- maps on the grid of the files -------------------------------------------------------------------------------------------


def erode(inside: np.ndarray, radius: int) -> np.ndarray:
    image = sitk.GetImageFromArray(inside.astype(np.uint8))
    return sitk.GetArrayFromImage(sitk.BinaryErode(image, (radius,) * 3, sitk.sitkBox, 0.0, 1.0)).astype(bool)


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("mask_edge, is_shrunk", [(8, False), (20, True)])
def test_a_map_returns_to_where_its_tokens_were_cut(tmp_path, reader, mask_edge, is_shrunk):
    """Where an image is linear, a token's mean is the image at its centre, and interpolation between centres is exact."""
    z, y, x = np.indices(SHAPE)
    head = box(SHAPE, (3, 5, 2), (44, 49, 47)).astype(bool)
    ramp = np.where(head, 100 + 2.0 * z - 1.0 * y + 0.5 * x, 0).astype(np.float32)
    image = save(tmp_path / "ramp.nii.gz", ramp)
    save(tmp_path / "mask.nii.gz", box(SHAPE, (15, 18, 16), (15 + mask_edge, 18 + mask_edge, 16 + mask_edge)))
    plans = plans_of(COARSE) | {"image_reader_writer": reader.__name__}
    plans["configurations"]["3d_fullres"] |= {"normalization_schemes": ["NoNormalization"], "use_mask_for_norm": [False]}
    manager = PlansManager(plans)
    volume, segmentation, properties = DefaultPreprocessor(verbose=False).run_case(
        [str(tmp_path / "ramp.nii.gz")],
        str(tmp_path / "mask.nii.gz"),
        manager,
        manager.get_configuration("3d_fullres"),
        DATASET_JSON,
    )
    patch, placement = cut_around(volume, segmentation[0] > 0, PATCH_SIZE, 0.0)
    assert (placement.factor > 1) == is_shrunk
    means = to_map(to_tokens(patch[None], TOKEN_SIZE).mean(-1).transpose(1, 2), grid_size(PATCH_SIZE, TOKEN_SIZE))[0, 0].numpy()
    frame = Frame.of(placement, volume.shape[1:], properties, manager)
    grid = Grid.of(image)
    back = frame.on_grid(means, TOKEN_SIZE, grid)
    assert Grid.of(back).same_as(grid)
    covered = sitk.GetArrayFromImage(frame.on_grid(np.ones_like(means), TOKEN_SIZE, grid)) > 0.5
    of_patch = np.prod(PATCH_SIZE) * placement.factor**3 * np.prod(COARSE)
    assert covered.sum() * np.prod(SPACING) == pytest.approx(of_patch, rel=0.1)
    # up to half a token from the rim of the patch a token has no neighbour
    inner = erode(covered, int(np.ceil(max(frame.step) * max(TOKEN_SIZE) / 2)))
    assert inner.sum() > 100
    assert np.abs(sitk.GetArrayFromImage(back) - ramp)[inner].max() < 0.4
    assert not sitk.GetArrayFromImage(back)[~covered].any()


@pytest.mark.parametrize("absent", [False, True])
def test_the_picture_shows_every_series(tmp_path, absent):
    rng = np.random.default_rng(0)
    volume, maps = rng.random((2, 6, 20, 24)), np.zeros((2, 6, 20, 24))
    maps[0, 2, 5:9, 6:12], maps[1, 2, 5:9, 6:12] = 1.0, -0.5
    if absent:
        volume[1] = maps[1] = 0
    mask = box((6, 20, 24), (1, 4, 5), (4, 10, 13)).astype(bool)
    save_activation(tmp_path / "one.png", volume, maps, mask, ("T1w", "T2w"), (0.7, 0.3), "case: malignant")
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).astype(int)
    # of all hues only orange has more red than blue, and blue the reverse
    redder = pixels[..., 0] - pixels[..., 2]
    legend = pixels.shape[0] - 40
    assert (redder[:legend] > 100).sum() > 500
    assert ((redder[:legend] < -20).sum() > 500) != absent


# --- from files to probabilities ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model whose folds have random weights, three cases, and where to write."""

    folder: Path
    images: Path
    masks: Path
    output: Path

    def request(self, **changes):
        values: dict[str, Any] = {
            "dataset": "1",
            "trainer": TRAINER,
            "plans": "nnUNetCSMPlans",
            "configuration": "3d_fullres",
            "folds": ("0", "1"),
            "checkpoint_name": "checkpoint_final.pth",
            "images": self.images,
            "masks": self.masks,
            "output": self.output,
            "device": "cpu",
        }
        return ClassifyRequest(**(values | changes))

    def classify(self, **changes):
        classify(self.request(overwrite=True, **changes))
        table = pd.read_csv(self.output, dtype={"mask_label": "Int64"}, keep_default_na=True)
        return table, json.loads(self.output.with_suffix(".json").read_text())

    def save_fold(self, fold, plans=None, measures=None, **changes):
        """Save a fold with random weights; `measures` are of the masks it would have been trained on."""
        torch.manual_seed(fold)
        plans = plans or plans_of()
        settings = read_configuration(plans, "3d_fullres", "plans")
        network = build_classifier(settings, len(SERIES), len(CLASSES), 0 if measures is None else measures.shape[1])
        nn.init.normal_(network.head.weight)
        if network.measures is not None:
            network.measures.fit(measures)
        saved = checkpoint_of(plans, network.state_dict())
        saved |= {"trainer_name": TRAINER, "classes": list(CLASSES), "by_mask_label": False, **changes}
        path = self.folder / f"fold_{fold}" / "checkpoint_final.pth"
        path.parent.mkdir(exist_ok=True)
        checkpoint.save({key: value for key, value in saved.items() if value is not None}, path)


@pytest.fixture
def model(nnunet_folders, tmp_path):
    (nnunet_folders.raw / "Dataset001_Tiny").mkdir()
    folder = nnunet_folders.results / "Dataset001_Tiny" / f"{TRAINER}__nnUNetCSMPlans__3d_fullres"
    folder.mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans_of()))
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    made = Model(folder, tmp_path / "images", tmp_path / "masks", tmp_path / "out" / "predictions.csv")
    for fold in (0, 1):
        made.save_fold(fold)
    rng = np.random.default_rng(0)
    for case in ("a", "b", "c"):
        for channel in range(len(SERIES)):
            save(made.images / f"{case}_{channel:04d}.nii.gz", rng.normal(100, 20, (20, 24, 22)).astype(np.float32))
        mask = box((20, 24, 22), (6, 8, 7), (12, 14, 15))
        mask[6:9] *= 2
        save(made.masks / f"{case}.nii.gz", mask)
    (made.images / "b_0001.nii.gz").unlink()
    return made


def test_folds_that_are_not_named_are_those_that_are_trained(model, capsys):
    (model.folder / "fold_0").rename(model.folder / "fold_4")
    (model.folder / "fold_2").mkdir()
    named = model.classify(folds=("1", "4"))[0]
    pd.testing.assert_frame_equal(model.classify(folds=())[0], named)
    assert "Folds 1, 4: those that are trained" in capsys.readouterr().out
    shutil.rmtree(model.folder / "fold_1")
    (model.folder / "fold_4").rename(model.folder / "fold_all")
    model.classify(folds=())
    assert "Folds all: " in capsys.readouterr().out
    shutil.rmtree(model.folder / "fold_all")
    with pytest.raises(UserError, match=r"fold_0/checkpoint_final\.pth: no such checkpoint"):
        model.classify(folds=())


def test_folds_are_averaged_and_the_record_tells_what_did_it(model):
    table, record = model.classify()
    assert table.columns.tolist() == ["case", "mask_label", "p_benign", "p_malignant", "predicted"]
    assert table["case"].tolist() == ["a", "b", "c"] and table["mask_label"].isna().all()
    assert np.allclose(table[["p_benign", "p_malignant"]].sum(axis=1), 1, atol=2e-6)
    alone = [model.classify(folds=(fold,))[0]["p_malignant"] for fold in ("0", "1")]
    assert not np.allclose(alone[0], alone[1], atol=1e-3)
    assert np.allclose(np.mean(alone, axis=0), table["p_malignant"], atol=2e-6)
    assert (table["predicted"] == np.where(table["p_malignant"] > 0.5, *CLASSES[::-1])).all()
    for one, row in zip(record["samples"], table.itertuples(), strict=True):
        assert np.mean(list(one["probabilities_by_fold"].values()), axis=0)[1] == pytest.approx(row.p_malignant, abs=1e-6)
    assert [one["series_present"] for one in record["samples"]] == [list(SERIES), [SERIES[0], SERIES[2]], list(SERIES)]
    assert [one["fold"] for one in record["checkpoints"]] == ["0", "1"]
    path = model.folder / "fold_1" / "checkpoint_final.pth"
    assert record["checkpoints"][1]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def validated(model, fold, certain, num_samples=40):
    """Leave what the training of a fold predicts of patients it was not trained on: three of four right, however certain."""
    folder = model.folder / f"fold_{fold}" / "validation"
    folder.mkdir()
    label = np.arange(num_samples) % 2
    given = np.where(np.isin(np.arange(num_samples) % 8, (3, 6)), 1 - label, label)
    malignant = np.where(given == 1, certain, 1 - certain)
    names = [f"{fold}_{sample}" for sample in range(num_samples)]
    rows = {"case": names, "mask_label": "", "patient": names, "class": np.array(CLASSES)[label]}
    pd.DataFrame(rows | {"p_benign": 1 - malignant, "p_malignant": malignant}).to_csv(folder / "predictions.csv", index=False)


def test_calibrated_probabilities_are_those_of_the_folds_at_the_temperature_of_their_validation(model):
    before, raw = model.classify()
    assert raw["temperature"] is None
    for fold in (0, 1):
        validated(model, fold, certain=0.99)
    model.classify()
    after, record = model.classify(calibrated=True)
    # 0.99 is right in three of four: log odds of 99 become those of 3
    temperature = record["temperature"]["value"]
    assert temperature == pytest.approx(np.log(99) / np.log(3), rel=1e-3) and record["temperature"]["num_samples"] == 80
    judged = record["temperature"]["cross_validated"]
    assert judged["before"]["calibration_error"] == pytest.approx(0.24) and judged["after"]["calibration_error"] < 1e-3
    for one, same, row in zip(record["samples"], raw["samples"], after.itertuples(), strict=True):
        assert one["probabilities_by_fold"] == same["probabilities_by_fold"]
        odds = [np.log(p[1] / p[0]) / temperature for p in one["probabilities_by_fold"].values()]
        assert row.p_malignant == pytest.approx(np.mean([1 / (1 + np.exp(-odd)) for odd in odds]), abs=2e-6)
    assert not np.allclose(before["p_malignant"], after["p_malignant"], atol=1e-3)
    (model.folder / "fold_0" / "checkpoint_final.pth").rename(model.folder / "fold_0" / "checkpoint_best.pth")
    with pytest.raises(UserError, match=r"-chk names checkpoint_best\.pth"):
        model.classify(calibrated=True, checkpoint_name="checkpoint_best.pth", folds=("0",))


def test_a_model_that_was_not_validated_is_not_calibrated(model):
    validated(model, 0, certain=0.9)
    with pytest.raises(UserError, match=r"fold_1/validation/predictions\.csv: no such file.*--calibrated"):
        model.classify(calibrated=True)
    assert not model.output.exists()
    model.classify(calibrated=True, folds=("0",))


def test_a_mask_stored_with_other_axes_is_turned(model, capsys):
    expected, _ = model.classify()
    path = model.masks / "a.nii.gz"
    sitk.WriteImage(sitk.DICOMOrient(sitk.ReadImage(str(path)), "RAS"), str(path))
    table, record = model.classify()
    assert table.equals(expected) and not record["left_out"]
    assert "a.nii.gz: turned from RAS to" in "".join(capsys.readouterr())


def test_a_missing_file_is_an_absent_series(model):
    before, _ = model.classify()
    save(model.images / "b_0001.nii.gz", np.zeros((20, 24, 22), np.float32))
    after, _ = model.classify()
    pd.testing.assert_frame_equal(before, after)


def test_mirroring_takes_away_what_side_a_thing_is_on(model):
    """A mirrored file gives the same probabilities, as the plans ask for mirroring, up to where the patch is cut."""
    (model.images / "b_0000.nii.gz").unlink()
    (model.images / "b_0002.nii.gz").unlink()
    before, _ = model.classify()
    for folder in (model.images, model.masks):
        for path in folder.iterdir():
            save(path, sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[::-1].copy())
    after, _ = model.classify()
    assert np.allclose(before["p_malignant"], after["p_malignant"], atol=5e-3)


def test_lesions_are_told_apart_when_training_did(model):
    for fold in (0, 1):
        model.save_fold(fold, by_mask_label=True)
    table, _ = model.classify(maps=True)
    assert table[["case", "mask_label"]].values.tolist() == [[case, label] for case in "abc" for label in (1, 2)]
    assert (model.output.parent / "predictions_maps" / "a_2.png").is_file()


def test_only_labels_that_training_had_are_lesions(model):
    """The masks of the phantom's cases hold labels 1 and 2; training may have classified around one of them."""
    model.save_fold(0, by_mask_label=True, mask_labels=[2])
    model.save_fold(1, by_mask_label=True, mask_labels=[2, 5])
    table, record = model.classify()
    assert table["mask_label"].tolist() == [2, 2, 2] and record["mask_labels"] == [2, 5]
    assert list(record["left_out"]) == ["a_1", "b_1", "c_1"]
    assert "no sample of label 1, only of 2, 5" in record["left_out"]["a_1"]


def test_a_mask_of_a_size_that_training_never_saw_is_left_out_where_the_head_looks_at_it(model):
    """Masks of 30 training samples had both labels; that those of 2 had tells nothing."""
    plans = plans_of(mask_features=True)
    (model.folder / "plans.json").write_text(json.dumps(plans))
    sizes = torch.tensor([[8.0, 8, 8, 400, 250, 250], [6, 6, 6, 120, 60, 60]]).log1p()
    seen = torch.cat([sizes, torch.ones(2, 2)], dim=1)
    for fold in (0, 1):
        model.save_fold(fold, plans, seen.repeat(15, 1))
    whole, _ = model.classify()
    assert whole["case"].tolist() == ["a", "b", "c"]
    path = model.masks / "b.nii.gz"
    save(path, 2 * (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) > 0))
    table, record = model.classify()
    assert table["case"].tolist() == ["a", "c"]
    assert "b.nii.gz: presence of label 1 in the mask is 0 (1: there), 1.00 on average" in record["left_out"]["b"]
    tiny = np.zeros_like(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))
    tiny[8, 8, 8:10] = 1, 2
    save(path, tiny)
    assert re.search(r"b.nii.gz: the mask's volume is \d+ voxels at the spacing", model.classify()[1]["left_out"]["b"])
    for fold in (0, 1):
        model.save_fold(fold, plans, seen)
    save(path, 2 * (sitk.GetArrayFromImage(sitk.ReadImage(str(model.masks / "a.nii.gz"))) > 0))
    assert model.classify()[0]["case"].tolist() == ["a", "b", "c"]


@pytest.mark.parametrize("changes", [{"scale": 1.5}, {"pooling": "mask"}, {"mask_features": True}])
def test_folds_trained_with_other_settings_of_the_mask_are_refused(model, changes):
    (model.folder / "plans.json").write_text(json.dumps(plans_of(**changes)))
    with pytest.raises(UserError, match=f"classification.{next(iter(changes))} is "):
        model.classify()


def test_a_fold_counts_once(model):
    once, _ = model.classify(folds=("0",))
    twice, record = model.classify(folds=("0", "0"))
    pd.testing.assert_frame_equal(once, twice)
    assert len(record["checkpoints"]) == 1


def test_maps_lie_on_the_grid_of_the_images(model):
    _, record = model.classify(maps=True)
    folder = model.output.parent / "predictions_maps"
    present = {"a": SERIES, "b": (SERIES[0], SERIES[2]), "c": SERIES}
    expected = {f"{case}_{name}.nii.gz" for case, names in present.items() for name in names} | {f"{case}.png" for case in "abc"}
    assert {path.name for path in folder.iterdir()} == expected
    reference = sitk.ReadImage(str(model.images / "a_0000.nii.gz"))
    for path in folder.glob("*.nii.gz"):
        image = sitk.ReadImage(str(path))
        assert Grid.of(image).same_as(Grid.of(reference))
        voxels = sitk.GetArrayFromImage(image)
        assert voxels[8:10, 10:12, 10:12].all() and not voxels[0].any()
    for one in record["samples"]:
        assert sum(one["series_shares"].values()) == pytest.approx(1, abs=1e-5)
    assert record["samples"][1]["series_shares"][SERIES[1]] == 0


# --- ahead -------------------------------------------------------------------------------------------------------------------


def test_what_is_made_ahead_comes_in_order_and_no_further_than_asked():
    begun: list[int] = []
    slow = threading.Event()

    def make(number):
        begun.append(number)
        if number == 0:
            assert slow.wait(10)
        if number == 1:
            slow.set()
        return number**2

    with closing(made_ahead(make, range(9), 2)) as squares:
        # the first one ends after the second has begun
        assert next(squares) == 0 and next(squares) == 1
        assert set(begun) <= {0, 1, 2, 3}
    assert len(begun) <= 4
    assert list(made_ahead(str, [], 2)) == []


def test_what_fails_ahead_fails_at_its_turn():
    def make(number):
        if number == 2:
            raise UserError("case 2: no")
        return number

    numbers = made_ahead(make, range(5), 2)
    assert [next(numbers), next(numbers)] == [0, 1]
    with pytest.raises(UserError, match="case 2: no"):
        next(numbers)


# --- what can be wrong -------------------------------------------------------------------------------------------------------


def spoil_nothing(model):
    (model.masks / "b.nii.gz").unlink()
    return "b.nii.gz: no such mask"


def spoil_empty(model):
    save(model.masks / "b.nii.gz", np.zeros((20, 24, 22), np.uint8))
    return "the mask is empty"


def spoil_grid(model):
    save(model.masks / "b.nii.gz", box((20, 24, 21), (6, 8, 7), (12, 14, 15)))
    return "is on another grid"


def spoil_values(model):
    """A map of probabilities."""
    save(model.masks / "b.nii.gz", 1.5 * box((20, 24, 22), (6, 8, 7), (12, 14, 15)).astype(np.float32))
    return "the mask has the value 1.5, expected whole numbers"


def spoil_large(model):
    save(model.masks / "b.nii.gz", 2**16 * box((20, 24, 22), (6, 8, 7), (12, 14, 15)).astype(np.int32))
    return "the mask has the value 65536, expected whole numbers up to 32767"


def spoil_truncated(model):
    path = model.masks / "b.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    return "b.nii.gz cannot be read"


@pytest.mark.parametrize("spoil", [spoil_nothing, spoil_empty, spoil_grid, spoil_values, spoil_large, spoil_truncated])
def test_a_case_without_a_usable_mask_is_left_out_and_named(model, spoil):
    reason = spoil(model)
    lines = classify(model.request())
    assert reason in next(line for line in lines if line.startswith("b is left out"))
    assert pd.read_csv(model.output)["case"].tolist() == ["a", "c"]
    assert reason in json.loads(model.output.with_suffix(".json").read_text())["left_out"]["b"]
    with pytest.raises(UserError, match=r"b: .*leave out --strict"):
        classify(model.request(strict=True, maps=True, output=model.output.with_name("strict.csv")))
    assert not list(model.output.parent.glob("*strict*"))


def test_a_mask_where_no_planned_series_is_leaves_the_case_out(model):
    image = np.zeros((20, 24, 22), np.float32)
    image[:4] = 100 + np.random.default_rng(0).normal(size=(4, 24, 22))
    for channel in range(3):
        save(model.images / f"c_{channel:04d}.nii.gz", image + channel * (image > 0))
    assert "nothing of the mask is left" in next(line for line in classify(model.request()) if line.startswith("c is"))


def test_a_mask_of_no_image_is_told(model):
    """Such as that of a case whose images have another ending."""
    for path in model.images.glob("c_*"):
        path.rename(path.with_name(path.name.replace(".nii.gz", ".nrrd")))
    lines = classify(model.request())
    assert next(line for line in lines if "masks of no image" in line).endswith("such as c.nii.gz")


def test_weights_that_are_or_give_no_numbers_are_refused(model):
    torch.manual_seed(0)
    network = build_classifier(read_configuration(plans_of(), "3d_fullres", "plans"), len(SERIES), len(CLASSES))
    weights = network.state_dict()
    for name, value, message in (
        ("head.bias", torch.nan, r"fold_1/checkpoint_final\.pth: network_weights: head\.bias holds NaN"),
        ("head.weight", 3e38, "a: the classifier of fold 1 gives NaN"),
    ):
        model.save_fold(1, network_weights={**weights, name: torch.full_like(weights[name], value)})
        with pytest.raises(UserError, match=message):
            classify(model.request())
    assert not model.output.exists()


def test_a_segmenter_gives_no_probabilities(model):
    model.save_fold(1, trainer_name="nnUNetTrainerCSM", classes=None)
    with pytest.raises(UserError, match=r"nnUNetTrainerCSM, which predicts no class and no number.*nnunet_csm predict"):
        classify(model.request())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"folds": ("0", "3")}, r"fold_3/checkpoint_final\.pth: no such checkpoint; train with"),
        ({"plans": "Others"}, r"dataset\.json: no such file; train with"),
        ({"output": Path("predictions.txt")}, "ends in .csv"),
        ({"output": Path(__file__) / "predictions.csv"}, r"cannot be written because of .*test_classify\.py"),
        ({"device": "mps"}, "-device cpu"),
        ({"masks": Path("nowhere")}, "folder of masks nowhere does not exist"),
    ],
)
def test_what_is_asked_for_must_be_there(model, changes, message):
    with pytest.raises(UserError, match=message):
        classify(model.request(**changes))


def test_folds_must_know_the_same_classes(model):
    model.save_fold(1, classes=["benign", "borderline"])
    with pytest.raises(UserError, match=r"benign, malignant.*benign, borderline; train them alike"):
        classify(model.request())
    model.save_fold(1, by_mask_label=True)
    with pytest.raises(UserError, match=r"benign, malignant; .*benign, malignant by mask label; train them alike"):
        classify(model.request())


@pytest.mark.parametrize(
    "plans, message",
    [
        (plans_of(pooling="mean"), r"classification\.pooling is attentive, plans\.json of the model says mean"),
        (plans_of(margin=0.5), r"classification\.margin is 0\.25, plans\.json of the model says 0\.5"),
        (plans_of((1.0, 1.0, 1.0)), r"spacing is \[1\.0, 1\.3, 1\.2\], plans\.json of the model says \[1\.0, 1\.0, 1\.0\]"),
    ],
)
def test_plans_that_changed_are_refused(model, plans, message):
    (model.folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(UserError, match=message):
        classify(model.request())


def test_what_is_there_is_kept(model):
    classify(model.request(maps=True))
    files = {path: path.read_bytes() for path in model.output.parent.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="exists and is kept"):
        classify(model.request())
    model.output.unlink()
    model.output.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="exists and is kept"):
        classify(model.request(maps=True))
    assert all(path.read_bytes() == content for path, content in files.items() if path.suffix == ".png")
    assert not model.output.exists()


def test_maps_of_other_predictions_do_not_stay_beside_new_ones(model):
    classify(model.request(maps=True))
    with pytest.raises(UserError, match="has maps of other predictions"):
        classify(model.request(overwrite=True))
    classify(model.request(maps=True, overwrite=True))
