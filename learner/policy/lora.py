"""Linear layers and their LoRA adapters in one autograd function: y = x W' + s (dropout(x) A') B', W frozen.

A composition of torch's own functions would allocate more [L, O] and [L, I] tensors: the adapter's output, its scaled
copy, the sum, and x after dropout. Here the adapter's matmul adds into the base's output, and dropout keeps one byte
per element. Projections of one input (q, k, v; gate, up) share a call: one dropout mask, one matmul with all A, and one
gradient of x, into which each projection adds. Suffixes: L tokens, I inputs, O outputs, R rank, K the sum of the ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class Projection(NamedTuple):
    """A frozen linear layer and its adapter's two factors."""

    weight_OI: Tensor
    bias_O: Tensor | None
    a_RI: Tensor
    b_OR: Tensor


def lora_linear(x: Tensor, projections: Sequence[Projection], *, scale: float, dropout: float) -> tuple[Tensor, ...]:
    """[..., I] -> [..., O] for each projection, in the dtype of the weights, which get no gradient.

    `dropout` zeroes that fraction of the adapters' input and scales up the rest. A and B are rounded to the weights'
    dtype at use, as autocast would do; their gradients have the dtypes of A and B.
    """
    dtype = projections[0].weight_OI.dtype
    x_LI = x.reshape(-1, x.shape[-1]).to(dtype)
    dropped_LI = None
    if dropout > 0:
        dropped_LI, kept_fraction = dropped(x_LI.shape, dropout, x.device)
        scale /= kept_fraction
    weights, biases, a_s, b_s = zip(*projections, strict=True)
    a_KI = torch.cat(a_s).to(dtype)
    outputs = _LoraLinear.apply(x_LI, a_KI, scale, dropped_LI, weights, biases, *(b_OR.to(dtype) for b_OR in b_s))
    return tuple(y_LO.view(*x.shape[:-1], -1) for y_LO in outputs)


class SharedInput:
    """Peft's adapted layers of one input (learner/policy/policy.py): computes all of them when the first is called, and
    keeps each output until that layer is called."""

    def __init__(self, layers: Sequence[Any], scale: float) -> None:
        self.layers = layers
        self.scale = scale
        self.x: Tensor | None = None
        self.outputs: dict[Any, Tensor] = {}

    def output(self, layer: Any, x: Tensor) -> Tensor:
        if x is not self.x or layer not in self.outputs:
            [name] = layer.active_adapters
            dropout = layer.lora_dropout[name]
            outputs = lora_linear(
                x,
                [each.projection() for each in self.layers],
                scale=self.scale,
                dropout=getattr(dropout, "p", 0.0) if dropout.training else 0.0,  # peft uses an Identity for 0
            )
            self.x, self.outputs = x, dict(zip(self.layers, outputs, strict=True))
        y = self.outputs.pop(layer)
        if not self.outputs:
            self.x = None
        return y


def dropped(shape: torch.Size, dropout: float, device: torch.device) -> tuple[Tensor, float]:
    """A bool tensor, true where an element is dropped with probability `dropout`, and the exact fraction that is kept.

    It draws 16 random bits per element and rounds the probability to them, because torch's own dropout is slower on a
    CPU: it draws 64 bits per element, one element at a time.
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
        a_KI: Tensor,
        scale: float,
        dropped_LI: Tensor | None,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        *b_s: Tensor,
    ) -> tuple[Tensor, ...]:
        inner_LK = _zeroed(x_LI, dropped_LI) @ a_KI.T
        ctx.scale, ctx.weights = scale, weights
        ctx.save_for_backward(x_LI, a_KI, inner_LK, dropped_LI, *b_s)
        inners = inner_LK.split([b_OR.shape[1] for b_OR in b_s], dim=1)
        return tuple(
            linear(x_LI, weight_OI, bias_O).addmm_(inner_LR, b_OR.T, alpha=scale)
            for weight_OI, bias_O, b_OR, inner_LR in zip(weights, biases, b_s, inners, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x_LI, a_KI, inner_LK, dropped_LI, *b_s = ctx.saved_tensors
        ranks = [b_OR.shape[1] for b_OR in b_s]
        grad_inner_LK = torch.cat([grad_LO @ b_OR for grad_LO, b_OR in zip(grads, b_s, strict=True)], 1).mul_(ctx.scale)
        grad_a_KI = grad_inner_LK.T @ _zeroed(x_LI, dropped_LI)
        grad_b_s = [
            (grad_LO.T @ inner_LR).mul_(ctx.scale)
            for grad_LO, inner_LR in zip(grads, inner_LK.split(ranks, dim=1), strict=True)
        ]
        grad_x_LI = None
        if ctx.needs_input_grad[0]:
            grad_x_LI = (
                (grad_inner_LK @ a_KI) if dropped_LI is None else (grad_inner_LK @ a_KI).masked_fill_(dropped_LI, 0)
            )
            for grad_LO, weight_OI in zip(grads, ctx.weights, strict=True):
                grad_x_LI.addmm_(grad_LO, weight_OI)
        return grad_x_LI, grad_a_KI, None, None, None, None, *grad_b_s
