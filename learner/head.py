"""The fused entropy path: log-probability and exact entropy of the vocabulary projection, never N x V logits.

The projection is frozen, so the gradient is made in the forward pass: with u = d logprob / d hidden and
v = d entropy / d hidden kept per row, backward is a row scale. Sums are in float32 (float64 for float64 inputs)
and centred at the row's maximum; the target is left out of the sum of the others, which keeps near-certain
tokens exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

CHUNK_ROWS = 256  # rows of hidden states whose logits exist at once
TILE_COLUMNS = 8192  # rows of the weight that are upcast at once
NEGLIGIBLE = -1000.0  # exp() of it is 0 in float64 too; finite, so that 0 * it is 0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStats:
    """Per scored token, nats. The first two are differentiable in the hidden states."""

    logprob_N: Tensor
    entropy_N: Tensor
    entropy_at_one_N: Tensor  # the entropy at temperature 1, no gradient
    topk_entropy_N: Tensor | None = None  # entropy of the K likeliest tokens, renormalised, no gradient
    topk_mass_N: Tensor | None = None  # their probability; mass * (topk_entropy - log mass) is the partial sum


def concatenate(parts: Sequence[HeadStats]) -> HeadStats:
    """The statistics of consecutive parts of the scored tokens as one."""
    whole: dict[str, Any] = {}
    for field in fields(HeadStats):
        column = [getattr(part, field.name) for part in parts]
        whole[field.name] = None if column[0] is None else torch.cat(column)
    return HeadStats(**whole)


def head_stats(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_N: Tensor,
    *,
    temperature: float = 1.0,
    topk: int | None = None,
    entropy_gradient: bool = True,
) -> HeadStats:
    """Log-probability of each target and entropy of its distribution softmax(hidden weight^T / temperature).

    hidden_NH and weight_VH share one floating dtype; target_N holds vocabulary indices. `entropy_gradient=False`
    saves one matrix product where only the log-probability is differentiated. Raises ValueError for a weight that
    requires a gradient: this head never makes one.
    """
    if weight_VH.requires_grad:
        raise ValueError("weight_VH requires a gradient, but the head is frozen; train without an adapter on it")
    logprob_N, entropy_N, at_one_N, topk_entropy_N, topk_mass_N = _Head.apply(
        hidden_NH, weight_VH, target_N, temperature, topk, entropy_gradient
    )
    return HeadStats(
        logprob_N=logprob_N,
        entropy_N=entropy_N,
        entropy_at_one_N=at_one_N,
        topk_entropy_N=topk_entropy_N,
        topk_mass_N=topk_mass_N,
    )


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, weight_VH, target_N, temperature, topk, entropy_gradient):
        wants_u = ctx.needs_input_grad[0]
        wants_v = wants_u and entropy_gradient
        chunks = [
            _chunk(hidden_cH, weight_VH, target_c, temperature, topk, wants_u, wants_v)
            for hidden_cH, target_c in zip(hidden_NH.split(CHUNK_ROWS), target_N.split(CHUNK_ROWS), strict=True)
        ]
        logprob_N, entropy_N, at_one_N, topk_entropy_N, topk_mass_N, u_NH, v_NH = (
            None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True)
        )
        ctx.save_for_backward(u_NH, v_NH)
        ctx.hidden_dtype = hidden_NH.dtype
        without_gradient = [at_one_N] if wants_v else [at_one_N, entropy_N]
        ctx.mark_non_differentiable(*without_gradient, *([topk_entropy_N, topk_mass_N] if topk else []))
        return logprob_N, entropy_N, at_one_N, topk_entropy_N, topk_mass_N

    @staticmethod
    def backward(ctx, grad_logprob_N, grad_entropy_N, *_):
        u_NH, v_NH = ctx.saved_tensors
        grad_NH = grad_logprob_N[:, None] * u_NH
        if v_NH is not None:
            grad_NH.addcmul_(grad_entropy_N[:, None], v_NH)
        return grad_NH.to(ctx.hidden_dtype), None, None, None, None, None


def _chunk(hidden_cH, weight_VH, target_c, temperature, topk, wants_u, wants_v):
    """The seven columns of some rows: log-probability, entropy, entropy at 1, top-K entropy and mass, u, v."""
    dtype = torch.promote_types(hidden_cH.dtype, torch.float32)
    hidden_cH = hidden_cH.to(dtype)
    logits_Vc = hidden_cH.new_empty(len(weight_VH), len(hidden_cH))  # V first: a tile is one contiguous block
    for tile, weight_tH in _tiles(weight_VH, dtype):
        torch.mm(weight_tH, hidden_cH.T, out=logits_Vc[tile])
    at_one_c = None if temperature == 1 else _entropy(logits_Vc)
    centred_Vc = logits_Vc.div_(temperature).sub_(logits_Vc.amax(dim=0)).clamp_(min=NEGLIGIBLE)
    topk_entropy_c, topk_mass_c = _topk(centred_Vc, topk) if topk else (None, None)

    column = torch.arange(len(target_c), device=target_c.device)
    centred_y_c = centred_Vc[target_c, column]
    exp_y_c = centred_y_c.exp()
    exp_Vc = centred_Vc.exp()
    exp_Vc[target_c, column] = 0
    others_c = exp_Vc.sum(dim=0)
    sum_c = others_c + exp_y_c
    mean_c = ((exp_Vc * centred_Vc).sum(dim=0) + exp_y_c * centred_y_c) / sum_c
    logprob_c = -softplus(others_c.log() - centred_y_c)
    entropy_c = sum_c.log() - mean_c

    u_cH = v_cH = None
    weight_y_cH = weight_VH[target_c].to(dtype) if wants_u else None
    if wants_u:
        u_cH = others_c[:, None] * weight_y_cH
        for tile, weight_tH in _tiles(weight_VH, dtype):
            u_cH.addmm_(exp_Vc[tile].T, weight_tH, alpha=-1)
        u_cH.div_((sum_c * temperature)[:, None])
    if wants_v:
        v_cH = (exp_y_c * (mean_c - centred_y_c))[:, None] * weight_y_cH
        exp_Vc.mul_(centred_Vc.sub_(mean_c))
        for tile, weight_tH in _tiles(weight_VH, dtype):
            v_cH.addmm_(exp_Vc[tile].T, weight_tH, alpha=-1)
        v_cH.div_((sum_c * temperature)[:, None])
    return (
        logprob_c,
        entropy_c,
        entropy_c.clone() if at_one_c is None else at_one_c,
        topk_entropy_c,
        topk_mass_c,
        u_cH,
        v_cH,
    )


def _tiles(weight_VH, dtype):
    for start in range(0, len(weight_VH), TILE_COLUMNS):
        tile = slice(start, start + TILE_COLUMNS)
        yield tile, weight_VH[tile].to(dtype)


def _entropy(logits_Vc: Tensor) -> Tensor:
    centred_Vc = (logits_Vc - logits_Vc.amax(dim=0)).clamp_(min=NEGLIGIBLE)
    exp_Vc = centred_Vc.exp()
    sum_c = exp_Vc.sum(dim=0)
    return sum_c.log() - exp_Vc.mul_(centred_Vc).sum(dim=0) / sum_c


def _topk(centred_Vc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    top_Kc = centred_Vc.topk(min(k, len(centred_Vc)), dim=0).values
    return _entropy(top_Kc), top_Kc.exp().sum(dim=0) / centred_Vc.exp().sum(dim=0)
