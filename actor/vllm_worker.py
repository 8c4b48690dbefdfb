"""vLLM's worker with a resident adapter: each adapted layer computes base(x) + alpha / rank (x A) B beside W.

One adapter version serves all requests, so vLLM's machinery for many is not needed. A and B are fixed buffers, made
before vLLM profiles, compiles and captures graphs, and written in place at each version: the frozen weights are never
touched, and no update is lost to their rounding. The k projections that vLLM computes in one layer (q, k, v; gate, up)
share one A [inputs, k rank] and one B [k rank, outputs], which is block-diagonal.

Tensor parallelism: a column-parallel layer holds its outputs of B, a row-parallel one its inputs of A and adds the
product before its all-reduce.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, RowParallelLinear
from vllm.platforms import current_platform

from common.adapter import LORA_A, LORA_B, PEFT_PREFIX, Shapes, checksum, split

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

OPTIONS = "horizon"  # key of vLLM's additional_config: rank, alpha and targets of the adapter


class ResidentAdapter:
    """Stands in for a layer's quant_method, and adds the adapter's product to what that computes."""

    def __init__(self, base: Any, scale: float) -> None:
        self.base = base
        self.scale = scale
        self.packed: tuple[Any, Any] | None = None  # A and B as oneDNN multiplies with them

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def pack(self, layer: Any) -> None:
        """Take over what the buffers hold. A CPU multiplies with copies in oneDNN's own order, made at each version.

        Without them a decoded token takes 1.15 times as long in bfloat16 (SmolLM2, 16 sequences, AVX-512).
        """
        if current_platform.is_cpu() and ops._supports_onednn:
            self.packed = ops.create_onednn_mm(layer.adapter_a.data), ops.create_onednn_mm(layer.adapter_b.data)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        y = self.base.apply(layer, x, bias)
        if self.packed is None:
            return y.addmm_(x @ layer.adapter_a, layer.adapter_b, alpha=self.scale)
        a, b = self.packed
        return y.add_(ops.onednn_mm(b, ops.onednn_mm(a, x, None), None), alpha=self.scale)


class Factor(NamedTuple):
    """One factor of one projection, where it lies."""

    held: Tensor  # view of the buffer, turned as PEFT has it
    share: tuple[slice, slice]  # of the whole factor: what this rank holds


class AdapterWorker(Worker):
    """Passed to vLLM by name (worker_cls). Its methods are reached by collective_rpc."""

    def load_model(self, **options: Any) -> None:
        """As vLLM's; then the buffers are made, holding an adapter that changes nothing."""
        super().load_model(**options)
        chosen = self.vllm_config.additional_config[OPTIONS]
        self.made_for = (chosen["rank"], chosen["alpha"], str(self.model_config.dtype).removeprefix("torch."))
        model = self.model_runner.get_model()
        self.adapted: list[Any] = []  # layers
        self.factors: dict[str, Factor] = {}
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LinearBase):
                parent, _, leaf = name.rpartition(".")
                parts = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
                adapted = {i: f"{parent}.{part}" for i, part in enumerate(parts) if part in chosen["targets"]}
                if adapted:
                    self.adapted.append(layer)
                    self.factors |= install(
                        layer, adapted, *self.made_for[:2], dtype=self.model_config.dtype, device=self.device
                    )

    def write_adapter(self, values: np.ndarray, shapes: Shapes, rank: int, alpha: float, dtype: str) -> str:
        """Hold this version (common.adapter.Adapter) and no other; returns the checksum of what the buffers hold.

        Raises ValueError for a factor of no adapted module, and for another rank, alpha or dtype than the buffers have.
        """
        if (rank, alpha, dtype) != self.made_for:
            raise ValueError(f"the adapter has (rank, alpha, dtype) {(rank, alpha, dtype)}, the engine {self.made_for}")
        if unknown := [name for name in shapes if name not in self.factors]:
            raise ValueError(f"the adapter's {unknown[0]} belongs to no linear module that the engine adapts")
        flat = torch.tensor(values).view(self.model_config.dtype)
        given = split(flat, shapes)
        for name, factor in self.factors.items():
            if name in given:
                factor.held.copy_(given[name][factor.share])
            else:
                factor.held.zero_()
        for layer in self.adapted:
            layer.quant_method.pack(layer)
        for name, whole in given.items():  # back from the buffers, over what was received
            whole[self.factors[name].share].copy_(self.factors[name].held)
        return checksum(flat.view(torch.uint8).numpy(), shapes, dtype)


def install(
    layer: Any, adapted: Mapping[int, str], rank: int, alpha: float, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Factor]:
    """Give vLLM's linear layer its buffers; returns its factors by PEFT's names.

    `adapted`: the projections that get an adapter, by their place among those that the layer computes.
    """
    by_rows = isinstance(layer, RowParallelLinear)
    outputs = list(layer.output_partition_sizes)
    inputs = layer.input_size_per_partition
    a = torch.zeros(inputs, len(adapted) * rank, dtype=dtype, device=device)
    b = torch.zeros(len(adapted) * rank, sum(outputs), dtype=dtype, device=device)
    factors = {}
    for place, (part, projection) in enumerate(adapted.items()):
        own, first = slice(place * rank, (place + 1) * rank), sum(outputs[:part])
        share = _share(layer, part)
        of_inputs = slice(share * inputs, (share + 1) * inputs) if by_rows else slice(None)
        of_outputs = slice(None) if by_rows else slice(share * outputs[part], (share + 1) * outputs[part])
        factors[f"{PEFT_PREFIX}{projection}{LORA_A}"] = Factor(a[:, own].T, (slice(None), of_inputs))
        factors[f"{PEFT_PREFIX}{projection}{LORA_B}"] = Factor(
            b[own, first : first + outputs[part]].T, (of_outputs, slice(None))
        )
    layer.adapter_a, layer.adapter_b = (torch.nn.Parameter(buffer, requires_grad=False) for buffer in (a, b))
    layer.quant_method = ResidentAdapter(layer.quant_method, alpha / rank)
    return factors


def _share(layer: Any, part: int) -> int:
    """Which share of a projection this rank has: its own, but of keys and values that of the heads that it computes."""
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and part else 1
    return layer.tp_rank // replicas
