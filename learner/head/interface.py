"""What learner/head passes to a backend for a chunk of c tokens, and what the backend returns."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

GPU_WORKSPACE_BYTES = 512 * 2**20  # for a chunk on a GPU: its float32 logits and the token weights made from them


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """The frozen output projection: logits z = hidden weight^T + bias, and with `softcap` c then c tanh(z / c)."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a backend computes besides log-probability and entropy."""

    u: bool  # d logprob / d hidden
    v: bool  # d entropy / d hidden
    entropy_at_one: bool
    topk: int | None


class Chunk(NamedTuple):
    """The statistics of c tokens; float32, or float64 for float64 inputs; None where not wanted."""

    logprob_c: Tensor
    entropy_c: Tensor
    entropy_at_one_c: Tensor | None
    topk_entropy_c: Tensor | None
    topk_mass_c: Tensor | None
    u_cH: Tensor | None
    v_cH: Tensor | None
