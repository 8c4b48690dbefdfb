"""Decoupled rewards (GDPO) of a whole step, against statistics' float64 loops; and which groups they keep."""

import math
import random
import statistics
from dataclasses import replace

import pytest
import tiny

from common.config import with_values
from common.methods import METHODS
from common.types import Group, Score
from learner.learner import Learner
from learner.selection import drop_reason, select

WEIGHTS = {"correct": 1.0, "my.module.length": -0.3, "format": 0.0, "steps": 2.5}
GDPO = METHODS["grpo"].model_copy(update={"decoupled_rewards": True})


def group(seed: int, parts: list[dict[str, float] | None], weights: dict[str, float]) -> Group:
    """A group whose rollouts have these rewards; None stands for one that failed."""
    made = tiny.group(seed, [3] * len(parts), [None] * len(parts))
    return replace(
        made,
        rollouts=tuple(
            replace(
                rollout,
                score=each and Score(total=sum(w * each[n] for n, w in weights.items()), correct=False, parts=each),
            )
            for rollout, each in zip(made.rollouts, parts, strict=True)
        ),
    )


def random_groups() -> list[Group]:
    """Rewards of scales from 0.01 to 1,000; a group with a constant reward, one with failed rollouts."""
    source = random.Random(4)
    scales = {"correct": 1.0, "my.module.length": 1000.0, "format": 0.01, "steps": 3.0}
    parts = [[{name: scale * source.random() for name, scale in scales.items()} for _ in range(4)] for _ in range(3)]
    for each in parts[1]:
        each["correct"] = 1.0
    return [group(seed, each, WEIGHTS) for seed, each in enumerate([*parts[:2], [parts[2][0], None, *parts[2][1:]]])]


def gdpo(groups: list[Group]) -> list[float]:
    """Eq. 4 to 6 of arXiv 2601.05242 as loops over single rollouts."""
    sums = []
    for each in groups:
        scores = [rollout.score for rollout in each.rollouts if rollout.score]
        columns = {name: [score.parts[name] for score in scores] for name in WEIGHTS}
        for score in scores:
            total = 0.0
            for name, weight in WEIGHTS.items():
                centre, spread = statistics.fmean(columns[name]), statistics.pstdev(columns[name])
                total += weight * (score.parts[name] - centre) / (spread + 1e-6)
            sums.append(total)
    centre, spread = statistics.fmean(sums), statistics.pstdev(sums)
    return [(total - centre) / (spread + 1e-6) for total in sums]


def test_decoupled_rewards_against_loops() -> None:
    groups = random_groups()
    selection = select(groups, GDPO, max_tokens=9, rewards=WEIGHTS)
    assert selection.advantages_B.tolist() == pytest.approx(gdpo(groups), rel=1e-9)
    assert selection.index_B == (*range(9), *range(10, 13))


def test_the_switch_off_sums_first() -> None:
    groups = random_groups()
    with_parts = select(groups, METHODS["grpo"], max_tokens=9, rewards=WEIGHTS)
    totals = [[r.score.total for r in each.rollouts if r.score] for each in groups]
    expected = [(x - statistics.fmean(each)) / (statistics.pstdev(each) + 1e-6) for each in totals for x in each]
    assert with_parts.advantages_B.tolist() == pytest.approx(expected, rel=1e-9)


def test_a_small_reward_counts_as_much_as_a_large_one() -> None:
    """Correct answers are the longer ones: the sum sees the length alone."""
    weights = {"correct": 1.0, "length": -1.0}
    parts = [{"correct": c, "length": n} for c, n in ((1.0, 300.0), (1.0, 200.0), (0.0, 100.0), (0.0, 0.0))]
    one = [group(0, parts, weights)]
    summed = select(one, METHODS["grpo"], max_tokens=9, rewards=weights).advantages_B
    decoupled = select(one, GDPO, max_tokens=9, rewards=weights).advantages_B
    assert summed.argmax().item() == 3 and summed[1] < 0
    assert decoupled.argmax().item() == 1, "correct and the shorter of the two"


def test_groups_of_equal_sums_have_a_signal() -> None:
    weights = {"a": 1.0, "b": 1.0, "c": 1.0}
    parts = [{"a": 3.0, "b": 0.0, "c": 0.0}, {"a": 0.0, "b": 2.0, "c": 1.0}, {"a": 0.0, "b": 1.0, "c": 2.0}]
    equal_sums, equal = group(0, parts, weights), group(1, [parts[0]] * 3, weights)
    drops = METHODS["grpo"].model_copy(update={"group_filter": "zero-variance"})
    assert [drop_reason(each, drops, weights) for each in (equal_sums, equal)] == ["zero-variance"] * 2
    drops = drops.model_copy(update={"decoupled_rewards": True})
    assert [drop_reason(each, drops, weights) for each in (equal_sums, equal)] == [None, "zero-variance"]
    assert select([equal_sums, equal], drops, max_tokens=9, rewards=weights).advantages_B.abs().max() > 0.1


def test_a_reward_of_weight_0_changes_nothing() -> None:
    """It neither keeps a group nor is needed: a score lacks it where it has failed."""
    weights = {"monitor": 0.0, "a": 1.0}
    drops = GDPO.model_copy(update={"group_filter": "zero-variance"})
    equal = group(0, [{"a": 1.0, "monitor": 1.0}, {"a": 1.0, "monitor": 2.0}], weights)
    assert drop_reason(equal, drops, weights) == "zero-variance"
    lacking, without = (
        group(1, [{"a": 1.0}, {"a": 2.0} | monitored, {"a": 4.0}], {"a": 1.0}) for monitored in ({"monitor": 5.0}, {})
    )
    assert drop_reason(lacking, drops, weights) is None
    got = select([lacking], drops, max_tokens=9, rewards=weights).advantages_B
    expected = select([without], drops, max_tokens=9, rewards={"a": 1.0}).advantages_B
    assert got.tolist() == expected.tolist() and expected.abs().max() > 0.1


def test_no_group_and_no_signal_are_no_division_by_zero() -> None:
    weights = {"a": 1.0}
    assert select([], GDPO, max_tokens=9, rewards=weights).advantages_B.tolist() == []
    equal = group(1, [{"a": 0.1}] * 3, weights)
    assert select([equal], GDPO, max_tokens=9, rewards=weights).advantages_B.abs().max() < 1e-3


def test_a_learner_takes_the_weights_from_the_task(tmp_path) -> None:
    config = with_values(
        tiny.config(method={"name": "grpo"}), {"task.rewards": WEIGHTS, "method.decoupled_rewards": True}
    )
    groups = random_groups()
    result = Learner(tiny.save_model(tmp_path), config, tiny.CANARY).update(groups)
    got = [tokens.advantage for tokens in result.tokens if tokens is not None]
    assert got == pytest.approx(gdpo(groups), rel=1e-6)
    assert math.isfinite(result.metrics["gradient/norm"])
