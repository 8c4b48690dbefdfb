"""The record of an evaluation and of each problem, from scripted completions."""

import json
from dataclasses import replace

import pytest
import tiny

from common.config import Config, EvaluationConfig
from common.types import Group, Prompt
from launch.evaluation.measure import OWN, evaluate, lines

CORRECT, WRONG, FAILED = 4.0, 0.0, None  # rewards


class Fleet:
    """Gives the rewards of a script: by the answer of a prompt, that of the greedy completion, then of the samples."""

    def __init__(self, script: dict[str, tuple[float | None, list[float | None]]]) -> None:
        self.script = script
        self.asked: list = []

    def sample(self, prompts, sampling, *, work):
        self.asked.append((prompts, sampling, work))
        return [self.group(prompt, sampling) for prompt in prompts]

    def group(self, prompt: Prompt, sampling) -> Group:
        greedy, several = self.script[prompt.answer]
        rewards = [greedy] if sampling.temperature == 0 else several
        assert len(rewards) == sampling.group_size
        group = tiny.group(prompt.index, [3] * len(rewards), rewards)
        rollouts = [  # a wrong answer is a truncated one here
            replace(r, finish_reason="length" if reward == WRONG else "stop", text=f"text of {prompt.answer}")
            for r, reward in zip(group.rollouts, rewards, strict=True)
        ]
        return replace(group, prompt=prompt, rollouts=tuple(rollouts))


def prompts(*answers: str) -> list[Prompt]:
    return [Prompt(messages=({"role": "user", "content": f"question {each}"},), answer=each) for each in answers]


def config(**values) -> Config:
    return Config(evaluation=EvaluationConfig(**values))


def test_the_greedy_numbers_by_hand():
    fleet = Fleet({"a": (CORRECT, []), "b": (WRONG, []), "c": (FAILED, []), "d": (CORRECT, [])})
    found = evaluate(fleet, {OWN: prompts("a", "b", "c", "d")}, config(), step=7)
    record = found.record
    assert record.pop("seconds") >= 0
    assert record.pop("wilson95") == pytest.approx([0.15004, 0.84996], abs=1e-5)  # by hand, 2 of 4
    assert record == {
        "step": 7,
        "pass_at_1": 0.5,  # the failed reward counts as incorrect,
        "ci95": pytest.approx(0.49),
        "num_problems": 4,
        "reward_mean": pytest.approx(8 / 3),  # and not for the mean reward
        "length_mean": 3.0,
        "num_failed_rewards": 1,
        "num_truncated": 1,
    }
    [(asked, sampling, work)] = fleet.asked
    assert [prompt.index for prompt in asked] == [0, 1, 2, 3]
    assert (sampling.temperature, sampling.group_size, work) == (0.0, 1, "evaluate")


def test_the_sampled_numbers_by_hand():
    script = {
        "a": (CORRECT, [CORRECT, WRONG, WRONG, WRONG]),  # pass@2: 1 - C(3, 2) / C(4, 2) = 1/2
        "b": (WRONG, [WRONG] * 3 + [FAILED]),  # 0
        "c": (WRONG, [CORRECT, CORRECT, WRONG, WRONG]),  # 1 - C(2, 2) / C(4, 2) = 5/6
    }
    record = evaluate(Fleet(script), {OWN: prompts("a", "b", "c")}, config(num_samples=4), step=0).record
    assert record["k"] == 4
    assert record["pass_at_k"] == record["pass_at_4"] == pytest.approx(2 / 3)
    assert record["mean_at_4"] == pytest.approx((1 / 4 + 0 + 2 / 4) / 3)
    assert record["mean_at_4_ci95"] == pytest.approx(1.96 * 0.25 / 3**0.5)  # deviations 0, -1/4, 1/4
    assert record["pass_at_2"] == pytest.approx((1 / 2 + 0 + 5 / 6) / 3)
    assert (record["num_truncated"], record["num_truncated_samples"]) == (2, 3 + 3 + 2)
    chosen = evaluate(Fleet(script), {OWN: prompts("a")}, config(num_samples=4, pass_at=(3,)), step=0).record
    assert {name for name in chosen if name.startswith("pass_at_")} == {"pass_at_1", "pass_at_k", "pass_at_3"} | {
        "pass_at_3_ci95"
    }


def test_the_default_ks_are_powers_of_two_and_n():
    assert [EvaluationConfig(num_samples=n).ks for n in (0, 1, 2, 6, 8)] == [(), (), (2,), (2, 4, 6), (2, 4, 8)]


def test_every_set_has_numbers_of_its_own():
    script = {"a": (CORRECT, [CORRECT, WRONG]), "b": (WRONG, [WRONG, WRONG])}
    problems = {OWN: prompts("a", "b"), "math500": prompts("a"), "svamp": prompts("b", "b", "b")}
    found = evaluate(Fleet(script), problems, config(num_samples=2), step=3)
    sets = found.record["sets"]
    assert [found.record["pass_at_1"], sets["math500"]["pass_at_1"], sets["svamp"]["pass_at_1"]] == [0.5, 1.0, 0.0]
    assert sets["svamp"]["num_problems"] == 3
    assert set(sets["math500"]) == set(found.record) - {"step", "sets", "seconds"}
    shown = list(lines(found.record))
    assert [line.partition(":")[0] for line in shown] == [
        f"evaluation at step 3{name}" for name in ("", ", math500", ", svamp")
    ]
    assert shown[2].endswith("Pass@1 0.000 ± 0.000 [0.000, 0.562], mean@2 0.000 ± 0.000, pass@2 0.000 ± 0.000, "
                             "reward 0.000, 3 problems, 3 truncated")  # fmt: skip


def test_sets_alone_have_no_numbers_of_the_task():
    found = evaluate(Fleet({"a": (CORRECT, [])}), {"math500": prompts("a")}, config(), step=0)
    assert set(found.record) == {"step", "sets", "seconds"}
    assert [line.partition(":")[0] for line in lines(found.record)] == ["evaluation at step 0, math500"]


def test_what_became_of_each_problem():
    script = {"a": (CORRECT, [CORRECT, WRONG, FAILED]), "b": (FAILED, [WRONG] * 3)}
    first, second = evaluate(Fleet(script), {"math500": prompts("a", "b")}, config(num_samples=3), step=5).problems
    assert json.loads(json.dumps(first)) == {
        "step": 5,
        "set": "math500",
        "problem": first["problem"],
        "question": "question a",
        "answer": "a",
        "correct": True,
        "truncated": False,
        "text": "text of a",
        "reward_error": None,
        "num_samples": 3,
        "num_samples_correct": 1,
        "num_samples_truncated": 1,
    }
    assert (second["correct"], second["reward_error"], second["num_samples_truncated"]) == (False, "it raised", 3)
    assert len(first["problem"]) == 16
    assert first["problem"] != second["problem"]
    [alone] = evaluate(Fleet({"a": (WRONG, [])}), {"other": prompts("a")}, config(), step=0).problems
    assert alone["problem"] == first["problem"]  # whatever the step, the set and the completion
    assert "num_samples" not in alone
