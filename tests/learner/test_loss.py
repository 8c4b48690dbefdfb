"""The clipped surrogate and the KL estimators against plain Python, and their gradients by hand."""

import math

import pytest
import torch

from learner.loss import clipped_surrogate, kl


@pytest.mark.parametrize("advantage", [2.0, -2.0, 0.0])
@pytest.mark.parametrize("ratio", [0.5, 0.85, 1.0, 1.25, 3.0])
def test_surrogate_and_gradient(ratio, advantage):
    logprobs = torch.tensor([math.log(ratio) - 1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0], dtype=torch.float64)
    got = clipped_surrogate(logprobs, old, torch.tensor([advantage], dtype=torch.float64), clip_low=0.2, clip_high=0.28)
    clipped = min(max(ratio, 0.8), 1.28)
    assert got.item() == pytest.approx(min(ratio * advantage, clipped * advantage), rel=1e-12)
    got.backward()
    # There is no gradient outside the bounds where the ratio has moved in the direction that raises the objective.
    cut = (advantage > 0 and ratio > 1.28) or (advantage < 0 and ratio < 0.8)
    assert logprobs.grad.item() == pytest.approx(0.0 if cut else ratio * advantage, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize(("estimator", "expected"), [("k1", 0.5), ("k2", 0.125), ("k3", math.exp(-0.5) + 0.5 - 1)])
def test_kl_by_hand(estimator, expected):
    got = kl(torch.tensor([-1.0]).double(), torch.tensor([-1.5]).double(), estimator=estimator)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_estimators_are_unbiased(estimator):
    """sum_x p(x) estimate(x) is the KL itself for k1 and k3."""
    p, q = (torch.tensor(x, dtype=torch.float64) for x in ([0.7, 0.2, 0.1], [0.3, 0.3, 0.4]))
    exact = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert (p * kl(p.log(), q.log(), estimator=estimator)).sum().item() == pytest.approx(exact, rel=1e-12)


def test_k3_keeps_precision_near_zero():
    """At d = 1e-3, exp(d) - d - 1 in float32 would cancel to about one correct digit; its value is d^2 / 2."""
    got = kl(torch.tensor([0.0]), torch.tensor([1e-3]), estimator="k3")
    assert got.item() == pytest.approx(1e-6 / 2, rel=1e-3)
