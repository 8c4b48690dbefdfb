"""A model of a step's cost on many devices, fitted to measured steps. Pure numpy.

    sample   = E[max over actors] (a1 longest completion + a2 tokens of its part) * jitter
    learn    = E[max over ranks] (b0 + b1 packed tokens of its part) * jitter
    targets  = c0 + c1 tokens of the step          every rank packs and weights the whole step
    sums     = sum over (gradient, statistics) of s1 2(R-1) + s2 2(R-1)/R bytes          gloo's ring
    publish  = e0 + e1 actors + load               load: of an actor that has its device to itself
    driver   = d0 + d1 tokens of the step + d2 (ranks + actors)

The coefficients are at least 0. Each line is fitted alone, to means of measured points, by least squares of relative
errors. The expected maxima (stragglers) are simulated: prompts with the lengths of their completions are drawn from the
measured ones and cut into shares; jitter, the ratio of a share's time to its fit, is drawn from the measured ones too.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

from launch.benchmarks.scaling_measured import Measured, Point

DRAWS = 300  # of the coefficients, for the error bars
ITERATIONS = 4  # of the weights of a fit
SIMULATED_STEPS = 100  # of which the expected maximum over shares is the mean


@dataclass(frozen=True, slots=True)
class Fit:
    """Coefficients [k] of one line of the model; `draws` [DRAWS, k] has their uncertainty."""

    coefficients: np.ndarray
    draws: np.ndarray

    @property
    def all(self) -> np.ndarray:
        """[1 + DRAWS, k]: the fit, then its draws."""
        return np.vstack([self.coefficients, self.draws])


def non_negative(rows: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares with coefficients of at least 0, exact: the best of all subsets of the few columns."""
    best, least = np.zeros(rows.shape[1]), float(values @ values)
    for size in range(rows.shape[1], 0, -1):
        for columns in combinations(range(rows.shape[1]), size):
            chosen, *_ = np.linalg.lstsq(rows[:, columns], values, rcond=None)
            error = float(((rows[:, columns] @ chosen - values) ** 2).sum())
            if chosen.min() >= 0 and error < least:
                best, least = np.zeros(rows.shape[1]), error
                best[list(columns)] = chosen
        if size == rows.shape[1] and best.any():  # no subset is better than all columns
            break
    return best


def relative(rows: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Non-negative least squares of errors relative to the fit. Errors relative to what was measured would favour small
    values."""
    weights = seconds
    for _ in range(ITERATIONS):
        coefficients = non_negative(rows / weights[:, None], seconds / weights)
        weights = np.maximum(rows @ coefficients, 1e-3 * seconds)
    return coefficients


def fit(rows: np.ndarray, seconds: np.ndarray, generator: np.random.Generator) -> Fit:
    """The coefficients for seconds [n] of rows [n, k], and a parametric bootstrap with log-normal errors.

    Each draw has its own variance, from chi-squared with n - k degrees of freedom: with few points the intervals are as
    wide as Student's.
    """
    number, columns = rows.shape
    assert number > columns, f"{number} points do not determine {columns} coefficients and their errors"
    best = relative(rows, seconds)
    modelled = np.maximum(rows @ best, 1e-3 * seconds)
    squares = float((np.log(seconds / modelled) ** 2).sum())
    deviations = np.sqrt(squares / generator.chisquare(number - columns, DRAWS))
    noise = np.exp(deviations[:, None] * generator.standard_normal((DRAWS, number)))
    return Fit(best, np.array([relative(rows, each) for each in modelled * noise]))


def line(rows: Iterable[tuple[Hashable, Sequence[float], float]]) -> Fit:
    """The fit to the means of what was measured at each point, from (point, columns, seconds)."""
    points: dict[Hashable, list[list[float]]] = defaultdict(list)
    for point, columns, seconds in rows:
        points[point].append([*columns, seconds])
    mean = np.array([np.mean(each, axis=0) for each in points.values()])
    return fit(mean[:, :-1], mean[:, -1], np.random.default_rng(0))


def ring_factors(ranks: int, num_bytes: float) -> tuple[float, float]:
    """Messages one after the other, and bytes that each rank sends, of one sum over a ring."""
    return 2 * (ranks - 1), 2 * (ranks - 1) / ranks * num_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What is dealt out to the shares of a step, and how it is summed."""

    groups: tuple[tuple[int, ...], ...]  # measured ones: tokens of the prompt, then of its completions
    gradient_bytes: int  # of each reduce
    exchange_token_bytes: tuple[int, ...]  # of each exchange, per sampled token
    num_reduces: int = 1

    @property
    def group_tokens(self) -> float:
        """Sampled tokens of a prompt, on average."""
        return float(np.mean([sum(group[1:]) for group in self.groups]))


@dataclass(frozen=True, kw_only=True)
class Model:
    """The fitted lines."""

    sample: Fit
    learn: Fit
    targets: Fit
    sums: Fit
    publish: Fit
    load: Fit
    driver: Fit
    sample_jitter: np.ndarray  # ratios to the fit, mean 1
    learn_jitter: np.ndarray
    work: Work
    shares: dict[tuple[int, int], tuple[np.ndarray, ...]] = field(
        default_factory=dict
    )  # simulated, by (prompts, number)

    def phases(self, point: Point) -> dict[str, np.ndarray]:
        """Modelled seconds [1 + DRAWS] of each phase: the fit, then its draws."""
        tokens = self.work.group_tokens * point.prompts
        reduced = [float(self.work.gradient_bytes)] * self.work.num_reduces
        sizes = [*reduced, *(each * tokens for each in self.work.exchange_token_bytes)]
        ring = np.sum([ring_factors(point.ranks, each) for each in sizes], axis=0)
        longest, sampled, _ = self._dealt(point.prompts, point.actors)
        *_, packed = self._dealt(point.prompts, point.ranks)
        return {
            "sample": expected_maximum(self.sample.all, (longest, sampled), self.sample_jitter),
            "learn": expected_maximum(self.learn.all, (np.ones_like(packed), packed), self.learn_jitter),
            "targets": self.targets.all @ [1, tokens],
            "sums": self.sums.all @ ring,
            "publish": self.publish.all @ [1, point.actors] + self.load.all @ [1, 0],
            "driver": self.driver.all @ [1, tokens, point.ranks + point.actors],
        }

    def fits(self) -> dict[str, Fit]:
        """The lines by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Fit)}

    def seconds(self, point: Point) -> np.ndarray:
        """Modelled seconds [1 + DRAWS] of a step."""
        return np.sum(list(self.phases(point).values()), axis=0)

    def tokens_per_second(self, point: Point) -> np.ndarray:
        """[1 + DRAWS]"""
        return self.work.group_tokens * point.prompts / self.seconds(point)

    def _dealt(self, prompts: int, number: int) -> tuple[np.ndarray, ...]:
        if (prompts, number) not in self.shares:
            self.shares[prompts, number] = deal(self.work.groups, prompts, number, np.random.default_rng(0))
        return self.shares[prompts, number]


def deal(
    groups: Sequence[Sequence[int]], prompts: int, number: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Longest completion, sampled tokens and packed tokens, [SIMULATED_STEPS, shares] each, of steps of `prompts` drawn
    groups cut into at most `number` consecutive shares, as launch/runtime/fleet.py cuts a request."""
    per_group = np.array([(max(group[1:]), sum(group[1:]), sum(group)) for group in groups], float)
    drawn = per_group[generator.integers(len(groups), size=(SIMULATED_STEPS, prompts))]
    starts = np.arange(0, prompts, -(-prompts // number))
    longest = np.maximum.reduceat(drawn[..., 0], starts, axis=1)
    sampled, packed = (np.add.reduceat(drawn[..., i], starts, axis=1) for i in (1, 2))
    return longest, sampled, packed


def expected_maximum(coefficients: np.ndarray, columns: Sequence[np.ndarray], jitter: np.ndarray) -> np.ndarray:
    """Mean over simulated steps of the slowest share's seconds, for each row of `coefficients`."""
    drawn = np.random.default_rng(1).choice(jitter, size=columns[0].shape)
    jittered = [drawn * column for column in columns]
    return np.array([np.tensordot(row, jittered, axes=1).max(axis=1).mean() for row in coefficients])


def jitter(shares: Iterable[Sequence[float]]) -> np.ndarray:
    """How the shares of one step differ, from each step's ratios of seconds to the fit; mean 1.

    What the shares of a step have in common cancels. Their mean takes 1/n of their variance, which is restored.
    """
    several = [np.array(ratios) for ratios in shares if len(ratios) > 1]
    found = [1 + (each / each.mean() - 1) * np.sqrt(len(each) / (len(each) - 1)) for each in several]
    return np.concatenate(found) if found else np.ones(1)


def fitted(measured: Measured, work: Work) -> Model:
    """The model of what was measured."""
    steps = measured.steps
    parts = [(step, part) for step in steps for part in step.parts]
    ranks = [(step, rank) for step in steps for rank in step.ranks]
    all_sums = [*measured.sums, *((step.point.ranks, each) for step, rank in ranks for each in rank.sums)]
    all_publishes = [*measured.publishes, *(step.publish for step in steps)]
    sample = line((step.point, (part.longest, part.tokens), part.seconds) for step, part in parts)
    learn = line((step.point, (1, rank.packed_tokens), rank.own_seconds) for step, rank in ranks)
    return Model(
        sample=sample,
        learn=learn,
        targets=line((step.point, (1, step.tokens), rank.targets_seconds) for step, rank in ranks),
        sums=line(((number, each.bytes), ring_factors(number, each.bytes), each.seconds) for number, each in all_sums),
        publish=line(
            ((each.actors, each.sharing), (1, each.actors), each.seconds - each.load_seconds) for each in all_publishes
        ),
        load=line(((each.actors, each.sharing), (1, each.sharing - 1), each.load_seconds) for each in all_publishes),
        driver=line(  # its noise is of single steps: each is a point
            (number, (1, step.tokens, step.point.ranks + step.point.actors), step.phases["driver"])
            for number, step in enumerate(steps)
        ),
        sample_jitter=jitter(
            [part.seconds / float(sample.coefficients @ [part.longest, part.tokens]) for part in step.parts]
            for step in steps
        ),
        learn_jitter=jitter(
            [rank.own_seconds / float(learn.coefficients @ [1, rank.packed_tokens]) for rank in step.ranks]
            for step in steps
        ),
        work=work,
    )


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 % interval of the draws of [1 + DRAWS] values."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return float(low), float(high)
