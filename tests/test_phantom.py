"""Properties of the synthetic subjects: seeding, physics of the series, contrast of the lesion parts, and the written task."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_csm.errors import UserError
from nnunet_csm.phantom.anatomy import GLIOMA, LABELS, draw_anatomy, label_map, smooth_field, tissue_fractions
from nnunet_csm.phantom.subject import PhantomSpec, Subject, add_rician_noise, draw_subject
from nnunet_csm.phantom.task import write_task
from nnunet_csm.phantom.tissues import ACQUISITIONS, CLASSES, CORES, TISSUES, signal

ALL_SERIES = tuple(ACQUISITIONS)
SMALL = PhantomSpec(shape=(14, 24, 20), spacing_mm=(9.0, 6.5, 8.0))
NUM_SUBJECTS = 8


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    return [draw_subject(PhantomSpec(series=ALL_SERIES), index) for index in range(NUM_SUBJECTS)]


def same(first: Subject, second: Subject, names: tuple[str, ...]) -> bool:
    return np.array_equal(first.labels, second.labels) and all(
        np.array_equal(first.series[name], second.series[name]) for name in names
    )


def test_subject_depends_on_seed_and_index_only():
    forwards = [draw_subject(SMALL, index) for index in (0, 1, 2)]
    assert same(draw_subject(SMALL, 2), forwards[2], SMALL.series)
    assert not same(forwards[0], forwards[1], SMALL.series)
    assert not same(forwards[0], draw_subject(replace(SMALL, seed=1), 0), SMALL.series)


def test_a_seed_gives_the_images_it_always_gave():
    subject = draw_subject(replace(SMALL, series=ALL_SERIES, diagnoses=True, seed=5), 1)
    means = {"T1w": 263.0637, "T1ce": 284.5698, "T2w": 124.1247, "FLAIR": 188.7167, "DWI": 200.8423, "ADC": 332.0193}
    # sums differ in the last digits between processors
    assert {name: volume.mean(dtype=float) for name, volume in subject.series.items()} == pytest.approx(means, rel=1e-5)
    assert np.bincount(subject.labels.ravel()).tolist() == [6593, 81, 37, 9] and subject.diagnosis == "benign"


def test_series_does_not_depend_on_the_others_asked_for():
    alone = draw_subject(replace(SMALL, series=("T2w",)), 3)
    assert same(alone, draw_subject(SMALL, 3), ("T2w",))


@pytest.mark.parametrize("shape", [(8, 8, 8), (9, 31, 16), (40, 20, 33)])
def test_any_shape(shape):
    subject = draw_subject(PhantomSpec(series=ALL_SERIES, shape=shape, spacing_mm=(3.0, 2.0, 1.0)), 0)
    for volume in subject.series.values():
        assert volume.shape == shape and volume.dtype == np.float32 and np.isfinite(volume).all()
    assert subject.labels.shape == shape and subject.labels.dtype == np.uint8


def test_zero_is_background_and_nothing_else(subjects):
    for subject in subjects:
        assert 0.15 < subject.brain.mean() < 0.5
        assert not subject.labels[~subject.brain].any()
        for volume in subject.series.values():
            assert np.array_equal(volume != 0, subject.brain)


def test_absent_series_are_zero_and_one_remains():
    spec = replace(SMALL, missing_share=0.6)
    drawn = [draw_subject(spec, index) for index in range(25)]
    for subject in drawn:
        assert any(subject.present.values())
        for name in spec.series:
            assert subject.series[name].any() == subject.present[name]
    share = 1 - np.mean([list(subject.present.values()) for subject in drawn])
    assert 0.35 < share < 0.75
    assert all(draw_subject(SMALL, index).present[name] for index in range(3) for name in SMALL.series)
    assert sum(draw_subject(replace(SMALL, missing_share=1.0), 0).present.values()) == 1


def test_fractions_sum_to_one_and_restricted_tumour_needs_diffusion():
    rng = np.random.default_rng(5)
    anatomy = draw_anatomy(rng, enhancing_share=1.0)
    without, ventricles, brain = tissue_fractions(anatomy, (20, 24, 28), restricted_focus=False)
    with_focus, _, _ = tissue_fractions(anatomy, (20, 24, 28), restricted_focus=True)
    np.testing.assert_allclose(without.sum(0), 1, atol=1e-5)
    restricted = list(TISSUES).index("restricted")
    assert without.min() >= 0 and not without[restricted].any() and with_focus[restricted].any()
    labels = [label_map(fractions, ventricles, GLIOMA)[brain] for fractions in (with_focus, without)]
    assert np.array_equal(*labels)


def test_ventricles_are_told_by_their_place_and_leave_the_rest_alone():
    """In each series other fluid within the brain is as bright as theirs, and nothing but the labels is another."""
    spec = replace(PhantomSpec(), ventricles=True, bias=0.0)
    for index in range(4):
        subject, plain = draw_subject(spec, index), draw_subject(replace(spec, ventricles=False), index)
        assert same(subject, replace(plain, labels=subject.labels), spec.series)
        ventricles = subject.labels == list(spec.labelled).index("ventricles") + 1
        core = subject.labels == list(spec.labelled).index("tumour core") + 1
        # (a rim and a core of less than half of a voxel each are a core of more)
        assert core[plain.labels >= 2].all() and not ventricles[plain.labels > 0].any()
        # near the middle from left to right
        assert ventricles.sum() > 100 and np.abs(np.nonzero(ventricles)[2] / spec.shape[2] - 0.5).max() < 0.25
        rng = np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=(index,)))
        rng.random(len(ACQUISITIONS)), rng.standard_normal()
        fractions, _, brain = tissue_fractions(draw_anatomy(rng, spec.enhancing_share), spec.shape, restricted_focus=False)
        fluid = (fractions[list(TISSUES).index("CSF")] > 0.7) & brain
        assert (fluid & ~ventricles).sum() > 100
        for volume in subject.series.values():
            means = [volume[fluid & where].mean() for where in (ventricles, ~ventricles)]
            spread = volume[fluid & ~ventricles].std()
            assert abs(means[0] - means[1]) < 2 * spread


def test_smooth_field_is_standard_normal_in_each_voxel():
    rng = np.random.default_rng(0)
    values = np.stack([smooth_field(rng.standard_normal((6, 6, 6)), (3, 4, 5)) for _ in range(2000)])
    np.testing.assert_allclose(values.mean(0), 0, atol=0.12)
    np.testing.assert_allclose(values.std(0), 1, atol=0.12)


def test_signal_orders_contrasts_as_in_mri():
    value = {name: {tissue: signal(ACQUISITIONS[name], TISSUES[tissue], 0.0) for tissue in TISSUES} for name in ALL_SERIES}
    assert abs(value["FLAIR"]["CSF"]) < 1e-9
    assert value["T1w"]["white matter"] > value["T1w"]["grey matter"] > value["T1w"]["CSF"]
    assert value["T2w"]["CSF"] > 2 * value["T2w"]["grey matter"] > 2 * value["T2w"]["white matter"]
    assert value["DWI"]["restricted"] > value["DWI"]["white matter"] > value["DWI"]["CSF"]
    assert value["ADC"]["CSF"] == TISSUES["CSF"].adc
    # What one series cannot tell apart, another can.
    assert value["T1w"]["oedema"] == pytest.approx(value["T1w"]["white matter"], rel=0.05)
    assert value["FLAIR"]["oedema"] > 1.5 * value["FLAIR"]["grey matter"]
    assert value["FLAIR"]["core"] == pytest.approx(value["FLAIR"]["oedema"], rel=0.1)
    assert value["T2w"]["core"] > 1.3 * value["T2w"]["oedema"]
    for name in ALL_SERIES:
        assert (value[name]["enhancing"] > 1.5 * value[name]["oedema"]) == (name == "T1ce")
        assert (value[name]["restricted"] == value[name]["oedema"]) == (name not in ("DWI", "ADC"))


def test_dwi_falls_with_adc_and_contrast_needs_uptake():
    water = np.linspace(-0.1, 0.1, 5)
    dwi = [signal(ACQUISITIONS["DWI"], replace(TISSUES["oedema"], adc=adc), 0.0) for adc in (500, 1000, 2000, 3000)]
    assert all(np.diff(dwi) < 0)
    assert dwi[1] / dwi[2] == pytest.approx(math.e)  # b is 1000 s/mm2
    for tissue in TISSUES.values():
        before = signal(ACQUISITIONS["T1w"], tissue, water)
        after = signal(ACQUISITIONS["T1ce"], tissue, water)
        assert np.array_equal(before, after) if tissue.uptake_mmol_l == 0 else (after > before).all()


def test_rician_noise_has_rayleigh_mean_without_signal():
    noisy = add_rician_noise(np.zeros((40, 50, 60), dtype=np.float32), 7.0, np.random.default_rng(0))
    assert noisy.mean() == pytest.approx(7 * math.sqrt(math.pi / 2), rel=0.01)
    strong = add_rician_noise(np.full((40, 50, 60), 200, dtype=np.float32), 7.0, np.random.default_rng(0))
    assert strong.std() == pytest.approx(7, rel=0.02)


def contrast_to_noise(subject: Subject, name: str, inside: np.ndarray, outside: np.ndarray) -> float:
    values = subject.series[name]
    return abs(values[inside].mean() - values[outside].mean()) / values[outside].std()


def test_lesion_parts_show_in_their_series(subjects):
    enhancing, oedema, core = [], [], []
    for subject in subjects:
        healthy = subject.brain & (subject.labels == 0)
        part = {label: subject.labels == LABELS[label] for label in LABELS}
        oedema.append([contrast_to_noise(subject, name, part["edema"], healthy) for name in ("FLAIR", "T1w")])
        core.append([contrast_to_noise(subject, name, part["non-enhancing tumor"], part["edema"]) for name in ("T2w", "FLAIR")])
        if part["enhancing tumor"].any():
            enhancing.append(
                [contrast_to_noise(subject, name, part["enhancing tumor"], part["edema"]) for name in ("T1ce", "T1w")]
            )
    assert len(enhancing) >= NUM_SUBJECTS // 2
    for strong, weak in (np.mean(enhancing, 0), np.mean(oedema, 0), np.mean(core, 0)):
        assert strong > 1.5 and strong > 2 * weak


def test_tissue_predicts_a_series_better_than_another_series_does():
    """A voxel-wise straight line between two series is a mediocre predictor, a line in the tissue fractions a good one."""
    spec = replace(PhantomSpec(), bias=0.0)
    subject = draw_subject(spec, 0)
    rng = np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=(0,)))
    rng.random(len(ACQUISITIONS)), rng.standard_normal()
    fractions, _, _ = tissue_fractions(draw_anatomy(rng, spec.enhancing_share), spec.shape, restricted_focus=False)

    def explained(target: np.ndarray, predictors: np.ndarray) -> float:
        design = np.concatenate([predictors, np.ones((1, target.size))]).T
        residual = target - design @ np.linalg.lstsq(design, target)[0]
        return 1 - residual.var() / target.var()

    values = {name: volume[subject.brain] for name, volume in subject.series.items()}
    for target, other in (("FLAIR", "T1w"), ("T2w", "FLAIR"), ("T1w", "FLAIR")):
        by_tissue = explained(values[target], fractions[:, subject.brain])
        by_series = explained(values[target], values[other][None])
        assert by_tissue > 0.6 and by_series < 0.5 and by_tissue > by_series + 0.25, (target, by_tissue, by_series)


def test_written_task_round_trips(tmp_path):
    spec = replace(SMALL, missing_share=0.3)
    task = write_task(spec, tmp_path / "msd", num_training=3, num_test=2, task_id=901)
    assert task == tmp_path / "msd" / "Task901_Phantom"
    assert [path.name for path in task.parent.iterdir()] == [task.name]  # nothing temporary is left

    description = json.loads((task / "dataset.json").read_text())
    assert description["modality"] == {"0": "FLAIR", "1": "T1w", "2": "T1ce", "3": "T2w"}
    assert description["labels"] == {str(value): label for label, value in LABELS.items()}
    assert (description["numTraining"], description["numTest"]) == (3, 2)
    pairs = [(entry["image"], entry["label"]) for entry in description["training"]]
    pairs += [(image, image.replace("images", "labels")) for image in description["test"]]
    with (task / "cases.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["split"] for row in rows] == ["Tr"] * 3 + ["Ts"] * 2

    for index, ((image_path, label_path), row) in enumerate(zip(pairs, rows, strict=True)):
        subject = draw_subject(spec, index)
        image, label = sitk.ReadImage(str(task / image_path)), sitk.ReadImage(str(task / label_path))
        assert image.GetSize() == (20, 24, 14, 4) and label.GetSize() == (20, 24, 14)
        assert image.GetSpacing()[:3] == label.GetSpacing() == (8.0, 6.5, 9.0)
        assert np.array_equal(sitk.GetArrayFromImage(label), subject.labels)
        stored = sitk.GetArrayFromImage(image)
        for channel, name in enumerate(spec.series):
            np.testing.assert_allclose(stored[channel], subject.series[name], atol=0.5)
            assert np.array_equal(stored[channel] != 0, subject.series[name] != 0)
            assert row[name] == str(int(subject.present[name]))


def test_task_is_never_overwritten_nor_half_written(tmp_path, monkeypatch):
    write_task(SMALL, tmp_path, num_training=1, num_test=0)
    with pytest.raises(UserError, match="exists"):
        write_task(SMALL, tmp_path, num_training=1, num_test=0)
    with pytest.raises(UserError, match="letters and digits"):
        write_task(SMALL, tmp_path, num_training=1, num_test=0, name="two_words")

    monkeypatch.setattr("nnunet_csm.phantom.subject.label_map", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_task(SMALL, tmp_path, num_training=1, num_test=0, task_id=902)
    assert [path.name for path in tmp_path.iterdir()] == ["Task900_Phantom"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"series": ("T1w", "PET")},
        {"series": ()},
        {"series": ("T1w", "T1w")},
        {"shape": (32, 64, 4)},
        {"spacing_mm": (4.0, 0.0, 2.5)},
        {"snr": 0.0},
        {"missing_share": 1.5},
    ],
)
def test_wrong_spec_is_refused(wrong):
    with pytest.raises(UserError, match=str(next(iter(wrong)))):
        PhantomSpec(**wrong)


# --- diagnoses ---------------------------------------------------------------------------------------------------------------


def test_a_diagnosis_changes_the_core_and_nothing_else():
    spec = PhantomSpec(series=("T1w", "T2w"), shape=(12, 24, 24), spacing_mm=(10.0, 7.0, 7.0), snr=math.inf)
    with_class = replace(spec, diagnoses=True)
    kinds = set()
    for index in range(12):
        plain, diagnosed = draw_subject(spec, index), draw_subject(with_class, index)
        assert plain.diagnosis is None and diagnosed.diagnosis in CLASSES
        assert np.array_equal(plain.labels, diagnosed.labels)
        kinds.add(diagnosed.diagnosis)
    assert kinds == set(CLASSES)


def test_the_class_shows_in_two_series_together_and_in_neither_alone():
    """Signal of the core over that of white matter: T1w tells T1, T2w tells T2, and the class is whether they agree."""
    for name, told in (("T1w", 0), ("T2w", 1)):
        levels = {kind: float(signal(ACQUISITIONS[name], core, 0.0)) for kind, core in CORES.items()}
        for level in (False, True):
            of_level = [value for kind, value in levels.items() if kind[told] == level]
            others = [value for kind, value in levels.items() if kind[told] != level]
            # the other bit, and with it the class, changes a series by far less than its own
            assert abs(of_level[0] - of_level[1]) < 0.15 * min(abs(a - b) for a in of_level for b in others)
