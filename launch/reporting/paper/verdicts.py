"""How an interval over seeds decides a claim: it holds, does not hold, or is inconclusive.

Verdicts use Student's and Welch's intervals, which hold their level for few seeds; only finished runs count.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np

from launch.reporting.data.groups import PAPER_ALPHA, Group, differences
from launch.reporting.data.pairing import EXACT_PAIRS, MAX_SEEDS, permutation, seeds_needed
from launch.reporting.data.statistics import Estimate, finite, mean

HOLDS, FAILS, INCONCLUSIVE = "holds", "does not hold", "inconclusive"
IN_WHICH_METHODS_DIFFER = {"method.name", "method.alpha", "method.token_weight", "method.selective"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What these runs show of one claim, and the numbers behind it."""

    claim: str
    paper: str  # the paper's own numbers
    setting: str
    verdict: str  # one of HOLDS, FAILS, INCONCLUSIVE
    reason: str
    paired: str = "-"  # the difference (or ratio) of paired seeds with its interval
    p_value: str = "-"  # of their sign flips
    needed: str = "-"  # how many paired seeds would find the paper's effect


class Missing(Exception):
    """The runs hold no numbers for a claim; the message names what is missing."""


class Measured(NamedTuple):
    """What was measured, in words, and its value; and the number of each seed, or the difference of each pair."""

    words: str
    estimate: Estimate
    per_seed: np.ndarray  # float [seeds]; of a ratio the differences of the logarithms
    paired: bool = False
    ratio: bool = False
    note: str = ""  # seeds left out of the pairing, and the interval of a block bootstrap


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A quantity that the paper says is above a threshold (or, `below`, under it)."""

    words: str
    paper: str
    measure: Callable[["Finished"], Measured]
    of_paper: float | None = None  # its number for this quantity; of its models the one that is further off
    threshold: float = 0.0
    below: bool = False
    digits: int = 3


class Finished:
    """The finished runs of one setting, grouped, by their name in the paper. Raises Missing for what is not there."""

    def __init__(self, groups: Sequence[Group]) -> None:
        whole = [replace(group, runs=tuple(run for run in group.runs if run.finished)) for group in groups]
        self.groups = [group for group in whole if group.runs]

    def sweep(self, role: str) -> list[Group]:
        return [group for group in self.groups if group.role == role]

    def candidates(self, role: str) -> list[Group]:
        """The groups that may stand for a method: at the paper's alpha; of GRPO those of the others' reduction."""
        found = self.sweep(role)
        if not found:
            raise Missing(f"no finished run of {role}")
        if role == "GRPO":
            return [g for g in found if g.method != "grpo"] or found
        at_alpha = [g for g in found if g.alpha == PAPER_ALPHA]
        if not at_alpha:
            raise Missing(f"no finished run of {role} at the paper's α {PAPER_ALPHA:g}")
        return at_alpha

    def one(self, role: str) -> Group:
        return self.candidates(role)[0]

    def pair(self, left: str, right: str) -> tuple[Group, Group]:
        """Two methods that differ in nothing else."""
        pairs = list(product(self.candidates(left), self.candidates(right)))
        found = next((pair for pair in pairs if not other_differences(pair)), pairs[0])
        require_comparable(found)
        return found


def other_differences(groups: Sequence[Group]) -> list[str]:
    """The method.* settings that differ between groups though their methods do not ask for it."""
    known = IN_WHICH_METHODS_DIFFER | ({"method.normaliser"} if any(g.method == "grpo" for g in groups) else set())
    return [key for key in differences([g.runs[0] for g in groups]) if key.startswith("method.") and key not in known]


def require_comparable(groups: Sequence[Group]) -> None:
    """Raise Missing if the groups differ in more than their methods."""
    if keys := other_differences(groups):
        names = " and ".join(dict.fromkeys(g.label for g in groups))
        raise Missing(f"{names} also differ in {', '.join(keys)}: not comparable")


def judge(claim: Claim, setting: str, groups: Sequence[Group]) -> Verdict:
    """Holds or fails if the whole interval is on one side of the threshold; otherwise inconclusive."""
    stub = Verdict(claim=claim.words, paper=claim.paper, setting=setting, verdict=INCONCLUSIVE, reason="")
    try:
        measured = claim.measure(Finished(groups))
        words, estimate = measured.words, measured.estimate
        if not np.isfinite(estimate.value):
            raise Missing(f"{words}: not recorded in these runs")
        found = f"{words}: {estimate.value:.{claim.digits}f}"
        if not estimate.has_interval:
            raise Missing(f"{found} ({_seeds(estimate.num)}); an interval needs two seeds that differ")
    except Missing as missing:
        return replace(stub, reason=str(missing))
    above, under = estimate.low > claim.threshold, estimate.high < claim.threshold
    verdict = INCONCLUSIVE if not (above or under) else HOLDS if above != claim.below else FAILS
    relation = "lies above" if above else "lies below" if under else "contains"
    interval = _interval(estimate, claim.digits)
    reason = f"{found}, 95 % {interval} {relation} {claim.threshold:g} ({_seeds(estimate.num)}){measured.note}"
    return _with_pairs(replace(stub, verdict=verdict, reason=reason), claim, measured)


def _with_pairs(verdict: Verdict, claim: Claim, measured: Measured) -> Verdict:
    """The verdict with what its paired seeds say: interval, p against the threshold, seeds that would decide it."""

    def scaled(value: float) -> float:
        return math.log(value) if measured.ratio else value

    numbers = finite(measured.per_seed)
    if len(numbers) < 2 or np.ptp(numbers) == 0:
        return verdict
    threshold = scaled(claim.threshold)
    p_value = f"{permutation(numbers - threshold):.3g}" + ("" if len(numbers) <= EXACT_PAIRS else " (sampled)")
    effect = float(numbers.mean()) - threshold  # where the paper has no number
    if claim.of_paper is not None:
        effect = scaled(claim.of_paper) - threshold
    needed = verdict.needed
    if effect:
        seeds = seeds_needed(effect, float(numbers.std(ddof=1)))
        needed = f"{seeds or f'more than {MAX_SEEDS}'}{' (for the effect found)' if claim.of_paper is None else ''}"
    return replace(verdict, paired=_paired(measured, numbers, claim.digits), p_value=p_value, needed=needed)


def _paired(measured: Measured, numbers: np.ndarray, digits: int) -> str:
    """The mean of paired differences, or the ratio, with Student's interval; "-" for a measure of one method."""
    if not measured.paired:
        return "-"
    found = mean(numbers)
    if measured.ratio:
        low, high = math.exp(found.low), math.exp(found.high)
        found = replace(found, value=math.exp(found.value), low=low, high=high)
    return f"{found.value:.{digits}f} {_interval(found, digits)}"


def _interval(estimate: Estimate, digits: int) -> str:
    return f"[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def decided(found: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """Setting -> its verdicts, inconclusive ones last; only settings in which at least one claim is decided."""
    by_setting: dict[str, list[Verdict]] = {}
    for each in sorted(found, key=lambda verdict: verdict.verdict == INCONCLUSIVE):
        by_setting.setdefault(each.setting, []).append(each)
    return {setting: of_it for setting, of_it in by_setting.items() if of_it[0].verdict != INCONCLUSIVE}


def _seeds(num: int) -> str:
    return "one seed" if num == 1 else f"{num} seeds"
