"""Attention over packed rows: a rollout sees its prompt and its own past, and nothing else is computed.

Registered with transformers under the name PACKED; the lengths of a micro-batch reach it as the keyword `lengths`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

PACKED = "horizon_packed"


def packed_attention(
    module: nn.Module,
    query_1ALD: Tensor,
    key_1KLD: Tensor,
    value_1KLD: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    lengths: Sequence[Sequence[int]] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention of A query heads over K key heads, output [1, L, A, D].

    `lengths` has an entry per prompt: its length, then those of the rollouts that follow it; their sum is L.
    None: one plain causal sequence.
    """
    if lost := [name for name in ("s_aux", "softcap") if others.get(name) is not None]:
        raise ValueError(f"the model's attention has {lost[0]}, which packed attention would leave out")
    repeats = query_1ALD.shape[1] // key_1KLD.shape[1]
    key_1ALD, value_1ALD = (x.repeat_interleave(repeats, dim=1) for x in (key_1KLD, value_1KLD))
    if lengths is None:
        lengths = [[query_1ALD.shape[2]]]
    flat = [length for row in lengths for length in row]
    pieces = zip(*(x.split(flat, dim=2) for x in (query_1ALD, key_1ALD, value_1ALD)), strict=True)
    outputs = []
    for row in lengths:
        query, prompt_key, prompt_value = next(pieces)
        outputs.append(scaled_dot_product_attention(query, prompt_key, prompt_value, is_causal=True, scale=scaling))
        for length in row[1:]:
            query, key, value = next(pieces)
            mask = torch.ones(length, row[0] + length, dtype=torch.bool, device=query.device).tril(row[0])
            keys, values = torch.cat([prompt_key, key], dim=2), torch.cat([prompt_value, value], dim=2)
            outputs.append(scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=scaling))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED, packed_attention)
