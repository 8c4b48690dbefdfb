"""Attention over packed sequences: a rollout attends to its prompt and its own past, and nothing else is computed.

A layer with a sliding window attends to the last of these alone.

It is registered with transformers under the name PACKED, and gets a micro-batch's `lengths` and `ends` as keywords.
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
# Heads of keys and values may be fewer than those of queries: torch 2.11 accepts that, 2.13 needs a flag.
GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in signature(varlen.varlen_attn).parameters else {}
KERNEL_BACKWARD = torch.ops.torch_attn._varlen_attn_backward.default  # computes the gradient of varlen_attn
KERNEL_ROWS = 128  # rows of padding per sequence in the scratch memory of the kernel's backward pass


def packed_attention(
    module: nn.Module,
    query_1ALD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    lengths: Sequence[Sequence[int]] | None = None,
    ends: Ends | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of A query heads over K key heads, output [1, L, A, D].

    `lengths` are those of learner.batch.MicroBatch, with sum L; None means one plain causal sequence. `ends` are made
    from `lengths` once for all layers. A token attends to at most `sliding_window` tokens, itself included.
    """
    left_out = {"a mask": attention_mask} | {name: others.get(name) for name in ("s_aux", "softcap")}
    for name, value in left_out.items():
        if value is not None:
            raise ValueError(f"the model's attention has {name}, which packed attention would leave out")
    lengths = lengths or ((query_1ALD.shape[2],),)
    pieces = _pieces(query_1ALD, key_1KLD, value_1KLD, lengths)
    half = query_1ALD.dtype in (torch.bfloat16, torch.float16)
    # The meta device stands for a GPU when learner/policy/activations.py measures memory.
    if (query_1ALD.is_cuda or query_1ALD.is_meta) and half:
        return _attend_packed(pieces, ends or Ends.of(lengths, query_1ALD.device), scaling, sliding_window), None
    return _attend_one_by_one(pieces, scaling, sliding_window), None


def _pieces(
    query_1ALD: Tensor, key_1KLD: Tensor, value_1KLD: Tensor, lengths: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each prompt and rollout; a rollout's keys and values begin with its prompt's."""
    flat = [length for sequence in lengths for length in sequence]
    parts = zip(*(x.split(flat, dim=2) for x in (query_1ALD, key_1KLD, value_1KLD)), strict=True)
    pieces = []
    for sequence in lengths:
        pieces.append(prompt := next(parts))
        for _ in sequence[1:]:
            query, key, value = next(parts)
            pieces.append((query, torch.cat([prompt[1], key], dim=2), torch.cat([prompt[2], value], dim=2)))
    return pieces


def _attend_one_by_one(pieces: Sequence[tuple[Tensor, Tensor, Tensor]], scaling: float, window: int | None) -> Tensor:
    """[1, L, A, D], by one causal SDPA call per piece: its last query attends to all of its keys."""
    outputs = []
    for query, key, value in pieces:
        mask = _mask(query.shape[2], key.shape[2], window)
        outputs.append(
            scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if mask is None else mask.to(query.device),
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _mask(queries: int, keys: int, window: int | None) -> Tensor | None:
    """[queries, keys]: true where the last `queries` of a sequence's `keys` attend; None for a plainly causal one."""
    before = keys - queries
    if not before and (window is None or window >= keys):
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(before)
    return mask if window is None else mask.triu(before - window + 1)


def _attend_packed(
    pieces: Sequence[tuple[Tensor, Tensor, Tensor]], ends: Ends, scaling: float, window: int | None
) -> Tensor:
    """The same by one call of FlashAttention's variable-length kernel, for 16 bits on a GPU."""
    query_MAD, key_MKD, value_MKD = [
        torch.cat(tensors, dim=2)[0].transpose(0, 1) for tensors in zip(*pieces, strict=True)
    ]
    output_LAD: Any = varlen.varlen_attn(
        query_MAD,
        key_MKD,
        value_MKD,
        *ends,
        scale=scaling,
        # Tokens before and after its own that a query attends to, -1 for all; the last query is at the last key.
        window_size=(-1 if window is None else window - 1, 0),
        **GROUPED,
    )
    return output_LAD[None]


def backward_scratch_bytes(grad: Tensor, query_MAD: Tensor, key_MKD: Tensor, *others: Any) -> int:
    """Bytes of scratch memory that the kernel's backward pass takes on a GPU for these arguments.

    From mha_varlen_bwd of torch's flash_attn/flash_api.cpp: float32 sums of the queries' gradient, their row sums, and,
    where query heads share keys, the gradients of keys and values for each query head.
    """
    _, _, _, query_ends, *_ = others
    (queries, heads, size), (keys, key_heads, _) = query_MAD.shape, key_MKD.shape
    rows = queries + KERNEL_ROWS * (len(query_ends) - 1)
    rounded = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    expanded = 2 * keys * heads * size * key_MKD.element_size() if heads != key_heads else 0
    return 4 * rows * heads * (rounded + 1) + expanded


AttentionInterface.register(PACKED, packed_attention)
