"""A tiny model of each family through plan, learner and engine: a verified start, and samples that PEFT scores alike.

Two families are tried by default, the others with -m long; all of them in one process that starts engine after engine.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_oracle import peft_score
from families import FAMILIES, WINDOW, save_model
from transformers import AutoModelForCausalLM

from actor.actor import Receipt
from actor.engine import Sample
from common.adapter import Adapter
from common.config import ActorConfig, Config, LearnerConfig, MethodConfig, ModelConfig
from launch.planning import plan
from launch.runtime.channel import check_probe
from learner.learner import Learner
from learner.policy.base import targets

pytestmark = pytest.mark.slow

BY_DEFAULT = ("gemma-3", "phi-4-mini")  # sliding layers and scaled embeddings; fused projections and a long rope
V = 97
TOKENS = np.random.default_rng(0).integers(V, size=100).astype(np.int32)
PROMPT = TOKENS[: WINDOW + 20]
CONFIG = Config(
    model=ModelConfig(dtype="float32", lora_rank=4, lora_alpha=12, lora_variant="rslora", max_length=256),
    actor=ActorConfig(max_tokens=64),
    method=MethodConfig(importance="none"),
    learner=LearnerConfig(recompute="none", micro_batch_tokens=1024),
)


def _in_engine(folder: str, model: ModelConfig, probe: Adapter) -> tuple[np.ndarray, Receipt, list[Sample]]:
    """Log-probabilities without adapter; what the engine holds and computes with it; samples with it."""
    from actor.vllm_engine import VLLMEngine

    engine = VLLMEngine(folder, model, CONFIG.actor, seed=1)
    try:
        base = engine.logprobs(TOKENS.tolist())
        checksum = engine.load(probe)
        logprobs = engine.logprobs(TOKENS.tolist())
        options = {"num_samples": 2, "temperature": 1.0, "max_tokens": 8, "stop": (), "seeds": [5]}
        [samples] = engine.sample([PROMPT.tolist()], fixed_length=True, **options)
    finally:
        engine.close()
    return base, Receipt(version=probe.version, checksum=checksum, canary_logprobs=logprobs, load_seconds=0.0), samples


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, since vLLM changes global state of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool


@pytest.mark.parametrize(
    "family", [family if family in BY_DEFAULT else pytest.param(family, marks=pytest.mark.long) for family in FAMILIES]
)
def test_actor_and_learner_agree_on_a_family(tmp_path: Path, process: ProcessPoolExecutor, family: str) -> None:
    folder = save_model(tmp_path, family, vocab_size=V)
    names = targets(plan.check_model(CONFIG, folder), CONFIG.model)
    model = CONFIG.model.model_copy(update={"lora_targets": names})
    probe = Learner(folder, CONFIG.model_copy(update={"model": model}), TOKENS).probe()
    assert probe.canary is not None
    assert np.abs(probe.canary.logprobs - probe.canary.base_logprobs).mean() > 0.5

    base, receipt, samples = process.submit(_in_engine, str(folder), model, probe).result()
    np.testing.assert_allclose(base, probe.canary.base_logprobs, atol=1e-4)
    check_probe(probe, receipt)
    assert receipt.canary_logprobs is not None
    np.testing.assert_allclose(receipt.canary_logprobs, probe.canary.logprobs, atol=2e-3)

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert len({sample.token_ids.tobytes() for sample in samples}) == 2
    for sample in samples:
        expected = peft_score(reference, probe, np.append(PROMPT, sample.token_ids))[len(PROMPT) - 1 :]
        np.testing.assert_allclose(sample.logprobs, expected, atol=2e-3)
