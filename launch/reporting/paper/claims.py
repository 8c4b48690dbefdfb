"""The claims of the paper, its own numbers for each, and what is measured for it in the runs given."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from launch.reporting.data.groups import Group
from launch.reporting.data.measures import at_end, base, change, final, highest_later, lowest, mean_kl, peak, variance
from launch.reporting.data.pairing import block_length, common_seeds, of_seeds, variance_ratio
from launch.reporting.data.problems import by_problem
from launch.reporting.data.runs import Run
from launch.reporting.data.statistics import difference, mean, ratio
from launch.reporting.paper.verdicts import Claim, Finished, Measured, Missing, Verdict, judge, require_comparable

MARGIN = 0.02  # of Pass@1; the paper's section 7 asks for caution below it
KL_BOUND = 0.010


def less_variance(high: str, low: str) -> Callable[[Finished], Measured]:
    """How many times the training variance of `high` is that of `low`."""

    def measure(runs: Finished) -> Measured:
        a, b = runs.pair(high, low)
        for group in (a, b):
            if (group.per_seed(variance) == 0).any():
                raise Missing(f"a seed of {group.label} has a training variance of 0: no ratio")
        compared = _compared(f"training variance, {_name(a)} / {_name(b)}", a, b, variance, of_ratio=True)
        return compared._replace(note=compared.note + _blocks(a, b))

    return measure


def gain(value: Callable[[Run], float], words: str, left: str, right: str) -> Callable[[Finished], Measured]:
    """Difference of a measure between two methods."""

    def measure(runs: Finished) -> Measured:
        a, b = runs.pair(left, right)
        if value is peak and a.evaluated_steps != b.evaluated_steps:
            raise Missing(f"{a.label} and {b.label} were not evaluated at the same steps: peaks are not comparable")
        compared = _compared(f"{words}, {_name(a)} − {_name(b)}", a, b, value)
        if value is not final:
            return compared
        sides = zip(*_paired_runs(a, b), strict=True)
        pairs = [((one, one.num_steps), (other, other.num_steps)) for one, other in sides]
        return compared._replace(note=compared.note + by_problem(pairs))

    return measure


def own(value: Callable[[Run], float], words: str, role: str = "SA-AH-GRPO") -> Callable[[Finished], Measured]:
    """A measure of one method's runs."""

    def measure(runs: Finished) -> Measured:
        group = runs.one(role)
        measured = _of_one(f"{words}, {group.label}", group, value)
        if value is not _gain_over_base:
            return measured
        return measured._replace(note=by_problem([((run, run.num_steps), (run, 0)) for run in group.runs]))

    return measure


def largest_kl(runs: Finished) -> Measured:
    """The mean KL of the one of the paper's methods that is the strongest evidence against a bound on all of them."""
    measured = [_of_one(f"mean KL, {g.label}", g, mean_kl) for g in runs.groups if g.role]
    if not measured:
        raise Missing("no finished run of the paper's methods")
    above = [pair for pair in measured if pair.estimate.low > KL_BOUND]
    unsure = [pair for pair in measured if not pair.estimate.has_interval]
    return (above or unsure or [max(measured, key=lambda pair: pair.estimate.high)])[0]


def _pooled(groups: Sequence[Group]) -> Group:
    """Groups that differ in alpha as one; a seed's value is then its mean over the alphas."""
    return replace(groups[0], runs=tuple(run for each in groups for run in each.runs))


def positive_over_negative(runs: Finished) -> Measured:
    """Final Pass@1 of AH-GRPO, a seed's mean over positive alphas against its mean over negative ones."""
    sweep = runs.sweep("AH-GRPO")
    above, below = ([g for g in sweep if sign * g.alpha > 0] for sign in (1, -1))
    if not above or not below:
        raise Missing("no finished sweep of AH-GRPO with alphas of both signs")
    require_comparable([*above, *below])
    return _compared("final Pass@1, AH-GRPO with α > 0 − α < 0", _pooled(above), _pooled(below), final)


def negative_over_base(runs: Finished) -> Measured:
    """Final Pass@1 of AH-GRPO with negative alphas against the model before training."""
    if not (negative := [g for g in runs.sweep("AH-GRPO") if g.alpha < 0]):
        raise Missing("no finished run of AH-GRPO with a negative α")
    require_comparable(negative)
    return _of_one("final − base Pass@1, AH-GRPO with α < 0", _pooled(negative), _gain_over_base)


def _of_one(words: str, group: Group, value: Callable[[Run], float]) -> Measured:
    values = group.per_seed(value)
    return Measured(words, mean(values), values)


def _compared(
    words: str, left: Group, right: Group, value: Callable[[Run], float], *, of_ratio: bool = False
) -> Measured:
    """Two groups by Welch over all their seeds, and the seeds that both have as pairs."""
    a, b = left.per_seed(value), right.per_seed(value)
    common, alone = common_seeds(left, right)
    pairs = [of_seeds(left, a, common), of_seeds(right, b, common)]
    differences = np.subtract(*(np.log(pairs) if of_ratio else pairs))
    note = f"; without a pair: seeds {', '.join(map(str, alone))}" if alone else ""
    return Measured(words, (ratio if of_ratio else difference)(a, b), differences, True, of_ratio, note)


def _paired_runs(left: Group, right: Group) -> list[list[Run]]:
    """One run of each seed that both groups have, of either group."""
    common, _ = common_seeds(left, right)
    return [[next(run for run in group.runs if run.seed == seed) for seed in common] for group in (left, right)]


def _blocks(left: Group, right: Group) -> str:
    """In words, the ratio of training variances with the noise of steps in it: for one run of each paired seed."""
    sides = _paired_runs(left, right)
    found = variance_ratio(*sides) if sides[0] else None
    if found is None or not found.has_interval:
        return ""
    length = block_length(len(sides[0][0].steps) - len(sides[0][0].steps) // 2)
    return f"; seeds and steps resampled in blocks of {length}: [{found.low:.2f}, {found.high:.2f}]"


def _name(group: Group) -> str:
    """A group's label; a baseline with another reduction than the paper's own is marked."""
    return f"{group.label} (Eq. 2, another reduction)" if group.method == "grpo" else group.label


def _gain_over_base(run: Run) -> float:
    return final(run) - base(run)


CLAIMS = (
    Claim(
        words="SA-AH-GRPO trains with less variance than GRPO",
        paper="3B: 0.0885 / 0.0246 = 3.6×; 1.5B: 0.0885 / 0.1718 = 0.5×",
        of_paper=0.0885 / 0.0246,
        measure=less_variance("GRPO", "SA-AH-GRPO"),
        threshold=1.0,
        digits=2,
    ),
    Claim(
        words="The reduction is 3.6-fold or more",
        paper="3B: 3.6×, one seed, 150 against 180 steps",
        of_paper=3.6,
        measure=less_variance("GRPO", "SA-AH-GRPO"),
        threshold=3.6,
        digits=2,
    ),
    Claim(
        words="SA-AH-GRPO trains with less variance than AH-GRPO",
        paper="3B: 0.0630 / 0.0246 = 2.6×; 1.5B: 0.0630 / 0.1718 = 0.4×",
        of_paper=0.0630 / 0.0246,
        measure=less_variance("AH-GRPO", "SA-AH-GRPO"),
        threshold=1.0,
        digits=2,
    ),
    Claim(
        words=f"SA-AH-GRPO loses no peak accuracy against GRPO (not more than {MARGIN:g})",
        paper="3B: .858 against .852; 1.5B: .686 against .668",
        of_paper=0.006,
        measure=gain(peak, "peak Pass@1", "SA-AH-GRPO", "GRPO"),
        threshold=-MARGIN,
    ),
    Claim(
        words="SA-AH-GRPO ends with a higher Pass@1 than GRPO",
        paper="3B: .846 against .846; 1.5B: .686 against .660",
        of_paper=0.026,
        measure=gain(final, "final Pass@1", "SA-AH-GRPO", "GRPO"),
    ),
    Claim(
        words="SA-AH-GRPO ends with a higher Pass@1 than AH-GRPO",
        paper="3B: .846 against .848; 1.5B: .686 against .650",
        of_paper=0.036,
        measure=gain(final, "final Pass@1", "SA-AH-GRPO", "AH-GRPO"),
    ),
    Claim(
        words="SA-AH-GRPO improves on the base model",
        paper="3B: .846 against .831 (measured: .846); 1.5B: .686 against .637 (measured: .652)",
        of_paper=0.034,
        measure=own(_gain_over_base, "final − base Pass@1"),
    ),
    Claim(
        words="AH-GRPO improves on the base model",
        paper="3B: .848 against .831 (measured: .846); 1.5B: .650 against .637 (measured: .652)",
        of_paper=0.002,
        measure=own(_gain_over_base, "final − base Pass@1", "AH-GRPO"),
    ),
    Claim(
        words="GRPO improves on the base model",
        paper="3B: .846 against .831 (measured: .846); 1.5B: .660 against .637 (measured: .652)",
        of_paper=0.008,
        measure=own(_gain_over_base, "final − base Pass@1", "GRPO"),
    ),
    Claim(
        words="AH-GRPO with positive α ends above AH-GRPO with negative α",
        paper="1.5B: .640 to .654 against .634",
        of_paper=0.014,
        measure=positive_over_negative,
    ),
    Claim(
        words="AH-GRPO with negative α ends below the base model",
        paper="1.5B: .634 against .637 (measured: .652)",
        of_paper=-0.018,
        measure=negative_over_base,
        below=True,
    ),
    Claim(
        words="The standard deviation of a step's rewards stays below 0.25 in later training",
        paper="3B: .163 to .240 from step 90 on, but .488 at step 120; 1.5B: .255 to 1.571",
        measure=own(lambda run: highest_later(run, "reward/std"), "largest reward std, second half"),
        threshold=0.25,
        below=True,
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
        of_paper=-0.0199,
        measure=own(lambda run: change(run, "entropy/normalized_mean"), "H̄, last − first steps"),
        below=True,
        digits=4,
    ),
    Claim(
        words="The discount weakens by itself: the weight of negative rollouts rises",
        paper="3B: w̄₋ .174 → .619; 1.5B: .143 → .340",
        of_paper=0.445,
        measure=own(lambda run: change(run, "weight/negative_mean"), "w̄₋, last − first steps"),
    ),
    Claim(
        words="The mean weight stays above 0.5 at every step",
        paper="smallest of the steps shown, 3B: .516; 1.5B: .580",
        of_paper=0.516,
        measure=own(lambda run: lowest(run, "weight/mean"), "smallest w̄ of a run"),
        threshold=0.5,
    ),
    Claim(
        words="Completions become shorter",
        paper="3B: 243 → 171 tokens; 1.5B: 151 → 142",
        of_paper=-72.0,
        measure=own(lambda run: change(run, "completion/length_mean"), "tokens, last − first steps"),
        below=True,
        digits=1,
    ),
    Claim(
        words="The mean KL stays below 0.010 with every method",
        paper="at most .00785 (3B), .00986 (1.5B)",
        of_paper=0.00785,
        measure=largest_kl,
        threshold=KL_BOUND,
        below=True,
        digits=5,
    ),
    Claim(
        words="SA-AH-GRPO moves further from the reference than AH-GRPO",
        paper="mean KL, 3B: .00785 against .00512; 1.5B: .00986 against .00512",
        of_paper=0.00273,
        measure=gain(mean_kl, "mean KL", "SA-AH-GRPO", "AH-GRPO"),
        digits=5,
    ),
)


def verdicts(settings: dict[str, list[Group]]) -> list[Verdict]:
    """Every claim in every setting."""
    return [judge(claim, setting, groups) for setting, groups in settings.items() for claim in CLAIMS]
