"""REFT: the first tokens of completions (openers) are picked from the policy's most likely ones (arXiv 2605.28295)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from actor.engine import Engine, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """How openers are picked. A special token is never an opener."""

    num_candidates: int  # N: the prompt's most likely first tokens
    num_distinct: int  # K: how many of them are picked, uniformly; each begins G / K completions
    learned: bool  # whether the opener is in the loss
    after: str = ""  # text that is forced before the opener: a completion's first tokens


def forced_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The token ids of `text` by itself: neither the prompt before it nor the opener behind it is merged into them."""
    token_ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return token_ids


def sample_with_openers(
    engine: Engine,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    opening: Opening,
    *,
    num_samples: int,
    temperature: float,
    max_tokens: int,
    stop: Sequence[str],
    seeds: Sequence[int],
    fixed_length: bool = False,
) -> list[list[Sample]]:
    """As Engine.sample; of each prompt's completions, equal shares begin with `opening.num_distinct` picked tokens.

    The tokens of `opening.after` come first; they are not sampled, and their log-probabilities are 0. An opener's is
    the policy's own. Both count for max_tokens, which must exceed their number. A prompt with fewer candidates than
    `opening.num_distinct`, since special tokens are excluded, repeats some openers.
    """
    forced = forced_tokens(tokenizer, opening.after)
    prompts = [[*prompt, *forced] for prompt in prompts]
    openers = [
        _pick(ids, logprobs, opening.num_distinct, seed)
        for (ids, logprobs), seed in zip(
            engine.first_tokens(
                prompts, count=opening.num_candidates, temperature=temperature, without=tokenizer.all_special_ids
            ),
            seeds,
            strict=True,
        )
    ]
    branches = [(i, branch, opener) for i, picked in enumerate(openers) for branch, opener in enumerate(picked)]
    samples = engine.sample(
        [[*prompts[i], token_id] for i, _, (token_id, _) in branches],
        num_samples=num_samples // opening.num_distinct,
        temperature=temperature,
        max_tokens=max_tokens - len(forced) - 1,
        stop=stop,
        seeds=[_branch_seed(seeds[i], branch) for i, branch, _ in branches],
        fixed_length=fixed_length,
    )
    groups: list[list[Sample]] = [[] for _ in prompts]
    for (i, _, opener), drawn in zip(branches, samples, strict=True):
        groups[i] += [_joined(forced, opener, sample, tokenizer, () if fixed_length else stop) for sample in drawn]
    return groups


def _pick(ids: np.ndarray, logprobs: np.ndarray, count: int, seed: int) -> list[tuple[int, float]]:
    order = np.random.default_rng(seed).permutation(len(ids))
    return [(int(ids[i]), float(logprobs[i])) for i in np.resize(order, count)]


def _branch_seed(seed: int, branch: int) -> int:
    """A seed below 2^31 that differs between the branches of a prompt."""
    return int(np.random.SeedSequence([seed, branch]).generate_state(1)[0]) // 2


def _joined(
    forced: Sequence[int],
    opener: tuple[int, float],
    sample: Sample,
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[str],
) -> Sample:
    """The sample with the forced tokens and its opener in front, all decoded together."""
    token_id, logprob = opener
    token_ids = np.concatenate([np.array([*forced, token_id], dtype=np.int32), sample.token_ids])
    text = tokenizer.decode(token_ids, skip_special_tokens=True)
    ends = [text.index(word) + len(word) for word in stop if word in text]
    return Sample(
        token_ids=token_ids,
        logprobs=np.concatenate([np.array([*np.zeros(len(forced)), logprob], dtype=np.float32), sample.logprobs]),
        text=text[: min(ends)] if ends else text,
        finish_reason="stop" if ends else sample.finish_reason,
        num_forced_tokens=len(forced),
    )
