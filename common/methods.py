"""The table of methods: one row each, words and numbers only (../README.md, "Methods").

A field names a pure function of the learner (`advantage` -> learner/advantage.py, ...) or holds one of its
numbers. Every field can be overridden on the command line as --method.FIELD, so rows compose.
"""

from dataclasses import dataclass
from typing import Literal

Normaliser = Literal["sequence-mean", "group", "step"]
Entropy = Literal["exact", "topk-partial", "topk-renormalised"]
KLEstimator = Literal["none", "k1", "k2", "k3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to turn rewards and entropies into the streams of the loss.

    loss = - sum_{i,t} token_weight_{i,t} * surrogate(ratio_{i,t}, advantage_i) + beta * KL
    """

    paper: str
    equation: str
    advantage: Literal["group_std", "group_mean"] = "group_std"
    token_weight: Literal["uniform", "horizon"] = "uniform"
    alpha: float = 0.0  # horizon discount; negative amplifies uncertain tokens
    selective: bool = False  # discount only rollouts of negative advantage (Eq. 8)
    weight_gradient: bool = False  # let the gradient through w_t as well
    entropy: Entropy = "exact"
    entropy_topk: int = 500  # K of the two top-K estimates
    entropy_temperature: Literal["sampling", "one"] = "sampling"
    normaliser: Normaliser = "group"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl: KLEstimator = "k3"
    beta: float = 0.04
    drop_zero_variance: bool = False  # groups whose rewards are all equal take no part, not even in the KL
    reward_threshold: float | None = None  # groups whose reward spread (population std) is below take no part


METHODS: dict[str, Method] = {
    "grpo": Method(
        paper="arXiv 2606.05434 (after 2402.03300)",
        equation="2",
        normaliser="sequence-mean",
    ),
    "ah-grpo": Method(
        paper="arXiv 2606.05434",
        equation="3-6",
        token_weight="horizon",
        alpha=0.5,
    ),
    "sa-ah-grpo": Method(
        paper="arXiv 2606.05434",
        equation="3-5, 7-9",
        token_weight="horizon",
        alpha=0.5,
        selective=True,
    ),
}
