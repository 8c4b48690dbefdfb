"""The terms of the loss: pure functions per sampled token. learner/objective.py sums them."""

import math

import torch
from torch import Tensor


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = exp(logprobs - old_logprobs).

    All arguments and the result have the same shape; nats. To be maximised (arXiv 2606.05434, Eq. 2).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def stop_gradient_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """sg(clip(rho, 1 - clip_low, 1 + clip_high)) A logprob: no token loses its gradient (CISPO, arXiv 2506.13585).

    Only its gradient has a meaning, its value has none. Arguments as of `clipped_surrogate`.
    """
    ratio = torch.exp(logprobs - old_logprobs).clamp(1 - clip_low, 1 + clip_high).detach()
    return ratio * advantages * logprobs


def pessimistic_clip(log_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Tensor:
    """The log ratio at which `clipped_surrogate` evaluates A: at most log(1 + clip_high) where A > 0, at least
    log(1 - clip_low) where A < 0."""
    highest = log_ratio.clamp(max=math.log1p(clip_high))
    lowest = log_ratio.clamp(min=math.log1p(-clip_low) if clip_low < 1 else -math.inf)
    return torch.where(advantages > 0, highest, torch.where(advantages < 0, lowest, log_ratio))


def kl(logprobs: Tensor, reference_logprobs: Tensor, *, estimator: str) -> Tensor:
    """Per-token estimates, nats, of KL(policy || reference) on tokens that the policy sampled.

    With d = reference - policy log-probability: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1
    (J. Schulman, "Approximating KL divergence", 2020).
    """
    difference = reference_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return torch.expm1(difference) - difference


def adapt_entropy_bonus(
    bonus: float, entropy: float, *, target: float, step: float, maximum: float
) -> tuple[float, float]:
    """The bonus to apply at this step, and the next step's initial bonus (Skywork-OR1, arXiv 2505.22312, section 4).

    It is applied where the mean `entropy` (nats) is at most `target`. Below the target it grows by `step`, up to
    `maximum`; else it shrinks by `step`, down to 0.
    """
    following = min(bonus + step, maximum) if entropy < target else max(bonus - step, 0.0)
    return (bonus if entropy <= target else 0.0), following
