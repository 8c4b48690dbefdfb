"""Paired seeds against hand numbers, tables and analytic cases."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from launch.reporting.data.pairing import permutation, power, seeds_needed, variance_ratio
from launch.reporting.data.statistics import mean, student


def test_the_paired_t_interval_by_hand():
    found = mean([1.0, 2.0, 3.0])  # mean 2, deviation 1, t(2) 4.3027
    assert (found.low, found.high) == pytest.approx((2 - 4.3027 * 0.57735, 2 + 4.3027 * 0.57735), abs=1e-4)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),
        ([1.0, 2.0, -3.0], 1.0),
        ([1.0, 2.0, 3.0, 4.0], 2 / 16),
        ([-1.0, 2.0, 3.0, 4.0], 4 / 16),  # |sum| 8: +++-like flips of sum 10 and 8, and their negatives
        ([0.1, 0.2, 0.3, 0.0], 4 / 16),
    ],
)
def test_every_sign_flip_by_hand(differences, p):
    assert permutation(np.array(differences)) == p


def test_many_pairs_are_sampled_and_near_the_exact_share():
    values = np.array([1.0] * 9 + [-1.0] * 5)  # |sum| >= 4 of 14 fair coins: at most 5 of one side
    exact = 2 * sum(math.comb(14, i) for i in range(6)) / 2**14
    assert permutation(values) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(("effect", "num"), [(0.5, 34), (0.8, 15), (0.2, 199), (1.0, 10)])
def test_seeds_needed_are_those_of_the_tables(effect, num):
    assert seeds_needed(2 * effect, 2.0) == num
    assert seeds_needed(-effect, 1.0) == num


def test_power_without_an_effect_is_the_level():
    assert [power(0.0, num) for num in (2, 3, 10, 50)] == pytest.approx([0.05] * 4, abs=2e-4)


@pytest.mark.parametrize(("effect", "deviation"), [(0.0, 1.0), (1.0, 0.0), (0.01, 1.0), (math.nan, 1.0)])
def test_what_no_number_of_seeds_answers(effect, deviation):
    assert seeds_needed(effect, deviation) is None


@pytest.mark.parametrize(("freedom", "quantile"), [(33, 2.0345), (40, 2.0211), (60, 2.0003), (120, 1.9799)])
def test_student_beyond_its_table(freedom, quantile):
    assert student(freedom) == pytest.approx(quantile, abs=1e-4)


def test_the_block_bootstrap_covers_a_known_ratio_of_variances():
    """Independent noise of deviations 2 and 1, 8 seeds, 60 steps: the ratio is 4, the width known."""
    generator = np.random.default_rng(1)
    found = [variance_ratio(noise(generator, 2.0), noise(generator, 1.0)) for _ in range(20)]
    assert sum(each.low < 4 < each.high for each in found) >= 17  # of 20
    width = np.mean([math.log(each.high / each.low) for each in found])
    # A log variance of n steps has deviation sqrt(2 / n), a pair has two; seeds and steps both count it: sqrt(2) more.
    assert width == pytest.approx(2 * 1.96 * math.sqrt(2 * 2 / 60 / 8) * math.sqrt(2), rel=0.2)


def noise(generator, deviation):
    return [run(generator.normal(scale=deviation, size=120)) for _ in range(8)]


def run(rewards):
    return SimpleNamespace(series=lambda _: rewards, steps=np.arange(len(rewards)))


def test_runs_of_different_lengths_have_no_block_interval():
    assert math.isnan(variance_ratio([run(np.arange(8.0))], [run(np.arange(10.0))]).value)
