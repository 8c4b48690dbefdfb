"""The least time a step can take on this machine: rates that are measured, over work that is counted."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from common.config import ModelConfig
from common.types import Group
from launch.planning.memory import Size

REPEATS = 5  # of each measurement, after one that warms up; the best counts
WIDTH = {"cpu": 2048, "cuda": 8192}  # of the square matrices that the rate is measured with
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Of the device that samples and learns."""

    operations_per_second: float  # of a large matrix product in the model's dtype
    bytes_per_second: float  # read and written by a large copy


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the work is counted from."""

    trunk_parameters: int  # of the linear layers below the head
    head_parameters: int
    adapter_parameters: int
    attention_width: int  # layers * query heads * size of a head
    weight_bytes: int  # read for each decoded token of a batch
    kv_token_bytes: int  # of the cache, over all layers


def measure_rates(dtype: torch.dtype, device: torch.device) -> Rates:
    """Takes a second or two; nothing else may run on the device."""
    width, copied = WIDTH[device.type], COPIED_BYTES[device.type]
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))  # ones draw less power
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(
        operations_per_second=2 * width**3 / _best(lambda: left @ right, device),
        bytes_per_second=2 * copied / _best(lambda: target.copy_(source), device),
    )


def _best(function: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def shape(config: PretrainedConfig, model: ModelConfig) -> Shape:
    """Counted on the model's modules, whatever its architecture."""
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
    """Each prompt prefilled once, all rollouts decoded at once: by operations or by bytes, what takes longer.

    A decoded token of the batch reads every weight once, and each rollout its own cache.
    """
    prefill = sum(
        2 * shape.trunk_parameters * prompt + 4 * shape.attention_width * _triangle(prompt)
        for prompt, _ in map(_lengths, groups)
    )
    rollouts = [(prompt, length) for prompt, lengths in map(_lengths, groups) for length in lengths]
    seen = sum(prompt * length + _triangle(length) for prompt, length in rollouts)
    tokens = sum(length for _, length in rollouts)
    operations = 2 * (shape.trunk_parameters + shape.head_parameters) * tokens + 4 * shape.attention_width * seen
    passes = max(length for _, length in rollouts) - 1  # the prefill gives the first tokens
    moved = passes * shape.weight_bytes + seen * shape.kv_token_bytes
    return prefill / rates.operations_per_second + max(
        operations / rates.operations_per_second, moved / rates.bytes_per_second
    )


def learn_seconds(groups: Sequence[Group], shape: Shape, rates: Rates, *, reference: bool) -> float:
    """Forward, backward to the adapter, and the reference's forward if there is one; a group's prompt computed once.

    A token takes 2 operations of a frozen weight forward and 2 backward (which makes no gradient for it), 2 and 4 of an
    adapter's, and 4 of the head's where it is scored (learner/head).
    """
    tokens = sum(prompt + sum(lengths) for prompt, lengths in map(_lengths, groups))
    scored = sum(sum(lengths) for _, lengths in map(_lengths, groups))
    pairs = sum(
        _triangle(prompt) + sum(prompt * length + _triangle(length) for length in lengths)
        for prompt, lengths in map(_lengths, groups)
    )
    forward = 2 * shape.trunk_parameters * tokens + 4 * shape.attention_width * pairs
    backward = forward + 4 * shape.attention_width * pairs  # attention has twice its products to undo
    head = 4 * shape.head_parameters * scored
    adapter = 6 * shape.adapter_parameters * tokens
    again = (forward + 2 * shape.head_parameters * scored) if reference else 0
    return (forward + backward + head + adapter + again) / rates.operations_per_second


def _lengths(group: Group) -> tuple[int, list[int]]:
    """Tokens of the prompt, and of each completion."""
    return group.rollouts[0].num_prompt_tokens, [rollout.num_completion_tokens for rollout in group.rollouts]


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
