"""Prompts to groups: chat template, G samples of each prompt, mask and log-probabilities, scores."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from actor.engine import Engine, Sample
from actor.opening import Opening, sample_with_openers
from actor.rewards import Rewards
from common.config import Config
from common.types import Group, Prompt, Rollout, Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions are sampled. Temperature 0 is greedy."""

    group_size: int
    temperature: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    fixed_length: bool = False
    opening: Opening | None = None  # None: the first token is sampled like the others

    @classmethod
    def of(cls, config: Config) -> "Sampling":
        """The sampling of a run's training rollouts."""
        method = config.method
        opening = Opening(
            num_candidates=method.opening_candidates,
            num_distinct=method.opening_distinct,
            learned=method.opening_learned,
            after=method.opening_after,
        )
        return cls(
            group_size=config.actor.group_size,
            temperature=config.actor.temperature,
            max_tokens=config.actor.max_tokens,
            stop=config.actor.stop,
            seed=config.run.seed,
            fixed_length=config.actor.fixed_length,
            opening=opening if method.opening == "reft" else None,
        )


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """The token ids of the chat, rendered with the model's template up to the start of the assistant's turn."""
    messages = [dict(message) for message in prompt.messages]
    tokens: list[int] = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    return tokens


def prompt_seed(seed: int, index: int) -> int:
    """Sampling seed of the prompt at position `index` of the prompt stream: the same whatever the batching."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0]) // 2  # vLLM adds 0..G-1; stays below 2^32


def roll_out(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Rewards,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    version: int,
) -> list[Group]:
    """One scored group per prompt, in order, tagged with the adapter version that sampled it."""
    started = time.perf_counter()
    tokens = [prompt_tokens(tokenizer, prompt) for prompt in prompts]
    options: dict[str, Any] = {
        "num_samples": sampling.group_size,
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "stop": sampling.stop,
        "seeds": [prompt_seed(sampling.seed, prompt.index) for prompt in prompts],
        "fixed_length": sampling.fixed_length,
    }
    scorings: dict[int, Any] = {}  # by the prompt's index in `prompts`

    def start_scoring(index: int, group: list[Sample]) -> None:
        scorings[index] = rewards.start([(sample.text, prompts[index]) for sample in group])

    if sampling.opening is None:
        samples = engine.sample(tokens, **options, finished=start_scoring)  # scores while other prompts still decode
    else:
        samples = sample_with_openers(engine, tokenizer, tokens, sampling.opening, **options)
        for index, group in enumerate(samples):
            start_scoring(index, group)
    sampled = time.perf_counter()
    scores = [rewards.finish(scorings[index]) for index in range(len(prompts))]
    scored = time.perf_counter()
    return [
        Group(
            prompt=prompt,
            rollouts=tuple(
                _rollout(tokens[index], sample, score, version, sampling.opening)
                for sample, score in zip(samples[index], scores[index], strict=True)
            ),
            rollout_seconds=sampled - started,
            reward_seconds=scored - sampled,
        )
        for index, prompt in enumerate(prompts)
    ]


def _rollout(
    prompt_ids: Sequence[int], sample: Sample, score: Score | str, version: int, opening: Opening | None
) -> Rollout:
    num_prompt_tokens = len(prompt_ids)
    first_learned = num_prompt_tokens + sample.num_forced_tokens + (opening is not None and not opening.learned)
    mask = np.arange(num_prompt_tokens + len(sample.token_ids)) >= first_learned
    return Rollout(
        token_ids=np.concatenate([np.asarray(prompt_ids, dtype=np.int32), sample.token_ids]),
        num_prompt_tokens=num_prompt_tokens,
        num_forced_tokens=sample.num_forced_tokens,
        mask=mask,
        actor_logprobs=np.concatenate([np.zeros(num_prompt_tokens, dtype=np.float32), sample.logprobs]) * mask,
        text=sample.text,
        finish_reason=sample.finish_reason,
        version=version,
        score=score if isinstance(score, Score) else None,
        reward_error=score if isinstance(score, str) else None,
    )
