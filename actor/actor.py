"""The actor: prompts in, scored groups out, always with one known adapter version (a Ray actor in launch/runtime)."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from actor.reward_pool import RewardPool
from actor.rollout import Sampling, roll_out
from common.adapter import Adapter
from common.config import Config
from common.types import Group, Prompt

PREFIX_TOKENS = 300  # two blocks of vLLM's cache on a CPU, of 128 tokens, and more on a GPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """An actor's word on the adapter version that it loaded."""

    version: int
    checksum: str  # of what the engine's buffers hold
    canary_logprobs: np.ndarray | None  # float32 [T - 1], what the engine makes of the version's canary, if it has one
    load_seconds: float  # canary included
    canary_seconds: float = 0.0


class Actor:
    """One engine, one pool of reward workers."""

    def __init__(self, model_folder: Path, config: Config) -> None:
        from actor.vllm_engine import VLLMEngine  # here, so that the driver, which names this class, loads no vllm

        self.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        self.engine = VLLMEngine(str(model_folder), config.model, config.actor, seed=config.run.seed)
        self.rewards = RewardPool(
            config.task.name,
            workers=config.actor.reward_workers,
            timeout_seconds=config.actor.reward_timeout_seconds,
        )
        self.max_length = config.model.max_length
        self.version: int | None = None  # none yet

    def load(self, adapter: Adapter) -> Receipt:
        """Sample with `adapter` from now on. The receipt proves it to whoever published it."""
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
        """How far sampling, which may read cached prefixes, is from a pass that reads none: nats of one token.

        Asked before and after a load it shows a prefix that is left of an older version. The canary is repeated to be
        longer than the blocks of the cache.
        """
        token_ids = np.resize(canary_token_ids, min(PREFIX_TOKENS, self.max_length - 2)).tolist()
        [(ids, logprobs)] = self.engine.first_tokens([token_ids], count=1, temperature=1.0, without=())
        return abs(float(logprobs[0] - self.engine.logprobs([*token_ids, int(ids[0])])[-1]))

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Scored groups of `prompts`, sampled with the loaded version."""
        assert self.version is not None, "an actor samples only with an adapter version that was published to it"
        return roll_out(self.engine, self.tokenizer, self.rewards, prompts, sampling, version=self.version)

    def close(self) -> None:
        """End the engine's and the reward pool's processes."""
        self.rewards.close()
        self.engine.close()
