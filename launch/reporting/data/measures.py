"""Single numbers of a run, and Pass@1 of a group, for tables, figures and claims; NaN where absent."""

import math

import numpy as np

from launch.reporting.data.groups import Group
from launch.reporting.data.runs import Run
from launch.reporting.data.statistics import (
    Estimate,
    binomial,
    bootstrap,
    detrended_variance,
    finite,
    training_variance,
)

EDGE_STEPS = 5  # "at the start" and "at the end" are means of so many steps, of at most half of them in a short run


def final(run: Run) -> float:
    """Pass@1 after the last step of the whole run; NaN before that was evaluated."""
    return run.pass_at_1().get(int(run.settings["run.steps"]), math.nan)


def peak(run: Run) -> float:
    """The highest Pass@1 of all checkpoints (step 0, the model before training, does not count)."""
    return max((v for step, v in run.pass_at_1().items() if step > 0 and math.isfinite(v)), default=math.nan)


def base(run: Run) -> float:
    """Pass@1 of the model before training."""
    return run.pass_at_1().get(0, math.nan)


def variance(run: Run) -> float:
    """The paper's training variance."""
    return training_variance(run.series("reward/mean"))


def detrended(run: Run) -> float:
    """The detrended training variance: around a straight line, so without what the run still learns."""
    return detrended_variance(run.series("reward/mean"))


def mean_kl(run: Run) -> float:
    """Mean over all steps of the mean per-token KL."""
    return _mean(run.series("kl/mean"))


def mean_idle(run: Run) -> float:
    """Mean over all steps of the idle share of the devices."""
    return _mean(run.series("idle/mean_fraction"))


def at_start(run: Run, metric: str) -> float:
    """Mean of a metric over the first steps."""
    return _mean(run.series(metric)[: _edge(run)])


def at_end(run: Run, metric: str) -> float:
    """Mean of a metric over the last steps."""
    return _mean(run.series(metric)[-_edge(run) :])


def _edge(run: Run) -> int:
    return min(EDGE_STEPS, max(len(run.steps) // 2, 1))


def change(run: Run, metric: str) -> float:
    """End minus start; NaN for a run too short to have both."""
    long_enough = len(run.steps) >= 2 * EDGE_STEPS
    return at_end(run, metric) - at_start(run, metric) if long_enough else math.nan


def lowest(run: Run, metric: str) -> float:
    """The smallest value of a metric over all steps."""
    return float(np.fmin.reduce(run.series(metric), initial=math.nan))  # NaN only if it has no number


def highest_later(run: Run, metric: str) -> float:
    """The largest value of a metric over the second half of the steps."""
    values = run.series(metric)
    return float(np.fmax.reduce(values[len(values) // 2 :], initial=math.nan))


def _mean(values: np.ndarray) -> float:
    numbers = finite(values)
    return float(numbers.mean()) if len(numbers) else math.nan


def evaluated(group: Group, values: np.ndarray) -> Estimate:
    """Pass@1 over seeds; for one seed, or equal values, with the binomial interval of one evaluation."""
    estimate = bootstrap(values)
    if not estimate.has_interval:
        return binomial(estimate.value, max(run.num_problems for run in group.runs))
    return estimate


def pass_at(group: Group, step: int) -> Estimate:
    """Greedy Pass@1 of a group at one step."""
    return evaluated(group, group.per_seed(lambda run: run.pass_at_1().get(step, math.nan)))
