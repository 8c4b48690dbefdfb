"""The rooflines of a step: counted by hand on a small shape, and on modules that really compute."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from common.config import ModelConfig
from launch.benchmarks import roofline
from launch.benchmarks.roofline import Rates, Shape

SHAPE = Shape(
    trunk_parameters=100,
    head_parameters=30,
    adapter_parameters=10,
    attention_width=5,
    weight_bytes=1000,
    kv_token_bytes=7,
)
GROUPS = [tiny.group(1, [2, 3], [0.0, 1.0], prompt_length=4), tiny.group(2, [1], [0.0], prompt_length=2)]
TOKENS, SCORED, PREFILLED = 4 + 2 + 3 + 2 + 1, 6, 6
PAIRS_OF_PROMPTS = 10 + 3  # 4 + 3 + 2 + 1, and 2 + 1
PAIRS_OF_ROLLOUTS = (4 + 1) + (4 + 2) + (4 + 1) + (4 + 2) + (4 + 3) + (2 + 1)  # what each completion token sees


def test_sampling_by_bytes_by_hand():
    rates = Rates(operations_per_second=1e9, bytes_per_second=10.0)
    prefill = 2 * 100 * PREFILLED + 4 * 5 * PAIRS_OF_PROMPTS
    moved = 2 * 1000 + PAIRS_OF_ROLLOUTS * 7  # the longest has 3 tokens, the first out of the prefill
    assert roofline.rollout_seconds(GROUPS, SHAPE, rates) == pytest.approx(prefill / 1e9 + moved / 10)


def test_sampling_by_operations_by_hand():
    rates = Rates(operations_per_second=10.0, bytes_per_second=1e9)
    prefill = 2 * 100 * PREFILLED + 4 * 5 * PAIRS_OF_PROMPTS
    decode = 2 * 130 * SCORED + 4 * 5 * PAIRS_OF_ROLLOUTS
    assert roofline.rollout_seconds(GROUPS, SHAPE, rates) == pytest.approx((prefill + decode) / 10)


@pytest.mark.parametrize("reference", [False, True])
def test_learning_by_hand(reference):
    rates = Rates(operations_per_second=1.0, bytes_per_second=1.0)
    attention = 4 * 5 * (PAIRS_OF_PROMPTS + PAIRS_OF_ROLLOUTS)
    forward, backward = 2 * 100 * TOKENS + attention, 2 * 100 * TOKENS + 2 * attention
    expected = forward + backward + 6 * 10 * TOKENS + 4 * 30 * SCORED
    if reference:
        expected += forward + 2 * 30 * SCORED
    assert roofline.learn_seconds(GROUPS, SHAPE, rates, reference=reference) == pytest.approx(expected)


def test_a_shape_counts_what_a_model_computes(tmp_path):
    """Against torch's own count of operations, and the weights of the real modules."""
    folder = tiny.save_model(tmp_path)
    config = AutoConfig.from_pretrained(folder)
    shape = roofline.shape(config, ModelConfig(dtype="bfloat16", lora_rank=4))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    length = 7
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(length)[None])
    computed = 2 * (shape.trunk_parameters + shape.head_parameters) * length + 4 * shape.attention_width * length**2
    assert counter.get_total_flops() == computed  # eager computes the masked pairs too
    assert shape.head_parameters == tiny.V * 32
    assert shape.kv_token_bytes == 2 * 2 * 2 * 8 * 2  # key and value, layers, heads, their size, bytes
    assert shape.weight_bytes == 2 * (shape.trunk_parameters + shape.head_parameters)
    inputs = {"gate_proj": 32, "up_proj": 32, "down_proj": 48} | dict.fromkeys(
        ("q_proj", "k_proj", "v_proj", "o_proj"), 32
    )
    outputs = {"gate_proj": 48, "up_proj": 48, "down_proj": 32, "q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32}
    assert shape.adapter_parameters == 2 * 4 * sum(inputs[name] + outputs[name] for name in inputs)
