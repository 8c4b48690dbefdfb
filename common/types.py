"""The shared vocabulary: what travels between the actor, the learner and the loop.

Dimension legend, used as suffixes of array names everywhere:
P prompts of a step, G rollouts per prompt, B = P * G rollouts, T tokens of a rollout,
N scored (sampled) tokens, V vocabulary, H hidden size.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np


class UserError(ValueError):
    """Bad input: one line that says what, the value and what to do. Ends the program with status 2."""


def suggest(word: str, known: Iterable[str]) -> str:
    """The known word that `word` was meant to be, or all of them; the end of an error message."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One problem of a task.

    Example: Prompt(messages=({"role": "user", "content": "2 + 2 = ?"},), answer="4")
    """

    messages: tuple[Mapping[str, str], ...]  # chat messages, rendered by the model's own template
    answer: str  # ground truth, as the task's reward reads it
    metadata: Mapping[str, Any] = field(default_factory=dict)  # whatever else the reward needs; plain JSON values
    index: int = 0  # position in the prompt stream of the run; sampling seeds derive from it


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The reward of one completion.

    Example: Score(total=7.5, correct=True, parts={"correct": 4.0, "format": 1.5, "present": 1.0, "steps": 1.0})
    """

    total: float  # the reward
    correct: bool  # the answer is exactly correct: Pass@1, and the binary reward of methods that need one
    parts: Mapping[str, float]  # the terms of total


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One flat token sequence, prompt and completion, with aligned mask and log-probabilities.

    Example: 3 prompt tokens and 2 sampled ones have mask [F, F, F, T, T].
    """

    token_ids: np.ndarray  # int32 [T]
    num_prompt_tokens: int  # that the group's rollouts share
    mask: np.ndarray  # bool [T], true where the actor sampled the token (of an opener: where it is learned)
    actor_logprobs: np.ndarray  # float32 [T], nats at the sampling temperature; 0 outside the mask
    text: str  # the completion, cut at a stop string
    finish_reason: str  # "stop", or "length" for a truncated completion
    version: int  # of the adapter that sampled it
    score: Score | None = None  # None: the reward failed, and the rollout is excluded from the step
    reward_error: str | None = None  # why it failed

    @property
    def num_completion_tokens(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The G rollouts of one prompt, and the wall time of the request that they came with."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    rollout_seconds: float = 0.0  # sampling of the whole request, shared by its groups
    reward_seconds: float = 0.0  # scoring that was not finished when the sampling was


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTargets:
    """What the learner made of one rollout, over its sampled tokens."""

    advantage: float
    entropies: np.ndarray  # float32 [N], nats, of which the weights are made
    weights: np.ndarray  # float32 [N], before normalising


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one optimizer step did."""

    metrics: Mapping[str, float]
    tokens: tuple[TokenTargets | None, ...]  # B, in the order of the groups and their rollouts; None: excluded
    skipped: str | None = None  # why the optimizer skipped the step (not finite); None: it was taken
