"""The paper's claims, each decided by an interval over seeds: holds, does not hold, or cannot be told.

Verdicts use Student's and Welch's intervals, which stay honest for few seeds; only finished runs count, and a final
Pass@1 only after the last step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from launch.reporting.groups import PAPER_ALPHA, Group, differences
from launch.reporting.measures import at_end, base, change, final, lowest, mean_kl, peak, variance
from launch.reporting.runs import Run
from launch.reporting.statistics import Estimate, difference, mean, ratio

HOLDS, FAILS, UNKNOWN = "holds", "does not hold", "cannot be told with these runs"
MARGIN = 0.02  # of Pass@1; the paper's section 7 asks for caution below it
KL_BOUND = 0.010
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


def variance_ratio(high: str, low: str) -> Callable[[Finished], Measured]:
    """How many times the training variance of `high` is that of `low`."""

    def measure(runs: Finished) -> Measured:
        a, b = runs.pair(high, low)
        for group in (a, b):
            if (group.per_seed(variance) == 0).any():
                raise Untold(f"a seed of {group.label} has no training variance at all, so that no ratio can be told")
        return f"training variance, {_name(a)} / {_name(b)}", ratio(a.per_seed(variance), b.per_seed(variance))

    return measure


def gain(value: Callable[[Run], float], words: str, left: str, right: str) -> Callable[[Finished], Measured]:
    """Difference of a measure between two methods."""

    def measure(runs: Finished) -> Measured:
        a, b = runs.pair(left, right)
        if value is peak and a.evaluated_steps != b.evaluated_steps:
            raise Untold(f"{a.label} and {b.label} were not evaluated at the same steps, so their peaks do not compare")
        return f"{words}, {_name(a)} − {_name(b)}", difference(a.per_seed(value), b.per_seed(value))

    return measure


def own(value: Callable[[Run], float], words: str, role: str = "SA-AH-GRPO") -> Callable[[Finished], Measured]:
    """A measure of one method's runs."""

    def measure(runs: Finished) -> Measured:
        group = runs.one(role)
        return f"{words}, {group.label}", mean(group.per_seed(value))

    return measure


def largest_kl(runs: Finished) -> Measured:
    """The mean KL of that one of the paper's methods which speaks most against a bound on all of them."""
    measured = [(f"mean KL, {g.label}", mean(g.per_seed(mean_kl))) for g in runs.groups if g.role]
    if not measured:
        raise Untold("no finished run of the paper's methods")
    above = [pair for pair in measured if pair[1].low > KL_BOUND]
    unsure = [pair for pair in measured if not pair[1].has_interval]
    return (above or unsure or [max(measured, key=lambda pair: pair[1].high)])[0]


def positive_over_negative(runs: Finished) -> Measured:
    """Final Pass@1 of AH-GRPO, a seed's mean over positive alphas against its mean over negative ones."""
    sweep = runs.sweep("AH-GRPO")
    sides = [[g for g in sweep if sign * g.alpha > 0] for sign in (1, -1)]
    if not all(sides):
        raise Untold("no finished sweep of AH-GRPO with alphas of both signs")
    refuse_unlike([g for side in sides for g in side])
    pooled = [replace(side[0], runs=tuple(run for g in side for run in g.runs)) for side in sides]
    return "final Pass@1, AH-GRPO with α > 0 − α < 0", difference(*(side.per_seed(final) for side in pooled))


def _gain_over_base(run: Run) -> float:
    return final(run) - base(run)


CLAIMS = (
    Claim(
        words="SA-AH-GRPO trains with less variance than GRPO",
        paper="3B: 0.0885 / 0.0246 = 3.6×; 1.5B: 0.0885 / 0.1718 = 0.5×",
        measure=variance_ratio("GRPO", "SA-AH-GRPO"),
        threshold=1.0,
        digits=2,
    ),
    Claim(
        words="The reduction is 3.6-fold or more",
        paper="3B: 3.6×, one seed, 150 against 180 steps",
        measure=variance_ratio("GRPO", "SA-AH-GRPO"),
        threshold=3.6,
        digits=2,
    ),
    Claim(
        words="SA-AH-GRPO trains with less variance than AH-GRPO",
        paper="3B: 0.0630 / 0.0246 = 2.6×; 1.5B: 0.0630 / 0.1718 = 0.4×",
        measure=variance_ratio("AH-GRPO", "SA-AH-GRPO"),
        threshold=1.0,
        digits=2,
    ),
    Claim(
        words=f"SA-AH-GRPO loses no peak accuracy against GRPO (not more than {MARGIN:g})",
        paper="3B: .858 against .852; 1.5B: .686 against .668",
        measure=gain(peak, "peak Pass@1", "SA-AH-GRPO", "GRPO"),
        threshold=-MARGIN,
    ),
    Claim(
        words="SA-AH-GRPO ends with a higher Pass@1 than GRPO",
        paper="3B: .846 against .846; 1.5B: .686 against .660",
        measure=gain(final, "final Pass@1", "SA-AH-GRPO", "GRPO"),
    ),
    Claim(
        words="SA-AH-GRPO ends with a higher Pass@1 than AH-GRPO",
        paper="3B: .846 against .848; 1.5B: .686 against .650",
        measure=gain(final, "final Pass@1", "SA-AH-GRPO", "AH-GRPO"),
    ),
    Claim(
        words="SA-AH-GRPO improves on the base model",
        paper="3B: .846 against .831 (measured: .846); 1.5B: .686 against .637 (measured: .652)",
        measure=own(_gain_over_base, "final − base Pass@1"),
    ),
    Claim(
        words="AH-GRPO with positive α ends above AH-GRPO with negative α",
        paper="1.5B: .640 to .654 against .634",
        measure=positive_over_negative,
    ),
    Claim(
        words="SA-AH-GRPO keeps more entropy than GRPO at the end (no entropy collapse)",
        paper="no number is given for GRPO",
        measure=gain(lambda run: at_end(run, "entropy/normalized_mean"), "H̄ of the last steps", "SA-AH-GRPO", "GRPO"),
        digits=4,
    ),
    Claim(
        words="Entropy falls during training",
        paper="3B: H̄ .0291 → .0092; 1.5B: .0432 → .0246",
        measure=own(lambda run: change(run, "entropy/normalized_mean"), "H̄, last − first steps"),
        below=True,
        digits=4,
    ),
    Claim(
        words="So the discount weakens by itself: the weight of negative rollouts rises",
        paper="3B: w̄₋ .174 → .619; 1.5B: .143 → .340",
        measure=own(lambda run: change(run, "weight/negative_mean"), "w̄₋, last − first steps"),
    ),
    Claim(
        words="The mean weight stays above 0.5 at every step",
        paper="3B: least .516 of the steps shown; 1.5B: .580",
        measure=own(lambda run: lowest(run, "weight/mean"), "least w̄ of a run"),
        threshold=0.5,
    ),
    Claim(
        words="Completions become shorter",
        paper="3B: 243 → 171 tokens; 1.5B: 151 → 142",
        measure=own(lambda run: change(run, "completion/length_mean"), "tokens, last − first steps"),
        below=True,
        digits=1,
    ),
    Claim(
        words="The mean KL stays below 0.010 with every method",
        paper="at most .00785 (3B), .00986 (1.5B)",
        measure=largest_kl,
        threshold=KL_BOUND,
        below=True,
        digits=5,
    ),
)


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


def verdicts(settings: dict[str, list[Group]]) -> list[Verdict]:
    """Every claim in every setting."""
    return [judge(claim, setting, groups) for setting, groups in settings.items() for claim in CLAIMS]


def _name(group: Group) -> str:
    """A group's label; of a baseline with another reduction than the paper's own, with a warning."""
    return f"{group.label} (Eq. 2, another reduction)" if group.method == "grpo" else group.label


def _seeds(num: int) -> str:
    return "one seed" if num == 1 else f"{num} seeds"
