"""ERPO: one advantage per token (arXiv 2603.28204). Formulas from a secondary source; `assemble` is our reading.

Pure functions on padded, detached [B, T] tensors; T counts the sampled tokens of a rollout; 0 outside the mask.
"""

import torch
from torch import Tensor

EPSILON = 1e-6


def gate(entropy_BT: Tensor, mask_BT: Tensor, group_B: Tensor, *, sharpness: float) -> Tensor:
    """sigmoid(sharpness * z), where z is the entropy standardised over all tokens of the group (population std)."""
    standardised_BT = _standardise(entropy_BT, mask_BT, group_B[:, None].expand_as(mask_BT))
    return torch.sigmoid(sharpness * standardised_BT) * mask_BT


def progress(
    logprobs_BT: Tensor, reference_logprobs_BT: Tensor, mask_BT: Tensor, group_B: Tensor, *, scale: float, buckets: int
) -> Tensor:
    """scale * (log pi - log pi_ref), standardised over the tokens of a group that lie in the same bucket.

    Token t of T lies in bucket floor(buckets * t / T). 0 where all tokens of a bucket have the same value.
    """
    length_B1 = mask_BT.sum(dim=1, keepdim=True)
    position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    bucket_BT = (position_T * buckets // length_B1).clamp(max=buckets - 1)
    raw_BT = scale * (logprobs_BT - reference_logprobs_BT)
    return _standardise(raw_BT, mask_BT, group_B[:, None] * buckets + bucket_BT)


def assemble(
    advantages_B: Tensor, gate_BT: Tensor, progress_BT: Tensor, mask_BT: Tensor, *, assembly: str, weight: float
) -> Tensor:
    """Token advantages from the rollout's advantage A, the gate W and the progress s; eta is `weight`.

    - "additive": A + eta W sgn(A) s
    - "gated-outcome": T W / (sum of W) A + eta sgn(A) s, for a rollout of T tokens
    - "multiplicative": W A
    """
    advantages_B1 = advantages_B[:, None]
    if assembly == "multiplicative":
        return gate_BT * advantages_B1
    if assembly == "additive":
        return (advantages_B1 + weight * gate_BT * advantages_B1.sign() * progress_BT) * mask_BT
    mean_gate_B1 = gate_BT.sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True)
    return (gate_BT / mean_gate_B1 * advantages_B1 + weight * advantages_B1.sign() * progress_BT) * mask_BT


def _standardise(values_BT: Tensor, mask_BT: Tensor, cell_BT: Tensor) -> Tensor:
    """(value - mean) / (population std + 1e-6) over the tokens of each cell; 0 where all are equal."""
    values_N, cell_N = values_BT[mask_BT], cell_BT[mask_BT]
    num_cells = int(cell_N.max()) + 1
    count_C = values_N.new_zeros(num_cells).index_add(0, cell_N, torch.ones_like(values_N)).clamp(min=1)
    mean_C = values_N.new_zeros(num_cells).index_add(0, cell_N, values_N) / count_C
    centred_N = values_N - mean_C[cell_N]
    variance_C = values_N.new_zeros(num_cells).index_add(0, cell_N, centred_N.square()) / count_C
    result_BT = torch.zeros_like(values_BT)
    result_BT[mask_BT] = centred_N / (variance_C[cell_N].sqrt() + EPSILON)
    return result_BT
