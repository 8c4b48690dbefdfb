"""The names in task.rewards: each bad one is one line before a run; and what a run folder keeps of them."""

import math
import textwrap
from pathlib import Path

import pytest

from actor import rewards
from actor.reward_functions import Call, find, values_of
from common.command_line import build, load
from common.config import Config, dump, with_values
from common.types import Prompt, UserError

PROMPT = Prompt(messages=({"role": "user", "content": "?"},), answer="42")


def config(weights: dict[str, float]) -> Config:
    return with_values(Config(), {"task.name": "judges", "task.rewards": weights})


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"judges.lenght": 1.0}, ["task.rewards", "judges.lenght", "no such function"]),
        ({"jugdes.length": 1.0}, ["task.rewards", "jugdes.length", "No module named 'jugdes'"]),
        ({"judges.number": 1.0}, ["judges.number", "not a function"]),
        ({"judges.judged_by_none": 1.0}, ["judges.judged_by_none", "(completion, prompt)", "(completions, prompts)"]),
        ({"wrods": 1.0}, ["task.name=judges", "no part wrods", "did you mean words?"]),
    ],
)
def test_a_misspelt_reward_is_one_line(weights: dict[str, float], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        rewards.check(config(weights), PROMPT)
    assert all(word in str(error.value) for word in words), error.value


def test_rewards_that_exist_pass_the_check() -> None:
    rewards.check(config({"correct": 1.0, "words": 0.5, "judges.odd": 1.0, "judges.like_trl": 1.0}), PROMPT)
    kinds = {
        name: (find(f"judges.{name}").batched, find(f"judges.{name}").is_async)
        for name in ("length", "rank", "judge", "fair", "like_trl")
    }
    assert kinds == {
        "length": (False, False),
        "rank": (True, False),
        "judge": (False, True),
        "fair": (True, True),
        "like_trl": (True, False),
    }


def test_a_function_of_trls_form_gets_texts_and_fails_where_it_returns_none() -> None:
    call = Call("judges.like_trl", ("a", "pass over", "b"), (PROMPT,) * 3)
    assert values_of(call, lambda _: None) == [1.0, "the reward returned None, not a finite number", 1.0]


def test_a_module_that_raises_anything_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raising.py").write_text("raise KeyError('a\\nb')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match=r"task\.rewards: raising\.f: no such function \(KeyError: 'a\\nb'\)"):
        rewards.check(config({"raising.f": 1.0}), PROMPT)


def test_each_function_and_the_task_may_take_their_time_for_a_rollout() -> None:
    times = {"actor.reward_timeout_seconds": 6.0, "actor.reward_workers": 4}
    given = [{}, {"correct": 1.0, "words": 0.0}, {"words": 1.0, "judges.rank": 0.0, "judges.odd": 2.0}]
    assert [rewards.seconds_of_a_rollout(with_values(config(each), times)) for each in given] == [1.5, 1.5, 4.5]


def test_the_pool_is_told_the_tasks_of_the_evaluation_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """It imports them before the first call (test_reward_pool.py)."""
    seen = []
    monkeypatch.setattr(rewards, "RewardPool", lambda *_, graders, **__: seen.append(graders))
    for sets in ((), ("math500:x", "gsm8k:y", "aime24:z")):
        rewards.start(with_values(config({}), {"evaluation.sets": sets}))
    assert seen == [[], ["gsm8k", "math"]]


def test_weights_are_finite() -> None:
    for weight in (math.nan, math.inf, "much"):
        with pytest.raises(UserError, match=r"task\.rewards\.correct"):
            build({"task": {"rewards": {"correct": weight}}})


def test_a_run_folder_keeps_names_weights_and_their_order(tmp_path: Path) -> None:
    empty = tmp_path / "empty.toml"
    empty.touch()
    given = load(["--task.rewards", '{"b.c.length": -0.5, "correct": 2, "a.b.judge": 0}'], empty)
    (tmp_path / "config.toml").write_text(dump(given))
    again = load(["--config", str(tmp_path / "config.toml")], tmp_path / "config.toml")
    assert list(again.task.rewards.items()) == [("b.c.length", -0.5), ("correct", 2.0), ("a.b.judge", 0.0)]


def test_the_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "actor/README.md").read_text()
    code = textwrap.dedent(text[text.index("    # my/rewards.py") : text.index("The names of the parameters decide")])
    (tmp_path / "readme_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    brevity, rank, judge = (find(f"readme_rewards.{name}") for name in ("brevity", "rank", "judge"))
    assert brevity.called("x" * 100, PROMPT) == 0.1
    assert rank.batched and rank.called(["aa", "a", "aaa"], [PROMPT] * 3) == [1, 0, 2]
    assert judge.is_async and not judge.batched
