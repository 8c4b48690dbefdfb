"""learner.mini_batches: one batch learned in disjoint parts, with everything but the current policy fixed."""

from itertools import pairwise

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batch import pack

CPU = torch.device("cpu")
shapes = st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=5), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny"))


def nearly_equal(numbers):
    numbers = list(numbers)
    assert max(numbers) - min(numbers) <= 1


@given(shapes, st.integers(1, 9), st.integers(1, 60), st.integers(1, 3))
def test_mini_batches_are_whole_groups_or_equal_parts_of_one(shapes, number, budget, accumulation):
    groups = [tiny.group(i, lengths, [1.0] * len(lengths)) for i, lengths in enumerate(shapes)]
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    batch = pack(groups, max_tokens=budget, min_micro_batches=accumulation, device=CPU, mini_batches=number)
    parts = [batch.part(slices) for slices in batch.mini_batches]
    sizes = [len(part.mask_BT) for part in parts]
    firsts, bounds = (np.cumsum([0, *each]).tolist() for each in (sizes, map(len, shapes)))
    assert firsts[-1] == bounds[-1]
    if number <= len(groups):
        assert len(parts) == number
        assert set(firsts) <= set(bounds)
        nearly_equal(sum(start <= bound < end for bound in bounds) for start, end in pairwise(firsts))
    else:
        assert len(parts) <= number
        assert set(bounds) <= set(firsts)
        for first, last in pairwise(bounds):
            nearly_equal(end - start for start, end in pairwise(firsts) if first <= start < last)
    assert [m.index for part in parts for m in part.micro_batches] == list(range(len(batch.micro_batches)))
    values_N = batch.gather([np.arange(r.num_completion_tokens) + 100 * i for i, r in enumerate(rollouts)])
    first = 0
    for slices, part in zip(batch.mini_batches, parts, strict=True):
        padded_BT = part.pad(values_N[slices.tokens])
        assert torch.equal(padded_BT, batch.pad(values_N)[first : first + len(part.mask_BT)])
        assert torch.equal(part.flatten(padded_BT), values_N[slices.tokens])
        assert sum(len(m.target_N) for m in part.micro_batches) == part.mask_BT.sum()
        first += len(part.mask_BT)


def test_whole_groups_share_their_prompt():
    """The prompt of each group is computed once."""
    groups = [tiny.group(i, [3] * 4, [1.0] * 4) for i in range(4)]
    batch = pack(groups, max_tokens=999, min_micro_batches=1, device=CPU, mini_batches=2)
    assert [m.lengths for m in batch.micro_batches] == [((5, 3, 3, 3, 3),) * 2] * 2


@pytest.mark.parametrize(("number", "sizes"), [(3, [3, 4, 4]), (2, [3, 8]), (5, [3, 2, 2, 2, 2]), (9, [1] * 11)])
def test_a_failed_reward_moves_no_cut(number, sizes):
    """Groups of 3, 4 and 4 rollouts: a lone rollout of a group would weigh as much as a whole one."""
    groups = [tiny.group(i, [3] * n, [1.0] * n) for i, n in enumerate((3, 4, 4))]
    batch = pack(groups, max_tokens=999, min_micro_batches=1, device=CPU, mini_batches=number)
    got = [len(batch.part(slices).mask_BT) for slices in batch.mini_batches]
    assert got == (sizes if number < 9 else [1, 1, 1, 1, 1, 2, 1, 1, 2])


def test_without_a_change_of_the_weights_every_ratio_is_exactly_one(folder):
    """Dropout included: every mini-batch has that of the pass that gave the old log-probabilities."""
    clip = {"name": "gspo", "clip_low": 0.0, "clip_high": 0.0}
    made = tiny.learner(folder, dropout=0.5, mini_batches=3, gradient_accumulation=2, method=clip)
    take, made.optimizer.adamw.step = made.optimizer.adamw.step, lambda: None
    assert made.update(tiny.groups()).metrics["ratio/outside_fraction"] == 0
    made.optimizer.adamw.step = take
    assert made.update(tiny.groups()).metrics["ratio/outside_fraction"] > 0.5  # of the second and third mini-batch


@pytest.mark.parametrize("mini_batches", [1, 3])
def test_the_power_of_hoelders_mean_acts_from_the_second_update_on(folder, mini_batches):
    def weights(power):
        method = {"name": "holder", "power_start": power, "clip_low": 1.0, "clip_high": 9.0}
        made = tiny.learner(folder, mini_batches=mini_batches, method=method)
        made.update(tiny.groups())
        return torch.cat([p.detach().flatten() for p in made.policy.parameters()])

    moved = (weights(2.0) - weights(-2.0)).abs().max().item()
    assert (moved < 2e-6) == (mini_batches == 1)


def test_fewer_rollouts_than_mini_batches_are_learned_one_by_one(folder):
    made = tiny.learner(folder, mini_batches=12, method={"group_filter": "zero-variance"})
    gradients = tiny.kept_gradients(made)
    assert made.update(tiny.groups()).skipped is None
    assert len(gradients) == 8


def test_a_mini_batch_that_is_not_finite_ends_the_step(folder):
    made = tiny.learner(folder, mini_batches=3)
    result = made.update([*tiny.groups()[:2], tiny.group(3, [5, 5, 2, 3], [float("inf"), 0, 0, 0])])
    assert "nan in update 3 of the step; those before it were made" in result.skipped


def test_the_norm_is_the_mean_over_the_mini_batches_of_the_last_inner_update(folder):
    made = tiny.learner(folder, mini_batches=3, inner_updates=2, gradient_clip=1e9)
    gradients = tiny.kept_gradients(made)
    metrics = made.update(tiny.groups()).metrics
    norms = [np.linalg.norm(gradient.astype(float)) for gradient in gradients]
    assert len(norms) == 6
    assert metrics["gradient/norm"] == pytest.approx(sum(norms[3:]) / 3, rel=1e-5)


def test_what_is_fixed_at_the_start_is_that_of_the_whole_batch(folder):
    whole, parts = (tiny.learner(folder, mini_batches=n).update(tiny.groups()) for n in (1, 3))
    for name in ("entropy/mean", "weight/mean", "actor_learner_kl", "advantage/positive_mean"):
        assert parts.metrics[name] == pytest.approx(whole.metrics[name], rel=1e-5), name
    for one, other in zip(whole.tokens, parts.tokens, strict=True):
        np.testing.assert_allclose(other.weights, one.weights, rtol=1e-5)
