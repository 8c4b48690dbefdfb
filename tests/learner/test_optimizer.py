"""The schedule by hand, and that a skipped step changes nothing."""

import math

import pytest
import torch

from common.config import LearnerConfig
from learner.optimizer import Optimizer, learning_rate


def test_schedule_of_the_paper():
    rates = [learning_rate(step, steps=150, peak=5e-6) for step in range(150)]
    assert rates[:15] == pytest.approx([5e-6 * (k + 1) / 15 for k in range(15)])  # warm-up max(5, 150 // 10)
    assert rates[15] == pytest.approx(5e-6)
    middle = 15 + 135 // 3  # a third of the way down: (1 + cos 60 deg) / 2 = 3/4
    assert rates[middle] == pytest.approx(0.75 * 5e-6)
    assert 0 < rates[-1] < 1e-9
    assert rates[15:] == sorted(rates[15:], reverse=True)


def test_short_runs_warm_up_over_five_steps():
    assert [learning_rate(k, steps=3, peak=1.0) for k in range(3)] == pytest.approx([0.2, 0.4, 0.6])


def test_gradient_is_clipped_and_adamw_steps():
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Optimizer([parameter], LearnerConfig(learning_rate=0.1, weight_decay=0.0, gradient_clip=1.0), steps=100)
    norm, skipped = optimizer.step((parameter * torch.tensor([30.0, 40.0])).sum(), 10)
    assert norm == pytest.approx(50.0)
    assert skipped is None
    assert parameter.grad.tolist() == pytest.approx([0.6, 0.8], rel=1e-5)
    assert parameter.tolist() == pytest.approx([2.9, 3.9], rel=1e-5)  # Adam's first step equals the learning rate


@pytest.mark.parametrize(
    "loss", [lambda p: p.sum() * math.inf, lambda p: p.sum() * math.nan, lambda p: (p * 0).sqrt().sum()]
)
def test_a_skipped_step_changes_nothing(loss):
    """The third loss is 0, but its gradient, 0 * inf, is not finite."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = Optimizer([parameter], LearnerConfig(learning_rate=0.1), steps=10)
    optimizer.step(parameter.sum(), 0)
    before, moments = parameter.clone(), optimizer.state_dict()["0.exp_avg"].clone()
    _, skipped = optimizer.step(loss(parameter), 1)
    assert skipped
    assert torch.equal(parameter, before)
    assert torch.equal(optimizer.state_dict()["0.exp_avg"], moments)
