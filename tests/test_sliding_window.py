"""Our sliding window gives nnU-Net's logits, whatever the batches, and its command nnU-Net's segmentations."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from factories import DATASET_JSON, SERIES, csm_plans
from hypothesis import given
from hypothesis import strategies as st
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_csm import checkpoint, nnunet
from nnunet_csm.errors import UserError
from nnunet_csm.inference import sliding_window
from nnunet_csm.inference.segmentation import PredictRequest, load_model, predict
from nnunet_csm.inference.sliding_window import BatchedPredictor, share_out

CPU = torch.device("cpu")
# logits are sums in fp16; a network that differs in its last bit moves a few of them by one step
FP16: dict[str, Any] = {"rtol": 2e-3, "atol": 2e-3}
TRAINER, PLANS = "nnUNetTrainerCSM", "nnUNetCSMPlans"


def network_of(manager: PlansManager, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    configuration = manager.get_configuration("3d_fullres")
    return get_network_from_plans(
        configuration.network_arch_class_name,
        configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import,
        len(SERIES),
        manager.get_label_manager(DATASET_JSON).num_segmentation_heads,
        deep_supervision=False,
    )


def predictor(kind=BatchedPredictor, axes=None, num_samples=None, folds=1, network=None, **options):
    manager = PlansManager(csm_plans())
    networks = [network_of(manager, fold) for fold in range(folds)]
    host = kind(device=CPU, allow_tqdm=False, **options)
    host.manual_initialization(
        network or networks[0],
        manager,
        manager.get_configuration("3d_fullres"),
        [one.state_dict() for one in networks],
        DATASET_JSON,
        TRAINER,
        axes,
    )
    if num_samples is not None:
        host.num_samples = num_samples
    return host


def image(absent=(), shape=(6, 20, 15)):
    """Noise, with background below, T1w cut off where it was not acquired, and whole series absent."""
    volume = torch.randn(len(SERIES), *shape, generator=torch.Generator().manual_seed(3))
    volume[1, :, :, 5:] = 0
    volume[:, :, 8:] = 0
    volume[list(absent)] = 0
    return volume


# --- the same logits as stock ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", [None, (1,), (0, 1, 2)])
@pytest.mark.parametrize("absent", [(), (0, 2)])
@pytest.mark.parametrize("num_samples", [1, 40])
def test_logits_are_those_of_stock_prediction(axes, absent, num_samples):
    volume = image(absent)
    expected = predictor(nnUNetPredictor, axes).predict_logits_from_preprocessed_data(volume)
    found = predictor(axes=axes, num_samples=num_samples).predict_logits_from_preprocessed_data(volume)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, **FP16)
    # the sums are made in the same order: all but a few are the same to the last bit
    assert (found == expected).float().mean() > 0.98
    assert expected.float().std() > 0.05


@pytest.mark.parametrize(
    "options",
    [{"tile_step_size": 1.0}, {"tile_step_size": 0.4}, {"use_gaussian": False}, {"use_mirroring": False}],
    ids=str,
)
def test_options_mean_what_they_mean_to_stock(options):
    volume = image()
    expected = predictor(nnUNetPredictor, (0, 2), **options).predict_logits_from_preprocessed_data(volume)
    found = predictor(axes=(0, 2), **options).predict_logits_from_preprocessed_data(volume)
    torch.testing.assert_close(found, expected, **FP16)


def test_folds_are_averaged_as_by_stock():
    volume = image((1,))
    expected = predictor(nnUNetPredictor, folds=3).predict_logits_from_preprocessed_data(volume)
    torch.testing.assert_close(predictor(folds=3).predict_logits_from_preprocessed_data(volume), expected, **FP16)
    assert not torch.allclose(predictor(folds=1).predict_logits_from_preprocessed_data(volume), expected, **FP16)


def test_an_image_smaller_than_the_patch_and_one_of_background():
    for volume in (image(shape=(3, 5, 7)), torch.zeros(3, 6, 13, 11)):
        expected = predictor(nnUNetPredictor, (0,)).predict_logits_from_preprocessed_data(volume)
        torch.testing.assert_close(predictor(axes=(0,)).predict_logits_from_preprocessed_data(volume), expected, **FP16)


def test_a_network_that_is_not_ours_is_predicted_as_by_stock():
    network = torch.nn.Sequential(torch.nn.Conv3d(len(SERIES), 3, 3, padding=1), torch.nn.ReLU())
    volume = image()
    results = []
    for kind in (nnUNetPredictor, BatchedPredictor):
        host = predictor(kind, (0, 1), network=network)
        host.list_of_parameters = [network.state_dict()]
        results.append(host.predict_logits_from_preprocessed_data(volume))
    torch.testing.assert_close(*results, **FP16)


# --- batches -----------------------------------------------------------------------------------------------------------------


class Recorder(torch.nn.Module):
    """Records the batches a network is given; runs out of memory above `limit` samples."""

    def __init__(self, limit=1000):
        super().__init__()
        self.sizes, self.limit = [], limit

    def forward(self, volume):
        if len(volume) > self.limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        self.sizes.append(len(volume))
        return volume * 1.0


def recorded(num_samples, axes=None, limit=1000, volume=None):
    network = Recorder(limit)
    # in the corners, weights are near the smallest number of fp16
    host = predictor(axes=axes, num_samples=num_samples, network=network, use_gaussian=False)
    host.list_of_parameters = [{}]
    return host.predict_logits_from_preprocessed_data(image() if volume is None else volume), network, host


@given(st.integers(1, 100), st.sampled_from([1, 2, 4, 8]), st.integers(1, 100))
def test_a_batch_is_a_power_of_two_within_its_limits(num_samples, num_passes, num_left):
    num_tiles, num_together = share_out(num_samples, num_passes, num_left)
    assert 1 <= num_tiles <= num_left and 1 <= num_together <= num_passes
    assert num_tiles * num_together <= num_samples
    assert (num_tiles * num_together).bit_count() == 1
    # passes of a tile are split up only where they do not fit
    assert num_tiles == 1 or num_together == num_passes
    assert 2 * num_tiles * num_together > min(num_samples, num_left * num_passes)


def test_every_pass_of_every_tile_is_made_once_and_undone():
    volume = image()
    for num_samples in (1, 2, 8, 32):
        logits, network, _ = recorded(num_samples, (0, 1, 2), volume=volume)
        # a network that changes nothing gives the image back, or a flip was not undone
        torch.testing.assert_close(logits.float(), volume, rtol=2e-3, atol=2e-3)
        assert max(network.sizes) == num_samples
    _, alone, _ = recorded(1, (0, 1, 2), volume=volume)
    assert sum(network.sizes) == len(alone.sizes)


@pytest.mark.parametrize("limit", [1, 5, 16])
def test_a_batch_that_does_not_fit_is_made_smaller_and_no_tile_counts_twice(limit, capsys):
    volume = image()
    logits, network, host = recorded(64, (0, 1, 2), limit, volume)
    torch.testing.assert_close(logits.float(), volume, rtol=2e-3, atol=2e-3)
    assert host.num_samples <= limit < 2 * host.num_samples or limit == 5
    assert "did not fit into GPU memory" in capsys.readouterr().out
    assert max(network.sizes) <= limit


def test_a_single_sample_that_does_not_fit_is_nnunets_to_handle():
    with pytest.raises(torch.cuda.OutOfMemoryError):
        recorded(4, limit=0)


@pytest.mark.parametrize("voxels, expected", [(96**3, 18), (48**3, 33), (2**25, 1)])
def test_the_first_tile_tells_how_many_fit_into_gpu_memory(monkeypatch, voxels, expected):
    gib = sliding_window.GIB
    state = {"max_memory_allocated": 2 * gib, "memory_reserved": 3 * gib, "mem_get_info": (10 * gib, 80 * gib)}
    for name, value in state.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    # four samples took 1 GiB; 10 GiB are free, and 2 of the 3 that torch has taken
    assert predictor()._num_samples_that_fit(gib, 4, voxels) == expected


def test_tokens_of_absent_series_are_left_out_tile_by_tile(monkeypatch):
    host, seen = predictor(num_samples=1), set()
    forward = host.network.forward

    def watch(volume, shown=None):
        present = sliding_window.series_present(volume)
        assert present.all(0).nonzero().flatten().tolist() == list(shown) == present.any(0).nonzero().flatten().tolist()
        seen.add(shown)
        return forward(volume, shown)

    monkeypatch.setattr(host.network, "forward", watch)
    host.predict_logits_from_preprocessed_data(image())
    # some tiles are beyond the field of view of T1w; in those of background, all series count as present
    assert seen == {(0, 2), (0, 1, 2)}


# --- the command -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def request_(nnunet_folders, tmp_path):
    """A model of two folds that never learned, and three cases of which one lacks a series."""
    plans = csm_plans() | {"foreground_intensity_properties_per_channel": {str(c): {} for c in range(len(SERIES))}}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (nnunet.folder(name) / "Dataset001_Tiny").mkdir()
    model = nnunet_folders.results / "Dataset001_Tiny" / f"{TRAINER}__{PLANS}__3d_fullres"
    for fold in range(2):
        (model / f"fold_{fold}").mkdir(parents=True)
        saved = {
            "network_weights": network_of(PlansManager(csm_plans()), fold).state_dict(),
            "init_args": {"plans": plans, "configuration": "3d_fullres", "fold": fold},
            "trainer_name": TRAINER,
            "inference_allowed_mirroring_axes": (0, 1),
        }
        checkpoint.save(saved, model / f"fold_{fold}" / "checkpoint_final.pth")
    nnunet.save_json(plans, model / "plans.json")
    nnunet.save_json(DATASET_JSON, model / "dataset.json")
    images = tmp_path / "images"
    images.mkdir()
    for case in range(3):
        for channel, series in enumerate(image((), (6, 20, 13 + case)).numpy()):
            values = series * (case != 1 or channel != 0)
            sitk.WriteImage(sitk.GetImageFromArray(values + channel * (values != 0)), images / f"case{case}_{channel:04d}.nii.gz")
    return PredictRequest(
        "1", TRAINER, PLANS, "3d_fullres", ("0", "1"), "checkpoint_final.pth", "cpu", images, tmp_path / "ours",
        num_preprocessing=0, num_export=0, progress_bar=False,
    )  # fmt: skip


def predict_by_stock(request: PredictRequest, folder: Path, mirroring=True) -> None:
    """With weights of the checkpoint's as nnU-Net reads them, and without its look for the trainer, which takes long."""
    host = nnUNetPredictor(device=CPU, allow_tqdm=False, use_mirroring=mirroring)
    model = load_model(request)
    manager = PlansManager(model.plans)
    weights = [loaded["network_weights"] for loaded in model.checkpoints]
    configuration = manager.get_configuration("3d_fullres")
    host.manual_initialization(network_of(manager), manager, configuration, weights, DATASET_JSON, TRAINER, (0, 1))
    folder.mkdir()
    host.predict_from_files_sequential(str(request.images), str(folder), save_probabilities=True)


def test_segmentations_and_probabilities_are_those_of_stock_prediction(request_, tmp_path):
    predict(replace(request_, save_probabilities=True))
    predict_by_stock(request_, tmp_path / "stock")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in request_.output.iterdir())
    folders = (request_.output, tmp_path / "stock")
    for case in range(3):
        found, expected = (sitk.GetArrayFromImage(sitk.ReadImage(folder / f"case{case}.nii.gz")) for folder in folders)
        probabilities, wanted = (np.load(folder / f"case{case}.npz")["probabilities"] for folder in folders)
        np.testing.assert_allclose(probabilities, wanted, atol=1e-3)
        # where two classes are equal to fp16's precision, either may win
        clear = np.diff(np.sort(wanted, axis=0)[-2:], axis=0)[0] > 1e-3
        assert np.array_equal(found[clear], expected[clear]) and clear.mean() > 0.9
        assert len(np.unique(expected)) > 1


def test_parts_and_continuing_take_the_cases_they_are_to_take(request_):
    predict(replace(request_, num_parts=2, part_id=1))
    assert [path.name for path in request_.output.glob("*.nii.gz")] == ["case1.nii.gz"]
    kept = request_.output / "case1.nii.gz"
    before = kept.stat().st_mtime_ns
    predict(replace(request_, continue_prediction=True))
    assert len(list(request_.output.glob("*.nii.gz"))) == 3
    assert kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_processes_beside_the_network_change_nothing(request_, tmp_path):
    predict(request_)
    beside = replace(request_, output=tmp_path / "beside", num_preprocessing=2, num_export=1)
    predict(beside)
    for path in request_.output.glob("*.nii.gz"):
        found, expected = (sitk.GetArrayFromImage(sitk.ReadImage(d / path.name)) for d in (beside.output, request_.output))
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"step_size": 0.0}, "-step_size"),
        ({"part_id": 1}, "-part_id"),
        ({"num_export": 3}, "-npp and -nps"),
    ],
)
def test_flags_that_make_no_sense_are_refused(request_, change, complaint):
    with pytest.raises(UserError, match=complaint):
        replace(request_, **change)


def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_written(request_, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="-device cpu"):
        predict(replace(request_, device="cuda"))
    assert not request_.output.exists()


def test_a_model_that_is_not_there_or_another_one_is_refused_before_anything_is_written(request_):
    with pytest.raises(UserError, match=r"fold_4.*no such checkpoint.*finetune"):
        predict(replace(request_, folds=("0", "4")))
    path = load_model(request_).folder / "fold_1" / "checkpoint_final.pth"
    saved = checkpoint.load(path)
    del saved["network_weights"]["decoder.seg_layers.0.bias"]
    checkpoint.save(saved, path)
    with pytest.raises(UserError, match=r"fold_1/checkpoint_final\.pth.*do not fit the network"):
        predict(request_)
    saved["init_args"]["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["depth"] = 7
    checkpoint.save(saved, path)
    with pytest.raises(UserError, match=r"plans\.json says"):
        predict(request_)
    assert not request_.output.exists()
