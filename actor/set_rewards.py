"""Scores the problems of evaluation sets by their own tasks, and all others by the rewards of the run."""

from collections.abc import Mapping, Sequence
from typing import Any

from actor import rewards
from actor.reward_pool import RewardPool
from actor.rewards import Rewards
from actor.tasks.sets import task_of
from common.config import Config
from common.types import Prompt, Score


class SetRewards:
    """The rewards of a run, and those of other tasks for the prompts that name one (Prompt.task)."""

    def __init__(self, own: Rewards, others: Mapping[str, Rewards]) -> None:
        self._own = own
        self._others = others  # by the task

    def start(self, completions: Sequence[tuple[str, Prompt]]) -> tuple[Rewards, Any]:
        """Start to score the (completion, prompt) pairs of one group in the background."""
        task = completions[0][1].task
        chosen = self._own if task is None else self._others.get(task, self._own)  # an evaluation names the run's, too
        return chosen, chosen.start(completions)

    def finish(self, started: tuple[Rewards, Any]) -> list[Score | str]:
        """Wait for what `start` returned: one Score, or the text of a failure, for each pair, in their order."""
        chosen, calls = started
        return chosen.finish(calls)

    def close(self) -> None:
        """End the processes, including hung ones."""
        for each in (self._own, *self._others.values()):
            each.close()


def start(config: Config) -> Rewards:
    """The processes that score the completions of a run, and of its evaluation sets. Raises UserError.

    A set's task has processes of its own: task.rewards says nothing of it, and its imports must not take the time of a
    training reward.
    """
    others = {
        task: RewardPool(task, workers=config.actor.reward_workers, timeout_seconds=config.actor.reward_timeout_seconds)
        for task in {task_of(each) for each in config.evaluation.sets}
    }
    own = rewards.start(config)
    return SetRewards(own, others) if others else own
