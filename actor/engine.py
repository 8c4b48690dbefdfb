"""The engine protocol: what every sampling engine promises to actor/actor.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from common.adapter import Adapter


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sampled completion of T tokens."""

    token_ids: np.ndarray  # int32 [T], every sampled token, including the end token and a stop string's tokens
    logprobs: np.ndarray  # float32 [T], nats at the sampling temperature
    text: str  # decoded without special tokens, cut after the stop string
    finish_reason: str  # "stop" or "length"
    num_forced_tokens: int = 0  # the first of the T, which were not sampled; their log-probabilities are 0


class Engine(Protocol):
    """Samples from one model with one adapter version at a time. Not thread-safe: make one call at a time."""

    def load(self, adapter: Adapter) -> str:
        """Make `adapter` the only version in use, and drop every cached prefix of older versions.

        Returns the checksum (common.adapter.checksum) of the values that the engine then holds.
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
        """`num_samples` completions of each tokenised prompt; a prompt is prefilled once, and has one seed.

        Temperature 0 is greedy. `fixed_length` samples exactly max_tokens tokens and ignores every stop.
        Equal arguments and adapter give equal samples. `finished` is called with a prompt's index and samples as soon
        as these have ended, while other prompts still decode.
        """

    def first_tokens(
        self, prompts: Sequence[Sequence[int]], *, count: int, temperature: float, without: Sequence[int]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each prompt the `count` most likely next tokens, most likely first, and their log-probabilities.

        Token ids are int32, log-probabilities float32 nats at `temperature`. Tokens in `without` are left out, so
        there may be fewer than `count`.
        """

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """float32 [T - 1]: log-probabilities (nats, temperature 1) of tokens 1..T-1, each given those before it."""

    def close(self) -> None:
        """End every process of the engine."""
