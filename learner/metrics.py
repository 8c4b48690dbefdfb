"""The metrics of a step. Means are over the scored tokens of the step."""

import math

import torch

from common.types import TokenTargets
from learner import token_weights
from learner.batch import StepBatch
from learner.head import HeadStats
from learner.loss import kl
from learner.objective import Targets
from learner.selection import Selection


def step_metrics(
    stats: HeadStats, targets: Targets, selection: Selection, batch: StepBatch, *, vocab_size: int
) -> dict[str, float]:
    """Scalars by metric name, from the first forward pass of the step. Entropies divided by log V lie in 0..1."""
    assert stats.entropy_at_one_N is not None, "the head computes both temperatures"
    negative_N = targets.advantages_N < 0
    metrics = {
        "entropy/mean": stats.entropy_N.mean().item(),
        "entropy/normalized_mean": stats.entropy_N.mean().item() / math.log(vocab_size),
        "entropy/at_one_normalized_mean": stats.entropy_at_one_N.mean().item() / math.log(vocab_size),
        "entropy/bonus": targets.entropy_bonus,
        "weight/alpha": targets.alpha,
        "weight/mean": targets.raw_weights_N.mean().item(),
        "weight/negative_mean": _mean(targets.raw_weights_N[negative_N]),  # 0 without any, as in the paper's Table 6
        "weight/effective_fraction": _effective_fraction(targets.token_weights_N),
        "weight/gini": token_weights.gini(batch.pad(targets.raw_weights_N), batch.mask_BT).mean().item(),
        "ratio/power": targets.power,
        "importance/mean": targets.importance_N.mean().item(),
        "advantage/positive_mean": _mean(targets.advantages_N[targets.advantages_N > 0]),
        "advantage/negative_mean": _mean(targets.advantages_N[negative_N]),
        "advantage/spread_within_rollouts": _std_within(batch.pad(targets.advantages_N), batch.mask_BT),
        "advantage/negative_fraction": (selection.advantages_B < 0).float().mean().item(),
        "actor_learner_kl": kl(targets.actor_logprobs_N, targets.old_logprobs_N, estimator="k3").mean().item(),
    }
    if stats.topk_mass_N is not None:
        metrics["entropy/topk_mass"] = stats.topk_mass_N.mean().item()
    return metrics


def per_rollout(
    targets: Targets, selection: Selection, batch: StepBatch, num_rollouts: int
) -> tuple[TokenTargets | None, ...]:
    """The targets of each of the step's rollouts, in their order; None for an excluded one."""
    found: list[TokenTargets | None] = [None] * num_rollouts
    for index, advantage, entropies, weights in zip(
        selection.index_B,
        selection.advantages_B.tolist(),
        batch.split(targets.entropy_N),
        batch.split(targets.raw_weights_N),
        strict=True,
    ):
        found[index] = TokenTargets(advantage=advantage, entropies=entropies, weights=weights)
    return tuple(found)


def _mean(values: torch.Tensor) -> float:
    return values.mean().item() if len(values) else 0.0


def _std_within(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """Mean over rollouts of the population std of their tokens' values: 0 where each rollout has a single value."""
    length_B1 = mask_BT.sum(dim=1, keepdim=True)
    centred_BT = (values_BT - values_BT.sum(dim=1, keepdim=True) / length_B1) * mask_BT
    return (centred_BT.square().sum(dim=1) / length_B1[:, 0]).sqrt().mean().item()


def _effective_fraction(weights_N: torch.Tensor) -> float:
    """(sum w)^2 / (N sum w^2): 1 where all weights are equal."""
    return (weights_N.sum().square() / (len(weights_N) * weights_N.square().sum())).item()
