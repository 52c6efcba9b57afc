"""`nnunet_csm impute`: a series made up from the others, which is that of the network by hand, is marked, and knows no truth."""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
import torch
from factories import GRID_SIZE, JOINT, PATCH_SIZE, SERIES, TOKEN_SIZE, checkpoint_of, csm_plans, pretraining_request

from nnunet_csm import checkpoint
from nnunet_csm.cli import main
from nnunet_csm.errors import UserError
from nnunet_csm.evaluation.imputation import score_image
from nnunet_csm.inference.imputation import COMPLETE, MARK, RECORD, ImputeRequest, impute
from nnunet_csm.inference.training_scans import TrainingScans, z_scored
from nnunet_csm.model.tokens import select, to_tokens, to_volume
from nnunet_csm.plans import read_configuration
from nnunet_csm.pretext.base import setup_of
from nnunet_csm.pretext.csm import CSM
from nnunet_csm.pretext.imputation import Imputer, imputer_in
from nnunet_csm.raw.geometry import Grid

PRETRAINER = "nnUNetTrainerCSMPretrain"
NAME = "Dataset001_Tiny"
# larger than a patch, and no whole number of tokens
SHAPE = (7, 17, 13)
# neither axes nor corner are those of the patient
GRID = (-20.0, 35.0, 12.0), tuple(sitk.Euler3DTransform((0, 0, 0), 0.3, -0.2, 0.4, (0, 0, 0)).GetMatrix())


def save(path: Path, voxels: np.ndarray) -> None:
    image = sitk.GetImageFromArray(voxels.astype(np.float32))
    Grid(voxels.shape[::-1], (1.0, 1.0, 1.0), *GRID).put_on(image)
    path.parent.mkdir(exist_ok=True)
    sitk.WriteImage(image, str(path))


def plans_of(**changes: Any) -> dict[str, Any]:
    plans = csm_plans(pretraining_patch_size=list(PATCH_SIZE), **changes)
    plans["foreground_intensity_properties_per_channel"] = {str(channel): {} for channel in range(len(SERIES))}
    return plans


def pretext_of(plans: dict[str, Any]) -> Any:
    torch.manual_seed(1)
    cls, setup = setup_of(read_configuration(plans, "3d_fullres", "plans"))
    return cls(setup).eval()


def saved_of(plans: dict[str, Any]) -> dict[str, Any]:
    saved = checkpoint_of(plans, pretext_of(plans).state_dict())
    return saved | {"series": SERIES, "training_cases": [f"{NAME}/seen", "Dataset002_Other/one"]}


@dataclass(frozen=True)
class Model:
    """A pretraining with random weights, two cases of which one lacks a series, a raw training case, and where to write."""

    checkpoint: Path
    images: Path
    output: Path
    raw: Path

    def impute(self, **changes: Any) -> list[str]:
        return impute(pretraining_request(ImputeRequest, self.images, self.output, **changes))

    def written(self, name: str) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(self.output / name)))


@pytest.fixture
def model(nnunet_folders, tmp_path):
    raw = nnunet_folders.raw / NAME
    raw.mkdir()
    folder = nnunet_folders.results / NAME / f"{PRETRAINER}__nnUNetCSMPlans__3d_fullres" / "fold_0"
    folder.mkdir(parents=True)
    made = Model(folder / "checkpoint_final.pth", tmp_path / "images", tmp_path / "out", raw)
    checkpoint.save(saved_of(plans_of()), made.checkpoint)
    rng = np.random.default_rng(0)
    for place, case, shape in ((made.images, "one", PATCH_SIZE), (made.images, "two", SHAPE), (raw / "imagesTr", "seen", SHAPE)):
        for channel in range(len(SERIES)):
            voxels = rng.normal(100 * (channel + 1), 20, shape)
            voxels[0, 0] = 0
            save(place / f"{case}_{channel:04d}.nii.gz", voxels)
    (made.images / "two_0001.nii.gz").unlink()
    return made


# --- the network ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [("FLAIR",), ("T2w", "FLAIR")])
def test_one_tile_is_what_the_network_makes_by_hand(wanted):
    pretext = pretext_of(plans_of())
    volume = torch.randn(len(SERIES), *PATCH_SIZE)
    given = [name for name in SERIES if name not in wanted]
    found = Imputer(pretext).impute(volume, given, wanted, 0, 0.5)
    tokens, num = to_tokens(volume[None], TOKEN_SIZE), int(np.prod(GRID_SIZE))
    numbers = {name: torch.arange(num) + num * SERIES.index(name) for name in SERIES}
    visible = torch.cat([numbers[name] for name in given])[None]
    with torch.no_grad():
        encoded = pretext.encoder(select(tokens, visible), coordinates_of(visible))[-1]
        for name, image in zip(wanted, found.image, strict=True):
            by_hand = pretext.decoder(encoded, visible, numbers[name][None], GRID_SIZE)
            # means by weights of one tile
            torch.testing.assert_close(image, to_volume(by_hand[:, None], GRID_SIZE, TOKEN_SIZE)[0, 0], rtol=1e-5, atol=1e-6)
    assert found.deviation is None


def coordinates_of(numbers: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.from_numpy(one) for one in np.unravel_index(numbers, (len(SERIES), *GRID_SIZE))], -1)


class Repeats(CSM):
    """Stands in for a network: every token of a series is what the one of T1w at its place is, as far as it is visible."""

    def predicted(self, tokens: Any, mask: Any, grid: Any) -> torch.Tensor:
        seen = torch.where(mask.hidden[..., None], 0.0, tokens)
        return torch.cat([seen[:, 1]] * (mask.asked.shape[1] // seen.shape[2]), 1)


@pytest.mark.parametrize("shape", [SHAPE, (3, 5, 4), PATCH_SIZE])
@pytest.mark.parametrize("step_size", [0.25, 1.0])
def test_tiles_meet_where_they_were_cut(shape, step_size):
    _, setup = setup_of(read_configuration(plans_of(), "3d_fullres", "plans"))
    volume = torch.randn(len(SERIES), *shape)
    found = Imputer(Repeats(setup)).impute(volume, ("T1w",), ("T2w", "FLAIR"), 0, step_size)
    torch.testing.assert_close(found.image, volume[1].expand(2, *shape), rtol=1e-5, atol=1e-6)


def test_draws_show_as_many_tokens_as_training_and_are_always_the_same():
    _, setup = setup_of(read_configuration(plans_of(), "3d_fullres", "plans"))
    imputer, volume = Imputer(Repeats(setup)), torch.ones(len(SERIES), *PATCH_SIZE)
    first, again = (imputer.impute(volume, ("FLAIR", "T1w"), ("T2w",), 400, 1.0) for _ in range(2))
    assert first.deviation is not None and again.deviation is not None
    assert torch.equal(first.image, again.image) and torch.equal(first.deviation, again.deviation)
    # Bernoulli's: one in eight is visible
    share = float(first.image.mean())
    assert share == pytest.approx(round(0.125 * 30) / 30, abs=1e-5)
    assert first.deviation.square().mean() == pytest.approx(share * (1 - share), rel=0.05)


# --- intensities ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_intensities_are_those_of_the_scan_that_was_measured(masked):
    volumes = np.random.default_rng(0).gamma(2, 50, (2, *SHAPE)).astype(np.float32)
    volumes[:, 0] = 0
    scans = TrainingScans.measured([volumes], ("FLAIR", "T1w"), [masked] * 2)
    scored, inside = z_scored(volumes, [masked] * 2)
    assert inside.sum() == volumes[0].size * 6 / 7 and scored[0][inside].mean() == pytest.approx(0, abs=1e-5)
    for number, name in enumerate(("FLAIR", "T1w")):
        np.testing.assert_allclose(scans.as_scanned(name, scored[number])[inside], volumes[number][inside], rtol=1e-3, atol=0.05)


def test_intensities_rise_with_z_scores_also_where_many_voxels_are_equal_and_end_with_what_was_seen():
    rng = np.random.default_rng(0)
    cases = [rng.gamma(2, scale, (1, *SHAPE)).round() + 1 for scale in (1, 3, 100)]
    scans = TrainingScans.measured(cases, ("FLAIR",), [False])
    mapped = scans.as_scanned("FLAIR", np.linspace(-9, 9, 1000))
    assert (np.diff(mapped) >= 0).all() and mapped[0] == scans.intensities["FLAIR"][0] < mapped[-1]
    assert mapped[-1] == scans.intensities["FLAIR"][-1]
    with pytest.raises(UserError, match=r"no training case in nnUNet_raw shows T1w.*--z_scores"):
        scans.check(["FLAIR", "T1w"])


# --- the command ---------------------------------------------------------------------------------------------------------------


def test_what_a_case_lacks_is_written_on_its_grid_and_marked(model):
    lines = model.impute()
    assert sorted(path.name for path in model.output.iterdir()) == [RECORD, "two_0001_imputed.nii.gz", "two_T1w_imputed.png"]
    image = sitk.ReadImage(str(model.output / "two_0001_imputed.nii.gz"))
    assert Grid.of(image).same_as(Grid.of(sitk.ReadImage(str(model.images / "two_0000.nii.gz"))))
    assert image.GetMetaData("descrip") == MARK and "Not for diagnosis" in MARK
    voxels, seen = (
        sitk.GetArrayFromImage(image),
        sitk.GetArrayFromImage(sitk.ReadImage(str(model.raw / "imagesTr/seen_0001.nii.gz"))),
    )
    # background stays, all else is within what a scan of the series had
    assert not voxels[0, 0].any() and seen[seen > 0].min() - 1e-3 <= voxels[1:].min() < voxels.max() <= seen.max() + 1e-3
    record = json.loads((model.output / RECORD).read_text())
    assert record["cases"]["two"] == {
        "given": ["FLAIR", "T2w"],
        "imputed": {"T1w": "two_0001_imputed.nii.gz"},
        "hidden_on_purpose": [],
        "seen_in_training": False,
    }
    assert record["cases"]["one"]["imputed"] == {} and len(record["decoder"]["sha256"]) == 64
    assert "Not for diagnosis" in record["warning"] and record["intensities"].endswith("1 training cases")
    assert "one: lacks nothing" in lines and "two: T1w from FLAIR, T2w" in lines and "Not for diagnosis" in lines[-1]


def test_z_scores_are_those_of_the_network_for_the_preprocessed_image(model):
    model.impute(series=("T1w",), z_scores=True)
    volumes = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(model.images / f"one_{c:04d}.nii.gz"))) for c in range(3)])
    volumes[1] = 0
    scored, inside = z_scored(volumes, [True] * 3)
    imputer = Imputer(pretext_of(plans_of()))
    by_hand = imputer.impute(torch.from_numpy(scored), ("FLAIR", "T2w"), ("T1w",), 0, 0.5).image[0].numpy() * inside
    np.testing.assert_allclose(model.written("one_0001_imputed_z_scores.nii.gz"), by_hand, rtol=1e-3, atol=1e-4)


def test_the_series_that_is_hidden_on_purpose_is_not_looked_at(model):
    found = []
    for factor in (1.0, -3.0):
        file = model.images / "one_0001.nii.gz"
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        # other voxels, and another foreground
        voxels[0, 0] += 1
        save(file, voxels[::-1] * factor + 1)
        model.impute(series=("T1w",), num_draws=3)
        found.append([model.written(f"one_{name}.nii.gz") for name in ("0001_imputed", "T1w_disagreement")])
    for first, second in zip(*found, strict=True):
        assert np.array_equal(first, second)
    assert (found[0][1] >= 0).all() and found[0][1].max() > 0
    image = sitk.ReadImage(str(model.output / "one_T1w_disagreement.nii.gz"))
    assert image.GetMetaData("descrip") == MARK
    record = json.loads((model.output / RECORD).read_text())
    assert record["cases"]["one"]["hidden_on_purpose"] == ["T1w"] and record["cases"]["two"]["hidden_on_purpose"] == []
    assert record["draws"] == 3


def test_scores_of_cases_that_have_the_series_beside_linear_maps(model):
    model.impute(series=("T1w",), score=True)
    table = pd.read_csv(model.output / "scores.csv")
    assert list(table["case"]) == ["one"] * 3 and list(table["image"]) == ["imputed", "mean", "linear map"]
    assert table[["psnr", "psnr_foreground", "ssim", "ssim_foreground"]].notna().all(axis=None)
    text = (model.output / "scores.md").read_text()
    assert "| one | T1w | FLAIR+T2w | linear map |" in text and "T1w: 1 cases" in text


def test_scores_know_the_better_image():
    rng = np.random.default_rng(0)
    true, inside = rng.normal(size=(12, 13, 14)).astype(np.float32), np.ones((12, 13, 14), bool)
    noisy = [true + rng.normal(size=true.shape).astype(np.float32) * noise for noise in (0.1, 1.0)]
    same, near, far = score_image(true, {"same": true, "near": noisy[0], "far": noisy[1]}, inside)
    assert np.isnan(same["psnr"]) and same["ssim"] == pytest.approx(1)
    assert near["psnr"] > far["psnr"] + 6 and near["ssim_foreground"] > far["ssim_foreground"]


def test_whole_cases_for_prediction_link_what_was_scanned(model):
    model.impute(for_prediction=True)
    folder = model.output / COMPLETE
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{case}_{c:04d}.nii.gz" for case in ("one", "two") for c in range(3)
    ]
    assert (folder / "two_0001.nii.gz").resolve() == model.output / "two_0001_imputed.nii.gz"
    assert (folder / "two_0000.nii.gz").resolve() == model.images / "two_0000.nii.gz"
    assert sitk.ReadImage(str(folder / "two_0001.nii.gz")).GetMetaData("descrip") == MARK


# --- what cannot be -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"series": ("DWI",)}, r"-series DWI: expected some of FLAIR, T1w, T2w"),
        ({"series": ("T1w", "T1w")}, "each once"),
        ({"series": SERIES}, "not all of them"),
        ({"score": True}, "name those to be hidden and made up with -series"),
        ({"num_draws": 1}, "1 draws; expected 2 or more"),
        ({"step_size": 0.0}, "-step_size"),
        ({"images": Path("nowhere")}, "the input folder nowhere does not exist"),
        ({"overwrite": False}, "exists and is kept; give --overwrite"),
    ],
)
def test_requests_that_cannot_be(model, changes, said):
    model.output.mkdir()
    (model.output / "mine").touch()
    with pytest.raises(UserError, match=said):
        model.impute(**changes)
    assert [path.name for path in model.output.iterdir()] == ["mine"]


def test_images_that_cannot_be(model):
    (model.images / "two_0002.nii.gz").unlink()
    with pytest.raises(UserError, match="case two has nothing but what -series names"):
        model.impute(series=("FLAIR",))
    for channel in range(3):
        (model.images / f"two_{channel:04d}.nii.gz").unlink(missing_ok=True)
    with pytest.raises(UserError, match="no case lacks a series of FLAIR, T1w, T2w; name one with -series"):
        model.impute()
    (model.images / "one_0001.nii.gz").unlink()
    with pytest.raises(UserError, match="no case has T1w; --score needs"):
        model.impute(series=("T1w",), score=True)
    save(model.images / "one_0001.nii.gz", np.ones(SHAPE))
    with pytest.raises(UserError, match=r"one_0001.nii.gz is on another grid"):
        model.impute(series=("T1w",))
    image = sitk.GetArrayFromImage(sitk.ReadImage(str(model.images / "one_0000.nii.gz")))
    save(model.images / "one_0001.nii.gz", image)
    with pytest.raises(UserError, match=r"one_0001.nii.gz holds the voxels of FLAIR, too.*leave the copy out"):
        model.impute(series=("T1w",))
    # one that nobody names is no scan of its own
    assert "one: T1w from FLAIR, T2w" in model.impute(z_scores=True)
    shutil.rmtree(model.output)
    for file in (model.raw / "imagesTr").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"holds no images of the training cases.*set nnUNet_raw.*--z_scores"):
        model.impute(series=("T1w",))
    assert not model.output.exists()


@pytest.mark.parametrize(
    "changes, said",
    [
        (JOINT, "pretrained by 'mae3d'"),
        ({"masking": {"hidden_series": "none"}}, "rebuilt no series that was hidden whole.*'none'"),
        ({"reconstruction": {"normalize_targets": True}}, "no mean or deviation of tokens"),
    ],
)
def test_pretrainings_that_rebuild_no_series(changes, said):
    plans = plans_of(**changes)
    settings = read_configuration(plans, "3d_fullres", "plans")
    with pytest.raises(UserError, match=f"a.pth: .*{said}"):
        imputer_in(saved_of(plans), settings, "a.pth")


def test_a_checkpoint_imports_no_class_that_it_names():
    plans = plans_of()
    saved = saved_of(plans)
    plans["configurations"]["3d_fullres"]["csm"]["pretext"]["name"] = "antigravity.Pretext"
    with pytest.raises(UserError, match=r"a.pth: was pretrained by 'antigravity.Pretext'"):
        imputer_in(saved, read_configuration(plans, "3d_fullres", "plans"), "a.pth")
    assert "antigravity" not in sys.modules


def test_a_checkpoint_without_a_decoder(model):
    saved = saved_of(plans_of())
    saved["network_weights"] = {name: one for name, one in saved["network_weights"].items() if name.startswith("encoder.")}
    checkpoint.save(saved, model.checkpoint)
    with pytest.raises(UserError, match=r"checkpoint_final.pth: holds no decoder of pretraining"):
        model.impute()


def test_the_command_takes_its_flags(model, capsys):
    flags = ["-d", "1", "-f", "0", "-device", "cpu", "-i", str(model.images), "-o", str(model.output), "-series", "T1w"]
    assert main(["impute", *flags, "-draws", "2", "--score", "--for_prediction", "--z_scores", "-step_size", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Not for diagnosis" in printed and "-series: T1w is hidden from the network in every case" in printed
    for wrong in (flags, ["--help"]):
        with pytest.raises(SystemExit):
            main(["impute", *wrong])
    assert "Not for diagnosis" in capsys.readouterr().out
