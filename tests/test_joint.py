"""A joint plan makes datasets agree in all that an encoder sees, and changes nothing else."""

import copy

import pytest
from factories import base_plans

from nnunet_csm.errors import UserError
from nnunet_csm.planning.joint import Member, joint_base_plans, median_shape


def member(channels, shapes, spacings, masked=True, scheme="ZScoreNormalization", transpose=(0, 1, 2), name="A"):
    plans = base_plans(spacing=spacings[0], num_series=len(channels))
    plans["dataset_name"], plans["transpose_forward"] = name, list(transpose)
    entry = plans["configurations"]["3d_fullres"]
    entry["normalization_schemes"] = [scheme] * len(channels)
    entry["use_mask_for_norm"] = [masked] * len(channels)
    fingerprint = {"shapes_after_crop": shapes, "spacings": spacings}
    return Member(plans, fingerprint, {series: channel for channel, series in enumerate(channels)})


BRAIN = member(("FLAIR", "T1w", "T2w"), [[100, 120, 140]] * 3, [(1.0, 1.0, 1.0)] * 3, name="Brain")
THICK = member(("T1w", "DWI"), [[20, 240, 240]] * 2, [(5.0, 1.0, 1.0)] * 2, masked=False, name="Thick")


def test_spacing_is_that_of_the_first_dataset_or_by_hand():
    for members, spacing, expected in (
        ((BRAIN, THICK), None, [1.0, 1.0, 1.0]),
        ((THICK, BRAIN), None, [5.0, 1.0, 1.0]),
        ((THICK, BRAIN), (2.0, 1.0, 1.5), [2.0, 1.0, 1.5]),
    ):
        plans, decisions = joint_base_plans(members, "3d_fullres", "Joint", spacing)
        assert [p["configurations"]["3d_fullres"]["spacing"] for p in plans] == [expected, expected]
        assert "Brain 1 x 1 x 1" in decisions[0].reason and "Thick 5 x 1 x 1" in decisions[0].reason


def test_the_median_shape_is_that_of_all_cases_at_the_joint_spacing():
    assert median_shape([BRAIN, THICK], (1.0, 1.0, 1.0)) == [100, 120, 140]
    assert median_shape([BRAIN, THICK], (2.0, 2.0, 2.0)) == [50, 60, 70]
    assert median_shape([THICK], (1.0, 1.0, 1.0)) == [100, 240, 240]


def test_shapes_are_turned_as_each_dataset_turns_its_axes():
    sagittal = member(("T1w",), [[30, 40, 50]], [(1.0, 1.0, 2.0)], transpose=(2, 0, 1))
    assert median_shape([sagittal], (1.0, 1.0, 1.0)) == [100, 30, 40]


def test_a_series_is_normalised_in_the_same_way_in_all_datasets():
    plans, _ = joint_base_plans([BRAIN, THICK], "3d_fullres", "Joint", None)
    brain, thick = (p["configurations"]["3d_fullres"] for p in plans)
    # one of them does not use the mask, so none does
    assert brain["use_mask_for_norm"] == [False] * 3 and thick["use_mask_for_norm"] == [False] * 2
    other = member(("T1w",), [[9, 9, 9]], [(1.0, 1.0, 1.0)], scheme="CTNormalization", name="Other")
    plans, _ = joint_base_plans([BRAIN, other], "3d_fullres", "Joint", None)
    assert plans[1]["configurations"]["3d_fullres"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert all(plans[0]["configurations"]["3d_fullres"]["use_mask_for_norm"])


def test_each_dataset_gets_data_of_its_own_and_keeps_the_rest():
    members = [BRAIN, THICK]
    before = copy.deepcopy(members)
    plans, _ = joint_base_plans(members, "3d_fullres", "Joint", None)
    for p, m in zip(plans, members, strict=True):
        entry = p["configurations"]["3d_fullres"]
        assert entry["data_identifier"].startswith("Joint_3d_fullres_")
        assert p["dataset_name"] == m.base_plans["dataset_name"] and len(entry["normalization_schemes"]) == len(m.channels)
        entry["spacing"][0] = 9
    assert members == before


def test_other_settings_mean_another_folder_of_data():
    """Else plans would meet data that was preprocessed for other spacings, or with other datasets."""

    def identifier(members, spacing=None):
        plans, _ = joint_base_plans(members, "3d_fullres", "Joint", spacing)
        assert len({p["configurations"]["3d_fullres"]["data_identifier"] for p in plans}) == 1
        return plans[0]["configurations"]["3d_fullres"]["data_identifier"]

    assert identifier([BRAIN, THICK]) == identifier([BRAIN, THICK], (1.0, 1.0, 1.0))
    assert len({identifier([BRAIN, THICK]), identifier([THICK, BRAIN]), identifier([BRAIN, THICK], (2.0, 2.0, 2.0))}) == 3


def test_a_dataset_without_the_configuration_is_named():
    half = {**BRAIN.base_plans, "configurations": {"3d_half": BRAIN.base_plans["configurations"]["3d_fullres"]}}
    members = [Member(half, BRAIN.nnunet_fingerprint, BRAIN.channels), THICK]
    with pytest.raises(UserError, match=r"plans of Thick.*3d_half"):
        joint_base_plans(members, "3d_half", "Joint", None)
