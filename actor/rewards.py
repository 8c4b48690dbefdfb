"""The rewards of a run: the task's own, or the weighted sum of the rewards that task.rewards names."""

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

from actor.async_rewards import AsyncRewards
from actor.reward_functions import Call, Values, find
from actor.reward_pool import RewardPool, Scoring
from actor.tasks.sets import task_of
from common.config import Config
from common.types import Prompt, Score, UserError, suggest

CORRECT = "correct"  # in task.rewards: the task's part of this name, or without one 1 for a correct completion, else 0


class Rewards(Protocol):
    """What scores the completions of a run; the time-out of a call is actor.reward_timeout_seconds."""

    def start(self, completions: Sequence[tuple[str, Prompt]], /) -> Any:
        """Start to score the (completion, prompt) pairs of one group in the background."""
        ...

    def finish(self, started: Any, /) -> list[Score | str]:
        """Wait for what `start` returned: one Score, or the text of a failure, for each pair, in their order."""
        ...

    def close(self) -> None:
        """End the processes, including hung ones."""
        ...


def start(config: Config) -> Rewards:
    """The processes that score the completions of a run, and of its evaluations.

    Raises UserError for an unknown task or reward.
    """
    return ComposedRewards(config) if config.task.rewards else _pool(config)


def _pool(config: Config, *, workers: int | None = None, functions: Sequence[str] = ()) -> RewardPool:
    return RewardPool(
        config.task.name,
        workers=workers or config.actor.reward_workers,
        timeout_seconds=config.actor.reward_timeout_seconds,
        graders=sorted({task_of(each) for each in config.evaluation.sets}),
        functions=functions,
    )


def functions_of(config: Config) -> list[str]:
    """The names in task.rewards that are paths of functions: those with a dot. The others are parts of the task's."""
    return [name for name in config.task.rewards if "." in name]


def seconds_of_a_rollout(config: Config) -> float:
    """What the rewards of one rollout may take at most, the task's and each function's, over the number of workers."""
    return (1 + len(functions_of(config))) * config.actor.reward_timeout_seconds / config.actor.reward_workers


def check(config: Config, prompt: Prompt) -> None:
    """Raise UserError for a name in task.rewards that is neither a part of the task's reward nor a function.

    The parts are those of two completions of `prompt`: none, and its answer. They are scored in a process of its own,
    since a reward may hang.
    """
    for path in functions_of(config):
        find(path)
    parts = [name for name in config.task.rewards if "." not in name and name != CORRECT]
    if not parts:
        return
    pool = _pool(config, workers=1)
    try:
        scores = pool.finish(pool.start([("", prompt), (prompt.answer, prompt)]))
    finally:
        pool.close()
    known = dict.fromkeys(name for score in scores if isinstance(score, Score) for name in (*score.parts, CORRECT))
    if not known:
        raise UserError(
            f"task.rewards names parts of the reward of task.name={config.task.name}, which fails: {scores[0]}"
        )
    for name in parts:
        if name not in known:
            raise UserError(
                f"task.rewards: the reward of task.name={config.task.name} has no part {name}{suggest(name, known)} "
                "(a function's path has a dot)"
            )


Calls = Sequence[tuple[Call, Future[Values | str]]]


@dataclass(frozen=True, slots=True)
class Composing:
    """Calls that were started, for the completions of a group."""

    own: Scoring
    others: Mapping[str, Calls] | None  # by the path of a function; None: the task's own reward alone


class ComposedRewards:
    """The weighted sum of the rewards that task.rewards names."""

    def __init__(self, config: Config) -> None:
        """Return when all processes have started. Raises UserError for an unknown task or function."""
        self._weights = config.task.rewards
        self._functions = {path: find(path) for path in functions_of(config)}
        self._async: AsyncRewards | None = None
        with ExitStack() as stack:
            self._pool = _pool(config, functions=list(self._functions))
            stack.callback(self._pool.close)  # unless all processes start
            if paths := [path for path, function in self._functions.items() if function.is_async]:
                self._async = AsyncRewards(
                    paths, timeout_seconds=config.actor.reward_timeout_seconds, alone=self._pool.call
                )
            stack.pop_all()

    def start(self, completions: Sequence[tuple[str, Prompt]]) -> Composing:
        """Start to score the (completion, prompt) pairs of one group in the background.

        The task's own reward is always computed, since it decides what is correct. It is alone where a prompt names the
        task that grades it, as those of evaluations do.
        """
        graded = any(prompt.task is not None for _, prompt in completions)
        calls = {} if graded else {path: _calls(path, completions) for path in self._functions}
        others = {path: [(call, self._started(call)) for call in each] for path, each in calls.items()}
        return Composing(own=self._pool.start(completions), others=None if graded else others)

    def finish(self, composing: Composing) -> list[Score | str]:
        """Wait for the calls that `start` started: one Score, or the text of a failure, for each completion."""
        own = self._pool.finish(composing.own)
        if composing.others is None:
            return own
        others = {path: _values(calls) for path, calls in composing.others.items()}
        return [
            score if isinstance(score, str) else composed(score, {p: v[i] for p, v in others.items()}, self._weights)
            for i, score in enumerate(own)
        ]

    def close(self) -> None:
        """End the processes, including hung ones."""
        if self._async is not None:
            self._async.close()
        self._pool.close()

    def _started(self, call: Call) -> Future[Values | str]:
        if self._async is not None and self._functions[call.path].is_async:
            return self._async.call(call)
        return self._pool.call(call)


def _calls(path: str, completions: Sequence[tuple[str, Prompt]]) -> list[Call]:
    """The whole group in one call of a function that takes a batch, else a call for each completion."""
    texts, prompts = tuple(text for text, _ in completions), tuple(prompt for _, prompt in completions)
    if find(path).batched:
        return [Call(path, texts, prompts)]
    return [Call(path, (text,), (prompt,)) for text, prompt in completions]


def _values(calls: Calls) -> Values:
    """The reward of each completion, or the text of a failure; a call that fails as a whole fails all of its own."""
    found: Values = []
    for call, future in calls:
        result = future.result()
        found += [result] * len(call.completions) if isinstance(result, str) else result
    return found


def composed(own: Score, others: Mapping[str, float | str], weights: Mapping[str, float]) -> Score | str:
    """The sum of weight times reward over the rewards that `weights` names, or the text of the first failure.

    `own` is the task's Score and `others` has the rewards of functions. `parts` are the rewards without their weights,
    in the order of `weights`, and `correct` is the task's. A reward that fails is never a 0. One of weight 0, which is
    only logged, is then left out of `parts`, so that it changes nothing that is trained on.
    """
    parts: dict[str, float] = {}
    for name, weight in weights.items():
        value = _reward(name, own, others)
        if not isinstance(value, str):
            parts[name] = value
        elif weight:
            return f"{name}: {value}"
    try:
        total = math.fsum(weight * parts[name] for name, weight in weights.items() if weight)
    except (OverflowError, ValueError):  # as of 1e308 + 1e308, and of inf - inf
        total = math.nan
    if not math.isfinite(total):
        return f"the sum of the rewards is {total}, which is not finite"
    return Score(total=total, correct=own.correct, parts=parts)


def _reward(name: str, own: Score, others: Mapping[str, float | str]) -> float | str:
    """One of the rewards, which is finite, or the text of its failure."""
    if name in others:
        return others[name]
    value = own.parts.get(name, float(own.correct) if name == CORRECT else None)
    if value is None:
        return "the task's reward has no such part"
    return value if math.isfinite(value) else f"it is {value}, which is not finite"
