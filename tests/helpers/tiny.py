"""A model of two layers with random weights, groups of random tokens, and a learner on both."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from common.config import Config, LearnerConfig, MethodConfig, ModelConfig, RunConfig
from common.types import Group, Prompt, Rollout, Score
from learner.learner import Learner

V = 97
LEARNER = {"learning_rate": 1e-2, "gradient_accumulation": 1, "recompute": "none", "micro_batch_tokens": 4096}
CANARY = np.arange(12, dtype=np.int32)


def save_model(folder: Path, seed: int = 0, initializer_range: float = 0.3) -> Path:
    """Save a Llama with V tokens and random weights, in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=initializer_range,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def config(*, steps: int = 10, dropout: float = 0.0, method: dict | None = None, **learner) -> Config:
    return Config(
        run=RunConfig(steps=steps),
        model=ModelConfig(dtype="float32", lora_rank=4, lora_alpha=8, lora_dropout=dropout),
        method=MethodConfig(**({"importance": "none"} | (method or {}))),
        learner=LearnerConfig(**(LEARNER | learner)),
    )


def group(seed: int, lengths: list[int], rewards: list[float | None], prompt_length: int = 5) -> Group:
    """One prompt with rollouts of the given lengths; None stands for a reward that failed."""
    rng = np.random.default_rng(seed)
    prompt_ids = rng.integers(V, size=prompt_length)
    return Group(
        prompt=Prompt(messages=({"role": "user", "content": "?"},), answer="1", index=seed),
        rollouts=tuple(
            Rollout(
                token_ids=np.concatenate([prompt_ids, rng.integers(V, size=n)]).astype(np.int32),
                num_prompt_tokens=prompt_length,
                mask=np.arange(prompt_length + n) >= prompt_length,
                actor_logprobs=np.concatenate([np.zeros(prompt_length), -rng.random(n) * 5]).astype(np.float32),
                text="",
                finish_reason="stop",
                version=0,
                score=None if reward is None else Score(total=reward, correct=reward > 1, parts={"correct": reward}),
                reward_error="it raised" if reward is None else None,
            )
            for n, reward in zip(lengths, rewards, strict=True)
        ),
    )


def forced(group: Group, count: int, masked: int | None = None) -> Group:
    """The group with `count` forced tokens, the same at the start of each completion, and a mask without the first
    `masked` ones, by default these; at least a rollout's last token stays scored."""
    start = group.rollouts[0].num_prompt_tokens
    text = np.random.default_rng(count).integers(V, size=count)

    def begun(rollout: Rollout) -> Rollout:
        number = min(count, rollout.num_completion_tokens - 1)
        mask = np.arange(len(rollout.mask)) >= min(start + (count if masked is None else masked), len(rollout.mask) - 1)
        return replace(
            rollout,
            token_ids=np.concatenate(
                [rollout.token_ids[:start], text[:number], rollout.token_ids[start + number :]]
            ).astype(np.int32),
            mask=mask,
            actor_logprobs=rollout.actor_logprobs * mask,
            num_forced_tokens=number,
        )

    return replace(group, rollouts=tuple(map(begun, group.rollouts)))


def groups() -> list[Group]:
    """Three groups of different lengths; the rewards of the third are all equal."""
    return [
        group(1, [7, 3, 9, 1], [4.0, 0.0, 1.5, -0.5]),
        group(2, [2, 6, 4, 8], [1.0, 1.0, 0.0, 2.0], prompt_length=11),
        group(3, [5, 5, 2, 3], [0.5, 0.5, 0.5, 0.5], prompt_length=2),
    ]


def move_adapter(learner: Learner) -> Learner:
    """Replace the zeros that B starts with by random numbers, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in learner.policy.peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return learner


def learner(folder: Path, **options) -> Learner:
    """A learner of `config(**options)` with a moved adapter."""
    return move_adapter(Learner(folder, config(**options), CANARY))


def gradients(made: Learner, groups: list[Group]) -> dict[str, torch.Tensor]:
    """Gradients of one update by parameter, without clipping; the weights stay unchanged."""
    made.optimizer.config = made.optimizer.config.model_copy(update={"gradient_clip": 1e9})
    made.optimizer.adamw.step = lambda: None
    result = made.update(groups)
    assert result.skipped is None
    return {n: p.grad.clone() for n, p in made.policy.peft_model.named_parameters() if p.requires_grad}


def kept_gradients(made: Learner) -> list[np.ndarray]:
    """A list to which each later optimizer step appends its gradient, all parameters in one."""
    kept: list[np.ndarray] = []
    step = made.optimizer.adamw.step

    def kept_step() -> None:
        kept.append(torch.cat([p.grad.flatten() for p in made.policy.parameters()]).numpy().copy())
        step()

    made.optimizer.adamw.step = kept_step
    return kept
