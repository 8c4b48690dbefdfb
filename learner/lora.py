"""A linear layer and its LoRA adapter in one function: y = x W' + s (dropout(x) A') B', W frozen.

Composed of torch's own functions this keeps and passes over several [L, O] and [L, I] tensors more: the adapter's
output, its scaled copy, the sum, and x after dropout. Here the adapter's product is added into the base's, and of the
dropout one byte an element stays. Suffixes: L tokens, I inputs, O outputs, R rank.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


def lora_linear(
    x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, *, scale: float, dropout: float
) -> Tensor:
    """[..., I] -> [..., O] in the dtype of `weight_OI`, which gets no gradient; differentiable in x, A and B.

    `dropout` zeroes that share of the adapter's inputs and scales up the others. A and B are rounded to the dtype of
    the weight at use, as autocast would; their gradients come back in their own.
    """
    dtype = weight_OI.dtype
    x_LI = x.reshape(-1, x.shape[-1]).to(dtype)
    dropped_LI = None
    if dropout > 0:
        dropped_LI, kept_fraction = dropped(x_LI.shape, dropout, x.device)
        scale /= kept_fraction
    y_LO = _LoraLinear.apply(x_LI, weight_OI, bias_O, a_RI.to(dtype), b_OR.to(dtype), scale, dropped_LI)
    return y_LO.view(*x.shape[:-1], -1)


def dropped(shape: torch.Size, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """Bool of `shape`, true at a share `dropout` of random places, and the share that is kept.

    16 random bits an element, the share rounded to them: torch's own dropout draws 64 on a CPU, one by one.
    """
    bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
    count = min(round(dropout * 2**16), 2**16 - 1)
    dropped = bits.view(torch.int16)[: shape.numel()].view(shape) < count - 2**15
    return dropped, 1 - count / 2**16


def _zeroed(x_LI: Tensor, dropped_LI: Tensor | None) -> Tensor:
    return x_LI if dropped_LI is None else x_LI.masked_fill(dropped_LI, 0)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_LI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        dropped_LI: Tensor | None,
    ) -> Tensor:
        inner_LR = _zeroed(x_LI, dropped_LI) @ a_RI.T
        ctx.scale = scale
        ctx.save_for_backward(x_LI, weight_OI, a_RI, b_OR, inner_LR, dropped_LI)
        return linear(x_LI, weight_OI, bias_O).addmm_(inner_LR, b_OR.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad_LO: Tensor) -> tuple[Tensor | None, ...]:
        x_LI, weight_OI, a_RI, b_OR, inner_LR, dropped_LI = ctx.saved_tensors
        grad_inner_LR = (grad_LO @ b_OR).mul_(ctx.scale)
        grad_a_RI = grad_inner_LR.T @ _zeroed(x_LI, dropped_LI)
        grad_b_OR = (grad_LO.T @ inner_LR).mul_(ctx.scale)
        grad_x_LI = None
        if ctx.needs_input_grad[0]:
            grad_x_LI = grad_LO @ weight_OI
            if dropped_LI is None:
                grad_x_LI.addmm_(grad_inner_LR, a_RI)
            else:
                grad_x_LI += (grad_inner_LR @ a_RI).masked_fill_(dropped_LI, 0)
        return grad_x_LI, None, None, grad_a_RI, grad_b_OR, None, None
