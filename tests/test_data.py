"""Fine-tuning reads copies of other series as zeros, and augmentation leaves absent series absent."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_csm.data.draws import generator, seed_everything
from nnunet_csm.training.segmentation import nnUNetTrainerCSM, without_copies


def test_fine_tuning_reads_copies_of_other_series_as_zeros(tmp_path):
    volume = np.random.default_rng(0).normal(size=(3, 9, 8, 7)).astype(np.float32)
    labels = np.zeros((1, *volume.shape[1:]), np.int16)
    sizes = {}
    for suffix, array in (("", volume), ("_seg", labels)):
        sizes[f"blocks{suffix}"], sizes[f"chunks{suffix}"] = comp_blosc2_params(array.shape, (4, 6, 5))
    for name in ("copied", "whole"):
        nnUNetDatasetBlosc2.save_case(volume, labels, {"spacing": [1, 1, 1]}, str(tmp_path / name), **sizes)
    dataset = without_copies(nnUNetDatasetBlosc2, {"copied": [0, 2]})(str(tmp_path), ["copied", "whole"])
    assert isinstance(dataset, nnUNetDatasetBlosc2) and dataset.identifiers == ["copied", "whole"]
    data, segmentation, _, properties = dataset.load_case("copied")
    assert not data[[0, 2]].any() and np.array_equal(data[1], volume[1])
    assert np.array_equal(segmentation[:], labels) and properties == {"spacing": [1, 1, 1]}
    assert np.array_equal(dataset.load_case("whole")[0][:], volume)


# --- nnU-Net's augmentation --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transforms():
    """nnU-Net's, as our trainer asks for them; each that is applied now and then is applied always."""
    composed = nnUNetTrainerCSM.get_training_transforms(
        np.array([8, 10, 6]), (-0.5, 0.5), None, (0, 1, 2), False, use_mask_for_norm=[False] * 3, foreground_labels=[1, 2]
    )
    for transform in composed.transforms[-1].transforms.transforms:
        if hasattr(transform, "apply_probability"):
            transform.apply_probability = 1.0
    return composed


def augment(transforms, image, seed):
    seed_everything(seed)
    return transforms(image=image.clone(), segmentation=torch.zeros(1, *image.shape[1:], dtype=torch.int16))["image"]


@pytest.mark.parametrize("thickness", [1, 2, 3])
def test_patches_that_are_thinner_than_the_blur_are_augmented_without_it(thickness):
    composed = nnUNetTrainerCSM.get_training_transforms(
        patch_size=np.array([thickness, 10, 8]),
        rotation_for_DA=(-0.5, 0.5),
        deep_supervision_scales=None,
        mirror_axes=(0, 1, 2),
        do_dummy_2d_data_aug=True,
        foreground_labels=[1],
    )
    intensity = composed.transforms[-1].transforms.transforms
    for transform in intensity:
        if hasattr(transform, "apply_probability"):
            transform.apply_probability = 1.0
    image = torch.randn(2, thickness, 10, 8)
    for seed in range(20):
        made = augment(composed, image, seed)
        assert made.shape == image.shape and made.isfinite().all() and not made.equal(image)
    assert not any(isinstance(getattr(one, "transform", None), GaussianBlurTransform) for one in intensity)


@pytest.mark.parametrize("absent", [[1], [0, 2], []])
def test_augmentation_leaves_absent_series_absent_and_changes_the_others(transforms, absent):
    image = torch.randn(3, 10, 12, 8, generator=generator(0))
    image[absent] = 0
    for seed in range(3):
        augmented = augment(transforms, image, seed)
        assert augmented.shape == (3, 8, 10, 6)
        for series in range(3):
            assert augmented[series].any() == (series not in absent)
        assert not augmented.equal(augment(transforms, image, seed + 10))


def test_noise_would_make_an_absent_series_present_without_that(transforms):
    image = torch.randn(3, 10, 12, 8, generator=generator(0))
    image[1] = 0
    intensity = transforms.transforms[-1].transforms
    assert augment(intensity, image, 0)[1].any()


def test_a_patch_of_background_is_augmented_as_nnunet_does(transforms):
    image = torch.zeros(3, 10, 12, 8)
    *spatial, kept = transforms.transforms
    assert augment(transforms, image, 0).equal(augment(ComposeTransforms([*spatial, kept.transforms]), image, 0))


def test_augmentation_is_a_function_of_the_key(transforms):
    image = torch.randn(3, 10, 12, 8, generator=generator(0))
    assert augment(transforms, image, 5).equal(augment(transforms, image, 5))
