"""Numbers of an evaluation: pass@k, intervals of one evaluation, and the comparison of two on the same problems."""

import math
from collections.abc import Sequence

Z95 = 1.96  # standard normal, 97.5 % quantile


def half_width(fraction: float, num: int) -> float:
    """Half-width of the paper's 95 % interval of a fraction of `num`: 1.96 sqrt(p (1 - p) / n) (arXiv 2606.05434, 4.4).

    It is 0 if none or all are correct, which `wilson` corrects.
    """
    return Z95 * math.sqrt(fraction * (1 - fraction) / num)


def wilson(num_correct: int, num: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the fraction num_correct / num, within [0, 1] (Wilson 1927; num > 0)."""
    fraction, scale = num_correct / num, 1 + Z95**2 / num
    centre = (fraction + Z95**2 / (2 * num)) / scale
    half = Z95 / scale * math.sqrt(fraction * (1 - fraction) / num + (Z95 / (2 * num)) ** 2)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate that one of k samples is correct: 1 - C(n - c, k) / C(n, k), for k <= n (arXiv 2107.03374).

    In whole numbers up to one division, which Python rounds correctly: nothing overflows, and nothing cancels.
    """
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_correct, k)) / subsets


def mean_half_width(values: Sequence[float]) -> float:
    """Half-width of the 95 % interval of a mean over problems, from their standard deviation; NaN for fewer than two.

    The problems are what is drawn: the samples of one problem are not independent.
    """
    if len(values) < 2:
        return math.nan
    centre = math.fsum(values) / len(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return Z95 * math.sqrt(variance / len(values))


def mcnemar(num_gained: int, num_lost: int) -> float:
    """Two-sided p-value of McNemar's exact test: gained and lost problems are as likely under the null hypothesis.

    Twice the smaller tail of the binomial distribution of gained + lost tosses, at most 1.
    """
    num = num_gained + num_lost
    tail = sum(math.comb(num, i) for i in range(min(num_gained, num_lost) + 1))
    return min(1.0, 2 * tail / 2**num)


def paired_interval(num_gained: int, num_lost: int, num: int) -> tuple[float, float]:
    """95 % interval of the difference (gained - lost) / num of two fractions of the same problems.

    Agresti and Min (2005): the normal interval after half a problem is added to each of the four cells. It has a width
    where no problem changed, and covers at least 91 % for as few as 10 problems (a plain normal interval: 51 %).
    """
    total, changed, net = num + 2, num_gained + num_lost + 1, num_gained - num_lost
    half = Z95 * math.sqrt(changed - net**2 / total) / total
    return max(net / total - half, -1.0), min(net / total + half, 1.0)
