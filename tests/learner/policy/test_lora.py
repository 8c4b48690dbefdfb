"""The fused LoRA layer against the formula, PEFT's own layer and finite differences."""

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora as peft_lora

from learner.policy import lora
from learner.policy.lora import Projection, dropped, lora_linear

L, INPUTS, OUTPUTS, R = 7, 6, 5, 3


def one(x, weight, bias_O, a, b, **options):
    [y] = lora_linear(x, [Projection(weight, bias_O, a, b)], **options)
    return y


def tensors(dtype=torch.float64, *, bias=True):
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, L, INPUTS), (OUTPUTS, INPUTS), (OUTPUTS,), (R, INPUTS), (OUTPUTS, R))
    x, weight, bias_O, a, b = (torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    for tensor in (x, a, b):
        tensor.requires_grad_()
    return x, weight, bias_O if bias else None, a, b


@pytest.mark.parametrize("bias", [True, False])
def test_without_dropout_it_is_pefts_layer(bias):
    x, weight, bias_O, a, b = tensors(torch.float32, bias=bias)
    base = torch.nn.Linear(INPUTS, OUTPUTS, bias=bias)
    peer = peft_lora.Linear(base, "default", LoraConfig(r=R, lora_alpha=5), r=R, lora_alpha=5)
    with torch.no_grad():
        base.weight.copy_(weight)
        peer.lora_A["default"].weight.copy_(a)
        peer.lora_B["default"].weight.copy_(b)
        if bias:
            base.bias.copy_(bias_O)
    ours = one(x, weight, bias_O, a, b, scale=5 / R, dropout=0.0)
    theirs_x = x.detach().clone().requires_grad_()
    theirs = peer(theirs_x)
    torch.testing.assert_close(ours, theirs)
    direction = torch.randn_like(ours)
    ours.backward(direction)
    theirs.backward(direction)
    torch.testing.assert_close(x.grad, theirs_x.grad)
    torch.testing.assert_close(a.grad, peer.lora_A["default"].weight.grad)
    torch.testing.assert_close(b.grad, peer.lora_B["default"].weight.grad)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_finite_differences(dropout):
    x, weight, bias_O, a, b = tensors()

    def function(x, a, b):
        torch.manual_seed(3)  # the same dropout mask in every call
        return one(x, weight, bias_O, a, b, scale=1.7, dropout=dropout)

    assert torch.autograd.gradcheck(function, (x, a, b))


def test_dropout_applies_to_the_adapters_input_alone(monkeypatch):
    x, weight, bias_O, a, b = tensors()
    mask = torch.rand(L, INPUTS, generator=torch.Generator().manual_seed(1)) < 0.5
    monkeypatch.setattr(lora, "dropped", lambda *_: (mask, 0.8))
    expected = x @ weight.T + bias_O + 1.7 * ((x[0] * ~mask / 0.8) @ a.T @ b.T)
    torch.testing.assert_close(one(x, weight, bias_O, a, b, scale=1.7, dropout=0.2), expected)


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_fraction_of_dropped_elements(dropout):
    torch.manual_seed(0)
    mask, kept = dropped(torch.Size((999, 1001)), dropout, torch.device("cpu"))
    sigma = np.sqrt(dropout * (1 - dropout) / mask.numel())
    assert kept == pytest.approx(1 - dropout, abs=2**-16)
    assert mask.double().mean().item() == pytest.approx(1 - kept, abs=4 * sigma)
    for lag in (1, 2, 3, 4, 1001):  # neighbours come from the same 64 random bits
        flat = mask.flatten().double() - (1 - kept)
        assert abs((flat[lag:] * flat[:-lag]).mean().item()) < 4 * dropout * (1 - dropout) / np.sqrt(mask.numel())
    assert not torch.equal(mask, dropped(mask.shape, dropout, torch.device("cpu"))[0])


def test_the_adapter_is_rounded_at_use_and_its_gradients_are_float32():
    x, weight, bias_O, a, b = tensors(torch.float32)
    y = one(x, weight.bfloat16(), bias_O.bfloat16(), a, b, scale=2.0, dropout=0.1)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert {tensor.grad.dtype for tensor in (x, a, b)} == {torch.float32}


def test_an_input_without_gradient_gets_none():
    x, weight, bias_O, a, b = tensors()
    y = one(x.detach(), weight, bias_O, a, b, scale=2.0, dropout=0.0)
    y.sum().backward()
    assert a.grad is not None and b.grad is not None


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_projections_of_one_input_equal_separate_calls_with_one_mask(dropout):
    """Values and all gradients of three projections with different outputs and ranks; x gets the sum of theirs."""
    x, _, _, _, _ = tensors()
    generator = torch.Generator().manual_seed(4)

    def projection(outputs, rank, bias):
        shapes = ((outputs, INPUTS), (outputs,), (rank, INPUTS), (outputs, rank))
        weight, bias_O, a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
        return Projection(weight, bias_O if bias else None, a.requires_grad_(), b.requires_grad_())

    parts = [projection(5, 3, True), projection(2, 3, False), projection(4, 1, False)]
    directions = [torch.randn(1, L, len(p.weight_OI), generator=generator, dtype=torch.float64) for p in parts]

    def gradients(outputs):
        loss = sum((y * direction).sum() for y, direction in zip(outputs, directions, strict=True))
        return torch.autograd.grad(loss, [x, *(p.a_RI for p in parts), *(p.b_OR for p in parts)])

    def seeded(projections):
        torch.manual_seed(3)  # the same dropout mask in every call
        return lora_linear(x, projections, scale=1.7, dropout=dropout)

    together, alone = seeded(parts), [seeded([part])[0] for part in parts]
    for one_y, other_y in zip(together, alone, strict=True):
        torch.testing.assert_close(one_y, other_y)
    for got, expected in zip(gradients(together), gradients(alone), strict=True):
        torch.testing.assert_close(got, expected)
