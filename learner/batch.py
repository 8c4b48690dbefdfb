"""Groups -> packed micro-batches by token budget, and values of scored tokens -> padded [B, T] and back.

A row is one prompt followed by rollouts of it: the prompt is computed once. A micro-batch is rows laid end to end,
with no padding; learner/policy/attention.py keeps rows and rollouts from seeing each other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.types import Group, Rollout


class Ends(NamedTuple):
    """Where the queries and the keys of each prompt and rollout end, as FlashAttention's kernel takes them."""

    query_ends: Tensor  # int32, from 0 on
    key_ends: Tensor  # a rollout's keys are its prompt's and its own
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, lengths: Sequence[Sequence[int]], device: torch.device) -> "Ends":
        """Of rows as in MicroBatch.lengths."""
        queries = [length for row in lengths for length in row]
        keys = [length + (row[0] if place else 0) for row in lengths for place, length in enumerate(row)]
        query_ends, key_ends = (torch.tensor(np.cumsum([0, *n]), dtype=torch.int32).to(device) for n in (queries, keys))
        return cls(query_ends, key_ends, max(queries), max(keys))


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """L positions, of which N predict a scored token. All tensors int64."""

    token_ids_L: Tensor
    position_ids_L: Tensor  # a rollout's positions go on from its prompt's
    lengths: tuple[tuple[int, ...], ...]  # of each row: its prompt, then its rollouts; they sum to L
    ends: Ends  # of the lengths
    predictor_N: Tensor  # index into L: where the distribution of the token is made
    target_N: Tensor  # the token
    rollout_N: Tensor  # its rollout, 0..B-1
    token_N: Tensor  # its place among the sampled tokens of the rollout, 0..T-1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """The micro-batches of one optimizer step. Scored tokens of the step are numbered in micro-batch order."""

    micro_batches: tuple[MicroBatch, ...]
    mask_BT: Tensor  # bool, true at sampled tokens
    rollout_N: Tensor  # over the whole step
    token_N: Tensor

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


def pack(groups: Sequence[Group], *, max_tokens: int, min_micro_batches: int, device: torch.device) -> StepBatch:
    """Pack the rollouts of `groups`, numbered in their order, into micro-batches of at most `max_tokens` positions.

    A prompt with one rollout that is longer makes a micro-batch of its own. At least `min_micro_batches`
    are made where there are so many rows. The cut never changes the gradient.
    """
    rows = [row for group, first in _numbered(groups) for row in _rows(group.rollouts, first, max_tokens)]
    most_rows = max(1, len(rows) // min_micro_batches)
    micro_batches = tuple(_micro_batch(cut, device) for cut in _cut(rows, max_tokens, most_rows))
    rollout_N = torch.cat([m.rollout_N for m in micro_batches])
    token_N = torch.cat([m.token_N for m in micro_batches])
    num_rollouts = sum(len(group.rollouts) for group in groups)
    mask_BT = torch.zeros(num_rollouts, int(token_N.max()) + 1, dtype=torch.bool, device=device)
    mask_BT[rollout_N, token_N] = True
    return StepBatch(micro_batches=micro_batches, mask_BT=mask_BT, rollout_N=rollout_N, token_N=token_N)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One prompt and some rollouts of it, laid end to end. All arrays int64."""

    token_ids_L: np.ndarray
    position_ids_L: np.ndarray
    lengths: tuple[int, ...]
    predictor_N: np.ndarray  # index into this row
    target_N: np.ndarray
    rollout_N: np.ndarray
    token_N: np.ndarray


def _numbered(groups: Sequence[Group]) -> Iterable[tuple[Group, int]]:
    """Each group with the number of its first rollout."""
    first = 0
    for group in groups:
        yield group, first
        first += len(group.rollouts)


def _rows(rollouts: Sequence[Rollout], first: int, max_tokens: int) -> Iterable[_Row]:
    """Rows of one group: as many rollouts each as fit behind the prompt."""
    prompt_length = rollouts[0].num_prompt_tokens
    taken: list[int] = []
    tokens = prompt_length
    for i, rollout in enumerate(rollouts):
        length = len(rollout.token_ids) - prompt_length
        if taken and tokens + length > max_tokens:
            yield _row(rollouts, taken, first, prompt_length)
            taken, tokens = [], prompt_length
        taken.append(i)
        tokens += length
    yield _row(rollouts, taken, first, prompt_length)


def _row(rollouts: Sequence[Rollout], taken: Sequence[int], first: int, prompt_length: int) -> _Row:
    prompt_ids = rollouts[taken[0]].token_ids[:prompt_length]
    token_ids, positions, lengths = [prompt_ids], [np.arange(prompt_length)], [prompt_length]
    predictors, targets, numbers, tokens = [], [], [], []
    start = prompt_length  # of the next rollout in the row
    for i in taken:
        rollout = rollouts[i]
        assert np.array_equal(rollout.token_ids[:prompt_length], prompt_ids), "the rollouts of a group share a prompt"
        tail_ids, scored = rollout.token_ids[prompt_length:], np.flatnonzero(rollout.mask[prompt_length:])
        token_ids.append(tail_ids)
        positions.append(prompt_length + np.arange(len(tail_ids)))
        lengths.append(len(tail_ids))
        predictors.append(np.where(scored == 0, prompt_length, start + scored) - 1)  # the first: the prompt's last
        targets.append(tail_ids[scored])
        numbers.append(np.full(len(scored), first + i))
        tokens.append(np.arange(len(scored)))
        start += len(tail_ids)
    return _Row(
        token_ids_L=np.concatenate(token_ids),
        position_ids_L=np.concatenate(positions),
        lengths=tuple(lengths),
        predictor_N=np.concatenate(predictors),
        target_N=np.concatenate(targets),
        rollout_N=np.concatenate(numbers),
        token_N=np.concatenate(tokens),
    )


def _cut(rows: Sequence[_Row], max_tokens: int, most_rows: int) -> Iterable[list[_Row]]:
    """Consecutive rows within the budget."""
    taken: list[_Row] = []
    for row in rows:
        tokens = sum(len(r.token_ids_L) for r in [*taken, row])
        if taken and (len(taken) == most_rows or tokens > max_tokens):
            yield taken
            taken = []
        taken.append(row)
    yield taken


def _micro_batch(rows: Sequence[_Row], device: torch.device) -> MicroBatch:
    def tensor(arrays: Iterable[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(list(arrays)).astype(np.int64)).to(device)

    starts = np.cumsum([0, *(len(row.token_ids_L) for row in rows)])
    return MicroBatch(
        token_ids_L=tensor(row.token_ids_L for row in rows),
        position_ids_L=tensor(row.position_ids_L for row in rows),
        lengths=tuple(row.lengths for row in rows),
        ends=Ends.of([row.lengths for row in rows], device),
        predictor_N=tensor(row.predictor_N + start for row, start in zip(rows, starts, strict=False)),
        target_N=tensor(row.target_N for row in rows),
        rollout_N=tensor(row.rollout_N for row in rows),
        token_N=tensor(row.token_N for row in rows),
    )
