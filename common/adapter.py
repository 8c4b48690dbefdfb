"""An adapter version: its number, its values, its LoRA settings and its checksum.

The values are one contiguous buffer in the dtype that learner and actor multiply with. The learner's float32 weights
are rounded once, here; the transport and the engine round nothing.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"  # suffixes of PEFT's names of the two factors
PEFT_PREFIX = "base_model.model."  # prefix of PEFT's names
PROBE_VERSION = -1  # version number of the random adapter that verifies the actors when a run starts
Shapes = Mapping[str, tuple[int, ...]]  # shape of each factor by its name, in the order of the buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A fixed token sequence and the learner's log-probabilities of it, to verify the weights that an actor uses."""

    token_ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T - 1], nats at temperature 1: tokens 1..T-1 with this adapter
    base_logprobs: np.ndarray  # float32 [T - 1]: the same with the adapter off
    seconds: float = 0.0  # the learner's time for both passes


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One version of the LoRA weights, as the learner publishes it.

    `shapes` has PEFT's own names (base_model.model...q_proj.lora_A.weight): lora_A [rank, in_features] and
    lora_B [out_features, rank]. The weight change is `scale` * B A.
    """

    version: int  # number of optimizer steps taken (at 0 every B is zero: the base model), or PROBE_VERSION
    values: np.ndarray  # uint8 [bytes]: the factors, concatenated
    shapes: Shapes
    dtype: str  # bfloat16 or float32
    rank: int
    alpha: float
    variant: str = "lora"  # model.lora_variant
    target_modules: tuple[str, ...]
    canary: Canary | None  # None: the checksum alone verifies this version
    checksum: str  # checksum(values, shapes, dtype), computed by the learner

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return scale(self.rank, self.alpha, self.variant)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], dtype: str, **fields: Any) -> "Adapter":
        """The version with these factors, rounded to `dtype`; `fields` are the fields that do not follow from them."""
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors.values()])
        values = flat.to(getattr(torch, dtype)).view(torch.uint8).cpu().numpy()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        return cls(values=values, shapes=shapes, dtype=dtype, checksum=checksum(values, shapes, dtype), **fields)


def scale(rank: int, alpha: float, variant: str) -> float:
    """What the product B A is multiplied by, in learner and actor: alpha / rank, or alpha / sqrt(rank) of rsLoRA
    (arXiv 2312.03732), whose updates do not shrink as the rank grows."""
    return alpha / (math.sqrt(rank) if variant == "rslora" else rank)


def split(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The factors as views of `flat`, in which they are concatenated."""
    sizes = [int(np.prod(shape)) for shape in shapes.values()]
    return {name: part.view(shapes[name]) for name, part in zip(shapes, flat.split(sizes), strict=True)}


def tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The factors, on the CPU, by PEFT's names."""
    return split(torch.tensor(adapter.values).view(getattr(torch, adapter.dtype)), adapter.shapes)


def checksum(values: np.ndarray, shapes: Shapes, dtype: str) -> str:
    """Hash of names, shapes, dtype and bytes."""
    digest = hashlib.blake2b(repr((list(shapes.items()), dtype)).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()
