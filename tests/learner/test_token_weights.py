"""Horizon weights and their normalisation against the paper's formulas in plain Python floats."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.token_weights import gini, horizon, normalise, uniform

V = 50


def entropies(normalized):
    return torch.tensor(normalized, dtype=torch.float64) * math.log(V)


def test_horizon_oracle():
    got = horizon(
        entropies([[0.1, 0.2, 0.3]]),
        torch.ones(1, 3, dtype=torch.bool),
        torch.tensor([1.0]),
        alpha=0.5,
        vocab_size=V,
        selective=False,
    )
    torch.testing.assert_close(
        got, torch.tensor([[0.951229, 0.860708, 0.740818]], dtype=torch.float64), atol=5e-7, rtol=0
    )


def test_selective_discounts_negative_advantages_only():
    entropy_BT = entropies([[0.1, 0.2, 0.3]] * 3)
    got = horizon(
        entropy_BT,
        torch.ones(3, 3, dtype=torch.bool),
        torch.tensor([1.0, 0.0, -1.0]),
        alpha=0.5,
        vocab_size=V,
        selective=True,
    )
    assert got[:2].tolist() == [[1.0] * 3] * 2
    assert got[2, 2].item() == pytest.approx(math.exp(-0.5 * 0.6))


ragged = st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=2, max_size=5)


@given(ragged, st.floats(-2, 2), st.booleans())
def test_horizon_against_a_product_over_tokens(rollouts, alpha, selective):
    length = max(map(len, rollouts))
    mask = torch.tensor([[t < len(rollout) for t in range(length)] for rollout in rollouts])
    padded = entropies([rollout + [0.7] * (length - len(rollout)) for rollout in rollouts])  # 0.7 must not count
    advantages = torch.tensor([(-1.0) ** i for i in range(len(rollouts))])
    got = horizon(padded, mask, advantages, alpha=alpha, vocab_size=V, selective=selective)
    for i, rollout in enumerate(rollouts):
        weight = 1.0
        for t, entropy in enumerate(rollout):
            weight *= math.exp(-alpha * entropy)  # Eq. 4-5 as a product
            expected = 1.0 if selective and i % 2 == 0 else weight
            assert got[i, t].item() == pytest.approx(expected, rel=1e-12)
        assert (got[i, len(rollout) :] == 0).all()


@pytest.mark.parametrize("normaliser", ["sequence-mean", "group", "step"])
def test_normalised_sum_reproduces_the_reduction(normaliser):
    generator = torch.Generator().manual_seed(0)
    lengths, group_B = [3, 1, 4, 2, 5], torch.tensor([0, 0, 1, 1, 1])
    mask = torch.arange(5)[None, :] < torch.tensor(lengths)[:, None]
    weights = torch.rand(5, 5, generator=generator, dtype=torch.float64) * mask
    values = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    got = (normalise(weights, mask, group_B, normaliser=normaliser) * values).sum().item()

    rollouts = [[(weights[i, t].item(), values[i, t].item()) for t in range(n)] for i, n in enumerate(lengths)]
    if normaliser == "sequence-mean":
        expected = sum(sum(w * v for w, v in rollout) / len(rollout) for rollout in rollouts) / 5
    elif normaliser == "step":
        flat = [pair for rollout in rollouts for pair in rollout]
        expected = sum(w * v for w, v in flat) / sum(w for w, _ in flat)
    else:
        groups = [rollouts[0] + rollouts[1], rollouts[2] + rollouts[3] + rollouts[4]]
        expected = sum(sum(w * v for w, v in g) / sum(w for w, _ in g) for g in groups) / 2
    assert got == pytest.approx(expected, rel=1e-13)


def test_selective_denominator_scales_positive_tokens_up():
    """Two rollouts of 3 tokens, one positive, entropies .1 .2 .3, alpha .5: the weight of a positive token is 1.081."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    raw = horizon(
        entropies([[0.1, 0.2, 0.3]] * 2), mask, torch.tensor([1.0, -1.0]), alpha=0.5, vocab_size=V, selective=True
    )
    weights = normalise(raw, mask, torch.tensor([0, 0]), normaliser="group")
    assert weights[0, 0].item() * 6 == pytest.approx(1.081, abs=5e-4)


def test_alpha_zero_is_the_token_mean():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    raw = horizon(entropies([[0.3] * 3] * 2), mask, torch.tensor([-1.0, 1.0]), alpha=0.0, vocab_size=V, selective=True)
    assert torch.equal(raw, uniform(mask))
    got = normalise(raw, mask, torch.tensor([0, 0]), normaliser="group")
    torch.testing.assert_close(got, mask.double() / 5)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([2.0, 2.0, 2.0], 0.0),
        ([1.0, 3.0], 1 / 4),  # (|1 - 3| + |3 - 1|) / (2 * 2 * 4)
        ([1.0, 0.0, 0.0], 2 / 3),  # 4 / (2 * 3 * 1)
        ([0.0, 0.0], 0.0),  # no token has a weight
        ([5.0], 0.0),
    ],
)
def test_gini_by_hand(weights, expected):
    padded = torch.tensor([weights + [9.0] * (4 - len(weights)), [1.0] * 4])  # the 9s must not count
    mask = torch.arange(4)[None, :] < torch.tensor([[len(weights)], [4]])
    assert gini(padded, mask).tolist() == pytest.approx([expected, 0.0], abs=1e-6)
