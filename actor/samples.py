"""What vLLM says of sampled tokens, as arrays. Its Logprob is anything with a `logprob` here: vllm is not imported."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def chosen(token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any]]) -> np.ndarray:
    """float32 [T]: nats of the tokens themselves, of what is known at each place."""
    return np.array([entry[token].logprob for token, entry in zip(token_ids, logprobs, strict=True)], dtype=np.float32)


def likeliest(logprobs: Mapping[int, Any], count: int, without: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """int32 and float32: the `count` likeliest tokens that are not `without`, and their nats, likeliest first."""
    ranked = sorted((-entry.logprob, token) for token, entry in logprobs.items() if token not in without)[:count]
    return np.array([t for _, t in ranked], dtype=np.int32), np.array([-n for n, _ in ranked], dtype=np.float32)
