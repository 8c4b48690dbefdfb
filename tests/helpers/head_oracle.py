"""The head in float64 on whole logits, random inputs for it, and the tolerances of a head that sums in float32."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from learner import head
from learner.head import head_stats
from learner.head.interface import Projection, Wanted

GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Expected(NamedTuple):
    logprob: Tensor
    entropy: Tensor
    u: Tensor  # d logprob / d hidden
    v: Tensor  # d entropy / d hidden
    largest: float  # |logit| / temperature


class Got(NamedTuple):
    logprob: Tensor
    entropy: Tensor
    u: Tensor
    v: Tensor


def case(rows, hidden_size, vocab, *, seed=0, scale=1.0, dtype=torch.float32):
    """Random hidden states, weight and targets; the first row's target is the last token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, hidden_size, generator=generator) * scale
    weight = torch.randn(vocab, hidden_size, generator=generator) / hidden_size**0.5
    target = torch.randint(vocab, (rows,), generator=generator)
    target[:1] = vocab - 1
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), target.to(DEVICE)


def oracle(hidden, weight, target, *, temperature=1.0, bias_V=None, softcap=None) -> Expected:
    """The formulas on the whole softmax; 1 - p(target) is computed from the other tokens, which keeps it exact."""
    h, w = hidden.detach().double(), weight.double()
    raw = h @ w.T
    if bias_V is not None:
        raw = raw + bias_V.double()
    slope = torch.ones_like(raw)
    if softcap is not None:
        raw = softcap * torch.tanh(raw / softcap)
        slope = 1 - (raw / softcap) ** 2
    z = raw / temperature
    rows = torch.arange(len(target), device=h.device)
    others = z.clone()
    others[rows, target] = -math.inf
    gap = others.logsumexp(1) - z[rows, target]
    p, logp = z.softmax(1), z.log_softmax(1)
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(1)
    onehot_minus_p = -p
    onehot_minus_p[rows, target] = torch.sigmoid(gap)
    return Expected(
        logprob=-torch.nn.functional.softplus(gap),
        entropy=entropy,
        u=onehot_minus_p * slope @ w / temperature,
        v=-torch.where(p > 0, p * (logp + entropy[:, None]), 0.0) * slope @ w / temperature,
        largest=z[z.isfinite()].abs().max().item() if z.isfinite().any() else 0.0,
    )


def run(hidden, weight, target, **options) -> Got:
    """Values and both gradients of one call; the gradients have the dtype of `hidden`."""
    hidden = hidden.detach().requires_grad_()
    stats = head_stats(hidden, weight, target, **options)
    (u,) = torch.autograd.grad(stats.logprob_N.sum(), hidden, retain_graph=True)
    (v,) = torch.autograd.grad(stats.entropy_N.sum(), hidden)
    return Got(stats.logprob_N.detach(), stats.entropy_N.detach(), u, v)


def check_values(logprob, entropy, expected: Expected) -> None:
    """Assert the tolerances of a head that sums in float32."""
    size = max(1.0, expected.largest / 32)
    error = (logprob.double() - expected.logprob).abs()
    assert error.max() <= 2e-5 * size
    certain = expected.logprob > math.log(0.99)
    assert (error <= 1e-4 * size * expected.logprob.abs() + 1e-30)[certain].all()
    assert (entropy.double() - expected.entropy).abs().max() <= 1e-5 * size


def check_rows(gradient, expected, tolerance: float, *, floor: float = 0.0) -> None:
    """Assert the error of every row relative to its norm, or to `floor` where that is larger."""
    error = (gradient.double() - expected).norm(dim=1)
    assert (error <= tolerance * expected.norm(dim=1).clamp(min=floor)).all()


def check_coherent(gradient, expected) -> None:
    """Assert the tolerances of a gradient made from 16-bit weights and summed in float32, per row and for their sum."""
    check_rows(gradient, expected, 1e-2)
    error = gradient.double() - expected
    assert (error.norm(dim=1) / expected.norm(dim=1)).median() <= 2e-3
    assert error.sum(0).norm() / expected.sum(0).norm() <= 2e-3


def chunk_of(backend, hidden, weight, target, *, temperature=1.0, bias_V=None):
    """A backend's result for all tokens as one chunk, whose gradients are not yet rounded to the dtype of `hidden`."""
    return head._module(backend).chunk(
        hidden,
        target,
        temperature,
        Projection(weight_VH=weight, bias_V=bias_V, softcap=None),
        Wanted(u=True, v=True, entropy_at_one=False, topk=None),
    )


def check(backend, hidden, weight, target, **options):
    expected = oracle(hidden, weight, target, **options)
    got = run(hidden, weight, target, backend=backend, **options)
    check_values(got.logprob, got.entropy, expected)
    tolerance = GRADIENT_TOLERANCE[hidden.dtype] * max(1.0, expected.largest / 32)
    floor = 1e-2 * weight.double().norm(dim=1).max().item()  # the rounding error of w_y - mean w
    check_rows(got.u, expected.u, tolerance, floor=floor)
    check_rows(got.v, expected.v, tolerance, floor=floor)
    return got, expected
