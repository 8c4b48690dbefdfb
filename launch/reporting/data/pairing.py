"""Paired seeds: the same run.seed in two groups means the same prompts in the same order, so their difference is finer.

A paired t interval is `statistics.mean` of the differences. Here: a permutation test, the seeds that a claim would
need, and the ratio of two training variances with the noise of steps in it.
"""

import math
from itertools import product

import numpy as np

from launch.reporting.data.groups import Group
from launch.reporting.data.runs import Run
from launch.reporting.data.statistics import NUM_RESAMPLES, Estimate, student

EXACT_PAIRS = 12  # up to so many pairs every sign flip is counted, 2^12
MAX_SEEDS = 1000  # a claim that needs more is not answered by seeds
POWER = 0.8
BLOCK_RESAMPLES = 1000


def common_seeds(left: Group, right: Group) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The seeds that both groups have, and those that only one has, which no pairing can use."""
    a, b = set(left.seeds), set(right.seeds)
    return tuple(sorted(a & b)), tuple(sorted(a ^ b))


def of_seeds(group: Group, values: np.ndarray, seeds: tuple[int, ...]) -> np.ndarray:
    """float [len(seeds)] of a group's values per seed."""
    by_seed = dict(zip(group.seeds, values.tolist(), strict=True))
    return np.array([by_seed[seed] for seed in seeds], dtype=float)


def permutation(differences: np.ndarray) -> float:
    """Two-sided p-value of the sign-flip test: the share of flips whose |sum| is at least the observed one.

    Exact up to 12 pairs, so never below 2 / 2^n; beyond that a sample of fixed seed, in which the observed signs
    count once. NaN without a difference.
    """
    num = len(differences)
    if not num:
        return math.nan
    if num <= EXACT_PAIRS:
        signs = np.array(list(product((1.0, -1.0), repeat=num)))
    else:
        drawn = np.random.default_rng(0).choice((1.0, -1.0), size=(NUM_RESAMPLES, num))
        signs = np.vstack([np.ones(num), drawn])
    observed = abs(differences.sum())
    tolerance = 1e-9 * np.abs(differences).sum()  # the same sum in another order is the same sum
    return float((np.abs(signs @ differences) >= observed - tolerance).mean())


def power(effect: float, num: int) -> float:
    """Chance that a two-sided paired t test at .05 of `num` pairs finds a mean of `effect` standard deviations.

    P(|T| > t) of the noncentral t, T = (Z + effect sqrt(n)) / S with S² = chi² / (n - 1), integrated over S.
    """
    freedom, shift = num - 1, effect * math.sqrt(num)
    scale = (np.arange(2000) + 0.5) / 2000 * (1 + 12 / math.sqrt(2 * freedom))  # midpoints
    log_density = (freedom - 1) * np.log(scale) - freedom * scale**2 / 2
    density = np.exp(log_density - log_density.max())
    beyond = [_normal(shift - student(freedom) * s) + _normal(-shift - student(freedom) * s) for s in scale.tolist()]
    return float((density * np.array(beyond)).sum() / density.sum())


def seeds_needed(effect: float, deviation: float) -> int | None:
    """The fewest paired seeds that find `effect` at .05 with power .8, if paired differences have this deviation.

    None without an effect or a deviation, or if 1000 would not do. By bisection: power grows with the seeds.
    """
    size = abs(effect) / deviation if deviation > 0 else math.nan
    if not math.isfinite(size) or power(size, MAX_SEEDS) < POWER:
        return None
    low, high = 1, MAX_SEEDS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(size, middle) >= POWER else (middle, high)
    return high


def block_length(num_steps: int) -> int:
    """Of the moving blocks: the cube root of the number of steps, rounded, as is usual for a variance."""
    return max(round(num_steps ** (1 / 3)), 1)


def variance_ratio(left: list[Run], right: list[Run]) -> Estimate:
    """Ratio of geometric mean training variances of paired runs, with a bootstrap over seeds and over their steps.

    Each resample draws seeds, and within a seed moving blocks of steps, the same for both runs of a pair: their prompts
    are the same. Seeds differ by the noise of their steps, too, which so counts twice: the interval is up to sqrt(2)
    too wide. Percentiles 2.5 and 97.5, fixed seed. No interval for runs of different lengths or without numbers.
    """
    halves = [[run.series("reward/mean")[len(run.steps) // 2 :] for run in side] for side in (left, right)]
    lengths = {len(half) for side in halves for half in side}
    if len(lengths) != 1 or not (num := lengths.pop()) or not np.isfinite(halves).all():
        return Estimate(value=math.nan, num=len(left))
    rewards = np.array(halves)  # [2, seeds, steps]
    variances = rewards.var(axis=2)
    if (variances <= 0).any():
        return Estimate(value=math.nan, num=len(left))
    generator, length = np.random.default_rng(0), block_length(num)
    logs = []
    for _ in range(BLOCK_RESAMPLES):
        seeds = generator.integers(len(left), size=len(left))
        starts = generator.integers(num - length + 1, size=(len(left), math.ceil(num / length)))
        steps = (starts[:, :, None] + np.arange(length)).reshape(len(left), -1)[:, :num]
        drawn = np.take_along_axis(rewards[:, seeds], steps[None], axis=2).var(axis=2)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs.append(np.mean(np.log(drawn[0]) - np.log(drawn[1])))
    numbers = np.array(logs)[np.isfinite(logs)]
    low, high = np.exp(np.quantile(numbers, [0.025, 0.975])) if len(numbers) else (math.nan, math.nan)
    value = math.exp(float(np.mean(np.log(variances[0]) - np.log(variances[1]))))
    return Estimate(value=value, low=float(low), high=float(high), num=len(left))


def _normal(value: float) -> float:
    """Distribution function of the standard normal."""
    return 0.5 * math.erfc(-value / math.sqrt(2))
