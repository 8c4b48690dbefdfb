"""vLLM's worker with a resident adapter: each adapted layer computes x W + s (x A) B.

One adapter version serves all requests, so vLLM's machinery for several adapters is not needed. A and B are fixed
buffers, allocated before vLLM profiles, compiles and captures graphs, and written in place at each version. The frozen
weights never change, so no update is lost to their rounding. The k projections that vLLM fuses into one layer (q, k, v;
gate, up) share one A [inputs, k rank] and one block-diagonal B [k rank, outputs]. Where the model itself has them as
one projection (Phi-3), that has one A and one B.

Tensor parallelism: a column-parallel layer holds B for its own outputs; a row-parallel one holds A for its own inputs,
and adds the adapter's product before its all-reduce.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearBase, QKVParallelLinear, ReplicatedLinear, RowParallelLinear
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
        """[..., inputs] -> [..., outputs]; more than [tokens] before in models that vLLM takes from transformers."""
        y: Tensor = self.base.apply(layer, x, bias)
        flat_x, flat_y = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if self.packed is None:
            flat_y.addmm_(flat_x @ layer.adapter_a, layer.adapter_b, alpha=self.scale)
        else:
            a, b = self.packed
            flat_y.add_(ops.onednn_mm(b, ops.onednn_mm(a, flat_x, None), None), alpha=self.scale)
        return y


class Piece(NamedTuple):
    """Where a part of one factor (A or B) of one projection is stored."""

    held: Tensor  # view of the buffer, transposed to PEFT's orientation
    share: tuple[slice, slice]  # that part of the whole factor


Factors = dict[str, list[Piece]]  # by PEFT's names: the pieces that this rank holds


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
        self.factors: Factors = {}
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LinearBase):
                parent, _, leaf = name.rpartition(".")
                fused = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
                names = [leaf] if leaf in targets else fused
                adapted = {
                    f"{parent}.{name}": outputs
                    for name, outputs in projections(layer, names).items()
                    if targets & {name, ALL_LINEAR}
                }
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
        for name, pieces in self.factors.items():
            for held, share in pieces:
                if name in given:
                    held.copy_(given[name][share])
                else:
                    held.zero_()
        for layer in self.adapted:
            layer.quant_method.pack(layer)
        for name, whole in given.items():  # the checksum is of the values read back from the buffers
            for held, share in self.factors[name]:
                whole[share].copy_(held)
        return checksum(flat.view(torch.uint8).numpy(), shapes, dtype)


def projections(layer: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """The layer's outputs that each projection computes. vLLM fuses q, k, v and gate, up; so do some models (Phi-3),
    where one projection has all outputs."""
    outputs = range(len(layer.output_partition_sizes))
    return {names[0]: list(outputs)} if len(names) == 1 else {name: [i] for i, name in zip(outputs, names, strict=True)}


def install(
    layer: Any,
    adapted: Mapping[str, Sequence[int]],
    rank: int,
    scale: float,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Factors:
    """Allocate the buffers of vLLM's linear layer; returns its factors.

    `adapted`: the projections that get an adapter, with the indices of the layer's outputs that they compute.
    """
    outputs = list(layer.output_partition_sizes)
    inputs = layer.input_size if isinstance(layer, ReplicatedLinear) else layer.input_size_per_partition
    row_parallel = isinstance(layer, RowParallelLinear)
    of_inputs = slice(layer.tp_rank * inputs, (layer.tp_rank + 1) * inputs) if row_parallel else slice(None)
    a = torch.zeros(inputs, len(adapted) * rank, dtype=dtype, device=device)
    b = torch.zeros(len(adapted) * rank, sum(outputs), dtype=dtype, device=device)
    factors = {}
    for number, (projection, indices) in enumerate(adapted.items()):
        own = slice(number * rank, (number + 1) * rank)
        factors[f"{PEFT_PREFIX}{projection}{LORA_A}"] = [Piece(a[:, own].T, (slice(None), of_inputs))]
        of_b, before = [], 0  # `before`: the projection's rows that belong to its earlier outputs
        for i in indices:
            share, num_shares = _share(layer, i)
            first, start = sum(outputs[:i]), before + share * outputs[i]
            of_b.append(Piece(b[own, first : first + outputs[i]].T, (slice(start, start + outputs[i]), slice(None))))
            before += num_shares * outputs[i]
        factors[f"{PEFT_PREFIX}{projection}{LORA_B}"] = of_b
    layer.adapter_a, layer.adapter_b = (torch.nn.Parameter(buffer, requires_grad=False) for buffer in (a, b))
    layer.quant_method = ResidentAdapter(layer.quant_method, scale)
    return factors


def _share(layer: Any, output: int) -> tuple[int, int]:
    """Which share of an output this rank computes, and how many there are. Several ranks compute the same one of keys
    and values if these have fewer heads than there are ranks."""
    if isinstance(layer, (RowParallelLinear, ReplicatedLinear)):
        return 0, 1
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and output else 1
    return layer.tp_rank // replicas, layer.tp_size // replicas
