"""Synthetic rollouts of equal lengths: the memory plan packs them, and the benchmarks learn from them."""

import numpy as np

from common.types import Group, Prompt, Rollout, Score


def synthetic_groups(
    num_prompts: int, group_size: int, *, prompt_tokens: int, completion_tokens: int, vocab_size: int, seed: int
) -> list[Group]:
    """Groups of random tokens. The rewards of a group all differ, so that half of its advantages are negative."""
    generator = np.random.default_rng(seed)
    tokens = prompt_tokens + completion_tokens
    groups = []
    for index in range(num_prompts):
        prompt_ids = generator.integers(vocab_size, size=prompt_tokens)
        completion_ids = [generator.integers(vocab_size, size=completion_tokens) for _ in range(group_size)]
        rollouts = [
            Rollout(
                token_ids=np.append(prompt_ids, ids).astype(np.int32),
                num_prompt_tokens=prompt_tokens,
                mask=np.arange(tokens) >= prompt_tokens,
                actor_logprobs=np.full(tokens, -1.0, dtype=np.float32),
                text="",
                finish_reason="length",
                version=0,
                score=Score(total=float(reward), correct=False, parts={}),
            )
            for reward, ids in enumerate(completion_ids)
        ]
        groups.append(Group(prompt=Prompt(messages=(), answer="", index=index), rollouts=tuple(rollouts)))
    return groups
