"""Token weights: how much each sampled token counts, and their normalisation over the whole update.

Pure functions on padded [B, T] tensors; T counts the sampled tokens of a rollout; 0 outside the mask.
"""

import math

import torch
from torch import Tensor

EPSILON = 1e-12  # in `residual`
NO_RESIDUAL = 1e-8  # a rollout whose raised norms sum to less has uniform weights, as in ARCA's code


def uniform(mask_BT: Tensor) -> Tensor:
    """1 at every sampled token."""
    return mask_BT.to(torch.float64)


def horizon(
    entropy_BT: Tensor,
    mask_BT: Tensor,
    advantages_B: Tensor,
    *,
    alpha: float,
    vocab_size: int,
    selective: bool,
) -> Tensor:
    """w_t = exp(-alpha * sum_{s <= t} H_s / log V): the entropy-adaptive horizon (arXiv 2606.05434, Eq. 3-5).

    entropy_BT in nats, mask_BT true at sampled tokens. With `selective` only rollouts of negative advantage are
    discounted, all others have weight 1 (Eq. 7-8). Not normalised. The result has the dtype of entropy_BT; pass
    float64 where a negative alpha makes weights grow.
    """
    normalized_BT = entropy_BT.where(mask_BT, entropy_BT.new_zeros(())) / math.log(vocab_size)
    weights_BT = torch.exp(-alpha * normalized_BT.cumsum(dim=1))
    if selective:
        weights_BT = weights_BT.where((advantages_B < 0)[:, None], torch.ones_like(weights_BT))
    return weights_BT * mask_BT


def residual(norm_BT: Tensor, mask_BT: Tensor, *, power: float) -> Tensor:
    """|o| (a_t^power + eps) / sum_s (a_s^power + eps), which has mean 1 in a rollout (ARCA, arXiv 2606.00257).

    norm_BT = a_t is the norm of the adapter's change to the last hidden state of the position that predicts token t.
    All weights of a rollout are 1 where sum a_s^power is at most 1e-8, as while the adapter is zero.
    """
    raised_BT = norm_BT.double() ** power * mask_BT
    raised_BT = raised_BT.where(raised_BT.sum(dim=1, keepdim=True) > NO_RESIDUAL, torch.zeros_like(raised_BT))
    raised_BT = (raised_BT + EPSILON) * mask_BT
    return raised_BT * mask_BT.sum(dim=1, keepdim=True) / raised_BT.sum(dim=1, keepdim=True)


def gini(weights_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """[B]: Gini coefficient of each rollout's weights: sum |w_s - w_t| / (2 T sum w), 0 where all are equal.

    It is 0 too where all weights are 0, as when `top_entropy` keeps no token of a rollout.
    """
    length_B = mask_BT.sum(dim=1)
    ascending_BT = (weights_BT * mask_BT).sort(dim=1).values  # tokens outside the mask come first, as 0
    rank_BT = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device) - (mask_BT.shape[1] - length_B)[:, None]
    sum_B = ascending_BT.sum(dim=1)
    gini_B = 2 * (rank_BT * ascending_BT).sum(dim=1) / (length_B * sum_B) - (length_B + 1) / length_B
    return gini_B.where(sum_B > 0, torch.zeros_like(gini_B))


def top_entropy(entropy_BT: Tensor, mask_BT: Tensor, *, fraction: float) -> Tensor:
    """Bool [B, T]: the `fraction` of the step's sampled tokens that have the highest entropy (arXiv 2506.01939).

    At least one token is kept, and so is every token whose entropy equals that of the last one.
    """
    entropy_N = entropy_BT[mask_BT]
    num_kept = max(1, round(fraction * len(entropy_N)))
    return mask_BT & (entropy_BT >= entropy_N.topk(num_kept).values[-1])


def normalise(
    weights_BT: Tensor, mask_BT: Tensor, group_B: Tensor, *, normaliser: str, max_tokens: int | None = None
) -> Tensor:
    """Weights divided so that the loss is a plain sum over the tokens of an update: of the step, or of a mini-batch.

    group_B is the index of each rollout's group, 0..P-1. Every rollout must have a sampled token.
    - "sequence-mean": 1 / (B |o_i|): the mean over rollouts of per-sequence means (Eq. 2)
    - "token-mean": 1 / (number of sampled tokens)
    - "constant": 1 / (B max_tokens), independent of the lengths (Dr. GRPO, arXiv 2503.20783)
    - "group": 1 / (P sum of the group's weights): Eq. 6 and 9 per group, then the mean over groups
    - "step": 1 / (sum of all weights)
    """
    if normaliser == "sequence-mean":
        return weights_BT / (mask_BT.sum(dim=1, keepdim=True) * len(weights_BT))
    if normaliser == "constant":
        assert max_tokens is not None, "the constant normaliser needs max_tokens"
        return weights_BT / (max_tokens * len(weights_BT))
    if normaliser == "token-mean":
        return weights_BT / mask_BT.sum()
    if normaliser == "step":
        group_B = torch.zeros_like(group_B)
    num_groups = int(group_B.max()) + 1
    sum_P = weights_BT.new_zeros(num_groups).index_add(0, group_B, weights_BT.sum(dim=1))
    sum_P = sum_P.where(sum_P > 0, torch.ones_like(sum_P))  # avoids 0 / 0 for a group whose weights are all 0
    return weights_BT / (sum_P[group_B] * num_groups)[:, None]
