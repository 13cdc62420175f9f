import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.metrics.comparison import (
    Estimate,
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.metrics.frechet import FeatureStats
from diffusers_ext.metrics.kid import kid

RNG = np.random.default_rng(0)
REFERENCE_ROWS = RNG.normal(size=(200, 4))
REFERENCE = FeatureStats.of(REFERENCE_ROWS)


def _difference(x, groups=None):
    return paired_difference(x[:, 0], x[:, 1], groups)


def _accuracy(x, groups=None):
    return proportion(x[:, 0] > 0, groups)


def _frechet(x, groups=None):
    return frechet_interval(x, REFERENCE, groups)


def _paired_frechet(x, groups=None):
    return paired_frechet_difference(x, 1.2 * x[:, ::-1] + 0.1, REFERENCE, groups)


def _kid(x, groups=None):
    return kid(x, REFERENCE_ROWS, groups)


MEASURES = pytest.mark.parametrize("measure", [_difference, _accuracy, _frechet, _paired_frechet, _kid])


def _numbers(estimate):
    return (estimate.value, estimate.low, estimate.high)


def _sample(seed, n=60):
    return np.random.default_rng(seed).normal(0.2, 1.1, size=(n, 4))


@MEASURES
@given(seed=st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_the_order_of_rows_does_not_matter(measure, seed):
    x, groups = _sample(seed), np.arange(60) // 3
    order = np.random.default_rng(seed).permutation(60)
    # Sums in another order.
    assert _numbers(measure(x[order], groups[order])) == pytest.approx(_numbers(measure(x, groups)), abs=1e-9)


@MEASURES
def test_a_row_is_its_own_group(measure):
    x = _sample(1)
    labels = [f"prompt {i}" for i in range(60)]
    assert _numbers(measure(x, labels)) == pytest.approx(_numbers(measure(x)), abs=1e-12)


@MEASURES
@pytest.mark.parametrize("times", [2, 5])
def test_repeated_rows_of_one_group_say_nothing_new(measure, times):
    x = _sample(2)
    repeated = measure(np.repeat(x, times, axis=0), np.repeat(np.arange(60), times))
    # A design effect counts the rows' degrees of freedom, which is 2% of the width of 60.
    tolerance = 0.01 if measure is _accuracy else 1e-9
    assert _numbers(repeated) == pytest.approx(_numbers(measure(x)), abs=tolerance)


@MEASURES
def test_without_their_groups_repeated_rows_look_like_new_ones(measure):
    x = _sample(3)
    rows, groups = np.repeat(x, 4, axis=0), np.repeat(np.arange(60), 4)
    with_groups, without = measure(rows, groups), measure(rows)
    # Half the width, but for KID's reference and its diagonal, which do not change.
    assert with_groups.high - with_groups.low > 1.3 * (without.high - without.low)


@MEASURES
def test_labels_are_checked(measure):
    with pytest.raises(ValueError, match="60 rows but 2 group labels"):
        measure(_sample(4), ["a", "b"])
    with pytest.raises(ValueError, match="two or more independent groups"):
        measure(_sample(4), ["a"] * 60)


def test_wilson_interval_against_published_values():
    # 81 of 263: [0.2553, 0.3662] (Newcombe 1998, table I, method 3).
    result = proportion(np.arange(263) < 81)
    assert result.low == pytest.approx(0.2553, abs=5e-5)
    assert result.high == pytest.approx(0.3662, abs=5e-5)


@pytest.mark.parametrize("right", [0, 50])
@pytest.mark.parametrize("groups", [None, np.arange(50) // 5])
def test_interval_of_all_or_none_stays_in_the_unit_range(right, groups):
    result = proportion(np.arange(50) < right, groups)
    assert 0 <= result.low <= result.value <= result.high <= 1
    assert result.low < result.high


def test_all_right_in_few_groups_is_less_certain():
    assert proportion(np.ones(50, bool), np.arange(50) // 5) == proportion(np.ones(10, bool))


def test_paired_difference_sees_a_shift_that_unpaired_noise_would_hide():
    rng = np.random.default_rng(0)
    control = rng.normal(0, 10, 200)
    result = paired_difference(control + 0.5 + rng.normal(0, 0.1, 200), control)
    assert result.low > 0
    # The standard error of the mean of 200 differences of deviation 0.1 is .007.
    assert result.value == pytest.approx(0.5, abs=0.03)
    assert not paired_difference(control, control).excludes(0)


def test_booleans_are_differences_too():
    ours, control = np.array([True, True, False, True]), np.array([False, True, False, True])
    assert paired_difference(ours, control).value == 0.25


def test_paired_frechet_difference():
    rng = np.random.default_rng(2)
    near = rng.normal(size=(300, 4))
    assert paired_frechet_difference(near + 1.0, near, REFERENCE).low > 0
    same = paired_frechet_difference(near, near, REFERENCE)
    assert _numbers(same) == (0, 0, 0)
    assert same.p_value == 1
    swapped = paired_frechet_difference(near, near + 1.0, REFERENCE)
    assert swapped.value == pytest.approx(-paired_frechet_difference(near + 1.0, near, REFERENCE).value)


def test_a_pair_is_more_certain_than_its_two_distances():
    x = _sample(5, 300)
    single = frechet_interval(x, REFERENCE)
    paired = paired_frechet_difference(x + 0.1, x, REFERENCE)
    assert paired.high - paired.low < 0.5 * (single.high - single.low)


def test_errors():
    with pytest.raises(ValueError, match="No results"):
        proportion(np.zeros(0, bool))
    with pytest.raises(ValueError, match="same length"):
        paired_difference(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="equal shapes"):
        paired_frechet_difference(np.zeros((3, 2)), np.zeros((4, 2)), FeatureStats.of(np.eye(2)))


def test_text():
    assert Estimate(0.5, 0.25, 0.75).format(1, scale=100) == "50.0 [25.0, 75.0]"
    assert markdown_table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
