"""The memory measured without data, against what real models on the CPU keep."""

from pathlib import Path

import psutil
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from common.config import ModelConfig
from learner.policy import activations
from learner.policy.activations import measure, observe, scored_everywhere
from learner.policy.policy import Policy

LENGTHS = ((30, 20, 17, 25), (12, 40))
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
MODES = ("none", "layer", "micro-batch")
CPU, META = torch.device("cpu"), torch.device("meta")


def shape(layers: int = 3, architecture: type = LlamaConfig) -> LlamaConfig:
    return architecture(**SHAPE, num_hidden_layers=layers)


def settings(dtype: str = "bfloat16", dropout: float = 0.1) -> ModelConfig:
    return ModelConfig(dtype=dtype, lora_rank=4, lora_alpha=8, lora_dropout=dropout)


def real_policy(folder: Path, config: ModelConfig, recompute: str, device: torch.device = CPU) -> Policy:
    LlamaForCausalLM(shape()).save_pretrained(folder)
    return Policy(folder, config, device=device, recompute=recompute, head_backend="torch")


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_real_model_keeps_what_was_measured_without_data(tmp_path, dtype, dropout, recompute) -> None:
    config = settings(dtype, dropout)
    measured = measure(shape(), config, lengths=LENGTHS, recompute=recompute, gpu=False)
    assert measured == observe(real_policy(tmp_path, config, recompute), LENGTHS)


def saved_bytes(policy: Policy) -> int:
    """Bytes of the tensors that autograd saves in one pass, each storage counted once, without the weights."""
    storages = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = policy.scored_states(scored_everywhere(LENGTHS, policy.device)).sum()
    own = {tensor.untyped_storage()._cdata for tensor in policy.peft_model.state_dict().values()}
    own |= {tensor.untyped_storage()._cdata for tensor in policy.peft_model.buffers()}
    kept = sum(storage.nbytes() for address, storage in storages.items() if address not in own)
    loss.backward()
    return kept


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_kept_is_what_autograd_saves(tmp_path, dtype, dropout) -> None:
    config = settings(dtype, dropout)
    kept = measure(shape(), config, lengths=LENGTHS, recompute="none", gpu=False).kept
    assert kept == pytest.approx(saved_bytes(real_policy(tmp_path, config, "none")), rel=0.02)
    without_data = Policy(shape(), config, device=META, recompute="none", head_backend="torch")
    kept = measure(shape(), config, lengths=LENGTHS, recompute="none", gpu=True).kept
    assert kept == pytest.approx(saved_bytes(without_data), rel=0.02)


@pytest.mark.parametrize("recompute", MODES)
def test_the_peak_is_that_of_the_allocator(tmp_path, recompute) -> None:
    policy = real_policy(tmp_path, settings(), recompute)
    observed = observe(policy, LENGTHS)  # leaves gradients, which are not counted
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        policy.scored_states(scored_everywhere(LENGTHS, CPU)).sum().backward()
    live = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak == pytest.approx(observed.peak, rel=0.15)  # attention kernels take scratch memory too


@pytest.mark.parametrize("recompute", MODES)
@pytest.mark.parametrize("gpu", [False, True])
def test_six_layers_keep_what_three_predict(monkeypatch, recompute, gpu) -> None:
    extended = measure(shape(6), settings(), lengths=LENGTHS, recompute=recompute, gpu=gpu)
    monkeypatch.setattr(activations, "MORE", 6)
    whole = measure(shape(6), settings(), lengths=LENGTHS, recompute=recompute, gpu=gpu)
    assert extended.kept == whole.kept
    assert extended.peak == pytest.approx(whole.peak, rel=0.01)


@pytest.mark.parametrize("gpu", [False, True])
def test_activation_checkpointing_keeps_less(gpu) -> None:
    none, layer, whole = (measure(shape(6), settings(), lengths=LENGTHS, recompute=mode, gpu=gpu) for mode in MODES)
    assert whole.kept < layer.kept < none.kept
    assert layer.peak < none.peak


@pytest.mark.parametrize("architecture", [Qwen2Config, Qwen3Config, MistralConfig, Gemma3TextConfig])
@pytest.mark.parametrize("recompute", MODES)
def test_any_architecture_can_be_measured(tmp_path, architecture, recompute) -> None:
    model = shape(3, architecture)
    measured = measure(model, settings(), lengths=LENGTHS, recompute=recompute, gpu=False)
    AutoModelForCausalLM.from_config(model).save_pretrained(tmp_path)
    policy = Policy(tmp_path, settings(), device=CPU, recompute=recompute, head_backend="torch")
    assert measured == observe(policy, LENGTHS)
    on_gpu = measure(model, settings(), lengths=LENGTHS, recompute=recompute, gpu=True)
    assert 0 < on_gpu.kept <= measured.kept, "a CPU also keeps attention masks"


def test_a_large_model_is_measured_without_its_memory() -> None:
    large = Qwen2Config(hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64)
    before = psutil.Process().memory_info().rss
    measured = measure(large, settings(), lengths=[[4096, 4096]], recompute="none", gpu=True)
    assert measured.kept > 100 * 2**30
    assert psutil.Process().memory_info().rss - before < 2**30
