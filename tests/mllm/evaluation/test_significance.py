"""Tests over paired answers, against values worked out by hand or by scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from mllm.evaluation.significance import bootstrap_p, holm, mcnemar_p


@pytest.mark.parametrize(
    ("counts", "p"),
    [((0, 0), 1), ((1, 0), 1), ((5, 0), 2 / 32), ((1, 5), 14 / 64), ((10, 3), 756 / 8192), ((4, 4), 1)],
)
def test_mcnemar_is_the_exact_tail_of_a_fair_coin(counts, p):
    assert mcnemar_p(*counts) == pytest.approx(p, rel=1e-12)


@settings(deadline=None)  # a busy machine is not a wrong test
@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_is_the_two_sided_binomial_test_and_does_not_care_which_comes_first(one, two):
    expected = binomtest(one, one + two).pvalue if one + two else 1.0
    assert mcnemar_p(one, two) == pytest.approx(expected, rel=1e-9)
    assert mcnemar_p(one, two) == mcnemar_p(two, one)


def test_mcnemar_of_very_many_rows_is_a_number():
    assert 0 < mcnemar_p(30_000, 30_500) < 0.05


def test_holm_multiplies_by_how_many_are_left_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02]) == [0.02]
    assert holm([0.9, 0.5]) == [1.0, 1.0]


@settings(deadline=None)  # a busy machine is not a wrong test
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_is_never_below_the_p_value_nor_above_bonferronis(p_values):
    for p, adjusted in zip(p_values, holm(p_values), strict=True):
        assert p <= adjusted <= min(1.0, len(p_values) * p)


def test_bootstrap_p_is_twice_the_smaller_tail_and_never_zero():
    means = np.array([-1.0] * 10 + [1.0] * 989)
    assert bootstrap_p(means) == pytest.approx(2 * 11 / 1000)
    assert bootstrap_p(np.ones(999)) == pytest.approx(2 / 1000)
    assert bootstrap_p(np.zeros(999)) == 1


def test_bootstrap_p_falls_below_five_per_cent_just_where_the_interval_leaves_zero():
    means = np.linspace(-1, 1, 10_001)
    for shift in (0.94, 0.96):
        low = np.percentile(means + shift, 2.5)
        assert (low > 0) == (bootstrap_p(means + shift) < 0.05)
