"""The path that attention takes on a GPU, tested without one: forward and backward through varlen_attn's fake kernel.

The fake kernel returns tensors of the correct shape and checks nothing. The checks of the real one, from mha_varlen_fwd
and mha_varlen_bwd of torch's flash_attn/flash_api.cpp, are repeated here and applied to every call.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from common.config import ModelConfig
from learner.batch import Ends
from learner.policy.activations import LiveBytes, measure, observe, scored_everywhere
from learner.policy.attention import KERNEL_BACKWARD, backward_scratch_bytes, packed_attention
from learner.policy.policy import Policy

KERNEL = torch.ops.torch_attn._varlen_attn.default
META = torch.device("meta")
LENGTHS = ((30, 20, 17, 25), (12, 40))  # 144 positions, 6 sequences; keys: 30, 50, 47, 55, 12, 52
QUERIES, SEQUENCES, KEYS, MAX_QUERIES, MAX_KEYS = 144, 6, 246, 40, 55
HEADS, KEY_HEADS, D, LAYERS, RANK = 4, 2, 16, 3, 4
MODEL = LlamaConfig(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_attention_heads=HEADS,
    num_key_value_heads=KEY_HEADS,
    head_dim=D,
    num_hidden_layers=LAYERS,
    tie_word_embeddings=True,
)


class Kernel(TorchDispatchMode):
    """Rejects the arguments that the real kernel rejects, and ends that are not those of the packed sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.forwards = self.backwards = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator is KERNEL:
            self.forwards += 1
            query, key, value, *packing, causal, scale, window, _ = args[:11]
            self._check(query, key, value, *packing)
            assert causal and list(window) == [-1, 0] and scale is not None
        if operator is KERNEL_BACKWARD:
            self.backwards += 1
            grad, query, key, value, output, sums, *packing, causal, _, _, window = args
            self._check(query, key, value, *packing)
            assert causal and list(window) == [-1, 0]
            for tensor in (grad, output):
                assert tensor.shape == query.shape and tensor.dtype == query.dtype and tensor.stride(-1) == 1
            assert sums.shape == (query.shape[1], len(query)) and sums.dtype == torch.float32
        return operator(*args, **(kwargs or {}))

    def _check(self, query: Tensor, key: Tensor, value: Tensor, ends_q: Tensor, ends_k: Tensor, *maxima: int) -> None:
        assert query.dtype in (torch.bfloat16, torch.float16), "16 bits alone"
        assert query.dtype == key.dtype == value.dtype, "one dtype"
        assert ends_q.dtype == ends_k.dtype == torch.int32, "int32 ends"
        assert ends_q.is_contiguous() and ends_k.is_contiguous()
        assert ends_q.shape == ends_k.shape and ends_q.ndim == 1
        assert all(tensor.stride(-1) == 1 for tensor in (query, key, value)), "contiguous heads"
        assert query.shape[2] % 8 == 0 and query.shape[2] <= 256, "head size"
        assert query.shape[1] % key.shape[1] == 0 and key.shape == value.shape, "heads"
        assert query.shape[2] == key.shape[2]
        assert (len(query), len(ends_q) - 1, len(key), *maxima) == (
            QUERIES,
            SEQUENCES,
            KEYS,
            MAX_QUERIES,
            MAX_KEYS,
        )


def policy(recompute: str = "none", dtype: str = "bfloat16") -> Policy:
    config = ModelConfig(dtype=dtype, lora_rank=RANK, lora_alpha=8, lora_dropout=0.1)
    return Policy(MODEL, config, device=META, recompute=recompute, head_backend="torch")


def inputs(size: int = D, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Queries, keys and values as a model passes them."""
    shapes = [(1, heads, QUERIES, size) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.empty(shape, dtype=dtype, device=META, requires_grad=True) for shape in shapes]


def attend(tensors: Sequence[Tensor], ends: Ends | None = None) -> Tensor:
    return packed_attention(nn.Module(), *tensors, None, scaling=0.25, lengths=LENGTHS, ends=ends)[0]


@pytest.mark.parametrize(("recompute", "forwards"), [("none", 1), ("layer", 2), ("micro-batch", 2)])
def test_a_policy_learns_through_the_kernel(recompute, forwards) -> None:
    made = policy(recompute)
    with Kernel() as kernel:
        states_NH = made.scored_states(scored_everywhere(LENGTHS, META))
        states_NH.sum().backward()
    assert (kernel.forwards, kernel.backwards) == (forwards * LAYERS, LAYERS)
    assert states_NH.shape == (QUERIES, 64) and states_NH.dtype == torch.bfloat16
    gradients = {name: p.grad for name, p in made.peft_model.named_parameters() if p.requires_grad}
    assert len(gradients) == LAYERS * 7 * 2
    for name, parameter in made.peft_model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.shape == parameter.shape and parameter.grad.dtype == torch.float32, name
        else:
            assert parameter.grad is None, name
    keys = next(grad for name, grad in gradients.items() if "layers.0.self_attn.k_proj.lora_B" in name)
    assert keys.shape == (KEY_HEADS * D, RANK), "fewer heads of keys than of queries"


def test_what_attention_keeps_is_the_kernels_arguments_and_results() -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    tensors = inputs()
    with Kernel(), LiveBytes() as memory:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output_1LAD = attend(tensors, Ends.of(LENGTHS, META))
        kept = memory.live
        output_1LAD.backward(torch.empty(output_1LAD.shape, dtype=torch.bfloat16, device=META))
    assert output_1LAD.shape == (1, QUERIES, HEADS, D)
    expected = [
        ("query", (QUERIES, HEADS, D), torch.bfloat16),
        ("key", (KEYS, KEY_HEADS, D), torch.bfloat16),
        ("value", (KEYS, KEY_HEADS, D), torch.bfloat16),
        ("ends of queries", (SEQUENCES + 1,), torch.int32),
        ("ends of keys", (SEQUENCES + 1,), torch.int32),
        ("output", (QUERIES, HEADS, D), torch.bfloat16),
        ("log of the sum of exponentials", (HEADS, QUERIES), torch.float32),
        ("random state", (2,), torch.uint64),
    ]
    assert [(tuple(t.shape), t.dtype) for t in saved] == [(shape, dtype) for _, shape, dtype in expected]
    by_hand = 2 * (2 * QUERIES * HEADS * D) + 2 * (2 * KEYS * KEY_HEADS * D) + 4 * HEADS * QUERIES + 2 * 8
    assert kept == by_hand + 2 * 4 * (SEQUENCES + 1), "and the ends, once for all layers"
    for tensor in tensors:
        assert tensor.grad.shape == tensor.shape and tensor.grad.dtype == torch.bfloat16


def test_the_scratch_memory_of_the_backward_pass_is_part_of_the_peak() -> None:
    rows = QUERIES + 128 * SEQUENCES
    sums, row_sums = 4 * rows * HEADS * 32, 4 * rows * HEADS  # heads of 16 in blocks of 32, float32
    of_each_head = 2 * (2 * KEYS * HEADS * D)  # keys and values
    results = 2 * QUERIES * HEADS * D + 2 * (2 * KEYS * KEY_HEADS * D)  # gradients of queries, keys and values
    output_1LAD = attend(inputs(), Ends.of(LENGTHS, META))
    gradient = torch.empty_like(output_1LAD)  # allocated outside LiveBytes, so not counted
    with LiveBytes() as memory:
        output_1LAD.backward(gradient)
    zeros = 4 * HEADS * QUERIES + 2 * 8  # gradients of the kernel's unused results
    assert memory.peak == results + zeros + sums + row_sums + of_each_head
    ends, unused = torch.empty(2, dtype=torch.int32), torch.empty(0)
    query, key = torch.empty(100, 2, 160, dtype=torch.bfloat16), torch.empty(300, 2, 160, dtype=torch.bfloat16)
    alone = backward_scratch_bytes(query, query, key, key, query, unused, ends, ends)
    assert alone == 4 * (100 + 128) * 2 * (192 + 1), "one sequence, heads of 160 in blocks of 64, no shared keys"


def without_window(query, key, value, cu_q, cu_k, max_q, max_k, *, scale=None, enable_gqa=False):
    """The signature of varlen_attn in torch 2.10."""


@pytest.mark.parametrize(
    ("tensors", "ends", "words"),
    [
        (inputs(), Ends.of(LENGTHS, META)._replace(query_ends=torch.empty(7, dtype=torch.int64, device=META)), "int32"),
        (inputs(), Ends.of(LENGTHS, META)._replace(key_ends=torch.empty(14, device=META).int()[::2]), "contiguous"),
        (inputs(), Ends.of([*LENGTHS, (1,)], META), "144"),
        (inputs(size=12), None, "head size"),
        ([inputs()[0], *inputs(dtype=torch.float16)[1:]], None, "one dtype"),
    ],
)
def test_the_checks_of_the_real_kernel_apply(tensors, ends, words) -> None:
    with Kernel(), pytest.raises(AssertionError, match=words):
        attend(tensors, ends)


def test_a_torch_whose_kernel_has_no_window_raises(monkeypatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", without_window)
    with pytest.raises(TypeError, match="window_size"):
        attend(inputs())


def test_float32_does_not_use_the_kernel() -> None:
    """Where query heads share keys, the attention weights of each sequence, queries by keys, are kept."""
    made = policy(dtype="float32")
    with Kernel() as kernel:
        counted = observe(made, LENGTHS)
    assert kernel.forwards == 0
    weights = 4 * HEADS * sum(n * k for n, k in zip((30, 20, 17, 25, 12, 40), (30, 50, 47, 55, 12, 52), strict=True))
    on_cpu = measure(MODEL, made.config, lengths=LENGTHS, recompute="none", gpu=False)
    assert counted.kept > on_cpu.kept + LAYERS * weights / 2
