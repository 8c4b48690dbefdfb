"""The curriculum: pools by running success rate, drawn in shares, the same on a resumed run."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import local_run
import numpy as np
import pytest
import tiny

from common.command_line import load
from common.metrics import read_lines
from common.types import Group, Prompt, Score, UserError
from launch import run
from launch.planning.curriculum import Curriculum, State, saved
from launch.planning.prompts import order_of_pass
from launch.runtime.cluster import DEFAULT_CONFIG

SHARES = (0.1, 0.2, 0.4, 0.3)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(messages=({"role": "user", "content": str(n)},), answer=str(n)) for n in range(count)]


def curriculum(count: int, shares=SHARES, **options) -> Curriculum:
    return Curriculum(prompts(count), seed=5, shares=shares, **options)


def group(prompt: Prompt, correct: list[bool | None]) -> Group:
    """A group with these results; None is a reward that failed."""
    made = tiny.group(prompt.index, [2] * len(correct), [0.0] * len(correct))
    scores = [None if c is None else Score(total=0.5, correct=c, parts={}) for c in correct]
    rollouts = (replace(r, score=score) for r, score in zip(made.rollouts, scores, strict=True))
    return Group(prompt=prompt, rollouts=tuple(rollouts))


def test_new_problems_come_once_each_in_the_shuffled_order():
    made = curriculum(10)
    drawn = made.draw(10)
    assert [int(prompt.answer) for prompt in drawn] == order_of_pass(10, 5, 0).tolist()
    assert [prompt.index for prompt in drawn] == list(range(10))


def test_a_rate_is_the_mean_of_the_last_group_and_the_rate_before():
    made = curriculum(1, shares=(0.25, 0.25, 0.25, 0.25))
    pools = []
    for results in ([True, False], [True, True], [None, None], [True, True], [True, None], [True] * 4, [False] * 4):
        [prompt] = made.draw(1)
        made.learn([group(prompt, results)])
        pools.append((made.state()["curriculum"]["rates"][0], int(made.pools()[0])))
    assert pools == [(0.5, 2), (0.75, 1), (0.75, 1), (0.875, 1), (0.9375, 1), (0.96875, 0), (0.484375, 2)]


@pytest.mark.parametrize(("rate", "pool"), [(0.0, 3), (0.25, 3), (0.26, 2), (0.74, 2), (0.75, 1), (0.94, 1), (0.95, 0)])
def test_the_bounds_of_the_pools(rate, pool):
    assert curriculum(1, state=State(rates={0: rate})).pools().tolist() == [pool]


def test_pools_are_drawn_in_their_shares_and_each_takes_turns():
    pools = {0: 1.0, 1: 0.8, 2: 0.5, 3: 0.0}
    made = curriculum(40, state=State(rates={n: pools[n % 4] for n in range(40)}))
    counts = Counter()
    for _ in range(2000):
        [prompt] = made.draw(1)
        counts[int(prompt.answer)] += 1
        made.learn([group(prompt, [None, None])])  # the rates stay
    for pool, share in enumerate(SHARES):
        each = [counts[n] for n in range(40) if n % 4 == pool]
        assert abs(sum(each) / 2000 - share) < 4 * np.sqrt(share * (1 - share) / 2000)
        assert max(each) - min(each) <= 1


def test_an_empty_pool_leaves_its_share_to_the_others():
    made = curriculum(
        20, state=State(rates={n: (0.0 if n % 2 else 1.0) for n in range(20)}), shares=(0.5, 0.2, 0.2, 0.1)
    )
    counts = Counter()
    for _ in range(600):
        [prompt] = made.draw(1)
        counts[int(prompt.answer) % 2] += 1
        made.learn([group(prompt, [None])])
    assert abs(counts[0] / 600 - 5 / 6) < 4 * np.sqrt(5 / 36 / 600)


def test_a_problem_is_not_drawn_again_before_its_result_unless_all_wait():
    made = curriculum(6, state=State(rates=dict.fromkeys(range(6), 0.0)), left_out=frozenset({2}))
    drawn = [int(prompt.answer) for prompt in made.draw(10)]
    assert sorted(drawn[:5]) == [0, 1, 3, 4, 5]
    assert 2 not in drawn


def test_a_resumed_curriculum_draws_the_same(tmp_path: Path):
    """With prompts that are drawn ahead of the results, which the checkpoint keeps too."""
    rng = np.random.default_rng(0)
    results = {index: rng.random(2) < rng.random() for index in range(200)}

    def step(made: Curriculum, ahead: list[Prompt]) -> list[tuple[int, str]]:
        taken, ahead[:] = ahead[:4], ahead[4:] + made.draw(4)
        made.learn([group(prompt, results[prompt.index].tolist()) for prompt in taken])
        return [(prompt.index, prompt.answer) for prompt in taken]

    made = curriculum(12)
    ahead = made.draw(4)
    for _ in range(10):
        step(made, ahead)
    cursor = ahead[0].index
    (tmp_path / "run_state.json").write_text(json.dumps({"step": 10, **made.state()}))
    resumed = curriculum(12, cursor=cursor, state=saved(tmp_path, 12))
    again = resumed.draw(4)
    assert [step(resumed, again) for _ in range(20)] == [step(made, ahead) for _ in range(20)]
    assert resumed.state() == made.state()


@pytest.mark.parametrize(
    "state",
    [None, [], {"rates": {"12": 0.5}}, {"rates": {"0": "nan"}}, {"rates": {"0": 2}}, {"drawn": {"1": -1}}, {"more": 1}],
)
def test_a_state_that_no_run_writes_is_refused(tmp_path: Path, state: object):
    (tmp_path / "run_state.json").write_text(json.dumps({"step": 1, "curriculum": state}))
    with pytest.raises(UserError, match=r"has no curriculum \(.*\); use another checkpoint"):
        saved(tmp_path, 12)


def test_shares_must_sum_to_one():
    with pytest.raises(UserError, match=r"task\.curriculum=\[0\.5, 0\.5, 0\.5, 0\.0\] must be four shares"):
        load(["--task.curriculum", "[0.5, 0.5, 0.5, 0]"], DEFAULT_CONFIG)


def test_a_run_that_is_resumed_has_the_same_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    local_run.install(monkeypatch)
    options = ["--task.curriculum", "[0.1, 0.2, 0.4, 0.3]", "--task.num_train", "5", "--run.steps", "6"]
    arguments = local_run.options(local_run.save_model(tmp_path / "model"), tmp_path / "run", *options)
    assert run.main(arguments) == 0
    whole = read_lines(tmp_path / "run" / "rollouts.jsonl")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:06d}")
    assert run.main([*arguments, "--run.resume"]) == 0
    assert read_lines(tmp_path / "run" / "rollouts.jsonl") == whole
    first_pass = [record["prompt"] for record in whole if record["prompt_index"] < 5]
    assert [record["prompt"] for record in whole if 5 <= record["prompt_index"] < 10] != first_pass, "it has learned"
