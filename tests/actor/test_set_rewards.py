"""The problems of a set are scored by its own task, all others by the rewards of the run."""

import pytest

from actor import set_rewards
from actor.reward_pool import RewardPool
from actor.set_rewards import SetRewards
from common.config import ActorConfig, Config, EvaluationConfig, TaskConfig
from common.types import Prompt, Score


def prompt(task: str | None, answer: str = "4") -> Prompt:
    return Prompt(
        messages=({"role": "user", "content": "2 + 2?"},), answer=answer, task=task, metadata={"reward": "correct"}
    )


class Scripted:
    """Rewards whose total is their own number."""

    def __init__(self, number: float) -> None:
        self.number, self.closed = number, False

    def start(self, completions):
        return completions

    def finish(self, started):
        return [Score(total=self.number, correct=False, parts={}) for _ in started]

    def close(self):
        self.closed = True


def test_a_prompt_is_scored_by_the_task_that_it_names():
    own, math, gsm8k = Scripted(0.0), Scripted(1.0), Scripted(2.0)
    rewards = SetRewards(own, {"math": math, "gsm8k": gsm8k})
    started = [rewards.start([("4", prompt(task))] * 2) for task in ("gsm8k", None, "math")]
    assert [[score.total for score in rewards.finish(each)] for each in started] == [[2.0] * 2, [0.0] * 2, [1.0] * 2]
    own_in_an_evaluation = rewards.start([("4", prompt("gym"))])  # no set's: the run's own task
    assert [score.total for score in rewards.finish(own_in_an_evaluation)] == [0.0]
    rewards.close()
    assert own.closed and math.closed and gsm8k.closed


@pytest.mark.slow
def test_real_processes_grade_a_set_by_math_and_the_run_by_its_own_rewards():
    """The run's task.rewards, here of the format alone, say nothing of a set."""
    rewards = set_rewards.start(
        Config(
            task=TaskConfig(name="gsm8k", rewards={"format": 1.0}),
            actor=ActorConfig(reward_workers=1, reward_timeout_seconds=60.0),
            evaluation=EvaluationConfig(sets=("math500:x", "aime24:y")),
        )
    )
    try:
        half = rewards.start(
            [("so it is \\boxed{\\frac{1}{2}}", prompt("math", "0.5")), ("\\boxed{2}", prompt("math", "0.5"))]
        )
        own = rewards.start([("<SOLUTION>4</SOLUTION>", prompt(None))])
        assert [(score.total, score.correct) for score in rewards.finish(half)] == [(1.0, True), (0.0, False)]
        [score] = rewards.finish(own)
        assert score.correct
        assert set(score.parts) == {"format"}
    finally:
        rewards.close()


def test_without_sets_there_are_no_more_processes():
    config = Config(task=TaskConfig(name="gsm8k"), actor=ActorConfig(reward_workers=1))
    rewards = set_rewards.start(config)
    try:
        assert isinstance(rewards, RewardPool)
    finally:
        rewards.close()
