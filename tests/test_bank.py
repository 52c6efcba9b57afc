"""Patches are slices of the stored volumes, the same from every bank; labels are never read; background is drawn less often."""

import inspect
import math
from collections import Counter

import numpy as np
import pytest
import torch
from factories import SERIES
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_csm.data import bank as bank_module
from nnunet_csm.data.bank import (
    CROPS_PER_VOLUME,
    CaseFile,
    DiskBank,
    GpuBank,
    MemoryBank,
    Pools,
    ahead,
    free_memory,
    memory_bytes,
    open_bank,
    read,
)
from nnunet_csm.data.crops import BLOCK, Crops, Occupancy, cut, draw_crops, gather, occupied_blocks
from nnunet_csm.data.draws import Draws, What
from nnunet_csm.errors import UserError

CPU = torch.device("cpu")
PATCH_SIZE = (4, 6, 5)
# larger than the patch, smaller along two axes, and of its size along one
SHAPES = {"large": (9, 8, 7), "small": (3, 10, 2), "equal": (4, 7, 9)}
ABSENT = {"small": 1}

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


def case_files(folder, names=SHAPES, num_channels=3, channels=(0, 1, 2)):
    return [CaseFile(name, folder / f"{name}.b2nd", num_channels, channels) for name in names]


def opened(files, where="auto"):
    return open_bank(files, CPU, where, batch_size=4, seed=0)


def gpu_bank(files):
    """On the CPU, where `open_bank` would not put it."""
    flat = torch.empty(sum(math.prod(SHAPES[file.name]) * len(file.channels) for file in files), dtype=torch.float16)
    return GpuBank(read(files, flat), flat, "")


BANKS = {"gpu": gpu_bank, "memory": lambda files: opened(files, "memory"), "disk": lambda files: opened(files, "disk")}
every_bank = pytest.mark.parametrize("where", list(BANKS))


@pytest.fixture
def folder(tmp_path):
    for name in SHAPES:
        save(tmp_path, name, volume_of(name))
    return tmp_path


def half(array):
    return array.astype(np.float16)


# --- crops -------------------------------------------------------------------------------------------------------------------


def sliced(volume, start, flip, patch_size):
    """A patch of the volume with zeros all around it, then flipped: what is to be cut, in plain numpy."""
    margin = 20
    padded = np.pad(np.asarray(volume), [(0, 0), *[(margin, margin)] * 3])
    z, y, x = (slice(s + margin, s + margin + p) for s, p in zip(start, patch_size, strict=True))
    return np.flip(padded[:, z, y, x], tuple(axis + 1 for axis, f in enumerate(flip) if f))


def drawn_crops(seed, shapes, patch_size=PATCH_SIZE, occupancy=None):
    return draw_crops(Draws(seed, torch.arange(len(shapes))), torch.as_tensor(shapes), patch_size, occupancy)


@settings(max_examples=60, deadline=None)
@given(sizes, sizes, st.tuples(*[st.booleans()] * 3), st.integers(0, 999))
def test_a_crop_is_a_slice_of_the_volume_with_zeros_around_it(shape, patch_size, flip, seed):
    volume = half(np.random.default_rng(seed).random((1, *shape)) + 1)
    start = drawn_crops(seed, [shape], patch_size).start[0].tolist()
    patch = torch.full(patch_size, 9.0, dtype=torch.float16)
    cut(volume[0], start, flip, patch)
    assert np.array_equal(patch, sliced(volume, start, flip, patch_size)[0])
    # as much of the volume as there is room for
    assert (patch != 0).sum() == math.prod(map(min, shape, patch_size))


def test_positions_and_flips_are_uniform():
    num_draws = 4000
    crops = drawn_crops(0, torch.tensor([[6, 4, 2]]).expand(num_draws, 3), (4, 4, 4))
    tolerance = 5 * math.sqrt(0.25 / num_draws)
    for axis, allowed in enumerate(([0, 1, 2], [0], [-2, -1, 0])):
        values, counts = crops.start[:, axis].unique(return_counts=True)
        assert values.tolist() == allowed
        assert (counts / num_draws - 1 / len(allowed)).abs().max() < tolerance
    assert (crops.flip.float().mean(0) - 0.5).abs().max() < tolerance
    # axes are drawn apart
    joint = Counter(map(tuple, crops.flip.tolist()))
    assert len(joint) == 8 and max(abs(n / num_draws - 1 / 8) for n in joint.values()) < tolerance


def test_no_position_is_beyond_the_last_one_even_for_the_largest_number(monkeypatch):
    """As a product of floats may be: 75 (1 - 2**-24) rounds to 75."""
    monkeypatch.setattr(Draws, "integers", lambda self, what, num: torch.full((1, num), 2**63 - 1))
    assert drawn_crops(0, [[80, 5, 3]], (6, 5, 8)).start.tolist() == [[74, 0, -5]]


def test_the_same_key_draws_the_same_crops():
    first, again, other = (drawn_crops(seed, [[30, 40, 50]] * 4) for seed in (1, 1, 2))
    assert first.start.equal(again.start) and first.flip.equal(again.flip)
    assert not first.start.equal(other.start)


# --- background --------------------------------------------------------------------------------------------------------------


def island(shape, low, high, background=-0.7):
    """A volume that is constant, and not zero, outside a box."""
    volume = np.full(shape, background, np.float32)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    volume[box] = np.random.default_rng(0).normal(size=volume[box].shape)
    return volume


def test_a_block_is_occupied_where_any_series_varies():
    one, other = island((24, 20, 17), (0, 0, 0), (8, 8, 8)), island((24, 20, 17), (17, 9, 16), (24, 20, 17))
    blocks = occupied_blocks([one, other])
    assert blocks.shape == (3, 3, 3)
    assert set(zip(*np.nonzero(blocks), strict=True)) == {(0, 0, 0), (2, 1, 2), (2, 2, 2)}
    # whatever the units, and rounding is no variation
    assert np.array_equal(occupied_blocks([1000 * one + 1e-2 * np.sin(np.arange(17)), other]), blocks)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(*[st.integers(1, 5)] * 3), min_size=1, max_size=3), st.integers(0, 99))
def test_shares_are_counted_over_the_blocks_that_a_patch_touches(num_blocks, seed):
    rng = np.random.default_rng(seed)
    maps = [rng.random(n) < 0.4 for n in num_blocks]
    shapes = torch.tensor([[BLOCK * n - rng.integers(BLOCK) for n in blocks] for blocks in num_blocks])
    patch_size = tuple(rng.integers(1, 30, 3).tolist())
    start = drawn_crops(seed, shapes, patch_size).start
    shares = Occupancy.of(maps).share(start[:, None], patch_size)
    for blocks, first, share in zip(maps, start.tolist(), shares[:, 0].tolist(), strict=True):
        touched = blocks[tuple(slice(max(f, 0) // BLOCK, -(-(f + p) // BLOCK)) for f, p in zip(first, patch_size, strict=True))]
        assert share == 1000 * touched.sum() // touched.size


def test_where_there_is_no_background_the_draw_is_the_one_without_a_map():
    shapes = torch.tensor([[30, 40, 50], [60, 9, 33]] * 200)
    full = Occupancy.of([np.ones([-(-n // BLOCK) for n in shape], bool) for shape in shapes[:2].tolist()])
    plain, mapped = drawn_crops(5, shapes), drawn_crops(5, shapes, PATCH_SIZE, full[torch.arange(400) % 2])
    assert plain.start.equal(mapped.start) and plain.flip.equal(mapped.flip)


def test_patches_of_background_are_drawn_again():
    shape, patch_size, num_draws = (64, 64, 64), (16, 16, 16), 4000
    blocks = np.zeros((8, 8, 8), bool)
    blocks[:, :, :4] = True
    occupancy = Occupancy.of([blocks])[torch.zeros(num_draws, dtype=torch.long)]
    plain = drawn_crops(1, [shape] * num_draws, patch_size)
    mapped = drawn_crops(1, [shape] * num_draws, patch_size, occupancy)
    empty, still = ((crops.start[:, 2] >= 32).float().mean().item() for crops in (plain, mapped))
    tolerance = 5 * math.sqrt(0.25 / num_draws)
    assert abs(empty - 17 / 49) < tolerance and abs(still - (17 / 49) ** 4) < tolerance
    # what was not background stays where it was
    kept = plain.start[:, 2] < 32
    assert plain.start[kept].equal(mapped.start[kept])


def test_of_patches_that_are_all_background_the_fullest_is_taken():
    """One block in a large volume is less than the share asked for, in any patch."""
    shape, patch_size, num_draws = (64, 64, 64), (48, 48, 48), 3000
    blocks = np.zeros((8, 8, 8), bool)
    blocks[0, 0, 0] = True
    occupancy = Occupancy.of([blocks])
    every = occupancy[torch.zeros(num_draws, dtype=torch.long)]
    plain, mapped = (drawn_crops(2, [shape] * num_draws, patch_size, some) for some in (None, every))
    found = [(every.share(crops.start[:, None], patch_size) > 0).float().mean() for crops in (plain, mapped)]
    assert 0.1 < found[0] < 0.9
    # any of four
    assert abs(found[1] - (1 - (1 - found[0]) ** 4)) < 5 * math.sqrt(0.25 / num_draws)


# --- banks -------------------------------------------------------------------------------------------------------------------


@every_bank
def test_patches_are_those_of_the_stored_volumes(folder, where):
    bank = BANKS[where](case_files(folder))
    assert bank.where == where and len(bank) == 3 and bank.names == list(SHAPES)
    assert bank.shapes.tolist() == [list(shape) for shape in SHAPES.values()]
    chosen = torch.tensor([2, 0, 1, 1, 0, 2, 1])
    crops = drawn_crops(0, bank.shapes[chosen])
    patches = bank.cut(chosen, crops, PATCH_SIZE)
    assert patches.dtype == torch.float16 and patches.shape == (7, len(SERIES), *PATCH_SIZE)
    for patch, case, start, flip in zip(patches, chosen, crops.start.tolist(), crops.flip.tolist(), strict=True):
        assert np.array_equal(patch, half(sliced(volume_of(bank.names[case]), start, flip, PATCH_SIZE)))


@settings(max_examples=15, deadline=None)
@given(patch_size=st.tuples(*[st.integers(1, 12)] * 3), seed=st.integers(0, 99))
def test_all_banks_give_the_same_patches_for_the_same_draws(banks, patch_size, seed):
    results = []
    for bank in banks:
        draws = Draws(seed, torch.arange(9))
        chosen = draws.integers(What.CASE, 1)[:, 0] % len(bank)
        crops = draw_crops(draws, bank.shapes[chosen], patch_size, bank.occupancy[chosen])
        results.append(bank.cut(chosen, crops, patch_size))
    assert results[0].any()
    assert all(result.equal(results[0]) for result in results[1:])


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cases")
    for name in SHAPES:
        save(folder, name, volume_of(name))
    files = case_files(folder)
    return [make(files) for make in BANKS.values()] + [small_disk_bank(files, num_bytes) for num_bytes in (0, 1500, 6000)]


def small_disk_bank(files, num_bytes):
    return DiskBank(read(files), num_bytes, batch_size=4, seed=0)


def test_beyond_two_to_the_31_voxels_places_are_still_right():
    shape, end = (2, 3, 4), 2**31 + 1000
    # 4 GiB of which only the pages at the end are ever touched
    flat = torch.from_numpy(np.zeros(end + 24, np.float16))
    flat[end:] = torch.arange(24)
    one = torch.zeros(1, 3, dtype=torch.long)
    crops = Crops(one, one.bool())
    patch = gather(flat, torch.tensor([[end]]), torch.tensor([shape]), torch.ones(1, 1, dtype=torch.bool), crops, shape)
    assert patch.ravel().tolist() == list(range(24))


def test_a_compiler_makes_one_graph_of_the_gather():
    shapes, present = torch.tensor([[9, 8, 7], [3, 10, 2]]), torch.tensor([[True, False], [True, True]])
    offset, flat = torch.tensor([[0, 0], [504, 564]]), torch.rand(624).half()
    args = flat, offset, shapes, present, drawn_crops(1, shapes), PATCH_SIZE
    # without the checks of shapes that tests wrap around it
    compiled = torch.compile(inspect.unwrap(gather), fullgraph=True, backend="eager")
    assert compiled(*args).equal(gather(*args))


@every_bank
def test_a_series_is_absent_where_the_stored_volume_is_all_zero(folder, where):
    bank = BANKS[where](case_files(folder))
    assert bank.series_present.tolist() == [[ABSENT.get(name) != s for s in range(len(SERIES))] for name in SHAPES]


@every_bank
def test_series_come_from_their_channels_and_those_a_case_lacks_are_zero(folder, where):
    """As for a dataset with other series than the run has, in another order, or with a copy in place of a series."""
    bank = BANKS[where](case_files(folder, channels=(2, None, 0, None)))
    assert bank.series_present.tolist() == [[True, False, True, False]] * len(SHAPES)
    start = torch.zeros(len(SHAPES), 3, dtype=torch.long)
    patches = bank.cut(torch.arange(len(SHAPES)), Crops(start, start.bool()), PATCH_SIZE)
    for patch, name in zip(patches, SHAPES, strict=True):
        expected = half(sliced(volume_of(name), (0, 0, 0), (False,) * 3, PATCH_SIZE))
        assert np.array_equal(patch[[0, 2]], expected[[2, 0]]) and not patch[[1, 3]].any()


@every_bank
def test_what_was_cut_can_be_changed_without_changing_the_case(folder, where):
    bank = BANKS[where](case_files(folder, ["equal"]))
    crops = Crops(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool))
    before = bank.cut(torch.tensor([0]), crops, PATCH_SIZE)
    bank.cut(torch.tensor([0]), crops, PATCH_SIZE).fill_(9)
    assert bank.cut(torch.tensor([0]), crops, PATCH_SIZE).equal(before)


def test_memory_of_a_batch_is_used_again_once_nobody_holds_any_of_it(folder):
    bank = opened(case_files(folder), "memory")
    crops = Crops(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool))

    def cut_case(case):
        return bank.cut(torch.tensor([case]), crops, PATCH_SIZE)

    part, expected = cut_case(0)[0, 1:], cut_case(0)[0, 1:].clone()
    other = cut_case(2)
    assert part.equal(expected) and not other[0, 1:].equal(expected)
    place = other.data_ptr()
    del other
    assert cut_case(1).data_ptr() == place and part.equal(expected)
    # of another size
    assert bank.cut(torch.tensor([0]), crops, (2, 2, 2)).shape == (1, 3, 2, 2, 2) and part.equal(expected)


@every_bank
def test_values_beyond_fp16_are_clamped(folder, where):
    volume = np.ones((3, *SHAPES["equal"]), np.float32)
    volume[:, 0, 0, 0] = 1e6, -1e6, 7
    (folder / "equal.b2nd").unlink()
    save(folder, "equal", volume)
    bank = BANKS[where](case_files(folder, ["equal"]))
    crops = Crops(torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3, dtype=torch.bool))
    assert bank.cut(torch.tensor([0]), crops, (1, 1, 1)).ravel().tolist() == [65504, -65504, 7]


# --- threads and the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_threads_cut_the_same_patches(folder, where):
    def batches(bank, num_threads):
        def make(seed):
            draws = Draws(seed, torch.arange(5))
            chosen = draws.integers(What.CASE, 1)[:, 0] % len(bank)
            return bank.cut(chosen, draw_crops(draws, bank.shapes[chosen], PATCH_SIZE), PATCH_SIZE)

        return list(ahead(make, range(40), num_threads, CPU))

    files = case_files(folder)
    for threaded, alone in zip(batches(BANKS[where](files), 4), batches(BANKS[where](files), 0), strict=True):
        assert threaded.equal(alone)


def decoded_by(bank, monkeypatch):
    """Cases in the order in which the bank decodes them."""
    seen = []
    inner = bank.cache.decode

    def decode(case):
        seen.append(case)
        return inner(case)

    monkeypatch.setattr(bank.cache, "decode", decode)
    return seen


def test_the_cache_holds_no_more_than_it_may_and_drops_what_was_not_used_longest(folder, monkeypatch):
    sizes = [2 * math.prod(SHAPES[n]) * (3 - (n in ABSENT)) for n in SHAPES]
    bank = small_disk_bank(case_files(folder), sizes[0] + sizes[2])
    seen = decoded_by(bank, monkeypatch)
    for case in (0, 2, 0, 2, 1, 2, 0, 1):
        bank.part(case, (0, 0, 0), PATCH_SIZE)
        assert bank.cache.num_bytes <= bank.cache.max_bytes
        assert bank.cache.num_bytes == sum(sizes[kept] for kept in bank.cache.kept)
    # case 1 takes the place of case 0, which takes that of case 1, which takes that of case 2
    assert seen == [0, 2, 1, 0, 1]


def test_threads_that_want_one_case_decode_it_once(folder, monkeypatch):
    bank = opened(case_files(folder), "disk")
    seen = decoded_by(bank, monkeypatch)
    list(ahead(lambda case: bank.part(case, (0, 0, 0), PATCH_SIZE), [0, 1, 2] * 20, 6, CPU))
    assert sorted(seen) == [0, 1, 2]


def test_a_file_that_cannot_be_read_is_an_error_each_time_and_for_everybody(folder):
    bank = opened(case_files(folder), "disk")
    (folder / "large.b2nd").unlink()
    for _ in range(2):
        with pytest.raises(UserError, match=r"large\.b2nd"):
            list(ahead(lambda case: bank.part(case, (0, 0, 0), PATCH_SIZE), [0, 0], 2, CPU))
    assert not bank.cache.kept


def test_a_patch_of_a_volume_much_larger_than_it_is_cut_from_the_file(folder, monkeypatch):
    monkeypatch.setattr(bank_module, "PIECE", 0)
    bank = opened(case_files(folder), "disk")
    seen = decoded_by(bank, monkeypatch)
    crops = drawn_crops(3, bank.shapes[[0, 0]], (2, 2, 2))
    patches = bank.cut(torch.tensor([0, 0]), crops, (2, 2, 2))
    assert CROPS_PER_VOLUME * 8 < 9 * 8 * 7 and seen == []
    assert patches.equal(opened(case_files(folder), "memory").cut(torch.tensor([0, 0]), crops, (2, 2, 2)))


# --- pools -------------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.data(), st.integers(0, 9))
def test_every_case_is_in_the_pool_as_often_as_any_other(num_cases, data, seed):
    pool_size = data.draw(st.integers(1, num_cases))
    # the window moves on by one case a step
    pools = Pools(num_cases, pool_size, CROPS_PER_VOLUME, seed)
    counts: Counter[int] = Counter()
    num_passes = 4
    for step in range(num_passes * num_cases):
        pool = pools(step)
        assert pool.shape == (pool_size,)
        counts.update(pool.tolist())
    assert set(counts) == set(range(num_cases))
    # all but the stays that begin before the first pass or end after the last one
    assert all(abs(count - num_passes * pool_size) <= pool_size for count in counts.values())


def test_each_case_stays_in_the_pool_for_some_crops_and_neighbouring_pools_share_nearly_all_cases():
    pools = Pools(num_cases=50, pool_size=10, batch_size=8, seed=3)
    steps: dict[int, list[int]] = {case: [] for case in range(50)}
    for step in range(100, 2100):
        for case in pools(step).tolist():
            steps[case].append(step)
        assert len(set(pools(step).tolist()) - set(pools(step + 1).tolist())) <= 1
    # the window moves by one case every 16 / 8 steps, so that a stay is of 20 steps; 2,000 steps are 20 passes
    assert all(abs(len(stay) - 400) <= 20 for stay in steps.values())
    assert not pools(5).equal(Pools(50, 10, 8, seed=4)(5))


def test_a_disk_bank_draws_from_pools_that_fit_its_cache(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"case_{number:02d}" for number in range(40)]
    for name in names:
        save(tmp_path, name, rng.normal(size=(3, 4, 4, 4)).astype(np.float32))
    files = case_files(tmp_path, names)
    size = 2 * 3 * 4**3
    bank = small_disk_bank(files, 30 * size)
    decoded = 0
    for step in range(400):
        pool = bank.reach(step)
        assert len(pool) == 22
        for case in pool[Draws(step, torch.arange(4)).integers(What.CASE, 1)[:, 0] % len(pool)].tolist():
            before = bank.cache.kept.get(case)
            bank.part(case, (0, 0, 0), PATCH_SIZE)
            decoded += before is None
    # one decoding for 16 crops, besides the first pool
    assert decoded <= 22 + 1.2 * 1600 / CROPS_PER_VOLUME
    # all cases fit, or the pool would be too small to be of use
    assert small_disk_bank(files, 60 * size).reach(0) is None
    assert len(small_disk_bank(files, size).reach(0)) == bank_module.MIN_POOL
    assert opened(files, "memory").reach(0) is None


# --- where -------------------------------------------------------------------------------------------------------------------


def test_memory_is_chosen_when_the_images_take_a_share_of_it_and_else_the_disk(folder, monkeypatch):
    size = 2 * 3 * sum(map(math.prod, SHAPES.values()))
    monkeypatch.setattr(bank_module, "free_memory", lambda: 2 * size)
    bank = opened(case_files(folder))
    assert isinstance(bank, MemoryBank) and "within 50%" in bank.reason
    monkeypatch.setattr(bank_module, "free_memory", lambda: 2 * size - 2)
    bank = opened(case_files(folder))
    assert isinstance(bank, DiskBank) and "more than 50%" in bank.reason and "cache of" in bank.reason
    # two ranks on one machine have a half each
    monkeypatch.setattr(bank_module, "free_memory", lambda: 3 * size)
    assert open_bank(case_files(folder), CPU, batch_size=4, seed=0, num_ranks=2).where == "disk"


def test_a_bank_that_was_asked_for_and_does_not_fit_is_an_error_with_sizes_and_the_remedy(folder, monkeypatch):
    monkeypatch.setattr(bank_module, "free_memory", lambda: 1000)
    with pytest.raises(UserError, match=r"_csm_bank is memory: .* GiB .* do not fit .* GiB free memory; choose disk or auto"):
        opened(case_files(folder), "memory")
    assert opened(case_files(folder), "disk").where == "disk"
    with pytest.raises(UserError, match="nnUNet_csm_bank is gpu, but the network is on cpu; choose"):
        opened(case_files(folder), "gpu")
    with pytest.raises(UserError, match="nnUNet_csm_bank is 'ram'; choose auto, gpu, memory or disk"):
        opened(case_files(folder), "ram")


def test_ranks_agree_on_the_place_and_the_pool_of_the_one_with_least_room(folder):
    """Or they would draw other cases for the same batch."""
    given = []

    def agree(number):
        given.append(number)
        return min(number, 0 if len(given) == 1 else 2**20)

    bank = open_bank(case_files(folder), CPU, batch_size=4, seed=0, agree=agree)
    assert bank.where == "disk" and "but disk, since another rank has less room" in bank.reason
    assert isinstance(bank, DiskBank)
    assert given[0] == 1 and given[1] > bank.cache.max_bytes == 2**20


def test_free_memory_is_some_and_no_more_than_there_is():
    assert 2**20 < free_memory() <= memory_bytes()


# --- bad files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_what_is_wrong_with_files_is_said_with_the_remedy(folder, where):
    with pytest.raises(UserError, match=r"large\.b2nd: 3 series, expected 2 as in the plans"):
        opened(case_files(folder, num_channels=2), where)
    with pytest.raises(UserError, match=r"gone\.b2nd.*nnunet_csm plan_and_preprocess -preprocess_only"):
        opened(case_files(folder, ["large", "gone"]), where)
    with pytest.raises(UserError, match="no case"):
        opened([], where)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_a_case_of_nothing_but_zeros_is_left_out_and_named(folder, where):
    save(folder, "empty", np.zeros((3, 4, 6, 5), np.float32))
    bank = opened(case_files(folder, ["empty", "large"]), where)
    assert bank.names == ["large"] and bank.left_out == ["empty"] and len(bank.shapes) == len(bank.series_present) == 1
    with pytest.raises(UserError, match="empty hold"):
        opened(case_files(folder, ["empty"]), where)


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_refused_with_the_remedy(folder, where, value):
    volume = np.ones((3, 4, 6, 5), np.float32)
    volume[1, 2, 3, 1] = value
    save(folder, "broken", volume)
    with pytest.raises(UserError, match=r"broken\.b2nd: holds NaN or infinite voxels"):
        opened(case_files(folder, ["large", "broken"]), where)


def test_a_file_that_was_cut_off_is_named_with_the_remedy(folder):
    path = folder / "large.b2nd"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"large\.b2nd: not a whole file .* preprocess again"):
        opened(case_files(folder))
