"""vLLM's worker with a resident adapter: each adapted layer computes x W + s (x A) B.

One adapter version serves all requests, so vLLM's machinery for several adapters is not needed. A and B are fixed
buffers, allocated before vLLM profiles, compiles and captures graphs, and written in place at each version. The frozen
weights never change, so no update is lost to their rounding. The k projections that vLLM fuses into one layer (q, k, v;
gate, up) share one A [inputs, k rank] and one block-diagonal B [k rank, outputs].

Tensor parallelism: a column-parallel layer holds B for its own outputs; a row-parallel one holds A for its own inputs,
and adds the adapter's product before its all-reduce.
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
from common.config import ALL_LINEAR

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker

OPTIONS = "horizon"  # key in vLLM's additional_config of the adapter's rank, scale and targets


class ResidentAdapter:
    """Wraps a layer's quant_method and adds the adapter's product to its output."""

    def __init__(self, base: Any, scale: float) -> None:
        self.base = base
        self.scale = scale
        self.packed: tuple[Any, Any] | None = None  # A and B in oneDNN's layout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    def pack(self, layer: Any) -> None:
        """Apply the buffers' new values: on a CPU, copy them into oneDNN's layout. Called once per version.

        Without that layout a decoded token takes 1.15 times as long in bfloat16 (SmolLM2, 16 sequences, AVX-512).
        """
        if current_platform.is_cpu() and ops._supports_onednn:
            self.packed = ops.create_onednn_mm(layer.adapter_a.data), ops.create_onednn_mm(layer.adapter_b.data)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[tokens, inputs] -> [tokens, outputs]."""
        y: Tensor = self.base.apply(layer, x, bias)
        if self.packed is None:
            return y.addmm_(x @ layer.adapter_a, layer.adapter_b, alpha=self.scale)
        a, b = self.packed
        return y.add_(ops.onednn_mm(b, ops.onednn_mm(a, x, None), None), alpha=self.scale)


class Factor(NamedTuple):
    """Where one factor (A or B) of one projection is stored."""

    held: Tensor  # view of the buffer, transposed to PEFT's orientation
    share: tuple[slice, slice]  # the part of the whole factor that this rank holds


class AdapterWorker(Worker):
    """vLLM imports it by name (worker_cls). The engine calls its methods through collective_rpc."""

    def load_model(self, **options: Any) -> None:
        """As vLLM's; then allocate the buffers, filled with zeros: an adapter that changes nothing."""
        super().load_model(**options)
        chosen = self.vllm_config.additional_config[OPTIONS]
        targets = set(chosen["targets"])
        self.made_for = (chosen["rank"], chosen["scale"], str(self.model_config.dtype).removeprefix("torch."))
        model = self.model_runner.get_model()
        self.adapted: list[Any] = []  # layers
        self.factors: dict[str, Factor] = {}
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LinearBase):
                parent, _, leaf = name.rpartition(".")
                fused = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
                parts = [leaf] if leaf in targets else fused  # some models have one such module in transformers too
                adapted = {i: f"{parent}.{part}" for i, part in enumerate(parts) if targets & {part, ALL_LINEAR}}
                if adapted:
                    self.adapted.append(layer)
                    self.factors |= install(
                        layer, adapted, *self.made_for[:2], dtype=self.model_config.dtype, device=self.device
                    )

    def write_adapter(self, values: np.ndarray, shapes: Shapes, rank: int, scale: float, dtype: str) -> str:
        """Replace the buffers' values by this version's (common.adapter.Adapter); returns their checksum.

        Raises ValueError if rank, scale or dtype differ from the buffers', or a factor belongs to no adapted module.
        """
        if (rank, scale, dtype) != self.made_for:
            raise ValueError(f"the adapter has (rank, scale, dtype) {(rank, scale, dtype)}, the engine {self.made_for}")
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
        for name, whole in given.items():  # the checksum is of the values read back from the buffers
            whole[self.factors[name].share].copy_(self.factors[name].held)
        return checksum(flat.view(torch.uint8).numpy(), shapes, dtype)


def install(
    layer: Any, adapted: Mapping[int, str], rank: int, scale: float, *, dtype: torch.dtype, device: torch.device
) -> dict[str, Factor]:
    """Allocate the buffers of vLLM's linear layer; returns its factors by PEFT's names.

    `adapted`: the projections that get an adapter, by their index among those that the layer computes.
    """
    row_parallel = isinstance(layer, RowParallelLinear)
    outputs = list(layer.output_partition_sizes)
    inputs = layer.input_size_per_partition
    a = torch.zeros(inputs, len(adapted) * rank, dtype=dtype, device=device)
    b = torch.zeros(len(adapted) * rank, sum(outputs), dtype=dtype, device=device)
    factors = {}
    for i, (part, projection) in enumerate(adapted.items()):
        own, first = slice(i * rank, (i + 1) * rank), sum(outputs[:part])
        share = _share(layer, part)
        of_inputs = slice(share * inputs, (share + 1) * inputs) if row_parallel else slice(None)
        of_outputs = slice(None) if row_parallel else slice(share * outputs[part], (share + 1) * outputs[part])
        factors[f"{PEFT_PREFIX}{projection}{LORA_A}"] = Factor(a[:, own].T, (slice(None), of_inputs))
        factors[f"{PEFT_PREFIX}{projection}{LORA_B}"] = Factor(
            b[own, first : first + outputs[part]].T, (of_outputs, slice(None))
        )
    layer.adapter_a, layer.adapter_b = (torch.nn.Parameter(buffer, requires_grad=False) for buffer in (a, b))
    layer.quant_method = ResidentAdapter(layer.quant_method, scale)
    return factors


def _share(layer: Any, part: int) -> int:
    """Which share of a projection this rank holds. Several ranks hold the same one of keys and values if these have
    fewer heads than there are ranks."""
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and part else 1
    return int(layer.tp_rank // replicas)
