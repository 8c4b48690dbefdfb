"""How a claim is decided by an interval over seeds: it holds, does not hold, or cannot be told.

Verdicts use Student's and Welch's intervals, which stay honest for few seeds; only finished runs count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from launch.reporting.data.groups import PAPER_ALPHA, Group, differences
from launch.reporting.data.statistics import Estimate

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told with these runs"
IN_WHICH_METHODS_DIFFER = {"method.name", "method.alpha", "method.token_weight", "method.selective"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What these runs say about one claim, in words and with the numbers behind them."""

    claim: str
    paper: str  # the paper's own numbers
    setting: str
    verdict: str  # one of HOLDS, FAILS, UNKNOWN
    reason: str


class Untold(Exception):
    """A claim for which the runs hold no numbers; the message says what is missing."""


Measured = tuple[str, Estimate]  # what was measured, in words, and how it came out


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A quantity that the paper says is above a threshold (or, `below`, under it)."""

    words: str
    paper: str
    measure: Callable[["Finished"], Measured]
    threshold: float = 0.0
    below: bool = False
    digits: int = 3


class Finished:
    """The finished runs of one setting, grouped, by their name in the paper. Raises Untold for what is not there."""

    def __init__(self, groups: Sequence[Group]) -> None:
        whole = [replace(group, runs=tuple(run for run in group.runs if run.finished)) for group in groups]
        self.groups = [group for group in whole if group.runs]

    def sweep(self, role: str) -> list[Group]:
        return [group for group in self.groups if group.role == role]

    def candidates(self, role: str) -> list[Group]:
        """The groups that may stand for a method: at the paper's alpha; GRPO's best with the others' reduction."""
        found = self.sweep(role)
        if not found:
            raise Untold(f"no finished run of {role}")
        if role == "GRPO":
            return [g for g in found if g.method != "grpo"] or found
        at_alpha = [g for g in found if g.alpha == PAPER_ALPHA]
        if not at_alpha:
            raise Untold(f"no finished run of {role} at the paper's α {PAPER_ALPHA:g}")
        return at_alpha

    def one(self, role: str) -> Group:
        return self.candidates(role)[0]

    def pair(self, left: str, right: str) -> tuple[Group, Group]:
        """Two methods that differ in nothing else."""
        pairs = list(product(self.candidates(left), self.candidates(right)))
        found = next((pair for pair in pairs if not other_differences(pair)), pairs[0])
        refuse_unlike(found)
        return found


def other_differences(groups: Sequence[Group]) -> list[str]:
    """The method.* settings that differ between groups though their methods do not ask for it."""
    known = IN_WHICH_METHODS_DIFFER | ({"method.normaliser"} if any(g.method == "grpo" for g in groups) else set())
    return [key for key in differences([g.runs[0] for g in groups]) if key.startswith("method.") and key not in known]


def refuse_unlike(groups: Sequence[Group]) -> None:
    """Raise Untold if something else differs between the groups too."""
    if keys := other_differences(groups):
        names = " and ".join(dict.fromkeys(g.label for g in groups))
        raise Untold(f"{names} differ in {', '.join(keys)} too, so they do not compare")


def judge(claim: Claim, setting: str, groups: Sequence[Group]) -> Verdict:
    """Holds or fails if the whole interval is on one side of the threshold; otherwise it cannot be told."""
    try:
        words, estimate = claim.measure(Finished(groups))
        if not np.isfinite(estimate.value):
            raise Untold(f"{words}: not recorded in these runs")
        found = f"{words}: {estimate.value:.{claim.digits}f}"
        if not estimate.has_interval:
            raise Untold(f"{found}, without an interval: {_seeds(estimate.num)}, and a spread needs two that differ")
    except Untold as missing:
        return Verdict(claim=claim.words, paper=claim.paper, setting=setting, verdict=UNKNOWN, reason=str(missing))
    above, under = estimate.low > claim.threshold, estimate.high < claim.threshold
    verdict = UNKNOWN if not (above or under) else HOLDS if above != claim.below else FAILS
    interval = f"[{estimate.low:.{claim.digits}f}, {estimate.high:.{claim.digits}f}]"
    relation = "lies above" if above else "lies below" if under else "contains"
    reason = f"{found}, 95 % {interval} {relation} {claim.threshold:g} ({_seeds(estimate.num)})"
    return Verdict(claim=claim.words, paper=claim.paper, setting=setting, verdict=verdict, reason=reason)


def _seeds(num: int) -> str:
    return "one seed" if num == 1 else f"{num} seeds"
