"""The keyword arguments and environment variables that vLLM starts with, on a CPU and on its share of a GPU.

This file does not import vLLM: the memory plan reads the same numbers, and a test checks them for a CUDA platform.
"""

import math
import os
from typing import Any

from common.adapter import scale
from common.config import ActorConfig, ModelConfig

# Tokens per engine step, the default of vLLM's server on a GPU of 40 GB (get_batch_defaults in
# vllm/engine/arg_utils.py). The default of vllm.LLM, 8,192 or 16,384, needs several times the working memory.
PREFILL_TOKENS = 2048

# Decode batch sizes that get a CUDA graph; other sizes are padded to the next one. vLLM's default captures up to 51
# sizes, which takes several times as long at start-up; its largest is 512 too.
GRAPH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def arguments(model_dir: str, model: ModelConfig, actor: ActorConfig, *, seed: int, on_gpu: bool) -> dict[str, Any]:
    """All keyword arguments of vllm.LLM. vLLM's default holds for what neither the configuration nor the plan sets."""
    chosen: dict[str, Any] = {
        "model": model_dir,
        "dtype": model.dtype,
        "max_model_len": model.max_length,
        "seed": seed,
        "enable_prefix_caching": True,
        "use_tqdm_on_load": False,
        "logprobs_mode": "processed_logprobs",  # with the temperature applied
        "max_logprobs": -1,  # no limit: Engine.first_tokens asks for any number
        "tensor_parallel_size": actor.tensor_parallel,
        "distributed_executor_backend": "uni" if actor.tensor_parallel == 1 else "mp",
        "worker_cls": "actor.vllm_worker.AdapterWorker",
        "additional_config": {
            "horizon": {
                "rank": model.lora_rank,
                "scale": scale(model.lora_rank, model.lora_alpha, model.lora_variant),
                "targets": list(model.lora_targets),
            }
        },
    }
    if actor.num_sequences is not None:
        chosen["max_num_seqs"] = actor.num_sequences
    if not on_gpu:
        # Compilation takes minutes and gains little on a CPU. Chunked prefill would break reproducibility: vLLM samples
        # after each chunk, and cannot rewind a CPU's random generator, which has no offset.
        return chosen | {"enforce_eager": True, "enable_chunked_prefill": False}
    if not actor.eager:
        chosen["compilation_config"] = {"cudagraph_capture_sizes": graph_sizes(actor.num_sequences)}
    return chosen | options(actor)


def options(actor: ActorConfig) -> dict[str, Any]:
    """The arguments of vllm.LLM that divide a GPU's memory. vLLM's default holds for what the plan has not set."""
    chosen: dict[str, Any] = {
        "enforce_eager": actor.eager,
        "max_num_batched_tokens": max(PREFILL_TOKENS, actor.num_sequences or 0),
    }
    if actor.gpu_memory_fraction is not None:
        chosen["gpu_memory_utilization"] = actor.gpu_memory_fraction
    if actor.kv_cache_gib is not None:  # vLLM then only checks at start-up that its share is free
        chosen["kv_cache_memory_bytes"] = round(actor.kv_cache_gib * 2**30)
    return chosen


def graph_sizes(num_sequences: int | None) -> list[int]:
    """Decode batch sizes to capture CUDA graphs for, with at most `num_sequences` concurrent sequences.

    The largest size is that number itself. vLLM uses no graph larger than the number: with 20 sequences and a graph of
    32, batches of 17 to 20 would decode without a graph.
    """
    return sorted({min(size, num_sequences or size) for size in GRAPH_SIZES})


def environment(actor: ActorConfig, *, on_gpu: bool) -> dict[str, str]:
    """Environment variables of the engine's process. vLLM reads them when it starts, not when it is imported."""
    chosen = {
        "VLLM_NO_USAGE_STATS": "1",
        # The scheduler stays in this process. All requests of a call are then queued before its first step, so
        # equal calls make equal batches; no process can outlive the actor; none polls while the engine is idle.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # The engine has no peer on another machine. By default vLLM looks up an address, which may be unreachable.
        "VLLM_HOST_IP": "127.0.0.1",
    }
    if not on_gpu:
        chosen["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(actor.kv_cache_gib or 1))  # vLLM takes whole GiB only
        if actor.tensor_parallel > 1:  # its processes share out the processors; vLLM would want a NUMA node for each
            threads = max(1, len(os.sched_getaffinity(0)) // actor.tensor_parallel)
            chosen |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads)}
        return chosen
    # FlashInfer's sampler supports neither seeds nor processed log-probabilities, which all our requests need; vLLM's
    # check whether it is available may compile it.
    return chosen | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
