"""Ratios of current to old policy, in log space: pure functions of the per-token difference of log-probabilities.

All take and return padded [B, T] tensors; T counts the sampled tokens of a rollout; 0 outside the mask. A ratio of a
whole rollout is repeated at each of its tokens.
"""

import torch
from torch import Tensor

NEARLY_ZERO = 1e-6  # a smaller power is computed as the limit 0


def sequence(difference_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the rollout: log (pi(o) / pi_old(o))^(1 / |o|) (GSPO, arXiv 2507.18071, Eq. 7)."""
    mean_B1 = (difference_BT * mask_BT).sum(dim=1, keepdim=True) / mask_BT.sum(dim=1, keepdim=True)
    return mean_B1 * mask_BT


def power_mean(difference_BT: Tensor, mask_BT: Tensor, *, power: float) -> Tensor:
    """log of (mean over the rollout of r^p)^(1 / p), where r is the token's ratio (HölderPO, arXiv 2605.12058).

    p = 1 is the arithmetic mean, -1 the harmonic one, 0 the geometric one, which is `sequence`. The gradient reaches
    token t in proportion to r_t^p / sum r^p.
    """
    if abs(power) < NEARLY_ZERO:
        return sequence(difference_BT, mask_BT)
    scaled_BT = (power * difference_BT.double()).masked_fill(
        ~mask_BT, -torch.inf
    )  # float64, as dividing by a small p enlarges rounding
    log_mean_B1 = torch.logsumexp(scaled_BT, dim=1, keepdim=True) - mask_BT.sum(dim=1, keepdim=True).double().log()
    return (log_mean_B1 / power * mask_BT).to(difference_BT.dtype)


def importance(difference_BT: Tensor, mask_BT: Tensor, *, sequence_level: bool, mask_out: bool, cap: float) -> Tensor:
    """pi_learner / pi_actor of each token, or of the whole rollout, from `difference_BT` of their log-probabilities.

    A weight above `cap` becomes `cap` (truncated), or 0 with `mask_out` (masked)
    (F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025).
    """
    if sequence_level:
        difference_BT = (difference_BT * mask_BT).sum(dim=1, keepdim=True).expand_as(mask_BT)
    ratio_BT = difference_BT.exp()
    bounded_BT = ratio_BT.where(ratio_BT <= cap, torch.zeros_like(ratio_BT)) if mask_out else ratio_BT.clamp(max=cap)
    return bounded_BT * mask_BT
