"""The per-token streams of a step, fixed at its start: all that the objective reads besides the current policy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.methods import Method, function
from learner import erpo, ratio, token_weights
from learner.batch import StepBatch
from learner.head import HeadStats
from learner.loss import clipped_surrogate, kl, pessimistic_clip, stop_gradient_surrogate
from learner.policy.policy import Pass
from learner.selection import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Streams:
    """[N] over the scored tokens of the step, detached; nats."""

    old_logprobs_N: Tensor
    actor_logprobs_N: Tensor
    reference_logprobs_N: Tensor | None  # None: the method compares with no reference
    entropy_N: Tensor  # the one that the weights are made of
    advantages_N: Tensor
    raw_weights_N: Tensor  # before normalising
    token_weights_N: Tensor  # normalised over the step, times importance: the objective is a plain sum
    importance_N: Tensor  # weights that correct for what the actor sampled otherwise
    entropy_slopes_N: Tensor | None  # d objective / d entropy through the weights, where the method asks for it
    entropy_bonus: float  # weight of the mean entropy in the objective
    power: float  # of the power-mean ratio at this step


def fix(
    passed: Pass,
    batch: StepBatch,
    selection: Selection,
    method: Method,
    *,
    reference: Pass | None,
    vocab_size: int,
    max_tokens: int,
    entropy_bonus: float,
    power: float,
) -> Streams:
    """The streams of a step, from its first forward pass and, where the method has one, the adapter-off pass."""
    stats = passed.stats
    device = stats.logprob_N.device
    advantages_B, group_B = selection.advantages_B.to(device), selection.group_B.to(device)
    entropy_BT = batch.pad(weight_entropy(stats, method)).double().requires_grad_(method.weight_gradient)
    raw_BT = _raw_weights(entropy_BT, passed, batch, advantages_B, method, reference, vocab_size=vocab_size)
    weights_BT = token_weights.normalise(
        raw_BT, batch.mask_BT, group_B, normaliser=method.normaliser, max_tokens=max_tokens
    )
    advantages_BT = _token_advantages(entropy_BT.detach(), passed, batch, advantages_B, group_B, method, reference)
    old_logprobs_N = stats.logprob_N.detach()
    actor_logprobs_N = batch.gather([r.actor_logprobs[r.mask] for g in selection.groups for r in g.rollouts])
    importance_BT = _importance(batch.pad(old_logprobs_N - actor_logprobs_N).double(), batch, method)
    slopes_N = None
    if method.weight_gradient:  # at the step's start the ratio is 1, and the surrogate is the advantage
        (slopes_BT,) = torch.autograd.grad((weights_BT * importance_BT * advantages_BT).sum(), entropy_BT)
        slopes_N = batch.flatten(slopes_BT).float()
    return Streams(
        old_logprobs_N=old_logprobs_N,
        actor_logprobs_N=actor_logprobs_N,
        reference_logprobs_N=None if reference is None else reference.stats.logprob_N,
        entropy_N=batch.flatten(entropy_BT.detach()).float(),
        advantages_N=batch.flatten(advantages_BT).float(),
        raw_weights_N=batch.flatten(raw_BT.detach()).float(),
        token_weights_N=batch.flatten(weights_BT.detach() * importance_BT).float(),
        importance_N=batch.flatten(importance_BT).float(),
        entropy_slopes_N=slopes_N,
        entropy_bonus=entropy_bonus,
        power=power,
    )


def _raw_weights(
    entropy_BT: Tensor,
    passed: Pass,
    batch: StepBatch,
    advantages_B: Tensor,
    method: Method,
    reference: Pass | None,
    *,
    vocab_size: int,
) -> Tensor:
    """[B, T] float64, before normalising."""
    if method.token_weight == "horizon":
        raw_BT = token_weights.horizon(
            entropy_BT,
            batch.mask_BT,
            advantages_B,
            alpha=method.alpha,
            vocab_size=vocab_size,
            selective=method.selective,
        )
    elif method.token_weight == "residual":
        assert reference is not None and reference.hidden_NH is not None, "the reference pass was asked for its states"
        assert passed.hidden_NH is not None, "the pass was asked for its states"
        norm_N = (passed.hidden_NH.float() - reference.hidden_NH.float()).norm(dim=1)
        raw_BT = token_weights.residual(batch.pad(norm_N), batch.mask_BT, power=method.residual_power)
    elif method.token_weight == "uniform":
        raw_BT = token_weights.uniform(batch.mask_BT)
    else:
        raw_BT = function(method.token_weight)(entropy_BT, batch.mask_BT, advantages_B) * batch.mask_BT
    if method.top_entropy_fraction < 1:
        raw_BT = raw_BT * token_weights.top_entropy(entropy_BT, batch.mask_BT, fraction=method.top_entropy_fraction)
    return raw_BT


def _token_advantages(
    entropy_BT: Tensor,
    passed: Pass,
    batch: StepBatch,
    advantages_B: Tensor,
    group_B: Tensor,
    method: Method,
    reference: Pass | None,
) -> Tensor:
    """[B, T] float64."""
    if method.token_advantage == "broadcast":
        return advantages_B[:, None] * batch.mask_BT
    assert reference is not None, "the reference pass was asked for"
    gate_BT = erpo.gate(entropy_BT, batch.mask_BT, group_B, sharpness=method.erpo_gate)
    progress_BT = erpo.progress(
        batch.pad(passed.stats.logprob_N.detach().double()),
        batch.pad(reference.stats.logprob_N.double()),
        batch.mask_BT,
        group_B,
        scale=method.erpo_progress,
        buckets=method.erpo_buckets,
    )
    return erpo.assemble(
        advantages_B,
        gate_BT,
        progress_BT,
        batch.mask_BT,
        assembly=method.token_advantage.removeprefix("erpo-"),
        weight=method.erpo_weight,
    )


def _importance(difference_BT: Tensor, batch: StepBatch, method: Method) -> Tensor:
    """[B, T] weights from log pi_learner - log pi_actor at the step's start."""
    if method.importance == "none":
        return batch.mask_BT.to(difference_BT.dtype)
    level, kind = method.importance.split("-")
    return ratio.importance(
        difference_BT,
        batch.mask_BT,
        sequence_level=level == "sequence",
        mask_out=kind == "mask",
        cap=method.importance_cap,
    )


def weight_entropy(stats: HeadStats, method: Method) -> Tensor:
    """[N] nats: the entropy that `method` makes weights of, detached."""
    assert stats.entropy_at_one_N is not None, "the head was asked for both temperatures"
    if method.entropy == "exact":
        return stats.entropy_N.detach() if method.entropy_temperature == "sampling" else stats.entropy_at_one_N
    assert stats.topk_entropy_N is not None, "the head was asked for the top K"
    return stats.topk_entropy_N if method.entropy == "topk-renormalised" else stats.topk_partial_entropy_N


def loss(stats: HeadStats, streams: Streams, batch: StepBatch, method: Method) -> tuple[Tensor, dict[str, float]]:
    """- sum of token weight * clipped surrogate + beta * mean KL (arXiv 2606.05434, Eq. 2, 6, 9), and its terms.

    Where the method has an entropy bonus, less that times the mean entropy.
    """
    log_ratio_N = _log_ratio(stats.logprob_N, streams, batch, method)
    objective = stop_gradient_surrogate if method.ratio == "stop-gradient" else clipped_surrogate
    surrogate_N = objective(
        log_ratio_N,
        torch.zeros_like(log_ratio_N),
        streams.advantages_N,
        clip_low=method.clip_low,
        clip_high=method.clip_high,
    )
    total = -(streams.token_weights_N * surrogate_N).sum()
    if streams.entropy_slopes_N is not None:
        total = total - (streams.entropy_slopes_N * stats.entropy_N).sum()
    ratio_N = log_ratio_N.detach().exp()
    outside_N = (ratio_N < 1 - method.clip_low) | (ratio_N > 1 + method.clip_high)
    terms = {"loss/policy": total.item(), "ratio/outside_fraction": outside_N.float().mean().item()}
    if method.has_kl:
        assert streams.reference_logprobs_N is not None, "the reference pass was asked for"
        mean_kl = kl(stats.logprob_N, streams.reference_logprobs_N, estimator=method.kl).mean()
        total = total + method.beta * mean_kl
        terms["kl/mean"] = mean_kl.item()
    if streams.entropy_bonus > 0:
        total = total - streams.entropy_bonus * stats.entropy_N.mean()
    return total, terms | {"loss/total": total.item()}


def _log_ratio(logprobs_N: Tensor, streams: Streams, batch: StepBatch, method: Method) -> Tensor:
    """[N]: log of the ratio that the surrogate takes at each token."""
    difference_N = logprobs_N - streams.old_logprobs_N
    if method.ratio == "sequence":
        return batch.flatten(ratio.sequence(batch.pad(difference_N), batch.mask_BT))
    if method.ratio == "power-mean":
        if method.power_clip == "token":  # of what is clipped so, the mean lies within the same bounds
            difference_N = pessimistic_clip(
                difference_N, streams.advantages_N, clip_low=method.clip_low, clip_high=method.clip_high
            )
        return batch.flatten(ratio.power_mean(batch.pad(difference_N), batch.mask_BT, power=streams.power))
    return difference_N
