"""An adapter version: its number, its values, its LoRA settings, its checksum. Nothing of how it travels.

The values are one contiguous buffer in the dtype that learner and actor multiply with: the learner rounds its float32
weights once, here, and nothing is rounded on the way or in the engine.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"  # how PEFT's names of the two factors end
PEFT_PREFIX = "base_model.model."  # and how they begin
PROBE_VERSION = -1  # of the random adapter that a run's start is verified with
Shapes = Mapping[str, tuple[int, ...]]  # of the factors by name, in the order of the buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A fixed token sequence and its log-probabilities, by which an actor proves which weights it samples with."""

    token_ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T - 1], nats at temperature 1: tokens 1..T-1 under this adapter
    base_logprobs: np.ndarray  # float32 [T - 1]: the same with the adapter off
    seconds: float = 0.0  # that the learner took for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One version of the LoRA weights, as the learner publishes it.

    `shapes` has PEFT's own names (base_model.model...q_proj.lora_A.weight): lora_A [rank, in_features] and
    lora_B [out_features, rank]. The weight change is alpha / rank * B A.
    """

    version: int  # number of optimizer steps behind it; 0 changes nothing, since every B is zero; or PROBE_VERSION
    values: np.ndarray  # uint8 [bytes]: the factors, one behind the other
    shapes: Shapes
    dtype: str  # bfloat16 or float32
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    canary: Canary | None  # None: this version is proved by its checksum alone
    checksum: str  # checksum(values, shapes, dtype), computed by the learner

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dtype: str, **fields: Any) -> "Adapter":
        """The version with these factors, rounded to `dtype`; `fields` are those that are not made from them."""
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
        values = flat.to(getattr(torch, dtype)).view(torch.uint8).cpu().numpy()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(values=values, shapes=shapes, dtype=dtype, checksum=checksum(values, shapes, dtype), **fields)


def split(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The factors as views of `flat`, which holds them one behind the other."""
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    return {name: part.view(shapes[name]) for name, part in zip(shapes, flat.split(sizes), strict=True)}


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The factors, on the CPU, by PEFT's names."""
    return split(torch.tensor(adapter.values).view(getattr(torch, adapter.dtype)), adapter.shapes)


def checksum(values: np.ndarray, shapes: Shapes, dtype: str) -> str:
    """Hash of the names and shapes, of the dtype and of the bytes: equal adapters alone have equal checksums."""
    digest = hashlib.blake2b(repr((list(shapes.items()), dtype)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
