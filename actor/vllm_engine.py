"""vLLM as the actor's engine: samples with the adapter version that its worker holds (actor/vllm_worker.py)."""

import os
from collections.abc import Callable, Sequence

# Read while the libraries below are loaded. On a CPU, OpenMP threads that wait by spinning take the cores from the
# learner and from each other (7 times slower with other load); in a process that has torch already, set it earlier.
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
from actor.samples import chosen, likeliest
from common.adapter import Adapter
from common.config import ActorConfig, ModelConfig


class VLLMEngine:
    """actor.engine.Engine on vLLM. Scheduler and model run in the process that owns it; there is no other."""

    def __init__(self, model_dir: str, model: ModelConfig, actor: ActorConfig, *, seed: int) -> None:
        """Start vLLM on the model folder `model_dir` with the frozen weights, as adapter version 0 would sample."""
        assert model.dtype != "auto", "the plan has resolved it"
        on_gpu = not current_platform.is_cpu()
        os.environ.update(gpu_share.environment(actor, on_gpu=on_gpu))
        if not on_gpu:
            torch.set_num_threads(len(os.sched_getaffinity(0)))  # Ray sets OMP_NUM_THREADS to 1
        self._llm = LLM(**gpu_share.arguments(model_dir, model, actor, seed=seed, on_gpu=on_gpu))

    def load(self, adapter: Adapter) -> str:
        """See Engine.load. Raises ValueError for an adapter that the engine is not made for."""
        [checksum] = self._llm.collective_rpc(
            "write_adapter", args=(adapter.values, adapter.shapes, adapter.rank, adapter.alpha, adapter.dtype)
        )
        return checksum

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
        engine = self._llm.llm_engine
        for place, (prompt, each) in enumerate(zip(prompts, parameters, strict=True)):
            engine.add_request(str(place), _request(prompt), each)
        samples: list[list[Sample]] = [[] for _ in prompts]
        while engine.has_unfinished_requests():
            for output in engine.step():
                place = int(output.request_id)
                samples[place] = [_sample(completion) for completion in output.outputs]
                finished(place, samples[place])
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
        [output] = self._llm.generate([_request(token_ids)], [parameters], use_tqdm=False)
        return chosen(token_ids[1:], output.prompt_logprobs[1:])

    def close(self) -> None:
        """Free the engine's memory. It has no process of its own."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        cleanup_dist_env_and_memory()


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
