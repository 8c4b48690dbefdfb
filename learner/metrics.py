"""What the learner can say of a step. Means are over the scored tokens of the step."""

import math

import torch

from learner.head import HeadStats
from learner.loss import kl
from learner.selection import Selection
from learner.streams import Streams


def step_metrics(stats: HeadStats, streams: Streams, selection: Selection, *, vocab_size: int) -> dict[str, float]:
    """Scalars by metric name, from the first forward pass of the step. Entropies divided by log V lie in 0..1."""
    assert stats.entropy_at_one_N is not None, "the head was asked for both temperatures"
    negative_N = streams.advantages_N < 0
    mean_negative_weight = streams.raw_weights_N[negative_N].mean().item() if negative_N.any() else 0.0
    metrics = {
        "entropy/mean": stats.entropy_N.mean().item(),
        "entropy/normalized_mean": stats.entropy_N.mean().item() / math.log(vocab_size),
        "entropy/at_one_normalized_mean": stats.entropy_at_one_N.mean().item() / math.log(vocab_size),
        "entropy/bonus": streams.entropy_bonus,
        "weight/mean": streams.raw_weights_N.mean().item(),
        "weight/negative_mean": mean_negative_weight,  # 0 where no rollout is negative, as in the paper's Table 6
        "weight/effective_fraction": _effective_fraction(streams.token_weights_N),
        "advantage/negative_fraction": (selection.advantages_B < 0).float().mean().item(),
        "actor_learner_kl": kl(streams.actor_logprobs_N, streams.old_logprobs_N, estimator="k3").mean().item(),
    }
    if stats.topk_mass_N is not None:
        metrics["entropy/topk_mass"] = stats.topk_mass_N.mean().item()
    return metrics


def _effective_fraction(weights_N: torch.Tensor) -> float:
    """(sum w)^2 / (N sum w^2): 1 where all tokens count alike."""
    return (weights_N.sum().square() / (len(weights_N) * weights_N.square().sum())).item()
