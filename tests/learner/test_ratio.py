"""Ratios of whole rollouts and of HölderPO against the hand numbers of the papers, and importance weights."""

import math
from dataclasses import fields

import numpy as np
import pytest
import tiny
import torch

from learner import ratio
from learner.batch import pack
from learner.learner import Learner
from learner.objective import Targets, linear

ALL = torch.ones(1, 3, dtype=torch.bool)
RATIOS = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("power", "mean"),
    [(3, 1.448896), (2, 1.322876), (1, 1.166667), (0, 1.0), (-1, 0.857143), (-2, 0.755929), (1e-9, 1.0)],
)
def test_power_mean_oracle(power, mean):
    got = ratio.power_mean(RATIOS.log(), ALL, power=power).exp()
    torch.testing.assert_close(got, torch.full((1, 3), mean, dtype=torch.float64), rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    ("power", "both", "gains", "loses"),
    [
        (2, 1.022162, 0.946925, 1.371131),
        (1, 1.011111, 0.9, 1.266667),
        (0, 1.0, 0.843433, 1.169607),
        (-1, 0.989011, 0.782609, 1.090909),
        (-2, 0.978319, 0.725830, 1.032796),
    ],
)
def test_power_means_of_clipped_ratios_oracle(folder, power, both, gains, loses):
    """The ratio in the surrogate of ratios .5, 1, 2, clipped at .2, for advantages of either sign."""
    for clip, advantage, expected in (("both", 1, both), ("both", -1, both), ("token", 1, gains), ("token", -1, loses)):
        ratio_N, _ = objective_ratio(folder, power, clip, advantage)
        assert ratio_N.tolist() == pytest.approx([expected] * 3, abs=5e-7)


@pytest.mark.parametrize("advantage", [1, -1])
def test_a_ratio_clipped_on_both_sides_has_no_gradient(folder, advantage):
    _, gradient_N = objective_ratio(folder, 2, "both", advantage)
    assert gradient_N[[0, 2]].tolist() == [0, 0]
    assert gradient_N[1] > 0


def objective_ratio(folder, power, clip, advantage):
    """The power mean that the objective takes of one rollout with RATIOS, and the gradient of its first entry."""
    method = {"name": "holder", "power_start": power, "power_clip": clip, "clip_low": 0.2, "clip_high": 0.2}
    made = Learner(folder, tiny.config(method=method), np.arange(12))
    batch = pack([tiny.group(1, [3], [1.0])], max_tokens=99, min_micro_batches=1, device=torch.device("cpu"))
    nothing_N = torch.zeros(3, dtype=torch.float64)
    targets = Targets(
        **{field.name: nothing_N for field in fields(Targets)} | {"advantages_N": nothing_N + advantage, "power": power}
    )
    logprobs_N = RATIOS[0].log().requires_grad_()
    log_ratio_N = made.objective._log_ratio(logprobs_N, targets, batch)
    (gradient_N,) = torch.autograd.grad(log_ratio_N[0], logprobs_N)
    return log_ratio_N.detach().exp(), gradient_N


def test_power_mean_weights_tokens_by_their_power():
    difference_BT = RATIOS.log().requires_grad_()
    (gradient_BT,) = torch.autograd.grad(ratio.power_mean(difference_BT, ALL, power=2.0)[0, 0], difference_BT)
    torch.testing.assert_close(
        gradient_BT, torch.tensor([[0.0476, 0.1905, 0.7619]], dtype=torch.float64), rtol=0, atol=5e-5
    )
    assert gradient_BT.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("power", [-2.0, 0.0, 1.0])
def test_sequence_ratios_see_their_own_tokens_only(power):
    """Padding and other rollouts change nothing, and a token outside the mask gets no gradient."""
    difference_BT = torch.tensor([[0.1, -0.2, 9.0], [0.3, 0.3, 0.3]], dtype=torch.float64, requires_grad=True)
    mask_BT = torch.tensor([[True, True, False], [True, True, True]])
    got = ratio.power_mean(difference_BT, mask_BT, power=power)
    alone = ratio.power_mean(difference_BT[:1, :2], mask_BT[:1, :2], power=power)
    torch.testing.assert_close(got[0, :2], alone[0])
    assert got[0, 2] == 0
    torch.testing.assert_close(got[1], torch.full((3,), 0.3, dtype=torch.float64))
    (gradient_BT,) = torch.autograd.grad(got.sum(), difference_BT)
    assert gradient_BT[0, 2] == 0
    assert gradient_BT.isfinite().all()


def test_power_mean_of_zero_is_the_sequence_ratio():
    difference_BT = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask_BT = torch.arange(7) < torch.tensor([[7], [1], [3], [5]])
    torch.testing.assert_close(
        ratio.power_mean(difference_BT, mask_BT, power=1e-5), ratio.sequence(difference_BT, mask_BT), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("power", [-2.0, 0.5, 3.0])
def test_at_ratio_one_every_power_has_the_gradient_of_zero(power):
    mask_BT = torch.arange(5) < torch.tensor([[5], [2]])
    gradients = []
    for p in (power, 0.0):
        difference_BT = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
        (gradient_BT,) = torch.autograd.grad(ratio.power_mean(difference_BT, mask_BT, power=p).sum(), difference_BT)
        gradients.append(gradient_BT)
    torch.testing.assert_close(*gradients)


def test_importance_by_hand():
    difference_BT = torch.tensor([[math.log(3), math.log(0.5), 9.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, False]])
    for options, expected in (
        ({"sequence_level": False, "mask_out": False}, [2.0, 0.5, 0.0]),
        ({"sequence_level": False, "mask_out": True}, [0.0, 0.5, 0.0]),
        ({"sequence_level": True, "mask_out": False}, [1.5, 1.5, 0.0]),
        ({"sequence_level": True, "mask_out": True}, [1.5, 1.5, 0.0]),
    ):
        got = ratio.importance(difference_BT, mask_BT, cap=2.0, **options)
        torch.testing.assert_close(got, torch.tensor([expected], dtype=torch.float64))


def test_the_power_runs_from_start_to_end(folder):
    made = Learner(folder, tiny.config(method={"name": "holder"}, steps=5), np.arange(12))
    assert [made.update(tiny.groups()).metrics["ratio/power"] for _ in range(5)] == [2, 1, 0, -1, -2]


def test_the_power_ends_after_its_steps():
    """p of arXiv 2605.12058 over its first 500 steps."""
    assert [linear(2.0, -2.0, step, 500) for step in (0, 125, 250, 375, 500, 900)] == [2, 1, 0, -1, -2, -2]


def test_the_power_steps_are_those_of_the_option(folder):
    method = {"name": "holder", "power_steps": 2}
    made = Learner(folder, tiny.config(method=method, steps=5), np.arange(12))
    assert [made.update(tiny.groups()).metrics["ratio/power"] for _ in range(4)] == [2, 0, -2, -2]
