"""An adapter version: its number, its tensors, its LoRA settings, its checksum. Nothing of how it travels."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A fixed token sequence and its log-probabilities, by which an actor proves which weights it samples with."""

    token_ids: np.ndarray  # int32 [T]
    logprobs: np.ndarray  # float32 [T - 1], nats at temperature 1: tokens 1..T-1 under this adapter
    base_logprobs: np.ndarray  # float32 [T - 1]: the same with the adapter off


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """One version of the LoRA weights, as the learner publishes it.

    `tensors` maps PEFT's own names (base_model.model...q_proj.lora_A.weight, float32) to arrays:
    lora_A [rank, in_features], lora_B [out_features, rank]. The weight change is alpha / rank * B A.
    """

    version: int  # number of optimizer steps behind it; 0 changes nothing, since every B is zero
    tensors: Mapping[str, np.ndarray]
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    canary: Canary
    checksum: str  # checksum(tensors), computed by the learner


def checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """Hash of names, shapes and bytes, in the order of the names: equal tensors give equal checksums."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data.cast("B"))
    return digest.hexdigest()
