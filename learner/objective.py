"""The objective of a method: what it demands of a forward pass, the per-token targets of a step, and the loss.

In the learner, only this file and selection.py read the method's fields.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from common.config import Config
from common.method import function
from common.methods import MethodConfig
from learner import erpo, ratio, token_weights
from learner.batch import StepBatch
from learner.head import HeadStats
from learner.loss import adapt_entropy_bonus, clipped_surrogate, kl, pessimistic_clip, stop_gradient_surrogate
from learner.policy.forward import Demands, ForwardOutput
from learner.selection import Selection


def demands(config: Config) -> Demands:
    """What the forward passes of a step must compute for the method."""
    method = config.method
    compares = method.token_advantage != "broadcast" or method.token_weight == "residual"
    return Demands(
        temperature=config.actor.temperature,
        reference=compares or _has_kl(method),
        residual=method.token_weight == "residual",
        topk=None if method.entropy == "exact" else method.entropy_topk,
        entropy_gradient=method.weight_gradient or method.entropy_bonus > 0 or method.entropy_target > 0,
        dropout=not compares,  # its noise would look like a change that the adapter has learned
    )


def _has_kl(method: MethodConfig) -> bool:
    """Whether the loss contains the divergence from the frozen model."""
    return method.kl != "none" and method.beta > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The per-token targets, fixed at the start of a step: [N] over its scored tokens, detached; nats."""

    alpha: float  # the horizon discount
    old_logprobs_N: Tensor
    actor_logprobs_N: Tensor
    reference_logprobs_N: Tensor | None  # None without a reference pass
    entropy_N: Tensor  # the one that the token weights are made of
    advantages_N: Tensor
    raw_weights_N: Tensor  # before normalising
    token_weights_N: Tensor  # normalised over the mini-batch, times importance: the objective is a plain sum
    importance_N: Tensor  # corrects for the difference between the policies of actor and learner
    entropy_slopes_N: Tensor | None  # d objective / d entropy through the weights, for method.weight_gradient
    entropy_bonus: float  # weight of the mean entropy in the objective
    next_entropy_bonus: float  # its value after this step
    power: float  # p of the power-mean ratio

    def part(self, tokens_n: slice) -> "Targets":
        """The targets of some of the tokens."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        columns: dict[str, Any] = {name: value[tokens_n] for name, value in values.items() if torch.is_tensor(value)}
        return replace(self, **columns)


class Objective:
    """A method's objective. Its only state is the adaptive entropy bonus."""

    def __init__(self, config: Config, vocab_size: int) -> None:
        assert config.method.importance != "auto", "the plan resolves auto"
        self.method = config.method
        self.demands = demands(config)
        self.num_steps = config.run.steps
        self.max_tokens = config.actor.max_tokens
        self.vocab_size = vocab_size
        self.entropy_bonus = self.method.entropy_bonus

    def targets(
        self, output: ForwardOutput, reference: ForwardOutput | None, batch: StepBatch, selection: Selection, step: int
    ) -> Targets:
        """The targets of 0-based `step`, from its first forward pass and, if demanded, the reference pass."""
        method, stats = self.method, output.stats
        device = stats.logprob_N.device
        advantages_B, group_B = selection.advantages_B.to(device), selection.group_B.to(device)
        entropy_BT = batch.pad(self._weight_entropy(stats)).double().requires_grad_(method.weight_gradient)
        alpha = self._alpha(step)
        raw_BT = self._raw_weights(entropy_BT, output, batch, advantages_B, alpha)
        of_mini_batches = [each.rollouts for each in batch.mini_batches]
        weights_BT = torch.cat([self._normalised(raw_BT[b], batch.mask_BT[b], group_B[b]) for b in of_mini_batches])
        advantages_BT = self._token_advantages(entropy_BT.detach(), output, batch, advantages_B, group_B, reference)
        old_logprobs_N = stats.logprob_N.detach()
        actor_logprobs_N = batch.gather([r.actor_logprobs[r.mask] for g in selection.groups for r in g.rollouts])
        importance_BT = self._importance(batch.pad(old_logprobs_N - actor_logprobs_N).double(), batch)
        slopes_N = None
        if method.weight_gradient:  # the ratio is 1 at the step's start, so the surrogate is the advantage
            (slopes_BT,) = torch.autograd.grad((weights_BT * importance_BT * advantages_BT).sum(), entropy_BT)
            slopes_N = batch.flatten(slopes_BT).float()
        entropy_bonus, next_entropy_bonus = self._entropy_bonuses(stats)
        return Targets(
            alpha=alpha,
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
            next_entropy_bonus=next_entropy_bonus,
            power=self._power(step),
        )

    def loss(self, output: ForwardOutput, targets: Targets, batch: StepBatch) -> tuple[Tensor, dict[str, float]]:
        """- sum of token weight * clipped surrogate + beta * mean KL (arXiv 2606.05434, Eq. 2, 6, 9), and its terms.

        An entropy bonus subtracts the mean entropy times the bonus.
        """
        method, stats = self.method, output.stats
        log_ratio_N = self._log_ratio(stats.logprob_N, targets, batch)
        surrogate = stop_gradient_surrogate if method.ratio == "stop-gradient" else clipped_surrogate
        surrogate_N = surrogate(
            log_ratio_N,
            torch.zeros_like(log_ratio_N),
            targets.advantages_N,
            clip_low=method.clip_low,
            clip_high=method.clip_high,
        )
        total = -(targets.token_weights_N * surrogate_N).sum()
        if targets.entropy_slopes_N is not None:
            total = total - (targets.entropy_slopes_N * stats.entropy_N).sum()
        ratio_N = log_ratio_N.detach().exp()
        outside_N = (ratio_N < 1 - method.clip_low) | (ratio_N > 1 + method.clip_high)
        terms = {"loss/policy": total.item(), "ratio/outside_fraction": outside_N.float().mean().item()}
        if _has_kl(method):
            assert targets.reference_logprobs_N is not None, "the reference pass was demanded"
            mean_kl = kl(stats.logprob_N, targets.reference_logprobs_N, estimator=method.kl).mean()
            total = total + method.beta * mean_kl
            terms["kl/mean"] = mean_kl.item()
        if targets.entropy_bonus > 0:
            total = total - targets.entropy_bonus * stats.entropy_N.mean()
        return total, terms | {"loss/total": total.item()}

    def _raw_weights(
        self,
        entropy_BT: Tensor,
        output: ForwardOutput,
        batch: StepBatch,
        advantages_B: Tensor,
        alpha: float,
    ) -> Tensor:
        """[B, T] float64: token weights before normalising."""
        method = self.method
        if method.token_weight == "horizon":
            raw_BT = token_weights.horizon(
                entropy_BT,
                batch.mask_BT,
                advantages_B,
                alpha=alpha,
                vocab_size=self.vocab_size,
                selective=method.selective,
            )
        elif method.token_weight == "residual":
            assert output.residual_N is not None, "the residual was demanded"
            raw_BT = token_weights.residual(batch.pad(output.residual_N), batch.mask_BT, power=method.residual_power)
        elif method.token_weight == "uniform":
            raw_BT = token_weights.uniform(batch.mask_BT)
        else:
            raw_BT = function(method.token_weight)(entropy_BT, batch.mask_BT, advantages_B) * batch.mask_BT
        if method.top_entropy_fraction < 1:
            raw_BT = raw_BT * token_weights.top_entropy(entropy_BT, batch.mask_BT, fraction=method.top_entropy_fraction)
        return raw_BT

    def _normalised(self, raw_BT: Tensor, mask_BT: Tensor, group_B: Tensor) -> Tensor:
        """[B, T]: the weights of one mini-batch, normalised over it."""
        return token_weights.normalise(
            raw_BT, mask_BT, group_B - group_B[0], normaliser=self.method.normaliser, max_tokens=self.max_tokens
        )

    def _token_advantages(
        self,
        entropy_BT: Tensor,
        output: ForwardOutput,
        batch: StepBatch,
        advantages_B: Tensor,
        group_B: Tensor,
        reference: ForwardOutput | None,
    ) -> Tensor:
        """[B, T] float64: the advantage of each token."""
        method = self.method
        if method.token_advantage == "broadcast":
            return advantages_B[:, None] * batch.mask_BT
        assert reference is not None, "the reference pass was demanded"
        gate_BT = erpo.gate(entropy_BT, batch.mask_BT, group_B, sharpness=method.erpo_gate)
        progress_BT = erpo.progress(
            batch.pad(output.stats.logprob_N.detach().double()),
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

    def _importance(self, difference_BT: Tensor, batch: StepBatch) -> Tensor:
        """[B, T] weights from log pi_learner - log pi_actor at the step's start."""
        if self.method.importance == "none":
            return batch.mask_BT.to(difference_BT.dtype)
        level, kind = self.method.importance.split("-")
        return ratio.importance(
            difference_BT,
            batch.mask_BT,
            sequence_level=level == "sequence",
            mask_out=kind == "mask",
            cap=self.method.importance_cap,
        )

    def _weight_entropy(self, stats: HeadStats) -> Tensor:
        """[N] nats: the entropy that the token weights are made of, detached."""
        assert stats.entropy_at_one_N is not None, "the head computes both temperatures"
        if self.method.entropy == "exact":
            sampling = self.method.entropy_temperature == "sampling"
            return stats.entropy_N.detach() if sampling else stats.entropy_at_one_N
        assert stats.topk_entropy_N is not None, "top-K statistics were demanded"
        return stats.topk_entropy_N if self.method.entropy == "topk-renormalised" else stats.topk_partial_entropy_N

    def _log_ratio(self, logprobs_N: Tensor, targets: Targets, batch: StepBatch) -> Tensor:
        """[N]: log of the ratio in the surrogate of each token."""
        method = self.method
        difference_N = logprobs_N - targets.old_logprobs_N
        if method.ratio == "sequence":
            return batch.flatten(ratio.sequence(batch.pad(difference_N), batch.mask_BT))
        if method.ratio == "power-mean":
            if method.power_clip == "both":
                difference_N = difference_N.clamp(-math.log1p(method.clip_low), math.log1p(method.clip_high))
            if method.power_clip == "token":  # their mean then lies within the bounds too
                difference_N = pessimistic_clip(
                    difference_N, targets.advantages_N, clip_low=method.clip_low, clip_high=method.clip_high
                )
            return batch.flatten(ratio.power_mean(batch.pad(difference_N), batch.mask_BT, power=targets.power))
        return difference_N

    def _power(self, step: int) -> float:
        """p of the power-mean ratio at 0-based `step`: linear from power_start to power_end, where it stays."""
        method = self.method
        return linear(method.power_start, method.power_end, step, method.power_steps or self.num_steps - 1)

    def _alpha(self, step: int) -> float:
        """The horizon discount at 0-based `step`."""
        alpha, end = self.method.alpha, self.method.alpha_end
        return alpha if end == "alpha" else linear(alpha, end, step, self.num_steps - 1)

    def _entropy_bonuses(self, stats: HeadStats) -> tuple[float, float]:
        """The bonus of this step and of the next."""
        if self.method.entropy_target == 0:
            return self.entropy_bonus, self.entropy_bonus
        return adapt_entropy_bonus(
            self.entropy_bonus,
            stats.entropy_N.mean().item(),
            target=self.method.entropy_target,
            step=self.method.entropy_bonus_step,
            maximum=self.method.entropy_bonus_max,
        )


def linear(start: float, end: float, step: int, num_steps: int) -> float:
    """A value that changes linearly from `start` at step 0 to `end` at step `num_steps`, where it stays."""
    return start + min(1.0, step / max(1, num_steps)) * (end - start)
