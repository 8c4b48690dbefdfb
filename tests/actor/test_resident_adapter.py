"""Resident adapters compared with vLLM's own LoRA, and with the learner's log-probabilities at small updates."""

import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engine_oracle import ALL_TARGETS, ALPHA, RANK, make_adapter, peft_score
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from common.adapter import Adapter, tensors
from common.config import ActorConfig, ModelConfig
from launch.planning import model_folder
from learner.policy.policy import Policy

pytestmark = pytest.mark.long

TOKENS = np.random.default_rng(0).integers(0, 49_000, 200).astype(np.int32)


def _in_own_process(function: Any, *arguments: Any) -> Any:
    """Call `function` in a new process, since vLLM changes global state of torch."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _ours(folder: str, dtype: str, adapters: list[Adapter]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Log-probabilities of the base model, and with each adapter."""
    from actor.vllm_engine import VLLMEngine

    model = ModelConfig(dtype=dtype, lora_rank=adapters[0].rank, lora_alpha=adapters[0].alpha)
    engine = VLLMEngine(folder, model, ActorConfig(), seed=1)
    base, found = engine.logprobs(TOKENS.tolist()), []
    for adapter in adapters:
        assert engine.load(adapter) == adapter.checksum
        found.append(engine.logprobs(TOKENS.tolist()))
    return base, found


def _vllms_own(folder: str, dtype: str, adapter: str) -> np.ndarray:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        folder,
        dtype=dtype,
        max_model_len=512,
        enforce_eager=True,
        distributed_executor_backend="uni",
        enable_lora=True,
        max_loras=1,
        max_lora_rank=RANK,
    )
    [output] = llm.generate(
        [{"prompt_token_ids": TOKENS.tolist()}],
        SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=1.0),
        lora_request=LoRARequest("reference", 1, adapter),
    )
    chosen = zip(TOKENS.tolist()[1:], output.prompt_logprobs[1:], strict=True)
    return np.array([entry[token].logprob for token, entry in chosen])


@pytest.mark.parametrize(("dtype", "noise"), [("float32", 2e-4), ("bfloat16", 0.15)])
def test_they_are_no_worse_than_vllms_own_lora(tmp_path: Path, dtype: str, noise: float) -> None:
    folder = str(model_folder.smollm2())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapter = make_adapter(reference, 1, scale=0.02, dtype=dtype)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors(adapter).items()}, tmp_path / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(ALL_TARGETS)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    expected = peft_score(reference, adapter, TOKENS)
    base, [ours] = _in_own_process(_ours, folder, dtype, [adapter])
    theirs = _in_own_process(_vllms_own, folder, dtype, str(tmp_path))
    error, their_error = (float(np.abs(found - expected).mean()) for found in (ours, theirs))
    assert error < noise < np.abs(base - expected).mean()
    assert error <= 1.15 * their_error + 1e-6, "the two differ by more than rounding"


def test_the_actor_moves_as_the_learner_does() -> None:
    """In float32, with |B| from that after one step at the paper's learning rate to that after 30 steps at 2e-4.

    The learner differs from other implementations by 1e-5 nats per token, which limits the check of the smallest |B|.
    """
    folder = model_folder.smollm2()
    config = ModelConfig(dtype="float32")
    policy = Policy(folder, config, device=torch.device("cpu"), recompute="none", head_backend="torch")
    with policy.reference():
        base = policy.logprobs(TOKENS).astype(np.float64)
    adapters, moved = [], []
    for size in (5e-6, 4e-5, 4e-4, 3e-3):
        with policy.probed(size):
            adapters.append(policy.adapter(1, None))
            moved.append(policy.logprobs(TOKENS) - base)
    actors_base, found = _in_own_process(_ours, str(folder), "float32", adapters)
    for logprobs, learners in zip(found, moved, strict=True):
        actors = logprobs.astype(np.float64) - actors_base
        assert np.abs(actors - learners).mean() < 3e-5
        slope = actors @ learners / (learners @ learners)
        assert slope == pytest.approx(1, abs=1e-3 if np.abs(learners).mean() > 5e-4 else 2e-2)


def _rss_after(folder: str, dtype: str, adapters: list[Adapter], loads: int) -> tuple[int, int]:
    from actor.vllm_engine import VLLMEngine

    engine = VLLMEngine(folder, ModelConfig(dtype=dtype, lora_rank=RANK, lora_alpha=ALPHA), ActorConfig(), seed=1)
    sizes = []
    for count in (20, loads):
        for number in range(count):
            adapter = adapters[number % 2]
            assert engine.load(adapter) == adapter.checksum
        sizes.append(psutil.Process().memory_info().rss)
    return sizes[0], sizes[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_five_hundred_publishes_leave_the_memory_flat(dtype: str) -> None:
    folder = str(model_folder.smollm2())
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapters = [make_adapter(reference, version, scale=0.02, dtype=dtype) for version in (1, 2)]
    before, after = _in_own_process(_rss_after, folder, dtype, adapters, 500)
    assert after - before < 30 * 2**20, "an adapter is 5 or 10 MB"
