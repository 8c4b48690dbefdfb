"""The contract of every backend of ours, against the float64 oracle on whole logits.

The Triton kernels run under Triton's interpreter where there is no GPU (tests/conftest.py).
"""

import math

import pytest
import torch
from head_oracle import DEVICE, case, check, check_coherent, check_rows, chunk_of, oracle, run

from learner.head import head_stats, triton_backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.05])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 11), (128, 512), (131, 1027)])
def test_values_and_gradients(backend, rows, vocab, temperature, dtype):
    check(backend, *case(rows, 24, vocab, scale=2.0, dtype=dtype), temperature=temperature)


def test_no_rows(backend):
    hidden, weight, target = case(0, 8, 50)
    got = run(hidden, weight, target, backend=backend, topk=3, entropy_at_one=True, temperature=0.5)
    assert got.logprob.shape == got.entropy.shape == (0,)
    assert got.u.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_softcap_and_bias(backend, bias, dtype):
    hidden, weight, target = case(40, 24, 700, scale=4.0, dtype=dtype)
    bias_V = torch.randn(700, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype) if bias else None
    check(backend, hidden, weight, target, softcap=5.0, bias_V=bias_V, temperature=0.7)
    check(backend, hidden, weight, target, bias_V=bias_V)


def test_strided_inputs_and_upstream_gradients(backend):
    hidden, weight, target = case(12, 16, 600)
    strided = hidden.repeat_interleave(2, dim=1)[:, ::2].detach().requires_grad_()
    stats = head_stats(strided, weight, target.repeat_interleave(3)[::3], backend=backend)
    g = torch.arange(24.0, device=DEVICE)[::2]
    (got,) = torch.autograd.grad((stats.logprob_N, stats.entropy_N), strided, (g, -2 * g))
    expected = oracle(hidden, weight, target)
    check_rows(got, g.double()[:, None] * (expected.u - 2 * expected.v), 1e-4)


@pytest.mark.parametrize("k", [1, 10, 400])
def test_topk(backend, k):
    hidden, weight, target = case(20, 16, 300)
    stats = head_stats(hidden, weight, target, topk=k, temperature=0.6, backend=backend)
    z = hidden.double() @ weight.double().T / 0.6
    p = z.softmax(1).sort(descending=True).values[:, :k]
    mass, partial = p.sum(1), -(p * p.log()).sum(1)
    torch.testing.assert_close(stats.topk_mass_N.double(), mass, rtol=1e-5, atol=0)
    torch.testing.assert_close(stats.topk_entropy_N.double(), partial / mass + mass.log(), rtol=0, atol=1e-5)
    torch.testing.assert_close(stats.topk_partial_entropy_N.double(), partial, rtol=0, atol=1e-5)


def test_topk_with_ties_and_impossible_tokens(backend):
    bias_V = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf, -math.inf], device=DEVICE)
    ones, weight = torch.ones(1, 1, device=DEVICE), torch.ones(6, 1, device=DEVICE)
    for k, entropy, mass in ((2, math.log(2), 0.5), (5, math.log(4), 1.0)):
        stats = head_stats(ones, weight, torch.tensor([0], device=DEVICE), topk=k, bias_V=bias_V, backend=backend)
        assert stats.topk_entropy_N.item() == pytest.approx(entropy, abs=1e-6)
        assert stats.topk_mass_N.item() == pytest.approx(mass, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_at_one_beside_another_temperature(backend, temperature):
    hidden, weight, target = case(70, 16, 600, scale=3.0)
    stats = head_stats(hidden.requires_grad_(), weight, target, temperature=temperature, entropy_at_one=True,
                       backend=backend)  # fmt: skip
    torch.testing.assert_close(
        stats.entropy_at_one_N.double(), oracle(hidden, weight, target).entropy, rtol=0, atol=1e-5
    )
    assert not stats.entropy_at_one_N.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_with_and_without_gradient_agree_bitwise(backend, dtype):
    hidden, weight, target = case(150, 16, 1100, dtype=dtype)
    with torch.no_grad():
        plain = head_stats(hidden, weight, target, temperature=0.7, backend=backend)
    for entropy_gradient in (False, True):
        stats = head_stats(hidden.detach().requires_grad_(), weight, target, temperature=0.7, backend=backend,
                           entropy_gradient=entropy_gradient)  # fmt: skip
        assert torch.equal(plain.logprob_N, stats.logprob_N)
        assert torch.equal(plain.entropy_N, stats.entropy_N)
        assert stats.logprob_N.requires_grad
        assert stats.entropy_N.requires_grad == entropy_gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_before_they_are_rounded(backend, dtype, monkeypatch):
    """The gradients that matmuls make from 16-bit inputs, before they are rounded to the hidden states' dtype.

    Triton's interpreter truncates to bfloat16 where a GPU rounds (tests/helpers/compile_kernels.py). The interpreted
    kernels therefore make float32 weights, which this test rounds.
    """
    hidden, weight, target = case(300, 64, 1027, scale=2.0, dtype=dtype)
    expected = oracle(hidden, weight, target, temperature=0.6)
    if (backend, dtype, DEVICE) == ("triton", torch.bfloat16, "cpu"):
        hidden, weight = hidden.float(), weight.float()
        monkeypatch.setattr(triton_backend, "_matmul", lambda a, b: a.bfloat16().float() @ b)
    got = chunk_of(backend, hidden, weight, target, temperature=0.6)
    check_coherent(got.u_cH, expected.u)
    check_coherent(got.v_cH, expected.v)


def test_identities(backend):
    """H = -logp + <h, d logp / d h>; permuting the vocabulary changes nothing, nor does adding a vector to all rows of
    the weight."""
    hidden, weight, target = case(30, 16, 600)
    got = run(hidden, weight, target, temperature=0.7, backend=backend)
    torch.testing.assert_close(got.entropy, -got.logprob + (hidden * got.u).sum(1), rtol=0, atol=2e-5)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    shuffled = run(hidden, weight[order], order.argsort()[target], temperature=0.7, backend=backend)
    shifted = run(hidden, weight + weight[5], target, temperature=0.7, backend=backend)
    for other in (shuffled, shifted):
        for a, b in zip(got, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": math.nan}, "temperature=nan must be positive"),
        ({"topk": 0}, "topk=0 keeps no token"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
        ({"weight_VH": torch.ones(9, 4, dtype=torch.float16)}, "weight_VH torch.float16; cast the hidden states"),
    ],
)
def test_numbers_out_of_range_raise(backend, bad, words):
    with pytest.raises(ValueError, match=words):
        head_stats(
            **dict(zip(("hidden_NH", "weight_VH", "target_N"), case(2, 4, 9), strict=True)) | bad, backend=backend
        )


def test_a_trainable_head_raises(backend):
    hidden, weight, target = case(2, 4, 9)
    for weight_grad, bias_grad in ((True, False), (False, True)):
        bias_V = torch.zeros(9, device=DEVICE, requires_grad=bias_grad)
        with pytest.raises(ValueError, match="frozen"):
            head_stats(hidden, weight.detach().requires_grad_(weight_grad), target, bias_V=bias_V, backend=backend)


def test_memory_does_not_grow_with_rows_times_vocabulary(backend):
    """No tensor is larger than a chunk of logits, for any number of tokens; nor is the whole weight upcast."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():  # the interpreter copies bytes
                    largest = max(largest, tensor.numel())
            return out

    hidden, weight, target = case(300, 50, 1000, dtype=torch.bfloat16)
    with Watch():
        head_stats(
            hidden.requires_grad_(), weight, target, topk=10, entropy_at_one=True, temperature=0.5, backend=backend
        )
    assert largest <= {"torch": 64 * (256 + 10), "triton": 128 * 1000}[backend]
