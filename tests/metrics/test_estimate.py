import sys

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.core.extras import MissingExtraError
from diffusers_ext.metrics.comparison import Estimate, bootstrap, holm, paired_difference
from diffusers_ext.metrics.estimate import group_index


@pytest.mark.parametrize(("df", "tolerance"), [(3, 0.02), (10, 2e-3), (60, 1e-4), (1000, 1e-5)])
def test_interval_and_p_value_are_those_of_students_t(df, tolerance):
    # The tolerances are a little above the stated error of Wallace's approximation.
    result = Estimate.of_error(2.0, 0.8, df)
    assert (result.high - 2.0) / 0.8 == pytest.approx(scipy.stats.t.ppf(0.975, df), rel=tolerance)
    assert result.p_value == pytest.approx(2 * scipy.stats.t.sf(2.5, df), rel=10 * tolerance)


def test_a_mean_has_scipys_t_interval():
    x = np.random.default_rng(0).normal(0.3, 1, 200)
    expected = scipy.stats.ttest_1samp(x, 0)
    result = paired_difference(x, np.zeros(200))
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval()), abs=1e-5)
    assert result.p_value == pytest.approx(expected.pvalue, rel=1e-3)


@given(st.floats(-4, 4), st.floats(0.01, 2), st.integers(1, 500))
@settings(deadline=None)
def test_the_p_value_and_the_interval_agree(value, error, df):
    result = Estimate.of_error(value, error, df)
    assert result.p_value is not None
    assert result.p_value == pytest.approx(0.05, abs=1e-6) or (result.p_value < 0.05) == result.excludes(0)


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.5, 0.0)])
def test_without_any_error(value, p):
    assert Estimate.of_error(value, 0.0, 9) == Estimate(value, value, value, p)


def _with(*p_values):
    return [Estimate(1.0, 0.5, 1.5, p) for p in p_values]


def test_holm_by_hand():
    # Sorted: .004 ≤ .05/4, .02 > .05/3, so that only the first is left.
    assert holm(_with(0.02, 0.004, 0.3, 0.04)) == [False, True, False, False]
    assert holm(_with(0.02, 0.004, 0.3, 0.04), level=0.1) == [True, True, False, True]
    assert holm([]) == []


@pytest.mark.parametrize(("value", "differs"), [(1.97, False), (1.99, True), (-1.99, True)])
def test_holm_of_one_estimate_is_its_interval(value, differs):
    # The 97.5% quantile at 100 degrees of freedom is 1.984.
    result = Estimate.of_error(value, 1.0, 100)
    assert holm([result]) == [result.excludes(0)] == [differs]


def test_holm_needs_p_values_a_level_and_statsmodels(monkeypatch):
    with pytest.raises(ValueError, match="estimate 1 of 2 has none"):
        holm(_with(0.1, None))
    with pytest.raises(ValueError, match="between 0 and 1, got 5"):
        holm(_with(0.1), level=5)
    monkeypatch.setitem(sys.modules, "statsmodels.stats.multitest", None)
    with pytest.raises(MissingExtraError, match=r"diffusers-ext\[bench\]"):
        holm(_with(0.1))


def test_groups_are_numbered_as_they_occur():
    assert group_index(["b", "a", "b", "c"], 4).tolist() == [0, 1, 0, 2]
    assert group_index(np.array([7, 7, 3]), 3).tolist() == [0, 0, 1]
    assert group_index(None, 3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="3 rows but 2 group labels"):
        group_index(["a", "b"], 3)
    with pytest.raises(ValueError, match="two or more independent groups, got 1"):
        group_index(["a", "a"], 2)


def test_bootstrap_draws_whole_groups():
    x = np.random.default_rng(1).normal(size=200)

    def mean_of(values):
        return lambda rows: float(values[rows].mean())

    alone = bootstrap(mean_of(x), 200, 1000)
    repeated = bootstrap(mean_of(np.repeat(x, 3)), 600, 1000, groups=np.repeat(np.arange(200), 3))
    # The same resamples, but for the rounding of a mean.
    assert repeated.low == pytest.approx(alone.low, abs=1e-12)
    assert repeated.p_value == alone.p_value


def test_bootstrap_gives_a_p_value_and_refuses_nan():
    x = np.arange(50) - 20.0
    # The t test's p-value is .016; that of 2,000 resamples has an error of about .004.
    expected = scipy.stats.ttest_1samp(x, 0).pvalue
    found = bootstrap(lambda rows: float(x[rows].mean()), 50, 2000).p_value
    assert found == pytest.approx(expected, abs=0.015)
    with pytest.raises(ValueError, match="is not finite in 10 of 10"):
        bootstrap(lambda rows: float("nan"), 5, 10)


def test_marked_follows_the_interval_or_the_correction():
    clear = Estimate(1.0, 0.5, 1.5)
    assert clear.marked(1) == "**1.0 [0.5, 1.5]**"
    assert clear.marked(1, bold=False) == "1.0 [0.5, 1.5]"
    assert not Estimate(float("nan"), float("nan"), float("nan")).excludes(0)
