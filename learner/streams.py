"""The per-token streams of a step, fixed at its start: all that the objective reads besides the current policy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.methods import Method
from learner import token_weights
from learner.batch import StepBatch
from learner.head import HeadStats
from learner.loss import clipped_surrogate, kl
from learner.selection import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """[N] over the scored tokens of the step, detached; nats."""

    old_logprobs_N: Tensor
    actor_logprobs_N: Tensor
    reference_logprobs_N: Tensor | None  # None: no KL term
    entropy_N: Tensor  # the one that the weights are made of
    advantages_N: Tensor
    raw_weights_N: Tensor  # before normalising
    token_weights_N: Tensor  # normalised over the step: the objective is a plain sum
    entropy_slopes_N: Tensor | None  # d objective / d entropy through the weights, where the method asks for it
    entropy_bonus: float  # weight of the mean entropy in the objective


def fix(
    stats: HeadStats,
    batch: StepBatch,
    selection: Selection,
    method: Method,
    *,
    vocab_size: int,
    reference_logprobs_N: Tensor | None,
    entropy_bonus: float,
) -> Streams:
    """The streams of a step, from the statistics of its first forward pass."""
    device = stats.logprob_N.device
    advantages_B, group_B = selection.advantages_B.to(device), selection.group_B.to(device)
    entropy_BT = batch.pad(weight_entropy(stats, method)).double().requires_grad_(method.weight_gradient)
    raw_BT = (
        token_weights.uniform(batch.mask_BT)
        if method.token_weight == "uniform"
        else token_weights.horizon(
            entropy_BT,
            batch.mask_BT,
            advantages_B,
            alpha=method.alpha,
            vocab_size=vocab_size,
            selective=method.selective,
        )
    )
    if method.top_entropy_fraction < 1:
        raw_BT = raw_BT * token_weights.top_entropy(entropy_BT, batch.mask_BT, fraction=method.top_entropy_fraction)
    weights_BT = token_weights.normalise(raw_BT, batch.mask_BT, group_B, normaliser=method.normaliser)
    slopes_N = None
    if method.weight_gradient:  # at the step's start the ratio is 1, and the surrogate is the advantage
        (slopes_BT,) = torch.autograd.grad((weights_BT * advantages_B[:, None]).sum(), entropy_BT)
        slopes_N = batch.flatten(slopes_BT).float()
    return Streams(
        old_logprobs_N=stats.logprob_N.detach(),
        actor_logprobs_N=batch.gather([r.actor_logprobs[r.mask] for g in selection.groups for r in g.rollouts]),
        reference_logprobs_N=reference_logprobs_N,
        entropy_N=batch.flatten(entropy_BT.detach()).float(),
        advantages_N=advantages_B[batch.rollout_N].float(),
        raw_weights_N=batch.flatten(raw_BT.detach()).float(),
        token_weights_N=batch.flatten(weights_BT.detach()).float(),
        entropy_slopes_N=slopes_N,
        entropy_bonus=entropy_bonus,
    )


def weight_entropy(stats: HeadStats, method: Method) -> Tensor:
    """[N] nats: the entropy that `method` makes weights of, detached."""
    assert stats.entropy_at_one_N is not None, "the head was asked for both temperatures"
    if method.entropy == "exact":
        return stats.entropy_N.detach() if method.entropy_temperature == "sampling" else stats.entropy_at_one_N
    assert stats.topk_entropy_N is not None, "the head was asked for the top K"
    return stats.topk_entropy_N if method.entropy == "topk-renormalised" else stats.topk_partial_entropy_N


def loss(stats: HeadStats, streams: Streams, method: Method) -> tuple[Tensor, dict[str, float]]:
    """- sum of token weight * clipped surrogate + beta * mean KL (arXiv 2606.05434, Eq. 2, 6, 9), and its terms.

    Where the method has an entropy bonus, less that times the mean entropy.
    """
    surrogate_N = clipped_surrogate(
        stats.logprob_N,
        streams.old_logprobs_N,
        streams.advantages_N,
        clip_low=method.clip_low,
        clip_high=method.clip_high,
    )
    total = -(streams.token_weights_N * surrogate_N).sum()
    if streams.entropy_slopes_N is not None:
        total = total - (streams.entropy_slopes_N * stats.entropy_N).sum()
    terms = {"loss/policy": total.item()}
    if streams.reference_logprobs_N is not None:
        mean_kl = kl(stats.logprob_N, streams.reference_logprobs_N, estimator=method.kl).mean()
        total = total + method.beta * mean_kl
        terms["kl/mean"] = mean_kl.item()
    if method.has_entropy_bonus:
        total = total - streams.entropy_bonus * stats.entropy_N.mean()
    return total, terms | {"loss/total": total.item()}
