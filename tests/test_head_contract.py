"""What every backend of ours promises, against float64 on the same values: whole logits, no chunks, no tricks.

The Triton kernels run under Triton's interpreter where there is no GPU (tests/conftest.py).
"""

import math

import pytest
import torch
from head_oracle import DEVICE, case, check_coherent, check_rows, check_values, oracle, run

from learner import head, head_torch, head_triton
from learner.head import head_stats
from learner.head_types import Projection, Wanted

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 1e-2}


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """A backend, its blocks made so small that a few hundred rows and a thousand tokens need several."""
    monkeypatch.setattr(head_torch, "ROWS", 64)
    monkeypatch.setattr(head_torch, "TILE", 256)
    monkeypatch.setattr(head_triton, "WORKSPACE_BYTES", 1)  # 128 rows
    monkeypatch.setattr(head_triton, "BLOCK", 512)
    return request.param


def check(backend, hidden, weight, target, **options):
    expected = oracle(hidden, weight, target, **options)
    got = run(hidden, weight, target, backend=backend, **options)
    check_values(got.logprob, got.entropy, expected)
    tolerance = GRADIENT_TOLERANCE[hidden.dtype] * max(1.0, expected.largest / 32)
    floor = 1e-2 * weight.double().norm(dim=1).max().item()  # what cancels in w_y - mean w leaves rounding of this size
    check_rows(got.u, expected.u, tolerance, floor=floor)
    check_rows(got.v, expected.v, tolerance, floor=floor)
    return got, expected


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


@pytest.mark.parametrize("topk", [None, 5])
def test_a_temperature_for_each_row(backend, topk):
    hidden, weight, target = case(70, 16, 600)
    temperature = torch.linspace(0.05, 2.0, 70, device=DEVICE)
    check(backend, hidden, weight, target, temperature=temperature)
    each = [head_stats(hidden[i : i + 1], weight, target[i : i + 1], temperature=temperature[i].item(), topk=topk,
                       entropy_at_one=True, backend=backend) for i in (0, 69)]  # fmt: skip
    whole = head_stats(hidden, weight, target, temperature=temperature, topk=topk, entropy_at_one=True, backend=backend)
    for i, alone in zip((0, 69), each, strict=True):
        for name in (
            "logprob_N",
            "entropy_N",
            "entropy_at_one_N",
            *(("topk_entropy_N", "topk_mass_N") if topk else ()),
        ):
            torch.testing.assert_close(getattr(whole, name)[i], getattr(alone, name)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_softcap_and_bias(backend, bias, dtype):
    hidden, weight, target = case(40, 24, 700, scale=4.0, dtype=dtype)
    bias_V = torch.randn(700, generator=torch.Generator().manual_seed(3)).to(DEVICE, dtype) if bias else None
    check(backend, hidden, weight, target, softcap=5.0, bias_V=bias_V, temperature=0.7)
    check(backend, hidden, weight, target, bias_V=bias_V)


@pytest.mark.parametrize("shift", [0.0, -200.0])
def test_all_logits_strongly_negative(backend, shift):
    """A vocabulary that fills no block, logits -15 but one +3: zero padding would take the maximum."""
    logits = torch.full((1029, 1), -15.0 + shift, device=DEVICE)
    logits[7] = 3.0 + shift
    for target in (7, 8, 1028):
        check(backend, torch.ones(1, 1, device=DEVICE), logits, torch.tensor([target], device=DEVICE))


def test_near_certain_target_keeps_its_gradient(backend):
    """p_y = 1 - 1e-9: log-probability and gradient live in the sum of the others."""
    weight = torch.tensor([[0.0, 1.0], [math.log(1e-9), 2.0]], device=DEVICE)
    got = run(torch.tensor([[1.0, 0.0]], device=DEVICE), weight, torch.tensor([0], device=DEVICE), backend=backend)
    assert got.logprob.item() == pytest.approx(-1e-9, rel=1e-4)
    torch.testing.assert_close(got.u, 1e-9 * (weight[0] - weight[1])[None], rtol=1e-4, atol=0)


def test_target_far_below_the_maximum(backend):
    """80 below, where its probability is 0 in float16, and 3,000 below, where it is 0 in float64."""
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
    assert max(got.u.abs().max(), got.v.abs().max()) < 1e-4  # of weights of 5: all cancels but rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_impossible_tokens(backend, dtype):
    """A bias of -inf: no probability, no entropy, no gradient; neither as a whole block nor as the target."""
    hidden, weight, target = case(9, 8, 1100, dtype=dtype)
    bias_V = torch.zeros(1100, device=DEVICE, dtype=dtype)
    bias_V[:600] = -math.inf  # whole blocks, the first ones
    bias_V[800:810] = -math.inf
    target[:] = 700
    check(backend, hidden, weight, target, bias_V=bias_V)
    assert torch.equal(
        head_stats(hidden, weight, torch.full_like(target, 3), bias_V=bias_V, backend=backend).logprob_N,
        torch.full((9,), -math.inf, device=DEVICE),
    )


def test_huge_logits(backend):
    weight = torch.tensor([[1e4], [9.9e3], [-1e4], [1e4]], device=DEVICE)
    for target in range(4):
        check(backend, torch.ones(1, 1, device=DEVICE), weight, torch.tensor([target], device=DEVICE))


def test_not_a_number_is_not_hidden(backend):
    hidden, weight, target = case(3, 8, 600)
    hidden[1, 0] = math.nan
    stats = head_stats(hidden, weight, target, backend=backend)
    assert stats.logprob_N.isnan().tolist() == stats.entropy_N.isnan().tolist() == [False, True, False]
    outside = head_stats(hidden[:1], weight, torch.tensor([600], device=DEVICE), backend=backend)
    assert outside.logprob_N.isnan().all()


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
def test_16_bit_gradients_before_they_are_rounded(backend, dtype):
    """What the products make of 16-bit inputs, without the last rounding to the hidden states' dtype."""
    if (backend, dtype, DEVICE) == ("triton", torch.bfloat16, "cpu"):
        pytest.skip("Triton's interpreter truncates to bfloat16, a GPU rounds")
    hidden, weight, target = case(300, 64, 1027, scale=2.0, dtype=dtype)
    wanted = Wanted(u=True, v=True, entropy_at_one=False, topk=None)
    projection = Projection(weight_VH=weight, bias_V=None, softcap=None)
    temperature = torch.full((300,), 0.6, device=DEVICE)
    chunk = head._module(backend).chunk(hidden, target, temperature, projection, wanted)
    expected = oracle(hidden, weight, target, temperature=0.6)
    check_coherent(chunk.u_cH, expected.u)
    check_coherent(chunk.v_cH, expected.v)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": math.nan}, "temperature=nan must be positive"),
        ({"topk": 0}, "topk=0 keeps no token"),
        ({"softcap": 0.0}, "softcap=0.0 must be positive"),
    ],
)
def test_numbers_out_of_range_raise(backend, bad, words):
    with pytest.raises(ValueError, match=words):
        head_stats(*case(2, 4, 9), backend=backend, **bad)


def test_a_trainable_head_raises(backend):
    hidden, weight, target = case(2, 4, 9)
    for weight_grad, bias_grad in ((True, False), (False, True)):
        bias_V = torch.zeros(9, device=DEVICE, requires_grad=bias_grad)
        with pytest.raises(ValueError, match="frozen"):
            head_stats(hidden, weight.detach().requires_grad_(weight_grad), target, bias_V=bias_V, backend=backend)


def test_memory_does_not_grow_with_rows_times_vocabulary(backend):
    """No tensor larger than a chunk of logits is made, whatever the number of rows."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():  # the interpreter copies bytes
                    largest = max(largest, tensor.numel())
            return out

    hidden, weight, target = case(300, 4, 1000)
    with Watch():
        head_stats(
            hidden.requires_grad_(), weight, target, topk=10, entropy_at_one=True, temperature=0.5, backend=backend
        )
    assert largest <= {"torch": 64 * (256 + 10), "triton": 128 * 1000}[backend]
