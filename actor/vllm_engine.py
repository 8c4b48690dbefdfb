"""The vLLM engine: samples, scores, and takes new adapter versions in memory. The only file that imports vllm.

A version is published in one of two ways (actor.publish), or, with auto, in the cheaper one (actor/publishing.py):
hotswap  as a LoRA adapter beside the frozen weights: cheap to publish, slower to sample with;
merged   W = W0 + alpha / rank * B A, from the frozen W0 every time: slower to publish, samples at base speed.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

# Read while the libraries below are loaded. On a CPU, OpenMP threads that wait by spinning take the cores from the
# learner and from each other (7 times slower with other load); in a process that has torch already, set it earlier.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import safetensors
import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.config.lora import MaxLoRARanks
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from actor import gpu_share
from actor.engine import Sample
from actor.publishing import Trial
from actor.samples import chosen, likeliest
from common.adapter import Adapter, checksum
from common.config import ActorConfig, ModelConfig
from common.types import UserError

PEFT_PREFIX = "base_model.model."
LORA_A = ".lora_A.weight"
LORA_B = ".lora_B.weight"


class VLLMEngine:
    """actor.engine.Engine on vLLM. Scheduler and model run in the process that owns it; there is no other."""

    def __init__(self, model_dir: str, model: ModelConfig, actor: ActorConfig, *, seed: int) -> None:
        """Start vLLM on the model folder `model_dir` with the frozen weights, as adapter version 0 would sample."""
        assert model.dtype != "auto", "the plan has resolved it"
        self._trial = Trial() if actor.publish == "auto" else Trial([actor.publish])
        self.way = ""  # of the version in use; none yet
        self._lora_request: LoRARequest | None = None
        self._llm = LLM(
            model=model_dir,
            dtype=model.dtype,
            max_model_len=model.max_length,
            seed=seed,
            enable_prefix_caching=True,
            use_tqdm_on_load=False,
            logprobs_mode="processed_logprobs",  # after the temperature
            max_logprobs=-1,  # first_tokens says how many
            worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__qualname__}",
            **_device_options(actor),
            **(_lora_options(model) if actor.publish != "merged" else {}),
        )

    def load(self, adapter: Adapter) -> str:
        """See Engine.load. Raises ValueError for a tensor that belongs to no linear module of the model."""
        before, self.way = self.way, self._trial.next_way()
        if (before, self.way) == ("merged", "hotswap"):
            self._llm.collective_rpc("merge_adapter", args=({}, adapter.rank, adapter.alpha))  # back to the base
        started = time.perf_counter()
        arguments: tuple[Any, ...] = (dict(adapter.tensors), adapter.rank, adapter.alpha)
        if self.way == "hotswap":
            lora_id = adapter.version + 1  # ids start at 1; a new one for each version, since vLLM caches by id
            received = self._llm.collective_rpc("swap_adapter", args=(lora_id, *arguments))
            self._lora_request = LoRARequest(f"version-{adapter.version}", lora_id, "in-memory")
        else:
            received = self._llm.collective_rpc("merge_adapter", args=arguments)
            self._lora_request = None
        self._trial.loaded(self.way, time.perf_counter() - started)
        return received[0]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        num_samples: int,
        temperature: float,
        max_tokens: int,
        stop: Sequence[str],
        seeds: Sequence[int],
        fixed_length: bool = False,
        finished: Callable[[int, list[Sample]], None] = lambda place, samples: None,
    ) -> list[list[Sample]]:
        """See Engine.sample. A completion that reaches model.max_length ends there, with finish_reason "length"."""
        self._forget_prefixes()
        parameters = [
            SamplingParams(
                n=num_samples,
                temperature=temperature,
                max_tokens=max_tokens,
                stop=[] if fixed_length else list(stop),
                include_stop_str_in_output=True,
                ignore_eos=fixed_length,
                seed=_spread(seed),
                logprobs=0,  # of the sampled token alone
                output_kind=RequestOutputKind.FINAL_ONLY,  # of a prompt: once all of its samples have ended
            )
            for seed in seeds
        ]
        started = time.perf_counter()
        engine = self._llm.llm_engine
        for place, (prompt, each) in enumerate(zip(prompts, parameters, strict=True)):
            engine.add_request(str(place), _request(prompt), each, lora_request=self._lora_request)
        samples: list[list[Sample]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            for output in engine.step():
                place = int(output.request_id)
                samples[place] = [_sample(completion) for completion in output.outputs]
                finished(place, samples[place])
        num_tokens = sum(len(sample.token_ids) for group in samples for sample in group)
        self._trial.sampled(self.way, time.perf_counter() - started, num_tokens)
        return samples

    def first_tokens(
        self, prompts: Sequence[Sequence[int]], *, count: int, temperature: float, without: Sequence[int]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """See Engine.first_tokens."""
        self._forget_prefixes()
        parameters = SamplingParams(
            temperature=temperature, max_tokens=1, seed=0, logprobs=count + len(without), detokenize=False
        )
        outputs = self._llm.generate(
            [_request(prompt) for prompt in prompts], parameters, use_tqdm=False, lora_request=self._lora_request
        )
        return [likeliest(output.outputs[0].logprobs[0], count, without) for output in outputs]

    def _forget_prefixes(self) -> None:
        # Every call starts with an empty prefix cache: what an older version left in it is never read, and an equal
        # call computes the same again (reading what the first one cached, it would round and so sample otherwise).
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache: requests are still running")

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """See Engine.logprobs. T is at most model.max_length - 1, since vLLM must sample one token more."""
        # vLLM reads no prefix cache for a request with prompt log-probabilities: all T tokens are computed.
        parameters = SamplingParams(temperature=1.0, max_tokens=1, seed=0, prompt_logprobs=0, detokenize=False)
        [output] = self._llm.generate(
            [_request(token_ids)], [parameters], use_tqdm=False, lora_request=self._lora_request
        )
        return chosen(token_ids[1:], output.prompt_logprobs[1:])

    def close(self) -> None:
        """Free the engine's memory. It has no process of its own."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()


class WorkerExtension:
    """What vLLM's worker can do beside its own methods; reached by collective_rpc, in the process of the model."""

    model_runner: Any  # of vLLM's Worker, which this class is mixed into
    model_config: Any

    def swap_adapter(self, lora_id: int, arrays: Mapping[str, np.ndarray], rank: int, alpha: float) -> str:
        """Hold the adapter `arrays` under `lora_id`, and no other; returns its checksum."""
        manager = self.model_runner.lora_manager._adapter_manager
        for projection in _projections(arrays):
            _locate(manager.model, projection)
        adapter = LoRAModel.from_lora_tensors(
            lora_id,
            {name: torch.tensor(array) for name, array in arrays.items()},
            PEFTHelper(r=rank, lora_alpha=alpha, target_modules=[]),
            device="cpu",  # activate_adapter copies it to the device
            dtype=manager.lora_config.lora_dtype,
        )
        manager.remove_all_adapters()  # also one of the same id, which add_adapter would keep in place of the new one
        manager.add_adapter(adapter)
        manager.activate_adapter(lora_id)
        return checksum(arrays)

    def merge_adapter(self, arrays: Mapping[str, np.ndarray], rank: int, alpha: float) -> str:
        """Compute every weight from the frozen one and the adapter `arrays`; returns the checksum of these."""
        model = self.model_runner.get_model()
        # What an earlier version changed is set again too: its projections may be none of this adapter's.
        self._merged_layers.update(_locate(model, projection) for projection in _projections(arrays))
        for layer, projections in self._merged_layers.items():
            weights = [self._merge(projection, arrays, alpha / rank) for projection in projections]
            _set_weight(model.get_submodule(layer), torch.cat(weights))
        return checksum(arrays)

    def _merge(self, projection: str, arrays: Mapping[str, np.ndarray], scale: float) -> torch.Tensor:
        frozen = self._frozen_weight(projection)
        if f"{PEFT_PREFIX}{projection}{LORA_A}" not in arrays:
            return frozen
        lora_a, lora_b = (  # rounded as the learner rounds them at use
            torch.tensor(arrays[f"{PEFT_PREFIX}{projection}{suffix}"], device=frozen.device, dtype=frozen.dtype)
            for suffix in (LORA_A, LORA_B)
        )
        return torch.addmm(frozen, lora_b, lora_a, alpha=scale)

    @cached_property
    def _merged_layers(self) -> dict[str, tuple[str, ...]]:
        return {}  # vLLM's layer -> the projections that it computes, for every layer that was ever merged

    @cached_property
    def _frozen_weights(self) -> dict[str, torch.Tensor]:
        return {}

    def _frozen_weight(self, projection: str) -> torch.Tensor:
        """The checkpoint's own weight, kept on the device. On a CPU it is the mapped file, which costs no memory."""
        if projection not in self._frozen_weights:
            name = f"{projection}.weight"
            frozen = self._checkpoint[name].get_tensor(name)
            device = self.model_runner.device
            self._frozen_weights[projection] = frozen.to(device=device, dtype=self.model_config.dtype)
        return self._frozen_weights[projection]

    @cached_property
    def _checkpoint(self) -> dict[str, Any]:
        files = [safetensors.safe_open(file, "pt") for file in Path(self.model_config.model).glob("*.safetensors")]
        return {name: file for file in files for name in list(file.keys())}


def _set_weight(layer: Any, weight: torch.Tensor) -> None:
    layer = getattr(layer, "base_layer", layer)  # in an engine that can also hold an adapter beside it
    if current_platform.is_cpu():  # computes with a packed copy, made here; the parameter itself is empty
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    else:
        assert layer.weight.shape == weight.shape
        layer.weight.data.copy_(weight)  # in place: CUDA graphs hold its address


def _projections(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """model.layers.0.self_attn.q_proj and so on, once each."""
    return [name.removeprefix(PEFT_PREFIX).removesuffix(LORA_A) for name in arrays if name.endswith(LORA_A)]


def _locate(model: Any, projection: str) -> tuple[str, tuple[str, ...]]:
    """The name of vLLM's layer that computes `projection`, and all projections fused in it, in order."""
    parent, _, leaf = projection.rpartition(".")
    fused, leaves = leaf, [leaf]
    for name, parts in model.packed_modules_mapping.items():
        if leaf in parts:
            fused, leaves = name, parts
    layer = f"{parent}.{fused}"
    try:
        model.get_submodule(layer)
    except AttributeError:
        raise ValueError(f"the adapter's {projection} is no linear module of {type(model).__name__}") from None
    return layer, tuple(f"{parent}.{part}" for part in leaves)


def _device_options(actor: ActorConfig) -> dict[str, Any]:
    """vLLM's options for this machine; sets the process environment where vLLM reads nothing else."""
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # Scheduler and model stay in this process. All requests of a call are then queued before its first step, so that
    # equal calls make equal batches; nothing can outlive the owner; nothing polls while the engine is idle.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    options: dict[str, Any] = {"distributed_executor_backend": "uni"}
    if actor.num_sequences is not None:
        options["max_num_seqs"] = actor.num_sequences
    if not current_platform.is_cpu():
        return options | gpu_share.options(actor)
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(math.ceil(actor.kv_cache_gib or 1))  # it reads whole GiB
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray sets OMP_NUM_THREADS to 1
    # Compiling gains nothing here, and would keep old packed weights. Prompts are whole: vLLM cannot take back the draw
    # that follows a part of one, since a CPU's random generator has no offset.
    return options | {"enforce_eager": True, "enable_chunked_prefill": False}


def _lora_options(model: ModelConfig) -> dict[str, Any]:
    allowed = [rank for rank in get_args(MaxLoRARanks) if rank >= model.lora_rank]
    if not allowed:
        raise UserError(f"model.lora_rank={model.lora_rank} is more than vLLM swaps; lower it or set publish=merged")
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(allowed)}


def _request(token_ids: Sequence[int]) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=np.asarray(token_ids).tolist())


def _spread(seed: int) -> int:
    """A seed far from those of `seed` + 1, + 2, ...: vLLM gives the i-th sample of a request the seed plus i."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 2)


def _sample(completion: CompletionOutput) -> Sample:
    return Sample(
        token_ids=np.array(completion.token_ids, dtype=np.int32),
        logprobs=chosen(completion.token_ids, completion.logprobs),
        text=completion.text,
        finish_reason=completion.finish_reason,
    )
