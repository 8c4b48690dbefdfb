"""The formulas that methods are composed of against hand numbers, and identities between methods."""

import math

import numpy as np
import pytest
import tiny
import torch

from common.methods import METHODS
from learner import erpo, token_weights
from learner.advantage import group_mean, leave_one_out
from learner.learner import Learner
from learner.loss import clipped_surrogate, pessimistic_clip, stop_gradient_surrogate
from learner.selection import drop_reason, overlong


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("tiny"))


def test_pessimistic_clip_gives_the_ratio_of_the_clipped_surrogate():
    log_ratio, advantages = (
        torch.tensor([-1.0, -0.1, 0.1, 1.0]).repeat(3),
        torch.tensor([2.0, -2.0, 0.0]).repeat_interleave(4),
    )
    clip = {"clip_low": 0.2, "clip_high": 0.28}
    taken = pessimistic_clip(log_ratio, advantages, **clip).exp() * advantages
    torch.testing.assert_close(taken, clipped_surrogate(log_ratio, torch.zeros(12), advantages, **clip))
    assert pessimistic_clip(torch.tensor(-9.0), torch.tensor(-1.0), clip_low=1.0, clip_high=0.2) == -9


def test_stop_gradient_surrogate_keeps_the_gradient_of_clipped_tokens():
    logprobs = torch.tensor([-1.0, -3.0, -0.1], requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    value = stop_gradient_surrogate(logprobs, torch.full((3,), -2.0), advantages, clip_low=1.0, clip_high=0.28)
    value.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([1.28 * 1.0, math.exp(-1) * -2.0, 1.28 * 0.5]))


def test_gate_oracle():
    """Sharpness 5 at z = -1, -.2, 0, .2, 1; the entropies standardise to a multiple of these z."""
    z = torch.tensor([-1.0, -0.2, 0.0, 0.2, 1.0], dtype=torch.float64)
    std = z.square().mean().sqrt()
    got = erpo.gate(
        3 + z[None], torch.ones(1, 5, dtype=torch.bool), torch.zeros(1, dtype=torch.int64), sharpness=5 * std.item()
    )
    expected = torch.tensor([[0.0067, 0.2689, 0.5, 0.7311, 0.9933]], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def test_progress_is_standardised_within_buckets_of_a_group():
    logprobs_BT = torch.tensor([[1.0, 2.0, 9.0, 9.0], [3.0, 5.0, 0.0, 0.0]], dtype=torch.float64)
    mask_BT = torch.tensor([[True, True, True, True], [True, True, False, False]])
    got = erpo.progress(
        logprobs_BT, torch.zeros_like(logprobs_BT), mask_BT, torch.zeros(2, dtype=torch.int64), scale=0.1, buckets=2
    )
    first = (torch.tensor([0.1, 0.2, 0.3]) - 0.2) / math.sqrt(2 / 300)  # 1 and 2 of the first rollout, 3 of the second
    second = (torch.tensor([0.9, 0.9, 0.5]) - 2.3 / 3) / math.sqrt(sum((v - 2.3 / 3) ** 2 for v in (0.9, 0.9, 0.5)) / 3)
    expected = torch.tensor([[first[0], first[1], second[0], second[1]], [first[2], second[2], 0, 0]]).double()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    apart = erpo.progress(
        logprobs_BT, torch.zeros_like(logprobs_BT), mask_BT, torch.tensor([0, 1]), scale=0.1, buckets=2
    )
    assert apart[1].abs().max() == 0, "the std of a bucket of one token is 0"


@pytest.mark.parametrize(
    ("power", "weights", "gini", "effective"),
    [(1.0, [1, 2, 3], 0.2222, 0.8571), (2.0, [1, 4, 9], 0.3810, 0.6667)],
)
def test_residual_oracle(power, weights, gini, effective):
    norm_BT = torch.tensor([[1.0, 2.0, 3.0, 7.0], [2.0, 2.0, 2.0, 2.0]])
    mask_BT = torch.tensor([[True, True, True, False], [True, True, True, True]])
    got = token_weights.residual(norm_BT, mask_BT, power=power)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    torch.testing.assert_close(got[0, :3], 3 * shares)
    torch.testing.assert_close(got[1], torch.ones(4, dtype=torch.float64))
    assert got[0, 3] == 0
    assert token_weights.gini(got, mask_BT).tolist() == pytest.approx([gini, 0.0], abs=5e-5)
    assert 1 / (3 * shares.square().sum().item()) == pytest.approx(effective, abs=5e-5)


def test_residual_weights_of_a_zero_adapter_are_uniform():
    mask_BT = torch.tensor([[True, True, False]])
    torch.testing.assert_close(
        token_weights.residual(torch.zeros(1, 3), mask_BT, power=2.0), mask_BT.double(), rtol=0, atol=0
    )


def test_residual_weights_of_tiny_norms_are_uniform_in_their_rollout_alone():
    norm_BT = torch.tensor([[1e-5, 2e-5, 3e-5], [1.0, 2.0, 3.0]])
    got = token_weights.residual(norm_BT, torch.ones(2, 3, dtype=torch.bool), power=2.0)
    assert got[0].tolist() == [1, 1, 1]
    assert got[1].tolist() == pytest.approx([3 / 14, 12 / 14, 27 / 14])


def test_leave_one_out_by_hand():
    got = leave_one_out(torch.tensor([[1.0, 2.0, 6.0]]))
    torch.testing.assert_close(got, torch.tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5]]))
    assert leave_one_out(torch.tensor([[5.0]])).item() == 0
    assert group_mean(torch.tensor([[5.0]])).item() == 0


def update_and_parameters(folder, *, adapter=True, **method):
    made = Learner(folder, tiny.config(method=method), np.arange(12))
    if adapter:
        tiny.move_adapter(made)
    result = made.update(tiny.groups())
    parameters = torch.cat([p.detach().flatten() for p in made.policy.parameters()])
    return result, parameters


@pytest.mark.parametrize(
    ("one", "other", "adapter"),
    [
        ({"name": "sa-ah-grpo", "alpha": 0.0}, {"name": "ah-grpo", "alpha": 0.0}, True),
        (
            {"name": "sa-ah-grpo", "alpha": 0.0, "normaliser": "step"},
            {"name": "grpo", "normaliser": "token-mean"},
            True,
        ),
        ({"name": "erpo", "erpo_weight": 0.0}, {"name": "grpo"}, True),
        ({"name": "erpo"}, {"name": "grpo"}, False),  # an untrained adapter: policy and reference agree
        ({"name": "arca"}, {"name": "grpo", "std_ddof": 1, "kl": "none"}, False),
        ({"name": "gspo"}, {"name": "grpo", "kl": "none"}, True),  # ratio 1
        (
            {"name": "holder", "power_start": 0.0, "std_ddof": 0},
            {"name": "gspo", "clip_low": 0.2, "clip_high": 0.2},
            True,
        ),
        ({"name": "holder", "power_start": 2.0}, {"name": "holder", "power_start": -2.0}, True),  # at ratio 1
        (
            {"name": "entropy-mask", "top_entropy_fraction": 1.0},
            {"name": "grpo", "normaliser": "token-mean", "clip_high": 0.28, "kl": "none", "group_filter": "accuracy"},
            True,
        ),
        (
            {"name": "cispo", "clip_low": 1.0},
            {"name": "grpo", "normaliser": "token-mean", "kl": "none", "group_filter": "accuracy"},
            True,
        ),  # ratio 1
    ],
)
def test_identities(folder, one, other, adapter):
    """Two methods that must make the same step."""
    (first, a), (second, b) = (update_and_parameters(folder, adapter=adapter, **method) for method in (one, other))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)
    for s, t in zip(first.tokens, second.tokens, strict=True):
        assert (s is None) == (t is None)


@pytest.mark.parametrize("method", [{"name": "grpo"}, {"name": "arca"}, {"name": "erpo", "erpo_weight": 5.0}])
def test_the_identities_can_fail(folder, method):
    """The methods that agree with an untrained adapter differ once it has moved."""
    grpo = update_and_parameters(folder, name="grpo")[1]
    same = torch.equal(update_and_parameters(folder, **method)[1], grpo)
    assert same == (method == {"name": "grpo"})


def test_each_method_shows_its_signal(folder):
    def metrics(**method):
        return update_and_parameters(folder, **method)[0].metrics

    grpo = metrics(name="grpo")
    assert grpo["advantage/spread_within_rollouts"] == pytest.approx(0, abs=1e-6)
    assert grpo["weight/gini"] == pytest.approx(0, abs=1e-6)
    asymmetric = metrics(name="asym-grpo")
    # group 1: rewards 4 and 1.5 are correct, p = 1/2, with 7 + 9 and 3 + 1 tokens; group 2: reward 2, p = 1/4, 8 and 12
    assert asymmetric["advantage/positive_mean"] == pytest.approx((16 * 1 + 8 * 3**0.9) / 24)
    assert asymmetric["advantage/negative_mean"] == pytest.approx(-(4 * 1 + 12 * 3**-0.4) / 16)
    assert metrics(name="erpo")["advantage/spread_within_rollouts"] > 0.01
    assert metrics(name="arca")["weight/gini"] > 0.05
    assert metrics(name="holder")["ratio/power"] == 2
    assert 0.2 <= metrics(name="entropy-mask")["weight/mean"] < 0.3  # first tokens of a group tie
    assert metrics(name="entropy-mask")["groups/dropped"] == 1


def test_why_a_group_is_dropped():
    def reason(rewards, **fields):
        group, method = tiny.group(0, [2] * len(rewards), rewards), METHODS["grpo"].model_copy(update=fields)
        return drop_reason(group, method, {})

    accuracy = {"group_filter": "accuracy"}  # a reward above 1 is correct
    assert reason([None, None]) == reason([None, None], **accuracy) == "unscored"
    assert reason([4.0, 4.0]) is None
    assert reason([4.0, 2.0], **accuracy) == "all-correct"
    assert reason([0.0, 0.5, None], **accuracy) == "all-incorrect"
    assert reason([4.0, 0.5], **accuracy) is None
    assert reason([0.5, 0.5], group_filter="zero-variance") == "zero-variance"
    assert reason([4.0, 2.0], group_filter="zero-variance") is None
    assert reason([1.0, 1.2], reward_threshold=0.2) == "low-variance"
    assert reason([1.0, 1.2], reward_threshold=0.05) is None


def test_overlong_by_hand():
    method = METHODS["dapo"].model_copy(update={"overlong_buffer": 20, "overlong_penalty": 0.5})
    for tokens, expected in ((1, 0.0), (80, 0.0), (90, 0.25), (100, 0.5), (130, 0.5)):
        assert overlong(tokens, method, max_tokens=100) == pytest.approx(expected)
    assert overlong(100, METHODS["dapo"], max_tokens=100) == 0


@pytest.mark.parametrize("name", ["arca", "erpo"])
def test_methods_that_compare_with_the_reference_use_no_dropout(folder, name):
    def update(dropout):
        made = Learner(folder, tiny.config(method={"name": name}, dropout=dropout), np.arange(12))
        with torch.no_grad():
            for key, parameter in made.policy.peft_model.named_parameters():
                if "lora_B" in key:
                    parameter.fill_(0.02)
        return made.update(tiny.groups()).metrics

    with_dropout, without = update(0.5), update(0.0)
    for key in without.keys() - {"memory/peak_bytes"}:
        assert with_dropout[key] == without[key], key


def test_alpha_runs_from_start_to_end(folder):
    method = {"name": "sa-ah-grpo", "alpha": 2.0, "alpha_end": -1.0}
    made = Learner(folder, tiny.config(method=method, steps=4), np.arange(12))
    for alpha in (2.0, 1.0, 0.0, -1.0):
        result = made.update(tiny.groups())
        assert result.metrics["weight/alpha"] == alpha
        targets = result.tokens[1]  # of negative advantage
        expected = np.exp(-alpha * np.cumsum(targets.entropies) / math.log(tiny.V))
        np.testing.assert_allclose(targets.weights, expected, rtol=1e-5)


def test_alpha_stays_without_an_end(folder):
    made = Learner(folder, tiny.config(method={"name": "ah-grpo"}, steps=2), np.arange(12))
    assert [made.update(tiny.groups()).metrics["weight/alpha"] for _ in range(2)] == [0.5, 0.5]
