"""A verified start: an engine with one incorrectly wired layer is caught by the random adapter."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from actor.actor import Actor, Receipt
from common.adapter import Adapter
from common.config import ActorConfig, Config, LearnerConfig, MethodConfig, ModelConfig
from launch.planning import model_folder
from launch.runtime.channel import PROBE_FRACTION, AdapterMismatch, check_probe
from learner.learner import PROBE_NATS, Learner

pytestmark = pytest.mark.slow

TEXT = "Question: Tom has 12 apples and buys 3 bags of 7 apples each. How many apples does he have?\nAnswer: 12 + 3 * 7"
_engine: Any = None  # set in the engine's process


def _start(folder: str) -> None:
    from actor.vllm_engine import VLLMEngine

    global _engine
    _engine = VLLMEngine(folder, ModelConfig(dtype="float32"), ActorConfig(), seed=1)


def _load(probe: Adapter, fault: str, layer: int) -> tuple[str, np.ndarray]:
    """Checksum and canary of an engine with a fault in one layer; the fault is removed afterwards."""
    checksum = _engine.load(probe)
    worker = _engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    adapted = {n: m for n, m in worker.model_runner.get_model().named_modules() if hasattr(m, "adapter_a")}
    kind, _, what = fault.partition(" ")
    same_kind = [m for n, m in adapted.items() if n.endswith(kind)]
    broken, other = same_kind[layer], same_kind[layer - 1]
    kept = broken.quant_method, broken.adapter_b, broken.quant_method.scale, broken.quant_method.packed
    rank = ModelConfig().lora_rank
    if what == "not wired":
        broken.quant_method = broken.quant_method.base
    elif what == "of another layer":
        broken.quant_method.pack(other)
    elif what == "swapped shards":
        broken.adapter_b = torch.nn.Parameter(broken.adapter_b.roll(rank, 0), requires_grad=False)
        broken.quant_method.pack(broken)
    elif what == "incorrect scale":
        broken.quant_method.scale *= 1.5
    logprobs = _engine.logprobs(probe.canary.token_ids.tolist())
    broken.quant_method, broken.adapter_b, broken.quant_method.scale, broken.quant_method.packed = kept[0], *kept[1:]
    return checksum, logprobs


@pytest.fixture(scope="module")
def folder() -> Path:
    return model_folder.smollm2()


@pytest.fixture(scope="module")
def probe(folder: Path) -> Adapter:
    canary = np.array(AutoTokenizer.from_pretrained(folder)(TEXT).input_ids, dtype=np.int32)
    config = Config(
        model=ModelConfig(dtype="float32"),
        method=MethodConfig(importance="none"),
        learner=LearnerConfig(recompute="none", micro_batch_tokens=1024),
    )
    learner = Learner(folder, config, canary)
    before, random_state = learner.adapter(), torch.get_rng_state()
    made = learner.probe()
    assert learner.adapter().checksum == before.checksum, "the learner's own weights are unchanged"
    assert torch.equal(torch.get_rng_state(), random_state), "a resumed run draws the same dropout"
    assert learner.probe().checksum == made.checksum
    return made


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        with ProcessPoolExecutor(1, mp_context=spawn, initializer=_start, initargs=(str(folder),)) as pool:
            yield pool


def receipt(engine: ProcessPoolExecutor, probe: Adapter, fault: str, layer: int) -> Receipt:
    checksum, logprobs = engine.submit(_load, probe, fault, layer).result()
    return Receipt(version=probe.version, checksum=checksum, canary_logprobs=logprobs, load_seconds=0.0)


def _prefix_differences(probe: Adapter, base: Adapter, forgets: bool) -> list[float]:
    """Actor.prefix_difference under two adapters, with or without emptying the prefix cache between them."""
    _engine._forget_prefixes()
    actor, forget = SimpleNamespace(engine=_engine, max_length=1024), type(_engine)._forget_prefixes
    if not forgets:
        type(_engine)._forget_prefixes = lambda self: None
    try:
        differences = []
        for adapter in (base, probe):
            _engine.load(adapter)
            differences.append(Actor.prefix_difference(actor, probe.canary.token_ids))
        return differences
    finally:
        type(_engine)._forget_prefixes = forget


def test_a_stale_prefix_is_found(engine, probe) -> None:
    base = replace(probe, values=np.zeros_like(probe.values))
    moved = np.abs(probe.canary.logprobs - probe.canary.base_logprobs).mean()
    correct = engine.submit(_prefix_differences, probe, base, True).result()
    assert max(correct) < PROBE_FRACTION["float32"] * moved / 10
    fresh, stale = engine.submit(_prefix_differences, probe, base, False).result()
    assert fresh < PROBE_FRACTION["float32"] * moved < stale


def test_the_random_adapter_is_strong_and_a_correct_engine_computes_it(engine, probe) -> None:
    moved = np.abs(probe.canary.logprobs - probe.canary.base_logprobs).mean()
    assert PROBE_NATS <= moved < 20
    correct = receipt(engine, probe, "qkv_proj correct", 0)
    check_probe(probe, correct)
    assert np.abs(correct.canary_logprobs - probe.canary.logprobs).mean() < PROBE_FRACTION["float32"] * moved / 10


@pytest.mark.parametrize("layer", [1, 29])
@pytest.mark.parametrize(
    "fault",
    [
        *(f"{kind} not wired" for kind in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        *(f"{kind} of another layer" for kind in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
        *(f"{kind} swapped shards" for kind in ("qkv_proj", "gate_up_proj")),
        *(f"{kind} incorrect scale" for kind in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    ],
)
def test_a_fault_in_one_layer_is_caught(engine, probe, fault, layer) -> None:
    with pytest.raises(
        AdapterMismatch, match=r"an actor does not compute what the learner does: .* nats in the learner"
    ):
        check_probe(probe, receipt(engine, probe, fault, layer))
