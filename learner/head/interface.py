"""What learner/head asks of a backend for a chunk of rows, and what it gets."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

GPU_WORKSPACE_BYTES = 512 * 2**20  # of a chunk on a GPU: float32 logits, and the weights made of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """The frozen output projection: logits z = hidden weight^T + bias, and with `softcap` c then c tanh(z / c)."""

    weight_VH: Tensor
    bias_V: Tensor | None
    softcap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is computed besides log-probability and entropy."""

    u: bool  # d logprob / d hidden
    v: bool  # d entropy / d hidden
    entropy_at_one: bool
    topk: int | None


class Chunk(NamedTuple):
    """Columns of c rows; float32, or float64 for float64 inputs; None where not wanted."""

    logprob_c: Tensor
    entropy_c: Tensor
    entropy_at_one_c: Tensor | None
    topk_entropy_c: Tensor | None
    topk_mass_c: Tensor | None
    u_cH: Tensor | None
    v_cH: Tensor | None
