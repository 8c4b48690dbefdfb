"""Numbers over seeds: intervals of means, differences and ratios, and the paper's training variance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 10_000

# Student's t, 97.5 % quantile for 1 .. 30 degrees of freedom.
STUDENT = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
    *(2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval; low and high are NaN where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan
    num: int = 1  # seeds (of a binomial interval: 1)

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.low) and math.isfinite(self.high)


def student(freedom: float) -> float:
    """97.5 % quantile of Student's t; a fraction of a degree of freedom is dropped, so that it is never too small.

    Beyond the table by the expansion of Cornish and Fisher, which is right to 1e-4 there.
    """
    whole = max(int(freedom), 1)
    if whole <= len(STUDENT):
        return STUDENT[whole - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * whole) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * whole**2)


def finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The values that are numbers."""
    array = np.asarray(values, dtype=float)
    return array[np.isfinite(array)]


def bootstrap(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean over seeds with its bootstrap interval: percentiles of the means of resampled seeds.

    The percentiles are those of Hesterberg (2015), Phi(-sqrt(n / (n - 1)) t): a plain 2.5 % is far too narrow for
    few seeds. Limit: it never reaches beyond the smallest and the largest seed. For 2, 3 or 4 seeds it is that range,
    which covers about 50, 75 or 87 %. There is none for fewer than two seeds, nor for seeds that do not differ.
    """
    seeds = finite(values)
    if len(seeds) < 2 or np.ptp(seeds) == 0:
        return Estimate(value=float(seeds.mean()) if len(seeds) else math.nan, num=len(seeds))
    generator = np.random.default_rng(0)  # the same runs give the same report
    means = seeds[generator.integers(len(seeds), size=(NUM_RESAMPLES, len(seeds)))].mean(axis=1)
    tail = 0.5 * math.erfc(math.sqrt(len(seeds) / (len(seeds) - 1)) * student(len(seeds) - 1) / math.sqrt(2))
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(value=float(seeds.mean()), low=float(low), high=float(high), num=len(seeds))


def mean(values: Sequence[float] | np.ndarray) -> Estimate:
    """Mean over seeds with Student's interval, which holds its level for few seeds; none where `bootstrap` has none."""
    seeds = finite(values)
    if len(seeds) < 2 or np.ptp(seeds) == 0:
        return Estimate(value=float(seeds.mean()) if len(seeds) else math.nan, num=len(seeds))
    half = student(len(seeds) - 1) * float(seeds.std(ddof=1)) / math.sqrt(len(seeds))
    centre = float(seeds.mean())
    return Estimate(value=centre, low=centre - half, high=centre + half, num=len(seeds))


def difference(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> Estimate:
    """mean(left) - mean(right) over independent seeds with Welch's interval.

    None for fewer than two seeds per side, or if neither side's seeds differ. `num` is the smaller number of seeds.
    """
    a, b = finite(left), finite(right)
    value = float(a.mean() - b.mean()) if len(a) and len(b) else math.nan
    num = min(len(a), len(b))
    if num < 2 or np.ptp(a) + np.ptp(b) == 0:
        return Estimate(value=value, num=num)
    squares = np.array([a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)])
    freedom = squares.sum() ** 2 / (squares**2 / np.array([len(a) - 1, len(b) - 1])).sum()
    half = student(float(freedom)) * math.sqrt(squares.sum())
    return Estimate(value=value, low=value - half, high=value + half, num=num)


def ratio(left: Sequence[float] | np.ndarray, right: Sequence[float] | np.ndarray) -> Estimate:
    """Ratio of the geometric means of positive numbers over independent seeds; Welch's interval of the logarithms.

    NaN if a number is not positive: dropping its seed would give the ratio of the remaining seeds.
    """
    a, b = finite(left), finite(right)
    if (a <= 0).any() or (b <= 0).any():
        return Estimate(value=math.nan, num=min(len(a), len(b)))
    logs = difference(np.log(a), np.log(b))
    return Estimate(value=math.exp(logs.value), low=math.exp(logs.low), high=math.exp(logs.high), num=logs.num)


def binomial(fraction: float, num: int) -> Estimate:
    """A fraction of `num` problems with its interval 1.96 sqrt(p (1 - p) / n), cut to [0, 1] (the paper's 4.4)."""
    half = 1.96 * math.sqrt(fraction * (1 - fraction) / num) if num and math.isfinite(fraction) else math.nan
    return Estimate(value=fraction, low=max(fraction - half, 0.0), high=min(fraction + half, 1.0))


def training_variance(rewards: np.ndarray) -> float:
    """Variance (population) of the mean step reward over the second half of a run (the paper's Table 2).

    rewards: float [steps], NaN where a step has none. NaN if that leaves fewer than two numbers.
    """
    second_half = finite(rewards[len(rewards) // 2 :])
    return float(second_half.var()) if len(second_half) >= 2 else math.nan


def detrended_variance(rewards: np.ndarray) -> float:
    """Variance (population) of the same numbers around their least-squares line: at most the training variance.

    The training variance also counts what a run still learns in its second half; this one does not.
    rewards: float [steps], NaN where a step has none. NaN if its second half has fewer than three numbers.
    """
    second_half = rewards[len(rewards) // 2 :]
    at = np.flatnonzero(np.isfinite(second_half))
    if len(at) < 3:
        return math.nan
    line = np.polynomial.Polynomial.fit(at, second_half[at], deg=1)
    return float(((second_half[at] - line(at)) ** 2).mean())
