"""The shards of an adapter on tensor-parallel ranks together compute the product of the whole, in float64."""

import numpy as np
import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from actor.vllm_worker import AdapterWorker, install, projections
from common.adapter import PROBE_VERSION, Adapter

RANK, ALPHA, SCALE, H = 3, 6.0, 2.0, 16
HEADS, KV_HEADS, HEAD = 8, 2, 4


class Base:
    """Stands in for vLLM's quant_method. Its output is 0, so that only the adapter's product remains."""

    def apply(self, layer, x, bias=None):
        return x.new_zeros(*x.shape[:-1], sum(layer.output_partition_sizes))


def layer(kind: type, rank: int, ranks: int, inputs: int, outputs: list[int]):
    """A layer of vLLM with the attributes that `install` reads, made without the constructor and process groups."""
    made = kind.__new__(kind)
    torch.nn.Module.__init__(made)
    made.tp_rank, made.tp_size, made.quant_method = rank, ranks, Base()
    row_parallel = kind is RowParallelLinear
    made.input_size = inputs
    if kind is not ReplicatedLinear:
        made.input_size_per_partition = inputs // ranks if row_parallel else inputs
    whole = row_parallel or kind is ReplicatedLinear
    made.output_partition_sizes = outputs if whole else [size // ranks for size in outputs]
    if kind is QKVParallelLinear:  # as vLLM: with fewer key heads than ranks, several ranks compute the same one
        made.num_kv_head_replicas = max(1, ranks // KV_HEADS)
        key = HEAD * max(1, KV_HEADS // ranks)
        made.output_partition_sizes = [outputs[0] // ranks, key, key]
    return made


QKV = [HEADS * HEAD, KV_HEADS * HEAD, KV_HEADS * HEAD]
LAYERS = {  # kind, the sizes of its outputs, and the names of the model's projections: one for each output, or for all
    "qkv_proj": (QKVParallelLinear, QKV, ["q_proj", "k_proj", "v_proj"]),
    "gate_up_proj": (MergedColumnParallelLinear, [24, 24], ["gate_proj", "up_proj"]),
    "fused qkv_proj": (QKVParallelLinear, QKV, ["qkv_proj"]),
    "fused gate_up_proj": (MergedColumnParallelLinear, [24, 24], ["gate_up_proj"]),
    "o_proj": (RowParallelLinear, [H], ["o_proj"]),
    "plain": (ColumnParallelLinear, [24], ["fc1"]),
    "replicated": (ReplicatedLinear, [24], ["gate"]),
}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_the_ranks_together_compute_the_whole_product(name, ranks):
    kind, outputs, names = LAYERS[name]
    sizes = dict(zip(names, outputs, strict=True)) if len(names) > 1 else {names[0]: sum(outputs)}
    generator = torch.Generator().manual_seed(ranks)
    factors = {}
    for projection, size in sizes.items():
        stem = f"base_model.model.layers.0.{projection}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(RANK, H, generator=generator)
        factors[f"{stem}.lora_B.weight"] = torch.randn(size, RANK, generator=generator)
    adapter = Adapter.of(
        factors,
        "float32",
        version=PROBE_VERSION,
        rank=RANK,
        alpha=ALPHA,
        target_modules=tuple(names),
        canary=None,
    )
    x = torch.randn(5, H, generator=generator)
    parts = []
    for rank in range(ranks):
        one = layer(kind, rank, ranks, H, outputs)
        worker = AdapterWorker.__new__(AdapterWorker)
        worker.model_config = type("", (), {"dtype": torch.float32})()
        worker.made_for, worker.adapted = (RANK, SCALE, "float32"), [one]
        adapted = {f"layers.0.{projection}": of for projection, of in projections(one, names).items()}
        worker.factors = install(one, adapted, RANK, SCALE, dtype=torch.float32, device=torch.device("cpu"))
        held = worker.write_adapter(adapter.values, adapter.shapes, RANK, SCALE, "float32")
        assert held == adapter.checksum
        own = x.chunk(ranks, 1)[rank] if kind is RowParallelLinear else x
        parts.append(one.quant_method.apply(one, own).double())
        of_a_batch = one.quant_method.apply(one, own[None]).double()  # as vLLM's models from transformers call it
        torch.testing.assert_close(of_a_batch, parts[-1][None])

    whole = [
        SCALE * x.double() @ factors[f"base_model.model.layers.0.{p}.lora_A.weight"].double().T
        @ factors[f"base_model.model.layers.0.{p}.lora_B.weight"].double().T
        for p in names
    ]  # fmt: skip
    if len(names) == 1:
        whole = list(whole[0].split(outputs, 1))
    if kind is ReplicatedLinear:
        got = [parts[-1]]
    elif kind is RowParallelLinear:
        got = [sum(parts)]  # vLLM's all-reduce
    else:
        split = [part.split(one.output_partition_sizes, 1) for part in parts]
        got = [torch.cat([pieces[i] for pieces in split], 1) for i in range(len(outputs))]
        if kind is QKVParallelLinear and ranks > KV_HEADS:
            step = ranks // KV_HEADS
            got[1:] = [torch.cat([pieces[i] for pieces in split[::step]], 1) for i in (1, 2)]
    for ours, expected in zip(got, whole, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected.numpy(), rtol=1e-5, atol=1e-5)
