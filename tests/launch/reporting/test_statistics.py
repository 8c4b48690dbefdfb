"""Intervals and the training variance against hand numbers and against other ways to compute them."""

import itertools
import math

import numpy as np
import pytest

from launch.reporting.data import statistics
from launch.reporting.data.statistics import (
    binomial,
    bootstrap,
    detrended_variance,
    difference,
    mean,
    ratio,
    training_variance,
)


def test_training_variance_by_hand():
    # The second half of six steps is 2, 3, 7: mean 4, squares 4, 1, 9.
    assert training_variance(np.array([9.0, 9.0, 1.0, 2.0, 3.0, 7.0])) == pytest.approx(14 / 3)
    # Of five steps the last three: 1, 2, 3.
    assert training_variance(np.array([9.0, 9.0, 1.0, 2.0, 3.0])) == pytest.approx(2 / 3)
    assert training_variance(np.array([9.0, 9.0, 1.0, math.nan, 3.0])) == pytest.approx(1.0)


@pytest.mark.parametrize("rewards", [[], [1.0], [1.0, 2.0], [1.0, 2.0, 3.0, math.nan]])
def test_training_variance_needs_two_numbers(rewards):
    assert math.isnan(training_variance(np.array(rewards)))


def test_detrended_variance_by_hand():
    # From the line 1.6 + 0.1 x (x 0 .. 3) the numbers 1, 3, 1, 2 are -.6, 1.3, -.8, .1 away: squares 2.7 in all.
    assert detrended_variance(np.array([9.0, 9.0, 9.0, 9.0, 1.0, 3.0, 1.0, 2.0])) == pytest.approx(2.7 / 4)
    rising = np.array([0.0, 0.0, 0.0, 0.0, 1.0, math.nan, 3.0, 4.0])
    assert detrended_variance(rising) == pytest.approx(0, abs=1e-20)
    assert training_variance(rising) > 1.5
    assert math.isnan(detrended_variance(np.array([1.0, 2.0, math.nan, 5.0, 6.0])))


@pytest.mark.parametrize("seeds", [[1.0, 6.0], [1.0, 2.0, 6.0], [1.0, 2.0, 3.0, 6.0]])
def test_bootstrap_of_fewer_than_five_seeds_is_their_range(seeds):
    found = bootstrap(seeds)
    assert (found.value, found.low, found.high, found.num) == (np.mean(seeds), 1.0, 6.0, len(seeds))
    five = bootstrap([1.0, 2.0, 3.0, 4.0, 6.0])
    assert (five.low > 1.0, five.high < 6.0) == (True, True)


def test_bootstrap_agrees_with_every_resample_counted():
    """Five seeds have 5^5 resamples, so their exact percentiles are known."""
    seeds = [0.3, 1.1, 1.2, 2.0, 4.5]
    means = np.array([np.mean(resample) for resample in itertools.product(seeds, repeat=5)])
    tail = 0.5 * math.erfc(math.sqrt(5 / 4) * 2.7764 / math.sqrt(2))
    found = bootstrap(seeds)
    assert found.low == pytest.approx(np.quantile(means, tail), abs=0.1)
    assert found.high == pytest.approx(np.quantile(means, 1 - tail), abs=0.2)


def test_bootstrap_covers_what_it_says():
    """Of 400 samples of ten normal seeds about 95 % have the true mean in their interval; a plain 2.5 % covers 90 %."""
    generator = np.random.default_rng(1)
    found = [bootstrap(generator.normal(5, 2, size=10)) for _ in range(400)]
    assert 0.92 <= np.mean([each.low <= 5 <= each.high for each in found]) <= 0.985


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 2.0, 2.0], [2.0, math.nan]])
def test_no_interval_without_two_seeds_that_differ(values):
    for found in (bootstrap(values), mean(values), difference(values, values)):
        assert not found.has_interval


def test_mean_by_hand():
    found = mean([1.0, 2.0, 3.0])  # t of 2 degrees of freedom 4.3027, standard error 1 / sqrt 3
    assert (found.low, found.high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)))


def test_difference_of_equal_variances_is_students():
    """Two samples of the same variance and size n have 2 n - 2 degrees of freedom in Welch's formula."""
    found = difference([1.0, 2.0, 3.0], [11.0, 12.0, 13.0])
    half = 2.7764 * math.sqrt(2 / 3)
    assert (found.value, found.low, found.high) == pytest.approx((-10, -10 - half, -10 + half))


def test_difference_covers_95_percent():
    generator = np.random.default_rng(2)
    found = [difference(generator.normal(1, 1, size=3), generator.normal(0, 3, size=3)) for _ in range(600)]
    assert np.mean([each.low <= 1 <= each.high for each in found]) >= 0.93


def test_ratio_is_the_difference_of_logarithms():
    found = ratio([1.0, 4.0], [0.5, 0.5, 0.5])
    logs = difference(np.log([1.0, 4.0]), np.log([0.5, 0.5, 0.5]))
    assert found.value == pytest.approx(4.0)  # geometric mean 2 over 0.5
    assert (found.low, found.high) == pytest.approx((math.exp(logs.low), math.exp(logs.high)))
    assert math.isnan(ratio([], [1.0]).value)
    assert math.isnan(ratio([1.0, 4.0, 0.0], [0.5, 0.6]).value)  # not the ratio of the two other seeds


def test_binomial_is_the_papers():
    found = binomial(0.846, 500)
    assert (round(found.value - found.low, 3), round(found.high - found.value, 3)) == (0.032, 0.032)
    assert not binomial(0.5, 0).has_interval


def test_students_quantiles():
    """Against their definition: the density from -t to t holds 95 %."""
    for freedom in (1, 2, 5, 30):
        t = statistics.student(freedom)
        x = np.linspace(-t, t, 200_001)
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        assert np.trapezoid(scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x) == pytest.approx(0.95, abs=1e-4)
