"""The actor: prompts in, scored groups out, always with one known adapter version. A Ray actor in launch/cluster.py."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from actor.reward import RewardPool
from actor.rollout import Sampling, roll_out
from common.adapter import Adapter
from common.config import Config
from common.types import Group, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """An actor's word on the adapter version that it loaded."""

    version: int
    checksum: str  # of the tensors as the sampling process received them
    canary_logprobs: np.ndarray  # float32 [T - 1], what the engine makes of the canary with that version
    load_seconds: float
    way: str  # "merged" or "hotswap"


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
        self.version = -1  # none yet

    def load(self, adapter: Adapter) -> Receipt:
        """Sample with `adapter` from now on. The receipt proves it to whoever published it."""
        started = time.perf_counter()
        checksum = self.engine.load(adapter)
        self.version = adapter.version
        return Receipt(
            version=adapter.version,
            checksum=checksum,
            canary_logprobs=self.engine.logprobs(adapter.canary.token_ids.tolist()),
            load_seconds=time.perf_counter() - started,
            way=self.engine.way,
        )

    def rollout(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Scored groups of `prompts`, sampled with the loaded version."""
        assert self.version >= 0, "an actor samples only with an adapter version that was published to it"
        return roll_out(self.engine, self.tokenizer, self.rewards, prompts, sampling, version=self.version)

    def close(self) -> None:
        """End the engine's and the reward pool's processes."""
        self.rewards.close()
        self.engine.close()
