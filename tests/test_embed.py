"""`nnunet_csm embed`: from raw files to features, which are those of the encoder by hand."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from factories import DATASET_JSON, PATCH_SIZE, SERIES, TINY, TOKEN_SIZE, checkpoint_of, csm_plans, pretraining_request

import nnunet_csm
from nnunet_csm import checkpoint
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.embeddings import read_embeddings
from nnunet_csm.inference.embedding import EmbedRequest, embed
from nnunet_csm.model.encoder import ENCODERS, Features, build_encoder
from nnunet_csm.model.frozen import FrozenEncoder
from nnunet_csm.model.tokens import grid_size, to_tokens
from nnunet_csm.plans import Architecture, EncoderSettings, read_configuration
from nnunet_csm.raw.geometry import Grid

PRETRAINER = "nnUNetTrainerCSMPretrain"
# larger than a patch, and no whole number of tokens
SHAPE = (7, 17, 13)
# neither axes nor corner are those of the patient
ORIGIN = (-20.0, 35.0, 12.0)
DIRECTION = tuple(sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.4, (0, 0, 0)).GetMatrix())


def save(path: Path, voxels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(voxels)
    Grid(voxels.shape[::-1], (1.0, 1.0, 1.0), ORIGIN, DIRECTION).put_on(image)
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))


@dataclass(frozen=True)
class Model:
    """An encoder with random weights, two cases of which one lacks a series, and where to write."""

    folder: Path
    images: Path
    output: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "fold_0" / "checkpoint_final.pth"

    def request(self, **changes: Any) -> EmbedRequest:
        return pretraining_request(EmbedRequest, self.images, self.output, **changes)

    def embed(self, **changes: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Case to vector, and the record."""
        request = self.request(**changes)
        embed(request)
        table = read_embeddings(request.output)
        return dict(zip(table.index, table.to_numpy(), strict=True)), json.loads(request.record.read_text())

    def image(self, case: str, channel: int) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(self.images / f"{case}_{channel:04d}.nii.gz")))


def plans_of() -> dict[str, Any]:
    plans = csm_plans(classification={"patch_size": [8, 8, 8]}, pretraining_patch_size=list(PATCH_SIZE))
    plans["foreground_intensity_properties_per_channel"] = {str(channel): {} for channel in range(len(SERIES))}
    return plans


@pytest.fixture
def model(nnunet_folders, tmp_path):
    for folder in (nnunet_folders.raw, nnunet_folders.preprocessed):
        (folder / "Dataset001_Tiny").mkdir()
    plans = plans_of()
    (nnunet_folders.preprocessed / "Dataset001_Tiny" / "nnUNetCSMPlans.json").write_text(json.dumps(plans))
    (nnunet_folders.preprocessed / "Dataset001_Tiny" / "dataset.json").write_text(json.dumps(DATASET_JSON))
    made = Model(
        nnunet_folders.results / "Dataset001_Tiny" / f"{PRETRAINER}__nnUNetCSMPlans__3d_fullres",
        tmp_path / "images",
        tmp_path / "out" / "features.csv",
    )
    made.checkpoint.parent.mkdir(parents=True)
    torch.manual_seed(1)
    encoder = build_encoder(read_configuration(plans, "3d_fullres", "plans").architecture)
    weights = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    saved = checkpoint_of(plans, weights) | {"series": SERIES, "training_cases": ["Dataset001_Tiny/one"]}
    checkpoint.save(saved, made.checkpoint)
    rng = np.random.default_rng(0)
    for case, shape in (("one", PATCH_SIZE), ("two", SHAPE)):
        for channel in range(len(SERIES)):
            save(made.images / f"{case}_{channel:04d}.nii.gz", rng.normal(100, 20, shape).astype(np.float32))
    (made.images / "two_0001.nii.gz").unlink()
    return made


def z_scored(voxels: np.ndarray) -> np.ndarray:
    return ((voxels - voxels.mean()) / voxels.std()).astype(np.float32)


# --- features ----------------------------------------------------------------------------------------------------------------


def test_features_of_one_tile_are_those_of_the_encoder_by_hand(model):
    vectors, record = model.embed()
    volume = torch.tensor(np.stack([z_scored(model.image("one", channel)) for channel in range(len(SERIES))]))
    encoder = nnunet_csm.load_encoder(model.checkpoint)
    assert encoder.patch_size == PATCH_SIZE
    with torch.no_grad():
        (found,) = encoder.encoder.levels(volume[None], torch.ones(1, len(SERIES), dtype=torch.bool))
    assert vectors["one"] == pytest.approx(found.tokens[0].mean((0, 1)).numpy(), rel=1e-4, abs=1e-5)
    # and those of the encoder from Python, of an image of several tiles that lacks a series
    images = {SERIES[channel]: z_scored(model.image("two", channel)) for channel in (0, 2)}
    assert vectors["two"] == pytest.approx(encoder.features(images, normalize=False).vector.numpy(), rel=1e-4, abs=1e-5)
    assert vectors["two"] == pytest.approx(encoder.features(images).vector.numpy(), rel=0.02, abs=0.02)
    assert record["cases"]["two"]["series"] == [SERIES[0], SERIES[2]]


class TokenMeans(torch.nn.Module):
    """Stands in for an encoder: the feature of a token is the mean of its voxels, wherever the tile begins."""

    keeps_series_apart = True

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, ...]] = []

    def levels(self, volume: torch.Tensor, present: torch.Tensor, num_levels: int, shown: list[int]) -> list[Features]:
        self.seen.append(tuple(volume.shape[2:]))
        grid = grid_size(tuple(volume.shape[2:]), TOKEN_SIZE)  # type: ignore[arg-type]
        tokens = to_tokens(volume[:, shown], TOKEN_SIZE).mean(-1, keepdim=True)
        return [Features(tokens, present[:, shown], grid, tuple(shown))]


@pytest.mark.parametrize("shape", [PATCH_SIZE, SHAPE, (3, 5, 2), (11, 4, 40)])
@pytest.mark.parametrize("step_size", [0.1, 0.5, 1.0])
def test_overlapping_tiles_agree_where_the_encoder_looks_at_single_tokens(shape, step_size):
    encoder = FrozenEncoder(read_configuration(plans_of(), "3d_fullres", "plans").architecture, PATCH_SIZE, (1, 1, 1))
    encoder.encoder = means = TokenMeans()  # type: ignore[assignment]
    image = np.random.default_rng(0).normal(size=shape)
    found = encoder.features({SERIES[1]: image}, normalize=False, step_size=step_size)
    padded = np.pad(image, [(0, -n % t) for n, t in zip(shape, TOKEN_SIZE, strict=True)])
    expected = to_tokens(torch.tensor(padded[None, None]).float(), TOKEN_SIZE).mean(-1).view(found.map.shape)
    torch.testing.assert_close(found.map, expected, rtol=1e-4, atol=1e-5)
    assert set(means.seen) == {PATCH_SIZE}
    share = to_tokens(torch.tensor((padded != 0)[None, None]).float(), TOKEN_SIZE).mean(-1).view(found.share.shape)
    assert torch.equal(found.share, share)
    assert found.vector.item() == pytest.approx(((expected * share).sum() / share.sum()).item(), abs=1e-5)
    inside = np.zeros(shape, bool)
    inside[:2, :4, :2] = True
    assert encoder.features({SERIES[1]: image}, False, inside).vector.item() == pytest.approx(image[:2, :4, :2].mean(), abs=1e-5)


def test_tiles_weigh_less_towards_their_edges():
    """An encoder that numbers its tiles shows how they are mixed: along x, tiles of 5 tokens, the second begins at token 2."""
    encoder = FrozenEncoder(read_configuration(plans_of(), "3d_fullres", "plans").architecture, PATCH_SIZE, (1, 1, 1))
    encoder.encoder = means = TokenMeans()  # type: ignore[assignment]
    levels = means.levels

    def numbered(*given: Any) -> list[Features]:
        (found,) = levels(*given)
        return [Features(torch.full_like(found.tokens, len(means.seen)), found.present, found.grid, found.series)]

    means.levels = numbered  # type: ignore[assignment, method-assign]
    found = encoder.features({SERIES[0]: np.ones((4, 12, 14))}, normalize=False)
    weight = np.exp(-0.5 * ((np.arange(5) - 2) / (5 / 8)) ** 2)
    second = np.concatenate([np.zeros(2), weight])
    first = np.concatenate([weight, np.zeros(2)])
    assert found.map[0, 0, 0].numpy() == pytest.approx((first + 2 * second) / (first + second), rel=1e-4)


def test_what_shows_nothing_is_skipped_and_has_features_of_zero():
    encoder = FrozenEncoder(read_configuration(plans_of(), "3d_fullres", "plans").architecture, PATCH_SIZE, (1, 1, 1))
    encoder.encoder = means = TokenMeans()  # type: ignore[assignment]
    image = np.zeros((4, 12, 30))
    image[..., :10] = 1
    found = encoder.features({SERIES[0]: image}, normalize=False)
    assert len(means.seen) < 5 and not found.map[..., -5:].any() and found.vector.item() == pytest.approx(1)
    with pytest.raises(UserError, match="0 voxels"):
        encoder.features({SERIES[0]: image}, False, np.zeros(image.shape, bool))
    with pytest.raises(UserError, match="on their grid"):
        encoder.features({SERIES[0]: image}, False, np.ones((2, 2, 2), bool))


@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_every_kind_of_encoder_has_a_feature_for_each_token(kind):
    encoder_settings = EncoderSettings(kind=kind, base=6)
    architecture = Architecture(SERIES, (0, 1, 2), TOKEN_SIZE, 24, 2, 2, 4, 0.0, encoder=encoder_settings)
    encoder = FrozenEncoder(architecture, PATCH_SIZE, (1, 1, 1))
    found = encoder.features({SERIES[2]: np.random.default_rng(0).normal(size=SHAPE)})
    assert found.map.shape == (encoder.encoder.width, 4, 5, 7) and torch.isfinite(found.vector).all()
    assert len(found.series) == len(found.tokens) == 1


# --- files -------------------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_an_absent_series(model):
    before, _ = model.embed()
    save(model.images / "two_0001.nii.gz", np.zeros(SHAPE, np.float32))
    after, record = model.embed()
    assert np.array_equal(before["two"], after["two"]) and record["cases"]["two"]["series"] == [SERIES[0], SERIES[2]]


def test_formats_and_what_stands_beside_them(model):
    pytest.importorskip("pyarrow")
    csv, record = model.embed()
    others = [model.embed(output=model.output.with_suffix(suffix))[0] for suffix in (".npz", ".parquet")]
    assert all(np.array_equal(csv[case], other[case]) for other in others for case in csv)
    assert record["encoder"]["sha256"] == hashlib.sha256(model.checkpoint.read_bytes()).hexdigest()
    assert record["encoder"]["checkpoint"] == str(model.checkpoint) and not record["encoder"]["untrained"]
    assert record["plans"] == "nnUNetCSMPlans" and record["software"]["nnunet_csm"] == nnunet_csm.__version__
    assert {case: one["seen_in_training"] for case, one in record["cases"].items()} == {"one": True, "two": False}


def test_a_path_names_the_same_encoder_and_random_weights_need_none(model, nnunet_folders):
    by_name, _ = model.embed()
    by_path, _ = model.embed(encoder=model.checkpoint)
    assert np.array_equal(by_name["one"], by_path["one"])
    of_plans, record = model.embed(untrained=True)
    of_checkpoint, _ = model.embed(untrained=True, encoder=model.checkpoint)
    assert np.array_equal(of_plans["two"], of_checkpoint["two"]) and not np.allclose(of_plans["two"], by_name["two"])
    assert record["encoder"]["untrained"] and "plans_file" in record["encoder"]
    assert not any(one["seen_in_training"] for one in record["cases"].values())


def test_a_segmenter_and_a_classifier_have_tiles_of_their_own(model, tmp_path):
    saved = checkpoint.load(model.checkpoint)
    del saved["series"]
    checkpoint.save(saved | {"classes": ["a", "b"]}, tmp_path / "classifier.pth")
    assert nnunet_csm.load_encoder(tmp_path / "classifier.pth").patch_size == (8, 8, 8)
    saved["init_args"]["plans"]["configurations"]["3d_fullres"]["patch_size"] = [8, 16, 16]
    checkpoint.save(saved, tmp_path / "segmenter.pth")
    assert nnunet_csm.load_encoder(tmp_path / "segmenter.pth").patch_size == (8, 16, 16)


def test_channels_of_other_images_are_named(model, tmp_path):
    """Images whose only channels are two of the encoder's series, the other way round, and one that it does not know."""
    expected, _ = model.embed()
    others = Model(model.folder, tmp_path / "others", tmp_path / "others.csv")
    save(others.images / "two_0000.nii.gz", model.image("two", 2))
    save(others.images / "two_0001.nii.gz", np.ones(SHAPE, np.float32))
    save(others.images / "two_0002.nii.gz", model.image("two", 0))
    found, record = others.embed(series=(SERIES[2], "-", SERIES[0]))
    assert np.array_equal(found["two"], expected["two"]) and record["cases"]["two"]["series"] == [SERIES[0], SERIES[2]]
    for series in (("PET", "-", "-"), ("-", "-", "-"), (SERIES[0], SERIES[0], "-")):
        with pytest.raises(UserError, match="expected for each channel"):
            others.embed(series=series)
    with pytest.raises(UserError, match=r"two_0002\.nii\.gz is of channel 2"):
        others.embed(series=(SERIES[0], "-"))
    save(others.images / "two_0000.nii.gz", np.ones((3, 3, 3), np.float32))
    with pytest.raises(UserError, match="others/two_000"):
        others.embed(series=(SERIES[2], "-", SERIES[0]))


def test_maps_lie_where_their_tokens_were_cut_and_masks_weigh_them(model, tmp_path):
    masks = tmp_path / "masks"
    mask = np.zeros(PATCH_SIZE, np.uint8)
    mask[:2, :8, 4:6] = 1
    save(masks / "one.nii.gz", mask)
    vectors, record = model.embed(masks=masks, dense=True)
    assert list(vectors) == ["one"] and "no such mask" in record["left_out"]["two"]
    file = model.output.parent / "features_dense" / "one.nii.gz"
    image, source = sitk.ReadImage(str(file)), sitk.ReadImage(str(model.images / "one_0000.nii.gz"))
    found = sitk.GetArrayFromImage(image)
    assert found.shape == (*grid_size(PATCH_SIZE, TOKEN_SIZE), TINY["width"])
    assert vectors["one"] == pytest.approx(found[0, :2, 2].mean(0), rel=1e-4, abs=1e-5)
    for token in ((0, 0, 0), (4, 2, 1)):  # x, y, z
        middle = [t * edge + (edge - 1) / 2 for t, edge in zip(token, TOKEN_SIZE[::-1], strict=True)]
        place = source.TransformContinuousIndexToPhysicalPoint(middle)
        assert image.TransformIndexToPhysicalPoint(token) == pytest.approx(place, abs=1e-4)
    # NIfTI has vectors along the fifth axis
    assert nibabel.load(file).shape == (5, 3, 2, 1, TINY["width"])  # type: ignore[attr-defined]
    assert not (model.output.parent / "features_dense" / "two.nii.gz").exists()


def test_nothing_is_left_of_what_fails(model):
    (model.images / "two_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match="two_0000"):
        model.embed(dense=True)
    assert not model.output.parent.exists() or not list(model.output.parent.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": "1", "encoder": Path("a.pth")}, "one of both"),
        ({"dataset": ""}, "which encoder"),
        ({"step_size": 0.0}, "a step size of 0"),
        ({"encoder": Path("a.pth")}, "a.pth: no such checkpoint"),
        ({"folds": ("0", "1")}, "choose one fold with -f"),
        ({"folds": ("3",)}, r"fold_3/checkpoint_final\.pth: no such checkpoint"),
        ({"output": Path("a.txt")}, r"\.parquet, \.csv, \.npz"),
        ({"masks": Path("nowhere")}, "nowhere does not exist"),
        ({"plans": "Others", "untrained": True}, r"Others\.json: no such file"),
    ],
)
def test_what_cannot_be_embedded_is_told(model, changes, words):
    with pytest.raises(UserError, match=words):
        model.embed(**changes)


def test_what_is_there_is_kept(model):
    model.embed()
    with pytest.raises(UserError, match="exists and is kept"):
        model.embed(overwrite=False)
