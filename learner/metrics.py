"""What the learner can say of a step. Means are over the scored tokens of the step."""

import math

import torch

from learner import token_weights
from learner.batch import StepBatch
from learner.head import HeadStats
from learner.loss import kl
from learner.selection import Selection
from learner.streams import Streams


def step_metrics(
    stats: HeadStats, streams: Streams, selection: Selection, batch: StepBatch, *, vocab_size: int
) -> dict[str, float]:
    """Scalars by metric name, from the first forward pass of the step. Entropies divided by log V lie in 0..1."""
    assert stats.entropy_at_one_N is not None, "the head was asked for both temperatures"
    negative_N = streams.advantages_N < 0
    metrics = {
        "entropy/mean": stats.entropy_N.mean().item(),
        "entropy/normalized_mean": stats.entropy_N.mean().item() / math.log(vocab_size),
        "entropy/at_one_normalized_mean": stats.entropy_at_one_N.mean().item() / math.log(vocab_size),
        "entropy/bonus": streams.entropy_bonus,
        "weight/mean": streams.raw_weights_N.mean().item(),
        "weight/negative_mean": _mean(
            streams.raw_weights_N[negative_N]
        ),  # 0 where no rollout is negative, as in the paper's Table 6
        "weight/effective_fraction": _effective_fraction(streams.token_weights_N),
        "weight/gini": token_weights.gini(batch.pad(streams.raw_weights_N), batch.mask_BT).mean().item(),
        "ratio/power": streams.power,
        "importance/mean": streams.importance_N.mean().item(),
        "advantage/positive_mean": _mean(streams.advantages_N[streams.advantages_N > 0]),
        "advantage/negative_mean": _mean(streams.advantages_N[negative_N]),
        "advantage/spread_within_rollouts": _spread_within(batch.pad(streams.advantages_N), batch.mask_BT),
        "advantage/negative_fraction": (selection.advantages_B < 0).float().mean().item(),
        "actor_learner_kl": kl(streams.actor_logprobs_N, streams.old_logprobs_N, estimator="k3").mean().item(),
    }
    if stats.topk_mass_N is not None:
        metrics["entropy/topk_mass"] = stats.topk_mass_N.mean().item()
    return metrics


def _mean(values: torch.Tensor) -> float:
    return values.mean().item() if len(values) else 0.0


def _spread_within(values_BT: torch.Tensor, mask_BT: torch.Tensor) -> float:
    """Mean over rollouts of the population std of their tokens' values: 0 where a rollout's advantage is one number."""
    length_B1 = mask_BT.sum(dim=1, keepdim=True)
    centred_BT = (values_BT - values_BT.sum(dim=1, keepdim=True) / length_B1) * mask_BT
    return (centred_BT.square().sum(dim=1) / length_B1[:, 0]).sqrt().mean().item()


def _effective_fraction(weights_N: torch.Tensor) -> float:
    """(sum w)^2 / (N sum w^2): 1 where all tokens count alike."""
    return (weights_N.sum().square() / (len(weights_N) * weights_N.square().sum())).item()
