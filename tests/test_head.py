"""The head against float64 on the same values: logits whole, no chunks, no centring tricks."""

import math

import pytest
import torch

from learner import head
from learner.head import head_stats


def oracle(hidden, weight, target, temperature=1.0):
    """float64 log-probability, entropy, and the gradients of both per row, by fused_head.md's formulas."""
    h, w = hidden.double(), weight.double()
    z = h @ w.T / temperature
    rows = torch.arange(len(target))
    others = z.clone()
    others[rows, target] = -math.inf
    gap = others.logsumexp(1) - z[rows, target]
    logprob = -torch.nn.functional.softplus(gap)
    p = z.softmax(1)
    logp = z.log_softmax(1)
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(1)
    onehot_minus_p = -p
    onehot_minus_p[rows, target] = torch.sigmoid(gap)
    u = onehot_minus_p @ w / temperature
    v = -torch.where(p > 0, p * (logp + entropy[:, None]), 0.0) @ w / temperature
    return logprob, entropy, u, v


def case(rows, hidden_size, vocab, *, seed=0, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator) * scale
    weight = torch.randn(vocab, hidden_size, generator=generator)
    target = torch.randint(vocab, (rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), target


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 11), (700, 9000), (256, 8192), (257, 8193)])
def test_values_and_gradients(rows, vocab, temperature, dtype):
    hidden, weight, target = case(rows, 24, vocab, dtype=dtype)
    target[-1] = vocab - 1  # in the last tile
    hidden.requires_grad_()
    stats = head_stats(hidden, weight, target, temperature=temperature)
    logprob, entropy, u, v = oracle(hidden.detach(), weight, target, temperature)
    largest = (hidden.detach().double() @ weight.double().T / temperature).abs().max().item()
    torch.testing.assert_close(stats.logprob_N.double(), logprob, rtol=0, atol=2e-5 * max(1, largest / 32))
    torch.testing.assert_close(stats.entropy_N.double(), entropy, rtol=0, atol=1e-5)
    (grad_logprob,) = torch.autograd.grad(stats.logprob_N.sum(), hidden, retain_graph=True)
    (grad_entropy,) = torch.autograd.grad(stats.entropy_N.sum(), hidden)
    for got, expected in ((grad_logprob, u), (grad_entropy, v)):
        error = (got.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-6)
        assert error.max() < (1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_gradcheck_in_float64():
    hidden, weight, target = case(5, 4, 13, dtype=torch.float64)
    hidden.requires_grad_()

    def both(h):
        stats = head_stats(h, weight, target, temperature=0.7)
        return stats.logprob_N, stats.entropy_N

    assert torch.autograd.gradcheck(both, (hidden,))


def test_upstream_gradients_scale_rows():
    hidden, weight, target = case(6, 8, 50)
    hidden.requires_grad_()
    stats = head_stats(hidden, weight, target)
    g = torch.arange(12.0)[::2]  # strided
    (got,) = torch.autograd.grad(stats.logprob_N, hidden, g)
    _, _, u, _ = oracle(hidden.detach(), weight, target)
    torch.testing.assert_close(got.double(), g.double()[:, None] * u, rtol=1e-4, atol=1e-5)


def test_no_grad_and_grad_calls_agree_bitwise_and_entropy_gradient_is_optional():
    hidden, weight, target = case(300, 16, 9001)
    with torch.no_grad():
        plain = head_stats(hidden, weight, target)
    with_gradient = head_stats(hidden.requires_grad_(), weight, target, entropy_gradient=False)
    assert torch.equal(plain.logprob_N, with_gradient.logprob_N)
    assert torch.equal(plain.entropy_N, with_gradient.entropy_N)
    assert with_gradient.logprob_N.requires_grad
    assert not with_gradient.entropy_N.requires_grad


def test_entropy_identity():
    """H = -logp_y + <h, d logp_y / d h>, at any temperature."""
    hidden, weight, target = case(9, 16, 77, dtype=torch.float64)
    hidden.requires_grad_()
    stats = head_stats(hidden, weight, target, temperature=0.3)
    (u,) = torch.autograd.grad(stats.logprob_N.sum(), hidden)
    identity = -stats.logprob_N + (hidden * u).sum(1)
    torch.testing.assert_close(stats.entropy_N, identity, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shift", [0.0, -200.0])
def test_all_logits_strongly_negative(shift):
    """A vocabulary that is no multiple of the tile, logits -15 but one +3: zero padding would take the maximum."""
    vocab = 8192 + 5
    logits = torch.full((vocab,), -15.0 + shift, dtype=torch.float64)
    logits[7] = 3.0 + shift
    stats = head_stats(torch.ones(1, 1), logits[:, None].float(), torch.tensor([7]))
    exact = logits - logits.logsumexp(0)
    assert stats.logprob_N.item() == pytest.approx(exact[7].item(), rel=1e-4)
    assert stats.entropy_N.item() == pytest.approx(-(exact.exp() * exact).sum().item(), abs=1e-5)


def test_near_certain_target_keeps_its_gradient():
    """p_y = 1 - 1e-9: log-probability and gradient live in the sum of the others."""
    gap = math.log(1e-9)
    weight = torch.tensor([[0.0, 1.0], [gap, 2.0]])
    hidden = torch.tensor([[1.0, 0.0]], requires_grad=True)
    stats = head_stats(hidden, weight, torch.tensor([0]))
    assert stats.logprob_N.item() == pytest.approx(-1e-9, rel=1e-4)
    stats.logprob_N.sum().backward()
    torch.testing.assert_close(hidden.grad, 1e-9 * (weight[0] - weight[1])[None], rtol=1e-4, atol=0)


def test_far_target_uniform_and_impossible_columns():
    weight = torch.tensor([[80.0], [0.0], [-math.inf], [80.0]])
    stats = head_stats(torch.ones(1, 1), weight, torch.tensor([1]))
    assert stats.logprob_N.item() == pytest.approx(-80 - math.log(2), rel=1e-6)
    assert stats.entropy_N.item() == pytest.approx(math.log(2), rel=1e-6)
    flat = head_stats(torch.ones(1, 1), torch.full((1000, 1), 5.0), torch.tensor([3]))
    assert flat.entropy_N.item() == pytest.approx(math.log(1000), rel=1e-6)


def test_entropy_at_one_beside_another_temperature():
    hidden, weight, target = case(20, 16, 300)
    stats = head_stats(hidden, weight, target, temperature=0.5)
    torch.testing.assert_close(stats.entropy_at_one_N.double(), oracle(hidden, weight, target)[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 10, 400])
def test_topk(k):
    hidden, weight, target = case(20, 16, 300)
    stats = head_stats(hidden, weight, target, topk=k)
    p = (hidden.double() @ weight.double().T).softmax(1).sort(descending=True).values[:, :k]
    mass = p.sum(1)
    partial = -(p * p.log()).sum(1)
    torch.testing.assert_close(stats.topk_mass_N.double(), mass, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.topk_entropy_N.double(), partial / mass + mass.log(), rtol=0, atol=1e-5)


def test_trainable_head_raises():
    hidden, weight, target = case(2, 4, 9)
    with pytest.raises(ValueError, match="frozen"):
        head_stats(hidden, weight.requires_grad_(), target)


def test_memory_does_not_grow_with_rows_times_vocabulary(monkeypatch):
    """No tensor larger than a chunk of logits is made, whatever the number of rows."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    hidden, weight, target = case(4 * head.CHUNK_ROWS, 4, 1000)
    with Watch():
        head_stats(hidden.requires_grad_(), weight, target)
    assert largest <= head.CHUNK_ROWS * 1000
