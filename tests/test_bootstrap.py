"""Resamples draw as many as there are, groups whole, and samples with their patients; intervals leave out what is not defined."""

import numpy as np
import pandas as pd
import pytest

from nnunet_csm.evaluation.bootstrap import drawn, drawn_weights, drawn_within, estimate_text, interval, two_sided_p

NAN = float("nan")


def test_a_resample_has_as_many_as_there_are():
    times = drawn(np.random.default_rng(0), 7, 500)
    assert times.shape == (500, 7) and (times.sum(1) == 7).all() and times.mean() == 1 and (times == 0).any()


def test_groups_are_drawn_then_their_members():
    groups = np.array([0, 0, 0, 1, 1, 1])
    counts = drawn_within(np.random.default_rng(0), groups, 400)
    of_groups = np.stack([counts[:, groups == group].sum(1) for group in (0, 1)], axis=1)
    assert (counts.sum(1) == 6).all() and set(of_groups.ravel()) == {0, 3, 6}
    # two of two groups: each once in half of the resamples
    assert (of_groups[:, 0] == 3).mean() == pytest.approx(0.5, abs=0.1)


def test_samples_are_drawn_with_their_patient():
    patient = np.array([0, 1, 0, 2, 1])
    (weights,) = drawn_weights(patient, 100, seed=0)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()


def test_intervals_leave_out_what_is_not_defined():
    resampled = np.arange(1001.0)
    low, high = interval(resampled)
    assert (low, high) == pytest.approx((25, 975))
    some = np.stack([np.where(resampled < 400, NAN, resampled), np.where(resampled < 600, NAN, resampled)], axis=1)
    assert interval(some)[:, 0] == pytest.approx(np.quantile(resampled[400:], [0.025, 0.975]))
    assert np.isnan(interval(some)[:, 1]).all() and np.isnan(interval(np.empty((0, 3)))).all()


def test_p_is_never_below_what_so_many_resamples_can_tell():
    assert two_sided_p(np.ones(99)) == pytest.approx(2 / 100) and two_sided_p(np.zeros(9)) == 1
    assert two_sided_p(np.array([-1.0, 1, 1, 1])) == pytest.approx(4 / 5) and np.isnan(two_sided_p(np.array([NAN, NAN, 1])))


@pytest.mark.parametrize(
    ("values", "text"), [((0.5, 0.25, 0.75), "0.500 (0.250 to 0.750)"), ((0.5, NAN, NAN), "0.500"), ((NAN, NAN, NAN), "-")]
)
def test_an_estimate_as_it_is_read(values, text):
    assert estimate_text(pd.Series(values, ["value", "low", "high"])) == text
