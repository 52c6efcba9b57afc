"""Crops are slices, batches are functions of their key, labels are never read, and absent series stay absent."""

import math

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from factories import SERIES
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_csm.data import cases as cases_module
from nnunet_csm.data.cases import CaseFile, Cases
from nnunet_csm.data.crops import Crops, cut, draw_crops
from nnunet_csm.data.draws import Purpose, batches, generator, key, seed_everything
from nnunet_csm.errors import UserError
from nnunet_csm.training.segmentation import nnUNetTrainerCSM, without_copies

PATCH_SIZE = (4, 6, 5)
# larger than the patch, smaller along two axes, and of its size along one
SHAPES = {"large": (9, 8, 7), "small": (3, 10, 2), "equal": (4, 7, 9)}
ABSENT = {"small": 1}

MORE_WORKERS_THAN_CORES = pytest.mark.filterwarnings("ignore:This DataLoader will create")

sizes = st.tuples(*[st.integers(1, 9)] * 3)


def volume_of(name):
    volume = np.random.default_rng(sum(map(ord, name))).normal(size=(len(SERIES), *SHAPES[name])).astype(np.float32)
    if name in ABSENT:
        volume[ABSENT[name]] = 0
    return volume


def save(folder, name, volume):
    """A case as nnU-Net's preprocessor writes it, without its labels and properties."""
    labels = np.zeros((1, *volume.shape[1:]), np.int16)
    sizes = {}
    for suffix, array in (("", volume), ("_seg", labels)):
        sizes[f"blocks{suffix}"], sizes[f"chunks{suffix}"] = comp_blosc2_params(array.shape, PATCH_SIZE)
    nnUNetDatasetBlosc2.save_case(volume, labels, {"spacing": [1, 1, 1]}, str(folder / name), **sizes)
    (folder / f"{name}_seg.b2nd").unlink()
    (folder / f"{name}.pkl").unlink()


def open_cases(folder, names, num_channels=3):
    return Cases([CaseFile(name, folder / f"{name}.b2nd", num_channels, tuple(range(len(SERIES)))) for name in names])


@pytest.fixture
def folder(tmp_path):
    for name in SHAPES:
        save(tmp_path, name, volume_of(name))
    return tmp_path


# --- crops -------------------------------------------------------------------------------------------------------------------


def sliced(volume, start, flip, patch_size):
    """A patch of the volume with zeros all around it, then flipped: what `cut` is to give, in plain numpy."""
    margin = 20
    padded = np.pad(np.asarray(volume), [(0, 0), *[(margin, margin)] * 3])
    z, y, x = (slice(s + margin, s + margin + p) for s, p in zip(start, patch_size, strict=True))
    return np.flip(padded[:, z, y, x], tuple(axis + 1 for axis, f in enumerate(flip) if f))


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.tuples(*[st.booleans()] * 3), st.integers(0, 999))
def test_a_crop_is_a_slice_of_the_volume_with_zeros_around_it(shape, patch_size, flip, seed):
    volume = torch.rand(2, *shape, generator=generator(seed)) + 1
    start = draw_crops(generator(seed), torch.tensor([shape]), patch_size).start[0].tolist()
    patch = cut(volume, range(2), start, flip, patch_size)
    assert np.array_equal(patch.numpy(), sliced(volume, start, flip, patch_size))
    # as much of the volume as there is room for
    assert (patch[0] != 0).sum() == math.prod(map(min, shape, patch_size))


def test_flipping_twice_gives_the_patch_back():
    volume, start = torch.rand(2, 9, 8, 7), (2, 1, 0)
    for flip in ((True, False, False), (False, True, True), (True, True, True)):
        again = cut(cut(volume, (0, 1), start, flip, PATCH_SIZE), (0, 1), (0, 0, 0), flip, PATCH_SIZE)
        assert again.equal(cut(volume, (0, 1), start, (False,) * 3, PATCH_SIZE))


def test_positions_and_flips_are_uniform():
    num_draws = 4000
    shapes = torch.tensor([[6, 4, 2]]).expand(num_draws, 3)
    crops = draw_crops(generator(0), shapes, (4, 4, 4))
    tolerance = 5 * math.sqrt(0.25 / num_draws)
    for axis, allowed in enumerate(([0, 1, 2], [0], [-2, -1, 0])):
        values, counts = crops.start[:, axis].unique(return_counts=True)
        assert values.tolist() == allowed
        assert (counts / num_draws - 1 / len(allowed)).abs().max() < tolerance
    assert (crops.flip.float().mean(0) - 0.5).abs().max() < tolerance


def test_the_same_key_draws_the_same_crops():
    shapes = torch.tensor([[30, 40, 50]] * 4)
    first, again, other = (draw_crops(generator(seed), shapes, PATCH_SIZE) for seed in (1, 1, 2))
    assert first.start.equal(again.start) and first.flip.equal(again.flip)
    assert not first.start.equal(other.start)


# --- draws -------------------------------------------------------------------------------------------------------------------


def make_batch(epoch, step):
    return torch.rand(3, generator=generator(key(7, Purpose.TRAINING, epoch, step, 0))), (epoch, step)


def drawn(num_workers=0, first_epoch=0, make=make_batch):
    return list(batches(make, first_epoch, 3, 4, num_workers, pin_memory=False))


def same(some, others):
    return len(some) == len(others) and all(a[0].equal(b[0]) and a[1] == b[1] for a, b in zip(some, others, strict=True))


@MORE_WORKERS_THAN_CORES
def test_batches_do_not_depend_on_who_makes_them():
    assert same(drawn(num_workers=2), drawn())


def test_batches_come_in_order():
    assert [number for _, number in drawn()] == [(epoch, step) for epoch in range(3) for step in range(4)]


def test_a_resumed_run_gets_the_batches_of_one_that_was_not_killed():
    assert same(drawn(first_epoch=1), drawn()[4:])
    assert drawn(first_epoch=3) == []


@given(st.integers(0, 10), st.integers(0, 10), st.integers(0, 2))
def test_a_key_is_a_seed_and_belongs_to_one_draw(epoch, step, rank):
    mine = key(1, Purpose.TRAINING, epoch, step, rank)
    assert 0 <= mine < 2**63
    assert mine == key(1, Purpose.TRAINING, epoch, step, rank)
    others = [(2, Purpose.TRAINING, epoch, step), (1, Purpose.VALIDATION, epoch, step), (1, Purpose.NETWORK, epoch, step)]
    others += [(1, Purpose.TRAINING, epoch + 1, step), (1, Purpose.TRAINING, epoch, step + 1)]
    assert mine not in {key(*other, rank) for other in others} | {key(1, Purpose.TRAINING, epoch, step, rank + 1)}


def test_the_generators_nnunet_draws_from_are_keyed_too():
    def draw():
        seed_everything(key(1, Purpose.TRAINING, 2, 3, 0))
        return np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


# --- cases -------------------------------------------------------------------------------------------------------------------


def test_cases_are_read_as_nnunet_wrote_them_without_their_labels(folder):
    cases = open_cases(folder, list(SHAPES))
    assert len(cases) == 3 and cases.where == "memory"
    assert cases.shapes.tolist() == [list(shape) for shape in SHAPES.values()]
    for volume, present, name in zip(cases.volumes, cases.series_present, SHAPES, strict=True):
        np.testing.assert_allclose(volume.float().numpy(), volume_of(name)[present.numpy()], rtol=1e-3, atol=1e-6)


def test_a_series_is_absent_where_the_stored_volume_is_all_zero(folder):
    cases = open_cases(folder, list(SHAPES))
    expected = [[ABSENT.get(name) != s for s in range(len(SERIES))] for name in SHAPES]
    assert cases.series_present.tolist() == expected


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_patches_are_those_of_the_stored_volumes_from_memory_and_from_files(folder, monkeypatch, share):
    monkeypatch.setattr(cases_module, "SHARE_OF_MEMORY", share)
    cases = open_cases(folder, list(SHAPES))
    assert cases.where == ("memory" if share else "files")
    chosen = torch.tensor([2, 0, 1, 1, 0, 2])
    crops = draw_crops(generator(0), cases.shapes[chosen], PATCH_SIZE)
    patches = cases.cut(chosen, crops, PATCH_SIZE)
    assert patches.dtype == torch.float32 and patches.shape == (6, len(SERIES), *PATCH_SIZE)
    names = list(SHAPES)
    for patch, case, start, flip in zip(patches, chosen, crops.start.tolist(), crops.flip.tolist(), strict=True):
        expected = sliced(volume_of(names[case]), start, flip, PATCH_SIZE)
        # rounded to fp16 wherever it comes from, so that a batch does not depend on the memory of a machine
        assert np.array_equal(patch.numpy(), expected.astype(np.float16).astype(np.float32))


@MORE_WORKERS_THAN_CORES
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_worker_processes_cut_the_same_patches(folder, monkeypatch, share):
    monkeypatch.setattr(cases_module, "SHARE_OF_MEMORY", share)
    cases = open_cases(folder, list(SHAPES))

    def make(epoch, step):
        g = generator(key(0, Purpose.TRAINING, epoch, step, 0))
        chosen = torch.randint(len(cases), (2,), generator=g)
        return cases.cut(chosen, draw_crops(g, cases.shapes[chosen], PATCH_SIZE), PATCH_SIZE), (epoch, step)

    assert same(drawn(2, make=make), drawn(0, make=make))


def test_what_was_cut_can_be_changed_without_changing_the_case(folder):
    cases = open_cases(folder, ["equal"])
    crops = Crops(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool))
    before = cases.volumes[0].clone()
    cases.cut(torch.tensor([0]), crops, PATCH_SIZE).fill_(9)
    assert cases.volumes[0].equal(before)


def test_another_number_of_series_is_an_error_that_says_so(folder):
    with pytest.raises(UserError, match=r"large\.b2nd: 3 series, expected 2 as in the plans"):
        open_cases(folder, list(SHAPES), num_channels=2)


def test_a_case_that_was_not_preprocessed_is_an_error_that_names_it(folder):
    with pytest.raises(UserError, match=r"gone\.b2nd.*nnunet_csm preprocess"):
        open_cases(folder, ["large", "gone"])


def test_no_case_at_all_is_an_error(folder):
    with pytest.raises(UserError, match="no case"):
        open_cases(folder, [])


def test_a_case_of_nothing_but_zeros_is_left_out_and_named(folder):
    save(folder, "empty", np.zeros((3, 4, 6, 5), np.float32))
    cases = open_cases(folder, ["empty", "large"])
    assert cases.names == ["large"] and cases.left_out == ["empty"] and len(cases.shapes) == len(cases.series_present) == 1
    with pytest.raises(UserError, match="empty hold"):
        open_cases(folder, ["empty"])


def test_voxels_that_are_no_numbers_are_refused_with_the_remedy(folder):
    volume = np.ones((3, 4, 6, 5), np.float32)
    volume[1] = np.nan
    save(folder, "broken", volume)
    with pytest.raises(UserError, match=r"broken\.b2nd: holds NaN or infinite voxels"):
        open_cases(folder, ["large", "broken"])


@pytest.mark.parametrize("share", [0.25, 0.0])
def test_series_come_from_their_channels_and_those_a_case_lacks_are_zero(folder, monkeypatch, share):
    """As for a dataset with other series than the run has, in another order, or with a copy in place of a series."""
    monkeypatch.setattr(cases_module, "SHARE_OF_MEMORY", share)
    channels = (2, None, 0, None)
    files = [CaseFile(name, folder / f"{name}.b2nd", 3, channels) for name in SHAPES]
    cases = Cases(files)
    assert cases.series_present.tolist() == [[True, False, True, False]] * len(SHAPES)
    start = torch.zeros(len(SHAPES), 3, dtype=torch.long)
    patches = cases.cut(torch.arange(len(SHAPES)), Crops(start, start.bool()), PATCH_SIZE)
    for patch, name in zip(patches, SHAPES, strict=True):
        expected = sliced(volume_of(name), (0, 0, 0), (False,) * 3, PATCH_SIZE).astype(np.float16).astype(np.float32)
        assert np.array_equal(patch[[0, 2]].numpy(), expected[[2, 0]]) and not patch[[1, 3]].any()


def test_fine_tuning_reads_copies_of_other_series_as_zeros(tmp_path):
    labels = np.zeros((1, *SHAPES["large"]), np.int16)
    sizes = {}
    for suffix, array in (("", volume_of("large")), ("_seg", labels)):
        sizes[f"blocks{suffix}"], sizes[f"chunks{suffix}"] = comp_blosc2_params(array.shape, PATCH_SIZE)
    for name in ("copied", "whole"):
        nnUNetDatasetBlosc2.save_case(volume_of("large"), labels, {"spacing": [1, 1, 1]}, str(tmp_path / name), **sizes)
    dataset = without_copies(nnUNetDatasetBlosc2, {"copied": [0, 2]})(str(tmp_path), ["copied", "whole"])
    assert isinstance(dataset, nnUNetDatasetBlosc2) and dataset.identifiers == ["copied", "whole"]
    data, segmentation, _, properties = dataset.load_case("copied")
    assert not data[[0, 2]].any() and np.array_equal(data[1], volume_of("large")[1])
    assert np.array_equal(segmentation[:], labels) and properties == {"spacing": [1, 1, 1]}
    assert np.array_equal(dataset.load_case("whole")[0][:], volume_of("large"))


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
