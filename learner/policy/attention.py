"""Attention over packed rows: a rollout sees its prompt and its own past, and nothing else is computed.

Registered with transformers under the name PACKED; the lengths of a micro-batch reach it as the keyword `lengths`.
"""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from learner.batch import Ends

PACKED = "horizon_packed"
# torch 2.11 takes fewer heads of keys and values as they are, 2.13 must be told.
GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in signature(varlen.varlen_attn).parameters else {}
KERNEL_BACKWARD = torch.ops.torch_attn._varlen_attn_backward.default  # what varlen_attn's gradient is made by
KERNEL_ROWS = 128  # by which the kernel's backward pass keeps the sums of two sequences apart


def packed_attention(
    module: nn.Module,
    query_1ALD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    lengths: Sequence[Sequence[int]] | None = None,
    ends: Ends | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of A query heads over K key heads, output [1, L, A, D].

    `lengths` has an entry per prompt: its length, then those of the rollouts that follow it; their sum is L.
    None: one plain causal sequence. `ends` are theirs (learner.batch.Ends), made once for all layers.
    """
    if lost := [name for name in ("s_aux", "softcap") if others.get(name) is not None]:
        raise ValueError(f"the model's attention has {lost[0]}, which packed attention would leave out")
    lengths = lengths or ((query_1ALD.shape[2],),)
    pieces = _pieces(query_1ALD, key_1KLD, value_1KLD, lengths)
    half = query_1ALD.dtype in (torch.bfloat16, torch.float16)
    # The meta device stands for a GPU: what one would keep is counted on it (learner/policy/activations.py).
    if (query_1ALD.is_cuda or query_1ALD.is_meta) and half:
        return _attend_packed(pieces, ends or Ends.of(lengths, query_1ALD.device), scaling), None
    return _attend_one_by_one(pieces, scaling), None


def _pieces(
    query_1ALD: Tensor, key_1KLD: Tensor, value_1KLD: Tensor, lengths: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For each prompt and each rollout its queries, and the keys and values up to its last one, the prompt's first."""
    flat = [length for row in lengths for length in row]
    parts = zip(*(x.split(flat, dim=2) for x in (query_1ALD, key_1KLD, value_1KLD)), strict=True)
    pieces = []
    for row in lengths:
        pieces.append(prompt := next(parts))
        for _ in row[1:]:
            query, key, value = next(parts)
            pieces.append((query, torch.cat([prompt[1], key], dim=2), torch.cat([prompt[2], value], dim=2)))
    return pieces


def _attend_one_by_one(pieces: Sequence[tuple[Tensor, Tensor, Tensor]], scaling: float) -> Tensor:
    """[1, L, A, D]; a piece's last query sees all of its keys, the one before all but one, and so on."""
    outputs = []
    for query, key, value in pieces:
        length, before = query.shape[2], key.shape[2] - query.shape[2]
        mask = torch.ones(length, key.shape[2], dtype=torch.bool).tril(before).to(query.device) if before else None
        outputs.append(
            scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=not before, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _attend_packed(pieces: Sequence[tuple[Tensor, Tensor, Tensor]], ends: Ends, scaling: float) -> Tensor:
    """The same by FlashAttention's kernel for sequences of many lengths, on a GPU in 16 bits."""
    query_MAD, key_MKD, value_MKD = [
        torch.cat(tensors, dim=2)[0].transpose(0, 1) for tensors in zip(*pieces, strict=True)
    ]
    output_LAD: Any = varlen.varlen_attn(
        query_MAD,
        key_MKD,
        value_MKD,
        *ends,
        scale=scaling,
        window_size=(-1, 0),  # any number of keys before, none after; the last query sees the last key
        **GROUPED,
    )
    return output_LAD[None]


def backward_scratch_bytes(grad: Tensor, query_MAD: Tensor, key_MKD: Tensor, *others: Any) -> int:
    """Bytes that the kernel's backward pass, called with these arguments, takes on a GPU beside its results.

    From mha_varlen_bwd of torch's flash_attn/flash_api.cpp: float32 sums of the queries' gradient, their row sums, and
    the gradients of keys and values for each query head, where several share one.
    """
    _, _, _, query_ends, *_ = others
    (queries, heads, size), (keys, key_heads, _) = query_MAD.shape, key_MKD.shape
    rows = queries + KERNEL_ROWS * (len(query_ends) - 1)
    rounded = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    expanded = 2 * keys * heads * size * key_MKD.element_size() if heads != key_heads else 0
    return 4 * rows * heads * (rounded + 1) + expanded


AttentionInterface.register(PACKED, packed_attention)
