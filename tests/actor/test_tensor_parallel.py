"""An engine spread over two processes computes what transformers and PEFT compute, and leaves none of them behind."""

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from engine_oracle import ALPHA, RANK, make_adapter, peft_score, score
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.config import ActorConfig, ModelConfig
from launch.planning import model_folder

pytestmark = pytest.mark.slow

V = 97
TOKENS = np.random.default_rng(0).integers(V, size=60)

_engine: Any = None  # set in the engine's process


def _start(folder: str) -> None:
    from actor.vllm_engine import VLLMEngine

    global _engine
    model = ModelConfig(dtype="float32", lora_rank=RANK, lora_alpha=ALPHA, max_length=256)
    _engine = VLLMEngine(folder, model, ActorConfig(tensor_parallel=2), seed=1)


def _call(method: str, *arguments: Any, **options: Any) -> Any:
    return getattr(_engine, method)(*arguments, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four query heads, and two of keys and values: a pair and one for each rank."""
    path: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=128,  # 32 for each head, the least that vLLM's attention on a CPU computes
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(model_folder.smollm2()).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def engine(folder: str) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_start, initargs=(folder,)
    )
    yield pool
    pool.shutdown()


def test_two_processes_compute_what_peft_computes_and_end_with_their_owner(
    engine: ProcessPoolExecutor, folder: str
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    owner = psutil.Process(engine.submit(os.getpid).result())
    workers = [child for child in owner.children(recursive=True) if "Worker" in child.name()]
    assert len(workers) == 2

    base = engine.submit(_call, "logprobs", TOKENS.tolist()).result()
    np.testing.assert_allclose(base, *score(reference, TOKENS, 1.0), atol=2e-4)
    for version, scale in ((1, 0.3), (2, 0.1)):
        adapter = make_adapter(reference, version, scale=scale, dtype="float32")
        assert engine.submit(_call, "load", adapter).result() == adapter.checksum
        expected = peft_score(reference, adapter, TOKENS)
        assert np.abs(expected - base).mean() > 0.1
        np.testing.assert_allclose(engine.submit(_call, "logprobs", TOKENS.tolist()).result(), expected, atol=5e-4)

    options = {"num_samples": 2, "temperature": 1.0, "max_tokens": 8, "stop": (), "seeds": [5]}
    [samples] = engine.submit(_call, "sample", [TOKENS[:10].tolist()], **options).result()
    for sample in samples:  # drawn with the last version
        whole = np.append(TOKENS[:10], sample.token_ids)
        np.testing.assert_allclose(sample.logprobs, peft_score(reference, adapter, whole)[9:], atol=5e-4)

    owner.send_signal(signal.SIGKILL)
    with pytest.raises(BrokenProcessPool):
        engine.submit(os.getpid).result()
    deadline = time.monotonic() + 20
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline, "vLLM's processes outlive the one that started them"
        time.sleep(0.1)
