"""The fingerprint: what is missing is found however it is hidden, real series are left alone, and no case is read twice."""

import gzip
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from nnunet_folders import NnunetFolders
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from PIL import Image
from scipy.ndimage import shift

from nnunet_csm.errors import UserError
from nnunet_csm.figures.fingerprint import NUM_CASES_DRAWN, State, save_fingerprint_picture
from nnunet_csm.fingerprint import extraction
from nnunet_csm.fingerprint.command import findings, fingerprint_dataset, summary
from nnunet_csm.fingerprint.extraction import example_slices, extract
from nnunet_csm.fingerprint.measurement import measure, nonzero_box
from nnunet_csm.fingerprint.record import (
    PERCENTILES,
    Fingerprint,
    absent_series,
    as_nnunet_fingerprint,
    backgrounds,
    misaligned,
    num_present,
    num_with_series,
    problems,
    read_fingerprint,
    save_fingerprint,
    voxels_before,
)
from nnunet_csm.phantom import PhantomSpec, draw_subject
from nnunet_csm.raw.background import background
from nnunet_csm.raw.check import check_inputs

SERIES = ("FLAIR", "T1w", "T1ce")
SPEC = PhantomSpec(series=SERIES, shape=(16, 40, 36), spacing_mm=(6.0, 3.5, 4.0), seed=3)
NUM_CASES = 8
DATASET_JSON: dict[str, Any] = {
    "channel_names": {str(channel): name for channel, name in enumerate(SERIES)},
    "labels": {"background": 0, "tumour": 1},
    "numTraining": NUM_CASES,
    "file_ending": ".nii.gz",
}

Case = dict[str, np.ndarray]


def write_volume(path: Path, voxels: np.ndarray, spacing: Sequence[float] = SPEC.spacing_mm, origin: float = 0.0) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing([float(mm) for mm in spacing[::-1]])
    image.SetOrigin((origin, 0.0, 0.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path), useCompression=True)


def file_of(raw: Path, case: str, series: str, subset: str = "imagesTr") -> Path:
    return raw / subset / f"{case}_{SERIES.index(series):04d}.nii.gz"


@pytest.fixture(scope="module")
def subjects() -> dict[str, Case]:
    return {f"case_{i}": dict(draw_subject(SPEC, i).series) for i in range(NUM_CASES)}


@pytest.fixture
def raw(tmp_path: Path, subjects: dict[str, Case]) -> Path:
    folder = tmp_path / "Dataset021_Test"
    for case, series in subjects.items():
        for name, voxels in series.items():
            write_volume(file_of(folder, case, name), voxels)
    (folder / "dataset.json").write_text(json.dumps(DATASET_JSON))
    return folder


def fingerprint_of(raw: Path, **options: Any) -> Fingerprint:
    return extract(raw, DATASET_JSON, SERIES, raw.parent / "out" / "csm_fingerprint.json", **options)


def copies(fingerprint: Fingerprint) -> dict[str, tuple[str, ...]]:
    """Case to its series that are there as a copy of another one only."""
    absent = {
        case: {name: one.series[name].absent or "" for name in absent_series(fingerprint)[case]}
        for case, one in fingerprint.cases.items()
        if case in absent_series(fingerprint)
    }
    found = {case: tuple(name for name, why in of.items() if "copy of" in why) for case, of in absent.items()}
    return {case: names for case, names in found.items() if names}


# --- what is missing ---------------------------------------------------------------------------------------------------------


def test_whole_cases_are_whole(raw: Path) -> None:
    fingerprint = fingerprint_of(raw)
    assert problems(fingerprint) == []
    assert absent_series(fingerprint) == {} and copies(fingerprint) == {} and misaligned(fingerprint) == {}
    assert num_with_series(fingerprint) == dict.fromkeys(SERIES, NUM_CASES)
    assert num_present(fingerprint, "imagesTr") == Counter({3: NUM_CASES})


def eight_bit(voxels: np.ndarray) -> np.ndarray:
    """Brightened, clipped and rounded, as pictures of a series are; background stays 0."""
    top = np.percentile(voxels[voxels > 0], 98)
    return np.where(voxels > 0, np.rint(1 + 254 * np.clip(voxels / top, 0, 1) ** 0.8), 0).astype(np.uint8)


def noisy(voxels: np.ndarray) -> np.ndarray:
    noise = 0.005 * voxels.std() * np.random.default_rng(0).standard_normal(voxels.shape)
    return np.where(voxels > 0, 3 * voxels + noise + 7, 0).astype(np.float32)


MISSING = {"case_1": ("T1ce",), "case_4": ("T1w", "T1ce"), "case_6": ("T1ce",)}


@pytest.mark.parametrize("fill", [np.zeros_like, np.copy, eight_bit, noisy])
def test_missing_series_are_the_same_however_they_were_filled(
    raw: Path, subjects: dict[str, Case], fill: Callable[[np.ndarray], np.ndarray]
) -> None:
    for case, names in MISSING.items():
        for name in names:
            write_volume(file_of(raw, case, name), fill(subjects[case]["FLAIR"]))
    fingerprint = fingerprint_of(raw)
    assert absent_series(fingerprint) == MISSING
    assert num_with_series(fingerprint) == {"FLAIR": NUM_CASES, "T1w": NUM_CASES - 1, "T1ce": NUM_CASES - 3}
    assert copies(fingerprint) == ({} if fill is np.zeros_like else MISSING)
    reasons = {fingerprint.cases[case].series[name].absent for case, names in MISSING.items() for name in names}
    expected = {np.zeros_like: "all zero", np.copy: "copy of FLAIR"}.get(fill, "almost a copy of FLAIR")
    assert reasons == {expected}


def test_the_original_is_what_the_image_looks_like_elsewhere_not_the_first(raw: Path, subjects: dict[str, Case]) -> None:
    filled = ("case_0", "case_3", "case_5")
    for case in filled:
        write_volume(file_of(raw, case, "FLAIR"), subjects[case]["T1ce"])
    assert copies(fingerprint_of(raw)) == dict.fromkeys(filled, ("FLAIR",))


def test_where_too_few_cases_tell_the_first_of_the_copies_stays(raw: Path, subjects: dict[str, Case]) -> None:
    for case, series in subjects.items():
        if case not in ("case_0", "case_1"):
            write_volume(file_of(raw, case, "T1w"), series["T1ce"])
    assert copies(fingerprint_of(raw)) == {case: ("T1ce",) for case in subjects if case not in ("case_0", "case_1")}


def test_of_copies_exactly_one_stays(raw: Path, subjects: dict[str, Case]) -> None:
    for name in SERIES:
        write_volume(file_of(raw, "case_2", name), subjects["case_2"]["T1w"])
    fingerprint = fingerprint_of(raw)
    assert [record.absent is None for record in fingerprint.cases["case_2"].series.values()].count(True) == 1
    assert len(copies(fingerprint)["case_2"]) == 2


def test_constant_and_invalid_voxels(raw: Path, subjects: dict[str, Case]) -> None:
    write_volume(file_of(raw, "case_0", "T1w"), np.full(SPEC.shape, 7, dtype=np.float32))
    write_volume(file_of(raw, "case_1", "T1w"), (subjects["case_1"]["T1w"] > 0).astype(np.uint8))  # a mask is no image
    write_volume(file_of(raw, "case_2", "T1w"), np.full(SPEC.shape, np.nan, dtype=np.float32))
    spoiled = subjects["case_3"]["T1w"].copy()
    spoiled[8, 20, 10:13] = np.nan, np.inf, -np.inf
    write_volume(file_of(raw, "case_3", "T1w"), spoiled)
    fingerprint = fingerprint_of(raw)
    records = {case: fingerprint.cases[case].series["T1w"] for case in fingerprint.cases}
    assert [records[f"case_{i}"].absent for i in range(4)] == ["constant", "constant", "no finite voxel", None]
    assert records["case_3"].num_invalid == 3
    assert records["case_2"].num_invalid == np.prod(SPEC.shape)
    assert [line.split(":")[0] for line in problems(fingerprint)] == [f"case_{i}" for i in range(4)]
    row = summary(fingerprint).loc["T1w"]
    assert (row["present"], row["constant"], row["NaN"], row["all zero"]) == (NUM_CASES - 3, 2, 2, 0)


@pytest.mark.parametrize("ending", [".nrrd", ".mha", ".nii.gz"])
def test_invalid_voxels_are_counted_whatever_the_reader_makes_of_them(tmp_path: Path, ending: str) -> None:
    spoiled = np.random.default_rng(0).random((4, 9, 8), dtype=np.float32)
    spoiled[2, 3, :4] = np.nan
    write_volume(tmp_path / "imagesTr" / f"a_0000{ending}", spoiled)
    fingerprint = extract(tmp_path, {**DATASET_JSON, "file_ending": ending}, ("FLAIR",), tmp_path / "out" / "f.json")
    record = fingerprint.cases["a"].series["FLAIR"]
    assert (record.absent, record.num_invalid) == (None, 4)


def test_intensities_are_of_voxels_that_are_not_zero(raw: Path, subjects: dict[str, Case]) -> None:
    record = fingerprint_of(raw).cases["case_0"].series["T1ce"]
    values = subjects["case_0"]["T1ce"][subjects["case_0"]["T1ce"] != 0]
    assert record.intensities is not None
    np.testing.assert_allclose(record.intensities.percentiles, np.percentile(values, PERCENTILES), rtol=1e-5)
    np.testing.assert_allclose((record.intensities.mean, record.intensities.sd), (values.mean(), values.std()), rtol=1e-4)
    assert record.foreground == pytest.approx(values.size / np.prod(SPEC.shape), rel=1e-5)


# --- geometry ----------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_the_box_is_that_of_nnunet(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    density = data.draw(st.sampled_from([0.0, 0.02, 0.1, 0.5]))
    volumes = (rng.random((2, *shape)) < density).astype(np.float32)
    cropped, _, _ = crop_to_nonzero(volumes)
    assert volumes[0][nonzero_box(list(volumes))].shape == cropped.shape[1:]


@pytest.mark.parametrize("voxels", [(0, 2, 0), (1, 0, 0), (0, -1, 2)])
def test_a_shifted_series_is_named_with_how_far(raw: Path, subjects: dict[str, Case], voxels: tuple[int, int, int]) -> None:
    write_volume(file_of(raw, "case_5", "T1w"), np.roll(subjects["case_5"]["T1w"], voxels, axis=(0, 1, 2)))
    fingerprint = fingerprint_of(raw)
    found = misaligned(fingerprint)
    assert {case: list(of) for case, of in found.items()} == {"case_5": ["T1w"]}
    np.testing.assert_allclose(found["case_5"]["T1w"], np.multiply(voxels, SPEC.spacing_mm), atol=1.5)
    assert any("T1w lies" in line for line in problems(fingerprint))
    assert absent_series(fingerprint) == {}


def test_of_two_series_that_disagree_the_later_is_named(raw: Path, subjects: dict[str, Case]) -> None:
    write_volume(file_of(raw, "case_0", "T1ce"), np.zeros(SPEC.shape, np.float32))
    write_volume(file_of(raw, "case_0", "FLAIR"), np.roll(subjects["case_0"]["FLAIR"], 2, axis=1))
    assert list(misaligned(fingerprint_of(raw))["case_0"]) == ["T1w"]


@pytest.mark.parametrize(("slices", "named"), [(0.25, False), (-0.35, False), (0.75, True), (-0.75, True)])
def test_less_than_half_a_slice_is_no_shift(raw: Path, subjects: dict[str, Case], slices: float, named: bool) -> None:
    thick = (12.0, *SPEC.spacing_mm[1:])  # by a quarter of a slice, 3 mm
    for series, voxels in subjects["case_5"].items():
        by = slices if series == "T1w" else 0
        write_volume(file_of(raw, "case_5", series), shift(voxels, (by, 0, 0), order=1), thick)
    assert (list(misaligned(fingerprint_of(raw)).get("case_5", {})) == ["T1w"]) == named


@pytest.mark.parametrize(("edge", "named"), [(6.0, True), (10.0, True), (14.0, False)])
def test_half_a_voxel_is_one_of_the_coarser_grid_before_conversion(
    raw: Path, subjects: dict[str, Case], edge: float, named: bool
) -> None:
    write_volume(file_of(raw, "case_5", "T1w"), np.roll(subjects["case_5"]["T1w"], 1, axis=0))  # 6 mm
    # acquired sagittally: its slices are the columns of the file
    sagittal = {"size": [20, 40, 36], "spacing": [3.5, edge, 4.0], "origin": [0, 0, 0], "direction": [0, 0, 1, 1, 0, 0, 0, 1, 0]}
    after = {"direction": [1, 0, 0, 0, 1, 0, 0, 0, 1]}
    entry = {"after": after, "series": {"T1w": {"before": sagittal}, "FLAIR": {"done": "zeros: series missing"}}}
    (raw / "csm_manifest.json").write_text(json.dumps({"cases": {"case_5": entry}}))
    assert (list(misaligned(fingerprint_of(raw)).get("case_5", {})) == ["T1w"]) == named


@given(st.permutations((0, 1, 2)), st.lists(st.booleans(), min_size=3, max_size=3))
def test_voxels_before_are_told_along_the_axes_of_the_file(order: list[int], flipped: list[bool]) -> None:
    edges = np.array([1.0, 2.0, 3.0])  # along x, y, z of the world
    signs = np.where(flipped, -1.0, 1.0)
    before = {"spacing": edges[order].tolist(), "direction": (np.eye(3)[:, order] * signs).ravel().tolist()}
    tilt = sitk.Euler3DTransform((0, 0, 0), 0.1, -0.05, 0.08).GetMatrix()
    entry = {"after": {"direction": list(tilt)}, "series": {"T1w": {"before": before}, "T2w": {}}}
    assert voxels_before({"cases": {"a": entry}}, "a") == {"T1w": (3.0, 2.0, 1.0)}


@pytest.mark.parametrize("manifest", [{}, {"cases": []}, {"cases": {"a": {"after": {"direction": "x"}, "series": {}}}}])
def test_a_manifest_of_anything_tells_nothing(manifest: dict[str, Any]) -> None:
    assert voxels_before(manifest, "a") == {}


def test_a_header_less_than_half_a_slice_off_is_not_named(raw: Path, subjects: dict[str, Case]) -> None:
    for case, mm in (("case_0", 2.8), ("case_1", 3.2)):
        image = sitk.ReadImage(str(file_of(raw, case, "T1w")))
        image.SetOrigin((0.0, 0.0, mm))
        sitk.WriteImage(image, str(file_of(raw, case, "T1w")))
    lines = problems(fingerprint_of(raw))
    assert len(lines) == 1 and lines[0].startswith("case_1: the header of T1w puts it up to 3.2 mm")


# --- background ----------------------------------------------------------------------------------------------------------------


def test_a_background_other_than_0_is_named_with_the_remedy(raw: Path, subjects: dict[str, Case]) -> None:
    for case in ("case_1", "case_2"):
        voxels = subjects[case]["T1w"]
        z_scored = (voxels - voxels.mean()) / voxels.std()
        write_volume(file_of(raw, case, "T1w"), z_scored.astype(np.float32))
    fingerprint = fingerprint_of(raw)
    found = backgrounds(fingerprint)
    assert list(found) == ["T1w"] and list(found["T1w"]) == ["case_1", "case_2"]
    voxels = subjects["case_1"]["T1w"]
    assert found["T1w"]["case_1"] == pytest.approx(-voxels.mean() / voxels.std(), rel=1e-4)
    text = "\n".join(findings(fingerprint))
    assert "T1w has another background than 0 in 2 cases" in text and "--zero_background" in text


def test_tissue_and_air_are_no_background(raw: Path) -> None:
    assert backgrounds(fingerprint_of(raw)) == {}
    air = np.random.default_rng(0).integers(0, 3, 1000).tolist() + list(range(3, 256))
    assert background(np.percentile([value for value in air if value], PERCENTILES, method="nearest").tolist()) is None


# --- grids and files -----------------------------------------------------------------------------------------------------------


def test_grids_that_disagree(raw: Path, subjects: dict[str, Case]) -> None:
    write_volume(file_of(raw, "case_0", "T1w"), subjects["case_0"]["T1w"][:, :-4])
    write_volume(file_of(raw, "case_1", "T1w"), subjects["case_1"]["T1w"], spacing=(6.0, 3.5, 3.0))
    write_volume(file_of(raw, "case_2", "T1w"), subjects["case_2"]["T1w"], origin=20.0)
    write_volume(file_of(raw, "case_3", "T1w"), subjects["case_3"]["T1w"], origin=0.1)  # rounding of a header
    fingerprint = fingerprint_of(raw)
    lines = problems(fingerprint)
    assert ["shape" in lines[0], "spacing" in lines[1], "20.0 mm" in lines[2]] == [True] * 3 and len(lines) == 3
    # nnU-Net reads the third case as if its files overlapped, and refuses the first two
    assert [fingerprint.cases[f"case_{i}"].shape for i in range(4)] == [None, None, SPEC.shape, SPEC.shape]
    assert fingerprint.cases["case_0"].series["T1w"].shape == (16, 36, 36)


def test_the_grid_before_conversion_comes_from_the_manifest(raw: Path) -> None:
    before = {"size": [384, 380, 20], "spacing": [0.5, 0.6, 3.0]}
    manifest = {"cases": {"case_1": {"series": {"T1w": {"before": before, "source": "x.dcm"}, "T1ce": None}}, "case_2": []}}
    (raw / "csm_manifest.json").write_text(json.dumps(manifest))
    cases = fingerprint_of(raw).cases
    found = cases["case_1"].series["T1w"].before
    assert found is not None and (found.size, found.spacing) == ((20, 380, 384), (3.0, 0.6, 0.5))
    assert all(r.before is None for n, c in cases.items() for s, r in c.series.items() if (n, s) != ("case_1", "T1w"))


# --- files -------------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_four_dimensions(path: Path) -> None:
    volume = sitk.GetImageFromArray(np.ones(SPEC.shape, np.float32))
    sitk.WriteImage(sitk.JoinSeries([volume] * 2), str(path))


@pytest.mark.parametrize(
    "spoil",
    [
        truncate,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(gzip.compress(b"no image")),
        write_four_dimensions,
        Path.unlink,
    ],
    ids=["truncated", "empty", "no image", "4-D", "no file"],
)
@pytest.mark.parametrize("case", ["case_0", "case_4"])  # the first is the one a reader is chosen with
def test_a_broken_file_is_reported_and_the_rest_is_used(raw: Path, case: str, spoil: Callable[[Path], None]) -> None:
    spoil(file_of(raw, case, "FLAIR"))
    fingerprint = fingerprint_of(raw)
    assert absent_series(fingerprint) == {case: ("FLAIR",)}
    assert fingerprint.cases[case].shape is None
    assert len(problems(fingerprint)) == 1 and problems(fingerprint)[0].startswith(case)
    assert len(as_nnunet_fingerprint(fingerprint)["spacings"]) == NUM_CASES - 1
    with pytest.raises(UserError, match=f"case {case}.*FLAIR|case {case}.*_0000"):
        fingerprint_of(raw, strict=True)


def test_nothing_to_read(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="imagesTs: no image"):
        fingerprint_of(raw, subsets=("imagesTr", "imagesTs"))
    for path in (raw / "imagesTr").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of nnU-Net's readers"):
        fingerprint_of(raw)
    assert not (tmp_path / "out" / "csm_fingerprint.json").exists()


def test_test_images_are_cases_of_their_own_subset(raw: Path, subjects: dict[str, Case]) -> None:
    for name in SERIES:
        voxels = subjects["case_0"][name] if name == "FLAIR" else np.zeros(SPEC.shape, np.float32)
        write_volume(file_of(raw, "test_0", name, "imagesTs"), voxels)
    fingerprint = fingerprint_of(raw, subsets=("imagesTr", "imagesTs"))
    assert absent_series(fingerprint) == {"test_0": ("T1w", "T1ce")} == absent_series(fingerprint, "imagesTs")
    assert absent_series(fingerprint, "imagesTr") == {} and num_with_series(fingerprint)["T1w"] == NUM_CASES
    for name in SERIES:
        write_volume(file_of(raw, "case_0", name, "imagesTs"), subjects["case_0"][name])
    with pytest.raises(UserError, match=r"case_0 is in imagesTr and in imagesTs"):
        fingerprint_of(raw, subsets=("imagesTr", "imagesTs"))


def test_cases_that_dataset_json_lists(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSEWHERE", str(raw / "imagesTr"))
    listed = {"a": {"images": [f"$ELSEWHERE/case_3_{c:04d}.nii.gz" for c in range(3)], "label": "none"}}
    other = tmp_path / "Dataset022_Listed"
    other.mkdir()
    fingerprint = extract(other, {**DATASET_JSON, "dataset": listed}, SERIES, tmp_path / "listed.json")
    assert list(fingerprint.cases) == ["a"] and fingerprint.cases["a"].series["T1w"].absent is None


# --- streaming ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that are measured, in turn."""
    names: list[str] = []

    def counted(job: Any) -> Any:
        names.append(job.name)
        return measure(job)

    monkeypatch.setattr(extraction, "measure", counted)
    return names


def test_a_stopped_run_goes_on(raw: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(job: Any) -> Any:
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append(job.name)
        return measure(job)

    with monkeypatch.context() as patched:
        patched.setattr(extraction, "measure", stopped)
        with pytest.raises(KeyboardInterrupt):
            fingerprint_of(raw)
    output = raw.parent / "out" / "csm_fingerprint.json"
    partial = output.with_name("csm_fingerprint.jsonl.partial")
    assert not output.exists()
    partial.write_text(partial.read_text() + partial.read_text()[:500])  # killed while writing a line
    first = list(measured)
    interrupted = fingerprint_of(raw)
    assert sorted(measured) == [f"case_{i}" for i in range(NUM_CASES)] and measured[:3] == first
    assert not partial.exists()
    output.unlink()
    assert fingerprint_of(raw) == interrupted == read_fingerprint(output)


def test_only_changed_files_are_read_again(raw: Path, subjects: dict[str, Case], measured: list[str]) -> None:
    before = fingerprint_of(raw)
    measured.clear()
    assert fingerprint_of(raw) == before and measured == []
    write_volume(file_of(raw, "case_7", "T1ce"), subjects["case_7"]["FLAIR"])
    for name in SERIES:
        file_of(raw, "case_2", name).unlink()
    changed = fingerprint_of(raw)
    assert measured == ["case_7"]
    assert list(copies(changed)) == ["case_7"] and set(changed.cases) == set(before.cases) - {"case_2"}
    # what is a copy is decided anew, not carried over
    write_volume(file_of(raw, "case_7", "T1ce"), subjects["case_7"]["T1ce"])
    assert absent_series(fingerprint_of(raw)) == {}


def test_processes_change_nothing(raw: Path) -> None:
    alone = fingerprint_of(raw)
    (raw.parent / "out" / "csm_fingerprint.json").unlink()
    assert fingerprint_of(raw, num_processes=2) == alone
    assert list(alone.cases) == sorted(alone.cases)


def test_files_of_another_version_or_broken_ones_are_refused_and_made_again(raw: Path) -> None:
    output = raw.parent / "out" / "csm_fingerprint.json"
    fingerprint = fingerprint_of(raw)
    save_fingerprint(replace(fingerprint, version=0), output)
    with pytest.raises(UserError, match=r"version 0.*nnunet_csm fingerprint"):
        read_fingerprint(output)
    output.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_fingerprint(output)
    assert fingerprint_of(raw) == fingerprint == read_fingerprint(output)


# --- for nnU-Net and for people ----------------------------------------------------------------------------------------------


def test_the_form_of_nnunet_agrees_with_nnunet(raw: Path, subjects: dict[str, Case], tmp_path: Path) -> None:
    label = tmp_path / "label.nii.gz"
    files = [str(file_of(raw, "case_3", name)) for name in SERIES]
    # with all that is not 0 as foreground, nnU-Net measures the same voxels
    write_volume(label, (subjects["case_3"]["T1w"] != 0).astype(np.uint8))
    shape, spacing, _, statistics, relative = DatasetFingerprintExtractor.analyze_case(files, str(label), SimpleITKIO)
    for case in set(subjects) - {"case_3"}:
        for name in SERIES:
            file_of(raw, case, name).unlink()
    ours = as_nnunet_fingerprint(fingerprint_of(raw))
    assert ours["shapes_after_crop"] == [list(shape)] and ours["spacings"] == [list(spacing)]
    assert ours["median_relative_size_after_cropping"] == pytest.approx(relative)
    for channel, expected in enumerate(statistics):
        found = ours["foreground_intensity_properties_per_channel"][str(channel)]
        assert set(found) == {*expected, "std"}
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-3), key


def test_pooled_intensities_weigh_cases_equally(raw: Path, subjects: dict[str, Case]) -> None:
    channel = as_nnunet_fingerprint(fingerprint_of(raw))["foreground_intensity_properties_per_channel"]["1"]
    values = [case["T1w"][case["T1w"] != 0] for case in subjects.values()]
    pooled = np.sort(np.concatenate([np.random.default_rng(0).choice(of_case, 20_000) for of_case in values]))
    assert channel["mean"] == pytest.approx(pooled.mean(), rel=0.01) and channel["std"] == pytest.approx(pooled.std(), rel=0.02)
    for key, percentile in (("percentile_00_5", 0.5), ("median", 50), ("percentile_99_5", 99.5)):
        # distributions are kept in steps of 5 %, so that tails of the pool are straight between the tails of the cases
        assert 100 * np.searchsorted(pooled, channel[key]) / pooled.size == pytest.approx(percentile, abs=0.3), key
    ends = min(of_case.min() for of_case in values), max(of_case.max() for of_case in values)
    assert (channel["min"], channel["max"]) == pytest.approx(ends, rel=1e-5)


def test_a_series_that_no_case_has_still_gives_numbers(raw: Path, subjects: dict[str, Case]) -> None:
    for case in subjects:
        write_volume(file_of(raw, case, "T1w"), np.zeros(SPEC.shape, np.float32))
    ours = as_nnunet_fingerprint(fingerprint_of(raw))
    assert set(ours["foreground_intensity_properties_per_channel"]["1"].values()) == {0.0}


def test_the_command(raw: Path, nnunet_folders: NnunetFolders, capsys: pytest.CaptureFixture[str]) -> None:
    target = nnunet_folders.raw / raw.name
    raw.rename(target)
    write_volume(file_of(target, "case_6", "T1w"), np.zeros(SPEC.shape, np.float32))
    fingerprint_dataset("21")
    printed = capsys.readouterr().out
    assert "1 case incomplete:\n  case_6: no T1w (all zero)" in printed and "87.5%" in printed
    # what `plan` says above it of the same files must not contradict it
    said = check_inputs(target / "imagesTr", SERIES, ".nii.gz")[0]
    assert said.endswith("each with files of FLAIR, T1w, T1ce (all zero where it lacks the series)")
    folder = nnunet_folders.preprocessed / raw.name
    assert absent_series(read_fingerprint(folder / "csm_fingerprint.json")) == {"case_6": ("T1w",)}
    assert Image.open(folder / "csm_fingerprint.png").size[0] == 900


def test_the_picture_shows_the_case_whose_series_lies_furthest_off(
    raw: Path, subjects: dict[str, Case], nnunet_folders: NnunetFolders, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    raw.rename(nnunet_folders.raw / raw.name)
    raw = nnunet_folders.raw / raw.name
    for case, voxels in (("case_2", (2, 0)), ("case_5", (-1, 2))):
        write_volume(file_of(raw, case, "T1w"), np.roll(subjects[case]["T1w"], voxels, axis=(1, 2)))
    drawn: list[Any] = []
    monkeypatch.setattr("nnunet_csm.fingerprint.command.save_fingerprint_picture", lambda *args: drawn.append(args))
    fingerprint_dataset("21")
    _, _, _, states, slices, shown, _ = drawn[0]
    assert shown.startswith("case_5 (T1w 8") and "misaligned" in states["case_5"]
    assert f"csm_fingerprint.png, with {shown}" in capsys.readouterr().out
    box = nonzero_box([subjects["case_5"]["FLAIR"]])
    middle = (box[0].start + box[0].stop) // 2
    assert any(np.array_equal(slices["FLAIR"], subjects["case_5"]["FLAIR"][z]) for z in (middle - 1, middle, middle + 1))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_picture_shows_thick_slices_as_they_were_acquired(raw: Path, axis: int) -> None:
    """Slices that lie upright in the file, but go along z, y or x of the patient by its header."""
    voxels = np.random.default_rng(0).normal(size=(5, 24, 30)).astype(np.float32)
    direction = np.roll(np.eye(3), axis, axis=1)  # the columns are the axes x, y, z of the file
    for series in SERIES:
        image = sitk.GetImageFromArray(voxels)
        image.SetSpacing((1.0, 2.0, 9.0))
        image.SetDirection(direction.ravel().tolist())
        sitk.WriteImage(image, str(file_of(raw, "case_0", series)))
    slices, aspect = example_slices(raw, DATASET_JSON, fingerprint_of(raw), "case_0")
    shown = slices["FLAIR"]
    assert sorted(shown.shape) == [24, 30] and np.array_equal(np.sort(shown.ravel()), np.sort(voxels[2].ravel()))
    assert aspect == (2.0 if shown.shape == (24, 30) else 0.5)


@pytest.mark.parametrize("num_cases", [1, 30, NUM_CASES_DRAWN + 1])
def test_the_picture_shows_every_state(tmp_path: Path, num_cases: int) -> None:
    slices = {"FLAIR": np.eye(20, 30, dtype=np.float32)}

    def drawn(state: State) -> bytes:
        states: dict[str, tuple[State, ...]] = {
            f"case_{i}": (state if i == 0 else "present", "present") for i in range(num_cases)
        }
        save_fingerprint_picture(tmp_path / "a.png", "title", ("FLAIR", "T1w"), states, slices, "case_0")
        return np.asarray(Image.open(tmp_path / "a.png")).tobytes()

    states: tuple[State, ...] = ("present", "absent", "copy", "misaligned", "constant", "unusable")
    assert len({drawn(state) for state in states}) == len(states)
