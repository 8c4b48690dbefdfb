"""Advantages against numbers computed by hand."""

import math

import pytest
import torch

from learner.advantage import asymmetric, decoupled, group_mean, group_std, standardised


def test_group_std_uses_the_population_std():
    # rewards 1 3 2 6: mean 3, deviations -2 0 -1 3, population variance 14 / 4
    std = math.sqrt(14 / 4)
    expected = [[-2 / (std + 1e-6), 0.0, -1 / (std + 1e-6), 3 / (std + 1e-6)]]
    got = group_std(torch.tensor([[1.0, 3.0, 2.0, 6.0]], dtype=torch.float64))
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_group_std_with_the_sample_std():
    binary = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    for ddof, expected in ((1, [1.5, -0.5, -0.5, -0.5]), (0, [1.7321, -0.5774, -0.5774, -0.5774])):
        assert group_std(binary, ddof=ddof)[0].tolist() == pytest.approx(expected, abs=1e-4)
    assert group_std(torch.tensor([[5.0]]), ddof=1).item() == 0


def test_groups_do_not_see_each_other():
    rewards_PG = torch.tensor([[0.0, 1.0], [10.0, 30.0]])
    torch.testing.assert_close(group_mean(rewards_PG), torch.tensor([[-0.5, 0.5], [-10.0, 10.0]]))
    torch.testing.assert_close(group_std(rewards_PG), torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]), rtol=1e-5, atol=0)


def test_equal_rewards_give_exactly_zero():
    assert group_std(torch.full((2, 4), 4.1)).abs().max() == 0


@pytest.mark.parametrize(
    ("num_correct", "positive", "negative"),
    [(1, 5.7622, -0.4592), (2, 2.6879, -0.6444), (6, 0.3720, -1.5518), (7, 0.1735, -2.1779), (0, 0, 0), (8, 0, 0)],
)
def test_asymmetric_oracle(num_correct, positive, negative):
    correct_PG = torch.tensor([[1.0] * num_correct + [0.0] * (8 - num_correct)], dtype=torch.float64)
    got = asymmetric(correct_PG, beta_pos=0.9, beta_neg=0.4)[0]
    assert got[0].item() == pytest.approx(positive, abs=5e-5)
    assert got[-1].item() == pytest.approx(negative, abs=5e-5)


@pytest.mark.parametrize("num_correct", [0, 1, 3, 4])
def test_asymmetric_without_powers_is_the_sign(num_correct):
    """Where all are correct, or none is, too: 0^0 = 1."""
    correct_PG = torch.tensor([[1.0] * num_correct + [0.0] * (4 - num_correct)])
    got = asymmetric(correct_PG, beta_pos=0.0, beta_neg=0.0)
    assert got.tolist() == [[1.0] * num_correct + [-1.0] * (4 - num_correct)]


def test_asymmetric_half_is_group_std_on_a_binary_reward():
    correct_PG = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(
        asymmetric(correct_PG, beta_pos=0.5, beta_neg=0.5), group_std(correct_PG), rtol=1e-5, atol=1e-12
    )


def test_decoupled_rewards_by_hand():
    """GDPO's own example: two rewards of two rollouts. With the sum, both groups would have advantages -1 and 1."""
    one, both = [[0.0, 1.0], [1.0, 1.0]], [[0.0, 1.0], [0.0, 2.0]]
    equal = torch.ones(2, dtype=torch.float64)
    sums = [decoupled(torch.tensor(rewards, dtype=torch.float64), equal) for rewards in (one, both)]
    torch.testing.assert_close(torch.cat(sums).tolist(), [-1.0, 1.0, -2.0, 2.0], rtol=1e-5, atol=0)
    # Eq. 6: mean 0, population variance (1 + 1 + 4 + 4) / 4
    expected = [-1 / math.sqrt(2.5), 1 / math.sqrt(2.5), -2 / math.sqrt(2.5), 2 / math.sqrt(2.5)]
    torch.testing.assert_close(standardised(torch.cat(sums)).tolist(), expected, rtol=1e-5, atol=0)


def test_decoupled_rewards_are_weighted_after_they_are_normalised():
    rewards_KG = torch.tensor([[0.0, 1.0, 1.0, 2.0], [300.0, 0.0, 100.0, 200.0]], dtype=torch.float64)
    weights_K = torch.tensor([1.0, -0.25], dtype=torch.float64)
    got = decoupled(rewards_KG, weights_K)
    torch.testing.assert_close(got, group_std(rewards_KG)[0] - 0.25 * group_std(rewards_KG)[1], rtol=1e-14, atol=0)
    scaled = decoupled(rewards_KG * torch.tensor([[1e3], [7.0]], dtype=torch.float64), weights_K)
    torch.testing.assert_close(scaled, got, rtol=1e-5, atol=0)
    torch.testing.assert_close(decoupled(rewards_KG, weights_K, group_mean), weights_K @ group_mean(rewards_KG))
