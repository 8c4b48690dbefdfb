"""The actor: prompts in, scored groups out, always with one known adapter version (a Ray actor in launch/runtime)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from actor import rewards
from actor.rollout import Sampling, roll_out
from common.adapter import Adapter
from common.config import Config
from common.types import Group, Prompt

PREFIX_TOKENS = 300  # spans two blocks of vLLM's prefix cache on a CPU (128 tokens each), and more on a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What an actor reports after it has loaded an adapter version."""

    version: int
    checksum: str  # of the values read back from the engine's buffers
    canary_logprobs: np.ndarray | None  # float32 [T - 1], the engine's for the adapter's canary; None without a canary
    load_seconds: float  # the canary's pass included
    canary_seconds: float = 0.0


class Actor:
    """One engine and one pool of reward workers."""

    def __init__(self, model_folder: Path, config: Config) -> None:
        from actor.vllm_engine import VLLMEngine  # imported here, since the driver imports this file but needs no vLLM

        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.engine = VLLMEngine(str(model_folder), config.model, config.actor, seed=config.run.seed)
        self.rewards = rewards.start(config)
        self.max_length = config.model.max_length
        self.version: int | None = None  # None until the first load

    def load(self, adapter: Adapter) -> Receipt:
        """Sample with `adapter` from the next call on. The publisher verifies the returned receipt."""
        started = time.perf_counter()
        checksum = self.engine.load(adapter)
        self.version = adapter.version
        loaded = time.perf_counter()
        logprobs = self.engine.logprobs(adapter.canary.token_ids.tolist()) if adapter.canary else None
        ended = time.perf_counter()
        return Receipt(
            version=adapter.version,
            checksum=checksum,
            canary_logprobs=logprobs,
            load_seconds=ended - started,
            canary_seconds=ended - loaded,
        )

    def prefix_difference(self, canary_token_ids: np.ndarray) -> float:
        """Log-probability of one sampled token minus that of a pass that reads no prefix cache: absolute, in nats.

        Called before and after a load, it detects a cached prefix of an older version. The canary is repeated until it
        fills whole blocks of the cache.
        """
        token_ids = np.resize(canary_token_ids, min(PREFIX_TOKENS, self.max_length - 2)).tolist()
        [(ids, logprobs)] = self.engine.first_tokens([token_ids], count=1, temperature=1.0, without=())
        return abs(float(logprobs[0] - self.engine.logprobs([*token_ids, int(ids[0])])[-1]))

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """One scored group per prompt, sampled with the loaded version."""
        assert self.version is not None, "load an adapter before the first rollout"
        return roll_out(self.engine, self.tokenizer, self.rewards, prompts, sampling, version=self.version)

    def close(self) -> None:
        """End the engine's and the reward pool's processes."""
        self.rewards.close()
        self.engine.close()
