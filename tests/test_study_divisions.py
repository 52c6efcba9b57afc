"""Who trains, validates and tests in a study: by patient, and nobody on two sides."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import make_table

from nnunet_csm import nnunet
from nnunet_csm.raw.manifest import MANIFEST
from nnunet_csm.study.dataset import Dataset
from nnunet_csm.study.divisions import divide, everybody, labelled, taken_away
from nnunet_csm.study.spec import Repeats


@settings(max_examples=30, deadline=None)
@given(st.integers(12, 60), st.integers(1, 3), st.sampled_from([("splits", 3), ("folds", 3), ("folds", 5)]), st.integers(0, 3))
def test_no_patient_is_on_two_sides_and_folds_test_everybody_once(
    num: int, cases_each: int, kind: tuple[str, int], seed: int
) -> None:
    table = make_table(num, num // 3, cases_each)
    patient = {sample.case: sample.patient for sample in table.samples}
    divisions = divide(table, Repeats(kind[0], kind[1], 2))  # type: ignore[arg-type]
    for division in divisions:
        sides = [{patient[case] for case in side} for side in (division.train, division.val, division.test)]
        assert all(sides) and sum(map(len, sides)) == len(set.union(*sides)) == num
        assert set(labelled(table, division, 0.3, seed)) < set(division.train)
    if kind[0] == "folds":
        assert sorted(case for division in divisions for case in division.test) == sorted(patient)


@pytest.mark.parametrize("seed", range(5))
def test_labelled_patients_are_nested_whole_and_of_all_classes_alike(seed: int) -> None:
    table = make_table(60, 20, 2)
    division = divide(table, Repeats("splits", 1))[0]
    label = {sample.case: sample.class_index for sample in table.samples}
    before: set[str] = set()
    for share in (0.1, 0.25, 0.5, 1.0):
        cases = labelled(table, division, share, seed)
        assert before <= set(cases)
        assert len(cases) == 2 * round(share * len(division.train) / 2)
        assert abs(np.mean([label[case] for case in cases]) - 1 / 3) <= 1 / (len(cases) / 2)
        before = set(cases)
    assert set(labelled(table, division, 0.25, seed)) != set(labelled(table, division, 0.25, seed + 1))


def test_a_case_never_loses_its_last_series() -> None:
    rng = np.random.default_rng(0)
    assert not taken_away(["T1w"], 1.0, (1, 2), rng)
    lost = [taken_away(["T1w", "T2w", "FLAIR"], 1.0, (1, 2, 5), rng) for _ in range(50)]
    assert {len(names) for names in lost} == {1, 2}
    assert sum(bool(taken_away(["a", "b"], 0.25, (1,), rng)) for _ in range(400)) == pytest.approx(100, abs=30)


def test_cases_without_a_class_are_segmented_all_the_same() -> None:
    table = make_table(3, 1)
    cases = [sample.case for sample in table.samples]
    found = everybody(table, [*cases, "x", "y"], {"y": table.samples[0].patient})
    assert [sample.patient for sample in found.samples][-2:] == ["x", table.samples[0].patient] and len(found.samples) == 5
    assert everybody(table, cases, {}) is table


def test_visits_of_a_patient_stay_on_one_side_without_a_class_table(
    studied: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "raw" / studied.name
    shutil.copytree(nnunet.folder("nnUNet_raw") / studied.name, raw)
    monkeypatch.setenv("nnUNet_raw", str(raw.parent))
    cases = sorted(sample.case for sample in studied.table.samples)
    assert len({sample.patient for sample in studied.table.samples}) == len(cases) > 3
    manifest = {"cases": {case: {"patient": f"p{number // 2}"} for number, case in enumerate(cases[1:])}}
    nnunet.save_json(manifest, raw / MANIFEST)
    again = Dataset("900", "3d_fullres", studied.folder)
    patients = {sample.case: sample.patient for sample in again.table.samples}
    assert patients == {cases[0]: cases[0], **{case: f"p{number // 2}" for number, case in enumerate(cases[1:])}}
    for division in divide(again.table, Repeats("folds", 2)):
        sides = [{patients[case] for case in side} for side in (division.train, division.val, division.test)]
        assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert f"{len(cases)} cases of {len(set(patients.values()))} patients" in again.described()
