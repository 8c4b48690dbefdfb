"""The fused entropy path: log-probability and exact entropy of the vocabulary projection, never N x V logits.

The projection is frozen, so the gradients are made in the forward pass: u = d logprob / d hidden and, on request,
v = d entropy / d hidden are kept for each token, and the backward pass only scales them. A backend computes a chunk of
tokens at a time: torch_backend.py on any device, triton_backend.py on an NVIDIA GPU. peers.py wraps TRL's and Liger's
heads for comparison.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learner.head import peers, torch_backend
from learner.head.interface import Projection, Wanted

PEERS = {"trl": peers.trl, "liger": peers.liger}
PACKAGES = {"triton": "triton", "trl": "trl", "liger": "liger_kernel"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStats:
    """Statistics of each scored token, in nats; float32, or float64 for float64 inputs.

    logprob_N is differentiable in the hidden states; entropy_N is too, unless `entropy_gradient=False`.
    """

    logprob_N: Tensor
    entropy_N: Tensor
    entropy_at_one_N: Tensor | None = None  # the entropy at temperature 1, no gradient
    topk_entropy_N: Tensor | None = None  # entropy of the K most likely tokens, renormalised, no gradient
    topk_mass_N: Tensor | None = None  # their probability

    @property
    def topk_partial_entropy_N(self) -> Tensor:
        """- sum of p log p over the K most likely tokens, not renormalised."""
        assert self.topk_entropy_N is not None and self.topk_mass_N is not None, "call head_stats with topk"
        return self.topk_mass_N * (self.topk_entropy_N - self.topk_mass_N.log())


def concatenate(parts: Sequence[HeadStats]) -> HeadStats:
    """Join the statistics of consecutive parts of the scored tokens."""
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
    entropy_at_one: bool = False,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> HeadStats:
    """Log-probability of each target and entropy of its distribution softmax(z / temperature).

    z = hidden weight^T + bias, and with `softcap` c then c tanh(z / c) (Gemma 2). hidden_NH and weight_VH have the same
    floating dtype; target_N holds vocabulary indices (an index outside the vocabulary gives NaN).
    `topk=K` adds the entropy and the mass of the K most likely tokens, `entropy_at_one` the entropy at temperature 1;
    `entropy_gradient=False` saves a matmul where only the log-probability is differentiated.

    Memory does not grow with N V: it holds one chunk of logits, and 4 N H bytes for each gradient. A call under no_grad
    returns bitwise the values of the call with gradient. Raises ValueError for a weight or bias that requires a
    gradient (the head is frozen and makes none), for numbers out of range, and for options that a peer's backend lacks.
    """
    projection = Projection(weight_VH=weight_VH, bias_V=bias_V, softcap=softcap)
    name = resolve(backend, hidden_NH)
    _check(hidden_NH, projection, temperature, topk, name)
    at_one_is_extra = entropy_at_one and temperature != 1
    if name in PEERS:
        columns = PEERS[name](hidden_NH, projection, target_N, temperature, at_one_is_extra)
    else:
        differentiated = torch.is_grad_enabled() and hidden_NH.requires_grad
        wanted = Wanted(
            u=differentiated,
            v=differentiated and entropy_gradient,
            entropy_at_one=at_one_is_extra,
            topk=topk,
        )
        columns = _Head.apply(hidden_NH, projection, target_N, temperature, wanted, name)
    logprob_N, entropy_N, at_one_N, topk_entropy_N, topk_mass_N = columns
    if entropy_at_one and not at_one_is_extra:
        at_one_N = entropy_N.detach()
    return HeadStats(
        logprob_N=logprob_N,
        entropy_N=entropy_N,
        entropy_at_one_N=at_one_N,
        topk_entropy_N=topk_entropy_N,
        topk_mass_N=topk_mass_N,
    )


def _check(hidden_NH: Tensor, projection: Projection, temperature: float, topk: int | None, backend: str) -> None:
    """Raise ValueError for the inputs that head_stats rejects."""
    if projection.weight_VH.requires_grad or (projection.bias_V is not None and projection.bias_V.requires_grad):
        raise ValueError("weight_VH or bias_V requires a gradient, but the head is frozen; train the layers below it")
    if topk is not None and topk < 1:
        raise ValueError(f"topk={topk} keeps no token; ask for 1 or more")
    if projection.softcap is not None and not projection.softcap > 0:
        raise ValueError(f"softcap={projection.softcap} must be positive, or None")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive")
    if hidden_NH.dtype != projection.weight_VH.dtype:
        raise ValueError(
            f"hidden_NH is {hidden_NH.dtype} but weight_VH {projection.weight_VH.dtype}; cast the hidden states"
        )
    if backend == "triton" and hidden_NH.dtype == torch.float64:
        raise ValueError("backend=triton sums in float32; use torch for float64 inputs")
    if backend in PEERS and topk is not None:
        raise ValueError(f"backend={backend} has no top-K entropy; use torch or triton")


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH, projection, target_N, temperature, wanted, backend):
        module = _module(backend)
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        rows = module.chunk_rows(projection.weight_VH)
        u_NH = torch.empty_like(hidden_NH, dtype=dtype) if wanted.u else None
        v_NH = torch.empty_like(hidden_NH, dtype=dtype) if wanted.v else None
        columns = []
        for start in range(0, max(1, len(hidden_NH)), rows):
            cut = slice(start, start + rows)
            chunk = module.chunk(hidden_NH[cut], target_N[cut], temperature, projection, wanted)
            for whole_NH, part_cH in ((u_NH, chunk.u_cH), (v_NH, chunk.v_cH)):
                if whole_NH is not None:
                    whole_NH[cut] = part_cH
            columns.append(chunk[:5])
        outputs = tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*columns, strict=True))
        ctx.save_for_backward(u_NH, v_NH)
        ctx.hidden_dtype = hidden_NH.dtype
        ctx.mark_non_differentiable(*(t for t in outputs[1 + wanted.v :] if t is not None))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob_N, grad_entropy_N, *_):
        u_NH, v_NH = ctx.saved_tensors
        grad_NH = grad_logprob_N[:, None] * u_NH
        if v_NH is not None:
            grad_NH.addcmul_(grad_entropy_N[:, None], v_NH)
        return grad_NH.to(ctx.hidden_dtype), None, None, None, None, None


def _module(backend: str) -> Any:
    if backend == "torch":
        return torch_backend
    from learner.head import triton_backend  # imported on use, since triton may be absent without a GPU

    return triton_backend


def resolve(backend: str, hidden_NH: Tensor) -> str:
    """The backend that "auto" means for these inputs, or `backend` itself."""
    if backend != "auto":
        return backend
    return "triton" if hidden_NH.is_cuda and hidden_NH.dtype != torch.float64 and find_spec("triton") else "torch"


def missing(backend: str) -> str | None:
    """Why `backend` cannot be used on this machine, in a few words; None if it can."""
    package = PACKAGES.get(backend)
    if package and find_spec(package) is None:
        return f"needs the package {package.replace('_', '-')}"
    if backend == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs an NVIDIA GPU"
    return None
