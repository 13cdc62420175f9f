import numpy as np
import pytest

from diffusers_ext.metrics.comparison import (
    Estimate,
    frechet_interval,
    markdown_table,
    paired_difference,
    paired_frechet_difference,
    proportion,
)
from diffusers_ext.metrics.frechet import FeatureStats, frechet_distance


def test_wilson_interval_against_published_values():
    # 81 of 263: [0.2553, 0.3662] (Newcombe 1998, table I, method 3).
    result = proportion(np.arange(263) < 81)
    assert result.low == pytest.approx(0.2553, abs=5e-5)
    assert result.high == pytest.approx(0.3662, abs=5e-5)


@pytest.mark.parametrize("right", [0, 50])
def test_interval_of_all_or_none_stays_in_the_unit_range(right):
    result = proportion(np.arange(50) < right)
    assert 0 <= result.low <= result.value <= result.high <= 1
    assert result.low < result.high


def test_paired_difference_sees_a_shift_that_unpaired_noise_would_hide():
    rng = np.random.default_rng(0)
    control = rng.normal(0, 10, 200)
    result = paired_difference(control + 0.5 + rng.normal(0, 0.1, 200), control)
    assert result.low > 0
    # The standard error of the mean of 200 differences of deviation 0.1 is .007.
    assert result.value == pytest.approx(0.5, abs=0.03)
    assert not paired_difference(control, control).excludes(0)


def test_paired_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = sum(not paired_difference(rng.normal(size=40), np.zeros(40)).excludes(0) for _ in range(100))
    # 95 expected, binomial deviation 2.2, and a bootstrap of 40 is a little narrow.
    assert 85 <= covered <= 100


def test_paired_frechet_difference():
    rng = np.random.default_rng(2)
    reference = FeatureStats.of(rng.normal(size=(2000, 3)))
    near = rng.normal(size=(300, 3))
    result = paired_frechet_difference(near + 1.0, near, reference)
    assert result.low > 0
    assert not paired_frechet_difference(near, near, reference).excludes(0)
    single = frechet_interval(near, reference)
    assert single.value == pytest.approx(frechet_distance(FeatureStats.of(near), reference))
    assert single.low < single.value < single.high


def test_groups_are_resampled_together():
    rng = np.random.default_rng(3)
    reference = FeatureStats.of(rng.normal(size=(2000, 3)))
    # Four equal rows in a group: as uncertain as 100 rows, not as 400.
    few = rng.normal(size=(100, 3))
    rows = np.repeat(few, 4, axis=0)

    def width(estimate):
        return estimate.high - estimate.low

    grouped, alone = (width(frechet_interval(rows, reference, 300, group_size=n)) for n in (4, 1))
    assert grouped > 1.5 * alone  # twice, but for resampling noise and bias
    change = np.repeat(0.3 * rng.normal(size=(100, 3)), 4, axis=0)
    grouped, alone = (
        width(paired_frechet_difference(rows + change, rows, reference, 300, group_size=n)) for n in (4, 1)
    )
    assert grouped > 1.5 * alone


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
