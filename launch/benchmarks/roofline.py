"""The roofline of a step, a lower bound of its time on this machine: counted work over measured rates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from common.config import ModelConfig
from common.types import Group
from launch.benchmarks.head import timed
from launch.planning.memory import Size

REPEATS = 5  # of each measurement, after a warm-up; the fastest counts
WIDTH = {"cpu": 2048, "cuda": 8192}  # of the square matrices of the measured matmul
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Rates of the device that samples and learns."""

    operations_per_second: float  # of a large matmul in the model's dtype
    bytes_per_second: float  # read and written by a large copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes from which the work is counted."""

    trunk_parameters: int  # of the linear layers below the head
    head_parameters: int
    adapter_parameters: int
    attention_width: int  # layers * query heads * size of a head
    weight_bytes: int  # read by each decode step
    kv_token_bytes: int  # of the KV cache per token, over all layers


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Measure the device for a second or two; nothing else may run on it."""
    width, copied = WIDTH[device.type], COPIED_BYTES[device.type]
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))  # ones draw less power
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(
        operations_per_second=2 * width**3 / _fastest(lambda: left @ right),
        bytes_per_second=2 * copied / _fastest(lambda: target.copy_(source)),
    )


def _fastest(call: Callable[[], object]) -> float:
    call()
    return min(timed(call) for _ in range(REPEATS))


def shape(config: PretrainedConfig, model: ModelConfig) -> Shape:
    """The sizes of a model of any architecture, counted on its modules."""
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    head = whole.get_output_embeddings()
    linear = [m for m in whole.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    trunk = sum(module.weight.numel() for module in linear)
    size = Size.of(whole, model)
    item_bytes = torch.finfo(getattr(torch, model.dtype)).bits // 8
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        trunk_parameters=trunk,
        head_parameters=head.weight.numel(),
        adapter_parameters=size.num_adapter_parameters,
        attention_width=text.num_hidden_layers * heads * head_size,
        weight_bytes=(trunk + head.weight.numel()) * item_bytes,
        kv_token_bytes=size.kv_elements * item_bytes,
    )


def rollout_seconds(groups: Sequence[Group], shape: Shape, rates: Rates) -> float:
    """Each prompt is prefilled once, and all rollouts are decoded concurrently, bound by operations or by bytes.

    A decode step reads every weight once, and the KV cache of each rollout.
    """
    prefill = sum(
        2 * shape.trunk_parameters * prompt + 4 * shape.attention_width * _triangle(prompt)
        for prompt, _ in map(_lengths, groups)
    )
    rollouts = [(prompt, length) for prompt, lengths in map(_lengths, groups) for length in lengths]
    seen = sum(prompt * length + _triangle(length) for prompt, length in rollouts)
    tokens = sum(length for _, length in rollouts)
    operations = 2 * (shape.trunk_parameters + shape.head_parameters) * tokens + 4 * shape.attention_width * seen
    passes = max(length for _, length in rollouts) - 1  # the prefill samples the first token
    moved = passes * shape.weight_bytes + seen * shape.kv_token_bytes
    return prefill / rates.operations_per_second + max(
        operations / rates.operations_per_second, moved / rates.bytes_per_second
    )


def learn_seconds(groups: Sequence[Group], shape: Shape, rates: Rates, *, reference: bool) -> float:
    """Forward, backward to the adapter, and the reference pass if there is one; a group's prompt is computed once.

    Operations per token and weight: a frozen weight takes 2 forward and 2 backward (it has no gradient), an adapter's
    weight 2 and 4, and the head's weights 4 in all, for scored tokens alone (learner/head).
    """
    tokens = sum(prompt + sum(lengths) for prompt, lengths in map(_lengths, groups))
    scored = sum(sum(lengths) for _, lengths in map(_lengths, groups))
    pairs = sum(
        _triangle(prompt) + sum(prompt * length + _triangle(length) for length in lengths)
        for prompt, lengths in map(_lengths, groups)
    )
    forward = 2 * shape.trunk_parameters * tokens + 4 * shape.attention_width * pairs
    backward = forward + 4 * shape.attention_width * pairs  # the backward of attention has twice the matmuls
    head = 4 * shape.head_parameters * scored
    adapter = 6 * shape.adapter_parameters * tokens
    reference_pass = (forward + 2 * shape.head_parameters * scored) if reference else 0
    return (forward + backward + head + adapter + reference_pass) / rates.operations_per_second


def _lengths(group: Group) -> tuple[int, list[int]]:
    """Tokens of the prompt, and of each completion."""
    return group.rollouts[0].num_prompt_tokens, [rollout.num_completion_tokens for rollout in group.rollouts]


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
