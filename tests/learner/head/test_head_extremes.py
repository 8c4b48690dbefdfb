"""Inputs that break a naive head: near-certain, impossible, huge, flat and strongly negative logits, and NaN."""

import math

import pytest
import torch
from head_oracle import DEVICE, GRADIENT_TOLERANCE, case, check, check_rows, check_values, chunk_of, oracle, run

from learner.head import head_stats

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("shift", [0.0, -200.0])
def test_all_logits_strongly_negative(backend, shift):
    """The vocabulary does not fill its last block and most logits are -15: zero padding would win the maximum."""
    logits = torch.full((1029, 1), -15.0 + shift, device=DEVICE)
    logits[7] = 3.0 + shift
    for target in (7, 8, 1028):
        check(backend, torch.ones(1, 1, device=DEVICE), logits, torch.tensor([target], device=DEVICE))


def test_near_certain_target_keeps_its_gradient(backend):
    """p_y = 1 - 1e-9: log-probability and gradient come from the sum over the other tokens."""
    weight = torch.tensor([[0.0, 1.0], [math.log(1e-9), 2.0]], device=DEVICE)
    got = run(torch.tensor([[1.0, 0.0]], device=DEVICE), weight, torch.tensor([0], device=DEVICE), backend=backend)
    assert got.logprob.item() == pytest.approx(-1e-9, rel=1e-4)
    torch.testing.assert_close(got.u, 1e-9 * (weight[0] - weight[1])[None], rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("one_minus_p", [1e-6, 1e-9])
def test_near_certain_targets_in_16_bits(backend, one_minus_p, dtype):
    """The error is relative to the tiny gradient itself, which must not drown in the rounding of the weights."""
    hidden, weight, target = case(20, 16, 1027, dtype=dtype)
    others = hidden.double() @ weight.double().T
    others[torch.arange(20), target] = -math.inf
    bias_V = torch.zeros(1027, device=DEVICE, dtype=dtype)
    target[:] = 5
    others[:, 5] = -math.inf
    gap = others.logsumexp(1) - math.log(one_minus_p) - hidden.double() @ weight[5].double()
    bias_V[5] = gap.mean().to(dtype)
    expected = oracle(hidden, weight, target, bias_V=bias_V)
    got = chunk_of(backend, hidden, weight, target, bias_V=bias_V)
    check_values(got.logprob_c, got.entropy_c, expected)
    check_rows(got.u_cH, expected.u, 1e-2)


@pytest.mark.parametrize("above", [90.0, 120.0, 3000.0])
@pytest.mark.parametrize("vocab", [1, 513, 600])
def test_target_far_above_the_rest(backend, vocab, above):
    """The others' sum is 0 in float32 (of 513 tokens the last block holds only the target), which must give no NaN."""
    weight = torch.zeros(vocab, 2, device=DEVICE)
    weight[:, 1] = torch.linspace(0, 1, vocab, device=DEVICE)
    weight[-1, 0] = above
    target = torch.tensor([vocab - 1], device=DEVICE)
    got = run(torch.tensor([[1.0, 0.0]], device=DEVICE), weight, target, backend=backend)
    for value in got:
        assert value.abs().max() <= 1e-6


def test_target_far_below_the_maximum(backend):
    """80 nats below, where its probability is 0 in float16, and 3,000 below, where it is 0 in float64."""
    for depth in (80.0, 3000.0):
        weight = torch.tensor([[depth], [0.0], [1.0]], device=DEVICE)
        got, _ = check(backend, torch.ones(1, 1, device=DEVICE), weight, torch.tensor([1], device=DEVICE))
        assert got.logprob.item() == pytest.approx(-depth, rel=1e-6)


def test_equal_logits(backend):
    hidden, target = torch.ones(3, 2, device=DEVICE), torch.tensor([0, 500, 999], device=DEVICE)
    got = run(hidden, torch.full((1000, 2), 5.0, device=DEVICE), target, backend=backend)
    flat = torch.full_like(got.entropy, math.log(1000))
    torch.testing.assert_close(got.entropy, flat, rtol=1e-6, atol=0)
    torch.testing.assert_close(got.logprob, -flat, rtol=1e-6, atol=0)
    assert max(got.u.abs().max(), got.v.abs().max()) < 1e-4  # only the rounding of weights of 5 remains


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_impossible_tokens(backend, dtype):
    """A token with bias -inf contributes nothing, also in a block of such tokens, and also as the target."""
    hidden, weight, target = case(9, 8, 1100, dtype=dtype)
    bias_V = torch.zeros(1100, device=DEVICE, dtype=dtype)
    bias_V[:600] = -math.inf  # whole blocks, the first ones
    bias_V[800:810] = -math.inf
    target[:] = 700
    check(backend, hidden, weight, target, bias_V=bias_V)
    impossible = run(hidden, weight, torch.full_like(target, 3), bias_V=bias_V, backend=backend)
    expected = oracle(hidden, weight, target, bias_V=bias_V)
    assert torch.equal(impossible.logprob, torch.full((9,), -math.inf, device=DEVICE))
    torch.testing.assert_close(impossible.entropy.double(), expected.entropy, rtol=0, atol=1e-5)
    assert impossible.u.isfinite().all()
    check_rows(impossible.v, expected.v, GRADIENT_TOLERANCE[dtype])


def test_huge_logits(backend):
    weight = torch.tensor([[1e4], [9.9e3], [-1e4], [1e4]], device=DEVICE)
    for target in range(4):
        check(backend, torch.ones(1, 1, device=DEVICE), weight, torch.tensor([target], device=DEVICE))


def test_nan_is_not_hidden(backend):
    hidden, weight, target = case(3, 8, 600)
    hidden[1, 0] = math.nan
    stats = head_stats(hidden, weight, target, backend=backend)
    assert stats.logprob_N.isnan().tolist() == stats.entropy_N.isnan().tolist() == [False, True, False]
    for outside in (-1, 600):
        got = run(hidden[:1], weight, torch.tensor([outside], device=DEVICE), backend=backend)
        assert got.logprob.isnan().all()
        assert got.u.isnan().all()


def test_a_flat_float16_row_over_a_large_vocabulary(backend):
    """All weights are 1/60,001: without SCALE each would be a float16 subnormal that is 0.14 % off."""
    hidden, weight, target = case(1, 8, 60_001, dtype=torch.float16)
    hidden, weight = torch.zeros_like(hidden), weight - 1  # the mean of w is far from 0
    check_rows(chunk_of(backend, hidden, weight, target).u_cH, oracle(hidden, weight, target).u, 2e-3)
