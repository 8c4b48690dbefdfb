"""Whether a merged model computes what the adapter does: log-probabilities of held-out prompts, both in float32.

Computing in float32 leaves one difference between the two: the rounding of the merged weights.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actor.rollout import prompt_tokens
from actor.tasks import task_module
from common.types import UserError
from launch.exporting.source import Source
from learner.policy.policy import Policy

NUM_PROMPTS, MAX_TOKENS = 8, 512  # of the comparison; a prompt is cut to MAX_TOKENS
NOISE_NATS = 1e-4  # of float32: without any rounding of weights SmolLM2-135M differs by 8e-6 nats per token


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Means over the tokens of the prompts, nats per token."""

    num_prompts: int
    num_tokens: int
    difference: float  # |merged - adapter|
    effect: float  # |adapter - base|

    @property
    def lost(self) -> float:
        """The part of the adapter's effect by which the merged model misses it; 0 within float32's noise."""
        return self.difference / self.effect if self.difference > NOISE_NATS else 0.0

    def __str__(self) -> str:
        return (
            f"on {self.num_prompts} held-out prompts ({self.num_tokens} tokens) its log-probabilities differ from the "
            f"adapter's by {self.difference:.2g} nats in the mean; the adapter's from the base's by {self.effect:.2g}"
        )


def held_out_tokens(source: Source) -> list[np.ndarray]:
    """Token ids of the run's first held-out prompts, int32 [T] each. Raises UserError if its task cannot be loaded."""
    task = source.config.task
    tokenizer = AutoTokenizer.from_pretrained(source.base, trust_remote_code=False)
    prompts = islice(task_module(task.name).load(task, "eval"), NUM_PROMPTS)
    tokens = [np.array(prompt_tokens(tokenizer, prompt)[:MAX_TOKENS], dtype=np.int32) for prompt in prompts]
    if not tokens:
        raise UserError(f"task.name={task.name} loads no prompts to compare the merged model on; its load() must")
    return tokens


def check_memory(source: Source) -> None:
    """Raise UserError if the model in float32 does not fit into the free memory."""
    needed, free = 4 * source.num_base_parameters, psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"--merge loads model.path={source.config.model.path} in float32 to compare it with the adapter, "
            f"{needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; merge on a machine with more memory"
        )


def adapter_logprobs(source: Source, prompts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """float32 [N] each, nats: the learner's log-probabilities with the adapter, and those of the base, in float32."""
    model = source.config.model.model_copy(update={"dtype": "float32"})
    policy = Policy(source.base, model, device=torch.device("cpu"), recompute="none", head_backend="torch")
    policy.load(source.checkpoint)
    with_adapter = np.concatenate([policy.logprobs(tokens) for tokens in prompts])
    with policy.reference():
        base = np.concatenate([policy.logprobs(tokens) for tokens in prompts])
    del policy
    gc.collect()  # its layers refer to one another: the merged model would be loaded beside it
    return with_adapter, base


def merged_logprobs(folder: Path, prompts: Sequence[np.ndarray]) -> np.ndarray:
    """float32 [N], nats: those of the saved model, as transformers loads and computes it, in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    found = []
    for tokens in prompts:
        tokens_T = torch.from_numpy(tokens).long()
        with torch.no_grad():
            logits_TV = model(input_ids=tokens_T[None, :-1], use_cache=False).logits[0]
        found.append(logits_TV.log_softmax(dim=-1).gather(1, tokens_T[1:, None])[:, 0].numpy())
    return np.concatenate(found)


def compare(merged_N: np.ndarray, adapter_N: np.ndarray, base_N: np.ndarray, num_prompts: int) -> Comparison:
    """The comparison of three sets of log-probabilities of the same tokens."""
    return Comparison(
        num_prompts=num_prompts,
        num_tokens=len(merged_N),
        difference=float(np.abs(merged_N - adapter_N).mean()),
        effect=float(np.abs(adapter_N - base_N).mean()),
    )
