"""Patches are slices of the stored volumes, the same from every bank; labels are never read; background is drawn less often."""

import inspect
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factories import SERIES
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_csm.data import bank as bank_module
from nnunet_csm.data import stored as stored_module
from nnunet_csm.data.bank import GpuBank, MappedBank, open_bank
from nnunet_csm.data.crops import BLOCK, Crops, Occupancy, cut, draw_crops, gather, occupied_blocks
from nnunet_csm.data.draws import Draws, What, ahead
from nnunet_csm.data.stored import FOLDER_VARIABLE, CaseFile, read
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
    return open_bank(files, CPU, where)


def gpu_bank(files):
    """On the CPU, where `open_bank` would not put it."""
    return GpuBank(read(files), CPU)


BANKS = {"gpu": gpu_bank, "mapped": opened}
every_bank = pytest.mark.parametrize("where", list(BANKS))


@pytest.fixture
def folder(tmp_path):
    return preprocessed(tmp_path)


def preprocessed(tmp_path):
    folder = tmp_path / "Dataset001_Phantom" / "nnUNetPlans_3d_fullres"
    folder.mkdir(parents=True)
    for name in SHAPES:
        save(folder, name, volume_of(name))
    return folder


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
    monkeypatch.setattr(Draws, "integers", lambda self, what, num, first=0: torch.full((1, num), 2**63 - 1))
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


def test_a_block_is_occupied_where_any_series_of_the_run_varies(folder):
    series = [island((24, 20, 17), low, high) for low, high in (((0, 0, 0), (8, 8, 8)), ((17, 9, 16), (24, 20, 17)))]
    one = occupied_blocks(series[0])
    assert one.shape == (3, 3, 3) and list(zip(*np.nonzero(one), strict=True)) == [(0, 0, 0)]
    # whatever the units, and rounding is no variation
    assert np.array_equal(occupied_blocks(1000 * series[0] + 1e-2 * np.sin(np.arange(17, dtype=np.float32))), one)
    save(folder, "islands", np.stack([*series, np.zeros_like(series[0])]))
    for channels, expected in (((0, 1, 2), {(0, 0, 0), (2, 1, 2), (2, 2, 2)}), ((2, 1), {(2, 1, 2), (2, 2, 2)})):
        (case,) = read(case_files(folder, ["islands"], channels=channels)).cases
        assert set(zip(*np.nonzero(case.occupied), strict=True)) == expected


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
def test_both_banks_give_the_same_patches_for_the_same_draws(banks, patch_size, seed):
    results = []
    for bank in banks:
        draws = Draws(seed, torch.arange(9))
        chosen = draws.integers(What.CASE, 1)[:, 0] % len(bank)
        crops = draw_crops(draws, bank.shapes[chosen], patch_size, bank.occupancy[chosen])
        results.append(bank.cut(chosen, crops, patch_size))
    assert results[0].any() and results[0].equal(results[1])


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    files = case_files(preprocessed(tmp_path_factory.mktemp("cases")))
    return [make(files) for make in BANKS.values()]


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
    bank = opened(case_files(folder))
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


def test_threads_cut_the_same_patches(folder):
    bank = opened(case_files(folder))

    def batches(num_threads):
        def make(seed):
            draws = Draws(seed, torch.arange(5))
            chosen = draws.integers(What.CASE, 1)[:, 0] % len(bank)
            return bank.cut(chosen, draw_crops(draws, bank.shapes[chosen], PATCH_SIZE), PATCH_SIZE)

        return list(ahead(make, range(40), num_threads, CPU))

    for threaded, alone in zip(batches(4), batches(0), strict=True):
        assert threaded.equal(alone)


# --- stored files ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Names of the cases that are decoded, in order."""
    names, inner = [], stored_module._decode

    def decode(file):
        names.append(file.name)
        return inner(file)

    monkeypatch.setattr(stored_module, "_decode", decode)
    return names


def whole_patches(bank):
    """A patch from the first corner of every case, larger than all of them."""
    start = torch.zeros(len(bank), 3, dtype=torch.long)
    return bank.cut(torch.arange(len(bank)), Crops(start, start.bool()), (10, 10, 10))


def test_a_case_is_decoded_once_for_all_folds_and_parts_of_the_series(folder, decoded):
    first = opened(case_files(folder, ["large"]))
    again = opened(case_files(folder, channels=(2, None)))
    assert sorted(decoded) == sorted(SHAPES)
    assert whole_patches(again)[0, 0].equal(whole_patches(first)[0, 2])
    stored = folder.with_name("nnUNetPlans_3d_fullres_csm")
    assert {file.name for file in stored.iterdir()} == {".writing", *(f"{name}.pt" for name in SHAPES)}
    assert str(stored) in again.reason and "0.0 GiB" in again.reason


def test_files_go_where_the_variable_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "scratch"))
    opened(case_files(folder))
    assert len(list((tmp_path / "scratch" / "Dataset001_Phantom" / "nnUNetPlans_3d_fullres_csm").glob("*.pt"))) == 3
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@every_bank
def test_a_case_that_was_preprocessed_again_is_read_again_and_no_other(folder, where, decoded):
    before = whole_patches(BANKS[where](case_files(folder)))
    decoded.clear()
    # of the same size and name, as after another normalisation
    path = folder / "large.b2nd"
    num_bytes = path.stat().st_size
    path.unlink()
    save(folder, "large", volume_of("large")[[2, 1, 0]])
    after = whole_patches(BANKS[where](case_files(folder)))
    assert decoded == ["large"] and abs(path.stat().st_size - num_bytes) < 100
    assert after[0].equal(before[0][[2, 1, 0]]) and after[1:].equal(before[1:])


def test_a_file_that_was_preprocessed_again_is_noticed_by_its_time_or_its_size_alone(folder, decoded):
    opened(case_files(folder, ["large"]))
    path = folder / "large.b2nd"
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    opened(case_files(folder, ["large"]))
    path.write_bytes(path.read_bytes() + b" ")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    opened(case_files(folder, ["large"]))
    assert decoded == ["large"] * 3


@pytest.mark.parametrize("name", ["FORMAT", "BLOCK", "MIN_SPAN"])
def test_files_of_other_code_are_not_used(folder, decoded, monkeypatch, name):
    opened(case_files(folder, ["large"]))
    monkeypatch.setattr(stored_module, name, 2 * getattr(stored_module, name))
    opened(case_files(folder, ["large"]))
    assert decoded == ["large"] * 2


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_stored_file_that_is_not_whole_is_written_again(folder, share):
    """As a disk may leave behind that failed."""
    (file,) = case_files(folder, ["large"])
    expected = whole_patches(opened([file])).clone()
    raw = file.stored.read_bytes()
    file.stored.write_bytes(raw[: int(share * len(raw))])
    assert whole_patches(opened([file])).equal(expected)
    assert len(file.stored.read_bytes()) == len(raw)


WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from nnunet_csm.data import bank, stored

folder, names, killed = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3] == "killed"
if killed:
    def save(stored, out):
        out.write(b"half of a file")
        out.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    torch.save = save
print("ready", flush=True)
sys.stdin.readline()
opened = bank.open_bank([stored.CaseFile(n, folder / f"{n}.b2nd", 3, (0, 1, 2)) for n in names], torch.device("cpu"))
print(sum(int(volume.sum() * 1000) for volumes in opened.volumes for volume in volumes if volume is not None))
"""


def start_writer(folder, names, how="to the end"):
    command = [sys.executable, "-c", WRITER, str(folder), ",".join(names), how]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_processes_that_start_at_once_are_all_right(folder):
    """Folds that share cases, one of which is stored from before."""
    opened(case_files(folder, ["equal"]))
    names = ["large", "small", "equal"]
    writers = [start_writer(folder, names[::order]) for order in (1, -1, 1)]
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    sums = {writer.communicate()[0].splitlines()[-1] for writer in writers}
    assert len(sums) == 1 and all(writer.returncode == 0 for writer in writers)
    assert sums == {
        str(sum(int(v.sum() * 1000) for vs in opened(case_files(folder, names)).volumes for v in vs if v is not None))
    }


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_read(folder, decoded):
    writer = start_writer(folder, SHAPES, "killed")
    writer.communicate("\n")
    assert writer.returncode == -signal.SIGKILL
    files = case_files(folder)
    assert not any(file.stored.exists() for file in files)
    # nor does its lock keep others out
    patches = whole_patches(opened(files))
    assert sorted(decoded) == sorted(SHAPES)
    for patch, name in zip(patches, SHAPES, strict=True):
        assert np.array_equal(patch, half(sliced(volume_of(name), (0, 0, 0), (False,) * 3, (10, 10, 10))))


# --- where -------------------------------------------------------------------------------------------------------------------


def test_a_bank_that_was_asked_for_and_is_not_there_is_an_error_with_the_remedy(folder):
    assert isinstance(opened(case_files(folder), "mapped"), MappedBank)
    with pytest.raises(UserError, match="nnUNet_csm_bank is gpu, but the network is on cpu; choose"):
        opened(case_files(folder), "gpu")
    for old in ("memory", "disk", "ram"):
        with pytest.raises(UserError, match=f"nnUNet_csm_bank is '{old}'; choose auto, gpu or mapped .*memory and disk"):
            opened(case_files(folder), old)


@pytest.mark.parametrize(
    ("where", "free", "chosen", "said"),
    [
        ("auto", 2.0, "gpu", "as they take no more than 50%"),
        ("auto", 1.9, "mapped", "more than 50% of .* beside a step of .*; mapped into memory"),
        ("gpu", 1.2, "gpu", "no more than 90%"),
        ("mapped", 9.0, "mapped", r"GiB\); mapped into memory"),
    ],
)
def test_the_gpu_is_chosen_when_the_images_take_a_share_of_what_a_step_leaves(folder, monkeypatch, where, free, chosen, said):
    bank = on_a_gpu(case_files(folder), monkeypatch, where, free)
    assert bank.where == chosen and re.search(said, bank.reason)


def test_a_gpu_that_is_too_small_is_an_error_with_sizes_and_the_remedy(folder, monkeypatch):
    with pytest.raises(UserError, match=r"_csm_bank is gpu: .* GiB .* do not fit into 90% of .*; choose mapped or auto"):
        on_a_gpu(case_files(folder), monkeypatch, "gpu", 1.1)


def on_a_gpu(files, monkeypatch, where, free):
    """A bank for a GPU on which `free` times the images' size is left beside a step; volumes stay on the CPU."""
    reserved, size = 10**6, read(files).num_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * size) + reserved, 0))
    monkeypatch.setattr(bank_module, "GpuBank", lambda contents, device, reason: GpuBank(contents, CPU, reason))
    monkeypatch.setattr(bank_module, "_pinned", lambda device, reason: (False, reason))
    return open_bank(files, torch.device("cuda"), where, reserved=reserved)


def test_a_disk_without_room_is_said_before_anything_is_decoded(folder, decoded, monkeypatch):
    monkeypatch.setattr(stored_module.shutil, "disk_usage", lambda folder: SimpleNamespace(free=stored_module.SPARE))
    with pytest.raises(UserError, match=r"_csm: 0\.0 GiB of images are to be stored .* 1\.0 GiB are left; set nnUNet_csm_images"):
        opened(case_files(folder))
    assert not decoded


def test_a_folder_that_cannot_be_written_is_an_error_with_the_remedy_unless_all_is_there(folder, monkeypatch):
    def refused(**_):
        raise PermissionError(13, "Permission denied")

    opened(case_files(folder, ["large"]))
    monkeypatch.setattr(stored_module.tempfile, "TemporaryFile", refused)
    assert len(opened(case_files(folder, ["large"]))) == 1
    with pytest.raises(UserError, match=r"_csm: images cannot be stored there .*Permission denied.* set nnUNet_csm_images"):
        opened(case_files(folder))


# --- bad files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True])
def test_what_is_wrong_with_files_is_said_with_the_remedy(folder, stored):
    if stored:
        opened(case_files(folder))
    with pytest.raises(UserError, match=r"large\.b2nd: 3 series, expected 2 as in the plans"):
        opened(case_files(folder, num_channels=2))
    with pytest.raises(UserError, match=r"gone\.b2nd.*nnunet_csm plan_and_preprocess -preprocess_only"):
        opened(case_files(folder, ["large", "gone"]))
    with pytest.raises(UserError, match="no case"):
        opened([])


def test_a_case_whose_preprocessed_file_is_gone_is_not_taken_from_what_was_stored(folder):
    opened(case_files(folder))
    (folder / "large.b2nd").unlink()
    with pytest.raises(UserError, match=r"large\.b2nd: not preprocessed"):
        opened(case_files(folder))


def test_a_case_of_nothing_but_zeros_is_left_out_and_named(folder):
    save(folder, "empty", np.zeros((3, 4, 6, 5), np.float32))
    for _ in range(2):
        bank = opened(case_files(folder, ["empty", "large"]))
        assert bank.names == ["large"] and bank.left_out == ["empty"] and len(bank.shapes) == len(bank.series_present) == 1
        with pytest.raises(UserError, match="empty hold"):
            opened(case_files(folder, ["empty"]))
    # of which the run has no series at all
    bank = opened([*case_files(folder, ["small"], channels=(None,)), *case_files(folder, ["large"], channels=(0,))])
    assert bank.names == ["large"] and bank.left_out == ["small"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers_are_refused_with_the_remedy_in_series_of_the_run(folder, value):
    volume = np.ones((3, 4, 6, 5), np.float32)
    volume[1, 2, 3, 1] = value
    save(folder, "broken", volume)
    for _ in range(2):
        with pytest.raises(UserError, match=r"broken\.b2nd: holds NaN or infinite voxels"):
            opened(case_files(folder, ["large", "broken"]))
    assert opened(case_files(folder, ["large", "broken"], channels=(0, 2))).series_present.all()


def test_a_file_that_was_cut_off_is_named_with_the_remedy(folder):
    path = folder / "large.b2nd"
    for _ in range(2):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(UserError, match=r"large\.b2nd: not a whole file .* preprocess again"):
            opened(case_files(folder))
        path.unlink()
        save(folder, "large", volume_of("large"))
        opened(case_files(folder))


def test_a_file_whose_voxels_cannot_be_decoded_is_named(folder):
    path = folder / "large.b2nd"
    data = bytearray(path.read_bytes())
    data[len(data) // 4 : len(data) // 2] = bytes(len(data) // 2 - len(data) // 4)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"large\.b2nd: cannot be decoded.*preprocess again"):
        opened(case_files(folder))
