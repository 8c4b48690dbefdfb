"""Identities that hold for any exact head, and naive heads that must fail the tolerances because they round more."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from head_oracle import DEVICE, Got, case, check_coherent, check_rows, check_values, oracle, run
from torch import Tensor

from learner import head
from learner.head import head_stats, torch_backend


def test_gradcheck_in_float64():
    hidden, weight, target = case(5, 4, 13, dtype=torch.float64)
    bias_V = torch.linspace(-1, 1, 13, dtype=torch.float64, device=DEVICE)

    def both(h):
        stats = head_stats(h, weight, target, temperature=0.7, bias_V=bias_V, softcap=2.0, backend="torch")
        return stats.logprob_N, stats.entropy_N

    assert torch.autograd.gradcheck(both, (hidden.requires_grad_(),))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_entropy_identity(temperature):
    """H = -logp_y + <h, d logp_y / d h>, at any temperature."""
    hidden, weight, target = case(9, 16, 77, dtype=torch.float64)
    got = run(hidden, weight, target, temperature=temperature)
    torch.testing.assert_close(got.entropy, -got.logprob + (hidden * got.u).sum(1), rtol=1e-10, atol=1e-10)


def test_a_vector_added_to_every_row_of_the_weight_changes_nothing():
    hidden, weight, target = case(30, 16, 300, dtype=torch.float64)
    one, other = run(hidden, weight, target), run(hidden, weight + weight[5] * 3, target)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_an_order_of_the_vocabulary_changes_nothing():
    hidden, weight, target = case(30, 16, 300, dtype=torch.float64)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    one, other = run(hidden, weight, target), run(hidden, weight[order], order.argsort()[target])
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("rows", "tile"), [(1, 300), (7, 64), (1024, 1)])
def test_the_chunk_size_changes_nothing(rows, tile, monkeypatch):
    hidden, weight, target = case(30, 16, 300, scale=3.0)
    whole = run(hidden, weight, target, temperature=0.5, backend="torch")
    monkeypatch.setattr(torch_backend, "ROWS", rows)
    monkeypatch.setattr(torch_backend, "TILE", tile)
    for a, b in zip(whole, run(hidden, weight, target, temperature=0.5, backend="torch"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_kernels_compile_for_a_gpu_and_fit_its_registers():
    """Down to machine code, since Triton's interpreter, which other tests use, checks no types."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, Path(__file__).parents[2] / "helpers" / "compile_kernels.py"],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stdout.endswith("compiled\n"), ran.stderr


def test_auto_is_torch_except_on_a_gpu():
    for dtype, is_cuda, name in (
        (torch.bfloat16, False, "torch"),
        (torch.bfloat16, True, "triton"),
        (torch.float64, True, "torch"),
    ):
        assert head.resolve("auto", SimpleNamespace(dtype=dtype, is_cuda=is_cuda)) == name
        assert head.resolve("trl", SimpleNamespace(dtype=dtype, is_cuda=is_cuda)) == "trl"


def test_what_is_missing_is_named(monkeypatch):
    assert head.missing("auto") is None
    assert head.missing("torch") is None
    monkeypatch.setattr(head, "find_spec", lambda name: None)
    assert head.missing("liger") == "needs the package liger-kernel"
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert head.missing("triton") == "needs an NVIDIA GPU"


def naive(hidden: Tensor, weight: Tensor, target: Tensor, *, bf16_logits=False, uncentred=False, bf16_sums=0) -> Got:
    """A head on whole logits in float32, optionally with one of the shortcuts that ours avoids."""
    h, w = hidden.float(), weight.float()
    logits = h @ w.T
    if bf16_logits:
        logits = logits.bfloat16().float()
    rows = torch.arange(len(h), device=h.device)
    highest = logits.amax(1, keepdim=True)
    exp = (logits - highest).exp()
    total = exp.sum(1, keepdim=True)
    base = logits if uncentred else logits - highest
    mean = (exp * base).sum(1, keepdim=True) / total
    entropy = total.log() + (highest if uncentred else 0) - mean
    onehot = torch.nn.functional.one_hot(target, len(w)).float()
    p = exp / total
    by_u, by_v = onehot - p, -p * (base - mean)
    if bf16_sums:  # the number of vocabulary pieces, whose products are summed in bfloat16
        u, v = ((sum_in_bf16(by, w, bf16_sums)) for by in (by_u, by_v))
    else:
        u, v = by_u @ w, by_v @ w
    return Got((logits - highest - total.log())[rows, target], entropy[:, 0], u, v)


def sum_in_bf16(by: Tensor, w: Tensor, pieces: int) -> Tensor:
    total = torch.zeros(len(by), w.shape[1], dtype=torch.bfloat16, device=w.device)
    for by_piece, w_piece in zip(by.chunk(pieces, dim=1), w.chunk(pieces), strict=True):
        total += (by_piece @ w_piece).bfloat16()
    return total.float()


def test_the_naive_head_passes_without_a_shortcut():
    hidden, weight, target = case(200, 64, 3001, scale=2.0, dtype=torch.bfloat16)
    got, expected = naive(hidden, weight, target), oracle(hidden, weight, target)
    check_values(got.logprob, got.entropy, expected)
    check_coherent(got.u, expected.u)
    check_coherent(got.v, expected.v)


def test_logits_rounded_to_bfloat16_fail():
    hidden, weight, target = case(200, 64, 3001, scale=5.0, dtype=torch.bfloat16)
    got, expected = naive(hidden, weight, target, bf16_logits=True), oracle(hidden, weight, target)
    with pytest.raises(AssertionError):
        check_values(got.logprob, expected.entropy, expected)
    with pytest.raises(AssertionError):
        check_values(expected.logprob, got.entropy, expected)
    with pytest.raises(AssertionError):
        check_coherent(got.u, expected.u)


def test_uncentred_sums_fail():
    """The logits are around 300 and exact in float32, so that only the sums round."""
    _, weight, target = case(20, 20, 5003)
    hidden, weight = torch.eye(20, device=DEVICE), 300 + 10 * weight
    expected = oracle(hidden, weight, target)._replace(largest=32.0)
    ours = run(hidden, weight, target)
    check_values(ours.logprob, ours.entropy, expected)
    got = naive(hidden, weight, target, uncentred=True)
    with pytest.raises(AssertionError):
        check_values(expected.logprob, got.entropy, expected)


def test_gradients_summed_in_bfloat16_fail():
    hidden, weight, target = case(200, 64, 3001, scale=2.0, dtype=torch.bfloat16)
    got, expected = naive(hidden, weight, target, bf16_sums=24), oracle(hidden, weight, target)
    with pytest.raises(AssertionError):
        check_coherent(got.u, expected.u)


@pytest.mark.parametrize("backend", ["trl", "liger"])
def test_peers_agree_in_float32_alone(backend):
    """In float32 both peers compute what ours does; in bfloat16 they round the logits, and fail the tolerances."""
    pytest.importorskip(head.PACKAGES[backend])
    if backend == "liger" and DEVICE == "cuda" and torch.cuda.get_device_capability()[0] >= 9:
        pytest.skip("Liger's kernel for Hopper takes no float32")
    hidden, weight, target = case(150, 24, 1027, scale=2.0)
    expected = oracle(hidden, weight, target, temperature=0.6)
    got = run(hidden, weight, target, temperature=0.6, backend=backend)
    torch.testing.assert_close(got.logprob.double(), expected.logprob, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got.entropy.double(), expected.entropy, rtol=1e-5, atol=2e-5)
    check_rows(got.u, expected.u, 1e-4)
    check_rows(got.v, expected.v, 1e-3)
    at_one = head_stats(hidden, weight, target, temperature=0.6, entropy_at_one=True, backend=backend).entropy_at_one_N
    torch.testing.assert_close(at_one.double(), oracle(hidden, weight, target).entropy, rtol=1e-5, atol=2e-5)
    rounded = run(hidden.bfloat16(), weight.bfloat16(), target, temperature=0.6, backend=backend)
    with pytest.raises(AssertionError):
        check_values(
            rounded.logprob, expected.entropy, oracle(hidden.bfloat16(), weight.bfloat16(), target, temperature=0.6)
        )


@pytest.mark.parametrize(
    ("backend", "options", "words"),
    [
        ("trl", {"topk": 5}, "backend=trl has no top-K entropy"),
        ("liger", {"topk": 5}, "backend=liger has no top-K entropy"),
        ("liger", {"softcap": 5.0}, "backend=liger has neither a bias nor a softcap"),
    ],
)
def test_an_option_that_a_peer_lacks_raises(backend, options, words):
    pytest.importorskip(head.PACKAGES[backend])
    with pytest.raises(ValueError, match=words):
        head_stats(*case(3, 8, 20), backend=backend, **options)


def test_float64_is_never_summed_in_float32():
    assert head_stats(*case(3, 8, 20, dtype=torch.float64)).logprob_N.dtype == torch.float64
    with pytest.raises(ValueError, match="backend=triton sums in float32"):
        head_stats(*case(3, 8, 20, dtype=torch.float64), backend="triton")


def test_trl_computes_softcap_and_bias_as_we_do():
    pytest.importorskip("trl")
    hidden, weight, target = case(30, 16, 300, scale=4.0)
    options = {"softcap": 5.0, "bias_V": torch.linspace(-1, 1, 300, device=DEVICE), "temperature": 0.7}
    ours, theirs = run(hidden, weight, target, **options), run(hidden, weight, target, backend="trl", **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
