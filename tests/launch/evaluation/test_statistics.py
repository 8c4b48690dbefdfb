"""pass@k, intervals and paired tests against exact fractions, enumeration and published numbers."""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.evaluation.statistics import half_width, mcnemar, mean_half_width, paired_interval, pass_at_k, wilson


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for correct in range(n + 1):
        samples = [i < correct for i in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(samples, k))
            expected = Fraction(sum(map(any, subsets)), len(subsets))
            assert pass_at_k(n, correct, k) == float(expected), (n, correct, k)


@settings(deadline=None)
@given(st.data())
def test_pass_at_k_is_the_nearest_float_to_the_exact_fraction(data):
    n = data.draw(st.integers(1, 300))
    correct, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    none = Fraction(1)  # the probability that no correct one is drawn, one sample after the other
    for i in range(k):
        none *= Fraction(max(n - correct - i, 0), n - i)
    assert pass_at_k(n, correct, k) == float(1 - none)


def test_pass_at_k_neither_overflows_nor_cancels():
    assert pass_at_k(10**6, 1, 1) == 1e-6  # 1 - (1 - 1e-6) has lost 10 digits
    assert pass_at_k(100_000, 0, 1000) == 0.0
    assert pass_at_k(10_000, 5_000, 5_000) == 1.0  # C(10,000, 5,000) is far beyond floats


def test_pass_at_1_is_the_fraction_and_more_samples_only_help():
    for n, correct in ((8, 3), (100, 1), (7, 7)):
        assert pass_at_k(n, correct, 1) == pytest.approx(correct / n, rel=1e-15)
        values = [pass_at_k(n, correct, k) for k in range(1, n + 1)]
        assert values == sorted(values)
        assert values[-1] == 1.0


def test_the_papers_interval():
    assert half_width(0.5, 500) == pytest.approx(0.0438, abs=5e-5)  # by hand: 1.96 / (2 sqrt(500))
    assert half_width(0.0, 10) == half_width(1.0, 10) == 0.0


@pytest.mark.parametrize(
    ("correct", "num", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_the_published_values(correct, num, low, high):
    assert wilson(correct, num) == pytest.approx((low, high), abs=5.1e-5)
    assert wilson(num - correct, num) == pytest.approx((1 - high, 1 - low), abs=5.1e-5)


@given(st.integers(1, 2000), st.data())
def test_wilson_holds_the_fractions_that_a_score_test_accepts(num, data):
    """Its ends solve |p - fraction| = 1.96 sqrt(p (1 - p) / n), with the deviation of p itself."""
    correct = data.draw(st.integers(0, num))
    ends = wilson(correct, num)
    assert 0 <= ends[0] <= correct / num + 1e-15
    assert correct / num - 1e-15 <= ends[1] <= 1
    for end in ends:
        distance = abs(end - correct / num)
        assert distance**2 == pytest.approx(1.96**2 * end * (1 - end) / num, rel=1e-9, abs=1e-15)


def test_the_interval_of_a_mean_by_hand():
    # mean 0.5, squares 0.25 + 0 + 0.25, variance 0.25, standard error 0.5 / sqrt(3)
    assert mean_half_width([0.0, 0.5, 1.0]) == pytest.approx(1.96 * 0.5 / math.sqrt(3))
    assert mean_half_width([0.25] * 10) == 0.0
    assert math.isnan(mean_half_width([1.0]))


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(1, 5) == pytest.approx(2 * 7 / 64)
    assert mcnemar(4, 4) == 1.0
    assert 0 < mcnemar(200, 900) < 1e-90  # neither 0 nor an overflow


@given(st.integers(0, 12), st.integers(0, 12))
def test_mcnemar_counts_the_outcomes_that_are_at_least_as_uneven(gained, lost):
    num = gained + lost
    outcomes = [math.comb(num, i) for i in range(num + 1)]
    as_uneven = sum(c for i, c in enumerate(outcomes) if abs(2 * i - num) >= abs(gained - lost))
    assert mcnemar(gained, lost) == float(Fraction(as_uneven, 2**num))


def test_the_paired_interval_by_hand():
    # 10 gained, 2 lost, 50 problems: cells 10.5 and 2.5 of 52; 1.96 sqrt(13 - 64 / 52) / 52 = 0.12930
    assert paired_interval(10, 2, 50) == pytest.approx((8 / 52 - 0.12930, 8 / 52 + 0.12930), abs=1e-5)
    low, high = paired_interval(2, 10, 50)
    assert (-high, -low) == pytest.approx(paired_interval(10, 2, 50))
    low, high = paired_interval(0, 0, 50)
    assert low == -high < 0


def coverage(interval, gain, loss, num):
    """The exact probability, over all outcomes of `num` problems, that the interval has the true difference."""
    covered = 0.0
    for gained in range(num + 1):
        for lost in range(num + 1 - gained):
            low, high = interval(gained, lost, num)
            if low <= gain - loss <= high:
                ways = math.comb(num, gained) * math.comb(num - gained, lost)
                covered += ways * gain**gained * loss**lost * (1 - gain - loss) ** (num - gained - lost)
    return covered


@pytest.mark.parametrize(("gain", "loss"), [(0.1, 0.1), (0.3, 0.1), (0.02, 0.05), (0.4, 0.4), (0.0, 0.1)])
@pytest.mark.parametrize("num", [10, 40])
def test_the_paired_interval_holds_its_level(gain, loss, num):
    assert coverage(paired_interval, gain, loss, num) > 0.91


def test_a_plain_normal_interval_would_fail_that():
    def plain(gained, lost, num):
        half = 1.96 * math.sqrt(gained + lost - (gained - lost) ** 2 / num) / num
        return (gained - lost) / num - half, (gained - lost) / num + half

    assert coverage(plain, 0.02, 0.05, 10) < 0.6


def test_the_paired_interval_is_sharper_than_two_side_by_side():
    """Two checkpoints that agree on most problems: 60 % and 64 % of 500, of which 20 were gained and none lost."""
    low, high = paired_interval(20, 0, 500)
    assert 0 < low < high < 2 * half_width(0.6, 500)
    assert mcnemar(20, 0) < 1e-5
    assert wilson(320, 500)[0] < wilson(300, 500)[1]  # they overlap
