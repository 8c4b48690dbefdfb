"""Packing: which position predicts which token, and token values padded and flattened again."""

import numpy as np
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batch import pack

CPU = torch.device("cpu")
shapes = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 8), min_size=2, max_size=5)), min_size=1, max_size=4
)


@given(shapes, st.integers(1, 60), st.integers(1, 5), st.integers(0, 3))
def test_every_sampled_token_is_predicted_once_from_the_position_before_it(shapes, budget, accumulation, num_forced):
    groups = [tiny.group(i, n, [1.0] * len(n), prompt_length=p) for i, (p, n) in enumerate(shapes)]
    groups = [tiny.forced(group, num_forced) for group in groups]
    rollouts = [r for group in groups for r in group.rollouts]
    batch = pack(groups, max_tokens=budget, min_micro_batches=accumulation, device=CPU)
    seen = set()
    for micro_batch in batch.micro_batches:
        assert sum(map(sum, micro_batch.lengths)) == len(micro_batch.token_ids_L)
        if len(micro_batch.lengths) > 1 or len(micro_batch.lengths[0]) > 2:  # one rollout alone may exceed the budget
            assert len(micro_batch.token_ids_L) <= budget
        for predictor, target, i, t in zip(
            *(getattr(micro_batch, n).tolist() for n in ("predictor_N", "target_N", "rollout_N", "token_N")),
            strict=True,
        ):
            rollout = rollouts[i]
            position = np.flatnonzero(rollout.mask)[t]
            assert target == rollout.token_ids[position]
            assert micro_batch.token_ids_L[predictor] == rollout.token_ids[position - 1]
            assert micro_batch.position_ids_L[predictor] == position - 1
            seen.add((i, t))
    assert len(seen) == sum(r.mask.sum() for r in rollouts) == len(batch.rollout_N)


def test_a_prompt_is_computed_once_per_packed_sequence():
    batch = pack([tiny.group(1, [4, 4, 4, 4], [1.0] * 4)], max_tokens=1000, min_micro_batches=1, device=CPU)
    assert [len(m.token_ids_L) for m in batch.micro_batches] == [5 + 16]


def test_pad_flatten_split_and_gather_agree():
    groups = tiny.groups()
    batch = pack(groups, max_tokens=30, min_micro_batches=1, device=CPU)
    values = [np.arange(r.num_completion_tokens) + 100 * i for i, r in enumerate(r for g in groups for r in g.rollouts)]
    values_N = batch.gather(values)
    assert torch.equal(batch.flatten(batch.pad(values_N)), values_N)
    assert batch.pad(values_N)[2].tolist()[:9] == [200 + t for t in range(9)]
    assert all(np.array_equal(a, b) for a, b in zip(batch.split(values_N), values, strict=True))
    assert batch.mask_BT.sum().item() == len(values_N)
