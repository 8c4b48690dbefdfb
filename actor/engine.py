"""The engine protocol: what every sampling engine promises to actor/actor.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.adapter import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sampled completion of T tokens."""

    token_ids: np.ndarray  # int32 [T], every sampled token, the end token and stop strings' tokens included
    logprobs: np.ndarray  # float32 [T], nats, of the distribution that was sampled from (temperature applied)
    text: str  # decoded without special tokens, cut after a stop string
    finish_reason: str  # "stop" or "length"


class Engine(Protocol):
    """Samples from one model with one adapter version at a time. Not thread-safe: one call at once."""

    def load(self, adapter: Adapter) -> str:
        """Make `adapter` the only version in use and forget every cached prefix of older ones.

        Returns the checksum (common.adapter.checksum) of what the engine now holds.
        """

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        temperature: float,
        max_tokens: int,
        stop: Sequence[str],
        seeds: Sequence[int],
        fixed_length: bool = False,
        finished: Callable[[int, list[Sample]], None] = ...,
    ) -> list[list[Sample]]:
        """`num_samples` completions of each tokenised prompt, which is computed once; one seed per prompt.

        temperature 0 is greedy. `fixed_length` samples exactly max_tokens tokens and ignores every stop.
        Equal arguments and adapter give equal samples. `finished` is told each prompt's place and samples as soon as
        they have ended, while others still decode.
        """

    def first_tokens(
        self, prompts: Sequence[Sequence[int]], *, count: int, temperature: float, without: Sequence[int]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each prompt the `count` likeliest tokens to follow it, likeliest first, and their log-probabilities.

        int32 and float32 nats, of the distribution that is sampled from; tokens in `without` are left out, so there
        may be fewer than `count`.
        """

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T - 1]: nats at temperature 1 of tokens 1..T-1, each given those before it."""

    def close(self) -> None:
        """End every process of the engine."""
