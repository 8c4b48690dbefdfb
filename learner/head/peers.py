"""TRL's and Liger's heads with the arguments of ours: references for comparison, never the default.

Both round the logits to the inputs' dtype before the softmax. Each function returns the five tensors of HeadStats.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from learner.head.interface import Projection

Columns = tuple[Tensor, Tensor, Tensor | None, None, None]
Apply = Callable[[float], tuple[Tensor, Tensor]]


def trl(hidden_NH: Tensor, projection: Projection, target_N: Tensor, temperature: float, at_one: bool) -> Columns:
    """trl.kernels.ChunkedLogProbFunction (TRL 1.16): online sums over vocabulary chunks, computed again in backward."""
    from trl.kernels import ChunkedLogProbFunction

    vocabulary_chunk = 32768 if hidden_NH.is_cuda else 8192  # TRL's default; on a CPU 8192 is 2 to 3 times as fast

    def apply(temperature: float) -> tuple[Tensor, Tensor]:
        logprob_N, entropy_N, *_ = ChunkedLogProbFunction.apply(
            hidden_NH,
            projection.weight_VH,
            projection.bias_V,
            target_N,
            temperature,
            vocabulary_chunk,
            projection.softcap,
            1.0,
            ("entropy",),
        )
        return logprob_N, entropy_N

    return _columns(apply, temperature, at_one)


def liger(hidden_NH: Tensor, projection: Projection, target_N: Tensor, temperature: float, at_one: bool) -> Columns:
    """LigerFusedLinearScaledCrossEntropyFunction (Liger 0.8): fused on Hopper, chunks of 512 tokens elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    if projection.bias_V is not None or projection.softcap is not None:
        raise ValueError("backend=liger has neither a bias nor a softcap; use torch or triton")

    def apply(temperature: float) -> tuple[Tensor, Tensor]:
        loss_N, entropy_N = LigerFusedLinearScaledCrossEntropyFunction.apply(
            hidden_NH, projection.weight_VH, target_N, temperature, -100, 1, True
        )
        return -loss_N, entropy_N.float()

    return _columns(apply, temperature, at_one)


def _columns(apply: Apply, temperature: float, at_one: bool) -> Columns:
    logprob_N, entropy_N = apply(temperature)
    with torch.no_grad():
        at_one_N = apply(1.0)[1] if at_one else None
    return logprob_N, entropy_N, at_one_N, None, None
