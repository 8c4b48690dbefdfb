"""vLLM's options for its share of a GPU. Imports no vLLM, so that the memory plan can read the same numbers."""

from typing import Any

from common.config import ActorConfig

# Tokens that vLLM computes at once: what its server takes on a GPU of 40 GB (get_batch_defaults in
# vllm/engine/arg_utils.py). As a library it would take 8,192 or 16,384, at several times the working memory.
PREFILL_TOKENS = 2048


def options(actor: ActorConfig) -> dict[str, Any]:
    """Arguments of vllm.LLM. What the plan has not set is left to vLLM."""
    chosen: dict[str, Any] = {
        "enforce_eager": actor.eager,
        "max_num_batched_tokens": max(PREFILL_TOKENS, actor.num_sequences or 0),
    }
    if actor.gpu_memory_fraction is not None:
        chosen["gpu_memory_utilization"] = actor.gpu_memory_fraction
    if actor.kv_cache_gib is not None:  # then its share is only asked for at the start, and nothing sized by it
        chosen["kv_cache_memory_bytes"] = round(actor.kv_cache_gib * 2**30)
    return chosen
