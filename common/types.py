"""The data types that the actor, the learner and the loop exchange.

Array names end in their dimensions: P prompts per step, G rollouts per prompt, B = P * G rollouts, T tokens of a
rollout, N scored (sampled) tokens, V vocabulary size, H hidden size.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LONGEST_LINE = 4000  # characters of an error, of which the middle is left out


class UserError(ValueError):
    """Invalid input; its one line gives what, the value and what to do. Ends the program with status 2."""

    def __init__(self, message: str) -> None:
        """The values in `message` may be anything: what a terminal would not print in the line is escaped."""
        if len(message) > LONGEST_LINE:
            message = f"{message[: LONGEST_LINE // 2]} … {message[-LONGEST_LINE // 2 :]}"
        super().__init__("".join(each if each.isprintable() else repr(each)[1:-1] for each in message))


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the known word closest to `word`, or all known words if none is close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; choose one of {', '.join(known)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem of a task.

    Example: Prompt(messages=({"role": "user", "content": "2 + 2 = ?"},), answer="4")
    """

    messages: tuple[Mapping[str, str], ...]  # chat messages, rendered by the model's own template
    answer: str  # ground truth, in the form that the task's reward expects
    metadata: Mapping[str, Any] = field(default_factory=dict)  # further inputs of the reward; plain JSON values
    index: int = 0  # position in the run's prompt stream; the sampling seed derives from it
    task: str | None = None  # the task that grades it; None: the run's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The reward of one completion.

    Example: Score(total=7.5, correct=True, parts={"correct": 4.0, "format": 1.5, "present": 1.0, "steps": 1.0})
    """

    total: float  # the reward
    correct: bool  # exactly correct: for Pass@1, and for methods with a binary reward
    parts: Mapping[str, float]  # the terms of total, before the weights of task.rewards if there are any


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One flat token sequence, prompt and completion, with aligned mask and log-probabilities.

    Example: 3 prompt tokens and 2 sampled ones have mask [F, F, F, T, T]; with 1 forced token before these two, which
    belongs to the completion, [F, F, F, F, T, T].
    """

    token_ids: np.ndarray  # int32 [T]
    num_prompt_tokens: int  # length of the prompt, which all rollouts of the group share
    num_forced_tokens: int = 0  # the completion's first tokens, which were not sampled: those of method.opening_after
    mask: np.ndarray  # bool [T], true where the actor sampled the token (for an opener: only if it is in the loss)
    actor_logprobs: np.ndarray  # float32 [T], nats at the sampling temperature; 0 outside the mask
    text: str  # the completion, cut at a stop string
    finish_reason: str  # "stop", or "length" for a truncated completion
    version: int  # the adapter version that sampled it
    score: Score | None = None  # None: the reward failed, and the rollout is excluded from the step
    reward_error: str | None = None  # why the reward failed

    @property
    def num_completion_tokens(self) -> int:
        """All of them: scored, forced, and an opener that is not in the loss."""
        return len(self.token_ids) - self.num_prompt_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G rollouts of one prompt, and the wall time of the request that sampled them."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rollout_seconds: float = 0.0  # sampling time of the whole request, the same for all its groups
    reward_seconds: float = 0.0  # scoring time of the request after its sampling had ended


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTargets:
    """The learner's targets of one rollout, for its N sampled tokens."""

    advantage: float
    entropies: np.ndarray  # float32 [N], nats, from which the weights are computed
    weights: np.ndarray  # float32 [N], before normalisation


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """The result of one optimizer step."""

    metrics: Mapping[str, float]
    tokens: tuple[TokenTargets | None, ...]  # B, in the order of the groups and their rollouts; None: excluded
    skipped: str | None = None  # why the optimizer skipped the step (non-finite values); None: it was applied
