"""What vLLM is started with: its keyword arguments and environment variables, on a CPU and on its share of a GPU.

Imports no vLLM, so that the memory plan can read the same numbers, and a test can hold them against any platform.
"""

import math
from typing import Any

from common.config import ActorConfig, ModelConfig

# Tokens that vLLM computes at once: what its server takes on a GPU of 40 GB (get_batch_defaults in
# vllm/engine/arg_utils.py). As a library it would take 8,192 or 16,384, at several times the working memory.
PREFILL_TOKENS = 2048

# Batch sizes of decoding that get a CUDA graph; others are padded to the next. vLLM would capture up to 51 sizes, at
# several times the start-up time; 512 is also its own largest.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def arguments(model_dir: str, model: ModelConfig, actor: ActorConfig, *, seed: int, on_gpu: bool) -> dict[str, Any]:
    """All keyword arguments of vllm.LLM. What neither the configuration nor the memory plan sets is left to vLLM."""
    chosen: dict[str, Any] = {
        "model": model_dir,
        "dtype": model.dtype,
        "max_model_len": model.max_length,
        "seed": seed,
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "logprobs_mode": "processed_logprobs",  # after the temperature
        "max_logprobs": -1,  # Engine.first_tokens says how many
        "distributed_executor_backend": "uni",
        "worker_cls": "actor.vllm_worker.AdapterWorker",
        "additional_config": {
            "horizon": {"rank": model.lora_rank, "alpha": model.lora_alpha, "targets": list(model.lora_targets)}
        },
    }
    if actor.num_sequences is not None:
        chosen["max_num_seqs"] = actor.num_sequences
    if not on_gpu:
        # Compiling gains little on a CPU, and takes minutes. Prompts are computed whole: vLLM cannot take back the
        # draw that follows a part of one, since a CPU's random generator has no offset.
        return chosen | {"enforce_eager": True, "enable_chunked_prefill": False}
    if not actor.eager:
        chosen["compilation_config"] = {"cudagraph_capture_sizes": graph_sizes(actor.num_sequences)}
    return chosen | options(actor)


def options(actor: ActorConfig) -> dict[str, Any]:
    """The arguments of vllm.LLM that divide a GPU's memory. What the plan has not set is left to vLLM."""
    chosen: dict[str, Any] = {
        "enforce_eager": actor.eager,
        "max_num_batched_tokens": max(PREFILL_TOKENS, actor.num_sequences or 0),
    }
    if actor.gpu_memory_fraction is not None:
        chosen["gpu_memory_utilization"] = actor.gpu_memory_fraction
    if actor.kv_cache_gib is not None:  # then its share is only asked for at the start, and nothing sized by it
        chosen["kv_cache_memory_bytes"] = round(actor.kv_cache_gib * 2**30)
    return chosen


def graph_sizes(num_sequences: int | None) -> list[int]:
    """Batch sizes of decoding to capture CUDA graphs for, at most `num_sequences` concurrent sequences.

    The largest is that number itself: vLLM decodes with no graph of more sequences than it may hold, so that of 20
    sequences a graph of 32 would leave batches of 17 to 20 without one.
    """
    return sorted({min(size, num_sequences or size) for size in GRAPH_SIZES})


def environment(actor: ActorConfig, *, on_gpu: bool) -> dict[str, str]:
    """Environment variables of the engine's process; vLLM reads them while it starts, not when it is imported."""
    chosen = {
        "VLLM_NO_USAGE_STATS": "1",
        # Scheduler and model stay in this process. All requests of a call are then queued before its first step, so
        # that equal calls make equal batches; nothing can outlive the owner; nothing polls while the engine is idle.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The engine has no peer on another machine; vLLM would otherwise look up an address that may not be reachable.
        "VLLM_HOST_IP": "127.0.0.1",
    }
    if not on_gpu:
        return chosen | {"VLLM_CPU_KVCACHE_SPACE": str(math.ceil(actor.kv_cache_gib or 1))}  # it reads whole GiB
    # FlashInfer's sampler takes neither seeds nor processed log-probabilities, so that no request of ours can use it;
    # finding out whether it could may compile it.
    return chosen | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
