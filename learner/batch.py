"""Groups -> packed micro-batches by token budget, and values of scored tokens -> padded [B, T] and back.

A batch is learned in one mini-batch or in several, disjoint ones; each of them is cut into micro-batches.
A packed sequence is one prompt followed by rollouts of it, so that the prompt is computed once. A micro-batch is packed
sequences laid end to end without padding; learner/policy/attention.py keeps sequences and rollouts from attending to
each other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.types import Group, Rollout


class Ends(NamedTuple):
    """Where the queries and the keys of each prompt and rollout end: the arguments of FlashAttention's kernel."""

    query_ends: Tensor  # int32, cumulative, starts with 0
    key_ends: Tensor  # the same; a rollout has the keys of its prompt and its own
    max_queries: int
    max_keys: int

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], device: torch.device) -> "Ends":
        """The ends for packed sequences with `lengths` as in MicroBatch."""
        queries = [length for sequence in lengths for length in sequence]
        keys = [length + (sequence[0] if i else 0) for sequence in lengths for i, length in enumerate(sequence)]
        query_ends, key_ends = (torch.tensor(np.cumsum([0, *n]), dtype=torch.int32).to(device) for n in (queries, keys))
        return cls(query_ends, key_ends, max(queries), max(keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """L positions, of which N predict a scored token. All tensors int64."""

    index: int  # in the batch
    token_ids_L: Tensor
    position_ids_L: Tensor  # a rollout's positions continue those of its prompt
    lengths: tuple[tuple[int, ...], ...]  # for each packed sequence: its prompt, then its rollouts; they sum to L
    ends: Ends  # made from the lengths
    predictor_N: Tensor  # index into L of the position that predicts the token
    target_N: Tensor  # the token's id
    rollout_N: Tensor  # index of its rollout in the batch, 0..B-1
    token_N: Tensor  # its index among the sampled tokens of the rollout, 0..T-1


class Slices(NamedTuple):
    """Where a mini-batch lies in its batch."""

    micro_batches: slice
    rollouts: slice  # of [B]
    tokens: slice  # of [N]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The micro-batches of a step, or of one of its mini-batches; [N] counts its scored tokens in their order."""

    micro_batches: tuple[MicroBatch, ...]
    mask_BT: Tensor  # bool, true at sampled tokens
    rollout_N: Tensor  # index of each token's rollout in mask_BT
    token_N: Tensor  # as in MicroBatch
    mini_batches: tuple[Slices, ...]  # of a step; a mini-batch has none

    def part(self, of: Slices) -> "StepBatch":
        """One of the mini-batches."""
        return StepBatch(
            micro_batches=self.micro_batches[of.micro_batches],
            mask_BT=self.mask_BT[of.rollouts],
            rollout_N=self.rollout_N[of.tokens] - of.rollouts.start,
            token_N=self.token_N[of.tokens],
            mini_batches=(),
        )

    def pad(self, values_N: Tensor) -> Tensor:
        """[N] -> [B, T], 0 outside the mask."""
        values_BT = values_N.new_zeros(self.mask_BT.shape)
        values_BT[self.rollout_N, self.token_N] = values_N
        return values_BT

    def gather(self, values: Sequence[np.ndarray]) -> Tensor:
        """B arrays over the sampled tokens of each rollout -> float32 [N]."""
        offsets_B = np.cumsum([0, *(len(v) for v in values)])[:-1]
        flat = torch.from_numpy(np.concatenate(values).astype(np.float32)).to(self.rollout_N.device)
        return flat[torch.from_numpy(offsets_B).to(self.rollout_N.device)[self.rollout_N] + self.token_N]

    def split(self, values_N: Tensor) -> list[np.ndarray]:
        """[N] -> B float32 arrays over the sampled tokens of each rollout."""
        values_BT, mask_BT = self.pad(values_N).float().cpu().numpy(), self.mask_BT.cpu().numpy()
        return [values_T[mask_T] for values_T, mask_T in zip(values_BT, mask_BT, strict=True)]

    def flatten(self, values_BT: Tensor) -> Tensor:
        """[B, T] -> [N]."""
        return values_BT[self.rollout_N, self.token_N]


def pack(
    groups: Sequence[Group], *, max_tokens: int, min_micro_batches: int, device: torch.device, mini_batches: int = 1
) -> StepBatch:
    """Pack the rollouts of `groups`, numbered in their order, into micro-batches of at most `max_tokens` positions.

    A mini-batch is an equal share of the groups, in their order, or, where these are fewer, an equal part of one group.
    A prompt and one rollout that together are longer form a micro-batch of their own. A mini-batch has at least
    `min_micro_batches` if it has that many packed sequences. How it is cut never changes its gradient.
    """
    micro_batches: list[MicroBatch] = []
    ends = [(0, 0, 0)]  # of each mini-batch: micro-batches, rollouts and tokens so far
    for mini_batch in _shares(groups, mini_batches):
        num_rollouts, num_tokens = ends[-1][1:]
        sequences: list[_Sequence] = []
        for rollouts in mini_batch:
            sequences += _pack_group(rollouts, num_rollouts, max_tokens)
            num_rollouts += len(rollouts)
        for cut in _cut(sequences, max_tokens, max(1, len(sequences) // min_micro_batches)):
            micro_batches.append(_micro_batch(len(micro_batches), cut, device))
            num_tokens += len(micro_batches[-1].target_N)
        ends.append((len(micro_batches), num_rollouts, num_tokens))
    rollout_N = torch.cat([m.rollout_N for m in micro_batches])
    token_N = torch.cat([m.token_N for m in micro_batches])
    mask_BT = torch.zeros(ends[-1][1], int(token_N.max()) + 1, dtype=torch.bool, device=device)
    mask_BT[rollout_N, token_N] = True
    return StepBatch(
        micro_batches=tuple(micro_batches),
        mask_BT=mask_BT,
        rollout_N=rollout_N,
        token_N=token_N,
        mini_batches=tuple(Slices(*map(slice, *pair)) for pair in pairwise(ends)),
    )


def _shares(groups: Sequence[Group], number: int) -> Iterable[list[Sequence[Rollout]]]:
    """The rollouts of `groups` in `number` consecutive shares, each by group: whole groups, or parts of one group."""
    if number <= len(groups):
        for start, end in pairwise(_ends(len(groups), number)):
            yield [group.rollouts for group in groups[start:end]]
        return
    parts = [end - start for start, end in pairwise(_ends(number, len(groups)))]  # of each group
    for group, num_parts in zip(groups, parts, strict=True):
        for start, end in pairwise(_ends(len(group.rollouts), min(num_parts, len(group.rollouts)))):
            yield [group.rollouts[start:end]]


def _ends(total: int, number: int) -> list[int]:
    """The bounds of `number` parts of `total` things that differ by one at most: 0, …, total."""
    return [total * i // number for i in range(number + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sequence:
    """One packed sequence: a prompt and some rollouts of it, laid end to end. All arrays int64."""

    token_ids_L: np.ndarray
    position_ids_L: np.ndarray
    lengths: tuple[int, ...]
    predictor_N: np.ndarray  # index into this sequence
    target_N: np.ndarray
    rollout_N: np.ndarray
    token_N: np.ndarray


def _pack_group(rollouts: Sequence[Rollout], first: int, max_tokens: int) -> Iterable[_Sequence]:
    """Packed sequences of one group, each with as many rollouts as fit behind the prompt. `first` is the index of the
    group's first rollout."""
    prompt_length = rollouts[0].num_prompt_tokens
    taken: list[int] = []
    tokens = prompt_length
    for i, rollout in enumerate(rollouts):
        length = len(rollout.token_ids) - prompt_length
        if taken and tokens + length > max_tokens:
            yield _sequence(rollouts, taken, first, prompt_length)
            taken, tokens = [], prompt_length
        taken.append(i)
        tokens += length
    yield _sequence(rollouts, taken, first, prompt_length)


def _sequence(rollouts: Sequence[Rollout], taken: Sequence[int], first: int, prompt_length: int) -> _Sequence:
    prompt_ids = rollouts[taken[0]].token_ids[:prompt_length]
    token_ids, positions, lengths = [prompt_ids], [np.arange(prompt_length)], [prompt_length]
    predictors, targets, indices, tokens = [], [], [], []
    start = prompt_length  # of the next rollout in the sequence
    for i in taken:
        rollout = rollouts[i]
        assert np.array_equal(rollout.token_ids[:prompt_length], prompt_ids), "the rollouts of a group share a prompt"
        tail_ids, scored = rollout.token_ids[prompt_length:], np.flatnonzero(rollout.mask[prompt_length:])
        token_ids.append(tail_ids)
        positions.append(prompt_length + np.arange(len(tail_ids)))
        lengths.append(len(tail_ids))
        predictors.append(np.where(scored == 0, prompt_length, start + scored) - 1)  # the prompt predicts token 0
        targets.append(tail_ids[scored])
        indices.append(np.full(len(scored), first + i))
        tokens.append(np.arange(len(scored)))
        start += len(tail_ids)
    return _Sequence(
        token_ids_L=np.concatenate(token_ids),
        position_ids_L=np.concatenate(positions),
        lengths=tuple(lengths),
        predictor_N=np.concatenate(predictors),
        target_N=np.concatenate(targets),
        rollout_N=np.concatenate(indices),
        token_N=np.concatenate(tokens),
    )


def _cut(sequences: Sequence[_Sequence], max_tokens: int, max_sequences: int) -> Iterable[list[_Sequence]]:
    """Consecutive sequences, as many as the two limits allow."""
    taken: list[_Sequence] = []
    for sequence in sequences:
        tokens = sum(len(each.token_ids_L) for each in [*taken, sequence])
        if taken and (len(taken) == max_sequences or tokens > max_tokens):
            yield taken
            taken = []
        taken.append(sequence)
    yield taken


def _micro_batch(index: int, sequences: Sequence[_Sequence], device: torch.device) -> MicroBatch:
    def tensor(arrays: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(list(arrays)).astype(np.int64)).to(device)

    starts = np.cumsum([0, *(len(sequence.token_ids_L) for sequence in sequences)])
    return MicroBatch(
        index=index,
        token_ids_L=tensor(sequence.token_ids_L for sequence in sequences),
        position_ids_L=tensor(sequence.position_ids_L for sequence in sequences),
        lengths=tuple(sequence.lengths for sequence in sequences),
        ends=Ends.of([sequence.lengths for sequence in sequences], device),
        predictor_N=tensor(each.predictor_N + start for each, start in zip(sequences, starts, strict=False)),
        target_N=tensor(sequence.target_N for sequence in sequences),
        rollout_N=tensor(sequence.rollout_N for sequence in sequences),
        token_N=tensor(sequence.token_N for sequence in sequences),
    )
