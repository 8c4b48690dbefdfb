"""vLLM as the actor's engine: samples with the adapter version that its worker holds (actor/vllm_worker.py)."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# The libraries imported below read these, so a process that has already imported torch must set them earlier. On a CPU,
# OpenMP threads that wait by spinning take the cores from the learner and from each other (7 times slower under load).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import numpy as np
import torch
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.outputs import CompletionOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from actor import gpu_share
from actor.engine import Sample
from common.adapter import Adapter
from common.config import ActorConfig, ModelConfig


class VLLMEngine:
    """actor.engine.Engine on vLLM. Scheduler and model run in the caller's process; vLLM starts no other.

    With actor.tensor_parallel the model runs in that many processes of vLLM, which end with the caller's.
    """

    def __init__(self, model_dir: str, model: ModelConfig, actor: ActorConfig, *, seed: int) -> None:
        """Start vLLM on the model folder `model_dir` with an adapter that changes nothing."""
        assert model.dtype != "auto", "the plan resolves model.dtype"
        on_gpu = not current_platform.is_cpu()
        os.environ.update(gpu_share.environment(actor, on_gpu=on_gpu))
        if not on_gpu:
            torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray sets OMP_NUM_THREADS to 1
        self._llm = LLM(**gpu_share.arguments(model_dir, model, actor, seed=seed, on_gpu=on_gpu))

    def load(self, adapter: Adapter) -> str:
        """See Engine.load. Raises ValueError for an adapter that does not fit the engine's buffers."""
        checksums = self._llm.collective_rpc(
            "write_adapter", args=(adapter.values, adapter.shapes, adapter.rank, adapter.scale, adapter.dtype)
        )
        return " and ".join(dict.fromkeys(checksums))  # of every tensor-parallel rank; one if they agree

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
        finished: Callable[[int, list[Sample]], None] = lambda index, samples: None,
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
                seed=_distant(seed),
                logprobs=0,  # only the sampled token's
                output_kind=RequestOutputKind.FINAL_ONLY,  # one output per prompt, once all of its samples have ended
            )
            for seed in seeds
        ]
        engine = self._llm.llm_engine
        for index, (prompt, each) in enumerate(zip(prompts, parameters, strict=True)):
            engine.add_request(str(index), _request(prompt), each)
        samples: list[list[Sample]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            for output in engine.step():
                index = int(output.request_id)
                samples[index] = [_sample(completion) for completion in output.outputs]
                finished(index, samples[index])
        return samples

    def first_tokens(
        self, prompts: Sequence[Sequence[int]], *, count: int, temperature: float, without: Sequence[int]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """See Engine.first_tokens."""
        self._forget_prefixes()
        parameters = SamplingParams(
            temperature=temperature, max_tokens=1, seed=0, logprobs=count + len(without), detokenize=False
        )
        outputs = self._llm.generate([_request(prompt) for prompt in prompts], parameters, use_tqdm=False)
        return [_most_likely(output.outputs[0].logprobs[0], count, without) for output in outputs]

    def _forget_prefixes(self) -> None:
        # Every call starts with an empty prefix cache. No call then reads what an older version cached, and a repeated
        # call gives the same samples (with cached prefixes it would round, and so sample, differently).
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache: requests are still running")

    def logprobs(self, token_ids: Sequence[int]) -> np.ndarray:
        """See Engine.logprobs. T is at most model.max_length - 1, since vLLM must sample one more token."""
        # vLLM reads no prefix cache for a request with prompt log-probabilities, so all T tokens are computed.
        parameters = SamplingParams(temperature=1.0, max_tokens=1, seed=0, prompt_logprobs=0, detokenize=False)
        [output] = self._llm.generate([_request(token_ids)], [parameters], use_tqdm=False)
        return _chosen(token_ids[1:], output.prompt_logprobs[1:])

    def close(self) -> None:
        """Free the engine's memory."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()


def _request(token_ids: Sequence[int]) -> TokensPrompt:
    return TokensPrompt(prompt_token_ids=np.asarray(token_ids).tolist())


def _distant(seed: int) -> int:
    """A seed far from those of `seed` + 1, + 2, ..., since vLLM gives the i-th sample of a request the seed plus i."""
    return int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 2)


def _sample(completion: CompletionOutput) -> Sample:
    return Sample(
        token_ids=np.array(completion.token_ids, dtype=np.int32),
        logprobs=_chosen(completion.token_ids, completion.logprobs),
        text=completion.text,
        finish_reason=completion.finish_reason,
    )


def _chosen(token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any]]) -> np.ndarray:
    """float32 [T]: log-probabilities of the tokens themselves, from vLLM's table of each position."""
    return np.array([entry[token].logprob for token, entry in zip(token_ids, logprobs, strict=True)], dtype=np.float32)


def _most_likely(logprobs: Mapping[int, Any], count: int, without: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """See Engine.first_tokens, for one prompt."""
    ranked = sorted((-entry.logprob, token) for token, entry in logprobs.items() if token not in without)[:count]
    return np.array([t for _, t in ranked], dtype=np.int32), np.array([-n for n, _ in ranked], dtype=np.float32)
