"""The curriculum: pools by running success rate, drawn in shares, the same on a resumed run."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import local_run
import numpy as np
import pytest
import tiny
from safetensors.numpy import load, save

from common import command_line
from common.metrics import read_lines
from common.types import Group, Prompt, Score, UserError
from launch import run
from launch.planning.curriculum import FILE, Curriculum, State, saved
from launch.planning.prompts import order_of_pass
from launch.runtime.cluster import DEFAULT_CONFIG

SHARES = (0.1, 0.2, 0.4, 0.3)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(messages=({"role": "user", "content": str(n)},), answer=str(n)) for n in range(count)]


def curriculum(count: int, shares=SHARES, **options) -> Curriculum:
    return Curriculum(prompts(count), seed=5, shares=shares, **options)


def state_of(rates: dict[int, float], count: int) -> State:
    """A state in which some problems have a rate and none was drawn."""
    state = State.new(count, 5)
    state.rates[list(rates)] = list(rates.values())
    return state


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
        pools.append((load(made.files()[FILE].tobytes())["rates"][0], int(made.pools()[0])))
    assert pools == [(0.5, 2), (0.75, 1), (0.75, 1), (0.875, 1), (0.9375, 1), (0.96875, 0), (0.484375, 2)]


@pytest.mark.parametrize(("rate", "pool"), [(0.0, 3), (0.25, 3), (0.26, 2), (0.74, 2), (0.75, 1), (0.94, 1), (0.95, 0)])
def test_the_bounds_of_the_pools(rate, pool):
    assert curriculum(1, state=state_of({0: rate}, 1)).pools().tolist() == [pool]


def test_pools_are_drawn_in_their_shares_and_each_takes_turns():
    pools = {0: 1.0, 1: 0.8, 2: 0.5, 3: 0.0}
    made = curriculum(40, state=state_of({n: pools[n % 4] for n in range(40)}, 40))
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
    state = state_of({n: 0.0 if n % 2 else 1.0 for n in range(20)}, 20)
    made = curriculum(20, state=state, shares=(0.5, 0.2, 0.2, 0.1))
    counts = Counter()
    for _ in range(600):
        [prompt] = made.draw(1)
        counts[int(prompt.answer) % 2] += 1
        made.learn([group(prompt, [None])])
    assert abs(counts[0] / 600 - 5 / 6) < 4 * np.sqrt(5 / 36 / 600)


def test_a_problem_is_not_drawn_again_before_its_result_unless_all_wait():
    made = curriculum(6, state=state_of(dict.fromkeys(range(6), 0.0), 6), left_out=frozenset({2}))
    drawn = [int(prompt.answer) for prompt in made.draw(10)]
    assert sorted(drawn[:5]) == [0, 1, 3, 4, 5]
    assert 2 not in drawn


def test_the_only_problem_of_a_pool_is_drawn_once_before_its_result():
    made = curriculum(6, state=state_of({3: 0.0}, 6), shares=(0.0, 0.0, 0.1, 0.9))
    assert sorted(int(prompt.answer) for prompt in made.draw(6)) == [0, 1, 2, 3, 4, 5]


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
    (tmp_path / FILE).write_bytes(made.files()[FILE].tobytes())
    resumed = curriculum(12, cursor=cursor, state=saved(tmp_path, 12))
    again = resumed.draw(4)
    assert [step(resumed, again) for _ in range(20)] == [step(made, ahead) for _ in range(20)]
    assert resumed.files()[FILE].tobytes() == made.files()[FILE].tobytes()


GOOD = {"rates": np.zeros(12), "last": np.zeros(12, np.int64), "drawn": np.zeros((1, 2), np.int64)}


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"rates": np.zeros(11)}, r"rates is float64 \[11\], not float64 \[12\]"),
        ({"rates": np.zeros(12, np.float32)}, "rates is float32"),
        ({"last": np.zeros(12)}, "last is float64"),
        ({"drawn": np.zeros(2, np.int64)}, "drawn is int64"),
        ({"rates": np.full(12, 2.0)}, "out of range"),
        ({"drawn": np.array([[0, 12]])}, "out of range"),
        ({"drawn": np.array([[-1, 0]])}, "out of range"),
        ({"more": np.zeros(1)}, "more"),
    ],
)
def test_a_state_that_no_run_writes_is_refused(tmp_path: Path, changed: dict[str, np.ndarray], problem: str):
    (tmp_path / FILE).write_bytes(save(GOOD))
    saved(tmp_path, 12)
    (tmp_path / FILE).write_bytes(save(GOOD | changed))
    with pytest.raises(UserError, match=f"{FILE} cannot be resumed from: .*{problem}.*; use another checkpoint"):
        saved(tmp_path, 12)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"no such file"])
def test_a_damaged_state_is_one_line(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"{FILE} cannot be resumed from: "):
        saved(tmp_path, 12)


def test_shares_must_sum_to_one():
    with pytest.raises(UserError, match=r"task\.curriculum=\[0\.5, 0\.5, 0\.5, 0\.0\] must be four shares"):
        command_line.load(["--task.curriculum", "[0.5, 0.5, 0.5, 0]"], DEFAULT_CONFIG)


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
